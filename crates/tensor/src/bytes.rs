use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::packed::Memory;
use crate::{Error, Result};

/// Memory that [`Bytes`] share.
pub trait BytesOwner: Send + Sync {
    /// All bytes, always the same ones.
    fn bytes(&self) -> &[u8];

    /// Says that the bytes in `range` will not be read soon: what is mapped from a file may leave memory and is read
    /// again when it is asked for.
    fn release(&self, range: Range<usize>) {
        let _ = range;
    }

    /// Says that the bytes in `range` will not be read again: what is mapped from a file may leave the system's cache as well,
    /// where it would take the room of what others read.
    fn forget(&self, range: Range<usize>) {
        self.release(range);
    }

    /// Says that the bytes in `range` will be read soon, and may wait for them: what is mapped from a file is in memory and in
    /// the process's tables afterwards, where the system can do that.
    fn prefetch(&self, range: Range<usize>) {
        let _ = range;
    }
}

impl BytesOwner for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl BytesOwner for AlignedF32 {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self[..])
    }
}

/// A shared, immutable run of bytes: part of a mapped file or of an owned buffer. Cloning copies no data.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn BytesOwner>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of `owner`, which lives as long as the last clone.
    pub fn from_owner(owner: Arc<dyn BytesOwner>) -> Bytes {
        let range = 0..owner.bytes().len();
        Bytes { owner, range }
    }

    /// The part `range` of these bytes, or `None` where it reaches past the end.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Bytes { owner: self.owner.clone(), range: start..start + (range.end - range.start) })
    }

    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        // An owner whose length shrinks is outside the contract; it gives an empty run, not a panic.
        self.owner.bytes().get(self.range.clone()).unwrap_or(&[])
    }

    /// Says that these bytes will not be read soon, see [`BytesOwner::release`].
    pub fn release(&self) {
        self.owner.release(self.range.clone());
    }

    /// Says that these bytes will not be read again, see [`BytesOwner::forget`].
    pub fn forget(&self) {
        self.owner.forget(self.range.clone());
    }

    /// Says that these bytes will be read soon, see [`BytesOwner::prefetch`].
    pub fn prefetch(&self) {
        self.owner.prefetch(self.range.clone());
    }

    /// [`Bytes::release`] with `margin` bytes of the owner before and behind: reading the ends has mapped some of them as well.
    pub fn release_around(&self, margin: usize) {
        let end = self.range.end.saturating_add(margin).min(self.owner.bytes().len());
        self.owner.release(self.range.start.saturating_sub(margin)..end);
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Bytes {
        Bytes::from_owner(Arc::new(v))
    }
}

impl From<AlignedF32> for Bytes {
    fn from(v: AlignedF32) -> Bytes {
        Bytes::from_owner(Arc::new(v))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} bytes)", self.len())
    }
}

/// One cache line of floats, so that a vector of them is aligned to 64 bytes.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A growable buffer of f32 whose first element is aligned to 64 bytes.
#[derive(Default)]
pub struct AlignedF32 {
    lines: Vec<Line>,
    /// Where the floats are instead of in `lines`, if this was made as working memory.
    mapped: Option<Memory>,
    len: usize,
}

/// Bytes from which working memory is in huge pages.
const HUGE: usize = 4 << 20;
/// Bytes from which room is mapped by itself.
const ROOM: usize = 64 << 10;
/// Bytes of a huge page: systems put whole numbers of them at their multiples, and begin others anywhere.
const HUGE_PAGE: usize = 2 << 20;

impl AlignedF32 {
    /// `len` zeros; an error instead of an abort where memory cannot be had.
    pub fn zeroed(len: usize) -> Result<AlignedF32> {
        let mut v = AlignedF32::default();
        v.resize(len)?;
        Ok(v)
    }

    /// The same in huge pages where the system has them and the buffer is large, for memory that kernels go back and
    /// forth in: on small pages the second-level cache holds less of it, because they lie in it anyhow, and addresses
    /// are looked up more often. Pages that are never touched take no memory.
    pub fn working(len: usize) -> Result<AlignedF32> {
        match len.checked_mul(4) {
            Some(bytes)
                if bytes >= HUGE && bytes <= isize::MAX as usize && cfg!(not(target_family = "wasm")) =>
            {
                let mapped = Some(Memory::new(bytes.next_multiple_of(HUGE_PAGE), "working memory")?);
                Ok(AlignedF32 { lines: Vec::new(), mapped, len })
            }
            _ => AlignedF32::zeroed(len),
        }
    }

    /// `len` zeros of which only those pages take memory that are written, where the system offers it: for room that may stay
    /// empty, such as that of a cache. Other buffers are touched when they are made.
    pub fn room(len: usize) -> Result<AlignedF32> {
        match len.checked_mul(4) {
            Some(bytes)
                if bytes >= ROOM && bytes <= isize::MAX as usize && cfg!(not(target_family = "wasm")) =>
            {
                Ok(AlignedF32 { lines: Vec::new(), mapped: Some(Memory::by_page(bytes, "room")?), len })
            }
            _ => AlignedF32::zeroed(len),
        }
    }

    /// Bytes of memory that [`AlignedF32::working`] takes for `len` elements once all are touched.
    pub fn working_bytes(len: usize) -> usize {
        match len.saturating_mul(4) {
            bytes if bytes >= HUGE => bytes.checked_next_multiple_of(HUGE_PAGE).unwrap_or(bytes),
            bytes => bytes,
        }
    }

    /// Makes the buffer exactly `len` long; new elements are zero, old ones keep their values.
    pub fn resize(&mut self, len: usize) -> Result<()> {
        if self.mapped.is_some() {
            let mut other = AlignedF32::working(len)?;
            let kept = len.min(self.len);
            other[..kept].copy_from_slice(&self[..kept]);
            *self = other;
            return Ok(());
        }
        let lines = len.div_ceil(16);
        if lines > self.lines.len() {
            self.lines.try_reserve_exact(lines - self.lines.len()).map_err(|_| Error::OutOfMemory {
                bytes: lines.saturating_mul(64),
                what: "an f32 buffer".into(),
            })?;
        }
        self.lines.resize(lines, Line([0.0; 16]));
        // What a shorter buffer has left in its last line would come back when it grows.
        bytemuck::cast_slice_mut(&mut self.lines)[len..].fill(0f32);
        self.len = len;
        Ok(())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl std::ops::Deref for AlignedF32 {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.mapped {
            Some(memory) => &bytemuck::cast_slice(memory.bytes())[..self.len],
            None => &bytemuck::cast_slice(&self.lines)[..self.len],
        }
    }
}

impl std::ops::DerefMut for AlignedF32 {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.mapped {
            Some(memory) => &mut bytemuck::cast_slice_mut(memory.writable())[..self.len],
            None => &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_memory_is_zero_and_keeps_what_it_holds_when_it_is_resized() {
        let lengths = [0, 5, ROOM / 4 + 1, HUGE / 4 - 1, HUGE / 4 + 3];
        let make = [AlignedF32::working, AlignedF32::room];
        for (len, make) in lengths.into_iter().flat_map(|len| make.map(|make| (len, make))) {
            let mut memory = make(len).unwrap();
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|v| *v == 0.0));
            assert!((memory.as_ptr() as usize).is_multiple_of(64));
            memory.fill(2.0);
            memory.resize(len + 100).unwrap();
            assert!(memory[..len].iter().all(|v| *v == 2.0) && memory[len..].iter().all(|v| *v == 0.0));
            memory.resize(len / 2).unwrap();
            assert!(memory.len() == len / 2 && memory.iter().all(|v| *v == 2.0));
            memory.resize(len).unwrap();
            assert!(memory[len / 2..].iter().all(|v| *v == 0.0), "{len}");
        }
        assert!(AlignedF32::working(usize::MAX / 2).is_err());
        assert!(AlignedF32::room(usize::MAX / 2).is_err());
    }
}
