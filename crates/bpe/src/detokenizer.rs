//! Streaming detokenization: ids in, whole characters out.

use crate::tokenizer::Tokenizer;

/// Turns ids into text one at a time without ever emitting half a character.
///
/// The pieces together equal [`Tokenizer::decode`] of all ids. At most three bytes are held back.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip_special: bool,
    /// Bytes that are a prefix of a character whose rest is still to come.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Starts a stream; `skip_special` leaves special tokens out of the text.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, pending: Vec::new() }
    }

    /// Takes the next id of `tokenizer` and returns the text that is certain now, if any.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Option<String> {
        if self.skip_special && tokenizer.is_special(id) {
            return None;
        }
        self.pending.extend_from_slice(tokenizer.token_bytes(id)?);
        let keep = incomplete_suffix(&self.pending);
        let ready = self.pending.len() - keep;
        let text = String::from_utf8_lossy(self.pending.get(..ready)?).into_owned();
        self.pending.drain(..ready);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the stream and returns what was held back; a character that never became whole is one U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        (!text.is_empty()).then_some(text)
    }
}

/// Number of bytes at the end that could become a character with more bytes.
fn incomplete_suffix(bytes: &[u8]) -> usize {
    let Some(last) = bytes.utf8_chunks().last() else { return 0 };
    let tail = last.invalid();
    match std::str::from_utf8(tail) {
        Err(e) if e.error_len().is_none() => tail.len(),
        _ => 0,
    }
}
