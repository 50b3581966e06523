//! A chat template, rendered with a conversation of every kind of message.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_bpe::{
    ChatTemplate, ContentFormat, Message, Part, RenderOptions, limits, template_from_config,
};

fuzz_target!(|data: &[u8]| {
    let _ = template_from_config(data);
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::new(source) else { return };
    let messages = [
        Message::text("system", "Be brief."),
        Message::parts("user", vec![Part::Image, Part::Text("What is 这?".into()), Part::Video]),
        Message::text("assistant", "<think>\n</think>A cat."),
        Message::text("user", "Sure?"),
    ];
    for format in [ContentFormat::Hf, ContentFormat::String] {
        let options = RenderOptions { format, ..RenderOptions::default() };
        if let Ok(text) = template.render(&messages, &options) {
            assert!(text.len() <= limits::MAX_TEMPLATE_OUTPUT_BYTES);
        }
    }
});
