//! Calibrated scales of the KV cache, folded into the weights around it.
//!
//! A cache stores one scale for a head and token (or for 32 components of it), so a component that is often large costs
//! the others their precision. Dividing component `c` of a head's keys by `s_c` and multiplying the queries' by it
//! changes no score; likewise for values and the columns of `o_proj`. Rotation mixes the two of a pair, so these share a
//! scale. Scales are powers of two: the fold loses nothing in any floating-point type, and runs at no cost, whatever the
//! cache's format, on every backend.
//!
//! Scales help where a few components are large, and harm where all are alike, since a small code is then multiplied
//! with more than it was divided by. So each head's are tried on rows that calibration kept: they are stored in every
//! format with and without scales, and what they lose is weighed by what meets them, the mean squares of the queries'
//! components or the columns of `o_proj`. A head whose loss does not fall in every format keeps its components.

use std::collections::HashMap;
use std::sync::Arc;

use pocketglm_tensor::ops::kv_store;
use pocketglm_tensor::{Cpu, KvFormat, KvRows, WeightSource};

use super::convert::sample_rows;
use super::subject::Subject;
use super::table::CalibrationTable;
use crate::model::Model;
use crate::{Error, Result};

/// Most doublings between a component's scale and the mean of its head.
const MOST: f32 = 12.0;
/// Exponents of the components' sizes that are tried; 0 is no scale.
const POWERS: [f32; 4] = [0.25, 0.5, 0.75, 1.0];
/// The formats that scales are tried with.
const FORMATS: [KvFormat; 2] = [KvFormat::Int8, KvFormat::Int4];
/// The part of the loss without scales that has to be undercut: what is less may be chance.
const GAIN: f64 = 0.95;

/// What a tensor is multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    /// Each row, or each element of a vector.
    Rows(Arc<Vec<f32>>),
    /// Each column.
    Columns(Arc<Vec<f32>>),
}

/// Keys or values of one layer as calibration saw them.
struct Seen<'a> {
    /// `[n, heads, d]`.
    rows: &'a [f32],
    /// The largest magnitude of each component, `[heads, d]`.
    sizes: &'a [f32],
    /// What the squared loss of a component counts, `[heads, d]`.
    weights: &'a [f32],
    d: usize,
    /// Pairs of a head that rotation mixes.
    pairs: usize,
}

/// The tensors that take up scales, by name. Values that are `rotated` get none: their components are alike.
pub(super) fn kv_scales(
    cpu: &Cpu,
    model: &Model,
    table: &CalibrationTable,
    rotated: bool,
) -> Result<HashMap<String, Scaling>> {
    let text = &model.text;
    let (heads, kv_heads, d) = (text.num_attention_heads, text.num_key_value_heads, text.head_dim);
    let group = (heads / kv_heads.max(1)).max(1);
    // Query head `h` meets the key head `h / group`.
    let spread = |s: &[f32]| -> Vec<f32> {
        (0..heads).flat_map(|h| s.get(h / group * d..).into_iter().flatten().take(d).copied()).collect()
    };
    let gather = |of_queries: &[f32]| -> Vec<f32> {
        let sum =
            |at: usize| (0..group).filter_map(|g| of_queries.get((at / d * group + g) * d + at % d)).sum();
        (0..kv_heads * d).map(sum).collect()
    };
    let mut scalings = HashMap::new();
    for i in 0..text.num_hidden_layers {
        let block = format!("model.language_model.layers.{i}.self_attn");
        let lacks = |what: &str| {
            let what = format!("it has no {what} of layer {i}: run `calibrate` again");
            Error::Calibration { path: table.path().to_owned(), what }
        };
        let scales = |state: &str, weights: &[f32], pairs: usize| -> Result<Vec<f32>> {
            let name = format!("{block}.{state}");
            let ranges = table.channel_ranges(&name, kv_heads * d)?;
            let (least, most) = ranges.ok_or_else(|| lacks("ranges of the cache"))?;
            let sizes: Vec<f32> = least.iter().zip(&most).map(|(a, b)| a.abs().max(b.abs())).collect();
            let rows = table.rows(&name, kv_heads * d)?.ok_or_else(|| lacks("rows of the cache"))?;
            choose(cpu, &Seen { rows: &rows, sizes: &sizes, weights, d, pairs })
        };
        let queries = table.mean_squares(&format!("{block}.q"), heads * d)?;
        let k = scales("k", &gather(&queries.ok_or_else(|| lacks("queries"))?), text.rotary_dim / 2)?;
        let inverse = |s: &[f32]| Arc::new(s.iter().map(|s| 1.0 / s).collect::<Vec<f32>>());
        let mut rows = |linear: &str, scales: Arc<Vec<f32>>| {
            for part in ["weight", "bias"] {
                scalings.insert(format!("{block}.{linear}.{part}"), Scaling::Rows(scales.clone()));
            }
        };
        if k.iter().any(|&s| s != 1.0) {
            rows("q_proj", Arc::new(spread(&k)));
            rows("k_proj", inverse(&k));
        }
        if rotated {
            continue;
        }
        let output = format!("{block}.o_proj.weight");
        let mut columns = vec![0.0; heads * d];
        let failed = |row, source| Error::Quantise {
            place: Subject::Model(model).place(&output),
            tensor: output.clone(),
            row,
            source: Box::new(source),
        };
        for row in sample_rows(&model.weights.tensor(&output)?, &failed)?.chunks_exact((heads * d).max(1)) {
            columns.iter_mut().zip(row).for_each(|(sum, w)| *sum += w * w);
        }
        let v = scales("v", &gather(&columns), 0)?;
        if v.iter().any(|&s| s != 1.0) {
            rows("v_proj", inverse(&v));
            scalings.insert(output, Scaling::Columns(Arc::new(spread(&v))));
        }
    }
    Ok(scalings)
}

/// The scales of all heads; ones for a head that is better off without.
fn choose(cpu: &Cpu, seen: &Seen<'_>) -> Result<Vec<f32>> {
    let mut best = vec![1.0; seen.sizes.len()];
    let without = losses(cpu, seen, &best)?;
    // As a part of what is lost without, summed over the formats.
    let mut least = vec![GAIN * FORMATS.len() as f64; seen.sizes.len() / seen.d.max(1)];
    for power in POWERS {
        let heads = seen.sizes.chunks_exact(seen.d.max(1));
        let scales: Vec<f32> = heads.flat_map(|head| of_head(head, seen.pairs, power)).collect();
        let with = losses(cpu, seen, &scales)?;
        for (head, least) in least.iter_mut().enumerate() {
            let part = |(with, without): (&Vec<f64>, &Vec<f64>)| {
                Some(with.get(head)? / without.get(head)?.max(f64::MIN_POSITIVE))
            };
            let parts: Vec<f64> = with.iter().zip(&without).filter_map(part).collect();
            let sum = parts.iter().sum::<f64>();
            if parts.iter().all(|&part| part < 1.0) && sum < *least {
                *least = sum;
                let range = head * seen.d..(head + 1) * seen.d;
                let (to, from) = (best.get_mut(range.clone()), scales.get(range));
                to.into_iter().flatten().zip(from.into_iter().flatten()).for_each(|(to, from)| *to = *from);
            }
        }
    }
    Ok(best)
}

/// What each head loses in each format where its components are divided by scales before they are stored and multiplied
/// afterwards: the weighed sum of squared differences.
fn losses(cpu: &Cpu, seen: &Seen<'_>, scales: &[f32]) -> Result<Vec<Vec<f64>>> {
    let (width, d) = (scales.len().max(1), seen.d.max(1));
    let (n, heads) = (seen.rows.len() / width, width / d);
    let scaled: Vec<f32> =
        seen.rows.chunks_exact(width).flat_map(|row| row.iter().zip(scales).map(|(x, s)| x / s)).collect();
    let of = |format: KvFormat| -> Result<Vec<f64>> {
        let row_bytes = format.head_bytes(d).unwrap_or(0) * heads;
        let mut stored = vec![0; n * row_bytes];
        kv_store(cpu, &scaled, width, [n, heads, d], format, &mut stored)?;
        let (read, mut found) = (KvRows::new(format, &stored, row_bytes), vec![0.0; d]);
        let mut sums = vec![0.0; heads];
        for (i, row) in scaled.chunks_exact(width).enumerate() {
            let weighed = scales.chunks_exact(d).zip(seen.weights.chunks_exact(d));
            for (head, ((sum, row), (scales, weights))) in
                sums.iter_mut().zip(row.chunks_exact(d)).zip(weighed).enumerate()
            {
                read.head(i, head, &mut found);
                for ((x, found), (s, w)) in row.iter().zip(&found).zip(scales.iter().zip(weights)) {
                    *sum += f64::from(*w) * f64::from((x - found) * s).powi(2);
                }
            }
        }
        Ok(sums)
    };
    FORMATS.into_iter().map(of).collect()
}

/// Powers of two near a power of the sizes of a head's components, relative to their geometric mean; the first `pairs`
/// pairs of neighbours share theirs.
fn of_head(sizes: &[f32], pairs: usize, power: f32) -> Vec<f32> {
    let mut sizes = sizes.to_vec();
    for pair in sizes.chunks_exact_mut(2).take(pairs) {
        let most = pair.iter().copied().fold(0.0, f32::max);
        pair.fill(most);
    }
    let logs: Vec<Option<f32>> =
        sizes.iter().map(|&s| (s > 0.0 && s.is_finite()).then(|| s.log2())).collect();
    let known = logs.iter().flatten().count().max(1);
    let mean = logs.iter().flatten().sum::<f32>() / known as f32;
    let scale = |log: f32| (power * (log - mean)).round().clamp(-MOST, MOST).exp2();
    logs.iter().map(|log| log.map_or(1.0, scale)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_around_the_mean_and_pairs_share_them() {
        assert_eq!(of_head(&[1.0, 4.0, 1.0, 4.0], 0, 1.0), [0.5, 2.0, 0.5, 2.0]);
        assert_eq!(of_head(&[1.0, 16.0, 1.0, 16.0], 0, 0.5), [0.5, 2.0, 0.5, 2.0]);
        assert_eq!(of_head(&[1.0, 8.0, 0.5, 8.0], 1, 1.0), [2.0, 2.0, 0.125, 2.0]);
        assert_eq!(of_head(&[0.0, 0.0], 1, 1.0), [1.0, 1.0]);
        assert_eq!(of_head(&[1e-30, 1e30], 0, 1.0), [1.0 / 4096.0, 4096.0]);
    }

    #[test]
    fn a_head_gets_scales_where_its_loss_falls_and_none_where_components_are_alike() {
        let (n, d) = (64, 32);
        let cpu = Cpu::new(1).unwrap();
        // Values of one size in the first head; in the second, four components are a hundred times as large.
        let large = |c: usize| if c >= d && c % 8 == 3 { 100.0 } else { 1.0 };
        let at = |i: usize| ((i * 7919 + i / 7 * 31) % 257) as f32 / 128.0 - 1.0;
        let rows: Vec<f32> = (0..n * 2 * d).map(|i| at(i) * large(i % (2 * d))).collect();
        let mut sizes = vec![0.0f32; 2 * d];
        for row in rows.chunks_exact(2 * d) {
            sizes.iter_mut().zip(row).for_each(|(size, x)| *size = size.max(x.abs()));
        }
        let weights: Vec<f32> = (0..2 * d).map(|c| 1.0 / (large(c) * large(c))).collect();
        let seen = Seen { rows: &rows, sizes: &sizes, weights: &weights, d, pairs: d / 4 };
        let found = choose(&cpu, &seen).unwrap();
        assert!(found[..d].iter().all(|&s| s == 1.0), "{found:?}");
        assert!(found[d + 3] >= 8.0 * found[d], "{found:?}");
        let (without, with) =
            (losses(&cpu, &seen, &[1.0; 64]).unwrap(), losses(&cpu, &seen, &found).unwrap());
        for (without, with) in without.iter().zip(&with) {
            assert!(with[0] == without[0] && with[1] < 0.1 * without[1], "{without:?} {with:?}");
        }
    }
}
