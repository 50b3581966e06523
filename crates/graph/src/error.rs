/// What can go wrong while a graph is built, rewritten, planned, compiled or run.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Operands that do not fit the op.
    #[error("{op}: expected {wanted}, found {found}")]
    Shape {
        /// The op.
        op: &'static str,
        /// What it takes.
        wanted: String,
        /// The operands given.
        found: String,
    },
    /// A named size without a value.
    #[error("the size `{name}` is not bound")]
    Unbound {
        /// The name.
        name: &'static str,
    },
    /// A dimension that is negative or overflows under the sizes given.
    #[error("dimension {dim} has no valid size under {bindings}")]
    DimRange {
        /// The dimension.
        dim: String,
        /// The sizes.
        bindings: String,
    },
    /// An input, output or state that the program does not have, or that the caller did not give.
    #[error("{kind} `{name}` {what}")]
    Name {
        /// "input", "output" or "state".
        kind: &'static str,
        /// Its name.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A weight whose stored shape is not the model's.
    #[error("tensor `{name}` has shape {found:?}, the model needs {wanted:?}")]
    WeightShape {
        /// Name in the checkpoint.
        name: String,
        /// Shape of the model.
        wanted: Vec<usize>,
        /// Shape in the checkpoint.
        found: Vec<usize>,
    },
    /// A plan that does not fit its budget.
    #[error("{what} needs {needed} bytes, the budget leaves {available}")]
    Budget {
        /// What was planned, with its parts.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes left.
        available: u64,
    },
    /// A quantised weight cannot be read.
    #[error("tensor `{name}`, row {row}: {source}")]
    Quantised {
        /// Name in the checkpoint.
        name: String,
        /// Row of the matrix.
        row: usize,
        /// What is wrong with it.
        source: pocketglm_quant::Error,
    },
    /// A device cannot do what was asked, or failed while it did.
    #[error("{device}: {what}")]
    Device {
        /// The device.
        device: String,
        /// What kind of failure it is.
        fault: DeviceFault,
        /// What happened.
        what: String,
    },
    /// A kernel, tensor or weight source failed.
    #[error(transparent)]
    Tensor(#[from] pocketglm_tensor::Error),
    /// The same, with the node where it happened.
    #[error("{scope}: {source}")]
    In {
        /// Path of the node in the model, and the op.
        scope: String,
        /// What happened there.
        source: Box<Error>,
    },
}

/// How a device failed: what a caller can do depends on it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// There is no such device, or none that can be used.
    Absent,
    /// It is gone: what it held is lost, and it does nothing more.
    Lost,
    /// It has no memory for what was asked.
    OutOfMemory,
    /// Its limits, or what is built for it, do not suffice.
    Unsupported,
    /// Its driver refused a kernel, or gave wrong results.
    Driver,
    /// It did not answer in time.
    Timeout,
}

impl Error {
    /// The device's fault, where this error is one.
    pub fn device_fault(&self) -> Option<DeviceFault> {
        match self {
            Error::Device { fault, .. } => Some(*fault),
            Error::In { source, .. } => source.device_fault(),
            _ => None,
        }
    }

    /// This error, with the place in the model where it happened.
    pub fn at(self, scope: impl Into<String>) -> Error {
        Error::In { scope: scope.into(), source: Box::new(self) }
    }
}
