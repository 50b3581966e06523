//! Host tensors and the CPU kernels that work on them.
//!
//! Start at [`Tensor`] for data, [`WeightSource`] for where weights come from, and [`ops`] for kernels,
//! which run on a [`Cpu`] (instruction set + thread pool). Every kernel in [`ops`] has a plain scalar
//! twin (`*_twin`) that is written from the formula and is what the tests compare against.
//!
//! This crate knows nothing of files, graphs, models or GPUs.
//!
//! Invariant: a [`Tensor`] holds exactly `dtype.bytes(shape)` bytes. Constructors check it.

#![deny(unsafe_code)]

mod bytes;
mod dtype;
mod error;
mod kv;
#[allow(unsafe_code, reason = "kernels: vector loads and stores, rows split between threads")]
pub mod ops;
mod packed;
#[allow(unsafe_code, reason = "the loop of byte products loads through pointers")]
pub mod peak;
#[allow(unsafe_code, reason = "a borrowed closure is handed to threads that outlive it")]
mod pool;
#[allow(unsafe_code, reason = "vector instructions")]
mod simd;
mod tensor;
mod weight;

pub use bytes::{AlignedF32, Bytes, BytesOwner};
pub use dtype::{Affine, Block, DType, Group};
pub use error::Error;
pub use kv::{KvFormat, KvRows};
pub use packed::{IQ4_TABLE, Packed, PackedFormat, RowCodes, ScaleKind, ZeroKind};
pub use pool::Cpu;
pub use simd::{Isa, Vectorise};
pub use tensor::{Tensor, TensorInfo, WeightSource};
pub use weight::Weight;

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
