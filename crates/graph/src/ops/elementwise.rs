//! Element-wise ops: `y = f(x)`, `y = f(a, b)` with `b` broadcast over leading dimensions, `y = c * x`.

use pocketglm_tensor::ops as kernels;
pub use pocketglm_tensor::ops::{Binary as BinaryKind, Unary as UnaryKind};

use super::{Call, OpDef, count, operands, shape_error};
use crate::Result;
use crate::graph::Meta;

/// `y = f(x)`, any shape.
#[derive(Clone, Debug)]
pub struct Unary {
    /// The function.
    pub kind: UnaryKind,
}

impl OpDef for Unary {
    fn name(&self) -> &'static str {
        match self.kind {
            UnaryKind::Silu => "silu",
            UnaryKind::Gelu => "gelu",
            UnaryKind::Relu => "relu",
            _ => "unary",
        }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("unary", inputs)?;
        Ok(vec![Meta::f32(x.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("unary", 0)?;
        Ok(kernels::unary(call.cpu, self.kind, x, call.output("unary", 0)?)?)
    }
}

/// `y = f(a, b)`; the shape of `b` is that of `a` or its last dimensions.
#[derive(Clone, Debug)]
pub struct Binary {
    /// The function.
    pub kind: BinaryKind,
}

impl OpDef for Binary {
    fn name(&self) -> &'static str {
        match self.kind {
            BinaryKind::Add => "add",
            BinaryKind::Mul => "mul",
            _ => "binary",
        }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [a, b] = operands::<2>("binary", inputs)?;
        if !a.shape.ends_with(&b.shape) {
            return Err(shape_error(self.name(), "b like a, or like a's last dimensions", inputs));
        }
        Ok(vec![Meta::f32(a.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (a, b) = (call.f32("binary", 0)?, call.f32("binary", 1)?);
        Ok(kernels::binary(call.cpu, self.kind, a, b, call.output("binary", 0)?)?)
    }
}

/// `y = c * x`.
#[derive(Clone, Debug)]
pub struct Scale {
    /// The factor.
    pub factor: f32,
}

impl OpDef for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("scale", inputs)?;
        Ok(vec![Meta::f32(x.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("scale", 0)?;
        for (y, x) in call.output("scale", 0)?.iter_mut().zip(x) {
            *y = self.factor * x;
        }
        Ok(())
    }
}
