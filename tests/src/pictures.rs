//! Pictures: odd sizes, every way of giving one, and everything that is no picture.

use std::time::{Duration, Instant};

use pocketglm::{
    Content, Engine, EngineOptions, Error, Message, Part, Picture, PreparedPrompt, Request, to_device_pixels,
};
use serde_json::Value;

use crate::golden::{Tensors, path, relative_l2};
use crate::support::{Folder, Random, answer, base64, engine, error, exactly, options};

fn one(engine: &Engine, picture: Picture) -> pocketglm::Result<PreparedPrompt> {
    let parts = vec![Part::Image(picture), Part::Text("点击".into())];
    engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]))
}

#[test]
fn pictures_of_odd_sizes_match_the_reference() {
    let expected: Value =
        serde_json::from_slice(&std::fs::read(path("odd-sizes/expected.json")).unwrap()).unwrap();
    let golden = Tensors::open("odd-sizes/golden.safetensors");
    let engine = engine("default");
    let mut parts: Vec<Part> = expected["pictures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| Part::Image(Picture::file(path("odd-sizes").join(p["file"].as_str().unwrap()))))
        .collect();
    assert_eq!(parts.len(), 8);
    parts.push(Part::Text(expected["question"].as_str().unwrap().into()));
    let prompt = engine.prompt(&Request::Messages(vec![Message::parts("user", parts)])).unwrap();
    let trace = engine.trace(&prompt).unwrap();
    for name in ["input_ids", "position_ids", "image_grid_thw"] {
        assert_eq!(trace.get(name).unwrap().to_i64().unwrap(), golden.i64(name).unwrap(), "{name}");
    }
    let grids: Vec<i64> = prompt.grids().concat().iter().map(|&side| side as i64).collect();
    assert_eq!(grids, golden.i64("image_grid_thw").unwrap());
    let f32s = |name: &str| trace.get(name).unwrap().to_f32().unwrap();
    let merger = relative_l2(&f32s("image_embeds"), &golden.f32("vision.merger").unwrap());
    assert!(merger <= 2e-5, "merger {merger:.1e}");
    let (all, wanted) = (f32s("logits"), golden.f32("logits_last_32").unwrap());
    let logits = relative_l2(&all[all.len() - wanted.len()..], &wanted);
    assert!(logits <= 1e-4, "logits {logits:.1e}");
    let ids: Vec<i64> =
        answer(&mut engine.session(), &prompt, &exactly(12)).ids.iter().map(|&i| i.into()).collect();
    assert_eq!(ids, golden.i64("generated_ids").unwrap());
}

#[test]
fn every_way_of_giving_a_picture_gives_the_same_prompt() {
    let engine = engine("default");
    for name in ["rgb.png", "palette-alpha.png", "444.jpg", "orientation-6.jpg", "lossless.webp"] {
        let file = path("decode").join(name);
        let bytes = std::fs::read(&file).unwrap();
        let encoded = base64(&bytes);
        let raw = Tensors::open("decode/rgb.safetensors").pictures(name).unwrap().remove(0);
        let pictures = [
            Picture::file(&file),
            Picture::bytes(bytes),
            Picture::base64(&encoded),
            Picture::base64(&format!("data:image/png;base64,{encoded}")),
            raw,
        ];
        let all: Vec<Vec<f32>> = pictures
            .into_iter()
            .map(|p| {
                let prompt = one(&engine, p).unwrap();
                engine.trace(&prompt).unwrap().get("pixel_values").unwrap().to_f32().unwrap().into_owned()
            })
            .collect();
        // The reference's decoder of JPEG rounds otherwise than ours, so its pixels are compared only where exact.
        let exact = if name.ends_with(".jpg") { 4 } else { 5 };
        assert!(all[..exact].iter().all(|p| *p == all[0]), "{name}");
    }
}

#[test]
fn a_request_file_gives_the_same_prompt_as_parts() {
    let engine = engine("default");
    let file = path("odd-sizes/57x31.png");
    let data = format!("data:image/png;base64,{}", base64(&std::fs::read(&file).unwrap()));
    let plain = one(&engine, Picture::file(&file)).unwrap();
    for url in [file.display().to_string(), format!("file://{}", file.display()), data] {
        let json = serde_json::json!({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "点击"}]}]});
        let prompt = engine.prompt(&Request::from_json(json.to_string().as_bytes()).unwrap()).unwrap();
        assert_eq!(prompt.token_ids(), plain.token_ids());
        assert_eq!(
            answer(&mut engine.session(), &prompt, &exactly(3)),
            answer(&mut engine.session(), &plain, &exactly(3))
        );
    }
}

#[test]
fn a_lower_cap_on_pixels_gives_fewer_tokens() {
    let file = || Picture::file(path("odd-sizes/211x199.png"));
    let tokens = |cap: Option<u64>| {
        let engine = Engine::open(path("default"), EngineOptions { max_pixels: cap, ..options() }).unwrap();
        let prompt = one(&engine, file()).unwrap();
        answer(&mut engine.session(), &prompt, &exactly(1));
        prompt.token_ids().iter().filter(|&&id| id == 994).count()
    };
    let all = [None, Some(60_000), Some(30_000), Some(15_000)].map(tokens);
    assert_eq!(all[0], 56);
    assert!(all.windows(2).all(|w| w[0] > w[1]), "{all:?}");
    // A still picture counts as two frames.
    for (cap, tokens) in [60_000, 30_000, 15_000].iter().zip(&all[1..]) {
        assert!(tokens * 28 * 28 * 2 <= *cap, "{tokens} tokens at {cap} pixels");
    }
    let absurd = EngineOptions { max_pixels: Some(0), ..options() };
    assert!(error(Engine::open(path("default"), absurd)).contains("pixels"));
}

/// A copy of `default` without its vision encoder.
fn text_only() -> Folder {
    let folder = Folder::copy_of("default");
    let mut config: Value = serde_json::from_slice(&folder.read("config.json")).unwrap();
    config.as_object_mut().unwrap().remove("vision_config");
    folder.write("config.json", config.to_string());
    let kept = crate::checkpoints::without(&folder.read("model.safetensors"), |name| name.contains("visual"));
    folder.write("model.safetensors", kept);
    folder
}

#[test]
fn a_text_only_model_refuses_pictures_and_answers_text() {
    let folder = text_only();
    let plain = Engine::open(folder.path(), options()).unwrap();
    assert!(matches!(one(&plain, Picture::file("not read")).map(|_| ()), Err(Error::NoVision { found: 1 })));
    let both = engine("default");
    let prompt = crate::support::prompt(&both, "default", "text");
    let wanted = answer(&mut both.session(), &prompt, &exactly(6));
    let prompt = crate::support::prompt(&plain, "default", "text");
    assert_eq!(answer(&mut plain.session(), &prompt, &exactly(6)), wanted);
    assert_eq!(plain.info().vision_blocks, 0);
    assert_eq!(plain.info().vision.count, 0);
}

#[test]
fn text_that_pretends_to_be_a_picture_is_refused() {
    let engine = engine("default");
    for word in ["<|image|>", "<|video|>"] {
        let text = format!("look: {word}");
        let alone = engine.prompt(&Request::Messages(vec![Message::text("user", &text)]));
        assert!(error(alone).contains(word));
        let parts = vec![Part::Image(Picture::file(path("odd-sizes/1x1.png"))), Part::Text(text.clone())];
        assert!(error(engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]))).contains(word));
        assert!(
            error(engine.prompt(&Request::Messages(vec![Message::text("system", &text)]))).contains(word)
        );
    }
    // The marks around pictures do not make one either: an error or plain text, but no panic.
    for word in ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"] {
        let parts = vec![Part::Text(word.into()), Part::Image(Picture::file(path("odd-sizes/1x1.png")))];
        let _ = engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]));
    }
}

#[test]
fn broken_pictures_are_errors_that_name_the_file() {
    let engine = engine("default");
    let folder = Folder::new();
    let mut random = Random::new(17);
    let mut refused = 0;
    for name in ["rgb.png", "444.jpg", "lossy.webp"] {
        let whole = std::fs::read(path("decode").join(name)).unwrap();
        for round in 0..60 {
            let mut bytes = whole.clone();
            if round % 2 == 0 {
                bytes.truncate(random.below(whole.len()));
            } else {
                for _ in 0..1 + random.below(8) {
                    let at = random.below(bytes.len());
                    bytes[at] = random.next() as u8;
                }
            }
            folder.write("broken.png", &bytes);
            let start = Instant::now();
            match one(&engine, Picture::file(folder.file("broken.png"))) {
                Ok(_) => {}
                Err(e @ Error::Picture { .. }) => {
                    assert!(e.to_string().contains("broken.png"), "{e}");
                    refused += 1;
                }
                Err(e) => panic!("{name}: {e}"),
            }
            assert!(start.elapsed() < Duration::from_secs(2));
        }
    }
    assert!(refused > 90, "only {refused} were refused");
    for (picture, wanted) in [
        (Picture::bytes(Vec::new()), "0 bytes"),
        (Picture::bytes(b"GIF89a..".to_vec()), "png, jpeg or webp"),
        (Picture::base64("data:text/plain,hello"), "data url"),
        (Picture::base64("???"), "data url"),
    ] {
        let e = one(&engine, picture).map(|_| ()).unwrap_err();
        assert!(matches!(e, Error::Picture { .. }) && e.to_string().contains(wanted), "{e}");
    }
    let pixels = |w, h, n| error(Picture::rgb8(w, h, vec![0; n]));
    assert!(pixels(2, 2, 11).contains("11 bytes for 2x2"), "{}", pixels(2, 2, 11));
    pixels(0, 0, 0);
    pixels(usize::MAX, 2, 6);
    assert!(
        error(one(&engine, Picture::rgb8(1, 300, vec![0; 900]).unwrap())).contains("200"),
        "aspect ratio"
    );
}

#[test]
fn a_picture_that_claims_gigabytes_is_refused_at_once() {
    let engine = engine("default");
    let mut png = std::fs::read(path("odd-sizes/1x1.png")).unwrap();
    // Width and height stand at bytes 16 to 24; the checksum follows at 29.
    png[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let checksum = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    let start = Instant::now();
    let text = error(one(&engine, Picture::bytes(png)));
    assert!(text.contains("limit"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// The checksum of PNG.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

#[test]
fn what_is_no_plain_file_is_refused_and_never_waited_for() {
    let engine = engine("default");
    let folder = Folder::new();
    let missing = error(one(&engine, Picture::file(folder.file("absent.png"))));
    assert!(missing.contains("absent.png"), "{missing}");
    let start = Instant::now();
    assert!(error(one(&engine, Picture::file(folder.path()))).contains("not a plain file"));
    #[cfg(unix)]
    {
        let pipe = folder.file("pipe.png");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        assert!(error(one(&engine, Picture::file(&pipe))).contains("not a plain file"));
        assert!(error(one(&engine, Picture::file("/dev/zero"))).contains("not a plain file"));
        assert!(error(Request::from_file(&pipe)).contains("not a plain file"));
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    std::fs::File::create(folder.file("huge.png")).unwrap().set_len(1 << 40).unwrap();
    assert!(error(one(&engine, Picture::file(folder.file("huge.png")))).contains("1099511627776"));
}

#[test]
fn a_video_needs_frames_of_one_size_and_a_second_for_each() {
    let engine = engine("default");
    let frame = |w: usize, h: usize| Picture::rgb8(w, h, vec![7; w * h * 3]).unwrap();
    let ask = |frames: Vec<Picture>, seconds: Vec<u32>| {
        let parts = vec![Part::Video { frames, seconds }, Part::Text("?".into())];
        engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]))
    };
    ask(vec![frame(60, 60); 4], vec![]).unwrap();
    ask(vec![frame(60, 60); 3], vec![0, 1, 2]).unwrap();
    error(ask(vec![], vec![]));
    error(ask(vec![frame(60, 60), frame(61, 60)], vec![]));
    assert!(error(ask(vec![frame(60, 60); 4], vec![0, 1])).contains("4 frames has 2 seconds"));
    ask(vec![frame(60, 60); 2], vec![u32::MAX; 2]).unwrap();
    // The reference refuses fewer frames than a patch has.
    assert!(error(ask(vec![frame(60, 60)], vec![])).contains("at least 2"));
}

#[test]
fn more_pictures_than_the_context_holds_are_refused() {
    let engine = Engine::open(path("default"), EngineOptions { context: 64, ..options() }).unwrap();
    let parts = vec![Part::Image(Picture::file(path("odd-sizes/211x199.png"))); 100];
    let refused = engine
        .prompt(&Request::Messages(vec![Message { role: "user".into(), content: Content::Parts(parts) }]));
    assert!(matches!(refused.map(|_| ()), Err(Error::Context { context: 64, .. })));
}

#[test]
fn answer_coordinates_become_device_pixels() {
    let corner = to_device_pixels(999, 999, 1080, 2400).unwrap();
    assert!(corner.x < 1080 && corner.y < 2400, "{corner:?}");
    let origin = to_device_pixels(0, 0, 1080, 2400).unwrap();
    assert_eq!((origin.x, origin.y), (0, 0));
}
