//! `y[i, j] = exp(x[i, j] - max(x[i, :])) / sum_j exp(x[i, j] - max(x[i, :]))`; `x, y: [r, c]`.
//!
//! Causal: `x, y: [b, t, s]`; row `i` of each batch sees columns `j <= past + i`, the others become zero.
//! A row in which nothing is larger than minus infinity becomes NaN, as the formula says.

use super::{SharedMut, count, expect, for_rows};
use crate::simd::{Kernel, Simd, math};
use crate::{Cpu, Error, Result};

/// Checks sizes of rows of `c`.
fn check(op: &'static str, x: &[f32], c: usize, y: &[f32]) -> Result<()> {
    if c == 0 && !x.is_empty() || c != 0 && !x.len().is_multiple_of(c) {
        return Err(Error::Value { op, what: format!("{} elements do not make rows of {c}", x.len()) });
    }
    expect(op, "y", &[x.len()], y.len())
}

fn check_causal(x: &[f32], [b, t, s]: [usize; 3], y: &[f32]) -> Result<()> {
    const OP: &str = "softmax_causal";
    expect(OP, "x", &[b, t, s], x.len())?;
    expect(OP, "y", &[b, t, s], y.len())?;
    count(OP, "x", &[b, t]).map(|_| ())
}

/// Softmax of rows of `c` elements; `x, y: [r, c]`.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn softmax(cpu: &Cpu, x: &[f32], c: usize, y: &mut [f32]) -> Result<()> {
    check("softmax", x, c, y)?;
    rows(cpu, x, c, y, &|_| c);
    Ok(())
}

/// Softmax of row `i` of `t` over columns `j <= past + i` of `s`; `x, y: [b, t, s]`.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn softmax_causal(cpu: &Cpu, x: &[f32], shape: [usize; 3], past: usize, y: &mut [f32]) -> Result<()> {
    check_causal(x, shape, y)?;
    let [_, t, s] = shape;
    rows(cpu, x, s, y, &|row| past.saturating_add(row % t + 1).min(s));
    Ok(())
}

/// Softmax of the first `seen(i)` elements of each row `i`; the others become zero.
fn rows(cpu: &Cpu, x: &[f32], c: usize, y: &mut [f32], seen: &(dyn Fn(usize) -> usize + Sync)) {
    if y.is_empty() {
        return;
    }
    let (r, out) = (y.len() / c, SharedMut::new(y));
    for_rows(cpu, r, c, &|range| {
        for i in range {
            let seen = seen(i);
            // SAFETY: inside `y` as checked; row `i` belongs to this task.
            let (y, rest) = unsafe { out.slice(i * c..(i + 1) * c) }.split_at_mut(seen);
            cpu.isa().run(Row { x: &x[i * c..][..seen], y });
            rest.fill(0.0);
        }
    });
}

/// One row, of the same length in `x` and `y`.
struct Row<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, whole) = (self.x.len(), self.x.len() / S::WIDTH * S::WIDTH);
        let (x, y) = (self.x.as_ptr(), self.y.as_mut_ptr());
        // SAFETY: whole vectors, then the remaining elements, of two rows of `n`.
        unsafe {
            let mut max = s.splat(f32::NEG_INFINITY);
            for j in (0..whole).step_by(S::WIDTH) {
                max = s.max(s.load(x.add(j)), max);
            }
            let max = self.x[whole..].iter().fold(s.reduce_max(max), |m, &v| if v > m { v } else { m });
            let shift = s.splat(max);
            let mut sum = s.splat(0.0);
            for j in (0..whole).step_by(S::WIDTH) {
                let e = math::exp(s, s.sub(s.load(x.add(j)), shift));
                s.store(y.add(j), e);
                sum = s.add(sum, e);
            }
            let e = math::exp(s, s.sub(s.load_n(x.add(whole), n - whole), shift));
            s.store_n(y.add(whole), n - whole, e);
            let sum = s.reduce_add(sum) + self.y[whole..].iter().sum::<f32>();
            let total = s.splat(sum);
            let y = self.y.as_mut_ptr();
            for j in (0..n).step_by(S::WIDTH) {
                let count = (n - j).min(S::WIDTH);
                s.store_n(y.add(j), count, s.div(s.load_n(y.add(j), count), total));
            }
        }
    }
}

/// One row, in f64.
fn row_twin(x: &[f32], y: &mut [f32]) {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    for (y, &v) in y.iter_mut().zip(x) {
        *y = ((f64::from(v) - max).exp() / sum) as f32;
    }
}

/// The scalar twin of [`softmax`], in f64.
pub fn softmax_twin(x: &[f32], c: usize, y: &mut [f32]) -> Result<()> {
    check("softmax", x, c, y)?;
    for (x, y) in x.chunks_exact(c.max(1)).zip(y.chunks_exact_mut(c.max(1))) {
        row_twin(x, y);
    }
    Ok(())
}

/// The scalar twin of [`softmax_causal`], in f64.
pub fn softmax_causal_twin(x: &[f32], shape: [usize; 3], past: usize, y: &mut [f32]) -> Result<()> {
    check_causal(x, shape, y)?;
    let [_, t, s] = shape;
    for (row, (x, y)) in x.chunks_exact(s.max(1)).zip(y.chunks_exact_mut(s.max(1))).enumerate() {
        let seen = past.saturating_add(row % t + 1).min(s);
        row_twin(&x[..seen], &mut y[..seen]);
        y[seen..].fill(0.0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{F32, SIZES, check, try_check, values};

    #[test]
    fn softmax_matches_its_twin() {
        for c in SIZES.into_iter().chain([3000]) {
            for r in [1, 2, 7] {
                let x: Vec<f32> = values(r * c, 1).iter().map(|v| v * 30.0).collect();
                let mut wanted = vec![0.0; r * c];
                softmax_twin(&x, c, &mut wanted).unwrap();
                check(&format!("{r}x{c}"), &wanted, F32, &|cpu, y| softmax(cpu, &x, c, y));
            }
        }
    }

    #[test]
    fn causal_softmax_matches_its_twin() {
        for [b, t, s, past] in [[1, 1, 1, 0], [2, 5, 5, 0], [3, 4, 20, 16], [1, 40, 100, 3], [2, 3, 2, 9]] {
            let x = values(b * t * s, 1);
            let mut wanted = vec![0.0; b * t * s];
            softmax_causal_twin(&x, [b, t, s], past, &mut wanted).unwrap();
            check("causal", &wanted, F32, &|cpu, y| softmax_causal(cpu, &x, [b, t, s], past, y));
        }
    }

    #[test]
    fn extreme_rows_match_the_twin() {
        for c in [3, 16, 33] {
            for value in [1e38, -1e38, 0.0, f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
                let mut x = vec![value; c];
                x.extend(vec![f32::NEG_INFINITY; c]);
                x[c + c / 2] = 2.0;
                x.extend(values(c, 1));
                x[2 * c] = value;
                let mut wanted = vec![0.0; 3 * c];
                softmax_twin(&x, c, &mut wanted).unwrap();
                check(&format!("{value} {c}"), &wanted, F32, &|cpu, y| softmax(cpu, &x, c, y));
            }
        }
    }

    #[test]
    fn a_wrong_row_length_is_noticed() {
        let x = values(64, 1);
        let mut wanted = vec![0.0; 64];
        softmax_twin(&x, 32, &mut wanted).unwrap();
        assert!(try_check(&wanted, F32, &|cpu, y| softmax(cpu, &x, 64, y)).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_typed_errors() {
        let cpu = Cpu::new(1).unwrap();
        assert!(softmax(&cpu, &[0.0; 6], 4, &mut [0.0; 6]).is_err());
        assert!(softmax(&cpu, &[0.0; 6], 0, &mut [0.0; 6]).is_err());
        assert!(softmax(&cpu, &[], 0, &mut []).is_ok());
        assert!(matches!(softmax(&cpu, &[0.0; 6], 3, &mut [0.0; 5]), Err(Error::Size { operand: "y", .. })));
        assert!(softmax_causal(&cpu, &[0.0; 6], [1, 2, 4], 0, &mut [0.0; 6]).is_err());
    }
}
