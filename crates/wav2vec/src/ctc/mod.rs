//! From logits to text: connectionist temporal classification (Graves et al. 2006), greedy and with a beam.
//!
//! Both decoders take logits frame by frame, so that a stream needs no more memory than what is undecided.
//! [`Greedy`] is the reference's decoding; [`Beam`] sums over all alignments of a text.

mod beam;
mod greedy;
mod vocabulary;

pub use beam::Beam;
pub use greedy::Greedy;
pub use vocabulary::{Span, Vocabulary};

use crate::Result;

/// A token of the text and the frames that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission {
    /// Its id.
    pub id: u32,
    /// The first frame that says it.
    pub start: usize,
    /// The frame after the last one that says it.
    pub end: usize,
}

/// A decoder that takes frames and gives the tokens that are certain.
#[derive(Clone, Debug)]
pub enum Decoder {
    /// The best token of each frame.
    Greedy(Greedy),
    /// The most probable text.
    Beam(Box<Beam>),
}

impl Decoder {
    /// A greedy decoder for a beam of 0 or 1, else one with a beam of that width.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a beam wider than 1000.
    pub fn new(vocabulary: usize, blank: u32, beam: usize) -> Result<Decoder> {
        Ok(match beam {
            0 | 1 => Decoder::Greedy(Greedy::new(vocabulary, blank)),
            width => Decoder::Beam(Box::new(Beam::new(vocabulary, blank, width)?)),
        })
    }

    /// Takes the logits of some frames `[frames, vocabulary]` and appends the tokens that no later frame can change.
    pub fn push(&mut self, logits: &[f32], out: &mut Vec<Emission>) {
        match self {
            Decoder::Greedy(d) => d.push(logits, out),
            Decoder::Beam(d) => d.push(logits, out),
        }
    }

    /// Appends the tokens that were still open.
    pub fn finish(&mut self, out: &mut Vec<Emission>) {
        match self {
            Decoder::Greedy(d) => d.finish(out),
            Decoder::Beam(d) => d.finish(out),
        }
    }
}

#[cfg(test)]
mod tests;
