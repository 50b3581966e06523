use crate::graph::Graph;
use crate::ops::Op;

/// Lets linear layers, convolutions over frames and attention take algorithms with fewer multiplications than their formula has, where
/// kernels find that it pays (Strassen 1969; Winograd 1980; products of spectra for long kernels). A row then depends, in
/// its last bits, on the rows beside it, and its error on their magnitudes. Not in [`ALL`](super::ALL): whoever builds an
/// encoder, whose rows are always computed together, decides.
pub fn fewer_products(graph: &mut Graph) -> crate::Result<usize> {
    let mut applied = 0;
    for node in &mut graph.nodes {
        let fewer = match &mut node.op {
            Op::Linear(linear) => &mut linear.fewer,
            Op::FrameConv(conv) => &mut conv.fewer,
            Op::Attention(attention) => &mut attention.fewer,
            _ => continue,
        };
        applied += usize::from(!std::mem::replace(fewer, true));
    }
    Ok(applied)
}
