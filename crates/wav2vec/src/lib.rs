//! Speech to features and text: audio files, resampling, the Wav2Vec2 encoder (Baevski et al. 2020) as graph functions,
//! CTC decoding (Graves et al. 2006), and streaming in overlapping chunks.
//!
//! Start at [`Recogniser::open`] for a checkpoint that turns speech into text, at [`audio::Clip`] for audio alone, and
//! at [`encoder`] for the model as part of another graph. Both families are one implementation: the "base" one (group
//! norm in the first convolution, norms after the residuals) and the "large" one (layer norm after every convolution,
//! norms before the blocks).
//!
//! This crate knows nothing of GLM, GPUs and text generation.
//!
//! Invariant: whatever an audio file, a microphone or a checkpoint holds, the answer is a value or a typed [`Error`];
//! no panic, and no allocation past the declared limits.

#![forbid(unsafe_code)]

pub mod audio;
mod config;
pub mod ctc;
mod encoder;
mod error;
mod recogniser;
mod stream;
mod weights;

pub use config::{FeatureNorm, SAMPLE_RATE, Wav2VecConfig};
pub use encoder::{Trace, ctc_head, encoder};
pub use error::{Error, Result};
pub use recogniser::{Recogniser, RecogniserInfo, RecogniserOptions, Transcript, Weights, Word};
pub use stream::{Chunking, Stream};
pub use weights::{Precision, Prepared, expected_tensors};
