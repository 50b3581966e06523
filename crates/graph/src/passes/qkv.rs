use super::{only_user, result_of, through_reshapes};
use crate::dim::Dim;
use crate::graph::{Graph, Value};
use crate::ops::{Activation, Attention, Linear, Op, Qkv, QkvRope, RopeLayout};

/// Where one of q, k, v comes from: columns of a linear layer, rotated or not.
struct Rows {
    linear: Value,
    column: usize,
    rope: Option<(Value, RopeLayout)>,
}

/// Merges the projections of an attention block with their RoPE and, where keys and values go to a cache,
/// with the append. The linear layers may be three of the same operand or one with three column ranges.
pub fn fuse_qkv(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Attention(attention) = graph.nodes[i].op.clone() else { continue };
        let Some(found) = matched(graph, i, &attention) else { continue };
        let scope = graph.nodes[i].scope.clone();
        let qkv = graph.push(Op::Qkv(found.op), found.inputs, &scope)?;
        let (kv, d) = (attention.kv_heads, attention.head_dim);
        let mut op = attention.clone();
        let mut inputs = graph.nodes[i].inputs.clone();
        inputs[0] = qkv;
        if found.appends.is_empty() {
            (inputs[1], inputs[2]) = (qkv, qkv);
            op.columns = [0, op.heads * d, (op.heads + kv) * d];
        } else {
            (inputs[1], inputs[2]) = (Value { port: 1, ..qkv }, Value { port: 2, ..qkv });
        }
        let fused = graph.push(Op::Attention(op), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        for (append, port) in found.appends.into_iter().zip(1..) {
            graph.replace(result_of(append), Value { port, ..qkv });
            graph.forget(append);
        }
        applied += 1;
    }
    Ok(applied)
}

struct Found {
    op: Qkv,
    inputs: Vec<Value>,
    /// The append nodes of k and v that become part of the fused node.
    appends: Vec<usize>,
}

fn matched(graph: &Graph, i: usize, attention: &Attention) -> Option<Found> {
    let users = graph.users();
    let [q, k, v] = *graph.nodes[i].inputs.get(..3)? else { return None };
    let (heads, kv, d) = (attention.heads, attention.kv_heads, attention.head_dim);
    let q = rows_of(graph, users, q)?;
    let append_of = |x: Value| match &graph.node(x).op {
        Op::KvAppend(a) => Some((x.node(), graph.node(x).inputs[0], graph.node(x).inputs[1], a.at.clone())),
        _ => None,
    };
    let (k, v, states, appends) = match (append_of(k), append_of(v)) {
        (Some(ka), Some(va)) => {
            if ka.3 != va.3 || [ka.0, va.0].iter().any(|&n| only_user(graph, users, result_of(n)).is_none()) {
                return None;
            }
            let rows = (rows_of(graph, users, ka.1)?, rows_of(graph, users, va.1)?);
            (rows.0, rows.1, Some((ka.2, va.2, ka.3)), vec![ka.0, va.0])
        }
        (None, None) => (rows_of(graph, users, k)?, rows_of(graph, users, v)?, None, Vec::new()),
        _ => return None,
    };
    let (table, layout) = q.rope?;
    if k.rope != q.rope || v.rope.is_some() {
        return None;
    }
    let plain = |v: Value| match &graph.node(v).op {
        Op::Linear(l) if l.norm.is_none() && !l.residual && l.activation == Activation::None => Some(l),
        _ => None,
    };
    let x = graph.node(q.linear).inputs[0];
    let (mut parts, mut weights): (Vec<bool>, Vec<Value>) = (Vec::new(), Vec::new());
    let mut take = |from: &Rows, layer: &Linear, width: Option<usize>| {
        parts.extend(&layer.parts);
        weights.extend(&graph.node(from.linear).inputs[1..]);
        width.is_none_or(|w| graph.meta(from.linear).shape.last().and_then(Dim::as_fixed) == Some(w))
    };
    let fits = if q.linear == k.linear && k.linear == v.linear {
        let columns = [q.column, k.column, v.column] == [0, heads * d, (heads + kv) * d];
        columns && take(&q, plain(q.linear)?, Some((heads + 2 * kv) * d))
    } else {
        let same = [&k, &v].iter().all(|r| graph.node(r.linear).inputs[0] == x && r.column == 0);
        same && q.column == 0
            && take(&q, plain(q.linear)?, Some(heads * d))
            && take(&k, plain(k.linear)?, Some(kv * d))
            && take(&v, plain(v.linear)?, Some(kv * d))
    };
    if !fits {
        return None;
    }
    let mut inputs = vec![x];
    inputs.extend(weights);
    inputs.push(table);
    let append = states.map(|(ks, vs, at)| {
        inputs.extend([ks, vs]);
        at
    });
    let op = Qkv { norm: None, parts, heads, kv_heads: kv, head_dim: d, rope: QkvRope { layout }, append };
    Some(Found { op, inputs, appends })
}

/// Walks back from an operand of attention to the linear layer it comes from.
fn rows_of(graph: &Graph, users: &[Vec<usize>], operand: Value) -> Option<Rows> {
    only_user(graph, users, operand)?;
    let mut value = through_reshapes(graph, users, operand)?;
    let mut rope = None;
    if let Op::Rope(r) = &graph.node(value).op {
        rope = Some((graph.node(value).inputs[1], r.layout));
        let inner = graph.node(value).inputs[0];
        only_user(graph, users, inner)?;
        value = through_reshapes(graph, users, inner)?;
    }
    let mut column = 0;
    if let Op::Slice(s) = &graph.node(value).op {
        if s.axis != 1 {
            return None;
        }
        column = s.start.as_fixed()?;
        value = graph.node(value).inputs[0];
        // The three ranges of one layer are its only users.
        if users[value.node()].len() != 3 || graph.is_output(value) {
            return None;
        }
    }
    matches!(graph.node(value).op, Op::Linear(_)).then_some(Rows { linear: value, column, rope })
}

/// The three projections of an attention block without rotation become one linear layer of three parts, whose columns
/// attention reads.
pub fn merge_attention_linears(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Attention(mut attention) = graph.nodes[i].op.clone() else { continue };
        let Some(operands) = graph.nodes[i].inputs.get(..3).map(<[Value]>::to_vec) else { continue };
        let (heads, kv, d) = (attention.heads, attention.kv_heads, attention.head_dim);
        let mut inputs = Vec::new();
        let mut parts = Vec::new();
        let plain = operands.iter().zip([heads * d, kv * d, kv * d]).all(|(v, width)| {
            let Op::Linear(l) = &graph.node(*v).op else { return false };
            let from = &graph.node(*v).inputs;
            if inputs.is_empty() {
                inputs.push(from[0]);
            }
            inputs.extend(&from[1..]);
            parts.extend(&l.parts);
            only_user(graph, graph.users(), *v).is_some()
                && from[0] == inputs[0]
                && l.norm.is_none()
                && !l.residual
                && l.activation == Activation::None
                && graph.meta(*v).shape.last().and_then(Dim::as_fixed) == Some(width)
        });
        if !plain || attention.columns != [0; 3] {
            continue;
        }
        let scope = graph.nodes[i].scope.clone();
        let linear = Linear { parts, ..Linear::plain(false) };
        let merged = graph.push(Op::Linear(linear), inputs, &scope)?;
        attention.columns = [0, heads * d, (heads + kv) * d];
        let rest = graph.nodes[i].inputs[3..].to_vec();
        let inputs = [merged; 3].into_iter().chain(rest).collect();
        let fused = graph.push(Op::Attention(attention), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}
