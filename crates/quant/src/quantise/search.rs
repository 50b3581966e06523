//! Searches for the scale that makes the weighted squared error of one group least.
//!
//! Each search tries some starting scales. A start fixes the codes; for fixed codes the best scale (and minimum)
//! solves a linear least-squares problem, which also gives the error, so that a start costs one pass.

use wide::f32x8;

use super::lanes::{nearest_in_table, round_within, sums};
use crate::codes::Lattice;

/// Importances of a unit, with the largest scaled to 1 so that sums neither overflow nor vanish.
pub(super) struct Weights {
    scaled: Vec<f32>,
}

impl Weights {
    /// `None` where all are zero: then any code is as good as another.
    pub fn new(importance: &[f32]) -> Option<Weights> {
        let most = importance.iter().fold(0.0f32, |a, &b| a.max(b));
        if most == 0.0 {
            return None;
        }
        // Where nothing in a group matters, the floor makes its values be fitted all the same.
        Some(Weights { scaled: importance.iter().map(|w| (w / most).max(1e-12)).collect() })
    }

    pub fn all(&self) -> &[f32] {
        &self.scaled
    }
}

/// Smallest and largest value.
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    let mut low = [f32::INFINITY; 8];
    let mut high = [f32::NEG_INFINITY; 8];
    let (xs, rest) = x.as_chunks::<8>();
    for x in xs {
        for i in 0..8 {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    let low = low.iter().chain(rest).fold(f32::INFINITY, |a, &b| if b < a { b } else { a });
    let high = high.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    (low, high)
}

/// Weighted squared error when every value takes its nearest code.
#[inline(always)]
pub(super) fn error(x: &[f32], w: &[f32], lattice: &Lattice) -> f32 {
    let Lattice { scale, zero, offset, table, low, top } = *lattice;
    let squared = |e, w| [w * e * e];
    if scale == 0.0 {
        return sums(x, w, |x, w| squared(x + f32x8::splat(offset), w))[0];
    }
    let inverse = f32x8::splat(1.0 / scale);
    let scale = f32x8::splat(scale);
    if table {
        return sums(x, w, |x, w| squared(x - nearest_in_table(x * inverse) * scale, w))[0];
    }
    let (low, high) = (f32x8::splat((low - zero) as f32), f32x8::splat((top - zero) as f32));
    let offset = f32x8::splat(offset);
    sums(x, w, |x, w| {
        let shifted = x + offset;
        squared(shifted - round_within(shifted * inverse, low, high) * scale, w)
    })[0]
}

/// Weighted squared error of these codes, in f64, for the comparison that decides.
pub(super) fn exact_error(x: &[f32], w: &[f32], codes: &[u8], lattice: &Lattice) -> f64 {
    let mut values = [0.0; 256];
    let mut lanes = [0.0f64; 4];
    for ((x, w), codes) in x.chunks(256).zip(w.chunks(256)).zip(codes.chunks(256)) {
        lattice.values(codes, &mut values);
        for (i, ((&x, &w), &value)) in x.iter().zip(w).zip(&values).enumerate() {
            let e = f64::from(x) - f64::from(value);
            lanes[i % 4] += f64::from(w) * e * e;
        }
    }
    lanes.iter().sum()
}

/// Starting ranges as parts of the values' own: the fewer the bits, the more clipping of outliers pays.
pub(super) fn ratios(bits: u32) -> impl Iterator<Item = f32> + Clone {
    let (from, steps) = match bits {
        2 => (0.35, 20),
        3 => (0.55, 18),
        4 => (0.65, 16),
        5 => (0.8, 12),
        6 => (0.88, 10),
        _ => (0.96, 6),
    };
    (0..=steps).map(move |i| from + (1.04 - from) * i as f32 / steps as f32)
}

/// The scale `d` of `x = d * m`, `m` an integer in `low..=high`. Zero for a group of zeros.
pub(super) fn symmetric(x: &[f32], w: &[f32], low: i32, high: i32, bits: u32) -> f32 {
    let (least, most) = range(x);
    let extreme = most.max(-least);
    if extreme <= 0.0 {
        return 0.0;
    }
    let (low, high) = (low as f32, high as f32);
    let reach = high.max(-low);
    // Where one side has a code more, which side that is matters.
    let signs: &[f32] = if low == -high { &[1.0] } else { &[1.0, -1.0] };
    let mut best = (0.0, 0.0);
    let (least, most) = (f32x8::splat(low), f32x8::splat(high));
    let mut attempt = |start: f32, best: &mut (f32, f32)| {
        let inverse = f32x8::splat(1.0 / start);
        let [xm, mm] = sums(x, w, |x, w| {
            let m = round_within(x * inverse, least, most);
            [w * x * m, w * m * m]
        });
        if mm > 0.0 && xm * xm > best.0 * mm {
            *best = (xm * xm / mm, xm / mm);
        }
    };
    for &sign in signs {
        for ratio in ratios(bits) {
            attempt(sign * extreme * ratio / reach, &mut best);
        }
    }
    refine(&mut best, &mut attempt);
    best.1
}

/// Takes the scale that was found as one more start, while that helps.
fn refine(best: &mut (f32, f32), attempt: &mut impl FnMut(f32, &mut (f32, f32))) {
    for _ in 0..2 {
        let (gain, scale) = *best;
        if scale == 0.0 {
            return;
        }
        attempt(scale, best);
        if best.0 == gain {
            return;
        }
    }
}

/// The scale `d` of `x = d * table[q]`.
pub(super) fn table(x: &[f32], w: &[f32]) -> f32 {
    let (least, most) = range(x);
    let extreme = most.max(-least);
    if extreme <= 0.0 {
        return 0.0;
    }
    let mut best = (0.0, 0.0);
    let mut attempt = |start: f32, best: &mut (f32, f32)| {
        let inverse = f32x8::splat(1.0 / start);
        let [xm, mm] = sums(x, w, |x, w| {
            let m = nearest_in_table(x * inverse);
            [w * x * m, w * m * m]
        });
        if mm > 0.0 && xm * xm > best.0 * mm {
            *best = (xm * xm / mm, xm / mm);
        }
    };
    for sign in [1.0, -1.0] {
        for ratio in ratios(4) {
            attempt(sign * extreme * ratio / 127.0, &mut best);
        }
    }
    refine(&mut best, &mut attempt);
    best.1
}

/// The scale and zero point of `x = d * (q - zero)`, both from `0..=top`; the range includes 0.
pub(super) fn zero_point(x: &[f32], w: &[f32], top: i32, bits: u32) -> (f32, i32) {
    let (least, most) = range(x);
    let (least, most) = (least.min(0.0), most.max(0.0));
    if most <= least {
        return (0.0, 0);
    }
    let middle = (-least / (most - least) * top as f32) as i32;
    let mut best = (0.0, 0.0, 0);
    let attempt = |start: f32, zero: i32, best: &mut (f32, f32, i32)| {
        let inverse = f32x8::splat(1.0 / start);
        let (low, high) = (f32x8::splat(-zero as f32), f32x8::splat((top - zero) as f32));
        let [xm, mm] = sums(x, w, |x, w| {
            let m = round_within(x * inverse, low, high);
            [w * x * m, w * m * m]
        });
        if mm > 0.0 && xm > 0.0 && xm * xm > best.0 * mm {
            *best = (xm * xm / mm, xm / mm, zero);
        }
    };
    for zero in middle - 1..=middle + 2 {
        if (0..=top).contains(&zero) {
            for ratio in ratios(bits) {
                attempt((most - least) * ratio / top as f32, zero, &mut best);
            }
        }
    }
    for _ in 0..2 {
        if best.1 > 0.0 {
            attempt(best.1, best.2, &mut best);
        }
    }
    (best.1, best.2)
}

/// Scale `d` and minimum `m` of `x = d * q + m`, `q` in `0..=top`; with `below` `m` is at most 0.
pub(super) fn with_minimum(x: &[f32], w: &[f32], top: i32, bits: u32, below: bool) -> (f32, f32) {
    let (least, most) = range(x);
    let least = if below { least.min(0.0) } else { least };
    if most <= least {
        return (0.0, least);
    }
    let top = top as f32;
    let spread = most - least;
    let base = f32x8::splat(least);
    let [sw, sx, sxx] = sums(x, w, |x, w| {
        let y = x - base;
        [w, w * y, w * y * y]
    });
    let mut best = (f32::INFINITY, spread / top, least);
    // Everything is relative to the least value, so that a large common part does not cancel the digits away.
    let attempt = |d: f32, low: f32, best: &mut (f32, f32, f32)| {
        let low = f32x8::splat(low);
        let inverse = f32x8::splat(1.0 / d);
        let [sq, sqq, sxq] = sums(x, w, |x, w| {
            let q = round_within((x - low) * inverse, f32x8::ZERO, f32x8::splat(top));
            [w * q, w * q * q, w * q * (x - base)]
        });
        let determinant = sw * sqq - sq * sq;
        let (mut d, mut m) = match determinant > 0.0 {
            true => ((sw * sxq - sx * sq) / determinant, (sqq * sx - sq * sxq) / determinant),
            false => (0.0, sx / sw),
        };
        if below && m + least > 0.0 && sqq > 0.0 {
            // On the border m = 0 the best scale solves the problem in one unknown.
            m = -least;
            d = (sxq - m * sq) / sqq;
        }
        let e = sxx + d * d * sqq + m * m * sw - 2.0 * (d * sxq + m * sx - d * m * sq);
        if d > 0.0 && e < best.0 {
            *best = (e, d, m + least);
        }
    };
    for ratio in ratios(bits) {
        let d = spread * ratio / top;
        attempt(d, least, &mut best);
        if ratio < 1.0 {
            attempt(d, least + (1.0 - ratio) / 2.0 * spread, &mut best);
        }
    }
    for _ in 0..2 {
        let (_, d, m) = best;
        attempt(d, m, &mut best);
    }
    (best.1, best.2)
}
