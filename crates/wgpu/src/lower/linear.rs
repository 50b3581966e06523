//! Matrix products: linear layers with what was fused into them, and batches.

use pocketglm_graph::ops::{Activation, Linear, LinearNorm, Qkv};
use pocketglm_graph::{Node, Result, Value};
use pocketglm_kernels::Variant;

use super::simple::{Other, activation};
use super::{Bound, Lowering};
use crate::plan::{Slot, Word, padded};

/// A linear layer to dispatch: rows of x against the parts of a weight.
struct Product<'n> {
    x: Bound,
    m: usize,
    k: usize,
    /// Weight and bias of each part.
    parts: Vec<(Value, Option<Value>)>,
    activation: Activation,
    residual: Option<Bound>,
    y: Bound,
    /// Elements of a row of y.
    stride: usize,
    node: &'n Node,
}

/// Weights and biases among the operands from `at` on.
fn parts(node: &Node, biases: &[bool], mut at: usize) -> Vec<(Value, Option<Value>)> {
    let mut list = Vec::with_capacity(biases.len());
    for &bias in biases {
        list.push((node.inputs[at], bias.then(|| node.inputs[at + 1])));
        at += 1 + usize::from(bias);
    }
    list
}

impl Lowering<'_> {
    /// Rows and columns of a matrix, `x [.., k]` seen as `[m, k]`.
    fn rows_of(&self, x: Value) -> [usize; 2] {
        let k = self.shape(x).last().copied().unwrap_or(0);
        [self.elements(x) / k.max(1), k]
    }

    /// The rows of x behind their norm, where there is one; `scratch` is where they go.
    fn normed(&mut self, node: &Node, norm: Option<LinearNorm>, scratch: usize) -> Result<Bound> {
        let x = node.inputs[0];
        let Some(norm) = norm else { return self.bound(x) };
        let y = self.arena(scratch, self.elements(x))?;
        match norm {
            LinearNorm::Rms(eps) => self.norm_to(x, node.inputs[1], None, eps, y)?,
            LinearNorm::Layer(eps) => {
                self.norm_to(x, node.inputs[1], Some(Other::Bias(node.inputs[2])), eps, y)?;
            }
        }
        Ok(y)
    }

    pub fn linear(&mut self, node: &Node, linear: &Linear) -> Result<()> {
        let [m, k] = self.rows_of(node.inputs[0]);
        let scratch = self.places.scratch(self.node);
        let x = self.normed(node, linear.norm, scratch)?;
        let first = 1 + match linear.norm {
            None => 0,
            Some(LinearNorm::Rms(_)) => 1,
            Some(LinearNorm::Layer(_)) => 2,
        };
        let parts = parts(node, &linear.parts, first);
        let n = self.shape(self.result(0)).last().copied().unwrap_or(0);
        let residual = match linear.residual {
            true => node.inputs.last().map(|v| self.bound(*v)).transpose()?,
            false => None,
        };
        let y = self.bound(self.result(0))?;
        if linear.activation != Activation::SwiGlu {
            let activation = linear.activation;
            return self.product(&Product { x, m, k, parts, activation, residual, y, stride: n, node });
        }
        if residual.is_some() {
            return Err(self.unsupported("a residual behind SwiGLU"));
        }
        let behind = scratch + linear.norm.map_or(0, |_| padded(m * k));
        let both = self.arena(behind, 2 * m * n)?;
        let activation = Activation::None;
        self.product(&Product { x, m, k, parts, activation, residual, y: both, stride: 2 * n, node })?;
        let words = vec![m.into(), n.into(), both.at.into(), y.at.into()];
        self.element_wise(Variant::new("swiglu.wgsl"), &[(1, both.slot), (2, y.slot)], words, m * n)
    }

    pub fn qkv(&mut self, node: &Node, qkv: &Qkv) -> Result<()> {
        let [t, c] = self.rows_of(node.inputs[0]);
        let x = self.normed(node, qkv.norm, self.places.scratch(self.node))?;
        let first = 1 + match qkv.norm {
            None => 0,
            Some(LinearNorm::Rms(_)) => 1,
            Some(LinearNorm::Layer(_)) => 2,
        };
        let parts = parts(node, &qkv.parts, first);
        let at = first + qkv.parts.iter().map(|b| 1 + usize::from(*b)).sum::<usize>();
        let width = (qkv.heads + 2 * qkv.kv_heads) * qkv.head_dim;
        let y = self.bound(self.result(0))?;
        let activation = Activation::None;
        self.product(&Product { x, m: t, k: c, parts, activation, residual: None, y, stride: width, node })?;
        let table = self.bound(node.inputs[at])?;
        let r = self.shape(node.inputs[at]).last().copied().unwrap_or(0);
        // q and k lie side by side, so one dispatch rotates the heads of both.
        let heads = qkv.heads + qkv.kv_heads;
        self.rope_rows([y, table, y], [t, heads, qkv.head_dim, r], [width, width], qkv.rope.layout)?;
        let Some(past) = &qkv.append else { return Ok(()) };
        for (i, column) in [qkv.heads, heads].into_iter().enumerate() {
            let rows = Bound { at: y.at + column * qkv.head_dim, ..y };
            self.kv_append(rows, t, width, node.inputs[at + 1 + i], past)?;
        }
        Ok(())
    }

    pub fn matmul(&mut self, node: &Node, transposed: bool) -> Result<()> {
        let (a, b) = (node.inputs[0], node.inputs[1]);
        let [m, k] = self.rows_of(a);
        let y = self.bound(self.result(0))?;
        let stride = self.shape(self.result(0)).last().copied().unwrap_or(0);
        if self.shape(b).len() == 2 {
            let x = self.bound(a)?;
            let activation = Activation::None;
            let parts = vec![(b, None)];
            return self.product(&Product { x, m, k, parts, activation, residual: None, y, stride, node });
        }
        let (batch, m) = (self.shape(a)[0], self.shape(a)[1]);
        let (x, w) = (self.bound(a)?, self.bound(b)?);
        let sizes = [batch, m, k, stride, x.at, w.at, y.at];
        let variant = Variant::new("matmul.wgsl").flag_if(transposed, "TRANSPOSED");
        let groups = batch * m.div_ceil(16) * stride.div_ceil(16);
        let words = sizes.iter().map(|&s| Word::from(s)).collect();
        self.dispatch(variant, &[(1, x.slot), (2, w.slot), (3, y.slot)], words, groups)
    }

    /// One dispatch for each part of each weight that is bound by itself.
    fn product(&mut self, p: &Product<'_>) -> Result<()> {
        let mut column = 0;
        for (weight, bias) in &p.parts {
            let (root, _) = self.places.plan.root(*weight);
            let held = self.held;
            let bias = bias.map(|b| self.bound(b)).transpose()?;
            let rows = self.shape(*weight)[0];
            let Some(matrix) = held.matrices.get(&root.node()) else {
                return Err(self
                    .unsupported(format!("{}: a weight that is no matrix of the checkpoint", p.node.scope)));
            };
            let form = &matrix.form;
            for (i, part) in matrix.parts.iter().enumerate() {
                let mut slots = vec![(4, p.x.slot), (7, p.y.slot)];
                slots.extend(matrix_slots(root.node(), i, matrix));
                let mut variant =
                    form.define(Variant::new("linear.wgsl")).value("KIND", activation(p.activation));
                let mut bias_at = 0;
                if let Some(bias) = bias {
                    variant = variant.flag("BIAS");
                    slots.push((5, bias.slot));
                    bias_at = bias.at + part.first;
                }
                if let Some(residual) = p.residual {
                    variant = variant.flag("RESIDUAL");
                    slots.push((6, residual.slot));
                }
                let mut words: Vec<Word> = [
                    p.m,
                    part.rows,
                    p.k,
                    p.x.at,
                    p.y.at,
                    p.stride,
                    column + part.first,
                    bias_at,
                    p.residual.map_or(0, |r| r.at),
                ]
                .iter()
                .map(|&s| Word::from(s))
                .collect();
                words.extend(matrix_words(matrix));
                let groups = p.m.div_ceil(32) * part.rows.div_ceil(32);
                self.dispatch(variant, &slots, words, groups)?;
            }
            column += rows;
        }
        Ok(())
    }

    pub fn gather_rows(&mut self, node: &Node) -> Result<()> {
        let (table, ids) = (node.inputs[0], node.inputs[1]);
        let [total, c] = *self.shape(table) else { return Err(self.unsupported("a table of another rank")) };
        let n = self.elements(ids);
        let (ids, y) = (self.bound(ids)?, self.bound(self.result(0))?);
        let (root, _) = self.places.plan.root(table);
        let held = self.held;
        let Some(matrix) = held.matrices.get(&root.node()) else {
            return self.gather_values(table, [ids, y], [n, total, c]);
        };
        for (i, part) in matrix.parts.iter().enumerate() {
            let mut slots = vec![(4, ids.slot), (5, y.slot)];
            slots.extend(matrix_slots(root.node(), i, matrix));
            let sizes = [n, c, part.first, part.rows, total, ids.at, y.at];
            let mut words: Vec<Word> = sizes.iter().map(|&s| Word::from(s)).collect();
            words.extend(matrix_words(matrix));
            let variant = matrix.form.define(Variant::new("gather_rows.wgsl"));
            self.element_wise(variant, &slots, words, n * c)?;
        }
        Ok(())
    }

    /// Rows of a value that the run computed.
    fn gather_values(&mut self, table: Value, [ids, y]: [Bound; 2], [n, total, c]: [usize; 3]) -> Result<()> {
        let table = self.bound(table)?;
        let sizes = [n, c, 0, total, total, ids.at, y.at, c, 0, 0, 0, 0, 0, table.at];
        let words = sizes.iter().map(|&s| Word::from(s)).collect();
        let slots = [(1, table.slot), (4, ids.slot), (5, y.slot)];
        self.element_wise(Variant::new("gather_rows.wgsl").flag("W_VALUES"), &slots, words, n * c)
    }
}

/// Bindings 1 to 3: the arrays of part `i` of a matrix.
fn matrix_slots(node: usize, i: usize, matrix: &crate::weights::Matrix) -> Vec<(u32, Slot)> {
    let part = &matrix.parts[i];
    let arrays = [true, part.scales.is_some(), part.offsets.is_some()];
    (0..3).filter(|&w| arrays[w]).map(|w| (w as u32 + 1, Slot::Matrix { node, part: i, which: w })).collect()
}

/// What every kernel is told of a matrix, in the order of its parameters.
fn matrix_words(matrix: &crate::weights::Matrix) -> Vec<Word> {
    let form = &matrix.form;
    vec![
        matrix.k.into(),
        form.blocks(matrix.k).into(),
        form.groups(matrix.k).into(),
        Word::U(form.shift()),
        matrix.factor.into(),
        form.zero.into(),
    ]
}
