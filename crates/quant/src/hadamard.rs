//! Offline rotation by Hadamard matrices: outliers are spread over many channels, which quantise better.
//!
//! A rotation is `x' = H D x` with `D` a diagonal of signs and `H` symmetric and orthogonal, so that
//! `W x = (W D H) (H D x)`: rotating the inputs of `W` and its activations changes nothing but rounding.

use crate::{Error, Result};

const OP: &str = "hadamard";

/// The Walsh-Hadamard transform of a power of two of values in place, scaled to be orthogonal (its own inverse).
///
/// # Errors
/// [`Error::Value`] where the length is no power of two.
pub fn hadamard_transform(x: &mut [f32]) -> Result<()> {
    if !x.len().is_power_of_two() {
        return Err(Error::Value {
            op: OP,
            what: format!("expected a power of two of values, found {}", x.len()),
        });
    }
    transform(x, 1);
    Ok(())
}

/// Transforms along the first dimension of `[power of two, width]`.
fn transform(x: &mut [f32], width: usize) {
    let n = x.len() / width.max(1);
    let mut half = width;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (n as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= scale);
}

/// A rotation of vectors of some length: Hadamard matrices along the diagonal, after signs.
#[derive(Clone, PartialEq, Debug)]
pub struct Rotation {
    block: usize,
    signs: Vec<f32>,
}

impl Rotation {
    /// For vectors of `k` values. Blocks have the largest power of two that divides `k` (all of `k` where it is one),
    /// and at most `largest`. `seed` picks the signs; `None`: no signs.
    ///
    /// # Errors
    /// [`Error::Value`] where `k` or `largest` is 0.
    pub fn new(k: usize, largest: usize, seed: Option<u64>) -> Result<Rotation> {
        if k == 0 || largest == 0 {
            let what =
                format!("expected at least one value in a block of at least one, found {k} and {largest}");
            return Err(Error::Value { op: OP, what });
        }
        let block = (1 << k.trailing_zeros()).min(1 << largest.ilog2());
        let mut state = seed.unwrap_or(0);
        let signs = (0..k).map(|_| match seed {
            None => 1.0,
            Some(_) => {
                // A step of splitmix64.
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                if z >> 63 == 0 { 1.0 } else { -1.0 }
            }
        });
        Ok(Rotation { block, signs: signs.collect() })
    }

    /// Values of a vector.
    pub fn values(&self) -> usize {
        self.signs.len()
    }

    /// Values that are mixed with each other.
    pub fn block(&self) -> usize {
        self.block
    }

    fn check(&self, operand: &'static str, unit: usize, found: usize) -> Result<()> {
        if unit == 0 || !found.is_multiple_of(unit) {
            return Err(Error::Size { op: OP, operand, wanted: unit, found });
        }
        Ok(())
    }

    /// `x' = H D x` for each row: activations, biases of rotated outputs, and, since `H` and `D` are symmetric, the
    /// rows of weights whose inputs are rotated (`W' = W D H`).
    ///
    /// # Errors
    /// [`Error::Size`] where these are no whole rows.
    pub fn rotate_rows(&self, rows: &mut [f32]) -> Result<()> {
        self.check("rows", self.values(), rows.len())?;
        for row in rows.chunks_exact_mut(self.values()) {
            row.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
            row.chunks_exact_mut(self.block).for_each(|block| transform(block, 1));
        }
        Ok(())
    }

    /// The inverse of [`rotate_rows`](Self::rotate_rows): `x = D H x'`.
    ///
    /// # Errors
    /// [`Error::Size`] where these are no whole rows.
    pub fn restore_rows(&self, rows: &mut [f32]) -> Result<()> {
        self.check("rows", self.values(), rows.len())?;
        for row in rows.chunks_exact_mut(self.values()) {
            row.chunks_exact_mut(self.block).for_each(|block| transform(block, 1));
            row.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
        }
        Ok(())
    }

    /// `W' = H D W` for `weights: [self.values(), k]`: the linear then gives rotated outputs.
    ///
    /// # Errors
    /// [`Error::Size`] where the weights do not have that shape.
    pub fn rotate_outputs(&self, weights: &mut [f32], k: usize) -> Result<()> {
        if self.values().checked_mul(k) != Some(weights.len()) || k == 0 {
            let wanted = self.values().saturating_mul(k);
            return Err(Error::Size { op: OP, operand: "weights", wanted, found: weights.len() });
        }
        for (row, &sign) in weights.chunks_exact_mut(k).zip(&self.signs) {
            row.iter_mut().for_each(|w| *w *= sign);
        }
        weights.chunks_exact_mut(self.block * k).for_each(|block| transform(block, k));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::{Affine, DType, Group};

    use super::*;
    use crate::report::ErrorMeter;
    use crate::tests::Random;
    use crate::{RowOptions, quantise_row};

    fn product(w: &[f32], x: &[f32]) -> Vec<f64> {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        w.chunks_exact(x.len()).map(dot).collect()
    }

    #[test]
    fn the_transform_is_sylvesters_matrix_scaled() {
        for n in [1usize, 2, 8, 64] {
            for column in 0..n {
                let mut x = vec![0.0; n];
                x[column] = 1.0;
                hadamard_transform(&mut x).unwrap();
                for (row, &found) in x.iter().enumerate() {
                    let sign = if (row & column).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert!((found - sign / (n as f32).sqrt()).abs() < 1e-6);
                }
            }
        }
        assert!(hadamard_transform(&mut [0.0; 12]).is_err());
        assert!(hadamard_transform(&mut []).is_err());
    }

    #[test]
    fn rotating_both_sides_changes_no_product() {
        for (n, k, block) in [(96, 64, 64), (64, 107 * 8, 8), (7, 5, 1)] {
            let mut random = Random(k as u64);
            let (w, x) = (random.gaussian(n * k), random.gaussian(k));
            let plain = product(&w, &x);
            let inputs = Rotation::new(k, 4096, Some(7)).unwrap();
            assert_eq!((inputs.block(), inputs.values()), (block, k));
            let (mut rotated_w, mut rotated_x) = (w.clone(), x.clone());
            inputs.rotate_rows(&mut rotated_w).unwrap();
            inputs.rotate_rows(&mut rotated_x).unwrap();
            if block > 1 {
                assert_ne!(rotated_x, x);
            }
            let outputs = Rotation::new(n, 16, Some(8)).unwrap();
            outputs.rotate_outputs(&mut rotated_w, k).unwrap();
            let mut found: Vec<f32> = product(&rotated_w, &rotated_x).iter().map(|&y| y as f32).collect();
            outputs.restore_rows(&mut found).unwrap();
            for (found, wanted) in found.iter().zip(&plain) {
                assert!((f64::from(*found) - wanted).abs() < 1e-3, "{found} {wanted}");
            }
            inputs.restore_rows(&mut rotated_x).unwrap();
            assert!(rotated_x.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn rotation_makes_weights_with_outlier_channels_quantise_better() {
        let (n, k) = (64, 512);
        let mut w = Random(1).gaussian(n * k);
        for row in w.chunks_exact_mut(k) {
            row.iter_mut().step_by(37).for_each(|w| *w *= 20.0);
        }
        let dtype = DType::Affine(Affine::new(4, Group::G128, true).unwrap());
        let sqnr = |w: &[f32]| {
            let mut bytes = Vec::new();
            for row in w.chunks_exact(k) {
                quantise_row(dtype, row, &RowOptions::default(), &mut bytes).unwrap();
            }
            let mut meter = ErrorMeter::default();
            meter.add(w, k, dtype, &bytes).unwrap();
            meter.report().sqnr_db
        };
        let plain = sqnr(&w);
        Rotation::new(k, k, Some(3)).unwrap().rotate_rows(&mut w).unwrap();
        let rotated = sqnr(&w);
        println!("{plain:.1} dB, rotated {rotated:.1} dB");
        assert!(rotated > plain + 3.0, "{plain} {rotated}");
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let rotation = Rotation::new(8, 8, None).unwrap();
        assert!(matches!(rotation.rotate_rows(&mut [0.0; 9]), Err(Error::Size { .. })));
        assert!(matches!(rotation.rotate_outputs(&mut [0.0; 9], 1), Err(Error::Size { .. })));
        assert!(matches!(Rotation::new(0, 1, None), Err(Error::Value { .. })));
    }
}
