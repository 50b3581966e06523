//! Where everything of a run lies on the device, and what is dispatched.

use std::collections::HashMap;
use std::sync::Arc;

use pocketglm_graph::ops::{LinearNorm, Op};
use pocketglm_graph::{Bindings, Dim, Graph, Node, Plan, Result, Value};

use crate::pipelines::Pipeline;

/// f32 elements of which places are multiples: what every device takes as the beginning of a binding.
pub(crate) const ALIGN: usize = 64;

/// Places of all values of a run: inputs and what the host computes first, then the intermediates of the plan.
pub(crate) struct Places {
    pub plan: Plan,
    /// Where the values begin that the host writes, by node.
    pub written: HashMap<usize, usize>,
    /// Where the plan's own arena begins.
    start: usize,
    /// f32 elements of all.
    pub total: usize,
}

/// Whether the host writes the results of this node.
pub(crate) fn is_written(op: &Op) -> bool {
    matches!(op, Op::Input(_) | Op::RopeTable(_))
}

pub(crate) fn padded(elements: usize) -> usize {
    elements.next_multiple_of(ALIGN)
}

impl Places {
    /// Places for the sizes in `bindings`; `halves` makes room for rows of x in half precision, which the kernels on
    /// cooperative matrices take.
    pub fn new(graph: &Graph, bindings: &Bindings, halves: bool) -> Result<Places> {
        let plan = Plan::aligned(graph, bindings, ALIGN, &|node, inputs, outputs| {
            scratch(node, inputs, outputs).saturating_add(if halves { half_rows(node, inputs) } else { 0 })
        })?;
        let (mut written, mut at) = (HashMap::new(), 0usize);
        for (i, _) in graph.nodes().iter().enumerate().filter(|(_, n)| is_written(&n.op) && !n.load_time) {
            written.insert(i, at);
            let elements: usize = plan.shape(Value::of(i, 0)).iter().product();
            at = at.saturating_add(padded(elements).max(ALIGN));
        }
        let total = at.saturating_add((plan.arena_bytes() / 4) as usize).max(ALIGN);
        Ok(Places { plan, written, start: at, total })
    }

    /// The element of the arena where a value begins, where it lies there.
    pub fn start(&self, value: Value) -> Option<usize> {
        let (root, offset) = self.plan.root(value);
        let start = match self.written.get(&root.node()) {
            Some(at) => *at,
            None => self.start + self.plan.arena_start(root)?,
        };
        Some(start + offset)
    }

    /// Where the working memory of a node begins.
    pub fn scratch(&self, node: usize) -> usize {
        self.start + self.plan.scratch_of(node).start
    }
}

/// Working memory of a node's kernels, in f32 elements: the normed rows, then both halves of a SwiGLU.
fn scratch(node: &Node, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> usize {
    let size = |shape: &[usize]| shape.iter().product::<usize>();
    let normed = |norm: &Option<LinearNorm>| norm.map_or(0, |_| padded(size(&inputs[0])));
    match &node.op {
        Op::Linear(l) if l.activation == pocketglm_graph::ops::Activation::SwiGlu => {
            normed(&l.norm) + 2 * padded(size(&outputs[0])).saturating_add(ALIGN)
        }
        Op::Linear(l) => normed(&l.norm),
        Op::Qkv(q) => normed(&q.norm),
        Op::TopK(t) if t.k == 1 => 2 * ARGMAX_GROUPS,
        Op::TopK(t) if sorts(inputs[0][0], inputs[0][1], t.k) => sorted_pairs(inputs[0][1], t.k).iter().sum(),
        Op::Attention(a) if inputs[0][0] == 1 => {
            a.heads * MOST_SPLITS * (a.head_dim.next_multiple_of(4) + 2) + 2 * ALIGN
        }
        _ => 0,
    }
}

/// Pairs that a workgroup sorts at once.
pub(crate) const SORTED: usize = 1024;

/// Whether the `k` largest of each row are found by sorting: of one long row, where a round leaves fewer than it found.
pub(crate) fn sorts(rows: usize, c: usize, k: usize) -> bool {
    rows == 1 && c > SORTED && k <= SORTED / 2
}

/// Elements of the pairs that the first round, and each round behind it, leaves at most.
pub(crate) fn sorted_pairs(c: usize, k: usize) -> [usize; 2] {
    let first = c.div_ceil(SORTED) * k;
    [first, first.div_ceil(SORTED) * k].map(|pairs| padded(2 * pairs))
}

/// Workgroups that look for the largest element of a row.
pub(crate) const ARGMAX_GROUPS: usize = 128;

/// Most parts that the keys of a decode step are split into: what the kernel that joins them has room for.
pub(crate) const MOST_SPLITS: usize = 256;

/// Rows of x from which on a product runs on cooperative matrices.
pub(crate) const COOPERATIVE_ROWS: usize = 32;

/// Elements of the rows of x in half precision, padded to whole blocks; they stand behind the other working memory.
pub(crate) fn half_rows(node: &Node, inputs: &[Vec<usize>]) -> usize {
    let k = inputs.first().and_then(|x| x.last()).copied().unwrap_or(0);
    let m: usize = inputs.first().map_or(0, |x| x.iter().rev().skip(1).product());
    match &node.op {
        Op::Linear(_) | Op::Qkv(_) if m >= COOPERATIVE_ROWS => padded(m * k.next_multiple_of(32) / 2),
        _ => 0,
    }
}

/// What is bound to one number of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Slot {
    /// Bytes of the arena.
    Arena { at: u64, bytes: u64 },
    /// The vectors in f32 that the program holds, all of them.
    Vectors,
    /// A table in f32 that is too large to be among the vectors.
    Table(Value),
    /// Array `which` (codes, scales, minima) of part `part` of a matrix.
    Matrix { key: usize, part: usize, which: usize },
    /// A state.
    State(usize),
}

/// One number that a kernel is given.
#[derive(Clone, Debug)]
pub(crate) enum Word {
    U(u32),
    F(f32),
    /// Known when a run begins.
    D(Dim),
    /// A function of a size that is known when a run begins.
    Of(Dim, fn(usize) -> usize),
}

impl From<usize> for Word {
    fn from(n: usize) -> Word {
        // Sizes of bindings are below 2^32 bytes; a larger number is refused where it is bound.
        Word::U(u32::try_from(n).unwrap_or(u32::MAX))
    }
}

impl From<f32> for Word {
    fn from(x: f32) -> Word {
        Word::F(x)
    }
}

impl From<&Dim> for Word {
    fn from(d: &Dim) -> Word {
        Word::D(d.clone())
    }
}

/// Words of a kernel's parameters: a slot of the uniform buffer.
pub(crate) const PARAMETERS: usize = 64;

/// One dispatch.
pub(crate) struct Step {
    pub node: usize,
    pub pipeline: Arc<Pipeline>,
    pub slots: Vec<(u32, Slot)>,
    pub words: Vec<Word>,
    pub groups: Groups,
    /// Operations of the whole node, at its first dispatch.
    pub operations: f64,
}

/// Workgroups of a dispatch.
#[derive(Clone, Debug)]
pub(crate) enum Groups {
    /// So many, folded into two dimensions where they are too many for one.
    Count(u64),
    /// Columns, which may depend on a size that is known when a run begins, and rows.
    Grid(Word, u32),
}

/// Everything of a run for one set of sizes.
pub(crate) struct Recipe {
    pub places: Places,
    pub steps: Vec<Step>,
    /// Bytes of each slot of the uniform buffer.
    pub stride: u64,
}
