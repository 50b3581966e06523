//! Stop strings: text that ends generation and is not shown.

use crate::error::{Error, Result, check_max};
use crate::limits;

/// Watches generated text for stop strings, holding back what might be the start of one.
///
/// The result does not depend on how the text is cut into pieces: the stop string that is complete first wins,
/// and the longest among those that are complete at the same character.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that was not released yet; shorter than the longest stop string between calls.
    held: String,
}

/// A stop string was met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Text before the stop string that was not released yet.
    pub text: String,
    /// Index of the stop string.
    pub stop: usize,
}

impl StopStrings {
    /// Watches for `stops`, none of which may be empty.
    pub fn new(stops: &[&str]) -> Result<Self> {
        check_max("stop strings", limits::MAX_STOP_STRINGS, stops.len())?;
        for (index, s) in stops.iter().enumerate() {
            if s.is_empty() || s.len() > limits::MAX_STOP_BYTES {
                return Err(Error::StopString { index, limit: limits::MAX_STOP_BYTES, found: s.len() });
            }
        }
        Ok(Self { stops: stops.iter().map(|s| (*s).to_owned()).collect(), held: String::new() })
    }

    /// Takes the next piece. `Ok` is text that may be shown; `Err` says that a stop string was met, after which
    /// the watcher is empty again.
    pub fn push(&mut self, piece: &str) -> std::result::Result<String, Stopped> {
        self.held.push_str(piece);
        let first = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(i, s)| self.held.find(s.as_str()).map(|at| (at + s.len(), at, i)))
            .min();
        if let Some((_, at, stop)) = first {
            self.held.truncate(at);
            return Err(Stopped { text: std::mem::take(&mut self.held), stop });
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Ok(std::mem::replace(&mut self.held, rest))
    }

    /// Ends the text and returns what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a start of `stop` but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    // Both are UTF-8, so an end that equals a start begins and ends on character boundaries.
    (1..=longest)
        .rev()
        .find(|&n| text.as_bytes().get(text.len() - n..) == stop.as_bytes().get(..n))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces` and returns the shown text and the stop.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut watcher = StopStrings::new(stops).unwrap();
        let mut shown = String::new();
        for p in pieces {
            match watcher.push(p) {
                Ok(text) => shown.push_str(&text),
                Err(s) => return (shown + &s.text, Some(s.stop)),
            }
        }
        (shown + &watcher.finish(), None)
    }

    #[test]
    fn a_stop_string_is_found_across_every_cut_of_the_text() {
        let text = "点击</answ </answer> 之后";
        for stops in [&["</answer>"][..], &["answer", "</answer>"], &["er>", "wer> 之"]] {
            let whole = run(stops, &[text]);
            assert!(whole.1.is_some());
            let cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
            for &a in &cuts {
                for &b in cuts.iter().filter(|&&b| b >= a) {
                    assert_eq!(run(stops, &[&text[..a], &text[a..b], &text[b..]]), whole);
                }
            }
        }
        assert_eq!(run(&["</answer>"], &[text]), ("点击</answ ".into(), Some(0)));
    }

    #[test]
    fn text_without_a_stop_string_comes_out_whole_and_undelayed() {
        assert_eq!(run(&["abc", "bd"], &["ab", "ab", "b"]), ("ababb".into(), None));
        let mut watcher = StopStrings::new(&["abc"]).unwrap();
        assert_eq!(watcher.push("xxab"), Ok("xx".into()));
        assert_eq!(watcher.push("x"), Ok("abx".into()));
    }

    #[test]
    fn empty_and_oversized_stop_strings_are_rejected() {
        assert!(matches!(StopStrings::new(&["a", ""]), Err(Error::StopString { index: 1, .. })));
        assert!(StopStrings::new(&[&"x".repeat(limits::MAX_STOP_BYTES + 1)]).is_err());
        assert!(StopStrings::new(&["a"; limits::MAX_STOP_STRINGS + 1]).is_err());
    }
}
