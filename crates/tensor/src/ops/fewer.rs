//! Matrix products with fewer multiplications: bilinear algorithms over blocks of the operands.
//!
//! A [`Scheme`] is a list of products. Each multiplies a sum of blocks of `x` with a sum of blocks of the right operand `b`
//! and is added, with a sign, to some blocks of the result. Sums of blocks of `x` are made while rows are packed, those of
//! `b` once while its panels are, and a tile goes to all its results from registers, so that no sum is a pass of its own.
//!
//! A row's result depends on the other rows of its position, and its error on their magnitudes: callers ask for this
//! explicitly.

use super::SharedMut;
use super::gemm::{Finish, Panels};
use super::tile::{Ahead, Into, Lines, Tile, Tiles, panel_columns, tile_rows};
use crate::simd::{Isa, Kernel, Simd};
use crate::{Cpu, Result};

/// Most steps of `k` between two uses of the same sums, and floats from one packed row to the next.
const KC: usize = 512;
/// Tiles of the positions of one task: their packed rows stay in the second-level cache while all panels pass by.
const TILES: usize = 8;
/// Floats of the sums of one task, which stay there as well.
const SUMS: usize = 96 << 10;
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
        Scheme { products, k, n, x_step: 1, y_step: 1, results: vec![[0, 0]] }
    }

    /// Three taps of `k` channels each over frames, two frames from one result to the next: two neighbouring results need
    /// five products (Winograd 1980), since the even frames meet two taps. `b` has the taps one below the other.
    pub(crate) fn three_taps(k: usize, n: usize) -> Scheme {
        let x = |row, factor| Term { row, column: 0, factor };
        let w = |tap: usize| Term { row: tap * k, column: 0, factor: 1.0 };
        let products = vec![
            Product { x: vec![x(0, 1.0), x(2, -1.0)], b: vec![w(0)], y: vec![(0, 1.0)] },
            Product { x: vec![x(1, 1.0)], b: vec![w(1)], y: vec![(0, 1.0)] },
            Product { x: vec![x(2, 1.0)], b: vec![w(0), w(2)], y: vec![(0, 1.0), (1, 1.0)] },
            Product { x: vec![x(2, -1.0), x(4, 1.0)], b: vec![w(2)], y: vec![(1, 1.0)] },
            Product { x: vec![x(3, 1.0)], b: vec![w(1)], y: vec![(1, 1.0)] },
        ];
        Scheme { products, k, n, x_step: 4, y_step: 2, results: vec![[0, 0], [1, 0]] }
    }

    /// Each product by Strassen's algorithm, on halves of its steps and columns and on neighbouring positions, whose
    /// magnitudes are alike where rows follow one another in time. `k` and `n` must be even.
    pub(crate) fn strassen(self) -> Scheme {
        let Scheme { products, k, n, x_step, y_step, results } = self;
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
        }
    }

    /// Strassen's algorithm for `[m, k, n]`, where it pays and halves are whole vectors.
    pub(crate) fn for_linear([m, k, n]: [usize; 3]) -> Option<Scheme> {
        let fits = m >= WORTH[0] && k >= WORTH[1] && n >= WORTH[2] && (k | n).is_multiple_of(32);
        fits.then(|| Scheme::plain(k, n).strassen())
    }

    /// The same on top of [`Scheme::three_taps`], for `m` results.
    pub(crate) fn for_taps([m, k, n]: [usize; 3]) -> Option<Scheme> {
        Scheme::for_linear([m, k, n]).map(|_| Scheme::three_taps(k, n).strassen())
    }

    /// Steps of a block of a product.
    fn steps(&self) -> usize {
        self.k.div_ceil(self.k.div_ceil(KC).max(1)).next_multiple_of(16).min(KC)
    }

    /// Positions of one task and columns of each of its results.
    fn block(&self, isa: Isa) -> [usize; 2] {
        let (rows, nr) = (TILES * tile_rows(isa.width()), panel_columns(isa.width()));
        let panels = self.n.div_ceil(nr);
        let most = (SUMS / (self.results.len() * rows * nr)).max(1);
        [rows, panels.div_ceil(panels.div_ceil(most).max(1)) * nr]
    }

    /// Floats of scratch: panels of `b`, and for each thread packed rows and sums.
    pub(crate) fn scratch_floats(&self, cpu: &Cpu) -> usize {
        let [panels, _, own] = self.sizes(cpu.isa());
        panels + cpu.threads() * own
    }

    /// Floats of the panels, and of one thread's packed rows alone and together with its sums. A panel fits there, too.
    fn sizes(&self, isa: Isa) -> [usize; 3] {
        let nr = panel_columns(isa.width());
        let [rows, columns] = self.block(isa);
        let panels = self.products.len() * self.k * self.n.next_multiple_of(nr);
        let sums = rows * columns * self.results.len();
        [panels.next_multiple_of(16), rows * KC, (rows * KC + sums).max(KC * nr).next_multiple_of(16)]
    }
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
    let [b_len, x_len, own_len] = scheme.sizes(isa);
    let mut scratch = cpu.scratch(scheme.scratch_floats(cpu))?;
    let (b, own) = scratch.split_at_mut(b_len);
    let (b, own) = (SharedMut::new(b), SharedMut::new(own));
    let nr = panel_columns(isa.width());
    let count = scheme.n.div_ceil(nr);
    cpu.parallel_slots(scheme.products.len() * count, &|slot, task| {
        let (product, column) = (task / count, task % count * nr);
        let dst = b.at(product * scheme.k * count * nr);
        isa.run(PackSums { scheme, panels, product, column, dst, spare: own.at(slot * own_len) });
    });
    let x_rows = x.len() / x_stride;
    let positions = m.div_ceil(scheme.y_step);
    let (down, right) = (positions.div_ceil(rows), (count * nr).div_ceil(columns));
    cpu.parallel_slots(down * right, &|slot, task| {
        let (block, column) = (task / right, task % right * columns);
        let positions = block * positions / down..(block + 1) * positions / down;
        let columns = columns.min(count * nr - column);
        let rows = own.at(slot * own_len);
        let sums = rows.wrapping_add(x_len);
        let b = b.at(0).cast_const();
        isa.run(Block { scheme, x, x_stride, x_rows, m, positions, b, column, columns, rows, sums, finish });
    });
    Ok(())
}

/// Packs one panel of a product's right operand: blocks of steps, each `[steps, NR]`.
struct PackSums<'a, P> {
    scheme: &'a Scheme,
    panels: &'a P,
    product: usize,
    column: usize,
    /// Panels of this product.
    dst: *mut f32,
    /// Room for a block.
    spare: *mut f32,
}

impl<P: Panels> Kernel for PackSums<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PackSums { scheme, panels, product, column, dst, spare } = self;
        let nr = panel_columns(S::WIDTH);
        let width = scheme.n.next_multiple_of(nr);
        for k0 in (0..scheme.k).step_by(scheme.steps()) {
            let kc = scheme.steps().min(scheme.k - k0);
            let dst = dst.wrapping_add(k0 * width + column * kc);
            for (i, term) in scheme.products[product].b.iter().enumerate() {
                let to = if i == 0 { dst } else { spare };
                // SAFETY: the block's place among the panels that `sizes` counted, or this thread's own memory.
                unsafe {
                    panels.pack(s, term.column + column, term.row + k0, kc, to);
                    if i == 0 && term.factor == 1.0 {
                        continue;
                    }
                    let factor = s.splat(term.factor);
                    for at in (0..kc * nr).step_by(S::WIDTH) {
                        let before = if i == 0 { s.splat(0.0) } else { s.load(dst.add(at)) };
                        s.store(dst.add(at), s.fma(s.load(to.add(at)), factor, before));
                    }
                }
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
    m: usize,
    positions: std::ops::Range<usize>,
    b: *const f32,
    column: usize,
    columns: usize,
    /// `[position][KC]`
    rows: *mut f32,
    /// `[result][position][columns]`
    sums: *mut f32,
    finish: &'a F,
}

impl<F: Finish> Kernel for Block<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { scheme, column, columns, rows, sums, .. } = self;
        let nr = panel_columns(S::WIDTH);
        let width = scheme.n.next_multiple_of(nr);
        let count = self.positions.len();
        let tiles = Tiles::new(count, S::WIDTH);
        let mut begun = vec![false; scheme.results.len()];
        let mut into = Vec::with_capacity(scheme.results.len());
        for (i, product) in scheme.products.iter().enumerate() {
            for k0 in (0..scheme.k).step_by(scheme.steps()) {
                let kc = scheme.steps().min(scheme.k - k0);
                self.pack(s, product, k0, kc);
                for panel in (0..columns).step_by(nr) {
                    let b = self.b.wrapping_add((i * scheme.k + k0) * width + (column + panel) * kc);
                    for t in 0..tiles.count {
                        let start = tiles.start(t);
                        let mr = tiles.start(t + 1) - start;
                        into.clear();
                        into.extend(product.y.iter().map(|&(result, factor)| Into {
                            c: sums.wrapping_add((result * count + start) * columns + panel),
                            factor,
                            first: !begun[result],
                        }));
                        // Each tile asks for its share of the panel that comes next.
                        let lines = (kc * nr / 16).div_ceil(tiles.count);
                        let next = Lines::run(b.wrapping_add(kc * nr + t * lines * 16).cast());
                        let ahead = Ahead { both: [next, Lines::run(std::ptr::null())], lines };
                        let a = rows.wrapping_add(start * KC);
                        // SAFETY: rows were packed just now, and the panels before; results lie in this thread's sums.
                        unsafe {
                            s.tile::<KC>(Tile { mr, k: kc, a, b, into: &into, stride: columns, ahead })
                        };
                    }
                }
                for (result, _) in &product.y {
                    begun[*result] = true;
                }
            }
        }
        for (i, [row, right]) in scheme.results.iter().enumerate() {
            let whole = columns.min(scheme.n - column);
            for (p, position) in self.positions.clone().enumerate() {
                let row = position * scheme.y_step + row;
                if row < self.m {
                    // SAFETY: written above, as every result has a product.
                    let sums =
                        unsafe { std::slice::from_raw_parts(sums.add((i * count + p) * columns), whole) };
                    self.finish.finish(s, row, right + column, sums);
                }
            }
        }
        self.finish.done(s);
    }
}

impl<F> Block<'_, F> {
    /// Sums of blocks of `x` for `kc` steps from `k0` on.
    #[inline(always)]
    fn pack<S: Simd>(&self, s: S, product: &Product, k0: usize, kc: usize) {
        for (p, position) in self.positions.clone().enumerate() {
            let dst = self.rows.wrapping_add(p * KC);
            for (i, term) in product.x.iter().enumerate() {
                let row = (position * self.scheme.x_step + term.row).min(self.x_rows - 1);
                let src = &self.x[row * self.x_stride + term.column + k0..][..kc];
                let factor = s.splat(term.factor);
                for at in (0..kc).step_by(S::WIDTH) {
                    let n = S::WIDTH.min(kc - at);
                    // SAFETY: `n` floats of `src`, and of this position's packed row.
                    unsafe {
                        let before = if i == 0 { s.splat(0.0) } else { s.load_n(dst.add(at), n) };
                        s.store_n(dst.add(at), n, s.fma(s.load_n(src.as_ptr().add(at), n), factor, before));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "fewer_tests.rs"]
mod tests;
