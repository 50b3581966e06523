use std::io;
use std::path::{Path, PathBuf};

/// Result of this program's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Another program could not be run, or failed.
    #[error("`{command}` {what}")]
    Command {
        /// The program and its arguments.
        command: String,
        /// What happened.
        what: String,
    },
    /// A file or an answer of a program is not what it should be.
    #[error("{place}: expected {wanted}, found {found}")]
    Content {
        /// The file or program.
        place: String,
        /// What it should be.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// A check found something.
    #[error("{check} found {} problem(s):\n  {}", .problems.len(), .problems.join("\n  "))]
    Problems {
        /// The check.
        check: &'static str,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// A checkpoint or its configuration cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] pocketglm_checkpoint::Error),
    /// A kernel or the thread pool failed.
    #[error(transparent)]
    Tensor(#[from] pocketglm_tensor::Error),
    /// A graph cannot be built, rewritten or planned.
    #[error(transparent)]
    Graph(#[from] pocketglm_graph::Error),
    /// A picture's size cannot be computed.
    #[error(transparent)]
    Picture(#[from] pocketglm_vit::Error),
}

/// Attaches what was tried and the path to a system error.
pub fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, path: path.to_owned(), source }
}
