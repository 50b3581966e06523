//! Whole files as shared bytes, mapped or copied. The only module with `unsafe`.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapOptions};
use pocketglm_tensor::{AlignedF32, Bytes, BytesOwner};

use crate::error::io_error;
use crate::file::open_regular;
use crate::{Error, Result};

/// How a file's bytes come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// Map the file: opening is instant, and the system may drop pages and read them again. The file must
    /// not be shortened or rewritten in place while it is in use: on Unix the process would get SIGBUS.
    /// (Replacing it by renaming another over it is harmless.)
    #[default]
    Map,
    /// Copy the file into memory, as many bytes as it is long: for files that others may truncate or
    /// rewrite.
    Read,
}

/// A regular file's bytes, mapped or copied, of the length that it had when opened.
#[derive(Debug)]
pub struct FileBytes {
    path: PathBuf,
    bytes: Bytes,
    /// Kept where mapped, so that the length can be asked for again.
    mapped: Option<Arc<File>>,
}

impl FileBytes {
    /// Opens `path`, following symbolic links. Anything but a regular file is refused without waiting
    /// for it; an empty file gives no bytes.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotAFile`], [`Error::Changed`] where the file's length changes meanwhile,
    /// [`Error::OutOfMemory`] in mode [`ReadMode::Read`].
    pub fn open(path: &Path, mode: ReadMode) -> Result<FileBytes> {
        let (mut file, length) = open_regular(path)?;
        let out_of_memory = || Error::OutOfMemory { bytes: length, path: path.to_owned() };
        let wanted = usize::try_from(length).map_err(|_| out_of_memory())?;
        let this = match mode {
            _ if wanted == 0 => {
                FileBytes { path: path.to_owned(), bytes: Bytes::from(Vec::new()), mapped: None }
            }
            ReadMode::Map => {
                let map = map(&file, wanted).map_err(io_error("map", path))?;
                let file = Arc::new(file);
                let bytes = Bytes::from_owner(Arc::new(Mapping { map, file: file.clone() }));
                FileBytes { path: path.to_owned(), bytes, mapped: Some(file) }
            }
            ReadMode::Read => {
                // A buffer aligned like a mapping, so that aligned tensors in the file stay aligned.
                let mut buffer = AlignedF32::zeroed(wanted.div_ceil(4)).map_err(|_| out_of_memory())?;
                let whole: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
                let Some(room) = whole.get_mut(..wanted) else { return Err(out_of_memory()) };
                file.read_exact(room).map_err(io_error("read", path))?;
                let bytes = Bytes::from(buffer).slice(0..wanted).ok_or_else(out_of_memory)?;
                check_length(path, &file, length)?;
                FileBytes { path: path.to_owned(), bytes, mapped: None }
            }
        };
        this.check_length()?;
        Ok(this)
    }

    /// Bytes that are in memory already, under the name `path` in messages.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Bytes) -> FileBytes {
        FileBytes { path: path.into(), bytes, mapped: None }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Asks whether a mapped file still has the length that it had: cheap, and better than SIGBUS.
    ///
    /// # Errors
    /// [`Error::Changed`] or [`Error::Io`].
    pub fn check_length(&self) -> Result<()> {
        match &self.mapped {
            Some(file) => check_length(&self.path, file, self.bytes.len() as u64),
            None => Ok(()),
        }
    }
}

fn check_length(path: &Path, file: &File, wanted: u64) -> Result<()> {
    let found = file.metadata().map_err(io_error("inspect", path))?.len();
    if found != wanted {
        let what = format!("it had {wanted} bytes when opened, now {found}");
        return Err(Error::Changed { path: path.to_owned(), what });
    }
    Ok(())
}

/// A mapped file.
struct Mapping {
    map: Mmap,
    file: Arc<File>,
}

/// Pages are at most so large on the systems that this runs on.
#[cfg(unix)]
const PAGE: usize = 64 << 10;

/// Bytes that come into the process's tables with one of them where they are in memory: what Linux has.
const AROUND: usize = 64 << 10;

impl BytesOwner for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        // Pages that other bytes share stay.
        let (begin, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if begin < end && end <= self.map.len() {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is a file's and read-only, so what is dropped is read again from the file, the
            // same as before.
            let _ = unsafe { self.map.unchecked_advise_range(advice, begin, end - begin) };
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn forget(&self, range: Range<usize>) {
        use rustix::fs::{Advice, fadvise};
        // What is in a page table stays in the cache.
        self.release(range.clone());
        if let Some(length) = std::num::NonZeroU64::new(range.len() as u64) {
            let _ = fadvise(&self.file, range.start as u64, Some(length), Advice::DontNeed);
        }
    }

    fn prefetch(&self, range: Range<usize>) {
        // A read of one byte brings its surroundings with it. Where a system has a call for it, that holds up every other change
        // of the process's memory for as long, and takes longer.
        for byte in self.map.get(range).unwrap_or_default().iter().step_by(AROUND) {
            std::hint::black_box(*byte);
        }
    }
}

/// Bytes of memory that this system has; `None` where it does not say.
pub fn system_memory() -> Option<u64> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let info = rustix::system::sysinfo();
        (info.totalram as u64).checked_mul(u64::from(info.mem_unit))
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    None
}

/// Maps the first `length` bytes of a regular file, read-only.
fn map(file: &File, length: usize) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and private to this process, and `length` is the file's length as
    // just reported. What no program can rule out is that someone else shortens or rewrites the file in
    // place: `ReadMode::Map` names that as the caller's duty, `ReadMode::Read` is there where it cannot be
    // met, and `check_length` is asked before each tensor is handed out. No reference from the mapping
    // to anything but plain bytes is made, so that changed bytes are wrong values, not broken types.
    unsafe { MmapOptions::new().len(length).map(file) }
}
