//! From a graph to what is drawn of it: the first layer in full, the others as one box, weights as names.

use std::collections::{BTreeMap, BTreeSet};

use pocketglm_graph::ops::Op;
use pocketglm_graph::{Dim, Graph, Node, Value};

use crate::draw::{Family, Shape, Sketch};

/// Longest line of weight names in a box.
const WIDEST: usize = 30;

/// The layer that a node belongs to.
fn layer(node: &Node) -> Option<usize> {
    let mut parts = node.scope.split('.');
    while let Some(part) = parts.next() {
        if matches!(part, "layers" | "blocks") {
            return parts.next()?.parse().ok();
        }
    }
    None
}

/// Whether a node has a box: what is known when weights are loaded has none.
fn drawn(node: &Node) -> bool {
    !node.load_time && !matches!(node.op, Op::Weight(_) | Op::Constant(_))
}

/// What to draw.
pub fn sketch(graph: &Graph) -> Sketch {
    let nodes = graph.nodes();
    let mut sketch = Sketch::default();
    let mut box_of: BTreeMap<usize, usize> = BTreeMap::new();
    let others: BTreeSet<usize> = nodes.iter().filter_map(layer).filter(|l| *l > 0).collect();
    let mut folded = None;
    // The folded box stands after everything that the folded layers need, so that arrows lead forwards.
    let last = nodes.iter().rposition(|n| drawn(n) && layer(n).is_some_and(|l| l > 0));
    let unfolded = (0..nodes.len()).filter(|&i| drawn(&nodes[i]) && layer(&nodes[i]).is_none_or(|l| l == 0));
    // What folded layers alone read is named in their box: a box of its own would stand beside the last of layer 0.
    let inside = inputs_of_folded(graph);
    let unfolded: Vec<usize> = unfolded.filter(|i| !inside.contains(i)).collect();
    let needs_folded = after_folded(graph);
    for pass in [false, true] {
        if pass && last.is_some() {
            folded = Some(sketch.boxes.len());
            sketch.boxes.push(folded_box(graph, &others, &inside));
        }
        for &i in unfolded.iter().filter(|&&i| needs_folded.contains(&i) == pass) {
            box_of.insert(i, sketch.boxes.len());
            sketch.boxes.push(shape(graph, i));
        }
    }
    let place = |i: usize| {
        box_of.get(&i).copied().or(folded.filter(|_| drawn(&nodes[i]) && layer(&nodes[i]).is_some()))
    };
    let mut arrows = BTreeSet::new();
    for (i, node) in nodes.iter().enumerate().filter(|(_, n)| drawn(n)) {
        for v in &node.inputs {
            if let (Some(a), Some(b)) = (place(v.node()), place(i)) {
                arrows.insert((a, b));
            }
        }
    }
    for (name, v) in graph.outputs() {
        if let Some(a) = place(v.node()) {
            arrows.insert((a, sketch.boxes.len()));
            sketch.boxes.push(Shape {
                title: name.clone(),
                lines: vec![dims(&graph.meta(*v).shape)],
                hint: format!("result {name}"),
                family: Family::Data,
                framed: false,
            });
        }
    }
    sketch.arrows = arrows.into_iter().filter(|(a, b)| a != b).collect();
    if sketch.boxes.iter().any(|b| b.framed) {
        sketch.frame = Some("layer 0".into());
    }
    sketch
}

/// Nodes outside of the folded layers that depend on one of them.
fn after_folded(graph: &Graph) -> BTreeSet<usize> {
    let nodes = graph.nodes();
    let is_folded = |i: usize| layer(&nodes[i]).is_some_and(|l| l > 0);
    let mut after = BTreeSet::new();
    for (i, node) in nodes.iter().enumerate() {
        if !is_folded(i) && node.inputs.iter().any(|v| is_folded(v.node()) || after.contains(&v.node())) {
            after.insert(i);
        }
    }
    after
}

/// Inputs of the graph that folded layers alone use.
fn inputs_of_folded(graph: &Graph) -> BTreeSet<usize> {
    let nodes = graph.nodes();
    let is_folded = |node: &Node| layer(node).is_some_and(|l| l > 0);
    let all_folded = |i: usize| {
        let mut users = nodes.iter().filter(|n| n.inputs.iter().any(|v| v.node() == i)).peekable();
        users.peek().is_some() && users.all(is_folded)
    };
    let inputs =
        (0..nodes.len()).filter(|&i| matches!(nodes[i].op, Op::Input(_)) && layer(&nodes[i]).is_none());
    inputs.filter(|&i| all_folded(i)).collect()
}

fn folded_box(graph: &Graph, others: &BTreeSet<usize>, inputs: &BTreeSet<usize>) -> Shape {
    let ops = |l: usize| -> Vec<&'static str> {
        let of_layer = graph.nodes().iter().filter(|n| layer(n) == Some(l) && drawn(n) && !n.op.is_source());
        of_layer.map(|n| n.op.name()).collect()
    };
    let first = ops(0);
    let equal = others.iter().filter(|l| ops(**l) == first).count();
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    let title = if equal == others.len() {
        format!("{} more layer{} like this", others.len(), plural(others.len()))
    } else {
        format!("{} more layers, {equal} of them like this", others.len())
    };
    let mut lines = vec![format!("{} node{} each", first.len(), plural(first.len()))];
    for &i in inputs {
        if let Op::Input(input) = &graph.nodes()[i].op {
            lines.push(format!("{} {}", input.name, dims(&graph.nodes()[i].outputs[0].shape)));
        }
    }
    Shape { hint: title.clone(), title, lines, family: Family::Folded, framed: false }
}

fn shape(graph: &Graph, i: usize) -> Shape {
    let node = &graph.nodes()[i];
    let (title, mut lines) = match &node.op {
        Op::Input(input) => (input.name.clone(), Vec::new()),
        Op::State(state) => (format!("cache {}", last_part(&state.name)), Vec::new()),
        op => (op.name().to_owned(), weight_lines(graph, node)),
    };
    // States are replaced in place; what a node is for comes first.
    let own = node.outputs.len() - node.op.state_results().min(node.outputs.len());
    let results = if own == 0 { &node.outputs[..] } else { &node.outputs[..own] };
    lines.push(results.iter().map(|m| dims(&m.shape)).collect::<Vec<_>>().join(" "));
    let hint =
        format!("{} in {}", node.op.name(), if node.scope.is_empty() { "the graph" } else { &node.scope });
    Shape {
        title,
        lines,
        hint,
        family: family(&node.op),
        framed: layer(node) == Some(0) && !node.op.is_source(),
    }
}

/// The names of the weights that a node uses, in lines of bearable length.
fn weight_lines(graph: &Graph, node: &Node) -> Vec<String> {
    let mut names = Vec::new();
    node.inputs.iter().for_each(|v| weights(graph, *v, &mut names));
    let mut lines: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names.into_iter().filter(|n| seen.insert(n.clone())) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + name.chars().count() + 2 <= WIDEST => {
                line.push_str(", ");
                line.push_str(&name);
            }
            _ => lines.push(name),
        }
    }
    lines
}

/// Short names of the weights behind a value that is known when weights are loaded.
fn weights(graph: &Graph, value: Value, names: &mut Vec<String>) {
    let node = graph.node(value);
    match &node.op {
        Op::Weight(w) => names.push(short(&w.name)),
        _ if node.load_time => node.inputs.iter().for_each(|v| weights(graph, *v, names)),
        _ => {}
    }
}

/// `q_proj` for a weight of a layer, else the path within its part of the model.
fn short(name: &str) -> String {
    let name = name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name);
    if name.contains(".layers.") || name.contains(".blocks.") {
        return last_part(name).to_owned();
    }
    let outer = ["model.language_model.", "model.visual."].iter().find_map(|p| name.strip_prefix(p));
    outer.unwrap_or(name).to_owned()
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn dims(shape: &[Dim]) -> String {
    format!("[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
}

fn family(op: &Op) -> Family {
    match op {
        Op::Input(_) | Op::Weight(_) | Op::Constant(_) | Op::State(_) => Family::Data,
        Op::MatMul(_) | Op::Linear(_) | Op::Qkv(_) | Op::Conv(_) => Family::Matrix,
        Op::Softmax(_) | Op::Attention(_) => Family::Attention,
        Op::RmsNorm(_) | Op::LayerNorm(_) | Op::BatchNorm(_) | Op::NormAdd(_) => Family::Norm,
        Op::RopeTable(_) | Op::Rope(_) => Family::Rope,
        Op::GatherRows(_) | Op::WeightedGather(_) | Op::ScatterRows(_) | Op::KvAppend(_) => Family::Rows,
        Op::Reshape(_) | Op::Permute(_) | Op::Slice(_) | Op::Concat(_) => Family::Layout,
        _ => Family::Elements,
    }
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::DType;

    use super::*;
    use crate::draw::layout::layout;
    use crate::draw::svg::box_size;
    use crate::model::Model;
    use crate::repo;

    #[test]
    fn arrows_lead_forwards_and_every_box_is_connected() {
        let model = Model::open(repo::root().join("tests/golden/default").to_str().unwrap()).unwrap();
        for graph in [model.decoder(DType::F32).unwrap(), model.encoder(DType::F32).unwrap()] {
            let sketch = sketch(&graph);
            assert!(sketch.arrows.iter().all(|(a, b)| a < b));
            for i in 0..sketch.boxes.len() {
                assert!(sketch.arrows.iter().any(|(a, b)| *a == i || *b == i), "{:?}", sketch.boxes[i]);
            }
            assert_eq!(sketch.boxes.iter().filter(|b| b.family == Family::Folded).count(), 1);
            let sizes: Vec<(f64, f64)> = sketch.boxes.iter().map(box_size).collect();
            let drawing = layout(&sizes, &sketch.arrows);
            for (c, s) in drawing.centres.iter().zip(&sizes) {
                assert!(
                    c.0 - s.0 / 2.0 > -1e-6 && c.0 + s.0 / 2.0 < drawing.size.0 + 1e-6,
                    "outside of the page"
                );
                for (x, y) in drawing.lines.iter().flat_map(|l| (1..20).map(|i| l.point(f64::from(i) / 20.0)))
                {
                    let inside = (x - c.0).abs() < s.0 / 2.0 && (y - c.1).abs() < s.1 / 2.0 - 1e-6;
                    assert!(!inside, "an arrow crosses a box");
                }
            }
        }
    }

    #[test]
    fn weights_have_the_names_that_a_reader_looks_for() {
        assert_eq!(short("model.language_model.layers.3.self_attn.q_proj.weight"), "q_proj");
        assert_eq!(short("model.visual.merger.proj.weight"), "merger.proj");
        assert_eq!(short("lm_head.weight"), "lm_head");
    }
}
