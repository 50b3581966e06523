//! The size that a picture is resized to, and the bicubic resizing.

use super::{Image, PreprocessConfig};
use crate::error::reserve;
use crate::{Error, Result};

/// Sides and frame counts up to here keep every product exact in f64.
const MAX_SIDE: usize = 1 << 16;
/// Pixels of the result of one resize.
const MAX_RESIZED_PIXELS: usize = 1 << 27;
/// Fractional bits of a weight, as in Pillow.
const BITS: u32 = 22;

/// Height and width that `frames` pictures of `h` x `w` pixels are resized to: multiples of
/// [`PreprocessConfig::factor`] near the original within the pixel budget (transformers' `smart_resize` for GLM-4V).
///
/// A still picture counts as `temporal_patch_size` frames. Rounding is half to even and all arithmetic is float64,
/// as in Python. Very long pictures may exceed the budget because no side gets shorter than one token.
pub fn smart_resize(frames: usize, h: usize, w: usize, cfg: &PreprocessConfig) -> Result<(usize, usize)> {
    for (what, value) in [("picture height", h), ("picture width", w), ("number of frames", frames)] {
        if !(1..=MAX_SIDE).contains(&value) {
            return Err(Error::size(what, format!("1 to {MAX_SIDE}"), value));
        }
    }
    if frames < cfg.temporal_patch_size {
        return Err(Error::size("number of frames", format!("at least {}", cfg.temporal_patch_size), frames));
    }
    let factor = cfg.factor() as f64;
    let (t, mut h, mut w) = (frames as f64, h as f64, w as f64);
    if h < factor || w < factor {
        let scale = (factor / h).max(factor / w);
        (h, w) = ((h * scale).trunc(), (w * scale).trunc());
    }
    let aspect = h.max(w) / h.min(w);
    if aspect > 200.0 {
        return Err(Error::AspectRatio { height: h as usize, width: w as usize, found: aspect });
    }
    let temporal = cfg.temporal_patch_size as f64;
    let (budget, least) = (cfg.longest_edge as f64, cfg.shortest_edge as f64);
    let mut h_out = (h / factor).round_ties_even() * factor;
    let mut w_out = (w / factor).round_ties_even() * factor;
    let t_out = (t / temporal).round_ties_even() * temporal;
    let total = t_out * h_out * w_out;
    if total > budget {
        let beta = (t * h * w / budget).sqrt();
        h_out = factor.max((h / beta / factor).floor() * factor);
        w_out = factor.max((w / beta / factor).floor() * factor);
    } else if total < least {
        let beta = (least / (t * h * w)).sqrt();
        h_out = (h * beta / factor).ceil() * factor;
        w_out = (w * beta / factor).ceil() * factor;
    }
    Ok((h_out as usize, w_out as usize))
}

/// Resizes to `h` x `w` pixels exactly as Pillow 11.3.0 does with `BICUBIC`: cubic kernel with a = -0.5, widened when
/// shrinking, weights rounded to 22 bits, horizontal pass first, 8 bits between the passes.
pub fn resize_bicubic_u8(image: &Image, h: usize, w: usize) -> Result<Image> {
    let sides = 1..=MAX_RESIZED_PIXELS;
    if !sides.contains(&h) || !sides.contains(&w) || h.checked_mul(w).is_none_or(|n| n > MAX_RESIZED_PIXELS) {
        let wanted = format!("1 to {MAX_RESIZED_PIXELS} pixels");
        return Err(Error::size("resized picture", wanted, format!("{h}x{w}")));
    }
    let (h_in, w_in) = (image.height(), image.width());
    let across = (w != w_in).then(|| Weights::new(w_in, w)).transpose()?;
    let down = (h != h_in).then(|| Weights::new(h_in, h)).transpose()?;
    let rgb = match (across, down) {
        (None, None) => copy(image.rgb())?,
        (Some(across), None) => across.horizontal(image.rgb(), w_in)?,
        (None, Some(down)) => down.vertical(image.rgb(), w)?,
        (Some(across), Some(down)) => down.vertical(&across.horizontal(image.rgb(), w_in)?, w)?,
    };
    Image::from_rgb8(w, h, rgb)
}

fn copy(rgb: &[u8]) -> Result<Vec<u8>> {
    let mut out = reserve("resized picture", Some(rgb.len()))?;
    out.extend_from_slice(rgb);
    Ok(out)
}

/// The taps of every output pixel along one axis.
struct Weights {
    /// Per output: first input index, and where its weights lie in `values`.
    spans: Vec<(usize, std::ops::Range<usize>)>,
    /// Signed, [`BITS`] fractional bits. Per output they sum to about 1 and their magnitudes to less than 1.5, so
    /// that a sum of products with 8-bit pixels stays within 31 bits.
    values: Vec<i32>,
}

impl Weights {
    fn new(n_in: usize, n_out: usize) -> Result<Self> {
        let scale = n_in as f64 / n_out as f64;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let most_taps = (2.0 * support).ceil() as usize + 2;
        let mut spans = reserve("resize weights", Some(n_out))?;
        let mut values = reserve("resize weights", n_out.checked_mul(most_taps.min(n_in)))?;
        let mut taps: Vec<f64> = Vec::new();
        for o in 0..n_out {
            let centre = (o as f64 + 0.5) * scale;
            let lo = (centre - support + 0.5).max(0.0) as usize;
            let hi = ((centre + support + 0.5) as usize).min(n_in);
            taps.clear();
            taps.extend((lo..hi).map(|i| cubic((i as f64 - centre + 0.5) * (1.0 / stretch))));
            let sum: f64 = taps.iter().sum();
            let start = values.len();
            for k in &taps {
                let v = k / sum * f64::from(1 << BITS);
                values.push((v + if v < 0.0 { -0.5 } else { 0.5 }) as i32);
            }
            spans.push((lo, start..values.len()));
        }
        Ok(Self { spans, values })
    }

    /// `rgb`: rows of `w_in` pixels → rows of as many pixels as there are spans.
    fn horizontal(&self, rgb: &[u8], w_in: usize) -> Result<Vec<u8>> {
        let rows = rgb.len() / (3 * w_in);
        let len = self.spans.len().checked_mul(3).and_then(|n| n.checked_mul(rows));
        let mut out = reserve("resized picture", len)?;
        for row in rgb.chunks_exact(3 * w_in) {
            for (lo, span) in &self.spans {
                let weights = &self.values[span.clone()];
                let mut sum = [1i32 << (BITS - 1); 3];
                for (pixel, k) in row[3 * lo..].as_chunks::<3>().0.iter().zip(weights) {
                    for c in 0..3 {
                        sum[c] += i32::from(pixel[c]) * k;
                    }
                }
                out.extend_from_slice(&sum.map(to_u8));
            }
        }
        Ok(out)
    }

    /// `rgb`: rows of `w` pixels → as many rows as there are spans.
    fn vertical(&self, rgb: &[u8], w: usize) -> Result<Vec<u8>> {
        let row_len = 3 * w;
        let mut out = reserve("resized picture", self.spans.len().checked_mul(row_len))?;
        let mut sums = reserve("resize row", Some(row_len))?;
        for (lo, span) in &self.spans {
            sums.clear();
            sums.resize(row_len, 1i32 << (BITS - 1));
            for (row, &k) in rgb[lo * row_len..].chunks_exact(row_len).zip(&self.values[span.clone()]) {
                for (sum, &v) in sums.iter_mut().zip(row) {
                    *sum += i32::from(v) * k;
                }
            }
            out.extend(sums.iter().map(|&s| to_u8(s)));
        }
        Ok(out)
    }
}

fn to_u8(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Keys' cubic with a = -0.5.
fn cubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden::{noise, sha256, text};
    use super::*;
    use serde_json::Value;

    fn settings(group: &Value) -> PreprocessConfig {
        let field = |name: &str| group[name].as_u64().unwrap();
        let file = serde_json::json!({
            "patch_size": field("patch_size"), "merge_size": field("merge_size"),
            "temporal_patch_size": field("temporal_patch_size"),
            "size": {"shortest_edge": field("shortest_edge"), "longest_edge": field("longest_edge")},
        });
        PreprocessConfig::from_image_json(file.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn sizes_are_those_of_transformers() {
        let golden: Value = serde_json::from_str(&text("resize.json")).unwrap();
        let (mut sizes, mut errors) = (0, 0);
        for group in golden["smart_resize"].as_array().unwrap() {
            let cfg = settings(group);
            for v in group["vectors"].as_array().unwrap() {
                let n = |i: usize| v[i].as_u64().unwrap() as usize;
                let got = smart_resize(n(0), n(1), n(2), &cfg);
                match v[3].as_str() {
                    None => assert_eq!(got.unwrap(), (n(3), n(4)), "{v} {cfg:?}"),
                    Some("aspect") => assert!(matches!(got, Err(Error::AspectRatio { .. })), "{v} {got:?}"),
                    Some(_) => assert!(matches!(got, Err(Error::Size { .. })), "{v} {got:?}"),
                }
                sizes += 1;
                errors += usize::from(v[3].is_string());
            }
        }
        assert!(sizes >= 250 && errors >= 20, "{sizes} sizes, {errors} errors");
    }

    #[test]
    fn resized_bytes_are_those_of_pillow() {
        let golden: Value = serde_json::from_str(&text("resize.json")).unwrap();
        let cases = golden["pixels"].as_array().unwrap();
        assert!(cases.len() >= 60);
        for case in cases {
            let n = |name: &str, i: usize| case[name][i].as_u64().unwrap() as usize;
            let image = noise(n("from", 0), n("from", 1), case["seed"].as_u64().unwrap() as u32);
            let out = resize_bicubic_u8(&image, n("to", 0), n("to", 1)).unwrap();
            if let Some(rgb) = case["rgb"].as_array() {
                let rgb: Vec<u8> = rgb.iter().map(|v| v.as_u64().unwrap() as u8).collect();
                assert_eq!(out.rgb(), rgb, "{:?} -> {:?}", case["from"], case["to"]);
            }
            assert_eq!(sha256(out.rgb()), case["sha256"], "{:?} -> {:?}", case["from"], case["to"]);
        }
    }

    #[test]
    fn vertical_first_would_be_noticed() {
        // Negative control of the test above: the other order of the passes gives other bytes.
        let image = noise(60, 90, 1);
        let right = resize_bicubic_u8(&image, 56, 84).unwrap();
        let wrong = resize_bicubic_u8(&resize_bicubic_u8(&image, 56, 90).unwrap(), 56, 84).unwrap();
        assert_ne!(right, wrong);
    }

    #[test]
    fn weights_of_extreme_ratios_cannot_overflow() {
        for (n_in, n_out) in
            [(1, 1000), (2, 999), (65536, 28), (3, 65536), (28, 27), (1000, 1), (7, 8), (65536, 65535)]
        {
            let weights = Weights::new(n_in, n_out).unwrap();
            for (lo, span) in &weights.spans {
                let values = &weights.values[span.clone()];
                assert!(!values.is_empty() && lo + values.len() <= n_in);
                let magnitude: i64 = values.iter().map(|&v| i64::from(v).abs()).sum();
                assert!(magnitude < 3 << (BITS - 1), "{n_in} -> {n_out}: {magnitude}");
            }
        }
    }

    #[test]
    fn resizing_to_nothing_or_to_gigabytes_is_refused() {
        let image = noise(4, 4, 0);
        for (h, w) in [(0, 4), (4, 0), (usize::MAX, 2), (1 << 20, 1 << 20)] {
            assert!(matches!(resize_bicubic_u8(&image, h, w), Err(Error::Size { .. })));
        }
    }

    #[test]
    fn a_cap_is_kept_by_ordinary_pictures() {
        let cfg = PreprocessConfig::published().with_max_pixels(1_000_000).unwrap();
        for (h, w) in [(2400, 1080), (1, 1), (4000, 3000), (300, 20_000)] {
            let (h, w) = smart_resize(2, h, w, &cfg).unwrap();
            assert!(2 * h * w <= 1_000_000, "{h}x{w}");
        }
    }
}
