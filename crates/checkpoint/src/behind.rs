//! Hashing and writing on a thread of its own, while the next bytes are made.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use crate::error::io_error;
use crate::file::AtomicFile;
use crate::{Error, Result};

/// Pieces that may wait for the thread; more make the caller wait.
const WAITING: usize = 2;

/// Bytes on their way into the file.
struct Piece {
    at: u64,
    bytes: Vec<u8>,
    /// The hash that they belong to, by number.
    hash: Option<usize>,
}

/// A file that takes pieces in any order. Where no thread can be had, as on the web, the caller's writes.
pub(crate) struct Behind {
    path: PathBuf,
    here: Option<Target>,
    pieces: Option<SyncSender<Piece>>,
    thread: Option<JoinHandle<Result<Target>>>,
}

/// The file and the hashes of what was written.
pub(crate) struct Target {
    path: PathBuf,
    file: AtomicFile,
    /// Where the next byte goes unless the file is moved.
    position: u64,
    hashes: Vec<Sha256>,
}

impl Target {
    fn write(&mut self, piece: &Piece) -> Result<()> {
        if let Some(hash) = piece.hash.and_then(|i| self.hashes.get_mut(i)) {
            hash.update(&piece.bytes);
        }
        self.put(piece.at, &piece.bytes)
    }

    /// Writes bytes that belong to no hash.
    pub fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        if at != self.position {
            self.file.out.seek(SeekFrom::Start(at)).map_err(io_error("seek in", &self.path))?;
        }
        self.file.out.write_all(bytes).map_err(io_error("write", &self.path))?;
        self.position = at + bytes.len() as u64;
        Ok(())
    }

    /// The hashes of all pieces, in their order; there are none left.
    pub fn digests(&mut self) -> Vec<[u8; 32]> {
        self.hashes.drain(..).map(|hash| hash.finalize().into()).collect()
    }

    /// See [`AtomicFile::commit`].
    pub fn commit(self) -> Result<()> {
        self.file.commit()
    }
}

impl Behind {
    /// Writes to `file`, which becomes `path`, with `hashes` hashes.
    pub fn new(path: &Path, file: AtomicFile, hashes: usize) -> Behind {
        let target = Target { path: path.to_owned(), file, position: 0, hashes: vec![Sha256::new(); hashes] };
        let mut this = Behind { path: path.to_owned(), here: None, pieces: None, thread: None };
        let (give, take) = sync_channel(WAITING);
        // Handed over behind the start, so that it is still here where there is none.
        let (hand, get) = sync_channel(1);
        match std::thread::Builder::new().name("pglm-writer".into()).spawn(move || serve(&get, &take)) {
            Ok(thread) => {
                // There is room for one, and the thread waits for it.
                let _ = hand.send(target);
                (this.pieces, this.thread) = (Some(give), Some(thread));
            }
            Err(_) => this.here = Some(target),
        }
        this
    }

    /// Hashes and writes bytes sometime.
    ///
    /// # Errors
    /// [`Error::Io`] of this piece or one before: then the file is of no more use.
    pub fn put(&mut self, at: u64, bytes: Vec<u8>, hash: Option<usize>) -> Result<()> {
        let piece = Piece { at, bytes, hash };
        if let Some(target) = &mut self.here {
            return target.write(&piece);
        }
        if self.pieces.as_ref().is_some_and(|pieces| pieces.send(piece).is_ok()) {
            return Ok(());
        }
        // The thread has ended, which it does on an error alone.
        self.join().and_then(|_| Err(self.lost()))
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// [`Error::Io`] of any piece.
    pub fn finish(mut self) -> Result<Target> {
        self.join()
    }

    fn join(&mut self) -> Result<Target> {
        self.pieces = None;
        match (self.here.take(), self.thread.take()) {
            (Some(target), _) => Ok(target),
            (None, Some(thread)) => thread.join().unwrap_or_else(|_| Err(self.lost())),
            (None, None) => Err(self.lost()),
        }
    }

    fn lost(&self) -> Error {
        Error::Write { path: self.path.clone(), what: "writing has failed before".into() }
    }
}

impl Drop for Behind {
    /// The temporary file is gone when this is.
    fn drop(&mut self) {
        self.pieces = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(target: &Receiver<Target>, pieces: &Receiver<Piece>) -> Result<Target> {
    let Ok(mut target) = target.recv() else {
        return Err(Error::Write { path: PathBuf::new(), what: "there is no file".into() });
    };
    for piece in pieces {
        target.write(&piece)?;
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    fn open(dir: &TempDir) -> (PathBuf, Behind) {
        let path = dir.path().join("out");
        let file = AtomicFile::create(&path).unwrap();
        (path.clone(), Behind::new(&path, file, 2))
    }

    #[test]
    fn pieces_land_where_they_belong_and_hashes_follow_the_order_of_their_pieces() {
        let dir = TempDir::new();
        let (path, mut behind) = open(&dir);
        for (at, bytes, hash) in
            [(4, "efgh", Some(1)), (0, "abcd", Some(0)), (8, "ij", Some(1)), (10, "k", None)]
        {
            behind.put(at, bytes.into(), hash).unwrap();
        }
        let mut target = behind.finish().unwrap();
        let sha = |bytes: &[u8]| <[u8; 32]>::from(Sha256::digest(bytes));
        assert_eq!(target.digests(), [sha(b"abcd"), sha(b"efghij")]);
        target.put(0, b"A").unwrap();
        target.commit().unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"Abcdefghijk");
    }

    #[test]
    fn what_is_dropped_before_the_end_leaves_nothing() {
        let dir = TempDir::new();
        let (path, mut behind) = open(&dir);
        behind.put(0, vec![1; 1 << 20], Some(0)).unwrap();
        drop(behind);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// `/dev/full` takes no byte.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_of_a_later_piece_or_of_the_end() {
        let dir = TempDir::new();
        let path = dir.path().join("out");
        let mut file = AtomicFile::create(&path).unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        file.out = std::io::BufWriter::with_capacity(16, full);
        let mut behind = Behind::new(&path, file, 1);
        let failed = (0..64).find_map(|i| behind.put(i * 64, vec![0; 64], Some(0)).err());
        let error = failed.unwrap_or_else(|| behind.finish().map(|_| ()).unwrap_err());
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}
