//! From resized pictures to the rows of the patch embedding.

use super::{Image, PreprocessConfig, resize_bicubic_u8, smart_resize};
use crate::error::reserve;
use crate::{Error, Result};

/// The input of the vision encoder for one picture or video.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[n, 3 * temporal * p * p]`, one row per patch in block order; a row is channel, frame, y, x.
    pub values: Vec<f32>,
    /// Temporal patches, patches from top to bottom, patches from left to right; `n` is their product.
    pub grid: [usize; 3],
}

/// Tokens that a grid becomes: every `merge` x `merge` patches are one. An error if the grid is not whole blocks.
pub fn visual_tokens(grid: [usize; 3], merge: usize) -> Result<usize> {
    let [t, h, w] = grid;
    let whole = merge > 0 && h % merge == 0 && w % merge == 0 && t > 0 && h > 0 && w > 0;
    let tokens = whole.then(|| t.checked_mul(h / merge)?.checked_mul(w / merge)).flatten();
    tokens.ok_or_else(|| {
        Error::size(
            "patch grid",
            format!("at least 1 and a multiple of {merge} patches a side"),
            format!("{grid:?}"),
        )
    })
}

/// Resizes a still picture by [`smart_resize`] and cuts it into patches; its one frame is repeated.
pub fn preprocess_image(image: &Image, cfg: &PreprocessConfig) -> Result<Pixels> {
    let resized = resize(image, cfg.temporal_patch_size, cfg)?;
    patchify(std::slice::from_ref(&resized), cfg)
}

/// Resizes the frames of a video and cuts them into patches. The frames are those to look at, already sampled, all of
/// one size; the last is repeated until `temporal_patch_size` divides their number.
pub fn preprocess_video(frames: &[Image], cfg: &PreprocessConfig) -> Result<Pixels> {
    same_size(frames)?;
    let mut resized = reserve("video frames", Some(frames.len()))?;
    for frame in frames {
        resized.push(resize(frame, frames.len(), cfg)?);
    }
    patchify(&resized, cfg)
}

/// Height and width of a picture of `h` x `w` pixels as the encoder will see it: known before any pixel is touched.
/// A still picture counts as `temporal_patch_size` frames.
pub fn resized_size(frames: usize, h: usize, w: usize, cfg: &PreprocessConfig) -> Result<(usize, usize)> {
    if cfg.do_resize { smart_resize(frames, h, w, cfg) } else { Ok((h, w)) }
}

fn resize(image: &Image, frames: usize, cfg: &PreprocessConfig) -> Result<Image> {
    let (h, w) = resized_size(frames, image.height(), image.width(), cfg)?;
    resize_bicubic_u8(image, h, w)
}

fn same_size(frames: &[Image]) -> Result<(usize, usize)> {
    let first = frames.first().ok_or_else(|| Error::size("number of frames", "at least 1", 0))?;
    let size = (first.height(), first.width());
    match frames.iter().find(|f| (f.height(), f.width()) != size) {
        None => Ok(size),
        Some(f) => {
            let wanted = format!("{}x{} as the first frame", size.0, size.1);
            Err(Error::size("frame", wanted, format!("{}x{}", f.height(), f.width())))
        }
    }
}

/// Normalises frames and cuts them into patches; they are already resized to multiples of
/// [`PreprocessConfig::factor`]. The last frame is repeated until `temporal_patch_size` divides their number.
pub fn patchify(frames: &[Image], cfg: &PreprocessConfig) -> Result<Pixels> {
    let (h, w) = same_size(frames)?;
    let (p, m, tp) = (cfg.patch_size, cfg.merge_size, cfg.temporal_patch_size);
    if h % cfg.factor() != 0 || w % cfg.factor() != 0 {
        let wanted = format!("a multiple of {} pixels a side", cfg.factor());
        return Err(Error::size("resized picture", wanted, format!("{h}x{w}")));
    }
    let grid = [frames.len().div_ceil(tp), h / p, w / p];
    let len = grid.iter().try_fold(cfg.row_len(), |n, &g| n.checked_mul(g));
    let mut values = reserve("pixel values", len)?;
    let tables = normalised(cfg);
    for group in frames.chunks(tp) {
        for (block_row, block_col) in pairs(grid[1] / m, grid[2] / m) {
            for (y, x) in pairs(m, m) {
                let (top, left) = ((block_row * m + y) * p, (block_col * m + x) * p);
                for (c, table) in tables.iter().enumerate() {
                    for i in 0..tp {
                        let frame = &group[i.min(group.len() - 1)];
                        for row in top..top + p {
                            let start = (row * w + left) * 3;
                            let pixels = frame.rgb()[start..start + p * 3].iter().skip(c).step_by(3);
                            values.extend(pixels.map(|&v| table[usize::from(v)]));
                        }
                    }
                }
            }
        }
    }
    Ok(Pixels { values, grid })
}

/// `(0, 0), (0, 1), ...`, rows first.
pub(super) fn pairs(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |r| (0..cols).map(move |c| (r, c)))
}

/// What each of the 256 values of each channel becomes, in the reference's float32 steps.
fn normalised(cfg: &PreprocessConfig) -> [[f32; 256]; 3] {
    std::array::from_fn(|c| {
        std::array::from_fn(|v| {
            let mut x = v as f32;
            if cfg.do_rescale {
                x *= cfg.rescale_factor;
            }
            if cfg.do_normalize {
                x = (x - cfg.mean[c]) / cfg.std[c];
            }
            x
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::golden::{Tensors, bytes, config, noise, sha256, text};
    use super::*;
    use crate::preprocess::DecodeLimits;
    use serde_json::Value;

    const CHECKPOINTS: [&str; 12] = [
        "default",
        "real-head-dim",
        "kv-heads-1",
        "kv-heads-all",
        "kv-heads-8-2",
        "patch-8",
        "merge-3",
        "temporal-1",
        "bf16",
        "f16",
        "tied",
        "eps",
    ];

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn pixel_values_of_every_checkpoint_are_those_of_the_reference() {
        let images = Tensors::open("default/golden/image.safetensors");
        let second = Tensors::open("default/golden/two_images.safetensors").image("image.1.raw_u8");
        let frames = Tensors::open("default/golden/video.safetensors").frames("video.raw_u8");
        let first = images.image("image.0.raw_u8");
        let mut compared = 0;
        for name in CHECKPOINTS {
            let expected: Value =
                serde_json::from_str(&text(&format!("{name}/golden/expected.json"))).unwrap();
            let (still, video) = (config(name, false), config(name, true));
            for (case, info) in expected["cases"].as_object().unwrap() {
                let (key, got) = match case.as_str() {
                    "image" => ("pixel_values", preprocess_image(&first, &still).unwrap().values),
                    "two_images" => {
                        let mut values = preprocess_image(&first, &still).unwrap().values;
                        values.extend(preprocess_image(&second, &still).unwrap().values);
                        ("pixel_values", values)
                    }
                    "video" => ("pixel_values_videos", preprocess_video(&frames, &video).unwrap().values),
                    _ => continue,
                };
                assert_eq!(sha256(&floats(&got)), info["sha256"][key], "{name} {case}");
                compared += 1;
            }
        }
        assert_eq!(compared, 17);
    }

    #[test]
    fn resized_pictures_and_grids_are_those_of_the_reference() {
        let golden = Tensors::open("default/golden/image.safetensors");
        let pixels = preprocess_image(&golden.image("image.0.raw_u8"), &config("default", false)).unwrap();
        assert_eq!(pixels.values, golden.f32("pixel_values"));
        assert_eq!(pixels.grid.map(|n| n as i64), *golden.i64("image_grid_thw"));
        let resized = resize(&golden.image("image.0.raw_u8"), 2, &config("default", false)).unwrap();
        assert_eq!(resized, golden.image("image.0.resized_u8"));

        let golden = Tensors::open("default/golden/video.safetensors");
        let pixels = preprocess_video(&golden.frames("video.raw_u8"), &config("default", true)).unwrap();
        assert_eq!(pixels.values, golden.f32("pixel_values_videos"));
        assert_eq!(pixels.grid.map(|n| n as i64), *golden.i64("video_grid_thw"));
    }

    #[test]
    fn png_files_of_odd_sizes_become_the_pixels_of_the_reference() {
        let expected: Value = serde_json::from_str(&text("odd-sizes/expected.json")).unwrap();
        let pictures = expected["pictures"].as_array().unwrap();
        assert!(pictures.len() >= 6);
        for picture in pictures {
            let file = bytes(&format!("odd-sizes/{}", picture["file"].as_str().unwrap()));
            let image = Image::decode(&file, &DecodeLimits::default()).unwrap();
            assert_eq!(sha256(image.rgb()), picture["raw_sha256"], "{picture}");
            let cfg = config("default", false);
            assert_eq!(
                sha256(resize(&image, 2, &cfg).unwrap().rgb()),
                picture["resized_sha256"],
                "{picture}"
            );
            let pixels = preprocess_image(&image, &cfg).unwrap();
            assert_eq!(sha256(&floats(&pixels.values)), picture["pixel_values_sha256"], "{picture}");
            assert_eq!(serde_json::json!(pixels.grid), picture["grid"]);
        }
    }

    #[test]
    fn an_odd_video_repeats_its_last_frame() {
        let cfg = config("default", true);
        let frames: Vec<Image> = (0..3).map(|i| noise(56, 84, i)).collect();
        let mut even = frames.clone();
        even.push(frames[2].clone());
        assert_eq!(patchify(&frames, &cfg).unwrap(), patchify(&even, &cfg).unwrap());
        even[3] = noise(56, 84, 9);
        assert_ne!(patchify(&frames, &cfg).unwrap(), patchify(&even, &cfg).unwrap());
    }

    #[test]
    fn frames_and_sizes_that_do_not_fit_are_refused() {
        let cfg = config("default", true);
        let message = |r: Result<Pixels>| r.unwrap_err().to_string();
        assert_eq!(message(preprocess_video(&[], &cfg)), "number of frames must be at least 1, found 0");
        assert_eq!(
            message(preprocess_video(&[noise(9, 9, 0)], &cfg)),
            "number of frames must be at least 2, found 1"
        );
        assert_eq!(
            message(preprocess_video(&[noise(9, 9, 0), noise(9, 8, 0)], &cfg)),
            "frame must be 9x9 as the first frame, found 9x8"
        );
        assert_eq!(
            message(patchify(&[noise(28, 29, 0)], &cfg)),
            "resized picture must be a multiple of 28 pixels a side, found 28x29"
        );
        assert!(matches!(preprocess_image(&noise(1, 201, 0), &cfg), Err(Error::AspectRatio { .. })));
    }

    #[test]
    fn steps_that_the_config_turns_off_are_left_out() {
        let file = br#"{"do_resize": false, "do_rescale": false, "do_normalize": false}"#;
        let cfg = PreprocessConfig::from_image_json(file).unwrap();
        let image = noise(28, 28, 3);
        let pixels = preprocess_image(&image, &cfg).unwrap();
        assert_eq!((pixels.grid, pixels.values.len()), ([1, 2, 2], 4 * 1176));
        assert_eq!(pixels.values[0], f32::from(image.rgb()[0]));
        assert_eq!(
            preprocess_image(&noise(30, 28, 3), &cfg).unwrap_err().to_string(),
            "resized picture must be a multiple of 28 pixels a side, found 30x28"
        );
    }

    #[test]
    fn a_grid_has_one_token_per_block() {
        assert_eq!(visual_tokens([1, 172, 78], 2).unwrap(), 3354);
        assert_eq!(visual_tokens([2, 6, 9], 3).unwrap(), 12);
        for (grid, merge) in [([1, 5, 4], 2), ([0, 4, 4], 2), ([1, 4, 4], 0), ([usize::MAX, 4, 4], 1)] {
            assert!(visual_tokens(grid, merge).is_err());
        }
    }
}
