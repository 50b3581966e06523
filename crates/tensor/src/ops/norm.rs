//! Normalisation of rows; `x: [r, c]`, `weight, bias: [c]`, `y: [r, c]`.
//!
//! - `rms_norm`: `y[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * weight`
//! - `norm_add`: `y = residual + rms_norm(x)`
//! - `layer_norm`: `y[i, :] = (x[i, :] - mean) / sqrt(mean((x[i, :] - mean)^2) + eps) * weight + bias`

use super::conv_frames::activated;
use super::{Epilogue, SharedMut, expect, for_rows};
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Error, Result};

/// Checks sizes and returns `(r, c)`.
fn check(
    op: &'static str,
    x: &[f32],
    weight: &[f32],
    others: &[(&'static str, usize)],
) -> Result<(usize, usize)> {
    let c = weight.len();
    if c == 0 || !x.len().is_multiple_of(c) {
        return Err(Error::Value { op, what: format!("{} elements do not make rows of {c}", x.len()) });
    }
    for &(operand, found) in others {
        expect(op, operand, &[x.len()], found)?;
    }
    Ok((x.len() / c, c))
}

/// `y[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * weight`; `x, y: [r, c]`, `weight: [c]`.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    let (r, c) = check("rms_norm", x, weight, &[("y", y.len())])?;
    each_row(cpu, r, c, y, &|i, y| {
        cpu.isa().run(Rms { x: &x[i * c..][..c], residual: None, weight, eps, y })
    });
    Ok(())
}

/// `y = residual + rms_norm(x)`; `residual, x, y: [r, c]`, `weight: [c]`.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn norm_add(
    cpu: &Cpu,
    residual: &[f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
) -> Result<()> {
    let (r, c) = check("norm_add", x, weight, &[("residual", residual.len()), ("y", y.len())])?;
    each_row(cpu, r, c, y, &|i, y| {
        let residual = Some(&residual[i * c..][..c]);
        cpu.isa().run(Rms { x: &x[i * c..][..c], residual, weight, eps, y });
    });
    Ok(())
}

/// `y[i, :] = (x[i, :] - mean) / sqrt(variance + eps) * weight + bias`; `x, y: [r, c]`, `weight, bias: [c]`.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn layer_norm(cpu: &Cpu, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    let (r, c) = check("layer_norm", x, weight, &[("y", y.len())])?;
    expect("layer_norm", "bias", &[c], bias.len())?;
    each_row(cpu, r, c, y, &|i, y| cpu.isa().run(Layer { x: &x[i * c..][..c], weight, bias, eps, y }));
    Ok(())
}

/// Normalises the rows of `y` themselves and applies an epilogue; `weight` and `bias` are as long as a row.
pub(super) fn layer_norm_in_place(
    cpu: &Cpu,
    y: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    epilogue: Epilogue,
) {
    let c = weight.len();
    each_row(cpu, y.len() / c.max(1), c, y, &|_, y| {
        cpu.isa().run(LayerInPlace { weight, bias, eps, epilogue, y })
    });
}

/// Calls `f` with the number of each row and that row of `y`, in parallel.
fn each_row(cpu: &Cpu, r: usize, c: usize, y: &mut [f32], f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let out = SharedMut::new(y);
    for_rows(cpu, r, c, &|rows| {
        for i in rows {
            // SAFETY: inside `y`, whose size was checked; row `i` belongs to this task.
            f(i, unsafe { out.slice(i * c..(i + 1) * c) });
        }
    });
}

/// Sum of `f` over vectors of a row; lanes past the end are not counted.
macro_rules! sum {
    ($s:ident, $x:expr, $v:ident => $f:expr) => {{
        let x: &[f32] = $x;
        let mut sums = [$s.splat(0.0); 4];
        let mut j = 0;
        // SAFETY: vectors inside `x`.
        unsafe {
            while j + 4 * S::WIDTH <= x.len() {
                for u in 0..4 {
                    let $v = $s.load(x.as_ptr().add(j + u * S::WIDTH));
                    sums[u] = $s.add(sums[u], $f);
                }
                j += 4 * S::WIDTH;
            }
            while j + S::WIDTH <= x.len() {
                let $v = $s.load(x.as_ptr().add(j));
                sums[0] = $s.add(sums[0], $f);
                j += S::WIDTH;
            }
            let mut lanes = [0f32; 16];
            let $v = $s.load_n(x.as_ptr().add(j), x.len() - j);
            $s.store(lanes.as_mut_ptr(), $f);
            let rest: f32 = lanes[..x.len() - j].iter().sum();
            $s.reduce_add($s.add($s.add(sums[0], sums[1]), $s.add(sums[2], sums[3]))) + rest
        }
    }};
}

/// RMS norm of one row, with or without a residual that is added.
struct Rms<'a> {
    x: &'a [f32],
    residual: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Rms<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.len();
        let squares = sum!(s, self.x, v => s.mul(v, v));
        let scale = s.splat(1.0 / (squares / c as f32 + self.eps).sqrt());
        for j in (0..c).step_by(S::WIDTH) {
            let n = (c - j).min(S::WIDTH);
            // SAFETY: all operands are rows of `c`, as checked.
            unsafe {
                let v = s.mul(s.load_n(self.x.as_ptr().add(j), n), scale);
                let v = s.mul(v, s.load_n(self.weight.as_ptr().add(j), n));
                let v = match self.residual {
                    Some(residual) => s.add(v, s.load_n(residual.as_ptr().add(j), n)),
                    None => v,
                };
                s.store_n(self.y.as_mut_ptr().add(j), n, v);
            }
        }
    }
}

/// Layer norm of one row; the variance from differences to the mean, which does not cancel.
struct Layer<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Layer<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.len();
        let mean = s.splat(sum!(s, self.x, v => v) / c as f32);
        let squares = sum!(s, self.x, v => s.mul(s.sub(v, mean), s.sub(v, mean)));
        let scale = s.splat(1.0 / (squares / c as f32 + self.eps).sqrt());
        for j in (0..c).step_by(S::WIDTH) {
            let n = (c - j).min(S::WIDTH);
            // SAFETY: all operands are rows of `c`, as checked.
            unsafe {
                let v = s.mul(s.sub(s.load_n(self.x.as_ptr().add(j), n), mean), scale);
                let (w, b) =
                    (s.load_n(self.weight.as_ptr().add(j), n), s.load_n(self.bias.as_ptr().add(j), n));
                s.store_n(self.y.as_mut_ptr().add(j), n, s.fma(v, w, b));
            }
        }
    }
}

/// The same in place, with an epilogue.
struct LayerInPlace<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    epilogue: Epilogue,
    y: &'a mut [f32],
}

impl Kernel for LayerInPlace<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.len();
        let mean = s.splat(sum!(s, self.y, v => v) / c as f32);
        let squares = sum!(s, self.y, v => s.mul(s.sub(v, mean), s.sub(v, mean)));
        let scale = s.splat(1.0 / (squares / c as f32 + self.eps).sqrt());
        for j in (0..c).step_by(S::WIDTH) {
            let n = (c - j).min(S::WIDTH);
            // SAFETY: all operands are rows of `c`, as the caller checked.
            unsafe {
                let v = s.mul(s.sub(s.load_n(self.y.as_ptr().add(j), n), mean), scale);
                let (w, b) =
                    (s.load_n(self.weight.as_ptr().add(j), n), s.load_n(self.bias.as_ptr().add(j), n));
                s.store_n(self.y.as_mut_ptr().add(j), n, activated(s, self.epilogue, s.fma(v, w, b)));
            }
        }
    }
}

/// The scalar twin of [`rms_norm`], accumulating in f64.
pub fn rms_norm_twin(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    let (_, c) = check("rms_norm", x, weight, &[("y", y.len())])?;
    for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        let squares: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let scale = 1.0 / (squares / c as f64 + f64::from(eps)).sqrt();
        for j in 0..c {
            y[j] = (f64::from(x[j]) * scale * f64::from(weight[j])) as f32;
        }
    }
    Ok(())
}

/// The scalar twin of [`norm_add`].
pub fn norm_add_twin(residual: &[f32], x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    check("norm_add", x, weight, &[("residual", residual.len()), ("y", y.len())])?;
    rms_norm_twin(x, weight, eps, y)?;
    for (y, r) in y.iter_mut().zip(residual) {
        *y += r;
    }
    Ok(())
}

/// The scalar twin of [`layer_norm`], accumulating in f64.
pub fn layer_norm_twin(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    let (_, c) = check("layer_norm", x, weight, &[("y", y.len())])?;
    expect("layer_norm", "bias", &[c], bias.len())?;
    for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / c as f64;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / c as f64;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        for j in 0..c {
            y[j] = ((f64::from(x[j]) - mean) * scale * f64::from(weight[j]) + f64::from(bias[j])) as f32;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{F32, SIZES, check, try_check, values};

    #[test]
    fn norms_match_their_twins() {
        for c in SIZES.into_iter().chain([4096]) {
            for r in [1, 2, 5] {
                let (x, residual) = (values(r * c, 1), values(r * c, 2));
                let (weight, bias) = (values(c, 3), values(c, 4));
                let mut wanted = vec![0.0; r * c];
                rms_norm_twin(&x, &weight, 1e-5, &mut wanted).unwrap();
                check("rms_norm", &wanted, F32, &|cpu, y| rms_norm(cpu, &x, &weight, 1e-5, y));
                norm_add_twin(&residual, &x, &weight, 1e-5, &mut wanted).unwrap();
                check("norm_add", &wanted, F32, &|cpu, y| norm_add(cpu, &residual, &x, &weight, 1e-5, y));
                if c > 1 {
                    layer_norm_twin(&x, &weight, &bias, 1e-5, &mut wanted).unwrap();
                    check("layer_norm", &wanted, F32, &|cpu, y| layer_norm(cpu, &x, &weight, &bias, 1e-5, y));
                }
            }
        }
    }

    #[test]
    fn equal_zero_and_special_rows_match_their_twins() {
        let c = 35;
        for value in [0.0, 3.0, -1e4, 1e-30, f32::INFINITY, f32::NAN] {
            let mut x = vec![value; c];
            x.extend(values(c, 1));
            let (weight, bias) = (values(c, 3), values(c, 4));
            let mut wanted = vec![0.0; 2 * c];
            rms_norm_twin(&x, &weight, 1e-6, &mut wanted).unwrap();
            check("rms_norm", &wanted, F32, &|cpu, y| rms_norm(cpu, &x, &weight, 1e-6, y));
            layer_norm_twin(&x, &weight, &bias, 1e-6, &mut wanted).unwrap();
            // A mean that is off by a rounding of 1e4 is seen through 1 / sqrt(eps).
            if value.abs() < 1e4 || !value.is_finite() {
                check("layer_norm", &wanted, F32, &|cpu, y| layer_norm(cpu, &x, &weight, &bias, 1e-6, y));
            }
        }
    }

    #[test]
    fn a_wrong_epsilon_is_noticed() {
        let (x, weight) = (values(64, 1), values(64, 2));
        let mut wanted = vec![0.0; 64];
        rms_norm_twin(&x, &weight, 1e-5, &mut wanted).unwrap();
        assert!(try_check(&wanted, F32, &|cpu, y| rms_norm(cpu, &x, &weight, 1e-3, y)).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_typed_errors() {
        let cpu = Cpu::new(1).unwrap();
        let (x, w) = ([0.0; 6], [0.0; 3]);
        assert!(matches!(rms_norm(&cpu, &x, &[0.0; 4], 0.1, &mut [0.0; 6]), Err(Error::Value { .. })));
        assert!(matches!(rms_norm(&cpu, &x, &[], 0.1, &mut [0.0; 6]), Err(Error::Value { .. })));
        assert!(matches!(rms_norm(&cpu, &x, &w, 0.1, &mut [0.0; 5]), Err(Error::Size { operand: "y", .. })));
        assert!(norm_add(&cpu, &x[..5], &x, &w, 0.1, &mut [0.0; 6]).is_err());
        assert!(layer_norm(&cpu, &x, &w, &w[..2], 0.1, &mut [0.0; 6]).is_err());
    }
}
