//! Attention without storing the scores: blocks of query rows times blocks of keys, with running maxima and sums.
//!
//! The query heads of one key head are rows of one matrix, so that packed keys and values serve all of them; row
//! `r` of a segment is query `r / g`, head `r % g` of the group. For each block of keys and tile of rows:
//! `S = Q K^T`; `m' = max(m, S)`; `P = exp(S - m')`; `l = l exp(m - m') + sum P`; `O = O exp(m - m') + P V`. Any reference
//! near the maximum does, so `m` stays where scores exceed it by little. Scores are in factors of two, not of e.
//! Few rows and many keys are cut along the keys as well, and the parts are joined afterwards. Where the cuts are
//! depends on the shape only, so the result does not depend on the number of threads.
//!
//! Where a caller allows it and it saves time, both products of a task are those of [`pairs`], with queries and keys scaled to
//! one magnitude and values to that of weights.

use super::{Attention, Mask};
use crate::ops::kv::widen;
use crate::ops::pairs::{self, add_excess_of_columns, excess_of_row, pair_rows, run_pairs};
use crate::ops::tile::{Ahead, Into, Lines, PACKED, Tile, Tiles, panel_columns, run_tile, tile_rows};
use crate::ops::{GRAIN, SharedMut};
use crate::simd::{Element, Kernel, Simd, math};
use crate::{Cpu, KvFormat, KvRows, Result};

/// Keys of one block.
const BK: usize = 256;
/// Tiles of one block of rows. Keys and values are packed anew for each block.
const TILES: usize = 16;
/// The same where every row sees all keys of its segment, so that a large block wastes nothing.
const SEGMENT_TILES: usize = 128;
/// Fewer tasks than this are cut along the keys.
const FEW_TASKS: usize = 16;
/// Rows from which magnitudes are known.
const SAMPLES: usize = 16;
/// Rows between one that is used and the one that is asked for.
const AHEAD: usize = 12;
/// With pairs, floats from one row of queries to the next, for heads of fewer components, and from one row of scores.
const PAIR_Q: usize = 144;
const PAIR_SCORES: usize = BK + 16;
/// With pairs, the magnitude that values get: weights are from 0 to 1, few of many or many alike.
const PAIR_V: f64 = 0.25;
/// Fewest keys of a part, and most parts.
const SPLIT: usize = 1024;
pub(super) const MAX_SPLITS: usize = 8;

/// Some rows of one key head with a range of keys.
pub(super) struct Task {
    pub(super) head: usize,
    /// First query of the segment, and rows of the segment that this task owns.
    pub(super) query: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) keys: std::ops::Range<usize>,
    /// Where the task's partial results go, in rows; not used without splits.
    pub(super) partial: usize,
}

/// The work, cut into tasks.
struct Plan {
    tasks: Vec<Task>,
    splits: usize,
    /// Rows of partial results for one split.
    rows: usize,
}

fn block_tiles(mask: &Mask<'_>) -> usize {
    if matches!(mask, Mask::Segments(_)) { SEGMENT_TILES } else { TILES }
}

fn plan(a: &Attention<'_>, width: usize) -> Plan {
    let group = a.h / a.kvh;
    let whole = [0, a.t as u32];
    let bounds = match a.mask {
        Mask::Segments(bounds) => bounds,
        _ => &whole[..],
    };
    let block = block_tiles(&a.mask) * tile_rows(width);
    let segments =
        || bounds.windows(2).map(|b| (b[0] as usize, b[1] as usize)).filter(|(from, to)| from < to);
    let blocks: usize = segments().map(|(from, to)| ((to - from) * group).div_ceil(block)).sum();
    let splits = match a.mask {
        Mask::Segments(_) => 1,
        _ if blocks * a.kvh >= FEW_TASKS => 1,
        _ => a.s.div_ceil(SPLIT).clamp(1, MAX_SPLITS),
    };
    let split_keys = a.s.div_ceil(splits).next_multiple_of(BK);
    let rows = a.t * a.h;
    let mut tasks = Vec::new();
    for head in 0..a.kvh {
        for (from, to) in segments() {
            let (key_from, key_to) = if matches!(a.mask, Mask::Segments(_)) { (from, to) } else { (0, a.s) };
            for row in (0..(to - from) * group).step_by(block) {
                let count = block.min((to - from) * group - row);
                for split in 0..splits {
                    let start = (key_from + split * split_keys).min(key_to);
                    let end = if splits == 1 { key_to } else { (start + split_keys).min(key_to) };
                    let partial = split * rows + head * a.t * group + row;
                    tasks.push(Task { head, query: from, row, rows: count, keys: start..end, partial });
                }
            }
        }
    }
    Plan { tasks, splits, rows }
}

/// Floats of each buffer of one thread, and of one row of partial results.
#[derive(Clone, Copy)]
struct Sizes {
    q: usize,
    k: usize,
    v: usize,
    /// Rows of keys on their way from another format.
    wide: usize,
    scores: usize,
    out: usize,
    /// Components of a head, rounded up to whole panels.
    padded: usize,
    partial: usize,
    /// Maxima and sums of all rows.
    stats: usize,
    /// What rows and columns have too much in products of pairs: queries, keys, weights of a tile and values.
    excess: [usize; 4],
}

impl Sizes {
    fn new(d: usize, width: usize, tiles: usize, pairs: bool) -> Sizes {
        let (mr, nr) = (tile_rows(width), panel_columns(width));
        let rows = tiles * mr;
        let (q_row, score_rows, score_row) =
            if pairs { (PAIR_Q, pair_rows(width), PAIR_SCORES) } else { (d, mr, BK) };
        let excess = if pairs { [rows, BK, score_rows, d.next_multiple_of(nr)] } else { [0; 4] };
        let padded = d.next_multiple_of(nr);
        Sizes {
            q: (rows * q_row).next_multiple_of(16),
            k: d * BK,
            v: BK * padded,
            wide: 16 * padded,
            scores: (score_rows * score_row).next_multiple_of(16),
            out: rows * padded,
            padded,
            partial: (padded + 2).next_multiple_of(16),
            stats: (2 * rows).next_multiple_of(16),
            excess: excess.map(|n| n.next_multiple_of(16)),
        }
    }

    fn total(&self) -> usize {
        let excess: usize = self.excess.iter().sum();
        self.q + self.k + self.v + self.wide + self.scores + self.out + self.stats + excess
    }
}

/// Whether products may be made of pairs, and are faster so.
fn in_pairs(cpu: &Cpu, a: &Attention<'_>) -> bool {
    a.fewer && cpu.isa().adds_beside_products()
}

/// Floats of scratch.
pub(super) fn scratch_floats(cpu: &Cpu, a: &Attention<'_>) -> usize {
    scratch_of(cpu, a, in_pairs(cpu, a))
}

fn scratch_of(cpu: &Cpu, a: &Attention<'_>, pairs: bool) -> usize {
    let width = cpu.isa().width();
    let (plan, sizes) = (plan(a, width), Sizes::new(a.d, width, block_tiles(&a.mask), pairs));
    let partials = if plan.splits > 1 { plan.splits * plan.rows * sizes.partial } else { 0 };
    partials + cpu.threads() * sizes.total()
}

/// The operands were checked.
pub(super) fn flash(cpu: &Cpu, a: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    flash_by(cpu, a, in_pairs(cpu, a), out)
}

/// [`flash`] with products of pairs, if the sizes allow that, or without.
pub(super) fn flash_by(cpu: &Cpu, a: &Attention<'_>, pairs: bool, out: &mut [f32]) -> Result<()> {
    let pairs = pairs && matches!(a.mask, Mask::Segments(_)) && a.d < PAIR_Q;
    let width = cpu.isa().width();
    let (plan, sizes) = (plan(a, width), Sizes::new(a.d, width, block_tiles(&a.mask), pairs));
    let partials = if plan.splits > 1 { plan.splits * plan.rows * sizes.partial } else { 0 };
    let mut scratch = cpu.scratch(scratch_of(cpu, a, pairs))?;
    let (partials, own) = scratch.split_at_mut(partials);
    let (partials, own, out) = (SharedMut::new(partials), SharedMut::new(own), SharedMut::new(out));
    let work = |slot: usize, i: usize| {
        let buffers = own.at(slot * sizes.total());
        let run =
            Run { a, task: &plan.tasks[i], sizes, buffers, partials, split: plan.splits > 1, pairs, out };
        cpu.isa().run(run);
    };
    cpu.parallel_slots(plan.tasks.len(), &work);
    if plan.splits > 1 {
        join(cpu, a, [sizes.padded, sizes.partial, plan.rows, plan.splits], partials, out);
    }
    Ok(())
}

/// Joins all rows; sizes as in [`Join`].
pub(super) fn join(
    cpu: &Cpu,
    a: &Attention<'_>,
    [padded, partial, rows, splits]: [usize; 4],
    partials: SharedMut<f32>,
    out: SharedMut<f32>,
) {
    let share = (GRAIN / (partial * splits)).max(1);
    cpu.parallel(rows.div_ceil(share), &|i| {
        for row in i * share..((i + 1) * share).min(rows) {
            cpu.isa().run(Join { a, row, padded, partial, rows, splits, partials, out });
        }
    });
}

struct Run<'a> {
    a: &'a Attention<'a>,
    task: &'a Task,
    sizes: Sizes,
    /// This thread's buffers.
    buffers: *mut f32,
    partials: SharedMut<f32>,
    split: bool,
    pairs: bool,
    out: SharedMut<f32>,
}

impl Kernel for Run<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { a, task, sizes, .. } = self;
        let (group, d, padded) = (a.h / a.kvh, a.d, sizes.padded);
        let (nr, most, score_row) = if self.pairs {
            (pairs::VECTORS * S::WIDTH, pair_rows(S::WIDTH), PAIR_SCORES)
        } else {
            (panel_columns(S::WIDTH), tile_rows(S::WIDTH), BK)
        };
        let q = self.buffers;
        let k = q.wrapping_add(sizes.q);
        let v = k.wrapping_add(sizes.k);
        let wide = v.wrapping_add(sizes.v);
        let scores = wide.wrapping_add(sizes.wide);
        let sums = scores.wrapping_add(sizes.scores);
        let stats = sums.wrapping_add(sizes.out);
        let mut excess = [stats.wrapping_add(sizes.stats); 4];
        for i in 1..4 {
            excess[i] = excess[i - 1].wrapping_add(sizes.excess[i - 1]);
        }
        let tiles = Tiles::of(task.rows, most);
        let soon = |key: usize| Soon::new(a, task, key);
        // Scores are exponents of two.
        let scale = a.scale * std::f32::consts::LOG2_E;
        let query_of = |r: usize| task.query + (task.row + r) / group;
        // The first key that row `r` does not see.
        let end_of = |r: usize| match a.mask {
            Mask::Causal { past } => (past + query_of(r) + 1).min(task.keys.end),
            _ => task.keys.end,
        };
        let [of_q, of_k, of_v] = if self.pairs { self.balance(scale) } else { [1.0; 3] };
        // SAFETY: the buffers have the sizes of `Sizes`, queries, keys and values were checked to lie in `a`'s slices,
        // and this task alone owns its rows of the outputs and partial results.
        unsafe {
            for t in 0..tiles.count {
                let (start, end) = (tiles.start(t), tiles.start(t + 1));
                for r in start..end {
                    let head = task.head * group + (task.row + r) % group;
                    let row = a.q.as_ptr().add(query_of(r) * a.q_stride + head * d);
                    // Heads of rows are far apart in memory.
                    for p in (0..d).step_by(16) {
                        s.prefetch_near(row.wrapping_add(AHEAD.div_ceil(group) * a.q_stride + p).cast());
                    }
                    if self.pairs {
                        let to = q.add(r * PAIR_Q);
                        scale_row(s, row, scale * of_q, d, to);
                        // The float behind a row is read, and counts for nothing.
                        *to.add(d) = 0.0;
                        *excess[0].add(r) = excess_of_row(s, to, d);
                    } else {
                        let to = q.add(start * d + r - start);
                        scatter(s, row, scale, d, to, end - start);
                    }
                }
            }
            std::slice::from_raw_parts_mut(sums, task.rows * padded).fill(0.0);
            for r in 0..task.rows {
                *stats.add(2 * r) = f32::NEG_INFINITY;
                *stats.add(2 * r + 1) = 0.0;
            }
            let mut key = task.keys.start;
            soon(key).all(s);
            let last = if task.rows == 0 { 0 } else { end_of(task.rows - 1) };
            while key < last {
                let count = BK.min(task.keys.end - key);
                pack_keys(s, Heads::new(&a.k, key, task.head, d), count, d, nr, k, wide);
                pack_values(s, Heads::new(&a.v, key, task.head, d), count, d, nr, v);
                if self.pairs {
                    for panel in 0..count.div_ceil(nr) {
                        scale_panel(s, k.add(panel * nr * d), of_k, d, excess[1].add(panel * nr));
                    }
                    for panel in 0..padded / nr {
                        scale_panel(s, v.add(panel * nr * count), of_v, count, excess[3].add(panel * nr));
                    }
                }
                let soon = soon(key + count);
                for t in 0..tiles.count {
                    let (start, end) = (tiles.start(t), tiles.start(t + 1));
                    let mr = end - start;
                    // Rows see ever more keys, so the last row of the tile sees the most.
                    let seen = end_of(end - 1).saturating_sub(key).min(count);
                    if seen == 0 {
                        continue;
                    }
                    for panel in 0..seen.div_ceil(nr) {
                        let (b, c) = (k.add(panel * nr * d), scores.add(panel * nr));
                        let panels = seen.div_ceil(nr);
                        let ahead = soon.part(soon.keys, t * panels + panel, tiles.count * panels);
                        let into = &[Into::sums(c, true)];
                        let tile = Tile { mr, k: d, a: q.add(start * d), b, into, stride: score_row, ahead };
                        if self.pairs {
                            let next = if panel + 1 < panels { b.add(nr * d) } else { v };
                            let tile = Tile { a: q.add(start * PAIR_Q), ahead: ahead.behind(next), ..tile };
                            let excess = [excess[0].add(start), excess[1].add(panel * nr)];
                            run_pairs::<S, PAIR_Q>(s, tile, excess.map(|p| p.cast_const()));
                        } else {
                            run_tile::<S, PACKED>(s, tile);
                        }
                    }
                    let own = |r: usize| end_of(start + r).saturating_sub(key).min(seen);
                    let (stats, sums) = (stats.add(2 * start), sums.add(start * padded));
                    let soften = Soften { scores, stride: score_row, rows: mr, seen, stats, sums, padded };
                    soften.run(s, own);
                    if self.pairs {
                        for r in 0..mr {
                            let row = scores.add(r * score_row);
                            *row.add(seen.next_multiple_of(S::WIDTH)) = 0.0;
                            *excess[2].add(r) = excess_of_row(s, row, seen);
                        }
                    }
                    for panel in 0..padded / nr {
                        let (b, c) = (v.add(panel * nr * count), sums.add(panel * nr));
                        let panels = padded / nr;
                        let ahead = soon.part(soon.values, t * panels + panel, tiles.count * panels);
                        let into = &[Into::sums(c, false)];
                        let tile = Tile { mr, k: seen, a: scores, b, into, stride: padded, ahead };
                        if self.pairs {
                            let next = if panel + 1 < panels { b.add(nr * count) } else { k };
                            let tile = Tile { ahead: ahead.behind(next), ..tile };
                            let excess = [excess[2], excess[3].add(panel * nr)];
                            run_pairs::<S, PAIR_SCORES>(s, tile, excess.map(|p| p.cast_const()));
                        } else {
                            run_tile::<S, BK>(s, tile);
                        }
                    }
                }
                key += count;
            }
            for r in 0..task.rows {
                let (row, max, sum) = (sums.add(r * padded), *stats.add(2 * r), *stats.add(2 * r + 1));
                if self.split {
                    let to = self.partials.at((task.partial + r) * sizes.partial);
                    std::ptr::copy_nonoverlapping(row, to, padded);
                    *to.add(padded) = max * std::f32::consts::LN_2;
                    *to.add(padded + 1) = sum;
                } else {
                    let head = task.head * group + (task.row + r) % group;
                    let to = self.out.at(query_of(r) * a.out_stride + head * d);
                    for p in (0..d).step_by(16) {
                        s.prefetch_near(to.wrapping_add(AHEAD.div_ceil(group) * a.out_stride + p).cast());
                    }
                    let saw = end_of(r) > task.keys.start;
                    divide(s, row, if saw { sum * of_v } else { 1.0 }, d, to);
                }
            }
        }
    }
}

impl Run<'_> {
    /// Powers of two for queries, keys and values of this task, by those of some rows; queries are multiplied with `scale`
    /// besides.
    fn balance(&self, scale: f32) -> [f32; 3] {
        let Run { a, task, .. } = self;
        let (group, d) = (a.h / a.kvh, a.d);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let samples = |count: usize| (0..SAMPLES.min(count)).map(move |i| i * count / SAMPLES.min(count));
        let mut head = vec![0.0; d];
        let mut of = |x: &KvRows<'_>| -> f64 {
            let rows = samples(task.keys.len());
            let n = (rows.len() * d) as f64;
            rows.map(|i| {
                x.head(task.keys.start + i, task.head, &mut head);
                head.iter().map(|&v| square(v)).sum::<f64>()
            })
            .sum::<f64>()
                / n
        };
        let (of_k, of_v) = (of(&a.k), of(&a.v));
        let rows = samples(task.rows);
        let n = (rows.len() * d) as f64;
        let of_q = rows.map(|r| {
            let at = (task.query + (task.row + r) / group) * a.q_stride;
            let head = task.head * group + (task.row + r) % group;
            a.q[at + head * d..][..d].iter().map(|&v| square(v * scale)).sum::<f64>()
        });
        let [q, k] = pairs::balance(of_q.sum::<f64>() / n, of_k);
        let v = (PAIR_V / of_v.sqrt()).log2().round();
        [q, k, if v.abs() <= 60.0 { v.exp2() as f32 } else { 1.0 }]
    }
}

/// The next block of keys and values. Rows of one head are short pieces, far apart, which the hardware's prefetchers
/// do not follow.
struct Soon {
    keys: Lines,
    values: Lines,
    rows: usize,
}

impl Soon {
    #[inline(always)]
    fn new(a: &Attention<'_>, task: &Task, key: usize) -> Soon {
        let bytes = a.k.format.head_bytes(a.d).unwrap_or(0).max(a.v.format.head_bytes(a.d).unwrap_or(0));
        let rows = BK.min(task.keys.end.saturating_sub(key));
        let at = |x: &KvRows<'_>| {
            let Heads { base, stride, .. } = Heads::new(x, key, task.head, a.d);
            Lines::new(base, stride, bytes.div_ceil(64))
        };
        Soon { keys: at(&a.k), values: at(&a.v), rows }
    }

    /// The share of call `call` of `calls` of one of both. Keys are asked for while scores are computed and values while
    /// they are used, so that memory is busy all the time.
    #[inline(always)]
    fn part(&self, of: Lines, call: usize, calls: usize) -> Ahead {
        let rows = self.rows.div_ceil(calls);
        if call * rows >= self.rows {
            return Ahead::none();
        }
        let lines = of.from(call * rows);
        let nothing_else = Lines::new(lines.base, 0, 1);
        Ahead { both: [lines, nothing_else], lines: of.of_rows(rows) }
    }

    /// Asks for everything at once.
    #[inline(always)]
    fn all<S: Simd>(&self, s: S) {
        for line in 0..self.keys.of_rows(self.rows) {
            s.prefetch(self.keys.address(line));
            s.prefetch(self.values.address(line));
        }
    }
}

/// `to[p * stride] = row[p] * factor` for `p < d`. Lanes go through memory, which is faster than instructions that scatter.
///
/// # Safety
/// `d` floats at `row`, and the elements of `to`.
#[inline(always)]
unsafe fn scatter<S: Simd>(s: S, row: *const f32, factor: f32, d: usize, to: *mut f32, stride: usize) {
    let mut lanes = [0f32; 16];
    for p in (0..d).step_by(S::WIDTH) {
        let n = (d - p).min(S::WIDTH);
        // SAFETY: `n` floats from `p`.
        unsafe {
            s.store(lanes.as_mut_ptr(), s.mul(s.load_n(row.add(p), n), s.splat(factor)));
            for (i, v) in std::hint::black_box(&lanes).iter().take(n).enumerate() {
                *to.add((p + i) * stride) = *v;
            }
        }
    }
}

/// `to[p] = row[p] * factor` for `p < d`.
///
/// # Safety
/// `d` floats at both.
#[inline(always)]
unsafe fn scale_row<S: Simd>(s: S, row: *const f32, factor: f32, d: usize, to: *mut f32) {
    for p in (0..d).step_by(S::WIDTH) {
        let n = (d - p).min(S::WIDTH);
        // SAFETY: `n` floats from `p`.
        unsafe { s.store_n(to.add(p), n, s.mul(s.load_n(row.add(p), n), s.splat(factor))) };
    }
}

/// Multiplies a panel of `k` steps for pairs in place, and gives what its columns have too much.
///
/// # Safety
/// Such a panel, and as many floats at `excess` as it has columns.
#[inline(always)]
unsafe fn scale_panel<S: Simd>(s: S, panel: *mut f32, factor: f32, k: usize, excess: *mut f32) {
    let columns = pairs::VECTORS * S::WIDTH;
    // SAFETY: the caller's promise.
    unsafe {
        scale_row(s, panel, factor, k * columns, panel);
        for j in (0..columns).step_by(S::WIDTH) {
            s.store(excess.add(j), s.splat(0.0));
        }
        add_excess_of_columns(s, panel, k, excess);
    }
}

/// `to[j] = row[j] / sum` for `j < d`.
///
/// # Safety
/// `d` floats at both.
#[inline(always)]
pub(super) unsafe fn divide<S: Simd>(s: S, row: *const f32, sum: f32, d: usize, to: *mut f32) {
    for j in (0..d).step_by(S::WIDTH) {
        let n = (d - j).min(S::WIDTH);
        // SAFETY: `n` floats from `j`.
        unsafe { s.store_n(to.add(j), n, s.div(s.load_n(row.add(j), n), s.splat(sum))) };
    }
}

/// How far, in factors of two, scores may exceed what they are taken relative to, before that is raised and sums are scaled
/// down: so they seldom are, and no digits are lost.
const SLACK: f32 = 8.0;

/// Rows of a tile whose scores become weights.
struct Soften {
    /// Rows of at most [`BK`] scores, in factors of two, and floats from one to the next.
    scores: *mut f32,
    stride: usize,
    rows: usize,
    /// Scores that exist.
    seen: usize,
    /// Reference and sum of each row.
    stats: *mut f32,
    /// What was summed before, rows of `padded`.
    sums: *mut f32,
    padded: usize,
}

impl Soften {
    /// Scores become powers of two relative to a reference, zeros from `own(r)` on in row `r`; references and sums of the
    /// rows are updated. All rows go through each step together, since their chains of operations are independent.
    ///
    /// # Safety
    /// At most as many rows as a tile has, of `stride >= BK` floats at `scores`, two at `stats` and `padded` at `sums`;
    /// `own(r) <= seen <= BK`.
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S, own: impl Fn(usize) -> usize) {
        let Soften { scores, stride, rows, seen, stats, sums, padded } = self;
        // `BK` is a multiple of the width.
        let whole = seen.next_multiple_of(S::WIDTH);
        let mut most = [f32::NEG_INFINITY; tile_rows(4)];
        // SAFETY: the caller's promise.
        unsafe {
            for r in 0..rows {
                let row = scores.add(r * stride);
                for j in own(r)..whole {
                    *row.add(j) = f32::NEG_INFINITY;
                }
                // NaN counts as nothing here and is found below.
                let mut max = s.splat(f32::NEG_INFINITY);
                for j in (0..whole).step_by(S::WIDTH) {
                    max = s.max(s.load(row.add(j)), max);
                }
                most[r] = s.reduce_max(max);
            }
            for r in 0..rows {
                let (reference, sum) = (stats.add(2 * r), stats.add(2 * r + 1));
                let before = *reference;
                if most[r] > before + SLACK {
                    *reference = most[r];
                    if before > f32::NEG_INFINITY {
                        let scale = math::exp2(s, s.splat(before - most[r]));
                        *sum *= s.reduce_max(scale);
                        for j in (0..padded).step_by(S::WIDTH) {
                            let at = sums.add(r * padded + j);
                            s.store(at, s.mul(s.load(at), scale));
                        }
                    }
                }
            }
            for r in 0..rows {
                let (row, reference) = (scores.add(r * stride), *stats.add(2 * r));
                // Nothing but minus infinities so far, or NaN.
                let none = reference == f32::NEG_INFINITY;
                let shift = s.splat(if none { 0.0 } else { reference });
                let mut sum = s.splat(0.0);
                for j in (0..whole).step_by(S::WIDTH) {
                    let p = math::exp2(s, s.sub(s.load(row.add(j)), shift));
                    s.store(row.add(j), p);
                    sum = s.add(sum, p);
                }
                *stats.add(2 * r + 1) += s.reduce_add(sum);
            }
        }
    }
}

/// One head of some rows of keys or values.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) base: *const u8,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    pub(super) format: KvFormat,
}

impl Heads {
    /// Head `head` of the rows from `first` on.
    #[inline(always)]
    pub(super) fn new(x: &KvRows<'_>, first: usize, head: usize, d: usize) -> Heads {
        let at = first * x.stride + head * x.format.head_bytes(d).unwrap_or(0);
        Heads { base: x.bytes.as_ptr().wrapping_add(at), stride: x.stride, format: x.format }
    }

    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> *const u8 {
        self.base.wrapping_add(i * self.stride)
    }

    /// Asks for the head a few rows after row `i` into the first-level cache.
    #[inline(always)]
    pub(super) fn prefetch_near<S: Simd>(&self, s: S, i: usize, d: usize) {
        const AHEAD: usize = 6;
        for byte in (0..self.format.head_bytes(d).unwrap_or(0)).step_by(64) {
            s.prefetch_near(self.row(i + AHEAD).wrapping_add(byte));
        }
    }
}

/// Panels of `nr` keys: `dst[panel][p][c] = key[panel * nr + c][p]`, zero past `count`.
///
/// # Safety
/// `count` rows of heads of `d` components at `src`, aligned for their elements; `d * BK` floats at `dst`, and 16 rows
/// of `d` floats, rounded up to vectors, at `wide`.
#[inline(always)]
unsafe fn pack_keys<S: Simd>(
    s: S,
    src: Heads,
    count: usize,
    d: usize,
    nr: usize,
    dst: *mut f32,
    wide: *mut f32,
) {
    for first in (0..count).step_by(S::WIDTH) {
        let rows = (count - first).min(S::WIDTH);
        let from = src.row(first);
        // SAFETY: rows below `count`, and a column group of a panel.
        unsafe {
            let dst = dst.add(first / nr * nr * d + first % nr);
            match src.format {
                KvFormat::F32 => pack_group(s, from.cast::<f32>(), src.stride / 4, rows, [d, nr], dst),
                KvFormat::F16 => pack_group(s, from.cast::<half::f16>(), src.stride / 2, rows, [d, nr], dst),
                format => {
                    let stride = d.next_multiple_of(S::WIDTH);
                    for r in 0..rows {
                        let to = wide.add(r * stride);
                        widen(s, format, src.row(first + r), d, |c, v| s.store(to.add(c), v));
                    }
                    pack_group(s, wide.cast_const(), stride, rows, [d, nr], dst);
                }
            }
        }
    }
    // A panel of several vectors whose last ones begin past the end.
    for first in (count.next_multiple_of(S::WIDTH)..count.next_multiple_of(nr)).step_by(S::WIDTH) {
        for p in 0..d {
            // SAFETY: a column group of the last panel.
            unsafe { s.store(dst.add(first / nr * nr * d + first % nr + p * nr), s.splat(0.0)) };
        }
    }
}

/// A vector's width of keys: `dst[p][c] = src[c][p]`, zero for `c >= rows`.
///
/// # Safety
/// `rows` rows of `d` elements at `src`, and `d` rows of `nr` floats at `dst`.
#[inline(always)]
unsafe fn pack_group<S: Simd, E: Element>(
    s: S,
    src: *const E,
    stride: usize,
    rows: usize,
    [d, nr]: [usize; 2],
    dst: *mut f32,
) {
    let mut p = 0;
    // SAFETY: the caller's promise.
    unsafe {
        if rows == S::WIDTH {
            while p + S::WIDTH <= d {
                s.transpose(src.add(p), stride, dst.add(p * nr), nr);
                p += S::WIDTH;
            }
        }
        for p in p..d {
            for c in 0..S::WIDTH {
                *dst.add(p * nr + c) = if c < rows { (*src.add(c * stride + p)).widen() } else { 0.0 };
            }
        }
    }
}

/// Panels of `nr` components: `dst[panel][j][c] = value[j][panel * nr + c]`; what is past `d` is arbitrary.
///
/// # Safety
/// `count` rows of heads of `d` components at `src`, `count * d` floats rounded up to panels at `dst`.
#[inline(always)]
pub(super) unsafe fn pack_values<S: Simd>(
    s: S,
    src: Heads,
    count: usize,
    d: usize,
    nr: usize,
    dst: *mut f32,
) {
    let padded = d.next_multiple_of(panel_columns(S::WIDTH));
    for j in 0..count {
        src.prefetch_near(s, j, d);
        // SAFETY: a row of heads; the row of a panel is written.
        unsafe {
            widen(s, src.format, src.row(j), d, |c, v| {
                s.store(dst.add((c / nr * count + j) * nr + c % nr), v)
            });
            for c in (d.next_multiple_of(S::WIDTH)..padded).step_by(S::WIDTH) {
                s.store(dst.add((c / nr * count + j) * nr + c % nr), s.splat(0.0));
            }
        }
    }
}

/// Joins the partial results of one row.
pub(super) struct Join<'a> {
    pub(super) a: &'a Attention<'a>,
    pub(super) row: usize,
    /// Components of a partial result; its maximum and sum follow.
    pub(super) padded: usize,
    /// Floats of a partial result.
    pub(super) partial: usize,
    /// Rows of one part, and parts.
    pub(super) rows: usize,
    pub(super) splits: usize,
    pub(super) partials: SharedMut<f32>,
    pub(super) out: SharedMut<f32>,
}

impl Kernel for Join<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Join { a, padded, .. } = self;
        let (group, d) = (a.h / a.kvh, a.d);
        let (head, row) = (self.row / (a.t * group), self.row % (a.t * group));
        let (query, head) = (row / group, head * group + row % group);
        let part = |i: usize| self.partials.at((i * self.rows + self.row) * self.partial);
        // SAFETY: partial results of this row were written by the first region; the output row belongs to this task.
        unsafe {
            let max = (0..self.splits).fold(f32::NEG_INFINITY, |m, i| m.max(*part(i).add(padded)));
            // A part that saw nothing has minus infinity here, and weighs nothing.
            let (mut weights, mut sum) = ([1f32; MAX_SPLITS], 0.0);
            for i in 0..self.splits {
                if max != f32::NEG_INFINITY {
                    weights[i] = s.reduce_max(math::exp(s, s.splat(*part(i).add(padded) - max)));
                }
                sum += weights[i] * *part(i).add(padded + 1);
            }
            let to = self.out.at(query * a.out_stride + head * d);
            for j in (0..d).step_by(S::WIDTH) {
                let n = (d - j).min(S::WIDTH);
                let mut total = s.splat(0.0);
                for i in 0..self.splits {
                    total = s.fma(s.load_n(part(i).add(j), n), s.splat(weights[i]), total);
                }
                s.store_n(to.add(j), n, s.div(total, s.splat(sum)));
            }
        }
    }
}
