//! The GPT-2 byte alphabet: one printable character for each byte.
//!
//! Bytes 0x21-0x7E, 0xA1-0xAC and 0xAE-0xFF stand for themselves as code points; the other 68 take the code
//! points from U+0100 on, in order.

/// True when the byte is written as the code point of the same number.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The 68 bytes that are written as U+0100 + index.
const SHIFTED: [u8; 68] = {
    let mut table = [0u8; 68];
    let (mut byte, mut n) = (0usize, 0usize);
    while byte < 256 {
        if !is_plain(byte as u8) {
            table[n] = byte as u8;
            n += 1;
        }
        byte += 1;
    }
    table
};

/// The byte that `c` stands for.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match u8::try_from(code) {
        Ok(byte) => is_plain(byte).then_some(byte),
        Err(_) => SHIFTED.get(code.checked_sub(0x100)? as usize).copied(),
    }
}

/// The character that `byte` is written as.
#[cfg(test)]
pub(crate) fn char_of(byte: u8) -> char {
    if is_plain(byte) {
        return char::from(byte);
    }
    let index = SHIFTED.iter().position(|&b| b == byte).unwrap_or_default();
    char::from_u32(0x100 + index as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Appends the bytes of a token written in the alphabet. Returns false, and appends nothing, when a character
/// is not of the alphabet.
pub(crate) fn append_bytes(token: &str, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(b) => out.push(b),
            None => {
                out.truncate(start);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_round_trips_every_byte() {
        let mut seen = std::collections::HashSet::new();
        for byte in 0..=255u8 {
            let c = char_of(byte);
            assert!(seen.insert(c), "{c:?} stands for two bytes");
            assert_eq!(byte_of(c), Some(byte));
        }
        assert_eq!((char_of(b' '), char_of(b'\n'), char_of(0xAD)), ('Ġ', 'Ċ', 'Ń'));
        for c in [' ', '\n', '\u{ad}', '\u{144}', '中'] {
            assert_eq!(byte_of(c), None);
        }
    }
}
