//! `y[n, o, i, j] = bias[o] + sum_{c, u, v} weight[o, c, u, v] * x[n, c', i s - p + u e, j s - p + v e]` with zero
//! outside of `x`; `x: [n, c, h, w]`, `weight: [o, c / groups, kh, kw]`, `bias: [o]`, `y: [n, o, oh, ow]`.
//!
//! `s` stride, `p` padding, `e` dilation; `c'` is channel `c` of the group that `o` belongs to. One dimension is the
//! same with `h = kh = 1`.

use super::gemm::{Finish, Panels, chunk_columns, gemm};
use super::tile::panel_columns;
use super::{SharedMut, count, expect, for_rows};
use crate::simd::Simd;
use crate::{Cpu, Error, Result};

const OP: &str = "conv2d";

/// Sizes of a two-dimensional convolution; pairs are (height, width).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Conv2d {
    /// Images.
    pub batch: usize,
    /// Input channels.
    pub channels: usize,
    /// Input height and width.
    pub size: [usize; 2],
    /// Output channels.
    pub outputs: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Steps of the kernel.
    pub stride: [usize; 2],
    /// Zeros on every side.
    pub padding: [usize; 2],
    /// Steps between kernel elements.
    pub dilation: [usize; 2],
    /// Channel groups that are convolved apart.
    pub groups: usize,
}

impl Conv2d {
    /// Output height and width.
    ///
    /// # Errors
    /// [`Error::Value`] where the kernel does not fit in the padded input or a step is zero.
    pub fn out_size(&self) -> Result<[usize; 2]> {
        let mut out = [0; 2];
        for i in 0..2 {
            let fit = || {
                let span = self.kernel[i].checked_sub(1)?.checked_mul(self.dilation[i])?.checked_add(1)?;
                let padded = self.size[i].checked_add(self.padding[i].checked_mul(2)?)?;
                Some(padded.checked_sub(span)?.checked_div(self.stride[i])? + 1)
            };
            out[i] = fit().filter(|_| self.dilation[i] > 0).ok_or_else(|| Error::Value {
                op: OP,
                what: format!(
                    "kernel {} with dilation {}, stride {} and padding {} does not fit {} elements",
                    self.kernel[i], self.dilation[i], self.stride[i], self.padding[i], self.size[i]
                ),
            })?;
        }
        Ok(out)
    }

    fn check(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>, y: &[f32]) -> Result<[usize; 2]> {
        let out = self.out_size()?;
        if self.groups == 0
            || !self.channels.is_multiple_of(self.groups)
            || !self.outputs.is_multiple_of(self.groups)
        {
            let what =
                format!("{} groups of {} channels and {} outputs", self.groups, self.channels, self.outputs);
            return Err(Error::Value { op: OP, what });
        }
        let [kh, kw] = self.kernel;
        count(OP, "columns", &[self.channels, kh, kw, out[0], out[1]])?;
        expect(OP, "x", &[self.batch, self.channels, self.size[0], self.size[1]], x.len())?;
        expect(OP, "weight", &[self.outputs, self.channels / self.groups, kh, kw], weight.len())?;
        if let Some(bias) = bias {
            expect(OP, "bias", &[self.outputs], bias.len())?;
        }
        expect(OP, "y", &[self.batch, self.outputs, out[0], out[1]], y.len())?;
        Ok(out)
    }
}

/// Sizes of a one-dimensional convolution: `x: [batch, channels, size]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Conv1d {
    /// Signals.
    pub batch: usize,
    /// Input channels.
    pub channels: usize,
    /// Input length.
    pub size: usize,
    /// Output channels.
    pub outputs: usize,
    /// Kernel length.
    pub kernel: usize,
    /// Step of the kernel.
    pub stride: usize,
    /// Zeros on both sides.
    pub padding: usize,
    /// Step between kernel elements.
    pub dilation: usize,
    /// Channel groups that are convolved apart.
    pub groups: usize,
}

impl Conv1d {
    /// The same convolution of images of height 1.
    fn as_2d(&self) -> Conv2d {
        Conv2d {
            batch: self.batch,
            channels: self.channels,
            size: [1, self.size],
            outputs: self.outputs,
            kernel: [1, self.kernel],
            stride: [1, self.stride],
            padding: [0, self.padding],
            dilation: [1, self.dilation],
            groups: self.groups,
        }
    }

    /// Output length.
    ///
    /// # Errors
    /// [`Error::Value`] where the kernel does not fit in the padded input or a step is zero.
    pub fn out_size(&self) -> Result<usize> {
        Ok(self.as_2d().out_size()?[1])
    }
}

/// See the module.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit, [`Error::OutOfMemory`] where there is none for
/// scratch.
pub fn conv2d(
    cpu: &Cpu,
    conv: &Conv2d,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> Result<()> {
    let out_size = conv.check(x, weight, bias, y)?;
    if y.is_empty() {
        return Ok(());
    }
    let positions = out_size[0] * out_size[1];
    let (per_in, per_out) = (conv.channels / conv.groups, conv.outputs / conv.groups);
    let k = per_in * conv.kernel[0] * conv.kernel[1];
    let pixels = conv.size[0] * conv.size[1];
    let out = SharedMut::new(y);
    for n in 0..conv.batch {
        for group in 0..conv.groups {
            let channel = n * conv.channels + group * per_in;
            let output = group * per_out;
            let columns = Columns { conv, x: &x[channel * pixels..][..per_in * pixels], out_size };
            let bias = bias.map(|b| &b[output..output + per_out]);
            let store = Store { y: out, first: (n * conv.outputs + output) * positions, positions, bias };
            let weight = &weight[output * k..][..per_out * k];
            gemm(cpu, weight, k, [per_out, k, positions], chunk_columns(cpu, positions), &columns, &store)?;
        }
    }
    Ok(())
}

/// The pixels under the kernel as a matrix `[per_in * kh * kw, oh * ow]` that is never stored as a whole.
struct Columns<'a> {
    conv: &'a Conv2d,
    x: &'a [f32],
    out_size: [usize; 2],
}

impl Panels for Columns<'_> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, _: S, column: usize, k0: usize, kc: usize, dst: *mut f32) {
        let nr = panel_columns(S::WIDTH);
        let Conv2d { size: [h, w], kernel: [kh, kw], stride, padding, dilation, .. } = *self.conv;
        let [oh, ow] = self.out_size;
        for c in 0..nr {
            let (i, j) = ((column + c) / ow, (column + c) % ow);
            for p in 0..kc {
                let (channel, u, v) = ((k0 + p) / (kh * kw), (k0 + p) / kw % kh, (k0 + p) % kw);
                // Left of or above the image wraps to a huge number, which is outside as well.
                let row = (i * stride[0] + u * dilation[0]).wrapping_sub(padding[0]);
                let col = (j * stride[1] + v * dilation[1]).wrapping_sub(padding[1]);
                let inside = i < oh && row < h && col < w;
                let value = if inside { self.x[(channel * h + row) * w + col] } else { 0.0 };
                // SAFETY: inside the panel.
                unsafe { *dst.add(p * nr + c) = value };
            }
        }
    }

    fn stored(&self, _: usize, _: usize, _: usize) -> (*const u8, usize, usize, usize) {
        (std::ptr::null(), 0, 0, 0)
    }
}

/// Adds the bias of each output channel and stores.
struct Store<'a> {
    y: SharedMut<f32>,
    first: usize,
    positions: usize,
    bias: Option<&'a [f32]>,
}

impl Finish for Store<'_> {
    #[inline(always)]
    fn finish<S: Simd>(&self, _: S, row: usize, column: usize, sums: &[f32]) {
        let count = sums.len().min(self.positions - column);
        let start = self.first + row * self.positions + column;
        let bias = self.bias.map_or(0.0, |b| b[row]);
        // SAFETY: these positions of the output channel exist and belong to this task.
        let y = unsafe { self.y.slice(start..start + count) };
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = sum + bias;
        }
    }
}

/// One dimension: `x: [batch, channels, size]`, `weight: [outputs, channels / groups, kernel]`, `y: [batch, outputs,
/// out_size]`.
///
/// # Errors
/// As [`conv2d`].
pub fn conv1d(
    cpu: &Cpu,
    conv: &Conv1d,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> Result<()> {
    conv2d(cpu, &conv.as_2d(), x, weight, bias, y)
}

/// The scalar twin of [`conv1d`].
pub fn conv1d_twin(
    conv: &Conv1d,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> Result<()> {
    conv2d_twin(&conv.as_2d(), x, weight, bias, y)
}

/// The scalar twin of [`conv2d`], accumulating in f64.
pub fn conv2d_twin(
    conv: &Conv2d,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> Result<()> {
    let [oh, ow] = conv.check(x, weight, bias, y)?;
    let ([h, w], [kh, kw]) = (conv.size, conv.kernel);
    let (per_in, per_out) = (conv.channels / conv.groups, conv.outputs / conv.groups);
    for n in 0..conv.batch {
        for o in 0..conv.outputs {
            for i in 0..oh {
                for j in 0..ow {
                    let mut sum = bias.map_or(0.0, |b| f64::from(b[o]));
                    for c in 0..per_in {
                        let channel = n * conv.channels + o / per_out * per_in + c;
                        for u in 0..kh {
                            for v in 0..kw {
                                let row =
                                    (i * conv.stride[0] + u * conv.dilation[0]).wrapping_sub(conv.padding[0]);
                                let col =
                                    (j * conv.stride[1] + v * conv.dilation[1]).wrapping_sub(conv.padding[1]);
                                if row < h && col < w {
                                    let weight = weight[((o * per_in + c) * kh + u) * kw + v];
                                    sum += f64::from(weight) * f64::from(x[(channel * h + row) * w + col]);
                                }
                            }
                        }
                    }
                    y[((n * conv.outputs + o) * oh + i) * ow + j] = sum as f32;
                }
            }
        }
    }
    Ok(())
}

/// Sizes of a batch norm: `x: [n, c, ...]`.
fn check_batch_norm(x: &[f32], shape: &[usize], params: [&[f32]; 4], y: &[f32]) -> Result<(usize, usize)> {
    const OP: &str = "batch_norm";
    let [_, c, inner @ ..] = shape else {
        return Err(Error::Value { op: OP, what: format!("x of shape {shape:?} has no channels") });
    };
    expect(OP, "x", shape, x.len())?;
    expect(OP, "y", shape, y.len())?;
    for (operand, values) in ["mean", "variance", "weight", "bias"].into_iter().zip(params) {
        expect(OP, operand, &[*c], values.len())?;
    }
    Ok((*c, count(OP, "x", inner)?))
}

/// `y[n, c, ...] = (x[n, c, ...] - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c]`; parameters `[c]`, in
/// the order mean, variance, weight, bias.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn batch_norm(
    cpu: &Cpu,
    x: &[f32],
    shape: &[usize],
    params: [&[f32]; 4],
    eps: f32,
    y: &mut [f32],
) -> Result<()> {
    let (c, inner) = check_batch_norm(x, shape, params, y)?;
    if y.is_empty() {
        return Ok(());
    }
    let out = SharedMut::new(y);
    for_rows(cpu, x.len() / inner, inner, &|rows| {
        for i in rows {
            let [mean, variance, weight, bias] = params.map(|p| p[i % c]);
            let scale = weight / (variance + eps).sqrt();
            // SAFETY: inside `y` as checked; row `i` belongs to this task.
            let y = unsafe { out.slice(i * inner..(i + 1) * inner) };
            for (y, x) in y.iter_mut().zip(&x[i * inner..][..inner]) {
                *y = (x - mean) * scale + bias;
            }
        }
    });
    Ok(())
}

/// The scalar twin of [`batch_norm`].
pub fn batch_norm_twin(
    x: &[f32],
    shape: &[usize],
    params: [&[f32]; 4],
    eps: f32,
    y: &mut [f32],
) -> Result<()> {
    let (c, inner) = check_batch_norm(x, shape, params, y)?;
    for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
        let channel = i / inner % c;
        let [mean, variance, weight, bias] = params.map(|p| f64::from(p[channel]));
        *y = ((f64::from(x) - mean) / (variance + f64::from(eps)).sqrt() * weight + bias) as f32;
    }
    Ok(())
}

#[cfg(test)]
#[path = "conv_tests.rs"]
mod tests;
