//! One row of quantised `x` times packed weights: decoding. What is read once should only be waited for, so everything
//! that is not a product is kept out of the inner loop.

use std::ops::Range;

use super::packed::{Header, Source, X, unit};
use super::rows::Store;
use crate::Isa;
use crate::ops::gemm::FinishRows;
use crate::packed::{Layout, Packed, UNIT, ZeroKind};
use crate::simd::dot::{self, DotKernel, Dots, LANES};

/// Bytes between what is read and what is asked for, in each stream. What is asked for goes to the second-level cache:
/// the first level has few requests at a time (Zen 4: with those, 256 bytes are best and 1024 cost a third of the
/// bandwidth; with the second level's, reading is up to 15 % faster, and little depends on the distance).
const AHEAD: usize = 1024;

/// Panels that one row of `x` is multiplied with side by side: a single stream does not keep the memory busy.
const STREAMS: usize = 4;
/// Columns that are finished together where one row of `x` is multiplied.
pub(super) const FEW_CHUNK: usize = STREAMS * LANES;
/// Chunks of a task, at most: every task begins with memory that nobody asked for.
const TASK: usize = 32;

/// The chunks of a product as tasks that get smaller to the end, where a thread waits for the others as long as their
/// last tasks take: each is a share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987).
pub(super) struct Tasks {
    /// First chunks, and the end.
    starts: Vec<usize>,
    threads: usize,
}

impl Tasks {
    pub(super) fn new(chunks: usize, threads: usize) -> Tasks {
        let mut starts = vec![0];
        let mut first = 0;
        while first < chunks {
            first += ((chunks - first) / (2 * threads)).clamp(1, TASK);
            starts.push(first);
        }
        Tasks { starts, threads }
    }

    pub(super) fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// The chunks of task `i`, and the first one of the task that its thread probably takes next: threads take them in turn.
    fn of(&self, i: usize) -> (Range<usize>, usize) {
        (self.starts[i]..self.starts[i + 1], self.starts[(i + self.threads).min(self.count())])
    }
}

/// One row of `x` times [`STREAMS`] panels of one layout: `sums[16 i ..]`.
struct Gemv<'a> {
    layout: &'a Layout,
    panels: [*const u8; STREAMS],
    /// What is read afterwards: asked for towards the end.
    next: [*const u8; STREAMS],
    x: &'a X,
    sums: &'a mut [f32; STREAMS * LANES],
}

impl DotKernel for Gemv<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        for_bits!(self.layout.format.bits, self.of(d))
    }
}

impl Gemv<'_> {
    #[inline(always)]
    fn of<D: Dots, const BITS: usize>(self, d: D) {
        // Only formats of these widths have groups of half a unit, and a table has sixteen values.
        let (halves, table) = (self.x.shape.group == 16, self.layout.format.table);
        // SAFETY: whoever made this found the panels; they are whole.
        unsafe {
            match (BITS, halves, table) {
                (2 | 3 | 6, true, _) => self.panels::<D, BITS, true, false>(d),
                (4, _, true) => self.panels::<D, BITS, false, true>(d),
                _ => self.panels::<D, BITS, false, false>(d),
            }
        }
    }

    /// # Safety
    /// As for [`panels`].
    #[inline(always)]
    unsafe fn panels<D: Dots, const BITS: usize, const HALVES: bool, const TABLE: bool>(self, d: D) {
        // SAFETY: the caller's promise.
        unsafe {
            panels::<D, BITS, HALVES, TABLE>(d, self.layout, self.x, self.panels, self.next, self.sums);
        }
    }
}

/// Panels times the one row of `x`.
///
/// # Safety
/// Panels of the layout at `p`; `x` holds one row of as many steps.
#[inline(always)]
unsafe fn panels<D: Dots, const BITS: usize, const HALVES: bool, const TABLE: bool>(
    d: D,
    l: &Layout,
    x: &X,
    p: [*const u8; STREAMS],
    next: [*const u8; STREAMS],
    out: &mut [f32; STREAMS * LANES],
) {
    let (units, span) = (x.k / UNIT, l.span / UNIT);
    let per_block = x.shape.block / UNIT;
    let per_group = if HALVES { 1 } else { (x.shape.group / UNIT).max(1) };
    // From places in the span to its groups: of a power of two units, or one for all.
    let group = if l.group < l.span { (l.group / UNIT).max(1).ilog2() } else { usize::BITS - 1 };
    let fixed = x.shape.zero.is_some();
    let zero = d.splat_f(0.0);
    let mut total = [zero; STREAMS];
    let (mut at, mut within, mut first) = (p, 0, 0);
    // SAFETY: spans, units and groups as the layout counts them; `x` has as many.
    unsafe {
        let mut steps = x.codes.at(0).cast::<i32>().cast_const();
        let mut x_sums = x.sums.at(0).cast_const();
        let mut x_scales = x.scales.at(0).cast_const();
        while first < units {
            let mut left = per_block.min(units - first);
            first += left;
            if first == units {
                for line in (0..2 * AHEAD).step_by(64) {
                    for next in next {
                        d.prefetch(next.wrapping_add(line));
                    }
                }
            }
            let mut sum = [zero; STREAMS];
            while left > 0 {
                // What is of one span.
                let here = left.min(span - within);
                let headers = each!(I in [0 1 2 3] => Header::new(d, l, at[I]));
                if within == 0 {
                    // Codes are asked for a fixed way ahead, which leaves a gap as long as the header.
                    for line in (0..l.header).step_by(64) {
                        for at in at {
                            d.prefetch(at.wrapping_add(AHEAD + line));
                        }
                    }
                }
                let mut codes = each!(I in [0 1 2 3] => at[I].add(l.header + within * 64 * BITS));
                let mut place = within;
                let mut rest = here;
                while rest > 0 {
                    let count = per_group.min(rest);
                    rest -= count;
                    let start = if fixed { x_sums.cast::<i32>().read() } else { 0 };
                    let mut acc = [d.splat_i(start); STREAMS];
                    for _ in 0..count {
                        if HALVES {
                            let second = if fixed { x_sums.add(1).cast::<i32>().read() } else { 0 };
                            let both = each!(I in [0 1 2 3] => {
                                let q = ahead::<D, BITS, TABLE>(d, codes[I]);
                                let low = d.splat_i(start);
                                [products(d, low, &q, 0, steps), products(d, d.splat_i(second), &q, 4, steps)]
                            });
                            sum = add(&headers, 2 * place, each!(I in [0 1 2 3] => both[I][0]), x_sums, sum);
                            acc = each!(I in [0 1 2 3] => both[I][1]);
                            x_sums = x_sums.add(1);
                        } else {
                            acc = each!(I in [0 1 2 3] => {
                                let q = ahead::<D, BITS, TABLE>(d, codes[I]);
                                products(d, products(d, acc[I], &q, 0, steps), &q, 4, steps)
                            });
                        }
                        steps = steps.add(UNIT / 4);
                        codes = codes.map(|codes| codes.add(64 * BITS));
                    }
                    let g = if HALVES { 2 * place + 1 } else { place >> group };
                    sum = add(&headers, g, acc, x_sums, sum);
                    place += count;
                    x_sums = x_sums.add(1);
                }
                left -= here;
                within += here;
                if within == span {
                    within = 0;
                    at = at.map(|at| at.wrapping_add(l.span_bytes));
                }
            }
            let scale = d.splat_f(x_scales.read());
            x_scales = x_scales.add(1);
            total = each!(I in [0 1 2 3] => d.fma(sum[I], scale, total[I]));
        }
        for i in 0..STREAMS {
            d.store_f(out.as_mut_ptr().add(i * LANES), total[i]);
        }
    }
}

/// The codes of a unit; those behind it are asked for.
///
/// # Safety
/// As for [`unit`].
#[inline(always)]
unsafe fn ahead<D: Dots, const BITS: usize, const TABLE: bool>(d: D, codes: *const u8) -> [D::Q; 8] {
    for line in (0..64 * BITS).step_by(64) {
        d.prefetch(codes.wrapping_add(AHEAD + line));
    }
    // SAFETY: the caller's promise.
    unsafe { unit::<D, BITS>(d, codes, TABLE) }
}

/// `acc` and the products of four vectors of codes from `first` on.
///
/// # Safety
/// The `x` of the whole unit at `steps`.
#[inline(always)]
unsafe fn products<D: Dots>(d: D, mut acc: D::I, q: &[D::Q; 8], first: usize, steps: *const i32) -> D::I {
    for s in first..first + 4 {
        // SAFETY: the caller's promise.
        acc = unsafe { d.dot(acc, q[s], steps.add(s)) };
    }
    acc
}

/// Adds group `g` of the span, whose sum of `x` is at `x_sum`.
///
/// # Safety
/// The headers have such a group; one f32 at `x_sum`.
#[inline(always)]
unsafe fn add<D: Dots>(
    headers: &[Header<'_, D>; STREAMS],
    g: usize,
    acc: [D::I; STREAMS],
    x_sum: *const f32,
    mut sum: [D::F; STREAMS],
) -> [D::F; STREAMS] {
    let d = headers[0].d;
    // SAFETY: the caller's promise.
    unsafe {
        let scales = each!(I in [0 1 2 3] => headers[I].scale(g));
        sum = each!(I in [0 1 2 3] => d.fma(d.to_f(acc[I]), scales[I], sum[I]));
        if !matches!(headers[0].l.format.zero, ZeroKind::Fixed(_)) {
            let x_sum = d.splat_f(*x_sum);
            sum = each!(I in [0 1 2 3] => d.fma(headers[I].minimum(g, scales[I]), x_sum, sum[I]));
        }
    }
    sum
}

/// The panels of a set of sources that are whole panels, of one layout; where there are fewer than streams, some twice.
fn side_by_side<'a>(sources: &[Source<'a>; STREAMS]) -> Option<(&'a Packed, [*const u8; STREAMS])> {
    let mut panels =
        sources.iter().filter_map(|s| if let Source::Panel(p, i) = *s { Some((p, i)) } else { None });
    let (packed, panel) = panels.next()?;
    if panels.any(|(p, _)| p.layout != packed.layout) {
        return None;
    }
    let panels = std::array::from_fn(|i| match sources[i] {
        Source::Panel(packed, panel) => packed.panel(panel),
        _ => packed.panel(panel),
    });
    Some((packed, panels))
}

/// The columns of task `task`.
pub(super) fn gemv(isa: Isa, x: &X, (tasks, task): (&Tasks, usize), store: &Store<'_>) {
    let sources_at = |chunk: usize| std::array::from_fn(|i| store.rows.source(chunk * FEW_CHUNK + i * LANES));
    debug_assert_eq!(store.rows.chunk, FEW_CHUNK, "gates and what they multiply lie in one chunk");
    let (chunks, next_task) = tasks.of(task);
    let mut sources: [Source<'_>; STREAMS] = sources_at(chunks.start);
    let mut set = side_by_side(&sources);
    for chunk in chunks.clone() {
        let after = sources_at(if chunk + 1 < chunks.end { chunk + 1 } else { next_task });
        let set_after = side_by_side(&after);
        let mut sums = [0f32; FEW_CHUNK];
        if let Some((packed, panels)) = set {
            let next = set_after.map_or(panels, |(_, next)| next);
            dot::run(isa, Gemv { layout: &packed.layout, panels, next, x, sums: &mut sums });
        } else {
            for (source, out) in sources.iter().zip(sums.chunks_exact_mut(LANES)) {
                if let Source::Panel(packed, panel) = *source {
                    out.copy_from_slice(&alone(isa, x, packed, panel));
                }
            }
        }
        for (source, out) in sources.iter().zip(sums.chunks_exact_mut(LANES)) {
            let &Source::Mixed(column) = source else { continue };
            for (out, column) in out.iter_mut().zip(column..) {
                let Some((packed, row)) = store.rows.lane(column) else { continue };
                *out = alone(isa, x, packed, row / LANES)[row % LANES];
            }
        }
        let column = chunk * FEW_CHUNK;
        isa.run(FinishRows { finish: store, first_row: 0, column, sums: &sums, chunk: FEW_CHUNK });
        (sources, set) = (after, set_after);
    }
}

/// The sums of one panel.
fn alone(isa: Isa, x: &X, packed: &Packed, panel: usize) -> [f32; LANES] {
    let mut out = [0f32; STREAMS * LANES];
    let panels = [packed.panel(panel); STREAMS];
    dot::run(isa, Gemv { layout: &packed.layout, panels, next: panels, x, sums: &mut out });
    std::array::from_fn(|i| out[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_all_chunks_in_order_and_no_smaller_than_those_behind_them() {
        for threads in 1..5 {
            for chunks in 0..300 {
                let tasks = Tasks::new(chunks, threads);
                let ranges: Vec<_> = (0..tasks.count()).map(|i| tasks.of(i).0).collect();
                let all: Vec<usize> = ranges.iter().cloned().flatten().collect();
                assert_eq!(all, (0..chunks).collect::<Vec<_>>());
                assert!(ranges.is_sorted_by(|a, b| a.len() >= b.len()));
                assert!(ranges.iter().rev().take(2 * threads).all(|r| r.len() == 1));
                for (i, next) in ranges.iter().enumerate().skip(threads) {
                    assert_eq!(tasks.of(i - threads).1, next.start);
                }
            }
        }
    }
}
