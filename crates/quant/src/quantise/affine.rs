//! Affine groups.

use half::bf16;
use pocketglm_tensor::{Affine, RowCodes};

use super::search::{self, Stored, Weights};
use crate::codes::{Lattice, affine_lattice, round};

/// Beyond these magnitudes squares leave f32's range, and groups are rounded plainly.
const SEARCHABLE: std::ops::Range<f32> = 1e-14..1e14;

#[inline(always)]
pub(super) fn encode(format: Affine, x: &[f32], weights: Option<&Weights>, row: &mut RowCodes) {
    let (least, most) = search::range(x);
    let (scale, zero) = match format.symmetric() {
        true => (round_symmetric(format, least, most), 0),
        false => round_with_zero(format, least, most),
    };
    let first = row.codes.len();
    row.codes.resize(first + x.len(), 0);
    let codes = &mut row.codes[first..];
    codes_of(&affine_lattice(format, scale.to_bits(), zero), x, codes);
    let (mut scale, mut zero) = (scale, zero);
    if let Some(weights) = weights.filter(|_| SEARCHABLE.contains(&most.max(-least))) {
        let (s, z) = searched(format, x, weights.all());
        let rounded = affine_lattice(format, scale.to_bits(), zero);
        let lattice = affine_lattice(format, s.to_bits(), z);
        let mut others = vec![0; x.len()];
        codes_of(&lattice, x, &mut others);
        let before = search::exact_error(x, weights.all(), codes, &rounded);
        if search::exact_error(x, weights.all(), &others, &lattice) < before {
            codes.copy_from_slice(&others);
            (scale, zero) = (s, z);
        }
    }
    row.scales.push(scale.to_bits());
    if !format.symmetric() {
        row.sub_minima.push(zero);
    }
}

/// Plain rounding of a row with the scale for values from `least` to `most`, and for its own.
pub(super) fn round_in_range(format: Affine, x: &[f32], (least, most): (f32, f32), row: &mut RowCodes) {
    let (low, high) = search::range(x);
    let (least, most) = (least.min(low), most.max(high));
    let (scale, zero) = match format.symmetric() {
        true => (round_symmetric(format, least, most), 0),
        false => round_with_zero(format, least, most),
    };
    row.codes.resize(x.len(), 0);
    codes_of(&affine_lattice(format, scale.to_bits(), zero), x, &mut row.codes);
    row.scales.push(scale.to_bits());
    if !format.symmetric() {
        row.sub_minima.push(zero);
    }
}

/// Groups whose scales are computed side by side.
const BATCH: usize = 16;
/// Scales that are found side by side: their bf16 is a normal number with one above it.
const NORMAL: std::ops::Range<f64> = 1e-36..1e37;
/// Below this magnitude every multiple of a scale next to a value is a finite f32.
const FINITE: f64 = 1e38;

/// Plain rounding of a row in groups of `unit`: what [`encode`] gives without weights, but scales are found for many groups
/// at once, which takes longer than the codes do where each is found alone.
#[inline(always)]
pub(super) fn round_row(format: Affine, x: &[f32], unit: usize, row: &mut RowCodes) {
    let first = row.codes.len();
    row.codes.resize(first + x.len(), 0);
    let codes = row.codes[first..].chunks_mut(unit * BATCH);
    for (x, codes) in x.chunks(unit * BATCH).zip(codes) {
        let (mut low, mut high) = ([0.0; BATCH], [0.0; BATCH]);
        for (i, x) in x.chunks(unit).enumerate() {
            (low[i], high[i]) = search::range(x);
        }
        let (down, up) = (low.map(|v| f64::from(-v.min(0.0))), high.map(|v| f64::from(v.max(0.0))));
        let found = if format.symmetric() {
            many_symmetric(format, &down, &up)
        } else {
            many_with_zero(format, &down, &up)
        };
        for (i, (x, codes)) in x.chunks(unit).zip(codes.chunks_mut(unit)).enumerate() {
            let (scale, zero) = match found.fits[i] {
                true => (found.scales[i], found.zeros[i]),
                false if format.symmetric() => (round_symmetric(format, low[i], high[i]).to_bits(), 0),
                false => {
                    let (scale, zero) = round_with_zero(format, low[i], high[i]);
                    (scale.to_bits(), zero)
                }
            };
            codes_of(&affine_lattice(format, scale, zero), x, codes);
            row.scales.push(scale);
            if !format.symmetric() {
                row.sub_minima.push(zero);
            }
        }
    }
}

/// Scales of many groups, as bits of bf16, and their zero points; where none was found a group has to be looked at alone.
struct Many {
    scales: [u16; BATCH],
    zeros: [u8; BATCH],
    fits: [bool; BATCH],
}

/// The bf16 next to a number in [`NORMAL`], ties to even as [`bf16::from_f64`] has them, as the upper half of an f64.
#[inline(always)]
fn nearest_bf16(value: f64) -> u32 {
    let upper = (value.to_bits() >> 32) as u32;
    (upper + 0xfff + (upper >> 13 & 1)) & !0x1fff
}

/// From one bf16 to the next one in the upper half of an f64.
const NEXT: u32 = 1 << 13;

#[inline(always)]
fn value_of(upper: u32) -> f64 {
    f64::from_bits(u64::from(upper) << 32)
}

/// The bits of a bf16 from the upper half of an f64: the exponent's bias differs.
#[inline(always)]
fn bits_of(upper: u32) -> u16 {
    ((upper - (896 << 20)) >> 13) as u16
}

#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if a > b { a } else { b }
}

#[inline(always)]
fn smaller(a: f64, b: f64) -> f64 {
    if a < b { a } else { b }
}

/// To an integer, ties to even, of numbers below 2^51.
#[inline(always)]
fn round_f64(x: f64) -> f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    (x + MAGIC) - MAGIC
}

/// [`round_symmetric`] for many groups.
#[inline(always)]
fn many_symmetric(format: Affine, down: &[f64; BATCH], up: &[f64; BATCH]) -> Many {
    let codes = f64::from(1 << (format.bits() - 1));
    let mut many = Many { scales: [0; BATCH], zeros: [0; BATCH], fits: [false; BATCH] };
    for i in 0..BATCH {
        let (down, up) = (down[i], up[i]);
        let (large, small) = (larger(down, up), smaller(down, up));
        let needed = larger(large / (codes + 0.5), small / (codes - 0.5));
        let wanted = larger(large / codes, needed);
        let first = nearest_bf16(wanted);
        let upper = if value_of(first) >= needed { first } else { first + NEXT };
        let sign = if up > down { 0x8000 } else { 0 };
        let normal = NORMAL.contains(&wanted);
        many.scales[i] = bits_of(if normal { upper } else { 1 << 30 }) | sign;
        many.fits[i] = normal & (large < FINITE) & (value_of(upper) >= needed);
    }
    many
}

/// [`round_with_zero`] for many groups.
#[inline(always)]
fn many_with_zero(format: Affine, down: &[f64; BATCH], up: &[f64; BATCH]) -> Many {
    let top = f64::from((1 << format.bits()) - 1);
    let mut many = Many { scales: [0; BATCH], zeros: [0; BATCH], fits: [false; BATCH] };
    for i in 0..BATCH {
        let (down, up) = (down[i], up[i]);
        let wanted = (down + up) / top;
        let normal = NORMAL.contains(&wanted);
        let first = nearest_bf16(if normal { wanted } else { 1.0 });
        let fit = |upper: u32| {
            let s = value_of(upper);
            let (below, above) = (down / s, up / s);
            let zero = smaller(round_f64(below), top);
            (zero, (below <= zero + 0.5) & (above <= top - zero + 0.5))
        };
        let ((zero, fits), (next_zero, next_fits)) = (fit(first), fit(first + NEXT));
        many.scales[i] = bits_of(if fits { first } else { first + NEXT });
        many.zeros[i] = if fits { zero } else { next_zero } as u8;
        many.fits[i] = normal & (larger(down, up) < FINITE) & (fits | next_fits);
    }
    many
}

/// `clamp(round(x / scale) + zero)`; the division is exact to the last bit also where 1 / scale would overflow.
#[inline(always)]
fn codes_of(lattice: &Lattice, x: &[f32], codes: &mut [u8]) {
    let &Lattice { scale, zero, top, .. } = lattice;
    if scale == 0.0 {
        codes.fill(zero as u8);
        return;
    }
    let (low, high) = (-zero as f32, (top - zero) as f32);
    for (code, &x) in codes.iter_mut().zip(x) {
        let m = x / scale;
        let m = if m > low { m } else { low };
        let m = if m < high { m } else { high };
        *code = (round(m) + zero) as u8;
    }
}

/// The next larger magnitude; the arguments here are finite and never the largest.
#[inline(always)]
fn next_up(scale: bf16) -> bf16 {
    bf16::from_bits(scale.to_bits() + 1)
}

/// Whether the multiple of `scale` next to `value`, at most `codes` of them, is a finite f32.
#[inline(always)]
fn stays_finite(value: f64, scale: f64, codes: f64) -> bool {
    ((value / scale).round_ties_even().min(codes) * scale) <= f64::from(f32::MAX)
}

/// The scale of codes `-2^(bits-1)..2^(bits-1)`: negative where the larger side is the positive one, because the
/// negative side has a code more. Nearest to where the extreme value is a code, but so that no value is further than
/// half a step from one.
#[inline(always)]
fn round_symmetric(format: Affine, least: f32, most: f32) -> bf16 {
    let (down, up) = (f64::from(-least.min(0.0)), f64::from(most.max(0.0)));
    let (large, small) = (down.max(up), down.min(up));
    if large == 0.0 {
        return bf16::ZERO;
    }
    let codes = f64::from(1 << (format.bits() - 1));
    let needed = (large / (codes + 0.5)).max(small / (codes - 0.5));
    let mut scale = bf16::from_f64((large / codes).max(needed));
    let fits = |s: f64| s >= needed && stays_finite(large, s, codes) && stays_finite(small, s, codes - 1.0);
    while !fits(scale.to_f64()) {
        scale = next_up(scale);
    }
    if up > down { -scale } else { scale }
}

/// Scale and zero point of codes `0..2^bits` for the range widened to 0.
#[inline(always)]
fn round_with_zero(format: Affine, least: f32, most: f32) -> (bf16, u8) {
    let (down, up) = (f64::from(-least.min(0.0)), f64::from(most.max(0.0)));
    if down + up == 0.0 {
        return (bf16::ZERO, 0);
    }
    let top = f64::from((1 << format.bits()) - 1);
    let mut scale = bf16::from_f64((down + up) / top);
    loop {
        let s = scale.to_f64();
        if s > 0.0 {
            let zero = (down / s).round_ties_even().min(top);
            let fits = down / s <= zero + 0.5 && up / s <= top - zero + 0.5;
            if fits && stays_finite(down, s, zero) && stays_finite(up, s, top - zero) {
                return (scale, zero as u8);
            }
        }
        scale = next_up(scale);
    }
}

/// The best scale and zero point that a search finds.
#[inline(always)]
fn searched(format: Affine, x: &[f32], w: &[f32]) -> (bf16, u8) {
    let bits = u32::from(format.bits());
    let (scale, zero) = match format.symmetric() {
        true => {
            let (low, high) = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1);
            (search::symmetric(x, w, low, high, bits, Stored::Bf16), 0)
        }
        false => search::zero_point(x, w, (1 << bits) - 1, bits),
    };
    (bf16::from_f32(scale), zero as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Random;

    /// Groups of all magnitudes and shapes, five for each, and some that are far from ordinary.
    fn groups(unit: usize) -> Vec<f32> {
        let mut random = Random(3);
        let mut x = Vec::new();
        for power in -149..=127 {
            let size = 2f32.powi(power);
            for shape in 0..5 {
                x.extend((0..unit).map(|i| match shape {
                    0 => random.uniform() * size,
                    1 => random.uniform().abs() * size,
                    2 => -random.uniform().abs() * size,
                    3 => size * (1.0 + random.uniform() / 64.0),
                    _ if i == 0 => size,
                    _ => random.uniform() * size / 16.0,
                }));
            }
        }
        for constant in [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, 15.0, -7.5] {
            x.extend(std::iter::repeat_n(constant, unit));
        }
        x.extend((0..unit).map(|i| if i % 2 == 0 { f32::MAX } else { f32::MIN }));
        x
    }

    #[test]
    fn scales_that_are_found_side_by_side_are_those_of_groups_alone() {
        for format in Affine::all() {
            // A last group that is shorter, and a last batch that is.
            let unit = format.group().of(64);
            let mut x = groups(unit);
            x.truncate(x.len() - unit / 2);
            let (mut together, mut alone) = (RowCodes::default(), RowCodes::default());
            round_row(format, &x, unit, &mut together);
            x.chunks(unit).for_each(|x| encode(format, x, None, &mut alone));
            assert!(together == alone, "{}", pocketglm_tensor::DType::Affine(format));
        }
    }

    #[test]
    fn ordinary_groups_are_never_looked_at_alone_and_zeros_always_are() {
        let mut random = Random(9);
        for _ in 0..2000 {
            let down: [f64; BATCH] = std::array::from_fn(|_| f64::from(random.uniform().abs()));
            let up = down.map(|v| f64::from(random.uniform().abs()) + v / 8.0);
            for format in Affine::all() {
                let many = if format.symmetric() { many_symmetric } else { many_with_zero };
                assert_eq!(many(format, &down, &up).fits, [true; BATCH]);
                assert_eq!(many(format, &[0.0; BATCH], &[0.0; BATCH]).fits, [false; BATCH]);
            }
        }
    }
}
