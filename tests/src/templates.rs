//! Rendered prompts.

use pocketglm::{ContentFormat, Engine, EngineOptions, Message, Part, Picture, Request};

use crate::golden::{CHECKPOINTS, cases, path};
use crate::support::{engine, error, options};

#[test]
fn every_golden_conversation_renders_and_encodes_as_the_reference_does() {
    let mut checked = 0;
    for (checkpoint, expected_in) in CHECKPOINTS {
        let engine = engine(checkpoint);
        for case in cases(expected_in) {
            let prompt = engine.prompt(&case.request).unwrap();
            assert_eq!(
                prompt.text(),
                case.expected["expanded_prompt"].as_str(),
                "{checkpoint} {}",
                case.name
            );
            let ids: Vec<i64> = prompt.token_ids().iter().map(|&id| id.into()).collect();
            assert_eq!(Some(ids.clone()), case.tensors.i64("input_ids"), "{checkpoint} {}", case.name);
            assert_eq!(engine.tokenize(prompt.text().unwrap()).unwrap(), prompt.token_ids());
            checked += 1;
        }
    }
    assert!(checked >= 20, "only {checked} conversations");
}

fn server(checkpoint: &str) -> Engine {
    Engine::open(path(checkpoint), EngineOptions { content_format: ContentFormat::String, ..options() })
        .unwrap()
}

fn parts() -> Vec<Part> {
    vec![Part::Image(Picture::rgb8(28, 28, vec![9; 28 * 28 * 3]).unwrap()), Part::Text("打开设置".into())]
}

#[test]
fn the_server_form_puts_a_newline_between_pictures_and_text() {
    let request =
        |parts| Request::Messages(vec![Message::text("system", "s"), Message::parts("user", parts)]);
    let picture = format!("<|begin_of_image|>{}<|end_of_image|>", "<|image|>".repeat(9));
    let (hf, string) = (engine("default"), server("default"));
    let text = |e: &Engine, parts| e.prompt(&request(parts)).unwrap().text().unwrap().to_string();
    assert_eq!(
        text(&hf, parts()),
        format!("[gMASK]<sop><|system|>\ns<|user|>\n{picture}打开设置<|assistant|>\n")
    );
    assert_eq!(
        text(&string, parts()),
        format!("[gMASK]<sop><|system|>\ns<|user|>\n{picture}\n打开设置<|assistant|>\n")
    );
    // Placeholders come first wherever the pictures stand.
    let last: Vec<Part> = parts().into_iter().rev().collect();
    assert_eq!(text(&string, last), text(&string, parts()));
    let two = [parts(), parts()].concat();
    assert_eq!(
        text(&string, two),
        format!("[gMASK]<sop><|system|>\ns<|user|>\n{picture}\n{picture}\n打开设置\n打开设置<|assistant|>\n")
    );
}

#[test]
fn a_list_of_one_text_renders_as_the_text_in_both_forms() {
    for engine in [engine("default"), server("default")] {
        let text =
            |m: Message| engine.prompt(&Request::Messages(vec![m])).unwrap().text().unwrap().to_string();
        let list = text(Message::parts("user", vec![Part::Text("x y".into())]));
        assert_eq!(list, text(Message::text("user", "x y")));
    }
}

#[test]
fn the_template_decides_about_roles_and_empty_conversations() {
    let engine = engine("default");
    let text = |m: Vec<Message>| engine.prompt(&Request::Messages(m)).unwrap().text().unwrap().to_string();
    assert_eq!(text(vec![]), "[gMASK]<sop><|assistant|>\n");
    assert_eq!(text(vec![Message::text("tool", "x")]), "[gMASK]<sop><|assistant|>\n");
    assert_eq!(text(vec![Message::text("user", "")]), "[gMASK]<sop><|user|>\n<|assistant|>\n");
    // A picture in a message that the template leaves out would be lost.
    let lost = engine.prompt(&Request::Messages(vec![Message::parts("tool", parts())]));
    assert!(error(lost).contains("1"));
}
