use super::*;
use crate::ops::check::{Close, check, try_check, values};

const CLOSE: Close = Close { relative: 2e-5, absolute: 1e-5 };

fn conv(frames: usize, channels: usize, outputs: usize, kernel: usize, stride: usize) -> FrameConv {
    FrameConv { frames, channels, outputs, kernel, stride, padding: [0, 0], groups: 1, fewer: false }
}

fn compare(c: &FrameConv) {
    let x = values(c.frames * c.channels, 1);
    let weight = values(c.outputs * c.kernel * c.channels / c.groups, 2);
    let (bias, scale, shift) = (values(c.outputs, 3), values(c.outputs, 4), values(c.outputs, 5));
    let out = c.out_frames().unwrap();
    let norms = [
        FrameNorm::None,
        FrameNorm::Layer { weight: &scale, bias: &shift, eps: 1e-5 },
        FrameNorm::Instance { weight: &scale, bias: &shift, eps: 1e-5 },
    ];
    for norm in norms {
        // A single channel or frame normalises to its bias, whatever rounding says.
        let alone = if matches!(norm, FrameNorm::Layer { .. }) { c.outputs } else { out };
        if alone < 3 && !matches!(norm, FrameNorm::None) {
            continue;
        }
        for (bias, epilogue) in [(None, Epilogue::Gelu), (Some(bias.as_slice()), Epilogue::None)] {
            let mut wanted = vec![0.0; out * c.outputs];
            conv_frames_twin(c, &x, Weight::F32(&weight), bias, norm, epilogue, &mut wanted).unwrap();
            check(&format!("{c:?} {norm:?}"), &wanted, CLOSE, &|cpu, y| {
                conv_frames(cpu, c, &x, Weight::F32(&weight), bias, norm, epilogue, y)
            });
        }
    }
}

#[test]
fn convolutions_over_frames_match_their_twin() {
    compare(&conv(1, 1, 1, 1, 1));
    compare(&conv(400, 1, 33, 10, 5));
    compare(&conv(61, 32, 20, 3, 2));
    compare(&conv(9, 32, 70, 2, 2));
    compare(&conv(40, 3, 5, 4, 7));
    compare(&FrameConv { padding: [2, 1], ..conv(30, 7, 19, 4, 1) });
    compare(&FrameConv { padding: [0, 5], ..conv(3, 2, 4, 6, 3) });
}

#[test]
fn grouped_convolutions_over_frames_match_their_twin() {
    compare(&FrameConv { padding: [8, 7], groups: 4, ..conv(70, 48, 48, 16, 1) });
    compare(&FrameConv { padding: [7, 7], groups: 3, ..conv(11, 6, 9, 15, 1) });
    compare(&FrameConv { padding: [1, 0], groups: 2, ..conv(50, 4, 6, 3, 2) });
}

#[test]
fn half_precision_weights_are_widened() {
    for groups in [1, 2] {
        let c = FrameConv { groups, ..conv(20, 4, 6, 3, 1) };
        let x = values(80, 1);
        let weight: Vec<u16> =
            values(6 * 3 * 4 / groups, 2).iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let mut wanted = vec![0.0; 18 * 6];
        let run = Weight::BF16(&weight);
        conv_frames_twin(&c, &x, run, None, FrameNorm::None, Epilogue::Relu, &mut wanted).unwrap();
        check("bf16", &wanted, CLOSE, &|cpu, y| {
            conv_frames(cpu, &c, &x, run, None, FrameNorm::None, Epilogue::Relu, y)
        });
    }
}

#[test]
fn a_folded_norm_of_a_loud_offset_keeps_its_digits() {
    // The mean is a thousand times the spread: sums of squares in f32 would have nothing left.
    let c = conv(20_000, 1, 24, 10, 5);
    let x: Vec<f32> = values(20_000, 1).iter().map(|v| 30.0 + 0.03 * v).collect();
    let (weight, scale, shift) = (values(240, 2), values(24, 3), values(24, 4));
    let norm = FrameNorm::Instance { weight: &scale, bias: &shift, eps: 1e-5 };
    let mut wanted = vec![0.0; c.out_frames().unwrap() * 24];
    conv_frames_twin(&c, &x, Weight::F32(&weight), None, norm, Epilogue::None, &mut wanted).unwrap();
    check("offset", &wanted, Close { relative: 1e-3, absolute: 2e-3 }, &|cpu, y| {
        conv_frames(cpu, &c, &x, Weight::F32(&weight), None, norm, Epilogue::None, y)
    });
}

#[test]
fn one_frame_too_late_is_noticed() {
    let c = FrameConv { padding: [2, 1], ..conv(30, 7, 19, 4, 1) };
    let (x, weight) = (values(210, 1), values(19 * 28, 2));
    let mut wanted = vec![0.0; 30 * 19];
    let w = Weight::F32(&weight);
    conv_frames_twin(&c, &x, w, None, FrameNorm::None, Epilogue::None, &mut wanted).unwrap();
    let late = FrameConv { padding: [1, 2], ..c };
    let run =
        |cpu: &Cpu, y: &mut [f32]| conv_frames(cpu, &late, &x, w, None, FrameNorm::None, Epilogue::None, y);
    assert!(try_check(&wanted, CLOSE, &run).is_err());
}

#[test]
fn sizes_that_do_not_fit_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    let run = |c: &FrameConv, x: &[f32], w: &[f32], y: &mut [f32]| {
        conv_frames(&cpu, c, x, Weight::F32(w), None, FrameNorm::None, Epilogue::None, y)
    };
    let c = conv(4, 1, 1, 3, 1);
    assert!(run(&c, &[0.0; 4], &[0.0; 3], &mut [0.0; 2]).is_ok());
    assert!(matches!(run(&c, &[0.0; 3], &[0.0; 3], &mut [0.0; 2]), Err(Error::Size { operand: "x", .. })));
    assert!(matches!(
        run(&c, &[0.0; 4], &[0.0; 4], &mut [0.0; 2]),
        Err(Error::Size { operand: "weight", .. })
    ));
    for wrong in [
        FrameConv { kernel: 5, ..c },
        FrameConv { stride: 0, ..c },
        FrameConv { kernel: 0, ..c },
        FrameConv { groups: 0, ..c },
        FrameConv { groups: 2, ..c },
        FrameConv { padding: [usize::MAX, 1], ..c },
    ] {
        assert!(
            matches!(run(&wrong, &[0.0; 4], &[0.0; 3], &mut [0.0; 2]), Err(Error::Value { .. })),
            "{wrong:?}"
        );
    }
}
