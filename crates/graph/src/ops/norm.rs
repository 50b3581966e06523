//! Normalisation over the last dimension, and the residual form that follows a sandwich norm.

use pocketglm_tensor::ops as kernels;

use super::{Call, OpDef, count, operands, shape_error};
use crate::Result;
use crate::graph::Meta;

/// `y[r, :] = x[r, :] * rsqrt(mean(x[r, :]²) + eps) * weight` (Zhang & Sennrich 2019); `weight: [c]`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// Added to the mean of squares.
    pub eps: f32,
}

/// Checks that every operand after the first `rows` ones is a vector as long as x's last dimension.
fn vectors(op: &'static str, inputs: &[Meta], matrices: usize) -> Result<Vec<Meta>> {
    let x = &inputs[0];
    let ok = x.shape.last().is_some_and(|c| {
        inputs[1..matrices].iter().all(|m| m.shape == x.shape)
            && inputs[matrices..].iter().all(|w| w.shape.as_slice() == std::slice::from_ref(c))
    });
    if !ok {
        return Err(shape_error(op, "x [.., c] and vectors [c]", inputs));
    }
    Ok(vec![Meta::f32(x.shape.clone())])
}

impl OpDef for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        vectors("rms_norm", operands::<2>("rms_norm", inputs)?, 1)
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        4.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, w) = (call.f32("rms_norm", 0)?, call.f32("rms_norm", 1)?);
        Ok(kernels::rms_norm(call.cpu, x, w, self.eps, call.output("rms_norm", 0)?)?)
    }
}

/// `y[r, :] = (x[r, :] - mean) * rsqrt(var + eps) * weight + bias` (Ba et al. 2016).
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

impl OpDef for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        vectors("layer_norm", operands::<3>("layer_norm", inputs)?, 1)
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        7.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, w, b) = (call.f32("layer_norm", 0)?, call.f32("layer_norm", 1)?, call.f32("layer_norm", 2)?);
        Ok(kernels::layer_norm(call.cpu, x, w, b, self.eps, call.output("layer_norm", 0)?)?)
    }
}

/// `y[t, c] = (x[t, c] - mean_c) * rsqrt(var_c + eps) * weight[c] + bias[c]`, mean and variance of each channel over
/// all rows (Ulyanov et al. 2016); a group norm whose groups are single channels.
#[derive(Clone, Debug)]
pub struct InstanceNorm {
    /// Added to the variance.
    pub eps: f32,
}

impl OpDef for InstanceNorm {
    fn name(&self) -> &'static str {
        "instance_norm"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, ..] = operands::<3>("instance_norm", inputs)?;
        if x.shape.len() != 2 {
            return Err(shape_error("instance_norm", "x [t, c] and vectors [c]", inputs));
        }
        vectors("instance_norm", inputs, 1)
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        7.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        const OP: &str = "instance_norm";
        let (x, w, b) = (call.f32(OP, 0)?, call.f32(OP, 1)?, call.f32(OP, 2)?);
        Ok(kernels::instance_norm(call.cpu, x, w, b, self.eps, call.output(OP, 0)?)?)
    }
}

/// Fused: `y = residual + RMSNorm(x; weight)`, operands `residual, x, weight`.
#[derive(Clone, Debug)]
pub struct NormAdd {
    /// Added to the mean of squares.
    pub eps: f32,
}

impl OpDef for NormAdd {
    fn name(&self) -> &'static str {
        "norm_add"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        vectors("norm_add", operands::<3>("norm_add", inputs)?, 2)
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        5.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (r, x, w) = (call.f32("norm_add", 0)?, call.f32("norm_add", 1)?, call.f32("norm_add", 2)?);
        Ok(kernels::norm_add(call.cpu, r, x, w, self.eps, call.output("norm_add", 0)?)?)
    }
}
