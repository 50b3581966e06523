//! A file that is to be written, and the files that must survive that.

use std::io::Write;
use std::path::{Path, PathBuf};

use pocketglm_checkpoint::{Checkpoint, OpenOptions, check_target, write_atomic};

use crate::{EngineOptions, Error, Result};

/// The name of a file that is to be written, with everything that must not be lost by that: the files that the work
/// reads, and whatever is no regular file.
///
/// Ask [`OutFile::check`] before long work, so that a refusal costs nothing, and again before the writing.
#[derive(Clone, Debug)]
pub struct OutFile {
    path: PathBuf,
    overwrite: bool,
    inputs: Vec<PathBuf>,
}

impl OutFile {
    /// The file `path`; one that stands there is replaced with `overwrite`.
    pub fn new(path: impl Into<PathBuf>, overwrite: bool) -> OutFile {
        OutFile { path: path.into(), overwrite, inputs: Vec::new() }
    }

    /// Adds files that are read and so must not be replaced, with or without `overwrite`.
    pub fn keeping(mut self, inputs: impl IntoIterator<Item = impl Into<PathBuf>>) -> OutFile {
        self.inputs.extend(inputs.into_iter().map(Into::into));
        self
    }

    /// Adds every file of a model or a speech checkpoint: weights, side files, a vision file, an adapter.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the model cannot be opened.
    pub fn keeping_model(self, path: impl AsRef<Path>, options: &EngineOptions) -> Result<OutFile> {
        let (mode, mmproj) = (options.read_mode, options.mmproj.clone());
        let open = OpenOptions { mode, mmproj, check_finite: false };
        let checkpoint = Checkpoint::open(path, &open)?;
        Ok(self.keeping(checkpoint.files()).keeping(&options.adapter))
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a name whose file must not be replaced.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file is one that is read, by whatever names the two go, or is no regular file;
    /// [`Error::Exists`] where one stands there that is not to be replaced.
    pub fn check(&self) -> Result<()> {
        check_target(&self.path, &self.inputs)?;
        if !self.overwrite && std::fs::symlink_metadata(&self.path).is_ok() {
            return Err(Error::Exists { path: self.path.clone() });
        }
        Ok(())
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// As [`OutFile::check`], and what the file system reports.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.check()?;
        Ok(write_atomic(&self.path, |file| file.write_all(bytes))?)
    }
}
