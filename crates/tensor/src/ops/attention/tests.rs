use super::*;
use crate::ops::check::{Close, check, try_check, values};
use crate::ops::kv_store_twin;

const CLOSE: Close = Close { relative: 1e-5, absolute: 2e-6 };

/// Operands with gaps between rows, which stay as they are.
struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sizes: [usize; 5],
    gap: usize,
}

impl Case {
    fn new(sizes: [usize; 5], gap: usize) -> Case {
        let [t, s, h, kvh, d] = sizes;
        let q = values(t * (h * d + gap), 1).iter().map(|v| v * 3.0).collect();
        Case { q, k: values(s * (kvh * d + gap), 2), v: values(s * (kvh * d + gap), 3), sizes, gap }
    }

    fn args<'a>(&'a self, mask: Mask<'a>) -> Attention<'a> {
        let [t, s, h, kvh, d] = self.sizes;
        let (wide, narrow) = (h * d + self.gap, kvh * d + self.gap);
        Attention {
            q: &self.q,
            q_stride: wide,
            k: KvRows::f32(&self.k, narrow),
            v: KvRows::f32(&self.v, narrow),
            t,
            s,
            h,
            kvh,
            d,
            scale: 1.0 / (d as f32).sqrt(),
            mask,
            out_stride: wide,
            fewer: false,
        }
    }

    fn compare(&self, mask: Mask<'_>) {
        compare(&self.args(mask), &format!("{:?} {mask:?}", self.sizes));
    }

    /// Keys or values as a cache in `format` has them: their bytes and those of a row.
    fn stored(&self, x: &[f32], format: KvFormat) -> (Vec<u8>, usize) {
        let [_, s, _, kvh, d] = self.sizes;
        let row = kvh * format.head_bytes(d).unwrap();
        let mut bytes = vec![0; s * row];
        kv_store_twin(x, kvh * d + self.gap, [s, kvh, d], format, &mut bytes).unwrap();
        (bytes, row)
    }

    /// With keys and values in every format; the twin reads the same bytes, so the formats cost no accuracy here.
    fn compare_stored(&self, mask: Mask<'_>) {
        for format in KvFormat::ALL {
            let ((k, row), (v, _)) = (self.stored(&self.k, format), self.stored(&self.v, format));
            let (k, v) = (KvRows::new(format, &k, row), KvRows::new(format, &v, row));
            let case = format!("{:?} {mask:?} {format}", self.sizes);
            compare(&Attention { k, v, ..self.args(mask) }, &case);
        }
    }
}

fn compare(args: &Attention<'_>, case: &str) {
    compare_within(CLOSE, args, case);
}

fn compare_within(close: Close, args: &Attention<'_>, case: &str) {
    let mut wanted = vec![0.5; args.t * args.out_stride];
    attention_twin(args, &mut wanted).unwrap();
    check(case, &wanted, close, &|cpu, out| {
        out.fill(0.5);
        attention(cpu, args, out)
    });
}

#[test]
fn caches_of_every_format_match_the_twin() {
    for [t, s, h, kvh, d] in [
        [1, 1, 1, 1, 1],
        [1, 17, 2, 1, 16],
        [1, 300, 16, 1, 128],
        [1, 65, 32, 2, 48],
        [3, 67, 6, 2, 17],
        [7, 90, 5, 1, 33],
        [20, 70, 4, 2, 64],
        [50, 300, 3, 1, 40],
        [2, 1100, 4, 2, 16],
    ] {
        Case::new([t, s, h, kvh, d], 3).compare_stored(Mask::Causal { past: s - t });
        Case::new([t, s, h, kvh, d], 0).compare_stored(Mask::Full);
    }
}

/// The largest error of attention over a cache of 128 components a head, queries of three times the keys' size, per
/// unit of the values: codes have half a step of error, 1/254 and 1/15 of the range, which a softmax over many keys
/// averages; measured errors are about half of these.
const STORED_ERROR: [(KvFormat, f32); 3] =
    [(KvFormat::F16, 1e-3), (KvFormat::Int8, 8e-3), (KvFormat::Int4, 1.2e-1)];

#[test]
fn formats_cost_no_more_than_their_bounds() {
    for s in [4, 64, 500] {
        let case = Case::new([1, s, 16, 1, 128], 0);
        let args = case.args(Mask::Full);
        let mut exact = vec![0.0; 16 * 128];
        attention_twin(&args, &mut exact).unwrap();
        let mut last = 0.0;
        for (format, most) in STORED_ERROR {
            let ((k, row), (v, _)) = (case.stored(&case.k, format), case.stored(&case.v, format));
            let (k, v) = (KvRows::new(format, &k, row), KvRows::new(format, &v, row));
            let mut out = vec![0.0; 16 * 128];
            attention(&Cpu::new(1).unwrap(), &Attention { k, v, ..args }, &mut out).unwrap();
            let worst = out.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= most && worst > last, "{format} of {s} keys: {worst}, at most {most}");
            last = worst;
        }
    }
}

#[test]
fn misaligned_caches_are_typed_errors() {
    let case = Case::new([1, 4, 1, 1, 8], 0);
    let args = case.args(Mask::Full);
    let bytes = [0u16; 64];
    let bytes: &[u8] = bytemuck::cast_slice(&bytes);
    let run = |k| attention(&Cpu::new(1).unwrap(), &Attention { k, ..args }, &mut [0.0; 8]);
    assert!(run(KvRows::new(KvFormat::F16, bytes, 16)).is_ok());
    assert!(matches!(run(KvRows::new(KvFormat::F16, &bytes[1..], 16)), Err(Error::Value { .. })));
    assert!(matches!(run(KvRows::new(KvFormat::F16, bytes, 17)), Err(Error::Value { .. })));
    assert!(matches!(run(KvRows::new(KvFormat::Int8, &bytes[..39], 10)), Err(Error::Size { .. })));
}

#[test]
fn causal_attention_matches_its_twin() {
    for [t, s, h, kvh, d] in [
        [1, 1, 1, 1, 1],
        [1, 17, 2, 1, 16],
        [3, 3, 4, 2, 17],
        [15, 31, 3, 3, 8],
        [16, 130, 4, 1, 32],
        [65, 65, 2, 2, 33],
        [100, 260, 2, 1, 64],
        [1, 300, 16, 1, 128],
        [300, 300, 1, 1, 15],
    ] {
        Case::new([t, s, h, kvh, d], 3).compare(Mask::Causal { past: s - t });
    }
}

#[test]
fn full_attention_matches_its_twin() {
    for sizes in [[1, 0, 1, 1, 4], [7, 100, 2, 1, 20], [130, 129, 2, 2, 16], [0, 5, 1, 1, 4]] {
        Case::new(sizes, 0).compare(Mask::Full);
    }
}

#[test]
fn segments_see_only_themselves() {
    let case = Case::new([150, 150, 2, 2, 24], 1);
    for bounds in [&[0, 150][..], &[0, 1, 1, 64, 128, 150], &[0, 149, 150], &[0, 0, 150, 150]] {
        case.compare(Mask::Segments(bounds));
    }
}

#[test]
fn many_keys_are_split_and_joined() {
    for (t, h, kvh) in [(1, 4, 2), (2, 2, 2), (5, 2, 1)] {
        let s = 2600;
        Case::new([t, s, h, kvh, 16], 0).compare(Mask::Causal { past: s - t });
        // The last parts see nothing.
        Case::new([t, s, h, kvh, 16], 0).compare(Mask::Causal { past: 3 });
    }
}

#[test]
fn large_and_equal_scores_are_stable() {
    let mut case = Case::new([20, 200, 1, 1, 16], 0);
    case.k.fill(0.25);
    case.compare(Mask::Full);
    case.q.iter_mut().for_each(|v| *v *= 1e4);
    case.k = values(200 * 16, 4).iter().map(|v| (v * 8.0).round()).collect();
    case.q.iter_mut().for_each(|v| *v = v.round());
    case.compare(Mask::Causal { past: 180 });
}

#[test]
fn scores_that_rise_from_block_to_block_are_stable() {
    // By less than the slack of the reference, by more, and back down; and a first block whose keys all count nothing.
    for rises in [[0.0, 2.0, 4.0], [0.0, 24.0, 3.0], [-1e30, 3.0, 16.0]] {
        let mut case = Case::new([600, 600, 1, 1, 16], 0);
        for row in case.q.chunks_exact_mut(16) {
            row[0] = 4.0;
        }
        for (i, row) in case.k.chunks_exact_mut(16).enumerate() {
            row[0] = rises[i / 256];
        }
        // Scores of 24 are rounded to a millionth.
        let close = Close { relative: 1e-5, absolute: 1e-5 };
        for mask in [Mask::Segments(&[0, 600]), Mask::Causal { past: 0 }] {
            compare_within(close, &case.args(mask), &format!("{rises:?} {mask:?}"));
        }
    }
}

#[test]
fn a_nan_reaches_only_the_rows_that_see_it() {
    let mut case = Case::new([40, 40, 1, 1, 16], 0);
    case.k[30 * 16] = f32::NAN;
    let args = case.args(Mask::Causal { past: 0 });
    let mut wanted = vec![0.0; 40 * 16];
    attention_twin(&args, &mut wanted).unwrap();
    assert!(wanted[..30 * 16].iter().all(|v| v.is_finite()) && wanted[30 * 16..].iter().all(|v| v.is_nan()));
    case.compare(Mask::Causal { past: 0 });
}

#[test]
fn a_wrong_mask_is_noticed() {
    let case = Case::new([40, 60, 2, 1, 16], 0);
    let mut wanted = vec![0.0; 40 * 32];
    attention_twin(&case.args(Mask::Causal { past: 19 }), &mut wanted).unwrap();
    let run = |cpu: &Cpu, out: &mut [f32]| attention(cpu, &case.args(Mask::Causal { past: 20 }), out);
    assert!(try_check(&wanted, CLOSE, &run).is_err());
}

#[test]
fn operands_that_do_not_fit_are_typed_errors() {
    let cpu = Cpu::new(1).unwrap();
    let case = Case::new([4, 8, 4, 2, 8], 0);
    let good = case.args(Mask::Causal { past: 4 });
    let run = |args: Attention<'_>, n: usize| attention(&cpu, &args, &mut vec![0.0; n]);
    assert!(run(good, 4 * 32).is_ok());
    assert!(matches!(run(good, 4 * 32 - 1), Err(Error::Size { operand: "out", .. })));
    assert!(matches!(
        run(Attention { mask: Mask::Causal { past: 5 }, ..good }, 128),
        Err(Error::Value { .. })
    ));
    assert!(run(Attention { mask: Mask::Causal { past: usize::MAX }, ..good }, 128).is_err());
    assert!(run(Attention { kvh: 3, ..good }, 128).is_err());
    assert!(run(Attention { kvh: 0, ..good }, 128).is_err());
    assert!(run(Attention { d: 0, ..good }, 128).is_err());
    assert!(run(Attention { q_stride: 31, ..good }, 128).is_err());
    assert!(matches!(run(Attention { s: 9, ..good }, 128), Err(Error::Size { operand: "k", .. })));
    for bounds in [&[][..], &[0, 3], &[1, 4], &[0, 3, 2, 4]] {
        let args = Attention { mask: Mask::Segments(bounds), s: 4, ..good };
        assert!(matches!(run(args, 128), Err(Error::Value { .. })), "{bounds:?}");
    }
}

#[test]
fn scratch_is_what_was_declared() {
    let case = Case::new([1, 2600, 2, 1, 16], 0);
    let cpu = Cpu::new(2).unwrap();
    let args = case.args(Mask::Causal { past: 2599 });
    attention(&cpu, &args, &mut [0.0; 32]).unwrap();
    assert!(cpu.scratch_bytes() <= attention_scratch_bytes(&cpu, &args).unwrap());
}

/// Cases of [`attention_int8`]: sizes, and the largest error in units of the values, whose range is -1..1: a step of
/// their codes is 1/127, and scores of a few units err by some hundredths.
const BYTES: [([usize; 5], f32); 9] = [
    ([1, 1, 1, 1, 1], 1e-2),
    ([3, 3, 4, 2, 17], 2e-2),
    ([16, 16, 3, 3, 8], 2e-2),
    ([65, 65, 2, 2, 33], 1e-2),
    ([100, 100, 2, 1, 64], 1e-2),
    ([257, 257, 2, 2, 16], 1e-2),
    ([300, 300, 1, 1, 128], 1e-2),
    ([7, 515, 4, 1, 64], 1e-2),
    ([40, 1, 2, 1, 4], 1e-2),
];

#[test]
fn attention_over_bytes_is_near_the_twin_on_every_instruction_set() {
    for (sizes, most) in BYTES {
        let case = Case::new(sizes, 3);
        let args = case.args(Mask::Full);
        assert!(bytes::suits(&args));
        let mut wanted = vec![0.5; args.t * args.out_stride];
        attention_twin(&args, &mut wanted).unwrap();
        let close = Close { relative: 0.0, absolute: most };
        check(&format!("bytes {sizes:?}"), &wanted, close, &|cpu, out| {
            out.fill(0.5);
            attention_int8(cpu, &args, out)
        });
        // The bound means something: without the second half of the keys the result is beyond it.
        if args.s > 1 {
            let (kept, mut half) = (Attention { s: args.s / 2, ..args }, vec![0.5; wanted.len()]);
            attention_int8(&Cpu::new(1).unwrap(), &kept, &mut half).unwrap();
            let apart = half.iter().zip(&wanted).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
            assert!(apart > 2.0 * most, "bytes {sizes:?}: {apart}");
        }
    }
}

#[test]
fn a_long_tail_of_small_weights_counts_in_attention_over_bytes() {
    // One key whose weight is 1, and many of e^-7 each, which eight bits would take for nothing.
    let (s, d) = (1500, 16);
    let q = vec![1.0; d];
    let mut k = vec![0.0; s * d];
    k[..d].fill(7.0 / d as f32 * 4.0);
    let v: Vec<f32> = (0..s * d).map(|i| if i < d { 0.0 } else { 1.0 }).collect();
    let args = Attention {
        q: &q,
        q_stride: d,
        k: KvRows::f32(&k, d),
        v: KvRows::f32(&v, d),
        t: 1,
        s,
        h: 1,
        kvh: 1,
        d,
        scale: 0.25,
        mask: Mask::Full,
        out_stride: d,
        fewer: false,
    };
    let (mut wanted, mut out) = (vec![0.0; d], vec![0.0; d]);
    attention_twin(&args, &mut wanted).unwrap();
    assert!(wanted[0] > 0.5, "the tail has the greater part: {}", wanted[0]);
    attention_int8(&Cpu::new(1).unwrap(), &args, &mut out).unwrap();
    assert!((out[0] - wanted[0]).abs() < 0.02, "{} for {}", out[0], wanted[0]);
}

#[test]
fn attention_over_bytes_keeps_nan_and_leaves_the_rest_to_attention() {
    let mut case = Case::new([20, 20, 2, 2, 16], 0);
    case.v[3 * 32 + 5] = f32::NAN;
    case.q[7 * 32 + 20] = f32::INFINITY;
    let mut out = vec![0.0; 20 * 32];
    attention_int8(&Cpu::new(2).unwrap(), &case.args(Mask::Full), &mut out).unwrap();
    for (i, v) in out.iter().enumerate() {
        let (row, column) = (i / 32, i % 32);
        let wanted = column == 5 || (row == 7 && column >= 16);
        assert_eq!(v.is_nan(), wanted, "row {row} column {column}: {v}");
    }
    let case = Case::new([20, 20, 2, 2, 16], 0);
    for mask in [Mask::Causal { past: 0 }, Mask::Segments(&[0, 8, 20])] {
        let (mut a, mut b) = (vec![0.0; 20 * 32], vec![0.0; 20 * 32]);
        attention(&Cpu::new(1).unwrap(), &case.args(mask), &mut a).unwrap();
        attention_int8(&Cpu::new(1).unwrap(), &case.args(mask), &mut b).unwrap();
        assert_eq!(a, b);
    }
}

#[test]
fn products_of_pairs_match_the_twin() {
    for ([t, h, kvh, d], bounds) in [
        ([1, 1, 1, 1], vec![0, 1]),
        ([3, 2, 1, 7], vec![0, 3]),
        ([70, 2, 2, 64], vec![0, 70]),
        ([300, 3, 3, 64], vec![0, 300]),
        ([300, 2, 1, 80], vec![0, 5, 5, 290, 300]),
        ([40, 1, 1, 143], vec![0, 40]),
        // Heads that are too wide for pairs.
        ([40, 1, 1, 144], vec![0, 40]),
    ] {
        let case = Case::new([t, t, h, kvh, d], 3);
        // Magnitudes far apart: queries and keys of a thousand and a thousandth, values of a million.
        for [of_q, of_k, of_v] in [[1.0, 1.0, 1.0], [1e3, 1e-3, 1e6]] {
            let scaled = |v: &[f32], by: f32| v.iter().map(|v| v * by).collect::<Vec<_>>();
            let (q, k, v) = (scaled(&case.q, of_q), scaled(&case.k, of_k), scaled(&case.v, of_v));
            let far = Case { q, k, v, sizes: case.sizes, gap: case.gap };
            let args = Attention { fewer: true, ..far.args(Mask::Segments(&bounds)) };
            let mut wanted = vec![0.5; t * args.out_stride];
            attention_twin(&args, &mut wanted).unwrap();
            let close = Close { relative: CLOSE.relative, absolute: CLOSE.absolute * of_v };
            let name = format!("{t} {h} {kvh} {d} {bounds:?} {of_v}");
            check(&name, &wanted, close, &|cpu, out| {
                out.fill(0.5);
                flash::flash_by(cpu, &args, true, out)
            });
            check(&name, &wanted, close, &|cpu, out| {
                out.fill(0.5);
                let declared = attention_scratch_bytes(cpu, &args)?;
                attention(cpu, &args, out)?;
                assert!(cpu.scratch_bytes() <= declared.max(1), "{} of {declared}", cpu.scratch_bytes());
                Ok(())
            });
        }
    }
}
