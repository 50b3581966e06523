//! What `bench/gpu.sh` measured on machines with a GPU: a table of its files, since those machines are rarely this one.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::error::io_error;
use crate::{Error, Result, repo};

/// llama.cpp of August 2026 on an H200 through CUDA, GLM-4 9B Q4_0 with flash attention: prefill of 512, decode, and decode
/// behind 4096 tokens, in tokens/s. Measured once, in another run, and not by this program.
const PEER: [f64; 3] = [9440.0, 251.0, 235.0];
/// The model of those figures.
const PEER_MODEL: &str = "glm4-9b-q4_0.gguf";

/// The section: one table for each file of `bench/gpu`.
pub fn section() -> Result<String> {
    let folder = repo::root().join("bench/gpu");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .map_err(io_error("read", &folder))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    files.sort();
    let mut text = String::from(
        "`bench/gpu.sh` on machines with a GPU, keys and values in f16; medians of rounds. The copy limit is a large copy in \
         the GPU's memory, measured beside: bytes read and written in a second. A decoded token counts as one reading of the \
         whole file, which includes the embedding table, of which it reads a row.\n\nRatios are against llama.cpp's CUDA \
         backend on an H200 and the same shape and format, measured once in another run: 9,440 tokens/s prefill of 512, 251 \
         decode, 235 behind 4,096 tokens.\n",
    );
    for file in &files {
        text.push_str(&table(file)?);
    }
    Ok(text)
}

fn table(path: &Path) -> Result<String> {
    let wrong = |found: String| Error::Content {
        place: path.display().to_string(),
        wanted: "lines that bench/gpu.sh wrote".into(),
        found,
    };
    let lines: Vec<Value> = repo::read(path)?
        .lines()
        .map(|l| serde_json::from_str(l).map_err(|e| wrong(format!("{l}: {e}"))))
        .collect::<Result<_>>()?;
    let device = lines.first().and_then(|l| l["result"]["device"].as_str()).unwrap_or("a GPU");
    let mut text = format!("\n### {device}\n\n| model | what | measured | ratio | of the copy limit |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for line in &lines {
        let (model, result) = (line["model"].as_str().unwrap_or("?"), &line["result"]);
        let number = |v: &Value| v.as_f64();
        let bytes = number(&line["bytes"]).unwrap_or(0.0);
        let share = |rate: f64| match number(&result["copy_bytes_per_s"]) {
            Some(limit) => format!("{:.0} % of {:.0} GB/s", 100.0 * bytes * rate / limit, limit / 1e9),
            None => String::new(),
        };
        let ratio = |rate: f64, peer: f64| match model {
            PEER_MODEL => format!("{:.2}", rate / peer),
            _ => String::new(),
        };
        let mut row = |what: &str, measured: String, ratio: String, share: String| {
            let _ = writeln!(text, "| {model} | {what} | {measured} | {ratio} | {share} |");
        };
        if let Some(parts) = result["parts"].as_object() {
            let screen = &result["screen"];
            for (part, measured) in parts {
                let seconds = number(&measured["seconds"]).unwrap_or(f64::NAN);
                let what = format!("step {}x{}: {part}", screen[0], screen[1]);
                row(&what, format!("{:.1} ms", seconds * 1e3), String::new(), String::new());
            }
            continue;
        }
        let decode = number(&result["decode_tokens_per_s"]).unwrap_or(f64::NAN);
        let tokens = |rate: f64| format!("{rate:.1} tokens/s");
        if let Some(depth) = result["depth"].as_u64() {
            row(&format!("decode behind {depth}"), tokens(decode), ratio(decode, PEER[2]), share(decode));
            continue;
        }
        let prefill = number(&result["prefill_tokens_per_s"]).unwrap_or(f64::NAN);
        let n = result["prompt_tokens"].as_u64().unwrap_or(0);
        row(&format!("prefill of {n}"), tokens(prefill), ratio(prefill, PEER[0]), String::new());
        row("decode", tokens(decode), ratio(decode, PEER[1]), share(decode));
    }
    Ok(text)
}
