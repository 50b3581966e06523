//! Properties that hold for every input.

use std::time::Instant;

use proptest::prelude::*;

use super::{XorShift, golden_tokenizer};
use crate::{AddedToken, Detokenizer, SplitStep, Tokenizer, TokenizerParts, alphabet};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn bpe_round_trips_every_text(text in "\\PC{0,60}|[ \\s'a-z0-9<|>]{0,60}", plain in any::<bool>()) {
        let tokenizer = golden_tokenizer("merge");
        let ids = if plain { tokenizer.encode_ordinary(&text) } else { tokenizer.encode(&text) }.unwrap();
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }

    #[test]
    fn any_bytes_pass_the_byte_alphabet_unchanged(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let text: String = bytes.iter().map(|&b| alphabet::char_of(b)).collect();
        let mut back = Vec::new();
        prop_assert!(alphabet::append_bytes(&text, &mut back));
        prop_assert_eq!(back, bytes);
    }

    #[test]
    fn streaming_equals_batch_decoding_and_never_shows_half_a_character(
        ids in prop::collection::vec(0u32..1100, 0..60), skip in any::<bool>()
    ) {
        let tokenizer = golden_tokenizer("ignore");
        let whole = tokenizer.decode(&ids, skip);
        let mut stream = Detokenizer::new(skip);
        let mut text = String::new();
        for &id in &ids {
            text.extend(stream.push(&tokenizer, id));
            // What was shown is never taken back.
            prop_assert!(whole.starts_with(&text));
        }
        text.extend(stream.finish());
        prop_assert_eq!(text, whole);
        prop_assert_eq!(stream.finish(), None);
    }
}

#[test]
fn streaming_holds_a_character_back_until_it_is_whole() {
    let tokenizer = golden_tokenizer("ignore");
    let byte = |b: u8| tokenizer.token_id(&alphabet::char_of(b).to_string()).unwrap();
    let mut stream = Detokenizer::new(true);
    let mut pushed: Vec<_> = "é😀".bytes().map(|b| stream.push(&tokenizer, byte(b))).collect();
    assert_eq!(pushed, [None, Some("é".into()), None, None, None, Some("😀".into())]);
    // A lead byte that is followed by something else is lost at once, not held for ever.
    pushed = [0xE4, 0xB8, b'a'].map(|b| stream.push(&tokenizer, byte(b))).to_vec();
    assert_eq!(pushed, [None, None, Some("\u{fffd}a".into())]);
    assert_eq!((stream.push(&tokenizer, byte(0xF0)), stream.finish()), (None, Some("\u{fffd}".into())));
}

/// A tokenizer of the size of GLM-4's: 256 bytes, then one token for each merge of earlier tokens.
fn big_parts(tokens: &mut Vec<String>, merges: &mut Vec<(usize, usize)>) {
    tokens.extend((0..=255u8).map(|b| alphabet::char_of(b).to_string()));
    let mut random = XorShift(99);
    let mut seen: std::collections::HashSet<String> = tokens.iter().cloned().collect();
    while tokens.len() < 151_329 {
        let (a, b) = (random.below(tokens.len().min(20_000)), random.below(256));
        let merged = format!("{}{}", tokens[a], tokens[b]);
        if merged.chars().count() < 20 && seen.insert(merged.clone()) {
            tokens.push(merged);
        }
        // The real file has two merges for each token.
        merges.push((a, b));
    }
    merges.retain(|&(a, b)| seen.contains(&format!("{}{}", tokens[a], tokens[b])));
    let extra = 318_088usize.saturating_sub(merges.len());
    let repeated: Vec<_> = merges.iter().cycle().take(extra).copied().collect();
    merges.extend(repeated);
}

#[test]
fn a_file_of_real_size_loads_fast_and_long_text_encodes_in_linear_time() {
    let (mut tokens, mut merges) = (Vec::new(), Vec::new());
    big_parts(&mut tokens, &mut merges);
    assert_eq!((tokens.len(), merges.len()), (151_329, 318_088));
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(i, t)| (t.clone(), i.into())).collect();
    let merges: Vec<_> = merges.iter().map(|&(a, b)| format!("{} {}", tokens[a], tokens[b])).collect();
    let json = serde_json::json!({
        "added_tokens": [{"id": 151_329, "content": "<|user|>", "special": true}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": crate::split::GLM_PATTERN}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}
    })
    .to_string();
    let start = Instant::now();
    let tokenizer = Tokenizer::from_json(json.as_bytes()).unwrap();
    let load = start.elapsed();
    println!("{} bytes loaded in {load:?}", json.len());
    assert!(load.as_secs_f64() < 5.0, "loading took {load:?}");
    assert_eq!(tokenizer.vocab_size(), 151_330);

    let mixed = "Tap the search box, 然后点击设置页面 1234567 <|user|>\n\n  😀 don't".repeat(14_000);
    for text in ["a".repeat(1 << 20), " ".repeat(1 << 20), "!".repeat(1 << 20), "中".repeat(1 << 18), mixed]
    {
        let start = Instant::now();
        let ids = tokenizer.encode(&text).unwrap();
        let time = start.elapsed();
        println!("{} bytes, {} ids, {time:?}", text.len(), ids.len());
        assert!(time.as_secs_f64() < 2.0, "{} bytes took {time:?}", text.len());
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

#[test]
fn a_tokenizer_can_be_built_from_the_parts_of_another_format() {
    let bytes: Vec<String> = (0..=255u8).map(|b| alphabet::char_of(b).to_string()).collect();
    let mut tokens: Vec<(&str, u32)> = bytes.iter().zip(0..).map(|(t, i)| (t.as_str(), i)).collect();
    tokens.extend([("ab", 256), ("Ġab", 300)]);
    let parts = TokenizerParts {
        tokens,
        merges: vec![("a", "b"), ("Ġ", "ab")],
        added: vec![AddedToken::special(301, "<|user|>")],
        split: vec![SplitStep::Gpt2],
        ignore_merges: false,
    };
    let tokenizer = Tokenizer::from_parts(parts).unwrap();
    assert_eq!(tokenizer.encode("ab ab<|user|>b").unwrap(), [256, 300, 301, u32::from(b'b')]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.id_limit()), (259, 302));
    assert_eq!(tokenizer.decode(&[256, 299, 301, 300], true), "ab ab");
}
