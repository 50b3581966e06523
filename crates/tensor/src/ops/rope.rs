//! Rotary position embedding: the first `r` components of each head are rotated in pairs by angles that depend on
//! the position; `x, y: [t, h, d]` with rows `x_stride`, `y_stride` floats apart, `table: [t, r]`.
//!
//! Pair `j < r / 2` is `(2j, 2j + 1)` or `(j, j + r / 2)`: `y_a = x_a cos - x_b sin`, `y_b = x_b cos + x_a sin`.
//! The angle of pair `j` at row `i` is `positions[axis_of_freq[j], i] * theta^(-2j / r)`; row `i` of the table is the
//! cosines of its `r / 2` pairs, then their sines.

use super::{SharedMut, count, expect, expect_strided, for_rows};
use crate::{Cpu, Error, Result};

const OP: &str = "rope";

/// Which components make a pair.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RopeLayout {
    /// Neighbours: `(2j, 2j + 1)`.
    Interleaved,
    /// Halves: `(j, j + r / 2)`.
    Half,
}

/// Cosines and sines, see the module; `positions: [axes, t]`, `axis_of_freq: [r / 2]`, `table: [t, r]`.
///
/// Rounded to f32 at the same places as the usual training code: exponent, power, reciprocal, angle.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit or an axis does not exist.
pub fn rope_table(
    positions: &[i32],
    t: usize,
    axis_of_freq: &[u8],
    theta: f32,
    r: usize,
    table: &mut [f32],
) -> Result<()> {
    const OP: &str = "rope_table";
    if !r.is_multiple_of(2) {
        return Err(Error::Value { op: OP, what: format!("{r} rotated components do not make pairs") });
    }
    expect(OP, "axis_of_freq", &[r / 2], axis_of_freq.len())?;
    expect(OP, "table", &[t, r], table.len())?;
    let axes = axis_of_freq.iter().map(|&a| usize::from(a) + 1).max().unwrap_or(0);
    if positions.len() < count(OP, "positions", &[axes, t])? {
        return Err(Error::Size { op: OP, operand: "positions", wanted: axes * t, found: positions.len() });
    }
    let inverse: Vec<f32> = (0..r / 2).map(|j| 1.0 / theta.powf((2 * j) as f32 / r as f32)).collect();
    for i in 0..t {
        let (cos, sin) = table[i * r..][..r].split_at_mut(r / 2);
        for j in 0..r / 2 {
            let position = positions[usize::from(axis_of_freq[j]) * t + i];
            let angle = position as f32 * inverse[j];
            (sin[j], cos[j]) = angle.sin_cos();
        }
    }
    Ok(())
}

/// Sizes of the data that [`rope`] rotates.
fn check(
    x: usize,
    stride: usize,
    operand: &'static str,
    [t, h, d, r]: [usize; 4],
    table: &[f32],
) -> Result<()> {
    if !r.is_multiple_of(2) || r > d {
        return Err(Error::Value { op: OP, what: format!("cannot rotate {r} components of heads of {d}") });
    }
    expect(OP, "table", &[t, r], table.len())?;
    expect_strided(OP, operand, t, count(OP, operand, &[h, d])?, stride, x)
}

/// Rotates one head from `x` to `y`.
#[inline(always)]
fn rotate(x: &[f32], cos: &[f32], sin: &[f32], layout: RopeLayout, y: &mut [f32]) {
    let half = cos.len();
    y[2 * half..].copy_from_slice(&x[2 * half..]);
    match layout {
        RopeLayout::Interleaved => {
            let (x, y) = (x.as_chunks::<2>().0, y.as_chunks_mut::<2>().0);
            for (((x, y), c), s) in x.iter().zip(y).zip(cos).zip(sin) {
                *y = [x[0] * c - x[1] * s, x[1] * c + x[0] * s];
            }
        }
        RopeLayout::Half => {
            let (xa, xb) = (&x[..half], &x[half..2 * half]);
            let (ya, yb) = y[..2 * half].split_at_mut(half);
            for j in 0..half {
                ya[j] = xa[j] * cos[j] - xb[j] * sin[j];
                yb[j] = xb[j] * cos[j] + xa[j] * sin[j];
            }
        }
    }
}

/// Rotates `x` into `y`; see the module for shapes.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn rope(
    cpu: &Cpu,
    x: &[f32],
    x_stride: usize,
    [t, h, d]: [usize; 3],
    table: &[f32],
    r: usize,
    layout: RopeLayout,
    y: &mut [f32],
    y_stride: usize,
) -> Result<()> {
    check(x.len(), x_stride, "x", [t, h, d, r], table)?;
    check(y.len(), y_stride, "y", [t, h, d, r], table)?;
    if h == 0 || d == 0 {
        return Ok(());
    }
    let out = SharedMut::new(y);
    for_rows(cpu, t, h * d, &|rows| {
        for i in rows {
            let (cos, sin) = table[i * r..][..r].split_at(r / 2);
            // SAFETY: inside `y` as checked; row `i` belongs to this task and rows do not overlap.
            let y = unsafe { out.slice(i * y_stride..i * y_stride + h * d) };
            for (x, y) in x[i * x_stride..][..h * d].chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                rotate(x, cos, sin, layout, y);
            }
        }
    });
    Ok(())
}

/// Rotates `x` in place; see the module for shapes.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn rope_in_place(
    cpu: &Cpu,
    x: &mut [f32],
    x_stride: usize,
    [t, h, d]: [usize; 3],
    table: &[f32],
    r: usize,
    layout: RopeLayout,
) -> Result<()> {
    check(x.len(), x_stride, "x", [t, h, d, r], table)?;
    if h == 0 || d == 0 {
        return Ok(());
    }
    let out = SharedMut::new(x);
    for_rows(cpu, t, h * d, &|rows| {
        for i in rows {
            let (cos, sin) = table[i * r..][..r].split_at(r / 2);
            // SAFETY: inside `x` as checked; row `i` belongs to this task and rows do not overlap.
            let row = unsafe { out.slice(i * x_stride..i * x_stride + h * d) };
            for head in row.chunks_exact_mut(d) {
                for j in 0..r / 2 {
                    let (a, b) = match layout {
                        RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                        RopeLayout::Half => (j, j + r / 2),
                    };
                    let (xa, xb) = (head[a], head[b]);
                    head[a] = xa * cos[j] - xb * sin[j];
                    head[b] = xb * cos[j] + xa * sin[j];
                }
            }
        }
    });
    Ok(())
}

/// The scalar twin of [`rope`].
pub fn rope_twin(
    x: &[f32],
    x_stride: usize,
    [t, h, d]: [usize; 3],
    table: &[f32],
    r: usize,
    layout: RopeLayout,
    y: &mut [f32],
    y_stride: usize,
) -> Result<()> {
    check(x.len(), x_stride, "x", [t, h, d, r], table)?;
    check(y.len(), y_stride, "y", [t, h, d, r], table)?;
    for i in 0..t {
        for head in 0..h {
            for e in 0..d {
                y[i * y_stride + head * d + e] = x[i * x_stride + head * d + e];
            }
            for j in 0..r / 2 {
                let (a, b) = match layout {
                    RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                    RopeLayout::Half => (j, j + r / 2),
                };
                let (cos, sin) = (f64::from(table[i * r + j]), f64::from(table[i * r + r / 2 + j]));
                let xa = f64::from(x[i * x_stride + head * d + a]);
                let xb = f64::from(x[i * x_stride + head * d + b]);
                y[i * y_stride + head * d + a] = (xa * cos - xb * sin) as f32;
                y[i * y_stride + head * d + b] = (xb * cos + xa * sin) as f32;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{F32, check, try_check, values};

    #[test]
    fn rotations_match_their_twin_in_place_and_not() {
        for [t, h, d, r] in
            [[1, 1, 2, 2], [3, 2, 16, 16], [5, 3, 64, 32], [40, 4, 128, 64], [7, 1, 30, 18], [2, 2, 8, 0]]
        {
            let (x_stride, y_stride) = (h * d + 5, h * d + 2);
            let x = values(t * x_stride, 1);
            let positions: Vec<i32> = (0..t as i32).map(|i| i * 31).collect();
            let mut table = vec![0.0; t * r];
            rope_table(&positions, t, &vec![0; r / 2], 10_000.0, r, &mut table).unwrap();
            for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
                let mut wanted = vec![0.5; t * y_stride];
                rope_twin(&x, x_stride, [t, h, d], &table, r, layout, &mut wanted, y_stride).unwrap();
                check("rope", &wanted, F32, &|cpu, y| {
                    y.fill(0.5);
                    rope(cpu, &x, x_stride, [t, h, d], &table, r, layout, y, y_stride)
                });
                let mut wanted = x.clone();
                rope_twin(&x, x_stride, [t, h, d], &table, r, layout, &mut wanted, x_stride).unwrap();
                check("rope in place", &wanted, F32, &|cpu, y| {
                    y.copy_from_slice(&x);
                    rope_in_place(cpu, y, x_stride, [t, h, d], &table, r, layout)
                });
            }
        }
    }

    #[test]
    fn the_table_holds_cosines_then_sines_of_each_axis() {
        let positions = [0, 1, 100_000, 5, -3, 7];
        let (t, r, theta) = (3, 4, 10_000.0f32);
        let mut table = vec![0.0; t * r];
        rope_table(&positions, t, &[0, 1], theta, r, &mut table).unwrap();
        for i in 0..t {
            let angles = [positions[i] as f32, positions[t + i] as f32 * (1.0 / theta.powf(0.5))];
            for j in 0..2 {
                let angle = f64::from(angles[j]);
                assert!((f64::from(table[i * r + j]) - angle.cos()).abs() < 1.2e-7, "{i} {j}");
                assert!((f64::from(table[i * r + 2 + j]) - angle.sin()).abs() < 1.2e-7, "{i} {j}");
            }
        }
    }

    #[test]
    fn the_other_layout_is_noticed() {
        let (x, mut table) = (values(32, 1), vec![0.0; 32]);
        rope_table(&[3, 4], 2, &[0; 8], 100.0, 16, &mut table).unwrap();
        let mut wanted = vec![0.0; 32];
        rope_twin(&x, 16, [2, 1, 16], &table, 16, RopeLayout::Half, &mut wanted, 16).unwrap();
        let other = |cpu: &Cpu, y: &mut [f32]| {
            rope(cpu, &x, 16, [2, 1, 16], &table, 16, RopeLayout::Interleaved, y, 16)
        };
        assert!(try_check(&wanted, F32, &other).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_typed_errors() {
        let cpu = Cpu::new(1).unwrap();
        let half = RopeLayout::Half;
        let run = |x: &[f32], stride, shape, table: &[f32], r, y: &mut [f32]| {
            rope(&cpu, x, stride, shape, table, r, half, y, 8)
        };
        assert!(run(&[0.0; 16], 8, [2, 2, 4], &[0.0; 8], 4, &mut [0.0; 16]).is_ok());
        assert!(run(&[0.0; 15], 8, [2, 2, 4], &[0.0; 8], 4, &mut [0.0; 16]).is_err());
        assert!(run(&[0.0; 16], 7, [2, 2, 4], &[0.0; 8], 4, &mut [0.0; 16]).is_err());
        assert!(run(&[0.0; 16], 8, [2, 2, 4], &[0.0; 6], 3, &mut [0.0; 16]).is_err());
        assert!(run(&[0.0; 16], 8, [2, 2, 4], &[0.0; 12], 6, &mut [0.0; 16]).is_err());
        assert!(run(&[0.0; 16], 8, [2, 2, 4], &[0.0; 8], 4, &mut [0.0; 15]).is_err());
        assert!(rope_table(&[0; 4], 2, &[0, 2], 1.0, 4, &mut [0.0; 8]).is_err());
        assert!(rope_table(&[0; 4], 2, &[0], 1.0, 3, &mut [0.0; 6]).is_err());
        assert!(rope_table(&[0; 4], 2, &[0, 1], 1.0, 4, &mut [0.0; 7]).is_err());
    }
}
