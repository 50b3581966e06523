//! The GPU kernels: WGSL sources, and the small preprocessor that makes variants of them.
//!
//! Start at [`Variant`]: a file and its definitions give the source that a device compiles, and [`bindings`] says what
//! the source binds. This crate knows nothing of tensors, wgpu or models.
//!
//! Three kinds of lines are ours, all of them comments or plain WGSL, so that a file is readable by WGSL tools:
//! `//#include "shared/x.wgsl"`; `//#if NAME`, `//#if !NAME`, `//#else`, `//#endif`, which may be nested; and
//! `const NAME = value;`, whose value a definition replaces.
//!
//! Invariant: every file of `wgsl/` is in [`FILES`]; what is not defined is absent, never a default somewhere else.

#![forbid(unsafe_code)]

mod preprocess;

pub use preprocess::{Access, Binding, Error, Variant, bindings};

/// Every file by its name below `wgsl/`.
pub const FILES: &[(&str, &str)] = &[
    ("attention.wgsl", include_str!("../wgsl/attention.wgsl")),
    ("batch_norm.wgsl", include_str!("../wgsl/batch_norm.wgsl")),
    ("binary.wgsl", include_str!("../wgsl/binary.wgsl")),
    ("conv.wgsl", include_str!("../wgsl/conv.wgsl")),
    ("copy.wgsl", include_str!("../wgsl/copy.wgsl")),
    ("gather_rows.wgsl", include_str!("../wgsl/gather_rows.wgsl")),
    ("kv_append.wgsl", include_str!("../wgsl/kv_append.wgsl")),
    ("kv_read.wgsl", include_str!("../wgsl/kv_read.wgsl")),
    ("linear.wgsl", include_str!("../wgsl/linear.wgsl")),
    ("matmul.wgsl", include_str!("../wgsl/matmul.wgsl")),
    ("norm.wgsl", include_str!("../wgsl/norm.wgsl")),
    ("rope.wgsl", include_str!("../wgsl/rope.wgsl")),
    ("scatter_rows.wgsl", include_str!("../wgsl/scatter_rows.wgsl")),
    ("softmax.wgsl", include_str!("../wgsl/softmax.wgsl")),
    ("swiglu.wgsl", include_str!("../wgsl/swiglu.wgsl")),
    ("top_k.wgsl", include_str!("../wgsl/top_k.wgsl")),
    ("unary.wgsl", include_str!("../wgsl/unary.wgsl")),
    ("weighted_gather.wgsl", include_str!("../wgsl/weighted_gather.wgsl")),
    ("shared/functions.wgsl", include_str!("../wgsl/shared/functions.wgsl")),
    ("shared/grid.wgsl", include_str!("../wgsl/shared/grid.wgsl")),
    ("shared/kv_load.wgsl", include_str!("../wgsl/shared/kv_load.wgsl")),
    ("shared/reduce.wgsl", include_str!("../wgsl/shared/reduce.wgsl")),
    ("shared/weight.wgsl", include_str!("../wgsl/shared/weight.wgsl")),
];
