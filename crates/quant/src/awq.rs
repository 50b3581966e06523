//! Activation-aware scaling: input channels with large activations get larger weights before rounding.
//!
//! With scales `s`, `W x = (W diag(s)) (x / s)`: the caller multiplies the columns of all linears that share an input
//! and divides what produces the input (a norm's weight, the rows of the linear before). Rounding then loses less in
//! the channels that matter. The scales are `(mean |x|)^alpha`, with the `alpha` that loses least.
//!
//! Source: Lin et al., "AWQ" (arXiv 2306.00978).

use std::sync::Mutex;

use pocketglm_tensor::ops::{MatmulB, matmul};
use pocketglm_tensor::{Cpu, DType};

use crate::factor::zeros;
use crate::quantise::{check_finite, check_importance};
use crate::{Error, Method, Result, RowOptions, dequantise_row, quantise_row};

const OP: &str = "awq";

/// What is known of the inputs' second moments; any positive factor is the same.
#[derive(Clone, Copy, Debug)]
pub enum Moments<'a> {
    /// The mean or sum of `x^2` of each of the `k` channels: errors of different channels count as independent.
    Diagonal(&'a [f32]),
    /// The mean or sum of `x x^T`, `[k, k]`: the outputs' error is measured as it is.
    Full(&'a [f32]),
}

/// A linear that uses the input.
#[derive(Clone, Copy, Debug)]
pub struct AwqLinear<'a> {
    /// `[n, k]`.
    pub weights: &'a [f32],
    /// What the weights will be stored as.
    pub dtype: DType,
}

/// Options of [`awq`].
#[derive(Clone, Copy, Debug)]
pub struct AwqOptions {
    /// Values of `alpha` tried besides 0: `1 / steps` to 1.
    pub steps: usize,
    /// Rows of each linear that are looked at, evenly spread.
    pub rows: usize,
    /// How the weights will be quantised; a search weighs errors by the scaled input's second moments.
    pub method: Method,
}

impl Default for AwqOptions {
    fn default() -> AwqOptions {
        AwqOptions { steps: 20, rows: 256, method: Method::Round }
    }
}

/// The scales that lose least.
#[derive(Clone, PartialEq, Debug)]
pub struct AwqScales {
    /// `s`, one positive number per input channel: all 1 where no scaling is best.
    pub scales: Vec<f32>,
    /// The exponent.
    pub alpha: f32,
    /// The outputs' squared error over the rows looked at, with the scales.
    pub error: f64,
    /// The same without scales.
    pub unscaled_error: f64,
}

/// Searches `alpha` for linears over an input of `k` channels with these mean magnitudes.
///
/// # Errors
/// [`Error::Size`] where operands do not fit `mean_abs`, [`Error::NotFinite`] for NaN and infinities,
/// [`Error::Value`] for zero rows, and as [`quantise_row`].
pub fn awq(
    cpu: &Cpu,
    linears: &[AwqLinear<'_>],
    mean_abs: &[f32],
    moments: Moments<'_>,
    options: &AwqOptions,
) -> Result<AwqScales> {
    let k = mean_abs.len();
    check_importance(mean_abs, k)?;
    if k == 0 || options.rows == 0 {
        let what = format!("expected at least one channel and one row, found {k} and {}", options.rows);
        return Err(Error::Value { op: OP, what });
    }
    let diagonal: Vec<f32> = match moments {
        Moments::Diagonal(d) => d.to_vec(),
        Moments::Full(h) => {
            if k.checked_mul(k) != Some(h.len()) {
                let wanted = k.saturating_mul(k);
                return Err(Error::Size { op: OP, operand: "second moments", wanted, found: h.len() });
            }
            check_finite("second moments", h)?;
            (0..k).map(|i| h[i * k + i]).collect()
        }
    };
    check_importance(&diagonal, k)?;
    let mut samples = Vec::new();
    for linear in linears {
        if !linear.weights.len().is_multiple_of(k) {
            let found = linear.weights.len();
            return Err(Error::Size { op: OP, operand: "weights", wanted: k, found });
        }
        check_finite("weights", linear.weights)?;
        let n = linear.weights.len() / k;
        let count = n.min(options.rows);
        let mut rows = zeros(count * k, "sampled weights")?;
        for (i, row) in rows.chunks_exact_mut(k).enumerate() {
            // Evenly over all rows; `i * n` is below the number of weights times the sample.
            let source = (i as u128 * n as u128 / count as u128) as usize;
            row.copy_from_slice(&linear.weights[source * k..(source + 1) * k]);
        }
        samples.push((linear.dtype, rows));
    }

    let measure = |scales: &[f32]| -> Result<f64> {
        let mut total = 0.0;
        for (dtype, rows) in &samples {
            total += loss(cpu, *dtype, rows, scales, &diagonal, moments, options.method)?;
        }
        Ok(total)
    };
    let ones = vec![1.0; k];
    let unscaled_error = measure(&ones)?;
    let mut best = AwqScales { scales: ones, alpha: 0.0, error: unscaled_error, unscaled_error };
    for step in 1..=options.steps {
        let alpha = step as f32 / options.steps as f32;
        let scales = power(mean_abs, alpha);
        let error = measure(&scales)?;
        if error < best.error {
            best = AwqScales { scales, alpha, error, ..best };
        }
    }
    Ok(best)
}

/// `mean_abs^alpha`, scaled so that the smallest and the largest are each other's inverse.
fn power(mean_abs: &[f32], alpha: f32) -> Vec<f32> {
    let mean = mean_abs.iter().map(|&m| f64::from(m)).sum::<f64>() / mean_abs.len() as f64;
    if mean == 0.0 {
        return vec![1.0; mean_abs.len()];
    }
    // A channel that is never used must not be divided by nothing, nor blow up its weights.
    let raw: Vec<f64> =
        mean_abs.iter().map(|&m| (f64::from(m) / mean).max(1e-4).powf(f64::from(alpha))).collect();
    let (least, most) = raw.iter().fold((f64::MAX, f64::MIN), |(a, b), &s| (a.min(s), b.max(s)));
    let middle = (least * most).sqrt();
    raw.iter().map(|s| (s / middle) as f32).collect()
}

/// The outputs' squared error for `rows: [n, k]` with these scales.
fn loss(
    cpu: &Cpu,
    dtype: DType,
    rows: &[f32],
    scales: &[f32],
    diagonal: &[f32],
    moments: Moments<'_>,
    method: Method,
) -> Result<f64> {
    let k = scales.len();
    let importance: Vec<f32> = diagonal.iter().zip(scales).map(|(d, s)| d / (s * s)).collect();
    let options = RowOptions { method, importance: Some(&importance), ..RowOptions::default() };
    let mut errors = zeros(rows.len(), "rounding errors")?;
    let per_task = (rows.len() / k).div_ceil(cpu.threads() * 4).max(1) * k;
    let tasks: Vec<_> = errors.chunks_mut(per_task).zip(rows.chunks(per_task)).map(Mutex::new).collect();
    let failure = Mutex::new(None);
    cpu.parallel(tasks.len(), &|task| {
        let Ok(mut part) = tasks[task].lock() else { return };
        let (errors, rows) = &mut *part;
        let (mut scaled, mut bytes) = (vec![0.0; k], Vec::new());
        for (errors, row) in errors.chunks_exact_mut(k).zip(rows.chunks_exact(k)) {
            scaled.iter_mut().zip(row).zip(scales).for_each(|((y, w), s)| *y = w * s);
            bytes.clear();
            let done = quantise_row(dtype, &scaled, &options, &mut bytes)
                .and_then(|()| dequantise_row(dtype, &bytes, &mut scaled));
            if let Err(error) = done {
                failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                return;
            }
            for (((e, w), q), s) in errors.iter_mut().zip(row).zip(&scaled).zip(scales) {
                *e = w - q / s;
            }
        }
    });
    drop(tasks);
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error);
    }
    match moments {
        Moments::Diagonal(_) => Ok(errors
            .chunks_exact(k)
            .flat_map(|row| row.iter().zip(diagonal))
            .map(|(&e, &d)| f64::from(d) * f64::from(e) * f64::from(e))
            .sum()),
        Moments::Full(h) => {
            let mut product = zeros(errors.len(), "outputs' errors")?;
            let shape = [1, errors.len() / k, k, k];
            matmul(cpu, &errors, h, MatmulB::Normal, shape, &mut product)?;
            Ok(errors.iter().zip(&product).map(|(&e, &p)| f64::from(e) * f64::from(p)).sum())
        }
    }
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::{Affine, Block, Group};

    use super::*;
    use crate::stats::ChannelStats;
    use crate::tests::{Random, correlated_inputs, output_error_of_values};

    fn quantised_values(weights: &[f32], dtype: DType, scales: &[f32]) -> Vec<f32> {
        let k = scales.len();
        let mut out = Vec::new();
        for row in weights.chunks_exact(k) {
            let scaled: Vec<f32> = row.iter().zip(scales).map(|(w, s)| w * s).collect();
            let mut bytes = Vec::new();
            quantise_row(dtype, &scaled, &RowOptions::default(), &mut bytes).unwrap();
            let mut values = vec![0.0; k];
            dequantise_row(dtype, &bytes, &mut values).unwrap();
            out.extend(values.iter().zip(scales).map(|(q, s)| q / s));
        }
        out
    }

    #[test]
    fn scaling_beats_rounding_in_the_outputs_error() {
        let cpu = Cpu::new(2).unwrap();
        let k = 256;
        let mut x = correlated_inputs(300, k, 21);
        // A few channels with large activations, as transformers have.
        x.chunks_exact_mut(k).for_each(|row| row.iter_mut().step_by(41).for_each(|x| *x *= 15.0));
        let mut stats = ChannelStats::new(k, true).unwrap();
        stats.add(&cpu, &x).unwrap();
        let (mean_abs, squares) = (stats.mean_abs(), stats.mean_squares());
        let (a, b) = (Random(22).gaussian(40 * k), Random(23).gaussian(24 * k));
        for dtype in [
            DType::Affine(Affine::new(4, Group::G64, true).unwrap()),
            DType::Affine(Affine::new(2, Group::G32, false).unwrap()),
            DType::Block(Block::Q4_0),
        ] {
            let linears = [&a, &b].map(|w| AwqLinear { weights: w, dtype });
            let full = Moments::Full(stats.second_moments.as_ref().unwrap());
            for moments in [Moments::Diagonal(&squares), full] {
                let found = awq(&cpu, &linears, &mean_abs, moments, &AwqOptions::default()).unwrap();
                assert!(found.error < found.unscaled_error && found.alpha > 0.0);
                assert!(found.scales.iter().all(|s| s.is_finite() && *s > 0.0));
                let error = |scales: &[f32]| -> f64 {
                    [&a, &b]
                        .map(|w| output_error_of_values(w, &quantised_values(w, dtype, scales), &x, k))
                        .iter()
                        .sum()
                };
                let (plain, scaled) = (error(&vec![1.0; k]), error(&found.scales));
                println!("{dtype}: alpha {}, {:.3} of rounding", found.alpha, scaled / plain);
                assert!(scaled < 0.85 * plain, "{dtype}: {scaled} {plain}");
                if let Moments::Full(_) = moments {
                    // All rows were looked at, so the measure is the error itself.
                    assert!((found.error / scaled - 1.0).abs() < 1e-2, "{} {scaled}", found.error);
                }
            }
        }
    }

    #[test]
    fn equal_channels_need_no_scales() {
        let cpu = Cpu::new(1).unwrap();
        let k = 64;
        let weights = Random(1).gaussian(8 * k);
        let linears = [AwqLinear { weights: &weights, dtype: DType::Block(Block::Q4_0) }];
        for same in [0.0, 2.0] {
            let (mean, squares) = (vec![same; k], vec![1.0; k]);
            let found =
                awq(&cpu, &linears, &mean, Moments::Diagonal(&squares), &AwqOptions::default()).unwrap();
            assert_eq!((found.alpha, &found.scales), (0.0, &vec![1.0; k]));
        }
    }

    #[test]
    fn bad_operands_are_errors() {
        let cpu = Cpu::new(1).unwrap();
        let run = |weights: &[f32], mean: &[f32], moments: Moments<'_>, options: AwqOptions| {
            let linears = [AwqLinear { weights, dtype: DType::Block(Block::Q4_0) }];
            awq(&cpu, &linears, mean, moments, &options).unwrap_err()
        };
        let (w, m) = ([0.5; 64], [1.0; 32]);
        let options = AwqOptions::default();
        let diagonal = Moments::Diagonal(&m);
        assert!(matches!(run(&w[1..], &m, diagonal, options), Error::Size { .. }));
        assert!(matches!(run(&w, &m, Moments::Diagonal(&m[1..]), options), Error::Size { .. }));
        assert!(matches!(run(&w, &m, Moments::Full(&m), options), Error::Size { .. }));
        assert!(matches!(run(&w, &[f32::NAN; 32], diagonal, options), Error::NotFinite { .. }));
        assert!(matches!(run(&[f32::NAN; 32], &m, diagonal, options), Error::NotFinite { .. }));
        assert!(matches!(run(&w, &m, diagonal, AwqOptions { rows: 0, ..options }), Error::Value { .. }));
        assert!(matches!(run(&w, &m[..31], diagonal, options), Error::Size { .. }));
    }
}
