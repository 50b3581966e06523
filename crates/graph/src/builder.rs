//! Building a graph: one method for each op, shapes checked as the node is made.

use std::collections::HashMap;

use pocketglm_tensor::{DType, KvFormat, Tensor, TensorInfo, WeightSource};

use crate::dim::Dim;
use crate::graph::{Graph, Meta, Node, Value};
use crate::ops::{
    Activation, BatchNorm, Binary, BinaryKind, Concat, Constant, Conv, FrameConv, GatherRows, Input,
    InstanceNorm, KvAppend, KvRead, LayerNorm, MatMul, Op, Permute, Reshape, RmsNorm, Rope, RopeLayout,
    RopeTable, Scale, ScatterRows, Slice, Softmax, SoftmaxMask, State, TopK, Unary, UnaryKind, WeightRef,
    WeightedGather,
};
use crate::{Error, Result};

/// Where the builder learns the stored type of a weight.
enum Weights<'w> {
    /// A checkpoint: names and shapes are checked.
    Source(&'w dyn WeightSource),
    /// No checkpoint: every weight counts as present, in this type.
    Assumed(DType),
}

/// Appends nodes to a graph. Names of weights and nodes are relative to the current scope.
pub struct GraphBuilder<'w> {
    graph: Graph,
    scope: String,
    weights: Weights<'w>,
    known: HashMap<String, Value>,
    kv_format: KvFormat,
}

impl<'w> GraphBuilder<'w> {
    /// A builder that takes the weights' types and shapes from `source`.
    pub fn new(source: &'w dyn WeightSource) -> GraphBuilder<'w> {
        GraphBuilder::with(Weights::Source(source))
    }

    /// A builder without a checkpoint, for plans and tensor lists: every weight counts as present, as `dtype`.
    pub fn assuming(dtype: DType) -> GraphBuilder<'static> {
        GraphBuilder::with(Weights::Assumed(dtype))
    }

    fn with(weights: Weights<'_>) -> GraphBuilder<'_> {
        GraphBuilder {
            graph: Graph::default(),
            scope: String::new(),
            weights,
            known: HashMap::new(),
            kv_format: KvFormat::F32,
        }
    }

    /// The graph built so far.
    pub fn finish(self) -> Graph {
        self.graph
    }

    /// Runs `body` with `name` appended to the scope.
    pub fn scoped<R>(&mut self, name: &str, body: impl FnOnce(&mut Self) -> R) -> R {
        let length = self.scope.len();
        if length > 0 && !name.is_empty() {
            self.scope.push('.');
        }
        self.scope.push_str(name);
        let result = body(self);
        self.scope.truncate(length);
        result
    }

    /// The full name of `name` in the current scope.
    pub fn path(&self, name: &str) -> String {
        if self.scope.is_empty() { name.into() } else { format!("{}.{name}", self.scope) }
    }

    /// Type and shape of a value.
    pub fn meta(&self, value: Value) -> &Meta {
        self.graph.meta(value)
    }

    /// Shape of a value.
    pub fn shape(&self, value: Value) -> &[Dim] {
        &self.graph.meta(value).shape
    }

    fn push(&mut self, op: Op, inputs: &[Value]) -> Result<Value> {
        self.graph.push(op, inputs.to_vec(), &self.scope)
    }

    fn push_known(&mut self, name: &str, op: Op) -> Result<Value> {
        if let Some(v) = self.known.get(name) {
            return Ok(*v);
        }
        let v = self.push(op, &[])?;
        self.known.insert(name.into(), v);
        Ok(v)
    }

    /// A value that the caller gives at each run. Its name does not depend on the scope.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> Result<Value> {
        let meta = Meta { dtype, shape: shape.to_vec() };
        self.push_known(name, Op::Input(Input { name: name.into(), meta }))
    }

    /// A tensor of the checkpoint.
    ///
    /// # Errors
    /// [`pocketglm_tensor::Error::Missing`] or [`Error::WeightShape`], naming the tensor.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Value> {
        self.weight_as(name, shape, shape)
    }

    /// A tensor of the checkpoint, used under another shape of as many elements.
    pub fn weight_as(&mut self, name: &str, stored: &[usize], shape: &[usize]) -> Result<Value> {
        let name = self.path(name);
        let dtype = match &self.weights {
            Weights::Assumed(dtype) => *dtype,
            Weights::Source(source) => {
                let info: TensorInfo = source.info(&name).ok_or_else(|| {
                    pocketglm_tensor::Error::Missing { name: name.clone(), place: "the checkpoint".into() }
                })?;
                if info.shape != stored {
                    return Err(Error::WeightShape { name, wanted: stored.to_vec(), found: info.shape });
                }
                info.dtype
            }
        };
        let op = WeightRef { name: name.clone(), dtype, shape: shape.to_vec(), stored: stored.to_vec() };
        self.push_known(&name, Op::Weight(op))
    }

    /// Whether the checkpoint has a tensor of this name in the current scope.
    pub fn has_weight(&self, name: &str) -> bool {
        match &self.weights {
            Weights::Assumed(_) => true,
            Weights::Source(source) => source.info(&self.path(name)).is_some(),
        }
    }

    /// A tensor that is part of the graph.
    pub fn constant(&mut self, tensor: Tensor) -> Result<Value> {
        self.push(Op::Constant(Constant { tensor }), &[])
    }

    /// Makes caches of this format from now on; f32 without.
    pub fn with_kv_format(mut self, format: KvFormat) -> Self {
        self.kv_format = format;
        self
    }

    /// A cache of keys or values that lives from run to run: `[capacity, heads, d]`.
    pub fn kv_state(&mut self, name: &str, capacity: Dim, heads: usize, d: usize) -> Result<Value> {
        let (name, dtype) = (self.path(name), self.kv_format.dtype());
        let shape = vec![capacity, heads.into(), d.into()];
        self.push_known(&name, Op::State(State { name: name.clone(), dtype, shape }))
    }

    /// Names a result of the graph.
    pub fn output(&mut self, name: &str, value: Value) {
        self.graph.outputs.push((name.into(), value));
    }

    /// `y = f(x)`.
    pub fn unary(&mut self, kind: UnaryKind, x: Value) -> Result<Value> {
        self.push(Op::Unary(Unary { kind }), &[x])
    }

    /// `y = x * sigmoid(x)`.
    pub fn silu(&mut self, x: Value) -> Result<Value> {
        self.unary(UnaryKind::Silu, x)
    }

    /// `y = x * Φ(x)`, exact.
    pub fn gelu(&mut self, x: Value) -> Result<Value> {
        self.unary(UnaryKind::Gelu, x)
    }

    /// `y = f(a, b)`; b may have the last dimensions of a only.
    pub fn binary(&mut self, kind: BinaryKind, a: Value, b: Value) -> Result<Value> {
        self.push(Op::Binary(Binary { kind }), &[a, b])
    }

    /// `y = a + b`; b may have the last dimensions of a only.
    pub fn add(&mut self, a: Value, b: Value) -> Result<Value> {
        self.binary(BinaryKind::Add, a, b)
    }

    /// `y = a * b`; b may have the last dimensions of a only.
    pub fn mul(&mut self, a: Value, b: Value) -> Result<Value> {
        self.binary(BinaryKind::Mul, a, b)
    }

    /// `y = factor * x`.
    pub fn scale(&mut self, x: Value, factor: f32) -> Result<Value> {
        self.push(Op::Scale(Scale { factor }), &[x])
    }

    /// `a [.., k] · b`: see [`MatMul`].
    pub fn matmul(&mut self, a: Value, b: Value, transposed: bool) -> Result<Value> {
        self.push(Op::MatMul(MatMul { transposed }), &[a, b])
    }

    /// A linear layer of the checkpoint: `x [.., k] · {name}.weight [n, k]ᵀ`, plus `{name}.bias [n]`.
    pub fn linear(&mut self, name: &str, x: Value, n: usize, bias: bool) -> Result<Value> {
        let k = self.fixed_last(x)?;
        self.scoped(name, |g| {
            let w = g.weight("weight", &[n, k])?;
            let y = g.matmul(x, w, true)?;
            if !bias {
                return Ok(y);
            }
            let b = g.weight("bias", &[n])?;
            g.add(y, b)
        })
    }

    /// `x * rsqrt(mean(x²) + eps) * {name}.weight` over the last dimension.
    pub fn rms_norm(&mut self, name: &str, x: Value, eps: f32) -> Result<Value> {
        let c = self.fixed_last(x)?;
        self.scoped(name, |g| {
            let w = g.weight("weight", &[c])?;
            g.rms_norm_by(x, w, eps)
        })
    }

    /// `x * rsqrt(mean(x²) + eps) * weight` with a given weight.
    pub fn rms_norm_by(&mut self, x: Value, weight: Value, eps: f32) -> Result<Value> {
        self.push(Op::RmsNorm(RmsNorm { eps }), &[x, weight])
    }

    /// `(x - mean) * rsqrt(var + eps) * {name}.weight + {name}.bias` over the last dimension.
    pub fn layer_norm(&mut self, name: &str, x: Value, eps: f32) -> Result<Value> {
        let c = self.fixed_last(x)?;
        self.scoped(name, |g| {
            let (w, b) = (g.weight("weight", &[c])?, g.weight("bias", &[c])?);
            g.layer_norm_by(x, w, b, eps)
        })
    }

    /// The same with given weight and bias `[c]`.
    pub fn layer_norm_by(&mut self, x: Value, weight: Value, bias: Value, eps: f32) -> Result<Value> {
        self.push(Op::LayerNorm(LayerNorm { eps }), &[x, weight, bias])
    }

    /// Batch normalisation with stored statistics: `parameters` are weight, bias, mean and variance, `[c]` each.
    pub fn batch_norm_by(&mut self, x: Value, parameters: [Value; 4], eps: f32) -> Result<Value> {
        let [weight, bias, mean, variance] = parameters;
        self.push(Op::BatchNorm(BatchNorm { eps }), &[x, weight, bias, mean, variance])
    }

    /// Convolution of `x [n, c, h, w]` with `weight [o, c/groups, kh, kw]` and `bias [o]`.
    pub fn conv_by(
        &mut self,
        x: Value,
        weight: Value,
        bias: Value,
        stride: [usize; 2],
        padding: [usize; 2],
        groups: usize,
    ) -> Result<Value> {
        let op = Conv { stride, padding, groups, activation: Activation::None };
        self.push(Op::Conv(op), &[x, weight, bias])
    }

    /// `(x - mean) * rsqrt(var + eps) * {name}.weight + {name}.bias` for each channel of `x [t, c]` over all rows.
    pub fn instance_norm(&mut self, name: &str, x: Value, eps: f32) -> Result<Value> {
        let c = self.fixed_last(x)?;
        self.scoped(name, |g| {
            let (w, b) = (g.weight("weight", &[c])?, g.weight("bias", &[c])?);
            g.instance_norm_by(x, w, b, eps)
        })
    }

    /// The same with given weight and bias `[c]`.
    pub fn instance_norm_by(&mut self, x: Value, weight: Value, bias: Value, eps: f32) -> Result<Value> {
        self.push(Op::InstanceNorm(InstanceNorm { eps }), &[x, weight, bias])
    }

    /// Convolution over the frames of `x [t, c]` with `weight [o, kernel·c/groups]`; see [`FrameConv`].
    pub fn frame_conv_by(
        &mut self,
        x: Value,
        weight: Value,
        bias: Option<Value>,
        [kernel, stride]: [usize; 2],
        padding: [usize; 2],
        groups: usize,
    ) -> Result<Value> {
        let activation = Activation::None;
        let op = FrameConv {
            kernel,
            stride,
            padding,
            groups,
            bias: bias.is_some(),
            norm: None,
            activation,
            fewer: false,
        };
        let inputs: Vec<Value> = [x, weight].into_iter().chain(bias).collect();
        self.push(Op::FrameConv(op), &inputs)
    }

    /// Softmax of scores `[b, t, s]` under a mask; `segments` for [`SoftmaxMask::Segments`].
    pub fn softmax(&mut self, x: Value, mask: SoftmaxMask, segments: Option<Value>) -> Result<Value> {
        let inputs: Vec<Value> = std::iter::once(x).chain(segments).collect();
        self.push(Op::Softmax(Softmax { mask }), &inputs)
    }

    /// Rotary angles of positions `[axes, t]`: see [`RopeTable`].
    pub fn rope_table(
        &mut self,
        positions: Value,
        theta: f32,
        axis_of_frequency: &[u8],
        period: usize,
    ) -> Result<Value> {
        let op = RopeTable { theta, axis_of_frequency: axis_of_frequency.to_vec(), period };
        self.push(Op::RopeTable(op), &[positions])
    }

    /// Rotates `x [t, h, d]` by a table.
    pub fn rope(&mut self, x: Value, table: Value, layout: RopeLayout) -> Result<Value> {
        self.push(Op::Rope(Rope { layout }), &[x, table])
    }

    /// The same elements under another shape.
    pub fn reshape(&mut self, x: Value, shape: &[Dim]) -> Result<Value> {
        self.push(Op::Reshape(Reshape { shape: shape.to_vec() }), &[x])
    }

    /// Dimension `k` of the result is dimension `order[k]` of x.
    pub fn permute(&mut self, x: Value, order: &[usize]) -> Result<Value> {
        self.push(Op::Permute(Permute { order: order.to_vec() }), &[x])
    }

    /// `len` indices from `start` on along `axis`.
    pub fn slice(
        &mut self,
        x: Value,
        axis: usize,
        start: impl Into<Dim>,
        len: impl Into<Dim>,
    ) -> Result<Value> {
        self.push(Op::Slice(Slice { axis, start: start.into(), len: len.into() }), &[x])
    }

    /// Operands one after the other along `axis`.
    pub fn concat(&mut self, parts: &[Value], axis: usize) -> Result<Value> {
        self.push(Op::Concat(Concat { axis }), parts)
    }

    /// `table[ids]`.
    pub fn gather_rows(&mut self, table: Value, ids: Value) -> Result<Value> {
        self.push(Op::GatherRows(GatherRows), &[table, ids])
    }

    /// Weighted sums of table rows.
    pub fn weighted_gather(&mut self, table: Value, taps: Value, weights: Value) -> Result<Value> {
        self.push(Op::WeightedGather(WeightedGather), &[table, taps, weights])
    }

    /// `x` with some rows replaced.
    pub fn scatter_rows(&mut self, x: Value, at: Value, rows: Value) -> Result<Value> {
        self.push(Op::ScatterRows(ScatterRows), &[x, at, rows])
    }

    /// Indices and values of the `k` largest elements of each row: see [`TopK`].
    pub fn top_k(&mut self, x: Value, k: usize) -> Result<[Value; 2]> {
        let ids = self.push(Op::TopK(TopK { k }), &[x])?;
        Ok([ids, Value { port: 1, ..ids }])
    }

    /// Appends rows to a state from row `at` on; the result is the state afterwards.
    pub fn kv_append(&mut self, rows: Value, state: Value, at: Dim) -> Result<Value> {
        self.push(Op::KvAppend(KvAppend { at }), &[rows, state])
    }

    /// The first rows of a cache as f32 `[rows, heads, d]`.
    pub fn kv_read(&mut self, state: Value, rows: Dim) -> Result<Value> {
        if self.meta(state).dtype == DType::F32 {
            return self.slice(state, 0, 0, rows);
        }
        self.push(Op::KvRead(KvRead { rows }), &[state])
    }

    /// Attention from primitive ops: `softmax(q · kᵀ * scale) · v` per head.
    ///
    /// `q [t, h, d]`, `k` and `v` `[s, kv, d]` with `h` a multiple of `kv`; result `[t, h·d]`.
    /// `segments` holds the boundaries for [`SoftmaxMask::Segments`].
    pub fn attention(
        &mut self,
        q: Value,
        k: Value,
        v: Value,
        scale: f32,
        mask: SoftmaxMask,
        segments: Option<Value>,
    ) -> Result<Value> {
        let (qs, ks) = (self.shape(q).to_vec(), self.shape(k).to_vec());
        let ([t, h, d], [s, kv, _]) = (qs.as_slice(), ks.as_slice()) else {
            return Err(Error::Shape {
                op: "attention",
                wanted: "q [t, h, d] and k [s, kv, d]".into(),
                found: format!("{qs:?} and {ks:?}"),
            });
        };
        // Query heads that share a key head are adjacent, so they count as more queries of that head.
        let group = match (h.as_fixed(), kv.as_fixed()) {
            (Some(h), Some(kv)) if kv > 0 && h % kv == 0 => h / kv,
            _ => 0,
        };
        let rows = t.clone() * group.into();
        let q = self.permute(q, &[1, 0, 2])?;
        let q = self.reshape(q, &[kv.clone(), rows.clone(), d.clone()])?;
        let k = self.permute(k, &[1, 0, 2])?;
        let v = self.permute(v, &[1, 0, 2])?;
        let scores = self.matmul(q, k, true)?;
        let scores = self.scale(scores, scale)?;
        let scores = self.reshape(scores, &[h.clone(), t.clone(), s.clone()])?;
        let p = self.softmax(scores, mask, segments)?;
        let p = self.reshape(p, &[kv.clone(), rows, s.clone()])?;
        let y = self.matmul(p, v, false)?;
        let y = self.reshape(y, &[h.clone(), t.clone(), d.clone()])?;
        let y = self.permute(y, &[1, 0, 2])?;
        self.reshape(y, &[t.clone(), h.clone() * d.clone()])
    }

    fn fixed_last(&self, x: Value) -> Result<usize> {
        self.shape(x).last().and_then(Dim::as_fixed).ok_or_else(|| Error::Shape {
            op: "weight",
            wanted: "a fixed last dimension".into(),
            found: self.meta(x).to_string(),
        })
    }
}

impl Graph {
    /// The checkpoint tensors that the graph uses, in the order of first use, with their stored shapes.
    pub fn weights(&self) -> Vec<TensorInfo> {
        self.nodes
            .iter()
            .filter_map(|Node { op, .. }| match op {
                Op::Weight(w) => {
                    Some(TensorInfo { name: w.name.clone(), dtype: w.dtype, shape: w.stored.clone() })
                }
                _ => None,
            })
            .collect()
    }
}
