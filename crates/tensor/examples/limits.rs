//! Prints how close the kernels come to this machine's measured limits: percent of the multiply-add peak and of the
//! read bandwidth. Limit and kernel are measured in turn, round after round, because other programs disturb both;
//! medians and bests are compared.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints; its sizes are its own")]

use std::hint::black_box;
use std::time::Instant;

use pocketglm_tensor::{
    Cpu, DType, KvFormat, KvRows, Packed, PackedFormat, RowCodes, ScaleKind, Weight, ZeroKind, ops, peak,
};

/// Median and best of rates.
fn summary(mut rates: Vec<f64>) -> (f64, f64) {
    rates.sort_by(f64::total_cmp);
    (rates[rates.len() / 2], rates[rates.len() - 1])
}

/// Alternates the limit and the kernel; `work` is in units (operations or bytes) of 1e9.
fn compare(
    name: &str,
    unit: &str,
    rounds: usize,
    work: f64,
    limit: &dyn Fn() -> f64,
    kernel: &mut dyn FnMut(),
) {
    kernel();
    let (mut limits, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        limits.push(limit());
        let start = Instant::now();
        kernel();
        rates.push(work / start.elapsed().as_secs_f64());
    }
    let ((limit, limit_best), (rate, rate_best)) = (summary(limits), summary(rates));
    println!(
        "{name:44} median {rate:7.1} of {limit:7.1} {unit} = {:5.1} %   best {rate_best:7.1} of {limit_best:7.1} = {:5.1} %",
        100.0 * rate / limit,
        100.0 * rate_best / limit_best
    );
}

/// Values in -1..1 without a pattern that caches or predictors like.
fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A packed matrix of random codes; scales repeat, since nothing depends on them.
fn random(cpu: &Cpu, format: PackedFormat, n: usize, k: usize) -> Packed {
    let group = if format.group == 0 { k } else { format.group };
    let nested = format.scale == ScaleKind::Nested;
    let halves = if nested { k / 256 } else { k / group };
    let minima = format.zero == ZeroKind::Minima;
    let row = |i: usize, row: &mut RowCodes| {
        let mut state = i as u32;
        row.codes.clear();
        row.codes.extend((0..k).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 20) as u8 & ((1u16 << format.bits) - 1) as u8
        }));
        row.scales = vec![0x2000; halves];
        row.minima = vec![0x2000; if minima { halves } else { 0 }];
        row.sub_scales = vec![3; if nested { k / group } else { 0 }];
        let bytes = nested && minima || format.zero == ZeroKind::Codes;
        row.sub_minima = vec![3; if bytes { k / group } else { 0 }];
        Ok(())
    };
    Packed::pack(cpu, format, n, k, &row).unwrap()
}

fn main() {
    let only: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| name.contains(o.as_str()));
    let rounds = std::env::var("ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(15);
    let threads = std::env::var("THREADS").ok().and_then(|r| r.parse().ok()).unwrap_or(0);
    let cpu = Cpu::new(threads).unwrap();
    println!("{} with {} threads", cpu.isa(), cpu.threads());
    let flops = || peak::fma_gflops(&cpu, 20);
    let buffer = peak::read_buffer(1 << 29).unwrap();
    let bytes = || peak::read_gbytes(&cpu, &buffer);

    let dots = || peak::dot_gops(&cpu, 20);
    for (n, k) in [(4096, 4096), (27392, 4096), (4096, 13696)] {
        for name in ["Q4_0", "Q8_0", "Q4_K", "Q5_0", "Q6_K", "int4-g64", "int4-g128", "int2-g64"] {
            let Some(format) = DType::from_name(name).and_then(PackedFormat::of) else { continue };
            if format.scale == ScaleKind::Nested && k % 256 != 0 {
                continue;
            }
            let cases = [1, 2, 4, 16, 64, 512].map(|m| (m, format!("linear {name} m={m} n={n} k={k}")));
            if !cases.iter().any(|(_, case)| wanted(case)) {
                continue;
            }
            let packed = random(&cpu, format, n, k);
            let parts = [ops::Part { weight: Weight::Packed(&packed), rows: n, bias: None }];
            for (m, case) in cases {
                if !wanted(&case) {
                    continue;
                }
                let x = values(m * k);
                let mut y = vec![0.0; m * n];
                let run = &mut || {
                    ops::linear(&cpu, black_box(&x), m, k, &parts, ops::Epilogue::None, &mut y).unwrap();
                };
                if m <= 4 {
                    compare(&case, "GB/s", rounds, packed.bytes().len() as f64 * 1e-9, &bytes, run);
                } else {
                    compare(&case, "GOP/s", rounds, 2.0 * (m * n * k) as f64 * 1e-9, &dots, run);
                }
            }
        }
    }

    // Layers of a speech encoder with a scale for each row of weights, on half a minute.
    for (m, n, k) in [(1499, 3072, 768), (1499, 768, 3072), (1499, 2304, 768), (12_000, 512, 1536)] {
        let name = format!("linear int8-row m={m} n={n} k={k}");
        let Some(format) = DType::from_name("int8-row").and_then(PackedFormat::of) else { continue };
        if !wanted(&name) {
            continue;
        }
        let packed = random(&cpu, format, n, k);
        let parts = [ops::Part { weight: Weight::Packed(&packed), rows: n, bias: None }];
        let x = values(m * k);
        let mut y = vec![0f32; m * n];
        let run = &mut || {
            ops::linear(&cpu, black_box(&x), m, k, &parts, ops::Epilogue::None, &mut y).unwrap();
        };
        compare(&name, "GOP/s", rounds, 2.0 * (m * n * k) as f64 * 1e-9, &dots, run);
    }
    for (n, k) in [(4096, 4096), (27392, 4096), (4096, 13696)] {
        let f32s = values(n * k);
        let halves: Vec<u16> = f32s.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        let f16s: Vec<u16> = f32s.iter().map(|&v| half::f16::from_f32(v).to_bits()).collect();
        for (kind, weight, size) in [
            ("f32", Weight::F32(&f32s), 4),
            ("bf16", Weight::BF16(&halves), 2),
            ("f16", Weight::F16(&f16s), 2),
        ] {
            let parts = [ops::Part { weight, rows: n, bias: None }];
            for m in [1, 2, 4, 8, 16, 64, 512] {
                let name = format!("linear {kind} m={m} n={n} k={k}");
                if !wanted(&name) {
                    continue;
                }
                let x = values(m * k);
                let mut y = vec![0f32; m * n];
                let mut run = || {
                    ops::linear(&cpu, &x, m, k, &parts, ops::Epilogue::None, &mut y).unwrap();
                    black_box(&y);
                };
                if m <= 8 {
                    compare(&name, "GB/s", rounds, (n * k * size) as f64 * 1e-9, &bytes, &mut run);
                } else {
                    compare(&name, "GFLOP/s", rounds, 2.0 * (m * n * k) as f64 * 1e-9, &flops, &mut run);
                }
            }
        }
    }

    for (name, t, s, h, kvh, mask) in [
        ("attention vision", 3268, 3268, 12, 12, ops::Mask::Full),
        ("attention prefill", 1024, 1024, 32, 2, ops::Mask::Causal { past: 0 }),
    ] {
        if !wanted(name) {
            continue;
        }
        let d = 128;
        let (q, k, v) = (values(t * h * d), values(s * kvh * d), values(s * kvh * d));
        let args = ops::Attention {
            q: &q,
            q_stride: h * d,
            k: KvRows::f32(&k, kvh * d),
            v: KvRows::f32(&v, kvh * d),
            t,
            s,
            h,
            kvh,
            d,
            scale: 0.088,
            mask,
            out_stride: h * d,
            fewer: false,
        };
        let mut out = vec![0f32; t * h * d];
        let seen = if mask == ops::Mask::Full { t * s } else { t * (t + 1) / 2 };
        let work = 4.0 * (seen * h * d) as f64 * 1e-9;
        compare(name, "GFLOP/s", rounds, work, &flops, &mut || {
            ops::attention(&cpu, &args, &mut out).unwrap();
            black_box(&out);
        });
    }
    for format in KvFormat::ALL {
        for s in [512, 4096] {
            let name = format!("attention decode {format} s={s}");
            if !wanted(&name) {
                continue;
            }
            let (h, kvh, d) = (32, 2, 128);
            let stride = kvh * format.head_bytes(d).unwrap();
            let cache = |x: &[f32]| {
                let mut bytes = vec![0u8; s * stride];
                ops::kv_store(&cpu, x, kvh * d, [s, kvh, d], format, &mut bytes).unwrap();
                bytes
            };
            // Many caches, so that none of them stays in the processor's.
            let count = ((1 << 28) / (s * kvh * d * 8)).max(2);
            let x = values(s * kvh * d + count);
            let caches: Vec<_> = (0..count).map(|i| (cache(&x[i..]), cache(&x[count - i..]))).collect();
            let q = values(h * d);
            let mut out = vec![0f32; h * d];
            let work = (caches.len() * s * stride * 2) as f64 * 1e-9;
            compare(&name, "GB/s", rounds, work, &bytes, &mut || {
                for (k, v) in &caches {
                    let args = ops::Attention {
                        q: &q,
                        q_stride: h * d,
                        k: KvRows::new(format, k, stride),
                        v: KvRows::new(format, v, stride),
                        t: 1,
                        s,
                        h,
                        kvh,
                        d,
                        scale: 0.088,
                        mask: ops::Mask::Causal { past: s - 1 },
                        out_stride: h * d,
                        fewer: false,
                    };
                    ops::attention(&cpu, &args, &mut out).unwrap();
                }
            });
        }
    }
}
