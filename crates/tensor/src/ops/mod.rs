//! The kernels. Each file has its formula with shapes at the top, the kernel `op(cpu, ...)`, and `op_twin(...)`, the
//! plain scalar reference that tests compare against.
//!
//! All activations are f32, row-major. Sizes that do not fit give a typed error. Results are the same bits for any
//! number of threads: work is split so that each output element is computed in the same order.

// Kernels index by counters on purpose: the formulas are written with indices.
#![allow(clippy::needless_range_loop)]

mod attention;
mod conv;
mod conv_frames;
mod conv_groups;
mod conv_spectrum;
mod elementwise;
mod fewer;
mod gather;
mod gemm;
mod instance_norm;
mod kv;
mod linear;
mod matmul;
mod norm;
pub(crate) mod pairs;
mod permute;
mod rope;
mod sample;
mod softmax;
pub(crate) mod tile;

pub use attention::{
    Attention, Mask, attention, attention_int8, attention_int8_scratch_bytes, attention_scratch_bytes,
    attention_twin,
};
pub use conv::{Conv1d, Conv2d, batch_norm, batch_norm_twin, conv1d, conv1d_twin, conv2d, conv2d_twin};
pub use conv_frames::{
    FrameConv, FrameNorm, conv_frames, conv_frames_fewer_scratch_bytes, conv_frames_scratch_bytes,
    conv_frames_twin,
};
pub use conv_groups::conv_groups_take;
pub use elementwise::{
    Binary, Unary, add_to, binary, binary_broadcast, binary_broadcast_twin, binary_twin, broadcast_shape,
    unary, unary_twin,
};
pub use gather::{gather_rows, gather_rows_twin, weighted_gather, weighted_gather_twin};
pub use instance_norm::{instance_norm, instance_norm_twin};
pub use kv::{kv_store, kv_store_twin};
pub use linear::{
    Epilogue, Part, linear, linear_fewer, linear_fewer_scratch_bytes, linear_rounded, linear_scratch_bytes,
    linear_twin, packed_scratch_bytes, round_activations,
};
pub use matmul::{MatmulB, matmul, matmul_twin};
pub use norm::{layer_norm, layer_norm_twin, norm_add, norm_add_twin, rms_norm, rms_norm_twin};
pub use permute::{permute, permute_twin};
pub use rope::{RopeLayout, rope, rope_in_place, rope_table, rope_twin};
pub use sample::{argmax, top_k};
pub use softmax::{softmax, softmax_causal, softmax_causal_twin, softmax_twin};

#[cfg(test)]
pub(crate) use elementwise::{erf_f64, gelu_f64};

use std::ops::Range;

use crate::{Cpu, Error, Result};

/// The product of `dims`, as the size of an operand.
fn count(op: &'static str, operand: &'static str, dims: &[usize]) -> Result<usize> {
    dims.iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= isize::MAX as usize / 8)
        .ok_or_else(|| Error::Value {
            op,
            what: format!("{operand} of shape {dims:?} does not fit in memory addresses"),
        })
}

/// The operand has exactly the elements that the others imply.
fn expect(op: &'static str, operand: &'static str, dims: &[usize], found: usize) -> Result<()> {
    let wanted = count(op, operand, dims)?;
    if wanted == found { Ok(()) } else { Err(Error::Size { op, operand, wanted, found }) }
}

/// The operand holds `rows` rows of `width` elements that begin `stride` elements apart.
fn expect_strided(
    op: &'static str,
    operand: &'static str,
    rows: usize,
    width: usize,
    stride: usize,
    found: usize,
) -> Result<()> {
    if stride < width {
        return Err(Error::Value {
            op,
            what: format!("{operand} has stride {stride} for rows of {width} elements"),
        });
    }
    if rows == 0 {
        return Ok(());
    }
    let wanted = count(op, operand, &[rows - 1, stride])?.saturating_add(width);
    if found >= wanted { Ok(()) } else { Err(Error::Size { op, operand, wanted, found }) }
}

/// A pointer to elements that tasks write, each its own part.
#[derive(Clone, Copy)]
struct SharedMut<T>(*mut T);

// SAFETY: a plain address; every use states why its part is not shared.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    fn new(slice: &mut [T]) -> SharedMut<T> {
        SharedMut(slice.as_mut_ptr())
    }

    /// The address of element `i`. (A method, so that closures capture the wrapper and not the bare pointer.)
    #[inline(always)]
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// They lie in the slice that this was made of, and nobody else uses them meanwhile.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "disjoint parts of one slice for several tasks, see the contract")]
    unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(range.start), range.len()) }
    }
}

/// Elements that one task should at least touch, so that handing it out costs little.
const GRAIN: usize = 16 * 1024;

/// Runs `f` on ranges that cover `0..rows`, in parallel where `rows * width` is worth it.
fn for_rows(cpu: &Cpu, rows: usize, width: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    let most = cpu.threads() * 4;
    let tasks = (rows.saturating_mul(width) / GRAIN).clamp(1, most).min(rows.max(1));
    let share = rows.div_ceil(tasks);
    cpu.parallel(tasks, &|task| {
        let start = (task * share).min(rows);
        f(start..(start + share).min(rows));
    });
}

#[cfg(test)]
mod check;
