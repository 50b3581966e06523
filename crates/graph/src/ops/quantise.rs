//! Quantise and dequantise in one node: what is left of values after a format has held them.

use pocketglm_quant::{Method, RowOptions, dequantise_row, quantise_row, range};
use pocketglm_tensor::{DType, Group, PackedFormat, ops as kernels};

use super::{Call, OpDef, count, operands, shape_error};
use crate::graph::Meta;
use crate::{Error, Result};

/// `y = dequantise(quantise(x))`, any shape; rows are the last dimension.
#[derive(Clone, Debug, PartialEq)]
pub enum QuantDequant {
    /// Rows of a weight, as a file in this format would hold them.
    Weight {
        /// The format, a quantised or a floating-point one.
        dtype: DType,
        /// How scales are chosen.
        method: Method,
    },
    /// Rows of activations, as kernels see them that meet weights of this format: signed bytes with a scale for each
    /// block, or one scale where the range is fixed.
    Activation {
        /// The weights' format.
        format: PackedFormat,
        /// The largest magnitude, where it is fixed; what lies beyond is cut off.
        range: Option<f32>,
    },
}

impl OpDef for QuantDequant {
    fn name(&self) -> &'static str {
        match self {
            QuantDequant::Weight { .. } => "quantise_dequantise_weight",
            QuantDequant::Activation { .. } => "quantise_dequantise",
        }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x] = operands::<1>("quantise_dequantise", inputs)?;
        let row = x.shape.last().ok_or_else(|| shape_error("quantise_dequantise", "x [.., k]", inputs))?;
        if let QuantDequant::Weight { dtype, .. } = self
            && row.as_fixed().and_then(|k| dtype.row_bytes(k)).is_none()
        {
            let wanted = format!("rows that {dtype} can hold");
            return Err(shape_error("quantise_dequantise", wanted, inputs));
        }
        Ok(vec![Meta::f32(x.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        2.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        const OP: &str = "quantise_dequantise";
        let (x, cpu) = (call.f32(OP, 0)?, call.cpu);
        let k = call.shape(OP, 0)?.last().copied().unwrap_or(0).max(1);
        let y = call.output(OP, 0)?;
        match self {
            QuantDequant::Activation { format, range } => {
                Ok(kernels::round_activations(cpu, x, k, *format, *range, y)?)
            }
            QuantDequant::Weight { dtype, method } => {
                let failed = |row| move |source| Error::Quantised { name: "a weight".into(), row, source };
                let whole = match dtype {
                    DType::Affine(a) if a.group() == Group::Tensor && !x.is_empty() => {
                        Some(range(x).map_err(failed(0))?)
                    }
                    _ => None,
                };
                let options = RowOptions { method: *method, range: whole, ..RowOptions::default() };
                let mut bytes = Vec::new();
                for (row, (x, y)) in x.chunks_exact(k).zip(y.chunks_exact_mut(k)).enumerate() {
                    bytes.clear();
                    quantise_row(*dtype, x, &options, &mut bytes)
                        .and_then(|()| dequantise_row(*dtype, &bytes, y))
                        .map_err(failed(row))?;
                }
                Ok(())
            }
        }
    }
}
