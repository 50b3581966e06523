use std::collections::{BTreeMap, HashMap};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use pocketglm_tensor::TensorInfo;
use serde_json::json;

use crate::error::{io_error, shown};
use crate::file::AtomicFile;
use crate::safetensors::METADATA_KEY;
use crate::{Error, MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, Result};

/// The data of a file begin at a multiple of this many bytes: a cache line.
const DATA_ALIGNMENT: usize = 64;

/// Writes a safetensors file tensor by tensor without holding any.
///
/// All tensors are declared first; then their bytes are given in any order and in pieces of any length.
/// In the file, wider element types come first (otherwise in the order declared), and the data begin at a
/// multiple of 64, so that every tensor is aligned to its element type.
///
/// Until [`SafetensorsWriter::finish`] the file is `.NAME.partial` beside the target, whose old content stays. Dropping the
/// writer removes it; what a killed process leaves there is replaced by the next writer of the same target. Two writers of
/// one target at once are refused.
pub struct SafetensorsWriter {
    file: AtomicFile,
    path: std::path::PathBuf,
    places: HashMap<String, Place>,
    /// Where the next byte goes unless the file is moved.
    position: u64,
}

struct Place {
    begin: u64,
    length: u64,
    written: u64,
}

impl SafetensorsWriter {
    /// Starts a file with these tensors and strings under `__metadata__`.
    ///
    /// # Errors
    /// [`Error::Write`] where a name occurs twice, the sizes pass what [`crate::SafetensorsFile`] reads or another process
    /// writes the target; [`Error::NotAFile`], [`Error::Io`].
    pub fn create(
        path: &Path,
        tensors: &[TensorInfo],
        metadata: &BTreeMap<String, String>,
    ) -> Result<SafetensorsWriter> {
        let (header, places) =
            layout(tensors, metadata).map_err(|what| Error::Write { path: path.to_owned(), what })?;
        let mut file = AtomicFile::create_staged(path)?;
        let length = (header.len() as u64).to_le_bytes();
        file.out
            .write_all(&length)
            .and_then(|()| file.out.write_all(&header))
            .map_err(io_error("write", path))?;
        let position = 8 + header.len() as u64;
        Ok(SafetensorsWriter { file, path: path.to_owned(), places, position })
    }

    /// Appends bytes (little-endian elements) to a tensor.
    ///
    /// # Errors
    /// [`Error::Write`] for a tensor that was not declared, or more bytes than it has; [`Error::Io`].
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
        // Counted after the write, so that a failed one cannot count as done.
        self.file.out.write_all(bytes).map_err(io_error("write", &self.path))?;
        place.written = after;
        self.position = at + bytes.len() as u64;
        Ok(())
    }

    /// Leaves what a tensor still lacks as zeros, in file systems that have holes without taking room.
    ///
    /// # Errors
    /// [`Error::Write`] for a tensor that was not declared; [`Error::Io`].
    pub fn leave_zeros(&mut self, tensor: &str) -> Result<()> {
        let Some(place) = self.places.get_mut(tensor) else {
            let what = format!("tensor `{}` was not declared", shown(tensor));
            return Err(Error::Write { path: self.path.clone(), what });
        };
        place.written = place.length;
        let end = place.begin + place.length;
        self.file.out.flush().map_err(io_error("write", &self.path))?;
        let file = self.file.out.get_ref();
        let length = file.metadata().map_err(io_error("inspect", &self.path))?.len();
        file.set_len(length.max(end)).map_err(io_error("lengthen", &self.path))
    }

    /// Syncs the file and gives it its final name.
    ///
    /// # Errors
    /// [`Error::Write`] where bytes of a tensor are missing: then nothing changes under the final name.
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        let short = self.places.iter().filter(|(_, p)| p.written != p.length);
        let count = short.clone().count();
        if let Some((name, place)) = short.min_by_key(|(_, p)| p.begin) {
            let what = format!(
                "tensor `{}` has {} bytes, {} were given ({count} tensors are incomplete)",
                shown(name),
                place.length,
                place.written
            );
            return Err(Error::Write { path: self.path, what });
        }
        self.file.commit()
    }
}

/// The header (padded) and every tensor's place; an error is the message.
fn layout(
    tensors: &[TensorInfo],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, HashMap<String, Place>), String> {
    if tensors.len() > MAX_TENSORS {
        return Err(format!("{} tensors, expected at most {MAX_TENSORS}", tensors.len()));
    }
    let mut ordered: Vec<&TensorInfo> = tensors.iter().collect();
    ordered.sort_by_key(|t| std::cmp::Reverse(t.dtype.alignment()));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA_KEY.into(), json!(metadata));
    }
    let mut places = HashMap::with_capacity(ordered.len());
    let mut begin = 0u64;
    for t in ordered {
        let name = shown(&t.name);
        let length = t.dtype.bytes(&t.shape).map(|n| n as u64);
        // Halved, so that adding a header cannot overflow either.
        let end = length.and_then(|n| begin.checked_add(n)).filter(|&end| end <= u64::MAX / 2);
        let (Some(length), Some(end)) = (length, end) else {
            return Err(format!("tensor `{name}` of shape {:?} is too large", t.shape));
        };
        if t.shape.len() > MAX_RANK {
            return Err(format!(
                "tensor `{name}` has {} dimensions, expected at most {MAX_RANK}",
                t.shape.len()
            ));
        }
        if t.name == METADATA_KEY {
            return Err(format!("a tensor cannot have the name `{METADATA_KEY}`"));
        }
        if places.insert(t.name.clone(), Place { begin, length, written: 0 }).is_some() {
            return Err(format!("tensor `{name}` was declared twice"));
        }
        let entry = json!({ "dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [begin, end] });
        header.insert(t.name.clone(), entry);
        begin = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| e.to_string())?;
    let padded = (8 + header.len()).next_multiple_of(DATA_ALIGNMENT) - 8;
    header.resize(padded, b' ');
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(format!("a header of {} bytes, expected at most {MAX_HEADER_BYTES}", header.len()));
    }
    for place in places.values_mut() {
        place.begin += 8 + header.len() as u64;
    }
    Ok((header, places))
}

#[cfg(test)]
mod tests;
