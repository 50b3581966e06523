use super::*;
use crate::ops::check::{Close, F32, check, try_check, values};

const CLOSE: Close = Close { relative: 1e-5, absolute: 1e-5 };

fn conv(channels: usize, size: [usize; 2], outputs: usize, kernel: [usize; 2]) -> Conv2d {
    Conv2d {
        batch: 1,
        channels,
        size,
        outputs,
        kernel,
        stride: [1, 1],
        padding: [0, 0],
        dilation: [1, 1],
        groups: 1,
    }
}

fn compare(c: &Conv2d) {
    let x = values(c.batch * c.channels * c.size[0] * c.size[1], 1);
    let weight = values(c.outputs * c.channels / c.groups * c.kernel[0] * c.kernel[1], 2);
    let bias = values(c.outputs, 3);
    let [oh, ow] = c.out_size().unwrap();
    for bias in [None, Some(bias.as_slice())] {
        let mut wanted = vec![0.0; c.batch * c.outputs * oh * ow];
        conv2d_twin(c, &x, &weight, bias, &mut wanted).unwrap();
        check(&format!("{c:?}"), &wanted, CLOSE, &|cpu, y| conv2d(cpu, c, &x, &weight, bias, y));
    }
}

#[test]
fn convolutions_match_their_twin() {
    compare(&conv(1, [1, 1], 1, [1, 1]));
    compare(&conv(3, [9, 11], 5, [3, 2]));
    compare(&Conv2d { padding: [1, 2], stride: [2, 1], ..conv(2, [7, 20], 17, [3, 3]) });
    compare(&Conv2d { dilation: [2, 3], padding: [2, 0], batch: 2, ..conv(4, [8, 16], 3, [2, 4]) });
    compare(&Conv2d { stride: [14, 14], ..conv(3, [28, 42], 33, [14, 14]) });
}

#[test]
fn grouped_convolutions_match_their_twin() {
    compare(&Conv2d { groups: 2, padding: [1, 1], batch: 2, ..conv(4, [6, 5], 6, [3, 3]) });
    compare(&Conv2d { groups: 5, padding: [1, 1], ..conv(5, [6, 17], 5, [3, 3]) });
}

#[test]
fn one_dimension_matches_its_twin() {
    let c = Conv1d {
        batch: 2,
        channels: 6,
        size: 50,
        outputs: 9,
        kernel: 5,
        stride: 2,
        padding: 3,
        dilation: 2,
        groups: 3,
    };
    let (x, weight, bias) = (values(2 * 6 * 50, 1), values(9 * 2 * 5, 2), values(9, 3));
    let mut wanted = vec![0.0; 2 * 9 * c.out_size().unwrap()];
    conv1d_twin(&c, &x, &weight, Some(&bias), &mut wanted).unwrap();
    check("conv1d", &wanted, CLOSE, &|cpu, y| conv1d(cpu, &c, &x, &weight, Some(&bias), y));
}

#[test]
fn a_difference_filter_by_hand() {
    let cpu = Cpu::new(1).unwrap();
    let c = Conv1d {
        batch: 1,
        channels: 1,
        size: 4,
        outputs: 1,
        kernel: 2,
        stride: 1,
        padding: 1,
        dilation: 1,
        groups: 1,
    };
    let mut y = [0.0; 5];
    conv1d(&cpu, &c, &[1.0, 4.0, 9.0, 16.0], &[-1.0, 1.0], None, &mut y).unwrap();
    assert_eq!(y, [1.0, 3.0, 5.0, 7.0, -16.0]);
}

#[test]
fn batch_norm_matches_its_twin() {
    for shape in [&[2, 3][..], &[1, 5, 17], &[3, 4, 5, 6], &[0, 4, 2]] {
        let c = shape[1];
        let x = values(shape.iter().product(), 1);
        let variance: Vec<f32> = values(c, 3).iter().map(|v| v.abs() + 0.1).collect();
        let (mean, weight, bias) = (values(c, 2), values(c, 4), values(c, 5));
        let params = [&mean[..], &variance, &weight, &bias];
        let mut wanted = vec![0.0; x.len()];
        batch_norm_twin(&x, shape, params, 1e-5, &mut wanted).unwrap();
        check("batch_norm", &wanted, F32, &|cpu, y| batch_norm(cpu, &x, shape, params, 1e-5, y));
    }
}

#[test]
fn a_wrong_padding_is_noticed() {
    let right = Conv2d { padding: [1, 0], ..conv(2, [6, 6], 3, [3, 3]) };
    let wrong = Conv2d { padding: [0, 0], size: [8, 6], ..right };
    let (x, weight) = (values(2 * 8 * 6, 1), values(3 * 2 * 9, 2));
    let mut wanted = vec![0.0; 3 * 6 * 4];
    conv2d_twin(&right, &x[..2 * 36], &weight, None, &mut wanted).unwrap();
    assert!(try_check(&wanted, CLOSE, &|cpu, y| conv2d(cpu, &wrong, &x, &weight, None, y)).is_err());
}

#[test]
fn impossible_sizes_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    let good = conv(2, [4, 4], 2, [3, 3]);
    let run = |c: &Conv2d| conv2d(&cpu, c, &[0.0; 32], &[0.0; 36], None, &mut [0.0; 8]);
    assert!(run(&good).is_ok());
    for bad in [
        Conv2d { kernel: [5, 3], ..good },
        Conv2d { kernel: [0, 3], ..good },
        Conv2d { stride: [0, 1], ..good },
        Conv2d { dilation: [1, 0], ..good },
        Conv2d { groups: 0, ..good },
        Conv2d { groups: 3, ..good },
        Conv2d { padding: [usize::MAX, 0], ..good },
        Conv2d { size: [usize::MAX, usize::MAX], ..good },
        Conv2d { dilation: [usize::MAX, 1], ..good },
    ] {
        assert!(run(&bad).is_err(), "{bad:?}");
    }
    let error = batch_norm(&cpu, &[0.0; 4], &[4], [&[]; 4], 0.1, &mut [0.0; 4]).unwrap_err();
    assert_eq!(error.to_string(), "batch_norm: x of shape [4] has no channels");
}
