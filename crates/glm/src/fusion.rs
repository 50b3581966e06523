//! How features of other modalities get into the decoder's sequence (late fusion, one shared embedding space).
//!
//! Each encoder works alone. A linear projection brings its rows to the decoder's width, and a learned tag, the same
//! for every row, marks where they came from: `y = x · Wᵀ + b + tag`. The rows then stand where the placeholder tokens
//! of their modality are, in any order with text. Public checkpoints of the family have none of these tensors; an
//! extended checkpoint or an adapter file does:
//!
//! | tensor | shape | |
//! | --- | --- | --- |
//! | `model.audio_tower.*` | | a Wav2Vec2 encoder, named as in a bare Wav2Vec2 checkpoint |
//! | `model.audio_projection.weight`, `.bias` | `[D, H]`, `[D]` | from the encoder's width to the decoder's |
//! | `model.audio_tag` | `[D]` | |
//! | `model.image_projection.weight`, `.bias` | `[D, D]`, `[D]` | may be absent: the merger's rows are used as they are |
//! | `model.image_tag` | `[D]` | may be absent |
//!
//! A frame of audio takes one position, like a token of text ([`positions`](crate::positions) counts it as such).

use pocketglm_checkpoint::{Error, Fields};
use pocketglm_graph::{GraphBuilder, Result, Value};
use pocketglm_tensor::WeightSource;

/// Scope of the audio encoder's weights.
pub const AUDIO_SCOPE: &str = "model.audio_tower";

/// Where features come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modality {
    /// Pictures and frames of videos.
    Image,
    /// Sound.
    Audio,
}

impl Modality {
    fn word(self) -> &'static str {
        match self {
            Modality::Image => "image",
            Modality::Audio => "audio",
        }
    }
}

/// Which of a modality's fusion tensors there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fusion {
    /// `model.{modality}_projection.weight` and `.bias`.
    pub projection: bool,
    /// `model.{modality}_tag`.
    pub tag: bool,
}

impl Fusion {
    /// Everything, which audio needs.
    pub const WHOLE: Fusion = Fusion { projection: true, tag: true };

    /// What `source` has.
    pub fn found(source: &dyn WeightSource, modality: Modality) -> Fusion {
        let has = |name: String| source.info(&name).is_some();
        let word = modality.word();
        let projection = ["weight", "bias"].iter().any(|p| has(format!("model.{word}_projection.{p}")));
        Fusion { projection, tag: has(format!("model.{word}_tag")) }
    }

    /// Appends projection and tag: `x [n, features]` to `[n, width]`.
    ///
    /// # Errors
    /// Missing or misshapen weights, by name.
    pub fn apply(
        self,
        g: &mut GraphBuilder<'_>,
        modality: Modality,
        x: Value,
        width: usize,
    ) -> Result<Value> {
        let word = modality.word();
        let mut x = x;
        if self.projection {
            x = g.linear(&format!("model.{word}_projection"), x, width, true)?;
        }
        if self.tag {
            let tag = g.weight(&format!("model.{word}_tag"), &[width])?;
            x = g.add(x, tag)?;
        }
        Ok(x)
    }
}

/// Ids of the tokens that stand for sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AudioTokens {
    /// Stands for one frame of a clip.
    pub audio: u32,
    /// Begins a clip, where there is such a token.
    pub start: Option<u32>,
    /// Ends a clip, where there is such a token.
    pub end: Option<u32>,
}

impl AudioTokens {
    /// Reads `audio_token_id`, and `audio_start_token_id` and `audio_end_token_id` where they are there.
    ///
    /// # Errors
    /// [`Error::Field`] where one is missing or no token id.
    pub fn from_fields(f: &Fields<'_>) -> std::result::Result<AudioTokens, Error> {
        let ids = 0..=(1 << 24);
        let optional = |name| f.integer(name, ids.clone()).map(|id| id.map(|n| n as u32));
        Ok(AudioTokens {
            audio: f.required("audio_token_id", ids.clone())? as u32,
            start: optional("audio_start_token_id")?,
            end: optional("audio_end_token_id")?,
        })
    }
}
