//! `tokenizer.json`, and a text through the tokenizer that it describes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_bpe::Tokenizer;

fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(data) else { return };
    let text = "Tap 设置, wait 42 s.\r\n  <|user|>\u{1F642}";
    if let Ok(ids) = tokenizer.encode(text) {
        assert!(ids.iter().all(|&id| id < tokenizer.id_limit()));
        let _ = tokenizer.decode(&ids, true);
    }
});
