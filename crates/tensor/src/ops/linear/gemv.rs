//! A few rows of `x`: every weight row is read once, in order, and multiplied with all of them. With more than one row
//! of `x` several weight rows go side by side, because `x` is fetched anew for each group of them.

use half::{bf16, f16};

use super::rows::{Rows, Store};
use crate::ops::gemm::FinishRows;
use crate::simd::{Element, Kernel, Simd};
use crate::{Cpu, Weight};

/// Most rows of `x` that this is used for.
pub(super) const MAX_M: usize = 8;
/// Weight rows of one task; an even number.
pub(super) const CHUNK: usize = 32;
/// Bytes between what is read and what is asked for.
const AHEAD: usize = 2048;

/// Dot products of the columns of one chunk: `sums[i * CHUNK + c]`.
struct Dots<'a> {
    rows: &'a Rows<'a>,
    x: &'a [f32],
    m: usize,
    column: usize,
    sums: &'a mut [f32; MAX_M * CHUNK],
}

impl Kernel for Dots<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Enough sums side by side that additions do not wait for each other, few enough for the registers.
        match (self.m, S::WIDTH >= 16 || S::WIDTH == 4) {
            (1, _) => self.of::<S, 1, 4, 2>(s),
            (2, true) => self.of::<S, 2, 4, 2>(s),
            (3, true) => self.of::<S, 3, 4, 1>(s),
            (4, true) => self.of::<S, 4, 4, 1>(s),
            (5, true) => self.of::<S, 5, 4, 1>(s),
            (6, true) => self.of::<S, 6, 4, 1>(s),
            (7, true) => self.of::<S, 7, 3, 1>(s),
            (8, true) => self.of::<S, 8, 3, 1>(s),
            (2, false) => self.of::<S, 2, 2, 2>(s),
            (3, false) => self.of::<S, 3, 2, 1>(s),
            (4, false) => self.of::<S, 4, 2, 1>(s),
            (5, false) => self.of::<S, 5, 2, 1>(s),
            (6, false) => self.of::<S, 6, 1, 1>(s),
            (7, false) => self.of::<S, 7, 1, 1>(s),
            _ => self.of::<S, 8, 1, 1>(s),
        }
    }
}

impl Dots<'_> {
    /// `M` rows of `x` with `R` weight rows at a time, `U` vectors of each.
    #[inline(always)]
    fn of<S: Simd, const M: usize, const R: usize, const U: usize>(self, s: S) {
        let mut c = 0;
        while c < CHUNK {
            let (row, count) = self.rows.run(self.column + c);
            let Some((part, row, rows)) = self.rows.find(row).filter(|_| count > 0) else {
                c += 1;
                continue;
            };
            let count = count.min(rows).min(CHUNK - c);
            let k = self.rows.k;
            let sums = &mut self.sums[c..];
            // SAFETY: `count` rows of `k` elements from `row` inside the part, whose size was checked.
            unsafe {
                match part.weight {
                    Weight::F32(v) => {
                        rows_of::<S, f32, M, R, U>(
                            s,
                            v.as_ptr().add(row * k),
                            count,
                            self.x.as_ptr(),
                            k,
                            sums,
                        );
                    }
                    Weight::F16(v) => {
                        let w = v.as_ptr().add(row * k).cast::<f16>();
                        rows_of::<S, f16, M, R, U>(s, w, count, self.x.as_ptr(), k, sums);
                    }
                    Weight::BF16(v) => {
                        let w = v.as_ptr().add(row * k).cast::<bf16>();
                        rows_of::<S, bf16, M, R, U>(s, w, count, self.x.as_ptr(), k, sums);
                    }
                    // Packed parts have a product of their own.
                    Weight::Packed(_) => {}
                }
            }
            c += count;
        }
    }
}

/// `sums[i * CHUNK + r] = w[r] . x[i]` for `r < count`, `i < M`.
///
/// # Safety
/// `count` rows of `k` elements at `w`, `M` at `x`.
#[inline(always)]
unsafe fn rows_of<S: Simd, E: Element, const M: usize, const R: usize, const U: usize>(
    s: S,
    w: *const E,
    count: usize,
    x: *const f32,
    k: usize,
    sums: &mut [f32],
) {
    let mut r = 0;
    while r < count {
        // SAFETY: rows from `r`, as many as are left of `R`.
        unsafe {
            if r + R <= count {
                let dots = dot::<S, E, M, R, U>(s, w.add(r * k), x, k);
                for (i, dots) in dots.iter().enumerate() {
                    sums[i * CHUNK + r..i * CHUNK + r + R].copy_from_slice(dots);
                }
                r += R;
            } else {
                let dots = dot::<S, E, M, 1, U>(s, w.add(r * k), x, k);
                for (i, dots) in dots.iter().enumerate() {
                    sums[i * CHUNK + r] = dots[0];
                }
                r += 1;
            }
        }
    }
}

/// `w[r] . x[i]` for `M` rows of `x` and `R` rows of `w`.
///
/// # Safety
/// `R * k` elements at `w`, `M * k` at `x`.
#[inline(always)]
unsafe fn dot<S: Simd, E: Element, const M: usize, const R: usize, const U: usize>(
    s: S,
    w: *const E,
    x: *const f32,
    k: usize,
) -> [[f32; R]; M] {
    let mut sums = [[[s.splat(0.0); U]; R]; M];
    let step = U * S::WIDTH;
    let mut p = 0;
    // SAFETY: the caller's promise; prefetched addresses may lie anywhere.
    unsafe {
        while p + step <= k {
            for u in 0..U {
                let at = p + u * S::WIDTH;
                let mut v = [s.splat(0.0); R];
                for r in 0..R {
                    let row = w.add(r * k + at);
                    v[r] = E::load(s, row);
                    // A line of 16-bit elements is asked for twice; that is cheaper than to find out.
                    s.prefetch(row.cast::<u8>().wrapping_add(AHEAD));
                }
                for i in 0..M {
                    let x = s.load(x.add(i * k + at));
                    for r in 0..R {
                        sums[i][r][u] = s.fma(v[r], x, sums[i][r][u]);
                    }
                }
            }
            p += step;
        }
        while p < k {
            let n = (k - p).min(S::WIDTH);
            for r in 0..R {
                let v = E::load_n(s, w.add(r * k + p), n);
                for i in 0..M {
                    sums[i][r][0] = s.fma(v, s.load_n(x.add(i * k + p), n), sums[i][r][0]);
                }
            }
            p += n;
        }
    }
    let mut out = [[0.0; R]; M];
    for i in 0..M {
        for r in 0..R {
            let mut sum = sums[i][r][0];
            for u in 1..U {
                sum = s.add(sum, sums[i][r][u]);
            }
            out[i][r] = s.reduce_add(sum);
        }
    }
    out
}

/// `rows.chunk` is [`CHUNK`], `m <= MAX_M`.
pub(super) fn gemv(cpu: &Cpu, x: &[f32], m: usize, rows: &Rows<'_>, store: &Store<'_>) {
    cpu.parallel(rows.columns().div_ceil(CHUNK), &|chunk| {
        let column = chunk * CHUNK;
        let mut sums = [0f32; MAX_M * CHUNK];
        cpu.isa().run(Dots { rows, x, m, column, sums: &mut sums });
        let sums = &sums[..m * CHUNK];
        cpu.isa().run(FinishRows { finish: store, first_row: 0, column, sums, chunk: CHUNK });
    });
}
