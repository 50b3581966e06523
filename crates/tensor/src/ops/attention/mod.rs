//! `out[i, a, :] = sum_j softmax_j(scale * q[i, a, :] . k[j, a / g, :]) v[j, a / g, :]` over the `j` that `i` sees;
//! `q: [t, h, d]`, `k, v: [s, kvh, d]`, `out: [t, h, d]`, `g = h / kvh` query heads per key head.
//!
//! Rows of `q` and `out` are `*_stride` floats apart, so that they can be parts of a merged projection; `k` and `v` are
//! [`KvRows`], parts of a projection or rows of a cache in any [`KvFormat`]. A row that sees nothing gives zeros.

mod bytes;
mod few;
mod flash;

use super::{count, expect_strided};
use crate::{Cpu, Error, KvFormat, KvRows, Result};

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
    pub k: KvRows<'a>,
    /// Values `[s, kvh, d]`.
    pub v: KvRows<'a>,
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
    /// Whether products within segments may be made of pairs of steps, whose errors depend on the magnitudes of all rows, where
    /// that saves time.
    pub fewer: bool,
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
    let q_width = count(OP, "q", &[a.h, a.d])?;
    if u32::try_from(a.t).is_err() {
        return Err(Error::Value { op: OP, what: format!("{} queries, the most is {}", a.t, u32::MAX) });
    }
    expect_strided(OP, "q", a.t, q_width, a.q_stride, a.q.len())?;
    for (operand, x) in [("k", &a.k), ("v", &a.v)] {
        let wide = || Error::Value { op: OP, what: format!("{} heads of {} components", a.kvh, a.d) };
        let width = x.format.head_bytes(a.d).ok_or_else(wide)?;
        expect_strided(OP, operand, a.s, count(OP, operand, &[a.kvh, width])?, x.stride, x.bytes.len())?;
        // Some kernels read elements through typed pointers.
        let size = match x.format {
            KvFormat::F32 => 4,
            KvFormat::F16 => 2,
            KvFormat::Int8 | KvFormat::Int4 => 1,
        };
        if !(x.bytes.as_ptr() as usize).is_multiple_of(size) || !x.stride.is_multiple_of(size) {
            let what = format!("{operand} in {} with rows of {} bytes is not aligned", x.format, x.stride);
            return Err(Error::Value { op: OP, what });
        }
    }
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
    if few::suits(args) { few::few(cpu, args, out) } else { flash::flash(cpu, args, out) }
}

/// [`attention`] with queries and keys rounded to twelve bits, each row of a head with a scale of its own, and values to bytes, each
/// component over 256 keys with one. Weights of a softmax keep about 14 bits. Where there is a
/// causal mask, a cache, or more than one segment this is [`attention`].
///
/// # Errors
/// As [`attention`].
pub fn attention_int8(cpu: &Cpu, args: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    check(args, out)?;
    if bytes::suits(args) { bytes::attend(cpu, args, out) } else { attention(cpu, args, out) }
}

/// Scratch memory, in bytes, that [`attention_int8`] takes from the context for operands of these sizes.
///
/// # Errors
/// As [`attention_scratch_bytes`].
pub fn attention_int8_scratch_bytes(cpu: &Cpu, args: &Attention<'_>) -> Result<usize> {
    check_heads(args)?;
    if bytes::suits(args) {
        Ok(4 * bytes::scratch_floats(cpu, args))
    } else {
        attention_scratch_bytes(cpu, args)
    }
}

/// Scratch memory, in bytes, that [`attention`] takes from the context for operands of these sizes.
///
/// # Errors
/// [`Error::Value`] where heads do not make groups.
pub fn attention_scratch_bytes(cpu: &Cpu, args: &Attention<'_>) -> Result<usize> {
    check_heads(args)?;
    let floats =
        if few::suits(args) { few::scratch_floats(cpu, args) } else { flash::scratch_floats(cpu, args) };
    Ok(4 * floats)
}

/// The scalar twin of [`attention`], in f64.
pub fn attention_twin(a: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    check(a, out)?;
    let group = a.h / a.kvh;
    let widened = |x: &KvRows<'_>| {
        let mut values = vec![0f32; a.s * a.kvh * a.d];
        for (i, out) in values.chunks_exact_mut(a.d).enumerate() {
            x.head(i / a.kvh, i % a.kvh, out);
        }
        values
    };
    let (keys, values) = (widened(&a.k), widened(&a.v));
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
                let k = &keys[(j * a.kvh + head / group) * a.d..][..a.d];
                f64::from(a.scale) * q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = scores.iter().map(|&v| (v - max).exp()).sum();
            for e in 0..a.d {
                let weighted: f64 = scores
                    .iter()
                    .zip(seen.clone())
                    .map(|(&v, j)| (v - max).exp() * f64::from(values[(j * a.kvh + head / group) * a.d + e]))
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
