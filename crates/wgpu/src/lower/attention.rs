//! Attention and the cache of keys and values.

use pocketglm_graph::ops::{Attention, AttentionMask};
use pocketglm_graph::{Dim, Node, Result, Value};
use pocketglm_kernels::Variant;
use pocketglm_tensor::KvFormat;

use super::{Bound, Lowering};
use crate::plan::{Groups, MOST_SPLITS, Slot, Word};
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
        let (layout, _) = self.cache(state)?;
        let bound = self.bound(state)?;
        let words =
            vec![t.into(), layout.heads.into(), layout.d.into(), at.into(), rows.at.into(), stride.into()];
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
        let mut kv = Vec::with_capacity(2);
        for i in 1..3 {
            let v = node.inputs[i];
            let bound = self.bound(v)?;
            kv.push(match (bound.slot, self.shape(v)) {
                (Slot::State(_), [_, _, _]) => {
                    let (layout, capacity) = self.cache(v)?;
                    Keys { slot: bound.slot, first: 0, stride: 0, layout: Some(layout), capacity }
                }
                (_, &[_, width]) => Keys {
                    slot: bound.slot,
                    first: bound.at + a.columns[i],
                    stride: width,
                    layout: None,
                    capacity: 0,
                },
                _ => return Err(self.unsupported("keys of another rank")),
            });
        }
        let [keys, values] =
            <[Keys; 2]>::try_from(kv).map_err(|_| self.unsupported("keys without values"))?;
        let mask = match &a.mask {
            AttentionMask::Causal { past } => Mask { past: past.into(), segments: None },
            AttentionMask::Segments => {
                let bound = self.bound(node.inputs[3])?;
                Mask { past: Word::U(0), segments: Some((bound, self.elements(node.inputs[3]))) }
            }
        };
        let q = Bound { at: q.at + a.columns[0], ..q };
        let call = Call { t, q, q_stride, keys, values, mask, y: self.bound(self.result(0))? };
        if call.moves_four(a) { self.flash(a, &call) } else { self.plain_attention(a, &call) }
    }

    /// The kernel that takes any size.
    fn plain_attention(&mut self, a: &Attention, c: &Call) -> Result<()> {
        let mut variant = Variant::new("attention_plain.wgsl");
        match c.keys.layout {
            None => variant = variant.flag("KV_ROWS"),
            // The kernel takes words as f32 where nothing else is said.
            Some(layout) if layout.format == KvFormat::F32 => {}
            Some(layout) => variant = variant.flag(layout.flag()),
        }
        let mut slots = vec![(1, c.q.slot), (2, c.keys.slot), (3, c.values.slot), (5, c.y.slot)];
        let (mut bounds, mut segments) = (0, 0);
        if let Some((bound, count)) = c.mask.segments {
            variant = variant.flag("SEGMENTS");
            slots.push((4, bound.slot));
            (bounds, segments) = (count, bound.at);
        }
        let words = vec![
            c.t.into(),
            a.heads.into(),
            a.kv_heads.into(),
            a.head_dim.into(),
            (&a.keys).into(),
            c.mask.past.clone(),
            a.scale.into(),
            bounds.into(),
            c.q.at.into(),
            c.q_stride.into(),
            c.keys.first.into(),
            c.keys.stride.into(),
            c.values.first.into(),
            c.values.stride.into(),
            segments.into(),
            c.y.at.into(),
        ];
        self.dispatch(variant, &slots, words, c.t * a.heads)
    }

    /// The kernel that moves four values at a time: whole rows of a prompt or a picture, or one token whose keys are
    /// split between workgroups.
    fn flash(&mut self, a: &Attention, c: &Call) -> Result<()> {
        let (group, four) = (a.heads / a.kv_heads, a.head_dim / 4);
        let split = c.t == 1 && c.mask.segments.is_none();
        let (variant, rows) = self.flash_variant(a, c, split);
        let mut variant = variant.flag_if(split, "SPLIT");
        let mut stride = [c.keys.stride / 4, c.values.stride / 4];
        if let Some(layout) = c.keys.layout {
            let head = if layout.format == KvFormat::Int8 { four + 1 } else { four };
            stride = [a.kv_heads * head; 2];
            // The kernel of one token knows no other format.
            if layout.format != KvFormat::F32 && variant.file() != "attention_decode_coop.wgsl" {
                variant = variant.flag(layout.flag());
            }
        }
        let mut slots = vec![(1, c.q.slot), (2, c.keys.slot), (3, c.values.slot)];
        let (mut bounds, mut segments) = (0, 0);
        if let Some((bound, count)) = c.mask.segments {
            variant = variant.flag("SEGMENTS");
            slots.push((6, bound.slot));
            (bounds, segments) = (count, bound.at);
        }
        // Partial results, then their maxima and sums, in the node's working memory.
        let most = if variant.file() == "attention_decode_coop.wgsl" { MOST_SPLITS } else { USUAL_SPLITS };
        let partial = self.places.scratch(self.node);
        let sums = partial + (a.heads * most * a.head_dim).next_multiple_of(crate::plan::ALIGN);
        let (mut o, mut o_off) = (c.y, c.y.at / 4);
        if split {
            o = self.arena(partial, a.heads * most * a.head_dim)?;
            o_off = o.at / 4;
            let sums = self.arena(sums, a.heads * most * 2)?;
            slots.push((5, sums.slot));
        }
        slots.push((4, o.slot));
        let (keys, tiles) = (&a.keys, (c.t * group).div_ceil(rows));
        let (of, parts) = match split {
            // The kernel of one token takes 64 keys in each part, however many parts that makes.
            true if variant.file() == "attention_decode_coop.wgsl" => {
                (Word::U(64), Word::Of(keys.clone(), |keys| keys.div_ceil(64).max(1)))
            }
            true => (Word::Of(keys.clone(), split_of), Word::Of(keys.clone(), splits_of)),
            false => (Word::U(1 << 30), Word::U(1)),
        };
        let words = vec![
            c.t.into(),
            group.into(),
            keys.into(),
            c.mask.past.clone(),
            of,
            parts.clone(),
            a.scale.into(),
            bounds.into(),
            (c.q.at / 4).into(),
            (c.q_stride / 4).into(),
            (c.keys.first / 4).into(),
            stride[0].into(),
            (c.values.first / 4).into(),
            stride[1].into(),
            o_off.into(),
            (a.heads * four).into(),
            segments.into(),
        ];
        let columns = if split { parts.clone() } else { tiles.into() };
        self.dispatch_grid(variant, &slots, words, Groups::Grid(columns, a.kv_heads as u32))?;
        if !split {
            return Ok(());
        }
        let lanes = (256 / four).clamp(1, 8);
        let variant =
            Variant::new("attention_combine.wgsl").value("D4", four as u32).value("SL", lanes as u32);
        let sums = self.arena(sums, a.heads * most * 2)?;
        let words = vec![parts, o_off.into(), (c.y.at / 4).into(), Word::U(0)];
        self.dispatch(variant, &[(1, o.slot), (2, sums.slot), (3, c.y.slot)], words, a.heads)
    }

    /// The kernel, and how many rows (pairs of a token and a head of a group) a workgroup owns.
    fn flash_variant(&self, a: &Attention, c: &Call, split: bool) -> (Variant, usize) {
        let (group, four) = (a.heads / a.kv_heads, a.head_dim / 4);
        let format = c.keys.layout.map_or(KvFormat::F32, |l| l.format);
        let causal = c.mask.segments.is_none();
        let limit = self.device.limits.max_compute_workgroup_storage_size;
        // Half precision is enough where weights have no more; a model in f32 keeps to f32.
        if self.device.cooperative() && !self.held.is_exact() && limit >= 32 << 10 {
            let fits = c.keys.capacity <= 64 * MOST_SPLITS;
            let decodes = split && fits && format == KvFormat::F16 && a.head_dim == 128 && group == 16;
            if decodes {
                return (Variant::new("attention_decode_coop.wgsl"), 16);
            }
            let known = [64, 80, 128].contains(&a.head_dim);
            if known && !split && c.t >= 16 && format != KvFormat::Int8 {
                let subgroups = if limit >= 47 << 10 { 8 } else { 4 };
                let variant = Variant::new("flash_attention_coop.wgsl")
                    .value("D4", four as u32)
                    .flag_if(a.head_dim == 80, "D80")
                    .flag_if(a.head_dim == 128, "D128")
                    .value("NS", subgroups)
                    .flag_if(causal, "CAUSAL");
                return (variant, 16 * subgroups as usize);
            }
        }
        let (rows, tile, workgroup) = self.flash_tile(four, split.then_some(group));
        let variant = Variant::new("flash_attention.wgsl")
            .value("WG", workgroup as u32)
            .value("BQ", rows as u32)
            .value("KT", tile as u32)
            .value("D4", four as u32)
            .flag_if(causal, "CAUSAL");
        (variant, rows)
    }

    /// Rows and keys of a tile and the invocations of a workgroup: as much as workgroup memory holds.
    fn flash_tile(&self, four: usize, group: Option<usize>) -> (usize, usize, usize) {
        let limit = self.device.limits.max_compute_workgroup_storage_size as usize;
        let bytes =
            |rows: usize, tile: usize| (rows * four + tile * (four + 1)) * 16 + rows * tile * 8 + rows * 16;
        let workgroup = match self.device.info.software {
            true => 64,
            false => 256,
        };
        let workgroup = four.next_power_of_two().max(workgroup);
        match group {
            Some(group) => {
                let tile = if bytes(group, 32) <= limit { 32 } else { 16 };
                (group, tile, workgroup.max(group.next_power_of_two()))
            }
            None if bytes(32, 16) <= limit && !self.device.info.software => (32, 16, workgroup),
            None => (16, 8, workgroup.min(64).max(four.next_power_of_two())),
        }
    }
}

/// Keys or values: a cache, or rows of f32 that are `stride` elements apart.
struct Keys {
    slot: Slot,
    first: usize,
    stride: usize,
    layout: Option<KvLayout>,
    /// Rows that a cache has room for.
    capacity: usize,
}

struct Mask {
    past: Word,
    /// Boundaries and how many there are.
    segments: Option<(Bound, usize)>,
}

/// What every attention kernel is told.
struct Call {
    t: usize,
    q: Bound,
    q_stride: usize,
    keys: Keys,
    values: Keys,
    mask: Mask,
    y: Bound,
}

impl Call {
    /// Whether every place is a multiple of four elements.
    fn moves_four(&self, a: &Attention) -> bool {
        let places = [
            a.head_dim,
            self.q.at,
            self.q_stride,
            self.keys.first,
            self.keys.stride,
            self.values.first,
            self.values.stride,
            self.y.at,
        ];
        places.iter().all(|p| p.is_multiple_of(4))
    }
}

/// Parts of a decode step that keep a device busy.
const USUAL_SPLITS: usize = 64;

/// Keys of each part of a decode step: whole tiles, and about [`USUAL_SPLITS`] parts.
fn split_of(keys: usize) -> usize {
    keys.div_ceil(USUAL_SPLITS).next_multiple_of(32).max(64)
}

/// Parts of a decode step.
fn splits_of(keys: usize) -> usize {
    keys.div_ceil(split_of(keys)).max(1)
}
