//! What a linear's input looks like: the statistics that calibration gathers.

use pocketglm_tensor::Cpu;
use pocketglm_tensor::ops::{MatmulB, matmul};

use crate::factor::zeros;
use crate::quantise::check_finite;
use crate::{Error, Result};

const OP: &str = "channel statistics";
/// Rows of the matrix of second moments that one product updates.
const STRIPE: usize = 512;

/// Sums over the rows of activations that a linear saw, per channel. Sums, so that parts can be [merged](Self::merge).
#[derive(Clone, PartialEq, Debug)]
pub struct ChannelStats {
    /// Rows seen.
    pub rows: u64,
    /// Smallest value of each channel; infinity before the first row.
    pub min: Vec<f32>,
    /// Largest value of each channel; minus infinity before the first row.
    pub max: Vec<f32>,
    /// Sum of magnitudes.
    pub sum_abs: Vec<f64>,
    /// Sum of squares.
    pub sum_squares: Vec<f64>,
    /// The sum of `x x^T`, row-major `[k, k]`, where it was asked for.
    pub second_moments: Option<Vec<f32>>,
}

impl ChannelStats {
    /// For rows of `k` channels; with `full` the `[k, k]` matrix as well.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the matrix does not fit.
    pub fn new(k: usize, full: bool) -> Result<ChannelStats> {
        let second_moments = match full {
            true => {
                let n = k.checked_mul(k).ok_or(Error::OutOfMemory { elements: usize::MAX, what: OP })?;
                Some(zeros(n, "the matrix of second moments")?)
            }
            false => None,
        };
        Ok(ChannelStats {
            rows: 0,
            min: vec![f32::INFINITY; k],
            max: vec![f32::NEG_INFINITY; k],
            sum_abs: vec![0.0; k],
            sum_squares: vec![0.0; k],
            second_moments,
        })
    }

    /// Channels.
    pub fn channels(&self) -> usize {
        self.min.len()
    }

    /// Takes in rows of `k` activations each.
    ///
    /// # Errors
    /// [`Error::Size`] where these are no whole rows, [`Error::NotFinite`] naming the first NaN or infinity;
    /// the statistics are then as before.
    pub fn add(&mut self, cpu: &Cpu, rows: &[f32]) -> Result<()> {
        let k = self.channels();
        if k == 0 || !rows.len().is_multiple_of(k) {
            return Err(Error::Size { op: OP, operand: "activations", wanted: k, found: rows.len() });
        }
        check_finite("activations", rows)?;
        let count = rows.len() / k;
        if let Some(moments) = self.second_moments.as_mut().filter(|_| count > 0) {
            let mut transposed = zeros(rows.len(), "transposed activations")?;
            for (r, row) in rows.chunks_exact(k).enumerate() {
                for (c, &x) in row.iter().enumerate() {
                    transposed[c * count + r] = x;
                }
            }
            let mut products = zeros(STRIPE.min(k) * k, "products of activations")?;
            for (left, moments) in transposed.chunks(STRIPE * count).zip(moments.chunks_mut(STRIPE * k)) {
                let products = &mut products[..moments.len()];
                let shape = [1, left.len() / count, count, k];
                matmul(cpu, left, rows, MatmulB::Normal, shape, products)?;
                moments.iter_mut().zip(products).for_each(|(m, p)| *m += *p);
            }
        }
        for row in rows.chunks_exact(k) {
            for (c, &x) in row.iter().enumerate() {
                self.min[c] = self.min[c].min(x);
                self.max[c] = self.max[c].max(x);
                self.sum_abs[c] += f64::from(x.abs());
                self.sum_squares[c] += f64::from(x) * f64::from(x);
            }
        }
        self.rows += count as u64;
        Ok(())
    }

    /// Takes in what another run saw.
    ///
    /// # Errors
    /// [`Error::Size`] where the channels differ, [`Error::Value`] where only one has the matrix.
    pub fn merge(&mut self, other: &ChannelStats) -> Result<()> {
        if self.channels() != other.channels() {
            let (wanted, found) = (self.channels(), other.channels());
            return Err(Error::Size { op: OP, operand: "other channels", wanted, found });
        }
        match (&mut self.second_moments, &other.second_moments) {
            (Some(a), Some(b)) => a.iter_mut().zip(b).for_each(|(a, b)| *a += b),
            (None, None) => {}
            _ => {
                let what = "only one of the two has the matrix of second moments".into();
                return Err(Error::Value { op: OP, what });
            }
        }
        self.rows += other.rows;
        self.min.iter_mut().zip(&other.min).for_each(|(a, b)| *a = a.min(*b));
        self.max.iter_mut().zip(&other.max).for_each(|(a, b)| *a = a.max(*b));
        self.sum_abs.iter_mut().zip(&other.sum_abs).for_each(|(a, b)| *a += b);
        self.sum_squares.iter_mut().zip(&other.sum_squares).for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// Mean magnitude of each channel, for [`awq`](crate::awq::awq); zeros before the first row.
    pub fn mean_abs(&self) -> Vec<f32> {
        self.mean(&self.sum_abs)
    }

    /// Mean square of each channel, the importance of [`RowOptions`](crate::RowOptions).
    pub fn mean_squares(&self) -> Vec<f32> {
        self.mean(&self.sum_squares)
    }

    fn mean(&self, sums: &[f64]) -> Vec<f32> {
        sums.iter().map(|s| (s / self.rows.max(1) as f64).min(f64::from(f32::MAX)) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Random;

    #[test]
    fn statistics_are_the_sums_over_all_rows_however_they_are_split() {
        let cpu = Cpu::new(2).unwrap();
        let k = 600;
        let x = Random(9).gaussian(50 * k);
        let mut whole = ChannelStats::new(k, true).unwrap();
        whole.add(&cpu, &x).unwrap();
        let (mut a, mut b) = (ChannelStats::new(k, true).unwrap(), ChannelStats::new(k, true).unwrap());
        a.add(&cpu, &x[..7 * k]).unwrap();
        a.add(&cpu, &[]).unwrap();
        b.add(&cpu, &x[7 * k..]).unwrap();
        a.merge(&b).unwrap();
        assert_eq!((a.rows, &a.min, &a.max), (50, &whole.min, &whole.max));
        for c in [0, 1, 511, 512, 599] {
            let column: Vec<f64> = x.chunks_exact(k).map(|row| f64::from(row[c])).collect();
            assert_eq!(f64::from(a.min[c]), column.iter().copied().fold(f64::MAX, f64::min));
            assert_eq!(f64::from(a.max[c]), column.iter().copied().fold(f64::MIN, f64::max));
            assert!((a.sum_abs[c] - column.iter().map(|x| x.abs()).sum::<f64>()).abs() < 1e-9);
            assert!((f64::from(a.mean_squares()[c]) * 50.0 - a.sum_squares[c]).abs() < 1e-4);
            for d in [0, 300, 598] {
                let wanted: f64 = x.chunks_exact(k).map(|row| f64::from(row[c]) * f64::from(row[d])).sum();
                for stats in [&a, &whole] {
                    let found = stats.second_moments.as_ref().unwrap()[c * k + d];
                    assert!((f64::from(found) - wanted).abs() < 1e-3, "{c} {d}: {found} {wanted}");
                }
            }
        }
    }

    #[test]
    fn activations_that_are_no_numbers_are_named_and_change_nothing() {
        let cpu = Cpu::new(1).unwrap();
        let mut stats = ChannelStats::new(4, true).unwrap();
        let error = stats.add(&cpu, &[0.0, 1.0, f32::NAN, 2.0]).unwrap_err();
        assert_eq!(error.to_string(), "activations: element 2 is NaN, expected a finite number");
        assert!(matches!(stats.add(&cpu, &[0.0; 5]), Err(Error::Size { .. })));
        assert_eq!(stats, ChannelStats::new(4, true).unwrap());
        assert!(matches!(stats.merge(&ChannelStats::new(5, true).unwrap()), Err(Error::Size { .. })));
        assert!(matches!(stats.merge(&ChannelStats::new(4, false).unwrap()), Err(Error::Value { .. })));
        assert_eq!(stats.mean_abs(), [0.0; 4]);
    }
}
