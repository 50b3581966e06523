//! Resampling to 16 kHz with a windowed sinc, in blocks.

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{
    Async, FixedAsync, Indexing, Resampler as _, SincInterpolationParameters, SincInterpolationType,
    WindowFunction,
};

use crate::{Error, Result, SAMPLE_RATE};

/// Rates that are taken, in frames a second.
pub(super) const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;
/// Input frames of one step.
const BLOCK: usize = 1024;
/// Length of the filter, in samples of the lower rate.
const SINC: usize = 128;

/// Takes mono audio of one rate, block by block, and gives it at 16 kHz. `n` frames in all become
/// `ceil(n · 16000 / rate)` samples.
pub struct Resampler {
    rate: u32,
    /// `None` where the audio has the right rate already.
    inner: Option<Box<Async<f32>>>,
    pending: Vec<f32>,
    output: Vec<f32>,
    taken: u64,
    given: u64,
    /// Samples to drop: the filter's delay.
    skip: usize,
}

impl Resampler {
    /// # Errors
    /// [`Error::Format`] for a rate outside 1,000 to 768,000.
    pub fn new(rate: u32) -> Result<Resampler> {
        if !RATES.contains(&rate) {
            let wanted = format!("{} to {} Hz", RATES.start(), RATES.end());
            return Err(Error::Format { what: "sampling rate", wanted, found: format!("{rate} Hz") });
        }
        let mut resampler = Resampler {
            rate,
            inner: None,
            pending: Vec::new(),
            output: Vec::new(),
            taken: 0,
            given: 0,
            skip: 0,
        };
        if rate != SAMPLE_RATE {
            // Filters of a higher rate span as much time, so they have more taps.
            let length = SINC * (rate.div_ceil(SAMPLE_RATE) as usize);
            let parameters = SincInterpolationParameters::new(length, WindowFunction::BlackmanHarris2)
                .oversampling_factor(128)
                .interpolation(SincInterpolationType::Cubic);
            let ratio = f64::from(SAMPLE_RATE) / f64::from(rate);
            let inner = Async::new_sinc(ratio, 1.0, &parameters, BLOCK, 1, FixedAsync::Input)
                .map_err(|e| Error::Resample { rate, reason: e.to_string() })?;
            // The filter's middle; what is left of the delay is less than half a sample.
            resampler.skip = (length as f64 * ratio / 2.0 - 1.0).round().max(0.0) as usize;
            resampler.output = vec![0.0; inner.output_frames_max()];
            resampler.inner = Some(Box::new(inner));
        }
        Ok(resampler)
    }

    /// Takes frames and appends the samples that are ready.
    ///
    /// # Errors
    /// [`Error::Resample`] where the library refuses.
    pub fn push(&mut self, frames: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.taken += frames.len() as u64;
        if self.inner.is_none() {
            self.given += frames.len() as u64;
            out.extend_from_slice(frames);
            return Ok(());
        }
        self.pending.extend_from_slice(frames);
        let mut at = 0;
        while self.pending.len() - at >= BLOCK {
            self.step(at, BLOCK, u64::MAX, out)?;
            at += BLOCK;
        }
        self.pending.drain(..at);
        Ok(())
    }

    /// Appends what is left once all frames were given.
    ///
    /// # Errors
    /// As [`Resampler::push`].
    pub fn finish(&mut self, out: &mut Vec<f32>) -> Result<()> {
        if self.inner.is_none() {
            return Ok(());
        }
        let wanted = (self.taken * u64::from(SAMPLE_RATE)).div_ceil(u64::from(self.rate));
        while self.given < wanted {
            let frames = self.pending.len().min(BLOCK);
            self.step(0, frames, wanted, out)?;
            self.pending.drain(..frames);
        }
        Ok(())
    }

    /// Runs `frames` pending frames from `at`, and silence after them, and appends up to `most` samples in all.
    fn step(&mut self, at: usize, frames: usize, most: u64, out: &mut Vec<f32>) -> Result<()> {
        let rate = self.rate;
        let refused = |reason: String| Error::Resample { rate, reason };
        let Some(inner) = &mut self.inner else { return Ok(()) };
        // What lies behind the last frame counts as silence.
        let mut block = [0f32; BLOCK];
        block[..frames].copy_from_slice(&self.pending[at..at + frames]);
        let input = InterleavedSlice::new(&block[..], 1, BLOCK).map_err(|e| refused(e.to_string()))?;
        let room = self.output.len();
        let mut output =
            InterleavedSlice::new_mut(&mut self.output[..], 1, room).map_err(|e| refused(e.to_string()))?;
        let (_, made) = inner
            .process_into_buffer(&input, &mut output, Some(&Indexing::new()))
            .map_err(|e| refused(e.to_string()))?;
        let skipped = made.min(self.skip);
        self.skip -= skipped;
        let fresh = &self.output[skipped..made];
        let count = usize::try_from(most.saturating_sub(self.given)).unwrap_or(usize::MAX).min(fresh.len());
        out.extend_from_slice(&fresh[..count]);
        self.given += count as u64;
        Ok(())
    }
}
