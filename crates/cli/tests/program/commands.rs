//! Each command does what its help says.

use std::io::Read;
use std::process::Stdio;

use serde_json::Value;

use crate::{checkpoint, golden, ok, program, run, run_with};

fn json(args: &[&str]) -> Value {
    let run = ok(args);
    serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}", run.stdout))
}

#[test]
fn generate_streams_text_to_stdout_and_statistics_to_stderr() {
    let model = checkpoint("default");
    let args = ["generate", "--model", &model, "--prompt", "hi", "--max-new-tokens", "5", "--ignore-eos"];
    let plain = ok(&args);
    assert!(
        plain.stderr.contains("prompt tokens") && plain.stderr.contains("5 new tokens"),
        "{}",
        plain.stderr
    );
    let object = json(&[&args[..], &["--json"]].concat());
    assert_eq!(plain.stdout.trim_end_matches('\n'), object["text"].as_str().unwrap().trim_end_matches('\n'));
    assert!(plain.stdout.ends_with('\n'));
    assert_eq!(object["token_ids"].as_array().unwrap().len(), 5);
    let quiet = ok(&[&args[..], &["--quiet"]].concat());
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (plain.stdout, ""));
}

#[test]
fn generate_json_has_exactly_the_names_that_scripts_use() {
    let model = checkpoint("default");
    let args = ["generate", "--json", "--model", &model, "--prompt", "hi", "--max-new-tokens", "3"];
    let names = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let object = json(&args);
    assert_eq!(names(&object), ["text", "token_ids", "prompt_tokens", "finish_reason", "timings"]);
    let with_taps = json(&[&args[..], &["--device-size", "1080x2400"]].concat());
    assert_eq!(names(&with_taps), ["text", "token_ids", "prompt_tokens", "finish_reason", "timings", "taps"]);
}

#[test]
fn a_seed_gives_the_same_answer_again_and_another_seed_another() {
    let model = checkpoint("default");
    let with_seed = |seed| {
        let args = ["generate", "--json", "--model", &model, "--prompt", "hi", "--ignore-eos"];
        let sampling = ["--temperature", "1.5", "--top-p", "0.95", "--max-new-tokens", "12", "--seed", seed];
        json(&[&args[..], &sampling].concat())["token_ids"].clone()
    };
    assert_eq!(with_seed("7"), with_seed("7"));
    assert_ne!(with_seed("7"), with_seed("8"));
}

#[test]
fn a_stop_string_ends_the_answer_and_is_not_part_of_it() {
    let model = checkpoint("default");
    let args =
        ["generate", "--json", "--model", &model, "--prompt", "hi", "--ignore-eos", "--max-new-tokens", "12"];
    let whole = json(&args)["text"].as_str().unwrap().to_string();
    // Something from the middle of the answer that is whole characters.
    let middle = whole.char_indices().nth(whole.chars().count() / 2).unwrap().0;
    let stop: String = whole[middle..].chars().take(2).collect();
    let stopped = json(&[&args[..], &["--stop", &stop]].concat());
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &whole[..whole.find(&stop).unwrap()]);
}

#[test]
fn info_shows_counts_sizes_and_the_plan_without_a_picture_too() {
    let model = checkpoint("default");
    let text = ok(&["info", "--model", &model]).stdout;
    for wanted in [
        "glm4v, 3 decoder layers, 2 vision blocks",
        "360,448",
        "F32",
        "memory plan",
        "total",
        "cpu",
        "1080x2400",
    ] {
        assert!(text.contains(wanted), "{wanted} in\n{text}");
    }
    let phone = json(&["info", "--json", "--model", &model]);
    // 360,448 parameters is the reference's own count.
    assert_eq!(phone["parameters"]["total"], 360_448);
    assert_eq!(phone["size_bytes"]["f32"], 360_448 * 4);
    assert_eq!(phone["size_bytes"]["int4"], 360_448 / 2);
    assert_eq!(phone["stored_bytes"]["F32"], 360_448 * 4);
    // 3 layers, keys and values, 2 heads of 16, 4 bytes.
    assert_eq!(phone["kv_bytes_per_token"], 3 * 2 * 2 * 16 * 4);
    assert_eq!(phone["screen"], serde_json::json!([1080, 2400]));
    let parts = phone["plan"]["parts"].as_array().unwrap();
    let sum: u64 = parts.iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
    assert_eq!(phone["plan"]["total"], sum);

    let none = json(&["info", "--json", "--screen", "none", "--model", &model]);
    assert!(none["screen"].is_null());
    assert!(none["plan"]["total"].as_u64() < phone["plan"]["total"].as_u64());
    let longer = json(&["info", "--json", "--context", "100", "--model", &model]);
    assert!(longer["plan"]["total"].as_u64() < phone["plan"]["total"].as_u64());
    assert_eq!(longer["context"], 100);
}

#[test]
fn bench_measures_what_it_was_asked_for() {
    let model = checkpoint("default");
    let args = [
        "bench",
        "--json",
        "--model",
        &model,
        "--prompt-tokens",
        "40",
        "--max-new-tokens",
        "4",
        "--rounds",
        "2",
    ];
    let text = json(&args);
    assert_eq!(
        (&text["prompt_tokens"], &text["new_tokens"], &text["rounds"]),
        (&40.into(), &4.into(), &2.into())
    );
    assert!(text["prefill_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(text["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(text["planned_memory_bytes"].as_u64().unwrap() > 0);
    assert_eq!(text["peak_memory_bytes"].is_u64(), cfg!(target_os = "linux"));
    assert_eq!(text["vision_s"], 0.0);

    let file = golden("odd-sizes/211x199.png").display().to_string();
    let picture = json(&[&args[..], &["--image", &file]].concat());
    assert!(picture["vision_s"].as_f64().unwrap() > 0.0);
    assert!(picture["prompt_tokens"].as_u64().unwrap() > 40);
    let table = ok(&[&args[..1], &args[2..]].concat());
    assert!(table.stdout.contains("prefill") && table.stdout.contains("planned"), "{}", table.stdout);
}

#[test]
fn chat_keeps_the_conversation_and_reuses_its_cache() {
    let model = checkpoint("default");
    let picture = golden("odd-sizes/29x28.png").display().to_string();
    let input =
        format!("/image {picture}\n看图\n/stats\nand now?\n/stats\n/reset\n/stats\n/quit\nnever said\n");
    let args = ["chat", "--model", &model, "--max-new-tokens", "4", "--ignore-eos", "--system", "s"];
    let run = run_with(&args, input.as_bytes());
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let stats: Vec<&str> = run.stderr.lines().filter(|l| l.contains("prompt tokens")).collect();
    assert_eq!(stats.len(), 2, "{}", run.stderr);
    assert!(stats[0].contains("1 picture encoded") && !stats[0].contains("reused"), "{}", stats[0]);
    // The picture is in the reused part, so it is not encoded again.
    assert!(stats[1].contains("reused") && !stats[1].contains("encoded"), "{}", stats[1]);
    assert!(run.stderr.contains("5 messages"), "{}", run.stderr);
    assert!(run.stderr.contains("0 messages, 0 tokens in the cache"), "{}", run.stderr);
}

#[test]
fn the_first_answer_of_a_chat_is_that_of_generate() {
    let model = checkpoint("default");
    let more = ["--model", &model, "--max-new-tokens", "8", "--ignore-eos", "--system", "s", "--quiet"];
    let generated = ok(&[&["generate", "--prompt", "你好"], &more[..]].concat());
    let chat = run_with(&[&["chat"], &more[..]].concat(), "你好\n".as_bytes());
    assert_eq!((chat.status, chat.stdout), (Some(0), generated.stdout));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let model = checkpoint("default");
    let args = ["generate", "--model", &model, "--prompt", "hi", "--ignore-eos", "--max-new-tokens", "2000"];
    let mut child = program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn help_names_every_command_and_flag() {
    let help = ok(&["--help"]).stdout;
    for command in ["generate", "chat", "info", "bench", "trace"] {
        assert!(help.contains(command));
        let help = ok(&[command, "--help"]).stdout;
        let common =
            ["--model", "--backend", "--threads", "--max-pixels", "--context", "--prefill-chunk", "--memory"];
        for flag in common.iter().chain(&["--content-format", "--read-mode", "--no-fuse", "--quiet"]) {
            assert!(help.contains(flag), "{command} {flag}");
        }
    }
    assert_eq!(run(&["--version"]).status, Some(0));
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_that_is_not_there_is_an_error_or_the_processor_with_a_note() {
    let model = checkpoint("default");
    let args = ["generate", "--model", &model, "--prompt", "hi", "--max-new-tokens", "3", "--ignore-eos"];
    let plain = ok(&[&args[..], &["--quiet"]].concat());
    let absent = ["--backend", "wgpu", "--gpu", "no such adapter"];
    let refused = run(&[&args[..], &absent].concat());
    assert_eq!(refused.status, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("adapter"), "{}", refused.stderr);
    let replaced = ok(&[&args[..], &absent, &["--gpu-fallback", "cpu", "--quiet"]].concat());
    assert_eq!(replaced.stdout, plain.stdout);
    assert!(replaced.stderr.contains("note: the processor runs the model"), "{}", replaced.stderr);
}

#[cfg(feature = "wgpu")]
#[test]
fn gpus_are_listed_with_their_limits() {
    let listed = json(&["gpus", "--json"]);
    let text = ok(&["gpus"]).stdout;
    for gpu in listed.as_array().unwrap() {
        assert!(gpu["binding_limit"].as_u64().unwrap() >= 1 << 27);
        assert!(text.contains(gpu["name"].as_str().unwrap()), "{text}");
    }
}

/// Needs an adapter; where the list is empty there is nothing to place, and the test says so.
#[cfg(feature = "wgpu")]
#[test]
fn info_prints_the_placement_and_the_bytes_on_each_device() {
    let model = checkpoint("default");
    let listed = json(&["gpus", "--json"]);
    let Some(name) = listed[0]["name"].as_str() else {
        eprintln!("SKIPPED: no adapter");
        return;
    };
    let with = |more: &[&str]| {
        let args = ["info", "--json", "--model", &model, "--backend", "wgpu", "--gpu", name];
        json(&[&args[..], more].concat())
    };
    let whole = with(&[]);
    let total = whole["plan"]["device_total"].as_u64().unwrap();
    assert_eq!((&whole["placement"]["layers"], &whole["placement"]["of"]), (&3.into(), &3.into()));
    let none = with(&["--gpu-memory", "0"]);
    assert_eq!((&none["placement"]["layers"], &none["plan"]["device_total"]), (&0.into(), &0.into()));
    let least = none["placement"]["least"].as_u64().unwrap().to_string();
    let one = with(&["--gpu-memory", &least]);
    assert_eq!(one["placement"]["layers"], 1, "{one}");
    assert_eq!(one["plan"]["device_total"].to_string(), least);
    assert!(one["plan"]["device_total"].as_u64().unwrap() < total);
    let args = ["info", "--model", &model, "--backend", "wgpu", "--gpu", name, "--gpu-memory", &least];
    let text = ok(&args).stdout;
    for wanted in
        ["placement: 1 of 3 decoder layers on the device; the other layers,", "limits", " on the device"]
    {
        assert!(text.contains(wanted), "{text}");
    }
}
