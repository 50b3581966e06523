//! The tokenizer inside a text file, as the `tokenizer.json` that it was converted from.

use std::collections::HashMap;
use std::io::Write as _;

use crate::error::shown;
use crate::gguf::read::{GgufArray, GgufFile, GgufValue};
use crate::{Error, Result};

/// The list of tokens.
pub(crate) const TOKENS: &str = "tokenizer.ggml.tokens";
/// The chat template.
pub(crate) const TEMPLATE: &str = "tokenizer.chat_template";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
/// The names of the family's way to cut text into pieces.
const PRE_NAMES: [&str; 2] = ["glm4", "chatglm-bpe"];
/// The expression behind those names.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Most tokens and merges, and most bytes of the file that is made: what the tokenizer's reader takes.
const MAX_TOKENS: usize = 1 << 20;
const MAX_MERGES: usize = 1 << 21;
const MAX_JSON_BYTES: usize = 64 << 20;
/// Longest token; a longer one is no word but an attack.
const MAX_TOKEN_BYTES: usize = 4096;

/// What a token is, by `tokenizer.ggml.token_type`.
pub(crate) mod token_kind {
    pub(crate) const NORMAL: u64 = 1;
    pub(crate) const CONTROL: u64 = 3;
    pub(crate) const USER_DEFINED: u64 = 4;
    pub(crate) const UNUSED: u64 = 5;
    pub(crate) const BYTE: u64 = 6;
}

/// Tokens with their kinds, read from the file as they are asked for.
pub(crate) struct Vocabulary<'a> {
    file: &'a GgufFile,
    tokens: GgufArray<'a>,
    kinds: GgufArray<'a>,
    merges: GgufArray<'a>,
    /// Control and user-defined tokens by their text.
    special: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    /// Checks that the file has a tokenizer of the family.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub(crate) fn new(file: &'a GgufFile) -> Result<Vocabulary<'a>> {
        if file.string(MODEL)? != Some("gpt2") {
            return Err(file.key_error(MODEL, "gpt2 (byte-level BPE)"));
        }
        if !file.string(PRE)?.is_some_and(|pre| PRE_NAMES.contains(&pre)) {
            return Err(file.key_error(PRE, "glm4 or chatglm-bpe"));
        }
        let list = |key: &str, most: usize| -> Result<GgufArray<'a>> {
            let array = file.array(key)?.filter(|a| a.len() <= most);
            array.ok_or_else(|| file.key_error(key, format!("an array of at most {most} values")))
        };
        let tokens = list(TOKENS, MAX_TOKENS)?;
        let kinds = list(KINDS, MAX_TOKENS)?;
        let merges = list(MERGES, MAX_MERGES)?;
        if kinds.len() != tokens.len() {
            return Err(file.key_error(KINDS, format!("an array of {} values, one a token", tokens.len())));
        }
        let mut this = Vocabulary { file, tokens, kinds, merges, special: HashMap::new() };
        let mut special = HashMap::new();
        for (id, token) in this.entries().enumerate() {
            let (text, kind) = token?;
            if matches!(kind, token_kind::CONTROL | token_kind::USER_DEFINED) {
                // Of two equal ones the first counts here; reading the tokenizer refuses them.
                special.entry(text).or_insert(id as u32);
            }
        }
        this.special = special;
        Ok(this)
    }

    /// Every token with its kind, checked.
    fn entries(&self) -> impl Iterator<Item = Result<(&'a str, u64)>> + use<'a> {
        let file = self.file;
        self.tokens.iter().zip(self.kinds.iter()).enumerate().map(move |(id, (token, kind))| {
            let text = match token {
                GgufValue::String(s) if s.len() <= MAX_TOKEN_BYTES => std::str::from_utf8(s).ok(),
                _ => None,
            };
            let text = text.ok_or_else(|| {
                let wanted = format!("strings in UTF-8 of at most {MAX_TOKEN_BYTES} bytes (see token {id})");
                file.key_error(TOKENS, wanted)
            })?;
            match kind {
                GgufValue::Unsigned(kind @ token_kind::NORMAL..=token_kind::BYTE) => Ok((text, kind)),
                _ => Err(file.key_error(KINDS, format!("numbers from 1 to 6 (see token {id})"))),
            }
        })
    }

    /// The id of a control or user-defined token.
    pub(crate) fn special(&self, text: &str) -> Option<u32> {
        self.special.get(text).copied()
    }

    /// The id under `tokenizer.ggml.<name>`, if it is a token's.
    ///
    /// # Errors
    /// [`Error::GgufKey`].
    pub(crate) fn id(&self, file: &GgufFile, name: &str) -> Result<Option<u32>> {
        let last = self.tokens.len().saturating_sub(1);
        Ok(file.integer(&format!("tokenizer.ggml.{name}"), 0..=last)?.map(|id| id as u32))
    }

    /// The text of a control or user-defined token.
    pub(crate) fn text(&self, id: u32) -> Option<&'a str> {
        self.special.iter().find(|(_, i)| **i == id).map(|(text, _)| *text)
    }

    /// `tokenizer.json`. Pieces that are tokens are taken whole, as the family's own files say.
    ///
    /// # Errors
    /// [`Error::GgufKey`]; [`Error::FileTooLarge`] where the result would be too long.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        let mut out = Json(Vec::new());
        out.raw(r#"{"version":"1.0","added_tokens":["#);
        let mut first = true;
        for (id, token) in self.entries().enumerate() {
            let (text, kind) = token?;
            if !matches!(kind, token_kind::CONTROL | token_kind::USER_DEFINED) {
                continue;
            }
            out.separator(&mut first);
            out.raw(&format!(r#"{{"id":{id},"content":"#));
            out.text(text);
            let special = kind == token_kind::CONTROL;
            out.raw(&format!(
                r#","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":{special}}}"#
            ));
            self.check_size(&out)?;
        }
        out.raw(r#"],"normalizer":null,"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"#);
        out.text(SPLIT);
        out.raw(r#"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE","ignore_merges":true,"vocab":{"#);
        let mut first = true;
        for (id, token) in self.entries().enumerate() {
            let (text, kind) = token?;
            // Padding is no token: it is there to give the embedding table a round number of rows.
            if matches!(kind, token_kind::CONTROL | token_kind::USER_DEFINED | token_kind::UNUSED) {
                continue;
            }
            out.separator(&mut first);
            out.text(text);
            out.raw(&format!(":{id}"));
            self.check_size(&out)?;
        }
        out.raw(r#"},"merges":["#);
        let mut first = true;
        for (i, merge) in self.merges.iter().enumerate() {
            let text = match merge {
                GgufValue::String(s) if s.len() <= 2 * MAX_TOKEN_BYTES + 1 => std::str::from_utf8(s).ok(),
                _ => None,
            };
            // The first character may itself be a space.
            let pair = text.and_then(|t| {
                let skip = t.chars().next()?.len_utf8();
                let at = t.get(skip..)?.find(' ')? + skip;
                Some((t.get(..at)?, t.get(at + 1..)?))
            });
            let (left, right) = pair.ok_or_else(|| {
                self.file
                    .key_error(MERGES, format!("strings of two tokens with a space between (see merge {i})"))
            })?;
            out.separator(&mut first);
            out.raw("[");
            out.text(left);
            out.raw(",");
            out.text(right);
            out.raw("]");
            self.check_size(&out)?;
        }
        out.raw("]}}");
        Ok(out.0)
    }

    fn check_size(&self, out: &Json) -> Result<()> {
        if out.0.len() <= MAX_JSON_BYTES {
            return Ok(());
        }
        let path = self.file.path().with_file_name(shown("tokenizer.json"));
        Err(Error::FileTooLarge { path, limit: MAX_JSON_BYTES as u64, found: out.0.len() as u64 })
    }
}

/// JSON that is written piece by piece.
struct Json(Vec<u8>);

impl Json {
    fn raw(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    fn separator(&mut self, first: &mut bool) {
        if !std::mem::take(first) {
            self.raw(",");
        }
    }

    /// A string with its quotes. Writing to memory cannot fail.
    fn text(&mut self, text: &str) {
        let _ = serde_json::to_writer(&mut self.0, text);
        let _ = self.0.flush();
    }
}
