//! One element at a time.
//!
//! - `unary`: `y[i] = f(x[i])`
//! - `binary`: `y[i] = f(a[i], b[i mod len(b)])`, so `b` is as long as `a` or one row that is repeated
//! - `binary_broadcast`: the same on shapes, aligned at their last dimensions; a dimension of 1 is repeated

use super::{SharedMut, count, expect, for_rows};
use crate::simd::{Kernel, Simd, math};
use crate::{Cpu, Error, Result};

/// A function of one element.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unary {
    /// `x / (1 + exp(-x))`
    Silu,
    /// `0.5 x (1 + erf(x / sqrt 2))`
    Gelu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// Error function.
    Erf,
    /// Exponential.
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `x^2`
    Square,
}

/// A function of two elements.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// The larger; `b` where one of them is NaN.
    Max,
    /// The smaller; `b` where one of them is NaN.
    Min,
}

/// `y[i] = f(x[i])`.
///
/// # Errors
/// [`Error::Size`] where `y` is not as long as `x`.
pub fn unary(cpu: &Cpu, f: Unary, x: &[f32], y: &mut [f32]) -> Result<()> {
    expect("unary", "y", &[x.len()], y.len())?;
    let out = SharedMut::new(y);
    for_rows(cpu, x.len().div_ceil(ROW), ROW, &|rows| {
        let range = rows.start * ROW..(rows.end * ROW).min(x.len());
        // SAFETY: inside `y`, which is as long as `x`; the range belongs to this task.
        let y = unsafe { out.slice(range.clone()) };
        cpu.isa().run(Map { f, x: &x[range], y });
    });
    Ok(())
}

/// Elements that are never divided between threads, so that vectors begin at the same places.
const ROW: usize = 1024;

/// `y = f(x)`, of the same length.
struct Map<'a> {
    f: Unary,
    x: &'a [f32],
    y: &'a mut [f32],
}

/// The loop of [`Map`]; a macro, because a closure would not get the target features.
macro_rules! map {
    ($s:ident, $self:ident, $v:ident => $f:expr) => {{
        let n = $self.y.len();
        for j in (0..n).step_by(S::WIDTH) {
            let count = (n - j).min(S::WIDTH);
            // SAFETY: `count` elements from `j` of both.
            unsafe {
                let $v = $s.load_n($self.x.as_ptr().add(j), count);
                $s.store_n($self.y.as_mut_ptr().add(j), count, $f);
            }
        }
    }};
}

impl Kernel for Map<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        match self.f {
            Unary::Silu => map!(s, self, v => math::silu(s, v)),
            Unary::Gelu => map!(s, self, v => math::gelu(s, v)),
            Unary::GeluTanh => map!(s, self, v => math::gelu_tanh(s, v)),
            // The order of the operands lets NaN through.
            Unary::Relu => map!(s, self, v => s.max(zero, v)),
            Unary::Sigmoid => map!(s, self, v => math::sigmoid(s, v)),
            Unary::Tanh => map!(s, self, v => math::tanh(s, v)),
            Unary::Erf => map!(s, self, v => math::erf(s, v)),
            Unary::Exp => map!(s, self, v => math::exp(s, v)),
            Unary::Sqrt => map!(s, self, v => s.sqrt(v)),
            Unary::Rsqrt => map!(s, self, v => s.div(one, s.sqrt(v))),
            Unary::Recip => map!(s, self, v => s.div(one, v)),
            Unary::Square => map!(s, self, v => s.mul(v, v)),
            Unary::Neg => self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = -x),
            Unary::Abs => self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = x.abs()),
            // Not in any inner loop of our models, so the standard library's will do.
            Unary::Log => self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = x.ln()),
        }
    }
}

/// `y[i] = f(a[i], b[i mod len(b)])`.
///
/// # Errors
/// [`Error::Size`] where `y` is not as long as `a`, [`Error::Value`] where `b` does not divide `a` into rows.
pub fn binary(cpu: &Cpu, f: Binary, a: &[f32], b: &[f32], y: &mut [f32]) -> Result<()> {
    check_binary(a, b, y)?;
    if y.is_empty() {
        return Ok(());
    }
    let out = SharedMut::new(y);
    if a.len() == b.len() || b.len() == 1 {
        for_rows(cpu, a.len().div_ceil(ROW), ROW, &|rows| {
            let range = rows.start * ROW..(rows.end * ROW).min(a.len());
            // SAFETY: inside `y`, which is as long as `a`; the range belongs to this task.
            let y = unsafe { out.slice(range.clone()) };
            let b = if b.len() == 1 { b } else { &b[range.clone()] };
            cpu.isa().run(Zip { f, a: &a[range], b, y });
        });
    } else {
        let c = b.len();
        for_rows(cpu, a.len() / c, c, &|rows| {
            for i in rows {
                // SAFETY: inside `y`, which is as long as `a`; row `i` belongs to this task.
                let y = unsafe { out.slice(i * c..(i + 1) * c) };
                cpu.isa().run(Zip { f, a: &a[i * c..][..c], b, y });
            }
        });
    }
    Ok(())
}

/// `y[i] += x[i]`.
///
/// # Errors
/// [`Error::Size`] where `y` is not as long as `x`.
pub fn add_to(cpu: &Cpu, x: &[f32], y: &mut [f32]) -> Result<()> {
    expect("add_to", "y", &[x.len()], y.len())?;
    let out = SharedMut::new(y);
    for_rows(cpu, x.len().div_ceil(ROW), ROW, &|rows| {
        let range = rows.start * ROW..(rows.end * ROW).min(x.len());
        // SAFETY: inside `y`, which is as long as `x`; the range belongs to this task.
        let y = unsafe { out.slice(range.clone()) };
        for (y, x) in y.iter_mut().zip(&x[range]) {
            *y += x;
        }
    });
    Ok(())
}

/// `y = f(a, b)`; `b` is as long as `a` and `y`, or one element.
struct Zip<'a> {
    f: Binary,
    a: &'a [f32],
    b: &'a [f32],
    y: &'a mut [f32],
}

/// The loop of [`Zip`].
macro_rules! zip {
    ($s:ident, $self:ident, $a:ident, $b:ident => $f:expr) => {{
        let n = $self.y.len();
        let one = $self.b.len() == 1;
        for j in (0..n).step_by(S::WIDTH) {
            let count = (n - j).min(S::WIDTH);
            // SAFETY: `count` elements from `j` of all three, unless `b` is a single one.
            unsafe {
                let $a = $s.load_n($self.a.as_ptr().add(j), count);
                let $b = if one { $s.splat($self.b[0]) } else { $s.load_n($self.b.as_ptr().add(j), count) };
                $s.store_n($self.y.as_mut_ptr().add(j), count, $f);
            }
        }
    }};
}

impl Kernel for Zip<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.f {
            Binary::Add => zip!(s, self, a, b => s.add(a, b)),
            Binary::Sub => zip!(s, self, a, b => s.sub(a, b)),
            Binary::Mul => zip!(s, self, a, b => s.mul(a, b)),
            Binary::Div => zip!(s, self, a, b => s.div(a, b)),
            Binary::Max => zip!(s, self, a, b => s.max(a, b)),
            Binary::Min => zip!(s, self, a, b => s.min(a, b)),
        }
    }
}

fn check_binary(a: &[f32], b: &[f32], y: &[f32]) -> Result<()> {
    expect("binary", "y", &[a.len()], y.len())?;
    if a.len() != b.len() && (b.is_empty() || !a.len().is_multiple_of(b.len())) {
        let what = format!("b of {} elements is no row of a with {}", b.len(), a.len());
        return Err(Error::Value { op: "binary", what });
    }
    Ok(())
}

/// The shape of an operation on two shapes.
///
/// # Errors
/// [`Error::Value`] where two dimensions differ and neither is 1.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let dim = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |i| shape[i]);
    (0..rank)
        .map(|i| match (dim(a, i), dim(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(Error::Value {
                op: "binary_broadcast",
                what: format!("shapes {a:?} and {b:?} do not go together"),
            }),
        })
        .collect()
}

/// Strides of `shape` in `out`, zero where a dimension is repeated.
fn broadcast_strides(shape: &[usize], out: &[usize]) -> Vec<usize> {
    let missing = out.len() - shape.len();
    let mut strides = vec![0; out.len()];
    let mut step = 1;
    for i in (0..shape.len()).rev() {
        strides[missing + i] = if shape[i] == 1 { 0 } else { step };
        step *= shape[i];
    }
    strides
}

/// `y = f(a, b)` with broadcasting; `y` has the shape of [`broadcast_shape`].
///
/// # Errors
/// [`Error::Size`] or [`Error::Value`] where operands do not fit.
pub fn binary_broadcast(
    cpu: &Cpu,
    f: Binary,
    a: &[f32],
    a_shape: &[usize],
    b: &[f32],
    b_shape: &[usize],
    y: &mut [f32],
) -> Result<()> {
    let shape = check_broadcast(a, a_shape, b, b_shape, y)?;
    let row = &b_shape[b_shape.iter().take_while(|&&d| d == 1).count()..];
    if shape == a_shape && shape.ends_with(row) {
        return binary(cpu, f, a, b, y);
    }
    let Some((&width, outer)) = shape.split_last().filter(|_| !y.is_empty()) else {
        return binary_broadcast_twin(f, a, a_shape, b, b_shape, y);
    };
    let (a_strides, b_strides) = (broadcast_strides(a_shape, &shape), broadcast_strides(b_shape, &shape));
    let (a_step, b_step) = (a_strides[outer.len()], b_strides[outer.len()]);
    let out = SharedMut::new(y);
    for_rows(cpu, out_rows(outer), width, &|rows| {
        for row in rows {
            let (mut rest, mut ai, mut bi) = (row, 0, 0);
            for d in (0..outer.len()).rev() {
                ai += rest % outer[d] * a_strides[d];
                bi += rest % outer[d] * b_strides[d];
                rest /= outer[d];
            }
            // SAFETY: inside `y` as checked; row `row` belongs to this task.
            let y = unsafe { out.slice(row * width..(row + 1) * width) };
            if a_step == 1 {
                let b = if b_step == 1 { &b[bi..bi + width] } else { &b[bi..bi + 1] };
                cpu.isa().run(Zip { f, a: &a[ai..ai + width], b, y });
            } else {
                for (j, y) in y.iter_mut().enumerate() {
                    *y = apply(f, a[ai + j * a_step], b[bi + j * b_step]);
                }
            }
        }
    });
    Ok(())
}

/// Rows of an output with these outer dimensions.
fn out_rows(outer: &[usize]) -> usize {
    outer.iter().product()
}

fn check_broadcast(
    a: &[f32],
    a_shape: &[usize],
    b: &[f32],
    b_shape: &[usize],
    y: &[f32],
) -> Result<Vec<usize>> {
    const OP: &str = "binary_broadcast";
    expect(OP, "a", a_shape, a.len())?;
    expect(OP, "b", b_shape, b.len())?;
    let shape = broadcast_shape(a_shape, b_shape)?;
    count(OP, "y", &shape)?;
    expect(OP, "y", &shape, y.len())?;
    Ok(shape)
}

/// The scalar twin of [`unary`], in f64 except for the one-rounding functions.
pub fn unary_twin(f: Unary, x: &[f32], y: &mut [f32]) -> Result<()> {
    expect("unary", "y", &[x.len()], y.len())?;
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    for (y, &x) in y.iter_mut().zip(x) {
        let v = f64::from(x);
        *y = match f {
            Unary::Silu => (v / (1.0 + (-v).exp())) as f32,
            Unary::Gelu => gelu_f64(v) as f32,
            Unary::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
                (0.5 * v * (1.0 + inner.tanh())) as f32
            }
            Unary::Relu => {
                if x > 0.0 || x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Unary::Sigmoid => sigmoid(v) as f32,
            Unary::Tanh => v.tanh() as f32,
            Unary::Erf => erf_f64(v) as f32,
            Unary::Exp => v.exp() as f32,
            Unary::Log => v.ln() as f32,
            Unary::Sqrt => v.sqrt() as f32,
            Unary::Rsqrt => (1.0 / v.sqrt()) as f32,
            Unary::Recip => 1.0 / x,
            Unary::Neg => -x,
            Unary::Abs => x.abs(),
            Unary::Square => x * x,
        };
    }
    Ok(())
}

fn apply(f: Binary, a: f32, b: f32) -> f32 {
    match f {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Max => {
            if a > b {
                a
            } else {
                b
            }
        }
        Binary::Min => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

/// The scalar twin of [`binary`].
pub fn binary_twin(f: Binary, a: &[f32], b: &[f32], y: &mut [f32]) -> Result<()> {
    check_binary(a, b, y)?;
    for (i, (y, &a)) in y.iter_mut().zip(a).enumerate() {
        *y = apply(f, a, b[i % b.len()]);
    }
    Ok(())
}

/// The scalar twin of [`binary_broadcast`].
pub fn binary_broadcast_twin(
    f: Binary,
    a: &[f32],
    a_shape: &[usize],
    b: &[f32],
    b_shape: &[usize],
    y: &mut [f32],
) -> Result<()> {
    let shape = check_broadcast(a, a_shape, b, b_shape, y)?;
    let (a_strides, b_strides) = (broadcast_strides(a_shape, &shape), broadcast_strides(b_shape, &shape));
    for (i, y) in y.iter_mut().enumerate() {
        let (mut rest, mut ai, mut bi) = (i, 0, 0);
        for d in (0..shape.len()).rev() {
            let index = rest % shape[d];
            rest /= shape[d];
            ai += index * a_strides[d];
            bi += index * b_strides[d];
        }
        *y = apply(f, a[ai], b[bi]);
    }
    Ok(())
}

/// The error function in f64: its Taylor series near zero, else the continued fraction of its complement.
pub(crate) fn erf_f64(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    if a < 2.5 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while f64::abs(term) > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    if a > 6.0 {
        return x.signum();
    }
    let fraction = (1..=60).rev().fold(a, |f, n| a + f64::from(n) / 2.0 / f);
    let complement = (-a * a).exp() / (fraction * std::f64::consts::PI.sqrt());
    (1.0 - complement).copysign(x)
}

/// GELU with the exact error function, in f64.
pub(crate) fn gelu_f64(x: f64) -> f64 {
    if x < -8.0 * std::f64::consts::SQRT_2 {
        // The factor is below 1e-28; minus infinity times zero would be NaN.
        return if x == f64::NEG_INFINITY { f64::NAN } else { -0.0 };
    }
    0.5 * x * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))
}

#[cfg(test)]
#[path = "elementwise_tests.rs"]
mod tests;
