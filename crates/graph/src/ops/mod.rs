//! The ops. One file each family: struct, shape rule, cost, and the call of the CPU kernel.
//!
//! The kernels and their scalar twins live in `pocketglm-tensor`; an op checks shapes when its node is
//! made and sizes again when it runs, because sizes are only known then.

mod attention;
mod conv;
mod elementwise;
mod frame_conv;
mod gather;
mod kv;
mod linear;
mod matmul;
mod norm;
mod qkv;
mod quantise;
mod rope;
mod shape;
mod softmax;
mod source;
#[cfg(test)]
mod tests;
mod top_k;

use pocketglm_tensor::{Cpu, DType, KvFormat, KvRows, Tensor, Weight};

pub use attention::{Attention, AttentionMask};
pub use conv::{BatchNorm, Conv};
pub use elementwise::{Binary, BinaryKind, Scale, Unary, UnaryKind};
pub use frame_conv::{ConvNorm, FrameConv};
pub use gather::{GatherRows, ScatterRows, WeightedGather};
pub use kv::{KvAppend, KvRead};
pub use linear::{Activation, Linear, LinearNorm};
pub use matmul::MatMul;
pub use norm::{InstanceNorm, LayerNorm, NormAdd, RmsNorm};
pub use qkv::{Qkv, QkvRope};
pub use quantise::QuantDequant;
pub use rope::{Rope, RopeLayout, RopeTable};
pub use shape::{Concat, Permute, Reshape, Slice};
pub use softmax::{Softmax, SoftmaxMask};
pub use source::{Constant, Input, State, WeightRef};
pub use top_k::TopK;

use crate::dim::Bindings;
use crate::graph::Meta;
use crate::{Error, Result};

/// What a node computes.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[allow(missing_docs)] // Each variant is documented at its struct.
pub enum Op {
    Input(Input),
    Weight(WeightRef),
    Constant(Constant),
    State(State),
    Unary(Unary),
    Binary(Binary),
    Scale(Scale),
    MatMul(MatMul),
    RmsNorm(RmsNorm),
    LayerNorm(LayerNorm),
    InstanceNorm(InstanceNorm),
    BatchNorm(BatchNorm),
    Softmax(Softmax),
    RopeTable(RopeTable),
    Rope(Rope),
    Reshape(Reshape),
    Permute(Permute),
    Slice(Slice),
    Concat(Concat),
    GatherRows(GatherRows),
    WeightedGather(WeightedGather),
    ScatterRows(ScatterRows),
    KvAppend(KvAppend),
    KvRead(KvRead),
    Conv(Conv),
    FrameConv(FrameConv),
    Linear(Linear),
    Qkv(Qkv),
    Attention(Attention),
    NormAdd(NormAdd),
    TopK(TopK),
    QuantDequant(QuantDequant),
}

/// Work of one call: what a roofline is computed from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions, each counted as one.
    pub operations: f64,
    /// Bytes read and written if every operand moved once.
    pub bytes: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.operations += other.operations;
        self.bytes += other.bytes;
    }
}

/// One operand of a running op.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub data: Data<'a>,
    pub shape: &'a [usize],
}

/// The elements of an operand.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    F32(&'a [f32]),
    I32(&'a [i32]),
    Weight(Weight<'a>),
    /// A quantised table, of which rows are read.
    Rows(&'a Tensor),
    /// A state of keys or values: its format and its bytes, of which there are none where the op writes it.
    Kv(KvFormat, &'a [u8]),
}

/// A running op: operands, results and where to work.
pub(crate) struct Call<'a, 'b> {
    pub cpu: &'a Cpu,
    pub bindings: &'a Bindings,
    pub inputs: &'a [Operand<'a>],
    /// One slice per result. A result that is a state is the whole state buffer.
    pub outputs: &'b mut [&'a mut [f32]],
    /// As long as the op's `scratch` asked for.
    pub scratch: &'b mut [f32],
}

impl<'a> Call<'a, '_> {
    fn operand(&self, op: &'static str, i: usize) -> Result<Operand<'a>> {
        self.inputs.get(i).copied().ok_or_else(|| Error::Shape {
            op,
            wanted: format!("at least {} operands", i + 1),
            found: self.inputs.len().to_string(),
        })
    }

    /// Operand `i` as f32 values.
    pub fn f32(&self, op: &'static str, i: usize) -> Result<&'a [f32]> {
        match self.operand(op, i)?.data {
            Data::F32(x) | Data::Weight(Weight::F32(x)) => Ok(x),
            Data::I32(_) => Err(kind(op, i, "f32", "i32")),
            Data::Weight(_) => Err(kind(op, i, "f32", "a 16-bit or packed weight")),
            Data::Rows(t) => Err(kind(op, i, "f32", t.dtype().name())),
            Data::Kv(format, _) => Err(kind(op, i, "f32", format.dtype().name())),
        }
    }

    /// Operand `i` as indices.
    pub fn i32(&self, op: &'static str, i: usize) -> Result<&'a [i32]> {
        match self.operand(op, i)?.data {
            Data::I32(x) => Ok(x),
            _ => Err(kind(op, i, "i32", "floats")),
        }
    }

    /// Operand `i` as a weight matrix in whatever type it is stored.
    pub fn weight(&self, op: &'static str, i: usize) -> Result<Weight<'a>> {
        match self.operand(op, i)?.data {
            Data::Weight(w) => Ok(w),
            Data::F32(x) => Ok(Weight::F32(x)),
            Data::I32(_) => Err(kind(op, i, "a weight", "i32")),
            Data::Rows(t) => Err(kind(op, i, "a weight", t.dtype().name())),
            Data::Kv(format, _) => Err(kind(op, i, "a weight", format.dtype().name())),
        }
    }

    /// The format of operand `i`, a state of keys or values.
    pub fn kv_format(&self, op: &'static str, i: usize) -> Result<KvFormat> {
        match self.operand(op, i)?.data {
            Data::Kv(format, _) => Ok(format),
            Data::F32(_) => Ok(KvFormat::F32),
            _ => Err(kind(op, i, "a cache", "other data")),
        }
    }

    /// Operand `i` as keys or values: a state `[capacity, heads, d]` or a matrix of f32.
    pub fn kv_rows(&self, op: &'static str, i: usize) -> Result<KvRows<'a>> {
        let operand = self.operand(op, i)?;
        let (row, head) = match *operand.shape {
            [_, heads, d] => (heads, d),
            [_, width] => (1, width),
            _ => (0, 0),
        };
        match operand.data {
            Data::Kv(format, bytes) => {
                let stride = format.head_bytes(head).unwrap_or(0).saturating_mul(row);
                Ok(KvRows::new(format, bytes, stride))
            }
            _ => Ok(KvRows::f32(self.f32(op, i)?, row * head)),
        }
    }

    /// Operand `i` where it is a quantised table.
    pub fn rows(&self, op: &'static str, i: usize) -> Result<Option<&'a Tensor>> {
        Ok(match self.operand(op, i)?.data {
            Data::Rows(t) => Some(t),
            _ => None,
        })
    }

    /// Shape of operand `i`.
    pub fn shape(&self, op: &'static str, i: usize) -> Result<&'a [usize]> {
        Ok(self.operand(op, i)?.shape)
    }

    /// Result `i`.
    pub fn output(&mut self, op: &'static str, i: usize) -> Result<&mut [f32]> {
        let found = self.outputs.len();
        self.outputs.get_mut(i).map(|o| &mut **o).ok_or_else(|| Error::Shape {
            op,
            wanted: format!("at least {} results", i + 1),
            found: found.to_string(),
        })
    }
}

fn kind(op: &'static str, i: usize, wanted: &str, found: &str) -> Error {
    Error::Shape { op, wanted: format!("{wanted} as operand {i}"), found: found.into() }
}

/// What every op defines.
pub(crate) trait OpDef {
    /// Name in reports and errors.
    fn name(&self) -> &'static str;

    /// Shape rule: checks the operands and gives the results.
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>>;

    /// Operations of one call; bytes are counted by the caller from shapes.
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64;

    /// f32 elements of working memory that a call needs besides its results.
    fn scratch(&self, _inputs: &[Vec<usize>], _outputs: &[Vec<usize>]) -> usize {
        0
    }

    /// Whether operand `i` may stay in the type that the checkpoint stores.
    fn takes_weight(&self, _i: usize) -> bool {
        false
    }

    /// Runs the CPU kernel.
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()>;
}

impl Op {
    pub(crate) fn def(&self) -> &dyn OpDef {
        match self {
            Op::Input(o) => o,
            Op::Weight(o) => o,
            Op::Constant(o) => o,
            Op::State(o) => o,
            Op::Unary(o) => o,
            Op::Binary(o) => o,
            Op::Scale(o) => o,
            Op::MatMul(o) => o,
            Op::RmsNorm(o) => o,
            Op::LayerNorm(o) => o,
            Op::InstanceNorm(o) => o,
            Op::BatchNorm(o) => o,
            Op::Softmax(o) => o,
            Op::RopeTable(o) => o,
            Op::Rope(o) => o,
            Op::Reshape(o) => o,
            Op::Permute(o) => o,
            Op::Slice(o) => o,
            Op::Concat(o) => o,
            Op::GatherRows(o) => o,
            Op::WeightedGather(o) => o,
            Op::ScatterRows(o) => o,
            Op::KvAppend(o) => o,
            Op::KvRead(o) => o,
            Op::Conv(o) => o,
            Op::FrameConv(o) => o,
            Op::Linear(o) => o,
            Op::Qkv(o) => o,
            Op::Attention(o) => o,
            Op::NormAdd(o) => o,
            Op::TopK(o) => o,
            Op::QuantDequant(o) => o,
        }
    }

    /// Name in reports and errors.
    pub fn name(&self) -> &'static str {
        self.def().name()
    }

    pub(crate) fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.def().infer(inputs)
    }

    /// Whether the node brings data in rather than computing it.
    pub fn is_source(&self) -> bool {
        matches!(self, Op::Input(_) | Op::Weight(_) | Op::Constant(_) | Op::State(_))
    }

    /// Whether the result is the operand's data under another shape.
    pub fn is_view(&self) -> bool {
        match self {
            Op::Reshape(_) => true,
            Op::Slice(s) => s.axis == 0,
            _ => false,
        }
    }

    /// Whether the node changes a state, so that it runs even where nobody uses its result.
    pub fn writes_state(&self) -> bool {
        self.state_results() > 0
    }

    /// How many of the node's last operands are states that its last results replace in place.
    pub fn state_results(&self) -> usize {
        match self {
            Op::KvAppend(_) => 1,
            Op::Qkv(q) if q.append.is_some() => 2,
            _ => 0,
        }
    }

    /// Operations, and the bytes of all operands and results, of one call.
    pub fn cost(&self, inputs: &[(DType, Vec<usize>)], outputs: &[Vec<usize>]) -> Cost {
        if self.is_source() || self.is_view() {
            return Cost::default();
        }
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|(_, s)| s.clone()).collect();
        let elements = |s: &[usize]| s.iter().map(|&d| d as f64).product::<f64>();
        let keep = inputs.len() - self.state_results().min(inputs.len());
        let mut bytes: f64 =
            outputs.iter().take(outputs.len() - self.state_results()).map(|s| elements(s) * 4.0).sum();
        for (i, (dtype, shape)) in inputs.iter().take(keep).enumerate() {
            let rows = match self {
                // A gather reads the rows it is asked for, not the table.
                Op::GatherRows(_) | Op::WeightedGather(_) if i == 0 => elements(&outputs[0]),
                _ => elements(shape),
            };
            let row = shape.last().copied().unwrap_or(1);
            let bytes_of_row = dtype.row_bytes(row).unwrap_or(0) as f64;
            bytes += rows / row.max(1) as f64 * bytes_of_row;
        }
        Cost { operations: self.def().operations(&shapes, outputs), bytes }
    }
}

/// `inputs` must hold exactly `N` operands.
pub(crate) fn operands<'m, const N: usize>(op: &'static str, inputs: &'m [Meta]) -> Result<&'m [Meta; N]> {
    inputs.try_into().map_err(|_| Error::Shape {
        op,
        wanted: format!("{N} operands"),
        found: inputs.len().to_string(),
    })
}

/// The error of a shape rule: what the op takes, and all operands as they are.
pub(crate) fn shape_error(op: &'static str, wanted: impl Into<String>, inputs: &[Meta]) -> Error {
    let found: Vec<String> = inputs.iter().map(Meta::to_string).collect();
    Error::Shape { op, wanted: wanted.into(), found: found.join(", ") }
}

/// Product of sizes, as the operations count of an element-wise op.
pub(crate) fn count(shape: &[usize]) -> f64 {
    shape.iter().map(|&d| d as f64).product()
}
