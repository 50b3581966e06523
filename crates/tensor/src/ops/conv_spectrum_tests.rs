use super::*;
use crate::ops::check::{Close, check, try_check, values};
use crate::ops::{
    FrameNorm, conv_frames, conv_frames_fewer_scratch_bytes, conv_frames_scratch_bytes, conv_frames_twin,
};
use crate::simd::Isa;
use crate::{Cpu, Weight};

const CLOSE: Close = Close { relative: 2e-5, absolute: 1e-4 };

fn conv(
    frames: usize,
    [channels, outputs, groups]: [usize; 3],
    kernel: usize,
    padding: [usize; 2],
) -> FrameConv {
    FrameConv { frames, channels, outputs, kernel, stride: 1, padding, groups, fewer: true }
}

#[test]
fn spectra_give_what_sums_give() {
    let cases = [
        // One position, a part of a block, whole blocks and one more, odd kernels, none and uneven padding.
        conv(32, [32, 32, 2], 32, [0, 0]),
        conv(1, [32, 32, 2], 33, [16, 16]),
        conv(40, [64, 32, 2], 32, [16, 15]),
        conv(66, [32, 96, 2], 32, [16, 16]),
        conv(67, [32, 32, 2], 32, [0, 31]),
        conv(300, [48, 48, 3], 47, [23, 23]),
        conv(131, [96, 96, 2], 128, [64, 63]),
        // More pairs of blocks than meet a spectrum at once.
        conv(500, [32, 32, 2], 33, [40, 7]),
    ];
    for case in cases {
        assert!(pays(&case), "{case:?}");
        let taps = case.kernel * case.channels / case.groups;
        let (x, w) = (values(case.frames * case.channels, 1), values(case.outputs * taps, 2));
        let w: Vec<f32> = w.iter().map(|v| v / 8.0).collect();
        let bias = values(case.outputs, 3);
        let mut wanted = vec![0.0; case.out_frames().unwrap() * case.outputs];
        for (bias, epilogue) in [(None, Epilogue::None), (Some(&bias[..]), Epilogue::Gelu)] {
            let (weight, norm) = (Weight::F32(&w), FrameNorm::None);
            conv_frames_twin(&case, &x, weight, bias, norm, epilogue, &mut wanted).unwrap();
            check(&format!("{case:?}"), &wanted, CLOSE, &|cpu, y| {
                conv_frames(cpu, &case, &x, weight, bias, norm, epilogue, y)
            });
        }
    }
}

#[test]
fn a_shifted_signal_is_found() {
    let case = conv(70, [32, 32, 2], 32, [16, 15]);
    let (x, w) = (values(70 * 32, 4), values(32 * 32 * 16, 5));
    let mut wanted = vec![0.0; 70 * 32];
    conv_frames_twin(&case, &x, Weight::F32(&w), None, FrameNorm::None, Epilogue::None, &mut wanted).unwrap();
    let shifted = FrameConv { padding: [15, 16], ..case };
    let found = try_check(&wanted, CLOSE, &|cpu, y| {
        conv_frames(cpu, &shifted, &x, Weight::F32(&w), None, FrameNorm::None, Epilogue::None, y)
    });
    assert!(found.is_err());
}

#[test]
fn only_long_kernels_of_whole_vectors_at_stride_one_take_spectra_and_scratch_is_declared() {
    let case = conv(70, [32, 32, 2], 32, [16, 15]);
    for other in [
        FrameConv { stride: 2, ..case },
        FrameConv { kernel: 31, ..case },
        FrameConv { kernel: 257, padding: [128, 128], ..case },
        FrameConv { channels: 24, ..case },
        FrameConv { outputs: 24, ..case },
        FrameConv { groups: 1, ..case },
    ] {
        assert!(!pays(&other), "{other:?}");
    }
    let (x, w) = (values(70 * 32, 6), values(32 * 32 * 16, 7));
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa, 2).unwrap();
        let mut y = vec![0.0; 70 * 32];
        conv_frames(&cpu, &case, &x, Weight::F32(&w), None, FrameNorm::None, Epilogue::None, &mut y).unwrap();
        let declared = conv_frames_fewer_scratch_bytes(&cpu, &case);
        assert!(cpu.scratch_bytes() > 0 && cpu.scratch_bytes() <= declared, "{isa}");
    }
    assert_eq!(conv_frames_scratch_bytes(&case, false).unwrap(), 0);
    let plain = FrameConv { fewer: false, ..case };
    assert!(conv_frames_scratch_bytes(&plain, false).unwrap() > 0);
}
