//! The GLM-4 decoder of the GLM-4.1V family: graph functions, 3-D positions, tensor names, sampling.
//!
//! Start at [`decoder`], which appends the model to a graph, and [`TextConfig`], which reads its sizes from a
//! checkpoint. [`positions`] places text and picture tokens, [`Sampler`] chooses the next token.
//!
//! [`Fusion`] brings what other encoders see and hear into the sequence.
//!
//! This crate knows nothing of wgpu, image files, audio files or tokenizers: pictures and sounds arrive as rows.
//!
//! Invariant: one implementation serves every checkpoint of the family; sizes come from the configuration alone.

#![forbid(unsafe_code)]

mod config;
mod decoder;
mod error;
mod fusion;
mod names;
mod positions;
mod sampling;

pub use config::{TextConfig, VisualTokens};
pub use decoder::{BEST, TOP, Trace, decoder};
pub use error::Error;
pub use fusion::{AUDIO_SCOPE, AudioTokens, Fusion, Modality};
pub use names::LAYOUTS;
pub use positions::{Grid, Positions, TokenKind, positions, token_kinds};
pub use sampling::{Sampler, Sampling};

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
