use super::*;
use crate::ops::check::{Close, F32, SIZES, awkward, check, compare, try_check, values};

const UNARY: [Unary; 15] = [
    Unary::Silu,
    Unary::Gelu,
    Unary::GeluTanh,
    Unary::Relu,
    Unary::Sigmoid,
    Unary::Tanh,
    Unary::Erf,
    Unary::Exp,
    Unary::Log,
    Unary::Sqrt,
    Unary::Rsqrt,
    Unary::Recip,
    Unary::Neg,
    Unary::Abs,
    Unary::Square,
];

const BINARY: [Binary; 6] = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min];

#[test]
fn unary_functions_match_their_twins_at_every_length() {
    for f in UNARY {
        for n in SIZES.into_iter().chain([5000]) {
            let x: Vec<f32> = values(n, 1).iter().map(|v| v * 9.0).collect();
            let mut wanted = vec![0.0; n];
            unary_twin(f, &x, &mut wanted).unwrap();
            check(&format!("{f:?} of {n}"), &wanted, F32, &|cpu, y| unary(cpu, f, &x, y));
        }
    }
}

#[test]
fn unary_functions_match_their_twins_at_awkward_values() {
    let mut x = awkward();
    for f in UNARY {
        // The tails of these are products of a large and a vanishing factor; we check where they are numbers.
        if matches!(f, Unary::Gelu | Unary::GeluTanh) {
            x.retain(|v| v.is_nan() || v.abs() < 1e10);
        }
        let mut wanted = vec![0.0; x.len()];
        unary_twin(f, &x, &mut wanted).unwrap();
        check(&format!("{f:?}"), &wanted, F32, &|cpu, y| unary(cpu, f, &x, y));
    }
}

#[test]
fn the_error_function_of_the_twin_is_right() {
    // Abramowitz and Stegun, table 7.1.
    for (x, wanted) in
        [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.0, 0.999_977_909_5)]
    {
        assert!((erf_f64(x) - wanted).abs() < 1e-10);
        assert!((erf_f64(-x) + wanted).abs() < 1e-10);
    }
    assert!((erf_f64(2.4999) - erf_f64(2.5001)).abs() < 1e-6);
}

#[test]
fn binary_functions_match_their_twins() {
    for f in BINARY {
        for c in SIZES {
            for r in [1, 3, 400] {
                let a = values(r * c, 1);
                for b in [values(r * c, 2), values(c, 2), values(1, 2)] {
                    let mut wanted = vec![0.0; r * c];
                    binary_twin(f, &a, &b, &mut wanted).unwrap();
                    check(&format!("{f:?} {r}x{c}"), &wanted, F32, &|cpu, y| binary(cpu, f, &a, &b, y));
                }
            }
        }
    }
}

#[test]
fn binary_functions_of_special_values_match_their_twins() {
    let specials = [0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, f32::MAX];
    let a: Vec<f32> = specials.iter().flat_map(|&v| [v; 8]).collect();
    let exact = Close { relative: 0.0, absolute: 0.0 };
    for f in BINARY {
        let mut wanted = vec![0.0; a.len()];
        binary_twin(f, &a, &specials, &mut wanted).unwrap();
        check(&format!("{f:?}"), &wanted, exact, &|cpu, y| binary(cpu, f, &a, &specials, y));
    }
}

#[test]
fn broadcasting_matches_its_twin() {
    let cases: [(&[usize], &[usize]); 10] = [
        (&[3, 5], &[3, 5]),
        (&[3, 5], &[5]),
        (&[3, 5], &[3, 1]),
        (&[3, 1], &[1, 17]),
        (&[5], &[4, 3, 5]),
        (&[2, 1, 65], &[7, 1]),
        (&[2, 3, 4, 5], &[3, 1, 5]),
        (&[], &[4]),
        (&[], &[]),
        (&[0, 3], &[3]),
    ];
    for (a_shape, b_shape) in cases {
        let (a, b) = (values(a_shape.iter().product(), 1), values(b_shape.iter().product(), 2));
        let shape = broadcast_shape(a_shape, b_shape).unwrap();
        let mut wanted = vec![0.0; shape.iter().product()];
        binary_broadcast_twin(Binary::Sub, &a, a_shape, &b, b_shape, &mut wanted).unwrap();
        check(&format!("{a_shape:?} {b_shape:?}"), &wanted, F32, &|cpu, y| {
            binary_broadcast(cpu, Binary::Sub, &a, a_shape, &b, b_shape, y)
        });
    }
}

#[test]
fn broadcasting_by_hand() {
    let cpu = Cpu::new(1).unwrap();
    let mut y = [0.0; 6];
    binary_broadcast(&cpu, Binary::Sub, &[10.0, 20.0], &[2, 1], &[1.0, 2.0, 3.0], &[3], &mut y).unwrap();
    assert_eq!(y, [9.0, 8.0, 7.0, 19.0, 18.0, 17.0]);
}

#[test]
fn another_function_is_noticed() {
    let x = values(100, 1);
    let mut wanted = vec![0.0; 100];
    unary_twin(Unary::Gelu, &x, &mut wanted).unwrap();
    assert!(try_check(&wanted, F32, &|cpu, y| unary(cpu, Unary::GeluTanh, &x, y)).is_err());
    assert!(compare(&wanted, &x, F32).is_err());
}

#[test]
fn sizes_that_do_not_fit_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    assert!(matches!(unary(&cpu, Unary::Exp, &[0.0; 3], &mut [0.0; 2]), Err(Error::Size { .. })));
    assert!(matches!(
        binary(&cpu, Binary::Add, &[0.0; 3], &[0.0; 2], &mut [0.0; 3]),
        Err(Error::Value { .. })
    ));
    assert!(matches!(binary(&cpu, Binary::Add, &[0.0; 3], &[], &mut [0.0; 3]), Err(Error::Value { .. })));
    assert!(binary(&cpu, Binary::Add, &[], &[], &mut []).is_ok());
    let error = broadcast_shape(&[2, 3], &[4, 3]).unwrap_err();
    assert_eq!(error.to_string(), "binary_broadcast: shapes [2, 3] and [4, 3] do not go together");
    let huge = [usize::MAX, 2];
    assert!(binary_broadcast(&cpu, Binary::Add, &[], &huge, &[0.0; 2], &[2], &mut []).is_err());
}

#[test]
fn rows_are_added_to_others() {
    for n in [0, 5, 70_001] {
        let (x, before) = (values(n, 1), values(n, 2));
        let wanted: Vec<f32> = x.iter().zip(&before).map(|(x, y)| x + y).collect();
        check("add_to", &wanted, F32, &|cpu, y| {
            y.copy_from_slice(&before);
            add_to(cpu, &x, y)
        });
    }
    assert!(add_to(&Cpu::new(1).unwrap(), &[0.0; 2], &mut [0.0]).is_err());
}
