//! Comparison with what the reference implementation gave, made once by `golden/make_golden.py`.

use serde::Deserialize;
use serde_json::Value as Json;

use super::{golden_json, golden_tokenizer};
use crate::{ChatTemplate, Content, ContentFormat, Detokenizer, Message, Part, RenderOptions, Tokenizer};

type EncodeRow = (String, Vec<u32>, Option<Vec<u32>>, Option<Vec<u32>>, Option<Vec<u32>>);

fn encode_rows() -> Vec<EncodeRow> {
    include_str!("../../golden/encode.jsonl").lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Texts for which `tokenizer` does not give the ids in `column`.
fn encode_failures(tokenizer: &Tokenizer, rows: &[EncodeRow], column: usize) -> Vec<String> {
    let differs = |row: &&EncodeRow| {
        let other = [None, row.2.as_ref(), row.3.as_ref(), row.4.as_ref()][column];
        tokenizer.encode(&row.0).unwrap() != *other.unwrap_or(&row.1)
    };
    rows.iter().filter(differs).map(|row| row.0.clone()).collect()
}

#[test]
fn ids_of_all_golden_strings_equal_the_reference() {
    let rows = encode_rows();
    assert!(rows.len() >= 10_000, "{} strings", rows.len());
    for (column, name) in ["ignore", "merge", "gpt2", "flags"].into_iter().enumerate() {
        let failures = encode_failures(&golden_tokenizer(name), &rows, column);
        let shown: Vec<_> = failures.iter().take(5).collect();
        assert!(failures.is_empty(), "{name}: {} of {} differ, first {shown:?}", failures.len(), rows.len());
    }
}

#[test]
fn the_golden_comparison_sees_a_wrong_tokenizer() {
    let rows = encode_rows();
    for (name, column) in [("merge", 0), ("ignore", 1), ("merge", 2), ("merge", 3)] {
        assert!(!encode_failures(&golden_tokenizer(name), &rows, column).is_empty());
    }
    // The same merges in another order are another tokenizer.
    let text = String::from_utf8(golden_json("merge").to_vec()).unwrap();
    let mut json: Json = serde_json::from_str(&text).unwrap();
    json["model"]["merges"].as_array_mut().unwrap().reverse();
    let wrong = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    assert!(!encode_failures(&wrong, &rows, 1).is_empty());
}

#[test]
fn merges_as_texts_and_as_pairs_give_the_same_tokenizer() {
    let mut json: Json = serde_json::from_slice(golden_json("merge")).unwrap();
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    let pair_form = merges[0].is_array();
    for m in merges.iter_mut() {
        *m = match &*m {
            Json::Array(pair) => {
                format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()).into()
            }
            Json::String(s) => s.split(' ').collect::<Vec<_>>().into(),
            other => panic!("{other}"),
        };
    }
    let other = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    assert!(pair_form, "the golden file has the pair form, so that the text form is tested here");
    let rows = encode_rows();
    assert!(encode_failures(&other, &rows[..2000], 1).is_empty());
}

#[test]
fn decoded_text_of_all_golden_ids_equals_the_reference_also_when_streamed() {
    let tokenizer = golden_tokenizer("ignore");
    let mut lossy = 0;
    let mut count = 0;
    for line in include_str!("../../golden/decode.jsonl").lines() {
        let (ids, full, skipped): (Vec<u32>, String, Option<String>) = serde_json::from_str(line).unwrap();
        let skipped = skipped.unwrap_or_else(|| full.clone());
        for (skip, expected) in [(false, &full), (true, &skipped)] {
            assert_eq!(&tokenizer.decode(&ids, skip), expected, "{ids:?}");
            let mut stream = Detokenizer::new(skip);
            let mut text: String = ids.iter().filter_map(|&id| stream.push(&tokenizer, id)).collect();
            text.extend(stream.finish());
            assert_eq!(&text, expected, "{ids:?}");
        }
        count += 1;
        lossy += usize::from(full.contains('\u{fffd}'));
    }
    assert!(count >= 4000 && lossy >= 1000, "{count} rows, {lossy} of them not UTF-8");
}

#[test]
fn encoding_and_decoding_gives_every_golden_string_back() {
    let tokenizer = golden_tokenizer("ignore");
    for (text, ids, ..) in encode_rows() {
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

#[derive(Deserialize)]
struct RenderRow {
    t: usize,
    m: Vec<RawMessage>,
    g: bool,
    o: String,
}

#[derive(Deserialize)]
struct RawMessage {
    role: String,
    content: Json,
    metadata: Option<String>,
}

fn message(raw: &RawMessage) -> Message {
    let content = match &raw.content {
        Json::String(s) => Content::Text(s.clone()),
        Json::Array(parts) => Content::Parts(
            parts
                .iter()
                .map(|p| match p["type"].as_str().unwrap() {
                    "image" => Part::Image,
                    "video" => Part::Video,
                    _ => Part::Text(p["text"].as_str().unwrap().to_owned()),
                })
                .collect(),
        ),
        other => panic!("{other}"),
    };
    Message { role: raw.role.clone(), content, metadata: raw.metadata.clone() }
}

#[test]
fn all_golden_conversations_render_as_in_the_reference() {
    let templates: Vec<String> = serde_json::from_str(include_str!("../../golden/templates.json")).unwrap();
    let templates: Vec<_> = templates.iter().map(|t| ChatTemplate::new(t).unwrap()).collect();
    let mut counts = vec![0; templates.len()];
    let mut changed = 0;
    for line in include_str!("../../golden/render.jsonl").lines() {
        let row: RenderRow = serde_json::from_str(line).unwrap();
        let messages: Vec<_> = row.m.iter().map(message).collect();
        let options = |g| RenderOptions {
            add_generation_prompt: g,
            format: ContentFormat::Hf,
            ..RenderOptions::default()
        };
        let text = templates[row.t].render(&messages, &options(row.g)).unwrap();
        assert_eq!(text, row.o, "template {}: {line}", row.t);
        counts[row.t] += 1;
        changed += usize::from(templates[row.t].render(&messages, &options(!row.g)).unwrap() != row.o);
    }
    assert!(counts[0] >= 150 && counts[1] >= 150 && counts.iter().sum::<usize>() >= 300, "{counts:?}");
    // The comparison can fail: the other setting of the generation prompt always shows.
    assert_eq!(changed, counts.iter().sum::<usize>());
}

#[test]
fn special_tokens_of_the_family_are_found_by_name() {
    let tokenizer = golden_tokenizer("ignore");
    assert_eq!(tokenizer.vocab_size(), 1000);
    let eos = tokenizer.token_id("<|endoftext|>").unwrap();
    assert!(tokenizer.is_special(eos) && tokenizer.added_tokens().len() == 20);
    assert_eq!(tokenizer.token_bytes(eos), Some("<|endoftext|>".as_bytes()));
    let think = tokenizer.token_id("<think>").unwrap();
    assert!(!tokenizer.is_special(think));
    assert_eq!(tokenizer.token_id("Ġthe").and_then(|id| tokenizer.token_bytes(id)), Some(&b" the"[..]));
    assert_eq!((tokenizer.token_id("<|nothing|>"), tokenizer.token_bytes(1000)), (None, None));
    assert_eq!(tokenizer.encode("<|user|>").unwrap().len(), 1);
    let plain = tokenizer.encode_ordinary("<|user|>").unwrap();
    assert!(plain.len() > 1 && !plain.iter().any(|&id| tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&plain, true), "<|user|>");
}
