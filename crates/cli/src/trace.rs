//! `pocketglm trace`: every tensor that a comparison with the reference needs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pocketglm::{OutFile, Recogniser, Request};

use crate::args::ModelArgs;
use crate::failure::Failure;
use crate::generate::read_request;
use crate::output::complain;
use crate::progress::Bars;

/// Write the tensors of one forward pass.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// Request file, `-` for standard input, or the JSON itself; see `generate --request`. A speech checkpoint takes
    /// {"audio": "clip.wav"}.
    #[arg(long, value_name = "FILE|JSON")]
    request: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace a file that stands under the name of --out; files that are read are never replaced.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub fn run(args: &TraceArgs) -> Result<ExitCode, Failure> {
    let request = match args.request.to_str().filter(|text| text.trim_start().starts_with('{')) {
        Some(json) => Request::from_json(json.as_bytes())?,
        None => read_request(&args.request)?,
    };
    let bars = Bars::new(args.model.quiet);
    let options = args.model.options(&bars)?;
    let out = OutFile::new(&args.out, args.force).keeping([&args.request]).keeping(request.files());
    let out = out.keeping_model(&args.model.model, &options)?;
    out.check()?;
    let trace = match &request {
        Request::Audio(sound) if Recogniser::is_one(&args.model.model) => {
            Recogniser::open(&args.model.model, options)?.trace(sound)?
        }
        _ => {
            let model = args.model.open(&bars)?;
            let engine = model.engine();
            engine.trace(&engine.prompt(&request)?)?
        }
    };
    bars.clear();
    out.check()?;
    trace.write(out.path())?;
    if !args.model.quiet {
        let width = trace.tensors().iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, tensor) in trace.tensors() {
            complain(&format!("{name:width$}  {:4} {:?}", tensor.dtype().name(), tensor.shape()));
        }
        complain(&format!("{} tensors in {}", trace.tensors().len(), args.out.display()));
    }
    Ok(ExitCode::SUCCESS)
}
