//! `cargo xtask check`: what CI runs, step by step, until one fails.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use crate::parity::{self, Parity};
use crate::{Error, Result, codegen, repo, tidy};

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// Builds and runs the tests of the crates with kernels for another target, under an emulator.
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
}

/// Targets that the tests run on under an emulator: triple, runner and linker.
const EMULATED: &[(&str, &str, &str)] =
    &[("aarch64-unknown-linux-musl", "qemu-aarch64 -cpu max", "rust-lld")];
/// The crates whose code depends on the target, and the one that calls it.
const EMULATED_PACKAGES: &[&str] = &["pocketglm-tensor", "pocketglm-quant", "pocketglm-graph"];

/// Targets that the facade must build for, GPU included, without being run here.
const BUILT: &[&str] = &["wasm32-unknown-unknown", "aarch64-linux-android"];

/// What a step ended with.
enum Outcome {
    Passed,
    /// It could not run, and why; said aloud, because it is not a pass.
    Skipped(String),
}

/// Steps that ran, with their seconds.
#[derive(Default)]
struct Steps {
    done: Vec<String>,
    skipped: Vec<String>,
}

impl Steps {
    /// Runs a step, and says what it is before and how long it took after.
    fn step(&mut self, name: &str, body: impl FnOnce() -> Result<Outcome>) -> Result<()> {
        repo::print(&format!("== {name}\n"))?;
        let start = Instant::now();
        let outcome = body();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(Outcome::Passed) => {
                self.done.push(format!("{name} {seconds:.0} s"));
                repo::print(&format!("== {name}: passed in {seconds:.1} s\n"))
            }
            Ok(Outcome::Skipped(why)) => {
                self.skipped.push(name.to_owned());
                repo::print(&format!("== {name}: SKIPPED, {why}\n"))
            }
            Err(error) => {
                repo::print(&format!("== {name}: FAILED after {seconds:.1} s\n"))?;
                Err(error)
            }
        }
    }

    fn command(&mut self, name: &str, command: &mut Command) -> Result<()> {
        self.step(name, || repo::run(command).map(|()| Outcome::Passed))
    }

    fn summary(&self) -> String {
        let skipped = match self.skipped.as_slice() {
            [] => String::new(),
            names => format!("; skipped: {}", names.join(", ")),
        };
        format!("check passed: {}{skipped}\n", self.done.join(", "))
    }
}

/// Runs the steps; the tests come last, so that their summary ends the output.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut steps = Steps::default();
    match &arguments.target {
        Some(target) => emulated(&mut steps, target)?,
        None => native(&mut steps)?,
    }
    repo::print(&steps.summary())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = repo::cargo();
    cargo.args(arguments);
    cargo
}

fn native(steps: &mut Steps) -> Result<()> {
    steps.command("fmt", &mut cargo(&["fmt", "--all", "--check"]))?;
    steps.step("tidy", || tidy::run().map(|()| Outcome::Passed))?;
    steps.step("codegen", || codegen::check().map(|()| Outcome::Passed))?;
    steps
        .command("clippy", &mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
    steps.command("doc", doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    steps.step("deny", deny)?;
    for target in BUILT {
        steps.step(&format!("facade for {target}"), || builds_for(target))?;
    }
    steps.step("examples/embed", embed)?;
    steps.command("test", &mut cargo(&["test", "--workspace"]))?;
    // Tests of a GPU pass where there is no adapter, because they cannot say more; this step says it.
    steps.step("parity on a GPU", || {
        Ok(match parity::check()? {
            Parity::Compared(_) => Outcome::Passed,
            Parity::Skipped(why) => Outcome::Skipped(why),
        })
    })
}

/// Licences, bans and sources need only the lock file; advisories need a database from the network.
fn deny() -> Result<Outcome> {
    if repo::output_of(&mut cargo(&["deny", "--version"])).is_err() {
        return Ok(Outcome::Skipped(
            "cargo-deny is not installed (`cargo install --locked cargo-deny`)".into(),
        ));
    }
    repo::run(&mut cargo(&["deny", "check", "bans", "licenses", "sources"]))?;
    if repo::output_of(&mut cargo(&["deny", "fetch", "db"])).is_err() {
        repo::print("== deny: advisories SKIPPED, their database cannot be fetched\n")?;
        return Ok(Outcome::Passed);
    }
    repo::run(&mut cargo(&["deny", "check", "--disable-fetch", "advisories"])).map(|()| Outcome::Passed)
}

/// Checking needs no linker of the target, only its standard library.
fn builds_for(target: &str) -> Result<Outcome> {
    let mut rustup = Command::new("rustup");
    rustup.current_dir(repo::root()).args(["target", "list", "--installed"]);
    let installed = repo::output_of(&mut rustup).unwrap_or_default();
    if !String::from_utf8_lossy(&installed).lines().any(|line| line.trim() == target) {
        return Ok(Outcome::Skipped(format!("the target is not installed (`rustup target add {target}`)")));
    }
    let facade = ["check", "--package", "pocketglm", "--features", "wgpu", "--target", target];
    repo::run(&mut cargo(&facade)).map(|()| Outcome::Passed)
}

/// The example project stands outside of the workspace, as a user's would.
fn embed() -> Result<Outcome> {
    let folder = repo::root().join("examples/embed");
    if !folder.join("Cargo.toml").is_file() {
        return Err(Error::Content {
            place: "examples/embed".into(),
            wanted: "an example project".into(),
            found: "no Cargo.toml".into(),
        });
    }
    let mut run = cargo(&["run", "--quiet", "--manifest-path"]);
    // Its build goes below ours, so that cleaning ours cleans it too.
    run.arg(folder.join("Cargo.toml")).arg("--target-dir").arg(target_folder().join("embed"));
    run.args(["--", "tests/golden/default", "tests/golden/odd-sizes/113x450.png", "What is in the picture?"]);
    repo::run(&mut run).map(|()| Outcome::Passed)
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo::root().join("target"), PathBuf::from)
}

fn emulated(steps: &mut Steps, target: &str) -> Result<()> {
    let Some((_, runner, linker)) = EMULATED.iter().find(|(triple, _, _)| *triple == target) else {
        let known: Vec<&str> = EMULATED.iter().map(|(triple, _, _)| *triple).collect();
        return Err(Error::Content {
            place: "--target".into(),
            wanted: known.join(" or "),
            found: target.into(),
        });
    };
    let emulator = runner.split(' ').next().unwrap_or(runner);
    steps.step(&format!("{emulator} is there"), || {
        repo::output_of(Command::new(emulator).arg("--version")).map(|_| Outcome::Passed)
    })?;
    let mut rustup = Command::new("rustup");
    rustup.current_dir(repo::root()).args(["target", "add", target]);
    steps.command(&format!("rustup target add {target}"), &mut rustup)?;
    let mut test = cargo(&["test", "--target", target, "--lib", "--tests"]);
    for package in EMULATED_PACKAGES {
        test.args(["--package", package]);
    }
    let variable = target.to_uppercase().replace('-', "_");
    test.env(format!("CARGO_TARGET_{variable}_RUNNER"), runner);
    test.env(format!("CARGO_TARGET_{variable}_LINKER"), linker);
    steps.command(&format!("test on {target}"), &mut test)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_fails_ends_the_check_and_a_skipped_one_is_counted_as_skipped() {
        let mut steps = Steps::default();
        steps.step("one", || Ok(Outcome::Passed)).unwrap();
        steps.step("two", || Ok(Outcome::Skipped("not installed".into()))).unwrap();
        assert!(steps.command("three", Command::new("git").arg("no-such-command")).is_err());
        assert_eq!(steps.summary(), "check passed: one 0 s; skipped: two\n");
    }

    #[test]
    fn a_target_that_is_not_installed_is_skipped_and_not_passed() {
        let outcome = builds_for("pdp11-unknown-unix").unwrap();
        assert!(matches!(&outcome, Outcome::Skipped(why) if why.contains("rustup target add pdp11")));
    }

    #[test]
    fn an_unknown_target_is_refused_with_the_known_ones() {
        let error = emulated(&mut Steps::default(), "pdp11").unwrap_err().to_string();
        assert!(error.contains("aarch64-unknown-linux-musl") && error.contains("pdp11"), "{error}");
    }
}
