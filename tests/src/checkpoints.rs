//! Broken checkpoints: every one is an error that names the place, or works; none panics, hangs or takes much memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use pocketglm::{Engine, EngineOptions, Error, Message, Part, Picture, Request};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::support::{Folder, Random, answer, case, error, exactly, options};

/// No broken file may cost more work than this.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nor keep anyone waiting for something else, on a machine that does other work as well.
const WAITING: Duration = Duration::from_secs(20);
/// A layer's weight of the checkpoint `bf16`, which most tests break.
const WEIGHT: &str = "model.language_model.layers.0.mlp.down_proj.weight";

fn open(folder: &Folder) -> pocketglm::Result<Engine> {
    Engine::open(folder.path(), EngineOptions { threads: 1, context: 256, ..options() })
}

/// Opens a folder and, where that works, asks about a small picture. Gives the error, and asserts the time.
fn attempt(folder: &Folder, what: &str) -> Option<Error> {
    let (start, before) = (Instant::now(), worked());
    let result = open(folder).and_then(|engine| {
        let picture = Picture::rgb8(30, 40, vec![120; 30 * 40 * 3])?;
        let picture = engine.info().vision_blocks.checked_sub(1).map(|_| Part::Image(picture));
        let parts = picture.into_iter().chain([Part::Text("点击 tap".into())]).collect();
        let prompt = engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]))?;
        engine.session().generate(&prompt, &exactly(2))?.text()
    });
    let waited = start.elapsed();
    let worked = worked().zip(before).map_or(waited, |(after, before)| after.saturating_sub(before));
    if worked > Duration::from_millis(200) {
        println!("{what} took {worked:?}");
    }
    assert!(worked < PATIENCE && waited < WAITING, "{what} took {waited:?}, of which {worked:?} at work");
    result.err()
}

/// Time that this thread has worked, where the system says so. Engines of one thread work on the caller's.
fn worked() -> Option<Duration> {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    line.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

fn refused(folder: &Folder, wanted: &[&str]) {
    let text = attempt(folder, "this folder")
        .unwrap_or_else(|| panic!("nothing was refused, wanted {wanted:?}"))
        .to_string();
    for part in wanted {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

/// Where a tensor's bytes lie in a file.
pub fn tensor_range(file: &[u8], name: &str) -> Range<usize> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let data = tensors.tensor(name).unwrap().data().as_ptr().addr() - file.as_ptr().addr();
    data..data + tensors.tensor(name).unwrap().data().len()
}

type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// The file with its tensors changed.
pub fn edited(file: &[u8], change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let stored = |t: &TensorView<'_>| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
    let mut all: BTreeMap<String, Stored> =
        tensors.tensors().iter().map(|(n, t)| (n.clone(), stored(t))).collect();
    change(&mut all);
    let view = |(d, s, b): &'_ Stored| (*d, s.clone(), b.clone());
    let owned: Vec<(String, Stored)> = all.iter().map(|(n, s)| (n.clone(), view(s))).collect();
    let views = owned.iter().map(|(n, (d, s, b))| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// The file without some tensors.
pub fn without(file: &[u8], drop: impl Fn(&str) -> bool) -> Vec<u8> {
    edited(file, |all| all.retain(|name, _| !drop(name)))
}

fn edit_weights(folder: &Folder, change: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    let file = edited(&folder.read("model.safetensors"), change);
    folder.write("model.safetensors", file);
}

fn edit_json(folder: &Folder, file: &str, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&folder.read(file)).unwrap();
    change(&mut value);
    folder.write(file, value.to_string());
}

#[test]
fn an_unbroken_copy_works() {
    for checkpoint in ["bf16", "sharded-v4", "default", "other-names"] {
        let e = attempt(&Folder::copy_of(checkpoint), checkpoint);
        assert!(e.is_none(), "{checkpoint}: {e:?}");
    }
}

#[test]
fn missing_extra_and_misshapen_tensors_are_named_together() {
    let folder = Folder::copy_of("bf16");
    edit_weights(&folder, |all| {
        all.remove("model.visual.downsample.bias");
        all.insert("model.language_model.extra.weight".into(), (Dtype::BF16, vec![2], vec![0; 4]));
        all.insert(WEIGHT.into(), (Dtype::BF16, vec![40, 32], vec![0; 2560]));
    });
    refused(
        &folder,
        &["model.safetensors", "1 missing", "model.visual.downsample.bias", "1 extra", "extra.weight"],
    );
    refused(&folder, &["1 of another shape", WEIGHT, "[32, 40]", "[40, 32]"]);
}

#[test]
fn a_weight_of_another_type_is_named() {
    let folder = Folder::copy_of("bf16");
    edit_weights(&folder, |all| {
        all.insert(WEIGHT.into(), (Dtype::I64, vec![32, 40], vec![0; 32 * 40 * 8]));
    });
    refused(&folder, &[WEIGHT, "I64"]);
    let folder = Folder::copy_of("bf16");
    edit_weights(&folder, |all| {
        all.insert(WEIGHT.into(), (Dtype::F64, vec![32, 40], vec![0; 32 * 40 * 8]));
    });
    refused(&folder, &[WEIGHT, "F64"]);
}

#[test]
fn weights_that_are_not_finite_are_named_when_they_spoil_the_logits() {
    let not_numbers = [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")];
    for (name, index) in [
        ("model.language_model.layers.1.input_layernorm.weight", 3),
        (WEIGHT, 100),
        ("model.visual.merger.proj.weight", 1),
        ("lm_head.weight", 7),
    ] {
        for (value, shown) in not_numbers {
            let folder = Folder::copy_of("bf16");
            let mut file = folder.read("model.safetensors");
            let at = tensor_range(&file, name).start + index * 2;
            file[at..at + 2].copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
            folder.write("model.safetensors", file);
            refused(&folder, &[name, shown, &format!("element {index}")]);
        }
    }
}

#[test]
fn a_truncated_weight_file_is_named_at_every_length() {
    let folder = Folder::copy_of("bf16");
    let whole = folder.read("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = Random::new(1);
    let mut lengths: Vec<usize> = (0..12).chain([header - 1, header, whole.len() - 1]).collect();
    lengths.extend((0..150).map(|_| random.below(header)));
    lengths.extend((0..40).map(|_| random.below(whole.len())));
    assert!(lengths.len() >= 200);
    for length in lengths {
        folder.write("model.safetensors", &whole[..length]);
        refused(&folder, &["model.safetensors"]);
    }
    folder.write("model.safetensors", [&whole[..], b"more"].concat());
    refused(&folder, &["model.safetensors"]);
}

#[test]
fn headers_that_claim_the_impossible_are_refused() {
    let folder = Folder::copy_of("bf16");
    let with = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 64]].concat();
    for header in [
        with(r#"{"a": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 64]}}"#),
        with(
            r#"{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 64]}}"#,
        ),
        with(r#"{"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}"#),
        with(r#"{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 18446744073709551615]}}"#),
        with(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))),
        with("[]"),
        with(""),
        u64::MAX.to_le_bytes().to_vec(),
        (1u64 << 40).to_le_bytes().to_vec(),
    ] {
        folder.write("model.safetensors", header);
        refused(&folder, &["model.safetensors"]);
    }
}

#[test]
fn a_truncated_config_is_named_at_every_length() {
    let folder = Folder::copy_of("bf16");
    let whole = folder.read("config.json");
    for length in 0..whole.iter().rposition(|&b| b == b'}').unwrap() {
        folder.write("config.json", &whole[..length]);
        refused(&folder, &["config.json"]);
    }
}

/// Paths of all fields of a JSON value.
fn fields(value: &Value, path: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), v)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
        _ => return,
    };
    for (name, child) in children {
        let path = format!("{path}/{name}");
        fields(child, &path, found);
        found.push(path);
    }
}

/// Sets every field of a file to every absurd value; gives the error texts by path.
fn absurd(checkpoint: &str, file: &str) -> BTreeMap<String, Vec<Option<String>>> {
    let folder = Folder::copy_of(checkpoint);
    let whole: Value = serde_json::from_slice(&folder.read(file)).unwrap();
    let mut paths = Vec::new();
    fields(&whole, "", &mut paths);
    let values = [
        json!(0),
        json!(-1),
        json!(1e30),
        json!("x"),
        json!(null),
        json!(1u64 << 40),
        json!(u64::MAX),
        json!([]),
        json!({}),
        json!(true),
        json!(1e-320),
        json!(3),
    ];
    let mut results = BTreeMap::new();
    for path in paths {
        let tried = values.iter().map(|v| {
            let mut changed = whole.clone();
            *changed.pointer_mut(&path).unwrap() = v.clone();
            folder.write(file, changed.to_string());
            attempt(&folder, &format!("{file} {path} = {v}")).map(|e| e.to_string())
        });
        results.insert(path.clone(), tried.collect());
    }
    results
}

#[test]
fn every_field_of_the_config_set_to_nonsense_is_named_or_harmless() {
    let results = absurd("bf16", "config.json");
    let text = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ];
    let vision = [
        "depth",
        "hidden_size",
        "num_heads",
        "patch_size",
        "out_hidden_size",
        "intermediate_size",
        "image_size",
        "spatial_merge_size",
        "temporal_patch_size",
    ];
    let rope = ["mrope_section", "rope_theta", "partial_rotary_factor"];
    let top = ["image_token_id", "video_start_token_id", "video_end_token_id"];
    let wanted = text.map(|f| format!("/text_config/{f}")).into_iter();
    let wanted = wanted.chain(vision.map(|f| format!("/vision_config/{f}")));
    let wanted = wanted.chain(rope.map(|f| format!("/text_config/rope_parameters/{f}")));
    let wanted = wanted.chain(top.map(|f| format!("/{f}")));
    let mut named = 0;
    for path in wanted {
        let tried = &results[&path];
        // -1, 1e30, "x", 2^64 - 1, {} and true are no sizes at all.
        for i in [1, 2, 3, 6, 8, 9] {
            let text = tried[i].as_ref().unwrap_or_else(|| panic!("{path}: value {i} was accepted"));
            let field = path.rsplit('/').next().unwrap();
            assert!(text.contains("config.json") && text.contains(field), "{path}: {text}");
            named += 1;
        }
    }
    assert!(named > 100, "only {named} errors were checked");
    for (path, tried) in &results {
        for text in tried.iter().flatten() {
            assert!(
                !text.is_empty() && text.len() < 8000 && !text.contains('\n')
                    || text.contains("tensors are not"),
                "{path}: {text}"
            );
        }
    }
}

#[test]
fn every_field_of_the_smaller_files_set_to_nonsense_is_harmless() {
    let mut refused = 0;
    for file in [
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tokenizer_config.json",
    ] {
        refused += absurd("bf16", file).values().flatten().flatten().count();
    }
    assert!(refused > 100, "only {refused} values were refused");
}

#[test]
fn what_the_config_must_say_is_asked_for() {
    let check = |change: &dyn Fn(&mut Value), wanted: &[&str]| {
        let folder = Folder::copy_of("bf16");
        edit_json(&folder, "config.json", change);
        refused(&folder, wanted);
    };
    check(
        &|c| {
            drop(c["text_config"]["rope_parameters"].as_object_mut().unwrap().remove("partial_rotary_factor"))
        },
        &["config.json", "partial_rotary_factor", "found nothing"],
    );
    check(&|c| c["model_type"] = json!("llama"), &["config.json", "glm4v", "llama"]);
    check(&|c| c["model_type"] = json!(null), &["config.json", "model_type"]);
    check(
        &|c| c["text_config"]["hidden_size"] = json!(1u64 << 40),
        &["text_config.hidden_size", "1099511627776"],
    );
    check(&|c| c["text_config"]["num_hidden_layers"] = json!(512), &["6630 missing"]);
    check(&|c| c["vision_config"]["depth"] = json!(512), &["missing", "model.visual.blocks"]);
    check(&|c| c["text_config"]["rope_parameters"]["rope_type"] = json!("yarn"), &["rope_type", "yarn"]);
    check(&|c| c["text_config"]["hidden_act"] = json!("gelu"), &["hidden_act", "gelu"]);
    check(&|c| c["image_token_id"] = json!(5), &["<|image|>", "5"]);
    check(&|c| c["text_config"]["eos_token_id"] = json!([1, -5]), &["config.json", "eos_token_id", "-5"]);
    check(&|c| *c = json!([]), &["config.json", "an object"]);
    let folder = Folder::copy_of("bf16");
    std::fs::remove_file(folder.file("config.json")).unwrap();
    refused(&folder, &["config.json"]);
    let folder = Folder::copy_of("bf16");
    // Tables of the same sizes as the weights, so that only the sum can notice.
    edit_json(&folder, "config.json", |c| {
        c["text_config"]["rope_parameters"]["mrope_section"] = json!([1, 1, 1])
    });
    refused(&folder, &["mrope_section", "sum to"]);
}

#[test]
fn an_end_of_sequence_id_beyond_the_vocabulary_never_ends_an_answer() {
    let folder = Folder::copy_of("bf16");
    edit_json(&folder, "generation_config.json", |c| c["eos_token_id"] = json!(1_000_000));
    edit_json(&folder, "config.json", |c| c["text_config"]["eos_token_id"] = json!([999_999]));
    assert!(attempt(&folder, "eos").is_none());
    edit_json(&folder, "generation_config.json", |c| c["eos_token_id"] = json!(1u64 << 33));
    refused(&folder, &["generation_config.json", "eos_token_id", "8589934592"]);
}

#[test]
fn a_missing_or_truncated_tokenizer_is_named() {
    let folder = Folder::copy_of("bf16");
    let whole = folder.read("tokenizer.json");
    for length in (0..whole.len() - 2).step_by(97) {
        folder.write("tokenizer.json", &whole[..length]);
        refused(&folder, &["tokenizer.json"]);
    }
    std::fs::remove_file(folder.file("tokenizer.json")).unwrap();
    refused(&folder, &["no tokenizer.json in"]);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_has_rows_is_an_error_of_the_prompt() {
    let folder = Folder::copy_of("bf16");
    edit_json(&folder, "tokenizer.json", |t| {
        let added = json!({"id": 5000, "content": "tap", "special": false, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
        t["added_tokens"].as_array_mut().unwrap().push(added);
    });
    refused(&folder, &["5000", "vocabulary has 352 rows"]);
}

#[test]
fn broken_templates_are_errors_and_looping_ones_end() {
    for (template, wanted) in [
        ("{% for x in messages %}", "template"),
        ("{{ messages[0].nothing.more }}", "template"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "template"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "template"),
        (
            "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "template",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "template"),
        ("{{ 'x' * 10000000000 }}", "template"),
        ("{{ raise_exception('no') }}", "no"),
        ("no picture at all", "1"),
        ("<|image|><|image|>", "2"),
    ] {
        let folder = Folder::copy_of("bf16");
        folder.write("chat_template.jinja", template);
        refused(&folder, &[wanted]);
    }
    let folder = Folder::copy_of("bf16");
    folder.write("chat_template.jinja", "{{".repeat(50_000));
    attempt(&folder, "many braces").unwrap();
    folder.write("chat_template.jinja", format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000)));
    attempt(&folder, "many parentheses").unwrap();
    folder.write("chat_template.jinja", [0xff, 0xfe]);
    refused(&folder, &["chat_template.jinja"]);
}

#[test]
fn a_checkpoint_without_a_template_takes_ids_only() {
    let folder = Folder::copy_of("bf16");
    std::fs::remove_file(folder.file("chat_template.jinja")).unwrap();
    edit_json(&folder, "tokenizer_config.json", |c| drop(c.as_object_mut().unwrap().remove("chat_template")));
    let engine = open(&folder).unwrap();
    let refused = engine.prompt(&Request::Messages(vec![Message::text("user", "x")]));
    assert!(matches!(refused.map(|_| ()), Err(Error::NoTemplate)));
    let prompt = crate::support::ids_prompt(&engine, &[1, 2, 3]);
    assert_eq!(answer(&mut engine.session(), &prompt, &exactly(2)).ids.len(), 2);
    // The same text in the tokenizer's configuration is as good as a file.
    let template =
        String::from_utf8(std::fs::read(crate::golden::path("bf16/chat_template.jinja")).unwrap()).unwrap();
    edit_json(&folder, "tokenizer_config.json", |c| c["chat_template"] = template.into());
    let engine = open(&folder).unwrap();
    let case = case("bf16", "image");
    assert_eq!(engine.prompt(&case.request).unwrap().text(), case.expected["expanded_prompt"].as_str());
}

#[test]
fn preprocessing_that_contradicts_the_model_is_refused() {
    for (field, value) in [("patch_size", 16), ("merge_size", 3), ("temporal_patch_size", 1)] {
        for file in ["preprocessor_config.json", "video_preprocessor_config.json"] {
            let folder = Folder::copy_of("bf16");
            edit_json(&folder, file, |c| c[field] = json!(value));
            refused(&folder, &[file, "config.json"]);
        }
    }
    let folder = Folder::copy_of("bf16");
    edit_json(&folder, "preprocessor_config.json", |c| c["image_std"] = json!([0, 0, 0]));
    refused(&folder, &["image_std"]);
}

#[test]
fn preprocessing_that_enlarges_pictures_beyond_the_context_is_refused_before_the_work() {
    let folder = Folder::copy_of("bf16");
    edit_json(&folder, "preprocessor_config.json", |c| {
        c["size"] = json!({"shortest_edge": 1 << 26, "longest_edge": 1 << 26});
    });
    let before = peak();
    refused(&folder, &["context"]);
    if let (Some(before), Some(after)) = (before, peak()) {
        let grown = after.saturating_sub(before);
        assert!(grown < 512 << 20, "peak memory grew by {grown} bytes");
    }
}

#[test]
fn broken_shards_are_named() {
    let folder = Folder::copy_of("sharded-v4");
    let second = "model-00002-of-00003.safetensors";
    let kept = folder.read(second);
    std::fs::remove_file(folder.file(second)).unwrap();
    refused(&folder, &[second]);
    folder.write(second, &kept[..kept.len() - 1]);
    refused(&folder, &[second]);
    folder.write(second, without(&kept, |n| n == "model.language_model.norm.weight"));
    refused(&folder, &[second, "model.language_model.norm.weight"]);
    folder.write(second, kept);
    assert!(attempt(&folder, "mended").is_none());
    for path in ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."] {
        let folder = Folder::copy_of("sharded-v4");
        edit_json(&folder, "model.safetensors.index.json", |i| {
            i["weight_map"]["lm_head.weight"] = json!(path)
        });
        refused(&folder, &["model.safetensors.index.json"]);
    }
    let whole = folder.read("model.safetensors.index.json");
    for length in (0..whole.len() - 3).step_by(61) {
        folder.write("model.safetensors.index.json", &whole[..length]);
        refused(&folder, &["index.json"]);
    }
}

#[test]
fn folders_that_are_no_checkpoints_are_errors() {
    let folder = Folder::new();
    let text = |path: &Path| error(Engine::open(path, options()));
    assert!(text(folder.path()).contains("no "), "{}", text(folder.path()));
    assert!(text(&folder.file("absent")).contains("absent"));
    folder.write("file", "x");
    assert!(text(&folder.file("file")).contains("file"));
}

#[cfg(unix)]
#[test]
fn pipes_in_a_folder_are_refused_and_never_waited_for() {
    for file in [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "chat_template.jinja",
        "preprocessor_config.json",
    ] {
        let folder = Folder::copy_of("bf16");
        std::fs::remove_file(folder.file(file)).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(folder.file(file)).status().unwrap().success());
        refused(&folder, &[file]);
    }
}

/// One random change of a file.
fn mutate(file: &[u8], random: &mut Random) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "0",
        "-1",
        "1e308",
        "18446744073709551615",
        "1099511627776",
        "null",
        "\"\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "{{ x }}",
        "{% for i in range(99999999) %}",
        "\u{fffd}",
    ];
    let mut bytes = file.to_vec();
    for _ in 0..1 + random.below(3) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(12)).min(bytes.len());
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            1 => drop(bytes.drain(at..end)),
            2 => bytes.truncate(at),
            3 => {
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            4 => drop(bytes.splice(at..at, WORDS[random.below(WORDS.len())].bytes())),
            _ => {
                // A number in the file becomes another one.
                let Some(from) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { continue };
                let digits = bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
                bytes.splice(from..from + digits, WORDS[random.below(6)].bytes());
            }
        }
    }
    bytes
}

/// Peak memory of this process in bytes, where the system says so.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Mutates one file of a checkpoint `rounds` times; gives how many were refused.
fn survive(checkpoint: &str, file: &str, rounds: usize, seed: u64) -> usize {
    let folder = Folder::copy_of(checkpoint);
    let whole = folder.read(file);
    // Of a weight file only the header is of interest.
    let header = if file.ends_with(".safetensors") {
        8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize
    } else {
        whole.len()
    };
    let mut random = Random::new(seed);
    let before = peak();
    let mut refused = 0;
    for round in 0..rounds {
        let mutated = [&mutate(&whole[..header], &mut random), &whole[header..]].concat();
        folder.write(file, mutated);
        refused += usize::from(attempt(&folder, &format!("{file}, mutation {round}")).is_some());
    }
    if let (Some(before), Some(after)) = (before, peak()) {
        let grown = after.saturating_sub(before);
        assert!(grown < 512 << 20, "{file}: peak memory grew by {grown} bytes");
    }
    refused
}

#[test]
fn mutated_configs_are_survived() {
    assert!(survive("bf16", "config.json", 400, 1) > 100);
}

#[test]
fn mutated_generation_settings_are_survived() {
    assert!(survive("bf16", "generation_config.json", 200, 2) > 50);
}

#[test]
fn mutated_preprocessing_settings_are_survived() {
    assert!(survive("bf16", "preprocessor_config.json", 250, 3) > 50);
    assert!(survive("bf16", "video_preprocessor_config.json", 100, 4) > 20);
}

#[test]
fn mutated_tokenizer_files_are_survived() {
    assert!(survive("bf16", "tokenizer_config.json", 150, 5) > 30);
    assert!(survive("bf16", "tokenizer.json", 250, 6) > 50);
}

#[test]
fn mutated_weight_headers_and_indexes_are_survived() {
    assert!(survive("bf16", "model.safetensors", 300, 7) > 200);
    assert!(survive("sharded-v4", "model.safetensors.index.json", 200, 8) > 100);
}

#[test]
fn mutated_templates_are_survived() {
    assert!(survive("bf16", "chat_template.jinja", 250, 9) > 50);
}

/// A copy of `bf16` whose first layer is repeated.
fn repeated(layers: usize) -> Folder {
    let folder = Folder::copy_of("bf16");
    edit_json(&folder, "config.json", |c| c["text_config"]["num_hidden_layers"] = json!(layers));
    edit_weights(&folder, |all| {
        let layer = |name: &str| Some(name.strip_prefix("model.language_model.layers.0.")?.to_string());
        let first: Vec<_> = all.iter().filter_map(|(name, t)| Some((layer(name)?, t.clone()))).collect();
        for i in 2..layers {
            for (rest, tensor) in &first {
                all.insert(format!("model.language_model.layers.{i}.{rest}"), tensor.clone());
            }
        }
    });
    folder
}

#[test]
fn opening_takes_time_in_proportion_to_the_layers() {
    let time = |layers: usize| {
        let folder = repeated(layers);
        let (start, before) = (Instant::now(), worked());
        assert_eq!(open(&folder).unwrap().info().layers, layers);
        let worked = worked().zip(before).map_or(start.elapsed(), |(after, before)| after - before);
        println!("{layers} layers took {worked:?}");
        worked
    };
    time(32);
    // Eight times the layers; passes that count all users anew at each match took a hundred times as long. Other tests slow
    // down some tries, whose times are printed.
    let in_proportion = |_| {
        let (few, many) = (time(32), time(256));
        many < few * 24 && many < PATIENCE
    };
    assert!((0..3).any(in_proportion));
}
