use super::conv::element_wise;
use super::{only_user, result_of};
use crate::graph::Graph;
use crate::ops::{Activation, ConvNorm, Op};

/// A norm of what a convolution over frames gives becomes part of it.
pub fn fuse_frame_conv_norm(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let norm = match &graph.nodes[i].op {
            Op::LayerNorm(n) => ConvNorm::Layer(n.eps),
            Op::InstanceNorm(n) => ConvNorm::Instance(n.eps),
            _ => continue,
        };
        let x = graph.nodes[i].inputs[0];
        let Op::FrameConv(mut conv) = graph.node(x).op.clone() else { continue };
        if conv.norm.is_some()
            || conv.activation != Activation::None
            || only_user(graph, graph.users(), x).is_none()
        {
            continue;
        }
        conv.norm = Some(norm);
        let inputs = graph.node(x).inputs.iter().chain(&graph.nodes[i].inputs[1..]).copied().collect();
        let scope = graph.node(x).scope.clone();
        let fused = graph.push(Op::FrameConv(conv), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}

/// `activation(FrameConv(..))` becomes one node.
pub fn fuse_frame_conv_activation(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for i in 0..graph.nodes.len() {
        let Op::Unary(unary) = &graph.nodes[i].op else { continue };
        let x = graph.nodes[i].inputs[0];
        let (Some(activation), Op::FrameConv(mut conv)) =
            (element_wise(unary.kind), graph.node(x).op.clone())
        else {
            continue;
        };
        if conv.activation != Activation::None || only_user(graph, graph.users(), x).is_none() {
            continue;
        }
        conv.activation = activation;
        let (inputs, scope) = (graph.node(x).inputs.clone(), graph.node(x).scope.clone());
        let fused = graph.push(Op::FrameConv(conv), inputs, &scope)?;
        graph.replace(result_of(i), fused);
        applied += 1;
    }
    Ok(applied)
}
