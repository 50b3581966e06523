//! The passes: small rewrites of the graph, in one visible list.
//!
//! Each pass takes the graph and says how often it applied. A pass keeps every named result and every
//! state write; its own test runs the graph before and after on numbers.

mod attention;
mod conv;
mod fewer;
mod frame_conv;
mod linear;
mod load_time;
mod norm;
mod qkv;
mod quantise;
mod taps;
#[cfg(test)]
pub(crate) mod tests;

use crate::graph::{Graph, Value};
use crate::ops::Op;

pub use attention::{attend_in_int8, fuse_attention};
pub use conv::{fold_batch_norm, fuse_conv_activation};
pub use fewer::fewer_products;
pub use frame_conv::{fuse_frame_conv_activation, fuse_frame_conv_norm};
pub use linear::{fold_added_vector, fuse_bias, fuse_linear_activation, fuse_linear_residual, fuse_swiglu};
pub use load_time::mark_load_time;
pub use norm::{fuse_norm_add, fuse_norm_add_linear, fuse_norm_linear};
pub use qkv::{fuse_qkv, merge_attention_linears};
pub use quantise::{Precision, insert_quantise};
pub use taps::{NormedLinears, Tap, matrices, normed_linears, tap_caches, tap_linear_inputs};

/// What one pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Name of the pass.
    pub pass: &'static str,
    /// How many places it rewrote.
    pub applied: usize,
    /// Compute nodes before.
    pub before: usize,
    /// Compute nodes after.
    pub after: usize,
}

/// A rewrite; returns how many places it changed.
pub type Pass = fn(&mut Graph) -> crate::Result<usize>;

/// Every pass, in the order in which they run.
pub const ALL: &[(&str, Pass)] = &[
    ("fold batch norm into convolution", fold_batch_norm),
    ("activation into convolution", fuse_conv_activation),
    ("norm into frame convolution", fuse_frame_conv_norm),
    ("activation into frame convolution", fuse_frame_conv_activation),
    ("matmul and bias into linear", fuse_bias),
    ("added vector into the bias of linear", fold_added_vector),
    ("SwiGLU into gate-up", fuse_swiglu),
    ("attention", fuse_attention),
    ("merge QKV with RoPE and KV append", fuse_qkv),
    ("merge QKV without RoPE", merge_attention_linears),
    ("norm and residual", fuse_norm_add),
    ("activation into linear", fuse_linear_activation),
    ("residual into linear", fuse_linear_residual),
    ("norm into linear", fuse_norm_linear),
    ("mark load-time nodes", mark_load_time),
];

/// Runs every pass of [`ALL`] and drops what became dead.
///
/// # Errors
/// Only where a pass builds a node that its own shape rule refuses, which is a defect of the pass.
pub fn optimise(graph: &mut Graph) -> crate::Result<Vec<Report>> {
    graph.prune_and_sort();
    ALL.iter().map(|(name, pass)| run(name, *pass, graph)).collect()
}

/// The passes that no backend can do without: load-time marking, and no fusion.
///
/// # Errors
/// As [`optimise`].
pub fn prepare(graph: &mut Graph) -> crate::Result<Vec<Report>> {
    Ok(vec![apply("mark load-time nodes", mark_load_time, graph)?])
}

/// Runs one pass and drops what became dead, and what was.
///
/// # Errors
/// As [`optimise`].
pub fn apply(name: &'static str, pass: Pass, graph: &mut Graph) -> crate::Result<Report> {
    graph.prune_and_sort();
    run(name, pass, graph)
}

/// Runs one pass on a sorted graph without dead nodes, and leaves one.
fn run(name: &'static str, pass: Pass, graph: &mut Graph) -> crate::Result<Report> {
    let (before, nodes) = (graph.compute_nodes(), graph.nodes.len());
    let applied = pass(graph)?;
    if applied > 0 || graph.nodes.len() != nodes {
        graph.prune_and_sort();
    }
    Ok(Report { pass: name, applied, before, after: graph.compute_nodes() })
}

/// The only node that uses `value`, where there is exactly one use and the value is no result of the graph.
fn only_user(graph: &Graph, users: &[Vec<usize>], value: Value) -> Option<usize> {
    match users[value.node()].as_slice() {
        [user] if !graph.is_output(value) => Some(*user),
        _ => None,
    }
}

/// `value` without the reshapes around it, provided nothing else uses what is skipped.
fn through_reshapes(graph: &Graph, users: &[Vec<usize>], mut value: Value) -> Option<Value> {
    while let Op::Reshape(_) = graph.node(value).op {
        let inner = graph.node(value).inputs[0];
        only_user(graph, users, inner)?;
        value = inner;
    }
    Some(value)
}

/// First result of node `i`.
fn result_of(i: usize) -> Value {
    Value { node: i as u32, port: 0 }
}
