//! Ready-made tables against the tokenizer that they were made of, and tables made to hurt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::{XorShift, golden_tokenizer};
use crate::{Error, Tokenizer};

const NAMES: [&str; 4] = ["ignore", "merge", "gpt2", "flags"];

fn open(tables: &[u8]) -> Result<Tokenizer, Error> {
    Tokenizer::from_tables(Arc::new(tables.to_vec()))
}

/// Texts of the golden set, each `step`-th one.
fn texts(step: usize) -> Vec<String> {
    let lines = include_str!("../../golden/encode.jsonl").lines().step_by(step);
    lines.map(|l| serde_json::from_str::<Json>(l).unwrap()[0].as_str().unwrap().to_owned()).collect()
}

#[test]
fn tables_give_what_the_tokenizer_gives_that_they_were_made_of() {
    let texts = texts(3);
    assert!(texts.len() > 3000);
    for name in NAMES {
        let built = golden_tokenizer(name);
        let tables = built.to_tables().unwrap();
        assert!(Tokenizer::are_tables(&tables));
        let stored = open(&tables).unwrap();
        for text in &texts {
            assert_eq!(stored.encode(text).unwrap(), built.encode(text).unwrap(), "{name}: {text:?}");
            let ordinary = built.encode_ordinary(text).unwrap();
            assert_eq!(stored.encode_ordinary(text).unwrap(), ordinary, "{name}: {text:?}");
            assert_eq!(stored.token_id(text), built.token_id(text), "{name}: {text:?}");
        }
        assert_eq!(stored.id_limit(), built.id_limit());
        assert_eq!(stored.vocab_size(), built.vocab_size());
        assert_eq!(stored.added_tokens(), built.added_tokens());
        for id in 0..built.id_limit() + 3 {
            assert_eq!(stored.token_bytes(id), built.token_bytes(id), "{name}: {id}");
            assert_eq!(stored.is_special(id), built.is_special(id), "{name}: {id}");
        }
        for token in built.added_tokens() {
            assert_eq!(stored.token_id(&token.content), Some(token.id));
        }
        assert!(stored.to_tables().unwrap() == tables, "{name}: made again they are others");
    }
}

#[test]
fn the_comparison_sees_the_tables_of_another_tokenizer() {
    let (built, other) =
        (golden_tokenizer("merge"), open(&golden_tokenizer("ignore").to_tables().unwrap()).unwrap());
    assert!(texts(3).iter().any(|text| built.encode(text).unwrap() != other.encode(text).unwrap()));
}

#[test]
fn tables_of_another_length_or_version_are_typed_errors() {
    let tables = golden_tokenizer("flags").to_tables().unwrap();
    for length in (0..tables.len()).step_by(97).chain(tables.len() - 40..tables.len()) {
        let error = open(&tables[..length]).unwrap_err();
        assert!(matches!(error, Error::Tables { .. }), "{length} bytes: {error}");
    }
    let mut longer = tables.clone();
    longer.push(0);
    assert!(matches!(open(&longer), Err(Error::Tables { .. })));
    let mut other = tables;
    other[7] = b'2';
    assert!(!Tokenizer::are_tables(&other));
    assert!(matches!(open(&other), Err(Error::Tables { .. })));
}

/// Opens changed tables, and uses them where that goes.
fn used(tables: &[u8], text: &str) -> bool {
    let start = Instant::now();
    let opened = open(tables);
    if let Ok(tokenizer) = &opened {
        let limit = tokenizer.id_limit();
        let ids = tokenizer.encode(text).unwrap_or_default();
        assert!(ids.iter().all(|id| *id < limit), "{ids:?} of {limit}");
        tokenizer.decode(&ids, false);
        let _ = (tokenizer.token_id("<|user|>"), tokenizer.token_bytes(limit), tokenizer.is_special(limit));
        let _ = tokenizer.to_tables();
    }
    assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    opened.is_ok()
}

#[test]
fn changed_tables_give_a_typed_error_or_ids_of_the_vocabulary_soon() {
    let tables = golden_tokenizer("merge").to_tables().unwrap();
    let text = "Hello, world! 打开设置 <|user|> 12345 \n\n  naïve";
    assert!(used(&tables, text));
    let mut random = XorShift(11);
    let (mut opened, numbers) = (0, tables.len() / 4);
    for round in 0..300 {
        let mut changed = tables.clone();
        for _ in 0..=random.below(8) {
            // Half of the rounds change the numbers in front, where the sizes and places are.
            let at = 4 * if round % 2 == 0 { random.below(numbers) } else { random.below(900) };
            let number = match random.below(4) {
                0 => u32::MAX,
                1 => 0,
                2 => 1 << random.below(32),
                _ => random.next() as u32,
            };
            changed[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        opened += usize::from(used(&changed, text));
    }
    assert!((20..300).contains(&opened), "{opened} of 300 were opened");
    // All numbers behind the head alike, so that every search runs as far as it can.
    for number in [0u32, 1, 77, u32::MAX] {
        let mut changed = tables.clone();
        let end = changed.len() - 4000;
        for place in changed[8 + 6 * 4 + 1024..end].chunks_exact_mut(4) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        used(&changed, text);
    }
}
