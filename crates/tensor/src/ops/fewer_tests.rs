use super::*;
use crate::Weight;
use crate::ops::check::{Close, check, try_check, values};
use crate::ops::linear::linear_by;
use crate::ops::{
    Epilogue, FrameConv, FrameNorm, Part, conv_frames, conv_frames_fewer_scratch_bytes, conv_frames_twin,
    linear_fewer, linear_fewer_scratch_bytes, linear_twin,
};

/// Sums of integers have no rounding: a scheme is right or it is not.
const EXACT: Close = Close { relative: 0.0, absolute: 0.0 };
const CLOSE: Close = Close { relative: 2e-5, absolute: 1e-4 };

/// Integers of at most four bits.
fn integers(n: usize, seed: u64) -> Vec<f32> {
    values(n, seed).iter().map(|v| (v * 8.0).round()).collect()
}

/// `x: [m, k]` times `w: [n, k]` by a scheme, with pairs of steps and without, against the twin.
fn compare(scheme: &Scheme, size: [usize; 3]) -> Result<(), String> {
    compare_as_it_is(&scheme.clone().with_pairs(true), size)?;
    compare_as_it_is(scheme, size)
}

fn compare_as_it_is(scheme: &Scheme, [m, k, n]: [usize; 3]) -> Result<(), String> {
    let (x, w) = (integers(m * k, 1), integers(n * k, 2));
    let parts = [Part { weight: Weight::F32(&w), rows: n, bias: None }];
    let mut wanted = vec![0.0; m * n];
    linear_twin(&x, m, k, &parts, Epilogue::None, &mut wanted).unwrap();
    try_check(&wanted, EXACT, &|cpu, y| linear_by(cpu, scheme, (&x, k), [m, k], &parts, Epilogue::None, y))
}

#[test]
fn seven_products_give_what_eight_give() {
    // One row and one position, blocks that end inside of a tile and a panel, more than one block of each kind.
    for size in [[1, 2, 2], [2, 32, 32], [3, 6, 10], [7, 34, 130], [131, 40, 62], [9, 1060, 70], [5, 8, 1100]]
    {
        let [_, k, n] = size;
        compare(&Scheme::plain(k, n), size).unwrap();
        compare(&Scheme::plain(k, n).strassen(), size).unwrap();
    }
    compare(&Scheme::plain(64, 64).strassen().strassen(), [37, 64, 64]).unwrap();
}

#[test]
fn a_wrong_sign_is_found() {
    let scheme = Scheme::plain(8, 8).strassen();
    for at in 0..scheme.products.len() {
        let mut wrong = scheme.clone();
        wrong.products[at].x[0].factor *= -1.0;
        assert!(compare(&wrong, [6, 8, 8]).is_err(), "{at} of x");
        let mut wrong = scheme.clone();
        wrong.products[at].b[0].factor *= -1.0;
        assert!(compare(&wrong, [6, 8, 8]).is_err(), "{at} of b");
        let mut wrong = scheme.clone();
        wrong.products[at].y[0].1 *= -1.0;
        assert!(compare(&wrong, [6, 8, 8]).is_err(), "{at} of y");
    }
}

#[test]
fn three_taps_two_frames_apart_need_seven_products_of_nine() {
    for (frames, channels, outputs) in
        [(3, 4, 6), (4, 2, 2), (5, 2, 4), (7, 2, 2), (9, 6, 10), (64, 34, 70), (211, 16, 130)]
    {
        let conv = FrameConv {
            frames,
            channels,
            outputs,
            kernel: 3,
            stride: 2,
            padding: [0, 0],
            groups: 1,
            fewer: false,
        };
        let (out, k) = (conv.out_frames().unwrap(), 3 * channels);
        let (x, w) = (integers(frames * channels, 3), integers(outputs * k, 4));
        let weight = Weight::F32(&w);
        let parts = [Part { weight, rows: outputs, bias: None }];
        let mut wanted = vec![0.0; out * outputs];
        conv_frames_twin(&conv, &x, weight, None, FrameNorm::None, Epilogue::None, &mut wanted).unwrap();
        let seven = Scheme::three_taps(channels, outputs);
        let pairs = seven.clone().with_pairs(true);
        for scheme in [seven.clone(), seven.strassen(), pairs.clone(), pairs.strassen()] {
            check(&format!("{conv:?}"), &wanted, EXACT, &|cpu, y| {
                linear_by(cpu, &scheme, (&x, channels), [out, k], &parts, Epilogue::None, y)
            });
        }
    }
}

#[test]
fn linear_layers_with_fewer_products_match_their_twin() {
    let [m, k, n] = [71, 256, 320];
    let (x, w, bias) = (values(m * k, 5), values(n * k, 6), values(n, 7));
    // The second part begins within a panel.
    let (first, second) = w.split_at(100 * k);
    let parts = [
        Part { weight: Weight::F32(first), rows: 100, bias: None },
        Part { weight: Weight::F32(second), rows: 220, bias: Some(&bias[..220]) },
    ];
    assert!(Scheme::for_linear(&Cpu::new(1).unwrap(), [m, k, n]).is_some());
    for epilogue in [Epilogue::None, Epilogue::Gelu, Epilogue::SwiGlu] {
        let outputs = if epilogue == Epilogue::SwiGlu { n / 2 } else { n };
        let mut wanted = vec![0.0; m * outputs];
        linear_twin(&x, m, k, &parts, epilogue, &mut wanted).unwrap();
        check(&format!("{epilogue:?}"), &wanted, CLOSE, &|cpu, y| {
            linear_fewer(cpu, &x, m, k, &parts, epilogue, y)
        });
    }
    let small = [Part { weight: Weight::F32(&w[..3 * k]), rows: 3, bias: None }];
    let mut wanted = vec![0.0; m * 3];
    linear_twin(&x, m, k, &small, Epilogue::None, &mut wanted).unwrap();
    check("too narrow", &wanted, CLOSE, &|cpu, y| linear_fewer(cpu, &x, m, k, &small, Epilogue::None, y));
}

#[test]
fn pairs_of_steps_err_no_more_where_magnitudes_are_far_apart() {
    let [m, k, n] = [70, 256, 256];
    let (x, w) = (values(m * k, 5), values(n * k, 6));
    let scheme = Scheme::plain(k, n).strassen().with_pairs(true);
    let multiply = |cpu: &Cpu, x: &[f32], w: &[f32]| {
        let mut y = vec![0.0; m * n];
        let parts = [Part { weight: Weight::F32(w), rows: n, bias: None }];
        linear_by(cpu, &scheme, (x, k), [m, k], &parts, Epilogue::None, &mut y).unwrap();
        y
    };
    let scaled = |v: &[f32], by: f32| v.iter().map(|v| v * by).collect::<Vec<_>>();
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa, 2).unwrap();
        // Powers of two are made up for exactly: not one bit differs. By less than a balance sees, errors differ.
        let wanted = multiply(&cpu, &x, &w);
        assert!(multiply(&cpu, &scaled(&x, 1024.0), &scaled(&w, 1.0 / 1024.0)) == wanted, "{isa}");
        assert!(multiply(&cpu, &scaled(&x, 0.75), &scaled(&w, 1.0 / 0.75)) != wanted, "{isa}");
        let threads = Cpu::with_isa(isa, 1).unwrap();
        assert!(multiply(&threads, &x, &w) == wanted, "{isa}: one thread");
    }
}

#[test]
fn convolutions_with_fewer_products_match_their_twin_within_declared_scratch() {
    for (kernel, channels) in [(3, 256), (2, 128)] {
        let conv = FrameConv {
            frames: 150,
            channels,
            outputs: 256,
            kernel,
            stride: 2,
            padding: [0, 0],
            groups: 1,
            fewer: true,
        };
        let (x, w) = (values(150 * channels, 8), values(256 * kernel * channels, 9));
        let (bias, weight) = (values(256, 10), Weight::F32(&w));
        let mut wanted = vec![0.0; conv.out_frames().unwrap() * 256];
        let (bias, norm) = (Some(&bias[..]), FrameNorm::None);
        conv_frames_twin(&conv, &x, weight, bias, norm, Epilogue::Gelu, &mut wanted).unwrap();
        check(&format!("{conv:?}"), &wanted, CLOSE, &|cpu, y| {
            conv_frames(cpu, &conv, &x, weight, bias, norm, Epilogue::Gelu, y)
        });
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(isa, 2).unwrap();
            let declared = conv_frames_fewer_scratch_bytes(&cpu, &conv);
            conv_frames(&cpu, &conv, &x, weight, bias, norm, Epilogue::None, &mut wanted).unwrap();
            assert!(cpu.scratch_bytes() > 0 && cpu.scratch_bytes() <= declared, "{isa}");
            let plain = FrameConv { fewer: false, ..conv };
            assert_eq!(conv_frames_fewer_scratch_bytes(&cpu, &plain), 0);
            let size = [150, 256, 256];
            let linear = linear_fewer_scratch_bytes(&cpu, size);
            assert!(linear >= 4 * Scheme::for_linear(&cpu, size).unwrap().scratch_floats(&cpu));
        }
    }
}
