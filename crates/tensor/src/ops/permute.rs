//! `y[i_perm[0], i_perm[1], ...] = x[i_0, i_1, ...]`: dimension `d` of `y` is dimension `perm[d]` of `x`.

use super::{SharedMut, count, expect, for_rows};
use crate::{Cpu, Error, Result};

const OP: &str = "permute";

/// Shape of `y`, and the strides in `x` of its dimensions.
fn plan(x: &[f32], shape: &[usize], perm: &[usize], y: &[f32]) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..shape.len()) {
        return Err(Error::Value {
            op: OP,
            what: format!("{perm:?} is no order of the dimensions of {shape:?}"),
        });
    }
    expect(OP, "x", shape, x.len())?;
    expect(OP, "y", shape, y.len())?;
    let mut strides = vec![0; shape.len()];
    let mut step = 1usize;
    for d in (0..shape.len()).rev() {
        strides[d] = step;
        step = step.saturating_mul(shape[d]);
    }
    Ok((perm.iter().map(|&d| shape[d]).collect(), perm.iter().map(|&d| strides[d]).collect()))
}

/// Reorders dimensions; see the module.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn permute(cpu: &Cpu, x: &[f32], shape: &[usize], perm: &[usize], y: &mut [f32]) -> Result<()> {
    let (out_shape, strides) = plan(x, shape, perm, y)?;
    let (Some(&width), Some(&step)) = (out_shape.last(), strides.last()) else {
        y.copy_from_slice(x);
        return Ok(());
    };
    if y.is_empty() {
        return Ok(());
    }
    let outer = &out_shape[..out_shape.len() - 1];
    let rows = count(OP, "y", outer)?;
    let out = SharedMut::new(y);
    for_rows(cpu, rows, width, &|range| {
        for row in range {
            let (mut rest, mut start) = (row, 0);
            for d in (0..outer.len()).rev() {
                start += rest % outer[d] * strides[d];
                rest /= outer[d];
            }
            // SAFETY: inside `y` as checked; row `row` belongs to this task.
            let y = unsafe { out.slice(row * width..(row + 1) * width) };
            if step == 1 {
                y.copy_from_slice(&x[start..start + width]);
            } else {
                for (y, x) in y.iter_mut().zip(x[start..].iter().step_by(step)) {
                    *y = *x;
                }
            }
        }
    });
    Ok(())
}

/// The scalar twin of [`permute`].
pub fn permute_twin(x: &[f32], shape: &[usize], perm: &[usize], y: &mut [f32]) -> Result<()> {
    let (out_shape, strides) = plan(x, shape, perm, y)?;
    for (i, y) in y.iter_mut().enumerate() {
        let (mut rest, mut from) = (i, 0);
        for d in (0..out_shape.len()).rev() {
            from += rest % out_shape[d] * strides[d];
            rest /= out_shape[d];
        }
        *y = x[from];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Close, check, try_check, values};

    const EXACT: Close = Close { relative: 0.0, absolute: 0.0 };

    #[test]
    fn permutations_match_their_twin() {
        let cases: [(&[usize], &[usize]); 8] = [
            (&[], &[]),
            (&[5], &[0]),
            (&[3, 65], &[1, 0]),
            (&[2, 3, 17], &[0, 2, 1]),
            (&[2, 3, 17], &[1, 0, 2]),
            (&[4, 5, 6, 7], &[3, 1, 0, 2]),
            (&[100, 64, 8], &[1, 2, 0]),
            (&[3, 0, 2], &[2, 1, 0]),
        ];
        for (shape, perm) in cases {
            let x = values(shape.iter().product(), 1);
            let mut wanted = vec![0.0; x.len()];
            permute_twin(&x, shape, perm, &mut wanted).unwrap();
            check(&format!("{shape:?} {perm:?}"), &wanted, EXACT, &|cpu, y| permute(cpu, &x, shape, perm, y));
        }
    }

    #[test]
    fn a_transpose_by_hand() {
        let cpu = Cpu::new(1).unwrap();
        let mut y = [0.0; 6];
        permute(&cpu, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3], &[1, 0], &mut y).unwrap();
        assert_eq!(y, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn another_order_is_noticed() {
        let x = values(60, 1);
        let mut wanted = vec![0.0; 60];
        permute_twin(&x, &[3, 4, 5], &[2, 0, 1], &mut wanted).unwrap();
        assert!(try_check(&wanted, EXACT, &|cpu, y| permute(cpu, &x, &[3, 4, 5], &[2, 1, 0], y)).is_err());
    }

    #[test]
    fn what_is_no_order_is_a_typed_error() {
        let cpu = Cpu::new(1).unwrap();
        for perm in [&[0][..], &[0, 0], &[0, 2], &[0, 1, 2]] {
            let result = permute(&cpu, &[0.0; 6], &[2, 3], perm, &mut [0.0; 6]);
            assert!(matches!(result, Err(Error::Value { .. })), "{perm:?}");
        }
        assert!(permute(&cpu, &[0.0; 5], &[2, 3], &[1, 0], &mut [0.0; 6]).is_err());
        assert!(permute(&cpu, &[0.0; 6], &[2, 3], &[1, 0], &mut [0.0; 7]).is_err());
    }
}
