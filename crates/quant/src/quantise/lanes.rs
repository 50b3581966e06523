//! Sums over eight values at once.

use wide::f32x8;

use crate::codes::{IQ4_VALUES, MAGIC, MIDDLE};

/// To integers, ties to even; for numbers within +-2^22.
#[inline(always)]
pub(super) fn round(x: f32x8) -> f32x8 {
    let magic = f32x8::splat(MAGIC);
    (x + magic) - magic
}

/// To an integer of `low..=high`.
#[inline(always)]
pub(super) fn round_within(x: f32x8, low: f32x8, high: f32x8) -> f32x8 {
    round(x.fast_max(low).fast_min(high))
}

/// The nearest values of [`IQ4_VALUES`].
#[inline(always)]
pub(super) fn nearest_in_table(x: f32x8) -> f32x8 {
    let mut nearest = f32x8::splat(f32::from(IQ4_VALUES[0]));
    for (i, &middle) in MIDDLE.iter().enumerate() {
        let step = f32::from(IQ4_VALUES[i + 1]) - f32::from(IQ4_VALUES[i]);
        nearest += x.simd_gt(f32x8::splat(middle)) & f32x8::splat(step);
    }
    nearest
}

/// Sums of the terms over all pairs; a rest of less than eight is padded with zeros, whose weight `w` is zero.
#[inline(always)]
pub(super) fn sums<const N: usize>(x: &[f32], w: &[f32], f: impl Fn(f32x8, f32x8) -> [f32x8; N]) -> [f32; N] {
    let mut total = [f32x8::splat(0.0); N];
    let mut add = |x: [f32; 8], w: [f32; 8]| {
        let terms = f(f32x8::new(x), f32x8::new(w));
        for n in 0..N {
            total[n] += terms[n];
        }
    };
    let ((xs, x_rest), (ws, w_rest)) = (x.as_chunks::<8>(), w.as_chunks::<8>());
    for (x, w) in xs.iter().zip(ws) {
        add(*x, *w);
    }
    if !x_rest.is_empty() {
        let (mut x, mut w) = ([0.0; 8], [0.0; 8]);
        x[..x_rest.len()].copy_from_slice(x_rest);
        w[..w_rest.len()].copy_from_slice(w_rest);
        add(x, w);
    }
    total.map(f32x8::reduce_add)
}
