//! A file that many threads write at once, and hashes of its parts, each of which is taken in the order of the bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use crate::chunks::Chunks;
use crate::error::io_error;
use crate::file::AtomicFile;
use crate::{Error, Result};

/// Where a piece belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// In the file.
    pub at: u64,
    /// The hash that takes it, by number, and how many bytes that has taken before.
    pub hash: usize,
    pub from: u64,
}

/// A file that takes pieces in any order from any thread.
pub(crate) struct Target {
    path: PathBuf,
    file: AtomicFile,
    chunks: Chunks,
    hashes: Mutex<Hashes>,
    /// A hash has taken a piece, or work has stopped.
    moved: Condvar,
}

/// What was hashed, and what has to wait because bytes before it are not there yet.
struct Hashes {
    of: Vec<Hash>,
    /// Pieces that were written, by their hash and their place in it.
    waiting: BTreeMap<(usize, u64), Vec<u8>>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
    /// Something failed: the file is of no more use.
    stopped: bool,
}

struct Hash {
    /// Away while a thread works on it.
    state: Option<Sha256>,
    taken: u64,
}

impl Target {
    /// Writes to `file`, which becomes `path`, with `hashes` hashes.
    pub fn new(path: &Path, file: AtomicFile, hashes: usize) -> Target {
        let of = (0..hashes).map(|_| Hash { state: Some(Sha256::new()), taken: 0 }).collect();
        let hashes = Hashes { of, waiting: BTreeMap::new(), spare: Vec::new(), stopped: false };
        let (hashes, moved) = (Mutex::new(hashes), Condvar::new());
        Target { path: path.to_owned(), file, chunks: Chunks::default(), hashes, moved }
    }

    fn hashes(&self) -> MutexGuard<'_, Hashes> {
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// [`Error::Write`] where something failed before: bytes are missing that nobody will bring.
    pub fn usable(&self) -> Result<()> {
        match self.hashes().stopped {
            true => Err(self.wrong("writing failed before".into())),
            false => Ok(()),
        }
    }

    fn wrong(&self, what: String) -> Error {
        Error::Write { path: self.path.clone(), what }
    }

    /// Writes bytes that belong to no hash, at once.
    ///
    /// # Errors
    /// [`Error::Io`], and as [`Target::usable`].
    pub fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.usable()?;
        self.write(at, bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let written = write_at(self.file.out.get_ref(), bytes, at).map_err(io_error("write", &self.path));
        written.inspect_err(|_| self.stop())
    }

    /// Takes bytes that are written with those around them.
    fn gather(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.chunks.add(at, bytes, &|at, bytes| self.write(at, bytes))
    }

    /// Writes and hashes bytes that follow those which their hash has taken.
    ///
    /// # Errors
    /// As [`Target::put`], and [`Error::Write`] where they follow others.
    pub fn append(&self, place: Place, bytes: &[u8]) -> Result<()> {
        self.usable()?;
        self.gather(place.at, bytes)?;
        let mut hashes = self.hashes();
        let of = hashes.of.get_mut(place.hash).filter(|of| of.taken == place.from);
        if let Some(of) = of
            && let Some(state) = &mut of.state
        {
            state.update(bytes);
            of.taken += bytes.len() as u64;
            return Ok(());
        }
        hashes.stopped = true;
        let what = format!("bytes from {} on of part {} do not follow those before", place.from, place.hash);
        Err(self.wrong(what))
    }

    /// Writes bytes, and hashes them as soon as all before them were: at once, or on the thread that brings those.
    /// They are a buffer of [`Target::buffer`], which is used again. What another thread failed with is no error here.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&self, place: Place, bytes: Vec<u8>) -> Result<()> {
        self.gather(place.at, &bytes)?;
        let mut hashes = self.hashes();
        hashes.waiting.insert((place.hash, place.from), bytes);
        loop {
            let Some((mut state, bytes)) = hashes.next(place.hash) else { return Ok(()) };
            drop(hashes);
            state.update(&bytes);
            hashes = self.hashes();
            hashes.put_back(place.hash, state, bytes);
            self.moved.notify_all();
        }
    }

    /// An empty buffer for a piece. Where `most` pieces wait for bytes before them, so does the caller, who must have none
    /// of those bytes. `None` where work has stopped.
    pub fn buffer(&self, most: usize) -> Option<Vec<u8>> {
        let mut hashes = self.hashes();
        while hashes.waiting.len() >= most.max(1) && !hashes.stopped {
            hashes = self.moved.wait(hashes).unwrap_or_else(PoisonError::into_inner);
        }
        if hashes.stopped {
            return None;
        }
        let mut buffer = hashes.spare.pop().unwrap_or_default();
        buffer.clear();
        Some(buffer)
    }

    /// Nobody gets a buffer any more, and nothing is written: bytes that others wait for will not come.
    pub fn stop(&self) {
        self.hashes().stopped = true;
        self.moved.notify_all();
    }

    /// Writes what still waits, and gives the hashes of all pieces, in their order, each of as many bytes as `lengths` says.
    ///
    /// # Errors
    /// [`Error::Write`] where a hash took fewer or more, and as [`Target::put`].
    pub fn digests(&mut self, lengths: &[u64]) -> Result<Vec<[u8; 32]>> {
        self.usable()?;
        self.chunks.flush(&|at, bytes| self.write(at, bytes))?;
        let of = std::mem::take(&mut self.hashes().of);
        let digest = |(i, (hash, &length)): (usize, (Hash, &u64))| match hash.state {
            Some(state) if hash.taken == length => Ok(state.finalize().into()),
            _ => Err(self.wrong(format!("part {i} has {length} bytes, {} were hashed", hash.taken))),
        };
        of.into_iter().zip(lengths).enumerate().map(digest).collect()
    }

    /// See [`AtomicFile::commit`].
    pub fn commit(self) -> Result<()> {
        self.file.commit()
    }
}

impl Hashes {
    /// The hash and the bytes that it takes next, where both are here.
    fn next(&mut self, hash: usize) -> Option<(Sha256, Vec<u8>)> {
        let of = self.of.get_mut(hash)?;
        of.state.as_ref()?;
        let bytes = self.waiting.remove(&(hash, of.taken))?;
        Some((of.state.take()?, bytes))
    }

    fn put_back(&mut self, hash: usize, state: Sha256, bytes: Vec<u8>) {
        if let Some(of) = self.of.get_mut(hash) {
            of.state = Some(state);
            of.taken += bytes.len() as u64;
        }
        self.spare.push(bytes);
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    /// Moving and writing are two steps elsewhere, for all files at once: those that are written together are few.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::CHUNK;
    use crate::test_support::TempDir;

    fn open(dir: &TempDir) -> (PathBuf, Target) {
        let path = dir.path().join("out");
        let file = AtomicFile::create(&path).unwrap();
        (path.clone(), Target::new(&path, file, 2))
    }

    fn sha(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    #[test]
    fn pieces_land_where_they_belong_and_hashes_follow_the_order_of_the_bytes() {
        let dir = TempDir::new();
        let (path, mut target) = open(&dir);
        target.put(0, b"_").unwrap();
        // The last ones first.
        for (at, bytes, hash, from) in
            [(9, "ij", 1, 4), (3, "cd", 0, 2), (5, "efgh", 1, 0), (11, "k", 1, 6), (1, "ab", 0, 0)]
        {
            target.add(Place { at, hash, from }, bytes.into()).unwrap();
        }
        assert_eq!(target.digests(&[4, 7]).unwrap(), [sha(b"abcd"), sha(b"efghijk")]);
        target.put(0, b"A").unwrap();
        target.commit().unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"Aabcdefghijk");
    }

    #[test]
    fn a_buffer_comes_when_bytes_that_others_wait_for_are_there_or_work_stops() {
        let dir = TempDir::new();
        let (_, target) = open(&dir);
        let add = |from: u64| target.add(Place { at: from, hash: 0, from }, vec![from as u8]);
        add(1).unwrap();
        add(2).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| target.buffer(2));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!waits.is_finished(), "two pieces wait, and one more may be made");
            add(0).unwrap();
            assert_eq!(waits.join().unwrap(), Some(Vec::new()));
        });
        add(4).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| target.buffer(1));
            target.stop();
            assert_eq!(waits.join().unwrap(), None);
        });
    }

    #[test]
    fn many_threads_give_the_hash_of_the_bytes_in_order() {
        let dir = TempDir::new();
        let (_, mut target) = open(&dir);
        let next = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    loop {
                        let Some(mut buffer) = target.buffer(4) else { return };
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if i >= 500 {
                            return;
                        }
                        buffer.extend([i as u8; 64]);
                        target.add(Place { at: i * 64, hash: 1, from: i * 64 }, buffer).unwrap();
                    }
                });
            }
        });
        let wanted: Vec<u8> = (0..500u64).flat_map(|i| [i as u8; 64]).collect();
        assert_eq!(target.digests(&[0, 500 * 64]).unwrap(), [sha(b""), sha(&wanted)]);
    }

    #[test]
    fn a_part_that_lacks_bytes_has_no_hash_and_bytes_that_follow_nothing_are_refused() {
        let dir = TempDir::new();
        let (_, mut target) = open(&dir);
        // The first four bytes never come.
        target.add(Place { at: 4, hash: 0, from: 4 }, b"efgh".into()).unwrap();
        let error = target.digests(&[8, 0]).unwrap_err().to_string();
        assert!(error.ends_with("part 0 has 8 bytes, 0 were hashed"), "{error}");
        let (_, target) = open(&dir);
        target.append(Place { at: 0, hash: 0, from: 0 }, b"abcd").unwrap();
        let error = target.append(Place { at: 5, hash: 0, from: 5 }, b"fgh").unwrap_err().to_string();
        assert!(error.ends_with("bytes from 5 on of part 0 do not follow those before"), "{error}");
        assert!(target.put(0, b"_").unwrap_err().to_string().ends_with("failed before"));
    }

    #[test]
    fn what_is_dropped_before_the_end_leaves_nothing() {
        let dir = TempDir::new();
        let (path, target) = open(&dir);
        target.add(Place { at: 0, hash: 0, from: 0 }, vec![1; 3 << 20]).unwrap();
        drop(target);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// `/dev/full` takes no byte.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_of_the_piece_and_of_all_that_follows() {
        let dir = TempDir::new();
        let path = dir.path().join("out");
        let mut file = AtomicFile::create(&path).unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        file.out = std::io::BufWriter::with_capacity(16, full);
        let mut target = Target::new(&path, file, 1);
        let place = Place { at: 0, hash: 0, from: 0 };
        // It comes with the first chunk that is full.
        let error = target.add(place, vec![0; CHUNK]).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert!(matches!(target.append(place, &[0; 64]), Err(Error::Write { .. })));
        assert!(matches!(target.digests(&[0]), Err(Error::Write { .. })));
    }
}
