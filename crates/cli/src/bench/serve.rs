//! `pocketglm bench --serve`: the model stays in memory and answers timing requests, so that two programs can take
//! turns. The lines are those of `bench/peers`: first one with `"ready": true`, then one for every request.
//!
//! | request | answer |
//! | --- | --- |
//! | `prefill N [DEPTH]` | `{"prefill": N, "depth": D, "seconds": s}` |
//! | `decode N [DEPTH]` | `{"decode": N, "depth": D, "seconds": s}` |
//! | `vision WIDTH HEIGHT` | `{"vision": tokens, "preprocess_s": s, "seconds": s}` |
//! | `quit`, or the end of the input | |
//! | anything else | `{"error": "..."}`, and it goes on |

use std::io::{BufRead, Read};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pocketglm::{
    Cancel, Engine, EngineOptions, Error, GenerateOptions, Message, Model, Part, Picture, Progress, Request,
};
use serde_json::{Value, json};

use super::meter::Meter;
use super::{BenchArgs, step};
use crate::failure::Failure;
use crate::generate::begin;
use crate::output::Out;
use crate::progress::Bars;

/// Longest line of a request.
const LONGEST_LINE: u64 = 200;

/// Stops a generation when its picture has been encoded: the session offers no encoding alone.
#[derive(Clone, Default)]
struct AfterPicture(Arc<Mutex<Option<Cancel>>>);

impl AfterPicture {
    fn set(&self, cancel: Option<Cancel>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = cancel;
    }

    fn hear(&self, progress: Progress) {
        if progress.step == "encode pictures"
            && progress.done == progress.total
            && let Some(cancel) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner)
        {
            cancel.cancel();
        }
    }
}

/// Runs until `quit` or the end of standard input.
pub fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let after = AfterPicture::default();
    let hook = after.clone();
    let start = Instant::now();
    let options = EngineOptions {
        progress: Some(Arc::new(move |progress| hook.hear(progress))),
        ..args.model.options(&Bars::new(true))?
    };
    let model = Model::open_with(&args.model.model, options)?;
    let engine = model.engine();
    let load = start.elapsed().as_secs_f64();
    let mut meter = Meter::new(engine, args.model.context, args.model.memory)?;
    let info = engine.info();
    let mut out = Out::new();
    out.json(&json!({
        "peer": "pocketglm",
        "version": env!("CARGO_PKG_VERSION"),
        "system": engine.device(),
        "model": info.model_type,
        "model_bytes": info.bytes.values().sum::<u64>(),
        "parameters": info.decoder.count + info.head.count + info.vision.count,
        "load_s": load,
        "ready": true,
    }))?;
    let mut input = std::io::stdin().lock();
    loop {
        let mut line = Vec::new();
        input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).map_err(Failure::Input)?;
        if line.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let answer = match Ask::parse(&String::from_utf8_lossy(&line)) {
            Ok(Ask::Quit) => return Ok(ExitCode::SUCCESS),
            Ok(ask) => answer(&ask, engine, &mut meter, args, &after),
            Err(failure) => Err(failure),
        };
        out.json(&answer.unwrap_or_else(|failure| json!({ "error": failure.to_string() })))?;
    }
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
enum Ask {
    Prefill(usize, usize),
    Decode(usize, usize),
    Vision(u32, u32),
    Quit,
}

impl Ask {
    fn parse(line: &str) -> Result<Ask, Failure> {
        let unknown = || Failure::BenchRequest { line: line.trim().chars().take(80).collect() };
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<u32>().map_err(|_| unknown());
        let count = |word: &str| match number(word)? {
            0 => Err(unknown()),
            n => Ok(n as usize),
        };
        match *words.as_slice() {
            ["prefill", n] => Ok(Ask::Prefill(count(n)?, 0)),
            ["prefill", n, depth] => Ok(Ask::Prefill(count(n)?, number(depth)? as usize)),
            ["decode", n] => Ok(Ask::Decode(count(n)?, 0)),
            ["decode", n, depth] => Ok(Ask::Decode(count(n)?, number(depth)? as usize)),
            ["vision", width, height] => Ok(Ask::Vision(number(width)?, number(height)?)),
            ["quit"] => Ok(Ask::Quit),
            _ => Err(unknown()),
        }
    }
}

fn answer(
    ask: &Ask,
    engine: &Engine,
    meter: &mut Meter<'_>,
    args: &BenchArgs,
    after: &AfterPicture,
) -> Result<Value, Failure> {
    match *ask {
        Ask::Prefill(n, depth) => {
            Ok(json!({ "prefill": n, "depth": depth, "seconds": meter.prefill(n, depth)? }))
        }
        Ask::Decode(n, depth) => {
            Ok(json!({ "decode": n, "depth": depth, "seconds": meter.decode(n, depth)? }))
        }
        Ask::Vision(width, height) => {
            let cancel = Cancel::default();
            after.set(Some(cancel.clone()));
            let encoded = vision(engine, args, cancel, (width, height));
            after.set(None);
            encoded
        }
        Ask::Quit => Ok(Value::Null),
    }
}

/// A made-up screenshot through preprocessing and the encoder, in a session that has not seen it.
fn vision(engine: &Engine, args: &BenchArgs, cancel: Cancel, size: (u32, u32)) -> Result<Value, Failure> {
    let pixels = step::screenshot(size, 1)?;
    let picture = Picture::rgb8(size.0 as usize, size.1 as usize, pixels)?;
    let request = Request::Messages(vec![Message::parts("user", vec![Part::Image(picture)])]);
    let start = Instant::now();
    let prompt = engine.prompt(&request)?;
    let preprocess = start.elapsed().as_secs_f64();
    let options = GenerateOptions { max_new_tokens: 1, cancel, ..GenerateOptions::default() };
    let mut session = engine.session();
    let mut answer = begin(&mut session, engine, &prompt, &options, args.model.memory)?;
    // Ends behind the encoder; a failure of the encoder is one of the answer.
    answer.text()?;
    let timings = answer.timings();
    if timings.encoded_pictures != 1 {
        return Err(Error::NoVision { found: 1 }.into());
    }
    Ok(json!({
        "vision": step::picture_tokens(&prompt),
        "preprocess_s": preprocess,
        "seconds": timings.vision.as_secs_f64(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_and_anything_else_is_an_error() {
        assert_eq!(Ask::parse("prefill 512").unwrap(), Ask::Prefill(512, 0));
        assert_eq!(Ask::parse(" decode 64  4096\n").unwrap(), Ask::Decode(64, 4096));
        assert_eq!(Ask::parse("vision 540 1200").unwrap(), Ask::Vision(540, 1200));
        assert_eq!(Ask::parse("quit").unwrap(), Ask::Quit);
        for bad in
            ["", "decode", "decode 0", "decode -1", "decode 1 2 3", "prefill 99999999999", "vision 5", "halt"]
        {
            let error = Ask::parse(bad).unwrap_err().to_string();
            assert!(error.contains("is no request"), "{error}");
        }
    }

    #[test]
    fn a_generation_is_stopped_behind_its_picture_and_nowhere_else() {
        let (after, cancel) = (AfterPicture::default(), Cancel::default());
        let at = |step, done| Progress { step, done, total: 1 };
        after.hear(at("encode pictures", 1));
        after.set(Some(cancel.clone()));
        for progress in [at("load", 1), at("encode pictures", 0), at("read prompt", 1)] {
            after.hear(progress);
            assert!(!cancel.is_cancelled(), "{progress:?}");
        }
        after.hear(at("encode pictures", 1));
        assert!(cancel.is_cancelled());
    }
}
