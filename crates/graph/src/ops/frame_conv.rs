//! Convolution over the frames of a signal, a frame being a row.

use pocketglm_tensor::{Cpu, ops as kernels};

use super::{Activation, Call, OpDef, count, shape_error};
use crate::Result;
use crate::dim::Dim;
use crate::graph::Meta;

/// A norm that was fused into the convolution before it; two operands, weight and bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ConvNorm {
    /// LayerNorm of each frame with this epsilon.
    Layer(f32),
    /// Instance norm, each channel over all frames, with this epsilon.
    Instance(f32),
}

/// `y[t, o] = act(norm(bias[o] + Σ_{u, c} weight[o, u, c] · x[t·stride + u - padding[0], g(o)·C + c]))`, zero outside
/// of x; `C = channels / groups`, and `g(o)` is the group of output `o`.
///
/// Operands: `x [frames, channels]`, `weight [outputs, kernel·C]` whose taps come before their channels, then
/// `bias [outputs]` where there is one, then the norm's weight and bias `[outputs]` where there is one. Result
/// `[⌊(frames + padding - kernel) / stride⌋ + 1, outputs]`.
#[derive(Clone, Debug)]
pub struct FrameConv {
    /// Frames under the kernel.
    pub kernel: usize,
    /// Frames from one position to the next.
    pub stride: usize,
    /// Zero frames before the first and after the last.
    pub padding: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// Applied to the sums.
    pub norm: Option<ConvNorm>,
    /// Applied to the result of the norm.
    pub activation: Activation,
    /// Whether neighbouring positions may share products, see [`fewer_products`](crate::passes::fewer_products).
    pub fewer: bool,
}

impl FrameConv {
    fn first_of_norm(&self) -> usize {
        2 + usize::from(self.bias)
    }

    fn geometry(&self, x: &[usize], weight: &[usize]) -> kernels::FrameConv {
        kernels::FrameConv {
            frames: x[0],
            channels: x[1],
            outputs: weight[0],
            kernel: self.kernel,
            stride: self.stride,
            padding: self.padding,
            groups: self.groups,
            fewer: self.fewer,
        }
    }

    /// Scratch memory of an algorithm with fewer multiplications, in bytes.
    pub(crate) fn fewer_scratch_bytes(&self, cpu: &Cpu, x: &[usize], weight: &[usize]) -> usize {
        kernels::conv_frames_fewer_scratch_bytes(cpu, &self.geometry(x, weight))
    }

    /// Working memory of the kernel besides that of its matrix product, in bytes; rows and steps of that product. With
    /// groups, packed weights need no other memory.
    pub(crate) fn product(&self, x: &[usize], weight: &[usize], packed: bool) -> Result<(u64, usize, usize)> {
        let geometry = self.geometry(x, weight);
        let bytes = kernels::conv_frames_scratch_bytes(&geometry, packed)? as u64;
        let out = geometry.out_frames()?;
        // With groups the weights are the rows.
        let m = match self.groups {
            0 | 1 => out,
            _ if packed => 0,
            groups => weight[0] / groups,
        };
        Ok((bytes, m, weight[1]))
    }
}

impl OpDef for FrameConv {
    fn name(&self) -> &'static str {
        match (self.norm.is_some(), self.activation) {
            (false, Activation::None) => "frame_conv",
            (false, _) => "frame_conv_act",
            (true, Activation::None) => "frame_conv_norm",
            (true, _) => "frame_conv_norm_act",
        }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let wrong = || {
            shape_error(
                "frame_conv",
                "x [t, c], weight [o, kernel·c/groups], bias [o], norm [o] twice",
                inputs,
            )
        };
        let vectors = self.first_of_norm() - 2 + 2 * usize::from(self.norm.is_some());
        let [x, w, rest @ ..] = inputs else { return Err(wrong()) };
        let ([t, c], [o, k]) = (x.shape.as_slice(), w.shape.as_slice()) else { return Err(wrong()) };
        let groups = u32::try_from(self.groups).ok().filter(|&g| g > 0).ok_or_else(wrong)?;
        let stride = u32::try_from(self.stride).ok().filter(|&s| s > 0).ok_or_else(wrong)?;
        let whole = |d: &Dim| d.div(groups) * self.groups.into() == *d;
        let fits = rest.len() == vectors
            && rest.iter().all(|v| v.shape.as_slice() == std::slice::from_ref(o))
            && self.kernel > 0
            && whole(c)
            && whole(o)
            && *k == c.div(groups) * self.kernel.into()
            && self.activation != Activation::SwiGlu;
        if !fits {
            return Err(wrong());
        }
        let padded = t.clone() + (self.padding[0] + self.padding[1]).into();
        let out = (padded - self.kernel.into()).div(stride) + 1.into();
        Ok(vec![Meta::f32(vec![out, o.clone()])])
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        2.0 * count(&outputs[0]) * inputs[1][1] as f64
    }
    fn takes_weight(&self, i: usize) -> bool {
        i == 1
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        const OP: &str = "frame_conv";
        let (x, weight) = (call.f32(OP, 0)?, call.weight(OP, 1)?);
        let geometry = self.geometry(call.shape(OP, 0)?, call.shape(OP, 1)?);
        let bias = if self.bias { Some(call.f32(OP, 2)?) } else { None };
        let at = self.first_of_norm();
        let norm = match self.norm {
            None => kernels::FrameNorm::None,
            Some(ConvNorm::Layer(eps)) => {
                kernels::FrameNorm::Layer { weight: call.f32(OP, at)?, bias: call.f32(OP, at + 1)?, eps }
            }
            Some(ConvNorm::Instance(eps)) => {
                kernels::FrameNorm::Instance { weight: call.f32(OP, at)?, bias: call.f32(OP, at + 1)?, eps }
            }
        };
        let cpu = call.cpu;
        let y = call.output(OP, 0)?;
        Ok(kernels::conv_frames(cpu, &geometry, x, weight, bias, norm, self.activation.epilogue(), y)?)
    }
}
