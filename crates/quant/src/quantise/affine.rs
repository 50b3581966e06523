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
