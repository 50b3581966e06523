//! Runs AutoGLM-Phone-9B and its family (GLM-4.1V) on the device itself: pictures, sounds and text in, text out.
//! Wav2Vec2 checkpoints turn speech into text by themselves.
//!
//! ```no_run
//! use pocketglm::{Model, Prompt};
//!
//! # fn main() -> pocketglm::Result<()> {
//! let model = Model::open("AutoGLM-Phone-9B")?;
//! let prompt = Prompt::new().image("screenshot.png").text("打开设置");
//! let mut chat = model.chat();
//! for piece in chat.answer(&prompt)? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Start at [`Model::open`], or at [`Recogniser::open`] for speech alone. [`Model`] is `Send + Sync + Clone`; a [`Chat`] is `Send` and keeps the conversation, its
//! KV cache and the pictures it has seen. [`Engine`] and [`Session`] below them give every step by itself: prompts,
//! memory plans, traces, timings.
//!
//! This crate knows nothing of terminals, HTTP or async runtimes: an answer is a blocking iterator, work happens in
//! `next`, and dropping it stops the work.
//!
//! Invariant: no type of a third-party crate is part of this interface, and nothing that a checkpoint, a picture or a
//! prompt contains makes it panic.

#![forbid(unsafe_code)]

#[cfg(feature = "wgpu")]
pub mod gpu;
mod model;

pub use model::{Chat, Model, Prompt};
pub use pocketglm_engine::{
    Arithmetic, AudioLimits, AudioPrecision, Backend, Cancel, Chunking, Content, ContentFormat, Cost, DType,
    DeviceFault, DevicePoint, Engine, EngineOptions, Error, Fallback, FinishReason, GenerateOptions,
    Generation, KvFormat, Level, MemoryPlan, MemoryUse, Message, ModelInfo, OpPlace, OpProfile, OpRange,
    OutFile, Parameters, Part, Picture, Piece, Placement, Progress, ProgressFn, Prompt as PreparedPrompt,
    ReadMode, Recogniser, RecogniserInfo, Request, Result, RunProfile, Sampling, Session, Sound, Stream,
    Tensor, Timings, Trace, TranscribeOptions, Transcript, Word, quantise, to_device_pixels,
};
