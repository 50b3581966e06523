//! Attention and the cache of keys and values.

use pocketglm_graph::ops::{Attention, AttentionMask};
use pocketglm_graph::{Dim, Node, Result, Value};
use pocketglm_kernels::Variant;

use super::{Bound, Lowering};
use crate::plan::{Slot, Word};
use crate::state::KvLayout;

/// Components of a head that the kernel has room for.
const MOST_COMPONENTS: usize = 256;

impl Lowering<'_> {
    /// Layout and capacity of the cache that a value is, or is the new content of.
    pub fn cache(&self, value: Value) -> Result<(KvLayout, usize)> {
        let (root, _) = self.places.plan.root(value);
        match self.held.states.iter().find(|(node, _)| *node == root.node()) {
            Some((_, layout)) => Ok((*layout, self.shape(root)[0])),
            None => Err(self.unsupported("a cache that is no state")),
        }
    }

    pub fn kv_append_node(&mut self, node: &Node, at: &Dim) -> Result<()> {
        let [t, c] = *self.shape(node.inputs[0]) else {
            return Err(self.unsupported("rows of another rank"));
        };
        let rows = self.bound(node.inputs[0])?;
        self.kv_append(rows, t, c, node.inputs[1], at)
    }

    /// Appends `t` rows, `stride` elements apart, to a state.
    pub fn kv_append(&mut self, rows: Bound, t: usize, stride: usize, state: Value, at: &Dim) -> Result<()> {
        let (layout, capacity) = self.cache(state)?;
        let bound = self.bound(state)?;
        let words = vec![
            t.into(),
            layout.heads.into(),
            layout.d.into(),
            at.into(),
            capacity.into(),
            rows.at.into(),
            stride.into(),
        ];
        let variant = Variant::new("kv_append.wgsl").flag(layout.flag());
        self.dispatch(variant, &[(1, rows.slot), (2, bound.slot)], words, t * layout.heads)
    }

    pub fn attention(&mut self, node: &Node, a: &Attention) -> Result<()> {
        if a.head_dim > MOST_COMPONENTS {
            return Err(self.unsupported(format!("heads of {}, the most is {MOST_COMPONENTS}", a.head_dim)));
        }
        let [t, q_stride] = *self.shape(node.inputs[0]) else {
            return Err(self.unsupported("q of another rank"));
        };
        let q = self.bound(node.inputs[0])?;
        let y = self.bound(self.result(0))?;
        let mut variant = Variant::new("attention.wgsl");
        let mut slots = vec![(1, q.slot), (5, y.slot)];
        let mut rows = [(0, 0); 2];
        let mut capacity = 0;
        for (i, rows) in (1..).zip(&mut rows) {
            let v = node.inputs[i];
            let bound = self.bound(v)?;
            slots.push((i as u32 + 1, bound.slot));
            let flag = match (bound.slot, self.shape(v)) {
                (Slot::State(_), [_, _, _]) => {
                    let (layout, rows) = self.cache(v)?;
                    capacity = rows;
                    layout.flag()
                }
                (_, &[_, width]) => {
                    *rows = (bound.at + a.columns[i], width);
                    "KV_ROWS"
                }
                _ => return Err(self.unsupported("keys of another rank")),
            };
            // Keys and values are stored in the same way.
            if i == 1 {
                variant = variant.flag(flag);
            }
        }
        let (mut past, mut bounds, mut segments) = (Word::U(0), 0, 0);
        match &a.mask {
            AttentionMask::Causal { past: p } => past = p.into(),
            AttentionMask::Segments => {
                let bound = self.bound(node.inputs[3])?;
                variant = variant.flag("SEGMENTS");
                slots.push((4, bound.slot));
                bounds = self.elements(node.inputs[3]);
                segments = bound.at;
            }
        }
        let words = vec![
            t.into(),
            a.heads.into(),
            a.kv_heads.into(),
            a.head_dim.into(),
            (&a.keys).into(),
            past,
            a.scale.into(),
            capacity.into(),
            bounds.into(),
            (q.at + a.columns[0]).into(),
            q_stride.into(),
            rows[0].0.into(),
            rows[0].1.into(),
            rows[1].0.into(),
            rows[1].1.into(),
            segments.into(),
            y.at.into(),
        ];
        self.dispatch(variant, &slots, words, t * a.heads)
    }
}
