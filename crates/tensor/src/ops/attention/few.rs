//! Attention of few rows over many keys: decoding.
//!
//! As in `flash`, the query heads of one key head are rows of one matrix, so that keys and values are read and widened
//! once for all of them. With so few rows, transposing the keys would cost as much as using them; here vectors run along
//! the components of a key, a tile of `R` rows and `KEYS` keys keeps a vector of partial sums for each pair, and a
//! tree of additions makes scores of them. Scores are stored key by key, `R` rows side by side: maxima, exponentials
//! and sums of all rows go on in the lanes of one vector, and the product with the values takes them as packed rows.
//!
//! Keys are cut into parts by the shape alone, so the result does not depend on the number of threads.

use super::flash::{Heads, MAX_SPLITS, Task, divide, join, pack_values};
use super::{Attention, Mask};
use crate::ops::SharedMut;
use crate::ops::kv::{USUAL, widen};
use crate::ops::tile::{Ahead, Into, Lines, PACKED, Tile, panel_columns, run_tile};
use crate::simd::{Kernel, Simd, math};
use crate::{Cpu, KvFormat, Result};

/// Most rows of a key head.
const ROWS: usize = 32;
/// Keys of one block, a multiple of every tile's keys. Fewer mean more joining of sums; more than these would not stay in
/// the second-level cache with their values and scores.
const BK: usize = 128;
/// Fewest keys of a part.
const SPLIT: usize = 256;

/// Rows of a tile of scores; with its keys a multiple of the width, and twice as many sums as vectors are loaded, where
/// there are registers for them.
const fn tile_rows(width: usize) -> usize {
    if width == 1 { 1 } else { 4 }
}

/// Whether this way suits the operands.
pub(super) fn suits(a: &Attention<'_>) -> bool {
    !matches!(a.mask, Mask::Segments(_)) && a.t > 0 && a.s > 0 && a.t.saturating_mul(a.h / a.kvh) <= ROWS
}

/// Floats of each buffer of one thread, and of one row of partial results.
#[derive(Clone, Copy)]
struct Sizes {
    splits: usize,
    split_keys: usize,
    /// Rows of a key head, rounded up to tiles, and components, rounded up to panels.
    rows: usize,
    padded: usize,
    q: usize,
    k: usize,
    v: usize,
    scores: usize,
    out: usize,
    stats: usize,
    partial: usize,
}

impl Sizes {
    fn new(a: &Attention<'_>, width: usize) -> Sizes {
        let splits = a.s.div_ceil(SPLIT).clamp(1, MAX_SPLITS);
        let rows = (a.t * (a.h / a.kvh)).next_multiple_of(tile_rows(width));
        let padded = a.d.next_multiple_of(panel_columns(width));
        Sizes {
            splits,
            split_keys: a.s.div_ceil(splits).next_multiple_of(BK),
            rows,
            padded,
            q: (rows * padded).next_multiple_of(16),
            k: BK * padded,
            v: BK * padded,
            scores: (rows * BK).next_multiple_of(16),
            out: (rows * padded).next_multiple_of(16),
            stats: (3 * rows).next_multiple_of(16),
            partial: (padded + 2).next_multiple_of(16),
        }
    }

    fn thread(&self) -> usize {
        self.q + self.k + self.v + self.scores + self.out + self.stats
    }

    fn partials(&self, a: &Attention<'_>) -> usize {
        if self.splits > 1 { self.splits * a.t * a.h * self.partial } else { 0 }
    }
}

/// Floats of scratch.
pub(super) fn scratch_floats(cpu: &Cpu, a: &Attention<'_>) -> usize {
    let sizes = Sizes::new(a, cpu.isa().width());
    sizes.partials(a) + cpu.threads() * sizes.thread()
}

/// The operands were checked.
pub(super) fn few(cpu: &Cpu, a: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    let sizes = Sizes::new(a, cpu.isa().width());
    let mut scratch = cpu.scratch(scratch_floats(cpu, a))?;
    let (partials, own) = scratch.split_at_mut(sizes.partials(a));
    let (partials, own, out) = (SharedMut::new(partials), SharedMut::new(own), SharedMut::new(out));
    let rows = a.t * (a.h / a.kvh);
    cpu.parallel_slots(sizes.splits * a.kvh, &|slot, i| {
        // Heads of the same keys lie side by side, so they come one after the other.
        let (split, head) = (i / a.kvh, i % a.kvh);
        let start = (split * sizes.split_keys).min(a.s);
        let keys = start..if sizes.splits == 1 { a.s } else { (start + sizes.split_keys).min(a.s) };
        let partial = split * a.t * a.h + head * rows;
        let task = Task { head, query: 0, row: 0, rows, keys, partial };
        let buffers = own.at(slot * sizes.thread());
        cpu.isa().run(Run { a, task, sizes, buffers, partials, out });
    });
    if sizes.splits > 1 {
        join(cpu, a, [sizes.padded, sizes.partial, a.t * a.h, sizes.splits], partials, out);
    }
    Ok(())
}

struct Run<'a> {
    a: &'a Attention<'a>,
    task: Task,
    sizes: Sizes,
    /// This thread's buffers.
    buffers: *mut f32,
    partials: SharedMut<f32>,
    out: SharedMut<f32>,
}

impl Kernel for Run<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match S::WIDTH {
            16 => self.tiled::<S, 4, 4>(s),
            8 => self.tiled::<S, 4, 2>(s),
            4 => self.tiled::<S, 4, 4>(s),
            _ => self.tiled::<S, 1, 1>(s),
        }
    }
}

impl Run<'_> {
    /// `R` as [`tile_rows`] gives it.
    #[inline(always)]
    fn tiled<S: Simd, const R: usize, const KEYS: usize>(self, s: S) {
        let Run { a, ref task, sizes, .. } = self;
        let (group, d, padded, rows) = (a.h / a.kvh, a.d, sizes.padded, sizes.rows);
        let nr = panel_columns(S::WIDTH);
        let q = self.buffers;
        let k = q.wrapping_add(sizes.q);
        let v = k.wrapping_add(sizes.k);
        let scores = v.wrapping_add(sizes.v);
        let sums = scores.wrapping_add(sizes.scores);
        let most = sums.wrapping_add(sizes.out);
        let totals = most.wrapping_add(rows);
        // The first key that each row does not see, as f32: exact, since no cache has 2^24 tokens that matter here.
        let ends = totals.wrapping_add(rows);
        let end_of = |r: usize| match a.mask {
            Mask::Causal { past } => (past + r.min(task.rows - 1) / group + 1).min(task.keys.end),
            _ => task.keys.end,
        };
        // SAFETY: the buffers have the sizes of `Sizes`; queries, keys and values were checked to lie in `a`'s slices;
        // this task alone owns its rows of the outputs and partial results.
        unsafe {
            std::slice::from_raw_parts_mut(q, rows * padded).fill(0.0);
            std::slice::from_raw_parts_mut(sums, rows * padded).fill(0.0);
            for r in 0..rows {
                *most.add(r) = f32::NEG_INFINITY;
                *totals.add(r) = 0.0;
                *ends.add(r) = end_of(r).saturating_sub(task.keys.start) as f32;
            }
            for r in 0..task.rows {
                let head = task.head * group + r % group;
                let row = a.q.as_ptr().add(r / group * a.q_stride + head * d);
                for p in 0..d {
                    *q.add(r * padded + p) = *row.add(p) * a.scale;
                }
            }
            let (first, last) = (end_of(0), end_of(rows - 1));
            let mut key = task.keys.start;
            while key < last {
                let count = BK.min(last - key);
                let next = key + count;
                let ahead = BK.min(task.keys.end.saturating_sub(next));
                let keys = widened(s, Heads::new(&a.k, key, task.head, d), count, d, padded, k);
                let soon = Soon::new(Heads::new(&a.k, next, task.head, d), ahead, d);
                let tiles = rows / R;
                for j in (0..count).step_by(KEYS) {
                    soon.part(s, j, count.div_ceil(KEYS) * KEYS, KEYS);
                    for t in 0..tiles {
                        let to = scores.add(t * R * BK + j * R);
                        dots::<S, R, KEYS>(s, q.add(t * R * padded), keys, j, count, padded, to);
                    }
                }
                pack_values(s, Heads::new(&a.v, key, task.head, d), count, d, nr, v);
                let soon = Soon::new(Heads::new(&a.v, next, task.head, d), ahead, d);
                for t in 0..tiles {
                    // What a row does not see, and keys that only fill a tile.
                    if next > first || count % KEYS != 0 {
                        let from = key - task.keys.start;
                        hide::<R>(
                            scores.add(t * R * BK),
                            count.next_multiple_of(KEYS),
                            from,
                            count,
                            ends.add(t * R),
                        );
                    }
                    let cells = count.next_multiple_of(KEYS) * R;
                    let scales =
                        soften::<S, R>(s, scores.add(t * R * BK), cells, most.add(t * R), totals.add(t * R));
                    for (r, scale) in scales.into_iter().enumerate().filter(|(_, scale)| *scale != 1.0) {
                        let row = sums.add((t * R + r) * padded);
                        for c in (0..padded).step_by(S::WIDTH) {
                            s.store(row.add(c), s.mul(s.load(row.add(c)), s.splat(scale)));
                        }
                    }
                }
                let panels = padded / nr;
                for panel in 0..panels {
                    for t in 0..tiles {
                        let (a, b) = (scores.add(t * R * BK), v.add(panel * nr * count));
                        let c = sums.add(t * R * padded + panel * nr);
                        let ahead = soon.ahead(panel * tiles + t, panels * tiles);
                        run_tile::<S, PACKED>(
                            s,
                            Tile {
                                mr: R,
                                k: count,
                                a,
                                b,
                                into: &[Into::sums(c, false)],
                                stride: padded,
                                ahead,
                            },
                        );
                    }
                }
                key = next;
            }
            for r in 0..task.rows {
                let (row, max, sum) = (sums.add(r * padded), *most.add(r), *totals.add(r));
                if sizes.splits > 1 {
                    let to = self.partials.at((task.partial + r) * sizes.partial);
                    std::ptr::copy_nonoverlapping(row, to, padded);
                    *to.add(padded) = max;
                    *to.add(padded + 1) = sum;
                } else {
                    let head = task.head * group + r % group;
                    let to = self.out.at(r / group * a.out_stride + head * d);
                    divide(s, row, if end_of(r) > task.keys.start { sum } else { 1.0 }, d, to);
                }
            }
        }
    }
}

/// Keys in f32: where they are, or widened into `buffer`.
///
/// # Safety
/// `count` rows of heads at `src`, `count * padded` floats at `buffer`.
#[inline(always)]
unsafe fn widened<S: Simd>(
    s: S,
    src: Heads,
    count: usize,
    d: usize,
    padded: usize,
    buffer: *mut f32,
) -> (*const f32, usize) {
    if src.format == KvFormat::F32 && d == padded {
        return (src.base.cast(), src.stride / 4);
    }
    for j in 0..count {
        let to = buffer.wrapping_add(j * padded);
        src.prefetch_near(s, j, d);
        // SAFETY: the caller's promise.
        unsafe {
            widen(s, src.format, src.row(j), d, |c, v| s.store(to.add(c), v));
            for c in d..padded {
                *to.add(c) = 0.0;
            }
        }
    }
    (buffer, padded)
}

/// `to[i][r] = sum_p q[r][p] * key[j + i][p]` for `i < KEYS`, `r < R`; keys from `count` on are the last one.
///
/// # Safety
/// `R` rows of `padded` floats at `q`, `count` at `keys`, `KEYS * R` floats at `to`.
#[inline(always)]
unsafe fn dots<S: Simd, const R: usize, const KEYS: usize>(
    s: S,
    q: *const f32,
    (keys, stride): (*const f32, usize),
    j: usize,
    count: usize,
    padded: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's promise; the sums fill whole vectors, since `KEYS * R` is a multiple of the width.
    unsafe {
        let mut sums = [s.splat(0.0); 16];
        let mut rows = [keys; KEYS];
        for i in 0..KEYS {
            rows[i] = keys.add((j + i).min(count - 1) * stride);
        }
        // The usual number: a loop of a length that the compiler knows.
        if padded == USUAL {
            add_products::<S, R, KEYS>(s, q, &rows, USUAL, &mut sums);
        } else {
            add_products::<S, R, KEYS>(s, q, &rows, padded, &mut sums);
        }
        for i in (0..KEYS * R).step_by(S::WIDTH) {
            s.store(to.add(i), s.reduce_add_each(&sums[i..i + S::WIDTH]));
        }
    }
}

/// The products of [`dots`], a vector of partial sums for each row and key.
///
/// # Safety
/// As for [`dots`].
#[inline(always)]
unsafe fn add_products<S: Simd, const R: usize, const KEYS: usize>(
    s: S,
    q: *const f32,
    rows: &[*const f32; KEYS],
    padded: usize,
    sums: &mut [S::V; 16],
) {
    for p in (0..padded).step_by(S::WIDTH) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut key = [s.splat(0.0); KEYS];
            for i in 0..KEYS {
                key[i] = s.load(rows[i].add(p));
            }
            for r in 0..R {
                let x = s.load(q.add(r * padded + p));
                for i in 0..KEYS {
                    sums[i * R + r] = s.fma(x, key[i], sums[i * R + r]);
                }
            }
        }
    }
}

/// Makes the scores of keys that a row does not see minus infinity.
///
/// # Safety
/// `cells` rows of `R` floats at `scores`, `R` floats at `ends`.
#[inline(always)]
unsafe fn hide<const R: usize>(scores: *mut f32, cells: usize, from: usize, count: usize, ends: *const f32) {
    for j in 0..cells {
        for r in 0..R {
            // SAFETY: the caller's promise.
            unsafe {
                if j >= count || (from + j) as f32 >= *ends.add(r) {
                    *scores.add(j * R + r) = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Replaces `cells` scores, `R` rows side by side, by their exponentials and updates the rows' maxima and sums. Returns
/// the factors for what was summed before.
///
/// # Safety
/// `cells` floats at `scores`, `R` at `most` and `totals`.
#[inline(always)]
unsafe fn soften<S: Simd, const R: usize>(
    s: S,
    scores: *mut f32,
    cells: usize,
    most: *mut f32,
    totals: *mut f32,
) -> [f32; R] {
    // SAFETY: the caller's promise; `cells` is a multiple of the width, and no vector has more than 16 lanes.
    unsafe {
        let mut max = s.splat(f32::NEG_INFINITY);
        for i in (0..cells).step_by(S::WIDTH) {
            max = s.max(s.load(scores.add(i)), max);
        }
        let (mut lanes, mut falls, mut shifts) = ([0f32; 16], [0f32; 16], [0f32; 16]);
        s.store(lanes.as_mut_ptr(), max);
        for r in 0..R {
            let before = *most.add(r);
            let mut now = before;
            for lane in 0..S::WIDTH / R {
                now = if lanes[lane * R + r] > now { lanes[lane * R + r] } else { now };
            }
            falls[r] = if now == before { 0.0 } else { before - now };
            // Nothing but minus infinities so far: their exponentials are zeros, and those of NaN stay NaN.
            let shift = if now == f32::NEG_INFINITY { 0.0 } else { now };
            for lane in 0..S::WIDTH / R {
                shifts[lane * R + r] = shift;
            }
            *most.add(r) = now;
        }
        // No tile has more rows than a vector lanes.
        s.store(falls.as_mut_ptr(), math::exp(s, s.load(falls.as_ptr())));
        let mut factors = [1f32; R];
        factors.copy_from_slice(&falls[..R]);
        let shift = s.load(shifts.as_ptr());
        let mut sum = s.splat(0.0);
        for i in (0..cells).step_by(S::WIDTH) {
            let p = math::exp(s, s.sub(s.load(scores.add(i)), shift));
            s.store(scores.add(i), p);
            sum = s.add(sum, p);
        }
        s.store(lanes.as_mut_ptr(), sum);
        for r in 0..R {
            let mut added = 0.0;
            for lane in 0..S::WIDTH / R {
                added += lanes[lane * R + r];
            }
            *totals.add(r) = *totals.add(r) * factors[r] + added;
        }
        factors
    }
}

/// The next block of keys or values.
struct Soon {
    lines: Lines,
    rows: usize,
}

impl Soon {
    #[inline(always)]
    fn new(heads: Heads, rows: usize, d: usize) -> Soon {
        let bytes = heads.format.head_bytes(d).unwrap_or(0);
        Soon { lines: Lines::new(heads.base, heads.stride, bytes.div_ceil(64)), rows }
    }

    /// Asks for the share of step `at` of `of`.
    #[inline(always)]
    fn part<S: Simd>(&self, s: S, at: usize, of: usize, step: usize) {
        let all = self.lines.of_rows(self.rows);
        for line in all * at / of..all * (at + step) / of {
            s.prefetch(self.lines.address(line));
        }
    }

    /// The share of call `call` of `calls`.
    #[inline(always)]
    fn ahead(&self, call: usize, calls: usize) -> Ahead {
        let rows = self.rows.div_ceil(calls);
        if call * rows >= self.rows {
            return Ahead::none();
        }
        let lines = self.lines.from(call * rows);
        let nothing_else = Lines::new(lines.base, 0, 1);
        Ahead { both: [lines, nothing_else], lines: self.lines.of_rows(rows) }
    }
}
