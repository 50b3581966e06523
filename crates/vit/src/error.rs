//! The one error type of this crate.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What a picture, a preprocessing config or a request got wrong; every message says what was wanted and found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The preprocessing config is not JSON of the expected form.
    #[error("preprocessor config: {reason}")]
    ConfigSyntax {
        /// The parser's message.
        reason: String,
    },
    /// A field of the preprocessing config has a value that cannot be used.
    #[error("preprocessor config: `{field}` must be {wanted}, found {found}")]
    ConfigValue {
        /// Name of the field, with a dot for nested ones.
        field: &'static str,
        /// What is accepted.
        wanted: String,
        /// The value in the file.
        found: String,
    },
    /// The bytes are not a picture of a supported format, or a broken one.
    #[error("cannot decode the {format} picture: {reason}")]
    Decode {
        /// `png`, `jpeg` or `webp`.
        format: &'static str,
        /// The decoder's message.
        reason: String,
    },
    /// The first bytes match no supported format.
    #[error("picture must be png, jpeg or webp, found {found}")]
    UnknownFormat {
        /// The first bytes in hexadecimal, or `no bytes`.
        found: String,
    },
    /// A picture goes past a limit of [`DecodeLimits`](crate::preprocess::DecodeLimits).
    #[error("picture limit: {what} must be at most {limit}, found {found}")]
    Limit {
        /// The limited quantity.
        what: &'static str,
        /// The largest accepted value.
        limit: u64,
        /// The value that the picture asks for.
        found: u64,
    },
    /// A data URL is not `data:image/...;base64,...`.
    #[error("data url: {reason}")]
    DataUrl {
        /// What is wrong with it.
        reason: String,
    },
    /// Sizes that do not fit together.
    #[error("{what} must be {wanted}, found {found}")]
    Size {
        /// What has the size.
        what: &'static str,
        /// What is accepted.
        wanted: String,
        /// What was given.
        found: String,
    },
    /// The picture is too long and thin for the model.
    #[error("aspect ratio must be at most 200, found {found} ({height}x{width})")]
    AspectRatio {
        /// Height after small pictures were enlarged to one token.
        height: usize,
        /// Width, likewise.
        width: usize,
        /// The longer side over the shorter.
        found: f64,
    },
    /// A buffer could not be had from the operating system.
    #[error("no memory for {bytes} bytes of {what}")]
    OutOfMemory {
        /// What the buffer is for.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
}

impl Error {
    pub(crate) fn size(what: &'static str, wanted: impl Into<String>, found: impl ToString) -> Self {
        Error::Size { what, wanted: wanted.into(), found: found.to_string() }
    }
}

/// An empty vector with room for exactly `len` items, or a typed error; `None` is a size that overflowed.
pub(crate) fn reserve<T>(what: &'static str, len: Option<usize>) -> Result<Vec<T>> {
    let bytes = len.and_then(|n| n.checked_mul(size_of::<T>())).map_or(u64::MAX, |n| n as u64);
    let mut v = Vec::new();
    let reserved = len.map(|n| v.try_reserve_exact(n));
    match reserved {
        Some(Ok(())) => Ok(v),
        _ => Err(Error::OutOfMemory { what, bytes }),
    }
}
