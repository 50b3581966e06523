use crate::graph::Graph;
use crate::ops::Op;

/// Constant folding: marks the nodes that depend on weights and constants alone, which a backend then
/// computes once, when it compiles, instead of at every run.
pub fn mark_load_time(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let node = &graph.nodes[i];
        let fixed = !node.op.is_source()
            && !node.op.writes_state()
            && node.outputs.iter().all(|m| m.shape.iter().all(|d| d.as_fixed().is_some()))
            && node.inputs.iter().all(|v| {
                let from = graph.node(*v);
                from.load_time || matches!(from.op, Op::Weight(_) | Op::Constant(_))
            });
        if fixed && !node.load_time {
            graph.nodes[i].load_time = true;
            applied += 1;
        }
    }
    Ok(applied)
}
