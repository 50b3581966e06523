//! What does not work is told in one line, with a status that is not 0, and never by a panic.

use std::time::{Duration, Instant};

use crate::{Run, checkpoint, golden, run, run_with, scratch};

/// A run that must fail as an error of use or of the input.
fn refused(args: &[&str], status: i32, wanted: &[&str]) -> Run {
    let start = Instant::now();
    let run = run(args);
    check(&run, args, status, wanted);
    assert!(start.elapsed() < Duration::from_secs(10), "{args:?} took {:?}", start.elapsed());
    run
}

fn check(run: &Run, args: &[&str], status: i32, wanted: &[&str]) {
    assert_eq!(run.status, Some(status), "{args:?}\n{}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{args:?}\n{}", run.stderr);
    for text in wanted.iter().chain(&["error: "]) {
        assert!(run.stderr.contains(text), "{args:?}: {text} in\n{}", run.stderr);
    }
}

#[test]
fn flags_that_make_no_sense_are_errors_of_use() {
    let model = checkpoint("default");
    let with = |more: &[&'static str], wanted: &str| {
        let args: Vec<&str> =
            ["generate", "--model", &model, "--prompt", "t"].iter().chain(more).copied().collect();
        refused(&args, 2, &[wanted]);
    };
    with(&["--backend", "gpu"], "possible values: cpu");
    with(&["--memory", "6 lots"], "is no size");
    with(&["--context", "0"], "at least 1");
    with(&["--device-size", "1080"], "is no screen");
    with(&["--content-format", "xml"], "possible values: hf, string");
    with(&["--request", "r.json"], "cannot be used with");
    with(&["--speed"], "unexpected argument");
    refused(&["generate", "--model", &model], 2, &["--prompt"]);
    refused(&["generate", "--prompt", "t"], 2, &["--model"]);
    refused(&["sing"], 2, &["unrecognized subcommand"]);
}

#[test]
fn settings_outside_their_ranges_are_named() {
    let model = checkpoint("default");
    for (flag, value, wanted) in [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "1.5", "top_p"),
        ("--min-p", "-0.1", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--frequency-penalty", "NaN", "frequency_penalty"),
        ("--stop", "", "stop"),
        ("--threads", "1000000", "threads"),
        ("--max-pixels", "1", "pixels"),
    ] {
        refused(&["generate", "--model", &model, "--prompt", "t", flag, value], 1, &[wanted]);
    }
}

#[test]
fn missing_files_are_named() {
    let model = checkpoint("default");
    refused(&["info", "--model", "no/such/folder"], 1, &["no/such/folder"]);
    refused(&["generate", "--model", "no/such/folder", "--prompt", "t"], 1, &["no/such/folder"]);
    refused(&["generate", "--model", &model, "--request", "no-such.json"], 1, &["no-such.json"]);
    refused(&["generate", "--model", &model, "--image", "no-such.png", "--prompt", "t"], 1, &["no-such.png"]);
    refused(&["chat", "--model", &model, "--image", "no-such.png"], 1, &["no-such.png"]);
    refused(&["bench", "--model", &model, "--image", "no-such.png"], 1, &["no-such.png"]);
    let request = scratch("missing").join("r.json");
    std::fs::write(&request, r#"{"input_ids": [1, 2]}"#).unwrap();
    let request = request.to_str().unwrap();
    refused(
        &["trace", "--model", &model, "--request", request, "--out", "no/such/folder/x"],
        1,
        &["no/such/folder"],
    );
}

#[test]
fn broken_requests_are_explained() {
    let model = checkpoint("default");
    let args = ["generate", "--model", &model, "--request", "-"];
    for (json, wanted) in [
        ("", "request: not JSON"),
        ("{\"messages\": [", "request: not JSON"),
        ("[]", "the top level must be an object"),
        ("{\"messages\": [{\"role\": \"user\"}]}", "messages[0].content"),
        ("{\"messages\": [], \"input_ids\": []}", "has both"),
        ("{\"input_ids\": [1, 999999]}", "input_ids[1] is 999999"),
        ("{\"input_ids\": []}", "the prompt has no tokens"),
        ("\u{1b}[2J", "request: not JSON"),
    ] {
        let run = run_with(&args, json.as_bytes());
        check(&run, &[json], 1, &[wanted]);
        assert!(!run.stderr.contains('\u{1b}'), "{:?}", run.stderr);
    }
    let deep = run_with(&args, "[".repeat(100_000).as_bytes());
    check(&deep, &["deep"], 1, &["recursion"]);
}

#[test]
fn what_is_no_picture_is_named_and_a_pipe_does_not_hang() {
    let folder = scratch("pictures");
    let model = checkpoint("default");
    let text = folder.join("text.png");
    std::fs::write(&text, "not a picture").unwrap();
    let text = text.to_str().unwrap();
    refused(&["generate", "--model", &model, "--image", text], 1, &["text.png"]);
    refused(&["generate", "--model", &model, "--image", folder.to_str().unwrap()], 1, &["not a plain file"]);
    let png = std::fs::read(golden("odd-sizes/29x28.png")).unwrap();
    let cut = folder.join("cut.png");
    std::fs::write(&cut, &png[..png.len() / 2]).unwrap();
    refused(&["generate", "--model", &model, "--image", cut.to_str().unwrap()], 1, &["cut.png"]);
    #[cfg(unix)]
    {
        let pipe = folder.join("pipe.png");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let pipe = pipe.to_str().unwrap();
        refused(&["generate", "--model", &model, "--image", pipe], 1, &["pipe.png", "not a plain file"]);
        refused(&["generate", "--model", &model, "--request", pipe], 1, &["pipe.png", "not a plain file"]);
    }
}

#[test]
fn a_budget_that_is_too_small_is_refused_with_the_plan() {
    let model = checkpoint("default");
    for command in [
        &["info"][..],
        &["generate", "--prompt", "t"],
        &["chat"],
        &["bench", "--prompt-tokens", "10", "--rounds", "1"],
    ] {
        let args: Vec<&str> = command.iter().copied().chain(["--model", &model, "--memory", "1MB"]).collect();
        let run = refused(&args, 1, &["--memory allows 976.56 KiB (1,000,000 bytes)"]);
        let table = run.stdout + &run.stderr;
        // The default context is 8,192 tokens, this checkpoint was made for 4,096.
        for wanted in ["memory plan for 4,096 tokens", "KV cache", "total", "bytes"] {
            assert!(table.contains(wanted), "{args:?}: {wanted} in\n{table}");
        }
    }
    // Negative control: what fits, runs.
    let args = ["generate", "--model", &model, "--prompt", "t", "--memory", "1GiB", "--max-new-tokens", "1"];
    assert_eq!(run(&args).status, Some(0));
}

#[test]
fn a_picture_that_breaks_the_budget_is_refused_with_the_plan_of_the_prompt() {
    let model = checkpoint("default");
    let picture = golden("odd-sizes/640x97.png").display().to_string();
    let total = |args: &[&str]| {
        let run = run(&[args, &["--json", "--model", &model]].concat());
        serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap()["plan"]["total"].as_u64().unwrap()
    };
    // Just enough for text, not for a picture besides.
    let budget = total(&["info", "--screen", "none", "--context", "256"]).to_string();
    let args =
        ["generate", "--model", &model, "--context", "256", "--memory", &budget, "--max-new-tokens", "4"];
    assert_eq!(run(&[&args[..], &["--prompt", "t"]].concat()).status, Some(0));
    refused(&[&args[..], &["--image", &picture]].concat(), 1, &["vision activations", "--memory allows"]);
}

#[test]
fn a_prompt_beyond_the_context_is_refused() {
    let model = checkpoint("default");
    let long = "word ".repeat(200);
    let args = ["generate", "--model", &model, "--context", "64", "--prompt", &long];
    refused(&args, 1, &["the context holds 64"]);
}

#[test]
fn a_failed_turn_ends_a_chat_that_comes_through_a_pipe() {
    let model = checkpoint("default");
    let run = run_with(&["chat", "--model", &model, "--quiet"], b"/image no-such.png\nhello\n");
    check(&run, &["chat"], 1, &["no-such.png: not a file"]);
    assert_eq!(run.stdout, "");
}
