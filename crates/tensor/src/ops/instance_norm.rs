//! Normalisation of each channel over all frames (Ulyanov et al. 2016); it is a group norm with as many groups as
//! channels (Wu & He 2018): `y[t, c] = (x[t, c] - mean_c) / sqrt(var_c + eps) * weight[c] + bias[c]`;
//! `x, y: [frames, channels]`, `weight, bias: [channels]`, means and variances over `t`.
//!
//! Sums are made in f64 over blocks of frames and added block by block, so that they are exact enough for hours of
//! audio and the same for any number of threads.

use super::conv_frames::Activate;
use super::{Epilogue, SharedMut, expect, for_rows};
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Error, Result};

const OP: &str = "instance_norm";
/// Frames whose sums are made by one task.
const BLOCK: usize = 1024;

/// Checks sizes and returns the number of channels.
fn check(x: &[f32], weight: &[f32], bias: &[f32], y: &[f32]) -> Result<usize> {
    let c = weight.len();
    if c == 0 || !x.len().is_multiple_of(c) {
        return Err(Error::Value { op: OP, what: format!("{} elements do not make rows of {c}", x.len()) });
    }
    expect(OP, "bias", &[c], bias.len())?;
    expect(OP, "y", &[x.len()], y.len())?;
    Ok(c)
}

/// See the module.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn instance_norm(
    cpu: &Cpu,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    y: &mut [f32],
) -> Result<()> {
    check(x, weight, bias, y)?;
    y.copy_from_slice(x);
    instance_norm_in_place(cpu, y, weight, bias, eps, Epilogue::None);
    Ok(())
}

/// Normalises `y` itself and applies an epilogue.
pub(super) fn instance_norm_in_place(
    cpu: &Cpu,
    y: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    epilogue: Epilogue,
) {
    let c = weight.len();
    let frames = y.len() / c.max(1);
    if frames == 0 {
        return;
    }
    let sums = column_sums(cpu, y, c, &vec![0.0; c], false);
    let mean: Vec<f64> = sums.iter().map(|s| s / frames as f64).collect();
    let squares = column_sums(cpu, y, c, &mean, true);
    let scale = |i: usize| f64::from(weight[i]) / (squares[i] / frames as f64 + f64::from(eps)).sqrt();
    let scale: Vec<f64> = (0..c).map(scale).collect();
    // The nearest f32 of the mean is subtracted first, which is exact where it matters, and its error later.
    let centre: Vec<f32> = mean.iter().map(|&m| m as f32).collect();
    let rest = |i: usize| f64::from(bias[i]) - (mean[i] - f64::from(centre[i])) * scale[i];
    let shift: Vec<f32> = (0..c).map(|i| rest(i) as f32).collect();
    let scale: Vec<f32> = scale.iter().map(|&s| s as f32).collect();
    let out = SharedMut::new(y);
    for_rows(cpu, frames, c, &|rows| {
        for i in rows {
            // SAFETY: row `i` belongs to this task.
            let row = unsafe { out.slice(i * c..(i + 1) * c) };
            cpu.isa().run(Affine { row, centre: &centre, scale: &scale, shift: &shift });
            if epilogue != Epilogue::None {
                cpu.isa().run(Activate { epilogue, y: row });
            }
        }
    });
}

/// `row = (row - centre) * scale + shift`.
struct Affine<'a> {
    row: &'a mut [f32],
    centre: &'a [f32],
    scale: &'a [f32],
    shift: &'a [f32],
}

impl Kernel for Affine<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, width) = (self.row.len(), S::WIDTH);
        for j in (0..n).step_by(width) {
            let m = (n - j).min(width);
            // SAFETY: all four are as long as a row.
            unsafe {
                let v = s.load_n(self.row.as_ptr().add(j), m);
                let v = s.sub(v, s.load_n(self.centre.as_ptr().add(j), m));
                let (a, b) =
                    (s.load_n(self.scale.as_ptr().add(j), m), s.load_n(self.shift.as_ptr().add(j), m));
                s.store_n(self.row.as_mut_ptr().add(j), m, s.fma(v, a, b));
            }
        }
    }
}

/// For each column the sum of `x - centre`, or of its square.
fn column_sums(cpu: &Cpu, x: &[f32], c: usize, centre: &[f64], squared: bool) -> Vec<f64> {
    let blocks = x.len().div_ceil(c * BLOCK);
    let mut parts = vec![0f64; blocks * c];
    let shared = SharedMut::new(&mut parts);
    cpu.parallel(blocks, &|b| {
        let rows = &x[b * BLOCK * c..x.len().min((b + 1) * BLOCK * c)];
        // SAFETY: the sums of block `b` belong to this task.
        let sums = unsafe { shared.slice(b * c..(b + 1) * c) };
        cpu.isa().run(Sums { rows, centre, squared, sums });
    });
    let mut sums = vec![0f64; c];
    for part in parts.chunks_exact(c) {
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum += part;
        }
    }
    sums
}

struct Sums<'a> {
    rows: &'a [f32],
    centre: &'a [f64],
    squared: bool,
    sums: &'a mut [f64],
}

impl Kernel for Sums<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for row in self.rows.chunks_exact(self.sums.len()) {
            // Plain loops, which the compiler makes vectors of f64 of.
            if self.squared {
                for ((sum, x), centre) in self.sums.iter_mut().zip(row).zip(self.centre) {
                    let d = f64::from(*x) - centre;
                    *sum += d * d;
                }
            } else {
                for (sum, x) in self.sums.iter_mut().zip(row) {
                    *sum += f64::from(*x);
                }
            }
        }
    }
}

/// Means and covariances of the numbers under a kernel, over all its positions.
pub(super) struct Moments {
    /// `[k]`
    pub(super) mean: Vec<f64>,
    /// `[k, k]`
    pub(super) covariance: Vec<f64>,
}

impl Moments {
    /// Over `count` runs of `k` numbers that begin `stride` apart.
    pub(super) fn of_windows(cpu: &Cpu, x: &[f32], stride: usize, k: usize, count: usize) -> Moments {
        let over = |width: usize, add: &(dyn Fn(&[f32], &mut [f64]) + Sync)| -> Vec<f64> {
            let blocks = count.div_ceil(BLOCK);
            let mut parts = vec![0f64; blocks * width];
            let shared = SharedMut::new(&mut parts);
            cpu.parallel(blocks, &|b| {
                // SAFETY: the sums of block `b` belong to this task.
                let sums = unsafe { shared.slice(b * width..(b + 1) * width) };
                for i in b * BLOCK..count.min((b + 1) * BLOCK) {
                    add(&x[i * stride..i * stride + k], sums);
                }
            });
            let total = |at: usize| parts.iter().skip(at).step_by(width).sum::<f64>() / count as f64;
            (0..width).map(total).collect()
        };
        let mean = over(k, &|window, sums| {
            for (sum, v) in sums.iter_mut().zip(window) {
                *sum += f64::from(*v);
            }
        });
        let covariance = over(k * k, &|window, sums| {
            for p in 0..k {
                let d = f64::from(window[p]) - mean[p];
                for q in 0..k {
                    sums[p * k + q] += d * (f64::from(window[q]) - mean[q]);
                }
            }
        });
        Moments { mean, covariance }
    }
}

/// The scalar twin of [`instance_norm`], in f64.
pub fn instance_norm_twin(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) -> Result<()> {
    let c = check(x, weight, bias, y)?;
    let frames = (x.len() / c) as f64;
    for i in 0..c {
        let column = || x.iter().skip(i).step_by(c).map(|&v| f64::from(v));
        let mean = column().sum::<f64>() / frames;
        let variance = column().map(|v| (v - mean).powi(2)).sum::<f64>() / frames;
        let scale = f64::from(weight[i]) / (variance + f64::from(eps)).sqrt();
        for (y, v) in y.iter_mut().skip(i).step_by(c).zip(column()) {
            *y = ((v - mean) * scale + f64::from(bias[i])) as f32;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Close, F32, SIZES, check, try_check, values};

    #[test]
    fn instance_norms_match_their_twin() {
        for c in SIZES {
            for frames in [1, 2, 1023, 1500] {
                let (x, weight, bias) = (values(frames * c, 1), values(c, 2), values(c, 3));
                let mut wanted = vec![0.0; frames * c];
                instance_norm_twin(&x, &weight, &bias, 1e-5, &mut wanted).unwrap();
                check("instance_norm", &wanted, Close { relative: 1e-5, absolute: 3e-6 }, &|cpu, y| {
                    instance_norm(cpu, &x, &weight, &bias, 1e-5, y)
                });
            }
        }
    }

    #[test]
    fn a_wrong_epsilon_is_noticed() {
        let (x, weight, bias) = (values(640, 1), values(64, 2), values(64, 3));
        let mut wanted = vec![0.0; 640];
        instance_norm_twin(&x, &weight, &bias, 1e-5, &mut wanted).unwrap();
        let wrong = |cpu: &Cpu, y: &mut [f32]| instance_norm(cpu, &x, &weight, &bias, 1e-2, y);
        assert!(try_check(&wanted, F32, &wrong).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_typed_errors() {
        let cpu = Cpu::new(1).unwrap();
        assert!(instance_norm(&cpu, &[0.0; 5], &[0.0; 2], &[0.0; 2], 0.1, &mut [0.0; 5]).is_err());
        assert!(instance_norm(&cpu, &[0.0; 4], &[0.0; 2], &[0.0; 1], 0.1, &mut [0.0; 4]).is_err());
        assert!(instance_norm(&cpu, &[], &[], &[], 0.1, &mut []).is_err());
        assert!(instance_norm(&cpu, &[], &[0.0; 2], &[0.0; 2], 0.1, &mut []).is_ok());
    }
}
