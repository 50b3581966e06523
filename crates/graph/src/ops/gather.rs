//! Rows by index: embedding look-up, bicubic position table, and picture rows put among text rows.

use pocketglm_tensor::{DType, Tensor, ops as kernels};

use super::{Call, OpDef, operands, shape_error};
use crate::graph::Meta;
use crate::{Error, Result};

/// `y[i, :] = table[ids[i], :]`; `table: [v, c]`, `ids: [t]`.
#[derive(Clone, Debug)]
pub struct GatherRows;

impl OpDef for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [table, ids] = operands::<2>("gather_rows", inputs)?;
        match (table.shape.as_slice(), ids.shape.as_slice(), ids.dtype) {
            ([_, c], [t], DType::I32) => Ok(vec![Meta::f32(vec![t.clone(), c.clone()])]),
            _ => Err(shape_error("gather_rows", "table [v, c] and i32 ids [t]", inputs)),
        }
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn takes_weight(&self, i: usize) -> bool {
        i == 0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let ids = call.i32("gather_rows", 1)?;
        let c = call.shape("gather_rows", 0)?[1];
        if let Some(table) = call.rows("gather_rows", 0)? {
            return quantised_rows(table, c, ids, call.output("gather_rows", 0)?);
        }
        let table = call.weight("gather_rows", 0)?;
        let ids: Vec<i64> = ids.iter().map(|&i| i64::from(i)).collect();
        Ok(kernels::gather_rows(call.cpu, table, c, &ids, call.output("gather_rows", 0)?)?)
    }
}

/// Rows of a quantised table, which stays as it is stored.
fn quantised_rows(table: &Tensor, c: usize, ids: &[i32], y: &mut [f32]) -> Result<()> {
    let bytes = table.dtype().row_bytes(c).unwrap_or(0);
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(c.max(1))) {
        let at = usize::try_from(id).ok().and_then(|i| i.checked_mul(bytes));
        let row =
            at.and_then(|at| table.bytes().get(at..at.checked_add(bytes)?)).ok_or_else(|| Error::Shape {
                op: "gather_rows",
                wanted: format!("ids below {}", table.shape().first().copied().unwrap_or(0)),
                found: id.to_string(),
            })?;
        let row_error =
            |source| Error::Quantised { name: "a table".into(), row: id.unsigned_abs() as usize, source };
        pocketglm_quant::dequantise_row(table.dtype(), row, y).map_err(row_error)?;
    }
    Ok(())
}

/// `y[i, :] = sum over j of weights[i, j] * table[taps[i, j], :]`; taps and weights `[n, 16]`.
#[derive(Clone, Debug)]
pub struct WeightedGather;

impl OpDef for WeightedGather {
    fn name(&self) -> &'static str {
        "weighted_gather"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [table, taps, weights] = operands::<3>("weighted_gather", inputs)?;
        match (table.shape.as_slice(), taps.shape.as_slice(), taps.dtype) {
            ([_, c], [n, j], DType::I32) if taps.shape == weights.shape && j.as_fixed() == Some(16) => {
                Ok(vec![Meta::f32(vec![n.clone(), c.clone()])])
            }
            _ => {
                Err(shape_error("weighted_gather", "table [v, c], i32 taps [n, 16], weights [n, 16]", inputs))
            }
        }
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        2.0 * super::count(&outputs[0]) * inputs[1].last().copied().unwrap_or(0) as f64
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let table = call.f32("weighted_gather", 0)?;
        let (taps, weights) = (call.i32("weighted_gather", 1)?, call.f32("weighted_gather", 2)?);
        let c = call.shape("weighted_gather", 0)?[1];
        // A negative tap becomes a huge one, which the kernel refuses.
        let taps: &[u32] = bytemuck::cast_slice(taps);
        Ok(kernels::weighted_gather(call.cpu, table, c, taps, weights, call.output("weighted_gather", 0)?)?)
    }
}

/// `y = x` with row `at[i]` replaced by `rows[i, :]`; `x: [t, c]`, `at: [v]`, `rows: [v, c]`.
#[derive(Clone, Debug)]
pub struct ScatterRows;

impl OpDef for ScatterRows {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, at, rows] = operands::<3>("scatter_rows", inputs)?;
        match (x.shape.as_slice(), at.shape.as_slice(), rows.shape.as_slice()) {
            ([_, c], [v], [rv, rc]) if c == rc && v == rv && at.dtype == DType::I32 => {
                Ok(vec![Meta::f32(x.shape.clone())])
            }
            _ => Err(shape_error("scatter_rows", "x [t, c], i32 at [v], rows [v, c]", inputs)),
        }
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, at) = (call.f32("scatter_rows", 0)?, call.i32("scatter_rows", 1)?);
        let rows = call.f32("scatter_rows", 2)?;
        let &[t, c] = call.shape("scatter_rows", 0)? else { return Ok(()) };
        let y = call.output("scatter_rows", 0)?;
        y.copy_from_slice(x);
        for (i, &row) in at.iter().enumerate() {
            let to = usize::try_from(row).ok().filter(|&r| r < t).ok_or_else(|| Error::Shape {
                op: "scatter_rows",
                wanted: format!("a row below {t}"),
                found: row.to_string(),
            })?;
            y[to * c..(to + 1) * c].copy_from_slice(&rows[i * c..(i + 1) * c]);
        }
        Ok(())
    }
}
