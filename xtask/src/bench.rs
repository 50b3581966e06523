//! `cargo xtask bench`: how close kernels and whole models come to this machine's limits.
//!
//! A limit and what is held against it are measured in turn, round after round, because the machine is shared and its
//! speed drifts; medians of the rounds and their ratio are what `bench/RESULTS.md` gets. Nobody edits that file.

use std::fmt::Write as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use pocketglm_tensor::{Cpu, Weight, ops, peak};
use serde_json::Value;

use crate::error::io_error;
use crate::{Error, Result, repo};

/// Measure kernels and models against the machine's limits, and write bench/RESULTS.md.
#[derive(clap::Args)]
pub struct Arguments {
    /// Small sizes and one round: shows that everything runs; writes nothing.
    #[arg(long)]
    quick: bool,
    /// Rounds; medians count.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads; 0 takes all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Decoder layers of the synthetic models.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Leave the whole models out.
    #[arg(long)]
    kernels_only: bool,
}

/// One measured line: a rate and the limit measured beside it, both in 1e9 units a second.
struct Line {
    name: String,
    rate: f64,
    limit: f64,
    unit: &'static str,
}

impl Line {
    fn share(&self) -> f64 {
        100.0 * self.rate / self.limit
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let cpu = Cpu::new(arguments.threads)?;
    let rounds = if arguments.quick { 1 } else { arguments.rounds.max(1) };
    let mut text = header(&cpu, rounds);
    let lines = kernels(&cpu, rounds, arguments.quick)?;
    text.push_str("## Kernels\n\nf32 operations against the measured multiply-add peak, bytes against the measured read bandwidth.\n\n");
    text.push_str("| kernel | measured | limit | share |\n| --- | --- | --- | --- |\n");
    for line in &lines {
        let _ = writeln!(
            text,
            "| {} | {:.1} {} | {:.1} | {:.0} % |",
            line.name,
            line.rate,
            line.unit,
            line.limit,
            line.share()
        );
    }
    if !arguments.kernels_only {
        text.push_str(&models(&cpu, rounds, arguments)?);
    }
    repo::print(&text)?;
    if arguments.quick {
        return Ok(());
    }
    let path = repo::root().join("bench/RESULTS.md");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io_error("create", folder))?;
    }
    pocketglm_checkpoint::write_atomic(&path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    repo::print(&format!("written to {}\n", path.display()))
}

fn header(cpu: &Cpu, rounds: usize) -> String {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(repo::root()).output().ok();
        output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default()
    };
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown", |l| l.trim_start_matches([' ', '\t', ':']));
    let dirty =
        if run("git", &["status", "--porcelain"]).is_empty() { "" } else { " with uncommitted changes" };
    format!(
        "# Results\n\nWritten by `cargo xtask bench`; do not edit. Medians of {rounds} rounds in which the limit and the \
         kernel take turns.\n\n* processor: {model}, {} threads, {}\n* commit: {}{dirty}\n* compiler: {}\n\n",
        cpu.threads(),
        cpu.isa(),
        run("git", &["rev-parse", "--short=12", "HEAD"]),
        run("rustc", &["--version"]),
    )
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Alternates a limit and a kernel of `work` (in 1e9 units).
fn alternate(
    rounds: usize,
    work: f64,
    limit: &dyn Fn() -> f64,
    kernel: &mut dyn FnMut() -> Result<()>,
) -> Result<(f64, f64)> {
    kernel()?;
    let (mut limits, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        limits.push(limit());
        let start = Instant::now();
        kernel()?;
        rates.push(work / start.elapsed().as_secs_f64());
    }
    Ok((median(rates), median(limits)))
}

/// Values in -1..1 that no cache or predictor likes.
fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn kernels(cpu: &Cpu, rounds: usize, quick: bool) -> Result<Vec<Line>> {
    let milliseconds = if quick { 2 } else { 20 };
    let flops = || peak::fma_gflops(cpu, milliseconds);
    let buffer = peak::read_buffer(if quick { 1 << 20 } else { 1 << 29 })?;
    let bytes = || peak::read_gbytes(cpu, &buffer);
    let mut lines = Vec::new();
    // The decoder's matrices: gate-up, down, o_proj; rows are outputs.
    let shapes = if quick { vec![(96, 64)] } else { vec![(27_392, 4096), (4096, 13_696), (4096, 4096)] };
    for (n, k) in shapes {
        let f32s = values(n * k);
        let halves: Vec<u16> = f32s.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        for (kind, weight, size) in [("f32", Weight::F32(&f32s), 4), ("bf16", Weight::BF16(&halves), 2)] {
            let parts = [ops::Part { weight, rows: n, bias: None }];
            for m in if quick { vec![1, 20] } else { vec![1, 64, 512] } {
                let (x, mut y) = (values(m * k), vec![0.0; m * n]);
                let mut kernel = || {
                    ops::linear(cpu, &x, m, k, &parts, ops::Epilogue::None, &mut y)?;
                    black_box(&mut y);
                    Ok(())
                };
                let name = format!("linear {kind}, {m} x {k} by {n}");
                let (unit, (rate, limit)) = if m == 1 {
                    ("GB/s", alternate(rounds, (n * k * size) as f64 / 1e9, &bytes, &mut kernel)?)
                } else {
                    let work = 2.0 * m as f64 * n as f64 * k as f64 / 1e9;
                    ("GFLOP/s", alternate(rounds, work, &flops, &mut kernel)?)
                };
                lines.push(Line { name, rate, limit, unit });
            }
        }
    }
    lines.push(attention(cpu, rounds, if quick { 40 } else { 3268 }, &flops)?);
    Ok(lines)
}

/// Attention of one vision block over the patches of a 540x1200 picture.
fn attention(cpu: &Cpu, rounds: usize, t: usize, flops: &dyn Fn() -> f64) -> Result<Line> {
    let (h, d) = (12, 128);
    let (qkv, mut out) = (values(t * 3 * h * d), vec![0.0; t * h * d]);
    let stride = 3 * h * d;
    let mut kernel = || {
        let arguments = ops::Attention {
            q: &qkv,
            q_stride: stride,
            k: &qkv[h * d..],
            k_stride: stride,
            v: &qkv[2 * h * d..],
            v_stride: stride,
            t,
            s: t,
            h,
            kvh: h,
            d,
            scale: 0.088,
            mask: ops::Mask::Full,
            out_stride: h * d,
        };
        ops::attention(cpu, &arguments, &mut out)?;
        black_box(&mut out);
        Ok(())
    };
    let work = 4.0 * (t * t * h * d) as f64 / 1e9;
    let (rate, limit) = alternate(rounds.min(3), work, flops, &mut kernel)?;
    Ok(Line { name: format!("attention, {t} patches, {h} heads of {d}"), rate, limit, unit: "GFLOP/s" })
}

/// A folder that is removed when the bench is done.
struct Work(PathBuf);

impl Drop for Work {
    fn drop(&mut self) {
        // A rest is harmless: the folder is ignored by git, and the next run replaces it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whole models of the true shape with few layers, run by the program itself.
fn models(cpu: &Cpu, rounds: usize, arguments: &Arguments) -> Result<String> {
    let program = build_program()?;
    let work = Work(repo::root().join("target/bench-work"));
    let mut text = String::from("\n## Models\n\n");
    let layers = if arguments.quick { 1 } else { arguments.layers };
    let _ = writeln!(
        text,
        "AutoGLM-Phone-9B's shape with {layers} decoder layers and random weights (`cargo xtask synth`), `pocketglm bench`. \
         Weights read per token are the layers and the head.\n"
    );
    text.push_str("| weights | what | tokens/s | of the limit | |\n| --- | --- | --- | --- | --- |\n");
    let mut memory = String::new();
    let buffer = peak::read_buffer(if arguments.quick { 1 << 20 } else { 1 << 29 })?;
    for dtype in if arguments.quick { vec!["bf16"] } else { vec!["f32", "bf16"] } {
        let _ = std::fs::remove_dir_all(&work.0);
        let vision = if arguments.quick { 1 } else { 2 };
        synthesise(layers, vision, dtype, &work.0)?;
        let size = if dtype == "f32" { 4.0 } else { 2.0 };
        let matrices = layers as f64 * 203_969_024.0 + 151_552.0 * 4096.0;
        let (prompt, new) = if arguments.quick { (8, 2) } else { (512, 32) };
        let (mut prefill, mut decode, mut flops, mut bytes) = (vec![], vec![], vec![], vec![]);
        let mut last = Value::Null;
        for _ in 0..rounds {
            flops.push(peak::fma_gflops(cpu, 20));
            bytes.push(peak::read_gbytes(cpu, &buffer));
            last = bench_once(&program, &work.0, arguments.threads, prompt, new)?;
            prefill.push(number(&last, "prefill_tokens_per_s")?);
            decode.push(number(&last, "decode_tokens_per_s")?);
        }
        let (prefill, decode, flops, bytes) = (median(prefill), median(decode), median(flops), median(bytes));
        // The head is computed for the last token alone.
        let per_token = 2.0 * layers as f64 * 203_969_024.0 / 1e9;
        let _ = writeln!(
            text,
            "| {dtype} | prefill of {prompt} | {prefill:.1} | {:.0} of {flops:.0} GFLOP/s | {:.0} % |",
            prefill * per_token,
            100.0 * prefill * per_token / flops
        );
        let _ = writeln!(
            text,
            "| {dtype} | decode of {new} | {decode:.2} | {:.1} of {bytes:.1} GB/s | {:.0} % |",
            decode * matrices * size / 1e9,
            100.0 * decode * matrices * size / 1e9 / bytes
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
fn synthesise(layers: usize, vision: usize, dtype: &str, out: &Path) -> Result<()> {
    let this = std::env::current_exe().map_err(io_error("find", Path::new("this program")))?;
    let status = Command::new(&this)
        .args(["synth", "autoglm-phone-9b", "--layers", &layers.to_string(), "--dtype", dtype])
        .args(["--vision-layers", &vision.to_string()])
        .arg(out)
        .status()
        .map_err(io_error("run", &this))?;
    if status.success() { Ok(()) } else { Err(failed("cargo xtask synth", &status.to_string())) }
}

fn build_program() -> Result<PathBuf> {
    let root = repo::root();
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--quiet", "-p", "pocketglm-cli"])
        .current_dir(&root)
        .status()
        .map_err(io_error("run cargo in", &root))?;
    if !status.success() {
        return Err(failed("cargo build --release -p pocketglm-cli", &status.to_string()));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release/pocketglm"))
}

fn bench_once(program: &Path, model: &Path, threads: usize, prompt: usize, new: usize) -> Result<Value> {
    let output = Command::new(program)
        .args(["bench", "--json", "--rounds", "1", "--model"])
        .arg(model)
        .args(["--threads", &threads.to_string(), "--prompt-tokens", &prompt.to_string()])
        .args(["--max-new-tokens", &new.to_string()])
        .output()
        .map_err(io_error("run", program))?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| failed("pocketglm bench", String::from_utf8_lossy(&output.stderr).trim()))
}

fn number(json: &Value, field: &str) -> Result<f64> {
    json[field].as_f64().ok_or_else(|| failed("pocketglm bench", &format!("printed no number `{field}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_bench_runs_and_has_a_rate() {
        let cpu = Cpu::new(2).unwrap();
        let lines = kernels(&cpu, 1, true).unwrap();
        assert_eq!(lines.len(), 5);
        assert!(lines.iter().all(|l| l.rate > 0.0 && l.limit > 0.0));
    }

    #[test]
    fn the_median_of_an_odd_number_of_rates_is_one_of_them() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
