//! Blocks of 256 values whose `G` sub-groups have integer scales of a common scale.

use half::f16;
use pocketglm_tensor::{Block, RowCodes};

use super::TooLarge;
use super::lanes::errors;
use super::search::{self, Stored, Weights};
use super::simple::extreme;
use crate::blocks::Nested;
use crate::codes::{Grid, Lattice, grid, nested_lattice};

struct Encoded<const G: usize> {
    scales: Nested<G>,
    codes: [u8; 256],
}

#[inline(always)]
pub(super) fn encode<const G: usize>(
    block: Block,
    x: &[f32],
    weights: Option<&Weights>,
    row: &mut RowCodes,
) -> Result<(), TooLarge> {
    let grid = grid(block);
    let shape = Shape::<G> { grid, sub: grid.sub.unwrap_or((0, 0)), x };
    let mut best = shape.rounded();
    if f16::from_bits(best.scales.d).is_infinite() || f16::from_bits(best.scales.dmin).is_infinite() {
        return Err(TooLarge);
    }
    if let Some(weights) = weights {
        let found = shape.searched(weights.all());
        if shape.exact_error(weights.all(), &found) < shape.exact_error(weights.all(), &best) {
            best = found;
        }
    }
    row.codes.extend_from_slice(&best.codes);
    row.scales.push(best.scales.d);
    row.sub_scales.extend_from_slice(&best.scales.scales);
    if grid.minima {
        row.minima.push(best.scales.dmin);
        row.sub_minima.extend_from_slice(&best.scales.minima);
    }
    Ok(())
}

/// The values of a block and how the format sees them.
struct Shape<'a, const G: usize> {
    grid: Grid,
    sub: (i32, i32),
    x: &'a [f32],
}

impl<const G: usize> Shape<'_, G> {
    #[inline(always)]
    fn group<'b>(&self, values: &'b [f32], g: usize) -> &'b [f32] {
        &values[g * (256 / G)..(g + 1) * (256 / G)]
    }

    fn top(&self) -> i32 {
        (1 << self.grid.bits) - 1
    }

    /// Real scales and (positive) minima of the sub-groups from their ranges, then rounded.
    #[inline(always)]
    fn rounded(&self) -> Encoded<G> {
        let mut d = [0.0; G];
        let mut m = [0.0; G];
        for g in 0..G {
            let x = self.group(self.x, g);
            if self.grid.minima {
                let (least, most) = search::range(x);
                let least = least.min(0.0);
                (d[g], m[g]) = ((most - least).max(0.0) / self.top() as f32, -least);
            } else {
                // The extreme value takes the lowest code.
                let reach = if self.grid.table { 127 } else { self.grid.zero };
                d[g] = extreme(x) / -reach as f32;
            }
        }
        let mut scales = self.common(&d, &m);
        for g in 0..G {
            (scales.scales[g], scales.minima[g]) = self.nearest_sub(&scales, d[g], m[g]);
        }
        self.with_codes(scales)
    }

    /// The common scales under which the largest of the sub-groups' take the largest integer.
    #[inline(always)]
    fn common(&self, d: &[f32; G], m: &[f32; G]) -> Nested<G> {
        let bits = |value: f32| f16::from_f32(value).to_bits();
        let (d, dmin) = match self.grid.minima {
            true => (extreme(d) / self.sub.1 as f32, extreme(m) / self.sub.1 as f32),
            false => (extreme(d) / self.sub.0 as f32, 0.0),
        };
        Nested { d: bits(d), dmin: bits(dmin), scales: [0; G], minima: [0; G] }
    }

    /// The integer scale and minimum nearest to real ones.
    #[inline(always)]
    fn nearest_sub(&self, scales: &Nested<G>, d: f32, m: f32) -> (u8, u8) {
        let integer = |value: f32, unit: u16| {
            let unit = f16::from_bits(unit).to_f32();
            if unit == 0.0 { 0 } else { (value / unit).round().clamp(-256.0, 256.0) as i32 }
        };
        let scale = integer(d, scales.d).clamp(self.sub.0, self.sub.1);
        let minimum = if self.grid.minima { integer(m, scales.dmin).clamp(0, self.sub.1) } else { 0 };
        (scale as u8, minimum as u8)
    }

    #[inline(always)]
    fn with_codes(&self, scales: Nested<G>) -> Encoded<G> {
        let mut codes = [0; 256];
        for (g, codes) in codes.chunks_exact_mut(256 / G).enumerate() {
            let lattice = nested_lattice(self.grid, &scales, g);
            for (code, &x) in codes.iter_mut().zip(self.group(self.x, g)) {
                *code = lattice.nearest(x);
            }
        }
        Encoded { scales, codes }
    }

    #[inline(always)]
    fn exact_error(&self, w: &[f32], encoded: &Encoded<G>) -> f64 {
        encoded
            .codes
            .chunks_exact(256 / G)
            .enumerate()
            .map(|(g, codes)| {
                let lattice = nested_lattice(self.grid, &encoded.scales, g);
                search::exact_error(self.group(self.x, g), self.group(w, g), codes, &lattice)
            })
            .sum()
    }

    /// Best real scales of each sub-group, then integers for them, then common scales for those integers.
    #[inline(always)]
    fn searched(&self, w: &[f32]) -> Encoded<G> {
        let Grid { bits, zero, low, .. } = self.grid;
        let mut d = [0.0; G];
        let mut m = [0.0; G];
        for g in 0..G {
            let (x, w) = (self.group(self.x, g), self.group(w, g));
            if self.grid.minima {
                let (scale, minimum) = search::with_minimum(x, w, self.top(), bits, true);
                (d[g], m[g]) = (scale, -minimum);
            } else if self.grid.table {
                d[g] = search::table(x, w);
            } else {
                d[g] = search::symmetric(x, w, low - zero, self.top() - zero, bits, Stored::Fine);
            }
        }
        let mut best = self.with_integers(self.common(&d, &m), &d, &m, w);
        for _ in 0..2 {
            let refit = self.with_integers(self.refit(w, &best.1), &d, &m, w);
            if refit.0 >= best.0 {
                break;
            }
            best = refit;
        }
        best.1
    }

    /// Tries the integers around each sub-group's real scale and minimum.
    #[inline(always)]
    fn with_integers(
        &self,
        mut scales: Nested<G>,
        d: &[f32; G],
        m: &[f32; G],
        w: &[f32],
    ) -> (f32, Encoded<G>) {
        let mut total = 0.0;
        for g in 0..G {
            let (x, w) = (self.group(self.x, g), self.group(w, g));
            let (scale, minimum) = self.nearest_sub(&scales, d[g], m[g]);
            let minima = if self.grid.minima { (0, self.sub.1) } else { (0, 0) };
            // Three by three around the nearest; what lies outside repeats a neighbour.
            let candidate = |i: usize| {
                let (s, m) = (
                    i32::from(scale as i8) + (i / 3 % 3) as i32 - 1,
                    i32::from(minimum) + (i % 3) as i32 - 1,
                );
                (s.clamp(self.sub.0, self.sub.1) as u8, m.clamp(minima.0, minima.1) as u8)
            };
            let lattices = std::array::from_fn(|i| {
                (scales.scales[g], scales.minima[g]) = candidate(i);
                nested_lattice(self.grid, &scales, g)
            });
            let errors = errors(x, w, &lattices);
            let mut best = (f32::INFINITY, scale, minimum);
            for (i, &e) in errors.iter().enumerate() {
                if e < best.0 {
                    let (s, m) = candidate(i);
                    best = (e, s, m);
                }
            }
            total += best.0;
            (scales.scales[g], scales.minima[g]) = (best.1, best.2);
        }
        (total, self.with_codes(scales))
    }

    /// The common scales that fit the codes and integers best: linear least squares in one or two unknowns.
    fn refit(&self, w: &[f32], encoded: &Encoded<G>) -> Nested<G> {
        // w = d * a - dmin * b with a = integer scale * code and b = integer minimum.
        let (mut aa, mut ab, mut bb, mut xa, mut xb) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (i, ((&x, &w), &code)) in self.x.iter().zip(w).zip(&encoded.codes).enumerate() {
            let g = i / (256 / G);
            let unit: Lattice = self.grid.lattice(f32::from(encoded.scales.scales[g] as i8), 0.0);
            let (x, w, a) = (f64::from(x), f64::from(w), f64::from(unit.value(code)));
            let b = -f64::from(encoded.scales.minima[g]);
            aa += w * a * a;
            ab += w * a * b;
            bb += w * b * b;
            xa += w * x * a;
            xb += w * x * b;
        }
        let mut scales = encoded.scales;
        let determinant = aa * bb - ab * ab;
        let half = |value: f64, old: u16| {
            let new = f16::from_f64(value);
            if new.is_finite() { new.to_bits() } else { old }
        };
        if determinant > 1e-9 * aa * bb {
            scales.d = half((xa * bb - xb * ab) / determinant, scales.d);
            scales.dmin = half((xb * aa - xa * ab) / determinant, scales.dmin);
        } else if aa > 0.0 && bb == 0.0 {
            scales.d = half(xa / aa, scales.d);
        }
        scales
    }
}
