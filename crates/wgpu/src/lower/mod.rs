//! From nodes to dispatches.

mod attention;
mod linear;
mod simple;
mod vector;

use pocketglm_graph::ops::Op;
use pocketglm_graph::{Bindings, DeviceFault, Error, Graph, Node, Result, Value};
use pocketglm_kernels::Variant;

use crate::device::Device;
use crate::held::Held;
use crate::plan::{Groups, PARAMETERS, Places, Slot, Step, Word};

/// An operand as a kernel sees it: what is bound, and the element of it where the values begin.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub slot: Slot,
    pub at: usize,
}

/// Makes the dispatches of one set of sizes.
pub(crate) struct Lowering<'a> {
    pub device: &'a Device,
    pub graph: &'a Graph,
    pub held: &'a Held,
    pub places: &'a Places,
    pub bindings: &'a Bindings,
    pub steps: Vec<Step>,
    /// The node at work.
    pub node: usize,
}

impl Lowering<'_> {
    /// The dispatches of all nodes.
    pub fn all(&mut self) -> Result<()> {
        let graph = self.graph;
        for (i, node) in graph.nodes().iter().enumerate() {
            let idle = node.op.is_source() || node.op.is_view() || node.load_time;
            if idle || crate::plan::is_written(&node.op) {
                continue;
            }
            self.node = i;
            self.lower(node).map_err(|e| e.at(format!("{} {}", node.scope, node.op.name())))?;
        }
        Ok(())
    }

    fn lower(&mut self, node: &Node) -> Result<()> {
        match &node.op {
            Op::Unary(u) => self.unary(node, u.kind),
            Op::Scale(s) => self.scale(node, s.factor),
            Op::Binary(b) => self.binary(node, b.kind),
            Op::RmsNorm(n) => self.norm(node.inputs[0], node.inputs[1], None, n.eps, self.result(0)),
            Op::NormAdd(n) => {
                let residual = self::simple::Other::Residual(node.inputs[0]);
                self.norm(node.inputs[1], node.inputs[2], Some(residual), n.eps, self.result(0))
            }
            Op::LayerNorm(n) => {
                let bias = self::simple::Other::Bias(node.inputs[2]);
                self.norm(node.inputs[0], node.inputs[1], Some(bias), n.eps, self.result(0))
            }
            Op::BatchNorm(n) => self.batch_norm(node, n.eps),
            Op::Softmax(s) => self.softmax(node, &s.mask),
            Op::Rope(r) => self.rope(node, r.layout),
            Op::Permute(p) => self.permute(node, &p.order),
            Op::Slice(s) => self.slice(node, s),
            Op::Concat(c) => self.concat(node, c.axis),
            Op::GatherRows(_) => self.gather_rows(node),
            Op::WeightedGather(_) => self.weighted_gather(node),
            Op::ScatterRows(_) => self.scatter_rows(node),
            Op::KvAppend(a) => self.kv_append_node(node, &a.at),
            Op::KvRead(r) => self.kv_read(node, &r.rows),
            Op::Conv(c) => self.conv(node, c),
            Op::FrameConv(c) => self.frame_conv(node, c),
            Op::InstanceNorm(n) => {
                let sizes = self.rows_of(node.inputs[0]);
                let (x, y) = (self.bound(node.inputs[0])?, self.bound(self.result(0))?);
                self.instance_norm(x, sizes, [node.inputs[1], node.inputs[2]], n.eps, y)
            }
            Op::MatMul(m) => self.matmul(node, m.transposed),
            Op::Linear(l) => self.linear(node, l),
            Op::Qkv(q) => self.qkv(node, q),
            Op::Attention(a) => self.attention(node, a),
            Op::TopK(t) => self.top_k(node, t.k),
            other => Err(self.unsupported(format!("the op {} has no kernel for it", other.name()))),
        }
    }

    pub fn unsupported(&self, what: impl Into<String>) -> Error {
        self.device.error(DeviceFault::Unsupported, what)
    }

    /// Result `port` of the node at work.
    pub fn result(&self, port: usize) -> Value {
        Value::of(self.node, port)
    }

    pub fn shape(&self, value: Value) -> &[usize] {
        self.places.plan.shape(value)
    }

    pub fn elements(&self, value: Value) -> usize {
        self.shape(value).iter().product()
    }

    /// An operand or result as a kernel sees it.
    pub fn bound(&self, value: Value) -> Result<Bound> {
        let elements = self.elements(value);
        if let Some(start) = self.places.start(value) {
            return self.arena(start, elements);
        }
        let (root, offset) = self.places.plan.root(value);
        if let Some(i) = self.held.states.iter().position(|(node, _)| *node == root.node()) {
            return Ok(Bound { slot: Slot::State(i), at: offset });
        }
        if let Some(at) = self.held.places.get(&root) {
            return Ok(Bound { slot: Slot::Vectors, at: at + offset });
        }
        if self.held.large.contains_key(&root) {
            return Ok(Bound { slot: Slot::Table(root), at: offset });
        }
        Err(self.unsupported(format!("{} is held in no form that a kernel takes", self.graph.meta(value))))
    }

    /// Elements of the arena as a kernel sees them.
    pub fn arena(&self, start: usize, elements: usize) -> Result<Bound> {
        let at = start % crate::plan::ALIGN;
        let (from, bytes) = ((start - at) as u64 * 4, (at + elements).max(1) as u64 * 4);
        if bytes > self.device.binding_limit() {
            return Err(self.unsupported(format!(
                "a value of {bytes} bytes does not fit a binding of {}: take smaller steps or pictures",
                self.device.binding_limit()
            )));
        }
        Ok(Bound { slot: Slot::Arena { at: from, bytes }, at })
    }

    /// The whole arena, where one binding holds it.
    pub fn whole(&self) -> Option<Slot> {
        let bytes = self.places.total as u64 * 4;
        (bytes <= self.device.binding_limit()).then_some(Slot::Arena { at: 0, bytes })
    }

    /// Adds a dispatch of `groups` workgroups.
    pub fn dispatch(
        &mut self,
        variant: Variant,
        slots: &[(u32, Slot)],
        words: Vec<Word>,
        groups: usize,
    ) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        self.dispatch_grid(variant, slots, words, Groups::Count(groups as u64))
    }

    /// Adds a dispatch of a grid of workgroups.
    pub fn dispatch_grid(
        &mut self,
        variant: Variant,
        slots: &[(u32, Slot)],
        words: Vec<Word>,
        groups: Groups,
    ) -> Result<()> {
        let pipeline = self.device.pipelines.get(self.device, &variant)?;
        let expected = pipeline.bindings.iter().filter(|b| b.access != pocketglm_kernels::Access::Uniform);
        let numbers: Vec<u32> = expected.map(|b| b.number).collect();
        let mut given: Vec<u32> = slots.iter().map(|(n, _)| *n).collect();
        given.sort_unstable();
        if numbers != given || words.len() > PARAMETERS {
            return Err(self.unsupported(format!(
                "kernel `{variant}` binds {numbers:?} and is given {given:?} and {} numbers",
                words.len()
            )));
        }
        let (node, slots) = (self.node, slots.to_vec());
        self.steps.push(Step { node, pipeline, slots, words, groups, operations: 0.0 });
        Ok(())
    }

    /// Adds a dispatch with one invocation of 64 for each of `n` elements.
    pub fn element_wise(
        &mut self,
        variant: Variant,
        slots: &[(u32, Slot)],
        words: Vec<Word>,
        n: usize,
    ) -> Result<()> {
        self.dispatch(variant, slots, words, n.div_ceil(64))
    }
}
