//! The error type of the crate.

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong; every message names what was wanted and what was found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not JSON, or not JSON of the expected form.
    #[error("{file}: not valid at line {line} column {column}: {detail}")]
    Json {
        /// File the text came from.
        file: &'static str,
        /// Line, counted from 1.
        line: usize,
        /// Column, counted from 1.
        column: usize,
        /// What the parser says.
        detail: String,
    },
    /// Something exceeds a cap of [`crate::limits`].
    #[error("{what}: at most {limit} allowed, found {found}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The cap.
        limit: usize,
        /// The size found.
        found: usize,
    },
    /// A required field is absent.
    #[error("{file}: field `{field}` is missing")]
    Missing {
        /// File the field belongs to.
        file: &'static str,
        /// Path of the field.
        field: String,
    },
    /// A component or setting that this crate does not implement.
    #[error("`{field}` is {found}, but only {wanted} is supported")]
    Unsupported {
        /// Path of the field.
        field: String,
        /// What is supported.
        wanted: &'static str,
        /// What the file says.
        found: String,
    },
    /// Ready-made tables are not laid out as they say.
    #[error("tokenizer tables: {what}")]
    Tables {
        /// What was expected, and what was found.
        what: String,
    },
    /// Two tokens share one id.
    #[error("token id {id} belongs to both {first:?} and {second:?}")]
    DuplicateId {
        /// The id.
        id: u32,
        /// One token.
        first: String,
        /// The other token.
        second: String,
    },
    /// One token has two ids.
    #[error("token {token:?} has both id {first} and id {second}")]
    DuplicateToken {
        /// The token.
        token: String,
        /// One id.
        first: u32,
        /// The other id.
        second: u32,
    },
    /// An id beyond [`crate::limits::MAX_TOKEN_ID`].
    #[error("token {token:?} has id {id}, but ids must be below {limit}")]
    IdOutOfRange {
        /// The token.
        token: String,
        /// Its id.
        id: u64,
        /// Exclusive bound.
        limit: u32,
    },
    /// The vocabulary cannot express one of the 256 bytes.
    #[error("vocabulary has no token for byte 0x{byte:02x}")]
    MissingByte {
        /// The byte.
        byte: u8,
    },
    /// A merge is not a pair of tokens.
    #[error("merge {index}: wanted two tokens, found {found:?}")]
    MergeForm {
        /// Position in the list.
        index: usize,
        /// The entry.
        found: String,
    },
    /// A merge names or makes a token that is not in the vocabulary.
    #[error("merge {index}: token {token:?} is not in the vocabulary")]
    MergeToken {
        /// Position in the list.
        index: usize,
        /// The unknown token.
        token: String,
    },
    /// An added token is empty or cannot be matched.
    #[error("added token {id}: {detail}")]
    AddedToken {
        /// Its id.
        id: u32,
        /// What is wrong.
        detail: String,
    },
    /// The split pattern does not compile.
    #[error("split pattern {pattern:?}: {detail}")]
    Pattern {
        /// Start of the pattern.
        pattern: String,
        /// What the regex compiler says.
        detail: String,
    },
    /// The split pattern needs too much work on this text.
    #[error("split pattern {pattern:?} gave up at byte {offset} of a stretch of {length} bytes: {detail}")]
    PatternWork {
        /// Start of the pattern.
        pattern: String,
        /// Byte offset inside the stretch.
        offset: usize,
        /// Length of the stretch.
        length: usize,
        /// Which limit was met.
        detail: String,
    },
    /// The chat template does not parse, or uses a feature that is not implemented.
    #[error("chat template line {line}: {detail}")]
    TemplateSyntax {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// The chat template fails on these messages.
    #[error("chat template line {line}: {detail}")]
    TemplateRender {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// The chat template called `raise_exception`.
    #[error("chat template refuses the messages: {message}")]
    TemplateRefused {
        /// The text it gave.
        message: String,
    },
    /// The chat template used up its fuel or exceeded its output cap.
    #[error("chat template line {line}: {what} of {limit} used up")]
    TemplateBudget {
        /// Line, counted from 1.
        line: usize,
        /// Which budget.
        what: &'static str,
        /// Its size.
        limit: u64,
    },
    /// A message part that the content format cannot express.
    #[error("message {message}: {kind} content cannot be expressed in the string content format")]
    UnsupportedPart {
        /// Index of the message.
        message: usize,
        /// Kind of the part.
        kind: &'static str,
    },
    /// The text of a message contains a token that only the program may write.
    #[error("message {message}: text contains the reserved token {token:?} at byte {offset}")]
    ReservedText {
        /// Index of the message.
        message: usize,
        /// The token.
        token: String,
        /// Byte offset in that text.
        offset: usize,
    },
    /// The prompt does not have one placeholder per image or video.
    #[error("prompt has {found} {placeholder:?} placeholders for {wanted} inputs")]
    PlaceholderCount {
        /// The placeholder token.
        placeholder: String,
        /// Number of inputs given.
        wanted: usize,
        /// Number of placeholders in the prompt.
        found: usize,
    },
    /// A stop string is empty or too long.
    #[error("stop string {index}: length must be 1 to {limit} bytes, found {found}")]
    StopString {
        /// Position in the list.
        index: usize,
        /// Longest allowed.
        limit: usize,
        /// Length found.
        found: usize,
    },
}

impl Error {
    /// Wraps what `serde_json` says about `file`.
    pub(crate) fn json(file: &'static str, e: &serde_json::Error) -> Self {
        let text = e.to_string();
        // serde_json appends the position to its text; it is a field here.
        let detail = match text.rfind(" at line ") {
            Some(at) => clip(text.get(..at).unwrap_or(&text), 160),
            None => clip(&text, 160),
        };
        Error::Json { file, line: e.line(), column: e.column(), detail }
    }
}

/// The first `max` characters of a text from a file, so that no error message grows with the file.
pub(crate) fn clip(s: &str, max: usize) -> String {
    match s.char_indices().nth(max) {
        Some((at, _)) => format!("{}...", s.get(..at).unwrap_or_default()),
        None => s.to_owned(),
    }
}

/// Fails when `found` exceeds `limit`.
pub(crate) fn check_max(what: &'static str, limit: usize, found: usize) -> Result<()> {
    if found > limit { Err(Error::TooLarge { what, limit, found }) } else { Ok(()) }
}
