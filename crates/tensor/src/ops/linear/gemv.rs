//! A few rows of `x`: every weight row is read once, in order, and multiplied with all of them.

use half::{bf16, f16};

use super::rows::{Rows, Store};
use crate::ops::gemm::FinishRows;
use crate::simd::{Element, Kernel, Simd};
use crate::{Cpu, Weight};

/// Most rows of `x` that this is used for.
pub(super) const MAX_M: usize = 4;
/// Weight rows of one task; an even number.
pub(super) const CHUNK: usize = 32;
/// Vectors that are summed side by side, so that additions do not wait for each other.
const UNROLL: usize = 4;
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
        match self.m {
            1 => self.of::<S, 1>(s),
            2 => self.of::<S, 2>(s),
            3 => self.of::<S, 3>(s),
            _ => self.of::<S, 4>(s),
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn of<S: Simd, const M: usize>(self, s: S) {
        let k = self.rows.k;
        let mut c = 0;
        while c < CHUNK {
            let (row, count) = self.rows.run(self.column + c);
            let Some((part, row, rows)) = self.rows.find(row).filter(|_| count > 0) else {
                c += 1;
                continue;
            };
            let count = count.min(rows).min(CHUNK - c);
            for r in 0..count {
                let at = (row + r) * k;
                // SAFETY: rows of `k` elements inside the part and inside `x`, both checked.
                let dots = unsafe {
                    match part.weight {
                        Weight::F32(v) => dot::<S, f32, M>(s, v.as_ptr().add(at), self.x.as_ptr(), k),
                        Weight::F16(v) => dot::<S, f16, M>(s, v.as_ptr().add(at).cast(), self.x.as_ptr(), k),
                        Weight::BF16(v) => {
                            dot::<S, bf16, M>(s, v.as_ptr().add(at).cast(), self.x.as_ptr(), k)
                        }
                    }
                };
                for i in 0..M {
                    self.sums[i * CHUNK + c + r] = dots[i];
                }
            }
            c += count;
        }
    }
}

/// `w . x[i]` for `M` rows of `x`.
///
/// # Safety
/// `k` elements at `w`, `M * k` at `x`.
#[inline(always)]
unsafe fn dot<S: Simd, E: Element, const M: usize>(s: S, w: *const E, x: *const f32, k: usize) -> [f32; M] {
    let mut sums = [[s.splat(0.0); UNROLL]; M];
    let step = UNROLL * S::WIDTH;
    let mut p = 0;
    // SAFETY: the caller's promise; prefetched addresses may lie anywhere.
    unsafe {
        while p + step <= k {
            let ahead = w.add(p).cast::<u8>().wrapping_add(AHEAD);
            let mut line = 0;
            while line < step * size_of::<E>() {
                s.prefetch(ahead.wrapping_add(line));
                line += 64;
            }
            for u in 0..UNROLL {
                let v = E::load(s, w.add(p + u * S::WIDTH));
                for i in 0..M {
                    sums[i][u] = s.fma(v, s.load(x.add(i * k + p + u * S::WIDTH)), sums[i][u]);
                }
            }
            p += step;
        }
        while p < k {
            let n = (k - p).min(S::WIDTH);
            let v = E::load_n(s, w.add(p), n);
            for i in 0..M {
                sums[i][0] = s.fma(v, s.load_n(x.add(i * k + p), n), sums[i][0]);
            }
            p += n;
        }
    }
    let mut out = [0.0; M];
    for i in 0..M {
        let pairs = (s.add(sums[i][0], sums[i][1]), s.add(sums[i][2], sums[i][3]));
        out[i] = s.reduce_add(s.add(pairs.0, pairs.1));
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
