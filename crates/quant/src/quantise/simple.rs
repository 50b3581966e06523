//! Blocks of 32 values with one scale.

use half::f16;
use pocketglm_tensor::{Block, RowCodes};

use super::TooLarge;
use super::search::{self, Stored, Weights};
use crate::codes::{Grid, grid, nearest_in_table, simple_lattice};

struct Encoded {
    d: f16,
    m: f16,
    codes: [u8; 32],
}

#[inline(always)]
pub(super) fn encode(
    block: Block,
    x: &[f32],
    weights: Option<&Weights>,
    row: &mut RowCodes,
) -> Result<(), TooLarge> {
    let mut best = rounded(block, x);
    if best.d.is_infinite() || best.m.is_infinite() {
        return Err(TooLarge);
    }
    let grid = grid(block);
    if let Some(weights) = weights {
        let w = weights.all();
        let found = searched(grid, x, w);
        if error(grid, x, w, &found) < error(grid, x, w, &best) {
            best = found;
        }
    }
    row.codes.extend_from_slice(&best.codes);
    row.scales.push(best.d.to_bits());
    if grid.minima {
        row.minima.push(best.m.to_bits());
    }
    Ok(())
}

#[inline(always)]
fn error(grid: Grid, x: &[f32], w: &[f32], of: &Encoded) -> f64 {
    search::exact_error(x, w, &of.codes, &simple_lattice(grid, of.d.to_bits(), of.m.to_bits()))
}

/// The first value of the largest magnitude, with its sign.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most })
}

/// Zero where there is none: such a scale is zero as f16.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// As ggml's reference encoders, operation by operation, so that the bytes are the same.
#[inline(always)]
fn rounded(block: Block, x: &[f32]) -> Encoded {
    let mut codes = [0; 32];
    macro_rules! each {
        ($f:expr) => {
            for (code, &x) in codes.iter_mut().zip(x) {
                *code = $f(x);
            }
        };
    }
    let (d, m) = match block {
        Block::Q8_0 => {
            let d = extreme(x).abs() / 127.0;
            let id = inverse(d);
            each!(|x: f32| (round_half_away(x * id) + 128).clamp(1, 255) as u8);
            (d, 0.0)
        }
        Block::Q4_0 | Block::Q5_0 => {
            let zero = if block == Block::Q4_0 { 8.0 } else { 16.0 };
            let d = extreme(x) / -zero;
            let id = inverse(d);
            each!(|x: f32| (x * id + (zero + 0.5)).min(2.0 * zero - 1.0) as u8);
            (d, 0.0)
        }
        Block::Q4_1 | Block::Q5_1 => {
            let top = if block == Block::Q4_1 { 15.0 } else { 31.0 };
            let (least, most) = search::range(x);
            let d = (most - least) / top;
            let id = inverse(d);
            each!(|x: f32| ((x - least) * id + 0.5).min(top) as u8);
            (d, least)
        }
        // IQ4_NL: the extreme value takes the table's, -127. Codes are nearest under the scale as stored.
        _ => {
            let d = f16::from_f32(extreme(x) / -127.0).to_f32();
            let id = inverse(d);
            each!(|x: f32| nearest_in_table(x * id));
            (d, 0.0)
        }
    };
    Encoded { d: f16::from_f32(d), m: f16::from_f32(m), codes }
}

/// C's `roundf` for numbers well below 2^23: the sum rounds up exactly from one half on.
#[inline(always)]
fn round_half_away(x: f32) -> i32 {
    (x + 0.499_999_97_f32.copysign(x)) as i32
}

#[inline(always)]
fn searched(grid: Grid, x: &[f32], w: &[f32]) -> Encoded {
    let top = (1 << grid.bits) - 1;
    let (d, m) = match (grid.table, grid.minima) {
        (true, _) => (search::table(x, w), 0.0),
        (false, true) => search::with_minimum(x, w, top, grid.bits, false),
        (false, false) => {
            (search::symmetric(x, w, grid.low - grid.zero, top - grid.zero, grid.bits, Stored::Fine), 0.0)
        }
    };
    let (d, m) = (f16::from_f32(d), f16::from_f32(m));
    let lattice = simple_lattice(grid, d.to_bits(), m.to_bits());
    let mut codes = [0; 32];
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = lattice.nearest(x);
    }
    Encoded { d, m, codes }
}

#[cfg(test)]
mod tests {
    use super::round_half_away;

    #[test]
    fn rounding_is_that_of_roundf() {
        for i in -40_000..=40_000 {
            let x = i as f32 / 256.0;
            for x in [x, f32::from_bits(x.to_bits() + 1), f32::from_bits(x.to_bits().saturating_sub(1))] {
                if x.is_finite() && x.abs() < 200.0 {
                    assert_eq!(round_half_away(x), x.round() as i32, "{x}");
                }
            }
        }
    }
}
