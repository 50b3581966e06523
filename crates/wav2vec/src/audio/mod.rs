//! Audio in: WAV files, frames of any rate and any number of channels, and what the encoder reads.
//!
//! The order of steps: [`Clip::decode_wav`] or [`Clip::from_frames`] mix the channels to one and resample to 16 kHz;
//! [`Clip::input_values`] normalises. Long files go through [`WavBlocks`], a block at a time.
//!
//! Integer samples are divided by `2^(bits - 1)`; normalisation makes any other factor the same.

mod resample;
mod wav;

use std::io::Cursor;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use crate::{Error, Result, SAMPLE_RATE};

pub use resample::Resampler;
pub use wav::{WavBlocks, WavInfo};

/// Added to the variance before it divides, as the reference does.
const EPS: f64 = 1e-7;

/// How much audio is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AudioLimits {
    /// Longest clip in seconds.
    pub max_seconds: u64,
    /// Largest file that is read into memory, after base64.
    pub max_file_bytes: u64,
}

impl Default for AudioLimits {
    /// One hour, 512 MiB.
    fn default() -> Self {
        Self { max_seconds: 3600, max_file_bytes: 512 << 20 }
    }
}

impl AudioLimits {
    /// The cap on the memory that a clip takes beyond its file: its samples at 16 kHz, twice while they grow, and the
    /// resampler's tables.
    pub fn max_memory(&self) -> u64 {
        self.max_seconds.saturating_mul(u64::from(SAMPLE_RATE) * 8).saturating_add(16 << 20)
    }

    /// Refuses more than `max_seconds` of `rate` frames a second.
    fn check_frames(&self, frames: u64, rate: u32) -> Result<()> {
        let found = frames.div_ceil(u64::from(rate.max(1)));
        match found > self.max_seconds {
            true => Err(Error::Limit { what: "length in seconds", limit: self.max_seconds, found }),
            false => Ok(()),
        }
    }

    fn check_bytes(&self, found: u64) -> Result<()> {
        match found > self.max_file_bytes {
            true => Err(Error::Limit { what: "file size in bytes", limit: self.max_file_bytes, found }),
            false => Ok(()),
        }
    }
}

/// Mono audio of 16,000 samples a second; every sample is a finite number.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    samples: Vec<f32>,
}

/// Mean and variance of audio, by which it is normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Mean of all samples.
    pub mean: f64,
    /// Their population variance.
    pub variance: f64,
}

/// Sums that a [`Level`] is made of, sample by sample (Welford 1962).
#[derive(Debug, Clone, Copy, Default)]
pub struct LevelMeter {
    count: f64,
    mean: f64,
    squares: f64,
}

impl LevelMeter {
    /// Counts these samples as well.
    pub fn push(&mut self, samples: &[f32]) {
        for &v in samples {
            let v = f64::from(v);
            self.count += 1.0;
            let before = v - self.mean;
            self.mean += before / self.count;
            self.squares += before * (v - self.mean);
        }
    }

    /// Mean and variance so far.
    pub fn level(&self) -> Level {
        Level { mean: self.mean, variance: if self.count > 0.0 { self.squares / self.count } else { 0.0 } }
    }
}

impl Level {
    /// `(x - mean) / sqrt(variance + 1e-7)`.
    pub fn normalise(&self, samples: &[f32]) -> Vec<f32> {
        let scale = 1.0 / (self.variance + EPS).sqrt();
        samples.iter().map(|&v| ((f64::from(v) - self.mean) * scale) as f32).collect()
    }
}

impl Clip {
    /// A clip from interleaved frames of `channels` samples each, `rate` frames a second: channels are averaged and
    /// resampled.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::NotFinite`] or [`Error::Limit`].
    pub fn from_frames(samples: &[f32], channels: u16, rate: u32, limits: &AudioLimits) -> Result<Clip> {
        let width = usize::from(channels);
        if width == 0 || !samples.len().is_multiple_of(width) {
            let found = format!("{} samples in {channels} channels", samples.len());
            return Err(Error::Format {
                what: "frames",
                wanted: "whole frames of 1 or more channels".into(),
                found,
            });
        }
        limits.check_frames((samples.len() / width) as u64, rate)?;
        let mut resampler = Resampler::new(rate)?;
        let mut out = Vec::new();
        let mut mono = Vec::new();
        for (block, part) in samples.chunks(width * 4096).enumerate() {
            mono.clear();
            mix(part, width, (block * width * 4096) as u64, &mut mono)?;
            resampler.push(&mono, &mut out)?;
        }
        resampler.finish(&mut out)?;
        Ok(Clip { samples: out })
    }

    /// Decodes a WAV file: 8, 16, 24 or 32-bit integers or 32-bit floats, any number of channels, any rate.
    ///
    /// # Errors
    /// [`Error::Wav`] for what the file gets wrong, [`Error::NotFinite`], [`Error::Limit`].
    pub fn decode_wav(bytes: &[u8], limits: &AudioLimits) -> Result<Clip> {
        limits.check_bytes(bytes.len() as u64)?;
        Clip::read_wav(Cursor::new(bytes), limits)
    }

    /// The same from a file that is read as it goes.
    ///
    /// # Errors
    /// As [`Clip::decode_wav`], and [`Error::Io`].
    pub fn read_wav(reader: impl std::io::Read + std::io::Seek, limits: &AudioLimits) -> Result<Clip> {
        let mut blocks = WavBlocks::new(reader, limits)?;
        let mut samples = Vec::new();
        while blocks.read(&mut samples)? {}
        Ok(Clip { samples })
    }

    /// Decodes the WAV file in base64, bare or as `data:audio/...;base64,...`; white space is skipped.
    ///
    /// # Errors
    /// [`Error::DataUrl`], and those of [`Clip::decode_wav`].
    pub fn decode_base64(text: &str, limits: &AudioLimits) -> Result<Clip> {
        let refuse = |reason: &str| Error::DataUrl { reason: reason.to_owned() };
        let payload = match text.strip_prefix("data:") {
            None => text,
            Some(rest) => {
                let (kind, payload) =
                    rest.split_once(',').ok_or_else(|| refuse("has no comma before the data"))?;
                if !kind.starts_with("audio/") || !kind.ends_with(";base64") {
                    return Err(refuse("must start with `data:audio/` and be marked `;base64`"));
                }
                payload
            }
        };
        let symbols = payload.bytes().filter(|b| !b.is_ascii_whitespace());
        limits.check_bytes(symbols.clone().count() as u64 / 4 * 3)?;
        let symbols: Vec<u8> = symbols.collect();
        let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let bytes = GeneralPurpose::new(&base64::alphabet::STANDARD, padding)
            .decode(&symbols)
            .map_err(|e| Error::DataUrl { reason: format!("is not base64: {e}").to_lowercase() })?;
        Clip::decode_wav(&bytes, limits)
    }

    /// The samples.
    pub fn samples(&self) -> &[f32] {
        &self.samples
    }

    /// Length in seconds.
    pub fn seconds(&self) -> f64 {
        self.samples.len() as f64 / f64::from(SAMPLE_RATE)
    }

    /// Mean and variance, of which the variance is summed from differences to the mean.
    pub fn level(&self) -> Level {
        let n = self.samples.len().max(1) as f64;
        let mean = self.samples.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = self.samples.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        Level { mean, variance }
    }

    /// What the encoder reads: zero mean and unit variance over the clip where `normalise` is set.
    pub fn input_values(&self, normalise: bool) -> Vec<f32> {
        if normalise { self.level().normalise(&self.samples) } else { self.samples.clone() }
    }
}

/// Appends the mean of each frame's channels; `from` is the number of the first sample, for the error.
pub(crate) fn mix(samples: &[f32], channels: usize, from: u64, out: &mut Vec<f32>) -> Result<()> {
    if let Some(at) = samples.iter().position(|v| !v.is_finite()) {
        return Err(Error::NotFinite { index: from + at as u64, value: samples[at] });
    }
    let scale = 1.0 / channels.max(1) as f64;
    out.extend(
        samples
            .chunks_exact(channels.max(1))
            .map(|frame| (frame.iter().map(|&v| f64::from(v)).sum::<f64>() * scale) as f32),
    );
    Ok(())
}

#[cfg(test)]
mod tests;
