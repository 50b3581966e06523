//! Calibrated scales of the KV cache, folded into the weights around it.
//!
//! A cache stores one scale for a head and token (or for 32 components of it), so a component that is often large costs
//! the others their precision. Dividing component `c` of a head's keys by `s_c` and multiplying the queries' by it
//! changes no score; likewise for values and the columns of `o_proj`. With `s_c` the largest magnitude that was seen, all
//! components use the whole range, which is where the summed error of scores is least. Rotation mixes the two of
//! a pair, so these share a scale. Scales are powers of two: the fold loses nothing in any floating-point type, and
//! runs at no cost, whatever the cache's format, on every backend.

use std::collections::HashMap;
use std::sync::Arc;

use super::table::CalibrationTable;
use crate::model::Model;
use crate::{Error, Result};

/// Most doublings between a component's scale and the mean of its head.
const MOST: f32 = 12.0;

/// What a tensor is multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    /// Each row, or each element of a vector.
    Rows(Arc<Vec<f32>>),
    /// Each column.
    Columns(Arc<Vec<f32>>),
}

/// The tensors that take up scales, by name.
pub(super) fn kv_scales(model: &Model, table: &CalibrationTable) -> Result<HashMap<String, Scaling>> {
    let text = &model.text;
    let (heads, kv_heads, d) = (text.num_attention_heads, text.num_key_value_heads, text.head_dim);
    let mut scalings = HashMap::new();
    for i in 0..text.num_hidden_layers {
        let block = format!("model.language_model.layers.{i}.self_attn");
        let scales = |state: &str, pairs: usize| -> Result<Vec<f32>> {
            let name = format!("{block}.{state}");
            let Some((least, most)) = table.channel_ranges(&name, kv_heads * d)? else {
                let what = format!("it has no ranges of the cache `{name}`: run `calibrate` again");
                return Err(Error::Calibration { path: table.path().to_owned(), what });
            };
            let sizes: Vec<f32> = least.iter().zip(&most).map(|(a, b)| a.abs().max(b.abs())).collect();
            Ok(sizes.chunks_exact(d.max(1)).flat_map(|head| of_head(head, pairs)).collect())
        };
        let (k, v) = (scales("k", text.rotary_dim / 2)?, scales("v", 0)?);
        // Query head `h` meets the key head `h / (heads / kv_heads)`.
        let spread = |s: &[f32]| -> Vec<f32> {
            let of =
                |h: usize| s.get(h / (heads / kv_heads).max(1) * d..).into_iter().flatten().take(d).copied();
            (0..heads).flat_map(of).collect()
        };
        let inverse = |s: &[f32]| Arc::new(s.iter().map(|s| 1.0 / s).collect::<Vec<f32>>());
        let (q, o) = (Arc::new(spread(&k)), Arc::new(spread(&v)));
        for (name, rows) in [("q_proj", q), ("k_proj", inverse(&k)), ("v_proj", inverse(&v))] {
            for part in ["weight", "bias"] {
                scalings.insert(format!("{block}.{name}.{part}"), Scaling::Rows(rows.clone()));
            }
        }
        scalings.insert(format!("{block}.o_proj.weight"), Scaling::Columns(o));
    }
    Ok(scalings)
}

/// Powers of two near the sizes of a head's components, relative to their geometric mean; the first `pairs` pairs of
/// neighbours share theirs.
fn of_head(sizes: &[f32], pairs: usize) -> Vec<f32> {
    let mut sizes = sizes.to_vec();
    for pair in sizes.chunks_exact_mut(2).take(pairs) {
        let most = pair.iter().copied().fold(0.0, f32::max);
        pair.fill(most);
    }
    let logs: Vec<Option<f32>> =
        sizes.iter().map(|&s| (s > 0.0 && s.is_finite()).then(|| s.log2())).collect();
    let known = logs.iter().flatten().count().max(1);
    let mean = logs.iter().flatten().sum::<f32>() / known as f32;
    logs.iter().map(|log| log.map_or(1.0, |log| (log - mean).round().clamp(-MOST, MOST).exp2())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_around_the_mean_and_pairs_share_them() {
        assert_eq!(of_head(&[1.0, 4.0, 1.0, 4.0], 0), [0.5, 2.0, 0.5, 2.0]);
        assert_eq!(of_head(&[1.0, 8.0, 0.5, 8.0], 1), [2.0, 2.0, 0.125, 2.0]);
        assert_eq!(of_head(&[0.0, 0.0], 1), [1.0, 1.0]);
        assert_eq!(of_head(&[1e-30, 1e30], 0), [1.0 / 4096.0, 4096.0]);
    }
}
