//! `pocketglm calibrate`: what a model's activations look like on a user's samples.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pocketglm::Error;
use pocketglm::quantise::{CalibrateOptions, Samples, calibrate};
use serde_json::json;

use crate::args::{RunArgs, byte_size, positive};
use crate::failure::Failure;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::output::{Out, complain};
use crate::progress::{Bars, Work};

/// Calibrate a model.
#[derive(Args, Debug)]
pub struct CalibrateArgs {
    /// Checkpoint folder, GGUF or .pglm file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Text, or .jsonl with one {"text": ..} or request on each line; requests may have pictures.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    /// The table to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Most tokens of a piece that text is cut into.
    #[arg(long, value_name = "N", default_value_t = CalibrateOptions::default().window, value_parser = positive)]
    window: usize,
    /// Also record the matrix of second moments, which GPTQ needs, for the inputs of weights of this name; `*` stands for
    /// any characters. May be given several times.
    #[arg(long, value_name = "PATTERN")]
    second_moments: Vec<String>,
    /// Most bytes of these matrices; those that do not fit are left out.
    #[arg(long, value_name = "BYTES", default_value = "2GiB", value_parser = byte_size)]
    second_moments_memory: u64,
    /// Replace a file that stands under the name of --out; files that are read are never replaced.
    #[arg(long)]
    force: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
pub fn run(args: &CalibrateArgs) -> Result<ExitCode, Failure> {
    let samples = Samples::read(&args.samples)?;
    let work = Work::new(args.run.quiet || args.json, false);
    let interrupt = Interrupt::install(&Bars::new(true))?;
    let options = CalibrateOptions {
        engine: args.run.options(&work),
        window: args.window,
        second_moments: args.second_moments.clone(),
        second_moments_bytes: args.second_moments_memory,
        overwrite: args.force,
        cancel: interrupt.begin(),
    };
    let done = calibrate(&args.model, &samples, &args.out, &options);
    work.clear();
    let done = match done {
        Err(Error::Cancelled) => {
            complain("stopped: nothing was written");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        other => other?,
    };
    let mut out = Out::new();
    if args.json {
        out.json(&json!({
            "out": args.out.display().to_string(),
            "samples": samples.hash(),
            "prompts": done.prompts,
            "tokens": done.tokens,
            "pictures": done.pictures,
            "inputs": done.inputs,
            "unseen_inputs": done.unseen,
            "second_moments": done.second_moments,
            "second_moments_left_out": done.left_out,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.run.quiet {
        out.line(&format!(
            "{} prompts, {} tokens, {} pictures; {} inputs of linear layers in {}",
            done.prompts,
            done.tokens,
            done.pictures,
            done.inputs,
            args.out.display()
        ))?;
        if done.unseen > 0 {
            let why = if done.pictures == 0 { ": the samples have no pictures" } else { "" };
            out.line(&format!("{} inputs were not reached{why}", done.unseen))?;
        }
        if done.second_moments + done.left_out > 0 {
            let (with, without) = (done.second_moments, done.left_out);
            out.line(&format!("second moments of {with} inputs; {without} did not fit"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
