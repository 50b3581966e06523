//! Reading one safetensors file.
//!
//! The format: 8 bytes little-endian header length, a JSON object (name → `dtype`, `shape`,
//! `data_offsets`, and `__metadata__` with strings), then the data, which the tensors cover without holes
//! or overlaps (<https://github.com/huggingface/safetensors>, "Format").

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use pocketglm_tensor::{Bytes, DType, Tensor, TensorInfo, WeightSource};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

use crate::error::shown;
use crate::mapped::FileBytes;
use crate::{Error, ReadMode, Result, first_non_finite};

/// Most bytes that a header may have; the reference reader has the same limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors in one file, and in one checkpoint. Models of a trillion parameters have about 100,000.
pub const MAX_TENSORS: usize = 262_144;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 8;

/// The header's key that is not a tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// Types of the format that nothing here computes with, and their bits per element.
const FOREIGN_TYPES: [(&str, u8); 16] = [
    ("BOOL", 8),
    ("I8", 8),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F4", 4),
    ("I16", 16),
    ("U16", 16),
    ("U32", 32),
    ("U64", 64),
    ("F64", 64),
    ("C64", 64),
];

/// What messages call the types that are computed with.
const SUPPORTED: &str = "F32, F16, BF16, I64, I32 or U8";

const TYPES: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::I64, DType::I32, DType::U8];

/// A type as stored: one of ours, or one that is only known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Known(DType),
    Foreign { name: &'static str, bits: u8 },
}

impl Stored {
    fn parse(name: &str) -> Option<Stored> {
        if let Some(&dtype) = TYPES.iter().find(|t| t.name() == name) {
            return Some(Stored::Known(dtype));
        }
        FOREIGN_TYPES.iter().find(|(n, _)| *n == name).map(|&(name, bits)| Stored::Foreign { name, bits })
    }

    fn bits(self) -> u64 {
        match self {
            Stored::Known(dtype) => dtype.alignment() as u64 * 8,
            Stored::Foreign { bits, .. } => u64::from(bits),
        }
    }
}

#[derive(Debug)]
struct Entry {
    name: String,
    stored: Stored,
    shape: Vec<usize>,
    /// Byte range in the file, inside of it.
    begin: usize,
    end: usize,
}

/// An opened safetensors file. Its tensors share the file's bytes.
///
/// Tensors of types that nothing here computes with (F64, BOOL, ...) do not prevent opening: they are in
/// [`SafetensorsFile::names`], but not in [`WeightSource::tensors`], and asking for one is an error that
/// names its type.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: FileBytes,
    /// In the order of their data.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header against its length. No data are read.
    ///
    /// # Errors
    /// As [`FileBytes::open`] and [`SafetensorsFile::parse`].
    pub fn open(path: &Path, mode: ReadMode) -> Result<SafetensorsFile> {
        SafetensorsFile::parse(FileBytes::open(path, mode)?)
    }

    /// Checks the header of a file that is opened already, or of bytes in memory.
    ///
    /// # Errors
    /// [`Error::Header`], [`Error::Tensor`], [`Error::Duplicate`].
    pub fn parse(file: FileBytes) -> Result<SafetensorsFile> {
        let bytes = file.bytes().as_slice();
        let (raw, data_start) = parse_header(file.path(), bytes)?;
        let mut entries = Vec::with_capacity(raw.tensors.len());
        for (name, tensor) in raw.tensors {
            entries.push(check_entry(file.path(), name, tensor, data_start, bytes.len())?);
        }
        entries.sort_by_key(|e| (e.begin, e.end));
        check_cover(file.path(), &entries, data_start, bytes.len())?;

        let mut by_name = HashMap::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            if by_name.insert(entry.name.clone(), i).is_some() {
                let place = file.path().display().to_string();
                return Err(Error::Duplicate {
                    tensor: shown(&entry.name),
                    first: place.clone(),
                    second: place,
                });
            }
        }
        Ok(SafetensorsFile { file, entries, by_name, metadata: raw.metadata })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The strings under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The names of all tensors in the order of their data, also of those with unsupported types.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// Whether there is a tensor of this name, be its type supported or not.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The tensor, sharing the file's bytes.
    ///
    /// # Errors
    /// [`Error::NoTensor`], [`Error::Unsupported`], [`Error::Changed`] where the file was truncated since.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let path = || self.path().to_owned();
        let entry = self.entry(name).ok_or_else(|| Error::NoTensor { tensor: shown(name), place: path() })?;
        let dtype = match entry.stored {
            Stored::Known(dtype) => dtype,
            Stored::Foreign { name: found, .. } => {
                let (tensor, found) = (shown(name), found.into());
                return Err(Error::Unsupported { path: path(), tensor, found, wanted: SUPPORTED });
            }
        };
        self.file.check_length()?;
        let bytes =
            self.file.bytes().slice(entry.begin..entry.end).unwrap_or_else(|| Bytes::from(Vec::new()));
        Tensor::new(dtype, &entry.shape, bytes).map_err(|e| Error::Tensor {
            path: path(),
            tensor: shown(name),
            offset: entry.begin as u64,
            what: e.to_string(),
        })
    }

    /// Reads every floating-point tensor and looks for NaN and infinity.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for the first one in the order of the data.
    pub fn check_finite(&self) -> Result<()> {
        for entry in &self.entries {
            if !matches!(entry.stored, Stored::Known(dtype) if dtype.is_float()) {
                continue;
            }
            if let Some(index) = first_non_finite(&self.get(&entry.name)?) {
                let path = self.path().to_owned();
                return Err(Error::NonFinite { path, tensor: shown(&entry.name), index });
            }
        }
        Ok(())
    }

    /// The header as it stands in the file, with its padding.
    pub(crate) fn header(&self) -> &[u8] {
        let bytes = self.file.bytes().as_slice();
        let length = bytes.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b));
        let end = usize::try_from(length).ok().and_then(|n| n.checked_add(8)).unwrap_or(8);
        bytes.get(8..end).unwrap_or_default()
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).and_then(|&i| self.entries.get(i))
    }
}

impl Entry {
    fn info(&self) -> Option<TensorInfo> {
        match self.stored {
            Stored::Known(dtype) => {
                Some(TensorInfo { name: self.name.clone(), dtype, shape: self.shape.clone() })
            }
            Stored::Foreign { .. } => None,
        }
    }
}

impl WeightSource for SafetensorsFile {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.entries.iter().filter_map(Entry::info).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.entry(name).and_then(Entry::info)
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        self.get(name).map_err(|e| source_error(e, name, self.path()))
    }
}

/// An error of this crate as one that a [`WeightSource`] may return.
pub(crate) fn source_error(error: Error, name: &str, place: &Path) -> pocketglm_tensor::Error {
    let (name, place) = (shown(name), place.display().to_string());
    match error {
        Error::NoTensor { .. } => pocketglm_tensor::Error::Missing { name, place },
        Error::Unsupported { found, wanted, .. } => {
            let what = format!("unsupported type {found}, expected {wanted}");
            pocketglm_tensor::Error::Source { name, place, what }
        }
        other => pocketglm_tensor::Error::Source { name, place, what: other.to_string() },
    }
}

/// Parses length and JSON; returns the header and where the data start.
fn parse_header(path: &Path, bytes: &[u8]) -> Result<(RawHeader, usize)> {
    let wrong = |offset, what| Error::Header { path: path.to_owned(), offset, what };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let what = format!("expected 8 bytes of header length, found a file of {} bytes", bytes.len());
        return Err(wrong(0, what));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(wrong(0, format!("header length {length}, expected at most {MAX_HEADER_BYTES}")));
    }
    let json = usize::try_from(length).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
        wrong(0, format!("header length {length}, but {} bytes follow in the file", rest.len()))
    })?;
    if json.first() != Some(&b'{') {
        let found = json.first().map_or("nothing".to_owned(), |b| format!("byte {b:#04x}"));
        return Err(wrong(8, format!("expected `{{`, found {found}")));
    }
    let text = std::str::from_utf8(json)
        .map_err(|e| wrong(8 + e.valid_up_to() as u64, "expected UTF-8, found other bytes".into()))?;
    let header: RawHeader = serde_json::from_str(text).map_err(|e| wrong(8, shown(&e.to_string())))?;
    Ok((header, 8 + json.len()))
}

/// Checks one tensor by itself: type, shape, byte range. Offsets become positions in the file.
fn check_entry(
    path: &Path,
    name: String,
    raw: RawTensor,
    data_start: usize,
    file_len: usize,
) -> Result<Entry> {
    let offset = (data_start as u64).saturating_add(raw.begin);
    let wrong = |name: &str, what| Error::Tensor { path: path.to_owned(), tensor: shown(name), offset, what };
    let Some(stored) = Stored::parse(&raw.dtype) else {
        return Err(wrong(&name, format!("unknown element type `{}`", shown(&raw.dtype))));
    };
    // Bits, because some types of the format are smaller than a byte.
    let bits = raw.shape.iter().try_fold(stored.bits(), |n, &d| n.checked_mul(d));
    let bits = bits.ok_or_else(|| wrong(&name, format!("shape {:?} has too many elements", raw.shape)))?;
    let found = raw.end.checked_sub(raw.begin).ok_or_else(|| {
        wrong(&name, format!("data_offsets [{}, {}] end before they begin", raw.begin, raw.end))
    })?;
    let available = (file_len - data_start) as u64;
    if raw.end > available {
        let what = format!(
            "data_offsets [{}, {}] reach past the {available} bytes of data in the file",
            raw.begin, raw.end
        );
        return Err(wrong(&name, what));
    }
    if bits % 8 != 0 || bits / 8 != found {
        let what = format!(
            "shape {:?} of type {} needs {} bytes, data_offsets give {found}",
            raw.shape,
            raw.dtype,
            bits.div_ceil(8)
        );
        return Err(wrong(&name, what));
    }
    // A shape such as [0, 2^40] has few bytes but a dimension that a 32-bit machine cannot express.
    let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let shape =
        shape.ok_or_else(|| wrong(&name, format!("shape {:?} has too large a dimension", raw.shape)))?;
    // Both fit: they are at most the file's length.
    let (begin, end) = (data_start + raw.begin as usize, data_start + raw.end as usize);
    Ok(Entry { name, stored, shape, begin, end })
}

/// Checks that tensors, sorted by position, cover the data exactly.
fn check_cover(path: &Path, entries: &[Entry], data_start: usize, file_len: usize) -> Result<()> {
    let mut covered = data_start;
    for entry in entries {
        if entry.begin != covered {
            let kind = if entry.begin > covered { "a hole lies before it" } else { "it overlaps another" };
            return Err(Error::Tensor {
                path: path.to_owned(),
                tensor: shown(&entry.name),
                offset: entry.begin as u64,
                what: format!("{kind}: expected data that begin at offset {covered}"),
            });
        }
        covered = entry.end;
    }
    if covered != file_len {
        let what = format!("the tensors end here, but the file has {file_len} bytes");
        return Err(Error::Header { path: path.to_owned(), offset: covered as u64, what });
    }
    Ok(())
}

/// The header as it stands: counted and typed, not yet checked against the file.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    begin: u64,
    end: u64,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut metadata = None;
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        let UniqueStrings(strings) = map.next_value()?;
                        if metadata.replace(strings).is_some() {
                            return Err(A::Error::custom("`__metadata__` occurs twice"));
                        }
                        continue;
                    }
                    if tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let tensor = map.next_value_seed(TensorSeed(&name))?;
                    tensors.push((name, tensor));
                }
                Ok(RawHeader { metadata: metadata.unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(Header)
    }
}

/// One tensor's object; the name is for messages.
struct TensorSeed<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawTensor, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "an object with dtype, shape and data_offsets for tensor `{}`", shown(self.0))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let wrong = |e: A::Error| A::Error::custom(format!("tensor `{}`: {e}", shown(self.0)));
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>().map_err(wrong)?).is_some(),
                "shape" => {
                    shape.replace(map.next_value::<FewNumbers<MAX_RANK>>().map_err(wrong)?.0).is_some()
                }
                "data_offsets" => {
                    offsets.replace(map.next_value::<FewNumbers<2>>().map_err(wrong)?.0).is_some()
                }
                // The reference reader ignores other keys too.
                _ => map.next_value::<IgnoredAny>().map(|_| false)?,
            };
            if twice {
                return Err(wrong(A::Error::custom(format!("`{key}` occurs twice"))));
            }
        }
        let missing = |key: &str| wrong(A::Error::custom(format!("`{key}` is missing")));
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        let [begin, end] = offsets[..] else {
            return Err(wrong(A::Error::invalid_length(offsets.len(), &"2 data_offsets")));
        };
        Ok(RawTensor {
            dtype: dtype.ok_or_else(|| missing("dtype"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
            begin,
            end,
        })
    }
}

/// An array of at most `MOST` non-negative integers.
struct FewNumbers<const MOST: usize>(Vec<u64>);

impl<'de, const MOST: usize> Deserialize<'de> for FewNumbers<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers<const MOST: usize>;
        impl<'de, const MOST: usize> Visitor<'de> for Numbers<MOST> {
            type Value = Vec<u64>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "an array of at most {MOST} non-negative integers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
                let mut numbers = Vec::new();
                while let Some(n) = seq.next_element()? {
                    if numbers.len() == MOST {
                        return Err(A::Error::custom(format!("more than {MOST} numbers in the array")));
                    }
                    numbers.push(n);
                }
                Ok(numbers)
            }
        }
        deserializer.deserialize_seq(Numbers::<MOST>).map(FewNumbers)
    }
}

/// An object of strings in which no key occurs twice.
pub(crate) struct UniqueStrings(pub(crate) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = BTreeMap<String, String>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    match strings.entry(key) {
                        std::collections::btree_map::Entry::Vacant(place) => {
                            place.insert(value);
                        }
                        std::collections::btree_map::Entry::Occupied(there) => {
                            let what = format!("key `{}` occurs twice", shown(there.key()));
                            return Err(de::Error::custom(what));
                        }
                    }
                    if strings.len() > MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} strings")));
                    }
                }
                Ok(strings)
            }
        }
        deserializer.deserialize_map(Strings).map(UniqueStrings)
    }
}

#[cfg(test)]
mod tests;
