//! Pictures in memory, and decoding them from PNG, JPEG and WebP files that nobody vouches for.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::header;
use crate::error::reserve;
use crate::{Error, Result};

/// A picture of 8-bit RGB pixels; the only kind that the rest of this crate handles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// What the PNG decoder may keep besides the picture: colour profile, text, EXIF, two rows.
const PNG_METADATA_BYTES: u64 = 8 << 20;

/// How large a picture may be. The header is checked against these before anything is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Largest width and largest height in pixels.
    pub max_side: u64,
    /// Largest width x height.
    pub max_pixels: u64,
    /// Largest file, after base64.
    pub max_file_bytes: u64,
}

impl Default for DecodeLimits {
    /// 16384 pixels a side, 50 million pixels, 64 MiB.
    fn default() -> Self {
        Self { max_side: 16_384, max_pixels: 50_000_000, max_file_bytes: 64 << 20 }
    }
}

impl DecodeLimits {
    /// The cap on the memory that decoding takes beyond the file itself, the picture included: 16 bytes per pixel
    /// (16-bit RGBA plus the result, or the coefficients of a progressive JPEG plus the result), two copies of
    /// the file, and 16 MiB of tables and metadata.
    pub fn max_memory(&self) -> u64 {
        let pixels = self.max_pixels.saturating_mul(16);
        pixels.saturating_add(self.max_file_bytes.saturating_mul(2)).saturating_add(16 << 20)
    }

    pub(super) fn check(&self, what: &'static str, limit: u64, found: u64) -> Result<()> {
        if found > limit { Err(Error::Limit { what, limit, found }) } else { Ok(()) }
    }

    pub(super) fn check_size(&self, width: u64, height: u64) -> Result<()> {
        if width == 0 || height == 0 {
            return Err(Error::size("picture", "at least 1x1 pixels", format!("{width}x{height}")));
        }
        self.check("width", self.max_side, width)?;
        self.check("height", self.max_side, height)?;
        self.check("number of pixels", self.max_pixels, width.saturating_mul(height))
    }
}

impl Image {
    /// A picture from its bytes: rows from the top, pixels from the left, red, green, blue.
    pub fn from_rgb8(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        let len = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if width == 0 || height == 0 || len != Some(rgb.len()) {
            let found = format!("{} bytes for {width}x{height} pixels", rgb.len());
            return Err(Error::size("rgb picture", "3 bytes for each of at least 1x1 pixels", found));
        }
        Ok(Self { width, height, rgb })
    }

    /// Decodes a PNG, JPEG or WebP file; the first bytes decide which. Of an animation, the first frame.
    ///
    /// As transformers' `load_image` does with Pillow: EXIF orientation is applied, then everything becomes 8-bit
    /// RGB; alpha is dropped, not blended. Equal to Pillow 11.3.0 for PNG and lossless WebP, with these differences:
    ///
    /// * 16-bit grey keeps the high byte, as 16-bit colour does in both; Pillow clips grey at 255, nearly white.
    /// * JPEG and lossy WebP decoders round differently; by at most 4 of 255 in the JPEG files that we compare.
    /// * An orientation that stands only in XMP, or in a text chunk of a PNG, is not seen.
    pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Self> {
        limits.check("file size in bytes", limits.max_file_bytes, bytes.len() as u64)?;
        let format = header::check(bytes, limits)?;
        // The decoders are other people's code and meet hostile files here. They should not panic; if one does, it
        // costs this picture and nothing else.
        catch_unwind(AssertUnwindSafe(|| decode_checked(bytes, format, limits))).unwrap_or_else(|_| {
            Err(Error::Decode { format: name(format), reason: "the decoder panicked".to_owned() })
        })
    }

    /// Decodes the picture in `data:image/...;base64,...`; white space in the base64 part is skipped.
    pub fn decode_data_url(url: &str, limits: &DecodeLimits) -> Result<Self> {
        let refuse = |reason: &str| Error::DataUrl { reason: reason.to_owned() };
        let rest = url.strip_prefix("data:image/").ok_or_else(|| refuse("must start with `data:image/`"))?;
        let (kind, payload) = rest.split_once(',').ok_or_else(|| refuse("has no comma before the data"))?;
        if !kind.ends_with(";base64") {
            return Err(refuse("must be marked `;base64` before the comma"));
        }
        let symbols = payload.bytes().filter(|b| !b.is_ascii_whitespace());
        limits.check("file size in bytes", limits.max_file_bytes, symbols.clone().count() as u64 / 4 * 3)?;
        let symbols: Vec<u8> = symbols.collect();
        let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let bytes = GeneralPurpose::new(&base64::alphabet::STANDARD, padding)
            .decode(&symbols)
            .map_err(|e| Error::DataUrl { reason: format!("is not base64: {e}").to_lowercase() })?;
        Self::decode(&bytes, limits)
    }

    /// Width in pixels, at least 1.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels, at least 1.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]` bytes.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Gives the bytes back.
    pub fn into_rgb(self) -> Vec<u8> {
        self.rgb
    }
}

pub(super) fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "png",
        ImageFormat::Jpeg => "jpeg",
        _ => "webp",
    }
}

fn decode_checked(bytes: &[u8], format: ImageFormat, limits: &DecodeLimits) -> Result<Image> {
    let broken = |e: image::ImageError| Error::Decode { format: name(format), reason: e.to_string() };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut bounds = image::Limits::default();
    let side = u32::try_from(limits.max_side).unwrap_or(u32::MAX);
    (bounds.max_image_width, bounds.max_image_height) = (Some(side), Some(side));
    bounds.max_alloc = Some(PNG_METADATA_BYTES);
    reader.limits(bounds);
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    limits.check_size(u64::from(width), u64::from(height))?;
    let orientation = exif_orientation(decoder.exif_metadata().unwrap_or_default());
    let color = decoder.color_type();
    let mut pixels: Vec<u8> = reserve("decoded picture", usize::try_from(decoder.total_bytes()).ok())?;
    pixels.resize(pixels.capacity(), 0);
    decoder.read_image(&mut pixels).map_err(broken)?;
    let rgb = to_rgb(pixels, color, format)?;
    let too_short = || Error::Decode { format: name(format), reason: "pixels are missing".to_owned() };
    let mut image =
        DynamicImage::ImageRgb8(image::RgbImage::from_raw(width, height, rgb).ok_or_else(too_short)?);
    image.apply_orientation(orientation);
    Image::from_rgb8(image.width() as usize, image.height() as usize, image.into_rgb8().into_raw())
}

/// An unreadable EXIF block turns nothing.
fn exif_orientation(exif: Option<Vec<u8>>) -> Orientation {
    exif.and_then(|e| Orientation::from_exif_chunk(e.strip_prefix(b"Exif\0\0").unwrap_or(&e)))
        .unwrap_or(Orientation::NoTransforms)
}

/// Drops alpha, repeats grey, keeps the high byte of 16 bits.
fn to_rgb(pixels: Vec<u8>, color: ColorType, format: ImageFormat) -> Result<Vec<u8>> {
    // Where the high byte of a native 16-bit number lies.
    let high = usize::from(cfg!(target_endian = "little"));
    let (step, channels) = match color {
        ColorType::Rgb8 => return Ok(pixels),
        ColorType::L8 => (1, [0, 0, 0]),
        ColorType::La8 => (2, [0, 0, 0]),
        ColorType::Rgba8 => (4, [0, 1, 2]),
        ColorType::L16 => (2, [high; 3]),
        ColorType::La16 => (4, [high; 3]),
        ColorType::Rgb16 => (6, [high, 2 + high, 4 + high]),
        ColorType::Rgba16 => (8, [high, 2 + high, 4 + high]),
        other => {
            let reason = format!("pixels of type {other:?} are not supported");
            return Err(Error::Decode { format: name(format), reason });
        }
    };
    let mut rgb = reserve("rgb picture", (pixels.len() / step).checked_mul(3))?;
    for pixel in pixels.chunks_exact(step) {
        rgb.extend_from_slice(&channels.map(|c| pixel[c]));
    }
    Ok(rgb)
}

#[cfg(test)]
mod tests;
