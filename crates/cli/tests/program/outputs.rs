//! What a command writes never takes the place of what it reads, nor of anything but a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Run, golden, ok, run, scratch};

/// A copy of a checkpoint's files, and beside it a sample file, a policy, a request and a picture.
struct Inputs {
    folder: PathBuf,
}

impl Inputs {
    fn new(test: &str) -> Inputs {
        let folder = scratch(test);
        std::fs::create_dir(folder.join("model")).unwrap();
        for entry in std::fs::read_dir(golden("default")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), folder.join("model").join(entry.file_name())).unwrap();
            }
        }
        let inputs = Inputs { folder };
        std::fs::copy(golden("odd-sizes/29x28.png"), inputs.file("picture.png")).unwrap();
        let messages = format!(
            r#"{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": {:?}}}, {{"type": "text", "text": "hi"}}]}}]}}"#,
            inputs.path("picture.png")
        );
        inputs.write("request.json", &messages);
        inputs.write(
            "samples.jsonl",
            &format!("{{\"text\": \"open the settings and tap on wifi\"}}\n{messages}\n"),
        );
        inputs.write("policy.json", r#"{"rules": [{"tensors": "*", "format": "Q8_0"}]}"#);
        ok(&[
            "calibrate",
            "--quiet",
            "--model",
            &inputs.path("model"),
            "--samples",
            &inputs.path("samples.jsonl"),
            "--out",
            &inputs.path("table"),
        ]);
        inputs
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn path(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.file(name), text).unwrap();
    }

    /// Names and bytes of all files.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        for folder in [self.folder.clone(), self.file("model")] {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    all.insert(path.clone(), std::fs::read(path).unwrap());
                }
            }
        }
        all
    }

    /// The commands that write, without the name of what they write, and with leave to replace it.
    fn commands(&self) -> [Vec<String>; 4] {
        let [model, samples, policy, table, request] =
            ["model", "samples.jsonl", "policy.json", "table", "request.json"].map(|name| self.path(name));
        let list = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect();
        [
            list(&[
                "quantize",
                "--quiet",
                "--force",
                "--model",
                &model,
                "--policy",
                &policy,
                "--calibration",
                &table,
                "--to",
                "pglm",
                "--out",
            ]),
            list(&["calibrate", "--quiet", "--force", "--model", &model, "--samples", &samples, "--out"]),
            list(&["trace", "--quiet", "--force", "--model", &model, "--request", &request, "--out"]),
            list(&[
                "eval",
                "--quiet",
                "--force",
                "--reference",
                &model,
                "--policy",
                &policy,
                "--static-inputs",
                &table,
                "--samples",
                &samples,
                "--plot",
            ]),
        ]
    }
}

fn write_to(command: &[String], out: &Path) -> Run {
    let out = out.display().to_string();
    run(&command.iter().map(String::as_str).chain([out.as_str()]).collect::<Vec<_>>())
}

#[test]
fn no_command_replaces_a_file_that_it_reads_whatever_is_forced() {
    let inputs = Inputs::new("inputs");
    let before = inputs.content();
    let [quantize, calibrate, trace, eval] = inputs.commands();
    let model = ["model/model.safetensors", "model/config.json", "model/tokenizer.json"];
    for (command, more) in [
        (&quantize, &["policy.json", "table", "model/preprocessor_config.json"][..]),
        (&calibrate, &["samples.jsonl", "picture.png", "model/generation_config.json"]),
        (&trace, &["request.json", "picture.png", "model/chat_template.jinja"]),
        (&eval, &["samples.jsonl", "policy.json", "table", "picture.png"]),
    ] {
        for name in model.iter().chain(more) {
            let run = write_to(command, &inputs.file(name));
            assert_eq!(run.status, Some(1), "{} {name}: {}", command[0], run.stderr);
            assert!(run.stderr.contains("which is being read"), "{} {name}: {}", command[0], run.stderr);
        }
    }
    // The other model of a comparison is read as well.
    std::fs::copy(inputs.file("model/model.safetensors"), inputs.file("model/copy.safetensors")).unwrap();
    let judged = inputs.path("model/copy.safetensors");
    let run = write_to(
        &[&eval[..3], &["--model".to_owned(), judged.clone()], &eval[3..]].concat(),
        Path::new(&judged),
    );
    assert!(run.status == Some(1) && run.stderr.contains("which is being read"), "{}", run.stderr);
    std::fs::remove_file(judged).unwrap();
    assert!(inputs.content() == before, "a refused command has changed or left a file");
    // The control: the same commands write to a name that nothing reads.
    for (i, command) in inputs.commands().iter().enumerate() {
        let out = inputs.file(&format!("out-{i}"));
        let run = write_to(command, &out);
        assert_eq!(run.status, Some(0), "{}: {}", command[0], run.stderr);
        assert!(out.is_file());
    }
}

#[cfg(unix)]
#[test]
fn a_link_to_an_input_is_that_input() {
    let inputs = Inputs::new("links");
    std::fs::hard_link(inputs.file("model/config.json"), inputs.file("hard")).unwrap();
    std::os::unix::fs::symlink("model/model.safetensors", inputs.file("soft")).unwrap();
    let before = inputs.content();
    for command in inputs.commands() {
        for name in ["hard", "soft"] {
            let run = write_to(&command, &inputs.file(name));
            assert_eq!(run.status, Some(1), "{} {name}", command[0]);
            assert!(run.stderr.contains("which is being read"), "{} {name}: {}", command[0], run.stderr);
        }
    }
    assert!(inputs.content() == before);
    assert!(inputs.file("soft").is_symlink());
}

#[test]
fn a_file_that_stands_there_is_replaced_with_leave_alone() {
    let inputs = Inputs::new("existing");
    for command in inputs.commands() {
        inputs.write("out", "precious");
        let shy: Vec<String> = command.iter().filter(|a| *a != "--force").cloned().collect();
        let run = write_to(&shy, &inputs.file("out"));
        assert_eq!(run.status, Some(1), "{}: {}", command[0], run.stderr);
        assert!(run.stderr.contains("out exists already (--force replaces it)"), "{}", run.stderr);
        assert_eq!(std::fs::read(inputs.file("out")).unwrap(), b"precious");
        let run = write_to(&command, &inputs.file("out"));
        assert_eq!(run.status, Some(0), "{}: {}", command[0], run.stderr);
        assert!(std::fs::read(inputs.file("out")).unwrap() != b"precious", "{}", command[0]);
        std::fs::remove_file(inputs.file("out")).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_not_replaced_by_a_file() {
    use std::os::unix::fs::FileTypeExt;
    let inputs = Inputs::new("pipes");
    let pipe = inputs.file("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for command in inputs.commands() {
        let run = write_to(&command, &pipe);
        assert_eq!(run.status, Some(1), "{}: {}", command[0], run.stderr);
        assert!(run.stderr.contains("pipe is a FIFO, expected a regular file"), "{}", run.stderr);
    }
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

/// The system refuses to make a file longer than a limit, as a full disk does.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_of_a_chart_a_table_or_a_trace() {
    let inputs = Inputs::new("full");
    let before = inputs.content();
    for command in &inputs.commands()[1..] {
        let status = std::process::Command::new("sh")
            .args(["-c", r#"trap "" XFSZ; ulimit -f 1; exec "$0" "$@""#, env!("CARGO_BIN_EXE_pocketglm")])
            .args(command)
            .arg(inputs.file("out"))
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&status.stderr);
        assert!(status.status.code() == Some(1) && told.contains("File too large"), "{}: {told}", command[0]);
        assert!(inputs.content() == before, "{} left something", command[0]);
    }
}
