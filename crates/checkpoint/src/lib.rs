//! Checkpoint folders, safetensors, GGUF and `.pglm` files, read and written behind
//! [`WeightSource`](pocketglm_tensor::WeightSource).
//!
//! Start at [`Checkpoint::open`] for whatever holds a model, at [`export_gguf`], [`export_pglm`] and
//! [`SafetensorsWriter`] for writing one, and at [`Renamed`] and [`check_tensors`] for fitting its tensor names to a
//! model's.
//!
//! This crate knows nothing of graphs, and of models only what GGUF files call their tensors: which names and shapes
//! a model wants is given to it.
//!
//! Invariant: every byte range of an opened file was checked against the file's length, so that no later
//! call can reach outside it; and no file stands under its final name before all its bytes are on disk.

#![deny(unsafe_code)]

mod check;
mod checkpoint;
mod chunks;
mod error;
mod fields;
mod file;
mod finite;
mod gguf;
mod index;
// The one place with `unsafe`: a file mapping has no safe interface.
#[allow(unsafe_code)]
mod mapped;
mod names;
mod pglm;
mod safetensors;
pub mod synth;
mod target;
#[cfg(test)]
mod test_support;
mod writer;

pub use check::{ExpectedTensor, Misshapen, TensorProblems, check_tensors};
pub use checkpoint::{Checkpoint, OpenOptions};
pub use error::Error;
pub use fields::Fields;
pub use file::{check_target, write_atomic};
pub use finite::first_non_finite;
pub use gguf::{
    Convert, Converted, GgufArray, GgufExport, GgufFile, GgufMeta, GgufValue, GgufWriter, check_gguf,
    export_gguf, gguf_formats, to_plain,
};
pub use mapped::{FileBytes, ReadMode, system_memory};
pub use names::{NameRules, Renamed};
pub use pglm::{PglmContents, PglmFile, PglmWriter, RowMaker, Unchecked, export_pglm};
pub use safetensors::{MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, SafetensorsFile};
pub use writer::SafetensorsWriter;

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
