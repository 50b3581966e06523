//! Attention over integers, for operands that are no more exact than that: all queries see all keys.
//!
//! A row of queries or keys of a head becomes integers of twelve bits with a scale: eight would cost as much as all the
//! rounding of a quantised layer, because errors of scores are errors of weights. Values become bytes with a scale for
//! each component over [`BK`] keys. Scores are then integer sums. The weights `exp(s - m)` of a block of keys become
//! integers up to 127 * 128 in two bytes, `128 h + l`, because a long tail of small weights may count for much; both
//! parts are multiplied with the values as integers, and blocks are added in f32 with running maxima and sums, as in
//! [`flash`](super::flash). Everything is made integers once, before the tiles begin.

use super::{Attention, Mask};
use crate::ops::SharedMut;
use crate::ops::linear::largest;
use crate::packed::MAX_BLOCK;
use crate::simd::dot::{self, DotKernel, Dots, LANES};
use crate::simd::{Kernel, Simd, math};
use crate::{Cpu, Isa, KvFormat, Result};

/// Keys of one block.
const BK: usize = 256;
/// The largest weight, 127 * 128, to the base of 2: its upper byte is 127, and the lower one has room for a rounding up.
const TOP_LOG2: f32 = 13.988_685;
/// The largest number of a query or key: sums of [`MAX_BLOCK`] products fit 32 bits.
const MOST: f32 = 2047.0;
/// Tiles of rows in one task.
const TILES: usize = 32;
/// Rows of a tile, at most.
const MAX_ROWS: usize = 6;

/// Whether these operands can be taken apart: a query sees every key, and keys and values are no cache.
pub(super) fn suits(a: &Attention<'_>) -> bool {
    let whole = match a.mask {
        Mask::Full => true,
        Mask::Segments(bounds) => bounds == [0, a.t as u32] && a.t == a.s,
        Mask::Causal { .. } => false,
    };
    whole && a.t > 0 && a.s > 0 && a.d <= MAX_BLOCK && [a.k, a.v].iter().all(|x| x.format == KvFormat::F32)
}

/// Where things are in the scratch memory, in floats.
#[derive(Clone, Copy)]
struct Sizes {
    /// Rows and panels of a tile.
    rows: usize,
    panels: usize,
    /// Queries of a head, keys and components, rounded up to whole tiles.
    queries: usize,
    keys: usize,
    components: usize,
    /// Pairs of components.
    steps: usize,
    /// What the codes of values are more than the numbers that they stand for.
    zero: i32,
}

impl Sizes {
    fn new(isa: Isa, a: &Attention<'_>) -> Sizes {
        let (rows, panels) = dot::tile_shape(isa);
        Sizes {
            rows,
            panels,
            queries: a.t.next_multiple_of(rows),
            keys: a.s.next_multiple_of(BK),
            components: a.d.next_multiple_of(LANES * panels),
            steps: a.d.div_ceil(2),
            zero: 128 - dot::bias8(isa),
        }
    }

    /// Codes and scales of one head's queries.
    fn query(&self) -> usize {
        (self.queries * (self.steps + 1)).next_multiple_of(16)
    }

    /// Codes and scales of one head's keys, then of its values.
    fn key(&self) -> usize {
        self.keys * (self.steps + 1)
    }

    fn value(&self) -> usize {
        self.keys / 4 * self.components + self.keys / BK * self.components
    }

    /// What one thread needs: scores, two bytes of weights, sums of a tile and of all blocks.
    fn own(&self) -> usize {
        self.rows * (BK + BK / 2 + self.components + self.panels * LANES)
    }
}

/// Floats of scratch.
pub(super) fn scratch_floats(cpu: &Cpu, a: &Attention<'_>) -> usize {
    let z = Sizes::new(cpu.isa(), a);
    a.h * z.query() + a.kvh * (z.key() + z.value()) + cpu.threads() * z.own()
}

/// The operands were checked and [`suits`] them.
pub(super) fn attend(cpu: &Cpu, a: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    let (isa, z) = (cpu.isa(), Sizes::new(cpu.isa(), a));
    let mut scratch = cpu.scratch(scratch_floats(cpu, a))?;
    let (queries, rest) = scratch.split_at_mut(a.h * z.query());
    let (keys, rest) = rest.split_at_mut(a.kvh * z.key());
    let (values, own) = rest.split_at_mut(a.kvh * z.value());
    let [queries, keys, values, own] = [queries, keys, values, own].map(SharedMut::new);
    let out = SharedMut::new(out);
    let blocks = z.keys / BK;
    let query_blocks = z.queries.div_ceil(BK);
    cpu.parallel(a.h * query_blocks + 2 * a.kvh * blocks, &|task| {
        let (head, block) = (task / query_blocks, task % query_blocks);
        if head < a.h {
            dot::run(isa, CodeQueries { a, z, head, first: block * BK, to: queries.at(head * z.query()) });
            return;
        }
        let task = task - a.h * query_blocks;
        let (head, block) = (task / 2 / blocks, task / 2 % blocks);
        match task % 2 {
            0 => dot::run(isa, CodeKeys { a, z, head, block, to: keys.at(head * z.key()) }),
            _ => dot::run(isa, CodeValues { a, z, head, block, to: values.at(head * z.value()) }),
        }
    });
    let tiles = z.queries / z.rows;
    let per_head = tiles.div_ceil(TILES);
    cpu.parallel_slots(a.h * per_head, &|slot, task| {
        let (head, first) = (task / per_head, task % per_head * TILES);
        let kv = head / (a.h / a.kvh);
        let operands = Operands {
            query: queries.at(head * z.query()),
            key: keys.at(kv * z.key()),
            value: values.at(kv * z.value()),
            own: own.at(slot * z.own()),
        };
        for tile in first..(first + TILES).min(tiles) {
            run_tile(isa, a, &z, &operands, tile * z.rows);
            for i in 0..z.rows.min(a.t - (tile * z.rows).min(a.t)) {
                let to = out.at((tile * z.rows + i) * a.out_stride + head * a.d);
                let sums = operands.sums(&z);
                // SAFETY: this task alone has these rows of this head.
                unsafe { std::ptr::copy_nonoverlapping(sums.add(i * z.components), to, a.d) };
            }
        }
    });
    Ok(())
}

/// The parts of a head in the scratch memory, and a thread's own memory.
struct Operands {
    query: *mut f32,
    key: *mut f32,
    value: *mut f32,
    own: *mut f32,
}

impl Operands {
    /// Scores `[rows, BK]`, upper and lower bytes of weights `[rows, BK]`.
    fn weights(&self, z: &Sizes) -> [*mut i8; 2] {
        let at = self.own.wrapping_add(z.rows * BK).cast::<i8>();
        [at, at.wrapping_add(z.rows * BK)]
    }

    /// Sums of all blocks `[rows, components]`.
    fn sums(&self, z: &Sizes) -> *mut f32 {
        self.own.wrapping_add(z.rows * (BK + BK / 2))
    }

    /// Sums of a tile while its other half is computed.
    fn half(&self, z: &Sizes) -> *mut f32 {
        self.sums(z).wrapping_add(z.rows * z.components)
    }
}

/// All keys for one tile of queries, whose first is `first`. Leaves finished rows in the sums.
fn run_tile(isa: Isa, a: &Attention<'_>, z: &Sizes, o: &Operands, first: usize) {
    let mut state =
        [Row { max: f32::NEG_INFINITY, sum: 0.0, factor: 0.0, scale: 0.0, code_sums: [0; 2] }; MAX_ROWS];
    let scales = o.query.wrapping_add(z.queries * z.steps + first);
    // SAFETY: scales of the tile's queries, which were written before the tiles began; the tile's sums.
    unsafe {
        for i in 0..z.rows {
            state[i].scale = *scales.add(i);
        }
        std::slice::from_raw_parts_mut(o.sums(z), z.rows * z.components).fill(0.0);
    }
    let query = o.query.wrapping_add(first * z.steps).cast::<i32>().cast_const();
    for block in 0..z.keys / BK {
        let count = BK.min(a.s - block * BK);
        let key = o.key.wrapping_add(block * BK * z.steps).cast::<u8>();
        let key_scales = o.key.wrapping_add(z.keys * z.steps + block * BK);
        let value = o.value.wrapping_add(block * BK / 4 * z.components).cast::<u8>();
        let value_scales = o.value.wrapping_add(z.keys / 4 * z.components + block * z.components);
        dot::run(isa, Scores { z, query, key, scales: key_scales, count, to: o.own });
        isa.run(Weigh { z, scores: o.own, to: o.weights(z), count, state: &mut state });
        dot::run(isa, Mix { z, o, count, state: &state, value, scales: value_scales });
    }
    isa.run(Divide { z, sums: o.sums(z), state: &state });
}

/// The running state of a row of queries.
#[derive(Clone, Copy)]
struct Row {
    /// Of the scores, in powers of two.
    max: f32,
    /// Of the weights as codes.
    sum: f32,
    /// What the sums of earlier blocks are multiplied with.
    factor: f32,
    /// Of the scores.
    scale: f32,
    /// Of the block's upper and lower codes.
    code_sums: [i32; 2],
}

/// Integers up to [`MOST`] and their scale; NaN where a value is not finite.
#[inline(always)]
fn integers(values: &[f32], codes: &mut [i16; MAX_BLOCK]) -> f32 {
    let most = largest(values);
    let inverse = MOST / most;
    // A subnormal maximum has no finite inverse; such values are lost in any sum.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    for (c, v) in codes.iter_mut().zip(values) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
        *c = (v * inverse + 12_582_912.0).to_bits() as i16;
    }
    most / MOST
}

/// Two integers side by side.
#[inline(always)]
fn two(codes: [i16; 2]) -> u32 {
    u32::from(codes[0] as u16) | u32::from(codes[1] as u16) << 16
}

/// Four codes, `zero` more than they stand for.
#[inline(always)]
fn four(codes: [i8; 4], zero: i32) -> u32 {
    u32::from_le_bytes(codes.map(|c| (i32::from(c) + zero) as u8))
}

/// The queries `first..first + BK` of a head: codes `[query][step]`, scales.
struct CodeQueries<'a> {
    a: &'a Attention<'a>,
    z: Sizes,
    head: usize,
    first: usize,
    to: *mut f32,
}

impl DotKernel for CodeQueries<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, _: D) {
        let CodeQueries { a, z, head, first, to } = self;
        // Scores are powers of two.
        let scale = a.scale * std::f32::consts::LOG2_E;
        for i in first..(first + BK).min(z.queries) {
            let mut codes = [0i16; MAX_BLOCK];
            let mut step = 0.0;
            if i < a.t {
                step = integers(&a.q[i * a.q_stride + head * a.d..][..a.d], &mut codes) * scale;
            }
            // SAFETY: query `i` of this head belongs to this task.
            unsafe {
                for (s, codes) in codes.as_chunks::<2>().0.iter().take(z.steps).enumerate() {
                    to.add(i * z.steps + s).cast::<u32>().write(two(*codes));
                }
                *to.add(z.queries * z.steps + i) = step;
            }
        }
    }
}

/// A block of keys of a head: codes `[set of panels][step][panel][key of the panel]`, so that a tile reads one stream;
/// scales.
struct CodeKeys<'a> {
    a: &'a Attention<'a>,
    z: Sizes,
    head: usize,
    block: usize,
    to: *mut f32,
}

impl DotKernel for CodeKeys<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, _: D) {
        let CodeKeys { a, z, head, block, to } = self;
        let stride = a.k.stride / 4;
        let keys: &[f32] = bytemuck::cast_slice(a.k.bytes);
        for j in block * BK..(block + 1) * BK {
            let mut codes = [0i16; MAX_BLOCK];
            let mut scale = 0.0;
            if j < a.s {
                scale = integers(&keys[j * stride + head * a.d..][..a.d], &mut codes);
            }
            // SAFETY: key `j` of this head belongs to this task.
            unsafe {
                let set = LANES * z.panels;
                let key = to.add(j / set * set * z.steps + j % set).cast::<u32>();
                for (s, codes) in codes.as_chunks::<2>().0.iter().take(z.steps).enumerate() {
                    key.add(s * set).write(two(*codes));
                }
                *to.add(z.keys * z.steps + j) = scale;
            }
        }
    }
}

/// A block of values of a head: codes `[four keys][component]`, a scale for each component.
struct CodeValues<'a> {
    a: &'a Attention<'a>,
    z: Sizes,
    head: usize,
    block: usize,
    to: *mut f32,
}

impl DotKernel for CodeValues<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, _: D) {
        let CodeValues { a, z, head, block, to } = self;
        let stride = a.v.stride / 4;
        let values: &[f32] = bytemuck::cast_slice(a.v.bytes);
        let row = |j: usize| &values[j * stride + head * a.d..][..a.d];
        let keys = block * BK..(block * BK + BK).min(a.s);
        let (mut most, mut sums) = ([0f32; MAX_BLOCK], [0f32; MAX_BLOCK]);
        for j in keys.clone() {
            for ((most, sum), v) in most.iter_mut().zip(&mut sums).zip(row(j)) {
                *most = if v.abs() > *most { v.abs() } else { *most };
                // Finite sums of zeros, unless a value is not finite.
                *sum += v * 0.0;
            }
        }
        let mut inverse = [0f32; MAX_BLOCK];
        for (i, most) in inverse.iter_mut().zip(&most) {
            let exact = 127.0 / most;
            *i = if exact.is_finite() { exact } else { 0.0 };
        }
        // SAFETY: this block of this head belongs to this task.
        unsafe {
            let scales = to.add(z.keys / 4 * z.components + block * z.components);
            for c in 0..z.components {
                *scales.add(c) = if c < a.d { most[c] / 127.0 + sums[c] } else { 0.0 };
            }
            for first in (block * BK..(block + 1) * BK).step_by(4) {
                let mut codes = [[0i8; 4]; MAX_BLOCK];
                for j in first..(first + 4).min(keys.end) {
                    for ((code, v), inverse) in codes.iter_mut().zip(row(j)).zip(&inverse) {
                        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
                        code[j - first] = (v * inverse + 12_582_912.0).to_bits() as i8;
                    }
                }
                let to = to.add(first / 4 * z.components).cast::<u32>();
                for (c, codes) in codes.iter().take(z.components).enumerate() {
                    to.add(c).write(four(*codes, z.zero));
                }
            }
        }
    }
}

/// Calls `$of::<D, ROWS, PANELS>` for the tiles of an instruction set.
macro_rules! for_tile {
    ($self:ident.$of:ident($d:ident)) => {
        match (D::ROWS, D::PANELS) {
            (6, 4) => $self.$of::<D, 6, 4>($d),
            (4, 1) => $self.$of::<D, 4, 1>($d),
            (2, 1) => $self.$of::<D, 2, 1>($d),
            _ => {}
        }
    };
}

/// `acc[i][j] += w[s][j] * x[i][s]` over `steps` groups of four bytes or, with `WIDE`, two integers of 16 bits: a tile of
/// integer sums.
///
/// # Safety
/// Codes of `NP` panels in each step, `panel` bytes apart, the steps `step` bytes apart; rows of `x` that are `x_stride`
/// groups apart and as long.
#[inline(always)]
unsafe fn tile<D: Dots, const R: usize, const NP: usize, const WIDE: bool>(
    d: D,
    acc: &mut [[D::I; NP]; R],
    w: *const u8,
    [panel, step]: [usize; 2],
    x: *const i32,
    x_stride: usize,
    steps: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for s in 0..steps {
            let mut codes = [d.load_q(w.add(s * step)); NP];
            for j in 1..NP {
                codes[j] = d.load_q(w.add(s * step + j * panel));
            }
            for i in 0..R {
                for j in 0..NP {
                    let x = x.add(i * x_stride + s);
                    acc[i][j] =
                        if WIDE { d.dot16(acc[i][j], codes[j], x) } else { d.dot(acc[i][j], codes[j], x) };
                }
            }
        }
    }
}

/// Scores of a tile with a block of keys, less the scale of the queries: `to: [rows, BK]`.
struct Scores<'a> {
    z: &'a Sizes,
    query: *const i32,
    key: *const u8,
    scales: *const f32,
    count: usize,
    to: *mut f32,
}

impl DotKernel for Scores<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        for_tile!(self.of(d))
    }
}

impl Scores<'_> {
    #[inline(always)]
    fn of<D: Dots, const R: usize, const NP: usize>(self, d: D) {
        let steps = self.z.steps;
        for first in (0..self.count).step_by(LANES * NP) {
            let mut acc = [[d.splat_i(0); NP]; R];
            // SAFETY: panels of the block, of which there are whole sets; the tile's queries; a block of scores.
            unsafe {
                let key = self.key.add(first * steps * 4);
                tile::<D, R, NP, true>(
                    d,
                    &mut acc,
                    key,
                    [LANES * 4, LANES * 4 * NP],
                    self.query,
                    steps,
                    steps,
                );
                for j in 0..NP {
                    let scale = d.load_f(self.scales.add(first + j * LANES));
                    for i in 0..R {
                        let to = self.to.add(i * BK + first + j * LANES);
                        d.store_f(to, d.mul(d.to_f(acc[i][j]), scale));
                    }
                }
            }
        }
    }
}

/// Scores of a block to weights as codes, with running maxima and sums.
struct Weigh<'a> {
    z: &'a Sizes,
    scores: *mut f32,
    to: [*mut i8; 2],
    count: usize,
    state: &'a mut [Row; MAX_ROWS],
}

impl Kernel for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.count.next_multiple_of(LANES);
        for (i, row) in self.state.iter_mut().enumerate().take(self.z.rows) {
            let scores = self.scores.wrapping_add(i * BK);
            let [upper, lower] = self.to.map(|to| to.wrapping_add(i * BK));
            let scale = s.splat(row.scale);
            // SAFETY: a row of scores and of codes; `whole` is at most `BK`.
            unsafe {
                // Lanes behind the last key repeat a score here, and their weights are taken out below.
                for j in self.count..whole {
                    *scores.add(j) = *scores;
                }
                let mut max = s.splat(row.max);
                for j in (0..whole).step_by(S::WIDTH) {
                    max = s.max(s.mul(s.load(scores.add(j)), scale), max);
                }
                let max = s.reduce_max(max);
                row.factor = if max == row.max { 1.0 } else { (row.max - max).exp2() };
                row.max = max;
                let shift = s.splat(TOP_LOG2 - max);
                let (mut sum, mut upper_sum) = (s.splat(0.0), s.splat(0.0));
                for j in (0..self.count).step_by(S::WIDTH) {
                    let x = s.fma(s.load(scores.add(j)), scale, shift);
                    // Of large scores the largest may come out a rounding above its maximum. Keeps NaN.
                    let x = s.min(s.splat(TOP_LOG2), x);
                    let mut code = s.round(math::exp2_to_integers(s, x));
                    if self.count - j < S::WIDTH {
                        let mut lanes = [0f32; LANES];
                        s.store_n(lanes.as_mut_ptr(), self.count - j, code);
                        code = s.load(lanes.as_ptr());
                    }
                    let high = s.round(s.mul(code, s.splat(1.0 / 128.0)));
                    s.store_i8(upper.add(j), high);
                    s.store_i8(lower.add(j), s.fma(high, s.splat(-128.0), code));
                    sum = s.add(sum, code);
                    upper_sum = s.add(upper_sum, high);
                }
                for to in [upper, lower] {
                    for j in self.count..whole {
                        *to.add(j) = 0;
                    }
                }
                // Exact: far below 2^24.
                let (sum, upper) = (s.reduce_add(sum), s.reduce_add(upper_sum));
                row.sum = row.sum * row.factor + sum;
                row.code_sums = [upper as i32, (sum - 128.0 * upper) as i32];
            }
        }
    }
}

/// Adds a block's weighted values to the sums.
struct Mix<'a> {
    z: &'a Sizes,
    o: &'a Operands,
    count: usize,
    state: &'a [Row; MAX_ROWS],
    value: *const u8,
    scales: *const f32,
}

impl DotKernel for Mix<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        for_tile!(self.of(d))
    }
}

impl Mix<'_> {
    #[inline(always)]
    fn of<D: Dots, const R: usize, const NP: usize>(self, d: D) {
        let Mix { z, o, state, .. } = self;
        let (sums, half) = (o.sums(z), o.half(z));
        let steps = self.count.div_ceil(4);
        for first in (0..z.components).step_by(LANES * NP) {
            // SAFETY: a block's values, of which there are whole sets of panels; a tile's weights and sums.
            unsafe {
                let value = self.value.add(first * 4);
                for (part, codes) in o.weights(z).into_iter().enumerate() {
                    let mut acc = [[d.splat_i(0); NP]; R];
                    for i in 0..R {
                        acc[i] = [d.splat_i(-z.zero * state[i].code_sums[part]); NP];
                    }
                    let codes = codes.cast::<i32>().cast_const();
                    tile::<D, R, NP, false>(
                        d,
                        &mut acc,
                        value,
                        [LANES * 4, z.components * 4],
                        codes,
                        BK / 4,
                        steps,
                    );
                    if part == 0 {
                        for i in 0..R {
                            for j in 0..NP {
                                let upper = d.mul(d.to_f(acc[i][j]), d.splat_f(128.0));
                                d.store_f(half.add((i * NP + j) * LANES), upper);
                            }
                        }
                        continue;
                    }
                    for j in 0..NP {
                        let scale = d.load_f(self.scales.add(first + j * LANES));
                        for i in 0..R {
                            let at = sums.add(i * z.components + first + j * LANES);
                            let before = d.mul(d.load_f(at), d.splat_f(state[i].factor));
                            let upper = d.load_f(half.add((i * NP + j) * LANES));
                            let both = d.fma(d.to_f(acc[i][j]), d.splat_f(1.0), upper);
                            d.store_f(at, d.fma(both, scale, before));
                        }
                    }
                }
            }
        }
    }
}

/// Sums of weighted values by the sums of the weights.
struct Divide<'a> {
    z: &'a Sizes,
    sums: *mut f32,
    state: &'a [Row; MAX_ROWS],
}

impl Kernel for Divide<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.z.components;
        for (i, row) in self.state.iter().enumerate().take(self.z.rows) {
            for c in (0..width).step_by(S::WIDTH) {
                let at = self.sums.wrapping_add(i * width + c);
                // SAFETY: components are whole vectors.
                unsafe { s.store(at, s.div(s.load(at), s.splat(row.sum))) };
            }
        }
    }
}
