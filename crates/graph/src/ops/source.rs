//! Nodes that bring data in: run-time inputs, checkpoint weights, constants and states.

use pocketglm_tensor::{DType, Tensor};

use super::{Call, OpDef};
use crate::dim::Dim;
use crate::graph::Meta;
use crate::{Error, Result};

/// A value that the caller gives at each run.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// Type and shape.
    pub meta: Meta,
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug)]
pub struct WeightRef {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type that the checkpoint stores.
    pub dtype: DType,
    /// Shape that the graph uses: the stored one, or another of as many elements.
    pub shape: Vec<usize>,
    /// Shape that the checkpoint stores.
    pub stored: Vec<usize>,
}

/// A tensor that is part of the graph.
#[derive(Clone, Debug)]
pub struct Constant {
    /// Its values.
    pub tensor: Tensor,
}

/// A buffer that lives from run to run, such as a KV cache.
#[derive(Clone, Debug)]
pub struct State {
    /// Its name.
    pub name: String,
    /// Element type: F32, or that of a [`KvFormat`](pocketglm_tensor::KvFormat), whose rows are heads.
    pub dtype: DType,
    /// Shape; its first dimension is the capacity.
    pub shape: Vec<Dim>,
}

fn never_runs(op: &'static str) -> Error {
    Error::Shape { op, wanted: "data from the executor".into(), found: "a call".into() }
}

macro_rules! source {
    ($ty:ty, $name:literal, |$s:ident| $meta:expr) => {
        impl OpDef for $ty {
            fn name(&self) -> &'static str {
                $name
            }
            fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
                let $s = self;
                Ok(vec![$meta])
            }
            fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
                0.0
            }
            fn run(&self, _: &mut Call<'_, '_>) -> Result<()> {
                Err(never_runs($name))
            }
        }
    };
}

fn fixed(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&d| d.into()).collect()
}

source!(Input, "input", |s| s.meta.clone());
source!(WeightRef, "weight", |s| Meta { dtype: s.dtype, shape: fixed(&s.shape) });
source!(Constant, "constant", |s| Meta { dtype: s.tensor.dtype(), shape: fixed(s.tensor.shape()) });
source!(State, "state", |s| Meta { dtype: s.dtype, shape: s.shape.clone() });
