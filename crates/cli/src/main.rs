//! The program `pocketglm`: pictures and text in, text out, on the device itself.
//!
//! Start at [`main`]: it parses the command line and hands over to one module per command. This crate uses the
//! facade alone: it knows nothing of kernels, tokenizers and file formats.
//!
//! Invariant: answers and reports go to stdout, everything else to stderr, and no input makes the program panic.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod calibrate;
mod chat;
mod eval;
mod failure;
mod generate;
#[cfg(feature = "wgpu")]
mod gpus;
mod info;
mod interrupt;
mod output;
mod plot;
mod progress;
mod quantize;
mod taps;
mod trace;
mod transcribe;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs AutoGLM-Phone-9B and its family (GLM-4.1V) on this device: pictures and text in, text out.
#[derive(Parser)]
#[command(name = "pocketglm", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt and stream the answer to stdout.
    Generate(generate::GenerateArgs),
    /// Talk with the model; the conversation and its cache are kept between turns.
    Chat(chat::ChatArgs),
    /// Show what a checkpoint is and how much memory it will take, without loading it.
    Info(info::InfoArgs),
    /// List the GPUs of this machine, the one that `--backend wgpu` takes first.
    #[cfg(feature = "wgpu")]
    Gpus(gpus::GpusArgs),
    /// Measure load time, prefill and decode speed, and peak memory.
    Bench(bench::BenchArgs),
    /// Write the intermediate tensors of one forward pass to a safetensors file.
    Trace(trace::TraceArgs),
    /// Turn a recording of speech into text with times, for a Wav2Vec2 checkpoint with a CTC head.
    Transcribe(transcribe::TranscribeArgs),
    /// Make a smaller model: integers of 8, 4 or 2 bits, or GGUF's blocks.
    Quantize(quantize::QuantizeArgs),
    /// Record what a model's activations look like on samples, for better quantising.
    Calibrate(calibrate::CalibrateArgs),
    /// Compare quantised models with the original: perplexity, divergence, agreement, size.
    Eval(eval::EvalArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Info(args) => info::run(&args),
        #[cfg(feature = "wgpu")]
        Command::Gpus(args) => gpus::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Transcribe(args) => transcribe::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Eval(args) => eval::run(&args),
    };
    match result {
        Ok(code) => code,
        // Whoever read the output has enough of it, as `head` does.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
