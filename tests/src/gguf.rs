//! GGUF files that another program wrote: they answer as the checkpoint does that they were made of.

use std::fs;

use pocketglm::{Engine, Message, Part, Picture, Request};

use crate::golden::{cases, path, relative_l2};
use crate::support::{Folder, answer, engine, error, exactly, ids_prompt, options};

/// The same numbers in the same kernels, but for biases and norms that are stored in another type.
const SAME: f64 = 1e-6;

/// A folder with some of the golden GGUF files, under these names.
fn folder(files: &[(&str, &str)]) -> Folder {
    let folder = Folder::new();
    for (from, to) in files {
        fs::copy(path("gguf").join(from), folder.file(to)).unwrap();
    }
    folder
}

fn open(path: impl AsRef<std::path::Path>) -> Engine {
    Engine::open(path, options()).unwrap()
}

#[test]
fn gguf_files_of_another_writer_answer_as_the_checkpoint_they_were_made_of() {
    let original = engine("bf16");
    let mut compared = 0;
    // By the folder, and by the text file alone with the vision file found beside it.
    for gguf in [open(path("gguf")), open(path("gguf/text.gguf"))] {
        for case in cases("bf16") {
            let (theirs, ours) =
                (original.prompt(&case.request).unwrap(), gguf.prompt(&case.request).unwrap());
            assert_eq!(ours.token_ids(), theirs.token_ids(), "{}", case.name);
            let distance = relative_l2(
                &gguf.session().forward(&ours).unwrap(),
                &original.session().forward(&theirs).unwrap(),
            );
            assert!(distance <= SAME, "{}: {distance:.1e}", case.name);
            let wanted = answer(&mut original.session(), &theirs, &exactly(24));
            assert_eq!(answer(&mut gguf.session(), &ours, &exactly(24)), wanted, "{}", case.name);
            compared += 1;
        }
    }
    assert!(compared >= 2, "{compared} cases");
}

#[test]
fn the_tokenizer_in_the_keys_gives_the_ids_of_tokenizer_json() {
    let (original, gguf) = (engine("bf16"), open(path("gguf")));
    let texts = [
        "Hello, world! 12345 it's  two  spaces\n\nand\tlines ",
        "点击 <answer>do(action=\"Tap\", element=[123,456])</answer>",
        "<|user|>\n<think>[gMASK]<sop>é\u{1F600}\u{0}",
        "'S 'LL ②３ \u{a0}\u{3000}",
    ];
    for text in texts {
        let ids = original.tokenize(text).unwrap();
        assert_eq!(gguf.tokenize(text).unwrap(), ids, "{text}");
        for skip in [true, false] {
            assert_eq!(gguf.detokenize(&ids, skip), original.detokenize(&ids, skip), "{text}");
        }
    }
}

#[test]
fn answers_end_where_those_of_the_checkpoint_do() {
    let original = engine("bf16");
    let gguf = open(path("gguf"));
    let mut ended = 0;
    for start in 0..24u32 {
        let ids: Vec<u32> = (0..8).map(|i| (start * 97 + i * 31) % 300).collect();
        let until_end = pocketglm::GenerateOptions { max_new_tokens: 64, ..Default::default() };
        let wanted = answer(&mut original.session(), &ids_prompt(&original, &ids), &until_end);
        assert_eq!(answer(&mut gguf.session(), &ids_prompt(&gguf, &ids), &until_end), wanted);
        ended += usize::from(wanted.ids.len() < 64);
    }
    assert!(ended > 0, "no answer ended by itself");
}

#[test]
fn a_text_file_alone_answers_text_and_refuses_pictures() {
    let alone = folder(&[("text.gguf", "model.gguf")]);
    let (original, gguf) = (engine("bf16"), open(alone.path()));
    let request = Request::Messages(vec![Message::text("user", "What is on the screen?")]);
    let wanted = answer(&mut original.session(), &original.prompt(&request).unwrap(), &exactly(16));
    assert_eq!(answer(&mut gguf.session(), &gguf.prompt(&request).unwrap(), &exactly(16)), wanted);
    let picture = Picture::rgb8(28, 28, vec![9; 28 * 28 * 3]).unwrap();
    let request = Request::Messages(vec![Message::parts("user", vec![Part::Image(picture)])]);
    let error = error(gguf.prompt(&request));
    assert!(error.contains("no vision encoder"), "{error}");
}

#[test]
fn a_folder_where_more_than_one_file_could_be_meant_is_refused_with_their_names() {
    let two = folder(&[("text.gguf", "a.gguf"), ("text.gguf", "b.gguf")]);
    let message = error(Engine::open(two.path(), options()));
    assert!(message.contains("2 models: a.gguf, b.gguf"), "{message}");
    // By its path one of them opens.
    open(two.file("b.gguf"));

    let eyes = folder(&[
        ("text.gguf", "a.gguf"),
        ("mmproj.gguf", "mmproj-1.gguf"),
        ("mmproj.gguf", "A-MMPROJ-f16.gguf"),
    ]);
    let message = error(Engine::open(eyes.path(), options()));
    assert!(message.contains("2 vision files: A-MMPROJ-f16.gguf, mmproj-1.gguf"), "{message}");

    // A text model without picture tokens does not take the eyes of another one.
    let other = folder(&[("text.gguf", "a.gguf"), ("mmproj.gguf", "mmproj.gguf")]);
    let mut bytes = other.read("a.gguf");
    let token = b"<|begin_of_video|>";
    let mut places = Vec::new();
    places.extend(bytes.windows(token.len()).enumerate().filter(|(_, w)| w == token).map(|(i, _)| i));
    assert!(!places.is_empty());
    places.iter().for_each(|&at| bytes[at + 2] = b'B');
    other.write("a.gguf", bytes);
    let picture = Picture::rgb8(28, 28, vec![9; 28 * 28 * 3]).unwrap();
    let request = Request::Messages(vec![Message::parts("user", vec![Part::Image(picture)])]);
    let message = error(open(other.path()).prompt(&request));
    assert!(message.contains("no vision encoder"), "{message}");

    let none = folder(&[("mmproj.gguf", "mmproj.gguf")]);
    let message = error(Engine::open(none.path(), options()));
    assert!(message.contains("no model.safetensors"), "{message}");
    let message = error(Engine::open(none.file("mmproj.gguf"), options()));
    assert!(
        message.contains("key `general.architecture`") && message.contains("found \"clip\""),
        "{message}"
    );
}

#[test]
fn a_truncated_gguf_file_is_an_error_that_names_it() {
    let whole = folder(&[("text.gguf", "t.gguf"), ("mmproj.gguf", "mmproj.gguf")]);
    for name in ["t.gguf", "mmproj.gguf"] {
        let bytes = whole.read(name);
        whole.write(name, &bytes[..bytes.len() / 2]);
        let message = error(Engine::open(whole.path(), options()));
        assert!(message.contains(name) && message.contains("reach past"), "{message}");
        whole.write(name, &bytes);
    }
    open(whole.path());
}
