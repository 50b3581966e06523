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
    ("argmax.wgsl", include_str!("../wgsl/argmax.wgsl")),
    ("arithmetic_rate.wgsl", include_str!("../wgsl/arithmetic_rate.wgsl")),
    ("attention_combine.wgsl", include_str!("../wgsl/attention_combine.wgsl")),
    ("attention_decode_coop.wgsl", include_str!("../wgsl/attention_decode_coop.wgsl")),
    ("attention_plain.wgsl", include_str!("../wgsl/attention_plain.wgsl")),
    ("batch_norm.wgsl", include_str!("../wgsl/batch_norm.wgsl")),
    ("binary.wgsl", include_str!("../wgsl/binary.wgsl")),
    ("conv.wgsl", include_str!("../wgsl/conv.wgsl")),
    ("copy.wgsl", include_str!("../wgsl/copy.wgsl")),
    ("copy_rate.wgsl", include_str!("../wgsl/copy_rate.wgsl")),
    ("flash_attention.wgsl", include_str!("../wgsl/flash_attention.wgsl")),
    ("flash_attention_coop.wgsl", include_str!("../wgsl/flash_attention_coop.wgsl")),
    ("frame_conv.wgsl", include_str!("../wgsl/frame_conv.wgsl")),
    ("gather_rows.wgsl", include_str!("../wgsl/gather_rows.wgsl")),
    ("gemm.wgsl", include_str!("../wgsl/gemm.wgsl")),
    ("gemm_coop.wgsl", include_str!("../wgsl/gemm_coop.wgsl")),
    ("gemm_coop_db.wgsl", include_str!("../wgsl/gemm_coop_db.wgsl")),
    ("gemm_coop_m64.wgsl", include_str!("../wgsl/gemm_coop_m64.wgsl")),
    ("instance_norm.wgsl", include_str!("../wgsl/instance_norm.wgsl")),
    ("kv_append.wgsl", include_str!("../wgsl/kv_append.wgsl")),
    ("kv_read.wgsl", include_str!("../wgsl/kv_read.wgsl")),
    ("linear.wgsl", include_str!("../wgsl/linear.wgsl")),
    ("matmul.wgsl", include_str!("../wgsl/matmul.wgsl")),
    ("matvec_f.wgsl", include_str!("../wgsl/matvec_f.wgsl")),
    ("matvec_q.wgsl", include_str!("../wgsl/matvec_q.wgsl")),
    ("norm.wgsl", include_str!("../wgsl/norm.wgsl")),
    ("rope.wgsl", include_str!("../wgsl/rope.wgsl")),
    ("scatter_rows.wgsl", include_str!("../wgsl/scatter_rows.wgsl")),
    ("softmax.wgsl", include_str!("../wgsl/softmax.wgsl")),
    ("swiglu.wgsl", include_str!("../wgsl/swiglu.wgsl")),
    ("to_f16.wgsl", include_str!("../wgsl/to_f16.wgsl")),
    ("top_k.wgsl", include_str!("../wgsl/top_k.wgsl")),
    ("top_k_sort.wgsl", include_str!("../wgsl/top_k_sort.wgsl")),
    ("unary.wgsl", include_str!("../wgsl/unary.wgsl")),
    ("weighted_gather.wgsl", include_str!("../wgsl/weighted_gather.wgsl")),
    ("shared/functions.wgsl", include_str!("../wgsl/shared/functions.wgsl")),
    ("shared/gemm_coop_head.wgsl", include_str!("../wgsl/shared/gemm_coop_head.wgsl")),
    ("shared/gemm_coop_load.wgsl", include_str!("../wgsl/shared/gemm_coop_load.wgsl")),
    ("shared/gemm_epilogue.wgsl", include_str!("../wgsl/shared/gemm_epilogue.wgsl")),
    ("shared/gemm_params.wgsl", include_str!("../wgsl/shared/gemm_params.wgsl")),
    ("shared/grid.wgsl", include_str!("../wgsl/shared/grid.wgsl")),
    ("shared/kv_load.wgsl", include_str!("../wgsl/shared/kv_load.wgsl")),
    ("shared/mv_main.wgsl", include_str!("../wgsl/shared/mv_main.wgsl")),
    ("shared/mv_params.wgsl", include_str!("../wgsl/shared/mv_params.wgsl")),
    ("shared/mv_prologue.wgsl", include_str!("../wgsl/shared/mv_prologue.wgsl")),
    ("shared/reduce.wgsl", include_str!("../wgsl/shared/reduce.wgsl")),
    ("shared/w8.wgsl", include_str!("../wgsl/shared/w8.wgsl")),
    ("shared/weight.wgsl", include_str!("../wgsl/shared/weight.wgsl")),
];
