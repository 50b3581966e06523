//! `peers`: runs llama.cpp on the files that pocketglm runs, so that both can be measured and compared.
//!
//! Knows nothing of pocketglm's crates. Start at [`Command`]; [`llama`] holds all calls of llama.cpp.
//!
//! Invariant: stdout carries results only, one JSON object a line; llama.cpp's warnings go to stderr.

mod llama;

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand, ValueEnum};
use llama_cpp_sys_2 as sys;
use serde_json::{Map, Value, json};

use crate::llama::{Model, Session, Settings, Vision};

/// The package that bundles llama.cpp; Cargo.toml pins it.
const PACKAGE: &str = "llama-cpp-sys-2 0.1.161";

/// What can go wrong here. llama.cpp gives its own reasons on stderr.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{0}: a path without a zero byte was wanted")]
    Path(PathBuf),
    #[error("{0}: llama.cpp could not load this file")]
    Load(PathBuf),
    #[error("llama.cpp could not make a context of this size and number of threads")]
    Context,
    #[error("1 to {context} tokens in all were wanted, found {n} behind {depth}")]
    Length { n: usize, depth: usize, context: usize },
    #[error("token ids from 0 to below {vocabulary} were wanted, found {id}")]
    Id { id: i32, vocabulary: usize },
    #[error("llama.cpp could not run the batch: code {0}")]
    Decode(i32),
    #[error("picture: {0}")]
    Picture(&'static str),
    #[error("one of {known} was wanted as the format, found {name}")]
    Format { name: String, known: String },
    #[error("{0}: llama.cpp could not quantise this file")]
    Quantize(PathBuf),
    #[error("{0}: a new file was wanted, this one exists")]
    Exists(PathBuf),
    #[error(
        "`prefill N [DEPTH]`, `decode N [DEPTH]`, `vision WIDTH HEIGHT` or `quit` was wanted, found `{0}`"
    )]
    Request(String),
    #[error("could not read or write {0}: {1}")]
    File(PathBuf, std::io::Error),
}

/// Result of this program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Runs llama.cpp on the files that pocketglm runs.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time prefill and decode, as llama-bench does.
    Bench {
        #[command(flatten)]
        engine: Engine,
        /// Tokens of the prefill.
        #[arg(long, default_value_t = 512)]
        prompt: usize,
        /// Tokens to decode.
        #[arg(long, default_value_t = 64)]
        decode: usize,
        /// Tokens in the cache before either begins.
        #[arg(long, default_value_t = 0)]
        depth: usize,
        /// One round beforehand that does not count.
        #[arg(long)]
        warmup: bool,
        /// Rounds.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// A JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Keep a model resident and time what stdin asks for: `prefill N [DEPTH]`, `decode N [DEPTH]`, `vision W H`, `quit`.
    Serve {
        #[command(flatten)]
        engine: Engine,
        /// Room in the cache, in tokens.
        #[arg(long, default_value_t = 1024)]
        context: u32,
        /// The vision encoder, for `vision`.
        #[arg(long)]
        mmproj: Option<PathBuf>,
    },
    /// Write a GGUF file in another format with llama.cpp's own quantiser.
    Quantize {
        /// An F32, F16 or BF16 file.
        #[arg(long = "in")]
        input: PathBuf,
        /// The new file.
        #[arg(long)]
        out: PathBuf,
        /// Q8_0, Q4_0, Q4_K (medium mixture), Q2_K ...
        #[arg(long = "type")]
        format: String,
        /// Give every matrix this format instead of llama.cpp's mixture.
        #[arg(long)]
        pure: bool,
        /// Threads; 0 takes all.
        #[arg(long, default_value_t = 0)]
        threads: u32,
    },
    /// Write the logits after every token of a prompt as safetensors, `logits` [tokens, vocabulary].
    Logits {
        #[command(flatten)]
        engine: Engine,
        /// Token ids, separated by commas.
        #[arg(long, value_delimiter = ',', required = true)]
        ids: Vec<i32>,
        /// The safetensors file.
        #[arg(long)]
        out: PathBuf,
    },
    /// Encode a picture of noise, and write its embeddings where wanted.
    Vision {
        #[command(flatten)]
        engine: Engine,
        /// The vision encoder.
        #[arg(long)]
        mmproj: PathBuf,
        /// Size in pixels.
        #[arg(long, default_value = "540x1200")]
        size: String,
        /// Rounds.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// RGB bytes, row after row, instead of noise.
        #[arg(long)]
        pixels: Option<PathBuf>,
        /// A safetensors file for `embeddings` [tokens, width].
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

/// The options of every command that runs a model.
#[derive(Args)]
struct Engine {
    /// The text model, a GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// Threads; 0 takes all.
    #[arg(long, default_value_t = 0)]
    threads: u32,
    /// Fused attention.
    #[arg(long)]
    flash_attn: bool,
    /// Format of the KV cache.
    #[arg(long, value_enum, default_value_t = Kv::F16)]
    kv: Kv,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kv {
    #[value(name = "f16")]
    F16,
    #[value(name = "q8_0")]
    Q8,
}

fn threads(wanted: u32) -> u32 {
    let all = || std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    if wanted == 0 { all() } else { wanted }
}

impl Engine {
    fn settings(&self, context: usize) -> Result<Settings> {
        let kv = if self.kv == Kv::Q8 { sys::GGML_TYPE_Q8_0 } else { sys::GGML_TYPE_F16 };
        let context = u32::try_from(context).map_err(|_| Error::Context)?;
        Ok(Settings { threads: threads(self.threads), context, flash_attention: self.flash_attn, kv })
    }

    /// What every answer about this model says first.
    fn facts(&self, model: &Model, load: f64) -> Map<String, Value> {
        let facts = json!({
            "peer": "llama.cpp",
            "version": llama::version(),
            "package": PACKAGE,
            "system": llama::system(),
            "model": model.description(),
            "model_bytes": model.bytes(),
            "parameters": model.parameters(),
            "threads": threads(self.threads),
            "flash_attn": self.flash_attn,
            "kv": if self.kv == Kv::Q8 { "q8_0" } else { "f16" },
            "load_s": load,
        });
        if let Value::Object(facts) = facts { facts } else { Map::new() }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    llama::start();
    match command {
        Command::Bench { engine, prompt, decode, depth, warmup, rounds, json } => {
            bench(&engine, prompt, decode, depth, warmup, rounds.max(1), json)
        }
        Command::Serve { engine, context, mmproj } => serve(&engine, context, mmproj.as_deref()),
        Command::Quantize { input, out, format, pure, threads: wanted } => {
            let format = llama::format(&format)?;
            if out.exists() {
                return Err(Error::Exists(out));
            }
            let start = Instant::now();
            llama::quantize(&input, &out, format, threads(wanted), pure).inspect_err(|_| {
                // What llama.cpp leaves of a failed run is no model; it did not exist before.
                let _ = std::fs::remove_file(&out);
            })?;
            let bytes = std::fs::metadata(&out).map_err(|e| Error::File(out, e))?.len();
            answer(&json!({ "seconds": start.elapsed().as_secs_f64(), "bytes": bytes }))
        }
        Command::Logits { engine, ids, out } => {
            let model = Model::open(&engine.model)?;
            let logits = Session::new(&model, engine.settings(ids.len())?)?.logits(&ids)?;
            save(&out, "logits", &logits, [ids.len(), model.vocabulary])
        }
        Command::Vision { engine, mmproj, size, rounds, pixels, out } => {
            let pair = size.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
            let (width, height) = pair.ok_or(Error::Picture("a size like 540x1200 was wanted"))?;
            let pixels = match pixels {
                Some(path) => std::fs::read(&path).map_err(|e| Error::File(path, e))?,
                None => noise(width, height),
            };
            let start = Instant::now();
            let model = Model::open(&engine.model)?;
            let mut vision = Vision::open(&mmproj, &model, engine.settings(1)?)?;
            let mut facts = engine.facts(&model, start.elapsed().as_secs_f64());
            let (mut preprocess, mut encode) = (Vec::new(), Vec::new());
            for round in 0..rounds.max(1) {
                let encoded = vision.encode(width, height, &pixels)?;
                preprocess.push(encoded.preprocess);
                encode.push(encoded.encode);
                facts.insert("tokens".into(), encoded.tokens.into());
                if let (0, Some(out)) = (round, &out) {
                    save(
                        out,
                        "embeddings",
                        &encoded.rows,
                        [encoded.tokens, encoded.rows.len() / encoded.tokens],
                    )?;
                }
            }
            facts.insert("preprocess_s".into(), preprocess.into());
            facts.insert("encode_s".into(), encode.into());
            answer(&facts.into())
        }
    }
}

fn bench(
    engine: &Engine,
    prompt: usize,
    decode: usize,
    depth: usize,
    warmup: bool,
    rounds: usize,
    as_json: bool,
) -> Result<()> {
    let context = prompt.max(decode).saturating_add(depth);
    let start = Instant::now();
    let model = Model::open(&engine.model)?;
    let mut session = Session::new(&model, engine.settings(context)?)?;
    let mut facts = engine.facts(&model, start.elapsed().as_secs_f64());
    if warmup {
        session.prefill(prompt, 0)?;
        session.generate(1, 0)?;
    }
    // All prefills first: a decode after a prefill keeps the cache's first `depth` tokens, and need not compute them anew.
    let prefills = (0..rounds).map(|_| session.prefill(prompt, depth)).collect::<Result<Vec<f64>>>()?;
    let decodes = (0..rounds).map(|_| session.generate(decode, depth)).collect::<Result<Vec<f64>>>()?;
    let (prefill_rate, decode_rate) =
        (prompt as f64 / median(prefills.clone()), decode as f64 / median(decodes.clone()));
    if !as_json {
        println!("{}, {} threads: {}", facts["model"], facts["threads"], facts["system"]);
        println!("prefill of {prompt} behind {depth}: {prefill_rate:.2} tokens/s");
        println!("decode of {decode} behind {depth}: {decode_rate:.2} tokens/s");
        return Ok(());
    }
    let measured = [
        ("prompt", json!(prompt)),
        ("decode", json!(decode)),
        ("depth", json!(depth)),
        ("prefill_s", json!(prefills)),
        ("decode_s", json!(decodes)),
        ("prefill_tokens_per_s", json!(prefill_rate)),
        ("decode_tokens_per_s", json!(decode_rate)),
        ("peak_memory_bytes", json!(peak_memory())),
    ];
    facts.extend(measured.map(|(name, value)| (name.to_owned(), value)));
    answer(&facts.into())
}

/// One request of `serve`.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Prefill(usize, usize),
    Decode(usize, usize),
    Vision(u32, u32),
    Quit,
}

fn request(line: &str) -> Result<Request> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unknown = || Error::Request(line.trim().chars().take(80).collect());
    let number = |word: &str| word.parse::<u32>().map_err(|_| unknown());
    match *words.as_slice() {
        ["prefill", n] => Ok(Request::Prefill(number(n)? as usize, 0)),
        ["prefill", n, depth] => Ok(Request::Prefill(number(n)? as usize, number(depth)? as usize)),
        ["decode", n] => Ok(Request::Decode(number(n)? as usize, 0)),
        ["decode", n, depth] => Ok(Request::Decode(number(n)? as usize, number(depth)? as usize)),
        ["vision", width, height] => Ok(Request::Vision(number(width)?, number(height)?)),
        ["quit"] => Ok(Request::Quit),
        _ => Err(unknown()),
    }
}

fn serve(engine: &Engine, context: u32, mmproj: Option<&Path>) -> Result<()> {
    let start = Instant::now();
    let model = Model::open(&engine.model)?;
    let settings = engine.settings(context as usize)?;
    let mut session = Session::new(&model, settings)?;
    let mut vision = mmproj.map(|path| Vision::open(path, &model, settings)).transpose()?;
    let mut facts = engine.facts(&model, start.elapsed().as_secs_f64());
    facts.insert("ready".into(), true.into());
    answer(&facts.into())?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::File("stdin".into(), e))?;
        let answered = request(&line).and_then(|request| match request {
            Request::Prefill(n, depth) => {
                Ok(Some(json!({ "prefill": n, "depth": depth, "seconds": session.prefill(n, depth)? })))
            }
            Request::Decode(n, depth) => {
                Ok(Some(json!({ "decode": n, "depth": depth, "seconds": session.generate(n, depth)? })))
            }
            Request::Vision(width, height) => {
                let vision = vision.as_mut().ok_or(Error::Picture("--mmproj was wanted at the start"))?;
                let encoded = vision.encode(width, height, &noise(width, height))?;
                let (tokens, preprocess) = (encoded.tokens, encoded.preprocess);
                Ok(Some(json!({ "vision": tokens, "preprocess_s": preprocess, "seconds": encoded.encode })))
            }
            Request::Quit => Ok(None),
        });
        match answered {
            Ok(Some(seconds)) => answer(&seconds)?,
            Ok(None) => break,
            Err(error) => answer(&json!({ "error": error.to_string() }))?,
        }
    }
    Ok(())
}

/// One line on stdout, at once: who drives `serve` waits for it.
fn answer(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).map_err(|e| Error::File("stdout".into(), e))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// RGB noise, the same in every run; a size beyond any screen gives nothing.
fn noise(width: u32, height: u32) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let bytes = 3 * u64::from(width) * u64::from(height);
    if bytes > 1 << 28 { Vec::new() } else { (0..bytes).map(&mut next).collect() }
}

/// The most memory that this process has held, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// A safetensors file of one f32 tensor.
fn save(path: &Path, name: &str, values: &[f32], shape: [usize; 2]) -> Result<()> {
    let failed = |e| Error::File(path.into(), e);
    let mut head = json!({ name: { "dtype": "F32", "shape": shape, "data_offsets": [0, values.len() * 4] } })
        .to_string();
    // The data begins at a multiple of eight bytes.
    head.push_str(&" ".repeat(head.len().next_multiple_of(8) - head.len()));
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).map_err(failed)?);
    file.write_all(&(head.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(head.as_bytes()).map_err(failed)?;
    values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes())).map_err(failed)?;
    file.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reported_package_is_the_pinned_one() {
        let (name, version) = PACKAGE.split_once(' ').unwrap();
        assert!(include_str!("../Cargo.toml").contains(&format!("{name} = {{ version = \"={version}\"")));
    }

    #[test]
    fn requests_are_read_and_anything_else_is_an_error() {
        assert_eq!(request("prefill 512").unwrap(), Request::Prefill(512, 0));
        assert_eq!(request(" decode 64  4096\n").unwrap(), Request::Decode(64, 4096));
        assert_eq!(request("vision 540 1200").unwrap(), Request::Vision(540, 1200));
        assert_eq!(request("quit").unwrap(), Request::Quit);
        for bad in ["", "decode", "decode -1", "decode 1 2 3", "prefill 99999999999", "vision 540", "halt"] {
            assert!(matches!(request(bad), Err(Error::Request(_))), "{bad}");
        }
    }

    #[test]
    fn a_k_format_without_a_mixture_means_the_medium_one_and_an_unknown_format_is_refused() {
        assert_eq!(llama::format("Q4_K").unwrap(), llama::format("Q4_K_M").unwrap());
        assert_ne!(llama::format("Q4_K").unwrap(), llama::format("Q4_K_S").unwrap());
        assert!(matches!(llama::format("Q9_0"), Err(Error::Format { .. })));
    }

    #[test]
    fn a_saved_tensor_has_a_header_of_its_length_and_its_values_behind_it() {
        let path = std::env::temp_dir().join(format!("peers-{}.safetensors", std::process::id()));
        save(&path, "logits", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let head = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(head % 8, 0);
        let header: Value = serde_json::from_slice(&bytes[8..8 + head]).unwrap();
        assert_eq!(header["logits"]["shape"], json!([2, 3]));
        assert_eq!(bytes.len(), 8 + head + 24);
        assert_eq!(f32::from_le_bytes(bytes[8 + head + 20..].try_into().unwrap()), 6.0);
    }

    #[test]
    fn the_median_of_an_odd_number_of_rounds_is_one_of_them() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn a_missing_file_is_an_error_and_not_a_crash() {
        llama::start();
        assert!(matches!(Model::open(Path::new("no-such-file.gguf")), Err(Error::Load(_))));
    }
}
