//! Searches for the scale that makes the weighted squared error of one group least.
//!
//! Each search tries some starting scales. A start fixes the codes; for fixed codes the best scale (and minimum)
//! solves a linear least-squares problem, which also gives the error, so that a start costs one pass. Starts go in
//! batches: first spread over a range, then closely around the best.

use half::bf16;

use super::lanes::{Each, WIDTH, codes, multiples, nearest_in_table, round_within};
use crate::codes::Lattice;

/// Importances of a unit, with the largest scaled to 1 so that sums neither overflow nor vanish.
pub(super) struct Weights {
    scaled: Vec<f32>,
}

impl Weights {
    /// `None` where all are zero: then any code is as good as another.
    #[inline(always)]
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
#[inline(always)]
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    let least = |a: f32, b: f32| if b < a { b } else { a };
    let most = |a: f32, b: f32| if b > a { b } else { a };
    let mut low = [f32::INFINITY; WIDTH];
    let mut high = [f32::NEG_INFINITY; WIDTH];
    let (xs, rest) = x.as_chunks::<WIDTH>();
    for x in xs {
        for i in 0..WIDTH {
            low[i] = least(low[i], x[i]);
            high[i] = most(high[i], x[i]);
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        low[i] = least(low[i], x);
        high[i] = most(high[i], x);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            low[i] = least(low[i], low[i + half]);
            high[i] = most(high[i], high[i + half]);
        }
    }
    (low[0], high[0])
}

/// Weighted squared error of these codes, in f64, for the comparison that decides.
#[inline(always)]
pub(super) fn exact_error(x: &[f32], w: &[f32], codes: &[u8], lattice: &Lattice) -> f64 {
    let mut values = [0.0; 256];
    let mut lanes = [0.0f64; 8];
    for ((x, w), codes) in x.chunks(256).zip(w.chunks(256)).zip(codes.chunks(256)) {
        let values = &mut values[..x.len()];
        lattice.values(codes, values);
        let ((xs, x_rest), (ws, w_rest), (vs, v_rest)) =
            (x.as_chunks::<8>(), w.as_chunks::<8>(), values.as_chunks::<8>());
        for ((x, w), v) in xs.iter().zip(ws).zip(vs) {
            for i in 0..8 {
                let e = f64::from(x[i]) - f64::from(v[i]);
                lanes[i] += f64::from(w[i]) * e * e;
            }
        }
        for ((&x, &w), &v) in x_rest.iter().zip(w_rest).zip(v_rest) {
            let e = f64::from(x) - f64::from(v);
            lanes[0] += f64::from(w) * e * e;
        }
    }
    lanes.iter().sum()
}

/// Starting ranges as parts of the values' own, from the first to [`WIDEST`]: the fewer the bits, the more clipping of
/// outliers pays.
#[inline(always)]
fn narrowest(bits: u32) -> f32 {
    match bits {
        2 => 0.35,
        3 => 0.55,
        4 => 0.65,
        5 => 0.8,
        6 => 0.88,
        _ => 0.96,
    }
}

const WIDEST: f32 = 1.04;

/// The ranges in `n` even steps; candidates beyond `n` begin anew.
#[inline(always)]
fn spread(bits: u32, n: usize) -> Each {
    let from = narrowest(bits);
    std::array::from_fn(|i| from + (WIDEST - from) * (i % n) as f32 / (n - 1) as f32)
}

/// Factors around 1, as far as the neighbours in [`spread`]; one is 1.
#[inline(always)]
fn around(bits: u32, n: usize) -> Each {
    let step = (WIDEST - narrowest(bits)) / (n - 1) as f32;
    std::array::from_fn(|i| 1.0 + step * (i as f32 - 8.0) / 8.0)
}

/// Different starts in each half of a batch where few are enough.
#[inline(always)]
const fn ranges_for(bits: u32) -> usize {
    if bits >= 6 { WIDTH / 2 } else { WIDTH }
}

/// How much a scale takes off the squared error, and that scale.
#[derive(Clone, Copy, Default)]
struct Gain {
    gain: f32,
    scale: f32,
}

impl Gain {
    /// Takes the best of a batch, where it is better; gives its place.
    #[inline(always)]
    fn take(&mut self, (xm, mm): (Each, Each)) -> Option<usize> {
        let mut found = None;
        for i in 0..WIDTH {
            let (xm, mm) = (xm[i], mm[i]);
            // In this order it stays in f32's range where sums of large values are squares already.
            let gain = xm * (xm / mm);
            if mm > 0.0 && gain > self.gain {
                *self = Gain { gain, scale: xm / mm };
                found = Some(i);
            }
        }
        found
    }
}

/// How scales are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// So finely that rounding them does not matter.
    Fine,
    /// In bf16, of whose neighbours the best is taken.
    Bf16,
}

impl Stored {
    /// Scales close to the best one.
    #[inline(always)]
    fn close(self, scale: f32, bits: u32, n: usize) -> Each {
        match self {
            Stored::Fine => around(bits, n).map(|f| f * scale),
            Stored::Bf16 => {
                let middle = bf16::from_f32(scale).to_bits();
                std::array::from_fn(|i| bf16::from_bits((middle + i as u16).saturating_sub(8)).to_f32())
            }
        }
    }

    /// Takes the best of a batch of close scales: with its own codes where scales are stored as they are, else refitted
    /// to them.
    #[inline(always)]
    fn take(self, best: &mut Gain, scales: &Each, (xm, mm): (Each, Each)) {
        if self == Stored::Fine {
            best.take((xm, mm));
            return;
        }
        let mut gain = f32::NEG_INFINITY;
        for i in 0..WIDTH {
            let d = scales[i];
            let here = d * (2.0 * xm[i] - d * mm[i]);
            if here > gain {
                gain = here;
                best.scale = d;
            }
        }
    }
}

/// The scale `d` of `x = d * m`, with the multiples `m` that `nearest` gives, of magnitudes up to `reach`. Zero for a
/// group of zeros.
#[inline(always)]
fn one_scale(
    x: &[f32],
    w: &[f32],
    bits: u32,
    (reach, both_signs, stored): (f32, bool, Stored),
    nearest: impl Fn(f32) -> f32,
) -> f32 {
    let (least, most) = range(x);
    let extreme = most.max(-least);
    if extreme <= 0.0 {
        return 0.0;
    }
    let n = ranges_for(bits);
    let starts = spread(bits, n).map(|ratio| extreme * ratio / reach);
    let mut best = Gain::default();
    let sign = |i: usize| if both_signs && i >= n { -1.0 } else { 1.0 };
    best.take(multiples(x, w, &std::array::from_fn(|i| sign(i) * starts[i]), |_, m| nearest(m)));
    if both_signs && n == WIDTH {
        best.take(multiples(x, w, &starts.map(|d| -d), |_, m| nearest(m)));
    }
    if best.scale != 0.0 {
        let close = stored.close(best.scale, bits, n);
        stored.take(&mut best, &close, multiples(x, w, &close, |_, m| nearest(m)));
    }
    best.scale
}

/// The scale `d` of `x = d * m`, `m` an integer in `low..=high`. Zero for a group of zeros.
#[inline(always)]
pub(super) fn symmetric(x: &[f32], w: &[f32], low: i32, high: i32, bits: u32, stored: Stored) -> f32 {
    let (low, high) = (low as f32, high as f32);
    // Where one side has a code more, which side that is matters.
    one_scale(x, w, bits, (high.max(-low), low != -high, stored), |m| round_within(m, low, high))
}

/// The scale `d` of `x = d * table[q]`.
#[inline(always)]
pub(super) fn table(x: &[f32], w: &[f32]) -> f32 {
    one_scale(x, w, 4, (127.0, true, Stored::Fine), nearest_in_table)
}

/// The scale, a bf16, and zero point of `x = d * (q - zero)`, both from `0..=top`; the range includes 0.
#[inline(always)]
pub(super) fn zero_point(x: &[f32], w: &[f32], top: i32, bits: u32) -> (f32, i32) {
    let (least, most) = range(x);
    let (least, most) = (least.min(0.0), most.max(0.0));
    if most <= least {
        return (0.0, 0);
    }
    let n = ranges_for(bits);
    let starts = spread(bits, n).map(|ratio| (most - least) * ratio / top as f32);
    let middle = (-least / (most - least) * top as f32) as i32;
    let (mut best, mut zero) = (Gain::default(), 0);
    // Two zero points to a batch where half of it is enough for one; then the neighbours of the best scale.
    let per_batch = WIDTH / n;
    for first in (middle - 1..=middle + 2).step_by(per_batch) {
        let zeros: [i32; WIDTH] = std::array::from_fn(|i| (first + (i / n) as i32).clamp(0, top));
        if let Some(i) = best.take(from_zero(x, w, top, &starts, zeros)) {
            zero = zeros[i];
        }
    }
    if best.scale > 0.0 {
        let close = Stored::Bf16.close(best.scale, bits, n);
        Stored::Bf16.take(&mut best, &close, from_zero(x, w, top, &close, [zero; WIDTH]));
    }
    (best.scale, zero)
}

/// [`multiples`] of codes that begin at these zero points; upwards alone.
#[inline(always)]
fn from_zero(x: &[f32], w: &[f32], top: i32, scales: &Each, zero: [i32; WIDTH]) -> (Each, Each) {
    let (low, high) = (zero.map(|z| -z as f32), zero.map(|z| (top - z) as f32));
    let (xm, mm) = multiples(x, w, scales, |i, m| round_within(m, low[i], high[i]));
    (xm.map(|xm| xm.max(0.0)), mm)
}

/// Scale `d` and minimum `m` of `x = d * q + m`, `q` in `0..=top`; with `below` `m` is at most 0.
#[inline(always)]
pub(super) fn with_minimum(x: &[f32], w: &[f32], top: i32, bits: u32, below: bool) -> (f32, f32) {
    let (least, most) = range(x);
    let least = if below { least.min(0.0) } else { least };
    if most <= least {
        return (0.0, least);
    }
    let top = top as f32;
    let width = most - least;
    // Everything is relative to the least value, so that a large common part does not cancel the digits away.
    let (mut sw, mut sx, mut sxx) = (0.0, 0.0, 0.0);
    for (&x, &w) in x.iter().zip(w) {
        let y = x - least;
        sw += w;
        sx += w * y;
        sxx += w * y * y;
    }
    let mut best = (f32::INFINITY, width / top, least);
    let ratios = spread(bits, WIDTH);
    for stage in 0..3 {
        // Clipped at the top alone, at both ends, and close to the best.
        let (d, low) = match stage {
            0 => (ratios.map(|ratio| width * ratio / top), [least; WIDTH]),
            1 => (
                ratios.map(|ratio| width * ratio / top),
                ratios.map(|ratio| least + (1.0 - ratio).max(0.0) / 2.0 * width),
            ),
            _ => (around(bits, WIDTH).map(|f| f * best.1), [best.2; WIDTH]),
        };
        let (sq, sqq, sxq) = codes(x, w, (&d, &low), least, top);
        for i in 0..WIDTH {
            let (sq, sqq, sxq) = (sq[i], sqq[i], sxq[i]);
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
                best = (e, d, m + least);
            }
        }
    }
    (best.1, best.2)
}
