mod find;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use pocketglm_tensor::{Bytes, Packed, Tensor, TensorInfo, WeightSource};
use serde_json::Value;

use crate::error::{io_error, shown};
use crate::file::{join_plain, read_small, stands};
use crate::gguf::{GlmGguf, MAGIC};
use crate::index::ShardIndex;
use crate::safetensors::source_error;
use crate::{Error, FileBytes, GgufFile, PglmFile, ReadMode, Result, SafetensorsFile, Unchecked};

/// The file of an unsharded checkpoint.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

const MIB: u64 = 1 << 20;
/// Most values in a JSON file: a parsed value takes up to 100 bytes of memory, so this bounds a small file
/// of many numbers. A tokenizer of 150,000 tokens and 320,000 merges has about 2 million.
const MAX_JSON_VALUES: usize = 4_000_000;

/// The side files that checkpoints of the family have.
const SIDE_FILES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
];

/// Most bytes read of a side file.
fn size_limit(name: &str) -> u64 {
    match name {
        "tokenizer.json" | "tokenizer.tables" => 64 * MIB,
        "tokenizer_config.json" => 4 * MIB,
        "config.json"
        | "generation_config.json"
        | "preprocessor_config.json"
        | "video_preprocessor_config.json"
        | "chat_template.jinja"
        | "chat_template.json"
        | "special_tokens_map.json" => MIB,
        _ => 16 * MIB,
    }
}

/// The side files that stand in a folder.
fn beside(folder: &Path) -> Vec<PathBuf> {
    SIDE_FILES.iter().map(|name| folder.join(name)).filter(|path| stands(path)).collect()
}

/// How to open a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Whether weights are mapped or copied.
    pub mode: ReadMode,
    /// Whether to read all weights at once and refuse NaN and infinity.
    pub check_finite: bool,
    /// The vision file of a GGUF model; an error for a model of another kind. Where it is not given, the one file
    /// beside the text file whose name has `mmproj` in it and whose keys fit is taken; of several the one that is named
    /// `mmproj-` and like the text file.
    pub mmproj: Option<PathBuf>,
}

/// A checkpoint: tensors of one or more files, and the JSON files that belong to them.
///
/// Tensors are in the order of files (shards by name; text before vision), and within a file in the order of their
/// data.
#[derive(Debug)]
pub struct Checkpoint {
    /// The path given to [`Checkpoint::open`].
    path: PathBuf,
    folder: PathBuf,
    store: Store,
    /// The index, and side files of the folder.
    beside: Vec<PathBuf>,
    notes: Vec<String>,
}

/// Where tensors and side files come from.
#[derive(Debug)]
enum Store {
    /// Safetensors files; side files stand in their folder.
    Shards {
        shards: Vec<SafetensorsFile>,
        /// Which shard holds a tensor.
        shard_of: HashMap<String, usize>,
    },
    /// GGUF files, which have the side files' content in their keys.
    Gguf(Box<GlmGguf>),
    /// A `.pglm` file, which has the side files in it.
    Pglm(Box<PglmFile>),
}

impl Checkpoint {
    /// Opens one of
    ///
    /// * a folder with `model.safetensors` or, where that is absent, `model.safetensors.index.json` and its shards;
    /// * a folder without these and with exactly one model among its `.gguf` and `.pglm` files;
    /// * a GGUF text file of the GLM-4 family, with its vision file beside it ([`OpenOptions::mmproj`]);
    /// * a `.pglm` file;
    /// * a safetensors file of any name.
    ///
    /// Files are told apart by their first bytes. Headers are read and checked, data are not.
    ///
    /// # Errors
    /// [`Error::NoFile`] where the folder has no weights, [`Error::Several`] where it has several models, and the
    /// errors of [`SafetensorsFile::open`], [`GgufFile::open`](crate::GgufFile::open) and
    /// [`PglmFile::open`](crate::PglmFile::open); where index and shards disagree, [`Error::Index`],
    /// [`Error::Duplicate`] or [`Error::FileName`].
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Checkpoint> {
        let path = path.as_ref();
        let is_folder = std::fs::metadata(path).map_err(io_error("open", path))?.is_dir();
        let this = if !is_folder {
            Checkpoint::single(path, path, options)?
        } else if stands(&path.join(SINGLE_FILE)) {
            Checkpoint::single(path, &path.join(SINGLE_FILE), options)?
        } else if stands(&path.join(INDEX_FILE)) {
            Checkpoint::sharded(path, options)?
        } else {
            Checkpoint::single(path, &find::model_in(path)?, options)?
        };
        if let (Some(vision), Store::Shards { .. } | Store::Pglm(_)) = (&options.mmproj, &this.store) {
            let wanted = format!("GGUF text file for the vision file {}", vision.display());
            return Err(Error::NoFile { wanted, folder: path.to_owned() });
        }
        if options.check_finite {
            this.check_finite()?;
        }
        Ok(this)
    }

    /// Reads all weights and looks for NaN and infinity, in quantised tensors among the scales.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for the first one.
    pub fn check_finite(&self) -> Result<()> {
        match &self.store {
            Store::Shards { shards, .. } => shards.iter().try_for_each(SafetensorsFile::check_finite),
            Store::Gguf(gguf) => gguf.check_finite(),
            Store::Pglm(pglm) => pglm.check_finite(),
        }
    }

    /// Whether the files have hashes of their content.
    pub fn has_hashes(&self) -> bool {
        matches!(self.store, Store::Pglm(_))
    }

    /// Reads everything that has a hash ([`Checkpoint::has_hashes`]) and compares. `progress` hears of bytes done and in all.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first part that is not as it was written.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        match &self.store {
            Store::Pglm(pglm) => pglm.verify(progress),
            Store::Shards { .. } | Store::Gguf(_) => Ok(()),
        }
    }

    /// One file of any kind; `path` is what the caller asked for.
    fn single(path: &Path, file: &Path, options: &OpenOptions) -> Result<Checkpoint> {
        let bytes = FileBytes::open(file, options.mode)?;
        let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        let mut notes = Vec::new();
        let store = if bytes.bytes().as_slice().starts_with(&MAGIC) {
            let text = GgufFile::parse(bytes)?;
            let vision = match &options.mmproj {
                Some(path) => Some(GgufFile::open(path, options.mode)?),
                None => find::vision_of(&text, &folder, options.mode, &mut notes)?,
            };
            let gguf = GlmGguf::new(text, vision)?;
            notes.extend(gguf.notes().iter().cloned());
            Store::Gguf(Box::new(gguf))
        } else {
            let shard = SafetensorsFile::parse(bytes)?;
            let named = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("pglm"));
            if named || PglmFile::is_one(&shard) {
                Store::Pglm(Box::new(PglmFile::new(shard)?))
            } else {
                let shard_of = shard.names().map(|name| (name.to_owned(), 0)).collect();
                Store::Shards { shards: vec![shard], shard_of }
            }
        };
        let beside = match &store {
            Store::Shards { .. } => beside(&folder),
            _ => Vec::new(),
        };
        Ok(Checkpoint { path: path.to_owned(), folder, store, beside, notes })
    }

    fn sharded(folder: &Path, options: &OpenOptions) -> Result<Checkpoint> {
        let index_path = folder.join(INDEX_FILE);
        let index = ShardIndex::read(&index_path)?;
        let mut shards = Vec::with_capacity(index.shards.len());
        for name in &index.shards {
            let path = join_plain(folder, name, &index_path)?;
            if !stands(&path) {
                return Err(Error::NoFile { wanted: format!("shard {name}"), folder: folder.to_owned() });
            }
            shards.push(SafetensorsFile::open(&path, options.mode)?);
        }
        let shard_of: HashMap<String, usize> = index.tensors.iter().cloned().collect();

        let disagree =
            |tensor: &str, what| Err(Error::Index { path: index_path.clone(), tensor: shown(tensor), what });
        let file = |i: usize| shards.get(i).map(|s| s.path().display().to_string()).unwrap_or_default();
        for (tensor, i) in &index.tensors {
            if !shards.get(*i).is_some_and(|shard| shard.contains(tensor)) {
                return disagree(tensor, format!("the index names {}, which lacks it", file(*i)));
            }
        }
        for (i, shard) in shards.iter().enumerate() {
            for tensor in shard.names() {
                match shard_of.get(tensor) {
                    Some(&j) if j == i => {}
                    // The index names another shard, and the loop above found the tensor there.
                    Some(&j) => {
                        return Err(Error::Duplicate {
                            tensor: shown(tensor),
                            first: file(j),
                            second: file(i),
                        });
                    }
                    None => return disagree(tensor, format!("{} has it, the index does not", file(i))),
                }
            }
        }
        let store = Store::Shards { shards, shard_of };
        let beside = std::iter::once(index_path).chain(beside(folder)).collect();
        let path = folder.to_owned();
        Ok(Checkpoint { folder: path.clone(), path, store, beside, notes: Vec::new() })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a user should know about the files, such as a vision file that was left out, one sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Every file that it is read from: those of the weights, and of a folder the index and the side files that stand
    /// there. Whatever is made of a checkpoint must not be written over one of them.
    pub fn files(&self) -> Vec<&Path> {
        let weights: Vec<&Path> = match &self.store {
            Store::Shards { shards, .. } => shards.iter().map(SafetensorsFile::path).collect(),
            Store::Gguf(gguf) => gguf.files().map(GgufFile::path).collect(),
            Store::Pglm(pglm) => vec![pglm.path()],
        };
        weights.into_iter().chain(self.beside.iter().map(PathBuf::as_path)).collect()
    }

    /// The file of a tensor for messages; the checkpoint's path where there is no such tensor.
    pub fn place(&self, tensor: &str) -> String {
        let file = match &self.store {
            Store::Shards { .. } => self.shard(tensor).map(SafetensorsFile::path),
            Store::Gguf(gguf) => gguf.path_of(tensor),
            Store::Pglm(pglm) => pglm.info(tensor).map(|_| pglm.path()),
        };
        file.unwrap_or(&self.path).display().to_string()
    }

    /// A side file by its name in a checkpoint folder, such as `config.json`: read from the folder, made from the
    /// keys of a GGUF file, or taken out of a `.pglm` file; `None` where there is none. `name` must be a plain file
    /// name.
    ///
    /// # Errors
    /// [`Error::FileTooLarge`] (each kind of file has a limit), [`Error::NotAFile`], [`Error::FileName`],
    /// [`Error::Io`], [`Error::GgufKey`].
    pub fn bytes(&self, name: &str) -> Result<Option<Bytes>> {
        let path = join_plain(&self.folder, name, &self.folder)?;
        let limit = size_limit(name);
        let inside = match &self.store {
            Store::Shards { .. } => {
                return match read_small(&path, limit) {
                    Ok(bytes) => Ok(Some(bytes)),
                    // A dangling link is not an absent file: its content was meant to be there.
                    Err(Error::Io { source, .. })
                        if source.kind() == io::ErrorKind::NotFound && !stands(&path) =>
                    {
                        Ok(None)
                    }
                    Err(e) => Err(e),
                };
            }
            Store::Gguf(gguf) => gguf.side_file(name)?,
            Store::Pglm(pglm) => pglm.file(name)?,
        };
        match inside {
            Some(bytes) if bytes.len() as u64 > limit => {
                Err(Error::FileTooLarge { path: self.side_path(name), limit, found: bytes.len() as u64 })
            }
            inside => Ok(inside),
        }
    }

    /// Every side file that there is, by name: what a copy of the checkpoint needs besides its tensors.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn side_files(&self) -> Result<Vec<(String, Bytes)>> {
        let mut found = Vec::new();
        for name in SIDE_FILES {
            found.extend(self.bytes(name)?.map(|bytes| (name.to_owned(), bytes)));
        }
        Ok(found)
    }

    /// What was made of the side file `of` beforehand, where the checkpoint holds it under `name`: see [`PglmFile::made_of`].
    ///
    /// # Errors
    /// As [`PglmFile::made_of`], and [`Error::FileTooLarge`].
    pub fn made_of(&self, of: &str, name: &str) -> Result<Option<Unchecked>> {
        let Store::Pglm(pglm) = &self.store else { return Ok(None) };
        let made = pglm.made_of(of, name)?;
        let (limit, found) = (size_limit(name), made.as_ref().map_or(0, |made| made.bytes().len() as u64));
        if found > limit {
            return Err(Error::FileTooLarge { path: self.side_path(name), limit, found });
        }
        Ok(made)
    }

    /// What messages call a side file: its path, or the model's file and its name.
    fn side_path(&self, name: &str) -> PathBuf {
        match &self.store {
            Store::Shards { .. } => self.folder.join(name),
            _ => PathBuf::from(format!("{}: {name}", self.path.display())),
        }
    }

    /// A text file of the folder, such as `chat_template.jinja`; `None` where it is absent.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`], and [`Error::Json`] where it is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let text = std::str::from_utf8(bytes.as_slice()).map_err(|e| Error::Json {
            path: self.side_path(name),
            what: format!("expected UTF-8, found other bytes at offset {}", e.valid_up_to()),
        })?;
        Ok(Some(text.to_owned()))
    }

    /// A JSON file of the folder, such as `config.json`; `None` where it is absent.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`], and [`Error::Json`] where it does not parse, is nested more than 128
    /// deep or has more than 4,000,000 values.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let wrong = |what| Error::Json { path: self.side_path(name), what };
        // Each value but the first follows one of these; those inside of strings count too, to no harm.
        let openers = bytes.as_slice().iter().filter(|b| matches!(b, b',' | b'[' | b'{' | b':')).count();
        if openers >= MAX_JSON_VALUES {
            return Err(wrong(format!("more than {MAX_JSON_VALUES} values")));
        }
        serde_json::from_slice(bytes.as_slice()).map(Some).map_err(|e| wrong(shown(&e.to_string())))
    }

    /// A JSON file that must be there.
    ///
    /// # Errors
    /// As [`Checkpoint::json`], and [`Error::NoFile`] with file and folder where it is absent.
    pub fn required_json(&self, name: &str) -> Result<Value> {
        self.json(name)?.ok_or_else(|| Error::NoFile { wanted: name.to_owned(), folder: self.folder.clone() })
    }

    fn shard(&self, tensor: &str) -> Option<&SafetensorsFile> {
        match &self.store {
            Store::Shards { shards, shard_of } => shard_of.get(tensor).and_then(|&i| shards.get(i)),
            _ => None,
        }
    }
}

impl WeightSource for Checkpoint {
    fn tensors(&self) -> Vec<TensorInfo> {
        match &self.store {
            Store::Shards { shards, .. } => shards.iter().flat_map(SafetensorsFile::tensors).collect(),
            Store::Gguf(gguf) => gguf.tensors(),
            Store::Pglm(pglm) => pglm.tensors(),
        }
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match &self.store {
            Store::Shards { .. } => self.shard(name).and_then(|s| s.info(name)),
            Store::Gguf(gguf) => gguf.info(name),
            Store::Pglm(pglm) => pglm.info(name),
        }
    }

    fn packed(&self, name: &str) -> pocketglm_tensor::Result<Option<Packed>> {
        match &self.store {
            Store::Pglm(pglm) => pglm.packed(name),
            Store::Shards { .. } | Store::Gguf(_) => Ok(None),
        }
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let found = match &self.store {
            Store::Shards { .. } => self.shard(name).map(|shard| shard.tensor(name)),
            Store::Gguf(gguf) => gguf.path_of(name).map(|_| gguf.tensor(name)),
            Store::Pglm(pglm) => pglm.info(name).map(|_| pglm.tensor(name)),
        };
        found.unwrap_or_else(|| {
            let missing = Error::NoTensor { tensor: shown(name), place: self.path.clone() };
            Err(source_error(missing, name, &self.path))
        })
    }
}

#[cfg(test)]
mod tests;
