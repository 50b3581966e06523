//! One row of x against a matrix: the decode step, with norms, rotary embedding and the caches in one dispatch.

use pocketglm_graph::ops::{Activation, Linear, LinearNorm, Qkv, RopeLayout};
use pocketglm_graph::{Node, Result, Value};
use pocketglm_kernels::Variant;
use pocketglm_tensor::KvFormat;

use super::Lowering;
use super::linear::matrix_slots;
use crate::held::Run;
use crate::plan::{Groups, Slot, Word};
use crate::weights::Matrix;

/// What is known of a row and its norm: places in the arena in units of four elements.
#[derive(Clone, Copy, Default)]
struct Row {
    k: usize,
    eps: f32,
    x: usize,
    prev: usize,
    sum: usize,
    inner_weight: usize,
    weight: usize,
    norms: bool,
    adds: bool,
}

/// How the kernel is shaped: invocations of a workgroup, rows of an item, blocks in flight, most workgroups, and whether
/// weights are asked for before the row of x is ready.
#[derive(Clone, Copy)]
struct Shape {
    workgroup: u32,
    rows: u32,
    unroll: u32,
    most: u32,
    early: bool,
}

/// What the rows of a matrix become.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Head,
    SwiGlu,
    Plain,
}

impl Lowering<'_> {
    /// The shape of the kernel for `n` rows of `k`: as measured on a device of 132 multiprocessors with large workgroups;
    /// elsewhere small ones.
    fn vector_shape(&self, what: Use, n: usize, k: usize) -> Shape {
        let most = self.device.limits.max_compute_invocations_per_workgroup;
        if self.device.info.software {
            return Shape { workgroup: 64, rows: 2, unroll: 2, most: 16, early: true };
        }
        if most < 1024 || !self.device.is_nvidia() {
            return Shape { workgroup: most.min(128), rows: 2, unroll: 2, most: 256, early: true };
        }
        match what {
            Use::Head | Use::SwiGlu => Shape { workgroup: 384, rows: 2, unroll: 2, most: 264, early: true },
            Use::Plain if n > 32_768 => Shape { workgroup: 512, rows: 2, unroll: 4, most: 264, early: true },
            Use::Plain if k > 8192 => Shape { workgroup: 1024, rows: 1, unroll: 3, most: 132, early: true },
            Use::Plain => Shape { workgroup: 1024, rows: 1, unroll: 4, most: 132, early: false },
        }
    }

    /// The row that a node multiplies, where the kernel can take it.
    fn vector_row(&self, node: &Node, norm: Option<LinearNorm>) -> Option<Row> {
        let [m, k] = self.rows_of(node.inputs[0]);
        if m != 1 || !k.is_multiple_of(4) || self.whole().is_none() {
            return None;
        }
        let place = |v: Value| self.places.start(v).filter(|at| at % 4 == 0).map(|at| at / 4);
        let vector = |v: Value| self.held.places.get(&self.places.plan.root(v).0).map(|at| at / 4);
        let row = Row { k, x: place(node.inputs[0])?, ..Row::default() };
        Some(match norm {
            None => row,
            Some(LinearNorm::Rms(eps)) => Row { eps, weight: vector(node.inputs[1])?, norms: true, ..row },
            Some(LinearNorm::AddRms { inner, outer }) if inner == outer => Row {
                eps: inner,
                prev: place(node.inputs[1])?,
                inner_weight: vector(node.inputs[2])?,
                weight: vector(node.inputs[3])?,
                sum: place(self.result(1))?,
                norms: true,
                adds: true,
                ..row
            },
            Some(_) => return None,
        })
    }

    /// The kernel of a row and a matrix, where workgroup memory suffices.
    fn vector_variant(&self, row: &Row, matrix: &Matrix, shape: Shape) -> Option<Variant> {
        let form = &matrix.form;
        if form.is_quantised() && !self.device.packed_dot() {
            return None;
        }
        let blocks = form.blocks(matrix.k);
        let subgroups = self.device.subgroups();
        // The row in workgroup memory: codes, scale and sum of each block, or its values; and the sums.
        let row_bytes = blocks * if form.is_quantised() { 40 } else { 128 };
        let sums = match subgroups {
            true => 2 * shape.workgroup + 256,
            false => shape.workgroup * (16 + 4 * shape.rows) + 256,
        };
        let limit = self.device.limits.max_compute_workgroup_storage_size;
        let fits = row_bytes + sums as usize <= limit as usize;
        let file = if form.is_quantised() { "matvec_q.wgsl" } else { "matvec_f.wgsl" };
        let mut variant = form
            .define_zero(Variant::new(file))
            .value("WG", shape.workgroup)
            .value("R", shape.rows)
            .value("U", shape.unroll)
            .flag_if(row.norms, "NORM")
            .flag_if(row.adds, "RESID");
        variant = variant.flag_if(subgroups, "SUBGROUP");
        if fits {
            let four = row.k.div_ceil(4) as u32;
            variant = variant.value("NV", four.div_ceil(shape.workgroup)).value("KB", blocks as u32);
            let variant = variant.flag_if(form.is_quantised(), "QUANT");
            return Some(variant.flag_if(form.is_quantised() && !shape.early, "NO_EARLY"));
        }
        // Without a norm, values can be read where they are, if there are no others behind them in the last block.
        let reads = !form.is_quantised() && !row.norms && row.k.is_multiple_of(32);
        reads.then(|| variant.flag("X_GLOBAL"))
    }

    /// Parameters of the kernel; those of the head of an attention block follow as they are.
    fn vector_words(
        &self,
        row: &Row,
        matrix: &Matrix,
        n: usize,
        y: usize,
        bias: usize,
        head: [Word; 6],
    ) -> Vec<Word> {
        let form = &matrix.form;
        let mut words = vec![
            n.into(),
            form.blocks(matrix.k).into(),
            form.groups(matrix.k).into(),
            Word::U(form.shift()),
            matrix.factor.into(),
            row.eps.into(),
            row.k.into(),
            row.x.into(),
            row.prev.into(),
            row.sum.into(),
            y.into(),
            row.inner_weight.into(),
            row.weight.into(),
            (bias / 4).into(),
        ];
        words.extend(head);
        words
    }

    /// Workgroups: no more than there are rows for, and few, because each prepares the row of x for itself.
    fn vector_groups(&self, rows: usize, shape: Shape) -> Groups {
        let teams = (shape.workgroup / 32) as usize;
        let needed = rows.div_ceil(teams * shape.rows as usize).max(1) as u64;
        Groups::Count(needed.min(u64::from(shape.most)))
    }

    /// A linear layer of one row; says whether it was one that the kernel takes.
    pub fn vector_linear(&mut self, node: &Node, linear: &Linear) -> Result<bool> {
        let swiglu = linear.activation == Activation::SwiGlu;
        if linear.residual || !(swiglu || linear.activation == Activation::None) {
            return Ok(false);
        }
        self.vector_rows(node, linear.norm, swiglu)
    }

    /// Products of one row with the matrices of a node, one after the other; says whether the kernel takes all.
    fn vector_rows(&mut self, node: &Node, norm: Option<LinearNorm>, swiglu: bool) -> Result<bool> {
        let (Some(row), Some(whole)) = (self.vector_row(node, norm), self.whole()) else { return Ok(false) };
        let Ok(runs) = self.runs().map(<[Run]>::to_vec) else { return Ok(false) };
        let Some(y) = self.places.start(self.result(0)) else { return Ok(false) };
        let held = self.held;
        let mut steps = Vec::new();
        let mut column = 0;
        for run in &runs {
            let Some(matrix) = held.matrices.get(run.matrix) else { return Ok(false) };
            let what = if swiglu { Use::SwiGlu } else { Use::Plain };
            let shape = self.vector_shape(what, run.rows, row.k);
            let Some(variant) = self.vector_variant(&row, matrix, shape) else { return Ok(false) };
            if swiglu && (runs.len() > 1 || matrix.parts.len() > 1 || run.bias.is_some()) {
                return Ok(false);
            }
            for (i, part) in matrix.parts.iter().enumerate() {
                let n = if swiglu { part.rows / 2 } else { part.rows };
                let vectors = row.norms || run.bias.is_some();
                let variant = variant
                    .clone()
                    .flag_if(swiglu, "SWIGLU")
                    .flag_if(run.bias.is_some(), "BIAS")
                    .flag_if(vectors, "VECW");
                let zero = || Word::U(0);
                let head = [zero(), zero(), zero(), zero(), zero(), zero()];
                let mut words = self.vector_words(&row, matrix, n, y + column, run.bias.unwrap_or(0), head);
                words.extend([zero(), zero(), part.first.into(), zero()]);
                let mut slots = vec![(4, whole), (5, whole)];
                slots.extend(matrix_slots(run.matrix, i, matrix));
                if vectors {
                    slots.push((6, Slot::Vectors));
                }
                steps.push((variant, slots, words, self.vector_groups(part.rows, shape)));
            }
            column += run.rows;
        }
        for (variant, slots, words, groups) in steps {
            self.dispatch_grid(variant, &slots, words, groups)?;
        }
        Ok(true)
    }

    /// The matrices of the head of an attention block and one row, where they are of several formats, or their result
    /// needs other kernels; says whether the kernel takes them.
    pub fn vector_heads(&mut self, node: &Node, qkv: &Qkv) -> Result<bool> {
        self.vector_rows(node, qkv.norm, false)
    }

    /// The head of an attention block of one row; says whether it was one that the kernel takes.
    pub fn vector_qkv(&mut self, node: &Node, qkv: &Qkv) -> Result<bool> {
        let (Some(row), Some(whole)) = (self.vector_row(node, qkv.norm), self.whole()) else {
            return Ok(false);
        };
        let Some(past) = &qkv.append else { return Ok(false) };
        let Ok(&[run]) = self.runs() else { return Ok(false) };
        let Some(matrix) = self.held.matrices.get(run.matrix) else { return Ok(false) };
        let at = qkv.first_weight() + qkv.parts.iter().map(|b| 1 + usize::from(*b)).sum::<usize>();
        let table = self.places.start(node.inputs[at]);
        let r = self.shape(node.inputs[at]).last().copied().unwrap_or(0);
        let (Some(y), Some(table), Some(bias)) = (self.places.start(self.result(0)), table, run.bias) else {
            return Ok(false);
        };
        let even = qkv.head_dim.is_multiple_of(2) && r.is_multiple_of(2);
        if matrix.parts.len() != 1 || !even || qkv.rope.layout != RopeLayout::Interleaved {
            return Ok(false);
        }
        let shape = self.vector_shape(Use::Head, run.rows, row.k);
        let Some(variant) = self.vector_variant(&row, matrix, shape) else { return Ok(false) };
        let states = [node.inputs[at + 1], node.inputs[at + 2]];
        let (layout, _) = self.cache(states[0])?;
        let direct = layout.format != KvFormat::Int8;
        let variant = variant
            .flag("QKV")
            .flag("VECW")
            .flag_if(direct, "KV_STATE")
            .flag_if(layout.format == KvFormat::F16, "KV_F16")
            .flag_if(!direct, "KV_STAGE");
        let d = qkv.head_dim;
        let head = [
            past.into(),
            (qkv.heads * d).into(),
            (qkv.kv_heads * d).into(),
            table.into(),
            r.into(),
            d.into(),
        ];
        let n = matrix.parts[0].rows;
        let mut words = self.vector_words(&row, matrix, n, y, bias, head);
        words.extend([Word::U(0), Word::U(0), Word::U(0), Word::U(0)]);
        let mut slots = vec![(4, whole), (5, whole), (6, Slot::Vectors)];
        slots.extend(matrix_slots(run.matrix, 0, matrix));
        if direct {
            slots.push((7, self.bound(states[0])?.slot));
            slots.push((8, self.bound(states[1])?.slot));
        }
        self.dispatch_grid(variant, &slots, words, self.vector_groups(n, shape))?;
        if !direct {
            let width = (qkv.heads + 2 * qkv.kv_heads) * d;
            let rows = self.bound(self.result(0))?;
            for (state, column) in states.into_iter().zip([qkv.heads, qkv.heads + qkv.kv_heads]) {
                let rows = super::Bound { at: rows.at + column * d, ..rows };
                self.kv_append(rows, 1, width, state, past)?;
            }
        }
        Ok(true)
    }
}
