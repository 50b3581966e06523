//! The inner kernel of matrix products: a tile of sums that stays in registers.
//!
//! `c[i, j] (+)= sum_p a[i, p] * b[p, j]` for `i < mr`, `j < NR`, `p < k`. The vectors run along `j`: one step loads
//! one row of the packed panel `b: [k, NR]` and multiplies it with broadcast elements of `a`.

use crate::simd::{Kernel, Simd};

/// Rows of a full tile: as many as leave registers for a panel row and a broadcast.
pub(crate) const fn tile_rows(width: usize) -> usize {
    match width {
        16 => 14,
        8 => 6,
        4 => 12,
        _ => 4,
    }
}

/// Columns of a panel, two vectors or four scalars; a divisor of 64.
pub(crate) const fn panel_columns(width: usize) -> usize {
    if width == 1 { 4 } else { 2 * width }
}

/// How rows are cut into tiles: as few as possible, and as even as possible.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    rows: usize,
    pub(crate) count: usize,
}

impl Tiles {
    pub(crate) fn new(rows: usize, width: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(tile_rows(width)) }
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
pub(crate) unsafe fn pack_rows(
    src: *const f32,
    stride: usize,
    mr: usize,
    k: usize,
    scale: f32,
    dst: *mut f32,
) {
    for p in 0..k {
        for r in 0..mr {
            // SAFETY: the caller's promise.
            unsafe { *dst.add(p * mr + r) = *src.add(r * stride + p) * scale };
        }
    }
}

/// One tile of `MR` rows. Element `a[i, p]` is at `i + p * MR` where `A_STRIDE` is [`PACKED`], else at
/// `i * A_STRIDE + p`.
///
/// # Safety
/// `a` and `b` as described are readable, `c`, rows of `NR` floats at `c_stride`, is writable and, unless `first`,
/// holds the sums so far.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const A_STRIDE: usize>(
    s: S,
    k: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    c_stride: usize,
    first: bool,
    ahead: Ahead,
) {
    let mut sums = [[s.splat(0.0); NV]; MR];
    // SAFETY: every address below is an element that the caller promised.
    unsafe {
        if !first {
            for i in 0..MR {
                for j in 0..NV {
                    sums[i][j] = s.load(c.add(i * c_stride + j * S::WIDTH));
                }
            }
        }
        let asked = ahead.lines.min(k / Ahead::STEPS);
        for line in 0..asked {
            s.prefetch(ahead.address(line));
            s.prefetch(ahead.run.wrapping_add(line * 64));
            for p in line * Ahead::STEPS..(line + 1) * Ahead::STEPS {
                step::<S, MR, NV, A_STRIDE>(s, p, a, b, &mut sums);
            }
        }
        for p in asked * Ahead::STEPS..k {
            step::<S, MR, NV, A_STRIDE>(s, p, a, b, &mut sums);
        }
        for i in 0..MR {
            for j in 0..NV {
                s.store(c.add(i * c_stride + j * S::WIDTH), sums[i][j]);
            }
        }
    }
}

/// One step of a tile: `sums[i, j] += a[i, p] * b[p, j]`.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize, const A_STRIDE: usize>(
    s: S,
    p: usize,
    a: *const f32,
    b: *const f32,
    sums: &mut [[S::V; NV]; MR],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [s.splat(0.0); NV];
        if S::WIDTH == 16 { unsafe {
            use std::arch::x86_64::*;
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((p * NV + 32) * S::WIDTH).cast());
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((p * NV + 33) * S::WIDTH).cast());
        } }
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

/// Memory that will be used next and is asked for while a tile computes: rows, `stride` bytes apart, of a power of two
/// of cache lines (weights to be packed), and a run of lines (the next tile's packed rows).
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    base: *const u8,
    stride: usize,
    /// Lines of a row, as a shift.
    shift: u32,
    /// The run of lines.
    run: *const u8,
    /// Lines that are asked for of both; a few too many do no harm.
    lines: usize,
}

impl Ahead {
    pub(crate) const NONE: Ahead = Ahead { base: std::ptr::null(), stride: 0, shift: 0, run: std::ptr::null(), lines: 0 };
    /// Steps of a tile from one line to the next.
    const STEPS: usize = 2;

    #[inline(always)]
    fn address(&self, line: usize) -> *const u8 {
        let within = line & ((1 << self.shift) - 1);
        self.base.wrapping_add((line >> self.shift) * self.stride + within * 64)
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

/// Operands of one tile of `mr` rows, see [`tile`].
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) mr: usize,
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) b: *const f32,
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    pub(crate) first: bool,
    pub(crate) ahead: Ahead,
}

/// One tile of `mr` rows, see [`tile`]. Not inlined by the instruction sets, so that each has one copy.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(crate) unsafe fn tile_of<S: Simd, const A_STRIDE: usize>(s: S, t: Tile) {
    let Tile { mr, k, a, b, c, c_stride, first, ahead } = t;
    // SAFETY: the caller's promise.
    unsafe {
        match S::WIDTH {
            16 => {
                for_mr!(mr, 2, A_STRIDE, (s, k, a, b, c, c_stride, first, ahead), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
            }
            8 => for_mr!(mr, 2, A_STRIDE, (s, k, a, b, c, c_stride, first, ahead), [1 2 3 4 5 6]),
            4 => {
                for_mr!(mr, 2, A_STRIDE, (s, k, a, b, c, c_stride, first, ahead), [1 2 3 4 5 6 7 8 9 10 11 12])
            }
            _ => for_mr!(mr, 4, A_STRIDE, (s, k, a, b, c, c_stride, first, ahead), [1 2 3 4]),
        }
    }
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
    /// What the tile of rows `t` and panel `panel` asks for: its share of the next block's weights and of the next
    /// tile of rows.
    #[inline(always)]
    fn ahead(&self, t: usize, panel: usize) -> Ahead {
        let next_tile = self.tiles.start(t + 1);
        let run_lines = if t + 1 < self.tiles.count {
            (self.tiles.start(t + 2) - next_tile) * self.k / 16 / self.panels
        } else {
            0
        };
        let run_start = next_tile * self.a_k + self.a_from * (self.tiles.start(t + 2) - next_tile);
        let run = self.a.wrapping_add(run_start + panel * run_lines * 16).cast::<u8>();
        let without = Ahead { base: run, stride: 0, shift: 63, run, lines: run_lines };
        let lines = self.next_bytes / 64;
        if self.next_rows == 0 || !lines.is_power_of_two() {
            return without;
        }
        let rows = self.next_rows.div_ceil(self.tiles.count * self.panels);
        let first = (t * self.panels + panel) * rows;
        if first >= self.next_rows {
            return without;
        }
        Ahead {
            base: self.next.wrapping_add(first * self.next_stride),
            stride: self.next_stride,
            shift: lines.trailing_zeros(),
            run,
            lines: run_lines.max(rows * lines),
        }
    }
}

impl Kernel for &Block {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let nr = panel_columns(S::WIDTH);
        for t in 0..self.tiles.count {
            let start = self.tiles.start(t);
            let mr = self.tiles.start(t + 1) - start;
            let a = self.a.wrapping_add(start * self.a_k + self.a_from * mr);
            for panel in 0..self.panels {
                let ahead = self.ahead(t, panel);
                let b = self.b.wrapping_add(panel * nr * self.k);
                let c = self.c.wrapping_add(start * self.c_stride + panel * nr);
                // SAFETY: who made the block promises that its operands lie inside their buffers.
                unsafe {
                    let (k, c_stride, first) = (self.k, self.c_stride, self.first);
                    s.tile::<PACKED>(Tile { mr, k, a, b, c, c_stride, first, ahead });
                }
            }
        }
    }
}

#[cfg(test)]
mod tmpbench {
    use super::*;
    struct K { k: usize, mr: usize, panels: usize, reps: usize }
    impl Kernel for K {
        type Output = f64;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f64 {
            let nr = panel_columns(S::WIDTH);
            let mut a = crate::AlignedF32::zeroed(self.k * self.mr).unwrap();
            a.fill(0.5);
            let mut b = crate::AlignedF32::zeroed(self.k * nr * self.panels).unwrap();
            b.fill(0.25);
            let mut c = crate::AlignedF32::zeroed(self.mr * 128).unwrap();
            let t = std::time::Instant::now();
            for _ in 0..self.reps {
                for p in 0..self.panels {
                    unsafe { s.tile::<PACKED>(Tile { mr: self.mr, k: self.k, a: a.as_ptr(), b: b.as_ptr().add(p * nr * self.k), c: c.as_mut_ptr(), c_stride: 128, first: true, ahead: Ahead::NONE }) };
                }
            }
            2.0 * (self.k * self.mr * nr * self.reps * self.panels) as f64 / t.elapsed().as_secs_f64() * 1e-9
        }
    }
    #[test]
    fn tmpgemm() {
        use std::sync::atomic::Ordering::Relaxed;
        let cpu = crate::Cpu::new(1).unwrap();
        for (m, n, k, half) in [(512, 4096, 4096, false), (512, 4096, 4096, true), (64, 4096, 4096, true), (64, 4096, 4096, false)] {
            let w = vec![0.5f32; n * k];
            let hw = vec![0x3f00u16; n * k];
            let x = vec![0.5f32; m * k];
            let mut y = vec![0f32; m * n];
            let weight = if half { crate::Weight::BF16(&hw) } else { crate::Weight::F32(&w) };
            let parts = [crate::ops::Part { weight, rows: n, bias: None }];
            let mut best: Vec<(f64, [u64; 4], f64)> = vec![];
            for _ in 0..12 {
                let pk = crate::peak::fma_gflops(&cpu, 10);
                crate::ops::gemm::T.iter().for_each(|t| t.store(0, Relaxed));
                let t = std::time::Instant::now();
                crate::ops::linear(&cpu, &x, m, k, &parts, crate::ops::Epilogue::None, &mut y).unwrap();
                let e = t.elapsed().as_secs_f64();
                let ts = [0, 1, 2, 3].map(|i| crate::ops::gemm::T[i].load(Relaxed) / 1000);
                best.push((2.0 * (m * n * k) as f64 / e * 1e-9, ts, pk));
            }
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
            let b = best[11];
            let ops = 2.0 * (m * n * k) as f64;
            println!("k={k} m={m} {half}: {:.1} (peak {:.1}); pack w {} us, tiles {} us = {:.1} GF, finish {}, pack x {}", b.0, best.iter().map(|b| b.2).fold(0.0, f64::max), b.1[0], b.1[1], ops / b.1[1] as f64 * 1e-3, b.1[2], b.1[3]);
        }
    }

    #[test]
    fn tmp() {
        let cpu = crate::Cpu::new(1).unwrap();
        for (k, mr, panels) in [(128, 14, 1), (256, 14, 1), (256, 12, 1), (256, 8, 1), (512, 14, 4), (512, 14, 8), (512,12,4), (256, 14, 4)] {
            let mut v: Vec<(f64, f64)> = (0..15).map(|_| (crate::peak::fma_gflops(&cpu, 5), cpu.isa().run(K { k, mr, panels, reps: 4000 / panels * 256 / k }))).collect();
            v.sort_by(|x, y| x.1.total_cmp(&y.1));
            let pk = { let mut q: Vec<f64> = v.iter().map(|x| x.0).collect(); q.sort_by(f64::total_cmp); (q[7], q[14]) };
            println!("k={k} mr={mr} panels={panels}: {:.1} best {:.1} of {:.1} best {:.1}", v[7].1, v[14].1, pk.0, pk.1);
        }
    }
}
