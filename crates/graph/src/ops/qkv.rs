//! Fused head of an attention block: norm, merged projections, rotary embedding, and KV append.

use pocketglm_tensor::ops as kernels;

use super::linear::{parts, total_rows};
use super::{Call, LinearNorm, OpDef, RopeLayout, count, kv, shape_error};
use crate::dim::Dim;
use crate::graph::Meta;
use crate::{Error, Result};

/// `[q | k | v] = norm(x) · Wᵀ + b`, q and k rotated; where `append` is set, k and v go to their states.
///
/// Operands: `x [t, c]`, the norm's, weights and biases, `table [t, r]`, then `k state`, `v state`
/// (`[capacity, kv_heads, head_dim]`). Results: `[t, (heads + 2·kv_heads)·head_dim]`, the normed sum where the norm
/// adds, then the states.
#[derive(Clone, Debug)]
pub struct Qkv {
    /// Norm of x.
    pub norm: Option<LinearNorm>,
    /// One entry for each weight: whether it has a bias.
    pub parts: Vec<bool>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// How q and k are rotated.
    pub rope: QkvRope,
    /// First row of the states that is written, where there are states.
    pub append: Option<Dim>,
}

/// The rotary embedding of a [`Qkv`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkvRope {
    /// Which components form a pair.
    pub layout: RopeLayout,
}

impl Qkv {
    /// Index of the first weight among the operands.
    pub fn first_weight(&self) -> usize {
        1 + LinearNorm::operands(self.norm)
    }

    fn weight_operands(&self) -> usize {
        self.parts.iter().map(|b| 1 + usize::from(*b)).sum()
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

impl OpDef for Qkv {
    fn name(&self) -> &'static str {
        if self.append.is_some() { "norm_qkv_rope_append" } else { "norm_qkv_rope" }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let wrong = || shape_error("qkv", "x [t, c], norm, weights, biases, table [t, r], states", inputs);
        let (at, weights) = (self.first_weight(), self.weight_operands());
        let states = if self.append.is_some() { 2 } else { 0 };
        if inputs.len() != at + weights + 1 + states {
            return Err(wrong());
        }
        let [t, c] = inputs[0].shape.as_slice() else { return Err(wrong()) };
        let n = total_rows(&self.parts, c, &inputs[at..at + weights]).ok_or_else(wrong)?;
        let table = &inputs[at + weights].shape;
        let fits = n.as_fixed() == Some(self.width())
            && LinearNorm::fits(self.norm, inputs)
            && matches!(table.as_slice(), [tt, r] if tt == t && r.as_fixed().is_some_and(|r| r <= self.head_dim))
            && inputs[at + weights + 1..].iter().all(|s| kv::is_cache(s, self.kv_heads, self.head_dim));
        if !fits {
            return Err(wrong());
        }
        let mut outputs = vec![Meta::f32(vec![t.clone(), self.width().into()])];
        outputs.extend(LinearNorm::adds(self.norm).then(|| Meta::f32(inputs[0].shape.clone())));
        outputs.extend(inputs[at + weights + 1..].iter().cloned());
        Ok(outputs)
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        let c = inputs[0].last().copied().unwrap_or(0) as f64;
        (2.0 * c + 3.0) * count(&outputs[0])
    }
    fn scratch(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> usize {
        if self.norm.is_some() { inputs[0].iter().product() } else { 0 }
    }
    fn takes_weight(&self, i: usize) -> bool {
        i >= self.first_weight() && i < self.first_weight() + self.weight_operands()
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let &[t, c] = call.shape("qkv", 0)? else { return Ok(()) };
        let list = parts(call, &self.parts, self.first_weight())?;
        let scratch = std::mem::take(&mut call.scratch);
        let x = LinearNorm::apply(self.norm, "qkv", call, scratch)?;
        let at = self.first_weight() + self.weight_operands();
        let table = call.f32("qkv", at)?;
        let r = call.shape("qkv", at)?[1];
        let (width, d, cpu) = (self.width(), self.head_dim, call.cpu);
        let y = call.output("qkv", 0)?;
        kernels::linear(cpu, x, t, c, &list, kernels::Epilogue::None, y)?;
        // q and k lie side by side, so one call rotates the heads of both.
        kernels::rope_in_place(
            cpu,
            y,
            width,
            [t, self.heads + self.kv_heads, d],
            table,
            r,
            self.rope.layout,
        )?;
        let Some(append) = &self.append else { return Ok(()) };
        let past = append.eval(call.bindings)?;
        let formats = [call.kv_format("qkv", at + 1)?, call.kv_format("qkv", at + 2)?];
        let results = call.outputs.len();
        let [qkv, .., k_state, v_state] = call.outputs else {
            return Err(Error::Shape {
                op: "qkv",
                wanted: "at least 3 results".into(),
                found: results.to_string(),
            });
        };
        let columns = [self.heads * d, (self.heads + self.kv_heads) * d];
        for ((state, format), column) in [k_state, v_state].into_iter().zip(formats).zip(columns) {
            let x = qkv.get(column..).unwrap_or(&[]);
            let rows = kv::Rows { x, stride: width, shape: [t, self.kv_heads, d] };
            kv::append(cpu, state, format, past, &rows)?;
        }
        Ok(())
    }
}
