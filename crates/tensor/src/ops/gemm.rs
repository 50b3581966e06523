//! Blocked matrix product: `sums[i, j] = sum_p x[i, p] * b[p, j]`; `x: [m, k]`, `b: [k, n]` made panel by panel.
//!
//! `x` is packed once for a block of rows. A task owns a chunk of columns: for each block of `k` it packs the chunk's
//! panels, widened to f32, into memory that stays in the second-level cache, runs all tiles over them, and at the end
//! hands finished sums to a [`Finish`], which adds biases, applies activations and stores.

use super::SharedMut;
use super::tile::{Block, Tiles, pack_rows, panel_columns, tile_rows};
use crate::simd::{Isa, Kernel, Simd};
use crate::{Cpu, Result};

/// Most columns of one task: each packed row is used for so many columns before it is fetched again.
const MAX_CHUNK: usize = 128;
/// Fewest, for products too narrow to give every thread wider ones.
const MIN_CHUNK: usize = 64;
/// Steps of `k` between two uses of the same sums: a panel (128 x 64 floats) stays in the first-level cache while the
/// rows stream past it; a packed chunk, the rows and the sums of a block stay in the second.
const KC: usize = 128;
/// Floats of packed `x`: beyond it, rows are worked on in several blocks.
const PACKED_FLOATS: usize = 2 << 20;
/// Most rows of one block.
const MAX_ROWS: usize = 512;

/// The right operand, which makes packed panels of itself.
pub(crate) trait Panels: Sync {
    /// `dst[p * NR + c]` = element `(k0 + p, column + c)` for `p < kc`, `c < NR`; zero where there is none.
    ///
    /// # Safety
    /// `kc * NR` writable floats at `dst`.
    unsafe fn pack<S: Simd>(&self, s: S, column: usize, k0: usize, kc: usize, dst: *mut f32);

    /// Where the stored elements `(k0.., column..)` are, as rows of `k` elements: address, rows, bytes from row to
    /// row, bytes of `kc` elements. Zero rows where that is unknown.
    fn stored(&self, column: usize, k0: usize, kc: usize) -> (*const u8, usize, usize, usize);
}

/// What happens to finished sums.
pub(crate) trait Finish: Sync {
    /// Takes the sums of row `row` and the columns from `column`, as many as a chunk has.
    fn finish<S: Simd>(&self, s: S, row: usize, column: usize, sums: &[f32]);

    /// Where the result of row `row` and column `column` goes, if it will be written there soon and through the caches.
    fn place(&self, _row: usize, _column: usize) -> Option<*const u8> {
        None
    }

    /// Follows the last of some rows.
    #[inline(always)]
    fn done<S: Simd>(&self, _: S) {}
}

/// Columns of one task for a product of `n`: at least four tasks a thread if that is possible. Sums do not depend on it.
pub(crate) fn chunk_columns(cpu: &Cpu, n: usize) -> usize {
    let mut chunk = MAX_CHUNK;
    while chunk > MIN_CHUNK && n < chunk * cpu.threads() * 4 {
        chunk /= 2;
    }
    chunk
}

/// Rows that are packed at a time.
fn block_rows(isa: Isa, m: usize, k: usize) -> usize {
    let mr = tile_rows(isa.width());
    let most = (PACKED_FLOATS / k.max(1)).min(MAX_ROWS) / mr * mr;
    m.div_ceil(m.div_ceil(most.max(mr)).max(1))
}

/// Floats of scratch for the widest products: packed rows, and for each thread packed panels and sums.
pub(crate) fn scratch_floats(cpu: &Cpu, m: usize, k: usize) -> usize {
    scratch_of(cpu, m, k, MAX_CHUNK)
}

fn scratch_of(cpu: &Cpu, m: usize, k: usize, chunk: usize) -> usize {
    let rows = block_rows(cpu.isa(), m, k);
    (rows * k).next_multiple_of(16) + cpu.threads() * (k.min(KC) + rows) * chunk
}

struct Pack<'a, P> {
    panels: &'a P,
    column: usize,
    count: usize,
    k0: usize,
    kc: usize,
    dst: *mut f32,
}

impl<P: Panels> Kernel for Pack<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let nr = panel_columns(S::WIDTH);
        for i in 0..self.count {
            // SAFETY: the task's panel buffer has room for a chunk's panels.
            unsafe {
                self.panels.pack(s, self.column + i * nr, self.k0, self.kc, self.dst.add(i * nr * self.kc))
            };
        }
    }
}

pub(crate) struct FinishRows<'a, F> {
    pub(crate) finish: &'a F,
    pub(crate) first_row: usize,
    pub(crate) column: usize,
    /// Sums `[rows, chunk]`.
    pub(crate) sums: &'a [f32],
    pub(crate) chunk: usize,
}

impl<F: Finish> Kernel for FinishRows<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, sums) in self.sums.chunks_exact(self.chunk).enumerate() {
            self.finish.finish(s, self.first_row + i, self.column, sums);
        }
        self.finish.done(s);
    }
}

/// Multiplies `m` rows of `k`, `x_stride` floats apart, with `n` columns, in chunks of [`chunk_columns`].
pub(crate) fn gemm<P: Panels, F: Finish>(
    cpu: &Cpu,
    x: &[f32],
    x_stride: usize,
    [m, k, n]: [usize; 3],
    columns: usize,
    panels: &P,
    finish: &F,
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    let isa = cpu.isa();
    let nr = panel_columns(isa.width());
    let rows = block_rows(isa, m, k);
    let mut scratch = cpu.scratch(scratch_of(cpu, m, k, columns))?;
    let packed_len = (rows * k).next_multiple_of(16);
    let (packed, rest) = scratch.split_at_mut(packed_len);
    let (packed, rest) = (SharedMut::new(packed), SharedMut::new(rest));
    let chunks = n.div_ceil(columns);
    let most_steps = k.min(KC);
    let share = (most_steps + rows) * columns;

    for first_row in (0..m).step_by(rows) {
        let rows = rows.min(m - first_row);
        let tiles = Tiles::new(rows, isa.width());
        cpu.parallel(tiles.count, &|t| {
            let start = tiles.start(t);
            let mr = tiles.start(t + 1) - start;
            let src = x[(first_row + start) * x_stride..].as_ptr();
            // SAFETY: the caller checked `x`; the packed tiles lie one after the other in `packed`.
            unsafe { pack_rows(src, x_stride, mr, k, packed.at(start * k)) };
        });
        cpu.parallel_slots(chunks, &|slot, chunk| {
            let column = chunk * columns;
            let count = columns.min(n - column).div_ceil(nr);
            let b = rest.at(slot * share);
            let sums = rest.at(slot * share + most_steps * columns);
            let mut k0 = 0;
            loop {
                let kc = most_steps.min(k - k0);
                isa.run(Pack { panels, column, count, k0, kc, dst: b });
                let (next_column, next_k) =
                    if k0 + kc < k { (column, k0 + kc) } else { (column + columns, 0) };
                let (next, next_rows, next_stride, next_bytes) = if next_column < n {
                    panels.stored(next_column, next_k, kc)
                } else {
                    (std::ptr::null(), 0, 0, 0)
                };
                isa.run(&Block {
                    a: packed.at(0),
                    a_k: k,
                    a_from: k0,
                    tiles,
                    k: kc,
                    b,
                    panels: count,
                    c: sums,
                    c_stride: columns,
                    first: k0 == 0,
                    next,
                    next_rows,
                    next_stride,
                    next_bytes,
                });
                k0 += kc;
                if k0 >= k {
                    break;
                }
            }
            // SAFETY: this slot's sums, written above as far as columns exist.
            let sums = unsafe { rest.slice(slot * share + most_steps * columns..slot * share + share) };
            isa.run(FinishRows { finish, first_row, column, sums: &sums[..rows * columns], chunk: columns });
        });
    }
    Ok(())
}
