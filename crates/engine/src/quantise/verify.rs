//! Whether a model's files are as they were written, and its weights are numbers.

use std::path::Path;

use pocketglm_checkpoint::{Checkpoint, OpenOptions};

use crate::{Cancel, EngineOptions, Error, Progress, ProgressFn, Result};

/// What [`verify_model`] found good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Weights, all of them finite.
    pub tensors: usize,
    /// Whether the files have hashes of their content, as `.pglm` files do. Without them, changed bytes that are numbers cannot
    /// be told.
    pub hashes: bool,
}

/// Reads all bytes of a model, or of a speech checkpoint: compares hashes, where it has any, and looks for NaN and infinity.
///
/// Opening does neither, for it would take as long as reading gigabytes; headers and side files are always checked. Of `options`
/// the ways of reading and `progress` count.
///
/// # Errors
/// [`Error::Checkpoint`] with what [`Checkpoint::open`], [`Checkpoint::verify`] and [`Checkpoint::check_finite`] report.
pub fn verify_model(path: impl AsRef<Path>, options: &EngineOptions) -> Result<Verified> {
    let (mode, mmproj) = (options.read_mode, options.mmproj.clone());
    let checkpoint = Checkpoint::open(path, &OpenOptions { mode, mmproj, check_finite: false })?;
    checkpoint.side_files()?;
    verify(&checkpoint, options.progress.as_ref(), &Cancel::default())?;
    checkpoint.check_finite()?;
    let tensors = pocketglm_tensor::WeightSource::tensors(&checkpoint).len();
    Ok(Verified { tensors, hashes: checkpoint.has_hashes() })
}

/// Compares hashes, where there are any.
pub(super) fn verify(checkpoint: &Checkpoint, progress: Option<&ProgressFn>, cancel: &Cancel) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    Ok(checkpoint.verify(&mut |done, total| {
        if let Some(progress) = progress {
            progress(Progress { step: "verify", done: done as usize, total: total as usize });
        }
    })?)
}
