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
    Ok(render(&lines))
}

fn render(lines: &[Value]) -> String {
    let device = lines.first().and_then(|l| l["result"]["device"].as_str()).unwrap_or("a GPU");
    let mut text = format!("\n### {device}\n\n| model | what | measured | ratio | of the copy limit |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for line in lines {
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
    let per_op: Vec<String> = lines.iter().filter_map(per_op).collect();
    if !per_op.is_empty() {
        text.push_str(PER_OP);
    }
    per_op.iter().for_each(|table| text.push_str(table));
    text
}

/// What the tables of ops say.
const PER_OP: &str = "\nWhat takes the time: ops of one kind in all layers, each dispatch timed by itself on the GPU, in a round of its \
own. Bytes are those of all operands moved once, weights as the GPU holds them; what is moved again, or is in a cache, is not \
known. A share of a limit is bytes or operations in a second over what a copy, and registers alone, were measured to do. Ops \
below 1 % of the time are left out.\n";

/// The ops of one measurement, where they were timed.
fn per_op(line: &Value) -> Option<String> {
    let result = &line["result"];
    let (model, per_op) = (line["model"].as_str().unwrap_or("?"), &result["per_op"]);
    let gigabytes =
        per_op["copy_bytes_per_s"].as_f64().map_or("not measured".into(), |r| format!("{:.0} GB/s", r / 1e9));
    let peaks = per_op["operations_per_s"].as_object().into_iter().flatten();
    let peaks: Vec<String> = peaks
        .map(|(kind, r)| format!("{kind} {:.1} TFLOP/s", r.as_f64().unwrap_or(f64::NAN) / 1e12))
        .collect();
    let mut text = String::new();
    for program in per_op["programs"].as_array()? {
        let name = program["program"].as_str().unwrap_or("?");
        // The checkpoint of a screenshot has a decoder cut short.
        if result["parts"].is_object() && name != "vision" {
            continue;
        }
        // The prompt of a deep context comes before what is measured.
        let what = match (name, result["depth"].as_u64()) {
            ("decode", Some(depth)) => format!("decode behind {depth}"),
            (_, Some(_)) => continue,
            ("prefill", None) => format!("prefill of {}", result["prompt_tokens"]),
            _ => name.to_owned(),
        };
        let total = program["seconds"].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(
            text,
            "\n{model}, {what}: {:.3} ms in ops; copy {gigabytes}, {}\n\n| op and block | kernels | ops | ms | of the time | MB | GFLOP | of \
             the copy limit | of the arithmetic limit |\n| --- | --- | --: | --: | --: | --: | --: | --: | --- |",
            total * 1e3,
            peaks.join(", ")
        );
        for row in program["rows"].as_array()? {
            let number = |key: &str| row[key].as_f64();
            let seconds = number("seconds").unwrap_or(f64::NAN);
            if seconds < 0.01 * total {
                continue;
            }
            let share =
                |key: &str| number(key).map_or("not measured".into(), |s| format!("{:.0} %", 100.0 * s));
            let mut kernels: Vec<&str> =
                row["kernels"].as_array()?.iter().filter_map(Value::as_str).collect();
            kernels.iter_mut().for_each(|k| *k = k.split([' ', '.']).next().unwrap_or(k));
            kernels.dedup();
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.3} | {:.0} % | {:.1} | {:.2} | {} | {} of {} |",
                row["op"].as_str().unwrap_or("?"),
                kernels.join(", "),
                row["ops"],
                seconds * 1e3,
                100.0 * seconds / total,
                number("bytes").unwrap_or(f64::NAN) / 1e6,
                number("operations").unwrap_or(f64::NAN) / 1e9,
                share("copy_share"),
                share("arithmetic_share"),
                row["arithmetic"].as_str().unwrap_or("?")
            );
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(result: Value) -> Value {
        json!({"model": "m.gguf", "bytes": 5e9, "result": result})
    }

    #[test]
    fn files_without_ops_and_with_them_are_rendered() {
        let old = json!({"device": "gpu X", "prompt_tokens": 512, "decode_tokens_per_s": 300.0,
            "prefill_tokens_per_s": 7000.0, "copy_bytes_per_s": 4e12});
        let without = render(&[line(old.clone())]);
        assert!(
            without.contains("| m.gguf | decode | 300.0 tokens/s |") && !without.contains("op and block")
        );
        let mut new = old;
        let row = |op: &str, seconds: f64| {
            json!({"op": op, "kernels": ["matvec_q.wgsl WG=1", "matvec_q.wgsl WG=2"], "ops": 40, "dispatches": 40,
                "seconds": seconds, "bytes": 4e9, "operations": 16e9, "copy_share": 0.5, "arithmetic": "packed bytes",
                "arithmetic_share": null})
        };
        let rows = [row("linear layers.*", 2e-3), row("scale", 1e-6)];
        new["per_op"] = json!({"copy_bytes_per_s": 4e12, "operations_per_s": {"f32": 6e13},
            "programs": [{"program": "decode", "runs": 9, "seconds": 2.001e-3, "rows": rows}]});
        let with = render(&[line(new)]);
        assert!(with.starts_with(&without), "{with}");
        for wanted in [
            "m.gguf, decode: 2.001 ms in ops; copy 4000 GB/s, f32 60.0 TFLOP/s",
            "| linear layers.* | matvec_q | 40 | 2.000 | 100 % | 4000.0 | 16.00 | 50 % | not measured of packed bytes |",
        ] {
            assert!(with.contains(wanted), "{wanted} in\n{with}");
        }
        assert!(!with.contains("| scale |"));
    }

    #[test]
    fn a_backend_that_times_nothing_gives_no_table() {
        let absent =
            json!({"device": "cpu", "depth": 4096, "decode_tokens_per_s": 3.0, "per_op": {"absent": "why"}});
        assert!(!render(&[line(absent)]).contains("op and block"));
    }
}
