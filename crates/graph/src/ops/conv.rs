//! Convolution and batch normalisation over `[n, c, h, w]`; a one-dimensional signal has `h = 1`.

use pocketglm_tensor::ops as kernels;

use super::{Activation, Call, OpDef, operands, shape_error};
use crate::Result;
use crate::dim::Dim;
use crate::graph::Meta;

/// Cross-correlation `x [n, c, h, w]`, `weight [o, c/groups, kh, kw]`, `bias [o]` to `[n, o, oh, ow]`,
/// with an activation where one was fused. `o{h,w} = floor(({h,w} + 2·padding - k) / stride) + 1`.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Step in y and x.
    pub stride: [usize; 2],
    /// Zeros around y and x.
    pub padding: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
    /// Applied to the result.
    pub activation: Activation,
}

impl OpDef for Conv {
    fn name(&self) -> &'static str {
        if self.activation == Activation::None { "conv" } else { "conv_act" }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, w, b] = operands::<3>("conv", inputs)?;
        let wrong = || shape_error("conv", "x [n, c, h, w], weight [o, c/groups, kh, kw], bias [o]", inputs);
        let ([n, c, h, wd], [o, cg, kh, kw], [bo]) =
            (x.shape.as_slice(), w.shape.as_slice(), b.shape.as_slice())
        else {
            return Err(wrong());
        };
        let groups = u32::try_from(self.groups).ok().filter(|&g| g > 0).ok_or_else(wrong)?;
        if bo != o || *c != cg.clone() * Dim::from(self.groups) || o.div(groups) * self.groups.into() != *o {
            return Err(wrong());
        }
        let side = |d: &Dim, k: &Dim, i: usize| -> Result<Dim> {
            let stride = u32::try_from(self.stride[i]).ok().filter(|&s| s > 0).ok_or_else(wrong)?;
            Ok((d.clone() + (2 * self.padding[i]).into() - k.clone()).div(stride) + 1.into())
        };
        Ok(vec![Meta::f32(vec![n.clone(), o.clone(), side(h, kh, 0)?, side(wd, kw, 1)?])])
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        2.0 * super::count(&outputs[0]) * super::count(&inputs[1][1..])
    }
    fn scratch(&self, _: &[Vec<usize>], outputs: &[Vec<usize>]) -> usize {
        if self.activation == Activation::None { 0 } else { outputs[0].iter().product() }
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("conv", 0)?;
        let (w, b) = (call.f32("conv", 1)?, call.f32("conv", 2)?);
        let (xs, ws) = (call.shape("conv", 0)?, call.shape("conv", 1)?);
        let geometry = kernels::Conv2d {
            batch: xs[0],
            channels: xs[1],
            size: [xs[2], xs[3]],
            outputs: ws[0],
            kernel: [ws[2], ws[3]],
            stride: self.stride,
            padding: self.padding,
            dilation: [1, 1],
            groups: self.groups,
        };
        let scratch = std::mem::take(&mut call.scratch);
        let cpu = call.cpu;
        let y = call.output("conv", 0)?;
        match self.activation.element_wise() {
            None => Ok(kernels::conv2d(cpu, &geometry, x, w, Some(b), y)?),
            Some(kind) => {
                kernels::conv2d(cpu, &geometry, x, w, Some(b), scratch)?;
                Ok(kernels::unary(cpu, kind, scratch, y)?)
            }
        }
    }
}

/// `y[:, c] = (x[:, c] - mean[c]) * rsqrt(var[c] + eps) * weight[c] + bias[c]` (Ioffe & Szegedy 2015), with
/// stored statistics; operands `x, weight, bias, mean, var`.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f32,
}

impl OpDef for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, rest @ ..] = operands::<5>("batch_norm", inputs)?;
        let ok = x.shape.len() >= 2 && rest.iter().all(|v| v.shape.len() == 1 && v.shape[0] == x.shape[1]);
        if !ok {
            return Err(shape_error("batch_norm", "x [n, c, ..] and four vectors [c]", inputs));
        }
        Ok(vec![Meta::f32(x.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        2.0 * super::count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("batch_norm", 0)?;
        let (w, b) = (call.f32("batch_norm", 1)?, call.f32("batch_norm", 2)?);
        let (mean, var) = (call.f32("batch_norm", 3)?, call.f32("batch_norm", 4)?);
        let shape = call.shape("batch_norm", 0)?;
        let cpu = call.cpu;
        let y = call.output("batch_norm", 0)?;
        Ok(kernels::batch_norm(cpu, x, shape, [mean, var, w, b], self.eps, y)?)
    }
}
