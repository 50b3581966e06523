//! Sums for sixteen candidates at once, in plain Rust that the compiler turns into vectors of any width.
//!
//! Lanes are candidates, not values: nothing has to be added up across a vector, and every candidate's sum has the same
//! order on every machine. The sums are separate arrays in one function, which keeps them in registers.

use crate::codes::{IQ4_VALUES, Lattice, MAGIC, MIDDLE};

/// Candidates of a batch.
pub(super) const WIDTH: usize = 16;

/// A number for each candidate.
pub(super) type Each = [f32; WIDTH];

/// To an integer of `low..=high`, ties to even; the bounds are within +-2^22.
#[inline(always)]
pub(super) fn round_within(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    let x = if x < high { x } else { high };
    (x + MAGIC) - MAGIC
}

/// The nearest value of [`IQ4_VALUES`].
#[inline(always)]
pub(super) fn nearest_in_table(x: f32) -> f32 {
    let mut nearest = f32::from(IQ4_VALUES[0]);
    for (i, &middle) in MIDDLE.iter().enumerate() {
        let step = f32::from(IQ4_VALUES[i + 1]) - f32::from(IQ4_VALUES[i]);
        nearest += if x > middle { step } else { 0.0 };
    }
    nearest
}

/// Sums of `w x m` and `w m m`, `m` the multiple that `nearest(candidate, x / scale)` gives.
#[inline(always)]
pub(super) fn multiples(
    x: &[f32],
    w: &[f32],
    scale: &Each,
    nearest: impl Fn(usize, f32) -> f32,
) -> (Each, Each) {
    let inverse = scale.map(|d| 1.0 / d);
    let (mut xm, mut mm) = ([0.0; WIDTH], [0.0; WIDTH]);
    for (&x, &w) in x.iter().zip(w) {
        for i in 0..WIDTH {
            let m = nearest(i, x * inverse[i]);
            let wm = w * m;
            xm[i] += x * wm;
            mm[i] += wm * m;
        }
    }
    (xm, mm)
}

/// Sums of `w q`, `w q q` and `w q (x - base)`, `q` the code in `0..=top` under a scale and a least value.
#[inline(always)]
pub(super) fn codes(
    x: &[f32],
    w: &[f32],
    (scale, low): (&Each, &Each),
    base: f32,
    top: f32,
) -> (Each, Each, Each) {
    let (inverse, low) = (scale.map(|d| 1.0 / d), *low);
    let (mut sq, mut sqq, mut sxq) = ([0.0; WIDTH], [0.0; WIDTH], [0.0; WIDTH]);
    for (&x, &w) in x.iter().zip(w) {
        let y = x - base;
        for i in 0..WIDTH {
            let q = round_within((x - low[i]) * inverse[i], 0.0, top);
            let wq = w * q;
            sq[i] += wq;
            sqq[i] += wq * q;
            sxq[i] += wq * y;
        }
    }
    (sq, sqq, sxq)
}

/// Weighted squared error under each lattice when every value takes its nearest code; all have the first one's grid.
#[inline(always)]
pub(super) fn errors(x: &[f32], w: &[f32], lattices: &[Lattice; WIDTH]) -> Each {
    // Under a scale of zero every value is nearest to the code of zero.
    let inverse = lattices.map(|l| if l.scale == 0.0 { 0.0 } else { 1.0 / l.scale });
    let scale = lattices.map(|l| l.scale);
    let mut error = [0.0; WIDTH];
    if lattices[0].table {
        for (&x, &w) in x.iter().zip(w) {
            for i in 0..WIDTH {
                let e = x - nearest_in_table(x * inverse[i]) * scale[i];
                error[i] += w * e * e;
            }
        }
        return error;
    }
    let low = lattices.map(|l| (l.low - l.zero) as f32);
    let high = lattices.map(|l| (l.top - l.zero) as f32);
    let offset = lattices.map(|l| l.offset);
    for (&x, &w) in x.iter().zip(w) {
        for i in 0..WIDTH {
            let shifted = x + offset[i];
            let e = shifted - round_within(shifted * inverse[i], low[i], high[i]) * scale[i];
            error[i] += w * e * e;
        }
    }
    error
}
