//! Added tokens: matched in the raw text before anything else.

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

use crate::error::{Error, Result, check_max, clip};
use crate::limits;

/// A token that is recognised in raw text, as listed under `added_tokens`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Left out of decoded text when special tokens are skipped.
    pub special: bool,
    /// Matches only when no word character stands next to it.
    pub single_word: bool,
    /// Takes the white space before it with it.
    pub lstrip: bool,
    /// Takes the white space after it with it.
    pub rstrip: bool,
    /// Matched after the tokens that are not normalized. There is no normalizer here, so that only the order
    /// differs.
    pub normalized: bool,
}

impl AddedToken {
    /// A special token without any stripping, as the family's files have them.
    pub fn special(id: u32, content: &str) -> Self {
        Self {
            id,
            content: content.to_owned(),
            special: true,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
        }
    }
}

/// Finds added tokens in text: leftmost, and longest among those that start at the same place.
#[derive(Debug)]
pub(crate) struct AddedMatcher {
    tokens: Vec<AddedToken>,
    /// One automaton per pass, with the index into `tokens` of each of its patterns.
    passes: Vec<(AhoCorasick, Vec<usize>)>,
    word: fancy_regex::Regex,
}

impl AddedMatcher {
    pub(crate) fn new(tokens: Vec<AddedToken>) -> Result<Self> {
        check_max("added tokens", limits::MAX_ADDED_TOKENS, tokens.len())?;
        let mut total = 0usize;
        for t in &tokens {
            check_max("added token bytes", limits::MAX_ADDED_TOKEN_BYTES, t.content.len())?;
            total += t.content.len();
            if t.content.is_empty() {
                return Err(Error::AddedToken { id: t.id, detail: "content is empty".into() });
            }
        }
        check_max("total added token bytes", limits::MAX_ADDED_BYTES, total)?;
        let mut passes = Vec::new();
        for normalized in [false, true] {
            let members: Vec<usize> = tokens
                .iter()
                .enumerate()
                .filter(|(_, t)| t.normalized == normalized)
                .map(|(i, _)| i)
                .collect();
            if members.is_empty() {
                continue;
            }
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .kind(Some(AhoCorasickKind::ContiguousNFA))
                .build(members.iter().filter_map(|&i| tokens.get(i)).map(|t| t.content.as_str()))
                .map_err(|e| Error::AddedToken {
                    id: members.first().and_then(|&i| tokens.get(i)).map_or(0, |t| t.id),
                    detail: clip(&e.to_string(), 160),
                })?;
            passes.push((automaton, members));
        }
        let word = fancy_regex::Regex::new(r"\w")
            .map_err(|e| Error::Pattern { pattern: r"\w".into(), detail: clip(&e.to_string(), 160) })?;
        Ok(Self { tokens, passes, word })
    }

    pub(crate) fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    /// Calls `part` with the parts of `text` in order: an added token, or text without any.
    pub(crate) fn split<'t>(
        &self,
        text: &'t str,
        part: &mut dyn FnMut(Part<'t>) -> Result<()>,
    ) -> Result<()> {
        self.split_pass(&self.passes, text, part)
    }

    fn split_pass<'t>(
        &self,
        passes: &[(AhoCorasick, Vec<usize>)],
        text: &'t str,
        part: &mut dyn FnMut(Part<'t>) -> Result<()>,
    ) -> Result<()> {
        let Some(((automaton, members), later)) = passes.split_first() else {
            return if text.is_empty() { Ok(()) } else { part(Part::Text(text)) };
        };
        let mut done = 0usize;
        for found in automaton.find_iter(text) {
            let Some(token) = members.get(found.pattern().as_usize()).and_then(|&i| self.tokens.get(i))
            else {
                continue;
            };
            let (mut start, mut end) = (found.start(), found.end());
            let before = text.get(..start).unwrap_or_default();
            let after = text.get(end..).unwrap_or_default();
            if token.single_word
                && (self.is_word(before.chars().next_back()) || self.is_word(after.chars().next()))
            {
                continue;
            }
            if token.lstrip {
                // White space that the previous token has taken stays with it.
                start = before.trim_end().len().max(done);
            }
            if token.rstrip {
                end += after.len() - after.trim_start().len();
            }
            if done < start {
                self.split_pass(later, text.get(done..start).unwrap_or_default(), part)?;
            }
            part(Part::Added(token.id))?;
            done = end;
        }
        self.split_pass(later, text.get(done..).unwrap_or_default(), part)
    }

    fn is_word(&self, c: Option<char>) -> bool {
        let mut buffer = [0u8; 4];
        c.is_some_and(|c| self.word.is_match(c.encode_utf8(&mut buffer)).unwrap_or(false))
    }
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'t> {
    /// Text without added tokens, not empty.
    Text(&'t str),
    /// The id of an added token.
    Added(u32),
}
