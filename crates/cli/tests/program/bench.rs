//! `bench --step`, `--depth` and `--serve`.

use serde_json::Value;

use crate::{checkpoint, golden, ok, run, run_with};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_step_is_timed_by_its_parts() {
    let model = checkpoint("default");
    let args = ["bench", "--model", &model, "--step", "56x112", "--max-new-tokens", "3", "--rounds", "2"];
    let step = &lines(&ok(&[&args[..], &["--json"]].concat()).stdout)[0];
    let part = |name: &str, field: &str| step["parts"][name][field].clone();
    let mut sum = 0.0;
    for name in ["preprocess", "vision", "prefill", "decode"] {
        let seconds = part(name, "seconds").as_f64().unwrap();
        assert!(seconds > 0.0 && part(name, "tokens_per_s").as_f64().unwrap() > 0.0, "{name}");
        assert_eq!(part(name, "rounds_s").as_array().unwrap().len(), 2, "{name}");
        sum += seconds;
    }
    // Medians of parts do not add up to the median of the sum, but nearly.
    assert!(step["total_s"].as_f64().unwrap() > sum / 2.0);
    assert_eq!(part("decode", "tokens"), 2);
    let picture = part("vision", "tokens").as_u64().unwrap();
    assert!(picture > 0 && part("prefill", "tokens").as_u64().unwrap() > picture + 100);

    let table = ok(&args).stdout;
    for word in ["preprocess", "vision", "prefill", "decode", "total", "56x112"] {
        assert!(table.contains(word), "{table}");
    }
}

#[test]
fn a_step_of_a_model_that_sees_nothing_is_refused() {
    let model = golden("gguf/text.gguf");
    // The text file alone: the folder of the other one would be searched for a vision file.
    let folder = crate::scratch("bench-text-only");
    let alone = folder.join("text.gguf");
    std::fs::copy(model, &alone).unwrap();
    let run = run(&["bench", "--model", &alone.display().to_string(), "--step", "56x56"]);
    assert_eq!(run.status, Some(1));
    assert!(run.stderr.contains("no vision encoder"), "{}", run.stderr);
}

#[test]
fn decoding_is_timed_behind_a_context() {
    let model = checkpoint("default");
    let args = ["bench", "--json", "--model", &model, "--depth", "90", "--max-new-tokens", "3"];
    let text = &lines(&ok(&args).stdout)[0];
    assert_eq!((&text["depth"], &text["new_tokens"]), (&90.into(), &3.into()));
    assert!(text["decode_tokens_per_s"].as_f64().unwrap() > 0.0);

    let run = run(&[&args[..], &["--context", "92"]].concat());
    assert_eq!(run.status, Some(1));
    assert!(run.stderr.contains("92"), "{}", run.stderr);
}

#[test]
fn a_resident_model_answers_line_by_line_and_goes_on_after_mistakes() {
    let model = checkpoint("default");
    let args = ["bench", "--serve", "--model", &model, "--threads", "1", "--context", "1000"];
    let asked = "prefill 16\nprefill 16\nprefill 8 40\nprefill 8 40\ndecode 3 40\ndecode 3 40\ndecode 3\nprefill 1\n\
                 prefill 1\nnonsense\nprefill 2000\ndecode 3 998\nvision 56 84\nvision 56 84\nvision 70000 70000\nquit\n\
                 decode 3\n";
    let run = run_with(&args, asked.as_bytes());
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let answers = lines(&run.stdout);
    assert_eq!(answers.len(), 16, "one line to begin with and one for each request before `quit`");
    assert_eq!(answers[0]["ready"], true);
    assert!(answers[0]["load_s"].as_f64().unwrap() > 0.0);
    for (at, answer) in answers.iter().enumerate().skip(1) {
        match at {
            10..=12 | 15 => assert!(answer["error"].is_string(), "{at}: {answer}"),
            _ => assert!(answer["seconds"].as_f64().is_some_and(|s| s > 0.0), "{at}: {answer}"),
        }
    }
    assert_eq!((&answers[3]["prefill"], &answers[3]["depth"]), (&8.into(), &40.into()));
    assert_eq!(answers[13]["vision"], answers[14]["vision"]);
    assert!(answers[13]["vision"].as_u64().unwrap() > 0);
}

#[test]
fn a_resident_model_ends_with_its_input_and_bounds_a_line() {
    let model = checkpoint("default");
    let run = run_with(&["bench", "--serve", "--model", &model], &vec![b'x'; 1000]);
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    assert!(lines(&run.stdout)[1]["error"].as_str().unwrap().contains("is no request"));
}
