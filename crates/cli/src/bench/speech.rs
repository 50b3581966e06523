//! `pocketglm bench` on a speech checkpoint: the encoder and its head on made-up audio, with the real-time factor and peak
//! memory. With `--serve` it says what memory is planned for `--seconds` of audio and answers one request a line, as
//! `serve.rs` does: `audio SECONDS` gives
//! `{"audio": n, "seconds": s, "peak_bytes": b, "sample": [..]}`, where the sample is every 997th number of the logits.

use std::io::{BufRead, Read};
use std::process::ExitCode;
use std::time::Instant;

use pocketglm::Recogniser;
use serde_json::{Value, json};

use super::{BenchArgs, add, median, ops, peak_memory};
use crate::failure::Failure;
use crate::output::{Out, bytes, complain};
use crate::progress::Bars;

/// Samples in a second.
const RATE: usize = 16_000;
/// Every so many numbers of a result are sent along, so that two programs can be compared.
const SAMPLED: usize = 997;
/// Longest line of a request.
const LONGEST_LINE: u64 = 200;

/// Numbers between -1.75 and 1.75 that another program can make as well: sample `i` is `(i·i·7919 + i·104729) mod 65521`,
/// less the middle, over 2^15, with a louder and softer passage every half second.
fn samples(seconds: usize) -> Vec<f32> {
    (0..(seconds * RATE) as u64)
        .map(|i| {
            let noise = (i * i % 65_521 * 7919 + i * 104_729) % 65_521;
            let loud = 1.0 + (i / 8000 % 4) as f32 * 0.25;
            (noise as f32 - 32_760.0) / 32_768.0 * loud
        })
        .collect()
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    let options = args.model.options(&Bars::new(true))?;
    let backend = options.backend.clone();
    let planned = Recogniser::inspect(&args.model.model, &options, args.seconds as f64)?.1.total();
    let recogniser = Recogniser::open(&args.model.model, options)?;
    let load = start.elapsed().as_secs_f64();
    let mut out = Out::new();
    if args.serve {
        return serve(&recogniser, load, planned, &mut out);
    }
    let mut took = Vec::new();
    for round in 1..=args.rounds {
        let (seconds, _) = encode(&recogniser, args.seconds)?;
        if !args.json && !args.model.quiet {
            complain(&format!("round {round}: {seconds:.3} s"));
        }
        took.push(seconds);
    }
    let seconds = median(took);
    let (factor, peak) = (seconds / args.seconds as f64, peak_memory());
    let again = || encode(&recogniser, args.seconds).map(|_| ());
    let per_op = args.per_op.then(|| ops::measure(backend.as_ref(), again)).transpose()?;
    if args.json {
        let mut object = json!({
            "load_s": load, "audio_s": args.seconds, "encode_s": seconds, "real_time_factor": factor,
            "peak_memory_bytes": peak, "planned_memory_bytes": planned,
        });
        add(&mut object, per_op.as_ref());
        out.json(&object)?;
        return Ok(ExitCode::SUCCESS);
    }
    out.line(&format!("load     {load:.3} s"))?;
    out.line(&format!(
        "encode   {seconds:.3} s for {} s of audio, real-time factor {factor:.4}",
        args.seconds
    ))?;
    out.line(&format!(
        "memory   {} at the peak, {} planned",
        peak.map_or("unknown".into(), bytes),
        bytes(planned)
    ))?;
    per_op.iter().try_for_each(|p| p.print(&mut out))?;
    Ok(ExitCode::SUCCESS)
}

/// Seconds, and some numbers of the result.
fn encode(recogniser: &Recogniser, seconds: usize) -> Result<(f64, Vec<f32>), Failure> {
    let audio = samples(seconds);
    let start = Instant::now();
    let logits = recogniser.logits(&audio)?;
    let took = start.elapsed().as_secs_f64();
    Ok((took, logits.iter().step_by(SAMPLED).copied().collect()))
}

fn serve(recogniser: &Recogniser, load: f64, planned: u64, out: &mut Out) -> Result<ExitCode, Failure> {
    out.json(&json!({
        "peer": "pocketglm", "version": env!("CARGO_PKG_VERSION"), "load_s": load, "planned_bytes": planned,
        "ready": true,
    }))?;
    let mut input = std::io::stdin().lock();
    loop {
        let mut line = Vec::new();
        input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).map_err(Failure::Input)?;
        let line = String::from_utf8_lossy(&line);
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match *words.as_slice() {
            [] if line.is_empty() => return Ok(ExitCode::SUCCESS),
            ["quit"] => return Ok(ExitCode::SUCCESS),
            ["audio", n] => answer(recogniser, n).unwrap_or_else(|e| json!({ "error": e.to_string() })),
            _ => json!({"error": format!("{:?} is no request", line.trim())}),
        };
        out.json(&answer)?;
    }
}

fn answer(recogniser: &Recogniser, seconds: &str) -> Result<Value, Failure> {
    let wrong = || Failure::BenchRequest { line: seconds.chars().take(80).collect() };
    let n = seconds.parse::<usize>().ok().filter(|n| (1..=3600).contains(n)).ok_or_else(wrong)?;
    let (took, sample) = encode(recogniser, n)?;
    Ok(json!({"audio": n, "seconds": took, "peak_bytes": peak_memory(), "sample": sample}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_audio_is_the_same_every_time_and_within_its_range() {
        let a = samples(2);
        assert_eq!(a.len(), 32_000);
        assert_eq!(a, samples(2));
        assert!(a.iter().all(|v| v.abs() <= 1.76));
        assert!(a.iter().sum::<f32>().abs() / 32_000.0 < 0.05);
    }
}
