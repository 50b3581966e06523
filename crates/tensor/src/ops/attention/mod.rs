//! `out[i, a, :] = sum_j softmax_j(scale * q[i, a, :] . k[j, a / g, :]) v[j, a / g, :]` over the `j` that `i` sees;
//! `q: [t, h, d]`, `k, v: [s, kvh, d]`, `out: [t, h, d]`, `g = h / kvh` query heads per key head.
//!
//! Rows of all four are `*_stride` floats apart, so that they can be parts of a merged projection or of a cache.
//! A row that sees nothing gives zeros.

mod flash;

use super::{count, expect_strided};
use crate::{Cpu, Error, Result};

const OP: &str = "attention";

/// Which keys a query sees.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mask<'a> {
    /// Query `i` sees keys `0..=past + i`.
    Causal {
        /// Keys before the first query.
        past: usize,
    },
    /// Queries and keys between two neighbouring boundaries see each other; `t == s`. The boundaries begin with 0,
    /// do not decrease and end with `t`.
    Segments(&'a [u32]),
    /// Every query sees every key.
    Full,
}

/// Operands and sizes of [`attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Queries `[t, h, d]`.
    pub q: &'a [f32],
    /// Floats from one query row to the next.
    pub q_stride: usize,
    /// Keys `[s, kvh, d]`.
    pub k: &'a [f32],
    /// Floats from one key row to the next.
    pub k_stride: usize,
    /// Values `[s, kvh, d]`.
    pub v: &'a [f32],
    /// Floats from one value row to the next.
    pub v_stride: usize,
    /// Query rows.
    pub t: usize,
    /// Key and value rows.
    pub s: usize,
    /// Query heads.
    pub h: usize,
    /// Key and value heads, a divisor of `h`.
    pub kvh: usize,
    /// Components of a head.
    pub d: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Which keys a query sees.
    pub mask: Mask<'a>,
    /// Floats from one output row to the next.
    pub out_stride: usize,
}

fn check_heads(a: &Attention<'_>) -> Result<()> {
    if a.kvh == 0 || !a.h.is_multiple_of(a.kvh) || a.d == 0 {
        let what = format!("{} query heads for {} key heads of {} components", a.h, a.kvh, a.d);
        return Err(Error::Value { op: OP, what });
    }
    Ok(())
}

fn check(a: &Attention<'_>, out: &[f32]) -> Result<()> {
    check_heads(a)?;
    let (q_width, k_width) = (count(OP, "q", &[a.h, a.d])?, count(OP, "k", &[a.kvh, a.d])?);
    if u32::try_from(a.t).is_err() {
        return Err(Error::Value { op: OP, what: format!("{} queries, the most is {}", a.t, u32::MAX) });
    }
    expect_strided(OP, "q", a.t, q_width, a.q_stride, a.q.len())?;
    expect_strided(OP, "k", a.s, k_width, a.k_stride, a.k.len())?;
    expect_strided(OP, "v", a.s, k_width, a.v_stride, a.v.len())?;
    expect_strided(OP, "out", a.t, q_width, a.out_stride, out.len())?;
    match a.mask {
        Mask::Causal { past } if past.checked_add(a.t).is_none_or(|end| end > a.s) => {
            let what = format!("{past} past and {} new positions, but {} keys", a.t, a.s);
            Err(Error::Value { op: OP, what })
        }
        Mask::Segments(bounds) => {
            let ends = bounds.first() == Some(&0) && bounds.last().is_some_and(|&b| b as usize == a.t);
            if a.t != a.s || !ends || !bounds.is_sorted() {
                let what = format!(
                    "{} segment boundaries from {:?} to {:?} for {} queries and {} keys",
                    bounds.len(),
                    bounds.first(),
                    bounds.last(),
                    a.t,
                    a.s
                );
                return Err(Error::Value { op: OP, what });
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// See the module. The scores are never stored as a whole.
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit, [`Error::OutOfMemory`] where there is none for
/// scratch.
pub fn attention(cpu: &Cpu, args: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    check(args, out)?;
    flash::flash(cpu, args, out)
}

/// Scratch memory, in bytes, that [`attention`] takes from the context for operands of these sizes.
///
/// # Errors
/// [`Error::Value`] where heads do not make groups.
pub fn attention_scratch_bytes(cpu: &Cpu, args: &Attention<'_>) -> Result<usize> {
    check_heads(args)?;
    Ok(4 * flash::scratch_floats(cpu, args))
}

/// The scalar twin of [`attention`], in f64.
pub fn attention_twin(a: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    check(a, out)?;
    let group = a.h / a.kvh;
    for i in 0..a.t {
        let seen = match a.mask {
            Mask::Causal { past } => 0..past + i + 1,
            Mask::Segments(bounds) => bounds
                .windows(2)
                .map(|b| b[0] as usize..b[1] as usize)
                .find(|segment| segment.contains(&i))
                .unwrap_or(0..0),
            Mask::Full => 0..a.s,
        };
        for head in 0..a.h {
            let q = &a.q[i * a.q_stride + head * a.d..][..a.d];
            let score = |j: usize| -> f64 {
                let k = &a.k[j * a.k_stride + head / group * a.d..][..a.d];
                f64::from(a.scale) * q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = scores.iter().map(|&v| (v - max).exp()).sum();
            for e in 0..a.d {
                let weighted: f64 = scores
                    .iter()
                    .zip(seen.clone())
                    .map(|(&v, j)| (v - max).exp() * f64::from(a.v[j * a.v_stride + head / group * a.d + e]))
                    .sum();
                let value = if scores.is_empty() { 0.0 } else { weighted / sum };
                out[i * a.out_stride + head * a.d + e] = value as f32;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
