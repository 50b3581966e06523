//! Tests of the crate as a whole, by its public interface.

mod golden;
mod hostile;
mod properties;
mod tables;
mod template;

use crate::Tokenizer;

/// A tokenizer of the golden set.
pub(crate) fn golden_json(name: &str) -> &'static [u8] {
    match name {
        "ignore" => include_bytes!("../../golden/tokenizer.ignore.json"),
        "merge" => include_bytes!("../../golden/tokenizer.merge.json"),
        "gpt2" => include_bytes!("../../golden/tokenizer.gpt2.json"),
        "flags" => include_bytes!("../../golden/tokenizer.flags.json"),
        other => panic!("no golden tokenizer {other}"),
    }
}

pub(crate) fn golden_tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_json(golden_json(name)).unwrap()
}

/// A small deterministic generator of numbers.
pub(crate) struct XorShift(pub u64);

impl XorShift {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
