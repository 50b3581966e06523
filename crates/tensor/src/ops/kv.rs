//! Rows of keys or values into a cache: `out[i] = stored(x[i])`, `x: [t, heads, d]` with rows `x_stride` floats apart,
//! `out: [t, heads]` heads in a [`KvFormat`], one after the other.
//!
//! Per head of Int8: `scale = up(max |x| / 127)`, `code = round(x / scale)`. Per group of Int4: `minimum = down(min x)`,
//! `scale = up((max x - minimum) / 15)`, `code = round((x - minimum) / scale)`; `up` and `down` round to bfloat16.
//! A head or group with a value that is not finite becomes NaN as a whole, so that it is noticed.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{SharedMut, count, expect_strided, for_rows};
use crate::kv::{GROUP4, GROUP4_BYTES, SCALE_BYTES};
use crate::simd::{Element, Kernel, Simd};
use crate::{Cpu, Error, KvFormat, Result};

const OP: &str = "kv_store";

/// Bytes of a row of `out`.
fn check(
    x: &[f32],
    x_stride: usize,
    [t, heads, d]: [usize; 3],
    format: KvFormat,
    out: &[u8],
) -> Result<usize> {
    if heads == 0 || d == 0 {
        return Err(Error::Value { op: OP, what: format!("{heads} heads of {d} components") });
    }
    expect_strided(OP, "x", t, count(OP, "x", &[heads, d])?, x_stride, x.len())?;
    let head = format.head_bytes(d).and_then(|b| b.checked_mul(heads));
    let row =
        head.ok_or_else(|| Error::Value { op: OP, what: format!("{heads} heads of {d} components") })?;
    let wanted = count(OP, "out", &[t, row])?;
    if wanted != out.len() {
        return Err(Error::Size { op: OP, operand: "out", wanted, found: out.len() });
    }
    Ok(row)
}

/// See the module.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn kv_store(
    cpu: &Cpu,
    x: &[f32],
    x_stride: usize,
    shape: [usize; 3],
    format: KvFormat,
    out: &mut [u8],
) -> Result<()> {
    let row = check(x, x_stride, shape, format, out)?;
    let [t, heads, d] = shape;
    let to = SharedMut::new(out);
    for_rows(cpu, t, heads * d, &|rows| {
        for i in rows {
            // SAFETY: the row was checked to lie in `out`, and this task alone writes it.
            let out = unsafe { to.slice(i * row..(i + 1) * row) };
            let x = &x[i * x_stride..][..heads * d];
            match format {
                KvFormat::F32 => out.copy_from_slice(bytemuck::cast_slice(x)),
                KvFormat::F16 => store_f16(x, out),
                KvFormat::Int8 | KvFormat::Int4 => cpu.isa().run(Store { x, d, format, out }),
            }
        }
    });
    Ok(())
}

fn store_f16(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.chunks(64).zip(out.chunks_mut(128)) {
        let mut halves = [f16::ZERO; 64];
        let halves = &mut halves[..x.len()];
        halves.convert_from_f32_slice(x);
        out.copy_from_slice(bytemuck::cast_slice(halves.reinterpret_cast()));
    }
}

/// The bits of the smallest bfloat16 that is not below `x >= 0`; NaN stays.
#[inline(always)]
fn up(x: f32) -> u16 {
    if x.is_nan() { 0x7fc0 } else { (x.to_bits().saturating_add(0xffff) >> 16) as u16 }
}

/// The bits of the largest bfloat16 that is not above `x`; NaN stays.
#[inline(always)]
fn down(x: f32) -> u16 {
    if x.is_nan() {
        0x7fc0
    } else if x.is_sign_negative() {
        (x.to_bits().saturating_add(0xffff) >> 16) as u16
    } else {
        (x.to_bits() >> 16) as u16
    }
}

#[inline(always)]
fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// One row in a format of codes.
struct Store<'a> {
    x: &'a [f32],
    d: usize,
    format: KvFormat,
    out: &'a mut [u8],
}

/// Smallest and largest value, and NaN where a value is not finite, else zero.
#[inline(always)]
fn range<S: Simd>(s: S, x: &[f32]) -> (f32, f32, f32) {
    let (mut least, mut most, mut odd) = (s.splat(f32::INFINITY), s.splat(f32::NEG_INFINITY), s.splat(0.0));
    for x in x.chunks(S::WIDTH) {
        if x.len() == S::WIDTH {
            let v = s.load_slice(x);
            least = s.min(v, least);
            most = s.max(v, most);
            odd = s.add(odd, s.mul(v, s.splat(0.0)));
        } else {
            for &x in x {
                least = s.min(s.splat(x), least);
                most = s.max(s.splat(x), most);
                odd = s.add(odd, s.splat(x * 0.0));
            }
        }
    }
    let least = -s.reduce_max(s.sub(s.splat(0.0), least));
    (least, s.reduce_max(most), s.reduce_add(odd))
}

/// `codes[i] = round((x[i] - from) / scale)`, zeros where the scale is.
#[inline(always)]
fn codes<S: Simd>(s: S, x: &[f32], from: f32, scale: f32, out: &mut [i32]) {
    for (x, out) in x.chunks(S::WIDTH).zip(out.chunks_mut(S::WIDTH)) {
        let mut lanes = [0f32; 16];
        let v = s.round(s.div(s.sub(s.load_slice(x), s.splat(from)), s.splat(scale)));
        // SAFETY: no vector has more lanes.
        unsafe { s.store(lanes.as_mut_ptr(), v) };
        for (code, v) in out.iter_mut().zip(lanes) {
            // A conversion of NaN, from a scale of zero or NaN, gives zero.
            *code = v as i32;
        }
    }
}

impl Kernel for Store<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Store { x, d, format, out } = self;
        let mut block = [0i32; 64];
        if format == KvFormat::Int8 {
            for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(SCALE_BYTES + d)) {
                let (least, most, odd) = range(s, x);
                let scale = up((-least).max(most) / 127.0 + odd);
                let (head, out) = out.split_at_mut(SCALE_BYTES);
                head.copy_from_slice(&scale.to_le_bytes());
                for (x, out) in x.chunks(64).zip(out.chunks_mut(64)) {
                    codes(s, x, 0.0, bf16_value(scale), &mut block[..x.len()]);
                    for (to, code) in out.iter_mut().zip(block) {
                        *to = code.clamp(-127, 127) as u8;
                    }
                }
            }
            return;
        }
        let groups = d.div_ceil(GROUP4);
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(groups * GROUP4_BYTES)) {
            for (x, out) in x.chunks(GROUP4).zip(out.chunks_exact_mut(GROUP4_BYTES)) {
                let (least, most, odd) = range(s, x);
                // Zero has one sign, so that every instruction set gives the same bits.
                let minimum = down(least + odd);
                let scale = up((most - bf16_value(minimum)) / 15.0 + odd);
                out[..2].copy_from_slice(&scale.to_le_bytes());
                out[2..4].copy_from_slice(&minimum.to_le_bytes());
                block[..GROUP4].fill(0);
                codes(s, x, bf16_value(minimum), bf16_value(scale), &mut block[..x.len()]);
                for (i, to) in out[4..].iter_mut().enumerate() {
                    let code = |i: usize| block[i].clamp(0, 15) as u8;
                    *to = code(i) | code(i + GROUP4 / 2) << 4;
                }
            }
        }
    }
}

/// The scalar twin of [`kv_store`], with the same bits.
pub fn kv_store_twin(
    x: &[f32],
    x_stride: usize,
    shape: [usize; 3],
    format: KvFormat,
    out: &mut [u8],
) -> Result<()> {
    let row = check(x, x_stride, shape, format, out)?;
    let [t, heads, d] = shape;
    let head = row / heads.max(1);
    for i in 0..t * heads {
        let x = &x[i / heads * x_stride + i % heads * d..][..d];
        let out = &mut out[i * head..(i + 1) * head];
        let finite = |x: &[f32]| x.iter().all(|v| v.is_finite());
        match format {
            KvFormat::F32 => {
                x.iter().zip(out.chunks_mut(4)).for_each(|(x, o)| o.copy_from_slice(&x.to_le_bytes()))
            }
            KvFormat::F16 => x
                .iter()
                .zip(out.chunks_mut(2))
                .for_each(|(&x, o)| o.copy_from_slice(&f16::from_f32(x).to_le_bytes())),
            KvFormat::Int8 => {
                let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let bits = if finite(x) { up(most / 127.0) } else { up(f32::NAN) };
                out[..2].copy_from_slice(&bits.to_le_bytes());
                for (x, o) in x.iter().zip(&mut out[SCALE_BYTES..]) {
                    let code = (x / bf16_value(bits)).round_ties_even();
                    *o = (code as i32).clamp(-127, 127) as u8;
                }
            }
            KvFormat::Int4 => {
                for (x, o) in x.chunks(GROUP4).zip(out.chunks_mut(GROUP4_BYTES)) {
                    let least = x.iter().copied().fold(f32::INFINITY, f32::min);
                    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let minimum = if finite(x) { down(least + 0.0) } else { down(f32::NAN) };
                    let scale = up((most - bf16_value(minimum)) / 15.0 + 0.0);
                    o[..2].copy_from_slice(&scale.to_le_bytes());
                    o[2..4].copy_from_slice(&minimum.to_le_bytes());
                    o[4..].fill(0);
                    for (j, x) in x.iter().enumerate() {
                        let code = ((x - bf16_value(minimum)) / bf16_value(scale)).round_ties_even();
                        let code = (code as i32).clamp(0, 15) as u8;
                        o[4 + j % 16] |= if j < 16 { code } else { code << 4 };
                    }
                }
            }
        }
    }
    Ok(())
}

/// Gives `put` the components of the head at `src`, a vector at a time: `c` is the first component's number, a multiple
/// of the width below `d`. Lanes from `d` on are arbitrary.
///
/// # Safety
/// A whole head of `d` components at `src`.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd>(
    s: S,
    format: KvFormat,
    src: *const u8,
    d: usize,
    put: impl FnMut(usize, S::V),
) {
    // SAFETY: the caller's promise.
    unsafe {
        // The usual number: loops of a length that the compiler knows.
        if d == USUAL { widen_head(s, format, src, USUAL, put) } else { widen_head(s, format, src, d, put) }
    }
}

/// Components of a head in most models.
pub(super) const USUAL: usize = 128;

/// See [`widen`].
///
/// # Safety
/// As for [`widen`].
#[inline(always)]
unsafe fn widen_head<S: Simd>(
    s: S,
    format: KvFormat,
    src: *const u8,
    d: usize,
    mut put: impl FnMut(usize, S::V),
) {
    #[inline(always)]
    unsafe fn plain<S: Simd, E: Element>(s: S, src: *const E, d: usize, mut put: impl FnMut(usize, S::V)) {
        let whole = d - d % S::WIDTH;
        // SAFETY: no more than `d` components are read.
        unsafe {
            for c in (0..whole).step_by(S::WIDTH) {
                put(c, E::load(s, src.add(c)));
            }
            if whole < d {
                put(whole, E::load_n(s, src.add(whole), d - whole));
            }
        }
    }
    // SAFETY: the layouts of the formats; the last group of Int4 is padded.
    unsafe {
        match format {
            KvFormat::F32 => plain(s, src.cast::<f32>(), d, put),
            KvFormat::F16 => plain(s, src.cast::<f16>(), d, put),
            KvFormat::Int8 => {
                let scale = s.splat(bf16_value(src.cast::<u16>().read_unaligned()));
                plain(s, src.add(SCALE_BYTES).cast::<i8>(), d, |c, v| put(c, s.mul(v, scale)));
            }
            KvFormat::Int4 => {
                for group in 0..d.div_ceil(GROUP4) {
                    let src = src.add(group * GROUP4_BYTES);
                    let scale = s.splat(bf16_value(src.cast::<u16>().read_unaligned()));
                    let minimum = s.splat(bf16_value(src.add(2).cast::<u16>().read_unaligned()));
                    for i in (0..GROUP4 / 2).step_by(S::WIDTH) {
                        let (low, high) = s.load_nibbles(src.add(4 + i));
                        let (c, half) = (group * GROUP4 + i, GROUP4 / 2);
                        if c < d {
                            put(c, s.fma(low, scale, minimum));
                        }
                        if c + half < d {
                            put(c + half, s.fma(high, scale, minimum));
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "kv_tests.rs"]
mod tests;
