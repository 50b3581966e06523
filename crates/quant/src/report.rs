//! How far quantised weights are from the original ones.

use pocketglm_tensor::DType;

use crate::{Error, Result, dequantise_row};

/// Error of quantised weights against the originals.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ErrorReport {
    /// Mean of the squared errors.
    pub mse: f64,
    /// Largest magnitude of an error.
    pub max: f64,
    /// Signal to quantisation noise, `10 log10(sum w^2 / sum (w - w')^2)`; infinite where nothing is lost.
    pub sqnr_db: f64,
    /// Stored bits per weight, scales included.
    pub bits_per_weight: f64,
}

/// Sums from which an [`ErrorReport`] is made, so that rows need not be in memory together.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct ErrorMeter {
    values: u64,
    bytes: u64,
    signal: f64,
    noise: f64,
    max: f64,
}

impl ErrorMeter {
    /// Takes in rows of `k` values and what `dtype` made of them.
    ///
    /// # Errors
    /// As [`dequantise_row`]; [`Error::Size`] where these are no whole rows.
    pub fn add(&mut self, original: &[f32], k: usize, dtype: DType, bytes: &[u8]) -> Result<()> {
        let op = "error report";
        if k == 0 || !original.len().is_multiple_of(k) {
            return Err(Error::Size { op, operand: "weights", wanted: k, found: original.len() });
        }
        let width = dtype.row_bytes(k).ok_or(Error::RowLength { dtype, values: k })?;
        let wanted = (original.len() / k).saturating_mul(width);
        if bytes.len() != wanted {
            return Err(Error::Bytes { dtype, values: original.len(), wanted, found: bytes.len() });
        }
        let mut values = vec![0.0; k];
        for (row, bytes) in original.chunks_exact(k).zip(bytes.chunks_exact(width)) {
            dequantise_row(dtype, bytes, &mut values)?;
            self.add_values(row, &values, width as u64);
        }
        Ok(())
    }

    /// Takes in values and what they became, which took `bytes`. Pairs beyond the shorter slice do not count.
    pub fn add_values(&mut self, original: &[f32], quantised: &[f32], bytes: u64) {
        for (&w, &q) in original.iter().zip(quantised) {
            let (w, error) = (f64::from(w), f64::from(w) - f64::from(q));
            self.values += 1;
            self.signal += w * w;
            self.noise += error * error;
            self.max = self.max.max(error.abs());
        }
        self.bytes += bytes;
    }

    /// Takes in another part's sums.
    pub fn merge(&mut self, other: &ErrorMeter) {
        self.values += other.values;
        self.bytes += other.bytes;
        self.signal += other.signal;
        self.noise += other.noise;
        self.max = self.max.max(other.max);
    }

    /// The report over everything taken in.
    pub fn report(&self) -> ErrorReport {
        let values = self.values.max(1) as f64;
        let sqnr_db = match self.noise == 0.0 {
            true => f64::INFINITY,
            false => 10.0 * (self.signal / self.noise).log10(),
        };
        ErrorReport {
            mse: self.noise / values,
            max: self.max,
            sqnr_db,
            bits_per_weight: self.bytes as f64 * 8.0 / values,
        }
    }
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::Block;

    use super::*;
    use crate::tests::Random;
    use crate::{RowOptions, quantise_row};

    #[test]
    fn a_report_is_the_sums_over_all_rows() {
        let mut meter = ErrorMeter::default();
        meter.add_values(&[3.0, 4.0], &[3.0, 4.5], 1);
        let mut other = ErrorMeter::default();
        other.add_values(&[0.0, 0.0], &[-1.0, 0.0], 1);
        meter.merge(&other);
        let report = meter.report();
        assert_eq!((report.mse, report.max, report.bits_per_weight), (1.25 / 4.0, 1.0, 4.0));
        assert!((report.sqnr_db - 10.0 * (25.0f64 / 1.25).log10()).abs() < 1e-12);
        assert_eq!(ErrorMeter::default().report().sqnr_db, f64::INFINITY);
    }

    #[test]
    fn each_bit_more_gains_about_six_decibel() {
        let x = Random(2).gaussian(4 * 512);
        let sqnr = |block| {
            let dtype = DType::Block(block);
            let mut bytes = Vec::new();
            for row in x.chunks_exact(512) {
                quantise_row(dtype, row, &RowOptions::default(), &mut bytes).unwrap();
            }
            let mut meter = ErrorMeter::default();
            meter.add(&x, 512, dtype, &bytes).unwrap();
            assert!(matches!(meter.add(&x, 512, dtype, &bytes[1..]), Err(Error::Bytes { .. })));
            let report = meter.report();
            let (values, size) = block.layout();
            assert_eq!(report.bits_per_weight, size as f64 * 8.0 / values as f64);
            report.sqnr_db
        };
        let (four, five, eight) = (sqnr(Block::Q4_0), sqnr(Block::Q5_0), sqnr(Block::Q8_0));
        assert!((five - four - 6.0).abs() < 1.0, "{four} {five}");
        assert!((eight - five - 18.0).abs() < 2.0, "{five} {eight}");
    }
}
