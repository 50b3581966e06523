//! Appending to a state: the KV cache grows by the rows of the new tokens.

use super::{Call, OpDef, operands, shape_error};
use crate::dim::Dim;
use crate::graph::Meta;
use crate::{Error, Result};

/// `state[at .. at + t, :] = rows`, in place; operands `rows [t, c], state [capacity, c]`.
#[derive(Clone, Debug)]
pub struct KvAppend {
    /// First row written: the tokens that the state already holds.
    pub at: Dim,
}

/// Writes `rows` into `state` from row `at` on; `c` numbers a row.
pub(crate) fn append(state: &mut [f32], at: usize, c: usize, rows: &[f32]) -> Result<()> {
    let capacity = state.len().checked_div(c).unwrap_or(0);
    let t = rows.len().checked_div(c).unwrap_or(0);
    state.get_mut(at * c..at * c + rows.len()).map(|to| to.copy_from_slice(rows)).ok_or_else(|| {
        Error::Shape {
            op: "kv_append",
            wanted: format!("room for {} tokens", at + t),
            found: format!("a state of {capacity}"),
        }
    })
}

impl OpDef for KvAppend {
    fn name(&self) -> &'static str {
        "kv_append"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [rows, state] = operands::<2>("kv_append", inputs)?;
        match (rows.shape.as_slice(), state.shape.as_slice()) {
            ([_, c], [_, sc]) if c == sc => Ok(vec![state.clone()]),
            _ => Err(shape_error("kv_append", "rows [t, c] and state [capacity, c]", inputs)),
        }
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let rows = call.f32("kv_append", 0)?;
        let c = call.shape("kv_append", 0)?[1];
        let at = self.at.eval(call.bindings)?;
        append(call.output("kv_append", 0)?, at, c, rows)
    }
}
