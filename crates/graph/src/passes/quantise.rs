//! Mixed precision as a rewrite: every matrix that a policy names, and what is multiplied with it, goes through the
//! policy's format and back.

use std::collections::BTreeMap;

use pocketglm_quant::Method;
use pocketglm_tensor::{DType, PackedFormat};

use super::taps::{linear, weight_of};
use crate::graph::{Graph, Value};
use crate::ops::{Op, QuantDequant};

/// What becomes of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Precision {
    /// Its format.
    pub dtype: DType,
    /// How its scales are chosen.
    pub method: Method,
    /// The largest magnitude of its input, where that is fixed.
    pub input_range: Option<f32>,
}

/// Inserts a [`QuantDequant`] node behind each matrix that `precision` names, and one before it on what it is multiplied
/// with, where kernels round that: for a quantised format. A table of which rows are read has no such input. Nodes
/// that would do the same to the same value are one.
///
/// The graph then computes, in f32, what a program over the quantised weights does; norms, softmax, residual sums and
/// whatever is not named stay as they are. Run it on a graph as it was built, before [`optimise`](super::optimise) or
/// [`prepare`](super::prepare). Returns how many nodes it inserted.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) where a matrix has rows that its format cannot hold.
pub fn insert_quantise(
    graph: &mut Graph,
    precision: &dyn Fn(&str) -> Option<Precision>,
) -> crate::Result<usize> {
    let mut weights: BTreeMap<Value, Value> = BTreeMap::new();
    let mut inputs: Vec<(Value, QuantDequant, Value)> = Vec::new();
    for i in 0..graph.nodes.len() {
        let (x, w) = match (&graph.nodes[i].op, graph.nodes[i].inputs.as_slice()) {
            (Op::GatherRows(_), &[table, _]) => (None, table),
            _ => match linear(graph, i) {
                Some((x, w)) => (Some(x), w),
                None => continue,
            },
        };
        let Some(name) = weight_of(graph, w).filter(|w| w.stored.len() == 2).map(|w| w.name.clone()) else {
            continue;
        };
        let Some(Precision { dtype, method, input_range }) = precision(&name) else { continue };
        let scope = graph.nodes[i].scope.clone();
        let rounded = match weights.get(&w) {
            Some(&rounded) => rounded,
            None => graph.push(Op::QuantDequant(QuantDequant::Weight { dtype, method }), vec![w], &scope)?,
        };
        weights.insert(w, rounded);
        graph.set_input(i, w, rounded);
        if let (Some(x), Some(format)) = (x, PackedFormat::of(dtype)) {
            let op = QuantDequant::Activation { format, range: input_range };
            let known = inputs.iter().find(|(from, with, _)| *from == x && *with == op).map(|found| found.2);
            let rounded = match known {
                Some(rounded) => rounded,
                None => graph.push(Op::QuantDequant(op.clone()), vec![x], &scope)?,
            };
            inputs.push((x, op, rounded));
            graph.set_input(i, x, rounded);
        }
    }
    graph.prune_and_sort();
    Ok(graph.nodes.iter().filter(|n| matches!(n.op, Op::QuantDequant(_))).count())
}
