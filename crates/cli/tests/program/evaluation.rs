//! `eval` says what it knows, and nothing about a model that computes no numbers.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{golden, ok, run, scratch};

/// A copy of a checkpoint in which one value of a tensor is NaN.
fn broken(folder: &Path, name: &str, tensor: &str) -> String {
    let copy = folder.join(name);
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(golden("default")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
    }
    let file = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let at = 8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(file, bytes).unwrap();
    copy.display().to_string()
}

/// A text, and a request with a picture.
fn samples(folder: &Path) -> String {
    let path: PathBuf = folder.join("samples.jsonl");
    let picture = golden("odd-sizes/29x28.png");
    let lines = format!(
        "{{\"text\": \"open the settings and tap on wifi\"}}\n{{\"messages\": [{{\"role\": \"user\", \"content\": \
         [{{\"type\": \"image\", \"image\": {picture:?}}}, {{\"type\": \"text\", \"text\": \"hi\"}}]}}]}}\n"
    );
    std::fs::write(&path, lines).unwrap();
    path.display().to_string()
}

#[test]
fn a_model_that_computes_nan_is_named_and_gets_no_figures() {
    const DECODER: &str = "model.language_model.layers.1.self_attn.o_proj.weight";
    const ENCODER: &str = "model.visual.blocks.0.attn.proj.weight";
    let folder = scratch("nan");
    let samples = samples(&folder);
    let good = golden("default").display().to_string();
    let text = broken(&folder, "broken-text", DECODER);
    let sight = broken(&folder, "broken-sight", ENCODER);
    let judge = |reference: &str, model: &str| {
        run(&["eval", "--json", "--quiet", "--reference", reference, "--model", model, "--samples", &samples])
    };
    for (reference, model, role, tensor, place) in [
        (&text, &good, "reference", DECODER, "the logit of token"),
        (&good, &text, "candidate", DECODER, "the logit of token"),
        (&sight, &good, "reference", ENCODER, "picture 1 of sample 2, encoded, is NaN"),
        (&good, &sight, "candidate", ENCODER, "picture 1 of sample 2, encoded, is NaN"),
        (&text, &text, "reference", DECODER, "the logit of token"),
    ] {
        let run = judge(reference, model);
        assert_eq!((run.status, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
        let named = if role == "reference" { reference } else { model };
        for wanted in
            [&format!("the {role} {named} cannot be compared"), place, tensor, "has NaN at element 0"]
        {
            assert!(run.stderr.contains(wanted), "{wanted} in {}", run.stderr);
        }
    }
    // The control: a model that computes numbers gets its figures.
    let small = folder.join("small.pglm").display().to_string();
    ok(&["quantize", "--quiet", "--model", &good, "--policy", "int8", "--out", &small]);
    let run = judge(&good, &small);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(report["models"][0]["kl"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["models"][0]["pictures"]["relative_l2"].as_f64().unwrap() > 0.0, "{report}");
}

#[test]
fn tokens_that_every_prompt_begins_with_are_not_predicted() {
    let folder = scratch("prefix");
    let model = golden("default").display().to_string();
    let tokenizer: Value =
        serde_json::from_slice(&std::fs::read(golden("default/tokenizer.json")).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let id = |token: &str| added.iter().find(|t| t["content"] == token).unwrap()["id"].as_u64().unwrap();
    let (mask, begin) = (id("[gMASK]"), id("<sop>"));
    let positions = |line: &str, window: &str| {
        let samples = folder.join("samples.jsonl");
        std::fs::write(&samples, line).unwrap();
        let samples = samples.display().to_string();
        let args =
            ["eval", "--json", "--quiet", "--reference", &model, "--model", &model, "--window", window];
        let run = ok(&[&args[..], &["--samples", &samples]].concat());
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        report["models"][0]["positions"].as_u64().unwrap()
    };
    let of_ids = |ids: &[u64]| positions(&format!("{{\"input_ids\": {ids:?}}}"), "512");
    // Four tokens of text are predicted where the prefix stands before them, and three where nothing does.
    assert_eq!(of_ids(&[mask, begin, 5, 6, 7, 8]), 4);
    assert_eq!(of_ids(&[5, 6, 7, 8]), 3);
    // The control: in another order they are no prefix, and count.
    assert_eq!(of_ids(&[begin, mask, 5, 6, 7, 8]), 5);
    // Every window of text has the prefix, so that each of its tokens is predicted once, however it is cut.
    let text = r#"{"text": "open the settings and tap on wifi"}"#;
    let (whole, cut) = (positions(text, "512"), positions(text, "2"));
    assert!(whole > 6 && cut == whole / 2 * 2, "{whole} {cut}");
}
