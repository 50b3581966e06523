//! `pocketglm bench`: load time, prefill and decode speed, and peak memory next to the plan; one step of an agent by
//! its parts; decoding behind a long context.

mod meter;
mod ops;
mod serve;
mod speech;
mod step;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use pocketglm::{Engine, GenerateOptions, Message, Part, Picture, Request, Timings};
use serde_json::json;

use crate::args::{ModelArgs, positive, screen};
use crate::failure::Failure;
use crate::generate::begin;
use crate::output::{Out, bytes, complain};
use crate::progress::Bars;
use meter::Meter;

/// Measure speed and memory.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Tokens of the prompt; with --image, about as many tokens of text besides the picture.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    prompt_tokens: usize,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    max_new_tokens: usize,
    /// Rounds, each in a fresh session; the median counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    rounds: usize,
    /// Also encode this picture in every round.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Time one step of an agent by its parts: a made-up screenshot of this size, instructions and a question.
    #[arg(long, value_name = "WxH", value_parser = screen, conflicts_with_all = ["image", "prompt_tokens"])]
    step: Option<(u32, u32)>,
    /// Seconds of audio that a speech checkpoint encodes at once.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = positive)]
    seconds: usize,
    /// Time decoding alone, behind this many tokens of context.
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with_all = ["image", "prompt_tokens", "step"])]
    depth: Option<usize>,
    /// Keep the model and answer requests on standard input, one line each: how `cargo xtask bench` takes turns
    /// between programs. See `serve.rs`.
    #[arg(long, hide = true, conflicts_with_all = ["image", "step", "depth"])]
    serve: bool,
    /// Also time every kind of op on the GPU, in one more round: time, bytes, operations, and what part of the GPU's limits they
    /// reach.
    #[arg(long, conflicts_with = "serve")]
    per_op: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    if pocketglm::Recogniser::is_one(&args.model.model) {
        return speech::run(args);
    }
    if args.serve {
        return serve::run(args);
    }
    let quiet = args.model.quiet || args.json;
    let bars = Bars::new(quiet);
    let start = Instant::now();
    let model = args.model.open(&bars)?;
    let load = start.elapsed().as_secs_f64();
    let engine = model.engine();
    if let Some(size) = args.step {
        return step::run(args, engine, load, size);
    }
    if let Some(depth) = args.depth {
        return behind(args, engine, load, depth);
    }

    let prompt = engine.prompt(&request(engine, args)?)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let planned = engine.plan(&prompt, args.max_new_tokens)?.total();
    let mut rounds: Vec<Timings> = Vec::new();
    for round in 1..=args.rounds {
        let mut session = engine.session();
        let mut answer = begin(&mut session, engine, &prompt, &options, args.model.memory)?;
        answer.text()?;
        bars.clear();
        let timings = answer.timings();
        if !quiet {
            let (prefill, decode) = (timings.prefill_rate(), timings.decode_rate());
            complain(&format!("round {round}: prefill {prefill:.1} tokens/s, decode {decode:.1} tokens/s"));
        }
        rounds.push(timings);
    }
    let of = |figure: fn(&Timings) -> f64| median(rounds.iter().map(figure).collect());
    let (prefill, decode) = (of(Timings::prefill_rate), of(Timings::decode_rate));
    let vision = of(|t| t.vision.as_secs_f64());
    let new_tokens = rounds.iter().map(|t| t.generated_tokens).min().unwrap_or(0);
    let peak = peak_memory();

    let per_op = args.per_op.then(|| {
        ops::measure(engine.device_backend(), || {
            let mut session = engine.session();
            begin(&mut session, engine, &prompt, &options, args.model.memory)?.text()?;
            Ok(())
        })
    });
    let per_op = per_op.transpose()?;

    let mut out = Out::new();
    let prompt_tokens = prompt.token_ids().len();
    if args.json {
        let mut object = json!({
            "device": engine.device(),
            "load_s": load,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "rounds": args.rounds,
            "vision_s": vision,
            "prefill_s": of(|t| t.prefill.as_secs_f64()),
            "decode_s": of(|t| t.decode.as_secs_f64()),
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "copy_bytes_per_s": engine.copy_rate()?,
            "peak_memory_bytes": peak,
            "planned_memory_bytes": planned,
        });
        add(&mut object, per_op.as_ref());
        out.json(&object)?;
        return Ok(ExitCode::SUCCESS);
    }
    out.line(&format!("device   {}", engine.device()))?;
    out.line(&format!("load     {load:.3} s"))?;
    if args.image.is_some() {
        out.line(&format!("vision   {vision:.3} s"))?;
    }
    out.line(&format!("prefill  {prefill:.1} tokens/s ({prompt_tokens} tokens)"))?;
    out.line(&format!("decode   {decode:.1} tokens/s ({new_tokens} tokens)"))?;
    out.line(&format!("memory   {} at the peak", peak.map_or("not measured on this system".into(), bytes)))?;
    out.line(&format!("planned  {}", bytes(planned)))?;
    per_op.iter().try_for_each(|p| p.print(&mut out))?;
    Ok(ExitCode::SUCCESS)
}

/// Adds what ops take to a report, where it was measured.
fn add(object: &mut serde_json::Value, per_op: Option<&ops::PerOp>) {
    if let Some(per_op) = per_op {
        object["per_op"] = per_op.json();
    }
}

/// Decoding alone, behind `depth` tokens that are computed once and not counted.
fn behind(args: &BenchArgs, engine: &Engine, load: f64, depth: usize) -> Result<ExitCode, Failure> {
    let mut meter = Meter::new(engine, args.model.context, args.model.memory)?;
    let seconds: Vec<f64> =
        (0..args.rounds).map(|_| meter.decode(args.max_new_tokens, depth)).collect::<Result<_, _>>()?;
    let middle = median(seconds.clone());
    let rate = args.max_new_tokens as f64 / middle.max(1e-9);
    // The tokens before are in the cache by now.
    let mut again = || meter.decode(args.max_new_tokens, depth).map(|_| ());
    let per_op = args.per_op.then(|| ops::measure(engine.device_backend(), &mut again)).transpose()?;
    let mut out = Out::new();
    if args.json {
        let mut object = json!({
            "device": engine.device(),
            "load_s": load,
            "depth": depth,
            "new_tokens": args.max_new_tokens,
            "rounds": args.rounds,
            "decode_s": middle,
            "decode_tokens_per_s": rate,
            "copy_bytes_per_s": engine.copy_rate()?,
            "peak_memory_bytes": peak_memory(),
        });
        add(&mut object, per_op.as_ref());
        out.json(&object)?;
    } else {
        out.line(&format!("device   {}", engine.device()))?;
        out.line(&format!("load     {load:.3} s"))?;
        out.line(&format!("decode   {rate:.1} tokens/s ({} tokens behind {depth})", args.max_new_tokens))?;
        per_op.iter().try_for_each(|p| p.print(&mut out))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The prompt: token ids drawn over the vocabulary, or the picture with filler text.
fn request(engine: &Engine, args: &BenchArgs) -> Result<Request, Failure> {
    let Some(image) = &args.image else {
        return Ok(Request::InputIds(ordinary_tokens(engine, args.prompt_tokens)?));
    };
    const FILLER: &str = " and then tap the next button";
    let each = engine.tokenize(FILLER)?.len().max(1);
    let text = FILLER.repeat(args.prompt_tokens.div_ceil(each));
    Ok(Request::Messages(vec![Message::parts(
        "user",
        vec![Part::Image(Picture::file(image)), Part::Text(text)],
    )]))
}

/// `count` token ids from all over the vocabulary, the same in every run. Special tokens are left out, because the
/// model would look for pictures behind them.
fn ordinary_tokens(engine: &Engine, count: usize) -> Result<Vec<u32>, Failure> {
    let rows = engine.info().vocabulary.max(1) as u64;
    let ordinary = |id: &u32| {
        let text = engine.detokenize(&[*id], true);
        !text.is_empty() && !text.starts_with("<|")
    };
    // The golden ratio's step visits the rows evenly and in no order (Knuth, volume 3, section 6.4).
    let step = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % rows;
    let candidates = (1..=rows.saturating_mul(8)).map(|i| step(i) as u32);
    let ids: Vec<u32> = candidates.filter(ordinary).take(count.min(rows as usize)).collect();
    if ids.is_empty() && count > 0 {
        Err(Failure::NoOrdinaryToken)
    } else {
        Ok(ids.into_iter().cycle().take(count).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle.wrapping_sub(1)), values.get(middle)) {
        (Some(low), Some(high)) if values.len().is_multiple_of(2) => (low + high) / 2.0,
        (_, Some(value)) => *value,
        _ => 0.0,
    }
}

/// The most memory that this process has held so far, where the system tells.
fn peak_memory() -> Option<u64> {
    high_water_mark(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// `VmHWM:     1234 kB` of Linux's process status, in bytes.
fn high_water_mark(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), 3.0);
    }

    #[test]
    fn peak_memory_is_read_from_the_process_status() {
        assert_eq!(high_water_mark("Name:\tx\nVmHWM:\t    1234 kB\nVmRSS:\t 5 kB\n"), Some(1234 * 1024));
        assert_eq!(high_water_mark("VmRSS:\t5 kB\n"), None);
        assert_eq!(high_water_mark("VmHWM:\tmany kB\n"), None);
    }
}
