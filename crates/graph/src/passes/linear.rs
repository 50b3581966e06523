use super::conv::element_wise;
use super::{only_user, result_of};
use crate::graph::{Graph, Value};
use crate::ops::{Activation, Binary, BinaryKind, Linear, Op};

/// The operands of `a + b` or `b + a`, where node `i` is that sum.
fn sum(graph: &Graph, i: usize) -> Option<[Value; 2]> {
    match &graph.nodes[i].op {
        Op::Binary(b) if b.kind == BinaryKind::Add => graph.nodes[i].inputs.as_slice().try_into().ok(),
        _ => None,
    }
}

/// `x · Wᵀ` becomes a [`Linear`] node, together with the bias that is added to it.
pub fn fuse_bias(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    let users = graph.users().to_vec();
    for i in 0..users.len() {
        let Op::MatMul(_) = graph.nodes[i].op else { continue };
        let [x, w] = *graph.nodes[i].inputs.as_slice() else { continue };
        let weight = |v: Value| matches!(graph.node(v).op, Op::Weight(_) | Op::Constant(_));
        // A weight that went through a format and back is one still.
        let rounded =
            |v: Value| matches!(&graph.node(v).op, Op::QuantDequant(_)) && weight(graph.node(v).inputs[0]);
        if graph.meta(w).shape.len() != 2 || !(weight(w) || rounded(w)) {
            continue;
        }
        let y = result_of(i);
        let biased = only_user(graph, &users, y).and_then(|user| match sum(graph, user)? {
            [a, b] if a == y && weight(b) && graph.meta(b).shape.len() == 1 => Some((user, b)),
            _ => None,
        });
        let scope = graph.nodes[i].scope.clone();
        let (target, inputs) = match biased {
            Some((user, b)) => (result_of(user), vec![x, w, b]),
            None => (y, vec![x, w]),
        };
        let linear = graph.push(Op::Linear(Linear::plain(biased.is_some())), inputs, &scope)?;
        graph.replace(target, linear);
        applied += 1;
    }
    Ok(applied)
}

/// A vector of the checkpoint that is added to what a linear layer gives, such as the tag of a modality, becomes part of
/// its bias, which is computed once at load time.
pub fn fold_added_vector(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Some([y, vector]) = sum(graph, i) else { continue };
        let fixed = matches!(graph.node(vector).op, Op::Weight(_) | Op::Constant(_));
        if !fixed || graph.meta(vector).shape.len() != 1 {
            continue;
        }
        let Some((linear, inputs)) = plain_linear(graph, graph.users(), y) else { continue };
        let (x, w, bias) = match (linear.parts.as_slice(), inputs) {
            ([true], &[x, w, b]) => (x, w, Some(b)),
            ([false], &[x, w]) => (x, w, None),
            _ => continue,
        };
        let scope = graph.node(y).scope.clone();
        let bias = match bias {
            Some(b) => graph.push(Op::Binary(Binary { kind: BinaryKind::Add }), vec![b, vector], &scope)?,
            None => vector,
        };
        let fused = graph.push(Op::Linear(Linear::plain(true)), vec![x, w, bias], &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}

/// The plain linear layer that makes `v`, where `v` has no other user.
fn plain_linear<'g>(graph: &'g Graph, users: &[Vec<usize>], v: Value) -> Option<(&'g Linear, &'g [Value])> {
    only_user(graph, users, v)?;
    match &graph.node(v).op {
        Op::Linear(l) if l.norm.is_none() && !l.residual && l.activation == Activation::None => {
            Some((l, &graph.node(v).inputs))
        }
        _ => None,
    }
}

/// `silu(gate) * up` becomes the epilogue of the linear layer, or of the two layers of the same operand, that
/// made gate and up.
pub fn fuse_swiglu(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Binary(b) = &graph.nodes[i].op else { continue };
        let [a, c] = *graph.nodes[i].inputs.as_slice() else { continue };
        if b.kind != BinaryKind::Mul || graph.meta(a).shape != graph.meta(c).shape {
            continue;
        }
        let users = graph.users();
        let fused = swiglu(graph, users, a, c).or_else(|| swiglu(graph, users, c, a));
        if let Some((linear, inputs, scope)) = fused {
            let y = graph.push(Op::Linear(linear), inputs, &scope)?;
            graph.replace(result_of(i), y);
            applied += 1;
        }
    }
    Ok(applied)
}

/// The fused layer for `silu(gate) * up`, where `activated` is the first factor.
fn swiglu(
    graph: &Graph,
    users: &[Vec<usize>],
    activated: Value,
    up: Value,
) -> Option<(Linear, Vec<Value>, String)> {
    let Op::Unary(silu) = &graph.node(activated).op else { return None };
    if element_wise(silu.kind) != Some(Activation::Silu) || only_user(graph, users, activated).is_none() {
        return None;
    }
    let gate = graph.node(activated).inputs[0];
    only_user(graph, users, gate)?;
    only_user(graph, users, up)?;
    if let (Op::Slice(g), Op::Slice(u)) = (&graph.node(gate).op, &graph.node(up).op) {
        // One layer, gate rows first.
        let (source, other) = (graph.node(gate).inputs[0], graph.node(up).inputs[0]);
        let shape = &graph.meta(source).shape;
        let halves = source == other
            && users[source.node()].len() == 2
            && !graph.is_output(source)
            && g.axis + 1 == shape.len()
            && u.axis == g.axis
            && g.start.as_fixed() == Some(0)
            && u.start == g.len
            && g.len == u.len
            && shape[g.axis] == g.len.clone() + u.len.clone();
        let Op::Linear(l) = &graph.node(source).op else { return None };
        if !halves || l.norm.is_some() || l.residual || l.activation != Activation::None {
            return None;
        }
        let linear = Linear { activation: Activation::SwiGlu, ..l.clone() };
        return Some((linear, graph.node(source).inputs.clone(), graph.node(source).scope.clone()));
    }
    let (g, g_inputs) = plain_linear(graph, users, gate)?;
    let (u, u_inputs) = plain_linear(graph, users, up)?;
    if g_inputs[0] != u_inputs[0] || g.parts.len() != 1 || u.parts.len() != 1 {
        return None;
    }
    let linear = Linear {
        parts: vec![g.parts[0], u.parts[0]],
        activation: Activation::SwiGlu,
        norm: None,
        residual: false,
        fewer: false,
    };
    let inputs = g_inputs.iter().chain(&u_inputs[1..]).copied().collect();
    let scope = graph.node(gate).scope.rsplit_once('.').map_or("", |(s, _)| s).to_string();
    Some((linear, inputs, scope))
}

/// `activation(linear)` becomes the layer's epilogue.
pub fn fuse_linear_activation(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Unary(unary) = &graph.nodes[i].op else { continue };
        let x = graph.nodes[i].inputs[0];
        let users = graph.users();
        let (Some(activation), Some((linear, inputs))) =
            (element_wise(unary.kind), plain_linear(graph, users, x))
        else {
            continue;
        };
        let (linear, inputs) = (Linear { activation, ..linear.clone() }, inputs.to_vec());
        let scope = graph.node(x).scope.clone();
        let y = graph.push(Op::Linear(linear), inputs, &scope)?;
        graph.replace(result_of(i), y);
        applied += 1;
    }
    Ok(applied)
}

/// `residual + linear(x)` becomes one node.
pub fn fuse_linear_residual(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Some([a, b]) = sum(graph, i) else { continue };
        if a == b || graph.meta(a).shape != graph.meta(b).shape {
            continue;
        }
        let users = graph.users();
        let found = [(b, a), (a, b)].into_iter().find(|(y, _)| plain_linear(graph, users, *y).is_some());
        let Some((y, residual)) = found else { continue };
        let Op::Linear(linear) = graph.node(y).op.clone() else { continue };
        let mut inputs = graph.node(y).inputs.clone();
        inputs.push(residual);
        let scope = graph.node(y).scope.clone();
        let fused = graph.push(Op::Linear(Linear { residual: true, ..linear }), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}
