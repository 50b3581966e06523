//! A first look at a picture file, before a decoder sees it: the format, and the sizes that the headers claim.
//!
//! The decoders allocate by what some headers say (an embedded frame, the length of a metadata chunk) before they
//! compare it with the rest of the file. Here every such number is held against the limits and the file's length.

use image::ImageFormat;

use super::decode::{DecodeLimits, name};
use crate::{Error, Result};

/// A progressive JPEG costs one pass over its pixels per scan; real ones have about ten.
const MAX_JPEG_SCANS_TIMES_PIXELS: u64 = 1 << 30;

/// The format by its signature, after its sizes were found within the limits.
pub(super) fn check(bytes: &[u8], limits: &DecodeLimits) -> Result<ImageFormat> {
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        png(bytes, limits)?;
        Ok(ImageFormat::Png)
    } else if bytes.starts_with(b"\xff\xd8\xff") {
        jpeg(bytes, limits)?;
        Ok(ImageFormat::Jpeg)
    } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        webp(bytes, limits)?;
        Ok(ImageFormat::WebP)
    } else {
        let hex: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
        let found = if hex.is_empty() { "no bytes".to_owned() } else { hex.join(" ") };
        Err(Error::UnknownFormat { found })
    }
}

fn broken(format: ImageFormat, reason: impl Into<String>) -> Error {
    Error::Decode { format: name(format), reason: reason.into() }
}

fn png(bytes: &[u8], limits: &DecodeLimits) -> Result<()> {
    let missing = || broken(ImageFormat::Png, "the header chunk is missing");
    if bytes.get(12..16) != Some(b"IHDR") {
        return Err(missing());
    }
    let be32 = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map(|b| u32::from_be_bytes(*b));
    let (Some(width), Some(height)) = (be32(16), be32(20)) else { return Err(missing()) };
    limits.check_size(u64::from(width), u64::from(height))
}

fn jpeg(bytes: &[u8], limits: &DecodeLimits) -> Result<()> {
    let truncated = || broken(ImageFormat::Jpeg, "the file ends early");
    let be16 = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map(|b| u16::from_be_bytes(*b));
    let mut at = 2;
    let mut pixels = None;
    loop {
        // Like libjpeg, skip what stands between two segments.
        at += bytes.get(at..).and_then(|b| b.iter().position(|&v| v == 0xff)).ok_or_else(truncated)?;
        at += bytes[at..].iter().position(|&v| v != 0xff).ok_or_else(truncated)?;
        let marker = bytes[at];
        at += 1;
        match marker {
            0x00 | 0x01 | 0xd0..=0xd8 => continue,
            0xd9 => return Err(truncated()),
            0xda => break,
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                let (Some(height), Some(width)) = (be16(at + 3), be16(at + 5)) else {
                    return Err(truncated());
                };
                limits.check_size(u64::from(width), u64::from(height))?;
                pixels = Some(u64::from(width) * u64::from(height));
            }
            _ => {}
        }
        at += usize::from(be16(at).ok_or_else(truncated)?).max(2);
    }
    let pixels = pixels.ok_or_else(|| broken(ImageFormat::Jpeg, "the frame header is missing"))?;
    // Compressed data never holds ff followed by one of these, so both can be searched for.
    let (mut scans, mut ended) = (1u64, false);
    for pair in bytes[at..].array_windows() {
        match pair {
            [0xff, 0xda] => scans += 1,
            [0xff, 0xd9] => {
                ended = true;
                break;
            }
            _ => {}
        }
    }
    // The decoder fills what is missing with grey; Pillow refuses, and so do we.
    if !ended {
        return Err(truncated());
    }
    limits.check("jpeg scans times pixels", MAX_JPEG_SCANS_TIMES_PIXELS, scans.saturating_mul(pixels))
}

fn webp(bytes: &[u8], limits: &DecodeLimits) -> Result<()> {
    let mut sizes = 0;
    webp_chunks(bytes.get(12..).unwrap_or_default(), limits, true, &mut sizes)?;
    if sizes == 0 { Err(broken(ImageFormat::WebP, "no chunk has a picture")) } else { Ok(()) }
}

/// Checks the sizes in a list of chunks and that each chunk lies within the file. `sizes` counts the sizes seen.
fn webp_chunks(mut rest: &[u8], limits: &DecodeLimits, outer: bool, sizes: &mut usize) -> Result<()> {
    let truncated = || broken(ImageFormat::WebP, "a chunk reaches past the end of the file");
    while !rest.is_empty() {
        // The container's padding byte may be missing at the very end, and junk after the last chunk is common.
        let Some((head, body)) = rest.split_first_chunk::<8>() else { return Ok(()) };
        let [a, b, c, d, l0, l1, l2, l3] = *head;
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).map_err(|_| truncated())?;
        let chunk = body.get(..len).ok_or_else(truncated)?;
        let le24 = |at: usize| {
            chunk.get(at..at + 3).map(|b| u64::from(b[0]) | u64::from(b[1]) << 8 | u64::from(b[2]) << 16)
        };
        let size = match &[a, b, c, d] {
            b"VP8X" => Some(le24(4).zip(le24(7)).map(|(w, h)| (w + 1, h + 1))),
            b"ANMF" => Some(le24(6).zip(le24(9)).map(|(w, h)| (w + 1, h + 1))),
            b"VP8 " => Some(le24(6).zip(le24(7)).map(|(w, h)| (w & 0x3fff, h >> 8 & 0x3fff))),
            b"VP8L" => Some(
                le24(1)
                    .zip(chunk.get(4))
                    .map(|(low, &top)| (low & 0x3fff, (low >> 14 | u64::from(top) << 10) & 0x3fff))
                    .map(|(w, h)| (w + 1, h + 1)),
            ),
            _ => None,
        };
        if let Some(size) = size {
            let (width, height) = size.ok_or_else(truncated)?;
            limits.check_size(width, height)?;
            *sizes += 1;
        }
        if outer && &[a, b, c, d] == b"ANMF" {
            webp_chunks(chunk.get(16..).unwrap_or_default(), limits, false, sizes)?;
        }
        rest = body.get(len + (len & 1)..).unwrap_or_default();
    }
    Ok(())
}
