//! `.pglm` files: a model with everything that belongs to it in one valid safetensors file.
//!
//! Tensors of plain types stand as they are; quantised ones stand as U8 of their bytes; side files (`config.json`,
//! `tokenizer.json`, ...) stand as U8 under `file:NAME`. All data begin at multiples of 64: where a length is none, a
//! tensor `pad:N` of zeros fills the gap, since the format has no holes. `file:tokenizer.tables`, which may be absent, is
//! 32 bytes, the SHA-256 of `file:tokenizer.json`, and the same tokenizer in a form that needs no parsing; where the hash is another
//! one, or the form one that a reader does not know, it reads the JSON. `__metadata__` holds
//!
//! * `pglm.version`: `1`;
//! * `pglm.tensors`: a JSON object of every tensor but the fillers: its format's name (`dtype`), its shape, the order
//!   of its bytes (`layout`), and the SHA-256 of its bytes. The layout is `rows`, row after row as [`DType`] describes,
//!   or `panels-16`, as the kernels read it ([`Packed`]): then loading is a map. Matrices are written in panels, but
//!   not the embedding table, of which rows are read. A matrix in panels may have an `input_range`: the largest magnitude
//!   of its input, whose scale is then fixed;
//! * `pglm.policy`, `pglm.calibration`: how the model was quantised, where that is known;
//! * `pglm.header`: the SHA-256 of the header with these 64 digits as zeros.

mod together;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use pocketglm_quant::{put_together, take_apart};
use pocketglm_tensor::{Bytes, Cpu, DType, Packed, PackedFormat, RowCodes, Tensor, TensorInfo, WeightSource};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::shown;
use crate::file::{AtomicFile, join_plain, refuse_inputs};
use crate::safetensors::{METADATA_KEY, source_error};
use crate::target::{Place, Target};
use crate::{
    Error, MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, ReadMode, Result, SafetensorsFile, first_non_finite,
};
pub use together::RowMaker;

const VERSION_KEY: &str = "pglm.version";
const VERSION: &str = "1";
const TENSORS_KEY: &str = "pglm.tensors";
const POLICY_KEY: &str = "pglm.policy";
const CALIBRATION_KEY: &str = "pglm.calibration";
const HEADER_KEY: &str = "pglm.header";
/// Begins the metadata keys that are this module's.
const OWN_KEYS: &str = "pglm.";
const FILE_SCOPE: &str = "file:";
const PAD_SCOPE: &str = "pad:";
/// What the place of every tensor is a multiple of: a cache line, and the widest vector.
const ALIGNMENT: u64 = 64;
/// Row after row.
const ROWS: &str = "rows";
/// Panels of sixteen rows, see [`Packed`].
const PANELS: &str = "panels-16";
/// The end of the names of tables of which rows are read.
const TABLES: &str = "embed_tokens.weight";
/// Bytes of the hash in front of what was made of a side file.
const MADE_OF: usize = 32;
/// A hash that is not known yet; its length is that of every hash.
const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Bytes that are hashed between two calls of a progress function, and that are written before they are hashed.
const STEP: usize = 8 << 20;

/// One tensor in `pglm.tensors`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    dtype: String,
    shape: Vec<usize>,
    layout: String,
    sha256: String,
    /// The largest magnitude of what the matrix is multiplied with, where it is fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input_range: Option<f32>,
}

/// The digits of a hash.
fn hex(digest: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |n: u8| DIGITS.get(usize::from(n)).map_or('0', |&d| char::from(d));
    digest.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The stored type and shape of a tensor.
fn stored(dtype: DType, shape: &[usize], layout: &str) -> Option<(DType, Vec<usize>)> {
    if layout == PANELS {
        let (format, &[rows, k]) = (PackedFormat::of(dtype)?, shape) else { return None };
        dtype.row_bytes(k)?;
        return Some((DType::U8, vec![Packed::bytes_for(format, rows, k).ok()?]));
    }
    match dtype.is_quantised() {
        true => Some((DType::U8, vec![dtype.bytes(shape)?])),
        false => Some((dtype, shape.to_vec())),
    }
}

/// The order in which the bytes of a tensor are written.
fn layout_of(name: &str, dtype: DType, shape: &[usize]) -> &'static str {
    let matrix = shape.len() == 2 && PackedFormat::of(dtype).is_some() && !shape.contains(&0);
    if matrix && !name.ends_with(TABLES) { PANELS } else { ROWS }
}

/// An opened `.pglm` file. Its tensors share the file's bytes.
#[derive(Debug)]
pub struct PglmFile {
    file: SafetensorsFile,
    rows: HashMap<String, (DType, Row)>,
}

/// A side file whose hash has not been looked at, so that this can be done on another thread.
#[derive(Clone, Debug)]
pub struct Unchecked {
    bytes: Bytes,
    path: PathBuf,
    name: String,
    wanted: String,
}

impl Unchecked {
    /// Bytes that [`Unchecked::check`] gives. They may be looked at before, but not relied on.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice().get(MADE_OF..).unwrap_or_default()
    }

    /// What was made, once its hash is that in the header.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn check(self) -> Result<Bytes> {
        check_hash(&self.path, &self.name, &self.wanted, sha256(self.bytes.as_slice()))?;
        Ok(self.bytes.slice(MADE_OF..self.bytes.len()).unwrap_or_else(|| Vec::new().into()))
    }
}

fn check_hash(path: &Path, name: &str, wanted: &str, found: String) -> Result<()> {
    if wanted == found {
        return Ok(());
    }
    let part = format!("tensor `{}`", shown(name));
    Err(Error::Damaged { path: path.to_owned(), part, wanted: wanted.to_owned(), found })
}

impl PglmFile {
    /// Opens a file, and checks its header against its length and its hash. No data are read.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`] and [`PglmFile::new`].
    pub fn open(path: &Path, mode: ReadMode) -> Result<PglmFile> {
        PglmFile::new(SafetensorsFile::open(path, mode)?)
    }

    /// Whether a safetensors file says that it is one.
    pub fn is_one(file: &SafetensorsFile) -> bool {
        file.metadata().contains_key(VERSION_KEY)
    }

    /// Checks the metadata of an opened file.
    ///
    /// # Errors
    /// [`Error::Pglm`] where they are missing, of another version, or contradict the tensors; [`Error::Damaged`]
    /// where the header has another hash than it says.
    pub fn new(file: SafetensorsFile) -> Result<PglmFile> {
        let path = file.path().to_owned();
        let wrong = |what: String| Error::Pglm { path: path.clone(), what };
        let metadata = |key: &str| {
            let value = file.metadata().get(key).map(String::as_str);
            value.ok_or_else(|| wrong(format!("no `{key}`: this is no pglm file")))
        };
        let version = metadata(VERSION_KEY)?;
        if version != VERSION {
            return Err(wrong(format!("version `{}`, expected {VERSION}", shown(version))));
        }
        check_header(&file, metadata(HEADER_KEY)?)?;
        let table: BTreeMap<String, Row> = serde_json::from_str(metadata(TENSORS_KEY)?)
            .map_err(|e| wrong(format!("`{TENSORS_KEY}`: {}", shown(&e.to_string()))))?;
        let mut rows = HashMap::with_capacity(table.len());
        for (name, row) in table {
            let dtype = check_row(&file, &name, &row)
                .map_err(|what| wrong(format!("tensor `{}`: {what}", shown(&name))))?;
            rows.insert(name, (dtype, row));
        }
        let stray = file.names().find(|name| !name.starts_with(PAD_SCOPE) && !rows.contains_key(*name));
        if let Some(stray) = stray {
            return Err(wrong(format!("tensor `{}` is not in `{TENSORS_KEY}`", shown(stray))));
        }
        Ok(PglmFile { file, rows })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The hash of the header, and thereby of all content: two files with the same one hold the same model.
    pub fn hash(&self) -> &str {
        self.file.metadata().get(HEADER_KEY).map_or("", String::as_str)
    }

    /// How the model was quantised, as the text of its precision policy.
    pub fn policy(&self) -> Option<&str> {
        self.file.metadata().get(POLICY_KEY).map(String::as_str)
    }

    /// What the model was calibrated with.
    pub fn calibration(&self) -> Option<&str> {
        self.file.metadata().get(CALIBRATION_KEY).map(String::as_str)
    }

    /// The strings under `__metadata__` that are not this format's own.
    pub fn extra(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.file.metadata().iter().map(|(k, v)| (k.as_str(), v.as_str()));
        all.filter(|(key, _)| !key.starts_with(OWN_KEYS))
    }

    /// The names of the side files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.file.names().filter_map(|name| name.strip_prefix(FILE_SCOPE))
    }

    /// A side file; `None` where there is none of that name. It is small, and read as a whole: its hash is looked at every time.
    ///
    /// # Errors
    /// [`Error::Damaged`]; [`Error::Changed`] where the file was truncated since it was opened.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>> {
        let name = format!("{FILE_SCOPE}{name}");
        if !self.file.contains(&name) {
            return Ok(None);
        }
        let bytes = self.file.get(&name)?.shared_bytes();
        self.check_hash(&name, sha256(bytes.as_slice()))?;
        Ok(Some(bytes))
    }

    /// What was made of the side file `of` and stands in the file as the side file `name`: 32 bytes, the SHA-256 of `of`, and
    /// what was made. `None` where there is none, or one of another `of`, which is not read.
    ///
    /// # Errors
    /// [`Error::Changed`] where the file was truncated since it was opened.
    pub fn made_of(&self, of: &str, name: &str) -> Result<Option<Unchecked>> {
        let name = format!("{FILE_SCOPE}{name}");
        let (Some((_, source)), Some((_, row))) =
            (self.rows.get(&format!("{FILE_SCOPE}{of}")), self.rows.get(&name))
        else {
            return Ok(None);
        };
        let bytes = self.file.get(&name)?.shared_bytes();
        if bytes.as_slice().get(..MADE_OF).map(hex).as_deref() != Some(source.sha256.as_str()) {
            return Ok(None);
        }
        Ok(Some(Unchecked { bytes, path: self.path().to_owned(), name, wanted: row.sha256.clone() }))
    }

    /// The content of a side file that [`PglmFile::made_of`] finds: `made` of the bytes `of`.
    pub fn content_made_of(of: &[u8], made: &[u8]) -> Vec<u8> {
        [Sha256::digest(of).as_slice(), made].concat()
    }

    /// Compares the hash of a tensor's or side file's bytes with the one in the header.
    fn check_hash(&self, name: &str, found: String) -> Result<()> {
        let wanted = self.rows.get(name).map_or("", |(_, row)| &row.sha256);
        check_hash(self.path(), name, wanted, found)
    }

    /// The tensor, sharing the file's bytes.
    ///
    /// # Errors
    /// [`Error::NoTensor`], [`Error::Changed`].
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let row = self.rows.get(name).filter(|_| is_weight(name));
        let Some((dtype, row)) = row else {
            return Err(Error::NoTensor { tensor: shown(name), place: self.path().to_owned() });
        };
        let mut bytes = self.file.get(name)?.shared_bytes();
        if let Some(packed) = self.get_packed(name)? {
            bytes = self.unpacked(name, *dtype, &packed)?;
        }
        Tensor::new(*dtype, &row.shape, bytes).map_err(|e| self.wrong(name, e.to_string()))
    }

    fn wrong(&self, name: &str, what: String) -> Error {
        Error::Pglm { path: self.path().to_owned(), what: format!("tensor `{}`: {what}", shown(name)) }
    }

    /// The rows that panels were packed from.
    fn unpacked(&self, name: &str, dtype: DType, packed: &Packed) -> Result<Bytes> {
        let mut bytes = Vec::new();
        let mut codes = RowCodes::default();
        for row in 0..packed.rows() {
            packed.row_codes(row, &mut codes).ok_or_else(|| self.wrong(name, format!("no row {row}")))?;
            put_together(dtype, &codes, &mut bytes)
                .map_err(|e| self.wrong(name, format!("row {row}: {e}")))?;
        }
        Ok(bytes.into())
    }

    /// The matrix in the kernels' layout, sharing the file's bytes; `None` where it is stored in rows.
    ///
    /// # Errors
    /// As for [`PglmFile::get`].
    pub fn get_packed(&self, name: &str) -> Result<Option<Packed>> {
        let Some((dtype, row)) = self.rows.get(name).filter(|(_, row)| row.layout == PANELS) else {
            return Ok(None);
        };
        let (Some(format), &[rows, k]) = (PackedFormat::of(*dtype), &row.shape[..]) else { return Ok(None) };
        let bytes = self.file.get(name)?.shared_bytes();
        let packed = Packed::from_bytes(format, rows, k, bytes).and_then(|packed| match row.input_range {
            Some(range) => packed.with_input_range(range),
            None => Ok(packed),
        });
        packed.map(Some).map_err(|e| self.wrong(name, e.to_string()))
    }

    /// Reads every tensor and looks for NaN and infinity, in quantised tensors among the scales.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for the first one in the order of the data.
    pub fn check_finite(&self) -> Result<()> {
        for name in self.file.names().filter(|name| is_weight(name)) {
            if let Some(index) = first_non_finite(&self.get(name)?) {
                return Err(Error::NonFinite { path: self.path().to_owned(), tensor: shown(name), index });
            }
        }
        Ok(())
    }

    /// Reads all data and compares their hashes with those in the header. `progress` hears of bytes done and in all.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first part that is not as it was written, in the order of the data.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let length = |name: &str| self.file.info(name).map_or(0, |info| info.bytes() as u64);
        let total = self.file.names().map(length).sum();
        let mut done = 0;
        for name in self.file.names() {
            let tensor = self.file.get(name)?;
            let mut hash = Sha256::new();
            let mut zeros = true;
            for piece in tensor.bytes().chunks(STEP) {
                match self.rows.contains_key(name) {
                    true => hash.update(piece),
                    false => zeros &= piece.iter().all(|&b| b == 0),
                }
                done += piece.len() as u64;
                progress(done, total);
            }
            if self.rows.contains_key(name) {
                self.check_hash(name, hex(&hash.finalize()))?;
            } else if !zeros {
                let (path, part) = (self.path().to_owned(), format!("tensor `{}`", shown(name)));
                let (wanted, found) = ("of zeros".to_owned(), "that of other bytes".to_owned());
                return Err(Error::Damaged { path, part, wanted, found });
            }
        }
        Ok(())
    }

    fn row_info(&self, name: &str) -> Option<TensorInfo> {
        let (dtype, row) = self.rows.get(name).filter(|_| is_weight(name))?;
        Some(TensorInfo { name: name.to_owned(), dtype: *dtype, shape: row.shape.clone() })
    }
}

fn is_weight(name: &str) -> bool {
    !name.starts_with(FILE_SCOPE) && !name.starts_with(PAD_SCOPE)
}

/// Checks the header's hash, which was taken with zeros in its own place.
fn check_header(file: &SafetensorsFile, wanted: &str) -> Result<()> {
    let wrong = |what: String| Error::Pglm { path: file.path().to_owned(), what };
    if wanted.len() != NO_HASH.len() || !wanted.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(wrong(format!("`{HEADER_KEY}` is `{}`, expected 64 digits", shown(wanted))));
    }
    let header = file.header();
    let entry = format!("\"{HEADER_KEY}\":\"{wanted}\"");
    let place = find(header, entry.as_bytes());
    let (Some(at), 1) = place else {
        return Err(wrong(format!("`{HEADER_KEY}` stands {} times as it is written here", place.1)));
    };
    let digits = at + entry.len() - 1 - NO_HASH.len();
    let mut hash = Sha256::new();
    hash.update(header.get(..digits).unwrap_or_default());
    hash.update(NO_HASH);
    hash.update(header.get(digits + NO_HASH.len()..).unwrap_or_default());
    let found = hex(&hash.finalize());
    if found != wanted {
        let (path, part) = (file.path().to_owned(), "the header".to_owned());
        return Err(Error::Damaged { path, part, wanted: wanted.to_owned(), found });
    }
    Ok(())
}

/// Where `needle` stands first in `bytes`, and how often.
fn find(bytes: &[u8], needle: &[u8]) -> (Option<usize>, usize) {
    let mut places = bytes.windows(needle.len()).enumerate().filter(|(_, w)| *w == needle).map(|(i, _)| i);
    let first = places.next();
    (first, usize::from(first.is_some()) + places.count())
}

/// Checks one row of the table against the stored tensor; an error is the message.
fn check_row(file: &SafetensorsFile, name: &str, row: &Row) -> Result<DType, String> {
    let Some(info) = file.info(name) else { return Err("the file has no such tensor".into()) };
    let dtype =
        DType::from_name(&row.dtype).ok_or_else(|| format!("unknown format `{}`", shown(&row.dtype)))?;
    if row.layout != ROWS && row.layout != PANELS {
        return Err(format!("unknown layout `{}`, expected {ROWS} or {PANELS}", shown(&row.layout)));
    }
    if row.shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, expected at most {MAX_RANK}", row.shape.len()));
    }
    let elements = row.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let wanted = elements.and_then(|_| stored(dtype, &row.shape, &row.layout));
    let Some((kind, shape)) = wanted else {
        return Err(format!("shape {:?} is none of the format {dtype}", row.shape));
    };
    if (info.dtype, &info.shape) != (kind, &shape) {
        return Err(format!(
            "stored as {} of shape {:?}, but shape {:?} of the format {dtype} needs {kind} of shape {shape:?}",
            info.dtype, info.shape, row.shape
        ));
    }
    if !is_weight(name) && (dtype != DType::U8 || row.shape.len() != 1) {
        return Err("a side file must be one run of bytes".into());
    }
    if let Some(range) = row.input_range
        && (row.layout != PANELS || !(range > 0.0 && range.is_finite()))
    {
        return Err(format!("an input range of {range}, expected a number above 0 and the layout {PANELS}"));
    }
    if row.sha256.len() != NO_HASH.len() {
        return Err(format!("the hash `{}`, expected 64 digits", shown(&row.sha256)));
    }
    Ok(dtype)
}

impl WeightSource for PglmFile {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.file.names().filter_map(|name| self.row_info(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.row_info(name)
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        self.get(name).map_err(|e| source_error(e, name, self.path()))
    }

    fn packed(&self, name: &str) -> pocketglm_tensor::Result<Option<Packed>> {
        self.get_packed(name).map_err(|e| source_error(e, name, self.path()))
    }
}

/// What goes into a `.pglm` file, but for the tensors' bytes.
#[derive(Clone, Debug, Default)]
pub struct PglmContents<'a> {
    /// The tensors in the order of their data, with the formats in which they are stored.
    pub tensors: Vec<TensorInfo>,
    /// Side files: plain file name and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// The text of the precision policy.
    pub policy: Option<&'a str>,
    /// What the model was calibrated with.
    pub calibration: Option<&'a str>,
    /// The largest magnitude of a matrix's input, by the matrix's name, where its scale is to be fixed.
    pub input_ranges: BTreeMap<String, f32>,
    /// More strings for `__metadata__`, under keys that do not begin with `pglm.`.
    pub extra: BTreeMap<String, String>,
}

/// Writes a `.pglm` file tensor by tensor without holding any.
///
/// Until [`PglmWriter::finish`] the file is `.NAME.partial` beside the target, whose old content stays. Dropping the
/// writer removes it; what a killed process leaves there is replaced by the next writer of the same target. Two
/// writers of one target at once are refused.
pub struct PglmWriter {
    file: Target,
    path: PathBuf,
    parts: Vec<Part>,
    by_name: HashMap<String, usize>,
    metadata: Vec<(String, String)>,
    header_length: u64,
    /// Packs panels; made when the first ones are.
    cpu: Option<Cpu>,
}

/// Writes every tensor of `source` with these contents, whose own list of tensors is not used. `progress` hears of
/// bytes done and in all.
///
/// # Errors
/// [`Error::Weights`] where the source fails, and those of [`PglmWriter`].
pub fn export_pglm(
    path: &Path,
    source: &dyn WeightSource,
    contents: PglmContents<'_>,
    inputs: &[&Path],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let contents = PglmContents { tensors: source.tensors(), ..contents };
    let mut writer = PglmWriter::create(path, &contents, inputs)?;
    let total = contents.tensors.iter().map(|t| t.bytes() as u64).sum();
    let mut done = 0;
    for info in &contents.tensors {
        let tensor = source.tensor(&info.name).map_err(|source| Error::Weights { source })?;
        if (tensor.dtype(), tensor.shape()) != (info.dtype, &info.shape[..]) {
            let what = format!("tensor `{}` is not of the format that was declared", shown(&info.name));
            return Err(Error::Write { path: path.to_owned(), what });
        }
        writer.write(&info.name, tensor.bytes())?;
        done += info.bytes() as u64;
        progress(done, total);
    }
    writer.finish()
}

struct Part {
    name: String,
    /// The format, with the shape in elements.
    dtype: DType,
    shape: Vec<usize>,
    /// Byte range in the data.
    begin: u64,
    end: u64,
    written: u64,
    /// Whether it fills a gap: such a part has no hash.
    filler: bool,
    digest: String,
    layout: &'static str,
    input_range: Option<f32>,
    /// Rows that were packed, and bytes of rows that wait for a panel to be full.
    packed_rows: usize,
    pending: Vec<u8>,
}

impl PglmWriter {
    /// Starts a file, and writes its side files. `inputs` are files that must not be replaced: those that the tensors
    /// are read from.
    ///
    /// # Errors
    /// [`Error::Write`] where the target is an input or another process writes it, a name occurs twice or is not
    /// allowed, or sizes pass what [`PglmFile`] reads; [`Error::Io`].
    pub fn create(path: &Path, contents: &PglmContents<'_>, inputs: &[&Path]) -> Result<PglmWriter> {
        refuse_inputs(path, inputs)?;
        let wrong = |what| Error::Write { path: path.to_owned(), what };
        for (name, _) in &contents.files {
            join_plain(Path::new(""), name, path)?;
        }
        let (parts, by_name) = plan(contents).map_err(wrong)?;
        let metadata = metadata(contents).map_err(wrong)?;
        let mut this = PglmWriter {
            file: Target::new(path, AtomicFile::create_staged(path)?, parts.len()),
            path: path.to_owned(),
            parts,
            by_name,
            metadata,
            header_length: 0,
            cpu: None,
        };
        let header = header(path, &this.metadata, &this.parts, NO_HASH)?;
        if header.len() as u64 > MAX_HEADER_BYTES {
            let what = format!("a header of {} bytes, expected at most {MAX_HEADER_BYTES}", header.len());
            return Err(Error::Write { path: path.to_owned(), what });
        }
        this.header_length = header.len() as u64;
        this.file.put(0, &(header.len() as u64).to_le_bytes())?;
        this.file.put(8, &header)?;
        for (name, content) in &contents.files {
            this.append(&format!("{FILE_SCOPE}{name}"), content)?;
        }
        Ok(this)
    }

    /// Appends bytes to a tensor, in its format and little-endian. Tensors may come in any order.
    ///
    /// # Errors
    /// [`Error::Write`] for a tensor that was not declared, or more bytes than it has; [`Error::Io`], also where the
    /// disk is full.
    pub fn write(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        if !is_weight(tensor) {
            let what = format!("tensor `{}` was not declared", shown(tensor));
            return Err(Error::Write { path: self.path.clone(), what });
        }
        match self.by_name.get(tensor).copied() {
            Some(i) if self.parts.get(i).is_some_and(|p| p.layout == PANELS) => {
                let panels = self.pack(i, bytes)?;
                self.append(tensor, &panels)
            }
            // In pieces: each is hashed soon after it was written.
            Some(_) => bytes.chunks(STEP).try_for_each(|piece| self.append(tensor, piece)),
            None => self.append(tensor, &[]),
        }
    }

    /// Takes bytes of rows, and gives the panels that are full with them.
    fn pack(&mut self, i: usize, bytes: &[u8]) -> Result<Vec<u8>> {
        let wrong = |what| Error::Write { path: self.path.clone(), what };
        if self.cpu.is_none() {
            self.cpu = Some(Cpu::new(0).map_err(|e| wrong(e.to_string()))?);
        }
        let (Some(cpu), Some(part)) = (&self.cpu, self.parts.get_mut(i)) else { return Ok(Vec::new()) };
        let name = shown(&part.name);
        let wrong = |what: String| wrong(format!("tensor `{name}`: {what}"));
        let (dtype, &[rows, k]) = (part.dtype, &part.shape[..]) else { return Ok(Vec::new()) };
        let (Some(format), Some(row_bytes)) = (PackedFormat::of(dtype), dtype.row_bytes(k)) else {
            return Err(wrong(format!("rows of {k} cannot be {dtype}")));
        };
        // What waits is seldom more than nothing; then the bytes are not copied.
        let bytes = if part.pending.is_empty() {
            Cow::Borrowed(bytes)
        } else {
            part.pending.extend_from_slice(bytes);
            Cow::Owned(std::mem::take(&mut part.pending))
        };
        let (left, given) = (rows - part.packed_rows, bytes.len() / row_bytes.max(1));
        if given > left || given == left && bytes.len() > left * row_bytes {
            return Err(wrong(format!("it has {rows} rows of {row_bytes} bytes, more were given")));
        }
        let take = if given == left { given } else { given / Packed::PANEL_ROWS * Packed::PANEL_ROWS };
        let size = Packed::bytes_for(format, take, k).map_err(|e| wrong(e.to_string()))?;
        let mut panels = vec![0; size];
        let row = |row: usize, codes: &mut RowCodes| {
            let stored = bytes.get(row * row_bytes..(row + 1) * row_bytes).unwrap_or_default();
            take_apart(dtype, stored, k, codes).map_err(|e| {
                let what = format!("row {}: {e}", part.packed_rows + row);
                pocketglm_tensor::Error::Value { op: "pack", what }
            })
        };
        Packed::pack_to(cpu, format, take, k, &row, &mut panels).map_err(|e| wrong(e.to_string()))?;
        part.pending = bytes.get(take * row_bytes..).unwrap_or_default().to_vec();
        part.packed_rows += take;
        Ok(panels)
    }

    /// Writes hashes into the header, syncs the file and gives it its final name.
    ///
    /// # Errors
    /// [`Error::Write`] where bytes of a tensor are missing: then nothing changes under the final name.
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        let mut short = self.parts.iter().filter(|p| !p.filler && p.written != p.end - p.begin);
        if let Some(part) = short.next() {
            let what = format!(
                "tensor `{}` has {} bytes, {} were given ({} tensors are incomplete)",
                shown(&part.name),
                part.end - part.begin,
                part.written,
                1 + short.count()
            );
            return Err(Error::Write { path: self.path, what });
        }
        let PglmWriter { file: mut target, path, mut parts, metadata, header_length, .. } = self;
        // Fillers are not hashed.
        let lengths: Vec<u64> = parts.iter().map(|p| p.written).collect();
        for (part, digest) in parts.iter_mut().zip(target.digests(&lengths)?).filter(|(p, _)| !p.filler) {
            part.digest = hex(&digest);
        }
        for part in parts.iter().filter(|p| p.filler) {
            let zeros = vec![0; (part.end - part.begin) as usize];
            target.put(8 + header_length + part.begin, &zeros)?;
        }
        let hash = sha256(&header(&path, &metadata, &parts, NO_HASH)?);
        let header = header(&path, &metadata, &parts, &hash)?;
        if header.len() as u64 != header_length {
            let what = format!("the header grew from {header_length} to {} bytes", header.len());
            return Err(Error::Write { path, what });
        }
        target.put(8, &header)?;
        target.commit()
    }

    fn append(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        let wrong = |what| Error::Write { path: self.path.clone(), what };
        let place = self.by_name.get(tensor).copied();
        let Some((i, part)) = place.and_then(|i| Some((i, self.parts.get_mut(i)?))) else {
            return Err(wrong(format!("tensor `{}` was not declared", shown(tensor))));
        };
        let (length, after) = (part.end - part.begin, part.written.saturating_add(bytes.len() as u64));
        if after > length {
            let what = format!("tensor `{}` has {length} bytes, {after} were given", shown(tensor));
            return Err(wrong(what));
        }
        let from = part.written;
        let at = 8 + self.header_length + part.begin + from;
        self.file.append(Place { at, hash: i, from }, bytes)?;
        part.written = after;
        Ok(())
    }
}

/// The header with the hashes known so far, padded so that the data are aligned. Its length is always the same.
fn header(path: &Path, own: &[(String, String)], parts: &[Part], own_hash: &str) -> Result<Vec<u8>> {
    let wrong = |e: serde_json::Error| Error::Write { path: path.to_owned(), what: e.to_string() };
    let mut table = Map::new();
    for part in parts.iter().filter(|p| !p.filler) {
        let row = Row {
            dtype: part.dtype.name().to_owned(),
            shape: part.shape.clone(),
            layout: part.layout.to_owned(),
            sha256: part.digest.clone(),
            input_range: part.input_range,
        };
        table.insert(part.name.clone(), serde_json::to_value(row).map_err(wrong)?);
    }
    let mut metadata = Map::new();
    for (key, value) in own {
        metadata.insert(key.clone(), value.as_str().into());
    }
    metadata.insert(TENSORS_KEY.into(), serde_json::to_string(&table).map_err(wrong)?.into());
    metadata.insert(HEADER_KEY.into(), own_hash.into());
    let mut header = Map::new();
    header.insert(METADATA_KEY.into(), Value::Object(metadata));
    for part in parts {
        let (kind, shape) = stored(part.dtype, &part.shape, part.layout).unwrap_or((DType::U8, Vec::new()));
        let offsets = [part.begin, part.end];
        header.insert(
            part.name.clone(),
            json!({ "dtype": kind.name(), "shape": shape, "data_offsets": offsets }),
        );
    }
    let mut header = serde_json::to_vec(&header).map_err(wrong)?;
    let padded = (8 + header.len()).next_multiple_of(ALIGNMENT as usize) - 8;
    header.resize(padded, b' ');
    Ok(header)
}

/// The strings for `__metadata__` but those that are made of hashes.
fn metadata(contents: &PglmContents<'_>) -> Result<Vec<(String, String)>, String> {
    if let Some(key) = contents.extra.keys().find(|k| k.starts_with(OWN_KEYS)) {
        return Err(format!("the metadata key `{}` begins with {OWN_KEYS}", shown(key)));
    }
    let mut all = vec![(VERSION_KEY.to_owned(), VERSION.to_owned())];
    let texts = [(POLICY_KEY, contents.policy), (CALIBRATION_KEY, contents.calibration)];
    all.extend(texts.iter().filter_map(|(key, text)| Some(((*key).to_owned(), (*text)?.to_owned()))));
    all.extend(contents.extra.iter().map(|(k, v)| (k.clone(), v.clone())));
    Ok(all)
}

/// Every part of the data in order, side files first; an error is the message.
fn plan(contents: &PglmContents<'_>) -> Result<(Vec<Part>, HashMap<String, usize>), String> {
    let files = contents.files.iter().map(|(name, content)| TensorInfo {
        name: format!("{FILE_SCOPE}{name}"),
        dtype: DType::U8,
        shape: vec![content.len()],
    });
    // Fillers count as tensors for readers.
    if contents.files.len() + contents.tensors.len() > MAX_TENSORS / 2 {
        return Err(format!("{} tensors, expected at most {}", contents.tensors.len(), MAX_TENSORS / 2));
    }
    let mut parts: Vec<Part> = Vec::new();
    let mut by_name = HashMap::new();
    let mut at = 0u64;
    let mut pads = 0;
    for (i, info) in files.chain(contents.tensors.iter().cloned()).enumerate() {
        let name = shown(&info.name);
        if i >= contents.files.len() && (!is_weight(&info.name) || info.name == METADATA_KEY) {
            return Err(format!("a tensor cannot have the name `{name}`"));
        }
        if info.shape.len() > MAX_RANK {
            return Err(format!(
                "tensor `{name}` has {} dimensions, expected at most {MAX_RANK}",
                info.shape.len()
            ));
        }
        let layout = layout_of(&info.name, info.dtype, &info.shape);
        let length = match stored(info.dtype, &info.shape, layout) {
            Some((kind, shape)) => kind.bytes(&shape).map(|n| n as u64),
            None => None,
        };
        // Halved, so that adding a header cannot overflow either.
        let end = length.and_then(|n| at.checked_add(n)).filter(|&end| end <= u64::MAX / 2);
        let Some(end) = end else {
            return Err(format!(
                "tensor `{name}` of shape {:?} is too large, or no shape of the format {}",
                info.shape, info.dtype
            ));
        };
        if by_name.insert(info.name.clone(), parts.len()).is_some() {
            return Err(format!("tensor `{name}` was declared twice"));
        }
        let part = |name: String, dtype, shape, begin, end, filler| Part {
            name,
            dtype,
            shape,
            begin,
            end,
            written: 0,
            filler,
            digest: NO_HASH.to_owned(),
            layout,
            input_range: None,
            packed_rows: 0,
            pending: Vec::new(),
        };
        let input_range = contents.input_ranges.get(&info.name).copied();
        if input_range.is_some_and(|range| layout != PANELS || !(range > 0.0 && range.is_finite())) {
            return Err(format!("tensor `{name}` cannot have an input range of {input_range:?}"));
        }
        let stated = part(info.name, info.dtype, info.shape, at, end, false);
        parts.push(Part { input_range, ..stated });
        at = end.next_multiple_of(ALIGNMENT);
        if at > end {
            let shape = vec![(at - end) as usize];
            let filler = part(format!("{PAD_SCOPE}{pads}"), DType::U8, shape, end, at, true);
            parts.push(Part { layout: ROWS, ..filler });
            pads += 1;
        }
    }
    Ok((parts, by_name))
}
