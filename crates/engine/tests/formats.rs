//! A checkpoint that is written as GGUF or as `.pglm` answers as it did.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: what fails is a failed test"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pocketglm_bpe::Tokenizer;
use pocketglm_checkpoint::{
    Checkpoint, Converted, GgufExport, GgufFile, NameRules, OpenOptions, PglmContents, PglmFile, ReadMode,
    Renamed, export_gguf, export_pglm, to_plain,
};
use pocketglm_engine::quantise::{Policy, QuantiseOptions, Quantiser, verify_model};
use pocketglm_engine::{
    Content, DType, Engine, EngineOptions, GenerateOptions, Message, Part, Picture, Request,
};
use pocketglm_glm::LAYOUTS;
use pocketglm_tensor::{TensorInfo, WeightSource};
use serde_json::Value;

const CHECKPOINTS: [&str; 14] = [
    "default",
    "real-head-dim",
    "kv-heads-1",
    "kv-heads-all",
    "kv-heads-8-2",
    "patch-8",
    "merge-3",
    "temporal-1",
    "bf16",
    "f16",
    "tied",
    "eps",
    "sharded-v4",
    "other-names",
];

struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("pocketglm-formats-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn open(path: &Path) -> Engine {
    Engine::open(path, EngineOptions { threads: 2, context: 1024, ..EngineOptions::default() }).unwrap()
}

/// A checkpoint under canonical names.
fn source(name: &str) -> Renamed<Checkpoint> {
    let checkpoint = Checkpoint::open(golden(name), &OpenOptions::default()).unwrap();
    let wanted = ["model.language_model.embed_tokens.weight"];
    let rules = NameRules::detect(&checkpoint, LAYOUTS, &wanted).unwrap();
    Renamed::new(checkpoint, rules).unwrap()
}

/// Writes text and vision file with matrices in `dtype`.
fn write_gguf(source: &Renamed<Checkpoint>, dtype: DType, folder: &Path) {
    let checkpoint = source.source();
    let config = checkpoint.required_json("config.json").unwrap();
    let tokenizer = checkpoint.bytes("tokenizer.json").unwrap().unwrap();
    let template = checkpoint.text("chat_template.jinja").unwrap();
    let preprocessor = checkpoint.json("preprocessor_config.json").unwrap();
    let converted = Converted {
        source,
        dtype: Box::new(move |info: &TensorInfo| if info.shape.len() > 1 { dtype } else { info.dtype }),
        convert: Box::new(|_, tensor, dtype| to_plain(&tensor, dtype)),
    };
    let export = GgufExport {
        source: &converted,
        config: &config,
        tokenizer: tokenizer.as_slice(),
        chat_template: template.as_deref(),
        preprocessor: preprocessor.as_ref(),
        name: "tiny",
        extra: Vec::new(),
    };
    let (mut last, mut steps) = ((0, 0), 0);
    let vision = folder.join("mmproj.gguf");
    export_gguf(
        &export,
        &folder.join("text.gguf"),
        Some(&vision),
        &checkpoint.files(),
        &mut |done, total| {
            assert!(done <= total && done >= last.0);
            last = (done, total);
            steps += 1;
        },
    )
    .unwrap();
    assert!(steps > 10 && last.0 == last.1);
}

/// Two conversations, one with a picture of odd size.
fn requests() -> [Request; 2] {
    let pixels = (0..37 * 61 * 3).map(|i| (i * 7919 % 251) as u8).collect();
    let picture = Picture::rgb8(37, 61, pixels).unwrap();
    let parts = vec![Part::Image(picture), Part::Text("Where is the button?".into())];
    [
        Request::Messages(vec![Message::text("system", "Short."), Message::text("user", "What is 17 + 4?")]),
        Request::Messages(vec![Message { role: "user".into(), content: Content::Parts(parts) }]),
    ]
}

fn greedy(engine: &Engine, request: &Request) -> (Vec<u32>, Vec<u32>, String) {
    let prompt = engine.prompt(request).unwrap();
    let options = GenerateOptions { max_new_tokens: 24, ignore_eos: true, ..GenerateOptions::default() };
    let mut session = engine.session();
    let mut generation = session.generate(&prompt, &options).unwrap();
    let text = generation.text().unwrap();
    (prompt.token_ids().to_vec(), generation.token_ids().to_vec(), text)
}

#[test]
fn every_checkpoint_written_as_gguf_answers_as_before() {
    let mut compared = 0;
    for name in CHECKPOINTS {
        let original = open(&golden(name));
        let source = source(name);
        let lossless = source.tensors().iter().all(|t| t.dtype == DType::F16);
        for dtype in [DType::F32, DType::F16] {
            // Another rounding of the weights is another model.
            if dtype == DType::F16 && !lossless {
                continue;
            }
            let folder = Folder::new();
            write_gguf(&source, dtype, &folder.0);
            let gguf = open(&folder.0);
            for request in requests() {
                assert_eq!(greedy(&gguf, &request), greedy(&original, &request), "{name} {dtype}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 2 * (CHECKPOINTS.len() + 1));
}

#[test]
fn a_checkpoint_in_f16_answers_alike_from_both_formats() {
    // The original is of another type here, so both are compared with each other.
    for name in ["default", "bf16", "merge-3"] {
        let source = source(name);
        let folder = Folder::new();
        write_gguf(&source, DType::F16, &folder.0);
        let converted = Converted {
            source: &source,
            dtype: Box::new(|info: &TensorInfo| if info.shape.len() > 1 { DType::F16 } else { info.dtype }),
            convert: Box::new(|_, tensor, dtype| to_plain(&tensor, dtype)),
        };
        let path = folder.0.join("model.pglm");
        write_pglm(&path, &converted, source.source());
        let (gguf, pglm) = (open(&folder.0.join("text.gguf")), open(&path));
        for request in requests() {
            assert_eq!(greedy(&gguf, &request), greedy(&pglm, &request), "{name}");
        }
    }
}

fn quantiser(name: &str, policy: &str, change: impl FnOnce(&mut QuantiseOptions)) -> Quantiser {
    let mut options = QuantiseOptions::new(Policy::load(policy).unwrap());
    change(&mut options);
    Quantiser::open(golden(name), options).unwrap()
}

#[test]
fn a_file_made_on_many_threads_is_that_of_its_tensors_one_after_the_other() {
    for (name, policy) in [("default", "int4"), ("bf16", "int8-row"), ("f16", "Q8_0"), ("tied", "int2")] {
        let folder = Folder::new();
        let path = folder.0.join("model.pglm");
        let one = quantiser(name, policy, |_| ());
        let checkpoint = source(name);
        let files = checkpoint.source().side_files().unwrap();
        let mut files: Vec<(String, Vec<u8>)> =
            files.into_iter().map(|(name, bytes)| (name, bytes.as_slice().to_vec())).collect();
        let json =
            files.iter().find(|(name, _)| name == "tokenizer.json").map(|(_, json)| json.clone()).unwrap();
        let tables = Tokenizer::from_json(&json).unwrap().to_tables().unwrap();
        files.push(("tokenizer.tables".into(), PglmFile::content_made_of(&json, &tables)));
        let text = Policy::load(policy).unwrap().to_json();
        let contents = PglmContents { files, policy: Some(&text), ..PglmContents::default() };
        export_pglm(&path, &one, contents, &[], &mut |_, _| {}).unwrap();
        let wanted = std::fs::read(&path).unwrap();
        for threads in [1, 3] {
            let many = quantiser(name, policy, |o| (o.threads, o.overwrite) = (threads, true));
            many.write_pglm(&path).unwrap();
            assert!(std::fs::read(&path).unwrap() == wanted, "{name} {policy}, {threads} threads");
        }
    }
}

#[test]
fn quantising_that_is_stopped_leaves_nothing() {
    for threads in [1, 3] {
        let folder = Folder::new();
        let quantiser = quantiser("default", "int4", |options| {
            let cancel = options.cancel.clone();
            // The first report comes before the first row.
            options.progress = Some(Arc::new(move |_| cancel.cancel()));
            options.threads = threads;
        });
        let error = quantiser.write_pglm(folder.0.join("model.pglm")).unwrap_err();
        assert!(matches!(error, pocketglm_engine::Error::Cancelled), "{error}");
        assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
    }
}

/// Where `part`, which must stand there once, is in a file's bytes.
fn place(bytes: &[u8], part: &[u8]) -> usize {
    let mut places = bytes.windows(part.len()).enumerate().filter(|(_, w)| *w == part).map(|(i, _)| i);
    let first = places.next().unwrap();
    assert_eq!(places.next(), None);
    first
}

#[test]
fn a_changed_byte_of_a_pglm_is_told_and_nothing_is_made_of_it() {
    let folder = Folder::new();
    let (good, bad, made) =
        (folder.0.join("good.pglm"), folder.0.join("bad.pglm"), folder.0.join("made.pglm"));
    quantiser("default", "Q8_0", |_| ()).write_pglm(&good).unwrap();
    let keep = |path: &Path| Quantiser::open(path, QuantiseOptions::new(Policy::load("keep").unwrap()));
    keep(&good).unwrap().write_pglm(&made).unwrap();
    std::fs::remove_file(&made).unwrap();
    let options = EngineOptions::default();
    assert!(verify_model(&good, &options).unwrap().hashes);
    let change = |part: &[u8]| {
        let mut bytes = std::fs::read(&good).unwrap();
        let at = place(&bytes, part);
        bytes[at] ^= 1;
        std::fs::write(&bad, bytes).unwrap();
    };
    let told = |error: pocketglm_engine::Error, part: &str| {
        let error = error.to_string();
        assert!(
            error.contains("bad.pglm") && error.contains(part) && error.contains("is damaged"),
            "{error}"
        );
    };
    // A weight: opening does not read it.
    let name = "model.language_model.layers.0.self_attn.q_proj.weight";
    let checkpoint = Checkpoint::open(&good, &OpenOptions::default()).unwrap();
    let packed = checkpoint.packed(name).unwrap().unwrap();
    change(packed.shared_bytes().as_slice());
    let opened = keep(&bad).unwrap();
    told(opened.write_pglm(&made).unwrap_err(), name);
    told(opened.write_gguf(folder.0.join("made.gguf"), None).unwrap_err(), name);
    told(verify_model(&bad, &options).unwrap_err(), name);
    // Side files: they are read when the model is opened, but not the one of which another was made.
    let json = checkpoint.bytes("tokenizer.json").unwrap().unwrap();
    let tables = checkpoint.made_of("tokenizer.json", "tokenizer.tables").unwrap().unwrap();
    for (part, name) in [
        (checkpoint.bytes("config.json").unwrap().unwrap().as_slice(), "config.json"),
        // Behind what says that these are tables: other bytes there are those of a newer version.
        (&tables.bytes()[40..], "tokenizer.tables"),
    ] {
        change(part);
        told(Engine::open(&bad, options.clone()).map(|_| ()).unwrap_err(), name);
        told(verify_model(&bad, &options).unwrap_err(), name);
    }
    change(json.as_slice());
    Engine::open(&bad, options.clone()).unwrap();
    told(verify_model(&bad, &options).unwrap_err(), "tokenizer.json");
    told(keep(&bad).unwrap().write_pglm(&made).unwrap_err(), "tokenizer.json");
    let mut left: Vec<_> = std::fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["bad.pglm", "good.pglm"]);
}

#[test]
fn weights_that_are_no_numbers_are_refused_where_they_are_copied_too() {
    let folder = Folder::new();
    for file in
        std::fs::read_dir(golden("default")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file())
    {
        std::fs::copy(&file, folder.0.join(file.file_name().unwrap())).unwrap();
    }
    let weights = folder.0.join("model.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let made = folder.0.join("made.pglm");
    let quantise = |policy: &str| {
        let options =
            QuantiseOptions { overwrite: true, ..QuantiseOptions::new(Policy::load(policy).unwrap()) };
        Quantiser::open(&folder.0, options).unwrap().write_pglm(&made)
    };
    quantise("int4").unwrap();
    let checkpoint = Checkpoint::open(golden("default"), &OpenOptions::default()).unwrap();
    for (name, policy) in [
        ("model.language_model.layers.1.input_layernorm.weight", "int4"),
        ("model.language_model.layers.0.self_attn.q_proj.bias", "int4"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "keep"),
    ] {
        let part = checkpoint.tensor(name).unwrap();
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let mut bytes = good.clone();
            let at = place(&bytes, part.bytes()) + 5 * 4;
            bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
            std::fs::remove_file(&made).unwrap();
            std::fs::write(&weights, &bytes).unwrap();
            let error = quantise(policy).unwrap_err().to_string();
            assert!(
                error.contains(name)
                    && error.contains("model.safetensors")
                    && error.contains("element 5 is NaN or infinite"),
                "{error}"
            );
            assert!(!made.exists());
            assert!(
                verify_model(&folder.0, &EngineOptions::default()).unwrap_err().to_string().contains(name)
            );
            std::fs::write(&weights, &good).unwrap();
            quantise(policy).unwrap();
        }
    }
    assert!(!verify_model(&folder.0, &EngineOptions::default()).unwrap().hashes);
}

#[test]
fn of_several_vision_files_the_one_named_like_the_text_file_or_the_one_asked_for_is_taken() {
    let folder = Folder::new();
    write_gguf(&source("default"), DType::F32, &folder.0);
    let at = |name: &str| folder.0.join(name);
    std::fs::rename(at("mmproj.gguf"), at("mmproj-text.gguf")).unwrap();
    std::fs::copy(at("mmproj-text.gguf"), at("mmproj-other.gguf")).unwrap();
    let files = |mmproj: Option<PathBuf>| {
        let options = OpenOptions { mmproj, ..OpenOptions::default() };
        let checkpoint = Checkpoint::open(at("text.gguf"), &options)?;
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        Ok::<_, pocketglm_checkpoint::Error>(checkpoint.files().into_iter().map(name).collect::<Vec<_>>())
    };
    assert_eq!(files(None).unwrap(), ["text.gguf", "mmproj-text.gguf"]);
    assert_eq!(files(Some(at("mmproj-other.gguf"))).unwrap(), ["text.gguf", "mmproj-other.gguf"]);
    std::fs::rename(at("mmproj-text.gguf"), at("mmproj-third.gguf")).unwrap();
    assert!(files(None).unwrap_err().to_string().contains("--mmproj"));
    let mmproj = Some(at("mmproj-third.gguf"));
    let options = EngineOptions { mmproj: mmproj.clone(), ..EngineOptions::default() };
    // A model that is no GGUF file has no use for it, and says so.
    let error = Engine::open(golden("default"), options.clone()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("no GGUF text file for the vision file"), "{error}");
    assert!(Engine::open(at("text.gguf"), options).unwrap().info().vision.count > 0);
    let options = QuantiseOptions { mmproj, ..QuantiseOptions::new(Policy::load("int8").unwrap()) };
    let plan = Quantiser::open(at("text.gguf"), options).unwrap().plan().clone();
    assert!(plan.tensors.iter().any(|t| t.name.starts_with("model.visual.")));
}

fn write_pglm(path: &Path, weights: &dyn WeightSource, checkpoint: &Checkpoint) {
    let files = checkpoint.side_files().unwrap();
    let contents = PglmContents {
        files: files.into_iter().map(|(name, bytes)| (name, bytes.as_slice().to_vec())).collect(),
        policy: Some("* = f16"),
        ..PglmContents::default()
    };
    export_pglm(path, weights, contents, &checkpoint.files(), &mut |_, _| {}).unwrap();
}

#[test]
fn every_checkpoint_written_as_pglm_answers_as_before() {
    for name in CHECKPOINTS {
        let source = source(name);
        let folder = Folder::new();
        let path = folder.0.join("model.pglm");
        write_pglm(&path, &source, source.source());
        let (original, pglm) = (open(&golden(name)), open(&path));
        for request in requests() {
            assert_eq!(greedy(&pglm, &request), greedy(&original, &request), "{name}");
        }
        assert_eq!(pglm.info().bytes, original.info().bytes, "{name}");
        // A folder with the file alone is the same model.
        assert_eq!(open(&folder.0).info().tensors, original.info().tensors, "{name}");
    }
}

#[test]
fn row_order_matters_so_the_comparison_would_notice_a_wrong_one() {
    // The negative control: without the key that says so, the permuted rows are taken as they stand.
    let source = source("default");
    let folder = Folder::new();
    write_gguf(&source, DType::F32, &folder.0);
    let path = folder.0.join("text.gguf");
    let good = greedy(&open(&folder.0), &requests()[0]).1;
    let mut bytes = std::fs::read(&path).unwrap();
    let key = b"glm4.rope.dimension_sections";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    bytes[at..at + key.len()].copy_from_slice(b"glm4.rope.dimension_sectionz");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let engine = open(&folder.0);
    assert_ne!(greedy(&engine, &requests()[0]).1, good);
    // And a file of this kind says that pictures will suffer.
    let checkpoint = Checkpoint::open(&folder.0, &OpenOptions::default()).unwrap();
    assert!(
        checkpoint.notes().iter().any(|n| n.contains("rope.dimension_sections")),
        "{:?}",
        checkpoint.notes()
    );
}

#[test]
fn written_keys_are_those_of_the_converters() {
    let source = source("default");
    let folder = Folder::new();
    write_gguf(&source, DType::F32, &folder.0);
    let text = GgufFile::open(&folder.0.join("text.gguf"), ReadMode::Map).unwrap();
    assert_eq!(text.string("general.architecture").unwrap(), Some("glm4"));
    assert_eq!(text.required("glm4.rope.dimension_count", 0..=64).unwrap(), 8);
    let sections = text.numbers::<4>("glm4.rope.dimension_sections", 0.0..=64.0).unwrap();
    assert_eq!(sections, Some([1.0, 1.0, 2.0, 0.0]));
    let gguf = Checkpoint::open(&folder.0, &OpenOptions::default()).unwrap();
    let config: Value = gguf.required_json("config.json").unwrap();
    for (file, field) in [
        ("generation_config.json", "eos_token_id"),
        ("generation_config.json", "pad_token_id"),
        ("tokenizer_config.json", "eos_token"),
        ("preprocessor_config.json", "size"),
        ("preprocessor_config.json", "temporal_patch_size"),
    ] {
        let (ours, theirs) =
            (gguf.required_json(file).unwrap(), source.source().required_json(file).unwrap());
        assert_eq!(ours[field], theirs[field], "{file} {field}");
    }
    let images = |checkpoint: &Checkpoint| checkpoint.required_json("preprocessor_config.json").unwrap();
    for field in ["image_mean", "image_std"] {
        // GGUF has them in f32, in which they are used.
        let numbers = |v: Value| -> Vec<f32> {
            v[field].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
        };
        assert_eq!(numbers(images(&gguf)), numbers(images(source.source())), "{field}");
    }
    let template = gguf.text("chat_template.jinja").unwrap();
    assert_eq!(template, source.source().text("chat_template.jinja").unwrap());
    let original = source.source().required_json("config.json").unwrap();
    for field in ["image_token_id", "video_token_id", "video_start_token_id", "video_end_token_id"] {
        assert_eq!(config[field], original[field], "{field}");
    }
    for field in ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"] {
        assert_eq!(config["text_config"][field], original["text_config"][field], "{field}");
    }
    for field in [
        "depth",
        "hidden_size",
        "num_heads",
        "image_size",
        "patch_size",
        "out_hidden_size",
        "intermediate_size",
        "spatial_merge_size",
        "temporal_patch_size",
    ] {
        assert_eq!(config["vision_config"][field], original["vision_config"][field], "{field}");
    }
}

#[test]
fn a_text_model_without_picture_positions_keeps_its_row_order() {
    let source = source("default");
    let checkpoint = source.source();
    let mut config = checkpoint.required_json("config.json").unwrap();
    config["text_config"]["rope_parameters"].as_object_mut().unwrap().remove("mrope_section").unwrap();
    let tokenizer = checkpoint.bytes("tokenizer.json").unwrap().unwrap();
    let template = checkpoint.text("chat_template.jinja").unwrap();
    let export = GgufExport {
        source: &source,
        config: &config,
        tokenizer: tokenizer.as_slice(),
        chat_template: template.as_deref(),
        preprocessor: None,
        name: "tiny",
        extra: Vec::new(),
    };
    let folder = Folder::new();
    let path = folder.0.join("text.gguf");
    export_gguf(&export, &path, None, &[], &mut |_, _| {}).unwrap();
    let file = GgufFile::open(&path, ReadMode::Map).unwrap();
    assert!(file.array("glm4.rope.dimension_sections").unwrap().is_none());
    // Text stands at the same place on all axes, so the sections do not matter to it.
    let request = &requests()[0];
    assert_eq!(greedy(&open(&path), request), greedy(&open(&golden("default")), request));
}
