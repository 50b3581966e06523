//! Matrix products with fewer multiplications: bilinear algorithms over blocks of the operands.
//!
//! A [`Scheme`] is a list of products. Each multiplies a sum of blocks of `x` with a sum of blocks of the right operand `b`
//! and is added, with a sign, to some blocks of the result. Sums of blocks of `x` are made while rows are packed, those of
//! `b` once while its panels are, and a tile goes to all its results from registers, so that no sum is a pass of its own.
//!
//! Where additions have units of their own, tiles are those of [`pairs`](super::pairs), which save multiplications once more.
//!
//! A row's result depends on the other rows of its position, and its error on their magnitudes: callers ask for this
//! explicitly.

use super::SharedMut;
use super::gemm::{Finish, Panels};
use super::pairs::{self, add_excess_of_columns, excess_of_row, pair_rows, run_pairs};
use super::tile::{Ahead, Into, Lines, Tile, Tiles, panel_columns, run_tile, tile_rows};
use crate::simd::{Isa, Kernel, Simd};
use crate::{Cpu, Result};

/// Most steps of `k` between two uses of the same sums: for few results, and for many.
const KC: [usize; 2] = [512, 256];
/// Floats from one packed row to the next, likewise: rows that are no power of two apart share no set of the caches.
const ROW: [usize; 2] = [KC[0] + 16, KC[1] + 16];
/// Tiles of the positions of one task, likewise: their packed rows stay in the second-level cache while all panels pass by.
const TILES: [usize; 2] = [8, 6];
/// Results that are many.
const MANY: usize = 12;
/// Floats of the sums of one task, which stay there as well.
const SUMS: usize = 224 << 10;
/// Steps of the right operand that are packed at a time: whole vectors, and all of [`pairs::STEPS`].
const SLICE: usize = 144;
/// Fewest rows, steps and columns for which additions cost less than the products that are saved.
const WORTH: [usize; 3] = [64, 256, 256];

/// A block of an operand, by its first row and column, times a factor.
#[derive(Clone, Copy, Debug)]
struct Term {
    row: usize,
    column: usize,
    factor: f32,
}

/// `(sum of blocks of x) (sum of blocks of b)`, which belongs to some results, times a factor.
#[derive(Clone, Debug)]
struct Product {
    x: Vec<Term>,
    b: Vec<Term>,
    y: Vec<(usize, f32)>,
}

/// An algorithm. Position `i` of a block of `x` is its row plus `i * x_step`, and so for results with `y_step`.
#[derive(Clone, Debug)]
pub(crate) struct Scheme {
    products: Vec<Product>,
    /// Steps of each product, and columns of each block of the result.
    k: usize,
    n: usize,
    x_step: usize,
    y_step: usize,
    /// First row and column of each block of the result.
    results: Vec<[usize; 2]>,
    /// Whether tiles are those of [`pairs`].
    pairs: bool,
}

/// Strassen's seven products (Strassen 1969): signs of the quadrants `[11, 12, 21, 22]` of both operands and of the result.
const STRASSEN: [[[i8; 4]; 3]; 7] = [
    [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1]],
    [[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 1, -1]],
    [[1, 0, 0, 0], [0, 1, 0, -1], [0, 1, 0, 1]],
    [[0, 0, 0, 1], [-1, 0, 1, 0], [1, 0, 1, 0]],
    [[1, 1, 0, 0], [0, 0, 0, 1], [-1, 1, 0, 0]],
    [[-1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]],
    [[0, 1, 0, -1], [0, 0, 1, 1], [1, 0, 0, 0]],
];

impl Scheme {
    /// The product itself.
    pub(crate) fn plain(k: usize, n: usize) -> Scheme {
        let term = Term { row: 0, column: 0, factor: 1.0 };
        let products = vec![Product { x: vec![term], b: vec![term], y: vec![(0, 1.0)] }];
        Scheme { products, k, n, x_step: 1, y_step: 1, results: vec![[0, 0]], pairs: false }
    }

    /// Three taps of `k` channels each over frames, two frames from one result to the next: three neighbouring results need
    /// seven products instead of nine (Winograd 1980), since the even frames meet two taps. `b` has the taps one below the
    /// other.
    pub(crate) fn three_taps(k: usize, n: usize) -> Scheme {
        let x = |row, factor| Term { row, column: 0, factor };
        let w = |tap: usize, factor| Term { row: tap * k, column: 0, factor };
        let both = |sign: f32| vec![w(0, 0.5), w(2, 0.5 * sign)];
        let odd = |y: usize| Product { x: vec![x(2 * y + 1, 1.0)], b: vec![w(1, 1.0)], y: vec![(y, 1.0)] };
        let products = vec![
            Product { x: vec![x(0, 1.0), x(4, -1.0)], b: vec![w(0, 1.0)], y: vec![(0, 1.0)] },
            odd(0),
            Product { x: vec![x(2, 1.0), x(4, 1.0)], b: both(1.0), y: vec![(0, 1.0), (1, 1.0), (2, 1.0)] },
            odd(1),
            Product { x: vec![x(4, 1.0), x(2, -1.0)], b: both(-1.0), y: vec![(0, 1.0), (1, -1.0), (2, 1.0)] },
            odd(2),
            Product { x: vec![x(6, 1.0), x(2, -1.0)], b: vec![w(2, 1.0)], y: vec![(2, 1.0)] },
        ];
        let results = vec![[0, 0], [1, 0], [2, 0]];
        Scheme { products, k, n, x_step: 6, y_step: 3, results, pairs: false }
    }

    /// Each product by Strassen's algorithm, on halves of its steps and columns and on neighbouring positions, whose
    /// magnitudes are alike where rows follow one another in time. `k` and `n` must be even.
    pub(crate) fn strassen(self) -> Scheme {
        let Scheme { products, k, n, x_step, y_step, results, pairs } = self;
        let split = |terms: &[Term], signs: [i8; 4], [down, right]: [usize; 2]| -> Vec<Term> {
            let quadrant = |q: usize, t: &Term| Term {
                row: t.row + q / 2 * down,
                column: t.column + q % 2 * right,
                factor: t.factor * f32::from(signs[q]),
            };
            (0..4)
                .filter(|&q| signs[q] != 0)
                .flat_map(|q| terms.iter().map(move |t| quadrant(q, t)))
                .collect()
        };
        let seven = |p: &Product| {
            STRASSEN.map(|[x, b, y]| {
                let all = |q: usize| p.y.iter().map(move |(r, f)| (4 * r + q, f * f32::from(y[q])));
                let y = (0..4).filter(|&q| y[q] != 0).flat_map(all).collect();
                Product { x: split(&p.x, x, [x_step, k / 2]), b: split(&p.b, b, [k / 2, n / 2]), y }
            })
        };
        let quarters = |[row, column]: &[usize; 2]| {
            [0, 1, 2, 3].map(|q| [row + q / 2 * y_step, column + q % 2 * (n / 2)])
        };
        Scheme {
            products: products.iter().flat_map(seven).collect(),
            k: k / 2,
            n: n / 2,
            x_step: 2 * x_step,
            y_step: 2 * y_step,
            results: results.iter().flat_map(quarters).collect(),
            pairs,
        }
    }

    /// The same with tiles of [`pairs`], or without.
    pub(crate) fn with_pairs(self, pairs: bool) -> Scheme {
        Scheme { pairs, ..self }
    }

    /// Strassen's algorithm for `[m, k, n]`, where it pays and halves are whole vectors.
    pub(crate) fn for_linear(cpu: &Cpu, [m, k, n]: [usize; 3]) -> Option<Scheme> {
        let fits = m >= WORTH[0] && k >= WORTH[1] && n >= WORTH[2] && (k | n).is_multiple_of(32);
        fits.then(|| Scheme::plain(k, n).strassen().with_pairs(cpu.isa().adds_beside_products()))
    }

    /// The same on top of [`Scheme::three_taps`], for `m` results.
    pub(crate) fn for_taps(cpu: &Cpu, size: [usize; 3]) -> Option<Scheme> {
        let [_, k, n] = size;
        Scheme::for_linear(cpu, size).map(|s| Scheme::three_taps(k, n).strassen().with_pairs(s.pairs))
    }

    /// Steps of a block of a product.
    fn steps(&self) -> usize {
        let most = KC[usize::from(self.results.len() >= MANY)];
        self.k.div_ceil(self.k.div_ceil(most).max(1)).next_multiple_of(16).min(most)
    }

    /// Blocks of so many steps.
    fn chunks(&self) -> usize {
        self.k.div_ceil(self.steps())
    }

    /// Floats from one packed row to the next.
    fn row_stride(&self) -> usize {
        if self.steps() <= KC[1] { ROW[1] } else { ROW[0] }
    }

    /// Columns of one tile.
    fn tile_columns(&self, width: usize) -> usize {
        if self.pairs { pairs::VECTORS * width } else { panel_columns(width) }
    }

    /// Positions of one task and columns of each of its results.
    fn block(&self, isa: Isa) -> [usize; 2] {
        let tiles = TILES[usize::from(self.results.len() >= MANY)];
        let (rows, nr) = (tiles * tile_rows(isa.width()), panel_columns(isa.width()));
        let panels = self.n.div_ceil(nr);
        let most = (SUMS / (self.results.len() * rows * nr)).max(1);
        [rows, panels.div_ceil(panels.div_ceil(most).max(1)) * nr]
    }

    /// Floats of scratch: panels of `b`, and for each thread packed rows and sums.
    pub(crate) fn scratch_floats(&self, cpu: &Cpu) -> usize {
        let Sizes { panels, excess, own, .. } = self.sizes(cpu.isa());
        panels + excess + cpu.threads() * own
    }

    fn sizes(&self, isa: Isa) -> Sizes {
        let nr = panel_columns(isa.width());
        let [rows, columns] = self.block(isa);
        let width = self.n.next_multiple_of(nr);
        let excess = if self.pairs { self.products.len() * self.chunks() * width } else { 0 };
        let sums = rows * columns * self.results.len();
        let spare = Blocks::new(self).places.len() * SLICE * nr;
        let packed = rows * self.row_stride();
        let of_rows = rows.next_multiple_of(16);
        Sizes {
            panels: (self.products.len() * self.k * width).next_multiple_of(16),
            excess: excess.next_multiple_of(16),
            packed,
            of_rows,
            own: (packed + of_rows + sums).max(spare).next_multiple_of(16),
        }
    }
}

/// Floats of each part of the scratch memory.
struct Sizes {
    /// Panels of all products, and what their columns have too much in products of pairs.
    panels: usize,
    excess: usize,
    /// One thread's packed rows, what these have too much, and all of its own, with its sums. Blocks of `b` fit there, too.
    packed: usize,
    of_rows: usize,
    own: usize,
}

/// Multiplies by a scheme. `x` has rows of `x_stride` floats, in which the scheme's blocks lie; the result has `m` rows, and
/// `panels` the columns of all blocks. Positions below the last row of `x` count as that row, and only results that do
/// not exist come of them.
pub(crate) fn multiply<P: Panels, F: Finish>(
    cpu: &Cpu,
    scheme: &Scheme,
    x: &[f32],
    x_stride: usize,
    m: usize,
    panels: &P,
    finish: &F,
) -> Result<()> {
    let isa = cpu.isa();
    let [rows, columns] = scheme.block(isa);
    let sizes = scheme.sizes(isa);
    let mut scratch = cpu.scratch(scheme.scratch_floats(cpu))?;
    let (b, rest) = scratch.split_at_mut(sizes.panels);
    let (excess, own) = rest.split_at_mut(sizes.excess);
    let blocks = &Blocks::new(scheme);
    let [of_x, of_b] = if scheme.pairs {
        pairs::balance(mean_square_of(x, x_stride), isa.run(Sample { blocks, panels, spare: &mut *own }))
    } else {
        [1.0; 2]
    };
    let (b, excess, own) = (SharedMut::new(b), SharedMut::new(excess), SharedMut::new(own));
    let nr = panel_columns(isa.width());
    let count = scheme.n.div_ceil(nr);
    cpu.parallel_slots(scheme.chunks() * count, &|slot, task| {
        let (column, chunk) = (task / scheme.chunks() * nr, task % scheme.chunks());
        let (dst, excess, spare) = (b.at(0), excess.at(0), own.at(slot * sizes.own));
        isa.run(PackSums { scheme, blocks, panels, chunk, column, scale: of_b, dst, excess, spare });
    });
    let x_rows = x.len() / x_stride;
    let positions = m.div_ceil(scheme.y_step);
    // As many blocks for each thread: no result depends on which one it is in.
    let down = positions.div_ceil(rows).next_multiple_of(cpu.threads()).min(positions);
    let right = (count * nr).div_ceil(columns);
    cpu.parallel_slots(down * right, &|slot, task| {
        let (block, column) = (task / right, task % right * columns);
        let positions = block * positions / down..(block + 1) * positions / down;
        let columns = columns.min(count * nr - column);
        let rows = own.at(slot * sizes.own);
        let of_rows = rows.wrapping_add(sizes.packed);
        let sums = of_rows.wrapping_add(sizes.of_rows);
        let b = b.at(0).cast_const();
        let excess = [of_rows, excess.at(0)];
        let scale = of_x;
        isa.run(Block {
            scheme,
            x,
            x_stride,
            x_rows,
            scale,
            m,
            positions,
            b,
            column,
            columns,
            rows,
            excess,
            sums,
            finish,
        });
    });
    Ok(())
}

/// Rows of `x` and steps of each block of `b` from which magnitudes are known.
const SAMPLES: usize = 16;

fn mean_square(values: impl Iterator<Item = f32>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, n), v| (sum + f64::from(v) * f64::from(v), n + 1));
    sum / f64::from(count.max(1))
}

/// Mean square of some rows of `x`, the same whatever the number of threads.
fn mean_square_of(x: &[f32], x_stride: usize) -> f64 {
    let rows = x.len() / x_stride;
    let rows = (0..SAMPLES.min(rows)).map(|i| &x[i * rows / SAMPLES.min(rows) * x_stride..][..x_stride]);
    mean_square(rows.flatten().copied())
}

/// Mean square of the first steps and columns of all blocks of the right operand.
struct Sample<'a, P> {
    blocks: &'a Blocks,
    panels: &'a P,
    spare: &'a mut [f32],
}

impl<P: Panels> Kernel for Sample<'_, P> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let steps = SAMPLES.min(self.blocks.k);
        let spare = &mut self.spare[..steps * panel_columns(S::WIDTH)];
        let places = self.blocks.places.iter();
        let sum: f64 = places
            .map(|&[row, column]| {
                // SAFETY: the slice has as many floats.
                unsafe { self.panels.pack(s, column, row, steps, spare.as_mut_ptr()) };
                mean_square(spare.iter().copied())
            })
            .sum();
        sum / self.blocks.places.len() as f64
    }
}

/// Packs the same steps and columns of all products' right operands: blocks of steps, each `[steps, columns of a tile]`. Blocks
/// of `b` are turned once and summed from there.
struct PackSums<'a, P> {
    scheme: &'a Scheme,
    blocks: &'a Blocks,
    panels: &'a P,
    /// Which block of steps.
    chunk: usize,
    column: usize,
    scale: f32,
    /// Panels of all products.
    dst: *mut f32,
    /// What their columns have too much: `[product, block of steps, columns]`
    excess: *mut f32,
    /// Room for some steps of all blocks.
    spare: *mut f32,
}

impl<P: Panels> Kernel for PackSums<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PackSums { scheme, blocks, panels, chunk, column, scale, dst, excess, spare } = self;
        let (nr, part) = (panel_columns(S::WIDTH), scheme.tile_columns(S::WIDTH));
        let width = scheme.n.next_multiple_of(nr);
        let k0 = chunk * scheme.steps();
        let kc = scheme.steps().min(scheme.k - k0);
        let excess_of =
            |product: usize| excess.wrapping_add((product * scheme.chunks() + chunk) * width + column);
        if scheme.pairs {
            for product in 0..blocks.sums.len() {
                // SAFETY: this task's columns of what `sizes` counted.
                unsafe { std::slice::from_raw_parts_mut(excess_of(product), nr).fill(0.0) };
            }
        }
        let mut terms = Vec::new();
        for first in (0..kc).step_by(SLICE) {
            let count = SLICE.min(kc - first);
            for (i, [row, right]) in blocks.places.iter().enumerate() {
                // Rows of the block that comes next, which are short pieces far apart.
                let (next_row, next_right, from) = match blocks.places.get(i + 1) {
                    Some(&[row, right]) => (row, right, k0 + first),
                    None => (blocks.places[0][0], blocks.places[0][1], k0 + first + count),
                };
                let (base, rows, stride, bytes) = panels.stored(next_right + column, next_row + from, count);
                for r in 0..rows.min(nr) {
                    for line in (0..bytes).step_by(64) {
                        s.prefetch(base.wrapping_add(r * stride + line));
                    }
                }
                let to = spare.wrapping_add(i * count * nr);
                // SAFETY: this thread's own memory, which `sizes` counted.
                unsafe { panels.pack(s, right + column, row + k0 + first, count, to) };
            }
            for (product, sum) in blocks.sums.iter().enumerate() {
                for from in (0..nr).step_by(part) {
                    terms.clear();
                    terms.extend(
                        sum.iter().map(|&(i, f)| {
                            (spare.wrapping_add(i * count * nr + from).cast_const(), f * scale)
                        }),
                    );
                    let at = (product * scheme.k + k0) * width + (column + from) * kc + first * part;
                    // SAFETY: the terms were packed just now; this place among the panels, which `sizes` counted, is this
                    // task's, and so are these columns.
                    unsafe {
                        let to = dst.add(at);
                        if part == nr {
                            add_up(s, &terms, [1, count * nr, 0], to);
                        } else {
                            add_up(s, &terms, [count, part, nr], to);
                        }
                        if scheme.pairs {
                            add_excess_of_columns(s, to, count, excess_of(product).add(from));
                        }
                    }
                }
            }
        }
    }
}

/// The blocks of the right operand, by first row and column, and what each product sums: a block's number and its factor.
struct Blocks {
    /// Steps of each.
    k: usize,
    places: Vec<[usize; 2]>,
    sums: Vec<Vec<(usize, f32)>>,
}

impl Blocks {
    fn new(scheme: &Scheme) -> Blocks {
        let mut places = Vec::new();
        let mut number = |t: &Term| {
            let place = [t.row, t.column];
            let at = places.iter().position(|p| *p == place).unwrap_or(places.len());
            if at == places.len() {
                places.push(place);
            }
            (at, t.factor)
        };
        let sums = scheme.products.iter().map(|p| p.b.iter().map(&mut number).collect()).collect();
        Blocks { k: scheme.k, places, sums }
    }
}

/// `dst[r * n + i]` is the sum of all terms' `src[r * stride + i] * factor`, for `size` rows, `n` and `stride`.
///
/// # Safety
/// So many floats at each term's source and at `dst`.
#[inline(always)]
unsafe fn add_up<S: Simd>(s: S, terms: &[(*const f32, f32)], size: [usize; 3], dst: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match terms.len() {
            1 => add_up_of::<S, 1>(s, terms, size, dst),
            2 => add_up_of::<S, 2>(s, terms, size, dst),
            4 => add_up_of::<S, 4>(s, terms, size, dst),
            _ => {
                let [rows, n, stride] = size;
                for r in 0..rows {
                    let dst = dst.add(r * n);
                    let mut so_far = None;
                    for &(src, factor) in terms {
                        let term = (src.wrapping_add(r * stride), factor);
                        match so_far {
                            None => add_up_of::<S, 1>(s, &[term], [1, n, 0], dst),
                            Some(sum) => add_up_of::<S, 2>(s, &[(sum, 1.0), term], [1, n, 0], dst),
                        }
                        so_far = Some(dst.cast_const());
                    }
                }
            }
        }
    }
}

/// [`add_up`] for `N` terms, whose sum stays in a register.
///
/// # Safety
/// As for [`add_up`].
#[inline(always)]
unsafe fn add_up_of<S: Simd, const N: usize>(
    s: S,
    terms: &[(*const f32, f32)],
    [rows, n, stride]: [usize; 3],
    dst: *mut f32,
) {
    let Some(&terms) = terms.first_chunk::<N>() else { return };
    let factors = terms.map(|(_, factor)| s.splat(factor));
    let whole = n / S::WIDTH * S::WIDTH;
    for r in 0..rows {
        let sources = terms.map(|(src, _)| src.wrapping_add(r * stride));
        // SAFETY: the caller's promise.
        unsafe {
            let dst = dst.add(r * n);
            for at in (0..whole).step_by(S::WIDTH) {
                let mut sum = s.mul(s.load(sources[0].add(at)), factors[0]);
                for i in 1..N {
                    sum = s.fma(s.load(sources[i].add(at)), factors[i], sum);
                }
                s.store(dst.add(at), sum);
            }
            if whole < n {
                let mut sum = s.splat(0.0);
                for i in 0..N {
                    sum = s.fma(s.load_n(sources[i].add(whole), n - whole), factors[i], sum);
                }
                s.store_n(dst.add(whole), n - whole, sum);
            }
        }
    }
}

/// All results of some positions and columns.
struct Block<'a, F> {
    scheme: &'a Scheme,
    x: &'a [f32],
    x_stride: usize,
    x_rows: usize,
    /// Factor of all rows.
    scale: f32,
    m: usize,
    positions: std::ops::Range<usize>,
    b: *const f32,
    column: usize,
    columns: usize,
    /// `[position][row_stride]`
    rows: *mut f32,
    /// What rows and columns have too much in products of pairs, negated: of these rows, and of the columns of all panels
    /// as [`PackSums`] has it.
    excess: [*mut f32; 2],
    /// `[result][panel][position][NR]`
    sums: *mut f32,
    finish: &'a F,
}

impl<F: Finish> Kernel for Block<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.scheme.row_stride() == ROW[1] {
            self.multiply::<S, { ROW[1] }>(s);
        } else {
            self.multiply::<S, { ROW[0] }>(s);
        }
        let Block { scheme, column, columns, sums, .. } = self;
        let (count, nr) = (self.positions.len(), panel_columns(S::WIDTH));
        let whole = columns.min(scheme.n - column);
        for (i, [row, right]) in scheme.results.iter().enumerate() {
            for (p, position) in self.positions.clone().enumerate() {
                let row = position * scheme.y_step + row;
                if row >= self.m {
                    continue;
                }
                for panel in (0..whole).step_by(nr) {
                    let at = i * count * columns + panel * count + p * nr;
                    // SAFETY: written before, as every result has a product.
                    let sums = unsafe { std::slice::from_raw_parts(sums.add(at), nr.min(whole - panel)) };
                    self.finish.finish(s, row, right + column + panel, sums);
                }
            }
        }
        self.finish.done(s);
    }
}

impl<F: Finish> Block<'_, F> {
    /// Makes the sums; packed rows are `STRIDE` floats apart.
    #[inline(always)]
    fn multiply<S: Simd, const STRIDE: usize>(&self, s: S) {
        let Block { scheme, column, columns, rows, excess, sums, .. } = *self;
        let (nr, part) = (panel_columns(S::WIDTH), scheme.tile_columns(S::WIDTH));
        let width = scheme.n.next_multiple_of(nr);
        let count = self.positions.len();
        let most = if scheme.pairs { pair_rows(S::WIDTH) } else { tile_rows(S::WIDTH) };
        let tiles = Tiles::of(count, most);
        let parts = columns.min(scheme.n - column).div_ceil(part);
        let mut into = Vec::with_capacity(scheme.results.len());
        // The same steps of all products follow one another, so that their rows of `x` stay in the second-level cache.
        for chunk in 0..scheme.chunks() {
            let k0 = chunk * scheme.steps();
            let kc = scheme.steps().min(scheme.k - k0);
            let mut begun = vec![k0 > 0; scheme.results.len()];
            for (i, product) in scheme.products.iter().enumerate() {
                self.pack(s, product, k0, kc);
                let soon = match scheme.products.get(i + 1) {
                    Some(next) => Soon::rows(self, next, k0, kc),
                    None if k0 + kc < scheme.k => Soon::rows(self, &scheme.products[0], k0 + kc, kc),
                    None => Soon::results(self),
                };
                let calls = parts * tiles.count;
                let b_of = |i: usize| self.b.wrapping_add((i * scheme.k + k0) * width + column * kc);
                let of_columns = excess[1].wrapping_add((i * scheme.chunks() + chunk) * width + column);
                for p in 0..parts {
                    // Each tile asks for its share of the panel that comes next.
                    let b = b_of(i).wrapping_add(p * part * kc);
                    let next = if p + 1 < parts { b.wrapping_add(kc * part) } else { b_of(i + 1) };
                    let lines = (kc * part / 16).div_ceil(tiles.count);
                    let place = p * part / nr * nr * count + p * part % nr;
                    for t in 0..tiles.count {
                        let start = tiles.start(t);
                        let mr = tiles.start(t + 1) - start;
                        into.clear();
                        into.extend(product.y.iter().map(|&(result, factor)| Into {
                            c: sums.wrapping_add(result * count * columns + place + start * nr),
                            factor,
                            first: !begun[result],
                        }));
                        let next = Lines::run(next.wrapping_add(t * lines * 16).cast());
                        let (other, others) = soon.part(p * tiles.count + t, calls);
                        let lines = if scheme.pairs { others } else { lines.max(others) };
                        let ahead = Ahead { both: [next, other], lines };
                        let a = rows.wrapping_add(start * STRIDE);
                        let tile = Tile { mr, k: kc, a, b, into: &into, stride: nr, ahead };
                        // SAFETY: rows were packed just now, and the panels before; results lie in this thread's sums.
                        unsafe {
                            if scheme.pairs {
                                let of_rows = excess[0].wrapping_add(start).cast_const();
                                run_pairs::<S, STRIDE>(s, tile, [of_rows, of_columns.wrapping_add(p * part)]);
                            } else {
                                run_tile::<S, STRIDE>(s, tile);
                            }
                        }
                    }
                }
                for (result, _) in &product.y {
                    begun[*result] = true;
                }
            }
        }
    }

    /// Sums of blocks of `x` for `kc` steps from `k0` on.
    #[inline(always)]
    fn pack<S: Simd>(&self, s: S, product: &Product, k0: usize, kc: usize) {
        let mut terms = Vec::with_capacity(product.x.len());
        for (p, position) in self.positions.clone().enumerate() {
            terms.clear();
            terms.extend(product.x.iter().map(|term| {
                let row = (position * self.scheme.x_step + term.row).min(self.x_rows - 1);
                let from = self.x[row * self.x_stride + term.column + k0..][..kc].as_ptr();
                (from, term.factor * self.scale)
            }));
            // SAFETY: `kc` floats of `x`, as just checked, and of this position's packed row, behind which there is room.
            unsafe {
                let row = self.rows.add(p * self.scheme.row_stride());
                add_up(s, &terms, [1, kc, 0], row);
                if self.scheme.pairs {
                    *row.add(kc) = 0.0;
                    *self.excess[0].add(p) = excess_of_row(s, row, kc);
                }
            }
        }
    }
}

/// What is asked for while the tiles of a product compute: some areas of as many rows as there are positions.
struct Soon {
    areas: Vec<*const u8>,
    /// Bytes from row to row, and lines of a row.
    stride: usize,
    lines: usize,
    rows: usize,
}

impl Soon {
    /// Rows of `x` that `product` packs.
    #[inline(always)]
    fn rows<F>(block: &Block<'_, F>, product: &Product, k0: usize, kc: usize) -> Soon {
        let Block { scheme, x, x_stride, positions, .. } = block;
        let area = |term: &Term| {
            let at = (positions.start * scheme.x_step + term.row) * x_stride + term.column + k0;
            x.as_ptr().wrapping_add(at).cast()
        };
        let areas = product.x.iter().map(area).collect();
        Soon { areas, stride: scheme.x_step * x_stride * 4, lines: kc.div_ceil(16), rows: positions.len() }
    }

    /// Where results go.
    #[inline(always)]
    fn results<F: Finish>(block: &Block<'_, F>) -> Soon {
        let Block { scheme, positions, column, columns, finish, .. } = block;
        let place = |row: usize, column: usize| finish.place(positions.start * scheme.y_step + row, column);
        let areas: Vec<_> =
            scheme.results.iter().filter_map(|&[row, right]| place(row, right + column)).collect();
        let next = place(scheme.y_step, *column).unwrap_or(std::ptr::null());
        let stride = areas.first().map_or(0, |&first| next.addr().wrapping_sub(first.addr()));
        Soon { areas, stride, lines: columns.div_ceil(16), rows: positions.len() }
    }

    /// The share of call `call` of `calls`, and how many lines it is.
    #[inline(always)]
    fn part(&self, call: usize, calls: usize) -> (Lines, usize) {
        let each = (calls / self.areas.len().max(1)).max(1);
        let rows = self.rows.div_ceil(each);
        let first = call % each * rows;
        match self.areas.get(call / each) {
            Some(&area) if first < self.rows => {
                let lines = Lines::new(area, self.stride, self.lines).from(first);
                (lines, lines.of_rows(rows))
            }
            _ => (Lines::run(std::ptr::null()), 0),
        }
    }
}

#[cfg(test)]
#[path = "fewer_tests.rs"]
mod tests;
