//! A tokenizer's tables as bytes that are searched where they lie: opening them builds nothing.
//!
//! `tokenizer.json` of a real model takes tens of milliseconds to parse, and its 300,000 merges have to be looked up one by
//! one. What comes of it is written once ([`Tokenizer::to_tables`]) and read in place ([`Tokenizer::from_tables`]). All
//! numbers are u32, little-endian. In order:
//!
//! | part | what |
//! | --- | --- |
//! | head | 8 bytes that say what this is, then the numbers of ids, tokens, slots, merges, bytes of text, bytes of the rest |
//! | byte ids | the id of each single byte, 256 of them |
//! | starts | where the bytes of each id begin in the text, and where the last ones end |
//! | runs | the first merge of each left id, and the number of merges |
//! | slots | a power of two: an id and 1, or 0; the tokens that encoding gives, by the hash of their bytes, or in the next free slot |
//! | merges | right id, rank and merged id, by left id and right id |
//! | kinds | for each id a byte: bits for a token, a special one, one that encoding gives |
//! | text | the bytes of all tokens |
//! | rest | added tokens, pre-tokenizer steps and tokens outside the byte alphabet, as JSON |
//!
//! Whatever the bytes say, a search looks at a bounded number of them, and gives ids below the number of ids.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::added::{AddedMatcher, AddedToken};
use crate::error::{Error, Result, check_max};
use crate::limits;
use crate::split::{SplitStep, Splitter};
use crate::tokenizer::Tokenizer;

const FILE: &str = "tokenizer tables";
/// The last digit is the version.
const MAGIC: &[u8; 8] = b"pglmbpe1";
/// Numbers in the head, behind the magic.
const COUNTS: usize = 6;
/// Most slots behind the first one that may hold a token.
const PROBES: usize = 64;

const TOKEN: u8 = 1;
const SPECIAL: u8 = 2;
const ENCODED: u8 = 4;

/// Bytes that a tokenizer's tables lie in, such as a part of a mapped file.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Where the parts of opened tables begin.
pub(crate) struct Stored {
    data: SharedBytes,
    ids: usize,
    slots: usize,
    merges: usize,
    starts_at: usize,
    runs_at: usize,
    slots_at: usize,
    merges_at: usize,
    kinds_at: usize,
    text_at: usize,
    text: usize,
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stored({} ids, {} merges)", self.ids, self.merges)
    }
}

/// What is small.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rest {
    ignore_merges: bool,
    /// A pattern, or nothing for GPT-2's.
    split: Vec<Option<String>>,
    added: Vec<Added>,
    by_text: Vec<(String, u32)>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Added {
    id: u32,
    content: String,
    special: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

impl Stored {
    fn number(&self, part: usize, index: usize) -> Option<u32> {
        number(self.bytes(), part.checked_add(index.checked_mul(4)?)?)
    }

    fn kind(&self, id: u32) -> u8 {
        let at = self.kinds_at + id as usize;
        if id as usize >= self.ids { 0 } else { self.bytes().get(at).copied().unwrap_or_default() }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        (*self.data).as_ref()
    }

    pub(crate) fn ids(&self) -> usize {
        self.ids
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.kind(id) & SPECIAL != 0
    }

    pub(crate) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        if self.kind(id) & TOKEN == 0 {
            return None;
        }
        let (start, end) =
            (self.number(self.starts_at, id as usize)?, self.number(self.starts_at, id as usize + 1)?);
        let (start, end) = (start as usize, end as usize);
        if end > self.text || end.checked_sub(start)? > limits::MAX_TOKEN_BYTES {
            return None;
        }
        self.bytes().get(self.text_at + start..self.text_at + end)
    }

    /// The id that encoding gives to these bytes as one token.
    pub(crate) fn lookup(&self, bytes: &[u8]) -> Option<u32> {
        for slot in probes(bytes, self.slots) {
            let id = self.number(self.slots_at, slot)?.checked_sub(1)?;
            if self.kind(id) & ENCODED != 0 && self.token_bytes(id) == Some(bytes) {
                return Some(id);
            }
        }
        None
    }

    /// Rank and merged id of a pair.
    pub(crate) fn merge(&self, (left, right): (u32, u32)) -> Option<(u32, u32)> {
        if left as usize >= self.ids {
            return None;
        }
        let mut low = self.number(self.runs_at, left as usize)? as usize;
        let mut high = (self.number(self.runs_at, left as usize + 1)? as usize).min(self.merges);
        while low < high {
            let middle = low + (high - low) / 2;
            let found = self.number(self.merges_at, middle * 3)?;
            if found == right {
                let rank = self.number(self.merges_at, middle * 3 + 1)?;
                let merged = self.number(self.merges_at, middle * 3 + 2)?;
                return Some((rank, merged)).filter(|_| (merged as usize) < self.ids);
            }
            if found < right { low = middle + 1 } else { high = middle }
        }
        None
    }
}

fn number(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

/// The slots in which these bytes may be, in order.
fn probes(bytes: &[u8], slots: usize) -> impl Iterator<Item = usize> {
    // FNV-1a, 64 bits.
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for &byte in bytes {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let (first, mask) = ((hash ^ (hash >> 32)) as usize, slots.wrapping_sub(1));
    (0..PROBES.min(slots)).map(move |step| first.wrapping_add(step) & mask)
}

/// The slots of tokens; `None` where too many have to be looked at, however many there are.
fn place(tokens: &[(u32, &[u8])]) -> Option<Vec<u32>> {
    let least = tokens.len().max(1).next_power_of_two() * 2;
    [least, least * 2, least * 4].into_iter().find_map(|count| {
        let mut slots = vec![0u32; count];
        for (id, bytes) in tokens {
            let free = probes(bytes, count).find(|&slot| slots.get(slot) == Some(&0))?;
            *slots.get_mut(free)? = id + 1;
        }
        Some(slots)
    })
}

impl Tokenizer {
    /// The tables, to be written and opened again by [`Tokenizer::from_tables`]; `None` where they cannot be laid out, because
    /// too many tokens have like hashes, or would be longer than [`limits::MAX_TABLES_BYTES`].
    pub fn to_tables(&self) -> Option<Vec<u8>> {
        if let Some(stored) = &self.stored {
            return Some(stored.bytes().to_vec());
        }
        let ids = self.id_limit();
        let (mut text, mut starts, mut kinds, mut encoded) = (Vec::new(), vec![0u32], Vec::new(), Vec::new());
        for id in 0..ids {
            let bytes = self.token_bytes(id);
            let mut kind = if bytes.is_some() { TOKEN } else { 0 };
            if let Some(bytes) = bytes {
                text.extend_from_slice(bytes);
                if self.lookup(bytes) == Some(id) {
                    kind |= ENCODED;
                    encoded.push((id, bytes));
                }
            }
            if self.is_special(id) {
                kind |= SPECIAL;
            }
            kinds.push(kind);
            starts.push(u32::try_from(text.len()).ok()?);
        }
        let slots = place(&encoded)?;
        let mut merges: Vec<[u32; 4]> =
            self.merges.iter().map(|(pair, to)| [pair.0, pair.1, to.0, to.1]).collect();
        merges.sort_unstable();
        let mut runs = vec![0u32; ids as usize + 1];
        for [left, ..] in &merges {
            *runs.get_mut(*left as usize + 1)? += 1;
        }
        let mut sum = 0;
        for run in &mut runs {
            sum += *run;
            *run = sum;
        }
        let mut by_text: Vec<(String, u32)> = self.by_text.iter().map(|(t, id)| (t.clone(), *id)).collect();
        by_text.sort_unstable();
        let rest = serde_json::to_vec(&Rest {
            ignore_merges: self.ignore_merges,
            split: self.steps.iter().map(SplitStep::pattern).collect(),
            added: self.added_tokens().iter().map(Added::of).collect(),
            by_text,
        })
        .ok()?;
        let counts = [ids as usize, self.vocab_size(), slots.len(), merges.len(), text.len(), rest.len()];
        let mut out = MAGIC.to_vec();
        let mut put = |number: u32| out.extend_from_slice(&number.to_le_bytes());
        for count in counts {
            put(u32::try_from(count).ok()?);
        }
        self.byte_ids.iter().chain(&starts).chain(&runs).chain(&slots).for_each(|n| put(*n));
        merges.iter().flat_map(|[_, rest @ ..]| rest).for_each(|n| put(*n));
        out.extend(kinds);
        out.extend(text);
        out.extend(rest);
        (out.len() <= limits::MAX_TABLES_BYTES).then_some(out)
    }

    /// Whether bytes are tables of the version that this library reads. Others are no error: `tokenizer.json` has it all.
    pub fn are_tables(bytes: &[u8]) -> bool {
        bytes.starts_with(MAGIC)
    }

    /// Opens tables as [`Tokenizer::to_tables`] made them. They are searched where they lie, so that no more of them is
    /// read than a text needs, and what they say is believed only as far as no search can go astray.
    ///
    /// # Errors
    /// [`Error::Tables`] where the parts do not have the length that the head gives, [`Error::TooLarge`] for numbers above
    /// the caps in [`limits`], and those of [`Tokenizer::from_parts`] for added tokens and pre-tokenizer steps.
    pub fn from_tables(data: SharedBytes) -> Result<Tokenizer> {
        let bytes = (*data).as_ref();
        let wrong = |what: String| Error::Tables { what };
        check_max("bytes of tokenizer tables", limits::MAX_TABLES_BYTES, bytes.len())?;
        if !Tokenizer::are_tables(bytes) {
            return Err(wrong("they do not begin as tables do".into()));
        }
        let count = |i: usize| {
            let found = number(bytes, MAGIC.len() + 4 * i).map(|n| n as usize);
            found.ok_or_else(|| wrong(format!("{} bytes hold no head", bytes.len())))
        };
        let [ids, tokens, slots, merges, text, rest] =
            [count(0)?, count(1)?, count(2)?, count(3)?, count(4)?, count(5)?];
        check_max("tokens", limits::MAX_TOKEN_ID as usize, ids)?;
        check_max("tokens", ids, tokens)?;
        check_max("merges", limits::MAX_MERGES, merges)?;
        check_max("bytes of added tokens", limits::MAX_JSON_BYTES, rest)?;
        if !slots.is_power_of_two() {
            return Err(wrong(format!("{slots} slots, expected a power of two")));
        }
        // Each number is below 2^32, so that sums fit 64 bits; a platform with fewer has no such file in memory.
        let mut at = (MAGIC.len() + 4 * COUNTS) as u64;
        let mut part = |bytes: u64| {
            let begin = at;
            at += bytes;
            begin as usize
        };
        let numbers = |n: usize| 4 * n as u64;
        let byte_ids_at = part(numbers(256));
        let (starts_at, runs_at) = (part(numbers(ids + 1)), part(numbers(ids + 1)));
        let (slots_at, merges_at) = (part(numbers(slots)), part(3 * numbers(merges)));
        let (kinds_at, text_at, rest_at) = (part(ids as u64), part(text as u64), part(rest as u64));
        if at != bytes.len() as u64 {
            return Err(wrong(format!("the parts have {at} bytes, found {}", bytes.len())));
        }
        let rest: Rest = serde_json::from_slice(bytes.get(rest_at..).unwrap_or_default())
            .map_err(|e| Error::json(FILE, &e))?;
        check_max("pre-tokenizer steps", limits::MAX_SPLIT_STEPS, rest.split.len())?;
        let mut byte_ids = [0; 256];
        for (byte, id) in (0..=255u8).zip(&mut byte_ids) {
            let found = number(bytes, byte_ids_at + 4 * usize::from(byte)).filter(|id| (*id as usize) < ids);
            *id = found.ok_or(Error::MissingByte { byte })?;
        }
        for (token, id) in &rest.by_text {
            if *id as usize >= ids {
                let (token, limit) = (crate::error::clip(token, 64), ids as u32);
                return Err(Error::IdOutOfRange { token, id: u64::from(*id), limit });
            }
        }
        let added: Vec<AddedToken> = rest.added.into_iter().map(Added::into_token).collect();
        if let Some(token) = added.iter().find(|token| token.id as usize >= ids) {
            let id = u64::from(token.id);
            let (token, limit) = (crate::error::clip(&token.content, 64), ids as u32);
            return Err(Error::IdOutOfRange { token, id, limit });
        }
        let steps: Vec<SplitStep> = rest.split.into_iter().map(SplitStep::of_pattern).collect();
        let split = steps.iter().map(Splitter::new).collect::<Result<Vec<_>>>()?;
        let stored = Stored {
            data,
            ids,
            slots,
            merges,
            starts_at,
            runs_at,
            slots_at,
            merges_at,
            kinds_at,
            text_at,
            text,
        };
        let mut this = Tokenizer::empty()?;
        this.stored = Some(stored);
        this.by_text = rest.by_text.into_iter().collect();
        this.byte_ids = byte_ids;
        this.added = AddedMatcher::new(added)?;
        (this.split, this.steps) = (split, steps);
        this.ignore_merges = rest.ignore_merges;
        this.count = tokens;
        Ok(this)
    }
}

impl SplitStep {
    fn pattern(&self) -> Option<String> {
        match self {
            SplitStep::Regex(pattern) => Some(pattern.clone()),
            SplitStep::Gpt2 => None,
        }
    }

    fn of_pattern(pattern: Option<String>) -> SplitStep {
        pattern.map_or(SplitStep::Gpt2, SplitStep::Regex)
    }
}

impl Added {
    fn of(token: &AddedToken) -> Added {
        let AddedToken { id, content, special, single_word, lstrip, rstrip, normalized } = token.clone();
        Added { id, content, special, single_word, lstrip, rstrip, normalized }
    }

    fn into_token(self) -> AddedToken {
        let Added { id, content, special, single_word, lstrip, rstrip, normalized } = self;
        AddedToken { id, content, special, single_word, lstrip, rstrip, normalized }
    }
}
