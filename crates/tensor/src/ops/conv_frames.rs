//! One-dimensional convolution of a signal whose frames are rows, with what follows it:
//! `y[t, o] = epilogue(norm(bias[o] + sum_{u, c} weight[o, u, c] * x[t s + u - p, g(o) C + c]))`, zero outside of `x`;
//! `x: [frames, channels]`, `weight: [outputs, kernel, C]` with `C = channels / groups`, `y: [frames', outputs]`.
//!
//! `s` stride, `p` zeros before the first frame, `g(o)` the group of output `o`. The weights' taps come before their
//! channels, so that the frames under the kernel are one run of `x`: without groups the convolution is a linear layer
//! over rows that overlap, and nothing is copied.

use super::conv_groups::{self, conv_groups_take};
use super::conv_spectrum;
use super::fewer::Scheme;
use super::gemm::{Finish, Panels, chunk_columns, gemm};
use super::instance_norm::{Moments, instance_norm_in_place};
use super::linear::{Part, linear_by, linear_strided};
use super::norm::layer_norm_in_place;
use super::tile::panel_columns;
use super::{Epilogue, SharedMut, count, expect, for_rows};
use crate::packed::MAX_BLOCK;
use crate::simd::{Kernel, Simd, math};
use crate::{AlignedF32, Cpu, Error, Result, Weight};

const OP: &str = "conv_frames";
/// Numbers under the kernel up to which an instance norm is folded into the weights: their covariance is small.
const FOLDED: usize = 64;

/// Sizes of a convolution over frames.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrameConv {
    /// Rows of `x`.
    pub frames: usize,
    /// Columns of `x`.
    pub channels: usize,
    /// Columns of `y`.
    pub outputs: usize,
    /// Frames under the kernel.
    pub kernel: usize,
    /// Frames from one position to the next.
    pub stride: usize,
    /// Zero frames before the first and after the last.
    pub padding: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
    /// Whether neighbouring positions may share products, as in [`linear_fewer`](super::linear_fewer).
    pub fewer: bool,
}

/// What the sums are normalised by before the epilogue.
#[derive(Clone, Copy, Debug)]
pub enum FrameNorm<'a> {
    /// Nothing.
    None,
    /// Each frame over its channels (Ba et al. 2016).
    Layer {
        /// `[outputs]`
        weight: &'a [f32],
        /// `[outputs]`
        bias: &'a [f32],
        /// Added to the variance.
        eps: f32,
    },
    /// Each channel over all frames (Ulyanov et al. 2016).
    Instance {
        /// `[outputs]`
        weight: &'a [f32],
        /// `[outputs]`
        bias: &'a [f32],
        /// Added to the variance.
        eps: f32,
    },
}

impl FrameConv {
    /// Rows of `y`.
    ///
    /// # Errors
    /// [`Error::Value`] where the kernel does not fit in the padded input or the stride is zero.
    pub fn out_frames(&self) -> Result<usize> {
        let fit = || {
            let padded = self.padded()?;
            Some(padded.checked_sub(self.kernel)?.checked_div(self.stride)? + 1)
        };
        fit().filter(|_| self.kernel > 0).ok_or_else(|| Error::Value {
            op: OP,
            what: format!(
                "a kernel of {} with stride {} and padding {:?} does not fit {} frames",
                self.kernel, self.stride, self.padding, self.frames
            ),
        })
    }

    fn padded(&self) -> Option<usize> {
        self.frames.checked_add(self.padding[0])?.checked_add(self.padding[1])
    }

    fn check(
        &self,
        x: &[f32],
        weight: usize,
        bias: Option<&[f32]>,
        norm: &FrameNorm<'_>,
        epilogue: Epilogue,
        y: &[f32],
    ) -> Result<usize> {
        let out = self.out_frames()?;
        let groups = self.groups;
        if groups == 0 || !self.channels.is_multiple_of(groups) || !self.outputs.is_multiple_of(groups) {
            let what = format!("{groups} groups of {} channels and {} outputs", self.channels, self.outputs);
            return Err(Error::Value { op: OP, what });
        }
        if epilogue == Epilogue::SwiGlu {
            return Err(Error::Value { op: OP, what: "has no gate for SwiGLU".into() });
        }
        expect(OP, "x", &[self.frames, self.channels], x.len())?;
        expect(OP, "weight", &[self.outputs, self.kernel, self.channels / groups], weight)?;
        if let Some(bias) = bias {
            expect(OP, "bias", &[self.outputs], bias.len())?;
        }
        if let FrameNorm::Layer { weight, bias, .. } | FrameNorm::Instance { weight, bias, .. } = norm {
            expect(OP, "norm weight", &[self.outputs], weight.len())?;
            expect(OP, "norm bias", &[self.outputs], bias.len())?;
        }
        expect(OP, "y", &[out, self.outputs], y.len())?;
        Ok(out)
    }

    /// The algorithm with fewer multiplications for `out` positions, where there is one that pays, and the distance between its
    /// rows of `x`.
    fn scheme(&self, cpu: &Cpu, out: usize) -> Option<(Scheme, usize)> {
        let Self { channels, outputs, kernel, stride, .. } = *self;
        if !self.fewer || self.groups != 1 || self.padding != [0, 0] {
            return None;
        }
        match (kernel, stride) {
            (3, 2) => Scheme::for_taps(cpu, [out, channels, outputs]).map(|s| (s, channels)),
            // Frames under neighbouring positions do not overlap: rows of a linear layer.
            _ if kernel == stride => {
                let k = kernel * channels;
                Scheme::for_linear(cpu, [out, k, outputs]).map(|s| (s, k))
            }
            _ => None,
        }
    }

    /// Floats of working memory for a call with weights that are packed, or not.
    fn scratch(&self, packed: bool) -> Result<usize> {
        let padded = self.padded().unwrap_or(usize::MAX);
        match (self.groups, self.padding) {
            (1, [0, 0]) => Ok(0),
            (1, _) => count(OP, "padded x", &[padded, self.channels]),
            _ if packed => conv_groups::scratch_floats(self),
            _ if self.fewer && conv_spectrum::pays(self) => Ok(0),
            // Whole panels of columns are read at the end.
            _ => count(OP, "padded x", &[padded.saturating_add(64 * self.stride), self.channels]),
        }
    }
}

/// Bytes of working memory that [`conv_frames`] takes besides that of its matrix product, for weights that are packed or
/// not.
///
/// # Errors
/// [`Error::Value`] for sizes beyond any memory.
pub fn conv_frames_scratch_bytes(conv: &FrameConv, packed: bool) -> Result<usize> {
    Ok(AlignedF32::working_bytes(conv.scratch(packed)?))
}

/// The most scratch memory, in bytes, that [`conv_frames`] takes from the context for an algorithm with fewer multiplications.
pub fn conv_frames_fewer_scratch_bytes(cpu: &Cpu, conv: &FrameConv) -> usize {
    if conv.fewer && conv.groups > 1 {
        return 4 * conv_spectrum::scratch_floats(cpu, conv);
    }
    let scheme = conv.out_frames().ok().and_then(|out| conv.scheme(cpu, out));
    scheme.map_or(0, |(scheme, _)| 4 * scheme.scratch_floats(cpu))
}

/// See the module. With groups, packed weights are those that [`conv_groups_take`] allows.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit, [`Error::OutOfMemory`] where there is none for
/// scratch.
pub fn conv_frames(
    cpu: &Cpu,
    conv: &FrameConv,
    x: &[f32],
    weight: Weight<'_>,
    bias: Option<&[f32]>,
    norm: FrameNorm<'_>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let out = conv.check(x, weight.len(), bias, &norm, epilogue, y)?;
    if y.is_empty() {
        return Ok(());
    }
    match norm {
        FrameNorm::None => convolve(cpu, conv, out, x, weight, bias, epilogue, y),
        FrameNorm::Layer { weight: scale, bias: shift, eps } => {
            convolve(cpu, conv, out, x, weight, bias, Epilogue::None, y)?;
            layer_norm_in_place(cpu, y, scale, shift, eps, epilogue);
            Ok(())
        }
        FrameNorm::Instance { weight: scale, bias: shift, eps } => {
            let foldable = conv.kernel * conv.channels <= FOLDED && conv.groups == 1;
            if foldable && conv.padding == [0, 0] && !matches!(weight, Weight::Packed(_)) {
                let (weight, bias) = folded(cpu, conv, out, x, weight, scale, shift, eps);
                return convolve(cpu, conv, out, x, Weight::F32(&weight), Some(&bias), epilogue, y);
            }
            convolve(cpu, conv, out, x, weight, bias, Epilogue::None, y)?;
            instance_norm_in_place(cpu, y, scale, shift, eps, epilogue);
            Ok(())
        }
    }
}

/// The convolution alone, with the epilogue.
fn convolve(
    cpu: &Cpu,
    conv: &FrameConv,
    out: usize,
    x: &[f32],
    weight: Weight<'_>,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    if conv.groups > 1 {
        return grouped(cpu, conv, out, x, weight, bias, epilogue, y);
    }
    let (k, stride) = (conv.kernel * conv.channels, conv.stride * conv.channels);
    let part = [Part { weight, rows: conv.outputs, bias }];
    if !matches!(weight, Weight::Packed(_))
        && let Some((scheme, x_stride)) = conv.scheme(cpu, out)
    {
        return linear_by(cpu, &scheme, (x, x_stride), [out, k], &part, epilogue, y);
    }
    if conv.padding == [0, 0] {
        return linear_strided(cpu, x, stride, [out, k], &part, epilogue, y);
    }
    let mut padded = AlignedF32::working(conv.scratch(false)?)?;
    padded[conv.padding[0] * conv.channels..][..x.len()].copy_from_slice(x);
    linear_strided(cpu, &padded, stride, [out, k], &part, epilogue, y)
}

/// An instance norm of the sums, folded into weights and bias: mean and variance of a sum over all positions follow
/// from the means and covariances of the numbers under the kernel.
fn folded(
    cpu: &Cpu,
    conv: &FrameConv,
    out: usize,
    x: &[f32],
    weight: Weight<'_>,
    scale: &[f32],
    shift: &[f32],
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let k = conv.kernel * conv.channels;
    let Moments { mean, covariance } = Moments::of_windows(cpu, x, conv.stride * conv.channels, k, out);
    let mut weights = Vec::with_capacity(conv.outputs * k);
    let mut biases = Vec::with_capacity(conv.outputs);
    for o in 0..conv.outputs {
        let row: Vec<f64> = (0..k).map(|p| f64::from(weight.get(o * k + p).unwrap_or(f32::NAN))).collect();
        let centre: f64 = row.iter().zip(&mean).map(|(w, m)| w * m).sum();
        let mut variance = 0f64;
        for p in 0..k {
            for q in 0..k {
                variance += row[p] * row[q] * covariance[p * k + q];
            }
        }
        let factor = f64::from(scale[o]) / (variance.max(0.0) + f64::from(eps)).sqrt();
        // NaN in x must not vanish in `max`.
        let factor = if variance.is_nan() { f64::NAN } else { factor };
        weights.extend(row.iter().map(|w| (w * factor) as f32));
        biases.push((f64::from(shift[o]) - centre * factor) as f32);
    }
    (weights, biases)
}

/// With groups: positions become the columns of a product with each group's weights, so that a narrow group wastes
/// nothing, and a channel's samples under one tap are one run.
fn grouped(
    cpu: &Cpu,
    conv: &FrameConv,
    out: usize,
    x: &[f32],
    weight: Weight<'_>,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let widened: Vec<f32>;
    let weight = match weight {
        Weight::F32(w) => w,
        Weight::Packed(packed) => {
            let inner = conv.channels / conv.groups;
            if (packed.rows(), packed.k()) == (conv.outputs, conv.kernel * inner)
                && conv_groups_take(packed.format(), inner)
            {
                return conv_groups::convolve(cpu, conv, out, x, packed, bias, epilogue, y);
            }
            let what = format!(
                "{:?} for groups of {inner} channels, expected codes of 8 bits with a scale for each row, and channels in fours up to {MAX_BLOCK}",
                packed.format()
            );
            return Err(Error::Value { op: OP, what });
        }
        other => {
            widened = (0..other.len()).map(|i| other.get(i).unwrap_or(f32::NAN)).collect();
            &widened
        }
    };
    if conv.fewer && conv_spectrum::convolve(cpu, conv, out, x, weight, bias, epilogue, y)? {
        return Ok(());
    }
    let mut turned = AlignedF32::working(conv.scratch(false)?)?;
    let length = turned.len() / conv.channels.max(1);
    let to = SharedMut::new(&mut turned);
    for_rows(cpu, conv.channels, conv.frames, &|channels| {
        for c in channels {
            // SAFETY: channel `c` of the turned signal belongs to this task; its frames lie behind the padding.
            let row =
                unsafe { to.slice(c * length + conv.padding[0]..c * length + conv.padding[0] + conv.frames) };
            for (t, v) in row.iter_mut().enumerate() {
                *v = x[t * conv.channels + c];
            }
        }
    });
    let (inner, outer) = (conv.channels / conv.groups, conv.outputs / conv.groups);
    let k = conv.kernel * inner;
    let y = SharedMut::new(y);
    for group in 0..conv.groups {
        let x = &turned[group * inner * length..][..inner * length];
        let shifted = Shifted { x, length, channels: inner, stride: conv.stride };
        let first = group * outer;
        let bias = bias.map(|b| &b[first..first + outer]);
        let store = Columns { y, first, width: conv.outputs, positions: out, bias, epilogue };
        let weight = &weight[first * k..][..outer * k];
        gemm(cpu, weight, k, [outer, k, out], chunk_columns(cpu, out), &shifted, &store)?;
    }
    Ok(())
}

/// The right operand of a group: row `u C + c`, column `t` is channel `c` at `t s + u`.
struct Shifted<'a> {
    /// `[C, length]`, with frames to spare behind the last.
    x: &'a [f32],
    length: usize,
    channels: usize,
    stride: usize,
}

impl Panels for Shifted<'_> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, s: S, column: usize, k0: usize, kc: usize, dst: *mut f32) {
        let nr = panel_columns(S::WIDTH);
        let (mut u, mut c) = (k0 / self.channels, k0 % self.channels);
        for p in 0..kc {
            let start = c * self.length + column * self.stride + u;
            // SAFETY: a panel begins at a position that exists and is at most 64 wide, and there are as many positions
            // to spare; `dst` as the caller promises.
            unsafe {
                if self.stride == 1 {
                    for j in (0..nr).step_by(S::WIDTH) {
                        s.store(dst.add(p * nr + j), s.load(self.x.as_ptr().add(start + j)));
                    }
                } else {
                    for j in 0..nr {
                        *dst.add(p * nr + j) = *self.x.as_ptr().add(start + j * self.stride);
                    }
                }
            }
            c += 1;
            if c == self.channels {
                (u, c) = (u + 1, 0);
            }
        }
    }

    fn stored(&self, _: usize, _: usize, _: usize) -> (*const u8, usize, usize, usize) {
        (std::ptr::null(), 0, 0, 0)
    }
}

/// Stores sums of one output channel for many positions as a column.
struct Columns<'a> {
    y: SharedMut<f32>,
    /// Column of the group's first output, of `width`.
    first: usize,
    width: usize,
    positions: usize,
    bias: Option<&'a [f32]>,
    epilogue: Epilogue,
}

impl Finish for Columns<'_> {
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize, column: usize, sums: &[f32]) {
        let count = sums.len().min(self.positions - column);
        let bias = s.splat(self.bias.map_or(0.0, |b| b[row]));
        let mut lanes = [0f32; 16];
        for from in (0..count).step_by(S::WIDTH) {
            let n = (count - from).min(S::WIDTH);
            // SAFETY: `n` sums from `from`; the column's elements at these positions belong to this task.
            unsafe {
                let v = s.add(s.load_n(sums.as_ptr().add(from), n), bias);
                s.store(lanes.as_mut_ptr(), activated(s, self.epilogue, v));
                for (i, v) in lanes.iter().take(n).enumerate() {
                    *self.y.at((column + from + i) * self.width + self.first + row) = *v;
                }
            }
        }
    }
}

/// An epilogue of single elements.
#[inline(always)]
pub(super) fn activated<S: Simd>(s: S, epilogue: Epilogue, v: S::V) -> S::V {
    match epilogue {
        Epilogue::Gelu => math::gelu(s, v),
        Epilogue::Silu => math::silu(s, v),
        // The order of the operands lets NaN through.
        Epilogue::Relu => s.max(s.splat(0.0), v),
        Epilogue::None | Epilogue::SwiGlu => v,
    }
}

/// The scalar twin of [`conv_frames`], accumulating in f64. Packed weights count as what they stand for.
pub fn conv_frames_twin(
    conv: &FrameConv,
    x: &[f32],
    weight: Weight<'_>,
    bias: Option<&[f32]>,
    norm: FrameNorm<'_>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let out = conv.check(x, weight.len(), bias, &norm, epilogue, y)?;
    let (inner, outer) = (conv.channels / conv.groups, conv.outputs / conv.groups);
    let n = conv.outputs;
    let mut sums = vec![0f64; out * n];
    for t in 0..out {
        for o in 0..n {
            let sum = &mut sums[t * n + o];
            *sum = bias.map_or(0.0, |b| f64::from(b[o]));
            for u in 0..conv.kernel {
                let Some(frame) = (t * conv.stride + u).checked_sub(conv.padding[0]) else { continue };
                if frame >= conv.frames {
                    continue;
                }
                for c in 0..inner {
                    let w = weight.get((o * conv.kernel + u) * inner + c).unwrap_or(f32::NAN);
                    let v = x[frame * conv.channels + o / outer * inner + c];
                    *sum += f64::from(w) * f64::from(v);
                }
            }
        }
    }
    let normed =
        |values: &mut dyn Iterator<Item = &mut f64>, scale: &dyn Fn(usize) -> (f64, f64), eps: f32| {
            let mut values: Vec<&mut f64> = values.collect();
            let count = values.len() as f64;
            let mean = values.iter().map(|v| **v).sum::<f64>() / count;
            let variance = values.iter().map(|v| (**v - mean).powi(2)).sum::<f64>() / count;
            for (i, v) in values.iter_mut().enumerate() {
                let (weight, bias) = scale(i);
                **v = (**v - mean) / (variance + f64::from(eps)).sqrt() * weight + bias;
            }
        };
    match norm {
        FrameNorm::None => {}
        FrameNorm::Layer { weight, bias, eps } => {
            for row in sums.chunks_mut(n) {
                normed(&mut row.iter_mut(), &|o| (f64::from(weight[o]), f64::from(bias[o])), eps);
            }
        }
        FrameNorm::Instance { weight, bias, eps } => {
            for o in 0..n {
                let column = &mut sums.iter_mut().skip(o).step_by(n);
                normed(column, &|_| (f64::from(weight[o]), f64::from(bias[o])), eps);
            }
        }
    }
    for (y, v) in y.iter_mut().zip(sums) {
        *y = match epilogue {
            Epilogue::Gelu => super::elementwise::gelu_f64(v),
            Epilogue::Silu => v / (1.0 + (-v).exp()),
            Epilogue::Relu if v <= 0.0 => 0.0,
            _ => v,
        } as f32;
    }
    Ok(())
}

/// Applies an epilogue to a row in place.
pub(super) struct Activate<'a> {
    pub(super) epilogue: Epilogue,
    pub(super) y: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for part in self.y.chunks_mut(S::WIDTH) {
            let v = activated(s, self.epilogue, s.load_slice(part));
            // SAFETY: as many lanes as the part has.
            unsafe { s.store_n(part.as_mut_ptr(), part.len(), v) };
        }
    }
}

#[cfg(test)]
#[path = "conv_frames_tests.rs"]
mod tests;
