//! Speech from the outside: `transcribe`, `trace` and `info` on a Wav2Vec2 checkpoint, and sounds for GLM.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::{checkpoint, golden, ok, run, scratch};

/// A WAV file of a second and a half of gliding tones at 22,050 Hz.
fn clip(folder: &Path) -> String {
    let samples: Vec<u8> = (0..33_075u32)
        .flat_map(|i| (((i * (i / 400 % 90 + 7)) % 20_000) as i16 - 10_000).to_le_bytes())
        .collect();
    let size = samples.len() as u32;
    let mut file = b"RIFF".to_vec();
    file.extend((36 + size).to_le_bytes());
    file.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend(22_050u32.to_le_bytes());
    file.extend(44_100u32.to_le_bytes());
    file.extend(b"\x02\0\x10\0data");
    file.extend(size.to_le_bytes());
    file.extend(samples);
    let path = folder.join("clip.wav");
    std::fs::write(&path, file).unwrap();
    path.display().to_string()
}

#[test]
fn transcribe_prints_every_format_of_the_same_text() {
    let folder = scratch("transcribe");
    let (model, file) = (checkpoint("hear/base"), clip(&folder));
    let print = |format: &str| ok(&["transcribe", "--model", &model, "--format", format, &file]);
    let plain = print("plain");
    assert!(plain.stderr.contains("1.5 s of audio") && plain.stderr.contains("real-time factor"));
    let json: Value = serde_json::from_str(&print("json").stdout).unwrap();
    let text = json["text"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!(plain.stdout.trim_end(), text);
    assert!((json["seconds"].as_f64().unwrap() - 1.5).abs() < 1e-3);
    let words = json["words"].as_array().unwrap();
    assert!(words.iter().all(|w| w["start"].as_f64() < w["end"].as_f64()));
    assert!(print("srt").stdout.starts_with("1\n00:00:0"));
    assert!(print("times").stdout.starts_with("[00:00:0"));
    // As a whole and in one chunk it is the same; a beam gives some text as well.
    for more in [["--chunk", "0"], ["--chunk", "20"]] {
        let other = ok(&["transcribe", "--model", &model, "--format", "plain", more[0], more[1], &file]);
        assert_eq!(other.stdout, plain.stdout);
    }
    for more in [["--beam", "8"], ["--weights", "int8"], ["--chunk", "0.5"]] {
        let other = ok(&["transcribe", "--quiet", "--model", &model, more[0], more[1], &file]);
        assert!(!other.stdout.trim().is_empty() && other.stderr.is_empty());
    }
}

#[test]
fn trace_of_a_sound_has_the_reference_s_names() {
    let folder = scratch("trace-speech");
    let file = clip(&folder);
    let out = folder.join("trace.safetensors").display().to_string();
    let request = format!("{{\"audio\": {file:?}}}");
    for (model, head) in [("hear/large", true), ("hear/bare", false)] {
        ok(&["trace", "--force", "--model", &checkpoint(model), "--request", &request, "--out", &out]);
        let bytes = std::fs::read(&out).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
        assert_eq!(shape("input_values"), [1, 24_000]);
        for name in ["hidden_states.0", "hidden_states.1", "hidden_states.2", "last_hidden_state"] {
            assert_eq!(shape(name), [1, 74, 32], "{name}");
        }
        assert_eq!(tensors.tensor("logits").is_ok(), head);
    }
    let refused =
        run(&["trace", "--force", "--model", &checkpoint("bf16"), "--request", &request, "--out", &out]);
    assert!(refused.status != Some(0) && refused.stderr.contains("speech checkpoint"), "{}", refused.stderr);
}

#[test]
fn info_and_bench_know_speech_checkpoints() {
    let model = checkpoint("hear/large");
    let text = ok(&["info", "--model", &model]).stdout;
    assert!(text.contains("wav2vec2, 2 layers of 32") && text.contains("50 a second"), "{text}");
    let json: Value = serde_json::from_str(&ok(&["info", "--json", "--model", &model]).stdout).unwrap();
    assert_eq!(json["model_type"], "wav2vec2");
    assert!(json["plan"]["total"].as_u64().unwrap() > 1 << 20);
    let refused = run(&["info", "--model", &model, "--memory", "1MB"]);
    assert!(refused.status != Some(0) && refused.stderr.contains("memory"), "{}", refused.stderr);
    let bench = ok(&["bench", "--json", "--model", &model, "--seconds", "2", "--rounds", "1"]).stdout;
    let bench: Value = serde_json::from_str(&bench).unwrap();
    assert!(bench["real_time_factor"].as_f64().unwrap() > 0.0);
}

#[test]
fn generate_takes_a_sound_with_an_adapter_and_says_what_is_missing_without() {
    let folder = scratch("generate-sound");
    let file = clip(&folder);
    let adapter = golden("hear/adapter/adapter.safetensors").display().to_string();
    let model = checkpoint("bf16");
    let args = ["generate", "--model", &model, "--audio", &file, "--prompt", "hi", "--max-new-tokens", "3"];
    let heard = ok(&[&args[..], &["--adapter", &adapter, "--json"]].concat());
    let heard: Value = serde_json::from_str(&heard.stdout).unwrap();
    assert!(heard["prompt_tokens"].as_u64().unwrap() > 74);
    let refused = run(&args);
    assert!(refused.status != Some(0) && refused.stderr.contains("no audio branch"), "{}", refused.stderr);
}

#[test]
fn recordings_that_are_none_end_with_a_message() {
    let folder = scratch("no-recording");
    let model = checkpoint("hear/base");
    for (name, bytes, wanted) in [
        ("empty.wav", &b""[..], "the end of the file"),
        ("ogg.wav", b"OggS0000000000000000", "RIFF"),
        ("short.wav", b"RIFF\x26\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\x02\0\0\0\0\0", "needs at least 400"),
    ] {
        let path = folder.join(name).display().to_string();
        std::fs::write(&path, bytes).unwrap();
        let refused = run(&["transcribe", "--model", &model, &path]);
        assert!(refused.status == Some(1) && refused.stderr.contains(wanted), "{name}: {}", refused.stderr);
        assert!(refused.stderr.contains(name), "{}", refused.stderr);
    }
    let refused = run(&["transcribe", "--model", &checkpoint("bf16"), "x.wav"]);
    assert!(refused.stderr.contains("must be wav2vec2, found glm4v"), "{}", refused.stderr);
}
