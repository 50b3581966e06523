//! Text to token ids and back: byte-level BPE, added tokens, chat templates, streaming detokenization.
//!
//! Everything here reads untrusted files and untrusted prompts. This crate knows nothing of tensors, models,
//! images or the clock; an image is only a placeholder token that is repeated as often as the caller says.
//!
//! Start at [`Tokenizer::from_json`], or [`Tokenizer::from_tables`] for what was made of it before, and [`ChatTemplate::new`]. A prompt goes [`Message`] ->
//! [`ChatTemplate::render`] -> [`expand_placeholders`] -> [`Tokenizer::encode`]; generated ids go through
//! [`Detokenizer`] and [`StopStrings`].
//!
//! Invariant: a loaded tokenizer has one token for each of the 256 bytes, every merge names tokens that exist,
//! and no file, text or template can make a call panic, run without bound or exceed the caps in [`limits`].
#![forbid(unsafe_code)]

mod added;
mod alphabet;
mod detokenizer;
mod error;
mod json;
pub mod limits;
mod merge;
mod message;
mod placeholder;
mod split;
mod stop;
mod tables;
mod template;
mod tokenizer;
mod unicode;
mod unicode_tables;

#[cfg(test)]
mod tests;

pub use added::AddedToken;
pub use detokenizer::Detokenizer;
pub use error::{Error, Result};
pub use message::{Content, ContentFormat, Message, Part};
pub use placeholder::{Placeholders, VideoFrames, expand_placeholders};
pub use split::SplitStep;
pub use stop::{StopStrings, Stopped};
pub use tables::SharedBytes;
pub use template::{ChatTemplate, RenderOptions, template_from_config};
pub use tokenizer::{Tokenizer, TokenizerParts};
