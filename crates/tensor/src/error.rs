use crate::DType;

/// What can go wrong with host tensors, kernels and the thread pool.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes given do not match shape and dtype.
    #[error("tensor of shape {shape:?} and type {dtype} needs {wanted} bytes, found {found}")]
    ByteLength {
        /// Shape asked for.
        shape: Vec<usize>,
        /// Element type asked for.
        dtype: DType,
        /// `dtype.bytes(shape)`.
        wanted: usize,
        /// Bytes given.
        found: usize,
    },
    /// `dtype.bytes(shape)` does not exist: a row that is no multiple of the format's block, or an overflow.
    #[error(
        "a tensor of shape {shape:?} cannot be of type {dtype}: too large, or rows that are no whole blocks"
    )]
    TooLarge {
        /// Shape asked for.
        shape: Vec<usize>,
        /// Element type asked for.
        dtype: DType,
    },
    /// An operand has another type than the kernel takes.
    #[error("{op}: expected {wanted}, found {found}")]
    DType {
        /// The kernel.
        op: &'static str,
        /// Types that it takes.
        wanted: &'static str,
        /// Type given.
        found: DType,
    },
    /// An operand's size does not fit the kernel's other operands.
    #[error("{op}: {operand} has {found} elements, expected {wanted}")]
    Size {
        /// The kernel.
        op: &'static str,
        /// The operand's name in the kernel's documentation.
        operand: &'static str,
        /// Elements that the other operands imply.
        wanted: usize,
        /// Elements given.
        found: usize,
    },
    /// An operand's value makes no sense for the kernel (an index out of range, a zero divisor).
    #[error("{op}: {what}")]
    Value {
        /// The kernel.
        op: &'static str,
        /// What was wanted and what was found.
        what: String,
    },
    /// The source has no tensor of this name.
    #[error("no tensor `{name}` in {place}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// The file or folder.
        place: String,
    },
    /// The source has the tensor but cannot give its bytes.
    #[error("tensor `{name}` in {place}: {what}")]
    Source {
        /// The tensor's name.
        name: String,
        /// The file or folder, with an offset where there is one.
        place: String,
        /// What was wanted and what was found.
        what: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start worker thread {index} of {threads}: {source}")]
    Thread {
        /// Index of the worker.
        index: usize,
        /// Threads asked for.
        threads: usize,
        /// The system's error.
        source: std::io::Error,
    },
    /// Memory could not be reserved.
    #[error("cannot reserve {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Their use.
        what: String,
    },
}
