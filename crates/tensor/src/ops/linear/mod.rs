//! `y[i, n] = epilogue(sum_k x[i, k] * w[n, k] + bias[n])`; `x: [m, k]`, `w: [N, k]`, `y: [m, N]`.
//!
//! `w` is given in parts that are concatenated along `N` without being copied (q, k, v; gate, up). For SwiGLU `N` is
//! `2 I`, the gate half first, and `y[i, n] = silu(gate[i, n]) * up[i, n]`, `y: [m, I]`.
//!
//! A few rows of `x` are a bandwidth problem: [`gemv`] streams each weight row once. More rows are an arithmetic
//! problem: [`gemm`](super::gemm) packs weights into panels, widened to f32.

mod gemv;
#[macro_use]
mod packed;
mod packed_gemv;
mod rows;

pub(super) use self::packed::{largest, quantise};
use self::rows::{Rows, Store};
use super::fewer::{self, Scheme};
use super::gemm::{self, gemm};
use super::{SharedMut, expect};
use crate::simd::{Kernel, Simd, math};
use crate::{AlignedF32, Cpu, Error, PackedFormat, Result, Weight};

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
    check_parts(m, k, parts, epilogue, y)
}

/// Checks all sizes but those of `x`, and returns `N`.
fn check_parts(m: usize, k: usize, parts: &[Part<'_>], epilogue: Epilogue, y: &[f32]) -> Result<usize> {
    let mut n = 0usize;
    for part in parts {
        expect(OP, "weight", &[part.rows, k], part.weight.len())?;
        if let Weight::Packed(packed) = part.weight
            && (packed.k(), packed.rows()) != (k, part.rows)
        {
            return Err(Error::Size { op: OP, operand: "packed rows", wanted: k, found: packed.k() });
        }
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
    expect(OP, "x", &[m, k], x.len())?;
    linear_strided(cpu, x, k, [m, k], parts, epilogue, y)
}

/// As [`linear`], by an algorithm with fewer multiplications where weights are floating-point and the sizes make it pay.
/// Neighbouring rows then share products: a row's last bits depend on the rows beside it, and its error on their magnitudes.
///
/// # Errors
/// As [`linear`].
pub fn linear_fewer(
    cpu: &Cpu,
    x: &[f32],
    m: usize,
    k: usize,
    parts: &[Part<'_>],
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let n = check(x, m, k, parts, epilogue, y)?;
    let floats = parts.iter().all(|p| !matches!(p.weight, Weight::Packed(_)));
    match Scheme::for_linear(cpu, [m, k, n]).filter(|_| floats && epilogue != Epilogue::SwiGlu) {
        Some(scheme) => linear_by(cpu, &scheme, (x, k), [m, k], parts, epilogue, y),
        None => linear(cpu, x, m, k, parts, epilogue, y),
    }
}

/// [`linear`] by a scheme for `x` with rows of `x_stride` floats; weights are floating-point, and there is no gate.
pub(super) fn linear_by(
    cpu: &Cpu,
    scheme: &Scheme,
    (x, x_stride): (&[f32], usize),
    [m, k]: [usize; 2],
    parts: &[Part<'_>],
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let n = check_parts(m, k, parts, epilogue, y)?;
    let bias = biases(parts);
    let rows = Rows { parts, k, n, chunk: n, swiglu: false };
    let y = SharedMut::new(y);
    let stream = Store::streams(&y, m * n, [n, 0], n);
    let bias = bias.as_deref();
    let store = Store { rows: &rows, bias, epilogue, y, stride: n, offset: 0, outputs: n, stream };
    fewer::multiply(cpu, scheme, x, x_stride, m, &rows, &store)
}

/// The biases of all rows, where there are any.
fn biases(parts: &[Part<'_>]) -> Option<Vec<f32>> {
    let of = |p: &Part<'_>| p.bias.map_or_else(|| vec![0.0; p.rows], <[f32]>::to_vec);
    parts.iter().any(|p| p.bias.is_some()).then(|| parts.iter().flat_map(of).collect())
}

/// As [`linear`], with rows of `x` that begin `stride` floats apart and may overlap: what a convolution over frames is.
///
/// # Errors
/// As [`linear`].
pub(super) fn linear_strided(
    cpu: &Cpu,
    x: &[f32],
    stride: usize,
    [m, k]: [usize; 2],
    parts: &[Part<'_>],
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let needed = if m == 0 { 0 } else { super::count(OP, "x", &[m - 1, stride])?.saturating_add(k) };
    if x.len() < needed {
        return Err(Error::Size { op: OP, operand: "x", wanted: needed, found: x.len() });
    }
    let n = check_parts(m, k, parts, epilogue, y)?;
    if y.is_empty() {
        return Ok(());
    }
    let x = &x[..needed];
    let kind = |part: &Part<'_>| match part.weight {
        Weight::Packed(packed) => Some(packed::Shape::of(cpu.isa(), packed)),
        _ => None,
    };
    let one_kind = parts.windows(2).all(|two| kind(&two[0]) == kind(&two[1]));
    let x = (x, stride);
    let stride = y.len() / m;
    if one_kind {
        let shape = parts.first().and_then(kind);
        return run(cpu, x, [m, k], parts, n, epilogue, shape, SharedMut::new(y), [stride, 0]);
    }
    if epilogue == Epilogue::SwiGlu {
        // Gate and up do not meet in one chunk; they meet in memory.
        let mut both = AlignedF32::zeroed(m * n)?;
        linear_strided(cpu, x.0, x.1, [m, k], parts, Epilogue::None, &mut both)?;
        let out = SharedMut::new(y);
        let both = &both[..];
        super::for_rows(cpu, m, n, &|range| {
            for i in range {
                let (gate, up) = both[i * n..(i + 1) * n].split_at(stride);
                // SAFETY: row `i` of `y` belongs to this task.
                let y = unsafe { out.slice(i * stride..(i + 1) * stride) };
                cpu.isa().run(Gate { gate, up, y });
            }
        });
        return Ok(());
    }
    let mut offset = 0;
    for parts in parts.chunk_by(|a, b| kind(a) == kind(b)) {
        let n = parts.iter().map(|p| p.rows).sum();
        let shape = parts.first().and_then(kind);
        run(cpu, x, [m, k], parts, n, epilogue, shape, SharedMut::new(y), [stride, offset])?;
        offset += n;
    }
    Ok(())
}

/// `y = silu(gate) * up`, of equal length.
struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for ((y, gate), up) in
            self.y.chunks_mut(S::WIDTH).zip(self.gate.chunks(S::WIDTH)).zip(self.up.chunks(S::WIDTH))
        {
            let v = s.mul(math::silu(s, s.load_slice(gate)), s.load_slice(up));
            // SAFETY: as many lanes as `y` has.
            unsafe { s.store_n(y.as_mut_ptr(), y.len(), v) };
        }
    }
}

/// Parts of one kind: all floating-point, or all packed and of one shape. `y` has rows of `stride` floats, of which
/// these parts make those from `offset`; rows of `x` begin `x_stride` floats apart.
fn run(
    cpu: &Cpu,
    (x, x_stride): (&[f32], usize),
    [m, k]: [usize; 2],
    parts: &[Part<'_>],
    n: usize,
    epilogue: Epilogue,
    shape: Option<packed::Shape>,
    y: SharedMut<f32>,
    [stride, offset]: [usize; 2],
) -> Result<()> {
    let bias = biases(parts);
    let few = m <= gemv::MAX_M;
    let swiglu = epilogue == Epilogue::SwiGlu;
    let chunk = match shape {
        Some(_) => packed::chunk(cpu, m, n),
        None if few => gemv::CHUNK,
        None => gemm::chunk_columns(cpu, n),
    };
    let rows = Rows { parts, k, n, chunk, swiglu };
    let outputs = if swiglu { n / 2 } else { n };
    let stream = Store::streams(&y, m * stride, [stride, offset], chunk);
    let store = Store { rows: &rows, bias: bias.as_deref(), epilogue, y, stride, offset, outputs, stream };
    match shape {
        Some(shape) => packed::linear(cpu, (x, x_stride), m, k, shape, &store)?,
        None if few && x_stride != k => {
            let packed: Vec<f32> = (0..m).flat_map(|i| &x[i * x_stride..][..k]).copied().collect();
            gemv::gemv(cpu, &packed, m, &rows, &store);
        }
        None if few => gemv::gemv(cpu, x, m, &rows, &store),
        None => gemm(cpu, x, x_stride, [m, k, rows.columns()], chunk, &rows, &store)?,
    }
    Ok(())
}

/// `x` as [`linear`] sees it for this weight: quantised where the weight is, and back. With it the twin's result is
/// the kernel's up to rounding.
pub fn linear_rounded(x: &[f32], k: usize, weight: Weight<'_>) -> Vec<f32> {
    match weight {
        Weight::Packed(packed) => {
            let mut out = vec![0.0; x.len()];
            packed::rounded(x, k, packed.format(), packed.input_range(), &mut out);
            out
        }
        _ => x.to_vec(),
    }
}

/// Rows of `k` values as [`linear`] sees them where they meet quantised weights of this format: rounded to signed
/// bytes, a scale for each block, or one scale where the largest magnitude is fixed as `range`.
///
/// # Errors
/// [`Error::Size`] where `out` is not as long as `x`.
pub fn round_activations(
    cpu: &Cpu,
    x: &[f32],
    k: usize,
    format: PackedFormat,
    range: Option<f32>,
    out: &mut [f32],
) -> Result<()> {
    expect("round_activations", "out", &[x.len()], out.len())?;
    let k = k.max(1);
    let to = SharedMut::new(out);
    super::for_rows(cpu, x.len().div_ceil(k), k, &|rows| {
        let range_of = rows.start * k..(rows.end * k).min(x.len());
        // SAFETY: these rows belong to this task.
        let out = unsafe { to.slice(range_of.clone()) };
        packed::rounded(&x[range_of], k, format, range, out);
    });
    Ok(())
}

/// The most scratch memory, in bytes, that [`linear`] takes from the context for `m` rows of `k` on `cpu`.
pub fn linear_scratch_bytes(cpu: &Cpu, m: usize, k: usize) -> usize {
    if m <= gemv::MAX_M { 0 } else { 4 * gemm::scratch_floats(cpu, m, k) }
}

/// The same for [`linear_fewer`] and `n` outputs.
pub fn linear_fewer_scratch_bytes(cpu: &Cpu, [m, k, n]: [usize; 3]) -> usize {
    let fewer = Scheme::for_linear(cpu, [m, k, n]).map_or(0, |s| 4 * s.scratch_floats(cpu));
    fewer.max(linear_scratch_bytes(cpu, m, k))
}

/// The same as [`linear_scratch_bytes`] where weights are packed.
pub fn packed_scratch_bytes(cpu: &Cpu, m: usize, k: usize) -> usize {
    packed::scratch_bytes(cpu, m, k)
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
mod packed_tests;
#[cfg(test)]
mod tests;
