//! The inner kernel of matrix products: a tile of sums that stays in registers.
//!
//! `c[i, j] (+)= sum_p a[i, p] * b[p, j]` for `i < mr`, `j < NR`, `p < k`. The vectors run along `j`: one step loads
//! one row of the packed panel `b: [k, NR]` and multiplies it with broadcast elements of `a`.

use crate::simd::{Kernel, Simd};

/// Rows of a full tile: as many as leave registers for a panel row and a broadcast.
///
/// With AVX-512 few rows and wide panels: machines were seen to do about one load of a vector or broadcast in a cycle,
/// so 6 + 4 loads for 24 multiply-adds are better than 14 + 2 for 28.
pub(crate) const fn tile_rows(width: usize) -> usize {
    match width {
        16 => 6,
        8 => 6,
        4 => 12,
        _ => 4,
    }
}

/// Columns of a panel: four vectors with AVX-512, else two, or four scalars; a divisor of 64.
pub(crate) const fn panel_columns(width: usize) -> usize {
    match width {
        1 => 4,
        16 => 64,
        _ => 2 * width,
    }
}

/// How rows are cut into tiles: as few as possible, and as even as possible.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    rows: usize,
    pub(crate) count: usize,
}

impl Tiles {
    pub(crate) fn new(rows: usize, width: usize) -> Tiles {
        Tiles::of(rows, tile_rows(width))
    }

    /// Tiles of at most `most` rows.
    pub(crate) fn of(rows: usize, most: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(most) }
    }

    /// First row of tile `i`; for `i == count` (and beyond, in proportion) the number of rows.
    #[inline(always)]
    pub(crate) fn start(&self, i: usize) -> usize {
        i * self.rows / self.count.max(1)
    }
}

/// Rows `a` that are stored `[k, mr]`, as [`pack_rows`] makes them.
pub(crate) const PACKED: usize = 0;

/// `dst[p * mr + r] = src[r * stride + p]` for `r < mr`, `p < k`.
///
/// # Safety
/// Those elements are readable and writable.
#[inline(always)]
pub(crate) unsafe fn pack_rows(src: *const f32, stride: usize, mr: usize, k: usize, dst: *mut f32) {
    for p in 0..k {
        for r in 0..mr {
            // SAFETY: the caller's promise.
            unsafe { *dst.add(p * mr + r) = *src.add(r * stride + p) };
        }
    }
}

/// One tile of `MR` rows. Element `a[i, p]` is at `i + p * MR` where `A_STRIDE` is [`PACKED`], else at
/// `i * A_STRIDE + p`.
///
/// # Safety
/// `a` and `b` as described are readable; each of `into`, rows of `NR` floats at `stride`, is writable and, unless
/// `first`, holds the sums so far.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const A_STRIDE: usize>(
    s: S,
    k: usize,
    a: *const f32,
    b: *const f32,
    into: &[Into],
    stride: usize,
    ahead: Ahead,
) {
    let mut sums = [[s.splat(0.0); NV]; MR];
    // SAFETY: every address below is an element that the caller promised.
    unsafe {
        // Sums are asked for in the last steps, a row in each: a long panel passes through the first-level cache before.
        let late = (into.len() * MR).min(k);
        let asked = ahead.lines.min(k - late);
        for p in 0..asked {
            ahead.ask(s, p);
            step::<S, MR, NV, A_STRIDE>(s, p, a, b, &mut sums);
        }
        for p in asked..k - late {
            step::<S, MR, NV, A_STRIDE>(s, p, a, b, &mut sums);
        }
        for p in k - late..k {
            ask_for_sums::<S, MR, NV>(s, into, stride, p - (k - late));
            if p < ahead.lines {
                ahead.ask(s, p);
            }
            step::<S, MR, NV, A_STRIDE>(s, p, a, b, &mut sums);
        }
        write_back(s, &sums, into, stride);
    }
}

/// Adds a tile to all its sums, or begins them with it.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn write_back<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    sums: &[[S::V; NV]; MR],
    into: &[Into],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for to in into {
            // Signs and plain stores leave the units of multiply-adds to the next tile.
            macro_rules! each {
                (|$v:ident, $at:ident| $value:expr) => {
                    for i in 0..MR {
                        for j in 0..NV {
                            let $at = to.c.add(i * stride + j * S::WIDTH);
                            let $v = sums[i][j];
                            s.store($at, $value);
                        }
                    }
                };
            }
            if to.first && to.factor == 1.0 {
                each!(|v, _at| v);
            } else if to.first {
                each!(|v, at| s.mul(v, s.splat(to.factor)));
            } else if to.factor == 1.0 {
                each!(|v, at| s.add(s.load(at), v));
            } else if to.factor == -1.0 {
                each!(|v, at| s.sub(s.load(at), v));
            } else {
                each!(|v, at| s.fma(v, s.splat(to.factor), s.load(at)));
            }
        }
    }
}

/// Asks for row `row` of all rows of all sums, if there is one.
#[inline(always)]
pub(super) fn ask_for_sums<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    into: &[Into],
    stride: usize,
    row: usize,
) {
    if let Some(to) = into.get(row / MR) {
        for line in 0..(NV * S::WIDTH).div_ceil(16) {
            s.prefetch_near(to.c.wrapping_add(row % MR * stride + line * 16).cast());
        }
    }
}

/// One step of a tile: `sums[i, j] += a[i, p] * b[p, j]`.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn step<S: Simd, const MR: usize, const NV: usize, const A_STRIDE: usize>(
    s: S,
    p: usize,
    a: *const f32,
    b: *const f32,
    sums: &mut [[S::V; NV]; MR],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [s.splat(0.0); NV];
        for j in 0..NV {
            row[j] = s.load(b.add((p * NV + j) * S::WIDTH));
        }
        for i in 0..MR {
            let at = if A_STRIDE == PACKED { p * MR + i } else { i * A_STRIDE + p };
            let x = s.splat(*a.add(at));
            for j in 0..NV {
                sums[i][j] = s.fma(x, row[j], sums[i][j]);
            }
        }
    }
}

/// Memory that will be used soon: rows of some cache lines, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    pub(crate) base: *const u8,
    pub(crate) stride: usize,
    /// Lines of a row, and `2^16` divided by that.
    row: usize,
    inverse: usize,
}

impl Lines {
    /// Rows of `row` lines, fewer than `2^16`. Hundreds of lines are right; far beyond, addresses may be others.
    pub(crate) fn new(base: *const u8, stride: usize, row: usize) -> Lines {
        Lines { base, stride, row, inverse: (1usize << 16).div_ceil(row.max(1)) }
    }

    /// One long row.
    pub(crate) fn run(base: *const u8) -> Lines {
        Lines { base, stride: 0, row: 0, inverse: 0 }
    }

    /// The rows from row `first` on.
    pub(crate) fn from(self, first: usize) -> Lines {
        Lines { base: self.base.wrapping_add(first * self.stride), ..self }
    }

    /// Lines of so many rows.
    pub(crate) fn of_rows(&self, rows: usize) -> usize {
        rows * self.row
    }

    #[inline(always)]
    pub(crate) fn address(&self, line: usize) -> *const u8 {
        let row = line.wrapping_mul(self.inverse) >> 16;
        let within = line.wrapping_sub(row.wrapping_mul(self.row));
        self.base.wrapping_add(row.wrapping_mul(self.stride)).wrapping_add(within.wrapping_mul(64))
    }
}

/// What is asked for into the second-level cache while a tile computes: a line of both in each of the first steps.
/// A few lines too many do no harm.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) both: [Lines; 2],
    pub(crate) lines: usize,
}

impl Ahead {
    pub(crate) fn none() -> Ahead {
        Ahead { both: [Lines::run(std::ptr::null()); 2], lines: 0 }
    }

    /// What a tile of pairs takes: a run, of which it takes its share, and then the first of both.
    pub(crate) fn behind(self, run: *const f32) -> Ahead {
        Ahead { both: [Lines::run(run.cast()), self.both[0]], lines: self.lines }
    }

    #[inline(always)]
    pub(super) fn ask<S: Simd>(&self, s: S, line: usize) {
        s.prefetch(self.both[0].address(line));
        s.prefetch(self.both[1].address(line));
    }
}

/// Calls [`tile`] for `mr` rows.
macro_rules! for_mr {
    ($mr:expr, $nv:literal, $stride:ident, $args:tt, [$($n:literal)*]) => {
        match $mr {
            $($n => tile::<S, $n, $nv, $stride> $args,)*
            _ => {}
        }
    };
}

/// Sums that a tile is added to, times a factor, or that it begins.
#[derive(Clone, Copy)]
pub(crate) struct Into {
    pub(crate) c: *mut f32,
    pub(crate) factor: f32,
    pub(crate) first: bool,
}

impl Into {
    /// The sums `c` themselves.
    pub(crate) fn sums(c: *mut f32, first: bool) -> Into {
        Into { c, factor: 1.0, first }
    }
}

/// Operands of one tile of `mr` rows, see [`tile`].
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) mr: usize,
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) b: *const f32,
    pub(crate) into: &'a [Into],
    /// Floats from one row of sums to the next.
    pub(crate) stride: usize,
    pub(crate) ahead: Ahead,
}

/// A tile as a kernel, so that there is one copy of it for each instruction set.
struct Call<'a, const A_STRIDE: usize>(Tile<'a>);

impl<const A_STRIDE: usize> Kernel for Call<'_, A_STRIDE> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { mr, k, a, b, into, stride, ahead } = self.0;
        // SAFETY: the promise of `run_tile`'s caller, where alone these are made.
        unsafe {
            match S::WIDTH {
                16 => {
                    for_mr!(mr, 4, A_STRIDE, (s, k, a, b, into, stride, ahead), [1 2 3 4 5 6])
                }
                8 => for_mr!(mr, 2, A_STRIDE, (s, k, a, b, into, stride, ahead), [1 2 3 4 5 6]),
                4 => {
                    for_mr!(mr, 2, A_STRIDE, (s, k, a, b, into, stride, ahead), [1 2 3 4 5 6 7 8 9 10 11 12])
                }
                _ => for_mr!(mr, 4, A_STRIDE, (s, k, a, b, into, stride, ahead), [1 2 3 4]),
            }
        }
    }
}

/// One tile of `mr` rows, see [`tile`].
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(crate) unsafe fn run_tile<S: Simd, const A_STRIDE: usize>(s: S, t: Tile<'_>) {
    s.call(Call::<A_STRIDE>(t));
}

/// All tiles of packed rows times all panels of a chunk: `c[i, :] (+)= a[i, :] b`.
pub(crate) struct Block {
    /// Packed rows: tile `t` begins at `start(t) * a_k + a_from * mr`.
    pub(crate) a: *const f32,
    /// Steps that were packed, and the first one used.
    pub(crate) a_k: usize,
    pub(crate) a_from: usize,
    pub(crate) tiles: Tiles,
    /// Steps of this block.
    pub(crate) k: usize,
    /// Panels `[k, NR]`, one after the other.
    pub(crate) b: *const f32,
    pub(crate) panels: usize,
    /// Sums, rows `c_stride` floats apart.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    pub(crate) first: bool,
    /// What will be packed next: rows, their distance in bytes, bytes of a row (a power of two of cache lines).
    pub(crate) next: *const u8,
    pub(crate) next_rows: usize,
    pub(crate) next_stride: usize,
    pub(crate) next_bytes: usize,
}

impl Block {
    /// What the tile of rows `t` and panel `panel` asks for: its share of the next block's weights, and of the tile
    /// of rows whose turn is [`GROUP`] tiles later. The shares are even, because only about a dozen lines can be on
    /// their way at a time.
    #[inline(always)]
    fn ahead(&self, t: usize, panel: usize) -> Ahead {
        let (tile, from) = match t + GROUP {
            later if later < self.tiles.count => (later, self.a_from),
            later => (later - self.tiles.count, self.a_from + self.k),
        };
        let from = if from < self.a_k { from } else { 0 };
        let start = self.tiles.start(tile);
        let mr = self.tiles.start(tile + 1).wrapping_sub(start);
        let run_lines = if tile < self.tiles.count { (mr * self.k / 16).div_ceil(self.panels) } else { 0 };
        let run = self.a.wrapping_add(start * self.a_k + from * mr + panel * run_lines * 16);
        let run = Lines::run(run.cast());
        let lines = self.next_bytes / 64;
        let rows = self.next_rows.div_ceil(self.tiles.count * self.panels);
        let first = (panel * self.tiles.count + t) * rows;
        if first >= self.next_rows || lines == 0 {
            return Ahead { both: [run; 2], lines: run_lines };
        }
        let base = self.next.wrapping_add(first * self.next_stride);
        let weights = Lines::new(base, self.next_stride, lines);
        Ahead { both: [weights, run], lines: run_lines.max(rows * lines) }
    }
}

/// Tiles of rows that stay in the second-level cache while all panels pass by.
const GROUP: usize = 24;

impl Kernel for &Block {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let nr = panel_columns(S::WIDTH);
        // A panel stays in the first-level cache while a group's tiles pass by, a group in the second while the panels
        // do.
        for group in (0..self.tiles.count).step_by(GROUP) {
            for panel in 0..self.panels {
                let b = self.b.wrapping_add(panel * nr * self.k);
                for t in group..(group + GROUP).min(self.tiles.count) {
                    let start = self.tiles.start(t);
                    let mr = self.tiles.start(t + 1) - start;
                    let a = self.a.wrapping_add(start * self.a_k + self.a_from * mr);
                    let c = self.c.wrapping_add(start * self.c_stride + panel * nr);
                    let ahead = self.ahead(t, panel);
                    // SAFETY: who made the block promises that its operands lie inside their buffers.
                    unsafe {
                        let (k, stride, into) = (self.k, self.c_stride, &[Into::sums(c, self.first)]);
                        run_tile::<S, PACKED>(s, Tile { mr, k, a, b, into, stride, ahead });
                    }
                }
            }
        }
    }
}
