use super::*;
use crate::ops::check::values;
use crate::{Isa, KvRows};

/// Heads of ordinary and of awkward values: outliers, offsets, constants, zeros, large and tiny ones.
fn heads(d: usize) -> Vec<Vec<f32>> {
    let plain = values(d, 7);
    let with = |f: &dyn Fn(usize, f32) -> f32| plain.iter().enumerate().map(|(i, &v)| f(i, v)).collect();
    vec![
        plain.clone(),
        with(&|i, v| if i % 13 == 5 { v * 40.0 } else { v }),
        with(&|_, v| v * 1e-3 + 7.0),
        with(&|_, v| -3.0 - v.abs()),
        vec![0.0; d],
        vec![-0.0; d],
        vec![0.3; d],
        vec![-1e30; d],
        with(&|_, v| v * 1e-38),
        with(&|_, v| v * 1e36),
        with(&|i, _| if i == 0 { -1.0 } else { 0.0 }),
    ]
}

/// Largest error of a stored value: half a step, of a scale that is rounded up by at most 1/128, from a range that the
/// minimum's rounding widens by at most 1/128 of its size; and a rounding of f32.
fn bound(format: KvFormat, x: &[f32]) -> f32 {
    const UP: f32 = 1.0 + 1.0 / 128.0;
    let size = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let (least, most) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    let half = match format {
        KvFormat::F32 => 0.0,
        // Half a unit of eleven bits, and of the smallest subnormal number.
        KvFormat::F16 => size / 2048.0 + 3e-8,
        KvFormat::Int8 => size / 127.0 * UP / 2.0,
        KvFormat::Int4 => (most - least + least.abs() / 128.0) / 15.0 * UP / 2.0,
    };
    half * 1.001 + size * 1e-6 + 1e-40
}

fn stored(isa: Isa, x: &[f32], d: usize, format: KvFormat) -> Vec<u8> {
    let mut out = vec![0; format.head_bytes(d).unwrap()];
    kv_store(&Cpu::with_isa(isa, 1).unwrap(), x, d, [1, 1, d], format, &mut out).unwrap();
    out
}

#[test]
fn every_instruction_set_stores_the_bits_of_the_twin() {
    for d in [1, 15, 16, 31, 33, 64, 100, 128] {
        for x in heads(d) {
            for format in KvFormat::ALL {
                let mut wanted = vec![0; format.head_bytes(d).unwrap()];
                kv_store_twin(&x, d, [1, 1, d], format, &mut wanted).unwrap();
                for isa in Isa::available() {
                    assert_eq!(stored(isa, &x, d, format), wanted, "{format} {isa} {d} {x:?}");
                }
            }
        }
    }
}

#[test]
fn values_come_back_within_half_a_step() {
    for d in [1, 16, 33, 64, 128] {
        for x in heads(d) {
            for format in KvFormat::ALL {
                if format == KvFormat::F16 && x.iter().any(|v| v.abs() > 65504.0) {
                    continue;
                }
                let bytes = stored(Isa::detect(), &x, d, format);
                let mut y = vec![0.0; d];
                KvRows::new(format, &bytes, bytes.len()).head(0, 0, &mut y);
                let mut worst = 0f32;
                let shares = if format == KvFormat::Int4 { GROUP4 } else { d };
                for (x, y) in x.chunks(shares).zip(y.chunks(shares)) {
                    let bound = bound(format, x);
                    for (x, y) in x.iter().zip(y) {
                        worst = worst.max((x - y).abs() / bound);
                    }
                }
                assert!(worst <= 1.0, "{format} {d}: {worst} of the bound for {x:?}");
            }
        }
    }
}

#[test]
fn the_bound_is_not_idle() {
    // A step is reached up to its half, so a bound of half as much would fail.
    for format in [KvFormat::F16, KvFormat::Int8, KvFormat::Int4] {
        let x = values(32, 3);
        let bytes = stored(Isa::detect(), &x, 32, format);
        let mut y = vec![0.0; 32];
        KvRows::new(format, &bytes, bytes.len()).head(0, 0, &mut y);
        let worst = x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(worst > bound(format, &x) / 2.0, "{format}: {worst}");
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17, 39] {
            let mut x = values(40, 5);
            x[at] = odd;
            for format in KvFormat::ALL {
                for isa in Isa::available() {
                    let bytes = stored(isa, &x, 40, format);
                    let mut y = vec![0.0; 40];
                    KvRows::new(format, &bytes, bytes.len()).head(0, 0, &mut y);
                    assert!(!y[at].is_finite(), "{format} {isa}: {odd} became {}", y[at]);
                }
            }
        }
    }
}

#[test]
fn rows_with_gaps_are_stored_one_after_the_other() {
    let (t, heads, d, stride) = (7, 3, 20, 70);
    let x = values(t * stride, 9);
    for format in KvFormat::ALL {
        let bytes = format.head_bytes(d).unwrap();
        let mut out = vec![0; t * heads * bytes];
        kv_store(&Cpu::new(2).unwrap(), &x, stride, [t, heads, d], format, &mut out).unwrap();
        for (i, out) in out.chunks(bytes).enumerate() {
            let from = i / heads * stride + i % heads * d;
            assert_eq!(out, stored(Isa::Scalar, &x[from..from + d], d, format), "{format} {i}");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    let x = values(64, 1);
    let run = |shape, stride, n: usize| kv_store(&cpu, &x, stride, shape, KvFormat::Int8, &mut vec![0; n]);
    assert!(run([2, 2, 16], 32, 72).is_ok());
    assert!(matches!(run([2, 2, 16], 32, 71), Err(Error::Size { operand: "out", .. })));
    assert!(matches!(run([3, 2, 16], 32, 108), Err(Error::Size { operand: "x", .. })));
    assert!(matches!(run([2, 2, 16], 31, 72), Err(Error::Value { .. })));
    assert!(run([2, 0, 16], 32, 0).is_err() && run([2, 2, 0], 32, 0).is_err());
    assert!(run([2, 2, usize::MAX], 32, 0).is_err());
}
