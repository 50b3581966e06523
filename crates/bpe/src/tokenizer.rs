//! The tokenizer proper: tables, encoding, decoding.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::added::{AddedMatcher, AddedToken, Part};
use crate::alphabet;
use crate::error::{Error, Result, check_max, clip};
use crate::limits;
use crate::merge::{Merger, Merges};
use crate::split::{RegexClock, SplitStep, Splitter};
use crate::tables::Stored;

/// What a tokenizer is made of, whichever file it came from.
#[derive(Debug, Default)]
pub struct TokenizerParts<'a> {
    /// Tokens with their ids. Text is in the GPT-2 byte alphabet, one character per byte.
    pub tokens: Vec<(&'a str, u32)>,
    /// Merges, best first, in the same alphabet.
    pub merges: Vec<(&'a str, &'a str)>,
    /// Tokens recognised in raw text, written plainly.
    pub added: Vec<AddedToken>,
    /// Pre-tokenizer steps, in order.
    pub split: Vec<SplitStep>,
    /// Take a piece that is a token as that token, without merging.
    pub ignore_merges: bool,
}

/// A byte-level BPE tokenizer. Sharing it between threads is free: it does not change after loading.
#[derive(Debug)]
pub struct Tokenizer {
    /// Tables that came ready-made; what is built of a file, up to `hasher` and `merges`, is empty then.
    pub(crate) stored: Option<Stored>,
    /// Bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where the bytes of each id are; an empty range for ids without a token.
    spans: Vec<Span>,
    /// Ids of the tokens that encoding can produce, found by their bytes.
    by_bytes: HashTable<u32>,
    hasher: RandomState,
    /// Tokens whose text is not in the byte alphabet; encoding never produces them.
    pub(crate) by_text: HashMap<String, u32>,
    /// Id of each single byte.
    pub(crate) byte_ids: [u32; 256],
    pub(crate) merges: Merges,
    pub(crate) added: AddedMatcher,
    pub(crate) split: Vec<Splitter>,
    /// What `split` was compiled of.
    pub(crate) steps: Vec<SplitStep>,
    pub(crate) ignore_merges: bool,
    pub(crate) count: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Span {
    start: u32,
    len: u16,
    used: bool,
    special: bool,
}

impl Tokenizer {
    /// Builds the tables, checking that all 256 bytes have a token, that ids and tokens are unique, and that
    /// every merge names and makes tokens of the vocabulary.
    pub fn from_parts(parts: TokenizerParts<'_>) -> Result<Self> {
        check_max("tokens", limits::MAX_TOKEN_ID as usize, parts.tokens.len())?;
        check_max("merges", limits::MAX_MERGES, parts.merges.len())?;
        check_max("pre-tokenizer steps", limits::MAX_SPLIT_STEPS, parts.split.len())?;
        let split = parts.split.iter().map(Splitter::new).collect::<Result<Vec<_>>>()?;
        let mut this = Tokenizer {
            by_bytes: HashTable::with_capacity(parts.tokens.len()),
            merges: Merges::with_capacity_and_hasher(parts.merges.len(), RandomState::default()),
            split,
            steps: parts.split,
            ignore_merges: parts.ignore_merges,
            ..Tokenizer::empty()?
        };
        for (text, id) in &parts.tokens {
            this.add_token(text, *id)?;
        }
        for byte in 0..=255u8 {
            let id = this.lookup(&[byte]).ok_or(Error::MissingByte { byte })?;
            if let Some(slot) = this.byte_ids.get_mut(usize::from(byte)) {
                *slot = id;
            }
        }
        this.add_merges(&parts.merges)?;
        for token in &parts.added {
            this.register_added(token)?;
        }
        this.added = AddedMatcher::new(parts.added)?;
        Ok(this)
    }

    /// A tokenizer of nothing.
    pub(crate) fn empty() -> Result<Tokenizer> {
        Ok(Tokenizer {
            stored: None,
            bytes: Vec::new(),
            spans: Vec::new(),
            by_bytes: HashTable::new(),
            hasher: RandomState::default(),
            by_text: HashMap::new(),
            byte_ids: [0; 256],
            merges: Merges::default(),
            added: AddedMatcher::new(Vec::new())?,
            split: Vec::new(),
            steps: Vec::new(),
            ignore_merges: false,
            count: 0,
        })
    }

    /// Adds a token of the vocabulary.
    fn add_token(&mut self, text: &str, id: u32) -> Result<()> {
        let start = self.bytes.len();
        let in_alphabet = alphabet::append_bytes(text, &mut self.bytes);
        if !in_alphabet {
            self.bytes.extend_from_slice(text.as_bytes());
        }
        self.add_span(text, id, start)?;
        if in_alphabet {
            let (bytes, spans, hasher) = (&self.bytes, &self.spans, &self.hasher);
            let key = bytes.get(start..).unwrap_or_default();
            let same = |&id: &u32| span_bytes(bytes, spans, id) == Some(key);
            let rehash = |&id: &u32| hasher.hash_one(span_bytes(bytes, spans, id).unwrap_or_default());
            match self.by_bytes.entry(hasher.hash_one(key), same, rehash) {
                Entry::Vacant(place) => place.insert(id),
                Entry::Occupied(first) => {
                    let first = *first.get();
                    return Err(Error::DuplicateToken { token: clip(text, 64), first, second: id });
                }
            };
        } else if let Some(first) = self.by_text.insert(text.to_owned(), id) {
            return Err(Error::DuplicateToken { token: clip(text, 64), first, second: id });
        }
        Ok(())
    }

    /// Gives `id` the bytes from `start` to the end.
    fn add_span(&mut self, text: &str, id: u32, start: usize) -> Result<()> {
        let len = self.bytes.len() - start;
        check_max("token bytes", limits::MAX_TOKEN_BYTES, len)?;
        if id >= limits::MAX_TOKEN_ID {
            return Err(Error::IdOutOfRange {
                token: clip(text, 64),
                id: u64::from(id),
                limit: limits::MAX_TOKEN_ID,
            });
        }
        if let Some(first) = self.token_bytes(id) {
            return Err(Error::DuplicateId {
                id,
                first: clip(&String::from_utf8_lossy(first), 64),
                second: clip(text, 64),
            });
        }
        let index = id as usize;
        if self.spans.len() <= index {
            self.spans.resize(index + 1, Span::default());
        }
        let (Ok(start), Ok(len)) = (u32::try_from(start), u16::try_from(len)) else {
            let found = self.bytes.len();
            return Err(Error::TooLarge { what: "vocabulary bytes", limit: u32::MAX as usize, found });
        };
        if let Some(span) = self.spans.get_mut(index) {
            *span = Span { start, len, used: true, special: false };
        }
        self.count += 1;
        Ok(())
    }

    fn add_merges(&mut self, merges: &[(&str, &str)]) -> Result<()> {
        let mut bytes = Vec::new();
        for (index, (left, right)) in merges.iter().enumerate() {
            bytes.clear();
            let mut find = |token: &str| {
                let start = bytes.len();
                let known = alphabet::append_bytes(token, &mut bytes)
                    .then(|| self.lookup(bytes.get(start..).unwrap_or_default()))
                    .flatten();
                known.ok_or_else(|| Error::MergeToken { index, token: clip(token, 64) })
            };
            let pair = (find(left)?, find(right)?);
            let merged = self
                .lookup(&bytes)
                .ok_or_else(|| Error::MergeToken { index, token: clip(&format!("{left}{right}"), 64) })?;
            // A pair that is listed twice keeps its last rank, as in the reference.
            self.merges.insert(pair, (index as u32, merged));
        }
        Ok(())
    }

    /// Gives an added token its id, or checks the one that the vocabulary already has for it.
    fn register_added(&mut self, token: &AddedToken) -> Result<()> {
        match self.token_id(&token.content) {
            Some(id) if id == token.id => {}
            Some(id) => {
                return Err(Error::DuplicateToken {
                    token: clip(&token.content, 64),
                    first: id,
                    second: token.id,
                });
            }
            None => {
                // Decoding reads an added token like any other: by the alphabet if it fits, else as it stands.
                let start = self.bytes.len();
                if !alphabet::append_bytes(&token.content, &mut self.bytes) {
                    self.bytes.extend_from_slice(token.content.as_bytes());
                }
                self.add_span(&token.content, token.id, start)?;
                self.by_text.insert(token.content.clone(), token.id);
            }
        }
        if let Some(span) = self.spans.get_mut(token.id as usize) {
            span.special |= token.special;
        }
        Ok(())
    }

    /// The id that encoding gives to these bytes as one token.
    pub(crate) fn lookup(&self, bytes: &[u8]) -> Option<u32> {
        if let Some(stored) = &self.stored {
            return stored.lookup(bytes);
        }
        let hash = self.hasher.hash_one(bytes);
        self.by_bytes.find(hash, |&id| span_bytes(&self.bytes, &self.spans, id) == Some(bytes)).copied()
    }

    /// Encodes text, recognising added tokens in it. No token is added that the text does not contain.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        check_max("text bytes", limits::MAX_TEXT_BYTES, text.len())?;
        let mut state = EncodeState::default();
        let mut clock = RegexClock::new();
        self.added.split(text, &mut |part| match part {
            Part::Added(id) => {
                state.ids.push(id);
                Ok(())
            }
            Part::Text(text) => self.encode_split(&self.split, text, &mut clock, &mut state),
        })?;
        Ok(state.ids)
    }

    /// Encodes text as plain text: the spelling of an added token in it has no special meaning.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>> {
        check_max("text bytes", limits::MAX_TEXT_BYTES, text.len())?;
        let mut state = EncodeState::default();
        self.encode_split(&self.split, text, &mut RegexClock::new(), &mut state)?;
        Ok(state.ids)
    }

    fn encode_split(
        &self,
        steps: &[Splitter],
        text: &str,
        clock: &mut RegexClock,
        state: &mut EncodeState,
    ) -> Result<()> {
        match steps.split_first() {
            Some((step, later)) => {
                step.split(text, clock, &mut |piece, clock| self.encode_split(later, piece, clock, state))
            }
            None => {
                self.encode_piece(text.as_bytes(), state);
                Ok(())
            }
        }
    }

    fn encode_piece(&self, piece: &[u8], state: &mut EncodeState) {
        if self.ignore_merges
            && let Some(id) = self.lookup(piece)
        {
            state.ids.push(id);
            return;
        }
        let bytes = piece.iter().map(|&b| self.byte_ids.get(usize::from(b)).copied().unwrap_or_default());
        match &self.stored {
            Some(stored) => state.merger.merge(bytes, |pair| stored.merge(pair), &mut state.ids),
            None => state.merger.merge(bytes, |pair| self.merges.get(&pair).copied(), &mut state.ids),
        }
    }

    /// Decodes ids; ids without a token give nothing, and bytes that are not UTF-8 give U+FFFD as
    /// [`String::from_utf8_lossy`] does. `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id).unwrap_or_default());
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The id of a token, written plainly for added tokens and in the byte alphabet for the rest, as in the file.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.by_text.get(token).copied().or_else(|| {
            let mut bytes = Vec::new();
            alphabet::append_bytes(token, &mut bytes).then(|| self.lookup(&bytes)).flatten()
        })
    }

    /// The bytes that `id` decodes to; they need not be UTF-8 on their own.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match &self.stored {
            Some(stored) => stored.token_bytes(id),
            None => span_bytes(&self.bytes, &self.spans, id),
        }
    }

    /// True for tokens that are left out of text when special tokens are skipped.
    pub fn is_special(&self, id: u32) -> bool {
        match &self.stored {
            Some(stored) => stored.is_special(id),
            None => self.spans.get(id as usize).is_some_and(|s| s.special),
        }
    }

    /// Number of tokens, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.count
    }

    /// One more than the largest id that has a token.
    pub fn id_limit(&self) -> u32 {
        self.stored.as_ref().map_or(self.spans.len(), Stored::ids) as u32
    }

    /// The tokens recognised in raw text.
    pub fn added_tokens(&self) -> &[AddedToken] {
        self.added.tokens()
    }
}

/// Scratch memory and result of one `encode` call.
#[derive(Default)]
struct EncodeState {
    ids: Vec<u32>,
    merger: Merger,
}

fn span_bytes<'b>(bytes: &'b [u8], spans: &[Span], id: u32) -> Option<&'b [u8]> {
    let span = spans.get(id as usize).filter(|s| s.used)?;
    let start = span.start as usize;
    bytes.get(start..start + usize::from(span.len))
}
