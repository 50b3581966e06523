//! Writing one GGUF file.

use std::collections::{HashMap, HashSet};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use pocketglm_tensor::TensorInfo;

use crate::error::{io_error, shown};
use crate::file::{AtomicFile, refuse_inputs};
use crate::gguf::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_DIMS, MAX_KEY_BYTES, MAX_KEYS, MAX_NAME_BYTES,
    kind,
};
use crate::{Error, MAX_TENSORS, Result};

const VERSION: u32 = 3;

/// A value to be written under a key.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the format's")]
pub enum GgufMeta {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Strings(Vec<String>),
}

impl From<u32> for GgufMeta {
    fn from(n: u32) -> GgufMeta {
        GgufMeta::U32(n)
    }
}

impl From<f32> for GgufMeta {
    fn from(x: f32) -> GgufMeta {
        GgufMeta::F32(x)
    }
}

impl From<bool> for GgufMeta {
    fn from(b: bool) -> GgufMeta {
        GgufMeta::Bool(b)
    }
}

impl From<&str> for GgufMeta {
    fn from(text: &str) -> GgufMeta {
        GgufMeta::String(text.to_owned())
    }
}

impl GgufMeta {
    fn write(&self, out: &mut Vec<u8>) {
        fn array(out: &mut Vec<u8>, inner: u32, count: usize) {
            out.extend(kind::ARRAY.to_le_bytes());
            out.extend(inner.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        }
        match self {
            GgufMeta::U32(n) => {
                out.extend(kind::U32.to_le_bytes());
                out.extend(n.to_le_bytes());
            }
            GgufMeta::F32(x) => {
                out.extend(kind::F32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            GgufMeta::Bool(b) => {
                out.extend(kind::BOOL.to_le_bytes());
                out.push(u8::from(*b));
            }
            GgufMeta::String(s) => {
                out.extend(kind::STRING.to_le_bytes());
                string(out, s);
            }
            GgufMeta::U32s(list) => {
                array(out, kind::U32, list.len());
                out.extend(list.iter().flat_map(|n| n.to_le_bytes()));
            }
            GgufMeta::I32s(list) => {
                array(out, kind::I32, list.len());
                out.extend(list.iter().flat_map(|n| n.to_le_bytes()));
            }
            GgufMeta::F32s(list) => {
                array(out, kind::F32, list.len());
                out.extend(list.iter().flat_map(|x| x.to_le_bytes()));
            }
            GgufMeta::Strings(list) => {
                array(out, kind::STRING, list.len());
                list.iter().for_each(|s| string(out, s));
            }
        }
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes a GGUF file (version 3, alignment 32) tensor by tensor without holding any.
///
/// Keys and tensors are declared first; then bytes are given in any order and in pieces of any length. Until
/// [`GgufWriter::finish`] the file is `.NAME.partial` beside the target, whose old content stays. Dropping the writer
/// removes it; what a killed process leaves there is replaced by the next writer of the same target. Two writers of
/// one target at once are refused.
pub struct GgufWriter {
    file: AtomicFile,
    path: PathBuf,
    places: HashMap<String, Place>,
    position: u64,
}

struct Place {
    begin: u64,
    length: u64,
    written: u64,
}

impl GgufWriter {
    /// Starts a file with these keys and tensors, whose shapes are row-major. `inputs` are files that must not be
    /// replaced: those that the tensors are read from.
    ///
    /// # Errors
    /// [`Error::Write`] where the target is an input or another process writes it, a name occurs twice or is not
    /// allowed, a format is none of GGUF, or sizes pass what [`crate::GgufFile`] reads; [`Error::Io`].
    pub fn create(
        path: &Path,
        metadata: &[(String, GgufMeta)],
        tensors: &[TensorInfo],
        inputs: &[&Path],
    ) -> Result<GgufWriter> {
        refuse_inputs(path, inputs)?;
        let (header, places, total) =
            layout(metadata, tensors).map_err(|what| Error::Write { path: path.to_owned(), what })?;
        let mut file = AtomicFile::create_staged(path)?;
        file.out.write_all(&header).and_then(|()| file.out.flush()).map_err(io_error("write", path))?;
        // The gaps between tensors are never written: a file that is made longer is zero there.
        file.out.get_ref().set_len(total).map_err(io_error("write", path))?;
        Ok(GgufWriter { file, path: path.to_owned(), places, position: header.len() as u64 })
    }

    /// Appends bytes to a tensor, in its format and little-endian.
    ///
    /// # Errors
    /// [`Error::Write`] for a tensor that was not declared, or more bytes than it has; [`Error::Io`], also where the
    /// disk is full.
    pub fn write(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        let wrong = |what| Error::Write { path: self.path.clone(), what };
        let Some(place) = self.places.get_mut(tensor) else {
            return Err(wrong(format!("tensor `{}` was not declared", shown(tensor))));
        };
        let after = place.written.saturating_add(bytes.len() as u64);
        if after > place.length {
            let what = format!("tensor `{}` has {} bytes, {after} were given", shown(tensor), place.length);
            return Err(wrong(what));
        }
        let at = place.begin + place.written;
        if at != self.position {
            self.file.out.seek(SeekFrom::Start(at)).map_err(io_error("seek in", &self.path))?;
        }
        self.file.out.write_all(bytes).map_err(io_error("write", &self.path))?;
        place.written = after;
        self.position = at + bytes.len() as u64;
        Ok(())
    }

    /// Syncs the file and gives it its final name.
    ///
    /// # Errors
    /// As [`GgufWriter::complete`]: then nothing changes under the final name.
    pub fn finish(mut self) -> Result<()> {
        self.complete()?;
        self.file.commit()
    }

    /// Brings the whole file to the disk, under its temporary name: for several files of which all or none shall be there.
    ///
    /// # Errors
    /// [`Error::Write`] where bytes of a tensor are missing; [`Error::Io`].
    pub fn complete(&mut self) -> Result<()> {
        let short = self.places.iter().filter(|(_, p)| p.written != p.length);
        let count = short.clone().count();
        if let Some((name, place)) = short.min_by_key(|(_, p)| p.begin) {
            let what = format!(
                "tensor `{}` has {} bytes, {} were given ({count} tensors are incomplete)",
                shown(name),
                place.length,
                place.written
            );
            return Err(Error::Write { path: self.path.clone(), what });
        }
        self.file.sync()
    }
}

/// Whether a file can have these keys and tensors, as [`GgufWriter::create`] would say.
///
/// # Errors
/// [`Error::Write`].
pub(crate) fn check_layout(
    path: &Path,
    metadata: &[(String, GgufMeta)],
    tensors: &[TensorInfo],
) -> Result<()> {
    layout(metadata, tensors).map(drop).map_err(|what| Error::Write { path: path.to_owned(), what })
}

/// The header with its padding, every tensor's place in the file, and the file's length.
type Layout = (Vec<u8>, HashMap<String, Place>, u64);

/// Where everything goes; an error is the message.
fn layout(metadata: &[(String, GgufMeta)], tensors: &[TensorInfo]) -> Result<Layout, String> {
    if tensors.len() > MAX_TENSORS || metadata.len() > MAX_KEYS {
        return Err(format!("{} tensors and {} keys, more than readers take", tensors.len(), metadata.len()));
    }
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    let mut keys = HashSet::new();
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_KEY_BYTES || key == ALIGNMENT_KEY || !keys.insert(key) {
            return Err(format!("the key `{}` is not allowed, or given twice", shown(key)));
        }
        string(&mut header, key);
        value.write(&mut header);
    }
    let mut places = HashMap::with_capacity(tensors.len());
    let mut at = 0u64;
    for info in tensors {
        let name = shown(&info.name);
        let Some(ggml) = GgmlType::of_dtype(info.dtype) else {
            return Err(format!("tensor `{name}`: GGUF has no format {}", info.dtype));
        };
        if info.name.is_empty() || info.name.len() >= MAX_NAME_BYTES {
            return Err(format!("tensor `{name}`: expected a name of 1 to {} bytes", MAX_NAME_BYTES - 1));
        }
        if info.shape.is_empty() || info.shape.len() > MAX_DIMS || info.shape.contains(&0) {
            return Err(format!(
                "tensor `{name}` has shape {:?}, expected 1 to {MAX_DIMS} dimensions",
                info.shape
            ));
        }
        let length = info.dtype.bytes(&info.shape).map(|n| n as u64);
        // Halved, so that padding and a header cannot overflow either.
        let end = length.and_then(|n| at.checked_add(n)).filter(|&end| end <= u64::MAX / 2);
        let (Some(length), Some(end)) = (length, end) else {
            return Err(format!(
                "tensor `{name}` of shape {:?} is too large, or no shape of the format {}",
                info.shape, info.dtype
            ));
        };
        string(&mut header, &info.name);
        header.extend((info.shape.len() as u32).to_le_bytes());
        header.extend(info.shape.iter().rev().flat_map(|&n| (n as u64).to_le_bytes()));
        header.extend(ggml.id.to_le_bytes());
        header.extend(at.to_le_bytes());
        if places.insert(info.name.clone(), Place { begin: at, length, written: 0 }).is_some() {
            return Err(format!("tensor `{name}` was declared twice"));
        }
        at = end.next_multiple_of(DEFAULT_ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    for place in places.values_mut() {
        place.begin += header.len() as u64;
    }
    let total = at + header.len() as u64;
    Ok((header, places, total))
}
