//! What a program holds on the device besides its arena: matrices, vectors, and how states lie.

use std::collections::HashMap;
use std::sync::Arc;

use pocketglm_graph::ops::{Linear, Op, Qkv};
use pocketglm_graph::{Graph, Node, Result, Value, load_time_values, widened_weight};
use pocketglm_tensor::{Cpu, KvFormat, WeightSource};

use crate::device::{Buffer, Device};
use crate::state::KvLayout;
use crate::weights::{Form, Kind, Matrix, Piece};

/// Elements above which a table has a buffer of its own.
const TABLE: usize = 1 << 20;

/// Weights, constants and load-time results on the device.
pub(crate) struct Held {
    pub matrices: Vec<Matrix>,
    /// For a node that multiplies with weights, its matrices in order.
    pub products: HashMap<usize, Vec<Run>>,
    /// For a weight of which rows are read, its matrix.
    pub tables: HashMap<usize, usize>,
    /// Where each vector begins in the buffer of all vectors, in elements.
    pub places: HashMap<Value, usize>,
    pub vectors: Buffer,
    pub large: HashMap<Value, Buffer>,
    /// Nodes that are states, with their layouts, in the order of their buffers.
    pub states: Vec<(usize, KvLayout)>,
}

/// Weights of one node that became one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Run {
    /// Its place among the matrices.
    pub matrix: usize,
    pub rows: usize,
    /// Where its bias begins among the vectors; parts without one have zeros there.
    pub bias: Option<usize>,
}

/// The weight of a part of a node, and its bias where it has one.
type WeightAndBias = (Value, Option<Value>);

/// Weight and bias of each part of a node that multiplies with weights; whether a bias is wanted in any case.
fn parts_of(node: &Node) -> Option<(Vec<WeightAndBias>, bool)> {
    let list = |biases: &[bool], mut at: usize| {
        let mut parts = Vec::with_capacity(biases.len());
        for &bias in biases {
            parts.push((node.inputs[at], bias.then(|| node.inputs[at + 1])));
            at += 1 + usize::from(bias);
        }
        parts
    };
    match &node.op {
        Op::Linear(l @ Linear { parts, .. }) => Some((list(parts, l.first_weight()), false)),
        Op::Qkv(q @ Qkv { parts, .. }) => Some((list(parts, q.first_weight()), true)),
        Op::MatMul(_) => Some((vec![(node.inputs[1], None)], false)),
        Op::FrameConv(c) => Some((vec![(node.inputs[1], c.bias.then(|| node.inputs[2]))], false)),
        _ => None,
    }
}

/// The vectors of a program on their way to one buffer.
#[derive(Default)]
struct Vectors {
    values: Vec<f32>,
    places: HashMap<Value, usize>,
}

impl Vectors {
    /// Appends values at a multiple of four elements, and says where.
    fn push(&mut self, values: &[f32]) -> usize {
        let at = self.values.len();
        self.values.extend_from_slice(values);
        self.values.resize(self.values.len().next_multiple_of(4), 0.0);
        at
    }
}

/// Bytes of a node's biases, which are kept once more behind one another, with zeros for parts that have none.
pub(crate) fn joined_biases(node: &Node, rows: impl Fn(Value) -> usize) -> u64 {
    let Some((parts, biased)) = parts_of(node) else { return 0 };
    if !biased && parts.iter().all(|(_, bias)| bias.is_none()) {
        return 0;
    }
    parts.iter().map(|(weight, _)| rows(*weight).next_multiple_of(4) as u64 * 4).sum()
}

impl Held {
    /// Brings what a graph needs to the device.
    pub fn load(
        device: &Arc<Device>,
        cpu: &Arc<Cpu>,
        graph: &Graph,
        weights: &dyn WeightSource,
    ) -> Result<Held> {
        let kept = graph.kept_as_stored();
        let mut uses = vec![0usize; graph.nodes().len()];
        for node in graph.nodes().iter().filter(|n| !n.load_time) {
            node.inputs.iter().for_each(|v| uses[v.node()] += 1);
        }
        let mut vectors = Vectors::default();
        let mut large = HashMap::new();
        let mut states = Vec::new();
        let mut keep = |vectors: &mut Vectors, value: Value, values: &[f32]| -> Result<()> {
            if values.len() > TABLE {
                large.insert(value, device.upload("table", bytemuck::cast_slice(values))?);
            } else {
                let at = vectors.push(values);
                vectors.places.insert(value, at);
            }
            Ok(())
        };
        for (value, output) in load_time_values(cpu, graph, weights)? {
            keep(&mut vectors, value, &output.values)?;
        }
        for (i, node) in graph.nodes().iter().enumerate() {
            match &node.op {
                Op::Weight(w) if uses[i] > 0 && !kept[i] => {
                    let values = widened_weight(&weights.tensor(&w.name)?, &w.name)?;
                    keep(&mut vectors, Value::of(i, 0), &values)?;
                }
                Op::Constant(c) if uses[i] > 0 => keep(&mut vectors, Value::of(i, 0), &c.tensor.to_f32()?)?,
                Op::State(s) => {
                    let side =
                        |d: usize| node.outputs[0].shape.get(d).and_then(|d| d.as_fixed()).unwrap_or(0);
                    let format = KvFormat::of(s.dtype).unwrap_or_default();
                    states.push((i, KvLayout::new(device, format, side(1), side(2))?));
                }
                _ => {}
            }
        }
        let mut loader = Loader {
            device,
            cpu,
            graph,
            weights,
            uses: &uses,
            kept: &kept,
            matrices: Vec::new(),
            alone: HashMap::new(),
        };
        let (mut products, mut tables) = (HashMap::new(), HashMap::new());
        for (i, node) in graph.nodes().iter().enumerate().filter(|(_, n)| !n.load_time) {
            if let Some((parts, biased)) = parts_of(node) {
                if let Some(runs) = loader.product(&parts, biased, &mut vectors)? {
                    products.insert(i, runs);
                }
            } else if let Op::GatherRows(_) = &node.op
                && let Some(matrix) = loader.lone(node.inputs[0])?
            {
                tables.insert(node.inputs[0].node(), matrix);
            }
        }
        let matrices = loader.matrices;
        let Vectors { values, places } = vectors;
        let vectors = device.upload("vectors", bytemuck::cast_slice(&values))?;
        Ok(Held { matrices, products, tables, places, vectors, large, states })
    }
}

impl Held {
    /// Whether every matrix is in f32, so that results are to be as exact.
    pub fn is_exact(&self) -> bool {
        self.matrices.iter().all(|m| m.form.kind == Kind::F32)
    }
}

struct Loader<'a> {
    device: &'a Device,
    cpu: &'a Cpu,
    graph: &'a Graph,
    weights: &'a dyn WeightSource,
    uses: &'a [usize],
    kept: &'a [bool],
    matrices: Vec<Matrix>,
    /// Weights that are matrices by themselves, because several nodes use them.
    alone: HashMap<usize, usize>,
}

impl<'a> Loader<'a> {
    /// Name, type and sizes of a weight that stays as it is stored.
    fn stored(&self, value: Value) -> Option<(Piece<'a>, usize)> {
        match &self.graph.node(value).op {
            Op::Weight(w) if self.kept[value.node()] => match *w.shape.as_slice() {
                [rows, k] => Some((Piece { name: &w.name, dtype: w.dtype, rows }, k)),
                _ => None,
            },
            _ => None,
        }
    }

    fn add(&mut self, pieces: &[Piece<'_>], k: usize) -> Result<usize> {
        self.matrices.push(Matrix::load(self.device, self.cpu, self.weights, pieces, k)?);
        Ok(self.matrices.len() - 1)
    }

    /// The matrix of a weight that is not joined with others.
    fn lone(&mut self, value: Value) -> Result<Option<usize>> {
        if let Some(&known) = self.alone.get(&value.node()) {
            return Ok(Some(known));
        }
        let Some((piece, k)) = self.stored(value) else { return Ok(None) };
        let added = self.add(&[piece], k)?;
        self.alone.insert(value.node(), added);
        Ok(Some(added))
    }

    /// The matrices of a node: neighbours of one form become one. `None` where a factor is no stored weight.
    fn product(
        &mut self,
        parts: &[WeightAndBias],
        biased: bool,
        vectors: &mut Vectors,
    ) -> Result<Option<Vec<Run>>> {
        let mut runs = Vec::new();
        let mut at = 0;
        while at < parts.len() {
            let Some((first, k)) = self.stored(parts[at].0) else { return Ok(None) };
            let form = Form::of(first.dtype);
            let mut pieces = vec![first];
            while self.uses[parts[at].0.node()] == 1
                && let Some((next, _)) = parts.get(at + pieces.len())
                && self.uses[next.node()] == 1
                && let Some((piece, _)) = self.stored(*next)
                && Form::of(piece.dtype) == form
            {
                pieces.push(piece);
            }
            let these = &parts[at..at + pieces.len()];
            let rows = pieces.iter().map(|p| p.rows).sum();
            let matrix = match these {
                [(only, _)] => self.lone(*only)?,
                _ => Some(self.add(&pieces, k)?),
            };
            let Some(matrix) = matrix else { return Ok(None) };
            let mut bias = None;
            if biased || these.iter().any(|(_, b)| b.is_some()) {
                let mut joined = Vec::with_capacity(rows);
                for ((_, value), piece) in these.iter().zip(&pieces) {
                    match value.and_then(|v| vectors.places.get(&v)) {
                        Some(&from) => joined
                            .extend_from_slice(vectors.values.get(from..from + piece.rows).unwrap_or(&[])),
                        None => joined.resize(joined.len() + piece.rows, 0.0),
                    }
                }
                bias = Some(vectors.push(&joined));
            }
            runs.push(Run { matrix, rows, bias });
            at += pieces.len();
        }
        Ok(Some(runs))
    }
}
