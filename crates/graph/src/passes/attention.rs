use super::{only_user, result_of};
use crate::dim::Dim;
use crate::graph::{Graph, Value};
use crate::ops::{Attention, AttentionMask, Op, Reshape, Slice, SoftmaxMask};

/// Walks back from a value to the operand of the node that made it, where that node is `op` and nothing else
/// uses the value.
fn back(graph: &Graph, users: &[Vec<usize>], value: Value, op: fn(&Op) -> bool) -> Option<Value> {
    only_user(graph, users, value)?;
    op(&graph.node(value).op).then(|| graph.node(value).inputs[0])
}

fn is_heads_first(op: &Op) -> bool {
    matches!(op, Op::Permute(p) if p.order == [1, 0, 2])
}

fn is_reshape(op: &Op) -> bool {
    matches!(op, Op::Reshape(_))
}

/// The chain that [`crate::GraphBuilder::attention`] builds becomes one [`Attention`] node.
pub fn fuse_attention(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        if let Some(found) = matched(graph, i) {
            let Found { q, k, v, segments, op, result, scope } = found;
            let mut inputs = Vec::with_capacity(4);
            for x in [q, k, v] {
                inputs.push(as_matrix(graph, x, &scope)?);
            }
            inputs.extend(segments);
            let y = graph.push(Op::Attention(op), inputs, &scope)?;
            graph.replace(result, y);
            applied += 1;
        }
    }
    Ok(applied)
}

/// Attention between positions whose queries, keys and values come from quantised matrices gets leave to round queries
/// and keys to twelve bits and values to bytes: they are no more exact than that. Not in [`ALL`](super::ALL); whoever builds an encoder decides.
pub fn attend_in_int8(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Attention(attention) = &graph.nodes[i].op else { continue };
        if attention.mask != AttentionMask::Segments || attention.int8 {
            continue;
        }
        let quantised = |v: &Value| {
            let node = graph.node(*v);
            matches!(node.op, Op::Linear(_))
                && node.inputs[1..].iter().any(|w| graph.meta(*w).dtype.is_quantised())
        };
        if graph.nodes[i].inputs[..3].iter().all(quantised)
            && let Op::Attention(attention) = &mut graph.nodes[i].op
        {
            attention.int8 = true;
            applied += 1;
        }
    }
    Ok(applied)
}

struct Found {
    q: Value,
    k: Value,
    v: Value,
    segments: Option<Value>,
    op: Attention,
    result: Value,
    scope: String,
}

fn matched(graph: &Graph, i: usize) -> Option<Found> {
    let Op::Softmax(softmax) = &graph.nodes[i].op else { return None };
    let users = graph.users();
    // Forward: reshape, product with v, reshape, heads back, reshape to a matrix.
    let mut y = result_of(i);
    let step = |y: Value, op: fn(&Op) -> bool| {
        let user = only_user(graph, users, y)?;
        (op(&graph.nodes[user].op) && graph.nodes[user].inputs[0] == y).then(|| result_of(user))
    };
    y = step(y, is_reshape)?;
    y = step(y, |op| matches!(op, Op::MatMul(m) if !m.transposed))?;
    let v = graph.node(y).inputs[1];
    y = step(y, is_reshape)?;
    y = step(y, is_heads_first)?;
    let result = step(y, is_reshape)?;
    // Backward: reshape, scale, product of q and k.
    let scores = back(graph, users, graph.nodes[i].inputs[0], is_reshape)?;
    let Op::Scale(scale) = &graph.node(scores).op else { return None };
    let product = back(graph, users, scores, |op| matches!(op, Op::Scale(_)))?;
    let Op::MatMul(m) = &graph.node(product).op else { return None };
    only_user(graph, users, product)?;
    let [q, k] = *graph.node(product).inputs.as_slice() else { return None };
    let q = back(graph, users, back(graph, users, q, is_reshape)?, is_heads_first)?;
    let k = back(graph, users, k, is_heads_first)?;
    let v = back(graph, users, v, is_heads_first)?;
    let (qs, ks) = (&graph.meta(q).shape, &graph.meta(k).shape);
    if !m.transposed || graph.meta(v).shape != *ks {
        return None;
    }
    let op = Attention {
        heads: qs[1].as_fixed()?,
        kv_heads: ks[1].as_fixed()?,
        head_dim: qs[2].as_fixed()?,
        scale: scale.factor,
        keys: ks[0].clone(),
        mask: match &softmax.mask {
            SoftmaxMask::Causal { past } => AttentionMask::Causal { past: past.clone() },
            SoftmaxMask::Segments => AttentionMask::Segments,
        },
        columns: [0; 3],
        int8: false,
        fewer: false,
    };
    let segments = graph.nodes[i].inputs.get(1).copied();
    let scope = graph.nodes[i].scope.clone();
    Some(Found { q, k, v, segments, op, result, scope })
}

/// `[rows, heads, d]` as `[rows, heads·d]`: what a reshape made it from, or a new reshape; or the cache that it is the
/// first rows of.
fn as_matrix(graph: &mut Graph, x: Value, scope: &str) -> crate::Result<Value> {
    // The first rows of a cache are the cache itself; the node's `keys` says how many count.
    let cache = match &graph.node(x).op {
        Op::Slice(Slice { axis: 0, start, .. }) if *start == Dim::fixed(0) => Some(graph.node(x).inputs[0]),
        Op::KvRead(_) => Some(graph.node(x).inputs[0]),
        _ => None,
    };
    if let Some(cache) = cache.filter(|c| matches!(graph.node(*c).op, Op::KvAppend(_) | Op::State(_))) {
        return Ok(cache);
    }
    let shape = graph.meta(x).shape.clone();
    let flat = vec![shape[0].clone(), shape[1].clone() * shape[2].clone()];
    let mut value = None;
    if let Op::Reshape(_) = graph.node(x).op {
        let inner = graph.node(x).inputs[0];
        value = (graph.meta(inner).shape == flat).then_some(inner);
    }
    match value {
        Some(v) => Ok(v),
        None => graph.push(Op::Reshape(Reshape { shape: flat }), vec![x], scope),
    }
}
