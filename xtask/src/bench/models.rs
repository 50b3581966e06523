//! Whole models, run by the program itself.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use pocketglm_checkpoint::{Checkpoint, OpenOptions};
use pocketglm_tensor::{Cpu, WeightSource, peak};
use serde_json::Value;

use super::measure::median;
use crate::error::io_error;
use crate::{Error, Result, repo};

/// A folder that is removed when the bench is done.
pub struct Work(pub PathBuf);

impl Work {
    /// An empty folder below `target`.
    pub fn new(name: &str) -> Result<Work> {
        let work = Work(repo::root().join("target/bench-work").join(name));
        let _ = std::fs::remove_dir_all(&work.0);
        std::fs::create_dir_all(&work.0).map_err(io_error("create", &work.0))?;
        Ok(work)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // A rest is harmless: the folder is ignored by git, and the next run replaces it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a token costs at least.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Values of the matrices of the decoder's layers.
    pub layers: f64,
    /// Those that a prefill multiplies every token with: of the last layer q, k and v alone.
    pub prefill: f64,
    /// Bytes of these, as stored.
    pub layer_bytes: f64,
    /// Bytes of these and of the head, as stored: what decoding reads for each token.
    pub read: f64,
}

impl Cost {
    /// Whether the layers are stored in bytes or less, and computed in integers.
    pub fn is_quantised(&self) -> bool {
        self.layer_bytes < 1.5 * self.layers
    }
}

/// The cost of a token, from the tensors of a checkpoint.
pub fn cost(model: &Path) -> Result<Cost> {
    let checkpoint = Checkpoint::open(model, &OpenOptions::default())?;
    let tensors = checkpoint.tensors();
    let is_head = |name: &str| name.ends_with("lm_head.weight");
    let tied = !tensors.iter().any(|t| is_head(&t.name));
    let layer_of = |name: &str| {
        let number = name.split_once("layers.")?.1.split('.').next()?;
        number.parse::<usize>().ok()
    };
    let last = tensors.iter().filter(|t| !t.name.contains("visual.")).filter_map(|t| layer_of(&t.name)).max();
    let mut cost = Cost { layers: 0.0, prefill: 0.0, layer_bytes: 0.0, read: 0.0 };
    for t in tensors.iter().filter(|t| t.shape.len() == 2 && !t.name.contains("visual.")) {
        let layer = t.name.contains("layers.");
        if layer {
            cost.layers += t.elements() as f64;
            let for_keys = ["q_proj.", "k_proj.", "v_proj."].iter().any(|part| t.name.contains(part));
            if for_keys || layer_of(&t.name) != last {
                cost.prefill += t.elements() as f64;
            }
            cost.layer_bytes += t.bytes() as f64;
        }
        if layer || is_head(&t.name) || tied && t.name.ends_with("embed_tokens.weight") {
            cost.read += t.bytes() as f64;
        }
    }
    Ok(cost)
}

/// The section of the report.
pub fn section(cpu: &Cpu, rounds: usize, arguments: &super::Arguments) -> Result<String> {
    let program = build_program()?;
    let (quick, layers) = (arguments.quick, arguments.layers);
    let mut text = if quick {
        String::from("A golden checkpoint of the tests, `pocketglm bench`.\n\n")
    } else {
        format!(
            "AutoGLM-Phone-9B's shape with {layers} decoder layers and random weights (`cargo xtask synth`), \
             `pocketglm bench`. Weights read per token are the layers and the head.\n\n"
        )
    };
    text.push_str("| weights | what | tokens/s | of the limit | |\n| --- | --- | --- | --- | --- |\n");
    let mut memory = String::new();
    let buffer = peak::read_buffer(if quick { 1 << 20 } else { 1 << 29 })?;
    for dtype in if quick { vec!["f32"] } else { vec!["f32", "bf16"] } {
        let work = Work::new("synthetic")?;
        let model = if quick { repo::root().join("tests/golden/default") } else { work.0.join("model") };
        if !quick {
            synthesise(layers, 2, dtype, &model)?;
        }
        let cost = cost(&model)?;
        let (prompt, new) = if quick { (8, 2) } else { (512, 32) };
        let (mut prefill, mut decode, mut flops, mut bytes) = (vec![], vec![], vec![], vec![]);
        let mut last = Value::Null;
        for _ in 0..rounds {
            flops.push(peak::fma_gflops(cpu, if quick { 2 } else { 20 }));
            bytes.push(peak::read_gbytes(cpu, &buffer));
            last = bench_once(&program, &model, arguments.threads, prompt, new)?;
            prefill.push(number(&last, "prefill_tokens_per_s")?);
            decode.push(number(&last, "decode_tokens_per_s")?);
        }
        let (prefill, decode, flops, bytes) = (median(prefill), median(decode), median(flops), median(bytes));
        // The head and most of the last layer are computed for the last token alone.
        let per_token = 2.0 * cost.prefill / 1e9;
        let _ = writeln!(
            text,
            "| {dtype} | prefill of {prompt} | {prefill:.1} | {:.0} of {flops:.0} GFLOP/s | {:.0} % |",
            prefill * per_token,
            100.0 * prefill * per_token / flops
        );
        let _ = writeln!(
            text,
            "| {dtype} | decode of {new} | {decode:.2} | {:.1} of {bytes:.1} GB/s | {:.0} % |",
            decode * cost.read / 1e9,
            100.0 * decode * cost.read / 1e9 / bytes
        );
        let (peak, planned) = (number(&last, "peak_memory_bytes")?, number(&last, "planned_memory_bytes")?);
        let _ = writeln!(
            memory,
            "| {dtype} | {:.1} MB | {:.1} MB | {:+.1} % | {:.3} s |",
            planned / 1e6,
            peak / 1e6,
            100.0 * (peak / planned - 1.0),
            number(&last, "load_s")?
        );
    }
    text.push_str("\n| weights | planned | peak | difference | load |\n| --- | --- | --- | --- | --- |\n");
    text.push_str(&memory);
    Ok(text)
}

fn failed(command: &str, what: &str) -> Error {
    Error::Command { command: command.into(), what: format!("failed: {what}") }
}

/// Writes a synthetic checkpoint, as a user of `cargo xtask synth` would.
pub fn synthesise(layers: usize, vision: usize, dtype: &str, out: &Path) -> Result<()> {
    let this = std::env::current_exe().map_err(io_error("find", Path::new("this program")))?;
    repo::run(
        Command::new(&this)
            .args(["synth", "autoglm-phone-9b", "--layers", &layers.to_string(), "--dtype", dtype])
            .args(["--vision-layers", &vision.to_string()])
            .arg(out),
    )
}

/// The program `pocketglm`, optimised as this one is.
pub fn build_program() -> Result<PathBuf> {
    let mut cargo = repo::cargo();
    cargo.args(["build", "--quiet", "--message-format=json", "-p", "pocketglm-cli"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let messages = repo::output_of(&mut cargo)?;
    String::from_utf8_lossy(&messages)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "pocketglm")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| failed("cargo build -p pocketglm-cli", "it names no program `pocketglm`"))
}

fn bench_once(program: &Path, model: &Path, threads: usize, prompt: usize, new: usize) -> Result<Value> {
    let mut command = Command::new(program);
    command
        .args(["bench", "--json", "--rounds", "1", "--model"])
        .arg(model)
        .args(["--threads", &threads.to_string(), "--prompt-tokens", &prompt.to_string()])
        .args(["--max-new-tokens", &new.to_string()]);
    let output = repo::output_of(&mut command)?;
    serde_json::from_slice(&output).map_err(|_| failed("pocketglm bench", "it printed no JSON"))
}

fn number(json: &Value, field: &str) -> Result<f64> {
    json[field].as_f64().ok_or_else(|| failed("pocketglm bench", &format!("it printed no number `{field}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_costs_the_matrices_of_the_layers_and_the_head() {
        let golden = |name: &str| repo::root().join("tests/golden").join(name);
        let cost = |name: &str| cost(&golden(name)).unwrap();
        // 101,376 values in the layers' matrices and a head of 1024 x 64, in f32.
        let plain = cost("default");
        assert_eq!((plain.layers, plain.read), (101_376.0, 4.0 * (101_376.0 + 65_536.0)));
        // Two of the three layers, and q, k and v of the last.
        assert_eq!(plain.prefill, 2.0 * 33_792.0 + 8_192.0);
        // A head of its own, and the embedding table in its place: 352 x 32 in bf16.
        for name in ["bf16", "tied"] {
            let half = cost(name);
            assert!(!half.is_quantised());
            assert_eq!((half.layers, half.read), (13_824.0, 2.0 * (13_824.0 + 11_264.0)), "{name}");
        }
        let gguf = cost("gguf/text.gguf");
        assert!(gguf.layers > 0.0 && gguf.read > gguf.layers / 2.0, "{gguf:?}");
    }
}
