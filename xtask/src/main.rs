//! The repository's own commands: `cargo xtask bench | check | tidy | codegen | fuse | parity | synth | golden`.
//!
//! Start at [`Command`]: each variant is one command and one module. This program knows nothing of tokens,
//! sessions and the engine: it looks at sources and graphs, and runs other programs.
//!
//! Invariant: a command that checks something fails when the check could not run; it never passes emptily.

#![forbid(unsafe_code)]

mod bench;
mod check;
mod codegen;
mod draw;
mod error;
mod fuse;
mod golden;
mod layers;
mod model;
mod parity;
mod repo;
mod speech;
mod synth;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use error::{Error, Result};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The repository's own commands", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Holds kernels and whole models against the machine's limits; writes bench/RESULTS.md.
    Bench(bench::Arguments),
    /// What CI runs: format, lints, generated text, tidy, documentation, the example project, tests.
    Check(check::Arguments),
    /// Checks layers, crate headers, `unsafe`, file sizes and lint exceptions; prints lines of code.
    Tidy,
    /// Writes the generated tables into the documents.
    Codegen(codegen::Arguments),
    /// Shows what the passes make of a model's graphs, in figures and as drawings.
    Fuse(fuse::Arguments),
    /// Compares what another backend computes with the processor's scalar kernels, op by op.
    Parity(parity::Arguments),
    /// Writes a checkpoint of a model's true shape with random weights.
    Synth(synth::Arguments),
    /// Makes the golden files again with the reference implementation.
    Golden(golden::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Tidy => tidy::run(),
        Command::Codegen(arguments) => codegen::run(&arguments),
        Command::Fuse(arguments) => fuse::run(&arguments),
        Command::Parity(arguments) => parity::run(&arguments),
        Command::Synth(arguments) => synth::run(&arguments),
        Command::Golden(arguments) => golden::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
