//! A range of ops as a stage of its own: what stands before it, the range, what stands behind.

use std::collections::BTreeMap;

use crate::graph::{Graph, Node, Value};
use crate::ops::Op;

impl Graph {
    /// The nodes that compute something at run time and are in one stage: their indices and names, `{op} {scope}`. Views and
    /// what every stage makes for itself are left out.
    pub fn op_names(&self) -> Vec<(usize, String)> {
        let idle = |n: &Node| super::is_repeated(n) || n.op.is_view();
        let named = |(i, n): (usize, &Node)| (i, format!("{} {}", n.op.name(), n.scope));
        self.nodes().iter().enumerate().filter(|(_, n)| !idle(n)).map(named).collect()
    }

    /// The stage of each node where the nodes from `first` to `last` are stage 1, those before them 0 and those behind them
    /// 2. A state has one owner, so the range grows until it holds all ops of a state or none.
    pub fn stages_around(&self, first: usize, last: usize) -> Vec<usize> {
        let (mut first, mut last) = (first, last.max(first));
        let spans = state_spans(self);
        loop {
            let before = (first, last);
            for &(lo, hi) in &spans {
                if lo < first && first <= hi {
                    first = lo;
                }
                if lo <= last && last < hi {
                    last = hi;
                }
            }
            if (first, last) == before {
                break;
            }
        }
        (0..self.nodes().len()).map(|i| usize::from(i >= first) + usize::from(i > last)).collect()
    }
}

/// The first and the last node that use each state.
fn state_spans(graph: &Graph) -> Vec<(usize, usize)> {
    let mut state_of: BTreeMap<Value, usize> = BTreeMap::new();
    let mut spans: Vec<Option<(usize, usize)>> = Vec::new();
    for (i, node) in graph.nodes().iter().enumerate() {
        if let Op::State(_) = node.op {
            state_of.insert(Value::of(i, 0), spans.len());
            spans.push(None);
            continue;
        }
        for state in node.inputs.iter().filter_map(|v| state_of.get(v)) {
            spans[*state] = Some((spans[*state].map_or(i, |(first, _)| first), i));
        }
        let replaced = node.op.state_results().min(node.inputs.len());
        for j in 0..replaced {
            let (from, to) = (node.inputs.len() - replaced + j, node.outputs.len() - replaced + j);
            if let Some(&state) = state_of.get(&node.inputs[from]) {
                state_of.insert(Value::of(i, to), state);
            }
        }
    }
    spans.into_iter().flatten().collect()
}
