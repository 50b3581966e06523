//! `y[i, n] = epilogue(sum_k x[i, k] * w[n, k] + bias[n])`; `x: [m, k]`, `w: [N, k]`, `y: [m, N]`.
//!
//! `w` is given in parts that are concatenated along `N` without being copied (q, k, v; gate, up). For SwiGLU `N` is
//! `2 I`, the gate half first, and `y[i, n] = silu(gate[i, n]) * up[i, n]`, `y: [m, I]`.
//!
//! A few rows of `x` are a bandwidth problem: [`gemv`] streams each weight row once. More rows are an arithmetic
//! problem: [`gemm`](super::gemm) packs weights into panels, widened to f32.

mod gemv;
mod rows;

use self::rows::{Rows, Store};
use super::gemm::{self, gemm};
use super::{SharedMut, expect};
use crate::{Cpu, Error, Result, Weight};

const OP: &str = "linear";

/// Rows of a linear layer's weight, with their bias.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Values `[rows, k]`.
    pub weight: Weight<'a>,
    /// Output features of this part.
    pub rows: usize,
    /// Added to the outputs, `[rows]`.
    pub bias: Option<&'a [f32]>,
}

/// What happens to the sums before they are stored.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// `0.5 x (1 + erf(x / sqrt 2))`
    Gelu,
    /// `x / (1 + exp(-x))`
    Silu,
    /// `max(x, 0)`
    Relu,
    /// The first half of the rows is the gate of the second: `silu(gate) * up`, half as many outputs.
    SwiGlu,
}

/// Checks sizes and returns `N`.
fn check(x: &[f32], m: usize, k: usize, parts: &[Part<'_>], epilogue: Epilogue, y: &[f32]) -> Result<usize> {
    expect(OP, "x", &[m, k], x.len())?;
    let mut n = 0usize;
    for part in parts {
        expect(OP, "weight", &[part.rows, k], part.weight.len())?;
        if let Some(bias) = part.bias {
            expect(OP, "bias", &[part.rows], bias.len())?;
        }
        n = n
            .checked_add(part.rows)
            .ok_or_else(|| Error::Value { op: OP, what: "too many weight rows".into() })?;
    }
    let outputs = match epilogue {
        Epilogue::SwiGlu if !n.is_multiple_of(2) => {
            return Err(Error::Value {
                op: OP,
                what: format!("swiglu needs an even number of rows, found {n}"),
            });
        }
        Epilogue::SwiGlu => n / 2,
        _ => n,
    };
    expect(OP, "y", &[m, outputs], y.len())?;
    Ok(n)
}

/// See the module: `x: [m, k]`, parts of `[rows, k]`, `y: [m, N]` or, for SwiGLU, `[m, N / 2]`.
///
/// # Errors
/// [`Error::Size`] where operands do not fit, [`Error::OutOfMemory`] where there is none for scratch.
pub fn linear(
    cpu: &Cpu,
    x: &[f32],
    m: usize,
    k: usize,
    parts: &[Part<'_>],
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let n = check(x, m, k, parts, epilogue, y)?;
    if y.is_empty() {
        return Ok(());
    }
    let bias: Option<Vec<f32>> = parts.iter().any(|p| p.bias.is_some()).then(|| {
        let of = |p: &Part<'_>| p.bias.map_or_else(|| vec![0.0; p.rows], <[f32]>::to_vec);
        parts.iter().flat_map(of).collect()
    });
    let few = m <= gemv::MAX_M;
    let swiglu = epilogue == Epilogue::SwiGlu;
    let rows =
        Rows { parts, k, n, chunk: if few { gemv::CHUNK } else { gemm::chunk_columns(cpu, n) }, swiglu };
    let outputs = y.len() / m;
    let store = Store { rows: &rows, bias: bias.as_deref(), epilogue, y: SharedMut::new(y), outputs };
    if few {
        gemv::gemv(cpu, x, m, &rows, &store);
        return Ok(());
    }
    gemm(cpu, x, k, [m, k, rows.columns()], rows.chunk, &rows, &store)
}

/// The most scratch memory, in bytes, that [`linear`] takes from the context for `m` rows of `k` on `cpu`.
pub fn linear_scratch_bytes(cpu: &Cpu, m: usize, k: usize) -> usize {
    if m <= gemv::MAX_M { 0 } else { 4 * gemm::scratch_floats(cpu, m, k) }
}

/// The scalar twin of [`linear`], accumulating in f64.
pub fn linear_twin(
    x: &[f32],
    m: usize,
    k: usize,
    parts: &[Part<'_>],
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let n = check(x, m, k, parts, epilogue, y)?;
    let rows: Vec<(&Part<'_>, usize)> = parts.iter().flat_map(|p| (0..p.rows).map(move |r| (p, r))).collect();
    let mut sums = vec![0f64; n];
    for i in 0..m {
        for (sum, (part, r)) in sums.iter_mut().zip(&rows) {
            *sum = part.bias.map_or(0.0, |b| f64::from(b[*r]));
            for j in 0..k {
                let w = part.weight.get(r * k + j).unwrap_or(f32::NAN);
                *sum += f64::from(x[i * k + j]) * f64::from(w);
            }
        }
        let silu = |v: f64| v / (1.0 + (-v).exp());
        let outputs = if epilogue == Epilogue::SwiGlu { n / 2 } else { n };
        for (j, out) in y[i * outputs..][..outputs].iter_mut().enumerate() {
            let v = sums[j];
            *out = match epilogue {
                Epilogue::None => v,
                Epilogue::Gelu => super::elementwise::gelu_f64(v),
                Epilogue::Silu => silu(v),
                Epilogue::Relu => {
                    if v > 0.0 || v.is_nan() {
                        v
                    } else {
                        0.0
                    }
                }
                Epilogue::SwiGlu => silu(v) * sums[n / 2 + j],
            } as f32;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
