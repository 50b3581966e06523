//! Element-wise ops, norms, data movement, and what else is one plain kernel.

use pocketglm_graph::ops::{Activation, BinaryKind, Conv, RopeLayout, Slice, SoftmaxMask, UnaryKind};
use pocketglm_graph::{Dim, Node, Result, Value};
use pocketglm_kernels::Variant;

use super::{Bound, Lowering};
use crate::plan::{ARGMAX_GROUPS, SORTED, Word};

/// The second vector or matrix of a norm.
pub(crate) enum Other {
    Residual(Value),
    Bias(Value),
}

/// Number of an element-wise function in the kernels.
fn function(kind: UnaryKind) -> Option<u32> {
    Some(match kind {
        UnaryKind::Silu => 1,
        UnaryKind::Gelu => 2,
        UnaryKind::GeluTanh => 3,
        UnaryKind::Relu => 4,
        UnaryKind::Sigmoid => 5,
        UnaryKind::Tanh => 6,
        UnaryKind::Erf => 7,
        UnaryKind::Exp => 8,
        UnaryKind::Log => 9,
        UnaryKind::Sqrt => 10,
        UnaryKind::Rsqrt => 11,
        UnaryKind::Recip => 12,
        UnaryKind::Neg => 13,
        UnaryKind::Abs => 14,
        UnaryKind::Square => 15,
        _ => return None,
    })
}

/// Number of an activation in the kernels; SwiGLU is a kernel of its own.
pub(crate) fn activation(kind: Activation) -> u32 {
    match kind {
        Activation::None | Activation::SwiGlu => 0,
        Activation::Silu => 1,
        Activation::Gelu => 2,
        Activation::Relu => 4,
    }
}

fn words<const N: usize>(words: [Word; N]) -> Vec<Word> {
    words.to_vec()
}

impl Lowering<'_> {
    pub fn unary(&mut self, node: &Node, kind: UnaryKind) -> Result<()> {
        let Some(number) = function(kind) else {
            return Err(self.unsupported(format!("the function {kind:?} has no kernel")));
        };
        self.map(node.inputs[0], number, 1.0)
    }

    pub fn scale(&mut self, node: &Node, factor: f32) -> Result<()> {
        self.map(node.inputs[0], 0, factor)
    }

    fn map(&mut self, x: Value, kind: u32, factor: f32) -> Result<()> {
        let n = self.elements(x);
        let (x, y) = (self.bound(x)?, self.bound(self.result(0))?);
        self.map_rows(x, y, n, kind, factor)
    }

    /// An element-wise function of values in one place whose results go to another, or to the same.
    pub fn map_rows(&mut self, x: Bound, y: Bound, n: usize, kind: u32, factor: f32) -> Result<()> {
        let variant = Variant::new("unary.wgsl").value("KIND", kind);
        self.element_wise(
            variant,
            &[(1, x.slot), (2, y.slot)],
            words([n.into(), x.at.into(), y.at.into(), factor.into()]),
            n,
        )
    }

    pub fn binary(&mut self, node: &Node, kind: BinaryKind) -> Result<()> {
        let number = match kind {
            BinaryKind::Add => 0,
            BinaryKind::Sub => 1,
            BinaryKind::Mul => 2,
            BinaryKind::Div => 3,
            BinaryKind::Max => 4,
            BinaryKind::Min => 5,
            other => return Err(self.unsupported(format!("the function {other:?} has no kernel"))),
        };
        self.add_like(number, node.inputs[0], node.inputs[1])
    }

    fn add_like(&mut self, kind: u32, a: Value, b: Value) -> Result<()> {
        let (n, nb) = (self.elements(a), self.elements(b));
        let (a, b, y) = (self.bound(a)?, self.bound(b)?, self.bound(self.result(0))?);
        self.element_wise(
            Variant::new("binary.wgsl").value("KIND", kind),
            &[(1, a.slot), (2, b.slot), (3, y.slot)],
            words([n.into(), nb.into(), a.at.into(), b.at.into(), y.at.into()]),
            n,
        )
    }

    /// A norm whose result is a value.
    pub fn norm(&mut self, x: Value, weight: Value, other: Option<Other>, eps: f32, y: Value) -> Result<()> {
        let y = self.bound(y)?;
        self.norm_to(x, weight, other, eps, y)
    }

    /// A norm of a value whose result goes to a place.
    pub fn norm_to(
        &mut self,
        x: Value,
        weight: Value,
        other: Option<Other>,
        eps: f32,
        y: Bound,
    ) -> Result<()> {
        let [rows, c] = self.rows_of(x);
        let x = self.bound(x)?;
        self.norm_rows(x, [rows, c], weight, other, eps, y)
    }

    /// A norm of rows in one place whose result goes to another, or to the same.
    pub fn norm_rows(
        &mut self,
        x: Bound,
        [rows, c]: [usize; 2],
        weight: Value,
        other: Option<Other>,
        eps: f32,
        y: Bound,
    ) -> Result<()> {
        let weight = self.bound(weight)?;
        let mut variant = Variant::new("norm.wgsl");
        // Wide rows have work for more invocations.
        if c >= 1024 && !self.device.info.software {
            variant = variant.value("WG", 256);
        }
        let mut slots = vec![(1, x.slot), (2, weight.slot), (4, y.slot)];
        let mut other_at = 0;
        if let Some(other) = other {
            let (flag, value) = match other {
                Other::Residual(v) => ("RESIDUAL", v),
                Other::Bias(v) => ("LAYER", v),
            };
            let bound = self.bound(value)?;
            variant = variant.flag("OTHER").flag(flag);
            slots.push((3, bound.slot));
            other_at = bound.at;
        }
        let words = words([
            rows.into(),
            c.into(),
            eps.into(),
            x.at.into(),
            weight.at.into(),
            other_at.into(),
            y.at.into(),
        ]);
        self.dispatch(variant, &slots, words, rows)
    }

    /// Each channel over all frames; `weight_and_bias` are vectors.
    pub fn instance_norm(
        &mut self,
        x: Bound,
        [frames, c]: [usize; 2],
        weight_and_bias: [Value; 2],
        eps: f32,
        y: Bound,
    ) -> Result<()> {
        let [weight, bias] = weight_and_bias;
        let (weight, bias) = (self.bound(weight)?, self.bound(bias)?);
        let words = words([
            frames.into(),
            c.into(),
            eps.into(),
            x.at.into(),
            weight.at.into(),
            bias.at.into(),
            y.at.into(),
        ]);
        let slots = [(1, x.slot), (2, weight.slot), (3, bias.slot), (4, y.slot)];
        self.dispatch(Variant::new("instance_norm.wgsl"), &slots, words, c)
    }

    pub fn batch_norm(&mut self, node: &Node, eps: f32) -> Result<()> {
        let shape = self.shape(node.inputs[0]).to_vec();
        let n: usize = shape.iter().product();
        let inner: usize = shape[2..].iter().product();
        let mut slots = Vec::new();
        let mut at = Vec::new();
        // Operands are x, weight, bias, mean and variance, as the kernel has them; the result follows.
        for (i, v) in (1..).zip(node.inputs.iter().copied().chain([self.result(0)])) {
            let bound = self.bound(v)?;
            slots.push((i, bound.slot));
            at.push(Word::from(bound.at));
        }
        let mut all = words([n.into(), shape[1].into(), inner.max(1).into(), eps.into()]);
        all.extend(at);
        self.element_wise(Variant::new("batch_norm.wgsl"), &slots, all, n)
    }

    pub fn softmax(&mut self, node: &Node, mask: &SoftmaxMask) -> Result<()> {
        let &[b, t, s] = self.shape(node.inputs[0]) else {
            return Err(self.unsupported("scores of another rank"));
        };
        let (x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        let mut slots = vec![(1, x.slot), (3, y.slot)];
        let mut variant = Variant::new("softmax.wgsl");
        let (mut past, mut bounds, mut segments) = (Word::U(0), 0, 0);
        match mask {
            SoftmaxMask::Causal { past: p } => past = p.into(),
            SoftmaxMask::Segments => {
                variant = variant.flag("SEGMENTS");
                bounds = self.elements(node.inputs[1]);
                let bound = self.bound(node.inputs[1])?;
                slots.push((2, bound.slot));
                segments = bound.at;
            }
        }
        let words = words([
            (b * t).into(),
            t.into(),
            s.into(),
            past,
            bounds.into(),
            x.at.into(),
            segments.into(),
            y.at.into(),
        ]);
        self.dispatch(variant, &slots, words, b * t)
    }

    pub fn rope(&mut self, node: &Node, layout: RopeLayout) -> Result<()> {
        let &[t, h, d] = self.shape(node.inputs[0]) else {
            return Err(self.unsupported("heads of another rank"));
        };
        let r = self.shape(node.inputs[1]).last().copied().unwrap_or(0);
        let (x, table, y) =
            (self.bound(node.inputs[0])?, self.bound(node.inputs[1])?, self.bound(self.result(0))?);
        self.rope_rows([x, table, y], [t, h, d, r], [h * d, h * d], layout)
    }

    /// Rotates heads of rows that are `strides` (of x and y) elements apart.
    pub fn rope_rows(
        &mut self,
        [x, table, y]: [Bound; 3],
        [t, heads, d, r]: [usize; 4],
        strides: [usize; 2],
        layout: RopeLayout,
    ) -> Result<()> {
        let variant = Variant::new("rope.wgsl").flag_if(layout == RopeLayout::Half, "HALF");
        let words = words([
            t.into(),
            heads.into(),
            d.into(),
            r.into(),
            strides[0].into(),
            x.at.into(),
            table.at.into(),
            y.at.into(),
            strides[1].into(),
        ]);
        self.element_wise(
            variant,
            &[(1, x.slot), (2, table.slot), (3, y.slot)],
            words,
            t * heads * d.div_ceil(2),
        )
    }

    /// Copies a box of `dims` elements between two layouts.
    fn copy(&mut self, x: Bound, y: Bound, dims: &[usize], from: &[usize], to: &[usize]) -> Result<()> {
        if dims.len() > 4 {
            return Err(self.unsupported(format!("{} dimensions are copied, the most is 4", dims.len())));
        }
        let front = |values: &[usize], fill: usize| -> [usize; 4] {
            let mut all = [fill; 4];
            all[4 - values.len()..].copy_from_slice(values);
            all
        };
        let (d, from, to) = (front(dims, 1), front(from, 0), front(to, 0));
        let n: usize = d.iter().product();
        let mut all = words([n.into(), d[1].into(), d[2].into(), d[3].into(), x.at.into(), y.at.into()]);
        all.extend(from.iter().chain(&to).map(|&s| Word::from(s)));
        self.element_wise(Variant::new("copy.wgsl"), &[(1, x.slot), (2, y.slot)], all, n)
    }

    pub fn permute(&mut self, node: &Node, order: &[usize]) -> Result<()> {
        let shape = self.shape(node.inputs[0]).to_vec();
        let strides = strides(&shape);
        let (x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        let dims: Vec<usize> = order.iter().map(|&i| shape[i]).collect();
        let from: Vec<usize> = order.iter().map(|&i| strides[i]).collect();
        self.copy(x, y, &dims, &from, &self::strides(&dims))
    }

    pub fn slice(&mut self, node: &Node, slice: &Slice) -> Result<()> {
        let shape = self.shape(node.inputs[0]).to_vec();
        let (start, len) = (slice.start.eval(self.bindings)?, slice.len.eval(self.bindings)?);
        if start + len > shape[slice.axis] {
            return Err(self.unsupported(format!("a slice up to {} of {shape:?}", start + len)));
        }
        let inner: usize = shape[slice.axis + 1..].iter().product();
        let outer: usize = shape[..slice.axis].iter().product();
        let (mut x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        x.at += start * inner;
        let run = len * inner;
        self.copy(x, y, &[outer, run], &[shape[slice.axis] * inner, 1], &[run, 1])
    }

    pub fn concat(&mut self, node: &Node, axis: usize) -> Result<()> {
        let run_of = |shape: &[usize]| shape[axis..].iter().product::<usize>();
        let width = run_of(self.shape(self.result(0)));
        let outer: usize = self.shape(self.result(0))[..axis].iter().product();
        let mut y = self.bound(self.result(0))?;
        for v in &node.inputs {
            let run = run_of(self.shape(*v));
            let x = self.bound(*v)?;
            self.copy(x, y, &[outer, run], &[run, 1], &[width, 1])?;
            y.at += run;
        }
        Ok(())
    }

    pub fn weighted_gather(&mut self, node: &Node) -> Result<()> {
        let [rows, c] = *self.shape(node.inputs[0]) else {
            return Err(self.unsupported("a table of another rank"));
        };
        let n = self.shape(node.inputs[1])[0];
        let (table, taps) = (self.bound(node.inputs[0])?, self.bound(node.inputs[1])?);
        let (weights, y) = (self.bound(node.inputs[2])?, self.bound(self.result(0))?);
        let words = words([
            n.into(),
            c.into(),
            rows.into(),
            table.at.into(),
            taps.at.into(),
            weights.at.into(),
            y.at.into(),
        ]);
        let slots = [(1, table.slot), (2, taps.slot), (3, weights.slot), (4, y.slot)];
        self.element_wise(Variant::new("weighted_gather.wgsl"), &slots, words, n * c)
    }

    pub fn scatter_rows(&mut self, node: &Node) -> Result<()> {
        let [t, c] = *self.shape(node.inputs[0]) else {
            return Err(self.unsupported("rows of another rank"));
        };
        let n = self.elements(node.inputs[1]);
        let (x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        self.copy(x, y, &[t * c], &[1], &[1])?;
        if n == 0 {
            return Ok(());
        }
        let (at, rows) = (self.bound(node.inputs[1])?, self.bound(node.inputs[2])?);
        let words = words([n.into(), c.into(), t.into(), at.at.into(), rows.at.into(), y.at.into()]);
        let slots = [(1, at.slot), (2, rows.slot), (3, y.slot)];
        self.element_wise(Variant::new("scatter_rows.wgsl"), &slots, words, n * c)
    }

    pub fn conv(&mut self, node: &Node, conv: &Conv) -> Result<()> {
        let (xs, ws) = (self.shape(node.inputs[0]).to_vec(), self.shape(node.inputs[1]).to_vec());
        let ys = self.shape(self.result(0)).to_vec();
        let n: usize = ys.iter().product();
        let (x, w) = (self.bound(node.inputs[0])?, self.bound(node.inputs[1])?);
        let (b, y) = (self.bound(node.inputs[2])?, self.bound(self.result(0))?);
        let sizes = [
            n,
            xs[1],
            xs[2],
            xs[3],
            ws[0],
            ys[2],
            ys[3],
            ws[2],
            ws[3],
            conv.stride[0],
            conv.stride[1],
            conv.padding[0],
            conv.padding[1],
            conv.groups,
            x.at,
            w.at,
            b.at,
            y.at,
        ];
        let variant = Variant::new("conv.wgsl").value("KIND", activation(conv.activation));
        let slots = [(1, x.slot), (2, w.slot), (3, b.slot), (4, y.slot)];
        self.element_wise(variant, &slots, sizes.iter().map(|&s| Word::from(s)).collect(), n)
    }

    pub fn top_k(&mut self, node: &Node, k: usize) -> Result<()> {
        let [rows, c] = *self.shape(node.inputs[0]) else {
            return Err(self.unsupported("rows of another rank"));
        };
        let x = self.bound(node.inputs[0])?;
        let ids = self.bound(self.result(0))?;
        if k == 1 && rows == 1 && !self.is_used(self.result(1)) {
            return self.argmax(x, c, ids);
        }
        let best = self.bound(self.result(1))?;
        if crate::plan::sorts(rows, c, k) {
            return self.sorted(x, [c, k], ids, best);
        }
        let variant = match self.device.info.software {
            true => Variant::new("top_k.wgsl").value("WG", 32),
            false => Variant::new("top_k.wgsl"),
        };
        let words = words([rows.into(), c.into(), k.into(), x.at.into(), ids.at.into(), best.at.into()]);
        self.dispatch(variant, &[(1, x.slot), (2, ids.slot), (3, best.slot)], words, rows)
    }

    /// The `k` largest of one row of `n`: workgroups sort a share each and keep `k` of it, until one has them all.
    fn sorted(&mut self, x: Bound, [n, k]: [usize; 2], ids: Bound, best: Bound) -> Result<()> {
        let scratch = self.places.scratch(self.node);
        let [first, second] = crate::plan::sorted_pairs(n, k);
        let places = [self.arena(scratch, first)?, self.arena(scratch + first, second)?];
        let (mut n, mut from, mut round) = (n, x, 0);
        loop {
            let groups = n.div_ceil(SORTED);
            let to = places[round % 2];
            let base =
                Variant::new("top_k_sort.wgsl").flag_if(round == 0, "FIRST").flag_if(groups == 1, "LAST");
            let variant = if self.device.info.software { base.value("WG", 32) } else { base };
            // Pairs are two words.
            let at = if round == 0 { from.at } else { from.at / 2 };
            let numbers = [n.into(), k.into(), at.into(), (to.at / 2).into(), ids.at.into(), best.at.into()];
            if groups == 1 {
                let slots = [(1, from.slot), (2, ids.slot), (3, best.slot)];
                return self.dispatch(variant, &slots, words(numbers), 1);
            }
            self.dispatch(variant, &[(1, from.slot), (2, to.slot)], words(numbers), groups)?;
            (n, from, round) = (groups * k, to, round + 1);
        }
    }

    /// Index of the largest of `n` elements: workgroups look at a share each, and one joins what they found.
    fn argmax(&mut self, x: Bound, n: usize, id: Bound) -> Result<()> {
        let groups = n.div_ceil(1024).clamp(1, ARGMAX_GROUPS);
        let pairs = self.arena(self.places.scratch(self.node), 2 * ARGMAX_GROUPS)?;
        let (first, second) = (Variant::new("argmax.wgsl"), Variant::new("argmax.wgsl").flag("SECOND"));
        let sizes = words([n.into(), x.at.into(), (pairs.at / 2).into(), Word::U(0)]);
        self.dispatch(first, &[(1, x.slot), (2, pairs.slot)], sizes, groups)?;
        let sizes = words([groups.into(), (pairs.at / 2).into(), id.at.into(), Word::U(0)]);
        self.dispatch(second, &[(1, pairs.slot), (2, id.slot)], sizes, 1)
    }

    /// Whether a value is read by a node or is a result of the graph.
    fn is_used(&self, value: Value) -> bool {
        self.graph.outputs().iter().any(|(_, v)| *v == value)
            || self.graph.nodes().iter().any(|n| n.inputs.contains(&value))
    }

    /// The first rows of a cache as f32.
    pub fn kv_read(&mut self, node: &Node, rows: &Dim) -> Result<()> {
        let rows = rows.eval(self.bindings)?;
        let (layout, capacity) = self.cache(node.inputs[0])?;
        if rows > capacity {
            return Err(self.unsupported(format!("{rows} rows of a cache of {capacity}")));
        }
        let (state, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
        let n = rows * layout.heads * layout.d;
        let words = words([n.into(), layout.heads.into(), layout.d.into(), y.at.into()]);
        let slots = [(1, state.slot), (2, state.slot), (3, y.slot)];
        self.element_wise(Variant::new("kv_read.wgsl").flag(layout.flag()), &slots, words, n)
    }
}

/// Elements between neighbours of each dimension.
fn strides(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect()
}
