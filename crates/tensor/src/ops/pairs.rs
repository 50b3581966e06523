//! A tile of sums with two multiplications for three.
//!
//! `x0 y0 + x1 y1 = (x0 + y1)(x1 + y0) - x0 x1 - y0 y1` (Winograd 1968): the last two products belong to a row or to a
//! column alone and are summed once for all tiles. The sums cost two additions for a multiplication that is saved, which
//! is a loss unless additions have units of their own beside those of multiply-adds. Of each three steps two go this way,
//! so that both kinds of units are busy all the time; every second pair is subtracted, so that what belongs to rows or
//! columns cancels where values have a mean.
//!
//! Errors are those of a sum of `(x0 + y1)(x1 + y0)`: as small as usual only where `x` and `y` are of one magnitude, which
//! [`balance`] makes them.

use super::tile::{Tile, ask_for_sums, step, write_back};
use crate::simd::{Kernel, Simd};

/// Steps after which everything repeats.
pub(crate) const STEPS: usize = 6;

/// Vectors of a panel: rows are broadcast from memory for each of them, and panels are loaded for each row.
pub(crate) const VECTORS: usize = 2;

/// Lines that are asked for in each of these steps.
pub(crate) const SOON: usize = 4;

/// Rows of a full tile: what registers hold beside three steps of a panel and two sums.
pub(crate) const fn pair_rows(width: usize) -> usize {
    if width == 16 { 12 } else { 4 }
}

/// What products of pairs have too much (or, each second time, too little) for each step of three vectors of any width.
const SIGNS: [f32; 48] = {
    let mut signs = [0.0; 48];
    let mut p = 0;
    while p < signs.len() {
        signs[p] = -1.0;
        signs[p + STEPS / 2] = 1.0;
        p += STEPS;
    }
    signs
};

/// What a row of `k` floats and one more has too much in products of pairs, negated.
///
/// # Safety
/// `k + 1` readable floats at `row`.
#[inline(always)]
pub(crate) unsafe fn excess_of_row<S: Simd>(s: S, row: *const f32, k: usize) -> f32 {
    let pairs = k / STEPS * STEPS;
    let whole = pairs / S::WIDTH * S::WIDTH;
    let mut sum = s.splat(0.0);
    // SAFETY: the caller's promise; `SIGNS` is a multiple of every width.
    unsafe {
        for p in (0..whole).step_by(S::WIDTH) {
            let signed = s.mul(s.load(row.add(p)), s.load(SIGNS.as_ptr().add(p % SIGNS.len())));
            sum = s.fma(signed, s.load(row.add(p + 1)), sum);
        }
        let mut rest = 0.0;
        for p in whole..pairs {
            if p % (STEPS / 2) == 0 {
                rest += SIGNS[p % SIGNS.len()] * *row.add(p) * *row.add(p + 1);
            }
        }
        s.reduce_add(sum) + rest
    }
}

/// Adds the same for columns: `k` steps of panels of [`VECTORS`] vectors, of which the first is the first of [`STEPS`].
///
/// # Safety
/// A panel at `b`, and as many columns at `sums`.
#[inline(always)]
pub(crate) unsafe fn add_excess_of_columns<S: Simd>(s: S, b: *const f32, k: usize, sums: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        for j in 0..VECTORS {
            let at = |p: usize| s.load(b.add((p * VECTORS + j) * S::WIDTH));
            let sum = sums.add(j * S::WIDTH);
            let (mut less, mut more) = (s.splat(0.0), s.load(sum));
            for p in (0..k / STEPS * STEPS).step_by(STEPS) {
                less = s.fma(at(p), at(p + 1), less);
                more = s.fma(at(p + 3), at(p + 4), more);
            }
            s.store(sum, s.sub(more, less));
        }
    }
}

/// The powers of two by which both operands are multiplied, so that products stay what they are and magnitudes become alike.
/// Energies are mean squares.
pub(crate) fn balance(x: f64, b: f64) -> [f32; 2] {
    let half = ((x / b).log2() / 4.0).round();
    if half.abs() <= 60.0 { [(-half).exp2() as f32, half.exp2() as f32] } else { [1.0; 2] }
}

/// Groups of six steps of a tile, `[a, b]` at their first: a pair that is added, a step, a pair that is subtracted, a step.
///
/// # Safety
/// So many floats of each row at `a`, rows `stride` floats apart, and steps of a panel at `b`.
#[inline(always)]
pub(crate) unsafe fn six_steps<S: Simd, const MR: usize>(
    s: S,
    groups: usize,
    [a, b]: [*const f32; 2],
    stride: usize,
    sums: &mut [[S::V; VECTORS]; MR],
) {
    for first in (0..groups * STEPS).step_by(STEPS / 2) {
        for i in 0..MR {
            // SAFETY: the caller's promise.
            let x = |p: usize| unsafe { s.splat(*a.add(i * stride + first + p)) };
            let (x0, x1, x2) = (x(0), x(1), x(2));
            for j in 0..VECTORS {
                // SAFETY: the caller's promise.
                let y = |p: usize| unsafe { s.load(b.add(((first + p) * VECTORS + j) * S::WIDTH)) };
                let sum = s.fma(x2, y(2), sums[i][j]);
                sums[i][j] = if first % STEPS == 0 {
                    s.fma(s.add(x0, y(1)), s.add(x1, y(0)), sum)
                } else {
                    s.fma(s.sub(x0, y(1)), s.sub(y(0), x1), sum)
                };
            }
        }
    }
}

/// One tile of `MR` rows and [`VECTORS`] vectors of columns; `excess` as the tile describes it.
///
/// # Safety
/// As for [`Tile`].
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const A_STRIDE: usize>(s: S, t: Tile<'_>, excess: [*const f32; 2]) {
    let Tile { k, a, b, into, stride, ahead, .. } = t;
    let groups = k / STEPS;
    // SAFETY: every address below is an element that the caller promised.
    unsafe {
        let [rows, columns] = excess;
        let mut sums = [[s.splat(0.0); VECTORS]; MR];
        for i in 0..MR {
            for j in 0..VECTORS {
                sums[i][j] = s.add(s.splat(*rows.add(i)), s.load(columns.add(j * S::WIDTH)));
            }
        }
        // Sums are asked for before the last groups: a long panel passes through the first-level cache before.
        let last = (into.len() * MR).div_ceil(STEPS).min(groups);
        let [next, others] = ahead.both;
        for line in 0..ahead.lines {
            s.prefetch(others.address(line));
        }
        s.six_steps::<MR, A_STRIDE>(groups - last, a, b, next.base, &mut sums);
        for row in 0..last * STEPS {
            ask_for_sums::<S, MR, VECTORS>(s, into, stride, row);
        }
        let at = (groups - last) * STEPS;
        let (a_rest, b_rest) = (a.add(at), b.add(at * VECTORS * S::WIDTH));
        let next = next.base.wrapping_add((groups - last) * 64 * SOON);
        s.six_steps::<MR, A_STRIDE>(last, a_rest, b_rest, next, &mut sums);
        for p in groups * STEPS..k {
            step::<S, MR, VECTORS, A_STRIDE>(s, p, a, b, &mut sums);
        }
        write_back(s, &sums, into, stride);
    }
}

/// Calls [`tile`] for `mr` rows.
macro_rules! for_mr {
    ($mr:expr, $stride:ident, $args:tt, [$($n:literal)*]) => {
        match $mr {
            $($n => tile::<S, $n, $stride> $args,)*
            _ => {}
        }
    };
}

/// A tile as a kernel, so that there is one copy of it for each instruction set.
struct Call<'a, const A_STRIDE: usize>(Tile<'a>, [*const f32; 2]);

impl<const A_STRIDE: usize> Kernel for Call<'_, A_STRIDE> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Call(t, excess) = self;
        // SAFETY: the promise of `run_pairs`' caller, where alone these are made.
        unsafe {
            if S::WIDTH == 16 {
                for_mr!(t.mr, A_STRIDE, (s, t, excess), [1 2 3 4 5 6 7 8 9 10 11 12])
            } else {
                for_mr!(t.mr, A_STRIDE, (s, t, excess), [1 2 3 4])
            }
        }
    }
}

/// One tile of at most [`pair_rows`] rows and [`VECTORS`] vectors of columns. `excess` are the sums of what products of pairs
/// have too much, negated: of each row and of each column. Rows are `A_STRIDE` floats apart. The first of what is asked for
/// ahead is one run, of which the tile takes its share; its number of lines counts the second.
///
/// # Safety
/// As for a tile of so many columns, and so many floats of `excess`.
#[inline(always)]
pub(crate) unsafe fn run_pairs<S: Simd, const A_STRIDE: usize>(s: S, t: Tile<'_>, excess: [*const f32; 2]) {
    s.call(Call::<A_STRIDE>(t, excess));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::ops::check::values;

    /// Excess of a row and of the columns of a panel of `k` steps.
    struct Excess<'a>(&'a [f32], &'a [f32], usize);

    impl Kernel for Excess<'_> {
        type Output = (f32, Vec<f32>);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> (f32, Vec<f32>) {
            let Excess(row, b, k) = self;
            let mut sums = vec![0.0; VECTORS * S::WIDTH];
            assert!(row.len() > k && b.len() >= k * sums.len());
            // SAFETY: as just checked.
            unsafe {
                add_excess_of_columns(s, b.as_ptr(), k, sums.as_mut_ptr());
                (excess_of_row(s, row.as_ptr(), k), sums)
            }
        }
    }

    #[test]
    fn rows_and_columns_have_the_same_excess_for_the_same_values() {
        for isa in Isa::available() {
            for k in [0, 5, 6, 47, 48, 60, 144, 250] {
                let row = values(k + 1, 1);
                let columns = VECTORS * isa.width();
                let b: Vec<f32> = (0..k * columns).map(|i| row[i / columns]).collect();
                let wanted: f64 = (0..k / STEPS * STEPS)
                    .map(|p| f64::from(SIGNS[p % 48]) * f64::from(row[p]) * f64::from(row[p + 1]))
                    .sum();
                let (of_row, of_columns) = isa.run(Excess(&row, &b, k));
                for sum in of_columns.iter().chain([&of_row]) {
                    assert!((f64::from(*sum) - wanted).abs() < 1e-5, "{isa} {k}: {sum} for {wanted}");
                }
            }
        }
    }

    #[test]
    fn balanced_operands_are_of_one_magnitude_and_their_products_what_they_were() {
        for (x, b) in [(1.0, 1.0), (1e6, 1e-4), (1e-20, 1e12), (3.0, 1e-30)] {
            let [of_x, of_b] = balance(x, b).map(f64::from);
            assert_eq!(of_x * of_b, 1.0);
            let ratio = x * of_x * of_x / (b * of_b * of_b);
            assert!((0.25..=4.0).contains(&ratio), "{ratio} of {x} and {b}");
        }
        for (x, b) in
            [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (f64::NAN, 1.0), (f64::INFINITY, 1.0), (1e300, 1e-300)]
        {
            assert_eq!(balance(x, b), [1.0; 2]);
        }
    }
}
