//! WAV files that nobody vouches for: the header is held against the file's length before the decoder sees it.

use std::io::{BufReader, Chain, Cursor, Read, Seek, SeekFrom, Take};
use std::panic::{AssertUnwindSafe, catch_unwind};

use hound::{SampleFormat, WavReader};

use super::resample::RATES;
use super::{AudioLimits, Resampler, mix};
use crate::{Error, Result};

/// Most channels of a frame.
const MAX_CHANNELS: u16 = 64;
/// Most chunks before the samples.
const MAX_CHUNKS: usize = 1000;
/// Largest `fmt ` chunk: the extensible form has 40 bytes.
const MAX_FORMAT_BYTES: u32 = 1024;
/// Frames that are decoded at a time.
const BLOCK_FRAMES: usize = 4096;

/// What the header of a WAV file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WavInfo {
    /// Samples of a frame.
    pub channels: u16,
    /// Frames a second.
    pub sample_rate: u32,
    /// Bits of a sample.
    pub bits: u16,
    /// Whether samples are floating-point numbers.
    pub float: bool,
    /// Frames of the file.
    pub frames: u64,
}

/// A WAV file as blocks of mono samples at 16 kHz.
pub struct WavBlocks<R: Read + Seek> {
    info: WavInfo,
    samples: Samples<R>,
    resampler: Resampler,
    read: u64,
    done: bool,
}

/// A header of the chunks that count, and the samples behind it: all that the decoder sees.
type Checked<R> = Chain<Cursor<Vec<u8>>, Take<BufReader<R>>>;

enum Samples<R> {
    Float(hound::WavIntoSamples<Checked<R>, f32>),
    Integer(hound::WavIntoSamples<Checked<R>, i32>, f32),
}

impl<R: Read + Seek> WavBlocks<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::Wav`], [`Error::Limit`], [`Error::Io`].
    pub fn new(reader: R, limits: &AudioLimits) -> Result<WavBlocks<R>> {
        let mut reader = BufReader::new(reader);
        let header = header(&mut reader)?;
        let checked = Cursor::new(header.preamble()).chain(reader.take(header.bytes));
        let wav = guarded(|| WavReader::new(checked))?;
        let spec = wav.spec();
        let info = WavInfo {
            channels: spec.channels,
            sample_rate: spec.sample_rate,
            bits: spec.bits_per_sample,
            float: spec.sample_format == SampleFormat::Float,
            frames: header.bytes / u64::from(header.format.block.max(1)),
        };
        // The decoder must have understood what we checked.
        if (info.channels, info.sample_rate) != (header.format.channels, header.format.rate)
            || u64::from(wav.len()) != info.frames.saturating_mul(u64::from(info.channels))
        {
            let found = format!("{} channels, {} Hz, {} samples", info.channels, info.sample_rate, wav.len());
            return Err(Error::wav("header", "one that can be read in one way only", found));
        }
        limits.check_frames(info.frames, info.sample_rate)?;
        let samples = match (info.float, info.bits) {
            (true, 32) => Samples::Float(wav.into_samples()),
            (false, bits @ 1..=32) => Samples::Integer(wav.into_samples(), 1.0 / (1u64 << (bits - 1)) as f32),
            (float, bits) => {
                let kind = if float { "floating-point" } else { "integer" };
                let found = format!("{bits}-bit {kind} ones");
                return Err(Error::wav("samples", "integers of 8 to 32 bits or 32-bit floats", found));
            }
        };
        let resampler = Resampler::new(info.sample_rate)?;
        Ok(WavBlocks { info, samples, resampler, read: 0, done: false })
    }

    /// What the header says.
    pub fn info(&self) -> &WavInfo {
        &self.info
    }

    /// Frames read so far, of [`WavInfo::frames`].
    pub fn frames_read(&self) -> u64 {
        self.read
    }

    /// Appends the samples of the next block; false once there are none.
    ///
    /// # Errors
    /// [`Error::Wav`] where the file ends early or a sample does not fit, [`Error::NotFinite`].
    pub fn read(&mut self, out: &mut Vec<f32>) -> Result<bool> {
        if self.done {
            return Ok(false);
        }
        let channels = usize::from(self.info.channels);
        let left = self.info.frames - self.read;
        let frames = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK_FRAMES);
        if frames == 0 {
            self.done = true;
            self.resampler.finish(out)?;
            return Ok(true);
        }
        let count = frames * channels;
        let block: Vec<f32> = guarded(|| match &mut self.samples {
            Samples::Float(samples) => samples.by_ref().take(count).collect(),
            Samples::Integer(samples, scale) => {
                let scale = *scale;
                samples.by_ref().take(count).map(|s| s.map(|v| v as f32 * scale)).collect()
            }
        })?;
        if block.len() != count {
            return Err(Error::wav("samples", format!("{count} more"), block.len()));
        }
        let mut mono = Vec::with_capacity(frames);
        mix(&block, channels, self.read * channels as u64, &mut mono)?;
        self.read += frames as u64;
        self.resampler.push(&mono, out)?;
        Ok(true)
    }
}

/// Runs the decoder, which is other people's code and meets hostile files here. It should not panic; if it does, it
/// costs this file and nothing else.
fn guarded<T>(decode: impl FnOnce() -> hound::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(hound::Error::IoError(e))) if e.kind() != std::io::ErrorKind::Other => Err(Error::Io(e)),
        Ok(Err(e)) => Err(Error::wav("content", "a WAV file", e)),
        Err(_) => Err(Error::wav("content", "a WAV file", "one on which the decoder panicked")),
    }
}

/// What a header says, checked.
struct Header {
    format: Format,
    /// Bytes of all samples.
    bytes: u64,
}

/// The `fmt ` chunk.
struct Format {
    channels: u16,
    rate: u32,
    /// Bytes of a frame.
    block: u16,
    /// The chunk as it is.
    chunk: Vec<u8>,
}

impl Header {
    /// A WAV header of this format chunk and these samples.
    fn preamble(&self) -> Vec<u8> {
        let size = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let chunk = &self.format.chunk;
        let whole = 4 + 8 + chunk.len() as u64 + 8 + self.bytes;
        [
            b"RIFF".as_slice(),
            &size(whole),
            b"WAVEfmt ",
            &size(chunk.len() as u64),
            chunk,
            b"data",
            &size(self.bytes),
        ]
        .concat()
    }
}

/// Walks the chunks up to the samples, and checks every number that the decoder will divide or allocate by.
fn header<R: Read + Seek>(reader: &mut BufReader<R>) -> Result<Header> {
    let length = reader.seek(SeekFrom::End(0))?;
    reader.seek(SeekFrom::Start(0))?;
    let mut magic = [0u8; 12];
    take(reader, &mut magic, "header", length)?;
    if &magic[..4] != b"RIFF" || &magic[8..] != b"WAVE" {
        let hex: Vec<String> = magic.iter().map(|b| format!("{b:02x}")).collect();
        return Err(Error::wav("header", "RIFF .. WAVE", hex.join(" ")));
    }
    let mut format = None;
    for _ in 0..MAX_CHUNKS {
        let mut head = [0u8; 8];
        take(reader, &mut head, "chunk", length)?;
        let at = reader.stream_position()?;
        let size = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let left = length.saturating_sub(at);
        if u64::from(size) > left {
            let name = if &head[..4] == b"data" { "size of the data chunk" } else { "size of a chunk" };
            let wanted = format!("at most the {left} bytes that the file has left");
            return Err(Error::wav(name, wanted, size));
        }
        match &head[..4] {
            b"fmt " => format = Some(format_chunk(reader, size, length)?),
            b"data" => {
                let Some(format) = format else {
                    return Err(Error::wav("first chunk", "`fmt `", "`data`"));
                };
                let Format { block, .. } = format;
                if !size.is_multiple_of(u32::from(block)) {
                    let wanted = format!("a multiple of {block} bytes, one frame");
                    return Err(Error::wav("size of the data chunk", wanted, size));
                }
                return Ok(Header { format, bytes: u64::from(size) });
            }
            _ => {}
        }
        // Chunks begin at even places.
        reader.seek(SeekFrom::Start(at + u64::from(size) + u64::from(size % 2)))?;
    }
    Err(Error::wav("chunks", format!("at most {MAX_CHUNKS} before the samples"), "more"))
}

/// Reads and checks a `fmt ` chunk.
fn format_chunk<R: Read + Seek>(reader: &mut BufReader<R>, size: u32, length: u64) -> Result<Format> {
    if !(16..=MAX_FORMAT_BYTES).contains(&size) {
        return Err(Error::wav("size of the fmt chunk", "16 to 1024 bytes", size));
    }
    let mut chunk = vec![0u8; size as usize];
    take(reader, &mut chunk, "fmt chunk", length)?;
    let &[_, _, c0, c1, r0, r1, r2, r3, _, _, _, _, a0, a1, b0, b1, ..] = chunk.as_slice() else {
        return Err(Error::wav("size of the fmt chunk", "16 bytes or more", size));
    };
    let (channels, rate) = (u16::from_le_bytes([c0, c1]), u32::from_le_bytes([r0, r1, r2, r3]));
    let (block, bits) = (u16::from_le_bytes([a0, a1]), u16::from_le_bytes([b0, b1]));
    if !(1..=MAX_CHANNELS).contains(&channels) {
        return Err(Error::wav("number of channels", format!("1 to {MAX_CHANNELS}"), channels));
    }
    if !RATES.contains(&rate) {
        return Err(Error::wav("sampling rate", format!("{} to {} Hz", RATES.start(), RATES.end()), rate));
    }
    if !(1..=64).contains(&bits) {
        return Err(Error::wav("bits of a sample", "1 to 64", bits));
    }
    let least = u32::from(channels) * u32::from(bits.div_ceil(8));
    let most = u32::from(channels) * 8;
    if u32::from(block) < least || u32::from(block) > most || !block.is_multiple_of(channels) {
        let wanted = format!("{least} to {most} for {channels} channels of {bits} bits");
        return Err(Error::wav("bytes of a frame", wanted, block));
    }
    Ok(Format { channels, rate, block, chunk })
}

/// Reads exactly as many bytes.
fn take<R: Read + Seek>(
    reader: &mut BufReader<R>,
    bytes: &mut [u8],
    what: &'static str,
    length: u64,
) -> Result<()> {
    reader.read_exact(bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Error::wav(what, "whole", format!("the end of the file after {length} bytes"))
        }
        _ => Error::Io(e),
    })
}
