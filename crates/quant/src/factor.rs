//! `H = U D U^T` with a unit upper triangular `U`, for symmetric positive definite `H`.
//!
//! Blocked Cholesky factorisation whose bulk runs in the matrix product of the tensor crate. The factorisation of
//! `H` with its order of rows and columns reversed is lower triangular; read backwards, it is the upper one.

use pocketglm_tensor::Cpu;
use pocketglm_tensor::ops::{MatmulB, matmul};

use crate::{Error, Result};

/// Columns that are factored at once.
const PANEL: usize = 128;
/// Rows of the rest that one product updates.
const STRIPE: usize = 512;

/// Memory for `n` numbers, or the error that says what it was for.
pub(crate) fn zeros(n: usize, what: &'static str) -> Result<Vec<f32>> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| Error::OutOfMemory { elements: n, what })?;
    v.resize(n, 0.0);
    Ok(v)
}

/// The unit upper triangle `U`, row-major `[k, k]` with ones on the diagonal; `None` where `H` is not positive
/// definite in f32. `h` is overwritten; only its upper triangle is read.
pub(crate) fn unit_upper(cpu: &Cpu, mut h: Vec<f32>, k: usize) -> Result<Option<Vec<f32>>> {
    h.reverse();
    if !cholesky(cpu, &mut h, k)? {
        return Ok(None);
    }
    h.reverse();
    let inverse: Vec<f32> = (0..k).map(|i| 1.0 / h[i * k + i]).collect();
    for (j, row) in h.chunks_exact_mut(k).enumerate() {
        row[..j].fill(0.0);
        for (u, inverse) in row[j..].iter_mut().zip(&inverse[j..]) {
            *u *= inverse;
        }
        row[j] = 1.0;
    }
    Ok(Some(h))
}

/// `A = L L^T` in the lower triangle of `a: [k, k]`; false where a pivot is not positive.
fn cholesky(cpu: &Cpu, a: &mut [f32], k: usize) -> Result<bool> {
    let mut panel = Vec::new();
    let mut below = Vec::new();
    let mut update = Vec::new();
    for first in (0..k).step_by(PANEL) {
        let last = (first + PANEL).min(k);
        let width = last - first;
        let Some(inverse) = factor_diagonal(a, k, first, width) else { return Ok(false) };
        let rows = k - last;
        if rows == 0 {
            break;
        }
        // L21 = A21 * L11^-T
        panel.clear();
        for row in last..k {
            panel.extend_from_slice(&a[row * k + first..row * k + last]);
        }
        below.resize(rows * width, 0.0);
        matmul(cpu, &panel, &inverse, MatmulB::Transposed, [1, rows, width, width], &mut below)?;
        for (row, values) in below.chunks_exact(width).enumerate() {
            a[(last + row) * k + first..][..width].copy_from_slice(values);
        }
        // A22 -= L21 * L21^T, up to the diagonal.
        for start in (0..rows).step_by(STRIPE) {
            let end = (start + STRIPE).min(rows);
            update.resize((end - start) * end, 0.0);
            let shape = [1, end - start, width, end];
            let (left, right) = (&below[start * width..end * width], &below[..end * width]);
            matmul(cpu, left, right, MatmulB::Transposed, shape, &mut update)?;
            for (row, update) in update.chunks_exact(end).enumerate() {
                let row = &mut a[(last + start + row) * k + last..][..end];
                row.iter_mut().zip(update).for_each(|(a, u)| *a -= u);
            }
        }
    }
    Ok(true)
}

/// Factors the block at (`first`, `first`) in f64 and returns the inverse of its factor, row-major.
fn factor_diagonal(a: &mut [f32], k: usize, first: usize, width: usize) -> Option<Vec<f32>> {
    let mut l = vec![0.0f64; width * width];
    for i in 0..width {
        for j in 0..=i {
            let (before, row) = l.split_at(i * width);
            let other = if j == i { row } else { &before[j * width..] };
            let dot: f64 = row[..j].iter().zip(&other[..j]).map(|(a, b)| a * b).sum();
            let rest = f64::from(a[(first + i) * k + first + j]) - dot;
            l[i * width + j] = if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                rest.sqrt()
            } else {
                rest / l[j * width + j]
            };
        }
    }
    for i in 0..width {
        for j in 0..=i {
            a[(first + i) * k + first + j] = l[i * width + j] as f32;
        }
    }
    // Row `i` of the inverse: (e_i - sum_{j < i} l_ij * row_j) / l_ii.
    let mut inverse = vec![0.0f64; width * width];
    for i in 0..width {
        let (before, row) = inverse.split_at_mut(i * width);
        let row = &mut row[..width];
        row[i] = 1.0;
        for (j, other) in before.chunks_exact(width).enumerate() {
            let factor = l[i * width + j];
            row.iter_mut().zip(other).for_each(|(r, o)| *r -= factor * o);
        }
        row.iter_mut().for_each(|r| *r /= l[i * width + i]);
    }
    Some(inverse.into_iter().map(|v| v as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Random;

    #[test]
    fn factors_multiply_to_the_matrix() {
        let cpu = Cpu::new(2).unwrap();
        for k in [1, 2, 5, 128, 300, 520] {
            let x = Random(k as u64).gaussian((k + 20) * k);
            let mut h = vec![0.0; k * k];
            for row in x.chunks_exact(k) {
                for i in 0..k {
                    for j in 0..k {
                        h[i * k + j] += row[i] * row[j] / k as f32;
                    }
                }
            }
            let u = unit_upper(&cpu, h.clone(), k).unwrap().unwrap();
            // D from the last column backwards: H_ii = sum_{m >= i} U_im^2 D_m.
            let mut d = vec![0.0f64; k];
            for i in (0..k).rev() {
                let later: f64 = (i + 1..k).map(|m| f64::from(u[i * k + m]).powi(2) * d[m]).sum();
                d[i] = f64::from(h[i * k + i]) - later;
                assert!(d[i] > 0.0 && u[i * k + i] == 1.0 && u[i * k..][..i].iter().all(|&v| v == 0.0));
            }
            for (i, j) in (0..k).flat_map(|i| [(i, i / 2), (i, k - 1), (0, i)]) {
                let product: f64 =
                    (i.max(j)..k).map(|m| f64::from(u[i * k + m]) * d[m] * f64::from(u[j * k + m])).sum();
                assert!((product - f64::from(h[i * k + j])).abs() < 1e-4, "{k}: {i} {j}");
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused() {
        let cpu = Cpu::new(1).unwrap();
        assert!(unit_upper(&cpu, vec![1.0, 2.0, 2.0, 1.0], 2).unwrap().is_none());
        assert!(unit_upper(&cpu, vec![1.0, f32::NAN, f32::NAN, 1.0], 2).unwrap().is_none());
    }
}
