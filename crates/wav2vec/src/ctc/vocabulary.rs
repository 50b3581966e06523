use serde_json::Value;

use super::Emission;
use crate::{Error, Result};

/// Longest spelling of a token in bytes.
const MAX_TOKEN_BYTES: usize = 256;

/// The texts of the tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    tokens: Vec<String>,
    blank: u32,
    delimiter: Option<u32>,
}

/// Some text and the frames that gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The text.
    pub text: String,
    /// The first frame that says it.
    pub start: usize,
    /// The frame after the last one that says it.
    pub end: usize,
}

impl Vocabulary {
    /// Reads `vocab.json`, an object from spelling to id: every id from 0 on up to `size` once at most.
    ///
    /// `delimiter` is the token that stands between words, `|` in the published models.
    ///
    /// # Errors
    /// [`Error::Vocabulary`].
    pub fn from_json(json: &Value, size: usize, blank: u32, delimiter: &str) -> Result<Vocabulary> {
        let wrong = |what: String| Error::Vocabulary { what };
        let object = json.as_object().ok_or_else(|| wrong("must be an object of tokens and ids".into()))?;
        let mut tokens: Vec<Option<String>> = vec![None; size];
        for (text, id) in object {
            if text.len() > MAX_TOKEN_BYTES {
                return Err(wrong(format!("a token has {} bytes, at most {MAX_TOKEN_BYTES}", text.len())));
            }
            let at = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < size);
            let at = at.ok_or_else(|| wrong(format!("{text:?} must have an id below {size}, found {id}")))?;
            if let Some(other) = tokens[at].replace(text.clone()) {
                return Err(wrong(format!("{other:?} and {text:?} have the same id {at}")));
            }
        }
        if blank as usize >= size {
            return Err(wrong(format!("the blank is {blank}, of {size} tokens")));
        }
        let delimiter = tokens.iter().position(|t| t.as_deref() == Some(delimiter)).map(|i| i as u32);
        Ok(Vocabulary {
            tokens: tokens.into_iter().map(Option::unwrap_or_default).collect(),
            blank,
            delimiter,
        })
    }

    /// Number of tokens, the blank included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The blank.
    pub fn blank(&self) -> u32 {
        self.blank
    }

    /// Text of one token; that of the delimiter is a space.
    pub fn text(&self, id: u32) -> &str {
        if Some(id) == self.delimiter { " " } else { self.tokens.get(id as usize).map_or("", String::as_str) }
    }

    /// Whether the token stands between words.
    pub fn is_delimiter(&self, id: u32) -> bool {
        Some(id) == self.delimiter
    }

    /// The text of tokens, without white space at its ends, as the reference joins it.
    pub fn join(&self, emissions: &[Emission]) -> String {
        let text: String = emissions.iter().map(|e| self.text(e.id)).collect();
        text.trim().to_owned()
    }

    /// The words and the frames that gave them: from the first frame of the first token to the last of the last.
    pub fn words(&self, emissions: &[Emission]) -> Vec<Span> {
        let mut words: Vec<Span> = Vec::new();
        let mut open = false;
        for e in emissions {
            if self.is_delimiter(e.id) {
                open = false;
                continue;
            }
            match words.last_mut().filter(|_| open) {
                Some(word) => {
                    word.text.push_str(self.text(e.id));
                    word.end = e.end;
                }
                None => {
                    words.push(Span { text: self.text(e.id).to_owned(), start: e.start, end: e.end });
                    open = true;
                }
            }
        }
        words
    }
}
