use super::*;
use crate::ops::check::{Close, check, try_check, values};
use crate::{Affine, Block, DType, Group, Packed, PackedFormat, RowCodes, ScaleKind, ZeroKind};

/// Every layout that a format has.
fn formats() -> Vec<PackedFormat> {
    let blocks = Block::ALL.map(DType::Block).into_iter();
    blocks.chain(Affine::all().map(DType::Affine)).filter_map(PackedFormat::of).collect()
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Random codes and scales of a row, each as the format has it.
fn random_row(format: PackedFormat, k: usize, seed: u64, row: &mut RowCodes) {
    let mut state = seed.wrapping_mul(0x9e37_79b9) + 1;
    let group = if format.group == 0 { k } else { format.group };
    let groups = k.div_ceil(group);
    let most = if format.table { 16 } else { 1 << format.bits };
    row.codes = (0..k).map(|_| (next(&mut state) % most) as u8).collect();
    let small = |state: &mut u64| 0.5 + (next(state) % 1000) as f32 / 1000.0;
    let (halves, nested) = match format.scale {
        ScaleKind::Nested => (k.div_ceil(256), true),
        _ => (groups, false),
    };
    let bits = |v: f32| match format.scale {
        ScaleKind::BF16 => half::bf16::from_f32(v).to_bits(),
        _ => half::f16::from_f32(v).to_bits(),
    };
    let unit = if nested { 1e-4 } else { 1e-2 };
    row.scales = (0..halves).map(|_| bits(small(&mut state) * unit)).collect();
    row.minima.clear();
    row.sub_scales.clear();
    row.sub_minima.clear();
    if format.zero == ZeroKind::Minima {
        row.minima =
            (0..halves).map(|_| bits(small(&mut state) * unit * if nested { 1.0 } else { -8.0 })).collect();
    }
    if nested {
        row.sub_scales = (0..groups).map(|_| next(&mut state) as u8).collect();
    }
    if nested && format.zero == ZeroKind::Minima || format.zero == ZeroKind::Codes {
        row.sub_minima = (0..groups).map(|_| (next(&mut state) % most) as u8).collect();
    }
}

fn packed(format: PackedFormat, rows: usize, k: usize, seed: u64) -> Packed {
    let cpu = Cpu::new(2).unwrap();
    let row = |i: usize, codes: &mut RowCodes| {
        random_row(format, k, seed + i as u64, codes);
        Ok(())
    };
    Packed::pack(&cpu, format, rows, k, &row).unwrap()
}

/// The value that the format's formula gives.
fn value(format: PackedFormat, row: &RowCodes, k: usize, step: usize) -> f32 {
    let group = if format.group == 0 { k } else { format.group };
    let g = step / group;
    let number = |bits: u16| match format.scale {
        ScaleKind::BF16 => half::bf16::from_bits(bits).to_f32(),
        _ => half::f16::from_bits(bits).to_f32(),
    };
    let code = row.codes[step];
    let q = f32::from(if format.table { crate::IQ4_TABLE[usize::from(code)] } else { code });
    let nested = format.scale == ScaleKind::Nested;
    let at = if nested { step / 256 } else { g };
    let scale = number(row.scales[at]) * if nested { f32::from(row.sub_scales[g] as i8) } else { 1.0 };
    match format.zero {
        ZeroKind::Fixed(zero) => scale * (q - f32::from(zero)),
        ZeroKind::Codes => scale * (q - f32::from(row.sub_minima[g])),
        ZeroKind::Minima if nested => scale * q - number(row.minima[at]) * f32::from(row.sub_minima[g]),
        ZeroKind::Minima => scale * q + number(row.minima[at]),
    }
}

/// Steps of `k` that a format can have: nested ones come in 256.
fn lengths(format: PackedFormat) -> Vec<usize> {
    if format.scale == ScaleKind::Nested { vec![256, 768] } else { vec![32, 96, 160, 544] }
}

fn compare(case: &str, m: usize, k: usize, parts: &[Part<'_>], epilogue: Epilogue) {
    let x = values(m * k, 3);
    let n: usize = parts.iter().map(|p| p.rows).sum();
    let outputs = if epilogue == Epilogue::SwiGlu { n / 2 } else { n };
    // Each part sees x in its own rounding; the twin takes one x, so it runs part by part where they differ.
    let mut plain = vec![0.0; m * n];
    let mut offset = 0;
    for part in parts {
        let rounded = linear_rounded(&x, k, part.weight);
        let mut y = vec![0.0; m * part.rows];
        linear_twin(&rounded, m, k, &[*part], Epilogue::None, &mut y).unwrap();
        for i in 0..m {
            plain[i * n + offset..][..part.rows].copy_from_slice(&y[i * part.rows..][..part.rows]);
        }
        offset += part.rows;
    }
    let wanted: Vec<f32> = if epilogue == Epilogue::SwiGlu {
        let silu = |v: f32| f64::from(v) / (1.0 + (-f64::from(v)).exp());
        let at = |i: usize, j: usize| plain[i * n + j];
        (0..m * outputs)
            .map(|e| (e / outputs, e % outputs))
            .map(|(i, j)| (silu(at(i, j)) * f64::from(at(i, outputs + j))) as f32)
            .collect()
    } else {
        plain
    };
    let most = wanted.iter().fold(0f32, |a, v| a.max(v.abs()));
    let close = Close { relative: 1e-5, absolute: 1e-5 * most };
    check(case, &wanted, close, &|cpu, y| linear(cpu, &x, m, k, parts, epilogue, y));
}

#[test]
fn packed_values_are_those_of_the_formula() {
    for format in formats() {
        for k in lengths(format) {
            let matrix = packed(format, 19, k, 5);
            let mut row = RowCodes::default();
            let mut all = vec![0.0; k];
            for i in 0..19 {
                random_row(format, k, 5 + i as u64, &mut row);
                let mut again = RowCodes::default();
                matrix.row_codes(i, &mut again).unwrap();
                assert_eq!(again, row, "{format:?} {i}");
                matrix.row(i, &mut all);
                for step in 0..k {
                    let wanted = value(format, &row, k, step);
                    let found = matrix.get(i, step).unwrap();
                    assert!((found - wanted).abs() <= 1e-6 * wanted.abs().max(1e-3), "{format:?} {i} {step}");
                    assert_eq!(found, all[step], "{format:?} {i} {step}");
                }
            }
            assert_eq!((matrix.get(19, 0), matrix.get(0, k)), (None, None));
        }
    }
}

#[test]
fn products_match_the_twin_for_all_formats() {
    for format in formats() {
        for k in lengths(format) {
            let matrix = packed(format, 48, k, 9);
            let part = Part { weight: Weight::Packed(&matrix), rows: 48, bias: None };
            for m in [1, 2, 5, 13] {
                compare(&format!("{format:?} {m}x{k}"), m, k, &[part], Epilogue::None);
            }
        }
    }
}

#[test]
fn inputs_of_a_fixed_range_are_cut_off_there_and_match_the_twin() {
    for format in formats() {
        let k = lengths(format)[1];
        // Values of x reach 1: some are cut off at 0.6, and none at 2.
        for range in [0.6, 2.0] {
            let matrix = packed(format, 33, k, 9).with_input_range(range).unwrap();
            let part = Part { weight: Weight::Packed(&matrix), rows: 33, bias: None };
            for m in [1, 6] {
                compare(&format!("{format:?} {m}x{k} within {range}"), m, k, &[part], Epilogue::None);
            }
        }
    }
    let format = PackedFormat::of(DType::Block(Block::Q4_0)).unwrap();
    let cpu = Cpu::new(1).unwrap();
    let mut rounded = [0.0; 4];
    round_activations(&cpu, &[0.5, -3.0, 0.004, 1.0], 4, format, Some(1.27), &mut rounded).unwrap();
    for (found, wanted) in rounded.iter().zip([0.5, -1.27, 0.0, 1.0]) {
        assert!((found - wanted).abs() < 1e-6, "{rounded:?}");
    }
    for range in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(packed(format, 16, 32, 1).with_input_range(range).is_err());
    }
}

/// `smmla` and `sdot` sum the same integers.
#[test]
#[cfg(target_arch = "aarch64")]
fn products_of_byte_matrices_have_the_bits_of_byte_dot_products() {
    use crate::Isa;
    assert!(Isa::NeonI8mm.is_available(), "these tests run where there is i8mm");
    for format in formats() {
        let k = lengths(format)[1];
        let matrix = packed(format, 40, k, 4);
        let part = [Part { weight: Weight::Packed(&matrix), rows: 40, bias: None }];
        for m in [2, 3, 4, 7, 8] {
            let x = values(m * k, 8);
            let [one, other] = [Isa::NeonI8mm, Isa::Neon].map(|isa| {
                let mut y = vec![0.0; m * 40];
                let cpu = Cpu::with_isa(isa, 1).unwrap();
                linear(&cpu, &x, m, k, &part, Epilogue::None, &mut y).unwrap();
                y
            });
            assert_eq!(one, other, "{format:?} {m}");
        }
    }
}

#[test]
fn ragged_rows_parts_biases_and_gates_match_the_twin() {
    let q4 = PackedFormat::of(DType::Block(Block::Q4_0)).unwrap();
    let q5 = PackedFormat::of(DType::Block(Block::Q5_1)).unwrap();
    let int8 = PackedFormat::of(DType::Affine(Affine::new(8, Group::G64, false).unwrap())).unwrap();
    let k = 192;
    let bias = values(200, 4);
    let float = values(24 * k, 6);
    for m in [1, 3, 20] {
        for rows in [[16, 16, 16], [5, 19, 40], [24, 24, 24], [100, 24, 33]] {
            let all = [packed(q4, rows[0], k, 1), packed(q4, rows[1], k, 2), packed(q4, rows[2], k, 3)];
            let parts: Vec<Part<'_>> = all
                .iter()
                .map(|p| Part { weight: Weight::Packed(p), rows: p.rows(), bias: Some(&bias[..p.rows()]) })
                .collect();
            compare(&format!("{rows:?} {m}"), m, k, &parts, Epilogue::None);
            compare(&format!("one of {rows:?} {m}"), m, k, &parts[1..2], Epilogue::None);
        }
        for inner in [16, 24, 40, 96] {
            let fused = packed(q4, 2 * inner, k, 1);
            let (gate, up) = (packed(q4, inner, k, 2), packed(q5, inner, k, 3));
            let part = |p| Part { weight: Weight::Packed(p), rows: Packed::rows(p), bias: None };
            compare(&format!("gate-up {inner} {m}"), m, k, &[part(&fused)], Epilogue::SwiGlu);
            compare(&format!("gate, up {inner} {m}"), m, k, &[part(&gate), part(&gate)], Epilogue::SwiGlu);
            compare(
                &format!("gate, other up {inner} {m}"),
                m,
                k,
                &[part(&gate), part(&up)],
                Epilogue::SwiGlu,
            );
        }
        let (a, b) = (packed(q4, 24, k, 1), packed(int8, 40, k, 2));
        let parts = [
            Part { weight: Weight::Packed(&a), rows: 24, bias: None },
            Part { weight: Weight::F32(&float), rows: 24, bias: Some(&bias[..24]) },
            Part { weight: Weight::Packed(&b), rows: 40, bias: None },
        ];
        compare(&format!("mixed {m}"), m, k, &parts, Epilogue::None);
    }
}

#[test]
fn values_that_are_not_finite_come_out_as_nan_and_zeros_as_zero() {
    let cpu = Cpu::new(2).unwrap();
    let format = PackedFormat::of(DType::Block(Block::Q4_0)).unwrap();
    let matrix = packed(format, 16, 64, 1);
    let part = [Part { weight: Weight::Packed(&matrix), rows: 16, bias: None }];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for m in [1, 7] {
            let mut x = values(m * 64, 3);
            x[5] = bad;
            let mut y = vec![0.0; m * 16];
            linear(&cpu, &x, m, 64, &part, Epilogue::None, &mut y).unwrap();
            assert!(y[..16].iter().all(|v| v.is_nan()));
            assert!(y[16..].iter().all(|v| v.is_finite()));
        }
    }
    let mut y = vec![1.0; 16];
    linear(&cpu, &[0.0; 64], 1, 64, &part, Epilogue::None, &mut y).unwrap();
    assert_eq!(y, [0.0; 16]);
}

#[test]
fn one_row_has_the_same_result_alone_and_among_others() {
    let cpu = Cpu::new(2).unwrap();
    for format in formats() {
        let k = 512;
        let matrix = packed(format, 64, k, 2);
        let part = [Part { weight: Weight::Packed(&matrix), rows: 64, bias: None }];
        let x = values(9 * k, 8);
        let mut all = vec![0.0; 9 * 64];
        linear(&cpu, &x, 9, k, &part, Epilogue::None, &mut all).unwrap();
        for i in 0..9 {
            let mut one = vec![0.0; 64];
            linear(&cpu, &x[i * k..(i + 1) * k], 1, k, &part, Epilogue::None, &mut one).unwrap();
            assert_eq!(one, all[i * 64..(i + 1) * 64], "{format:?} row {i}");
        }
    }
}

#[test]
fn a_wrong_code_is_found() {
    let format = PackedFormat::of(DType::Block(Block::Q4_0)).unwrap();
    let (right, wrong) = (packed(format, 16, 64, 1), packed(format, 16, 64, 2));
    let part = |p| [Part { weight: Weight::Packed(p), rows: 16, bias: None }];
    let x = values(64, 3);
    let mut wanted = vec![0.0; 16];
    linear(&Cpu::new(1).unwrap(), &x, 1, 64, &part(&right), Epilogue::None, &mut wanted).unwrap();
    let close = Close { relative: 1e-5, absolute: 1e-5 };
    assert!(
        try_check(&wanted, close, &|c, y| linear(c, &x, 1, 64, &part(&wrong), Epilogue::None, y)).is_err()
    );
}

#[test]
fn matrices_of_other_sizes_are_refused() {
    let format = PackedFormat::of(DType::Block(Block::Q4_0)).unwrap();
    let matrix = packed(format, 16, 64, 1);
    let part = [Part { weight: Weight::Packed(&matrix), rows: 64, bias: None }];
    let cpu = Cpu::new(1).unwrap();
    assert!(linear(&cpu, &[0.0; 16], 1, 16, &part, Epilogue::None, &mut [0.0; 64]).is_err());
    assert!(Packed::from_bytes(format, 16, 64, vec![0u8; 575].into()).is_err());
    assert!(Packed::bytes_for(format, usize::MAX, usize::MAX).is_err());
    let short = |_: usize, row: &mut RowCodes| {
        row.codes = vec![0; 63];
        Ok(())
    };
    assert!(Packed::pack(&cpu, format, 1, 64, &short).is_err());
}
