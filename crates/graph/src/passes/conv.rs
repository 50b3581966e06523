use pocketglm_tensor::Tensor;

use super::{only_user, result_of};
use crate::dim::product;
use crate::graph::{Graph, Value};
use crate::ops::{Activation, Binary, BinaryKind, Constant, Op, Permute, Reshape, Unary, UnaryKind};

/// `BatchNorm(Conv(x, W, b))` becomes `Conv(x, W·s, (b - mean)·s + bias)` with `s = weight·rsqrt(var + eps)`.
///
/// The new weights are load-time nodes, so the folding itself costs nothing at run time.
pub fn fold_batch_norm(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::BatchNorm(norm) = graph.nodes[i].op.clone() else { continue };
        let [x, weight, bias, mean, var] = *graph.nodes[i].inputs.as_slice() else { continue };
        let users = graph.users();
        let Op::Conv(conv) = graph.node(x).op.clone() else { continue };
        let fixed =
            |v: Value| matches!(graph.node(v).op, Op::Weight(_) | Op::Constant(_)) || graph.node(v).load_time;
        let convolution = graph.node(x).clone();
        if conv.activation != Activation::None
            || only_user(graph, users, x).is_none()
            || ![weight, bias, mean, var]
                .into_iter()
                .chain(convolution.inputs[1..].iter().copied())
                .all(fixed)
        {
            continue;
        }
        let scope = graph.nodes[i].scope.clone();
        let channels = graph.meta(weight).shape[0].clone();
        let c = channels.as_fixed().unwrap_or(0);
        let eps = Op::Constant(Constant { tensor: Tensor::from_f32(&[c], &vec![norm.eps; c])? });
        let eps = graph.push(eps, vec![], &scope)?;
        let mut binary = |kind, a, b| graph.push(Op::Binary(Binary { kind }), vec![a, b], &scope);
        let spread = binary(BinaryKind::Add, var, eps)?;
        let centred = binary(BinaryKind::Sub, convolution.inputs[2], mean)?;
        let inverse = graph.push(Op::Unary(Unary { kind: UnaryKind::Rsqrt }), vec![spread], &scope)?;
        let mut binary = |kind, a, b| graph.push(Op::Binary(Binary { kind }), vec![a, b], &scope);
        let scale = binary(BinaryKind::Mul, weight, inverse)?;
        let shifted = binary(BinaryKind::Mul, centred, scale)?;
        let new_bias = binary(BinaryKind::Add, shifted, bias)?;
        // The scale belongs to the first dimension of the kernel, and broadcasting is over the last one.
        let shape = graph.meta(convolution.inputs[1]).shape.clone();
        let flat = vec![channels, product(&shape[1..])];
        let w =
            graph.push(Op::Reshape(Reshape { shape: flat.clone() }), vec![convolution.inputs[1]], &scope)?;
        let turn = || Op::Permute(Permute { order: vec![1, 0] });
        let w = graph.push(turn(), vec![w], &scope)?;
        let w = graph.push(Op::Binary(Binary { kind: BinaryKind::Mul }), vec![w, scale], &scope)?;
        let w = graph.push(turn(), vec![w], &scope)?;
        let w = graph.push(Op::Reshape(Reshape { shape }), vec![w], &scope)?;
        let folded =
            graph.push(Op::Conv(conv), vec![convolution.inputs[0], w, new_bias], &convolution.scope)?;
        graph.replace(result_of(i), folded);
        applied += 1;
    }
    Ok(applied)
}

/// `activation(Conv(..))` becomes one node.
pub fn fuse_conv_activation(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Unary(Unary { kind }) = graph.nodes[i].op else { continue };
        let x = graph.nodes[i].inputs[0];
        let (Some(activation), Op::Conv(mut conv)) = (element_wise(kind), graph.node(x).op.clone()) else {
            continue;
        };
        if conv.activation != Activation::None || only_user(graph, graph.users(), x).is_none() {
            continue;
        }
        conv.activation = activation;
        let (inputs, scope) = (graph.node(x).inputs.clone(), graph.node(x).scope.clone());
        let fused = graph.push(Op::Conv(conv), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}

/// The fused form of an element-wise function, where there is one.
pub(super) fn element_wise(kind: UnaryKind) -> Option<Activation> {
    match kind {
        UnaryKind::Relu => Some(Activation::Relu),
        UnaryKind::Silu => Some(Activation::Silu),
        UnaryKind::Gelu => Some(Activation::Gelu),
        _ => None,
    }
}
