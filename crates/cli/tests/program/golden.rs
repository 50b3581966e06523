//! The program computes what the reference implementation computes.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::{checkpoint, golden, ok, run_with, scratch};

/// Bounds of the project: two exact implementations differ by about 3e-5 in the logits.
const MERGER: f64 = 2e-5;
const LOGITS: f64 = 1e-4;

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn f32s(file: &[u8], name: &str) -> Vec<f32> {
    let all = SafeTensors::deserialize(file).unwrap();
    let tensor = all.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
}

fn i64s(file: &[u8], name: &str) -> Vec<i64> {
    let all = SafeTensors::deserialize(file).unwrap();
    let tensor = all.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.data().as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect()
}

/// Relative L2 distance; infinite where the lengths differ or a value is not finite.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() || b.is_empty() || a.iter().chain(b).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let sum = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let apart = sum(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (apart / sum(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
}

/// Writes a raw picture tensor `[h, w, 3]` or `[frames, h, w, 3]` of a golden file as PNG files.
fn pngs(file: &str, tensor: &str, folder: &Path) -> Vec<String> {
    let bytes = std::fs::read(golden(file)).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let picture = all.tensor(tensor).unwrap();
    let shape = picture.shape();
    let (h, w) = (shape[shape.len() - 3] as u32, shape[shape.len() - 2] as u32);
    let frames = picture.data().chunks_exact((h * w * 3) as usize);
    frames
        .enumerate()
        .map(|(i, pixels)| {
            let path = folder.join(format!("{tensor}.{i}.png"));
            image::save_buffer(&path, pixels, w, h, image::ExtendedColorType::Rgb8).unwrap();
            path.display().to_string()
        })
        .collect()
}

/// A case as a request file: the conversation of `expected.json`, with paths for its pictures.
fn request(case: &str, expected: &Value, folder: &Path) -> String {
    let first = || pngs("default/golden/image.safetensors", "image.0.raw_u8", folder);
    let second = || pngs("default/golden/two_images.safetensors", "image.1.raw_u8", folder);
    let mut pictures = match case {
        "image" => first(),
        "two_images" => [first(), second()].concat(),
        _ => Vec::new(),
    }
    .into_iter();
    let mut messages = expected["messages"].clone();
    for message in messages.as_array_mut().unwrap() {
        let Some(parts) = message["content"].as_array_mut() else { continue };
        for part in parts {
            match part["type"].as_str().unwrap() {
                "image" => {
                    *part = json!({"type": "image_url", "image_url": {"url": pictures.next().unwrap()}})
                }
                "video" => {
                    let frames = pngs("default/golden/video.safetensors", "video.raw_u8", folder);
                    *part = json!({"type": "video", "video": frames, "seconds": [0, 1, 2, 3]});
                }
                _ => {}
            }
        }
    }
    let path = folder.join(format!("{case}.json"));
    std::fs::write(&path, json!({ "messages": messages }).to_string()).unwrap();
    path.display().to_string()
}

fn generate(model: &str, more: &[&str]) -> Value {
    let fixed = ["generate", "--json", "--temperature", "0", "--ignore-eos", "--model", model];
    let run = ok(&[&fixed, more].concat());
    assert_eq!(run.stderr, "", "--json says nothing on stderr");
    assert_eq!(run.stdout.lines().count(), 1);
    serde_json::from_str(&run.stdout).unwrap()
}

#[test]
fn generate_json_has_the_reference_s_tokens() {
    let folder = scratch("generate");
    let mut compared = 0;
    for name in [
        "default",
        "patch-8",
        "merge-3",
        "temporal-1",
        "real-head-dim",
        "kv-heads-1",
        "kv-heads-all",
        "kv-heads-8-2",
        "bf16",
        "f16",
        "tied",
        "eps",
        "sharded-v4",
        "other-names",
    ] {
        let source = if matches!(name, "sharded-v4" | "other-names") { "bf16" } else { name };
        let expected = read_json(&golden(source).join("golden/expected.json"));
        for (case, expected) in expected["cases"].as_object().unwrap() {
            let file = request(case, expected, &folder);
            let count = expected["generated_ids"].as_array().unwrap().len().to_string();
            let answer = generate(&checkpoint(name), &["--request", &file, "--max-new-tokens", &count]);
            assert_eq!(answer["token_ids"], expected["generated_ids"], "{name} {case}");
            assert_eq!(answer["prompt_tokens"], expected["seq_len"], "{name} {case}");
            assert_eq!(answer["finish_reason"], "length");
            let encoded = if case == "text" {
                0
            } else if case == "two_images" {
                2
            } else {
                1
            };
            assert_eq!(answer["timings"]["encoded_pictures"], encoded, "{name} {case}");
            compared += 1;
        }
    }
    assert_eq!(compared, 20, "cases of these checkpoints");
}

#[test]
fn the_flags_build_the_same_prompt_as_a_request() {
    let folder = scratch("flags");
    let expected = &read_json(&golden("default/golden/expected.json"))["cases"]["image"];
    let pictures = pngs("default/golden/image.safetensors", "image.0.raw_u8", &folder);
    let system = expected["messages"][0]["content"].as_str().unwrap();
    let text = expected["messages"][1]["content"][1]["text"].as_str().unwrap();
    let flags = [
        "--system",
        system,
        "--image",
        &pictures[0],
        "--prompt",
        text,
        "--max-new-tokens",
        "16",
        "--threads",
        "2",
    ];
    assert_eq!(generate(&checkpoint("default"), &flags)["token_ids"], expected["generated_ids"]);
    // What must not change a token: steps of the prefill, fusion, threads, how the file is read.
    for more in [&["--prefill-chunk", "7"][..], &["--no-fuse"], &["--threads", "1"], &["--read-mode", "read"]]
    {
        let flags: Vec<&str> = flags[..8].iter().chain(more).copied().collect();
        assert_eq!(
            generate(&checkpoint("default"), &flags)["token_ids"],
            expected["generated_ids"],
            "{more:?}"
        );
    }
    // Negative control: another picture gives another answer.
    let other = pngs("default/golden/two_images.safetensors", "image.1.raw_u8", &folder);
    let flags = ["--system", system, "--image", &other[0], "--prompt", text, "--max-new-tokens", "16"];
    assert_ne!(generate(&checkpoint("default"), &flags)["token_ids"], expected["generated_ids"]);
}

#[test]
fn pictures_of_odd_sizes_give_the_reference_s_tokens() {
    let expected = read_json(&golden("odd-sizes/expected.json"));
    let files: Vec<String> = expected["pictures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| golden("odd-sizes").join(p["file"].as_str().unwrap()).display().to_string())
        .collect();
    assert_eq!(files.len(), 8);
    let mut flags = vec!["--max-new-tokens", "12", "--prompt", expected["question"].as_str().unwrap()];
    for file in &files {
        flags.extend(["--image", file]);
    }
    let answer = generate(&checkpoint("default"), &flags);
    assert_eq!(answer["prompt_tokens"], expected["seq_len"]);
    assert_eq!(answer["token_ids"], expected["generated_ids"]);
    assert_eq!(answer["timings"]["encoded_pictures"], 8);
}

#[test]
fn input_ids_and_standard_input_give_the_same_answer_as_messages() {
    let expected = &read_json(&golden("default/golden/expected.json"))["cases"]["text"];
    let request = json!({ "input_ids": expected["input_ids"] }).to_string();
    let model = checkpoint("default");
    let args = [
        "generate",
        "--json",
        "--temperature",
        "0",
        "--ignore-eos",
        "--max-new-tokens",
        "16",
        "--model",
        &model,
    ];
    let run = run_with(&[&args[..], &["--request", "-"]].concat(), request.as_bytes());
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let answer: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(answer["token_ids"], expected["generated_ids"]);
}

#[test]
fn trace_writes_the_reference_s_tensors() {
    let folder = scratch("trace");
    let expected = read_json(&golden("default/golden/expected.json"));
    for case in ["text", "image", "two_images", "video"] {
        let file = request(case, &expected["cases"][case], &folder);
        let out = folder.join(format!("{case}.safetensors"));
        let model = checkpoint("default");
        let run = ok(&["trace", "--model", &model, "--request", &file, "--out", out.to_str().unwrap()]);
        assert!(run.stderr.contains("hidden_states.3") && run.stderr.contains("logits"), "{}", run.stderr);

        let ours = std::fs::read(&out).unwrap();
        let theirs = std::fs::read(golden(&format!("default/golden/{case}.safetensors"))).unwrap();
        for name in ["input_ids", "position_ids"] {
            assert_eq!(i64s(&ours, name), i64s(&theirs, name), "{case} {name}");
        }
        let logits = distance(&f32s(&ours, "logits"), &f32s(&theirs, "logits"));
        assert!(logits <= LOGITS, "{case} logits differ by {logits:.1e}");
        let (grid, embeds) = match case {
            "text" => continue,
            "video" => ("video_grid_thw", "video_embeds"),
            _ => ("image_grid_thw", "image_embeds"),
        };
        assert_eq!(i64s(&ours, grid), i64s(&theirs, grid), "{case}");
        let merger = distance(&f32s(&ours, embeds), &f32s(&theirs, "vision.merger"));
        assert!(merger <= MERGER, "{case} {embeds} differ by {merger:.1e}");
        if case == "image" {
            let pixels = f32s(&ours, "pixel_values");
            let same =
                pixels.iter().zip(&f32s(&theirs, "pixel_values")).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "pixels are the reference's, bit for bit");
        }
    }
}

#[test]
fn the_distance_notices_a_wrong_number() {
    let exact = vec![1.0f32; 100];
    let mut wrong = exact.clone();
    assert_eq!(distance(&wrong, &exact), 0.0);
    wrong[7] = 1.01;
    assert!(distance(&wrong, &exact) > LOGITS);
    wrong[7] = f32::NAN;
    assert_eq!(distance(&wrong, &exact), f64::INFINITY);
    assert_eq!(distance(&exact[1..], &exact), f64::INFINITY);
}
