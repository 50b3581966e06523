//! The one error type of this crate.

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an audio file, a microphone or a checkpoint got wrong; every message says what was wanted and found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is no WAV file, or a broken one.
    #[error("wav file: {what} must be {wanted}, found {found}")]
    Wav {
        /// The part of the file.
        what: &'static str,
        /// What is accepted.
        wanted: String,
        /// What the file has.
        found: String,
    },
    /// Audio past a limit of [`AudioLimits`](crate::audio::AudioLimits).
    #[error("audio limit: {what} must be at most {limit}, found {found}")]
    Limit {
        /// The limited quantity.
        what: &'static str,
        /// The largest accepted value.
        limit: u64,
        /// The value that the audio asks for.
        found: u64,
    },
    /// A frame that is NaN or infinite.
    #[error("audio frame {index} is {value}, expected a finite number")]
    NotFinite {
        /// Its number, counted over all channels.
        index: u64,
        /// Its value.
        value: f32,
    },
    /// Less audio than the encoder's first frame needs.
    #[error("the clip has {found} samples at 16 kHz, the encoder needs at least {wanted}")]
    TooShort {
        /// Samples of the smallest clip.
        wanted: usize,
        /// Samples of this one.
        found: usize,
    },
    /// A sampling rate or a number of channels that makes no sense.
    #[error("{what} must be {wanted}, found {found}")]
    Format {
        /// `sampling rate`, `channels`, ...
        what: &'static str,
        /// What is accepted.
        wanted: String,
        /// What was given.
        found: String,
    },
    /// Base64 or a data URL that is none.
    #[error("data url: {reason}")]
    DataUrl {
        /// What is wrong with it.
        reason: String,
    },
    /// The resampling library refused.
    #[error("resampling from {rate} Hz: {reason}")]
    Resample {
        /// The rate of the audio.
        rate: u32,
        /// The library's message.
        reason: String,
    },
    /// The checkpoint cannot be read, or does not hold what the model needs.
    #[error(transparent)]
    Checkpoint(#[from] pocketglm_checkpoint::Error),
    /// The checkpoint is of another model family.
    #[error("{place}: `model_type` must be wav2vec2, found {found}")]
    ModelType {
        /// The configuration file.
        place: String,
        /// The type in it.
        found: String,
    },
    /// Text is wanted of a checkpoint that has none.
    #[error("the checkpoint has no {what}, so it gives features and no text")]
    NoText {
        /// `lm_head.weight` or `vocab.json`.
        what: &'static str,
    },
    /// A vocabulary that cannot be used.
    #[error("vocab.json: {what}")]
    Vocabulary {
        /// What was wanted and what was found.
        what: String,
    },
    /// A setting outside its range.
    #[error("`{field}` must be {wanted}, found {found}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// What is accepted.
        wanted: String,
        /// What was given.
        found: String,
    },
    /// Results that are not finite.
    #[error("the result is not finite{}", .tensor.as_ref().map_or(String::new(), |t| format!(" because tensor {t} holds a number that is not")))]
    ResultNotFinite {
        /// The weight that is to blame, where there is one.
        tensor: Option<String>,
    },
    /// The work was stopped by its caller.
    #[error("cancelled")]
    Cancelled,
    /// A file could not be read.
    #[error("cannot read audio: {0}")]
    Io(#[from] std::io::Error),
    /// The graph could not be built, compiled or run.
    #[error(transparent)]
    Graph(#[from] pocketglm_graph::Error),
    /// A kernel or a tensor failed.
    #[error(transparent)]
    Tensor(#[from] pocketglm_tensor::Error),
}

impl Error {
    pub(crate) fn wav(what: &'static str, wanted: impl Into<String>, found: impl ToString) -> Error {
        Error::Wav { what, wanted: wanted.into(), found: found.to_string() }
    }
}
