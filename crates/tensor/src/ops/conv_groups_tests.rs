use super::*;
use crate::ops::check::{Close, check, try_check, values};
use crate::ops::{FrameNorm, conv_frames, conv_frames_twin};
use crate::{Error, Isa, RowCodes, Weight};

const CLOSE: Close = Close { relative: 2e-5, absolute: 2e-5 };

fn format(name: &str) -> PackedFormat {
    DType::from_name(name).and_then(PackedFormat::of).unwrap()
}

/// Random weights of about unit gain; rows have different scales.
fn packed(conv: &FrameConv, format: PackedFormat) -> Packed {
    let k = conv.kernel * conv.channels / conv.groups;
    let row = |i: usize, row: &mut RowCodes| {
        row.codes = values(k, 7 + i as u64).iter().map(|v| (128.0 + 127.0 * v) as u8).collect();
        let scales = if format.group == 0 { 1 } else { k.div_ceil(format.group) };
        row.scales = vec![half::bf16::from_f32(1e-3 + 1e-4 * i as f32).to_bits(); scales];
        Ok(())
    };
    Packed::pack(&Cpu::new(1).unwrap(), format, conv.outputs, k, &row).unwrap()
}

/// Each group of each frame rounded to bytes.
fn rounded(conv: &FrameConv, x: &[f32], range: Option<f32>) -> Vec<f32> {
    let of = |part: &[f32]| {
        let mut codes = [0; MAX_BLOCK];
        let scale = quantise(part, range, &mut codes);
        codes[..part.len()].iter().map(|&c| f32::from(c) * scale).collect::<Vec<_>>()
    };
    x.chunks(conv.channels / conv.groups).flat_map(of).collect()
}

fn run(
    cpu: &Cpu,
    conv: &FrameConv,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
    y: &mut [f32],
) -> Result<()> {
    let epilogue = if bias.is_some() { Epilogue::Gelu } else { Epilogue::None };
    conv_frames(cpu, conv, x, Weight::Packed(weight), bias, FrameNorm::None, epilogue, y)
}

fn twin(conv: &FrameConv, x: &[f32], weight: &Packed, bias: Option<&[f32]>) -> Vec<f32> {
    let epilogue = if bias.is_some() { Epilogue::Gelu } else { Epilogue::None };
    let x = rounded(conv, x, weight.input_range());
    let mut y = vec![0.0; conv.out_frames().unwrap() * conv.outputs];
    conv_frames_twin(conv, &x, Weight::Packed(weight), bias, FrameNorm::None, epilogue, &mut y).unwrap();
    y
}

fn conv(frames: usize, channels: usize, outputs: usize, kernel: usize, groups: usize) -> FrameConv {
    FrameConv {
        frames,
        channels,
        outputs,
        kernel,
        stride: 1,
        padding: [kernel / 2, (kernel - 1) / 2],
        groups,
        fewer: false,
    }
}

/// Groups of one to five panels, of parts of panels, and of none whole; more than one task; strides; no padding.
fn shapes() -> Vec<FrameConv> {
    vec![
        conv(75, 96, 96, 16, 2),
        conv(40, 32, 32, 10, 4),
        conv(7, 24, 30, 3, 6),
        conv(1, 8, 128, 9, 2),
        conv(38, 128, 160, 2, 2),
        conv(37, 256, 4, 1, 2),
        FrameConv { stride: 3, padding: [0, 0], ..conv(90, 8, 34, 5, 2) },
    ]
}

#[test]
fn grouped_convolutions_over_bytes_match_their_twin() {
    for c in shapes() {
        let (x, bias) = (values(c.frames * c.channels, 1), values(c.outputs, 3));
        let fixed = packed(&c, format("int8-row")).with_input_range(0.8).unwrap();
        for weight in [packed(&c, format("int8-row")), fixed] {
            for bias in [None, Some(bias.as_slice())] {
                let wanted = twin(&c, &x, &weight, bias);
                check(&format!("{c:?}"), &wanted, CLOSE, &|cpu, y| run(cpu, &c, &x, &weight, bias, y));
            }
        }
    }
}

#[test]
fn instruction_sets_give_the_same_bits() {
    for c in shapes() {
        let (x, weight) = (values(c.frames * c.channels, 1), packed(&c, format("int8-row")));
        let on = |isa: Isa| {
            let mut y = vec![0.0; c.out_frames().unwrap() * c.outputs];
            run(&Cpu::with_isa(isa, 2).unwrap(), &c, &x, &weight, None, &mut y).unwrap();
            y
        };
        let scalar = on(Isa::Scalar);
        for isa in Isa::available() {
            assert_eq!(on(isa), scalar, "{isa}, {c:?}");
        }
    }
}

#[test]
fn the_weights_of_another_group_are_noticed() {
    let c = conv(40, 32, 32, 10, 4);
    let (mut x, weight) = (values(c.frames * c.channels, 1), packed(&c, format("int8-row")));
    let wanted = twin(&c, &x, &weight, None);
    for frame in x.chunks_mut(32) {
        frame.rotate_left(8);
    }
    assert!(try_check(&wanted, CLOSE, &|cpu, y| run(cpu, &c, &x, &weight, None, y)).is_err());
}

#[test]
fn a_frame_that_is_not_finite_spreads_as_far_as_the_kernel_and_in_its_group() {
    let c = FrameConv { padding: [2, 2], ..conv(60, 16, 32, 5, 2) };
    let (mut x, weight) = (values(c.frames * c.channels, 1), packed(&c, format("int8-row")));
    x[30 * 16 + 9] = f32::INFINITY;
    let mut y = vec![0.0; 60 * 32];
    run(&Cpu::new(2).unwrap(), &c, &x, &weight, None, &mut y).unwrap();
    for (i, v) in y.iter().enumerate() {
        assert_eq!(v.is_nan(), (28..=32).contains(&(i / 32)) && i % 32 >= 16, "{i}: {v}");
    }
}

#[test]
fn other_formats_and_odd_groups_are_typed_errors() {
    for (c, name) in [
        (conv(9, 32, 32, 8, 4), "int4-g32"),
        (conv(9, 32, 32, 8, 4), "int8-g32"),
        (conv(9, 12, 18, 16, 2), "int8-row"),
    ] {
        let (x, weight) = (values(c.frames * c.channels, 1), packed(&c, format(name)));
        let mut y = vec![0.0; c.out_frames().unwrap() * c.outputs];
        let error = run(&Cpu::new(1).unwrap(), &c, &x, &weight, None, &mut y).unwrap_err();
        assert!(matches!(error, Error::Value { .. }), "{error}");
    }
}
