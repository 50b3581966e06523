//! Elementary functions of vectors. Coefficients are Chebyshev fits made for this file; the error bounds are
//! checked by tests against f64.

use super::Simd;

/// `exp(x)`, error below 2 units in the last place; subnormal results are kept, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Beyond the bounds the result is zero or infinity anyway. NaN goes through `max` and `min` as second operand.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    // x = n ln 2 + r with ln 2 in two parts, the first short enough that its multiples are exact.
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.392_617_6e-3);
    for c in [8.363_173e-3, 4.166_655_5e-2, 1.666_657_7e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(s.mul(r, r), p, r);
    s.scale2(s.add(p, s.splat(1.0)), n)
}

/// `2^x` for `x` of at most 126, relative error below 4e-7 where the result is a normal number.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    // NaN goes through as second operand.
    let x = s.max(s.splat(-200.0), x);
    let n = s.round(x);
    let p = polynomial(s, s.sub(x, n), EXP2);
    s.scale2(p, n)
}

/// `2^x` for `x` in -0.5..=0.5, relative error below 2e-7.
const EXP2: [f32; 6] = [1.327_646_7e-3, 9.675_541e-3, 5.550_713_5e-2, 2.402_212e-1, 6.931_469e-1, 1.0];

/// `2^x` for numbers that are rounded to integers afterwards: relative error below 4e-6, and what is below 2^-20 may be
/// anything below that. `x` at most 126.
#[inline(always)]
pub(crate) fn exp2_to_integers<S: Simd>(s: S, x: S::V) -> S::V {
    // NaN goes through as second operand.
    let x = s.max(s.splat(-24.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let mut p = s.splat(9.570_101e-3);
    for c in [5.591_786e-2, 2.402_474_5e-1, 6.931_218e-1, 0.999_999_3] {
        p = s.fma(p, r, s.splat(c));
    }
    s.scale2(p, n)
}

/// `1 / (1 + exp(-x))`
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// `x / (1 + exp(-x))`
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// The polynomial with the given coefficients, the highest power first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, coefficients: [f32; N]) -> S::V {
    let mut p = s.splat(coefficients[0]);
    for i in 1..N {
        p = s.fma(p, x, s.splat(coefficients[i]));
    }
    p
}

/// The error function, absolute error below 1e-7.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let minus = s.sub(s.splat(0.0), x);
    let a = s.max(minus, x);
    // Near zero: x P(x^2).
    let near = s.mul(
        x,
        polynomial(
            s,
            s.mul(x, x),
            [
                7.875_875e-5,
                -8.016_864e-4,
                5.189_087_4e-3,
                -2.685_421_2e-2,
                1.128_359_5e-1,
                -3.761_262_7e-1,
                std::f32::consts::FRAC_2_SQRT_PI,
            ],
        ),
    );
    // Elsewhere: 1 - exp(Q(|x|)); beyond 4 that is 1.
    let q = polynomial(
        s,
        s.min(s.splat(4.0), a),
        [
            1.637_151_4e-6,
            -4.605_805e-5,
            5.968_056e-4,
            -4.759_596e-3,
            2.642_113_6e-2,
            -1.100_800_8e-1,
            -6.318_26e-1,
            -1.130_233_4,
            3.201_380_5e-4,
        ],
    );
    let far = s.sub(s.splat(1.0), exp(s, q));
    let far = s.select_gt(s.splat(0.0), x, s.sub(s.splat(0.0), far), far);
    s.select_gt(a, s.splat(1.0), far, near)
}

/// `0.5 x (1 + erf(x / sqrt 2))`, absolute error below 1e-7 besides half a unit of the result.
///
/// With `P` the distribution function of the normal distribution that is `max(x, 0) - |x| P(-|x|)`, and `P(-|x|)` is two to
/// the power of a polynomial: no digits are lost near zero, and the tail needs no case of its own.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    // NaN goes through `max` and `min` as second operand.
    let minus = s.min(s.sub(s.splat(0.0), x), x);
    // Minus infinity gives NaN here, as the reference's formula does.
    let positive = s.fma(s.splat(0.5), x, s.mul(s.splat(-0.5), minus));
    let minus = s.max(s.splat(-6.0), minus);
    let mut q = s.splat(-1.991_893_7e-6);
    for c in [
        -2.927_192_7e-5,
        -1.380_878_1e-4,
        2.534_377_9e-4,
        7.216_391_6e-3,
        5.260_305e-2,
        -4.591_722_2e-1,
        1.151_109_7,
        -9.999_999e-1,
    ] {
        q = s.fma(q, minus, s.splat(c));
    }
    let n = s.round(q);
    let r = s.sub(q, n);
    let mut p = s.splat(1.327_646_7e-3);
    for c in [9.675_541e-3, 5.550_713_5e-2, 2.402_212e-1, 6.931_469e-1, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.fma(minus, s.scale2(p, n), positive)
}

/// `tanh(x)`, relative error below 3e-7.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // (1 - e) / (1 + e) with e = exp(-2 |x|) loses digits near zero, where the series takes over.
    let zero = s.splat(0.0);
    let a = s.max(s.sub(zero, x), x);
    let e = exp(s, s.mul(s.splat(-2.0), a));
    let far = s.div(s.sub(s.splat(1.0), e), s.add(s.splat(1.0), e));
    let far = s.select_gt(zero, x, s.sub(zero, far), far);
    let x2 = s.mul(x, x);
    let series =
        polynomial(s, x2, [-1382.0 / 155_925.0, 62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 0.0]);
    let near = s.fma(s.mul(x, series), s.splat(1.0), x);
    s.select_gt(a, s.splat(0.35), far, near)
}

/// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let cube = s.mul(s.mul(x, x), x);
    let inner = s.mul(s.splat(0.797_884_6), s.fma(s.splat(0.044_715), cube, x));
    s.mul(s.mul(s.splat(0.5), x), s.add(s.splat(1.0), tanh(s, inner)))
}
