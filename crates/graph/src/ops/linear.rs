//! Fused linear layer: `y = act(norm(x) · [W_1; W_2; ..]ᵀ + [b_1; b_2; ..]) + residual`.

use pocketglm_tensor::ops as kernels;

use super::{Call, OpDef, count, shape_error};
use crate::Result;
use crate::dim::Dim;
use crate::graph::Meta;

/// Function applied to a result before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The result as it is.
    None,
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Φ(x)`, with the exact error function.
    Gelu,
    /// `silu(first half) * second half` (Shazeer 2020); the result is half as wide.
    SwiGlu,
}

impl Activation {
    pub(crate) fn epilogue(self) -> kernels::Epilogue {
        match self {
            Activation::None => kernels::Epilogue::None,
            Activation::Relu => kernels::Epilogue::Relu,
            Activation::Silu => kernels::Epilogue::Silu,
            Activation::Gelu => kernels::Epilogue::Gelu,
            Activation::SwiGlu => kernels::Epilogue::SwiGlu,
        }
    }

    /// The element-wise function, where it is one.
    pub(crate) fn element_wise(self) -> Option<kernels::Unary> {
        match self {
            Activation::None | Activation::SwiGlu => None,
            Activation::Relu => Some(kernels::Unary::Relu),
            Activation::Silu => Some(kernels::Unary::Silu),
            Activation::Gelu => Some(kernels::Unary::Gelu),
        }
    }
}

/// A norm of the operand that was fused into the linear layer after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LinearNorm {
    /// RMSNorm with this epsilon; one operand, the weight.
    Rms(f32),
    /// LayerNorm with this epsilon; two operands, weight and bias.
    Layer(f32),
    /// RMSNorm of `h = x + RMSNorm(y; w)`, and `h` is a result too; three operands, `y`, `w` and the outer norm's
    /// weight.
    AddRms {
        /// Epsilon of the norm inside.
        inner: f32,
        /// Epsilon of the norm outside.
        outer: f32,
    },
}

impl LinearNorm {
    /// Operands that the norm takes besides x.
    pub fn operands(norm: Option<LinearNorm>) -> usize {
        match norm {
            None => 0,
            Some(LinearNorm::Rms(_)) => 1,
            Some(LinearNorm::Layer(_)) => 2,
            Some(LinearNorm::AddRms { .. }) => 3,
        }
    }

    /// Whether the sum that is normed is a result.
    pub fn adds(norm: Option<LinearNorm>) -> bool {
        matches!(norm, Some(LinearNorm::AddRms { .. }))
    }

    /// Whether the operands of the norm fit `x`, which is the first of `inputs`.
    pub(crate) fn fits(norm: Option<LinearNorm>, inputs: &[Meta]) -> bool {
        let Some(k) = inputs[0].shape.last() else { return false };
        let vectors = match norm {
            Some(LinearNorm::AddRms { .. }) if inputs[1].shape != inputs[0].shape => return false,
            Some(LinearNorm::AddRms { .. }) => &inputs[2..4],
            norm => &inputs[1..1 + LinearNorm::operands(norm)],
        };
        vectors.iter().all(|m| m.shape.as_slice() == std::slice::from_ref(k))
    }

    /// Norms the rows of a call's first operand into `scratch`, where there is a norm, and gives the rows to multiply.
    pub(crate) fn apply<'s, 'a: 's>(
        norm: Option<LinearNorm>,
        op: &'static str,
        call: &mut Call<'a, '_>,
        scratch: &'s mut [f32],
    ) -> Result<&'s [f32]> {
        let (cpu, x) = (call.cpu, call.f32(op, 0)?);
        match norm {
            None => return Ok(x),
            Some(LinearNorm::Rms(eps)) => kernels::rms_norm(cpu, x, call.f32(op, 1)?, eps, scratch)?,
            Some(LinearNorm::Layer(eps)) => {
                kernels::layer_norm(cpu, x, call.f32(op, 1)?, call.f32(op, 2)?, eps, scratch)?;
            }
            Some(LinearNorm::AddRms { inner, outer }) => {
                let (y, w, weight) = (call.f32(op, 1)?, call.f32(op, 2)?, call.f32(op, 3)?);
                let h = call.output(op, 1)?;
                kernels::norm_add(cpu, x, y, w, inner, h)?;
                kernels::rms_norm(cpu, h, weight, outer, scratch)?;
            }
        }
        Ok(scratch)
    }
}

/// Operands: `x [.., k]`, the norm's, then for each part `weight [n_i, k]` and, where it has one, `bias [n_i]`,
/// then the residual `[.., n]` where there is one. Results: `[.., n]`, and the normed sum where the norm adds.
#[derive(Clone, Debug)]
pub struct Linear {
    /// One entry for each weight: whether it has a bias.
    pub parts: Vec<bool>,
    /// Norm of x.
    pub norm: Option<LinearNorm>,
    /// Applied to the sum of product and bias.
    pub activation: Activation,
    /// Whether the last operand is added to the result.
    pub residual: bool,
    /// Whether neighbouring rows may share products, see [`fewer_products`](crate::passes::fewer_products).
    pub fewer: bool,
}

impl Linear {
    /// `x · Wᵀ`, plus a bias where there is one.
    pub fn plain(bias: bool) -> Linear {
        Linear { parts: vec![bias], norm: None, activation: Activation::None, residual: false, fewer: false }
    }

    /// Index of the first weight among the operands.
    pub fn first_weight(&self) -> usize {
        1 + LinearNorm::operands(self.norm)
    }

    /// Operands that belong to weights and biases.
    pub(crate) fn weight_operands(&self) -> usize {
        self.parts.iter().map(|b| 1 + usize::from(*b)).sum()
    }
}

/// Sum of the rows of all parts; `wrong` where a part does not fit `k`.
pub(crate) fn total_rows(parts: &[bool], k: &Dim, operands: &[Meta]) -> Option<Dim> {
    let mut n = Dim::fixed(0);
    let mut rest = operands.iter();
    for bias in parts {
        let w = rest.next()?;
        let [rows, wk] = w.shape.as_slice() else { return None };
        if wk != k || (*bias && rest.next()?.shape.as_slice() != std::slice::from_ref(rows)) {
            return None;
        }
        n = n + rows.clone();
    }
    rest.next().is_none().then_some(n)
}

/// The kernel's list of parts from the operands that start at `at`.
pub(crate) fn parts<'s>(
    call: &Call<'s, '_>,
    parts: &[bool],
    mut at: usize,
) -> Result<Vec<kernels::Part<'s>>> {
    let mut list = Vec::with_capacity(parts.len());
    for bias in parts {
        let (weight, rows) = (call.weight("linear", at)?, call.shape("linear", at)?[0]);
        let bias = if *bias { Some(call.f32("linear", at + 1)?) } else { None };
        at += 1 + usize::from(bias.is_some());
        list.push(kernels::Part { weight, rows, bias });
    }
    Ok(list)
}

impl OpDef for Linear {
    fn name(&self) -> &'static str {
        match (self.norm.is_some(), self.activation, self.residual) {
            (true, Activation::SwiGlu, _) => "norm_linear_swiglu",
            (false, Activation::SwiGlu, _) => "linear_swiglu",
            (true, _, _) => "norm_linear",
            (false, Activation::None, true) => "linear_add",
            (false, Activation::None, false) => "linear",
            (false, _, _) => "linear_act",
        }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let wrong =
            || shape_error("linear", "x [.., k], norm [k], weights [n, k], biases [n], residual", inputs);
        let (norm, weights) = (self.first_weight(), self.weight_operands());
        if inputs.len() != norm + weights + usize::from(self.residual) {
            return Err(wrong());
        }
        let (k, rows) = inputs[0].shape.split_last().ok_or_else(wrong)?;
        if !LinearNorm::fits(self.norm, inputs) {
            return Err(wrong());
        }
        let n = total_rows(&self.parts, k, &inputs[norm..norm + weights]).ok_or_else(wrong)?;
        let n = if self.activation == Activation::SwiGlu { n.div(2) } else { n };
        let shape: Vec<Dim> = rows.iter().cloned().chain([n]).collect();
        if self.residual && inputs.last().is_none_or(|r| r.shape != shape) {
            return Err(wrong());
        }
        let h = LinearNorm::adds(self.norm).then(|| Meta::f32(inputs[0].shape.clone()));
        Ok(std::iter::once(Meta::f32(shape)).chain(h).collect())
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        let at = self.first_weight();
        let weights: f64 =
            inputs[at..at + self.weight_operands()].iter().filter(|s| s.len() == 2).map(|s| count(s)).sum();
        let rows = count(&inputs[0]) / inputs[0].last().copied().unwrap_or(1).max(1) as f64;
        2.0 * weights * rows
    }
    fn scratch(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> usize {
        if self.norm.is_some() { inputs[0].iter().product() } else { 0 }
    }
    fn takes_weight(&self, i: usize) -> bool {
        // Biases among them are vectors, which are kept as f32 whatever their type.
        i >= self.first_weight() && i < self.first_weight() + self.weight_operands()
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let shape = call.shape("linear", 0)?;
        let k = shape.last().copied().unwrap_or(0);
        let m: usize = shape.iter().rev().skip(1).product();
        let list = parts(call, &self.parts, self.first_weight())?;
        let residual = if self.residual { Some(call.f32("linear", call.inputs.len() - 1)?) } else { None };
        let scratch = std::mem::take(&mut call.scratch);
        let x = LinearNorm::apply(self.norm, "linear", call, scratch)?;
        let cpu = call.cpu;
        let y = call.output("linear", 0)?;
        let product = if self.fewer { kernels::linear_fewer } else { kernels::linear };
        product(cpu, x, m, k, &list, self.activation.epilogue(), y)?;
        if let Some(residual) = residual {
            kernels::add_to(cpu, residual, y)?;
        }
        Ok(())
    }
}
