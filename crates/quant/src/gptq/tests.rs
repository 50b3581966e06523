use pocketglm_tensor::{Affine, Group};

use super::*;
use crate::tests::{Random, correlated_inputs, moments, output_error};
use crate::{RowOptions, dequantise_row, quantise_row};

fn rounded(weights: &[f32], k: usize, dtype: DType) -> Vec<u8> {
    let mut bytes = Vec::new();
    for row in weights.chunks_exact(k) {
        quantise_row(dtype, row, &RowOptions::default(), &mut bytes).unwrap();
    }
    bytes
}

fn affine(bits: u8, group: Group, symmetric: bool) -> DType {
    DType::Affine(Affine::new(bits, group, symmetric).unwrap())
}

#[test]
fn feedback_beats_rounding_in_the_outputs_error() {
    let cpu = Cpu::new(2).unwrap();
    let (n, k) = (24, 512);
    let x = correlated_inputs(400, k, 11);
    let h = moments(&x, k);
    let weights = Random(12).gaussian(n * k);
    let mut formats = vec![
        affine(4, Group::G32, true),
        affine(4, Group::G64, true),
        affine(4, Group::G128, true),
        affine(4, Group::G64, false),
        affine(4, Group::Row, true),
        affine(2, Group::G32, false),
        affine(8, Group::G128, true),
    ];
    formats.extend(Block::ALL.map(DType::Block));
    for dtype in formats {
        let plain = output_error(&weights, &rounded(&weights, k, dtype), dtype, &x, k);
        for act_order in [false, true] {
            let options = GptqOptions { act_order, method: Method::Round, ..GptqOptions::default() };
            let bytes = gptq(&cpu, &weights, k, &h, dtype, &options).unwrap();
            let error = output_error(&weights, &bytes, dtype, &x, k);
            println!("{:>14} act-order {act_order:5}: {:.3} of rounding", dtype.name(), error / plain);
            assert!(error < 0.8 * plain, "{dtype}, act-order {act_order}: {error} {plain}");
        }
    }
}

/// The published algorithm over the upper Cholesky factor of `H^-1`, in f64 and as plainly as can be.
fn textbook(weights: &[f32], k: usize, h: &[f64], dtype: DType) -> Vec<f32> {
    // H^-1 by Gauss-Jordan.
    let mut a: Vec<Vec<f64>> = (0..k)
        .map(|i| {
            (0..2 * k).map(|j| if j < k { h[i * k + j] } else { f64::from(u8::from(j == k + i)) }).collect()
        })
        .collect();
    for p in 0..k {
        let pivot = a[p][p];
        a[p].iter_mut().for_each(|v| *v /= pivot);
        let row = a[p].clone();
        for (i, other) in a.iter_mut().enumerate().filter(|(i, _)| *i != p) {
            let factor = other[p];
            assert!(i < k);
            other.iter_mut().zip(&row).for_each(|(o, r)| *o -= factor * r);
        }
    }
    // H^-1 = U^T U, U upper.
    let mut u = vec![vec![0.0f64; k]; k];
    for i in 0..k {
        for j in i..k {
            let dot: f64 = (0..i).map(|m| u[m][i] * u[m][j]).sum();
            let rest = a[i][k + j] - dot;
            u[i][j] = if i == j { rest.sqrt() } else { rest / u[i][i] };
        }
    }
    let mut out = Vec::new();
    for row in weights.chunks_exact(k) {
        // Scales are those of the row before any correction, as for `Group::Row`.
        let bytes = rounded(row, k, dtype);
        let mut codes = RowCodes::default();
        crate::take_apart(dtype, &bytes, k, &mut codes).unwrap();
        let DType::Affine(format) = dtype else { panic!("affine formats only") };
        let lattice = affine_lattice(format, codes.scales[0], 0);
        let mut w: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
        for i in 0..k {
            let value = lattice.value(lattice.nearest(w[i] as f32));
            let error = (w[i] - f64::from(value)) / u[i][i];
            for j in i + 1..k {
                w[j] -= error * u[i][j];
            }
            out.push(value);
        }
    }
    out
}

#[test]
fn codes_are_those_of_the_textbook_form_over_the_inverse() {
    let cpu = Cpu::new(1).unwrap();
    let (n, k) = (5, 300);
    let x = correlated_inputs(600, k, 3);
    let h = moments(&x, k);
    let mean = (0..k).map(|i| f64::from(h[i * k + i])).sum::<f64>() / k as f64;
    let mut damped: Vec<f64> = h.iter().map(|&v| f64::from(v) / mean).collect();
    (0..k).for_each(|i| damped[i * k + i] += 0.01);
    let weights = Random(5).gaussian(n * k);
    let dtype = affine(4, Group::Row, true);
    let options = GptqOptions { method: Method::Round, ..GptqOptions::default() };
    let bytes = gptq(&cpu, &weights, k, &h, dtype, &options).unwrap();
    let wanted = textbook(&weights, k, &damped, dtype);
    let mut found = vec![0.0; n * k];
    for (bytes, row) in bytes.chunks(bytes.len() / n).zip(found.chunks_mut(k)) {
        dequantise_row(dtype, bytes, row).unwrap();
    }
    // A tie may fall differently in f32 and changes what follows it in that row.
    let same = found.iter().zip(&wanted).filter(|(a, b)| a == b).count();
    println!("{same} of {} values are the same", n * k);
    assert!(same * 100 > n * k * 95, "{same} of {}", n * k);
}

#[test]
fn inputs_without_correlation_leave_plain_rounding() {
    let cpu = Cpu::new(2).unwrap();
    let k = 256;
    let mut h = vec![0.0; k * k];
    (0..k).for_each(|i| h[i * k + i] = 2.0);
    let weights = Random(6).gaussian(9 * k);
    let options = GptqOptions { method: Method::Round, ..GptqOptions::default() };
    for dtype in [affine(4, Group::G32, false), DType::Block(Block::Q6_K), DType::Block(Block::IQ4_NL)] {
        let bytes = gptq(&cpu, &weights, k, &h, dtype, &options).unwrap();
        assert_eq!(bytes, rounded(&weights, k, dtype), "{dtype}");
    }
}

#[test]
fn short_last_groups_and_odd_rows_are_whole() {
    let cpu = Cpu::new(2).unwrap();
    for (n, k) in [(1, 1), (3, 33), (5, 130), (2, 300)] {
        let x = correlated_inputs(2 * k + 3, k, 7);
        let h = moments(&x, k);
        let weights = Random(8).gaussian(n * k);
        for dtype in
            [affine(4, Group::G64, true), affine(2, Group::G128, false), affine(8, Group::Row, false)]
        {
            for act_order in [false, true] {
                let options = GptqOptions { act_order, ..GptqOptions::default() };
                let bytes = gptq(&cpu, &weights, k, &h, dtype, &options).unwrap();
                assert_eq!(Some(bytes.len()), dtype.bytes(&[n, k]));
                let plain = output_error(&weights, &rounded(&weights, k, dtype), dtype, &x, k);
                let error = output_error(&weights, &bytes, dtype, &x, k);
                assert!(error <= plain * 1.05, "{dtype} {n} {k}: {error} {plain}");
            }
        }
    }
}

#[test]
fn a_singular_matrix_is_damped() {
    let cpu = Cpu::new(1).unwrap();
    let k = 160;
    // Fewer rows than columns, and channels that are never used.
    let mut x = correlated_inputs(20, k, 9);
    x.iter_mut().skip(3).step_by(k).for_each(|x| *x = 0.0);
    let h = moments(&x, k);
    let weights = Random(10).gaussian(4 * k);
    let dtype = affine(4, Group::G32, true);
    let plain = output_error(&weights, &rounded(&weights, k, dtype), dtype, &x, k);
    for damping in [0.0, 0.01] {
        for h in [h.clone(), h.iter().map(|v| v * 1e-20).collect()] {
            let options = GptqOptions { damping, ..GptqOptions::default() };
            let bytes = gptq(&cpu, &weights, k, &h, dtype, &options).unwrap();
            assert!(output_error(&weights, &bytes, dtype, &x, k) < plain);
        }
    }
    let nothing = gptq(&cpu, &weights, k, &vec![0.0; k * k], dtype, &GptqOptions::default()).unwrap();
    assert_eq!(nothing.len(), 4 * dtype.row_bytes(k).unwrap());
}

#[test]
fn bad_operands_are_errors() {
    let cpu = Cpu::new(1).unwrap();
    let k = 32;
    let dtype = affine(4, Group::G32, true);
    let h = moments(&correlated_inputs(50, k, 1), k);
    let options = GptqOptions::default();
    let run =
        |weights: &[f32], h: &[f32], dtype, options| gptq(&cpu, weights, k, h, dtype, &options).unwrap_err();
    let mut bad = h.clone();
    bad[5] = f32::NAN;
    assert!(matches!(
        run(&[0.0; 32], &bad, dtype, options),
        Error::NotFinite { what: "hessian", index: 5, .. }
    ));
    bad[5] = 0.0;
    bad[0] = -1.0;
    assert!(matches!(run(&[0.0; 32], &bad, dtype, options), Error::NotFinite { index: 0, .. }));
    let mut weights = vec![1.0; 3 * k];
    weights[70] = f32::INFINITY;
    assert!(matches!(run(&weights, &h, dtype, options), Error::NotFinite { what: "weights", index: 70, .. }));
    weights[70] = 3e38;
    let error = run(&weights, &h, DType::Block(Block::Q4_0), options);
    assert!(matches!(error, Error::Range { index: 70, .. }), "{error}");
    assert!(matches!(run(&[0.0; 33], &h, dtype, options), Error::Size { .. }));
    assert!(matches!(run(&[0.0; 32], &h[1..], dtype, options), Error::Size { .. }));
    assert!(matches!(run(&[0.0; 32], &h, DType::F32, options), Error::DType { .. }));
    assert!(matches!(run(&[0.0; 32], &h, DType::Block(Block::Q4_K), options), Error::RowLength { .. }));
    let options = GptqOptions { damping: f32::NAN, ..options };
    assert!(matches!(run(&[0.0; 32], &h, dtype, options), Error::Value { .. }));
    // Corrections that leave f32's range are an error whatever the order, never a hang.
    let k2 = 256;
    let h2 = moments(&correlated_inputs(400, k2, 2), k2);
    let huge: Vec<f32> = Random(4).gaussian(k2).iter().map(|w| w.signum() * f32::MAX).collect();
    let mut refused = 0;
    for act_order in [false, true] {
        for dtype in [affine(2, Group::G32, true), affine(2, Group::Row, false)] {
            let options = GptqOptions { act_order, ..GptqOptions::default() };
            match gptq(&cpu, &huge, k2, &h2, dtype, &options) {
                Ok(bytes) => assert_eq!(Some(bytes.len()), dtype.row_bytes(k2)),
                Err(error) => {
                    assert!(matches!(error, Error::NotFinite { what: "corrected weights", .. }), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0);
    // Far from positive definite: no damping that keeps the matrix would do.
    let mut indefinite = vec![1e6; k * k];
    (0..k).for_each(|i| indefinite[i * k + i] = 1.0);
    assert!(matches!(run(&[0.0; 32], &indefinite, dtype, GptqOptions::default()), Error::Value { .. }));
}

/// Run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "measures time"]
fn speed() {
    let cpu = Cpu::new(2).unwrap();
    for (n, k) in [(1024, 1024), (4096, 4096)] {
        let x = Random(3).gaussian(2 * 512 * k);
        let time = |what: &str, f: &mut dyn FnMut()| {
            let start = std::time::Instant::now();
            f();
            println!("{n} x {k} {what}: {:.2} s", start.elapsed().as_secs_f64());
        };
        let mut stats = crate::stats::ChannelStats::new(k, true).unwrap();
        time("statistics of 1024 rows", &mut || stats.add(&cpu, &x).unwrap());
        let h = stats.second_moments.unwrap();
        let weights: Vec<f32> = x.iter().cycle().take(n * k).copied().collect();
        let mut feedback = None;
        time("factor", &mut || {
            feedback = Some(Feedback::new(&cpu, &h, k, &GptqOptions::default()).unwrap());
        });
        let feedback = feedback.unwrap();
        for dtype in [affine(4, Group::G64, true), DType::Block(Block::Q4_K)] {
            time(dtype.name(), &mut || drop(feedback.quantise(&cpu, &weights, dtype).unwrap()));
        }
    }
}
