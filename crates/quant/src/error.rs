use pocketglm_tensor::DType;

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with rows of values and their quantised bytes.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The type is none that the function handles.
    #[error("{op}: expected {wanted}, found {found}")]
    DType {
        /// The function.
        op: &'static str,
        /// Types that it takes.
        wanted: &'static str,
        /// Type given.
        found: DType,
    },
    /// The format has no rows of this length.
    #[error("a row of {values} values cannot be {dtype}: no whole number of blocks, or too large")]
    RowLength {
        /// The format.
        dtype: DType,
        /// Values of the row.
        values: usize,
    },
    /// The row's bytes are too few or too many.
    #[error("a row of {values} values of type {dtype} needs {wanted} bytes, found {found}")]
    Bytes {
        /// The format.
        dtype: DType,
        /// Values of the row.
        values: usize,
        /// `dtype.row_bytes(values)`.
        wanted: usize,
        /// Bytes given.
        found: usize,
    },
    /// An operand's length does not fit the others.
    #[error("{op}: {operand} has {found} elements, expected {wanted}")]
    Size {
        /// The function.
        op: &'static str,
        /// The operand.
        operand: &'static str,
        /// Elements that the other operands imply.
        wanted: usize,
        /// Elements given.
        found: usize,
    },
    /// A value is NaN or infinite (or, where it must not be, negative).
    #[error("{what}: element {index} is {value}, expected a finite {kind}")]
    NotFinite {
        /// The operand.
        what: &'static str,
        /// Index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
        /// What is accepted: `number`, or `number of at least 0`.
        kind: &'static str,
    },
    /// A value is too large for the format's scale.
    #[error("element {index} is {value}, too large for {dtype}, whose scale would overflow")]
    Range {
        /// Index of the largest element of the block.
        index: usize,
        /// Its value.
        value: f32,
        /// The format.
        dtype: DType,
    },
    /// A parameter makes no sense.
    #[error("{op}: {what}")]
    Value {
        /// The function.
        op: &'static str,
        /// What was wanted and what was found.
        what: String,
    },
    /// Memory could not be reserved.
    #[error("cannot reserve {elements} elements for {what}")]
    OutOfMemory {
        /// Elements asked for.
        elements: usize,
        /// Their use.
        what: &'static str,
    },
    /// A kernel of the tensor crate refused.
    #[error(transparent)]
    Tensor(#[from] pocketglm_tensor::Error),
}
