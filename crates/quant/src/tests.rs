use half::{bf16, f16};
use pocketglm_tensor::{Affine, Block, DType, Group, IQ4_TABLE, Isa, PackedFormat, ScaleKind, ZeroKind};
use proptest::prelude::*;

use crate::dequantise::dequantise_row_on;
use crate::quantise::encode_units_on;
use crate::*;

fn all_formats() -> Vec<DType> {
    Block::ALL.map(DType::Block).into_iter().chain(Affine::all().map(DType::Affine)).collect()
}

/// Deterministic numbers: uniform in -1..1.
pub(crate) struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn gauss(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }

    pub fn gaussian(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.gauss()).collect()
    }
}

fn quantised(dtype: DType, x: &[f32], options: &RowOptions<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    quantise_row(dtype, x, options, &mut bytes).unwrap();
    assert_eq!(Some(bytes.len()), dtype.row_bytes(x.len()));
    bytes
}

fn read(dtype: DType, bytes: &[u8], k: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; k];
    dequantise_row(dtype, bytes, &mut out).unwrap();
    out
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

macro_rules! golden {
    ($name:literal) => {
        include_bytes!(concat!("../golden/", $name)).as_slice()
    };
}

#[test]
fn random_blocks_read_as_in_ggmls_numpy_reference_bit_for_bit() {
    let cases = [
        (Block::Q8_0, golden!("q8_0.blocks"), golden!("q8_0.values")),
        (Block::Q4_0, golden!("q4_0.blocks"), golden!("q4_0.values")),
        (Block::Q4_1, golden!("q4_1.blocks"), golden!("q4_1.values")),
        (Block::Q5_0, golden!("q5_0.blocks"), golden!("q5_0.values")),
        (Block::Q5_1, golden!("q5_1.blocks"), golden!("q5_1.values")),
        (Block::Q2_K, golden!("q2_k.blocks"), golden!("q2_k.values")),
        (Block::Q3_K, golden!("q3_k.blocks"), golden!("q3_k.values")),
        (Block::Q4_K, golden!("q4_k.blocks"), golden!("q4_k.values")),
        (Block::Q5_K, golden!("q5_k.blocks"), golden!("q5_k.values")),
        (Block::Q6_K, golden!("q6_k.blocks"), golden!("q6_k.values")),
        (Block::IQ4_NL, golden!("iq4_nl.blocks"), golden!("iq4_nl.values")),
        (Block::IQ4_XS, golden!("iq4_xs.blocks"), golden!("iq4_xs.values")),
    ];
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (block, bytes, values) in cases {
        let wanted = floats(values);
        assert_eq!(wanted.len(), 1024);
        assert_eq!(bits(&read(DType::Block(block), bytes, 1024)), bits(&wanted), "{block:?}");
        // The check can fail: one flipped bit shows.
        let mut damaged = bytes.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        assert_ne!(bits(&read(DType::Block(block), &damaged, 1024)), bits(&wanted), "{block:?}");
    }
}

#[test]
fn plain_rounding_writes_the_bytes_of_ggmls_numpy_reference() {
    let x = floats(golden!("input.values"));
    let cases = [
        (Block::Q8_0, golden!("q8_0.written")),
        (Block::Q4_0, golden!("q4_0.written")),
        (Block::Q4_1, golden!("q4_1.written")),
        (Block::Q5_0, golden!("q5_0.written")),
        (Block::Q5_1, golden!("q5_1.written")),
    ];
    for (block, wanted) in cases {
        let found = quantised(DType::Block(block), &x, &RowOptions::default());
        let width = block.layout().1;
        for (i, (found, wanted)) in found.chunks(width).zip(wanted.chunks(width)).enumerate() {
            assert_eq!(found, wanted, "{block:?}, block {i} of {:?}", &x[i * 32..(i + 1) * 32]);
        }
    }
}

/// The table of [`RowCodes`], written down a second time and value by value.
fn value_of(dtype: DType, row: &RowCodes, i: usize, k: usize) -> f32 {
    let half = |bits: u16| f16::from_bits(bits).to_f32();
    let q = i32::from(row.codes[i]);
    let sub = |g: usize| f32::from(row.sub_scales[g] as i8);
    match dtype {
        DType::Affine(a) => {
            let g = i / a.group().of(k);
            let zero = if a.symmetric() { 1 << (a.bits() - 1) } else { i32::from(row.sub_minima[g]) };
            bf16::from_bits(row.scales[g]).to_f32() * (q - zero) as f32
        }
        DType::Block(b) => match b {
            Block::Q8_0 => half(row.scales[i / 32]) * (q - 128) as f32,
            Block::Q4_0 => half(row.scales[i / 32]) * (q - 8) as f32,
            Block::Q5_0 => half(row.scales[i / 32]) * (q - 16) as f32,
            Block::IQ4_NL => half(row.scales[i / 32]) * (i32::from(IQ4_TABLE[q as usize]) - 128) as f32,
            Block::Q4_1 | Block::Q5_1 => half(row.scales[i / 32]) * q as f32 + half(row.minima[i / 32]),
            Block::Q2_K | Block::Q4_K | Block::Q5_K => {
                let g = i / if b == Block::Q2_K { 16 } else { 32 };
                let d = half(row.scales[i / 256]) * sub(g);
                d * q as f32 - half(row.minima[i / 256]) * f32::from(row.sub_minima[g])
            }
            Block::Q3_K => half(row.scales[i / 256]) * sub(i / 16) * (q - 4) as f32,
            Block::Q6_K => half(row.scales[i / 256]) * sub(i / 16) * (q - 32) as f32,
            Block::IQ4_XS => {
                half(row.scales[i / 256]) * sub(i / 32) * (i32::from(IQ4_TABLE[q as usize]) - 128) as f32
            }
        },
        _ => f32::NAN,
    }
}

fn lengths(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Block(b) if b.layout().0 == 256 => &[0, 256, 1024],
        DType::Block(_) => &[0, 32, 96, 1024],
        _ => &[0, 1, 2, 3, 31, 33, 64, 127, 129, 515],
    }
}

#[test]
fn rows_taken_apart_give_the_dequantised_values_and_go_back_together() {
    let mut random = Random(1);
    let mut row = RowCodes::default();
    for dtype in all_formats() {
        for &k in lengths(dtype) {
            let bytes = quantised(dtype, &random.gaussian(k), &RowOptions::default());
            take_apart(dtype, &bytes, k, &mut row).unwrap();
            let mut again = Vec::new();
            put_together(dtype, &row, &mut again).unwrap();
            assert_eq!(again, bytes, "{dtype} {k}");

            // Any bytes at all, apart from scales that are no numbers.
            let bytes: Vec<u8> = bytes.iter().map(|_| random.bits() as u8 & 0x3b).collect();
            take_apart(dtype, &bytes, k, &mut row).unwrap();
            for (i, value) in read(dtype, &bytes, k).into_iter().enumerate() {
                let wanted = value_of(dtype, &row, i, k);
                assert_eq!(value.to_bits(), wanted.to_bits(), "{dtype} {k} {i}: {value} {wanted}");
                assert_eq!(
                    value_for_kernels(dtype, &row, i, k).to_bits(),
                    wanted.to_bits(),
                    "{dtype} {k} {i}"
                );
            }
        }
    }
}

/// A value by the kernels' description of the format.
fn value_for_kernels(dtype: DType, row: &RowCodes, i: usize, k: usize) -> f32 {
    let format = PackedFormat::of(dtype).unwrap();
    let g = i.checked_div(format.group).unwrap_or(0);
    let half = |bits: u16| f16::from_bits(bits).to_f32();
    let nested = |scales: &[u16], factor: f32| half(scales[i / 256]) * factor;
    let scale = match format.scale {
        ScaleKind::F16 => half(row.scales[g]),
        ScaleKind::BF16 => bf16::from_bits(row.scales[g]).to_f32(),
        ScaleKind::Nested => nested(&row.scales, f32::from(row.sub_scales[g] as i8)),
    };
    let code = i32::from(if format.table { IQ4_TABLE[usize::from(row.codes[i])] } else { row.codes[i] });
    assert!(code < 1 << if format.table { 8 } else { format.bits } && k == row.codes.len());
    match (format.zero, format.scale) {
        (ZeroKind::Fixed(zero), _) => scale * (code - i32::from(zero)) as f32,
        (ZeroKind::Codes, _) => scale * (code - i32::from(row.sub_minima[g])) as f32,
        (ZeroKind::Minima, ScaleKind::Nested) => {
            scale * code as f32 - nested(&row.minima, f32::from(row.sub_minima[g]))
        }
        (ZeroKind::Minima, _) => scale * code as f32 + half(row.minima[g]),
    }
}

#[test]
fn bytes_too_few_or_too_many_are_errors() {
    let mut row = RowCodes::default();
    for dtype in all_formats().into_iter().chain([DType::F32, DType::F16, DType::BF16]) {
        let k = 256;
        let bytes = quantised(dtype, &vec![0.5; k], &RowOptions::default());
        for wrong in [0, 1, bytes.len() - 1, bytes.len() + 1] {
            let mut wrong_bytes = bytes.clone();
            wrong_bytes.resize(wrong, 0);
            let error = dequantise_row(dtype, &wrong_bytes, &mut vec![0.0; k]).unwrap_err();
            assert!(matches!(error, Error::Bytes { found, .. } if found == wrong), "{error}");
            if dtype.is_quantised() {
                let error = take_apart(dtype, &wrong_bytes, k, &mut row).unwrap_err();
                assert!(matches!(error, Error::Bytes { found, .. } if found == wrong), "{error}");
            }
        }
    }
    let q4k = DType::Block(Block::Q4_K);
    let error = quantise_row(q4k, &[0.0; 255], &RowOptions::default(), &mut Vec::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a row of 255 values cannot be Q4_K: no whole number of blocks, or too large"
    );
    assert!(matches!(take_apart(q4k, &[], usize::MAX, &mut row), Err(Error::RowLength { .. })));
    assert!(matches!(take_apart(DType::F32, &[], 0, &mut row), Err(Error::DType { .. })));
    assert!(matches!(dequantise_row(DType::I32, &[0; 4], &mut [0.0]), Err(Error::DType { .. })));
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    for dtype in all_formats().into_iter().chain([DType::F32, DType::F16, DType::BF16]) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; 5120];
            x[4321] = bad;
            let mut out = vec![7];
            let error = quantise_row(dtype, &x, &RowOptions::default(), &mut out).unwrap_err();
            assert!(matches!(error, Error::NotFinite { index: 4321, .. }), "{error}");
            assert_eq!(out, [7]);
        }
    }
    let mut importance = vec![1.0; 32];
    importance[3] = -1.0;
    let options =
        RowOptions { method: Method::Search, importance: Some(&importance), ..RowOptions::default() };
    let error = quantise_row(DType::Block(Block::Q4_0), &[0.0; 32], &options, &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "importance: element 3 is -1, expected a finite number of at least 0");
}

#[test]
fn values_beyond_an_f16_scale_are_named() {
    for dtype in Block::ALL.map(DType::Block).into_iter().chain([DType::F16]) {
        let mut x = vec![0.5; 512];
        x[300] = -3e38;
        for method in [Method::Round, Method::Search] {
            let options = RowOptions { method, ..RowOptions::default() };
            let error = quantise_row(dtype, &x, &options, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, Error::Range { index: 300, .. }), "{dtype}: {error}");
        }
    }
}

/// Largest excess of an error over half a step, in steps; at most 0 where rounding is right.
fn excess(format: Affine, x: &[f32]) -> f64 {
    let dtype = DType::Affine(format);
    let bytes = quantised(dtype, x, &RowOptions::default());
    let mut row = RowCodes::default();
    take_apart(dtype, &bytes, x.len(), &mut row).unwrap();
    let mut worst = f64::NEG_INFINITY;
    for (i, (&x, value)) in x.iter().zip(read(dtype, &bytes, x.len())).enumerate() {
        let step = bf16::from_bits(row.scales[i / format.group().of(row.codes.len())]).to_f64().abs();
        // The quotient is rounded to f32, which may tip a tie.
        let tie = f64::from(x).abs() * f64::from(f32::EPSILON);
        let error = (f64::from(x) - f64::from(value)).abs();
        if x == 0.0 {
            assert_eq!(value, 0.0, "{format:?}");
        }
        worst = worst.max(if error <= step / 2.0 + tie { 0.0 } else { error / step });
    }
    worst
}

/// Finite f32 of every kind.
fn any_finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(|bits| {
        let x = f32::from_bits(bits);
        if x.is_finite() { x } else { f32::from_bits(bits & 0xbf7f_ffff) }
    })
}

fn adversarial_row() -> impl Strategy<Value = Vec<f32>> {
    let near = |scale: f32| prop::collection::vec((-1.0f32..1.0).prop_map(move |x| x * scale), 0..300);
    prop_oneof![
        4 => near(1.0),
        2 => prop::collection::vec(any_finite(), 0..300),
        1 => (any_finite(), 1usize..200).prop_map(|(x, n)| vec![x; n]),
        1 => (any_finite(), near(1e-3)).prop_map(|(c, x)| x.into_iter().map(|x| c * (0.9 + x)).collect()),
        1 => near(1.0).prop_map(|x| x.into_iter().map(f32::abs).collect()),
        1 => near(1.0).prop_map(|x| x.into_iter().map(|x| -x.abs()).collect()),
        1 => near(f32::MAX),
        1 => near(1e-38),
        1 => near(1e-44),
        1 => prop::collection::vec(prop_oneof![Just(0.0), Just(-0.0), Just(f32::MAX), Just(f32::MIN), Just(1e-45)], 0..80),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn affine_errors_are_at_most_half_a_step_for_all_finite_values(x in adversarial_row()) {
        for format in Affine::all() {
            let excess = excess(format, &x);
            prop_assert!(excess <= 0.0, "{format:?}: {excess} steps");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_format_takes_any_row_without_panic_and_reads_back_finite(
        mut x in adversarial_row(),
        small in any::<bool>(),
    ) {
        if small {
            x.iter_mut().for_each(|x| *x = x.clamp(-1e4, 1e4));
        }
        for dtype in all_formats() {
            let mut x = x.clone();
            if let DType::Block(b) = dtype {
                x.resize(x.len().next_multiple_of(b.layout().0), 0.25);
            }
            for method in [Method::Round, Method::Search] {
                let mut bytes = Vec::new();
                match quantise_row(dtype, &x, &RowOptions { method, ..RowOptions::default() }, &mut bytes) {
                    Ok(()) => prop_assert!(read(dtype, &bytes, x.len()).iter().all(|v| v.is_finite()), "{dtype}"),
                    Err(Error::Range { .. }) => prop_assert!(!small, "{dtype}"),
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
        }
    }
}

#[test]
fn rows_of_one_matrix_have_one_scale_and_errors_of_at_most_half_of_it() {
    let mut random = Random(11);
    for format in Affine::all().filter(|a| a.group() == Group::Tensor) {
        let dtype = DType::Affine(format);
        let rows: Vec<Vec<f32>> =
            [1.0, 0.01, 30.0].map(|s| random.gaussian(70).iter().map(|x| x * s).collect()).into();
        let ranges: Vec<(f32, f32)> = rows.iter().map(|r| range(r).unwrap()).collect();
        let all = ranges.iter().fold((0.0f32, 0.0f32), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        let mut scales = Vec::new();
        for (i, x) in rows.iter().enumerate() {
            let options = RowOptions { range: Some(all), method: Method::Search, ..RowOptions::default() };
            let bytes = quantised(dtype, x, &options);
            let mut row = RowCodes::default();
            take_apart(dtype, &bytes, x.len(), &mut row).unwrap();
            let step = bf16::from_bits(row.scales[0]).to_f32().abs();
            for (x, y) in x.iter().zip(read(dtype, &bytes, x.len())) {
                assert!((x - y).abs() <= step * 0.50001, "{dtype}: {x} {y} {step}");
            }
            // The negative control: a row alone has another scale, unless it is the one with the extremes.
            let alone = quantised(dtype, x, &RowOptions::default());
            assert!(i == 2 || alone[..2] != bytes[..2], "{dtype} {i}");
            scales.push((row.scales, row.sub_minima));
        }
        assert!(scales.iter().all(|s| *s == scales[0]), "{dtype}: {scales:?}");
        let bad = RowOptions { range: Some((0.0, f32::INFINITY)), ..RowOptions::default() };
        let error = quantise_row(dtype, &rows[0], &bad, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::NotFinite { what: "range", .. }), "{error}");
    }
    assert!(matches!(range(&[1.0, f32::NAN]), Err(Error::NotFinite { index: 1, .. })));
}

/// The largest error that plain rounding of value `i` to a block format may have, from the block's own scales.
///
/// A value between two codes is at most half of their distance off, and one beyond the last code, on the side that has a
/// code less, a whole one. Integer scales of sub-groups are rounded to a unit `d`: half of it is missed at every step
/// from zero, all of it where the range of integers has one less on one side. f16 rounds scales by `2^-11` of them, and
/// by `2^-25` near zero.
fn block_bound(block: Block, row: &RowCodes, i: usize) -> f64 {
    let half = |bits: u16| f16::from_bits(bits).to_f64().abs();
    // Codes from zero to the farthest one, and the largest error in steps.
    let (reach, off) = match block {
        Block::Q8_0 => (127.0, 0.5),
        Block::Q4_0 => (8.0, 1.0),
        Block::Q5_0 => (16.0, 1.0),
        Block::Q3_K => (4.0, 1.0),
        Block::Q6_K => (32.0, 1.0),
        Block::Q4_1 | Block::Q4_K => (15.0, 0.5),
        Block::Q5_1 | Block::Q5_K => (31.0, 0.5),
        Block::Q2_K => (3.0, 0.5),
        // The table goes from -127 to 113.
        Block::IQ4_NL | Block::IQ4_XS => (127.0, 14.0),
    };
    let per = if block.layout().0 == 256 { 256 } else { 32 };
    let (d, m) = (half(row.scales[i / per]), row.minima.get(i / per).map_or(0.0, |&m| half(m)));
    let rounded = |step: f64, minimum: f64| off * step + (reach * step + minimum) * 2f64.powi(-10);
    let (tiny, group) =
        (2f64.powi(-24), if matches!(block, Block::Q2_K | Block::Q3_K | Block::Q6_K) { 16 } else { 32 });
    if per == 32 {
        return rounded(d, m) + (reach + 1.0) * tiny;
    }
    let sub = f64::from((row.sub_scales[i / group] as i8).unsigned_abs());
    let sub_minimum = row.sub_minima.get(i / group).map_or(0.0, |&m| f64::from(m));
    let missed = if row.minima.is_empty() { reach * d } else { (reach * d + m) / 2.0 };
    rounded(sub * d, sub_minimum * m) + missed * (1.0 + 2f64.powi(-10)) + 128.0 * (reach + 1.0) * tiny
}

/// The largest error of a row as a part of [`block_bound`].
fn part_of_bound(block: Block, x: &[f32], bytes: &[u8]) -> f64 {
    let dtype = DType::Block(block);
    let mut row = RowCodes::default();
    take_apart(dtype, bytes, x.len(), &mut row).unwrap();
    let values = read(dtype, bytes, x.len());
    let part = |(i, (x, y)): (usize, (&f32, &f32))| {
        (f64::from(*x) - f64::from(*y)).abs() / block_bound(block, &row, i)
    };
    x.iter().zip(&values).enumerate().map(part).fold(0.0, f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn errors_of_block_formats_are_within_what_their_scales_allow(mut x in adversarial_row()) {
        x.iter_mut().for_each(|x| *x = x.clamp(-1e4, 1e4));
        for block in Block::ALL {
            let mut x = x.clone();
            x.resize(x.len().next_multiple_of(block.layout().0), 0.25);
            let part = part_of_bound(block, &x, &quantised(DType::Block(block), &x, &RowOptions::default()));
            prop_assert!(part <= 1.0, "{block:?}: {part} of the bound");
        }
    }
}

#[test]
fn a_wrong_code_is_beyond_the_bound_of_its_block_format() {
    for block in Block::ALL {
        let dtype = DType::Block(block);
        let x = Random(block as u64).gaussian(512);
        let bytes = quantised(dtype, &x, &RowOptions::default());
        let right = part_of_bound(block, &x, &bytes);
        assert!(right <= 1.0 && right > 0.2, "{block:?}: {right}");
        let mut row = RowCodes::default();
        take_apart(dtype, &bytes, x.len(), &mut row).unwrap();
        // The other half of the codes.
        let top = if block == Block::Q8_0 { 0x80 } else { 1 << (PackedFormat::of(dtype).unwrap().bits - 1) };
        row.codes[300] ^= top;
        let mut wrong = Vec::new();
        put_together(dtype, &row, &mut wrong).unwrap();
        let wrong = part_of_bound(block, &x, &wrong);
        println!("{block:?}: {right:.2} of the bound, with a wrong code {wrong:.1}");
        assert!(wrong > 1.0, "{block:?}: {wrong}");
    }
}

/// sum importance * (w - w')^2
fn weighted_error(dtype: DType, x: &[f32], importance: &[f32], method: Method) -> f64 {
    let bytes =
        quantised(dtype, x, &RowOptions { method, importance: Some(importance), ..RowOptions::default() });
    let values = read(dtype, &bytes, x.len());
    let error = |((&x, &y), &w): ((&f32, &f32), &f32)| f64::from(w) * (f64::from(x) - f64::from(y)).powi(2);
    x.iter().zip(&values).zip(importance).map(error).sum()
}

#[test]
fn searching_is_never_worse_than_rounding_and_mostly_much_better() {
    let mut random = Random(3);
    for dtype in all_formats() {
        let mut gain = (0.0, 0.0);
        for case in 0..24 {
            let mut x = random.gaussian(512);
            if case % 3 == 1 {
                x.iter_mut().step_by(17).for_each(|x| *x *= 8.0);
            }
            if case % 3 == 2 {
                x.iter_mut().for_each(|x| *x = x.abs() * 1e-3 + 1e-3);
            }
            let mut importance: Vec<f32> = (0..512).map(|_| random.gauss().powi(4) + 1e-3).collect();
            importance[case * 20] = 0.0;
            let rounded = weighted_error(dtype, &x, &importance, Method::Round);
            let searched = weighted_error(dtype, &x, &importance, Method::Search);
            assert!(searched <= rounded * (1.0 + 1e-9), "{dtype} {case}: {searched} {rounded}");
            if case % 3 != 2 {
                gain = (gain.0 + searched, gain.1 + rounded);
            }
        }
        let most = match dtype {
            // Eight bits leave little to gain, and one scale for a matrix is not searched.
            DType::Affine(a) if a.bits() == 8 || a.group() == Group::Tensor => 1.0,
            DType::Block(Block::Q8_0) => 1.0,
            _ => 0.85,
        };
        println!("{dtype:>14}: searched / rounded = {:.3}", gain.0 / gain.1);
        assert!(gain.0 <= most * gain.1, "{dtype}: {gain:?}");
    }
}

/// The source article's `linear_quantize`, step by step: `int()` truncates the zero point, nothing is clamped, and
/// `astype(uint8)` wraps. Returns codes before the cast.
fn article_codes(x: &[f32], bits: u32) -> Vec<i64> {
    let (least, most) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    let scale = f64::from(most - least) / f64::from((1 << bits) - 1);
    let zero_point = (-f64::from(least) / scale).trunc() as i64;
    x.iter().map(|&x| (f64::from(x) / scale).round_ties_even() as i64 + zero_point).collect()
}

#[test]
fn the_source_articles_quantiser_wraps_in_half_of_all_groups_and_this_one_in_none() {
    let mut random = Random(4);
    for bits in [8, 4, 2] {
        let format = Affine::new(bits, Group::G128, false).unwrap();
        let (mut wrapped, groups) = (0, 1000);
        for _ in 0..groups {
            let x = random.gaussian(128);
            let codes = article_codes(&x, u32::from(bits));
            wrapped += usize::from(codes.iter().any(|q| !(0..1 << bits).contains(q)));
            assert_eq!(excess(format, &x), 0.0);
        }
        println!("{bits} bits: {wrapped} of {groups} groups hold a code that wraps");
        assert!((400..600).contains(&wrapped), "{bits} bits: {wrapped}");
    }
    // A wrapped code is as wrong as can be: here -1 becomes 255, the smallest value the largest.
    let x = [-0.95, 0.0, 254.05];
    let codes = article_codes(&x, 8);
    assert_eq!(codes, [-1, 0, 254]);
    assert_eq!(codes[0] as u8, 255);
    // A constant group divides by zero there and is kept to bf16's precision here.
    assert!(article_codes(&[0.5; 128], 4).iter().all(|q| !(0..16).contains(q)));
    let dtype = DType::Affine(Affine::new(4, Group::G128, false).unwrap());
    for constant in [0.5, -3.0, 1e30, 0.0] {
        let x = [constant; 128];
        for value in read(dtype, &quantised(dtype, &x, &RowOptions::default()), 128) {
            assert!((value - constant).abs() <= constant.abs() / 256.0, "{constant} {value}");
        }
    }
}

/// Rows as they are, and with outliers, zeros and very small and large numbers among them.
#[test]
fn every_instruction_set_chooses_the_same_codes_and_reads_the_same_values() {
    let mut random = Random(11);
    for dtype in all_formats() {
        for &k in lengths(dtype).iter().chain(&[13_696]) {
            if dtype.row_bytes(k).is_none() {
                continue;
            }
            for special in [false, true] {
                let mut x = random.gaussian(k);
                if special {
                    let odd = [0.0, -0.0, 40.0, -1e-6, 1e-30, 3e4];
                    x.iter_mut().step_by(7).zip(odd.iter().cycle()).for_each(|(x, v)| *x = *v);
                }
                let importance: Vec<f32> = (0..k).map(|_| random.uniform().abs()).collect();
                for importance in [None, Some(importance.as_slice())] {
                    let encoded = |isa| {
                        let mut row = RowCodes::default();
                        encode_units_on(isa, dtype, &x, importance, &mut row).unwrap();
                        let mut bytes = Vec::new();
                        put_together(dtype, &row, &mut bytes).unwrap();
                        let mut values = vec![0.0; k];
                        dequantise_row_on(isa, dtype, &bytes, &mut values).unwrap();
                        (bytes, values.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
                    };
                    let plain = encoded(Isa::Scalar);
                    for isa in Isa::available() {
                        assert!(encoded(isa) == plain, "{dtype} of {k} on {isa}, {special}");
                    }
                }
            }
        }
    }
}

#[test]
fn floats_are_stored_as_floats() {
    let x = [0.0, -1.5, 65504.0, 1e-7, 3.0];
    assert_eq!(read(DType::F32, &quantised(DType::F32, &x, &RowOptions::default()), 5), x);
    let halves = x.map(|x| f16::from_f32(x).to_f32());
    assert_eq!(read(DType::F16, &quantised(DType::F16, &x, &RowOptions::default()), 5), halves);
    let brains = x.map(|x| bf16::from_f32(x).to_f32());
    assert_eq!(read(DType::BF16, &quantised(DType::BF16, &x, &RowOptions::default()), 5), brains);
    let most = read(DType::BF16, &quantised(DType::BF16, &[f32::MIN], &RowOptions::default()), 1);
    assert_eq!(most, [bf16::MIN.to_f32()]);
    let long: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    assert_eq!(read(DType::F16, &quantised(DType::F16, &long, &RowOptions::default()), 1000), long);
}

/// Values per second and core of the main functions; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "measures time"]
fn speed() {
    let x = Random(5).gaussian(4096);
    let importance: Vec<f32> = x.iter().map(|x| x * x + 0.1).collect();
    let mut row = RowCodes::default();
    let mut out = vec![0.0; 4096];
    let rate = |f: &mut dyn FnMut()| {
        f();
        let (start, mut runs) = (std::time::Instant::now(), 0);
        while start.elapsed().as_millis() < 150 {
            f();
            runs += 1;
        }
        4096.0 * f64::from(runs) / start.elapsed().as_secs_f64() / 1e6
    };
    println!("{:>14} {:>9} {:>9} {:>9} {:>9}  Mvalues/s", "", "round", "search", "read", "apart");
    for dtype in all_formats() {
        let mut bytes = Vec::new();
        let round = rate(&mut || {
            bytes.clear();
            quantise_row(dtype, &x, &RowOptions::default(), &mut bytes).unwrap();
        });
        let options =
            RowOptions { method: Method::Search, importance: Some(&importance), ..RowOptions::default() };
        let search = rate(&mut || {
            bytes.clear();
            quantise_row(dtype, &x, &options, &mut bytes).unwrap();
        });
        let read = rate(&mut || dequantise_row(dtype, &bytes, &mut out).unwrap());
        let apart = rate(&mut || take_apart(dtype, &bytes, 4096, &mut row).unwrap());
        println!("{:>14} {round:9.0} {search:9.1} {read:9.0} {apart:9.0}", dtype.name());
    }
}

/// `rows` activations of `k` channels that depend on a few common factors, of unequal sizes.
pub(crate) fn correlated_inputs(rows: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let factors = (k / 8).max(1);
    let mixing = random.gaussian(factors * k);
    let sizes: Vec<f32> = (0..k).map(|_| (random.gauss() * 0.7).exp()).collect();
    let mut x = Vec::new();
    for _ in 0..rows {
        let f = random.gaussian(factors);
        for c in 0..k {
            let common: f32 = f.iter().zip(&mixing[c * factors..]).map(|(f, m)| f * m).sum();
            x.push(sizes[c] * (common / (factors as f32).sqrt() + 0.3 * random.gauss()));
        }
    }
    x
}

/// The sum of `x x^T`.
pub(crate) fn moments(x: &[f32], k: usize) -> Vec<f32> {
    let mut h = vec![0.0; k * k];
    for row in x.chunks_exact(k) {
        for (h, a) in h.chunks_exact_mut(k).zip(row) {
            h.iter_mut().zip(row).for_each(|(h, b)| *h += a * b);
        }
    }
    h
}

/// Squared error of the outputs over all inputs.
pub(crate) fn output_error_of_values(weights: &[f32], values: &[f32], x: &[f32], k: usize) -> f64 {
    let mut total = 0.0;
    for (w, q) in weights.chunks_exact(k).zip(values.chunks_exact(k)) {
        let errors: Vec<f32> = w.iter().zip(q).map(|(w, q)| w - q).collect();
        for x in x.chunks_exact(k) {
            let dot: f64 = errors.iter().zip(x).map(|(e, x)| f64::from(*e) * f64::from(*x)).sum();
            total += dot * dot;
        }
    }
    total
}

/// The same for the bytes of rows.
pub(crate) fn output_error(weights: &[f32], bytes: &[u8], dtype: DType, x: &[f32], k: usize) -> f64 {
    let values: Vec<f32> =
        bytes.chunks_exact(dtype.row_bytes(k).unwrap()).flat_map(|bytes| read(dtype, bytes, k)).collect();
    output_error_of_values(weights, &values, x, k)
}
