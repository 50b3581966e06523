//! Where each patch lies, as plain numbers for the encoder: rows and columns for its rotary embedding, samples of
//! the learned position table, and the boundaries within which it attends.

use super::patchify::pairs;
use crate::error::reserve;
use crate::{Error, Result};

/// Patches of one request; their taps take 128 bytes each.
const MAX_PATCHES: usize = 1 << 20;
/// Side of the position table; the real one has 24.
const MAX_TABLE_SIDE: usize = 4096;
/// The cubic kernel of torch's `grid_sample`. (The resizing of pictures uses -0.5.)
const A: f32 = -0.75;

/// Positions of the `n` patches of some pictures and videos, one after the other, in block order.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionPositions {
    /// `[n]` row of each patch in its picture.
    pub rows: Vec<u32>,
    /// `[n]` column of each patch in its picture.
    pub cols: Vec<u32>,
    /// `[n, 16]` indices into the row-major position table: a window of four rows by four columns around the place of
    /// the patch, clamped at the border.
    pub taps: Vec<[u32; 16]>,
    /// `[n, 16]` weight of each tap; a patch adds the weighted sum of the table's rows.
    pub tap_weights: Vec<[f32; 16]>,
    /// `[1 + number of temporal patches]` first patch of each, then `n`. Attention stays within a segment.
    pub segments: Vec<u32>,
}

/// Positions for grids of `[t, h, w]` patches, merged in `merge` x `merge` blocks, with a square table of learned
/// positions of `table_side` rows. Temporal patches of one video have equal rows, columns and taps.
///
/// The samples are those of `grid_sample(mode="bicubic", padding_mode="border", align_corners=False)` in float32.
pub fn vision_positions(grids: &[[usize; 3]], merge: usize, table_side: usize) -> Result<VisionPositions> {
    if !(1..=MAX_TABLE_SIDE).contains(&table_side) {
        return Err(Error::size("position table side", format!("1 to {MAX_TABLE_SIDE}"), table_side));
    }
    let (mut n, mut frames) = (0usize, 0usize);
    for &grid in grids {
        super::visual_tokens(grid, merge)?;
        let [t, h, w] = grid;
        n = t
            .checked_mul(h)
            .and_then(|k| k.checked_mul(w))
            .and_then(|k| k.checked_add(n))
            .unwrap_or(usize::MAX);
        if n > MAX_PATCHES {
            return Err(Error::size("number of patches", format!("at most {MAX_PATCHES}"), n));
        }
        frames += t;
    }
    let mut out = VisionPositions {
        rows: reserve("vision positions", Some(n))?,
        cols: reserve("vision positions", Some(n))?,
        taps: reserve("vision positions", Some(n))?,
        tap_weights: reserve("vision positions", Some(n))?,
        segments: reserve("vision positions", Some(frames + 1))?,
    };
    out.segments.push(0);
    for &[t, h, w] in grids {
        let down: Vec<Samples> = (0..h).map(|r| Samples::new(r, h, table_side)).collect();
        let across: Vec<Samples> = (0..w).map(|c| Samples::new(c, w, table_side)).collect();
        for _ in 0..t {
            for (block_row, block_col) in pairs(h / merge, w / merge) {
                for (y, x) in pairs(merge, merge) {
                    let (r, c) = (block_row * merge + y, block_col * merge + x);
                    out.push(r, c, &down[r], &across[c], table_side);
                }
            }
            out.segments.push(out.rows.len() as u32);
        }
    }
    Ok(out)
}

impl VisionPositions {
    fn push(&mut self, r: usize, c: usize, down: &Samples, across: &Samples, table_side: usize) {
        self.rows.push(r as u32);
        self.cols.push(c as u32);
        self.taps.push(std::array::from_fn(|i| down.index[i / 4] * table_side as u32 + across.index[i % 4]));
        self.tap_weights.push(std::array::from_fn(|i| down.weight[i / 4] * across.weight[i % 4]));
    }
}

/// Four samples along one axis of the table.
struct Samples {
    index: [u32; 4],
    weight: [f32; 4],
}

impl Samples {
    /// For patch `i` of `n`.
    fn new(i: usize, n: usize, table_side: usize) -> Self {
        let side = table_side as f32;
        let centre = (i as f32 + 0.5) / n as f32 * 2.0 - 1.0;
        let place = ((centre + 1.0) * side - 1.0) / 2.0;
        let base = place.floor();
        let t = place - base;
        let last = table_side as i64 - 1;
        Samples {
            index: std::array::from_fn(|k| (base as i64 - 1 + k as i64).clamp(0, last) as u32),
            weight: [outer(t + 1.0), inner(t), inner(1.0 - t), outer(2.0 - t)],
        }
    }
}

/// The kernel up to a distance of 1.
fn inner(z: f32) -> f32 {
    ((A + 2.0) * z - (A + 3.0)) * z * z + 1.0
}

/// The kernel at distances of 1 to 2.
fn outer(z: f32) -> f32 {
    ((A * z - 5.0 * A) * z + 8.0 * A) * z - 4.0 * A
}

#[cfg(test)]
mod tests {
    use super::super::golden::{Tensors, config};
    use super::*;

    /// Largest difference between the sampled table and what the reference added to its activations.
    fn sampling_error(positions: &VisionPositions, table: &[f32], added: &[f32]) -> f32 {
        let c = added.len() / positions.rows.len();
        let mut worst = 0f32;
        for (patch, row) in added.chunks_exact(c).enumerate() {
            for (channel, want) in row.iter().enumerate() {
                let got: f32 = (0..16)
                    .map(|i| {
                        positions.tap_weights[patch][i]
                            * table[positions.taps[patch][i] as usize * c + channel]
                    })
                    .sum();
                worst = worst.max((got - want).abs());
            }
        }
        worst
    }

    #[test]
    fn taps_reproduce_the_positions_that_the_reference_adds() {
        let table = Tensors::open("default/model.safetensors")
            .f32("model.visual.embeddings.position_embedding.weight");
        let golden = Tensors::open("default/golden/image.safetensors");
        let (before, after) =
            (golden.f32("vision.post_conv_layernorm"), golden.f32("vision.after_pos_embed"));
        let added: Vec<f32> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        let grids: Vec<[usize; 3]> = golden
            .i64("image_grid_thw")
            .chunks_exact(3)
            .map(|g| [g[0] as usize, g[1] as usize, g[2] as usize])
            .collect();
        let merge = config("default", false).merge_size();
        let mut positions = vision_positions(&grids, merge, 5).unwrap();
        assert!(sampling_error(&positions, &table, &added) < 2e-6);
        // Negative control: a neighbouring tap is visibly wrong.
        positions.taps[7].swap(5, 6);
        assert!(sampling_error(&positions, &table, &added) > 1e-3);
    }

    #[test]
    fn rows_and_columns_give_the_angles_of_the_reference() {
        let golden = Tensors::open("default/golden/image.safetensors");
        let cos = golden.f32("vision.rope_cos");
        let g = golden.i64("image_grid_thw");
        let positions = vision_positions(&[[g[0] as usize, g[1] as usize, g[2] as usize]], 2, 5).unwrap();
        let head = cos.len() / positions.rows.len();
        for (patch, row) in cos.chunks_exact(head).enumerate() {
            // The first frequency is 1; rows fill the first quarter of the angles and columns the second.
            assert!((row[0] - (positions.rows[patch] as f32).cos()).abs() < 1e-6);
            assert!((row[head / 4] - (positions.cols[patch] as f32).cos()).abs() < 1e-6);
        }
    }

    #[test]
    fn a_grid_of_the_tables_size_reads_the_table_itself() {
        let positions = vision_positions(&[[1, 24, 24]], 2, 24).unwrap();
        for patch in 0..576 {
            let own = positions.rows[patch] * 24 + positions.cols[patch];
            let weight: f32 = (0..16)
                .filter(|&i| positions.taps[patch][i] == own)
                .map(|i| positions.tap_weights[patch][i])
                .sum();
            assert!((weight - 1.0).abs() < 1e-4, "{patch}: {weight}");
        }
    }

    #[test]
    fn blocks_frames_and_segments_follow_each_other() {
        let positions = vision_positions(&[[2, 2, 4], [1, 2, 2]], 2, 3).unwrap();
        assert_eq!(positions.rows, [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]);
        assert_eq!(positions.cols, [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1]);
        assert_eq!(positions.segments, [0, 8, 16, 20]);
        assert_eq!(positions.taps[..8], positions.taps[8..16]);
        for weights in &positions.tap_weights {
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
        assert!(positions.taps.iter().flatten().all(|&i| i < 9));
    }

    #[test]
    fn no_grid_has_no_patches() {
        assert_eq!(vision_positions(&[], 2, 24).unwrap().segments, [0]);
    }

    #[test]
    fn absurd_grids_are_refused() {
        for (grids, merge, side) in [
            (&[[1, 4, 4]][..], 0, 24),
            (&[[1, 5, 4]], 2, 24),
            (&[[0, 4, 4]], 2, 24),
            (&[[1, 4, 4]], 2, 0),
            (&[[1, 4, 4]], 2, 1 << 20),
            (&[[usize::MAX, usize::MAX - 1, 2]], 2, 24),
            (&[[1, 1 << 10, 1 << 10], [1, 2, 2]], 2, 24),
        ] {
            assert!(matches!(vision_positions(grids, merge, side), Err(Error::Size { .. })), "{grids:?}");
        }
    }
}
