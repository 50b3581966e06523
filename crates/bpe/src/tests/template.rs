//! Chat templates: the two content formats, reserved texts, template files.

use super::golden_tokenizer;
use crate::{
    ChatTemplate, ContentFormat, Error, Message, Part, Placeholders, RenderOptions, expand_placeholders,
    template_from_config,
};

fn family() -> ChatTemplate {
    let all: Vec<String> = serde_json::from_str(include_str!("../../golden/templates.json")).unwrap();
    ChatTemplate::new(&all[0]).unwrap()
}

fn screenshot(text: &str) -> Vec<Message> {
    vec![
        Message::text("system", "rules"),
        Message::parts("user", vec![Part::Image, Part::Text(text.to_owned())]),
    ]
}

fn with(format: ContentFormat) -> RenderOptions {
    RenderOptions { format, ..RenderOptions::default() }
}

#[test]
fn the_string_format_puts_a_newline_after_the_image_and_the_hf_format_does_not() {
    let image = "<|begin_of_image|><|image|><|end_of_image|>";
    let render = |format| family().render(&screenshot("打开设置"), &with(format)).unwrap();
    let head = "[gMASK]<sop><|system|>\nrules<|user|>\n";
    assert_eq!(render(ContentFormat::String), format!("{head}{image}\n打开设置<|assistant|>\n"));
    assert_eq!(render(ContentFormat::Hf), format!("{head}{image}打开设置<|assistant|>\n"));
}

#[test]
fn the_string_format_puts_all_placeholders_before_all_texts() {
    let parts = vec![Part::Text("a".into()), Part::Image, Part::Text("b".into()), Part::Video, Part::Image];
    let text = family().render(&[Message::parts("user", parts)], &RenderOptions::default()).unwrap();
    let (i, v) =
        ("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>");
    assert_eq!(text, format!("[gMASK]<sop><|user|>\n{i}\n{i}\n{v}\na\nb<|assistant|>\n"));
    let one = Message::parts("user", vec![Part::Text("a".into())]);
    let text = family().render(&[one], &RenderOptions::default()).unwrap();
    assert_eq!(text, "[gMASK]<sop><|user|>\na<|assistant|>\n");
}

#[test]
fn sound_has_no_string_form() {
    let messages = [Message::text("system", ""), Message::parts("user", vec![Part::Audio])];
    let e = family().render(&messages, &RenderOptions::default()).unwrap_err();
    assert_eq!(e, Error::UnsupportedPart { message: 1, kind: "audio" });
}

#[test]
fn a_rendered_prompt_expands_and_encodes_to_one_token_per_patch() {
    let tokenizer = golden_tokenizer("ignore");
    let prompt = family().render(&screenshot("点击"), &RenderOptions::default()).unwrap();
    let prompt = expand_placeholders(&prompt, &[6], &[], &Placeholders::default()).unwrap();
    let ids = tokenizer.encode(&prompt).unwrap();
    let image = tokenizer.token_id("<|image|>").unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == image).count(), 6);
    assert_eq!(&ids[..2], [tokenizer.token_id("[gMASK]").unwrap(), tokenizer.token_id("<sop>").unwrap()]);
}

#[test]
fn a_placeholder_written_as_text_is_refused_wherever_it_stands() {
    for messages in [
        screenshot("look: <|image|>"),
        vec![Message::text("tool", "x<|video|>")],
        vec![Message { metadata: Some("<|image|>".into()), ..Message::text("assistant", "") }],
    ] {
        let e = family().render(&messages, &RenderOptions::default()).unwrap_err();
        assert!(matches!(e, Error::ReservedText { .. }), "{e}");
    }
    // The check is a setting, and without it the count still tells.
    let open = RenderOptions { reserved: Vec::new(), ..RenderOptions::default() };
    let prompt = family().render(&screenshot("look: <|image|>"), &open).unwrap();
    let e = expand_placeholders(&prompt, &[6], &[], &Placeholders::default()).unwrap_err();
    assert!(matches!(e, Error::PlaceholderCount { wanted: 1, found: 2, .. }), "{e}");
    let strict = RenderOptions { reserved: vec!["<|assistant|>".into()], ..RenderOptions::default() };
    let e = family().render(&screenshot("a<|assistant|>"), &strict).unwrap_err();
    assert_eq!(e.to_string(), "message 1: text contains the reserved token \"<|assistant|>\" at byte 1");
}

#[test]
fn variables_of_the_caller_reach_the_template() {
    let template = ChatTemplate::new("{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}").unwrap();
    let options = RenderOptions {
        variables: vec![
            ("bos_token".into(), "[gMASK]".into()),
            ("tools".into(), serde_json::json!([{"name": "点", "n": 1.5}])),
        ],
        ..RenderOptions::default()
    };
    assert_eq!(template.render(&[], &options).unwrap(), "[gMASK][{\"name\": \"点\", \"n\": 1.5}]");
    assert_eq!(template.render(&[], &RenderOptions::default()).unwrap(), "");
}

#[test]
fn an_exception_raised_by_the_template_carries_its_message() {
    let template = ChatTemplate::new("a\n{{ raise_exception('system must be ' ~ 'first') }}").unwrap();
    let e = template.render(&[], &RenderOptions::default()).unwrap_err();
    assert_eq!(e, Error::TemplateRefused { message: "system must be first".into() });
}

#[test]
fn template_errors_name_the_line() {
    let e = ChatTemplate::new("a\n\n{% if %}").unwrap_err();
    assert!(matches!(e, Error::TemplateSyntax { line: 3, .. }), "{e:?}");
    for (source, part) in [
        ("\n{{ 'a' + 1 }}", "no arithmetic between a string and a number"),
        ("\n{{ x.y }}", "undefined value has no attribute \"y\""),
        ("\n{{ 1 | nosuch }}", "filter \"nosuch\" is not known"),
        ("\n{{ nosuch() }}", "function \"nosuch\" is not known"),
        ("\n{{ 1 is nosuch }}", "test \"nosuch\" is not known"),
        ("\n{{ 'a'.nosuch() }}", "a string has no method \"nosuch\""),
        ("\n{{ 'a' | upper(1) }}", "too many arguments"),
        ("\n{{ 1 // 0 }}", "division by zero"),
        ("\n{{ 9223372036854775807 + 1 }}", "exceeds 64 bits"),
        ("\n{% set messages.x = 1 %}", "only attributes of a namespace can be set"),
        ("\n{% for a, b in [[1]] %}{% endfor %}", "cannot unpack 1 values into 2"),
    ] {
        let e = ChatTemplate::new(source).unwrap().render(&[], &RenderOptions::default()).unwrap_err();
        assert!(matches!(e, Error::TemplateRender { line: 2, .. }), "{source}: {e:?}");
        assert!(e.to_string().contains(part), "{source}: {e}");
    }
}

#[test]
fn the_template_is_found_in_both_forms_of_the_config() {
    let find = |json: &str| template_from_config(json.as_bytes());
    assert_eq!(find(r#"{"chat_template": "x", "other": [{}]}"#).unwrap().as_deref(), Some("x"));
    let list =
        r#"{"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}"#;
    assert_eq!(find(list).unwrap().as_deref(), Some("b"));
    assert_eq!(find("{}").unwrap(), None);
    assert!(matches!(find(r#"{"chat_template": []}"#), Err(Error::Missing { .. })));
    assert!(matches!(find(r#"{"chat_template": 7}"#), Err(Error::Json { .. })));
}
