//! Single kernels against the machine's limits.

use std::fmt::Write as _;
use std::hint::black_box;

use pocketglm_tensor::{Bytes, Cpu, DType, KvRows, Packed, PackedFormat, Weight, ops, peak};

use super::measure::{Line, alternate};
use super::samples::{self, values};
use crate::Result;

/// Formats of quantised weights that are measured.
const FORMATS: [&str; 6] = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "int4-g64", "int2-g64"];
/// Bytes of weights that a matrix x vector kernel reads before it comes back to the same ones: several times what
/// the caches hold, as in a model.
const ROUND_TRIP: usize = 256 << 20;

/// The section of the report.
pub fn section(cpu: &Cpu, rounds: usize, quick: bool) -> Result<String> {
    let mut text = String::from(
        "One row of x is held against the read bandwidth, more rows against the peak of f32 multiply-adds or, for \
         quantised weights, of byte dot products. Limits are measured between the kernel's rounds.\n\n",
    );
    text.push_str("| kernel | measured | limit | share |\n| --- | --- | --- | --- |\n");
    for line in lines(cpu, rounds, quick)? {
        let _ = writeln!(
            text,
            "| {} | {:.1} {} | {:.1} | {:.0} % |",
            line.name,
            line.rate,
            line.unit,
            line.limit,
            line.share()
        );
    }
    Ok(text)
}

/// Limits, to be measured whenever they are asked for.
struct Limits<'a> {
    cpu: &'a Cpu,
    milliseconds: u32,
    buffer: peak::ReadBuffer,
}

impl Limits<'_> {
    fn flops(&self) -> f64 {
        peak::fma_gflops(self.cpu, self.milliseconds)
    }

    fn dots(&self) -> f64 {
        peak::dot_gops(self.cpu, self.milliseconds)
    }

    fn bytes(&self) -> f64 {
        peak::read_gbytes(self.cpu, &self.buffer)
    }
}

fn lines(cpu: &Cpu, rounds: usize, quick: bool) -> Result<Vec<Line>> {
    let limits = Limits {
        cpu,
        milliseconds: if quick { 2 } else { 20 },
        buffer: peak::read_buffer(if quick { 1 << 20 } else { 1 << 29 })?,
    };
    let mut lines = Vec::new();
    // The decoder's matrices: gate-up, down, o_proj; rows are outputs.
    let shapes = if quick { vec![(96, 64)] } else { vec![(27_392, 4096), (4096, 13_696), (4096, 4096)] };
    for (n, k) in shapes {
        let f32s = values(n * k);
        let halves: Vec<u16> = f32s.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        for (kind, weight, size) in [("f32", Weight::F32(&f32s), 4), ("bf16", Weight::BF16(&halves), 2)] {
            for m in if quick { vec![1, 20] } else { vec![1, 64, 512] } {
                let name = format!("linear {kind}, {m} x {k} by {n}");
                let mut kernel = linear(cpu, vec![weight], m, k, n);
                let (unit, (rate, limit)) = if m == 1 {
                    let work = (n * k * size) as f64 / 1e9;
                    ("GB/s", alternate(rounds, work, &|| limits.bytes(), &mut kernel)?)
                } else {
                    let work = 2.0 * m as f64 * n as f64 * k as f64 / 1e9;
                    ("GFLOP/s", alternate(rounds, work, &|| limits.flops(), &mut kernel)?)
                };
                lines.push(Line { name, rate, limit, unit });
            }
        }
    }
    let shapes = if quick { vec![(96, 512)] } else { vec![(27_392, 4096), (4096, 4096)] };
    for (n, k) in shapes {
        for name in FORMATS {
            lines.extend(packed(&limits, rounds, name, n, k, quick)?);
        }
    }
    lines.push(attention(cpu, rounds, if quick { 40 } else { 3268 }, &|| limits.flops())?);
    Ok(lines)
}

/// `m` rows of x times each of `weights` in turn.
fn linear<'a>(
    cpu: &'a Cpu,
    weights: Vec<Weight<'a>>,
    m: usize,
    k: usize,
    n: usize,
) -> impl FnMut() -> Result<()> + 'a {
    let (x, mut y) = (values(m * k), vec![0.0; m * n]);
    move || {
        for &weight in &weights {
            let parts = [ops::Part { weight, rows: n, bias: None }];
            ops::linear(cpu, &x, m, k, &parts, ops::Epilogue::None, &mut y)?;
            black_box(&mut y);
        }
        Ok(())
    }
}

/// A quantised matrix at one row of x, and at many.
fn packed(
    limits: &Limits<'_>,
    rounds: usize,
    name: &str,
    n: usize,
    k: usize,
    quick: bool,
) -> Result<Vec<Line>> {
    let Some(format) = DType::from_name(name).and_then(PackedFormat::of) else {
        return Err(crate::Error::Content {
            place: "the formats of the bench".into(),
            wanted: "a format that is computed with".into(),
            found: name.into(),
        });
    };
    let first = samples::packed(limits.cpu, format, n, k)?;
    let bytes = first.bytes().len();
    let copies = if quick { 1 } else { ROUND_TRIP.div_ceil(bytes) };
    let copy = |_| Ok(Packed::from_bytes(format, n, k, Bytes::from(first.bytes().to_vec()))?);
    let mut all: Vec<Packed> = (1..copies).map(copy).collect::<Result<_>>()?;
    all.push(first.clone());
    let weights = all.iter().map(Weight::Packed).collect();
    let work = (copies * bytes) as f64 / 1e9;
    let mut kernel = linear(limits.cpu, weights, 1, k, n);
    let (rate, limit) = alternate(rounds, work, &|| limits.bytes(), &mut kernel)?;
    let one = Line { name: format!("linear {name}, 1 x {k} by {n}"), rate, limit, unit: "GB/s" };

    let m = if quick { 20 } else { 512 };
    let work = 2.0 * m as f64 * n as f64 * k as f64 / 1e9;
    let mut kernel = linear(limits.cpu, vec![Weight::Packed(&first)], m, k, n);
    let (rate, limit) = alternate(rounds, work, &|| limits.dots(), &mut kernel)?;
    let many = Line { name: format!("linear {name}, {m} x {k} by {n}"), rate, limit, unit: "GOP/s" };
    Ok(vec![one, many])
}

/// Attention of one vision block over the patches of a 540x1200 picture.
fn attention(cpu: &Cpu, rounds: usize, t: usize, flops: &dyn Fn() -> f64) -> Result<Line> {
    let (h, d) = (12, 128);
    let (qkv, mut out) = (values(t * 3 * h * d), vec![0.0; t * h * d]);
    let stride = 3 * h * d;
    let mut kernel = || {
        let arguments = ops::Attention {
            q: &qkv,
            q_stride: stride,
            k: KvRows::f32(&qkv[h * d..], stride),
            v: KvRows::f32(&qkv[2 * h * d..], stride),
            t,
            s: t,
            h,
            kvh: h,
            d,
            scale: 0.088,
            mask: ops::Mask::Full,
            out_stride: h * d,
            fewer: false,
        };
        ops::attention(cpu, &arguments, &mut out)?;
        black_box(&mut out);
        Ok(())
    };
    let work = 4.0 * (t * t * h * d) as f64 / 1e9;
    let (rate, limit) = alternate(rounds.min(3), work, flops, &mut kernel)?;
    Ok(Line { name: format!("attention, {t} patches, {h} heads of {d}"), rate, limit, unit: "GFLOP/s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_bench_runs_and_has_a_rate() {
        let cpu = Cpu::new(2).unwrap();
        let lines = lines(&cpu, 1, true).unwrap();
        // Two element types and six formats, at one row and at many; attention.
        assert_eq!(lines.len(), 17);
        assert!(lines.iter().all(|l| l.rate > 0.0 && l.limit > 0.0));
    }
}
