//! The character classes `\p{L}` and `\p{N}` of the split patterns.
//!
//! The tables are those of the regex engine behind the reference tokenizer, read off by
//! `golden/make_golden.py`, and not those of a library of ours: the ids of a text must not change because a
//! dependency moves to a newer Unicode version.

use crate::unicode_tables::{LETTERS, NUMBERS};

/// `\p{L}`.
pub(crate) fn is_letter(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_alphabetic() } else { contains(LETTERS, c) }
}

/// `\p{N}`.
pub(crate) fn is_number(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_digit() } else { contains(NUMBERS, c) }
}

/// Binary search in sorted, disjoint, inclusive ranges.
fn contains(ranges: &[(u32, u32)], c: char) -> bool {
    let code = c as u32;
    let after = ranges.partition_point(|&(first, _)| first <= code);
    after.checked_sub(1).and_then(|i| ranges.get(i)).is_some_and(|&(_, last)| code <= last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_unicode_says() {
        for c in ['a', 'Z', 'é', 'ß', '中', '𠀀', 'ｱ', 'ʰ', 'ª', 'ⵣ'] {
            assert!(is_letter(c) && !is_number(c), "{c:?}");
        }
        for c in ['0', '9', '٣', '½', 'Ⅷ', '〇', '①', '𝟘'] {
            assert!(is_number(c) && !is_letter(c), "{c:?}");
        }
        for c in [' ', '_', '\u{301}', '😀', '\u{378}', '\u{10ffff}', '。'] {
            assert!(!is_number(c) && !is_letter(c), "{c:?}");
        }
        for table in [LETTERS, NUMBERS] {
            assert!(table.windows(2).all(|w| w[0].1 < w[1].0) && table.iter().all(|r| r.0 <= r.1));
        }
    }
}
