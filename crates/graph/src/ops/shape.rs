//! Views and data movement: reshape, permute, slice, concat.

use pocketglm_tensor::ops as kernels;

use super::{Call, OpDef, operands, shape_error};
use crate::dim::{Dim, product};
use crate::graph::Meta;
use crate::{Error, Result};

/// The same elements in the same order under another shape. A view.
#[derive(Clone, Debug)]
pub struct Reshape {
    /// The new shape.
    pub shape: Vec<Dim>,
}

impl OpDef for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("reshape", inputs)?;
        if product(&self.shape) != x.elements() {
            return Err(shape_error("reshape", format!("as many elements as {:?}", self.shape), inputs));
        }
        Ok(vec![Meta::f32(self.shape.clone())])
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        // Only a load-time reshape gets here; at run time it is a view.
        let x = call.f32("reshape", 0)?;
        call.output("reshape", 0)?.copy_from_slice(x);
        Ok(())
    }
}

/// `y[i_perm(0), i_perm(1), ..] = x[i_0, i_1, ..]`: dimension `k` of y is dimension `order[k]` of x.
#[derive(Clone, Debug)]
pub struct Permute {
    /// The source dimension of each result dimension.
    pub order: Vec<usize>,
}

impl OpDef for Permute {
    fn name(&self) -> &'static str {
        "permute"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("permute", inputs)?;
        let mut seen = self.order.clone();
        seen.sort_unstable();
        if seen != (0..x.shape.len()).collect::<Vec<_>>() {
            return Err(shape_error(
                "permute",
                format!("rank {} for order {:?}", seen.len(), self.order),
                inputs,
            ));
        }
        Ok(vec![Meta::f32(self.order.iter().map(|&i| x.shape[i].clone()).collect())])
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, shape) = (call.f32("permute", 0)?, call.shape("permute", 0)?);
        Ok(kernels::permute(call.cpu, x, shape, &self.order, call.output("permute", 0)?)?)
    }
}

/// `len` indices from `start` on along `axis`. A view where `axis` is the first.
#[derive(Clone, Debug)]
pub struct Slice {
    /// The dimension that is cut.
    pub axis: usize,
    /// First index.
    pub start: Dim,
    /// Number of indices.
    pub len: Dim,
}

impl OpDef for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("slice", inputs)?;
        let Some(dim) = x.shape.get(self.axis) else {
            return Err(shape_error("slice", format!("a dimension {}", self.axis), inputs));
        };
        // Symbolic bounds are checked again when sizes are known.
        if let (Some(d), Some(s), Some(l)) = (dim.as_fixed(), self.start.as_fixed(), self.len.as_fixed())
            && s + l > d
        {
            return Err(shape_error(
                "slice",
                format!("at least {} in dimension {}", s + l, self.axis),
                inputs,
            ));
        }
        let mut shape = x.shape.clone();
        shape[self.axis] = self.len.clone();
        Ok(vec![Meta::f32(shape)])
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, shape) = (call.f32("slice", 0)?, call.shape("slice", 0)?);
        let (start, len) = (self.start.eval(call.bindings)?, self.len.eval(call.bindings)?);
        let dim = shape[self.axis];
        if start + len > dim {
            return Err(Error::Shape {
                op: "slice",
                wanted: format!("at least {} in dimension {}", start + len, self.axis),
                found: format!("{shape:?}"),
            });
        }
        let inner: usize = shape[self.axis + 1..].iter().product();
        let y = call.output("slice", 0)?;
        if len * inner > 0 {
            for (to, from) in y.chunks_exact_mut(len * inner).zip(x.chunks_exact(dim * inner)) {
                to.copy_from_slice(&from[start * inner..(start + len) * inner]);
            }
        }
        Ok(())
    }
}

/// Operands one after the other along `axis`.
#[derive(Clone, Debug)]
pub struct Concat {
    /// The dimension along which they are joined.
    pub axis: usize,
}

impl OpDef for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let wrong =
            || shape_error("concat", format!("shapes that differ in dimension {} only", self.axis), inputs);
        let first = inputs.first().filter(|m| self.axis < m.shape.len()).ok_or_else(wrong)?;
        let mut shape = first.shape.clone();
        for other in &inputs[1..] {
            let same = other.shape.len() == shape.len()
                && (0..shape.len()).all(|i| i == self.axis || other.shape[i] == shape[i]);
            if !same {
                return Err(wrong());
            }
            shape[self.axis] = shape[self.axis].clone() + other.shape[self.axis].clone();
        }
        Ok(vec![Meta::f32(shape)])
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let mut parts = Vec::with_capacity(call.inputs.len());
        for i in 0..call.inputs.len() {
            let run: usize = call.shape("concat", i)?[self.axis..].iter().product();
            parts.push((call.f32("concat", i)?, run));
        }
        let width: usize = parts.iter().map(|(_, run)| run).sum();
        let y = call.output("concat", 0)?;
        if width == 0 {
            return Ok(());
        }
        for (i, row) in y.chunks_exact_mut(width).enumerate() {
            let mut at = 0;
            for (x, run) in &parts {
                row[at..at + run].copy_from_slice(&x[i * run..(i + 1) * run]);
                at += run;
            }
        }
        Ok(())
    }
}
