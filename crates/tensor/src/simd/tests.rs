use super::*;

/// Applies a vector function to values, in every instruction set.
struct Apply<'a, F> {
    f: F,
    x: &'a [f32],
    y: &'a mut [f32],
}

/// A vector function; a trait, because closures cannot be generic.
trait Function: Copy {
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V;
}

impl<F: Function> Kernel for Apply<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in (0..self.x.len()).step_by(S::WIDTH) {
            let n = (self.x.len() - i).min(S::WIDTH);
            // SAFETY: `n` elements from `i` of both.
            unsafe {
                let v = self.f.of(s, s.load_n(self.x.as_ptr().add(i), n));
                s.store_n(self.y.as_mut_ptr().add(i), n, v);
            }
        }
    }
}

fn apply(isa: Isa, f: impl Function, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    isa.run(Apply { f, x, y: &mut y });
    y
}

#[derive(Clone, Copy)]
struct Exp;
impl Function for Exp {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::exp(s, x)
    }
}

#[derive(Clone, Copy)]
struct Erf;
impl Function for Erf {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::erf(s, x)
    }
}

#[derive(Clone, Copy)]
struct Tanh;
impl Function for Tanh {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::tanh(s, x)
    }
}

/// Evenly spaced values.
fn range(from: f32, to: f32, n: usize) -> Vec<f32> {
    (0..n).map(|i| from + (to - from) * i as f32 / (n - 1) as f32).collect()
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let x = range(-87.0, 88.7, 200_001);
    for isa in Isa::available() {
        let worst = apply(isa, Exp, &x)
            .iter()
            .zip(&x)
            .map(|(&y, &x)| {
                let wanted = f64::from(x).exp();
                let unit = f64::from((wanted as f32).next_up() - wanted as f32);
                (f64::from(y) - wanted).abs() / unit
            })
            .fold(0.0, f64::max);
        assert!(worst < 2.0, "{isa}: {worst} units");
    }
}

#[derive(Clone, Copy)]
struct Exp2ToIntegers;
impl Function for Exp2ToIntegers {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::exp2_to_integers(s, x)
    }
}

#[test]
fn powers_of_two_that_become_integers_are_exact_enough_for_that() {
    let x = range(-23.9, 16.0, 100_001);
    for isa in Isa::available() {
        let y = apply(isa, Exp2ToIntegers, &x);
        let error = |(y, x): (&f32, &f32)| (f64::from(*y) / f64::from(*x).exp2() - 1.0).abs();
        let worst = y.iter().zip(&x).map(error).fold(0.0, f64::max);
        assert!(worst < 4e-6, "{isa}: {worst}");
        let special = apply(isa, Exp2ToIntegers, &[f32::NEG_INFINITY, -1e9, f32::NAN, 0.0]);
        assert!(special[0] < 1e-6 && special[1] < 1e-6 && special[2].is_nan());
        assert!((special[3] - 1.0).abs() < 4e-6);
    }
}

#[derive(Clone, Copy)]
struct Exp2;
impl Function for Exp2 {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::exp2(s, x)
    }
}

#[test]
fn powers_of_two_are_within_4e_7_and_vanish_at_minus_infinity() {
    let x = range(-126.0, 126.0, 100_001);
    for isa in Isa::available() {
        let error = |(y, x): (&f32, &f32)| (f64::from(*y) / f64::from(*x).exp2() - 1.0).abs();
        let worst = apply(isa, Exp2, &x).iter().zip(&x).map(error).fold(0.0, f64::max);
        assert!(worst < 4e-7, "{isa}: {worst}");
        let special = apply(isa, Exp2, &[f32::NEG_INFINITY, -1e9, f32::NAN, 0.0]);
        assert!(special[0] == 0.0 && special[1] == 0.0 && special[2].is_nan() && special[3] == 1.0);
    }
}

struct StoreBytes<'a>(&'a [f32], &'a mut [i8]);
impl Kernel for StoreBytes<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in (0..self.0.len()).step_by(S::WIDTH) {
            // SAFETY: both are as long, a multiple of every width.
            unsafe { s.store_i8(self.1.as_mut_ptr().add(i), s.load(self.0.as_ptr().add(i))) };
        }
    }
}

#[test]
fn integers_are_stored_as_bytes() {
    let x: Vec<f32> = (-128..128).map(|i| i.max(-127) as f32).collect();
    for isa in Isa::available() {
        let mut bytes = vec![0i8; x.len()];
        isa.run(StoreBytes(&x, &mut bytes));
        assert!(bytes.iter().zip(&x).all(|(&b, &x)| f32::from(b) == x), "{isa}");
    }
}

#[test]
fn exp_keeps_subnormal_results_and_special_values() {
    let x =
        [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -0.0, -95.0, -103.0, -104.0, -1e30, 88.8, 1e30, 88.72];
    for isa in Isa::available() {
        let y = apply(isa, Exp, &x);
        assert_eq!((y[0], y[1], y[3]), (0.0, f32::INFINITY, 1.0), "{isa}");
        assert!(y[2].is_nan());
        for (y, x) in y[4..6].iter().zip(&x[4..6]) {
            let wanted = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - wanted).abs() <= 1.5e-45 + wanted * 1e-6,
                "{isa}: {y:e}, wanted {wanted:e}"
            );
        }
        assert_eq!((y[6], y[7], y[8], y[9]), (0.0, 0.0, f32::INFINITY, f32::INFINITY), "{isa}");
        assert!(y[10].is_finite() && y[10] > 3e38);
    }
}

#[test]
fn erf_is_within_1e_7() {
    let x = range(-6.0, 6.0, 100_001);
    for isa in Isa::available() {
        for (y, x) in apply(isa, Erf, &x).iter().zip(&x) {
            let wanted = crate::ops::erf_f64(f64::from(*x));
            // Near one a unit of f32 is 6e-8, so half of one is added to the bound.
            assert!((f64::from(*y) - wanted).abs() < 1e-7 + 6e-8, "{isa} at {x}: {y}, wanted {wanted}");
        }
    }
}

#[derive(Clone, Copy)]
struct Gelu;
impl Function for Gelu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        math::gelu(s, x)
    }
}

#[test]
fn gelu_is_within_1e_7_and_half_a_unit() {
    let mut x = range(-12.0, 12.0, 200_001);
    x.extend([-1e30, -1e-30, 1e-30, 1e30, 3e38]);
    let (not_finite, wanted) =
        ([f32::NEG_INFINITY, f32::INFINITY, f32::NAN], [f32::NAN, f32::INFINITY, f32::NAN]);
    for isa in Isa::available() {
        for (y, x) in apply(isa, Gelu, &x).iter().zip(&x) {
            let wanted = crate::ops::gelu_f64(f64::from(*x));
            let bound = 1e-7 + wanted.abs() * f64::from(f32::EPSILON) / 2.0;
            assert!((f64::from(*y) - wanted).abs() <= bound, "{isa} at {x}: {y}, wanted {wanted}");
        }
        let y = apply(isa, Gelu, &not_finite);
        assert!(
            y.iter().zip(wanted).all(|(y, w)| y.total_cmp(&w).is_eq() || y.is_nan() && w.is_nan()),
            "{isa}: {y:?}"
        );
    }
}

#[test]
fn tanh_is_within_3e_7_relative() {
    let x = range(-12.0, 12.0, 100_002);
    for isa in Isa::available() {
        for (y, x) in apply(isa, Tanh, &x).iter().zip(&x) {
            let wanted = f64::from(*x).tanh();
            assert!((f64::from(*y) / wanted - 1.0).abs() < 3e-7, "{isa} at {x}: {y}, wanted {wanted}");
        }
    }
}

/// Widens every 16-bit pattern.
struct Widen<E>(Vec<E>);

impl<E: Element> Kernel for Widen<E> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut y = vec![0.0; self.0.len()];
        for i in (0..y.len()).step_by(S::WIDTH) {
            // SAFETY: the number of patterns is a multiple of the width.
            unsafe { s.store(y.as_mut_ptr().add(i), E::load(s, self.0.as_ptr().add(i))) };
        }
        y
    }
}

#[test]
fn every_half_precision_pattern_widens_exactly() {
    let same = |y: f32, wanted: f32| y == wanted && y.is_sign_negative() == wanted.is_sign_negative();
    for isa in Isa::available() {
        let y = isa.run(Widen((0..=u16::MAX).map(f16::from_bits).collect()));
        for (bits, y) in y.into_iter().enumerate() {
            let wanted = f16::from_bits(bits as u16).to_f32();
            assert!(same(y, wanted) || y.is_nan() && wanted.is_nan(), "{isa}: {bits:#x} gave {y}");
        }
        let y = isa.run(Widen((0..=u16::MAX).map(bf16::from_bits).collect()));
        for (bits, y) in y.into_iter().enumerate() {
            assert_eq!(y.to_bits(), (bits as u32) << 16, "{isa}");
        }
    }
}

/// Transposes one block.
struct Transpose<'a, E> {
    src: &'a [E],
    stride: usize,
    dst: &'a mut [f32],
    dst_stride: usize,
}

impl<E: Element> Kernel for Transpose<'_, E> {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        // SAFETY: the test gives room for 16 rows.
        unsafe { s.transpose(self.src.as_ptr(), self.stride, self.dst.as_mut_ptr(), self.dst_stride) };
        S::WIDTH
    }
}

#[test]
fn transposed_blocks_have_rows_and_columns_exchanged() {
    let (stride, dst_stride) = (19, 23);
    let values: Vec<f32> = (0..16 * stride).map(|i| i as f32).collect();
    let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
    for isa in Isa::available() {
        let mut wide = vec![-1.0; 16 * dst_stride];
        let mut narrow = wide.clone();
        let n = isa.run(Transpose { src: &values, stride, dst: &mut wide, dst_stride });
        isa.run(Transpose { src: &halves, stride, dst: &mut narrow, dst_stride });
        for c in 0..16 {
            for r in 0..dst_stride {
                let inside = c < n && r < n;
                let at = r * stride + c;
                assert_eq!(wide[c * dst_stride + r], if inside { values[at] } else { -1.0 }, "{isa} {r} {c}");
                assert_eq!(
                    narrow[c * dst_stride + r],
                    if inside { halves[at].to_f32() } else { -1.0 },
                    "{isa}"
                );
            }
        }
    }
}

#[test]
fn the_detected_instruction_set_is_the_first_available() {
    assert_eq!(Isa::detect(), Isa::available()[0]);
    assert!(Isa::available().contains(&Isa::Scalar));
}
