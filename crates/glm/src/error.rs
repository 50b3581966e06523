/// What can go wrong with prompts and sampling settings.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The prompt has other picture tokens than its pictures make.
    #[error("prompt position {at}: {found} {kind} tokens in a row, the next {kind} makes {wanted}")]
    VisualRun {
        /// "image" or "video frame".
        kind: &'static str,
        /// Where the run begins.
        at: usize,
        /// Tokens that the picture makes; 0 where there is no further picture.
        wanted: usize,
        /// Tokens in the run.
        found: usize,
    },
    /// Pictures that no token of the prompt stands for.
    #[error("the prompt has no tokens for {left} of its {given} {kind}s")]
    UnusedVisual {
        /// "image" or "video frame".
        kind: &'static str,
        /// Pictures without tokens.
        left: usize,
        /// Pictures given.
        given: usize,
    },
    /// A sampling setting outside its range.
    #[error("{setting} must be {wanted}, found {found}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its range.
        wanted: &'static str,
        /// The value given.
        found: String,
    },
    /// Logits that cannot be compared.
    #[error("logit of token {token} is {value}, expected a finite number")]
    NotFinite {
        /// The token.
        token: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// No logits at all.
    #[error("no logits to choose from")]
    NoLogits,
    /// A position beyond what 32 bits hold.
    #[error("the sequence is too long for 32-bit positions")]
    TooLong,
}
