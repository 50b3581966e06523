//! Pictures to rows for the decoder: decoding, resizing, patches, and the GLM-4.1V vision encoder as graph functions.
//!
//! Start at [`preprocess`]: [`preprocess::Image::decode`], then [`preprocess::preprocess_image`]; [`encoder`] appends
//! the model to a graph. This crate knows nothing of text, tokens or the language model, and nothing of GPUs.
//!
//! Invariant: whatever a picture or a config file holds, the answer is a value or a typed [`Error`]; no panic, and
//! no allocation past the declared limits.

#![forbid(unsafe_code)]

mod config;
mod encoder;
mod error;
pub mod preprocess;

pub use config::VisionConfig;
pub use encoder::encoder;
pub use error::{Error, Result};
