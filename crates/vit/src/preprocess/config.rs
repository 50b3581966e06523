//! `preprocessor_config.json` and `video_preprocessor_config.json`.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// A larger file is not a preprocessing config.
const MAX_FILE_BYTES: usize = 1 << 20;
/// Bounds the memory of one request: the float pixels of a picture take 12 bytes per unit of `longest_edge`.
const MAX_LONGEST_EDGE: u64 = 1 << 26;
/// The number that PIL gives to bicubic resampling.
const BICUBIC: u64 = 3;

/// How pictures are resized, normalised and cut into patches. Every number was checked when it was made.
///
/// `shortest_edge` and `longest_edge` are budgets in pixels over frames x height x width; a still picture counts as
/// `temporal_patch_size` frames.
#[derive(Debug, Clone, PartialEq)]
pub struct PreprocessConfig {
    pub(super) patch_size: usize,
    pub(super) temporal_patch_size: usize,
    pub(super) merge_size: usize,
    pub(super) shortest_edge: u64,
    pub(super) longest_edge: u64,
    pub(super) mean: [f32; 3],
    pub(super) std: [f32; 3],
    pub(super) rescale_factor: f32,
    pub(super) do_resize: bool,
    pub(super) do_rescale: bool,
    pub(super) do_normalize: bool,
}

impl PreprocessConfig {
    /// The settings that GLM-4.1V-9B publishes for still pictures, for a checkpoint without the file.
    ///
    /// Patch 14, temporal patch 2, merge 2, between 12544 and 9633792 pixels, the mean and deviation of CLIP.
    pub fn published() -> Self {
        Self {
            patch_size: 14,
            temporal_patch_size: 2,
            merge_size: 2,
            shortest_edge: 12_544,
            longest_edge: 9_633_792,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            rescale_factor: (1.0f64 / 255.0) as f32,
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
        }
    }

    /// Reads `preprocessor_config.json`. A field that is absent or null has the default of transformers' class, which
    /// is [`published`](Self::published) except for `size.longest_edge` = 11760000.
    pub fn from_image_json(bytes: &[u8]) -> Result<Self> {
        Self::from_json(bytes, 28 * 28 * 15_000)
    }

    /// Reads `video_preprocessor_config.json`; the default of `size.longest_edge` is 47040000. Sampling of frames
    /// (`fps`, `max_duration`) belongs to whoever decodes the video and is not read.
    pub fn from_video_json(bytes: &[u8]) -> Result<Self> {
        Self::from_json(bytes, 28 * 28 * 2 * 30_000)
    }

    fn from_json(bytes: &[u8], default_longest_edge: u64) -> Result<Self> {
        if bytes.len() > MAX_FILE_BYTES {
            let reason = format!("file must be at most {MAX_FILE_BYTES} bytes, found {}", bytes.len());
            return Err(Error::ConfigSyntax { reason });
        }
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| Error::ConfigSyntax { reason: e.to_string() })?;
        let Value::Object(file) = value else {
            return Err(Error::ConfigSyntax {
                reason: format!("must be an object, found {}", brief(&value)),
            });
        };
        let default = Self::published();
        let no_size = Map::new();
        let size = match present(&file, "size") {
            None => &no_size,
            Some(Value::Object(size)) => size,
            Some(other) => return Err(wrong("size", "an object", other)),
        };
        if let Some(named) = size.keys().find(|k| !matches!(k.as_str(), "shortest_edge" | "longest_edge")) {
            let found = format!("the key `{named}`");
            let wanted = "shortest_edge and longest_edge".to_owned();
            return Err(Error::ConfigValue { field: "size", wanted, found });
        }
        let longest_edge =
            integer(size, "longest_edge", "size.longest_edge", 1, MAX_LONGEST_EDGE, default_longest_edge)?;
        let shortest_edge =
            integer(size, "shortest_edge", "size.shortest_edge", 1, longest_edge, default.shortest_edge)?;
        let mode = integer(&file, "resample", "resample", 0, u64::from(u32::MAX), BICUBIC)?;
        if mode != BICUBIC {
            let wanted = format!("{BICUBIC} (bicubic)");
            return Err(Error::ConfigValue { field: "resample", wanted, found: mode.to_string() });
        }
        Ok(Self {
            patch_size: integer(&file, "patch_size", "patch_size", 1, 256, 14)? as usize,
            temporal_patch_size: integer(&file, "temporal_patch_size", "temporal_patch_size", 1, 16, 2)?
                as usize,
            merge_size: integer(&file, "merge_size", "merge_size", 1, 16, 2)? as usize,
            shortest_edge,
            longest_edge,
            mean: channels(&file, "image_mean", -1e3..=1e3, default.mean)?,
            std: channels(&file, "image_std", 1e-6..=1e6, default.std)?,
            rescale_factor: number(&file, "rescale_factor", 1e-9..=1e6, default.rescale_factor)?,
            do_resize: boolean(&file, "do_resize")?,
            do_rescale: boolean(&file, "do_rescale")?,
            do_normalize: boolean(&file, "do_normalize")?,
        })
    }

    /// The same settings with a smaller budget: lowers `longest_edge` (and `shortest_edge` where it is larger) to
    /// `max_pixels`, in their unit. A budget above the file's changes nothing. The least is one token.
    pub fn with_max_pixels(mut self, max_pixels: u64) -> Result<Self> {
        let factor = self.factor() as u64;
        let least = self.temporal_patch_size as u64 * factor * factor;
        if max_pixels < least {
            return Err(Error::size("max_pixels", format!("at least {least} (one token)"), max_pixels));
        }
        self.longest_edge = self.longest_edge.min(max_pixels);
        self.shortest_edge = self.shortest_edge.min(self.longest_edge);
        Ok(self)
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> usize {
        self.patch_size
    }

    /// Frames in one patch.
    pub fn temporal_patch_size(&self) -> usize {
        self.temporal_patch_size
    }

    /// Patches along one side of the block that becomes one token.
    pub fn merge_size(&self) -> usize {
        self.merge_size
    }

    /// Side of a token in pixels; resized pictures are multiples of it.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// The largest number of frames x height x width that pictures are resized to.
    pub fn longest_edge(&self) -> u64 {
        self.longest_edge
    }

    /// Numbers in the row of one patch: 3 channels x frames x side x side.
    pub fn row_len(&self) -> usize {
        3 * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}

/// A field that is there and not null.
fn present<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|v| !v.is_null())
}

/// A value for a message, cut short: a config may hold megabytes where a number belongs.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(v) => format!("a list of {}", v.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(s) => format!("{:?}", s.chars().take(40).collect::<String>()),
        other => other.to_string(),
    }
}

fn wrong(field: &'static str, wanted: &str, found: &Value) -> Error {
    Error::ConfigValue { field, wanted: wanted.to_owned(), found: brief(found) }
}

fn integer(
    map: &Map<String, Value>,
    key: &str,
    field: &'static str,
    min: u64,
    max: u64,
    default: u64,
) -> Result<u64> {
    match present(map, key) {
        None => Ok(default.clamp(min, max)),
        Some(v) => v
            .as_u64()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| wrong(field, &format!("an integer of {min} to {max}"), v)),
    }
}

fn float(value: &Value, field: &'static str, range: &std::ops::RangeInclusive<f64>) -> Result<f32> {
    value
        .as_f64()
        .filter(|x| range.contains(x))
        .map(|x| x as f32)
        .ok_or_else(|| wrong(field, &format!("a number of {:e} to {:e}", range.start(), range.end()), value))
}

fn number(
    map: &Map<String, Value>,
    field: &'static str,
    range: std::ops::RangeInclusive<f64>,
    default: f32,
) -> Result<f32> {
    present(map, field).map_or(Ok(default), |v| float(v, field, &range))
}

fn boolean(map: &Map<String, Value>, field: &'static str) -> Result<bool> {
    present(map, field).map_or(Ok(true), |v| v.as_bool().ok_or_else(|| wrong(field, "true or false", v)))
}

/// Three numbers, or one for all three channels.
fn channels(
    map: &Map<String, Value>,
    field: &'static str,
    range: std::ops::RangeInclusive<f64>,
    default: [f32; 3],
) -> Result<[f32; 3]> {
    match present(map, field) {
        None => Ok(default),
        Some(Value::Array(list)) => match list.as_slice() {
            [r, g, b] => Ok([float(r, field, &range)?, float(g, field, &range)?, float(b, field, &range)?]),
            _ => Err(wrong(field, "a list of 3 numbers", &Value::Array(list.clone()))),
        },
        Some(v) => Ok([float(v, field, &range)?; 3]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_settings_are_those_of_the_real_file() {
        let file = br#"{"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 12544, "longest_edge": 9633792}, "resample": 3, "do_resize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}"#;
        assert_eq!(PreprocessConfig::from_image_json(file).unwrap(), PreprocessConfig::published());
    }

    #[test]
    fn an_empty_object_has_the_defaults_of_the_class() {
        let image = PreprocessConfig::from_image_json(b"{}").unwrap();
        assert_eq!((image.shortest_edge, image.longest_edge), (12_544, 11_760_000));
        assert_eq!(PreprocessConfig::from_video_json(b"{\"size\": null}").unwrap().longest_edge, 47_040_000);
    }

    #[test]
    fn every_bad_number_is_named_with_its_value() {
        for (file, message) in [
            (r#"{"patch_size": 0}"#, "`patch_size` must be an integer of 1 to 256, found 0"),
            (r#"{"patch_size": -14}"#, "`patch_size` must be an integer of 1 to 256, found -14"),
            (r#"{"patch_size": 1e300}"#, "`patch_size` must be an integer of 1 to 256, found 1e+300"),
            (r#"{"merge_size": 17}"#, "`merge_size` must be an integer of 1 to 16, found 17"),
            (
                r#"{"temporal_patch_size": "2"}"#,
                "`temporal_patch_size` must be an integer of 1 to 16, found \"2\"",
            ),
            (
                r#"{"size": {"longest_edge": 0}}"#,
                "`size.longest_edge` must be an integer of 1 to 67108864, found 0",
            ),
            (
                r#"{"size": {"longest_edge": 9, "shortest_edge": 10}}"#,
                "`size.shortest_edge` must be an integer of 1 to 9, found 10",
            ),
            (
                r#"{"size": {"height": 336}}"#,
                "`size` must be shortest_edge and longest_edge, found the key `height`",
            ),
            (r#"{"size": 5}"#, "`size` must be an object, found 5"),
            (r#"{"image_std": [0.1, 0, 0.1]}"#, "`image_std` must be a number of 1e-6 to 1e6, found 0"),
            (r#"{"image_mean": [0.1]}"#, "`image_mean` must be a list of 3 numbers, found a list of 1"),
            (r#"{"rescale_factor": 0}"#, "`rescale_factor` must be a number of 1e-9 to 1e6, found 0"),
            (r#"{"resample": 2}"#, "`resample` must be 3 (bicubic), found 2"),
            (r#"{"do_resize": 1}"#, "`do_resize` must be true or false, found 1"),
        ] {
            let error = PreprocessConfig::from_image_json(file.as_bytes()).unwrap_err().to_string();
            assert_eq!(error, format!("preprocessor config: {message}"));
        }
    }

    #[test]
    fn hostile_files_are_refused_without_a_panic() {
        let deep = "[".repeat(100_000);
        for file in
            [&b""[..], b"null", b"[]", b"{", b"\xff\xfe", deep.as_bytes(), &vec![b' '; MAX_FILE_BYTES + 1]]
        {
            assert!(matches!(PreprocessConfig::from_image_json(file), Err(Error::ConfigSyntax { .. })));
        }
    }

    #[test]
    fn a_cap_lowers_both_budgets_and_never_raises_them() {
        let c = PreprocessConfig::published();
        assert_eq!(c.clone().with_max_pixels(5_000_000).unwrap().longest_edge, 5_000_000);
        assert_eq!(c.clone().with_max_pixels(u64::MAX).unwrap(), c);
        let low = c.clone().with_max_pixels(2_000).unwrap();
        assert_eq!((low.shortest_edge, low.longest_edge), (2_000, 2_000));
        let error = c.with_max_pixels(1_567).unwrap_err().to_string();
        assert_eq!(error, "max_pixels must be at least 1568 (one token), found 1567");
    }
}
