//! `y[.., m, n] = a[.., m, k] · b`, with `b` a matrix `[n, k]` (a weight, rows are outputs) or a batch.

use pocketglm_tensor::ops as kernels;

use super::{Call, OpDef, operands, shape_error};
use crate::Result;
use crate::graph::Meta;

/// Matrix product.
///
/// `b` of rank 2: `[n, k]`, as checkpoints store linear layers; `a` of any rank `[.., k]`.
/// `b` of rank 3: `[batch, n, k]` where `transposed`, else `[batch, k, n]`; `a: [batch, m, k]`.
#[derive(Clone, Debug)]
pub struct MatMul {
    /// Whether the rows of `b` are outputs. Always so for a `b` of rank 2.
    pub transposed: bool,
}

impl OpDef for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [a, b] = operands::<2>("matmul", inputs)?;
        let wrong = || shape_error("matmul", "a [.., k] and b [n, k], or batches of both", inputs);
        let (Some((k, rows)), true) =
            (a.shape.split_last(), a.dtype.is_float() && (b.dtype.is_float() || b.dtype.is_quantised()))
        else {
            return Err(wrong());
        };
        let n = match (b.shape.as_slice(), self.transposed) {
            ([n, bk], true) if bk == k => n,
            ([batch, n, bk], true) if bk == k && rows.len() == 2 && rows[0] == *batch => n,
            ([batch, bk, n], false) if bk == k && rows.len() == 2 && rows[0] == *batch => n,
            _ => return Err(wrong()),
        };
        Ok(vec![Meta::f32(rows.iter().chain([n]).cloned().collect())])
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        2.0 * super::count(&outputs[0]) * inputs[0].last().copied().unwrap_or(0) as f64
    }
    fn takes_weight(&self, i: usize) -> bool {
        i == 1
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let a = call.f32("matmul", 0)?;
        let a_shape = call.shape("matmul", 0)?;
        let b_shape = call.shape("matmul", 1)?;
        let k = a_shape.last().copied().unwrap_or(0);
        if let [n, _] = *b_shape {
            let m: usize = a_shape.iter().rev().skip(1).product();
            let part = kernels::Part { weight: call.weight("matmul", 1)?, rows: n, bias: None };
            let cpu = call.cpu;
            let y = call.output("matmul", 0)?;
            return Ok(kernels::linear(cpu, a, m, k, &[part], kernels::Epilogue::None, y)?);
        }
        let b = call.f32("matmul", 1)?;
        let (batch, m) = (a_shape[0], a_shape[1]);
        let n = if self.transposed { b_shape[1] } else { b_shape[2] };
        let cpu = call.cpu;
        let y = call.output("matmul", 0)?;
        let layout = if self.transposed { kernels::MatmulB::Transposed } else { kernels::MatmulB::Normal };
        Ok(kernels::matmul(cpu, a, b, layout, [batch, m, k, n], y)?)
    }
}
