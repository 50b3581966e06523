use super::{only_user, result_of};
use crate::graph::{Graph, Value};
use crate::ops::{BinaryKind, LinearNorm, NormAdd, Op};

/// `residual + RMSNorm(x)` becomes one node.
pub fn fuse_norm_add(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Binary(b) = &graph.nodes[i].op else { continue };
        let [r, y] = *graph.nodes[i].inputs.as_slice() else { continue };
        if b.kind != BinaryKind::Add || graph.meta(r).shape != graph.meta(y).shape {
            continue;
        }
        let users = graph.users();
        let found =
            [(r, y), (y, r)].into_iter().find_map(|(residual, normed)| match &graph.node(normed).op {
                Op::RmsNorm(norm) if only_user(graph, users, normed).is_some() => {
                    Some((residual, normed, norm.eps))
                }
                _ => None,
            });
        let Some((residual, normed, eps)) = found else { continue };
        let mut inputs = vec![residual];
        inputs.extend(&graph.node(normed).inputs);
        let scope = graph.node(normed).scope.clone();
        let fused = graph.push(Op::NormAdd(NormAdd { eps }), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}

/// A norm whose only user is a linear layer becomes that layer's prologue.
pub fn fuse_norm_linear(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let norm = match &graph.nodes[i].op {
            Op::RmsNorm(n) => LinearNorm::Rms(n.eps),
            Op::LayerNorm(n) => LinearNorm::Layer(n.eps),
            _ => continue,
        };
        let users = graph.users();
        let Some(user) = only_user(graph, users, result_of(i)) else { continue };
        if graph.nodes[user].inputs[0] != result_of(i) {
            continue;
        }
        let mut op = graph.nodes[user].op.clone();
        match &mut op {
            Op::Linear(l) if l.norm.is_none() => l.norm = Some(norm),
            Op::Qkv(q) if q.norm.is_none() => q.norm = Some(norm),
            _ => continue,
        }
        let inputs = graph.nodes[i].inputs.iter().chain(&graph.nodes[user].inputs[1..]).copied().collect();
        let scope = graph.nodes[user].scope.clone();
        let ports = graph.nodes[user].outputs.len();
        let fused = graph.push(op, inputs, &scope)?;
        for port in 0..ports as u16 {
            let old = Value { node: user as u32, port };
            graph.replace(old, Value { port, ..fused });
        }
        // A node that writes states stays alive without users, so the old one has to go at once.
        graph.forget(user);
        applied += 1;
    }
    Ok(applied)
}

/// A norm with its residual whose result a layer norms again becomes part of that layer, which gives the sum as another
/// result. Not part of [`ALL`](super::ALL): it saves a dispatch, and so only helps devices on which one costs something.
pub fn fuse_norm_add_linear(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::NormAdd(add) = &graph.nodes[i].op else { continue };
        let inner = add.eps;
        let sum = result_of(i);
        let takes = |&&user: &&usize| {
            let node = &graph.nodes[user];
            let norm = match &node.op {
                Op::Linear(l) => l.norm,
                Op::Qkv(q) => q.norm,
                _ => None,
            };
            matches!(norm, Some(LinearNorm::Rms(_)))
                && node.inputs[0] == sum
                && node.inputs.iter().filter(|v| **v == sum).count() == 1
        };
        let Some(&user) = graph.users()[i].iter().find(takes) else { continue };
        let mut op = graph.nodes[user].op.clone();
        let norm = match &mut op {
            Op::Linear(l) => &mut l.norm,
            Op::Qkv(q) => &mut q.norm,
            _ => continue,
        };
        let Some(LinearNorm::Rms(outer)) = *norm else { continue };
        *norm = Some(LinearNorm::AddRms { inner, outer });
        let inputs = graph.nodes[i].inputs.iter().chain(&graph.nodes[user].inputs[1..]).copied().collect();
        let scope = graph.nodes[user].scope.clone();
        let ports = graph.nodes[user].outputs.len() as u16;
        let fused = graph.push(op, inputs, &scope)?;
        for port in 0..ports {
            let old = Value { node: user as u32, port };
            // The sum stands behind the first result.
            graph.replace(old, Value { port: if port == 0 { 0 } else { port + 1 }, ..fused });
        }
        graph.forget(user);
        graph.replace(sum, Value { port: 1, ..fused });
        applied += 1;
    }
    Ok(applied)
}
