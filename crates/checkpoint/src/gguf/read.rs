//! Reading one GGUF file.
//!
//! Values are checked once and then read from the file's own bytes, so that a file of many small values costs no more
//! memory than a fixed amount per key and tensor. The layout of the data is held to what llama.cpp demands: tensors
//! follow each other in the order of their entries, each padded to the alignment, with nothing between or behind them.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;

use pocketglm_tensor::{DType, Tensor, TensorInfo, WeightSource};

use crate::error::shown;
use crate::gguf::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_DIMS, MAX_KEY_BYTES, MAX_KEYS, MAX_NAME_BYTES,
    kind,
};
use crate::mapped::FileBytes;
use crate::safetensors::source_error;
use crate::{Error, MAX_TENSORS, ReadMode, Result, first_non_finite};

/// Alignments that make sense: below 8 the specification forbids, above it would only waste space.
const ALIGNMENTS: RangeInclusive<u64> = 8..=65_536;
/// The least bytes that a key with its value, and a tensor's entry, take.
const LEAST_KEY: u64 = 8 + 1 + 4 + 1;
const LEAST_ENTRY: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// An opened GGUF file. Its tensors share the file's bytes.
///
/// Shapes are row-major: the reverse of the order in the file. Tensors of types that nothing here computes with
/// (Q8_K, IQ1_S, ...) do not prevent opening: they are in [`GgufFile::names`], but not in
/// [`WeightSource::tensors`], and asking for one is an error that names its type.
#[derive(Debug)]
pub struct GgufFile {
    file: FileBytes,
    version: u32,
    /// In the order of the file.
    keys: Vec<Key>,
    by_key: HashMap<String, usize>,
    /// In the order of their data.
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Key {
    name: String,
    /// Where its value begins, after the type.
    offset: usize,
    kind: u32,
}

#[derive(Debug)]
struct Entry {
    name: String,
    ggml: GgmlType,
    /// Slowest dimension first.
    shape: Vec<usize>,
    begin: usize,
    end: usize,
}

/// A value of the key-value section.
#[derive(Clone, Copy, Debug)]
pub enum GgufValue<'a> {
    /// A whole number of any width that is not negative.
    Unsigned(u64),
    /// A negative whole number.
    Negative(i64),
    /// A float32.
    Float32(f32),
    /// A float64.
    Float64(f64),
    /// True or false.
    Bool(bool),
    /// Text, which should be UTF-8.
    String(&'a [u8]),
    /// Values of one type.
    Array(GgufArray<'a>),
}

/// An array of the key-value section; its values are read as they are asked for.
#[derive(Clone, Copy, Debug)]
pub struct GgufArray<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> GgufArray<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values in order.
    pub fn iter(&self) -> impl Iterator<Item = GgufValue<'a>> + use<'a> {
        let (kind, mut rest) = (self.kind, self.bytes);
        // The bytes were checked to hold so many values; whatever is wrong here ends the sequence.
        (0..self.len).map_while(move |_| {
            let (value, used) = scalar(kind, rest)?;
            rest = rest.get(used..)?;
            Some(value)
        })
    }
}

impl GgufValue<'_> {
    fn describe(&self) -> String {
        match self {
            GgufValue::Unsigned(n) => n.to_string(),
            GgufValue::Negative(n) => n.to_string(),
            GgufValue::Float32(x) => x.to_string(),
            GgufValue::Float64(x) => x.to_string(),
            GgufValue::Bool(b) => b.to_string(),
            GgufValue::String(s) => {
                format!("{:?}", shown(&String::from_utf8_lossy(s.get(..60).unwrap_or(s))))
            }
            GgufValue::Array(a) => format!("an array of {} values of type {}", a.len, kind::name(a.kind)),
        }
    }
}

/// The value of a type other than array at the start of `bytes`, and the bytes that it takes.
fn scalar(kind: u32, bytes: &[u8]) -> Option<(GgufValue<'_>, usize)> {
    fn first<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
        bytes.first_chunk::<N>().copied()
    }
    let signed = |n: i64| match u64::try_from(n) {
        Ok(n) => GgufValue::Unsigned(n),
        Err(_) => GgufValue::Negative(n),
    };
    let value = match kind {
        kind::U8 => GgufValue::Unsigned(u8::from_le_bytes(first(bytes)?).into()),
        kind::I8 => signed(i8::from_le_bytes(first(bytes)?).into()),
        kind::U16 => GgufValue::Unsigned(u16::from_le_bytes(first(bytes)?).into()),
        kind::I16 => signed(i16::from_le_bytes(first(bytes)?).into()),
        kind::U32 => GgufValue::Unsigned(u32::from_le_bytes(first(bytes)?).into()),
        kind::I32 => signed(i32::from_le_bytes(first(bytes)?).into()),
        kind::U64 => GgufValue::Unsigned(u64::from_le_bytes(first(bytes)?)),
        kind::I64 => signed(i64::from_le_bytes(first(bytes)?)),
        kind::F32 => GgufValue::Float32(f32::from_le_bytes(first(bytes)?)),
        kind::F64 => GgufValue::Float64(f64::from_le_bytes(first(bytes)?)),
        kind::BOOL => GgufValue::Bool(first::<1>(bytes)? != [0]),
        kind::STRING => {
            let length = usize::try_from(u64::from_le_bytes(first(bytes)?)).ok()?;
            let end = length.checked_add(8)?;
            return Some((GgufValue::String(bytes.get(8..end)?), end));
        }
        _ => return None,
    };
    Some((value, kind::size(kind)?))
}

/// Reads the header from front to back; every step checks that its bytes are there.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        let slice = usize::try_from(n)
            .ok()
            .and_then(|n| self.bytes.get(self.at..)?.get(..n))
            .ok_or_else(|| format!("expected {n} more bytes, but {left} follow in the file"))?;
        self.at += slice.len();
        Ok(slice)
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))
    }

    fn u64(&mut self) -> Result<u64, String> {
        let bytes = self.take(8)?;
        Ok(bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)))
    }

    /// A name of 1 to `most` bytes of UTF-8.
    fn name(&mut self, most: usize) -> Result<String, String> {
        let length = self.u64()?;
        if length == 0 || length > most as u64 {
            return Err(format!("a name of {length} bytes, expected 1 to {most}"));
        }
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes)
            .map_err(|e| format!("a name that is not UTF-8 at its byte {}", e.valid_up_to()))?;
        Ok(text.to_owned())
    }

    /// Steps over a value of this type.
    fn skip_value(&mut self, kind: u32) -> Result<(), String> {
        match kind {
            kind::STRING => {
                let length = self.u64()?;
                self.take(length)?;
            }
            kind::ARRAY => {
                let inner = self.u32()?;
                let count = self.u64()?;
                match (inner, kind::size(inner)) {
                    (_, Some(size)) => {
                        let bytes = count
                            .checked_mul(size as u64)
                            .ok_or_else(|| format!("an array of {count} values of {size} bytes"))?;
                        self.take(bytes)?;
                    }
                    (kind::STRING, _) => {
                        let left = (self.bytes.len() - self.at) as u64;
                        if count > left / 8 {
                            return Err(format!("an array of {count} strings, but {left} bytes follow"));
                        }
                        for i in 0..count {
                            let length = self.u64()?;
                            self.take(length).map_err(|what| format!("string {i} of {count}: {what}"))?;
                        }
                    }
                    (kind::ARRAY, _) => {
                        return Err("an array of arrays, expected an array of numbers or strings".into());
                    }
                    _ => return Err(format!("an array of the unknown value type {inner}")),
                }
            }
            _ => {
                let size = kind::size(kind)
                    .ok_or_else(|| format!("the unknown value type {kind}, expected 0 to 12"))?;
                let bytes = self.take(size as u64)?;
                if kind == kind::BOOL && !matches!(bytes, [0 | 1]) {
                    return Err(format!("the bool {bytes:?}, expected 0 or 1"));
                }
            }
        }
        Ok(())
    }
}

impl GgufFile {
    /// Opens a file and checks its header against its length. No data are read.
    ///
    /// # Errors
    /// As [`FileBytes::open`] and [`GgufFile::parse`].
    pub fn open(path: &Path, mode: ReadMode) -> Result<GgufFile> {
        GgufFile::parse(FileBytes::open(path, mode)?)
    }

    /// Checks the header of a file that is opened already, or of bytes in memory.
    ///
    /// # Errors
    /// [`Error::GgufHeader`], [`Error::GgufKey`], [`Error::Tensor`], [`Error::Duplicate`].
    pub fn parse(file: FileBytes) -> Result<GgufFile> {
        let path = file.path();
        let mut cursor = Cursor { bytes: file.bytes().as_slice(), at: 0 };
        let (version, tensor_count, key_count) = head(&mut cursor, path)?;

        let mut keys = Vec::new();
        let mut by_key = HashMap::new();
        for i in 0..key_count {
            let key = parse_key(&mut cursor, path, i)?;
            if by_key.insert(key.name.clone(), keys.len()).is_some() {
                let what = "occurs twice".to_owned();
                let (key, offset) = (shown(&key.name), key.offset as u64);
                return Err(Error::GgufKey { path: path.to_owned(), key, offset, what });
            }
            keys.push(key);
        }
        let alignment = alignment(path, &keys, &by_key, cursor.bytes)?;
        let entries = parse_entries(&mut cursor, path, tensor_count, alignment)?;
        let mut by_name = HashMap::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            if by_name.insert(entry.name.clone(), i).is_some() {
                let place = path.display().to_string();
                let tensor = shown(&entry.name);
                return Err(Error::Duplicate { tensor, first: place.clone(), second: place });
            }
        }
        Ok(GgufFile { file, version, keys, by_key, entries, by_name })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The keys in the order of the file, with their values.
    pub fn keys(&self) -> impl Iterator<Item = (&str, GgufValue<'_>)> {
        self.keys.iter().filter_map(|k| Some((k.name.as_str(), value(k, self.file.bytes().as_slice())?)))
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<GgufValue<'_>> {
        value(self.key(key)?, self.file.bytes().as_slice())
    }

    /// The error for a key that does not hold what is needed.
    pub fn key_error(&self, key: &str, wanted: impl std::fmt::Display) -> Error {
        let found = self.value(key).map_or_else(|| "nothing".to_owned(), |v| v.describe());
        let offset = self.key(key).map_or(0, |k| k.offset as u64);
        let what = format!("must be {wanted}, found {found}");
        Error::GgufKey { path: self.path().to_owned(), key: shown(key), offset, what }
    }

    /// A whole number within `range`; `None` where the key is absent.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn integer(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = match value {
            GgufValue::Unsigned(n) => usize::try_from(n).ok().filter(|n| range.contains(n)),
            _ => None,
        };
        let wanted = || format!("a whole number from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.key_error(key, wanted()))
    }

    /// A whole number within `range` that must be there.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn required(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        self.integer(key, range)?.ok_or_else(|| self.key_error(key, wanted))
    }

    /// A number within `range`. A float32 gives the shortest decimal that reads back as the same float32, which is
    /// what a JSON file would have had.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let wanted = || format!("a number from {} to {}", range.start(), range.end());
        let number = number(value).filter(|x| range.contains(x));
        number.map(Some).ok_or_else(|| self.key_error(key, wanted()))
    }

    /// True or false.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::Bool(b)) => Ok(Some(b)),
            Some(_) => Err(self.key_error(key, "a bool")),
        }
    }

    /// Text.
    ///
    /// # Errors
    /// [`Error::GgufKey`] where it is not a string, or not UTF-8.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::String(s)) => match std::str::from_utf8(s) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(self.key_error(key, "a string in UTF-8")),
            },
            Some(_) => Err(self.key_error(key, "a string")),
        }
    }

    /// An array.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn array(&self, key: &str) -> Result<Option<GgufArray<'_>>> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::Array(array)) => Ok(Some(array)),
            Some(_) => Err(self.key_error(key, "an array")),
        }
    }

    /// An array of exactly `N` numbers within `range`.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub fn numbers<const N: usize>(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<[f64; N]>> {
        let Some(array) = self.array(key)? else { return Ok(None) };
        let wanted = || format!("{N} numbers from {} to {}", range.start(), range.end());
        let list: Option<Vec<f64>> = (array.len() == N)
            .then(|| array.iter().map(|v| number(v).filter(|x| range.contains(x))).collect())
            .flatten();
        let list = list.and_then(|l| <[f64; N]>::try_from(l).ok());
        list.map(Some).ok_or_else(|| self.key_error(key, wanted()))
    }

    /// The names of all tensors in the order of their data, also of those with unsupported types.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// Whether there is a tensor of this name, be its type supported or not.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Shape of a tensor, slowest dimension first, be its type supported or not.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entry(name).map(|e| e.shape.as_slice())
    }

    /// Where the data of a tensor begin in the file; 0 where there is none.
    pub(crate) fn offset(&self, name: &str) -> u64 {
        self.entry(name).map_or(0, |e| e.begin as u64)
    }

    /// The tensor, sharing the file's bytes.
    ///
    /// # Errors
    /// [`Error::NoTensor`], [`Error::Unsupported`], [`Error::Changed`] where the file was truncated since.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let path = || self.path().to_owned();
        let entry = self.entry(name).ok_or_else(|| Error::NoTensor { tensor: shown(name), place: path() })?;
        let Some(dtype) = entry.ggml.dtype else {
            let found = entry.ggml.name.to_owned();
            return Err(Error::Unsupported { path: path(), tensor: shown(name), found, wanted: SUPPORTED });
        };
        self.file.check_length()?;
        let wrong =
            |what| Error::Tensor { path: path(), tensor: shown(name), offset: entry.begin as u64, what };
        let bytes = self.file.bytes().slice(entry.begin..entry.end);
        let bytes = bytes.ok_or_else(|| wrong("its bytes lie outside of the file".to_owned()))?;
        Tensor::new(dtype, &entry.shape, bytes).map_err(|e| wrong(e.to_string()))
    }

    /// Reads every tensor of a supported type and looks for NaN and infinity, in quantised tensors among the scales.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for the first one in the order of the data.
    pub fn check_finite(&self) -> Result<()> {
        for entry in self.entries.iter().filter(|e| e.ggml.dtype.is_some()) {
            if let Some(index) = first_non_finite(&self.get(&entry.name)?) {
                let path = self.path().to_owned();
                return Err(Error::NonFinite { path, tensor: shown(&entry.name), index });
            }
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).and_then(|&i| self.entries.get(i))
    }

    fn key(&self, name: &str) -> Option<&Key> {
        self.by_key.get(name).and_then(|&i| self.keys.get(i))
    }
}

const SUPPORTED: &str =
    "F32, F16, BF16, I64, I32, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL or IQ4_XS";

impl Entry {
    fn info(&self) -> Option<TensorInfo> {
        let dtype: DType = self.ggml.dtype?;
        Some(TensorInfo { name: self.name.clone(), dtype, shape: self.shape.clone() })
    }
}

impl WeightSource for GgufFile {
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

/// A finite or infinite number of any kind; a float32 by its shortest decimal.
fn number(value: GgufValue<'_>) -> Option<f64> {
    match value {
        GgufValue::Unsigned(n) => Some(n as f64),
        GgufValue::Negative(n) => Some(n as f64),
        GgufValue::Float32(x) => x.to_string().parse().ok(),
        GgufValue::Float64(x) => Some(x),
        _ => None,
    }
}

/// The value of a key. The file was checked to hold it.
fn value<'a>(key: &Key, bytes: &'a [u8]) -> Option<GgufValue<'a>> {
    let bytes = bytes.get(key.offset..)?;
    if key.kind != kind::ARRAY {
        return scalar(key.kind, bytes).map(|(value, _)| value);
    }
    let mut cursor = Cursor { bytes, at: 0 };
    let (kind, len) = (cursor.u32().ok()?, cursor.u64().ok()?);
    Some(GgufValue::Array(GgufArray {
        kind,
        len: usize::try_from(len).ok()?,
        bytes: bytes.get(cursor.at..)?,
    }))
}

/// Magic, version and counts: version, tensors, keys.
fn head(cursor: &mut Cursor<'_>, path: &Path) -> Result<(u32, u64, u64)> {
    let wrong = |offset, what| Error::GgufHeader { path: path.to_owned(), offset, what };
    let length = cursor.bytes.len() as u64;
    let magic = cursor.take(4).map_err(|what| wrong(0, what))?;
    if magic != MAGIC {
        return Err(wrong(0, format!("expected the magic `GGUF`, found {magic:02x?}")));
    }
    let version = cursor.u32().map_err(|what| wrong(4, what))?;
    if version != 0 && version & 0xffff == 0 {
        let what = format!("a big-endian file (version {}), expected little-endian", version.swap_bytes());
        return Err(wrong(4, what));
    }
    if !matches!(version, 2 | 3) {
        return Err(wrong(4, format!("version {version}, expected 2 or 3")));
    }
    let tensors = cursor.u64().map_err(|what| wrong(8, what))?;
    let keys = cursor.u64().map_err(|what| wrong(16, what))?;
    for (offset, what, count, most, least) in [
        (8, "tensors", tensors, MAX_TENSORS as u64, LEAST_ENTRY),
        (16, "keys", keys, MAX_KEYS as u64, LEAST_KEY),
    ] {
        if count > most {
            return Err(wrong(offset, format!("{count} {what}, expected at most {most}")));
        }
        // Both factors are small, so this cannot overflow.
        if count * least > length {
            let what = format!("{count} {what} need at least {} bytes, the file has {length}", count * least);
            return Err(wrong(offset, what));
        }
    }
    Ok((version, tensors, keys))
}

fn parse_key(cursor: &mut Cursor<'_>, path: &Path, index: u64) -> Result<Key> {
    let begin = cursor.at as u64;
    let name = cursor.name(MAX_KEY_BYTES).map_err(|what| Error::GgufHeader {
        path: path.to_owned(),
        offset: begin,
        what: format!("key {index}: {what}"),
    })?;
    let offset = cursor.at as u64;
    let wrong = |what| Error::GgufKey { path: path.to_owned(), key: shown(&name), offset, what };
    let kind = cursor.u32().map_err(wrong)?;
    let offset = cursor.at;
    cursor.skip_value(kind).map_err(wrong)?;
    Ok(Key { name, offset, kind })
}

/// The alignment of tensor data. Its type must be the one that the specification gives it: a reader that takes
/// another would read its value from other bytes.
fn alignment(path: &Path, keys: &[Key], by_key: &HashMap<String, usize>, bytes: &[u8]) -> Result<u64> {
    let Some(key) = by_key.get(ALIGNMENT_KEY).and_then(|&i| keys.get(i)) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let wanted = format!("a power of two from {} to {} as uint32", ALIGNMENTS.start(), ALIGNMENTS.end());
    match value(key, bytes) {
        Some(GgufValue::Unsigned(n))
            if key.kind == kind::U32 && ALIGNMENTS.contains(&n) && n.is_power_of_two() =>
        {
            Ok(n)
        }
        found => {
            let found = found.map_or_else(|| "nothing".to_owned(), |v| v.describe());
            let what = format!("must be {wanted}, found {found} of type {}", kind::name(key.kind));
            let (key, offset) = (key.name.clone(), key.offset as u64);
            Err(Error::GgufKey { path: path.to_owned(), key, offset, what })
        }
    }
}

/// The tensors' entries, with byte ranges that lie in the file and follow each other.
fn parse_entries(cursor: &mut Cursor<'_>, path: &Path, count: u64, alignment: u64) -> Result<Vec<Entry>> {
    let file_len = cursor.bytes.len() as u64;
    let mut raw = Vec::new();
    for i in 0..count {
        let begin = cursor.at as u64;
        let name = cursor.name(MAX_NAME_BYTES).map_err(|what| Error::GgufHeader {
            path: path.to_owned(),
            offset: begin,
            what: format!("tensor {i}: {what}"),
        })?;
        let offset = cursor.at as u64;
        let wrong = |what| Error::Tensor { path: path.to_owned(), tensor: shown(&name), offset, what };
        let (ggml, shape, bytes, at) = parse_entry(cursor).map_err(wrong)?;
        raw.push((name, ggml, shape, bytes, at));
    }
    // All that follows is at most the file's length and an alignment, so nothing can wrap.
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    let available = file_len.saturating_sub(data_start);
    let mut entries = Vec::with_capacity(raw.len());
    let mut covered = 0u64;
    for (name, ggml, shape, bytes, at) in raw {
        let offset = data_start.saturating_add(at);
        let wrong = |what| Err(Error::Tensor { path: path.to_owned(), tensor: shown(&name), offset, what });
        if !at.is_multiple_of(alignment) {
            return wrong(format!("its offset {at} is no multiple of the alignment {alignment}"));
        }
        if at > available || bytes > available - at {
            return wrong(format!(
                "{bytes} bytes from offset {at} on reach past the {available} bytes of data in the file"
            ));
        }
        if at != covered {
            let kind = if at > covered { "a hole lies before it" } else { "it overlaps another" };
            return wrong(format!("{kind}: expected data that begin at offset {covered}, found {at}"));
        }
        covered = (at + bytes).next_multiple_of(alignment);
        // Both are within the file, whose length is a usize.
        let (begin, end) = (offset as usize, (offset + bytes) as usize);
        entries.push(Entry { name, ggml, shape, begin, end });
    }
    let end = data_start.saturating_add(covered);
    if !entries.is_empty() && end < file_len {
        let what = format!("the tensors end here, but the file has {file_len} bytes");
        return Err(Error::GgufHeader { path: path.to_owned(), offset: end, what });
    }
    Ok(entries)
}

/// One entry after its name: type, row-major shape, bytes, offset in the data.
fn parse_entry(cursor: &mut Cursor<'_>) -> Result<(GgmlType, Vec<usize>, u64, u64), String> {
    let dims = cursor.u32()?;
    if dims == 0 || dims as usize > MAX_DIMS {
        return Err(format!("{dims} dimensions, expected 1 to {MAX_DIMS}"));
    }
    let mut shape = Vec::with_capacity(MAX_DIMS);
    for i in 0..dims {
        let n = cursor.u64()?;
        match usize::try_from(n) {
            Ok(size) if size > 0 && n <= i64::MAX as u64 => shape.push(size),
            _ => return Err(format!("dimension {i} is {n}, expected 1 to {}", i64::MAX)),
        }
    }
    let id = cursor.u32()?;
    let ggml = GgmlType::of_id(id).ok_or_else(|| format!("unknown element type {id}"))?;
    let row = shape.first().copied().unwrap_or(1) as u64;
    if !row.is_multiple_of(ggml.values) {
        return Err(format!(
            "rows of {row} values, expected a multiple of the {} of a {} block",
            ggml.values, ggml.name
        ));
    }
    let rows = shape.iter().skip(1).try_fold(1u64, |n, &d| n.checked_mul(d as u64));
    let bytes = rows.and_then(|rows| (row / ggml.values).checked_mul(ggml.bytes)?.checked_mul(rows));
    // Elements are counted too: blocks of few bytes could have more elements than a usize counts.
    let elements = rows.and_then(|rows| rows.checked_mul(row)).filter(|&n| usize::try_from(n).is_ok());
    let (Some(bytes), Some(_)) = (bytes, elements) else {
        return Err(format!("dimensions {shape:?} have too many elements"));
    };
    shape.reverse();
    let at = cursor.u64()?;
    Ok((ggml, shape, bytes, at))
}

#[cfg(test)]
mod tests;
