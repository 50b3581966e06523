use std::collections::HashMap;

use serde_json::json;

use super::*;

fn vocabulary() -> Vocabulary {
    let json = json!({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "A": 7});
    Vocabulary::from_json(&json, 8, 0, "|").unwrap()
}

/// Logits in which these tokens win.
fn frames(ids: &[usize]) -> Vec<f32> {
    let mut logits = vec![0.0; ids.len() * 8];
    for (frame, id) in ids.iter().enumerate() {
        logits[frame * 8 + id] = 5.0;
    }
    logits
}

fn decode(decoder: &mut Decoder, logits: &[f32], at_a_time: usize) -> Vec<Emission> {
    let mut out = Vec::new();
    for part in logits.chunks(8 * at_a_time) {
        decoder.push(part, &mut out);
    }
    decoder.finish(&mut out);
    out
}

/// The vectors of the reference's recipe.
const VECTORS: &[(&[usize], &str)] = &[
    (&[0, 0, 5, 5, 0, 5, 4, 4, 6, 0, 0, 4, 7], "EE T A"),
    (&[], ""),
    (&[0, 0], ""),
    (&[4, 5, 4], "E"),
    (&[5, 5, 5, 4, 0, 4, 6], "E  T"),
    (&[3, 5], "<unk>E"),
    (&[5, 0, 0, 5, 1, 6, 2], "EE<s>T</s>"),
    (&[5, 1, 5, 3, 5], "E<s>E<unk>E"),
];

#[test]
fn repeats_are_merged_before_blanks_are_dropped() {
    for (ids, wanted) in VECTORS {
        for beam in [0, 8] {
            for step in [1, 3, 100] {
                let mut decoder = Decoder::new(8, 0, beam).unwrap();
                let got = vocabulary().join(&decode(&mut decoder, &frames(ids), step));
                assert_eq!(got, *wanted, "{ids:?}, beam {beam}, {step} frames at a time");
            }
        }
    }
}

#[test]
fn tokens_and_words_know_their_frames() {
    for beam in [0, 8] {
        let mut decoder = Decoder::new(8, 0, beam).unwrap();
        let out = decode(&mut decoder, &frames(VECTORS[0].0), 4);
        let times: Vec<(u32, usize, usize)> = out.iter().map(|e| (e.id, e.start, e.end)).collect();
        assert_eq!(
            times,
            [(5, 2, 4), (5, 5, 6), (4, 6, 8), (6, 8, 9), (4, 11, 12), (7, 12, 13)],
            "beam {beam}"
        );
        let words = vocabulary().words(&out);
        let words: Vec<(&str, usize, usize)> =
            words.iter().map(|w| (w.text.as_str(), w.start, w.end)).collect();
        assert_eq!(words, [("EE", 2, 6), ("T", 8, 9), ("A", 12, 13)]);
    }
}

/// Probability of every text by summing over every alignment: the definition.
fn by_definition(logits: &[f32], vocabulary: usize) -> HashMap<Vec<u32>, f64> {
    let frames: Vec<Vec<f64>> = logits
        .chunks(vocabulary)
        .map(|f| {
            let sum: f64 = f.iter().map(|&v| f64::from(v).exp()).sum();
            f.iter().map(|&v| f64::from(v).exp() / sum).collect()
        })
        .collect();
    let mut texts = HashMap::new();
    let paths = vocabulary.pow(frames.len() as u32);
    for path in 0..paths {
        let (mut rest, mut probability, mut text, mut last) = (path, 1.0, Vec::new(), usize::MAX);
        for frame in &frames {
            let id = rest % vocabulary;
            rest /= vocabulary;
            probability *= frame[id];
            if id != last && id != 0 {
                text.push(id as u32);
            }
            last = id;
        }
        *texts.entry(text).or_insert(0.0) += probability;
    }
    texts
}

#[test]
fn a_wide_beam_sums_over_all_alignments() {
    let mut state = 3u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    let mut differs = 0;
    for frames in [1, 3, 6] {
        for _ in 0..20 {
            let logits: Vec<f32> = (0..frames * 3).map(|_| number()).collect();
            let exact = by_definition(&logits, 3);
            let mut beam = Beam::new(3, 0, 1000).unwrap();
            for frame in logits.chunks(3) {
                beam.step(frame);
                beam.frame += 1;
            }
            let texts = beam.texts();
            assert_eq!(texts.len(), exact.len());
            for (log, text) in &texts {
                assert!((log.exp() - exact[text]).abs() < 1e-9, "{text:?}");
            }
            let mut greedy = Greedy::new(3, 0);
            let mut out = Vec::new();
            greedy.push(&logits, &mut out);
            greedy.finish(&mut out);
            differs += usize::from(out.iter().map(|e| e.id).ne(texts[0].1.iter().copied()));
        }
    }
    assert!(differs > 3, "the beam finds what greedy decoding misses, {differs} times");
}

#[test]
fn a_beam_gives_the_same_text_whatever_the_steps() {
    let logits: Vec<f32> = (0..8 * 200).map(|i| ((i * 7919) % 101) as f32 / 25.0).collect();
    let whole = decode(&mut Decoder::new(8, 0, 16).unwrap(), &logits, 1000);
    assert!(whole.len() > 20);
    for step in [1, 10, 33] {
        let mut decoder = Decoder::new(8, 0, 16).unwrap();
        let ids = |e: &[Emission]| e.iter().map(|e| e.id).collect::<Vec<_>>();
        assert_eq!(ids(&decode(&mut decoder, &logits, step)), ids(&whole));
        let Decoder::Beam(beam) = &decoder else { panic!() };
        assert!(beam.nodes.len() < 400);
    }
}

#[test]
fn logits_that_are_no_numbers_end_in_some_text() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for beam in [0, 4] {
            let mut decoder = Decoder::new(8, 0, beam).unwrap();
            decode(&mut decoder, &[value; 80], 3);
        }
    }
}

#[test]
fn vocabularies_that_make_no_sense_are_refused() {
    let wrong =
        |json: serde_json::Value, size| Vocabulary::from_json(&json, size, 0, "|").unwrap_err().to_string();
    assert!(wrong(json!([]), 3).contains("an object"));
    assert!(wrong(json!({"a": 5}), 3).contains("an id below 3, found 5"));
    assert!(wrong(json!({"a": -1}), 3).contains("found -1"));
    assert!(wrong(json!({"a": 1, "b": 1}), 3).contains("the same id 1"));
    assert!(wrong(json!({ "x".repeat(300): 1 }), 3).contains("300 bytes"));
    assert!(Vocabulary::from_json(&json!({}), 3, 3, "|").is_err());
    assert!(Beam::new(3, 0, 0).is_err() && Beam::new(3, 0, 1001).is_err());
}
