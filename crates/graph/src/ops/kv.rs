//! The KV cache: a state `[capacity, heads, d]` that grows by the rows of the new tokens, in any [`KvFormat`].

use pocketglm_tensor::{Cpu, KvFormat, ops as kernels};

use super::{Call, OpDef, operands, shape_error};
use crate::dim::{Dim, product};
use crate::graph::Meta;
use crate::{Error, Result};

/// `state[at .. at + t] = rows`, in place and in the state's format; operands `rows [t, heads·d]`,
/// `state [capacity, heads, d]`.
#[derive(Clone, Debug)]
pub struct KvAppend {
    /// First row written: the tokens that the state already holds.
    pub at: Dim,
}

/// The first rows of a state as f32 `[rows, heads, d]`. Fused attention reads the state itself.
#[derive(Clone, Debug)]
pub struct KvRead {
    /// How many.
    pub rows: Dim,
}

/// Rows to store: `t` rows of `heads` heads of `d`, `stride` floats apart.
pub(crate) struct Rows<'a> {
    pub x: &'a [f32],
    pub stride: usize,
    pub shape: [usize; 3],
}

/// Writes rows into the state's buffer from row `at` on.
pub(crate) fn append(
    cpu: &Cpu,
    state: &mut [f32],
    format: KvFormat,
    at: usize,
    rows: &Rows<'_>,
) -> Result<()> {
    let [t, heads, d] = rows.shape;
    let state: &mut [u8] = bytemuck::cast_slice_mut(state);
    let found = state.len();
    let row = format.head_bytes(d).and_then(|b| b.checked_mul(heads)).unwrap_or(usize::MAX);
    let range = at.checked_mul(row).zip(at.checked_add(t).and_then(|end| end.checked_mul(row)));
    let place = range.and_then(|(from, to)| state.get_mut(from..to)).ok_or_else(|| Error::Shape {
        op: "kv_append",
        wanted: format!("room for {} tokens", at.saturating_add(t)),
        found: format!("a state of {}", found / row.max(1)),
    })?;
    Ok(kernels::kv_store(cpu, rows.x, rows.stride, rows.shape, format, place)?)
}

/// Whether `state` is a cache of `heads` heads of `d` components.
pub(crate) fn is_cache(state: &Meta, heads: usize, d: usize) -> bool {
    let heads_of_d = [Dim::from(heads), Dim::from(d)];
    state.shape.len() == 3 && state.shape[1..] == heads_of_d && KvFormat::of(state.dtype).is_some()
}

impl OpDef for KvAppend {
    fn name(&self) -> &'static str {
        "kv_append"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [rows, state] = operands::<2>("kv_append", inputs)?;
        match (rows.shape.as_slice(), state.shape.as_slice()) {
            ([_, c], [_, heads, d])
                if *c == product(&[heads.clone(), d.clone()]) && KvFormat::of(state.dtype).is_some() =>
            {
                Ok(vec![state.clone()])
            }
            _ => Err(shape_error("kv_append", "rows [t, heads·d] and state [capacity, heads, d]", inputs)),
        }
    }
    fn operations(&self, _: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        0.0
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("kv_append", 0)?;
        let (&[t, c], &[_, heads, d]) = (call.shape("kv_append", 0)?, call.shape("kv_append", 1)?) else {
            return Ok(());
        };
        let (format, at, cpu) = (call.kv_format("kv_append", 1)?, self.at.eval(call.bindings)?, call.cpu);
        let rows = Rows { x, stride: c, shape: [t, heads, d] };
        append(cpu, call.output("kv_append", 0)?, format, at, &rows)
    }
}

impl OpDef for KvRead {
    fn name(&self) -> &'static str {
        "kv_read"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [state] = operands::<1>("kv_read", inputs)?;
        match state.shape.as_slice() {
            [_, heads, d] if KvFormat::of(state.dtype).is_some() => {
                Ok(vec![Meta::f32(vec![self.rows.clone(), heads.clone(), d.clone()])])
            }
            _ => Err(shape_error("kv_read", "state [capacity, heads, d]", inputs)),
        }
    }
    fn operations(&self, _: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        super::count(&outputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let &[capacity, heads, d] = call.shape("kv_read", 0)? else { return Ok(()) };
        let rows = self.rows.eval(call.bindings)?;
        if rows > capacity {
            return Err(Error::Shape {
                op: "kv_read",
                wanted: format!("{rows} tokens"),
                found: format!("a state of {capacity}"),
            });
        }
        let cache = call.kv_rows("kv_read", 0)?;
        for (i, out) in call.output("kv_read", 0)?.chunks_exact_mut(d.max(1)).enumerate() {
            cache.head(i / heads.max(1), i % heads.max(1), out);
        }
        Ok(())
    }
}
