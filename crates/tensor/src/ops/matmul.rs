//! `y[b, i, j] = sum_k a[b, i, k] * b[b, k, j]`; `a: [batch, m, k]`, `b: [batch, k, n]` or, transposed,
//! `[batch, n, k]`, `y: [batch, m, n]`.

use std::sync::Mutex;

use super::gemm::{Finish, Panels, chunk_columns, gemm};
use super::tile::panel_columns;
use super::{SharedMut, expect};
use crate::simd::Simd;
use crate::{Cpu, Result};

const OP: &str = "matmul";

/// How the right operand is stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatmulB {
    /// `[batch, k, n]`
    Normal,
    /// `[batch, n, k]`
    Transposed,
}

fn check(a: &[f32], b: &[f32], [batch, m, k, n]: [usize; 4], y: &[f32]) -> Result<()> {
    expect(OP, "a", &[batch, m, k], a.len())?;
    expect(OP, "b", &[batch, k, n], b.len())?;
    expect(OP, "y", &[batch, m, n], y.len())
}

/// See the module; `shape` is `[batch, m, k, n]`.
///
/// # Errors
/// [`Error::Size`](crate::Error::Size) where operands do not fit,
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory) where there is none for scratch.
pub fn matmul(
    cpu: &Cpu,
    a: &[f32],
    b: &[f32],
    layout: MatmulB,
    shape: [usize; 4],
    y: &mut [f32],
) -> Result<()> {
    check(a, b, shape, y)?;
    let [batch, m, k, n] = shape;
    if y.is_empty() {
        return Ok(());
    }
    let out = SharedMut::new(y);
    let one = |z: usize| {
        let panels = Matrix { b: &b[z * k * n..][..k * n], layout, k, n };
        let store = Store { y: out, first: z * m * n, n };
        gemm(cpu, &a[z * m * k..][..m * k], k, [m, k, n], chunk_columns(cpu, n), &panels, &store)
    };
    if batch < 2 * cpu.threads() {
        return (0..batch).try_for_each(one);
    }
    // The products' own regions then run on whichever thread has the product.
    let error = Mutex::new(Ok(()));
    cpu.parallel(batch, &|z| {
        if let Err(e) = one(z) {
            *error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Err(e);
        }
    });
    error.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// One right operand.
struct Matrix<'a> {
    b: &'a [f32],
    layout: MatmulB,
    k: usize,
    n: usize,
}

impl Panels for Matrix<'_> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, s: S, column: usize, k0: usize, kc: usize, dst: *mut f32) {
        let nr = panel_columns(S::WIDTH);
        for c in (0..nr).step_by(S::WIDTH) {
            let count = self.n.saturating_sub(column + c).min(S::WIDTH);
            let mut p = 0;
            // SAFETY: `count` columns and `kc` steps exist in `b`; the panel has room for `NR` columns.
            unsafe {
                let dst = dst.add(c);
                if self.layout == MatmulB::Normal {
                    for p in 0..kc {
                        let src = self.b.as_ptr().wrapping_add((k0 + p) * self.n + column + c);
                        s.store(dst.add(p * nr), s.load_n(src, count));
                    }
                    continue;
                }
                let src = self.b.as_ptr().wrapping_add((column + c) * self.k + k0);
                if count == S::WIDTH {
                    while p + S::WIDTH <= kc {
                        s.transpose(src.add(p), self.k, dst.add(p * nr), nr);
                        p += S::WIDTH;
                    }
                }
                for p in p..kc {
                    for i in 0..S::WIDTH {
                        *dst.add(p * nr + i) = if i < count { *src.add(i * self.k + p) } else { 0.0 };
                    }
                }
            }
        }
    }

    fn stored(&self, _: usize, _: usize, _: usize) -> (*const u8, usize, usize, usize) {
        (std::ptr::null(), 0, 0, 0)
    }
}

/// Stores sums as they are.
struct Store {
    y: SharedMut<f32>,
    first: usize,
    n: usize,
}

impl Finish for Store {
    #[inline(always)]
    fn finish<S: Simd>(&self, _: S, row: usize, column: usize, sums: &[f32]) {
        let count = sums.len().min(self.n - column);
        // SAFETY: these columns of the row exist and belong to this task.
        let y = unsafe {
            self.y.slice(self.first + row * self.n + column..self.first + row * self.n + column + count)
        };
        y.copy_from_slice(&sums[..count]);
    }
}

/// The scalar twin of [`matmul`], accumulating in f64.
pub fn matmul_twin(a: &[f32], b: &[f32], layout: MatmulB, shape: [usize; 4], y: &mut [f32]) -> Result<()> {
    check(a, b, shape, y)?;
    let [batch, m, k, n] = shape;
    for z in 0..batch {
        for i in 0..m {
            for j in 0..n {
                let mut sum = 0f64;
                for p in 0..k {
                    let b = match layout {
                        MatmulB::Normal => b[(z * k + p) * n + j],
                        MatmulB::Transposed => b[(z * n + j) * k + p],
                    };
                    sum += f64::from(a[(z * m + i) * k + p]) * f64::from(b);
                }
                y[(z * m + i) * n + j] = sum as f32;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Close, check, try_check, values};

    const CLOSE: Close = Close { relative: 1e-5, absolute: 1e-5 };

    #[test]
    fn matmul_matches_its_twin_in_both_layouts() {
        for shape in [
            [1, 1, 1, 1],
            [2, 3, 17, 31],
            [1, 14, 16, 32],
            [3, 15, 33, 65],
            [9, 5, 7, 3],
            [1, 64, 100, 130],
            [1, 20, 600, 40],
            [2, 4, 0, 3],
            [0, 4, 4, 4],
            [1, 0, 4, 4],
        ] {
            let [batch, m, k, n] = shape;
            let (a, b) = (values(batch * m * k, 1), values(batch * k * n, 2));
            for layout in [MatmulB::Normal, MatmulB::Transposed] {
                let mut wanted = vec![0.0; batch * m * n];
                matmul_twin(&a, &b, layout, shape, &mut wanted).unwrap();
                check(&format!("{shape:?} {layout:?}"), &wanted, CLOSE, &|cpu, y| {
                    matmul(cpu, &a, &b, layout, shape, y)
                });
            }
        }
    }

    #[test]
    fn the_other_layout_is_noticed() {
        let shape = [1, 16, 16, 16];
        let (a, b) = (values(256, 1), values(256, 2));
        let mut wanted = vec![0.0; 256];
        matmul_twin(&a, &b, MatmulB::Normal, shape, &mut wanted).unwrap();
        assert!(
            try_check(&wanted, CLOSE, &|cpu, y| matmul(cpu, &a, &b, MatmulB::Transposed, shape, y)).is_err()
        );
    }

    #[test]
    fn sizes_that_do_not_fit_are_typed_errors() {
        let cpu = Cpu::new(1).unwrap();
        let run = |a: &[f32], b: &[f32], y: &mut [f32]| matmul(&cpu, a, b, MatmulB::Normal, [1, 2, 3, 4], y);
        assert!(run(&[0.0; 6], &[0.0; 12], &mut [0.0; 8]).is_ok());
        assert!(run(&[0.0; 5], &[0.0; 12], &mut [0.0; 8]).is_err());
        assert!(run(&[0.0; 6], &[0.0; 11], &mut [0.0; 8]).is_err());
        assert!(run(&[0.0; 6], &[0.0; 12], &mut [0.0; 9]).is_err());
    }
}
