//! What quantising and calibrating need to know of a graph: which tensors are matrices of linear layers, what meets
//! them, and which norms feed nothing else.
//!
//! All of it reads graphs as they were built, before any fusion.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Graph, Value};
use crate::ops::{Op, WeightRef};

/// The input of one or more linear layers, as a named result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Name of the result: that of the first weight.
    pub output: String,
    /// The weights that the input meets.
    pub weights: Vec<String>,
    /// Width of the input.
    pub channels: usize,
}

/// A norm whose result meets matrices of linear layers and nothing else: scaling its weight by `1 / s` and their
/// columns by `s` changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormedLinears {
    /// The norm's weight.
    pub norm: String,
    /// The matrices, each used nowhere else.
    pub weights: Vec<String>,
}

pub(super) fn weight_of(graph: &Graph, value: Value) -> Option<&WeightRef> {
    match &graph.node(value).op {
        Op::Weight(w) => Some(w),
        _ => None,
    }
}

/// Input and weight of node `i` where it is a linear layer over a matrix as it is stored. A matrix made of a
/// convolution's kernel is none.
pub(super) fn linear(graph: &Graph, i: usize) -> Option<(Value, Value)> {
    let node = &graph.nodes[i];
    let Op::MatMul(_) = node.op else { return None };
    let &[x, w] = node.inputs.as_slice() else { return None };
    let weight = weight_of(graph, w)?;
    (weight.stored.len() == 2 && weight.stored == weight.shape).then_some((x, w))
}

/// The tensors that can be quantised: matrices of linear layers, and tables that are read by the row. In the order of
/// first use.
pub fn matrices(graph: &Graph) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut names = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let table = match node.op {
            Op::GatherRows(_) => node.inputs.first().copied(),
            _ => linear(graph, i).map(|(_, w)| w),
        };
        let weight = table.and_then(|w| weight_of(graph, w)).filter(|w| w.stored.len() == 2);
        if let Some(weight) = weight
            && seen.insert(weight.name.clone())
        {
            names.push(weight.name.clone());
        }
    }
    names
}

/// The norms of [`NormedLinears`], in the order of the graph.
pub fn normed_linears(graph: &Graph) -> Vec<NormedLinears> {
    let users = graph.users();
    let mut found = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let (Op::RmsNorm(_), &[_, norm]) = (&node.op, node.inputs.as_slice()) else { continue };
        let Some(norm) = weight_of(graph, norm) else { continue };
        let result = super::result_of(i);
        let weights: Option<Vec<String>> = users[i]
            .iter()
            .map(|&user| {
                let (x, w) = linear(graph, user)?;
                let alone = x == result && users[w.node()].len() == 1;
                weight_of(graph, w).filter(|_| alone).map(|w| w.name.clone())
            })
            .collect();
        if let Some(weights) = weights
            && !weights.is_empty()
            && !graph.is_output(result)
        {
            found.push(NormedLinears { norm: norm.name.clone(), weights });
        }
    }
    found
}

/// Makes the inputs of all linear layers whose weight is `wanted` the graph's only results. Run [`prepare`]
/// afterwards: it drops what they do not need.
///
/// [`prepare`]: super::prepare
pub fn tap_linear_inputs(graph: &mut Graph, wanted: &dyn Fn(&str) -> bool) -> Vec<Tap> {
    let mut taps: BTreeMap<Value, Tap> = BTreeMap::new();
    for i in 0..graph.nodes.len() {
        let Some((x, w)) = linear(graph, i) else { continue };
        let Some(weight) = weight_of(graph, w).filter(|w| wanted(&w.name)) else { continue };
        let name = weight.name.clone();
        let channels = weight.shape.last().copied().unwrap_or(0);
        let tap = taps.entry(x).or_insert(Tap { output: name.clone(), weights: Vec::new(), channels });
        tap.weights.push(name);
    }
    graph.outputs = taps.iter().map(|(x, tap)| (tap.output.clone(), *x)).collect();
    taps.into_values().collect()
}

/// Adds to the graph's results what is appended to caches, under the names of the caches, and the queries that meet
/// cached keys, under the keys' name with `q` for its last letter.
pub fn tap_caches(graph: &mut Graph) -> Vec<Tap> {
    let mut taps = Vec::new();
    for i in 0..graph.nodes.len() {
        let (Op::KvAppend(_), &[rows, state]) = (&graph.nodes[i].op, graph.nodes[i].inputs.as_slice()) else {
            continue;
        };
        let Op::State(cache) = &graph.node(state).op else { continue };
        let name = cache.name.clone();
        let queries =
            queries(graph, super::result_of(i)).zip(name.strip_suffix('k').map(|n| format!("{n}q")));
        let queries = queries.map(|(queries, name)| (name, queries));
        for (name, rows) in [(name, rows)].into_iter().chain(queries) {
            let shape = graph.meta(rows).shape.iter().skip(1);
            let channels = shape.map(|d| d.as_fixed().unwrap_or(0)).product();
            taps.push(Tap { output: name.clone(), weights: vec![name.clone()], channels });
            graph.outputs.push((name, rows));
        }
    }
    taps
}

/// The queries `[t, h, d]` of an attention built from primitive ops whose keys are read from a cache.
fn queries(graph: &Graph, cache: Value) -> Option<Value> {
    let user = |of: Value, wanted: &dyn Fn(&Op) -> bool| {
        let mut nodes = graph.nodes.iter().enumerate();
        let found = nodes.find(|(_, node)| node.inputs.contains(&of) && wanted(&node.op));
        found.map(|(i, _)| i)
    };
    let read = user(cache, &|op| matches!(op, Op::KvRead(_) | Op::Slice(_)))?;
    let turned = super::result_of(user(super::result_of(read), &|op| matches!(op, Op::Permute(_)))?);
    let scores = user(turned, &|op| matches!(op, Op::MatMul(_)))?;
    let (&[mut queries, keys], true) = (graph.nodes[scores].inputs.as_slice(), turned != cache) else {
        return None;
    };
    if keys != turned {
        return None;
    }
    while let (Op::Reshape(_) | Op::Permute(_), &[from]) =
        (&graph.node(queries).op, graph.node(queries).inputs.as_slice())
    {
        queries = from;
    }
    Some(queries)
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::DType;

    use super::*;
    use crate::{Dim, GraphBuilder, passes};

    /// `norm -> {a, b}`, `b -> silu -> c`, and a norm whose result is also added to.
    fn graph() -> Graph {
        let mut g = GraphBuilder::assuming(DType::F32);
        let ids = g.input("ids", DType::I32, &[Dim::symbol("T")]).unwrap();
        let table = g.weight("table", &[10, 4]).unwrap();
        let x = g.gather_rows(table, ids).unwrap();
        let n = g.rms_norm("norm", x, 1e-5).unwrap();
        let a = g.linear("a", n, 6, true).unwrap();
        let b = g.linear("b", n, 6, false).unwrap();
        let b = g.silu(b).unwrap();
        let y = g.mul(a, b).unwrap();
        let y = g.linear("c", y, 4, false).unwrap();
        let m = g.rms_norm("other", y, 1e-5).unwrap();
        let d = g.linear("d", m, 4, false).unwrap();
        let y = g.add(d, m).unwrap();
        let kernel = g.weight_as("kernel", &[4, 2, 2], &[4, 4]).unwrap();
        let y = g.matmul(y, kernel, true).unwrap();
        g.output("y", y);
        g.finish()
    }

    #[test]
    fn matrices_are_those_of_linear_layers_and_tables() {
        assert_eq!(matrices(&graph()), ["table", "a.weight", "b.weight", "c.weight", "d.weight"]);
    }

    #[test]
    fn only_norms_that_feed_linear_layers_alone_can_be_scaled() {
        let norm =
            NormedLinears { norm: "norm.weight".into(), weights: vec!["a.weight".into(), "b.weight".into()] };
        assert_eq!(normed_linears(&graph()), [norm]);
    }

    #[test]
    fn taps_are_shared_by_linear_layers_of_one_input_and_replace_the_results() {
        let mut g = graph();
        let taps = tap_linear_inputs(&mut g, &|name| name != "d.weight");
        let tap = |output: &str, weights: &[&str], channels| Tap {
            output: output.into(),
            weights: weights.iter().map(|w| w.to_string()).collect(),
            channels,
        };
        assert_eq!(taps, [tap("a.weight", &["a.weight", "b.weight"], 4), tap("c.weight", &["c.weight"], 6)]);
        passes::prepare(&mut g).unwrap();
        let names: Vec<&str> = g.outputs().iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["a.weight", "c.weight"]);
        assert!(!g.weights().iter().any(|w| w.name == "d.weight"), "dead layers are dropped");
    }
}
