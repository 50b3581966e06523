//! Rows by number.
//!
//! - `gather_rows`: `y[i, :] = table[ids[i], :]`; `table: [v, c]` stored in any float type, `ids: [t]`, `y: [t, c]`
//! - `weighted_gather`: `y[i, :] = sum_j weights[i, j] * table[taps[i, j], :]`; `table: [v, c]`,
//!   `taps, weights: [n, 16]`, `y: [n, c]` (bicubic interpolation of a position table)

use super::{SharedMut, expect, for_rows};
use crate::simd::{Element, Kernel, Simd};
use crate::{Cpu, Error, Result, Weight};
use half::{bf16, f16};

/// Taps of one output row of [`weighted_gather`].
const TAPS: usize = 16;

fn check_rows(table: &Weight<'_>, c: usize, ids: &[i64], y: &[f32]) -> Result<()> {
    const OP: &str = "gather_rows";
    if c == 0 || !table.len().is_multiple_of(c) {
        let what = format!("a table of {} elements does not make rows of {c}", table.len());
        return Err(Error::Value { op: OP, what });
    }
    let rows = table.len() / c;
    if let Some((i, id)) =
        ids.iter().enumerate().find(|(_, id)| !usize::try_from(**id).is_ok_and(|id| id < rows))
    {
        let what = format!("id {id} at position {i} is outside of 0..{rows}");
        return Err(Error::Value { op: OP, what });
    }
    expect(OP, "y", &[ids.len(), c], y.len())
}

/// Copies rows of a table and widens them to f32; see the module.
///
/// # Errors
/// [`Error::Value`] where an id is outside of the table, [`Error::Size`] where operands do not fit.
pub fn gather_rows(cpu: &Cpu, table: Weight<'_>, c: usize, ids: &[i64], y: &mut [f32]) -> Result<()> {
    check_rows(&table, c, ids, y)?;
    let out = SharedMut::new(y);
    for_rows(cpu, ids.len(), c, &|range| {
        for i in range {
            // SAFETY: inside `y` as checked; row `i` belongs to this task.
            let y = unsafe { out.slice(i * c..(i + 1) * c) };
            let row = ids[i] as usize * c..(ids[i] as usize + 1) * c;
            match table {
                Weight::F32(v) => y.copy_from_slice(&v[row]),
                Weight::F16(v) => {
                    cpu.isa().run(Widen { x: bytemuck::cast_slice::<u16, f16>(&v[row]), y });
                }
                Weight::BF16(v) => {
                    cpu.isa().run(Widen { x: bytemuck::cast_slice::<u16, bf16>(&v[row]), y });
                }
                Weight::Packed(p) => p.row(ids[i] as usize, y),
            }
        }
    });
    Ok(())
}

/// `y = x`, of equal length, widened.
struct Widen<'a, E> {
    x: &'a [E],
    y: &'a mut [f32],
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.x.len().min(self.y.len());
        let (x, y) = (self.x.as_ptr(), self.y.as_mut_ptr());
        let mut i = 0;
        while i + S::WIDTH <= n {
            // SAFETY: `WIDTH` elements from `i` are inside both.
            unsafe { s.store(y.add(i), E::load(s, x.add(i))) };
            i += S::WIDTH;
        }
        // SAFETY: the last `n - i` elements of both.
        unsafe { s.store_n(y.add(i), n - i, E::load_n(s, x.add(i), n - i)) };
    }
}

/// The scalar twin of [`gather_rows`].
pub fn gather_rows_twin(table: Weight<'_>, c: usize, ids: &[i64], y: &mut [f32]) -> Result<()> {
    check_rows(&table, c, ids, y)?;
    for (i, y) in y.iter_mut().enumerate() {
        *y = table.get(ids[i / c] as usize * c + i % c).unwrap_or(f32::NAN);
    }
    Ok(())
}

fn check_weighted(table: &[f32], c: usize, taps: &[u32], weights: &[f32], y: &[f32]) -> Result<()> {
    const OP: &str = "weighted_gather";
    if c == 0 || !table.len().is_multiple_of(c) || !y.len().is_multiple_of(c) {
        let what =
            format!("table of {} and output of {} elements do not make rows of {c}", table.len(), y.len());
        return Err(Error::Value { op: OP, what });
    }
    let rows = table.len() / c;
    expect(OP, "taps", &[y.len() / c, TAPS], taps.len())?;
    expect(OP, "weights", &[y.len() / c, TAPS], weights.len())?;
    match taps.iter().enumerate().find(|(_, tap)| **tap as usize >= rows) {
        Some((i, tap)) => {
            let what = format!("tap {tap} at position {i} is outside of 0..{rows}");
            Err(Error::Value { op: OP, what })
        }
        None => Ok(()),
    }
}

/// Sums of weighted rows of a table; see the module.
///
/// # Errors
/// [`Error::Value`] where a tap is outside of the table, [`Error::Size`] where operands do not fit.
pub fn weighted_gather(
    cpu: &Cpu,
    table: &[f32],
    c: usize,
    taps: &[u32],
    weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    check_weighted(table, c, taps, weights, y)?;
    let rows = y.len() / c;
    let out = SharedMut::new(y);
    for_rows(cpu, rows, c * TAPS, &|range| {
        for i in range {
            // SAFETY: inside `y` as checked; row `i` belongs to this task.
            let y = unsafe { out.slice(i * c..(i + 1) * c) };
            let (taps, weights) = (&taps[i * TAPS..][..TAPS], &weights[i * TAPS..][..TAPS]);
            cpu.isa().run(WeightedRow { table, taps, weights, y });
        }
    });
    Ok(())
}

/// One row of [`weighted_gather`]; every tap is a row of the table, as checked.
struct WeightedRow<'a> {
    table: &'a [f32],
    taps: &'a [u32],
    weights: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for WeightedRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.y.len();
        let mut i = 0;
        while i < c {
            let n = (c - i).min(S::WIDTH);
            let mut sum = s.splat(0.0);
            for (&tap, &weight) in self.taps.iter().zip(self.weights) {
                let row = &self.table[tap as usize * c + i..][..n];
                // SAFETY: `n` floats of the row.
                let v = unsafe { s.load_n(row.as_ptr(), n) };
                sum = s.fma(v, s.splat(weight), sum);
            }
            // SAFETY: `n` floats of `y` from `i`.
            unsafe { s.store_n(self.y.as_mut_ptr().add(i), n, sum) };
            i += n;
        }
    }
}

/// The scalar twin of [`weighted_gather`], accumulating in f64.
pub fn weighted_gather_twin(
    table: &[f32],
    c: usize,
    taps: &[u32],
    weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    check_weighted(table, c, taps, weights, y)?;
    for (i, y) in y.iter_mut().enumerate() {
        let row = i / c * TAPS;
        let term =
            |j: usize| f64::from(weights[row + j]) * f64::from(table[taps[row + j] as usize * c + i % c]);
        *y = (0..TAPS).map(term).sum::<f64>() as f32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Close, F32, SIZES, check, try_check, values};

    const EXACT: Close = Close { relative: 0.0, absolute: 0.0 };

    #[test]
    fn gathered_rows_are_exact_for_all_types() {
        for c in SIZES {
            let table = values(9 * c, 1);
            let f16s: Vec<u16> = table.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
            let bf16s: Vec<u16> = table.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
            let ids = [8i64, 0, 3, 3, 7];
            for table in [Weight::F32(&table), Weight::F16(&f16s), Weight::BF16(&bf16s)] {
                let mut wanted = vec![0.0; ids.len() * c];
                gather_rows_twin(table, c, &ids, &mut wanted).unwrap();
                check("gather_rows", &wanted, EXACT, &|cpu, y| gather_rows(cpu, table, c, &ids, y));
            }
        }
    }

    #[test]
    fn an_id_outside_of_the_table_is_an_error_that_names_it() {
        let cpu = Cpu::new(1).unwrap();
        let table = [0.0; 12];
        for id in [4i64, -1, i64::MAX, i64::MIN] {
            let error = gather_rows(&cpu, Weight::F32(&table), 3, &[0, id], &mut [0.0; 6]).unwrap_err();
            assert_eq!(error.to_string(), format!("gather_rows: id {id} at position 1 is outside of 0..4"));
        }
        assert!(gather_rows(&cpu, Weight::F32(&table), 5, &[0], &mut [0.0; 5]).is_err());
        assert!(gather_rows(&cpu, Weight::F32(&table), 0, &[0], &mut []).is_err());
        assert!(gather_rows(&cpu, Weight::F32(&table), 3, &[0], &mut [0.0; 4]).is_err());
    }

    #[test]
    fn weighted_rows_match_their_twin() {
        for c in SIZES {
            for n in [1, 7, 300] {
                let table = values(11 * c, 1);
                let taps: Vec<u32> = (0..n as u32 * 16).map(|i| i * 7 % 11).collect();
                let weights = values(n * 16, 2);
                let mut wanted = vec![0.0; n * c];
                weighted_gather_twin(&table, c, &taps, &weights, &mut wanted).unwrap();
                check("weighted", &wanted, F32, &|cpu, y| {
                    weighted_gather(cpu, &table, c, &taps, &weights, y)
                });
            }
        }
    }

    #[test]
    fn a_tap_outside_of_the_table_is_an_error_that_names_it() {
        let cpu = Cpu::new(1).unwrap();
        let mut taps = [0u32; 16];
        taps[5] = 4;
        let error = weighted_gather(&cpu, &[0.0; 12], 3, &taps, &[0.0; 16], &mut [0.0; 3]).unwrap_err();
        assert_eq!(error.to_string(), "weighted_gather: tap 4 at position 5 is outside of 0..4");
        assert!(weighted_gather(&cpu, &[0.0; 12], 3, &taps[..15], &[0.0; 16], &mut [0.0; 3]).is_err());
    }

    #[test]
    fn another_row_is_noticed() {
        let table = values(40, 1);
        let mut wanted = vec![0.0; 20];
        gather_rows_twin(Weight::F32(&table), 20, &[0], &mut wanted).unwrap();
        assert!(
            try_check(&wanted, EXACT, &|cpu, y| gather_rows(cpu, Weight::F32(&table), 20, &[1], y)).is_err()
        );
    }
}
