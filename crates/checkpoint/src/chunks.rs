//! Pieces of a file, put together and written in aligned chunks.
//!
//! What is written at once, from a multiple of its length on, can lie in one large page of the system's cache. Whoever maps the
//! file then needs one entry in the page tables for it instead of hundreds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;

/// Bytes of a chunk: the large page of x86-64, and of aarch64 with pages of 4 KiB.
pub(crate) const CHUNK: usize = 2 << 20;
/// Chunks that may wait for more bytes.
const MOST: usize = 16;

/// Writes bytes to their place in the file.
type Write<'a> = dyn Fn(u64, &[u8]) -> Result<()> + 'a;

/// What was given and not written yet.
#[derive(Default)]
pub(crate) struct Chunks(Mutex<State>);

#[derive(Default)]
struct State {
    /// By their place in the file.
    open: BTreeMap<u64, Chunk>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

struct Chunk {
    bytes: Vec<u8>,
    /// Where bytes were given, in order and neither touching nor empty.
    filled: Vec<Range<usize>>,
}

impl Chunks {
    /// Takes bytes that belong at `at`, and writes the chunks that are full with them. No byte is to be given twice.
    ///
    /// # Errors
    /// What `write` reports.
    pub fn add(&self, mut at: u64, mut bytes: &[u8], write: &Write<'_>) -> Result<()> {
        while !bytes.is_empty() {
            let offset = (at % CHUNK as u64) as usize;
            let (piece, rest) = bytes.split_at(bytes.len().min(CHUNK - offset));
            let ready = self.state().take(at - offset as u64, offset, piece);
            if let Some((begin, chunk)) = ready {
                self.write(begin, chunk, write)?;
            }
            at += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Writes everything that was given.
    ///
    /// # Errors
    /// What `write` reports.
    pub fn flush(&self, write: &Write<'_>) -> Result<()> {
        let open = std::mem::take(&mut self.state().open);
        open.into_iter().try_for_each(|(begin, chunk)| self.write(begin, chunk, write))
    }

    fn write(&self, begin: u64, chunk: Chunk, write: &Write<'_>) -> Result<()> {
        for range in chunk.filled {
            let at = begin + range.start as u64;
            write(at, chunk.bytes.get(range).unwrap_or_default())?;
        }
        self.state().spare.push(chunk.bytes);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Puts a piece into the chunk that begins at `begin`. What is to be written now comes back: that one if it is full, or
    /// another where too many wait.
    fn take(&mut self, begin: u64, offset: usize, piece: &[u8]) -> Option<(u64, Chunk)> {
        let spare = &mut self.spare;
        let new = || Chunk { bytes: spare.pop().unwrap_or_else(|| vec![0; CHUNK]), filled: Vec::new() };
        let chunk = self.open.entry(begin).or_insert_with(new);
        if let Some(room) = chunk.bytes.get_mut(offset..offset + piece.len()) {
            room.copy_from_slice(piece);
        }
        chunk.fill(offset..offset + piece.len());
        if chunk.filled.first() == Some(&(0..CHUNK)) {
            return self.open.remove_entry(&begin);
        }
        // Most files are written from their beginning on: what is still open there waits for something that comes late.
        if self.open.len() > MOST { self.open.pop_first() } else { None }
    }
}

impl Chunk {
    fn fill(&mut self, range: Range<usize>) {
        let at = self.filled.partition_point(|r| r.start < range.start);
        self.filled.insert(at, range);
        self.filled.dedup_by(|next, before| {
            let touching = next.start == before.end;
            if touching {
                before.end = next.end;
            }
            touching
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives pieces, and returns what was written until then and at the end, as places and lengths. Bytes and places are right.
    fn written(pieces: &[(u64, usize)]) -> [Vec<(u64, usize)>; 2] {
        let log = Mutex::new(Vec::new());
        let bytes = |at: u64, length: usize| (at..at + length as u64).map(|at| (at % 251) as u8);
        let write = |at: u64, piece: &[u8]| {
            assert!(bytes(at, piece.len()).eq(piece.iter().copied()), "{at}");
            log.lock().unwrap().push((at, piece.len()));
            Ok(())
        };
        let chunks = Chunks::default();
        for &(at, length) in pieces {
            chunks.add(at, &bytes(at, length).collect::<Vec<u8>>(), &write).unwrap();
        }
        let before = log.lock().unwrap().clone();
        chunks.flush(&write).unwrap();
        let mut all = log.into_inner().unwrap();
        let after = all[before.len()..].to_vec();
        all.sort_unstable();
        assert!(all.windows(2).all(|w| w[0].0 + w[0].1 as u64 <= w[1].0), "{all:?}");
        let total = |runs: &[(u64, usize)]| runs.iter().map(|r| r.1).sum::<usize>();
        assert_eq!(total(&all), total(pieces));
        [before, after]
    }

    const C: u64 = CHUNK as u64;

    #[test]
    fn pieces_that_make_a_whole_chunk_are_written_at_once_in_any_order() {
        let third = CHUNK / 3;
        let pieces = [(C + 2 * third as u64, CHUNK - 2 * third), (C, third), (C + third as u64, third)];
        assert_eq!(written(&pieces), [vec![(C, CHUNK)], vec![]]);
        // One piece of three chunks and the ends of two more.
        let [before, after] = written(&[(C - 10, 3 * CHUNK + 30)]);
        assert_eq!(before, [(C, CHUNK), (2 * C, CHUNK), (3 * C, CHUNK)]);
        assert_eq!(after, [(C - 10, 10), (4 * C, 20)]);
    }

    #[test]
    fn gaps_are_left_alone_and_what_touches_is_one_write() {
        let [before, after] = written(&[(7, 3), (100, 50), (10, 5), (150, 1)]);
        assert_eq!((before, after), (vec![], vec![(7, 8), (100, 51)]));
    }

    #[test]
    fn no_more_than_a_few_chunks_wait() {
        let pieces: Vec<(u64, usize)> = (0..MOST as u64 + 3).map(|i| (i * C + 5, 9)).collect();
        let [before, after] = written(&pieces);
        assert_eq!(before, [(5, 9), (C + 5, 9), (2 * C + 5, 9)]);
        assert_eq!(after.len(), MOST);
        // A buffer that is used again brings nothing of the chunk before.
        let [_, after] = written(&[(0, CHUNK), (C + 1, 1)]);
        assert_eq!(after, [(C + 1, 1)]);
    }
}
