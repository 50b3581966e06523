//! Files: how long quantising takes beside moving the bytes, and how soon a `.pglm` answers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pocketglm_tensor::{Cpu, peak};

use super::measure::{Sides, median};
use super::models::{Work, build_program, synthesise};
use super::peer::{Side, first_token};
use crate::error::io_error;
use crate::{Result, repo};

/// Operations for each weight of plain rounding to 4 bits in groups: magnitude, maximum, product, rounding, two for the
/// range, zero point, and the place in the byte.
const OPERATIONS: f64 = 8.0;
/// The share of the peak at which these count.
const SHARE: f64 = 0.5;
/// Starts of the program that count.
const STARTS: usize = 5;
/// Bytes that a copy moves at a time.
const STEP: usize = 8 << 20;

/// The section of the report.
pub fn section(cpu: &Cpu, rounds: usize, arguments: &super::Arguments) -> Result<String> {
    let program = build_program()?;
    let work = Work::new("files")?;
    let model =
        if arguments.quick { repo::root().join("tests/golden/default") } else { work.0.join("model") };
    if !arguments.quick {
        synthesise(arguments.layers, 24, "bf16", &model)?;
    }
    let inputs = weights(&model)?;
    let read: u64 = inputs.iter().map(|(_, bytes)| bytes).sum();
    let (output, copy) = (work.0.join("model.pglm"), work.0.join("copy"));
    let (mut sides, mut arithmetic, mut searching) = (Sides::default(), Vec::new(), Vec::new());
    let mut written = 0;
    // The other method that needs no calibration comes first: the file of plain rounding is used below.
    let quantise = |method: &str| -> Result<f64> {
        let _ = std::fs::remove_file(&output);
        let mut command = Command::new(&program);
        command.args(["quantize", "--policy", "int4", "--method", method, "--threads"]);
        command.arg(cpu.threads().to_string()).arg("--model").arg(&model).arg("--out").arg(&output);
        let start = Instant::now();
        repo::output_of(&mut command)?;
        Ok(start.elapsed().as_secs_f64())
    };
    for _ in 0..rounds.max(1) {
        // The peak counts a product and a sum for each lane; these operations are one each.
        let peak = peak::fma_gflops(cpu, if arguments.quick { 2 } else { 20 }) / 2.0 * 1e9;
        // A weight takes two bytes here, four in the test's checkpoint.
        let count = read as f64 / if arguments.quick { 4.0 } else { 2.0 };
        arithmetic.push(OPERATIONS * count / (peak * SHARE));
        searching.push(quantise("search")?);
        let length = |file: &Path| std::fs::metadata(file).map(|m| m.len()).map_err(io_error("read", file));
        let as_long = length(&output)?;
        // No two results are there at once: a disk that holds the input has little room left.
        std::fs::remove_file(&output).map_err(io_error("remove", &output))?;
        sides.push(false, moved(&inputs, as_long, &copy)?);
        sides.push(true, quantise("round")?);
        written = length(&output)?;
    }
    let (ours, bytes, sums) =
        (median(sides.ours.clone()), median(sides.theirs.clone()), median(arithmetic.clone()));
    let by_round = |at: usize| sides.ours[at] / (sides.theirs[at] + arithmetic[at]);
    let ratios: Vec<f64> = (0..sides.ours.len()).map(by_round).collect();
    let mut text = format!(
        "`pocketglm quantize --policy int4 --method round` of {:.2} GB of bf16 weights with random values ({layers}), and a program that only reads as many \
         bytes and writes those of the result, with fsync, in turn. The arithmetic counts {OPERATIONS} operations for each \
         weight at half of the peak measured in the round.\n\n| what | seconds |\n| --- | --- |\n",
        read as f64 / 1e9,
        layers = layers(arguments)
    );
    let _ = writeln!(text, "| quantising, {:.2} GB written | {ours:.2} |", written as f64 / 1e9);
    let _ = writeln!(text, "| reading and writing alone | {bytes:.2} |");
    let _ = writeln!(text, "| the arithmetic at half of the peak | {sums:.2} |");
    let _ = writeln!(text, "| quantising with `--method search` | {:.2} |", median(searching));
    let _ = writeln!(
        text,
        "\nPlain rounding over both together: {:.2}, the median of the rounds ({}); over moving the bytes alone {:.2}.",
        median(ratios.clone()),
        ratios.iter().map(|r| format!("{r:.2}")).collect::<Vec<_>>().join(", "),
        ours / bytes
    );
    let side = Side::ours(&program, &output, cpu.threads(), 128);
    let (mut first, mut pure) = (Vec::new(), Vec::new());
    for round in 0..=if arguments.quick { 1 } else { STARTS } {
        let pause = if arguments.quick { Duration::ZERO } else { Duration::from_millis(400) };
        let [from_start, warm] = first_token(&side, pause)?;
        // The first round warms the page cache.
        if round > 0 {
            first.push(from_start);
            pure.push(warm);
        }
    }
    let (first, pure) = (median(first), median(pure));
    let _ = writeln!(
        text,
        "\nThe `.pglm`, from the start of the process to the first token of a prompt of 16 with a warm page cache: \
         {first:.3} s, {:.2} of the {pure:.3} s of that prefill alone.",
        first / pure
    );
    Ok(text)
}

/// How much of the model was quantised.
fn layers(arguments: &super::Arguments) -> String {
    match arguments.quick {
        true => "a test's checkpoint".into(),
        false => format!("the 9 B shape with {} decoder layers", arguments.layers),
    }
}

/// The files with weights of a checkpoint, and their lengths.
fn weights(model: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let entries = std::fs::read_dir(model).map_err(io_error("list", model))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_error("list", model))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = std::fs::metadata(&path).map_err(io_error("read", &path))?.len();
            files.push((path, bytes));
        }
    }
    Ok(files)
}

/// Seconds of reading the files and writing `bytes` of what was read to `out`, which is removed again.
fn moved(inputs: &[(PathBuf, u64)], bytes: u64, out: &Path) -> Result<f64> {
    let start = Instant::now();
    let mut to = File::create(out).map_err(io_error("create", out))?;
    let total: u64 = inputs.iter().map(|(_, bytes)| bytes).sum();
    let (mut done, mut left) = (0, bytes);
    let mut buffer = vec![0; STEP];
    for (path, _) in inputs {
        let mut from = File::open(path).map_err(io_error("open", path))?;
        loop {
            let n = from.read(&mut buffer).map_err(io_error("read", path))?;
            if n == 0 {
                break;
            }
            done += n as u64;
            // What is written keeps pace with what is read, as it does while quantising.
            let due = (bytes as u128 * u128::from(done) / u128::from(total.max(1))) as u64;
            let now = due.saturating_sub(bytes - left).min(n as u64) as usize;
            to.write_all(&buffer[..now]).map_err(io_error("write", out))?;
            left -= now as u64;
        }
    }
    to.sync_all().map_err(io_error("write", out))?;
    drop(to);
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_file(out).map_err(io_error("remove", out))?;
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_reads_all_and_writes_what_is_asked_for() {
        let work = Work::new("test-files").unwrap();
        let input = work.0.join("a.safetensors");
        std::fs::write(&input, vec![7; 100_000]).unwrap();
        let inputs = weights(&work.0).unwrap();
        assert_eq!(inputs, [(input, 100_000)]);
        let out = work.0.join("out");
        assert!(moved(&inputs, 30_000, &out).unwrap() > 0.0);
        assert!(!out.exists());
        let missing = [(work.0.join("none"), 5)];
        assert!(moved(&missing, 1, &out).unwrap_err().to_string().contains("none"));
    }
}
