//! Audio without end: overlapping chunks, each encoded with some audio before and after it.

use crate::audio::{Level, LevelMeter, Resampler, mix};
use crate::ctc::{Decoder, Emission};
use crate::{Error, Recogniser, Result, SAMPLE_RATE};

/// How a stream is cut.
///
/// A chunk is encoded together with `context` seconds of audio before and after it, of which only the chunk's own
/// frames are kept. Audio that fits in a chunk and one context is encoded as a whole, and the result is that of
/// [`Recogniser::transcribe`], bit for bit. In longer audio the convolutions give the same numbers as long as the context
/// is longer than half the positional kernel (1.3 seconds in the published models), but attention reaches over the
/// whole clip offline and over `2 · context + seconds` here, and the "base" family's group norm takes its statistics from
/// what is encoded at once. How much that changes depends on how far a model looks.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunking {
    /// Seconds whose frames are kept of a chunk.
    pub seconds: f64,
    /// Seconds before and after that are encoded along.
    pub context: f64,
    /// Mean and variance of the whole audio, where they are known; else those of all audio up to the end of what is
    /// encoded.
    pub level: Option<Level>,
}

impl Default for Chunking {
    /// 20 seconds and 5 on either side.
    fn default() -> Chunking {
        Chunking { seconds: 20.0, context: 5.0, level: None }
    }
}

/// Takes audio as it comes and gives tokens as they are certain. At most `seconds + 2 · context` seconds of audio and
/// a block are held at a time.
pub struct Stream {
    recogniser: Recogniser,
    resampler: Resampler,
    decoder: Decoder,
    /// Mean and variance of the first `metered` samples.
    meter: LevelMeter,
    metered: usize,
    level: Option<Level>,
    /// Samples of a chunk and of its context, both whole frames.
    chunk: usize,
    context: usize,
    /// Samples from `first` on.
    samples: Vec<f32>,
    first: usize,
    /// Where the next chunk begins.
    next: usize,
    taken: u64,
}

impl Stream {
    pub(crate) fn new(
        recogniser: Recogniser,
        rate: u32,
        chunking: &Chunking,
        decoder: Decoder,
    ) -> Result<Stream> {
        let per_frame = recogniser.config().samples_per_frame();
        let longest = recogniser.options().limits.max_seconds as f64;
        let whole = |field: &'static str, seconds: f64, least: usize| {
            let samples = (seconds * f64::from(SAMPLE_RATE) / per_frame as f64).round();
            if !seconds.is_finite() || seconds < 0.0 || seconds > longest || samples < least as f64 {
                let wanted = format!("at least {least} frames and at most {longest} seconds");
                return Err(Error::Setting { field, wanted, found: seconds.to_string() });
            }
            Ok(samples as usize * per_frame)
        };
        Ok(Stream {
            chunk: whole("seconds of a chunk", chunking.seconds, 1)?,
            context: whole("seconds of context", chunking.context, 0)?,
            level: chunking.level,
            resampler: Resampler::new(rate)?,
            meter: LevelMeter::default(),
            metered: 0,
            samples: Vec::new(),
            first: 0,
            next: 0,
            taken: 0,
            recogniser,
            decoder,
        })
    }

    /// The model.
    pub fn recogniser(&self) -> &Recogniser {
        &self.recogniser
    }

    /// Seconds of audio taken so far.
    pub fn seconds(&self) -> f64 {
        (self.first + self.samples.len()) as f64 / f64::from(SAMPLE_RATE)
    }

    /// Takes mono frames of the stream's rate and gives the tokens that are certain now.
    ///
    /// # Errors
    /// [`Error::NotFinite`], and those of [`Recogniser::logits`].
    pub fn push(&mut self, frames: &[f32]) -> Result<Vec<Emission>> {
        let mut tokens = Vec::new();
        let mut mono = Vec::new();
        // In parts, so that a long block is not held twice.
        for part in frames.chunks(1 << 16) {
            mono.clear();
            mix(part, 1, self.taken, &mut mono)?;
            self.taken += part.len() as u64;
            self.resampler.push(&mono, &mut self.samples)?;
            self.run(false, &mut tokens)?;
        }
        Ok(tokens)
    }

    /// Encodes what is left and gives the last tokens.
    ///
    /// # Errors
    /// As [`Stream::push`], and [`Error::TooShort`] where all audio was shorter than one frame.
    pub fn finish(mut self) -> Result<Vec<Emission>> {
        let mut tokens = Vec::new();
        self.resampler.finish(&mut self.samples)?;
        self.run(true, &mut tokens)?;
        self.decoder.finish(&mut tokens);
        Ok(tokens)
    }

    /// Encodes every chunk whose context is there; where the audio has `ended`, whatever is left.
    fn run(&mut self, ended: bool, tokens: &mut Vec<Emission>) -> Result<()> {
        let config = self.recogniser.config();
        let (per_frame, field) = (config.samples_per_frame(), config.receptive_field());
        loop {
            let total = self.first + self.samples.len();
            // The last frame of the context sees some samples more.
            let stop = self.next + self.chunk + self.context + field.saturating_sub(per_frame);
            if total < stop && !ended {
                return Ok(());
            }
            let frames = config.frames(total);
            let last = total < stop;
            if last && frames <= self.next / per_frame && self.next > 0 {
                return Ok(());
            }
            let from = self.next.saturating_sub(self.context);
            let end = total.min(stop);
            // Up to here and no further, so that the result does not depend on how the audio came.
            let fresh = self.metered.max(self.first).min(end);
            self.meter.push(&self.samples[fresh - self.first..end - self.first]);
            self.metered = self.metered.max(end);
            let window = &self.samples[from - self.first..end - self.first];
            let values = match self.recogniser.normalises() {
                true => self.level.unwrap_or_else(|| self.meter.level()).normalise(window),
                false => window.to_vec(),
            };
            let logits = self.recogniser.logits(&values)?;
            let width = logits.shape.last().copied().unwrap_or(1);
            let rows = logits.values.len() / width.max(1);
            let skip = ((self.next - from) / per_frame).min(rows);
            let keep = if last { rows } else { (skip + self.chunk / per_frame).min(rows) };
            self.decoder.push(&logits.values[skip * width..keep * width], tokens);
            self.next += self.chunk;
            let unused = self.next.saturating_sub(self.context).min(total);
            self.samples.drain(..unused - self.first);
            self.first = unused;
            if last {
                return Ok(());
            }
        }
    }
}
