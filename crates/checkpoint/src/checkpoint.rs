use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use pocketglm_tensor::{Bytes, Tensor, TensorInfo, WeightSource};
use serde_json::Value;

use crate::error::{io_error, shown};
use crate::file::{join_plain, read_small, stands};
use crate::index::ShardIndex;
use crate::safetensors::source_error;
use crate::{Error, ReadMode, Result, SafetensorsFile};

/// The file of an unsharded checkpoint.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

const MIB: u64 = 1 << 20;
/// Most values in a JSON file: a parsed value takes up to 100 bytes of memory, so this bounds a small file
/// of many numbers. A tokenizer of 150,000 tokens and 320,000 merges has about 2 million.
const MAX_JSON_VALUES: usize = 4_000_000;

/// Most bytes read of a side file.
fn size_limit(name: &str) -> u64 {
    match name {
        "tokenizer.json" => 64 * MIB,
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

/// How to open a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Whether weights are mapped or copied.
    pub mode: ReadMode,
    /// Whether to read all weights at once and refuse NaN and infinity.
    pub check_finite: bool,
}

/// A checkpoint: tensors of one or more safetensors files, and the JSON files beside them.
///
/// Tensors are in the order of shard names, and within a shard in the order of their data.
#[derive(Debug)]
pub struct Checkpoint {
    /// The path given to [`Checkpoint::open`].
    path: PathBuf,
    folder: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// Which shard holds a tensor.
    shard_of: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a folder with `model.safetensors` or, where that is absent, `model.safetensors.index.json`
    /// and its shards; or one safetensors file of any name. Headers are read and checked, data are not.
    ///
    /// # Errors
    /// [`Error::NoFile`] where the folder has no weights, and the errors of [`SafetensorsFile::open`];
    /// where index and shards disagree, [`Error::Index`], [`Error::Duplicate`] or [`Error::FileName`].
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
            let wanted = format!("{SINGLE_FILE} or {INDEX_FILE}");
            return Err(Error::NoFile { wanted, folder: path.to_owned() });
        };
        if options.check_finite {
            this.shards.iter().try_for_each(SafetensorsFile::check_finite)?;
        }
        Ok(this)
    }

    fn single(path: &Path, file: &Path, options: &OpenOptions) -> Result<Checkpoint> {
        let shard = SafetensorsFile::open(file, options.mode)?;
        let shard_of = shard.names().map(|name| (name.to_owned(), 0)).collect();
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Checkpoint { path: path.to_owned(), folder, shards: vec![shard], shard_of })
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
        Ok(Checkpoint { path: folder.to_owned(), folder: folder.to_owned(), shards, shard_of })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weight files.
    pub fn shards(&self) -> &[SafetensorsFile] {
        &self.shards
    }

    /// The file of a tensor for messages; the checkpoint's path where there is no such tensor.
    pub fn place(&self, tensor: &str) -> String {
        self.shard(tensor).map_or(&*self.path, SafetensorsFile::path).display().to_string()
    }

    /// A file of the folder; `None` where it is absent. `name` must be a plain file name.
    ///
    /// # Errors
    /// [`Error::FileTooLarge`] (each kind of file has a limit), [`Error::NotAFile`], [`Error::FileName`],
    /// [`Error::Io`].
    pub fn bytes(&self, name: &str) -> Result<Option<Bytes>> {
        let path = join_plain(&self.folder, name, &self.folder)?;
        match read_small(&path, size_limit(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            // A dangling link is not an absent file: its content was meant to be there.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && !stands(&path) => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// A text file of the folder, such as `chat_template.jinja`; `None` where it is absent.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`], and [`Error::Json`] where it is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let text = std::str::from_utf8(bytes.as_slice()).map_err(|e| Error::Json {
            path: self.folder.join(name),
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
        let wrong = |what| Error::Json { path: self.folder.join(name), what };
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
        self.shard_of.get(tensor).and_then(|&i| self.shards.get(i))
    }
}

impl WeightSource for Checkpoint {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.shards.iter().flat_map(SafetensorsFile::tensors).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shard(name).and_then(|s| s.info(name))
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        match self.shard(name) {
            Some(shard) => shard.tensor(name),
            None => {
                let missing = Error::NoTensor { tensor: shown(name), place: self.path.clone() };
                Err(source_error(missing, name, &self.path))
            }
        }
    }
}

#[cfg(test)]
mod tests;
