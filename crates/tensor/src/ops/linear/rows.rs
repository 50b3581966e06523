//! The rows of a linear layer's parts as columns of a matrix product.

use half::{bf16, f16};

use super::{Epilogue, Part};
use crate::Weight;
use crate::ops::SharedMut;
use crate::ops::gemm::{Finish, Panels};
use crate::ops::tile::panel_columns;
use crate::simd::{Element, Simd, math};

/// Parts, and the order in which their rows are worked on.
///
/// Column `j` of the product is row `j` of the parts. For SwiGLU columns come in chunks whose first half are gate rows
/// and whose second half are the up rows that belong to them; a chunk ends with columns without rows where the rows
/// run out.
pub(super) struct Rows<'a> {
    pub(super) parts: &'a [Part<'a>],
    pub(super) k: usize,
    /// Rows of all parts.
    pub(super) n: usize,
    /// Columns that are finished together.
    pub(super) chunk: usize,
    pub(super) swiglu: bool,
}

impl<'a> Rows<'a> {
    /// Columns of the product.
    pub(super) fn columns(&self) -> usize {
        if self.swiglu { (self.n / 2).div_ceil(self.chunk / 2) * self.chunk } else { self.n }
    }

    /// The row that column `column` is, and how many of the columns from it on are the rows after it.
    #[inline(always)]
    pub(super) fn run(&self, column: usize) -> (usize, usize) {
        if !self.swiglu {
            return (column, self.n.saturating_sub(column));
        }
        let (half, inner) = (self.chunk / 2, self.n / 2);
        let (base, within) = (column / self.chunk * half, column % self.chunk);
        let row = base + within % half;
        let count = (half - within % half).min(inner.saturating_sub(row));
        (if within < half { row } else { inner + row }, count)
    }

    /// The part that holds row `row`, the row's place in it, and how many rows of the part begin there.
    #[inline(always)]
    pub(super) fn find(&self, mut row: usize) -> Option<(&'a Part<'a>, usize, usize)> {
        for part in self.parts {
            if row < part.rows {
                return Some((part, row, part.rows - row));
            }
            row -= part.rows;
        }
        None
    }

    /// `dst[p * NR + c]` for `WIDTH` columns.
    ///
    /// # Safety
    /// As for [`Panels::pack`].
    #[inline(always)]
    unsafe fn pack_block<S: Simd>(&self, s: S, column: usize, k0: usize, kc: usize, dst: *mut f32) {
        let (row, count) = self.run(column);
        if let Some((part, row, rows)) = self.find(row)
            && count.min(rows) >= S::WIDTH
        {
            let at = row * self.k + k0;
            // SAFETY: `WIDTH` rows from `row` and `kc` elements from `k0` lie in the part, whose size was checked.
            unsafe {
                match part.weight {
                    Weight::F32(v) => pack_full::<S, f32>(s, v.as_ptr().add(at), self.k, kc, dst),
                    Weight::F16(v) => pack_full::<S, f16>(s, v.as_ptr().add(at).cast(), self.k, kc, dst),
                    Weight::BF16(v) => pack_full::<S, bf16>(s, v.as_ptr().add(at).cast(), self.k, kc, dst),
                    // Packed parts have a product of their own.
                    Weight::Packed(_) => {}
                }
            }
            return;
        }
        // At an end or a border between parts: one column after the other.
        for c in 0..S::WIDTH {
            let (row, count) = self.run(column + c);
            let found = if count == 0 { None } else { self.find(row) };
            for p in 0..kc {
                let v =
                    found.and_then(|(part, row, _)| part.weight.get(row * self.k + k0 + p)).unwrap_or(0.0);
                // SAFETY: inside the panel.
                unsafe { *dst.add(p * panel_columns(S::WIDTH) + c) = v };
            }
        }
    }
}

/// `dst[p * NR + c] = src[c * stride + p]` for `c < WIDTH`, `p < kc`.
///
/// # Safety
/// Those elements are readable and writable.
#[inline(always)]
unsafe fn pack_full<S: Simd, E: Element>(s: S, src: *const E, stride: usize, kc: usize, dst: *mut f32) {
    let nr = panel_columns(S::WIDTH);
    let mut p = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while p + 2 * S::WIDTH <= kc {
            E::transpose_wide(s, src.add(p), stride, dst.add(p * nr), nr);
            p += 2 * S::WIDTH;
        }
        if p + S::WIDTH <= kc {
            s.transpose(src.add(p), stride, dst.add(p * nr), nr);
            p += S::WIDTH;
        }
        for p in p..kc {
            for c in 0..S::WIDTH {
                *dst.add(p * nr + c) = src.add(c * stride + p).read().widen();
            }
        }
    }
}

impl Panels for Rows<'_> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, s: S, column: usize, k0: usize, kc: usize, dst: *mut f32) {
        let nr = panel_columns(S::WIDTH);
        for c in (0..nr).step_by(S::WIDTH) {
            // SAFETY: the caller's promise.
            unsafe { self.pack_block(s, column + c, k0, kc, dst.add(c)) };
        }
    }

    fn stored(&self, column: usize, k0: usize, kc: usize) -> (*const u8, usize, usize, usize) {
        let (row, count) = self.run(column);
        let Some((part, row, rows)) = self.find(row) else { return (std::ptr::null(), 0, 0, 0) };
        let (base, size) = match part.weight {
            Weight::F32(v) => (v.as_ptr().cast::<u8>(), 4),
            Weight::F16(v) | Weight::BF16(v) => (v.as_ptr().cast(), 2),
            Weight::Packed(_) => return (std::ptr::null(), 0, 0, 0),
        };
        let at = base.wrapping_add((row * self.k + k0) * size);
        (at, count.min(rows).min(self.chunk), self.k * size, kc * size)
    }
}

/// Adds biases, applies the epilogue and stores.
pub(super) struct Store<'a> {
    pub(super) rows: &'a Rows<'a>,
    /// Biases of all rows, or none.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
    /// `[m, outputs]`
    pub(super) y: SharedMut<f32>,
    /// Columns of `y`, and the first of them that these rows make.
    pub(super) stride: usize,
    pub(super) offset: usize,
    pub(super) outputs: usize,
    /// Whether results go past the caches: see [`Store::streams`].
    pub(super) stream: bool,
}

/// Floats of a result that no cache holds until somebody reads it.
const STREAM: usize = 8 << 20;

impl Store<'_> {
    /// Whether `floats` results in rows of `stride`, from column `offset` on, are worth it and whole vectors of them are whole
    /// cache lines. Tasks of `chunk` columns begin at one, also where a chunk is two halves.
    pub(super) fn streams(
        y: &SharedMut<f32>,
        floats: usize,
        [stride, offset]: [usize; 2],
        chunk: usize,
    ) -> bool {
        let lines = [stride, offset, chunk / 2].iter().all(|n| n.is_multiple_of(16));
        floats >= STREAM && lines && y.at(0).addr().is_multiple_of(64)
    }
}

impl Finish for Store<'_> {
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize, column: usize, sums: &[f32]) {
        let swiglu = self.rows.swiglu;
        let half = self.rows.chunk / 2;
        let (first, most) = if swiglu { (column / 2, half) } else { (column, sums.len()) };
        let count = most.min(self.outputs - first);
        let mut i = 0;
        while i < count {
            let n = (count - i).min(S::WIDTH);
            // SAFETY: `n` sums, biases and outputs from `i` exist; this task owns these outputs. What is streamed is whole cache
            // lines, as `streams` found, and `done` follows it.
            unsafe {
                let sum = |at: usize, row: usize| {
                    let v = s.load_n(sums.as_ptr().add(at), n);
                    match self.bias {
                        Some(bias) => s.add(v, s.load_n(bias.as_ptr().add(row), n)),
                        None => v,
                    }
                };
                let v = sum(i, first + i);
                let v = match self.epilogue {
                    Epilogue::None => v,
                    Epilogue::Gelu => math::gelu(s, v),
                    Epilogue::Silu => math::silu(s, v),
                    // The order of the operands lets NaN through.
                    Epilogue::Relu => s.max(s.splat(0.0), v),
                    Epilogue::SwiGlu => s.mul(math::silu(s, v), sum(half + i, self.outputs + first + i)),
                };
                let to = self.y.at(row * self.stride + self.offset + first + i);
                if self.stream && n == S::WIDTH { s.stream(to, v) } else { s.store_n(to, n, v) }
            }
            i += n;
        }
    }

    fn place(&self, row: usize, column: usize) -> Option<*const u8> {
        let through = !self.stream && !self.rows.swiglu;
        through
            .then(|| self.y.at(0).wrapping_add(row * self.stride + self.offset + column).cast_const().cast())
    }

    #[inline(always)]
    fn done<S: Simd>(&self, s: S) {
        if self.stream {
            s.fence();
        }
    }
}
