//! Quantised weights: exact integer dot products within groups, f32 sums of groups.
//!
//! `x` is quantised to signed bytes, a scale for each block of [`Shape::block`] steps of a row. With codes `q` of a
//! weight row and `p` of a row of `x`, scales `s_g` of groups and `t_b` of blocks:
//! `y = sum_b t_b * sum_{g in b} (s_g * (sum_k q p - zero * sum_k p) + min_g * sum_k p)`.
//!
//! One row of `x` streams the panels through registers ([`gemv`]). More rows are a matrix product: panels are widened
//! to a byte a code in memory that stays in the first-level cache ([`Unpack`]), and tiles of sums pass over them
//! ([`Tiles`]).

use super::packed_gemv::{FEW_CHUNK, Tasks, gemv};
use super::rows::{Rows, Store};
use crate::ops::SharedMut;
use crate::ops::gemm::FinishRows;
use crate::packed::{IQ4_TABLE, Layout, MAX_BLOCK, Packed, PackedFormat, ScaleKind, UNIT, ZeroKind};
use crate::simd::dot::{self, DotKernel, Dots, LANES};
use crate::{Cpu, Isa, Result, Weight};

/// Columns of one task of a matrix product, at most and at least.
const MAX_CHUNK: usize = 128;
const MIN_CHUNK: usize = 64;
/// Steps of `k` whose codes are widened at a time.
const KC: usize = 512;
/// Bytes of quantised `x` that rows are worked on in blocks of: they stay in the second-level cache.
const X_BYTES: usize = 1 << 20;
/// Fewest and most rows of such a block.
const MIN_ROWS: usize = 192;
const MAX_ROWS: usize = 512;
/// Bytes between what is read and what is asked for while panels are widened.
const AHEAD: usize = 2048;

/// What the quantisation of `x` and the kernels depend on; parts that differ in it are multiplied one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// Steps that share a scale of `x`.
    pub(super) block: usize,
    /// Steps of one integer sum: those that share a scale of the weights, within a block.
    pub(super) group: usize,
    /// The zero point, where all groups have the same.
    pub(super) zero: Option<i32>,
    /// Bits of the largest magnitude of `x`, where it was fixed beforehand: then all blocks have one scale.
    range: Option<u32>,
}

impl Shape {
    pub(super) fn of(isa: Isa, packed: &Packed) -> Shape {
        let l = &packed.layout;
        let block = block_of(l.format);
        let zero = match l.format.zero {
            ZeroKind::Fixed(zero) => Some(i32::from(zero) - bias(isa, l)),
            _ => None,
        };
        Shape { block, group: l.group.min(block), zero, range: packed.input_range().map(f32::to_bits) }
    }
}

/// Steps of `x` that share a scale: codes of eight bits deserve finer ones, unless the weights' own steps are those of
/// whole rows.
fn block_of(format: PackedFormat) -> usize {
    if format.bits == 8 && format.group != 0 { 32 } else { 128 }
}

/// Whether codes, as they are multiplied, need all eight bits.
fn wide(l: &Layout) -> bool {
    l.format.bits == 8 || l.format.table
}

/// What the kernels' codes are less by.
fn bias(isa: Isa, l: &Layout) -> i32 {
    if wide(l) { dot::bias8(isa) } else { 0 }
}

/// Quantised rows of `x`, tile by tile: `[tile][step / 4][row]` codes, `[tile][block][row]` scales,
/// `[tile][group][row]` sums of codes: negative and times the zero point, as integers, where that is fixed, else f32.
pub(super) struct X {
    pub(super) shape: Shape,
    /// Steps, a multiple of [`UNIT`].
    pub(super) k: usize,
    blocks: usize,
    groups: usize,
    pub(super) codes: SharedMut<f32>,
    pub(super) scales: SharedMut<f32>,
    pub(super) sums: SharedMut<f32>,
}

impl X {
    /// Floats of memory for `rows` rows of `k`: codes, scales, sums.
    fn floats(shape: Shape, rows: usize, k: usize) -> [usize; 3] {
        let k = k.next_multiple_of(UNIT);
        [k / 4, k.div_ceil(shape.block), k.div_ceil(shape.group)].map(|n| (n * rows).next_multiple_of(16))
    }

    fn new(shape: Shape, rows: usize, k: usize, memory: &mut [f32]) -> X {
        let [codes, scales, _] = X::floats(shape, rows, k);
        let padded = k.next_multiple_of(UNIT);
        let memory = SharedMut::new(memory);
        X {
            shape,
            k: padded,
            blocks: padded.div_ceil(shape.block),
            groups: padded.div_ceil(shape.group),
            codes: SharedMut(memory.at(0)),
            scales: SharedMut(memory.at(codes)),
            sums: SharedMut(memory.at(codes + scales)),
        }
    }
}

/// Quantises the rows `[first, first + rows)` of a tile.
struct Quantise<'a> {
    x: &'a X,
    /// `rows` rows of `k` that begin `stride` apart.
    values: &'a [f32],
    k: usize,
    stride: usize,
    first: usize,
    rows: usize,
}

impl DotKernel for Quantise<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, _: D) {
        let Quantise { x, values, k, stride, first, rows } = self;
        let (block, group) = (x.shape.block, x.shape.group);
        let range = x.shape.range.map(f32::from_bits);
        for i in 0..rows {
            let row = &values[i * stride..][..k];
            for (b, part) in row.chunks(block).enumerate() {
                let mut codes = [0i8; MAX_BLOCK];
                let scale = quantise(part, range, &mut codes);
                // SAFETY: the tile's places in buffers that `X::floats` sized; nobody else has this tile.
                unsafe {
                    *x.scales.at(first * x.blocks + b * rows + i) = scale;
                    let steps = part.len().next_multiple_of(UNIT).min(block);
                    let at = first * x.k / 4 + b * block / 4 * rows + i;
                    for (s, four) in codes[..steps].as_chunks::<4>().0.iter().enumerate() {
                        *x.codes.at(at + s * rows).cast::<i32>() = i32::from_ne_bytes(four.map(|c| c as u8));
                    }
                    for (g, codes) in codes[..steps].chunks(group).enumerate() {
                        let sum: i32 = codes.iter().map(|&c| i32::from(c)).sum();
                        let sum = match x.shape.zero {
                            Some(zero) => f32::from_bits((-zero * sum) as u32),
                            None => sum as f32,
                        };
                        *x.sums.at(first * x.groups + (b * block / group + g) * rows + i) = sum;
                    }
                }
            }
        }
    }
}

/// The largest magnitude; NaN where a value is not finite. Magnitudes are ordered as their bits are, and a maximum of
/// integers, unlike one of floats, needs no order of the values: compilers make vectors of it.
#[inline(always)]
pub(in crate::ops) fn largest(values: &[f32]) -> f32 {
    let most = values.iter().fold(0, |most, v| most.max(v.abs().to_bits()));
    if most <= f32::MAX.to_bits() { f32::from_bits(most) } else { f32::NAN }
}

/// Codes `round(v / scale)` in -127..=127, and the scale: that of the largest magnitude, or of `range`, beyond which
/// values are cut off. NaN where a value is not finite.
#[inline(always)]
pub(in crate::ops) fn quantise(values: &[f32], range: Option<f32>, codes: &mut [i8; MAX_BLOCK]) -> f32 {
    let most = largest(values);
    if most.is_nan() {
        return f32::NAN;
    }
    let limit = range.unwrap_or(most);
    let scale = limit / 127.0;
    let inverse = if scale > 0.0 { 127.0 / limit } else { 0.0 };
    // A subnormal maximum has no finite inverse; such values are lost in any sum.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    let code = |v: f32| (v + 12_582_912.0).to_bits() as i8;
    if most > limit {
        for (c, v) in codes.iter_mut().zip(values) {
            *c = code((v * inverse).clamp(-127.0, 127.0));
        }
    } else {
        for (c, v) in codes.iter_mut().zip(values) {
            *c = code(v * inverse);
        }
    }
    scale
}

/// An array of the values of an expression for each index. Not a closure: what is called from one need not be inlined
/// where the target features are.
macro_rules! each {
    ($i:ident in [$($n:literal)*] => $e:expr) => {
        [$({ const $i: usize = $n; $e }),*]
    };
}

/// The codes of one unit, eight vectors of four steps each, one byte a code.
///
/// # Safety
/// `64 * BITS` readable bytes at `p`.
#[inline(always)]
pub(super) unsafe fn unit<D: Dots, const BITS: usize>(d: D, p: *const u8, table: bool) -> [D::Q; 8] {
    // SAFETY: the planes of a unit, as the layout puts them.
    unsafe {
        if BITS == 8 {
            return each!(I in [0 1 2 3 4 5 6 7] => d.bias8(d.load_q(p.add(64 * I))));
        }
        if BITS < 4 {
            let low = each!(I in [0 1] => d.load_q(p.add(64 * I)));
            let pairs = each!(I in [0 1 2 3 4 5 6 7] => d.shr(low[I % 2], I as u32 / 2 * 2, 3));
            if BITS == 2 {
                return pairs;
            }
            let bits = d.load_q(p.add(128));
            return each!(I in [0 1 2 3 4 5 6 7] => d.or(pairs[I], moved(d, bits, I as u32, 2, 4)));
        }
        let low = each!(I in [0 1 2 3] => d.load_q(p.add(64 * I)));
        let nibbles = each!(I in [0 1 2 3 4 5 6 7] => d.shr(low[I % 4], 4 * (I as u32 / 4), 15));
        let high = p.add(256);
        if BITS == 5 {
            let bits = d.load_q(high);
            return each!(I in [0 1 2 3 4 5 6 7] => d.or(nibbles[I], moved(d, bits, I as u32, 4, 16)));
        }
        if BITS == 6 {
            let bits = each!(I in [0 1] => d.load_q(high.add(64 * I)));
            return each!(I in [0 1 2 3 4 5 6 7] => {
                d.or(nibbles[I], moved(d, bits[I % 2], I as u32 / 2 * 2, 4, 48))
            });
        }
        if table {
            return each!(I in [0 1 2 3 4 5 6 7] => d.bias8(d.table(nibbles[I], &IQ4_TABLE)));
        }
        nibbles
    }
}

/// The bits of a plane that begin at bit `from`, put to bit `to`, where `mask` is.
#[inline(always)]
fn moved<D: Dots>(d: D, plane: D::Q, from: u32, to: u32, mask: u8) -> D::Q {
    if from <= to { d.shl(plane, to - from, mask) } else { d.shr(plane, from - to, mask) }
}

/// Reads the scales of a span.
#[derive(Clone, Copy)]
pub(super) struct Header<'a, D: Dots> {
    pub(super) d: D,
    pub(super) l: &'a Layout,
    at: *const u8,
    /// Where nested: the numbers that scales and minima are multiples of.
    outer: [D::F; 2],
    bias: f32,
}

impl<'a, D: Dots> Header<'a, D> {
    /// # Safety
    /// A whole header at `at`.
    #[inline(always)]
    pub(super) unsafe fn new(d: D, l: &'a Layout, at: *const u8) -> Header<'a, D> {
        let zero = d.splat_f(0.0);
        // SAFETY: the caller's promise; a nested header begins with sixteen scales, then minima if there are any.
        let outer = unsafe {
            match (l.format.scale, l.format.zero) {
                (ScaleKind::Nested, ZeroKind::Minima) => [d.load_f16(at), d.load_f16(at.add(l.minima))],
                (ScaleKind::Nested, _) => [d.load_f16(at), zero],
                _ => [zero; 2],
            }
        };
        Header { d, l, at, outer, bias: if wide(l) { D::BIAS8 as f32 } else { 0.0 } }
    }

    /// Scales of group `g` of the span.
    ///
    /// # Safety
    /// The span has such a group.
    #[inline(always)]
    pub(super) unsafe fn scale(&self, g: usize) -> D::F {
        // SAFETY: inside the header.
        unsafe {
            match self.l.format.scale {
                ScaleKind::F16 => self.d.load_f16(self.at.add(2 * LANES * g)),
                ScaleKind::BF16 => self.d.load_bf16(self.at.add(2 * LANES * g)),
                ScaleKind::Nested => {
                    self.d.mul(self.outer[0], self.d.load_i8(self.at.add(self.l.sub_scales + LANES * g)))
                }
            }
        }
    }

    /// What is added to `scale * code` in group `g`, for codes as the kernels take them.
    ///
    /// # Safety
    /// As for [`Header::scale`].
    #[inline(always)]
    pub(super) unsafe fn minimum(&self, g: usize, scale: D::F) -> D::F {
        let (d, l) = (self.d, self.l);
        // SAFETY: inside the header.
        unsafe {
            let byte = || d.load_u8(self.at.add(l.sub_minima + LANES * g));
            match (l.format.zero, l.format.scale) {
                (ZeroKind::Codes, _) => {
                    let above = d.fma(byte(), d.splat_f(-1.0), d.splat_f(self.bias));
                    d.mul(scale, above)
                }
                (ZeroKind::Minima, ScaleKind::Nested) => d.mul(d.mul(self.outer[1], byte()), d.splat_f(-1.0)),
                (ZeroKind::Minima, _) => d.load_f16(self.at.add(l.minima + 2 * LANES * g)),
                (ZeroKind::Fixed(_), _) => d.splat_f(0.0),
            }
        }
    }
}

/// Calls `$of::<D, BITS>` for the bits of a format.
macro_rules! for_bits {
    ($bits:expr, $self:ident.$of:ident($d:ident)) => {
        match $bits {
            2 => $self.$of::<D, 2>($d),
            3 => $self.$of::<D, 3>($d),
            4 => $self.$of::<D, 4>($d),
            5 => $self.$of::<D, 5>($d),
            6 => $self.$of::<D, 6>($d),
            _ => $self.$of::<D, 8>($d),
        }
    };
}

/// Memory of one task of a matrix product, for tiles of `panels` panels: codes `[step / 4][panel][64]`, scales and
/// minima `[group][panel][16]`.
#[derive(Clone, Copy)]
struct Widened {
    codes: *mut u8,
    scales: *mut f32,
    minima: *mut f32,
    panels: usize,
}

impl Widened {
    /// Floats for `panels` panels.
    fn floats(group: usize, panels: usize) -> usize {
        panels * (KC * LANES / 4 + 2 * KC / group * LANES)
    }

    fn new(memory: *mut f32, group: usize, panels: usize) -> Widened {
        let scales = memory.wrapping_add(panels * KC * LANES / 4);
        let minima = scales.wrapping_add(panels * KC / group * LANES);
        Widened { codes: memory.cast(), scales, minima, panels }
    }
}

/// Widens the units `[first, first + units)` of a panel to place `place` of a tile's panels.
struct Unpack<'a> {
    packed: &'a Packed,
    panel: usize,
    first: usize,
    units: usize,
    group: usize,
    to: Widened,
    place: usize,
}

impl DotKernel for Unpack<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        for_bits!(self.packed.layout.format.bits, self.of(d))
    }
}

impl Unpack<'_> {
    #[inline(always)]
    fn of<D: Dots, const BITS: usize>(self, d: D) {
        let l = &self.packed.layout;
        let panel = self.packed.panel(self.panel);
        let per_span = l.span / UNIT;
        let minima = !matches!(l.format.zero, ZeroKind::Fixed(_));
        // SAFETY: the units lie in the panel, and their places in the memory that `Widened::floats` sized.
        unsafe {
            for i in 0..self.units {
                let u = self.first + i;
                let span = panel.add(u / per_span * l.span_bytes);
                let within = u % per_span;
                let codes = span.add(l.header + within * 64 * BITS);
                for line in (0..64 * BITS).step_by(64) {
                    d.prefetch(codes.wrapping_add(AHEAD + line));
                }
                let q = unit::<D, BITS>(d, codes, l.format.table);
                if D::PAIRS {
                    // One panel to a tile, so eight steps of it lie together.
                    for s in 0..4 {
                        d.store_eight(self.to.codes.add((i * 4 + s) * 128), [q[2 * s], q[2 * s + 1]]);
                    }
                } else {
                    for s in 0..8 {
                        let at = ((i * 8 + s) * self.to.panels + self.place) * 64;
                        d.store_q(self.to.codes.add(at), q[s]);
                    }
                }
                let header = Header::new(d, l, span);
                for half in 0..if self.group == 16 { 2 } else { 1 } {
                    let at = i * UNIT + half * 16;
                    if at.is_multiple_of(self.group) {
                        let stored = (within * UNIT + half * 16) / l.group;
                        let scale = header.scale(stored);
                        let to = (at / self.group * self.to.panels + self.place) * LANES;
                        d.store_f(self.to.scales.add(to), scale);
                        if minima {
                            d.store_f(self.to.minima.add(to), header.minimum(stored, scale));
                        }
                    }
                }
            }
        }
    }
}

/// How rows are cut into tiles: full ones, then smaller ones of 4, 2 and 1 rows for the rest.
#[derive(Clone, Copy)]
struct Cut {
    rows: usize,
    full: usize,
    most: usize,
    tiles: usize,
}

impl Cut {
    fn new(rows: usize, most: usize) -> Cut {
        let full = rows / most;
        Cut { rows, full, most, tiles: full + (rows % most).count_ones() as usize }
    }

    /// First row of a tile, and how many it has.
    #[inline(always)]
    fn tile(&self, tile: usize) -> (usize, usize) {
        if tile < self.full {
            return (tile * self.most, self.most);
        }
        let mut rest = self.rows % self.most;
        for _ in self.full..tile {
            rest &= !(1 << rest.ilog2());
        }
        let rows = 1 << rest.ilog2();
        (self.rows - rest, rows)
    }
}

/// All tiles of rows times one set of panels: `c[i, 16 j ..]`, added to what is there unless `first_k` is 0.
struct Tiles<'a> {
    x: &'a X,
    cut: Cut,
    /// Steps `[first_k, first_k + steps)`.
    first_k: usize,
    steps: usize,
    from: Widened,
    c: *mut f32,
    c_stride: usize,
    /// Memory for [`TILE_FLOATS`].
    f: *mut f32,
}

/// Floats of the largest tile.
const TILE_FLOATS: usize = 6 * 4 * LANES;

impl DotKernel for Tiles<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        if self.x.shape.zero.is_some() { self.all::<D, false>(d) } else { self.all::<D, true>(d) }
    }
}

impl Tiles<'_> {
    #[inline(always)]
    fn all<D: Dots, const MINIMA: bool>(&self, d: D) {
        for t in 0..self.cut.tiles {
            let (first, rows) = self.cut.tile(t);
            // SAFETY: whoever made this sized the operands.
            unsafe {
                match (rows, D::PANELS) {
                    (1, 1) => self.tile::<D, 1, 1, MINIMA>(d, first),
                    (2, 1) => self.tile::<D, 2, 1, MINIMA>(d, first),
                    (4, 1) => self.tile::<D, 4, 1, MINIMA>(d, first),
                    (1, 4) => self.tile::<D, 1, 4, MINIMA>(d, first),
                    (2, 4) => self.tile::<D, 2, 4, MINIMA>(d, first),
                    (3, 4) => self.tile::<D, 3, 4, MINIMA>(d, first),
                    (4, 4) => self.tile::<D, 4, 4, MINIMA>(d, first),
                    (6, 4) => self.tile::<D, 6, 4, MINIMA>(d, first),
                    _ => {}
                }
            }
        }
    }

    /// # Safety
    /// Rows from `first`, `R` of them, in `x` and `c`; `NP` panels in `from`.
    #[inline(always)]
    unsafe fn tile<D: Dots, const R: usize, const NP: usize, const MINIMA: bool>(&self, d: D, first: usize) {
        let X { shape, k, blocks, groups, .. } = *self.x;
        let zero = d.splat_f(0.0);
        // Sums of a block wait in registers where those of a small tile leave some.
        let small = R <= 3 || NP == 1;
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = self.x.codes.at(first * k / 4 + self.first_k / 4 * R).cast::<i32>().cast_const();
            let mut block_scales =
                self.x.scales.at(first * blocks + self.first_k / shape.block * R).cast_const();
            let mut sums = self.x.sums.at(first * groups + self.first_k / shape.group * R).cast_const();
            let mut codes = self.from.codes.cast_const();
            let mut scales = self.from.scales.cast_const();
            let mut minima = self.from.minima.cast_const();
            let c = self.c.add(first * self.c_stride);
            let mut done = 0;
            while done < self.steps {
                let block = shape.block.min(self.steps - done);
                let mut f = [[zero; NP]; R];
                let mut in_block = 0;
                while in_block < block {
                    let group = shape.group.min(block - in_block);
                    let mut acc = [[d.splat_i(0); NP]; R];
                    if !MINIMA {
                        for i in 0..R {
                            acc[i] = [d.splat_i(sums.add(i).cast::<i32>().read()); NP];
                        }
                    }
                    if D::PAIRS && NP == 1 {
                        pairs::<D, R, NP>(d, &mut acc, codes, x, group / 8);
                        codes = codes.add(16 * group);
                        x = x.add(R * group / 4);
                    }
                    for _ in 0..if D::PAIRS && NP == 1 { 0 } else { group / 16 } {
                        for _ in 0..4 {
                            let mut w = [d.load_q(codes); NP];
                            for j in 1..NP {
                                w[j] = d.load_q(codes.add(64 * j));
                            }
                            for i in 0..R {
                                for j in 0..NP {
                                    acc[i][j] = d.dot(acc[i][j], w[j], x.add(i));
                                }
                            }
                            codes = codes.add(64 * NP);
                            x = x.add(R);
                        }
                    }
                    if small {
                        for j in 0..NP {
                            let scale = d.load_f(scales.add(LANES * j));
                            for i in 0..R {
                                f[i][j] = d.fma(d.to_f(acc[i][j]), scale, f[i][j]);
                                if MINIMA {
                                    let minimum = d.load_f(minima.add(LANES * j));
                                    f[i][j] = d.fma(minimum, d.splat_f(*sums.add(i)), f[i][j]);
                                }
                            }
                        }
                        scales = scales.add(LANES * NP);
                        minima = minima.add(if MINIMA { LANES * NP } else { 0 });
                        sums = sums.add(R);
                        in_block += group;
                        continue;
                    }
                    let (begins, ends) = (in_block == 0, in_block + group == block);
                    let fold = Fold { scales, minima, sums, f: self.f, c, c_stride: self.c_stride };
                    match (begins, ends, self.first_k + done == 0) {
                        (true, true, true) => {
                            fold.run::<D, R, NP, MINIMA, true, true, true>(d, acc, block_scales)
                        }
                        (true, true, false) => {
                            fold.run::<D, R, NP, MINIMA, true, true, false>(d, acc, block_scales)
                        }
                        (true, false, _) => {
                            fold.run::<D, R, NP, MINIMA, true, false, false>(d, acc, block_scales)
                        }
                        (false, false, _) => {
                            fold.run::<D, R, NP, MINIMA, false, false, false>(d, acc, block_scales)
                        }
                        (false, true, true) => {
                            fold.run::<D, R, NP, MINIMA, false, true, true>(d, acc, block_scales)
                        }
                        (false, true, false) => {
                            fold.run::<D, R, NP, MINIMA, false, true, false>(d, acc, block_scales)
                        }
                    }
                    scales = scales.add(LANES * NP);
                    minima = minima.add(if MINIMA { LANES * NP } else { 0 });
                    sums = sums.add(R);
                    in_block += group;
                }
                if small {
                    for i in 0..R {
                        let by = d.splat_f(*block_scales.add(i));
                        for j in 0..NP {
                            let at = c.add(i * self.c_stride + LANES * j);
                            let before = if self.first_k + done == 0 { zero } else { d.load_f(at) };
                            d.store_f(at, d.fma(f[i][j], by, before));
                        }
                    }
                }
                block_scales = block_scales.add(R);
                done += block;
            }
        }
    }
}

/// Adds `eights` times eight steps to the sums of one panel, two rows of `x` at a time; one row alone is taken twice.
///
/// # Safety
/// Codes as [`Dots::store_eight`] stored them, and as many steps of `R` rows of `x`.
#[inline(always)]
unsafe fn pairs<D: Dots, const R: usize, const NP: usize>(
    d: D,
    acc: &mut [[D::I; NP]; R],
    codes: *const u8,
    x: *const i32,
    eights: usize,
) {
    let mut sums = [[d.splat_i(0); 2]; 3];
    for (pair, i) in sums.iter_mut().zip((0..R).step_by(2)) {
        *pair = d.join([acc[i][0], acc[(i + 1).min(R - 1)][0]]);
    }
    // SAFETY: the caller's promise.
    unsafe {
        for s in 0..eights {
            let w = codes.add(128 * s);
            let x = [x.add(2 * s * R), x.add((2 * s + 1) * R)];
            if R == 1 {
                let twice = x.map(|x| [*x; 2]);
                sums[0] = d.dot_pair(sums[0], w, [twice[0].as_ptr(), twice[1].as_ptr()]);
            }
            for i in 0..R / 2 {
                sums[i] = d.dot_pair(sums[i], w, [x[0].add(2 * i), x[1].add(2 * i)]);
            }
        }
    }
    for (pair, i) in sums.iter().zip((0..R).step_by(2)) {
        let [first, second] = d.split(*pair);
        acc[i][0] = first;
        if i + 1 < R {
            acc[i + 1][0] = second;
        }
    }
}

/// What becomes of the integer sums of a group. The sums of a block wait in memory, so that those of a tile have all
/// registers.
#[derive(Clone, Copy)]
struct Fold {
    scales: *const f32,
    minima: *const f32,
    sums: *const f32,
    f: *mut f32,
    c: *mut f32,
    c_stride: usize,
}

impl Fold {
    /// `BEGINS`, `ENDS`: the group is the first, the last of its block. `FIRST`: nothing is in `c` yet.
    ///
    /// # Safety
    /// Operands of a tile of `R` rows and `NP` panels.
    #[inline(always)]
    unsafe fn run<
        D: Dots,
        const R: usize,
        const NP: usize,
        const MINIMA: bool,
        const BEGINS: bool,
        const ENDS: bool,
        const FIRST: bool,
    >(
        self,
        d: D,
        acc: [[D::I; NP]; R],
        block_scales: *const f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            for j in 0..NP {
                let scale = d.load_f(self.scales.add(LANES * j));
                for i in 0..R {
                    let waiting = self.f.add((i * NP + j) * LANES);
                    let sum = d.to_f(acc[i][j]);
                    let mut sum =
                        if BEGINS { d.mul(sum, scale) } else { d.fma(sum, scale, d.load_f(waiting)) };
                    if MINIMA {
                        let minimum = d.load_f(self.minima.add(LANES * j));
                        sum = d.fma(minimum, d.splat_f(*self.sums.add(i)), sum);
                    }
                    if !ENDS {
                        d.store_f(waiting, sum);
                        continue;
                    }
                    let at = self.c.add(i * self.c_stride + LANES * j);
                    let by = d.splat_f(*block_scales.add(i));
                    d.store_f(at, if FIRST { d.mul(sum, by) } else { d.fma(sum, by, d.load_f(at)) });
                }
            }
        }
    }
}

/// Where sixteen columns come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Rows of no part.
    Nothing,
    /// One panel.
    Panel(&'a Packed, usize),
    /// Rows here and there: [`Rows::lane`] of each column from this one on.
    Mixed(usize),
}

impl<'a> Rows<'a> {
    fn packed(&self, row: usize) -> Option<(&'a Packed, usize, usize)> {
        let (part, row, rows) = self.find(row)?;
        match part.weight {
            Weight::Packed(packed) => Some((packed, row, rows)),
            _ => None,
        }
    }

    pub(super) fn source(&self, column: usize) -> Source<'a> {
        let (row, count) = self.run(column);
        if count == 0 {
            return Source::Nothing;
        }
        match self.packed(row) {
            None => Source::Nothing,
            Some((packed, row, rows)) if row.is_multiple_of(LANES) && rows >= count.min(LANES) => {
                Source::Panel(packed, row / LANES)
            }
            Some(_) => Source::Mixed(column),
        }
    }

    /// The matrix of one column, and its row there.
    pub(super) fn lane(&self, column: usize) -> Option<(&'a Packed, usize)> {
        let (row, count) = self.run(column);
        let (packed, row, _) = if count == 0 { None } else { self.packed(row) }?;
        Some((packed, row))
    }
}

/// Columns of one task for `m` rows of `x`.
pub(super) fn chunk(cpu: &Cpu, m: usize, n: usize) -> usize {
    if m == 1 {
        return FEW_CHUNK;
    }
    let mut chunk = MAX_CHUNK;
    while chunk > MIN_CHUNK && n < chunk * cpu.threads() * 4 {
        chunk /= 2;
    }
    chunk
}

/// Rows of `x` that are worked on at a time.
fn block_rows(m: usize, k: usize) -> usize {
    let most = (X_BYTES / k.max(1)).clamp(MIN_ROWS, MAX_ROWS);
    m.div_ceil(m.div_ceil(most).max(1))
}

/// Floats of scratch: the quantised rows, and what each task needs.
fn scratch_of(cpu: &Cpu, shape: Shape, m: usize, k: usize, chunk: usize) -> [usize; 2] {
    let rows = block_rows(m, k);
    let x: usize = X::floats(shape, rows, k).iter().sum();
    if m == 1 {
        return [x, 0];
    }
    let (_, panels) = dot::tile_shape(cpu.isa());
    let panels = chunk.div_ceil(LANES).next_multiple_of(panels) + 1;
    let task = Widened::floats(shape.group, panels) + TILE_FLOATS + rows * chunk;
    [x, cpu.threads() * task.next_multiple_of(16)]
}

/// The most scratch memory, in bytes, that quantised parts take for `m` rows of `k`.
pub(super) fn scratch_bytes(cpu: &Cpu, m: usize, k: usize) -> usize {
    let shape = Shape { block: 32, group: 16, zero: None, range: None };
    4 * scratch_of(cpu, shape, m, k, MAX_CHUNK).iter().sum::<usize>()
}

/// Multiplies `m` rows of `x`, `x_stride` floats apart, with parts that are packed and of one [`Shape`].
pub(super) fn linear(
    cpu: &Cpu,
    (x, x_stride): (&[f32], usize),
    m: usize,
    k: usize,
    shape: Shape,
    store: &Store<'_>,
) -> Result<()> {
    let rows = store.rows;
    let isa = cpu.isa();
    let block = block_rows(m, k);
    let [x_floats, task_floats] = scratch_of(cpu, shape, m, k, rows.chunk);
    let mut scratch = cpu.scratch(x_floats + task_floats)?;
    let (x_memory, tasks) = scratch.split_at_mut(x_floats);
    let tasks = SharedMut::new(&mut tasks[..task_floats]);
    let columns = rows.columns();
    let chunks = columns.div_ceil(rows.chunk);
    let (mut tile_rows, panels) = dot::tile_shape(isa);
    if shape.group <= 32 && panels > 1 {
        // Sums of groups that end often are better kept in registers, at the price of smaller tiles.
        tile_rows /= 2;
    }
    for first in (0..m).step_by(block) {
        let count = block.min(m - first);
        let cut = Cut::new(count, tile_rows);
        let quantised = X::new(shape, count, k, x_memory);
        cpu.parallel(cut.tiles, &|t| {
            let (start, rows) = cut.tile(t);
            let values = &x[(first + start) * x_stride..][..(rows - 1) * x_stride + k];
            dot::run(isa, Quantise { x: &quantised, values, k, stride: x_stride, first: start, rows });
        });
        if m == 1 {
            let tasks = Tasks::new(chunks, cpu.threads());
            cpu.parallel(tasks.count(), &|task| gemv(isa, &quantised, (&tasks, task), store));
        } else {
            let share = task_floats / cpu.threads();
            cpu.parallel_slots(chunks, &|slot, chunk| {
                let memory = tasks.at(slot * share);
                gemm(isa, &quantised, cut, first, chunk * rows.chunk, memory, share, store);
            });
        }
    }
    Ok(())
}

/// One chunk of columns of a matrix product, in memory of its own.
fn gemm(
    isa: Isa,
    x: &X,
    cut: Cut,
    first_row: usize,
    column: usize,
    memory: *mut f32,
    floats: usize,
    store: &Store<'_>,
) {
    let rows = store.rows;
    let (chunk, group) = (rows.chunk, x.shape.group);
    let (_, panels) = dot::tile_shape(isa);
    let places = chunk.div_ceil(LANES).next_multiple_of(panels);
    // Sets of panels one after the other, a panel to gather from, and the sums.
    let set_floats = Widened::floats(group, panels);
    let single = Widened::new(memory.wrapping_add(places / panels * set_floats), group, 1);
    let sums_at = Widened::floats(group, places + 1);
    let f = memory.wrapping_add(sums_at);
    let sums_at = sums_at + TILE_FLOATS;
    let c = memory.wrapping_add(sums_at);
    let sources: [Source<'_>; MAX_CHUNK / LANES] = std::array::from_fn(|i| {
        if i * LANES < chunk { rows.source(column + i * LANES) } else { Source::Nothing }
    });
    for first_k in (0..x.k).step_by(KC) {
        let steps = KC.min(x.k - first_k);
        let (first, units) = (first_k / UNIT, steps / UNIT);
        for set in 0..places / panels {
            let to = Widened::new(memory.wrapping_add(set * set_floats), group, panels);
            let of_set = &sources[set * panels..(set + 1) * panels];
            if of_set.iter().all(|s| matches!(s, Source::Nothing)) {
                continue;
            }
            for (place, source) in of_set.iter().enumerate() {
                match source {
                    Source::Nothing => {}
                    &Source::Panel(packed, panel) => {
                        dot::run(isa, Unpack { packed, panel, first, units, group, to, place });
                    }
                    &Source::Mixed(column) => {
                        for lane in 0..LANES {
                            let Some((packed, row)) = rows.lane(column + lane) else { continue };
                            let panel = row / LANES;
                            dot::run(
                                isa,
                                Unpack { packed, panel, first, units, group, to: single, place: 0 },
                            );
                            let minima = x.shape.zero.is_none();
                            let pairs = dot::pairs(isa);
                            // SAFETY: both lie in this task's memory.
                            unsafe {
                                copy_lane(single, row % LANES, to, place, lane, steps, group, minima, pairs);
                            }
                        }
                    }
                }
            }
            let c = c.wrapping_add(set * panels * LANES);
            dot::run(isa, Tiles { x, cut, first_k, steps, from: to, c, c_stride: chunk, f });
        }
    }
    debug_assert!(sums_at + cut.rows * chunk <= floats, "the sums lie in the task's memory");
    // SAFETY: this task's sums; where no panel was, what an earlier task left, which is not stored.
    let sums = unsafe { std::slice::from_raw_parts(c, cut.rows * chunk) };
    isa.run(FinishRows { finish: store, first_row, column, sums, chunk });
}

/// Copies one row of a single widened panel to a lane of a set.
///
/// # Safety
/// Both hold `steps` steps, and nobody else uses them.
unsafe fn copy_lane(
    from: Widened,
    row: usize,
    to: Widened,
    place: usize,
    lane: usize,
    steps: usize,
    group: usize,
    minima: bool,
    pairs: bool,
) {
    // SAFETY: the caller's promise. Where pairs are multiplied, eight steps of a row lie together; there is one panel.
    unsafe {
        let at = |s: usize, panel: usize, lane: usize| match pairs {
            true => s / 2 * 128 + 8 * lane + 4 * (s % 2),
            false => panel * 64 + 4 * lane,
        };
        for s in 0..steps / 4 {
            let four = from.codes.add(at(s, s, row)).cast::<[u8; 4]>().read();
            to.codes.add(at(s, s * to.panels + place, lane)).cast::<[u8; 4]>().write(four);
        }
        for g in 0..steps.div_ceil(group) {
            let (source, target) = (g * LANES + row, (g * to.panels + place) * LANES + lane);
            *to.scales.add(target) = *from.scales.add(source);
            if minima {
                *to.minima.add(target) = *from.minima.add(source);
            }
        }
    }
}

/// Rows of `k` values of `x` as [`linear`] sees them for weights of a format whose input has this range, if it is fixed:
/// quantised and back.
pub(super) fn rounded(x: &[f32], k: usize, format: PackedFormat, range: Option<f32>, out: &mut [f32]) {
    let (k, block) = (k.max(1), block_of(format));
    for (row, out) in x.chunks(k).zip(out.chunks_mut(k)) {
        for (part, out) in row.chunks(block).zip(out.chunks_mut(block)) {
            let mut codes = [0i8; MAX_BLOCK];
            let scale = quantise(part, range, &mut codes);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code) * scale);
        }
    }
}
