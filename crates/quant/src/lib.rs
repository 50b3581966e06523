//! Quantised weights: rows of numbers to the bytes of a format and back, and choosing those bytes well.
//!
//! This crate knows nothing of models, files or graphs: it takes rows of values (and what is known of the
//! activations that meet them) and gives bytes. Start at [`quantise_row`] and [`dequantise_row`];
//! [`take_apart`] gives kernels a row's codes and scales, [`gptq`], [`awq`] and [`hadamard`] make the
//! bytes better than rounding does, [`stats`] gathers what those need and [`report`] measures the result.
//!
//! Invariant: `dtype.row_bytes(k)` bytes and `k` values belong together, and every function checks it.

#![forbid(unsafe_code)]

pub mod awq;
mod blocks;
mod codes;
mod dequantise;
mod error;
mod factor;
pub mod gptq;
pub mod hadamard;
mod quantise;
pub mod report;
pub mod stats;

pub use codes::{put_together, take_apart};
pub use dequantise::dequantise_row;
pub use error::{Error, Result};
pub use pocketglm_tensor::RowCodes;
pub use quantise::{Method, RowOptions, quantise_codes, quantise_row, range};

#[cfg(test)]
pub(crate) mod tests;
