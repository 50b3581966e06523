//! The largest elements of each row, for sampling: a device that does this reads back a few bytes, not all logits.

use pocketglm_tensor::{DType, ops as kernels};

use super::{Call, OpDef, count, operands, shape_error};
use crate::Result;
use crate::graph::Meta;

/// Indices `[r, k]` and values `[r, k]` of the `k` largest elements of each row of `x [r, c]`, the largest first, equal
/// ones in the order of their indices.
#[derive(Clone, Debug)]
pub struct TopK {
    /// How many.
    pub k: usize,
}

impl OpDef for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("top_k", inputs)?;
        match x.shape.as_slice() {
            [r, c] if self.k > 0 && c.as_fixed().is_none_or(|c| self.k <= c) => {
                let shape = vec![r.clone(), self.k.into()];
                Ok(vec![Meta { dtype: DType::I32, shape: shape.clone() }, Meta::f32(shape)])
            }
            _ => Err(shape_error("top_k", format!("x [r, c] with at least {} columns", self.k), inputs)),
        }
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("top_k", 0)?;
        let c = call.shape("top_k", 0)?[1];
        let mut order = Vec::with_capacity(x.len() / c.max(1));
        for row in x.chunks_exact(c.max(1)) {
            order.push(match self.k {
                1 => vec![kernels::argmax(row)?],
                k => kernels::top_k(row, k)?,
            });
        }
        // Indices of a row are far below 2^24, so they are exact as numbers.
        for (to, best) in call.output("top_k", 0)?.chunks_exact_mut(self.k).zip(&order) {
            to.iter_mut().zip(best).for_each(|(to, &i)| *to = i as f32);
        }
        let values = call.output("top_k", 1)?.chunks_exact_mut(self.k);
        for ((to, best), row) in values.zip(&order).zip(x.chunks_exact(c.max(1))) {
            to.iter_mut().zip(best).for_each(|(to, &i)| *to = row[i]);
        }
        Ok(())
    }
}
