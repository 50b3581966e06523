//! What a user gives to calibrate and to compare with: text, or conversations with pictures.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::table::hex;
use crate::picture::read_capped;
use crate::{Engine, Error, Request, Result};

/// Largest file of samples.
const MAX_BYTES: u64 = 256 << 20;
/// What a prompt of the family begins with.
const BEGIN: [&str; 2] = ["[gMASK]", "<sop>"];

/// One sample.
#[derive(Clone, Debug)]
pub enum Sample {
    /// Text as it is, without a chat template.
    Text(String),
    /// A conversation or token ids.
    Request(Request),
}

/// Samples of one file.
#[derive(Clone, Debug)]
pub struct Samples {
    path: PathBuf,
    hash: String,
    items: Vec<Sample>,
}

impl Samples {
    /// Reads a file: `.jsonl` has one `{"text": ..}`, `{"messages": ..}` or `{"input_ids": ..}` on each line (see
    /// [`Request::from_json`]), `.json` one of them, and any other file is text.
    ///
    /// # Errors
    /// [`Error::Samples`] with the line; [`Error::Read`] and [`Error::FileSize`].
    pub fn read(path: impl AsRef<Path>) -> Result<Samples> {
        let path = path.as_ref();
        let bytes = read_capped(path, MAX_BYTES)?;
        let wrong = |what: String| Error::Samples { path: path.to_owned(), what };
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| wrong(format!("expected UTF-8, found other bytes at offset {}", e.valid_up_to())))?;
        let kind = path.extension().map(|e| e.to_ascii_lowercase());
        let items = match kind.as_ref().and_then(|e| e.to_str()) {
            Some("jsonl") => text
                .lines()
                .enumerate()
                .filter(|(_, line)| !line.trim().is_empty())
                .map(|(i, line)| sample(line).map_err(|e| wrong(format!("line {}: {e}", i + 1))))
                .collect::<Result<Vec<_>>>()?,
            Some("json") => vec![sample(text).map_err(|e| wrong(e.to_string()))?],
            _ => vec![Sample::Text(text.to_owned())],
        };
        if items.is_empty() {
            return Err(wrong("no sample in it".into()));
        }
        Ok(Samples { path: path.to_owned(), hash: hex(&Sha256::digest(&bytes)), items })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, and those that its samples name: pictures and sounds.
    pub fn files(&self) -> Vec<&Path> {
        let named = self.items.iter().flat_map(|item| match item {
            Sample::Text(_) => Vec::new(),
            Sample::Request(request) => request.files(),
        });
        std::iter::once(self.path()).chain(named).collect()
    }

    /// SHA-256 of the file, in digits. Pictures that it names are not part of it.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The samples.
    pub fn items(&self) -> &[Sample] {
        &self.items
    }

    /// The samples as prompts for a model: text in windows of at most `window` tokens, each behind what prompts of the
    /// family begin with.
    ///
    /// # Errors
    /// [`Error::Samples`] where no window has two tokens, and what tokenizing reports.
    pub(super) fn requests(&self, engine: &Engine, window: usize) -> Result<Vec<Request>> {
        let begin = fixed(engine);
        let window = window.max(2);
        let mut requests = Vec::new();
        for item in &self.items {
            match item {
                Sample::Request(request) => requests.push(request.clone()),
                Sample::Text(text) => {
                    let ids = engine.tokenize(text)?;
                    // A window of one token has nothing to predict.
                    let windows = ids.chunks(window).filter(|ids| ids.len() > 1);
                    requests.extend(windows.map(|ids| Request::InputIds([&begin, ids].concat())));
                }
            }
        }
        if requests.is_empty() {
            let what = "no text of at least two tokens in it".to_owned();
            return Err(Error::Samples { path: self.path.clone(), what });
        }
        Ok(requests)
    }
}

/// The tokens that prompts of the family begin with; none where the tokenizer lacks one of them.
fn fixed(engine: &Engine) -> Vec<u32> {
    let tokenizer = &engine.inner.model.tokenizer;
    let all: Option<Vec<u32>> = BEGIN.iter().map(|t| tokenizer.token_id(t)).collect();
    all.unwrap_or_default()
}

/// How many tokens of a prompt are those that every prompt begins with: predicting them says nothing of its text.
pub(super) fn begin(engine: &Engine, ids: &[u32]) -> usize {
    let fixed = fixed(engine);
    if ids.starts_with(&fixed) { fixed.len() } else { 0 }
}

fn sample(json: &str) -> Result<Sample> {
    if let Ok(Value::Object(object)) = serde_json::from_str(json)
        && let Some(Value::String(text)) = object.get("text")
        && object.len() == 1
    {
        return Ok(Sample::Text(text.clone()));
    }
    Ok(Sample::Request(Request::from_json(json.as_bytes())?))
}
