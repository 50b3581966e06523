//! GPTQ: each column's rounding error is made up for by the columns that follow.
//!
//! What a linear's output loses is `e H e^T` for each row's error `e = w - q`, where `H` is the sum of `x x^T` over
//! the inputs `x`. With `H = U D U^T`, `U` unit upper triangular, that is `sum_i D_i (e_i + sum_{j < i} e_j U_ji)^2`.
//! So, going through the columns in order, `q_i` is chosen nearest to `w_i + sum_{j < i} e_j U_ji`. This gives the
//! same codes as the published form over the Cholesky factor of `H^-1`, without ever inverting `H`.
//!
//! Source: Frantar et al., "GPTQ" (arXiv 2210.17323); the form with `H`'s own factor is that of Chee et al., "QuIP"
//! (arXiv 2307.13304).

use std::sync::Mutex;

use pocketglm_tensor::ops::{MatmulB, matmul};
use pocketglm_tensor::{Block, Cpu, DType, Group, RowCodes};

use crate::codes::{Lattice, affine_lattice, grid, nested_lattice, nested_of, put_together, simple_lattice};
use crate::factor::{unit_upper, zeros};
use crate::quantise::{check_finite, encode_units, unit_of};
use crate::{Error, Method, Result};

const OP: &str = "gptq";
/// Columns whose errors go to the rest in one matrix product.
const COLUMNS: usize = 128;
/// Columns of the rest that one product updates, so that its result stays small.
const STRIPE: usize = 1024;
/// How often a matrix that is not positive definite is damped ten times more.
const ATTEMPTS: usize = 5;

/// Options of [`Feedback::new`] and [`gptq`].
#[derive(Clone, Copy, Debug)]
pub struct GptqOptions {
    /// Added to the diagonal of `H`, as a part of the diagonal's mean. Ten times as much, and so on, where the matrix
    /// is not positive definite even so.
    pub damping: f32,
    /// Takes the columns of the largest inputs first. Scales then come from the weights as they were before.
    pub act_order: bool,
    /// How scales are chosen; a search weighs errors by the diagonal of `H`.
    pub method: Method,
}

impl Default for GptqOptions {
    fn default() -> GptqOptions {
        GptqOptions { damping: 0.01, act_order: false, method: Method::Search }
    }
}

/// A prepared `H`, for all linears that share an input.
pub struct Feedback {
    k: usize,
    /// `[k, k]`, rows and columns in `order`.
    upper: Vec<f32>,
    /// The column that is `i`-th; empty where that is `i`.
    order: Vec<usize>,
    /// The diagonal of `H` in the weights' order.
    importance: Vec<f32>,
    options: GptqOptions,
}

impl Feedback {
    /// Factors `hessian: [k, k]`, the sum or mean of `x x^T` over inputs `x` (any positive factor is the same);
    /// symmetric, of which only one half is read. Takes `k^3 / 3` multiplications and twice the matrix's memory.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::NotFinite`] for NaN, infinities and a negative diagonal, [`Error::Value`] where no
    /// damping makes the matrix positive definite, [`Error::OutOfMemory`].
    pub fn new(cpu: &Cpu, hessian: &[f32], k: usize, options: &GptqOptions) -> Result<Feedback> {
        let wanted = k.checked_mul(k).ok_or(Error::OutOfMemory { elements: usize::MAX, what: OP })?;
        if hessian.len() != wanted {
            return Err(Error::Size { op: OP, operand: "hessian", wanted, found: hessian.len() });
        }
        if !(options.damping.is_finite() && options.damping >= 0.0) {
            let what = format!("damping must be a finite number of at least 0, found {}", options.damping);
            return Err(Error::Value { op: OP, what });
        }
        check_finite("hessian", hessian)?;
        let importance: Vec<f32> = (0..k).map(|i| hessian[i * k + i]).collect();
        if let Some(i) = importance.iter().position(|&v| v < 0.0) {
            return Err(Error::NotFinite {
                what: "hessian",
                index: i * k + i,
                value: importance[i],
                kind: "number of at least 0",
            });
        }
        let mut order = Vec::new();
        if options.act_order {
            order = (0..k).collect();
            order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
        }
        // Relative to the mean of the diagonal, so that inputs of any size are the same.
        let mean = importance.iter().map(|&v| f64::from(v)).sum::<f64>() / k.max(1) as f64;
        let unit = if mean > 0.0 { mean } else { 1.0 };
        let mut damping = f64::from(options.damping);
        for _ in 0..ATTEMPTS {
            let mut h = zeros(wanted, "the factored matrix")?;
            for (i, row) in h.chunks_exact_mut(k.max(1)).enumerate() {
                let source = &hessian[order.get(i).copied().unwrap_or(i) * k..][..k];
                for (j, v) in row.iter_mut().enumerate() {
                    *v = (f64::from(source[order.get(j).copied().unwrap_or(j)]) / unit) as f32;
                }
                row[i] += damping as f32;
                // A column that no input reaches costs nothing and corrects nothing.
                if row[i] == 0.0 {
                    row[i] = 1.0;
                }
            }
            if let Some(upper) = unit_upper(cpu, h, k)? {
                return Ok(Feedback { k, upper, order, importance, options: *options });
            }
            damping = (damping * 10.0).max(1e-4);
        }
        let what =
            format!("the matrix of second moments is not positive definite, damped by {damping} or less");
        Err(Error::Value { op: OP, what })
    }

    fn column(&self, i: usize) -> usize {
        self.order.get(i).copied().unwrap_or(i)
    }

    /// The bytes of `weights: [n, k]`, row after row. Takes about `n k^2` multiplications and twice the weights' memory.
    ///
    /// # Errors
    /// As [`quantise_row`](crate::quantise_row); element indices count through all rows. [`Error::NotFinite`] also where
    /// corrections leave f32's range.
    pub fn quantise(&self, cpu: &Cpu, weights: &[f32], dtype: DType) -> Result<Vec<u8>> {
        let k = self.k;
        let bytes = dtype.row_bytes(k).ok_or(Error::RowLength { dtype, values: k })?;
        if !dtype.is_quantised() {
            return Err(Error::DType { op: OP, wanted: "a quantised type", found: dtype });
        }
        // Rows are chosen alone.
        if matches!(dtype, DType::Affine(a) if a.group() == Group::Tensor) {
            return Err(Error::DType { op: OP, wanted: "a type whose scales are a row's own", found: dtype });
        }
        if k == 0 || !weights.len().is_multiple_of(k) {
            return Err(Error::Size { op: OP, operand: "weights", wanted: k, found: weights.len() });
        }
        check_finite("weights", weights)?;
        let n = weights.len() / k;
        let unit = unit_of(dtype, k);
        let group = match dtype {
            DType::Block(block) => grid(block).group,
            _ => unit,
        };
        // Where columns change places, or a scale covers the row, scales come from the weights as they are.
        let fixed = self.options.act_order || unit > COLUMNS.max(256);
        let columns = if fixed { COLUMNS } else { COLUMNS.max(unit) };

        let mut target = zeros(weights.len(), "the corrected weights")?;
        for (target, row) in target.chunks_exact_mut(k).zip(weights.chunks_exact(k)) {
            for (i, t) in target.iter_mut().enumerate() {
                *t = row[self.column(i)];
            }
        }
        let mut errors = zeros(n * columns.min(k), "the errors of a block of columns")?;
        let mut rows: Vec<Row> = Vec::with_capacity(n);
        rows.resize_with(n, Row::default);
        let per_task = n.div_ceil(cpu.threads() * 4).max(1);
        let (mut panel, mut update) = (Vec::new(), Vec::new());

        for first in (0..k).step_by(columns) {
            let last = (first + columns).min(k);
            let width = last - first;
            let shape = Part { dtype, unit, group, fixed, first, last };
            let tasks: Vec<_> = target
                .chunks_mut(per_task * k)
                .zip(weights.chunks(per_task * k))
                .zip(errors.chunks_mut(per_task * width))
                .zip(rows.chunks_mut(per_task))
                .map(|(((target, weights), errors), rows)| Mutex::new((target, weights, errors, rows)))
                .collect();
            let failure = Mutex::new(None);
            cpu.parallel(tasks.len(), &|task| {
                // Each task's lock is taken once, so it is never poisoned or contended.
                let Ok(mut part) = tasks[task].lock() else { return };
                let (target, weights, errors, rows) = &mut *part;
                let each = target.chunks_exact_mut(k).zip(weights.chunks_exact(k));
                for (i, ((target, weights), (errors, row))) in
                    each.zip(errors.chunks_exact_mut(width).zip(rows.iter_mut())).enumerate()
                {
                    if let Err(error) = self.columns(shape, target, weights, errors, row) {
                        let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                        failure.get_or_insert(shift_index(error, (task * per_task + i) * k));
                        return;
                    }
                }
            });
            drop(tasks);
            if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
                return Err(error);
            }
            // What follows is corrected by all errors of these columns: target += errors * U.
            for start in (last..k).step_by(STRIPE) {
                let end = (start + STRIPE).min(k);
                panel.clear();
                for i in first..last {
                    panel.extend_from_slice(&self.upper[i * k + start..i * k + end]);
                }
                update.resize(n * (end - start), 0.0);
                let shape = [1, n, width, end - start];
                matmul(cpu, &errors[..n * width], &panel, MatmulB::Normal, shape, &mut update)?;
                for (target, update) in target.chunks_exact_mut(k).zip(update.chunks_exact(end - start)) {
                    target[start..end].iter_mut().zip(update).for_each(|(t, u)| *t += u);
                }
            }
        }
        let mut out = Vec::new();
        let total = n.saturating_mul(bytes);
        out.try_reserve_exact(total).map_err(|_| Error::OutOfMemory { elements: total, what: OP })?;
        for row in &rows {
            put_together(dtype, &row.codes, &mut out)?;
        }
        Ok(out)
    }

    /// Chooses the codes of some columns of a row and passes their errors on within these columns.
    fn columns(
        &self,
        part: Part,
        target: &mut [f32],
        weights: &[f32],
        errors: &mut [f32],
        row: &mut Row,
    ) -> Result<()> {
        let Part { dtype, unit, group, fixed, first, last } = part;
        if fixed && first == 0 {
            for start in (0..self.k).step_by(unit) {
                let end = (start + unit).min(self.k);
                self.scales(dtype, start, &weights[start..end], row)?;
            }
        }
        for i in first..last {
            if !fixed && i % unit == 0 {
                self.scales(dtype, i, &target[i..(i + unit).min(self.k)], row)?;
            }
            let column = self.column(i);
            let Some(lattice) = row.lattices.get(column / group) else { continue };
            if !target[i].is_finite() {
                // Corrections of weights near the end of f32's range may leave it.
                let (what, value) = ("corrected weights", target[i]);
                return Err(Error::NotFinite { what, index: column, value, kind: "number" });
            }
            let code = lattice.nearest(target[i]);
            row.codes.codes[column] = code;
            let error = weights[column] - lattice.value(code);
            errors[i - first] = error;
            let upper = &self.upper[i * self.k + i + 1..i * self.k + last];
            target[i + 1..last].iter_mut().zip(upper).for_each(|(t, u)| *t += error * u);
        }
        Ok(())
    }

    /// Fixes the scales of the unit from column `start` on.
    fn scales(&self, dtype: DType, start: usize, values: &[f32], row: &mut Row) -> Result<()> {
        let importance = match self.options.method {
            Method::Round => None,
            Method::Search => Some(&self.importance[start..start + values.len()]),
        };
        check_finite("corrected weights", values).map_err(|e| shift_index(e, start))?;
        encode_units(dtype, values, importance, &mut row.codes).map_err(|e| shift_index(e, start))?;
        push_lattices(dtype, &row.codes, &mut row.lattices);
        Ok(())
    }
}

/// Which columns, and how scales come about.
#[derive(Clone, Copy)]
struct Part {
    dtype: DType,
    unit: usize,
    /// Values that share a lattice.
    group: usize,
    fixed: bool,
    first: usize,
    last: usize,
}

#[derive(Default)]
struct Row {
    codes: RowCodes,
    lattices: Vec<Lattice>,
}

fn shift_index(error: Error, by: usize) -> Error {
    match error {
        Error::Range { index, value, dtype } => Error::Range { index: index + by, value, dtype },
        Error::NotFinite { what, index, value, kind } => {
            Error::NotFinite { what, index: index + by, value, kind }
        }
        other => other,
    }
}

/// Appends the lattices of the unit that was encoded last.
fn push_lattices(dtype: DType, row: &RowCodes, lattices: &mut Vec<Lattice>) {
    let Some(last) = row.scales.len().checked_sub(1) else { return };
    match dtype {
        DType::Affine(format) => {
            let zero = row.sub_minima.get(last).copied().unwrap_or(0);
            lattices.push(affine_lattice(format, row.scales[last], zero));
        }
        DType::Block(block) => {
            let grid = grid(block);
            match block {
                Block::Q2_K | Block::Q3_K | Block::Q6_K => {
                    let scales = nested_of::<16>(row, last);
                    lattices.extend((0..16).map(|g| nested_lattice(grid, &scales, g)));
                }
                Block::Q4_K | Block::Q5_K | Block::IQ4_XS => {
                    let scales = nested_of::<8>(row, last);
                    lattices.extend((0..8).map(|g| nested_lattice(grid, &scales, g)));
                }
                Block::Q8_0 | Block::Q4_0 | Block::Q4_1 | Block::Q5_0 | Block::Q5_1 | Block::IQ4_NL => {
                    let minimum = row.minima.get(last).copied().unwrap_or(0);
                    lattices.push(simple_lattice(grid, row.scales[last], minimum));
                }
            }
        }
        // The other types have no codes; the caller has refused them.
        _ => {}
    }
}

/// The bytes of `weights: [n, k]` with error feedback for inputs whose sum of `x x^T` is `hessian: [k, k]`.
///
/// Linears that share an input share the costly half of this: see [`Feedback`].
///
/// # Errors
/// As [`Feedback::new`] and [`Feedback::quantise`].
pub fn gptq(
    cpu: &Cpu,
    weights: &[f32],
    k: usize,
    hessian: &[f32],
    dtype: DType,
    options: &GptqOptions,
) -> Result<Vec<u8>> {
    Feedback::new(cpu, hessian, k, options)?.quantise(cpu, weights, dtype)
}

#[cfg(test)]
mod tests;
