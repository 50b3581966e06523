//! How a case is written down.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pocketglm_graph::{Bindings, Dim, GraphBuilder, Result, Value};
use pocketglm_quant::{RowOptions, dequantise_row, quantise_row};
use pocketglm_tensor::{DType, Error as TensorError, KvFormat, Tensor, TensorInfo, WeightSource};

use super::comparison::{Bound, bounds};
use super::{Case, Model, Run, Values};

/// What values look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// Between -1 and 1.
    Spread,
    /// Between -10,000 and 10,000.
    Large,
    /// All 0.75.
    Equal,
    /// Between -1.1 and -0.1.
    Negative,
    /// Between 0.1 and 1.1.
    Positive,
    /// All zero.
    Zero,
    /// Whole numbers whose largest of every 32 is 127, so that rounding them to bytes changes nothing.
    Codes,
}

impl Fill {
    pub const EACH: [Fill; 5] = [Fill::Spread, Fill::Large, Fill::Equal, Fill::Negative, Fill::Zero];

    pub fn name(self) -> &'static str {
        match self {
            Fill::Spread => "spread",
            Fill::Large => "large",
            Fill::Equal => "equal",
            Fill::Negative => "negative",
            Fill::Positive => "positive",
            Fill::Zero => "zero",
            Fill::Codes => "whole",
        }
    }

    pub fn values(self, seed: u32, n: usize) -> Vec<f32> {
        // Marsaglia's xorshift32.
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n)
            .map(|i| {
                let u = next();
                match self {
                    Fill::Spread => u,
                    Fill::Large => u * 1e4,
                    Fill::Equal => 0.75,
                    Fill::Negative => -u.abs() - 0.1,
                    Fill::Positive => u.abs() + 0.1,
                    Fill::Zero => 0.0,
                    Fill::Codes if i % 32 == 0 => 127.0,
                    Fill::Codes => (u * 127.0).round(),
                }
            })
            .collect()
    }
}

/// A case in the making: weights and inputs are made where the graph needs them.
pub(super) struct Draft {
    weights: Shared,
    inputs: RefCell<Vec<(String, Values)>>,
    pub fill: Fill,
    seed: Cell<u32>,
    /// Whether weights are kept as the values that they stand for.
    widen: bool,
}

/// Weights that grow while a builder looks at them.
struct Shared(Mutex<HashMap<String, Tensor>>);

impl Shared {
    fn with<R>(&self, f: impl FnOnce(&mut HashMap<String, Tensor>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl WeightSource for Shared {
    fn tensors(&self) -> Vec<TensorInfo> {
        Vec::new()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = |t: &Tensor| TensorInfo { name: name.into(), dtype: t.dtype(), shape: t.shape().to_vec() };
        self.with(|all| all.get(name).map(info))
    }
    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let missing = || TensorError::Missing { name: name.into(), place: "the case".into() };
        self.with(|all| all.get(name).cloned()).ok_or_else(missing)
    }
}

impl Draft {
    fn next(&self) -> u32 {
        self.seed.set(self.seed.get() + 1);
        self.seed.get()
    }

    fn keep(&self, name: String, tensor: Tensor) {
        self.weights.with(|all| all.insert(name, tensor));
    }

    /// A weight matrix of the checkpoint, for the builder to find under the name.
    pub fn matrix(&self, name: &str, dtype: DType, [rows, k]: [usize; 2]) -> Result<()> {
        let values = Fill::Spread.values(self.next(), rows * k);
        let stored = stored(dtype, [rows, k], &values)?;
        self.keep(name.into(), if self.widen { widened(&stored)? } else { stored });
        Ok(())
    }

    /// A vector in f32.
    pub fn vector(&self, name: &str, n: usize, fill: Fill) -> Result<()> {
        let values = fill.values(self.next(), n);
        self.keep(name.into(), Tensor::from_f32(&[n], &values)?);
        Ok(())
    }

    /// A tensor in f32.
    pub fn tensor(&self, g: &mut GraphBuilder<'_>, name: &str, shape: &[usize]) -> Result<Value> {
        let values = Fill::Spread.values(self.next(), shape.iter().product());
        self.keep(name.into(), Tensor::from_f32(shape, &values)?);
        g.weight(name, shape)
    }

    /// `name.weight`, and `name.bias` where wanted, then the layer.
    pub fn linear(
        &self,
        g: &mut GraphBuilder<'_>,
        name: &str,
        dtype: DType,
        x: Value,
        [n, k]: [usize; 2],
        bias: bool,
    ) -> Result<Value> {
        self.matrix(&format!("{name}.weight"), dtype, [n, k])?;
        if bias {
            self.vector(&format!("{name}.bias"), n, Fill::Spread)?;
        }
        g.linear(name, x, n, bias)
    }

    /// `name.weight`, then the norm.
    pub fn rms(&self, g: &mut GraphBuilder<'_>, name: &str, x: Value, c: usize) -> Result<Value> {
        self.vector(&format!("{name}.weight"), c, Fill::Positive)?;
        g.rms_norm(name, x, 1e-5)
    }

    /// An input in f32 of the draft's fill.
    pub fn x(&self, g: &mut GraphBuilder<'_>, name: &str, shape: &[usize]) -> Result<Value> {
        self.x_of(g, name, shape, self.fill)
    }

    /// The same of another fill.
    pub fn x_of(&self, g: &mut GraphBuilder<'_>, name: &str, shape: &[usize], fill: Fill) -> Result<Value> {
        let values = fill.values(self.next(), shape.iter().product());
        self.given(g, name, shape, values)
    }

    /// An input with these values.
    pub fn given(
        &self,
        g: &mut GraphBuilder<'_>,
        name: &str,
        shape: &[usize],
        values: Vec<f32>,
    ) -> Result<Value> {
        self.inputs.borrow_mut().push((name.into(), Values::F32(values)));
        g.input(name, DType::F32, &dims(shape))
    }

    /// An input of indices.
    pub fn ids(&self, g: &mut GraphBuilder<'_>, name: &str, shape: &[usize], ids: &[i32]) -> Result<Value> {
        self.inputs.borrow_mut().push((name.into(), Values::I32(ids.to_vec())));
        g.input(name, DType::I32, &dims(shape))
    }
}

pub(super) fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&d| d.into()).collect()
}

/// What is known of a case besides its graph.
pub(super) struct About {
    pub op: &'static str,
    pub form: String,
    pub bound: Bound,
    pub fill: Fill,
    pub kv: KvFormat,
    pub fused: Vec<&'static str>,
}

impl About {
    pub fn new(op: &'static str, form: impl Into<String>, bound: Bound) -> About {
        let (fill, kv) = (Fill::Spread, KvFormat::F32);
        About { op, form: form.into(), bound, fill, kv, fused: Vec::new() }
    }

    pub fn filled(self, fill: Fill) -> About {
        About { fill, ..self }
    }

    pub fn fused(self, ops: &[&'static str]) -> About {
        About { fused: ops.to_vec(), ..self }
    }

    pub fn kv(self, kv: KvFormat) -> About {
        About { kv, ..self }
    }

    /// A case of one run: the closure builds the graph and gives the value that is its result.
    pub fn build(self, body: impl Fn(&Draft, &mut GraphBuilder<'_>) -> Result<Value>) -> Result<Case> {
        self.build_runs(body, vec![(Bindings::new(), Vec::new())])
    }

    /// A case of several runs with the same state: sizes and inputs of each. The inputs of the draft come to every one of
    /// them.
    pub fn build_runs(
        self,
        body: impl Fn(&Draft, &mut GraphBuilder<'_>) -> Result<Value>,
        runs: Vec<(Bindings, Vec<(String, Values)>)>,
    ) -> Result<Case> {
        let draw = |widen: bool| -> Result<(Model, Vec<(String, Values)>)> {
            let seed = self.form.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
            let draft = Draft {
                weights: Shared(Mutex::default()),
                inputs: RefCell::default(),
                fill: self.fill,
                seed: Cell::new(seed % 100_000),
                widen,
            };
            let mut g = GraphBuilder::new(&draft.weights).with_kv_format(self.kv);
            let y = body(&draft, &mut g)?;
            g.output("y", y);
            let graph = g.finish();
            let weights = draft.weights.0.into_inner().unwrap_or_else(PoisonError::into_inner);
            Ok((Model { graph, weights }, draft.inputs.into_inner()))
        };
        let (model, common) = draw(false)?;
        let (reference, _) = draw(true)?;
        let runs = runs.into_iter().map(|(bindings, inputs)| Run {
            bindings,
            inputs: common.iter().cloned().chain(inputs).collect(),
        });
        Ok(Case {
            op: self.op,
            cooperative: bounds::wider(
                self.bound,
                match self.op.contains("qkv") || self.op == "attention" {
                    true if self.kv == KvFormat::Int8 => bounds::COOPERATIVE_KV_INT8,
                    true => bounds::COOPERATIVE_ATTENTION,
                    false => bounds::COOPERATIVE,
                },
            ),
            bound: self.bound,
            quick: None,
            fused: self.fused,
            model,
            reference,
            runs: runs.collect(),
            form: self.form,
        })
    }
}

/// Values as a checkpoint stores them.
fn stored(dtype: DType, [rows, k]: [usize; 2], values: &[f32]) -> Result<Tensor> {
    let mut bytes = Vec::new();
    for row in values.chunks(k.max(1)) {
        quantise_row(dtype, row, &RowOptions::default(), &mut bytes)
            .map_err(|source| pocketglm_graph::Error::Quantised { name: "case".into(), row: 0, source })?;
    }
    Ok(Tensor::new(dtype, &[rows, k], bytes.into())?)
}

/// The values that a quantised tensor stands for; other tensors as they are.
fn widened(t: &Tensor) -> Result<Tensor> {
    let (&[_, k], true) = (t.shape(), t.dtype().is_quantised()) else { return Ok(t.clone()) };
    let mut values = vec![0.0; t.elements()];
    let bytes = t.dtype().row_bytes(k).unwrap_or(1).max(1);
    for (row, (stored, out)) in t.bytes().chunks(bytes).zip(values.chunks_mut(k.max(1))).enumerate() {
        dequantise_row(t.dtype(), stored, out).map_err(|source| pocketglm_graph::Error::Quantised {
            name: "case".into(),
            row,
            source,
        })?;
    }
    Ok(Tensor::from_f32(t.shape(), &values)?)
}
