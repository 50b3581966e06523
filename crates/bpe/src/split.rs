//! Pre-tokenizers: cut a text into the pieces that BPE works on.
//!
//! The two patterns that matter have hand-written scanners that look at each character a bounded number of
//! times. Any other pattern goes to a backtracking regex engine, on bounded text and with bounded work.

use std::time::Duration;
#[cfg(not(target_family = "wasm"))]
use std::time::Instant;

#[cfg(target_family = "wasm")]
use web_time::Instant;

use crate::error::{Error, Result, check_max, clip};
use crate::limits;
use crate::unicode::{is_letter, is_number};

/// Split pattern of GLM-4 (the same as that of Llama 3).
pub(crate) const GLM_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Split pattern of GPT-2, which `ByteLevel` with `use_regex` applies.
pub(crate) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// One step of the pre-tokenizer. Each step cuts the pieces of the step before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SplitStep {
    /// Cut at the matches of a regex, keeping matches and the text between them as pieces.
    Regex(String),
    /// Cut by the pattern of GPT-2.
    Gpt2,
}

/// A compiled [`SplitStep`].
#[derive(Debug)]
pub(crate) enum Splitter {
    Glm,
    Gpt2,
    Regex { regex: Box<fancy_regex::Regex>, pattern: String },
}

impl Splitter {
    pub(crate) fn new(step: &SplitStep) -> Result<Self> {
        let pattern = match step {
            SplitStep::Gpt2 => return Ok(Splitter::Gpt2),
            SplitStep::Regex(p) if p == GLM_PATTERN => return Ok(Splitter::Glm),
            SplitStep::Regex(p) if p == GPT2_PATTERN => return Ok(Splitter::Gpt2),
            SplitStep::Regex(p) => p,
        };
        check_max("split pattern bytes", limits::MAX_PATTERN_BYTES, pattern.len())?;
        let regex = fancy_regex::RegexBuilder::new(pattern)
            .backtrack_limit(limits::MAX_REGEX_BACKTRACKS)
            .delegate_size_limit(1 << 20)
            .delegate_dfa_size_limit(1 << 20)
            .build()
            .map_err(|e| Error::Pattern { pattern: clip(pattern, 64), detail: clip(&e.to_string(), 160) })?;
        Ok(Splitter::Regex { regex: Box::new(regex), pattern: clip(pattern, 64) })
    }

    /// Calls `piece` with the pieces of `text` in order; together they are `text`.
    pub(crate) fn split<'t>(
        &self,
        text: &'t str,
        clock: &mut RegexClock,
        piece: &mut dyn FnMut(&'t str, &mut RegexClock) -> Result<()>,
    ) -> Result<()> {
        match self {
            Splitter::Glm => split_with(text, glm_end, clock, piece),
            Splitter::Gpt2 => split_with(text, gpt2_end, clock, piece),
            Splitter::Regex { regex, pattern } => split_regex(regex, pattern, text, clock, piece),
        }
    }
}

/// Time left for regex work within one `encode` call.
#[derive(Debug)]
pub(crate) struct RegexClock {
    left: Duration,
}

impl RegexClock {
    pub(crate) fn new() -> Self {
        Self { left: Duration::from_millis(limits::MAX_REGEX_MILLIS) }
    }

    /// Subtracts the time since `start`; false when none is left.
    fn spend(&mut self, start: Instant) -> bool {
        self.left = self.left.saturating_sub(start.elapsed());
        !self.left.is_zero()
    }
}

fn split_regex<'t>(
    regex: &fancy_regex::Regex,
    pattern: &str,
    text: &'t str,
    clock: &mut RegexClock,
    piece: &mut dyn FnMut(&'t str, &mut RegexClock) -> Result<()>,
) -> Result<()> {
    let give_up = |offset: usize, detail: String| Error::PatternWork {
        pattern: pattern.to_owned(),
        offset,
        length: text.len(),
        detail,
    };
    if text.len() > limits::MAX_REGEX_BYTES {
        let detail = format!("only stretches of at most {} bytes are searched", limits::MAX_REGEX_BYTES);
        return Err(give_up(0, detail));
    }
    let mut done = 0usize;
    let mut matches = regex.find_iter(text);
    loop {
        let start = Instant::now();
        let next = matches.next();
        if !clock.spend(start) {
            return Err(give_up(done, format!("more than {} ms", limits::MAX_REGEX_MILLIS)));
        }
        let Some(found) = next else { break };
        let found = found.map_err(|e| give_up(done, clip(&e.to_string(), 160)))?;
        let before = text.get(done..found.start()).unwrap_or_default();
        for part in [before, found.as_str()] {
            if !part.is_empty() {
                piece(part, clock)?;
            }
        }
        done = found.end();
    }
    match text.get(done..) {
        Some(rest) if !rest.is_empty() => piece(rest, clock),
        _ => Ok(()),
    }
}

/// Cuts `text` by a scanner that returns the length in bytes of the piece at the start of a non-empty text.
fn split_with<'t>(
    mut text: &'t str,
    end: fn(&str) -> usize,
    clock: &mut RegexClock,
    piece: &mut dyn FnMut(&'t str, &mut RegexClock) -> Result<()>,
) -> Result<()> {
    while !text.is_empty() {
        let (head, rest) = text.split_at_checked(end(text).max(1)).unwrap_or((text, ""));
        piece(head, clock)?;
        text = rest;
    }
    Ok(())
}

/// Neither white space nor letter nor number: `[^\s\p{L}\p{N}]`.
fn is_other(c: char) -> bool {
    !c.is_whitespace() && !is_letter(c) && !is_number(c)
}

fn is_newline(c: char) -> bool {
    c == '\r' || c == '\n'
}

/// Length in bytes of the longest prefix of characters that satisfy `class`.
fn run(text: &str, class: impl Fn(char) -> bool) -> usize {
    text.find(|c| !class(c)).unwrap_or(text.len())
}

/// Length of the piece at the start of `text` by [`GLM_PATTERN`]; the comments name its alternatives.
fn glm_end(text: &str) -> usize {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let rest = chars.as_str();
    let first_len = first.len_utf8();
    // (?i:'s|'t|'re|'ve|'m|'ll|'d)
    if first == '\'' {
        // The long s folds to s, and is the only non-ASCII character that folds to a letter used here.
        let fold = |c: char| if c == '\u{17f}' { 's' } else { c.to_ascii_lowercase() };
        match (chars.next(), chars.next()) {
            (Some(a), _) if matches!(fold(a), 's' | 't' | 'm' | 'd') => return first_len + a.len_utf8(),
            (Some(a), Some(b)) if matches!((fold(a), fold(b)), ('r' | 'v', 'e') | ('l', 'l')) => {
                return first_len + a.len_utf8() + b.len_utf8();
            }
            _ => {}
        }
    }
    // [^\r\n\p{L}\p{N}]?\p{L}+
    if is_letter(first) {
        return run(text, is_letter);
    }
    // \p{N}{1,3}
    if is_number(first) {
        return text.chars().take_while(|&c| is_number(c)).take(3).map(char::len_utf8).sum();
    }
    if !is_newline(first) && rest.starts_with(is_letter) {
        return first_len + run(rest, is_letter);
    }
    //  ?[^\s\p{L}\p{N}]+[\r\n]*
    let skip = usize::from(first == ' ');
    let others = run(text.get(skip..).unwrap_or_default(), is_other);
    if others > 0 {
        let end = skip + others;
        return end + run(text.get(end..).unwrap_or_default(), is_newline);
    }
    // \s*[\r\n]+
    let blank = run(text, char::is_whitespace);
    if let Some(last) = text.get(..blank).and_then(|s| s.rfind(is_newline)) {
        return last + 1;
    }
    blank_end(text, blank)
}

/// `\s+(?!\S)|\s+` on `blank` bytes of white space: all of it at the end of the text, otherwise all but the
/// last character, unless that is the only one.
fn blank_end(text: &str, blank: usize) -> usize {
    if blank == text.len() {
        return blank;
    }
    match text.get(..blank).and_then(|s| s.char_indices().next_back()) {
        Some((last, _)) if last > 0 => last,
        _ => blank,
    }
}

/// Length of the piece at the start of `text` by [`GPT2_PATTERN`].
fn gpt2_end(text: &str) -> usize {
    for suffix in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"] {
        if text.starts_with(suffix) {
            return suffix.len();
        }
    }
    let skip = usize::from(text.starts_with(' '));
    let body = text.get(skip..).unwrap_or_default();
    for class in [is_letter as fn(char) -> bool, is_number, is_other] {
        let n = run(body, class);
        if n > 0 {
            return skip + n;
        }
    }
    blank_end(text, run(text, char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter
            .split(text, &mut RegexClock::new(), &mut |p, _| {
                out.push(p.to_owned());
                Ok(())
            })
            .unwrap();
        out
    }

    fn pieces(step: &SplitStep, text: &str) -> Vec<String> {
        cut(&Splitter::new(step).unwrap(), text)
    }

    /// The pattern with a group around it, which is not recognised and so goes to the regex engine.
    fn by_regex(pattern: &str) -> SplitStep {
        SplitStep::Regex(format!("(?:{pattern})"))
    }

    #[test]
    fn scanners_agree_with_a_regex_engine_on_random_text() {
        let alphabet: Vec<char> =
            " \t\r\n\u{a0}\u{3000}'sStTrReEvVmMlLdDaé中文7½٣.,!<|_\u{301}😀\u{17f}\u{200d}".chars().collect();
        let mut state = 1u64;
        let pairs = [(SplitStep::Regex(GLM_PATTERN.into()), GLM_PATTERN), (SplitStep::Gpt2, GPT2_PATTERN)]
            .map(|(step, p)| (Splitter::new(&step).unwrap(), Splitter::new(&by_regex(p)).unwrap()));
        assert!(pairs.iter().all(|(_, engine)| matches!(engine, Splitter::Regex { .. })));
        for _ in 0..4000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text.push(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            for (scanner, engine) in &pairs {
                assert_eq!(cut(scanner, &text), cut(engine, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn glm_pieces_are_as_the_pattern_says() {
        let glm = SplitStep::Regex(GLM_PATTERN.into());
        assert_eq!(
            pieces(&glm, "I'LL go  \n\n 12345 ok!\n"),
            ["I", "'LL", " go", "  \n\n", " ", "123", "45", " ok", "!\n"]
        );
        assert_eq!(pieces(&glm, "a   b "), ["a", "  ", " b", " "]);
    }

    #[test]
    fn a_pattern_that_matches_nothing_keeps_the_text_whole() {
        assert_eq!(pieces(&SplitStep::Regex("x*".into()), "ab"), ["a", "b"]);
        assert_eq!(pieces(&SplitStep::Regex("Q".into()), "ab"), ["ab"]);
    }
}
