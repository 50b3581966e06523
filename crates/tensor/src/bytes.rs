use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

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

    /// The same with `margin` bytes of the owner before and behind: reading the ends has mapped some of them as well.
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
    len: usize,
}

impl AlignedF32 {
    /// `len` zeros; an error instead of an abort where memory cannot be had.
    pub fn zeroed(len: usize) -> Result<AlignedF32> {
        let mut v = AlignedF32::default();
        v.resize(len)?;
        Ok(v)
    }

    /// Makes the buffer exactly `len` long; new elements are zero, old ones keep their values.
    pub fn resize(&mut self, len: usize) -> Result<()> {
        let lines = len.div_ceil(16);
        if lines > self.lines.len() {
            self.lines.try_reserve_exact(lines - self.lines.len()).map_err(|_| Error::OutOfMemory {
                bytes: lines.saturating_mul(64),
                what: "an f32 buffer".into(),
            })?;
        }
        self.lines.resize(lines, Line([0.0; 16]));
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
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl std::ops::DerefMut for AlignedF32 {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
