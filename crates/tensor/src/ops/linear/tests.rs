use half::{bf16, f16};

use super::*;
use crate::ops::check::{Close, F32, check, try_check, values};

/// The same values in the three stored types.
struct Stored {
    f32s: Vec<f32>,
    f16s: Vec<u16>,
    bf16s: Vec<u16>,
}

impl Stored {
    fn new(n: usize, seed: u64) -> Stored {
        let f32s = values(n, seed);
        let f16s = f32s.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
        let bf16s = f32s.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
        Stored { f32s, f16s, bf16s }
    }

    fn all(&self) -> [Weight<'_>; 3] {
        [Weight::F32(&self.f32s), Weight::F16(&self.f16s), Weight::BF16(&self.bf16s)]
    }
}

/// Sums of `k` products of values below 1 differ by a few roundings of their size.
fn close(k: usize) -> Close {
    Close { relative: 1e-5, absolute: 2e-7 * (k as f32).sqrt() * 4.0 + F32.absolute }
}

fn compare_with_twin(case: &str, m: usize, k: usize, parts: &[Part<'_>], epilogue: Epilogue) {
    let x = values(m * k, 7);
    let n: usize = parts.iter().map(|p| p.rows).sum();
    let outputs = if epilogue == Epilogue::SwiGlu { n / 2 } else { n };
    let mut wanted = vec![0.0; m * outputs];
    linear_twin(&x, m, k, parts, epilogue, &mut wanted).unwrap();
    check(case, &wanted, close(k), &|cpu, y| linear(cpu, &x, m, k, parts, epilogue, y));
}

#[test]
fn linear_matches_its_twin_for_all_shapes_and_types() {
    let shapes = [
        (1, 1, 1),
        (1, 17, 3),
        (2, 33, 65),
        (3, 64, 100),
        (4, 100, 31),
        (5, 1, 16),
        (6, 31, 1),
        (7, 65, 33),
        (13, 16, 32),
        (14, 100, 64),
        (15, 63, 127),
        (16, 513, 129),
        (29, 64, 257),
        (64, 17, 130),
        (100, 48, 48),
    ];
    for (m, k, n) in shapes {
        let stored = Stored::new(n * k, 5);
        for weight in stored.all() {
            let parts = [Part { weight, rows: n, bias: None }];
            compare_with_twin(
                &format!("{:?} bytes {m}x{k}x{n}", weight.size()),
                m,
                k,
                &parts,
                Epilogue::None,
            );
        }
    }
}

#[test]
fn many_rows_and_long_sums_are_blocked_correctly() {
    let (m, k, n) = (530, 1100, 40);
    let stored = Stored::new(n * k, 5);
    let parts = [Part { weight: stored.all()[2], rows: n, bias: None }];
    compare_with_twin("blocked", m, k, &parts, Epilogue::None);
}

#[test]
fn parts_biases_and_epilogues_match_their_twin() {
    for m in [1, 3, 9, 40] {
        for rows in [[5, 1, 30], [16, 32, 64], [128, 7, 129]] {
            let k = 37;
            let stored: Vec<Stored> = rows.iter().map(|&r| Stored::new(r * k, r as u64)).collect();
            let biases: Vec<Vec<f32>> = rows.iter().map(|&r| values(r, 90 + r as u64)).collect();
            let part = |i: usize, bias: bool| Part {
                weight: stored[i].all()[i],
                rows: rows[i],
                bias: bias.then_some(biases[i].as_slice()),
            };
            let parts = [part(0, true), part(1, false), part(2, true)];
            for epilogue in [Epilogue::None, Epilogue::Gelu, Epilogue::Silu, Epilogue::Relu] {
                compare_with_twin(&format!("m={m} {rows:?} {epilogue:?}"), m, k, &parts, epilogue);
            }
        }
    }
}

#[test]
fn swiglu_matches_its_twin_in_one_and_in_two_parts() {
    for m in [1, 4, 5, 33] {
        for inner in [1, 15, 16, 17, 32, 63, 64, 65, 100, 130] {
            let k = 35;
            let stored = Stored::new(2 * inner * k, inner as u64);
            let bias = values(2 * inner, 8);
            for weight in stored.all() {
                let one = [Part { weight, rows: 2 * inner, bias: Some(&bias) }];
                compare_with_twin(&format!("m={m} one part of {inner}"), m, k, &one, Epilogue::SwiGlu);
                let half = |range: std::ops::Range<usize>| Part {
                    weight: weight.slice(range.start * k..range.end * k).unwrap(),
                    rows: range.len(),
                    bias: Some(&bias[range]),
                };
                let two = [half(0..inner), half(inner..2 * inner)];
                compare_with_twin(&format!("m={m} two parts of {inner}"), m, k, &two, Epilogue::SwiGlu);
            }
        }
    }
}

#[test]
fn infinities_and_nans_reach_exactly_their_outputs() {
    for m in [2, 20] {
        let (k, n) = (50, 70);
        let weight = values(n * k, 1);
        let mut x = values(m * k, 2);
        x[k + 49] = f32::NAN;
        x[0] = f32::INFINITY;
        let parts = [Part { weight: Weight::F32(&weight), rows: n, bias: None }];
        let mut wanted = vec![0.0; m * n];
        linear_twin(&x, m, k, &parts, Epilogue::None, &mut wanted).unwrap();
        assert!(wanted[..n].iter().all(|v| v.is_infinite()) && wanted[n..2 * n].iter().all(|v| v.is_nan()));
        check("specials", &wanted, close(k), &|cpu, y| linear(cpu, &x, m, k, &parts, Epilogue::None, y));
    }
}

#[test]
fn subnormal_weights_of_all_types_are_kept() {
    let (k, n) = (32, 16);
    let f16s = vec![0x0001u16; n * k];
    let bf16s = vec![0x0001u16; n * k];
    for weight in [Weight::F16(&f16s), Weight::BF16(&bf16s)] {
        for m in [1, 16] {
            let x = vec![1.0f32; m * k];
            let parts = [Part { weight, rows: n, bias: None }];
            let wanted = vec![32.0 * weight.get(0).unwrap(); m * n];
            assert!(wanted[0] > 0.0);
            let exact = Close { relative: 0.0, absolute: 0.0 };
            check("subnormal", &wanted, exact, &|cpu, y| linear(cpu, &x, m, k, &parts, Epilogue::None, y));
        }
    }
}

#[test]
fn empty_sizes_give_biases_or_nothing() {
    let bias = [1.5, -2.0, 0.25];
    for m in [1, 6] {
        let parts = [Part { weight: Weight::F32(&[]), rows: 3, bias: Some(&bias) }];
        let wanted = bias.repeat(m);
        check("k = 0", &wanted, F32, &|cpu, y| linear(cpu, &[], m, 0, &parts, Epilogue::None, y));
    }
    check("m = 0", &[], F32, &|cpu, y| linear(cpu, &[], 0, 0, &[], Epilogue::None, y));
}

#[test]
fn a_wrong_weight_is_noticed() {
    let (m, k, n) = (20, 64, 64);
    let (x, weight) = (values(m * k, 1), values(n * k, 2));
    let mut changed = weight.clone();
    changed[n * k - 1] += 0.01;
    let part = |w| [Part { weight: Weight::F32(w), rows: n, bias: None }];
    let mut wanted = vec![0.0; m * n];
    linear_twin(&x, m, k, &part(&weight), Epilogue::None, &mut wanted).unwrap();
    let run = |cpu: &Cpu, y: &mut [f32]| linear(cpu, &x, m, k, &part(&changed), Epilogue::None, y);
    assert!(try_check(&wanted, close(k), &run).is_err());
}

#[test]
fn sizes_that_do_not_fit_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    let weight = [0.0; 6];
    let part = Part { weight: Weight::F32(&weight), rows: 2, bias: None };
    let run = |x: &[f32], m, k, part, epilogue, y: &mut [f32]| linear(&cpu, x, m, k, &[part], epilogue, y);
    assert!(run(&[0.0; 3], 1, 3, part, Epilogue::None, &mut [0.0; 2]).is_ok());
    let size = |r: Result<()>, name: &str| matches!(r, Err(Error::Size { operand, .. }) if operand == name);
    assert!(size(run(&[0.0; 4], 1, 3, part, Epilogue::None, &mut [0.0; 2]), "x"));
    assert!(size(run(&[0.0; 4], 1, 4, part, Epilogue::None, &mut [0.0; 2]), "weight"));
    assert!(size(run(&[0.0; 3], 1, 3, part, Epilogue::None, &mut [0.0; 3]), "y"));
    let short = Part { bias: Some(&[0.0]), ..part };
    assert!(size(run(&[0.0; 3], 1, 3, short, Epilogue::None, &mut [0.0; 2]), "bias"));
    let odd = Part { rows: 1, weight: Weight::F32(&weight[..3]), bias: None };
    assert!(matches!(run(&[0.0; 3], 1, 3, odd, Epilogue::SwiGlu, &mut []), Err(Error::Value { .. })));
    assert!(run(&[], usize::MAX, usize::MAX, part, Epilogue::None, &mut []).is_err());
}

#[test]
fn scratch_stays_within_what_was_declared() {
    for isa in crate::Isa::available() {
        let cpu = Cpu::with_isa(isa, 2).unwrap();
        let (m, k, n) = (60, 700, 300);
        let (x, weight, mut y) = (values(m * k, 1), values(n * k, 2), vec![0.0; m * n]);
        let parts = [Part { weight: Weight::F32(&weight), rows: n, bias: None }];
        linear(&cpu, &x, m, k, &parts, Epilogue::None, &mut y).unwrap();
        assert!(cpu.scratch_bytes() > 0);
        assert!(cpu.scratch_bytes() <= linear_scratch_bytes(&cpu, m, k));
    }
}

#[test]
fn results_that_no_cache_holds_are_those_of_smaller_products() {
    let (m, k, n) = (16_640, 16, 512);
    let (x, w) = (values(m * k, 7), values(n * k, 5));
    let parts = [Part { weight: Weight::F32(&w), rows: n, bias: None }];
    let cpu = Cpu::new(2).unwrap();
    let product = |x: &[f32], y: &mut [f32]| {
        linear(&cpu, x, x.len() / k, k, &parts, Epilogue::Gelu, y).unwrap();
    };
    let (mut whole, mut halves) = (AlignedF32::working(m * n).unwrap(), AlignedF32::working(m * n).unwrap());
    product(&x, &mut whole);
    for (x, y) in x.chunks(m / 2 * k).zip(halves.chunks_mut(m / 2 * n)) {
        product(x, y);
    }
    assert!(whole.iter().zip(halves.iter()).all(|(a, b)| a.to_bits() == b.to_bits()));
    // The first went past the caches, the others did not; nor does what is no whole lines.
    let streams = |y: &mut [f32], rows: usize, offset: usize, chunk: usize| {
        rows::Store::streams(&SharedMut::new(y), rows * n, [n, offset], chunk)
    };
    assert!(streams(&mut whole, m, 0, 64));
    assert!(!streams(&mut whole, m / 2, 0, 64));
    assert!(!streams(&mut whole, m, 8, 64));
    assert!(!streams(&mut whole, m, 0, 48));
    assert!(!streams(&mut whole[1..], m, 0, 64));
}
