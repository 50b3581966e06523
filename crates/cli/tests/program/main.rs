//! The built program against the golden checkpoints, from the outside: arguments in, output and exit status out.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

mod bench;
mod commands;
mod evaluation;
mod golden;
mod outputs;
mod quantising;
mod refusals;
mod speech;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// What one run of the program gave.
struct Run {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The program, ready for arguments.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pocketglm"));
    command.stdin(Stdio::null());
    command
}

fn finished(output: Output) -> Run {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs the program to its end.
fn run(args: &[&str]) -> Run {
    finished(program().args(args).output().unwrap())
}

/// Runs the program with `input` on its standard input.
fn run_with(args: &[&str], input: &[u8]) -> Run {
    let mut command = program();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).args(args);
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // The program may end before it has read everything, and may write before it has.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    finished(output)
}

/// A run that must succeed.
fn ok(args: &[&str]) -> Run {
    let run = run(args);
    assert_eq!(run.status, Some(0), "{args:?}\n{}", run.stderr);
    run
}

/// A checkpoint below `tests/golden`.
fn checkpoint(name: &str) -> String {
    golden(name).display().to_string()
}

/// A path below `tests/golden`.
fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// An empty folder for one test.
fn scratch(test: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
