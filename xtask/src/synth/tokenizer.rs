//! A tokenizer of a model's true vocabulary size, with merges of our own.
//!
//! Letters merge in pairs, also after a space, digits in groups of up to three, and each Chinese character
//! becomes one token: a text then has about as many tokens as with a trained tokenizer.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Where the named tokens of the family stand, counted from the first one, and whether they are special.
const NAMED: &[(&str, bool)] = &[
    ("<|endoftext|>", true),
    ("[MASK]", true),
    ("[gMASK]", true),
    ("[sMASK]", true),
    ("<sop>", true),
    ("<eop>", true),
    ("<|system|>", true),
    ("<|user|>", true),
    ("<|assistant|>", true),
    ("<|observation|>", true),
    ("<|begin_of_image|>", true),
    ("<|end_of_image|>", true),
    ("<|begin_of_video|>", true),
    ("<|end_of_video|>", true),
    (IMAGE, true),
    ("<|video|>", true),
    ("<think>", false),
    ("</think>", false),
    ("<answer>", false),
    ("</answer>", false),
];
const IMAGE: &str = "<|image|>";

/// The family's pre-tokenizer.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The two files.
pub struct Files {
    /// `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json`, without a chat template, which has its own file.
    pub config: Value,
}

/// Makes the files. The ids of the named tokens follow from the `image_token_id` of `config.json`.
pub fn synthetic(config: &Value, max_length: usize) -> Result<Files> {
    let at = NAMED.iter().position(|(text, _)| *text == IMAGE).unwrap_or(0) as u64;
    let wrong = |wanted: &str| Error::Content {
        place: "config.json: `image_token_id`".into(),
        wanted: wanted.into(),
        found: config["image_token_id"].to_string(),
    };
    let image = config["image_token_id"].as_u64().ok_or_else(|| wrong("a token id"))?;
    let first = image.checked_sub(at).filter(|&n| n >= 256).ok_or_else(|| wrong("an id above 269"))? as usize;

    let (vocab, merges) = vocabulary(first);
    let entry = |(i, (text, special)): (usize, &(&str, bool))| {
        let content = json!({
            "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special,
        });
        (first + i, content)
    };
    let named: Vec<(usize, Value)> = NAMED.iter().enumerate().map(entry).collect();
    let decoder: Map<String, Value> =
        named.iter().map(|(id, token)| (id.to_string(), token.clone())).collect();
    let added: Vec<Value> = named
        .into_iter()
        .map(|(id, mut token)| {
            token["id"] = id.into();
            token
        })
        .collect();
    let special: Vec<&str> = NAMED.iter().filter(|(_, special)| *special).map(|(text, _)| *text).collect();
    let byte_level = |prefix: bool, regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex });
    let split = json!({
        "type": "Split", "pattern": { "Regex": SPLIT }, "behavior": "Isolated", "invert": false,
    });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split, byte_level(false, false)] },
        "post_processor": null,
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": true,
            "vocab": vocab,
            "merges": merges,
        },
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Glm4vProcessor",
        "eos_token": NAMED[0].0,
        "pad_token": NAMED[0].0,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": false,
        "additional_special_tokens": special,
        "added_tokens_decoder": decoder,
    });
    Ok(Files { tokenizer, config })
}

/// `size` tokens: the 256 bytes, what merges make, and fillers; and the merges in the order of their rank.
fn vocabulary(size: usize) -> (Map<String, Value>, Vec<[String; 2]>) {
    let bytes: Vec<String> = (0..=255u8).map(|b| byte_char(b).to_string()).collect();
    let mut tokens = bytes.clone();
    let mut known: HashSet<String> = tokens.iter().cloned().collect();
    let mut merges = Vec::new();
    for [left, right] in pairs(&bytes) {
        let token = format!("{left}{right}");
        if tokens.len() < size
            && known.contains(&left)
            && known.contains(&right)
            && known.insert(token.clone())
        {
            tokens.push(token);
            merges.push([left, right]);
        }
    }
    // The pre-tokenizer separates letters from digits, so no text ever becomes a filler; a random model may
    // still choose one, and then prints it.
    for i in tokens.len()..size {
        tokens.push(format!("{}filler{i}", byte_char(b' ')));
    }
    tokens.truncate(size);
    (tokens.into_iter().zip(0u32..).map(|(token, id)| (token, id.into())).collect(), merges)
}

/// Merges in the order of their rank.
fn pairs(bytes: &[String]) -> Vec<[String; 2]> {
    let token = |b: u8| bytes[usize::from(b)].clone();
    let space = token(b' ');
    let (lower, upper, digits) = (b'a'..=b'z', b'A'..=b'Z', b'0'..=b'9');
    let mut pairs = Vec::new();
    // The first byte of a common Chinese character or mark is e3 to e9, the others are 80 to bf.
    for a in 0xe3..=0xe9u8 {
        pairs.extend((0x80..=0xbf).map(|b| [token(a), token(b)]));
    }
    for a in lower.clone().chain(upper) {
        pairs.extend(lower.clone().map(|b| [token(a), token(b)]));
        pairs.push([space.clone(), token(a)]);
    }
    for a in digits.clone() {
        pairs.extend(digits.clone().map(|b| [token(a), token(b)]));
    }
    let two: Vec<[String; 2]> = pairs.clone();
    for [a, b] in two {
        let joined = format!("{a}{b}");
        let first = a.chars().next();
        if first == Some(byte_char(b' ')) || b.is_empty() {
            continue;
        }
        if joined.chars().all(|c| c.is_ascii_alphabetic()) {
            pairs.push([space.clone(), joined]);
        } else if joined.chars().all(|c| c.is_ascii_digit()) {
            pairs.extend(digits.clone().map(|c| [joined.clone(), token(c)]));
        } else {
            pairs.extend((0x80..=0xbf).map(|c| [joined.clone(), token(c)]));
        }
    }
    pairs
}

/// The character that stands for a byte in byte-level vocabularies (Radford et al. 2019): itself where it is
/// printable, else one of the characters from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}
