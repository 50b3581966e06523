//! `cargo xtask golden`: makes tests/golden again with the reference implementation, and shows what changed.

use std::path::PathBuf;
use std::process::Command;

use crate::{Result, repo};

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// A Python that has the packages that tests/golden/README.md lists.
    #[arg(long)]
    python: PathBuf,
    /// The folder with the reference script `make_tiny.py`.
    #[arg(long)]
    reference: PathBuf,
    /// Makes only these; all where left out.
    #[arg(long, num_args = 1..)]
    only: Vec<String>,
}

/// Runs the recipe and prints the difference.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut python = Command::new(&arguments.python);
    // The paths were given relative to where we were called, so that folder stays the current one.
    python.arg(repo::root().join("tests/golden/make.py")).arg("--reference").arg(&arguments.reference);
    if !arguments.only.is_empty() {
        python.arg("--only").args(&arguments.only);
    }
    repo::run(&mut python)?;
    let mut git = Command::new("git");
    git.current_dir(repo::root()).args(["-c", "safe.directory=*"]);
    repo::run(git.args(["--no-pager", "diff", "--stat", "--", "tests/golden"]))?;
    let mut git = Command::new("git");
    git.current_dir(repo::root()).args(["-c", "safe.directory=*"]);
    repo::run(git.args(["status", "--short", "--", "tests/golden"]))
}
