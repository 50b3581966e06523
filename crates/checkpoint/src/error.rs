use std::io;
use std::path::{Path, PathBuf};

use crate::TensorProblems;

/// What can go wrong with checkpoint files.
///
/// Names that come from a file are shortened and have their control characters escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a configuration file that is missing or does not hold what is needed.
    #[error("{file}: `{field}` must be {wanted}, found {found}")]
    Field {
        /// The file.
        file: String,
        /// Path of the field.
        field: String,
        /// What it must hold.
        wanted: String,
        /// What it holds.
        found: String,
    },
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
    /// A folder lacks a file that it must have.
    #[error("no {wanted} in {folder}")]
    NoFile {
        /// The file, or the files of which one would do.
        wanted: String,
        /// The folder.
        folder: PathBuf,
    },
    /// A folder has several files of which just one can be meant.
    #[error("{folder} has {} {what}: {}; {hint}", names.len(), names.join(", "))]
    Several {
        /// The folder.
        folder: PathBuf,
        /// What is there several times.
        what: &'static str,
        /// The files.
        names: Vec<String>,
        /// What to do about it.
        hint: &'static str,
    },
    /// A path names something other than a regular file.
    #[error("{path} is {found}, expected a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// A file name reaches out of its folder, or is not a plain name.
    #[error("file name `{name}` in {place} is not a plain file name{wanted}")]
    FileName {
        /// The name.
        name: String,
        /// The file or folder for which it was given.
        place: PathBuf,
        /// What more is wanted of it.
        wanted: &'static str,
    },
    /// A file is larger than its kind may be.
    #[error("{path} has {found} bytes, at most {limit} are read")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes that a file of this kind may have.
        limit: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A file has not the length that it had, or was replaced while it was opened.
    #[error("{path} changed while it was in use: {what}")]
    Changed {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found.
        what: String,
    },
    /// Memory for a file's contents could not be reserved.
    #[error("cannot reserve {bytes} bytes for {path}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// The file.
        path: PathBuf,
    },
    /// The header of a safetensors file is not one.
    #[error("{path}: safetensors header at offset {offset}: {what}")]
    Header {
        /// The file.
        path: PathBuf,
        /// Byte offset in the file.
        offset: u64,
        /// What was wanted and what was found.
        what: String,
    },
    /// A tensor's entry in a safetensors header contradicts itself, its neighbours or the file.
    #[error("{path}: tensor `{tensor}` at offset {offset}: {what}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Where its data begin, as a byte offset in the file.
        offset: u64,
        /// What was wanted and what was found.
        what: String,
    },
    /// A tensor's element type is none that this program computes with.
    #[error("{path}: tensor `{tensor}` has the unsupported type {found}, expected {wanted}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type's name in the file.
        found: String,
        /// The types that the file's kind may have here.
        wanted: &'static str,
    },
    /// The header of a GGUF file is not one.
    #[error("{path}: GGUF header at offset {offset}: {what}")]
    GgufHeader {
        /// The file.
        path: PathBuf,
        /// Byte offset in the file.
        offset: u64,
        /// What was wanted and what was found.
        what: String,
    },
    /// A key of a GGUF file is missing, or does not hold what is needed.
    #[error("{path}: key `{key}` at offset {offset}: {what}")]
    GgufKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Where its value stands, as a byte offset in the file; 0 where the key is absent.
        offset: u64,
        /// What was wanted and what was found.
        what: String,
    },
    /// Two tensors have one name.
    #[error("tensor `{tensor}` occurs twice: in {first} and in {second}")]
    Duplicate {
        /// The name.
        tensor: String,
        /// The file, or the stored name, of the first.
        first: String,
        /// The file, or the stored name, of the second.
        second: String,
    },
    /// A source has no tensor of this name.
    #[error("no tensor `{tensor}` in {place}")]
    NoTensor {
        /// The tensor's name.
        tensor: String,
        /// The file or folder.
        place: PathBuf,
    },
    /// A JSON file does not parse, or is not what it should be.
    #[error("{path}: {what}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found, with line and column.
        what: String,
    },
    /// The index of a sharded checkpoint and its shards disagree.
    #[error("{path}: tensor `{tensor}`: {what}")]
    Index {
        /// The index file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was wanted and what was found.
        what: String,
    },
    /// No known naming of tensors fits the checkpoint.
    #[error("{place}: tensor names fit no known layout ({tried}): expected {wanted}, found {found}")]
    Layout {
        /// The file or folder.
        place: String,
        /// The layouts tried.
        tried: String,
        /// A name that each layout lacks.
        wanted: String,
        /// Some of the names found.
        found: String,
    },
    /// Tensors are missing, left over or misshapen.
    #[error("{0}")]
    Problems(Box<TensorProblems>),
    /// A weight is NaN or infinite.
    #[error("{path}: tensor `{tensor}`: element {index} is NaN or infinite, expected finite weights")]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Index of the first such element.
        index: usize,
    },
    /// The metadata of a `.pglm` file are missing, or contradict its tensors.
    #[error("{path}: pglm metadata: {what}")]
    Pglm {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found.
        what: String,
    },
    /// Bytes of a file are not those that were written.
    #[error("{path}: {part} is damaged: expected SHA-256 {wanted}, found {found}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The part that was hashed.
        part: String,
        /// The hash in the file.
        wanted: String,
        /// The hash of the bytes.
        found: String,
    },
    /// The source of weights that are being written fails.
    #[error("{source}")]
    Weights {
        /// What it says.
        source: pocketglm_tensor::Error,
    },
    /// A writer was given something that its file cannot hold.
    #[error("cannot write {path}: {what}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found.
        what: String,
    },
}

/// Attaches what was tried and the path to a system error.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, path: path.to_owned(), source }
}

/// A name from a file, fit for a message: at most 200 characters, control characters escaped.
pub(crate) fn shown(name: &str) -> String {
    const MOST: usize = 200;
    let mut out = String::new();
    for (n, c) in name.chars().enumerate() {
        if n == MOST {
            out.push_str("...");
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}
