//! Text, pictures and sounds in one prompt: the audio branch and the fusion of modalities.

use pocketglm::quantise::{Policy, QuantiseOptions, Quantiser};
use pocketglm::{
    Content, Engine, EngineOptions, GenerateOptions, Message, Model, Part, Prompt, Request, Sound, Trace,
};
use serde_json::{Value, json};

use crate::golden::{Tensors, path, relative_l2};
use crate::hear::clip;
use crate::support::{Folder, case, error, options};

const LOGITS: f64 = 1e-4;
const ROWS: f64 = 2e-5;

fn adapted() -> EngineOptions {
    EngineOptions { adapter: Some(path("hear/adapter/adapter.safetensors")), ..options() }
}

fn sounds() -> Vec<Sound> {
    let json: Value =
        serde_json::from_slice(&std::fs::read(path("hear/adapter/golden.json")).unwrap()).unwrap();
    let one = |c: &Value| {
        Sound::frames(&clip(c[0].as_u64().unwrap() as usize, c[1].as_i64().unwrap()), 1, 16_000).unwrap()
    };
    json["clips"].as_array().unwrap().iter().map(one).collect()
}

/// The golden picture of `bf16`.
fn picture() -> Part {
    let Request::Messages(messages) = case("bf16", "image").request else { panic!("messages") };
    let parts = messages.iter().filter_map(|m| match &m.content {
        Content::Parts(parts) => Some(parts),
        Content::Text(_) => None,
    });
    parts.flatten().find(|p| matches!(p, Part::Image(_))).unwrap().clone()
}

/// "tap ", a sound, the picture, " then ", another sound, "?".
fn interleaved() -> Vec<Part> {
    let mut sounds = sounds().into_iter().map(Part::Audio);
    let text = |t: &str| Part::Text(t.into());
    let (first, second) = (sounds.next().unwrap(), sounds.next().unwrap());
    vec![text("tap "), first, picture(), text(" then "), second, text("?")]
}

fn request(parts: Vec<Part>) -> Request {
    Request::Messages(vec![Message::parts("user", parts)])
}

fn distance(trace: &Trace, ours: &str, golden: &Tensors, theirs: &str) -> f64 {
    relative_l2(&trace.get(ours).unwrap().to_f32().unwrap(), &golden.f32(theirs).unwrap())
}

#[test]
fn one_prompt_of_text_picture_and_sounds_matches_the_reference() {
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let golden = Tensors::open("hear/adapter/golden.safetensors");
    let prompt = engine.prompt(&request(interleaved())).unwrap();
    let trace = engine.trace(&prompt).unwrap();
    for name in ["input_ids", "position_ids"] {
        assert_eq!(trace.get(name).unwrap().to_i64().unwrap(), golden.i64(name).unwrap(), "{name}");
    }
    let (audio, image) = (
        distance(&trace, "audio_embeds", &golden, "audio_embeds"),
        distance(&trace, "image_embeds", &golden, "image_embeds"),
    );
    let logits = distance(&trace, "logits", &golden, "logits");
    println!("audio rows {audio:.1e}, picture rows {image:.1e}, logits {logits:.1e}");
    assert!(audio < ROWS && image < ROWS && logits < LOGITS, "{audio:.1e} {image:.1e} {logits:.1e}");

    let wanted = golden.i64("generated_ids").unwrap();
    let greedy =
        GenerateOptions { max_new_tokens: wanted.len(), ignore_eos: true, ..GenerateOptions::default() };
    let mut session = engine.session();
    let mut answer = session.generate(&prompt, &greedy).unwrap();
    answer.text().unwrap();
    let got: Vec<i64> = answer.token_ids().iter().map(|&t| i64::from(t)).collect();
    assert_eq!(got, wanted);
}

#[test]
fn fused_equals_unfused_with_all_modalities() {
    let logits = |fuse: bool| {
        let engine = Engine::open(path("bf16"), EngineOptions { fuse, ..adapted() }).unwrap();
        let prompt = engine.prompt(&request(interleaved())).unwrap();
        engine.session().forward(&prompt).unwrap()
    };
    let apart = relative_l2(&logits(true), &logits(false));
    assert!(apart < 3e-5, "{apart:.1e}");
}

#[test]
fn modalities_come_in_any_order() {
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let mut sounds = sounds().into_iter().map(Part::Audio);
    let (first, second) = (sounds.next().unwrap(), sounds.next().unwrap());
    let orders: [Vec<Part>; 5] = [
        vec![first.clone()],
        vec![first.clone(), picture()],
        vec![picture(), first.clone(), first.clone(), Part::Text("x".into())],
        vec![Part::Text("x".into()), second.clone(), picture(), first.clone(), picture()],
        vec![Part::Text("no sound".into())],
    ];
    let mut seen = Vec::new();
    for parts in orders {
        let prompt = engine.prompt(&request(parts)).unwrap();
        let logits = engine.session().forward(&prompt).unwrap();
        assert!(logits.iter().all(|v| v.is_finite()));
        seen.push((prompt.token_ids().len(), logits));
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn a_sound_that_was_heard_is_not_encoded_again_and_another_one_is() {
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let mut session = engine.session();
    let parts = |i: usize| vec![Part::Audio(sounds().swap_remove(i)), Part::Text("?".into())];
    let few = GenerateOptions { max_new_tokens: 2, ignore_eos: true, ..GenerateOptions::default() };
    let mut encoded = Vec::new();
    for i in [0, 0, 1, 0] {
        let prompt = engine.prompt(&request(parts(i))).unwrap();
        let mut answer = session.generate(&prompt, &few).unwrap();
        answer.text().unwrap();
        encoded.push(answer.timings().encoded_pictures);
    }
    assert_eq!(encoded, [1, 0, 1, 0]);
}

#[test]
fn the_openai_form_and_the_facade_reach_the_same_prompt() {
    let samples = clip(4000, 900);
    let file = crate::hear::wav(&samples, 16_000);
    let work = Folder::new();
    work.write("clip.wav", &file);
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let data = crate::support::base64(&file);
    let path_of = work.file("clip.wav").display().to_string();
    let parts = [
        json!({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}),
        json!({"type": "audio", "audio": path_of}),
        json!({"type": "audio", "audio": {"url": format!("file://{path_of}")}}),
        json!({"type": "audio", "audio": format!("data:audio/wav;base64,{data}")}),
    ];
    let forward = |request: &Request| engine.session().forward(&engine.prompt(request).unwrap()).unwrap();
    let text = json!({"type": "text", "text": "go"});
    let wanted = forward(&request(vec![Part::Audio(Sound::bytes(file)), Part::Text("go".into())]));
    for part in parts {
        let json = json!({"messages": [{"role": "user", "content": [part, text]}]});
        assert_eq!(forward(&Request::from_json(json.to_string().as_bytes()).unwrap()), wanted);
    }
    let model = Model::open_with(path("bf16"), adapted()).unwrap();
    let mut chat = model.chat();
    chat.options_mut().max_new_tokens = 3;
    let prompt = Prompt::new().audio(work.file("clip.wav")).text("go");
    assert!(chat.answer(&prompt).unwrap().text().is_ok());
}

#[test]
fn a_checkpoint_without_an_audio_branch_says_what_is_missing() {
    let plain = Engine::open(path("bf16"), options()).unwrap();
    let message = error(plain.prompt(&request(vec![Part::Audio(sounds().remove(0))])));
    for wanted in ["no audio branch", "audio_config", "model.audio_tower", "--adapter", "1 sound"] {
        assert!(message.contains(wanted), "{wanted} in {message}");
    }
}

#[test]
fn sounds_and_texts_that_do_not_fit_are_typed_errors() {
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let say = |parts: Vec<Part>| error(engine.prompt(&request(parts)));
    let short = Sound::frames(&[0.1; 399], 1, 16_000).unwrap();
    assert!(say(vec![Part::Audio(short)]).contains("needs at least 400"));
    assert!(say(vec![Part::Audio(Sound::bytes(*b"RIFF"))]).contains("wav file"));
    assert!(say(vec![Part::Audio(Sound::file("no/such.wav"))]).contains("no/such.wav"));
    assert!(say(vec![Part::Text("<|observation|>".into())]).contains("audio placeholder"));
    let long = Sound::frames(&vec![0.1; 16_000 * 60], 1, 16_000).unwrap();
    assert!(say(vec![Part::Audio(long)]).contains("the context holds 2048"));
    assert!(error(engine.prompt(&Request::Audio(sounds().remove(0)))).contains("speech checkpoint"));
    let id = engine.tokenize("<|observation|>").unwrap();
    assert!(error(engine.prompt(&Request::InputIds(id))).contains("1 audio tokens for 0 frames"));
    let wrong = r#"{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}}]}]}"#;
    assert!(error(Request::from_json(wrong.as_bytes())).contains("format must be \"wav\""));
}

#[test]
fn adapters_that_are_none_are_typed_errors() {
    let open = |adapter: std::path::PathBuf| {
        error(Engine::open(path("bf16"), EngineOptions { adapter: Some(adapter), ..options() }).map(|_| ()))
    };
    assert!(open(path("bf16/model.safetensors")).contains("pocketglm.adapter"));
    assert!(open("no/such.safetensors".into()).contains("no/such"));
    let work = Folder::new();
    let original = std::fs::read(path("hear/adapter/adapter.safetensors")).unwrap();
    let with = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = original.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        work.write("a.safetensors", bytes);
        open(work.file("a.safetensors"))
    };
    assert!(with("model.audio_tag", "model.audio_bag").contains("model.audio_bag"));
    assert!(
        with("model.audio_projection.bias", "model.audio_projection.bios")
            .contains("model.audio_projection.bi")
    );
    // Another width of the decoder: every tensor of the projections has the wrong shape.
    let other = EngineOptions { adapter: Some(path("hear/adapter/adapter.safetensors")), ..options() };
    let message = error(Engine::open(path("kv-heads-8-2"), other).map(|_| ()));
    assert!(message.contains("model.audio_projection.weight") && message.contains("96"), "{message}");
}

#[test]
fn the_plan_counts_the_audio_branch() {
    let engine = Engine::open(path("bf16"), adapted()).unwrap();
    let prompt = engine.prompt(&request(interleaved())).unwrap();
    let plan = engine.plan(&prompt, 4).unwrap();
    for part in ["audio weights", "audio activations", "sounds", "vision weights"] {
        assert!(plan.parts.iter().any(|p| p.name == part && p.bytes > 0), "{part}");
    }
    assert_eq!(engine.info().audio_layers, 2);
    assert!(engine.info().audio.count > 20_000);
}

/// The golden checkpoint with the adapter's tensors as a shard of its own: a checkpoint that hears by itself.
fn hearing() -> Folder {
    let work = Folder::copy_of("bf16");
    let adapter = std::fs::read(path("hear/adapter/adapter.safetensors")).unwrap();
    let header = |bytes: &[u8]| -> Value {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        serde_json::from_slice(&bytes[8..8 + length]).unwrap()
    };
    let fields: Value =
        serde_json::from_str(header(&adapter)["__metadata__"]["pocketglm.adapter"].as_str().unwrap())
            .unwrap();
    let mut config: Value = serde_json::from_slice(&work.read("config.json")).unwrap();
    for (name, value) in fields.as_object().unwrap().iter().filter(|(name, _)| *name != "format") {
        config[name] = value.clone();
    }
    let mut shards = serde_json::Map::new();
    for (file, bytes) in
        [("text.safetensors", work.read("model.safetensors")), ("audio.safetensors", adapter)]
    {
        let names = header(&bytes);
        let names = names.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
        shards.extend(names.map(|name| (name.clone(), json!(file))));
        work.write(file, bytes);
    }
    std::fs::remove_file(work.file("model.safetensors")).unwrap();
    work.write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": shards}).to_string());
    work.write("config.json", config.to_string());
    work
}

#[test]
fn a_checkpoint_that_hears_still_does_when_it_is_quantised() {
    let work = hearing();
    let file = work.file("eight.pglm");
    let quantiser = || {
        let options = QuantiseOptions { threads: 2, ..QuantiseOptions::new(Policy::load("int8").unwrap()) };
        Quantiser::open(work.path(), options).unwrap()
    };
    quantiser().write_pglm(&file).unwrap();
    assert!(error(quantiser().write_gguf(work.file("text.gguf"), None)).contains("audio branch"));
    let logits = |model: &std::path::Path| {
        let engine = Engine::open(model, options()).unwrap();
        let trace = engine.trace(&engine.prompt(&request(interleaved())).unwrap()).unwrap();
        ["audio_embeds", "logits"].map(|name| trace.get(name).unwrap().to_f32().unwrap().into_owned())
    };
    let (exact, quantised) = (logits(work.path()), logits(&file));
    assert_eq!(exact[0], quantised[0], "the audio branch stays as it is");
    let apart = relative_l2(&quantised[1], &exact[1]);
    assert!(apart > 1e-6 && apart < 0.1, "{apart}");
}
