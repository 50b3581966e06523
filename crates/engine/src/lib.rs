//! Runs a checkpoint: loads it inside a memory budget, turns messages, pictures and sounds into prompts, generates.
//!
//! Start at [`Engine::open`]; [`Engine::session`] gives a conversation, [`Session::generate`] an iterator of
//! pieces. [`Recogniser::open`] runs a checkpoint that turns speech into text. This crate knows nothing of wgpu, HTTP, terminals or command lines.
//!
//! Invariants: an [`Engine`] is `Send + Sync + Clone` and immutable; what a conversation changes belongs to its
//! [`Session`], so no session can see another's tokens. Nothing large is allocated before the memory plan fits.

#![forbid(unsafe_code)]

mod ahead;
mod audio;
mod engine;
mod error;
mod fallback;
mod model;
mod options;
mod out_file;
mod picture;
mod placement;
mod plan;
mod prompt;
pub mod quantise;
mod range;
mod read_tokenizer;
mod recogniser;
mod request;
mod session;
mod sound;
mod trace;

pub use engine::Engine;
pub use error::Error;
pub use model::{ModelInfo, Parameters};
pub use options::{Cancel, EngineOptions, Fallback, GenerateOptions, Progress, ProgressFn};
pub use out_file::OutFile;
pub use picture::Picture;
pub use placement::Placement;
pub use plan::{MemoryPlan, MemoryUse};
pub use pocketglm_bpe::ContentFormat;
pub use pocketglm_checkpoint::ReadMode;
pub use pocketglm_glm::Sampling;
pub use pocketglm_graph::ops::Cost;
pub use pocketglm_graph::{Arithmetic, Backend, DeviceFault, OpProfile, RunProfile};
pub use pocketglm_tensor::{DType, KvFormat, Tensor};
pub use pocketglm_vit::preprocess::{DevicePoint, to_device_pixels};
pub use pocketglm_wav2vec::audio::{AudioLimits, Level};
pub use pocketglm_wav2vec::{
    Chunking, Precision as AudioPrecision, RecogniserInfo, Stream, Transcript, Word,
};
pub use prompt::Prompt;
pub use range::{OpPlace, OpRange};
pub use recogniser::{Recogniser, TranscribeOptions};
pub use request::{Content, Message, Part, Request};
pub use session::{FinishReason, Generation, Piece, Session, Timings};
pub use sound::Sound;
pub use trace::Trace;

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
