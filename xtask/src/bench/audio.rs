//! pocketglm against ONNX Runtime on the same speech encoder: both models stay in memory and take turns.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use pocketglm_tensor::{Cpu, peak};
use serde_json::Value;

use super::measure::median;
use super::models::Work;
use super::resident::Resident;
use crate::{Error, Result, repo};

/// Before every request: the threads of the program that had its turn may still look for work for a while.
const PAUSE: Duration = Duration::from_millis(400);
/// How far the results of f32 programs may be apart, relative L2.
const EXACT: f64 = 1e-4;
/// The same for int8 weights, on random ones.
const ROUNDED: f64 = 0.3;

/// Every program that takes turns.
struct Side {
    name: String,
    resident: Resident,
    /// Bytes that our programs plan for so much audio.
    planned: Option<f64>,
    took: Vec<f64>,
    peak: f64,
    sample: Vec<f64>,
}

impl Side {
    fn start(name: &str, command: Command) -> Result<Side> {
        let resident = Resident::start(command)?;
        let version = resident.facts["version"].as_str().unwrap_or("");
        let name = if name.is_empty() {
            format!("{} {version}", resident.facts["peer"].as_str().unwrap_or("peer"))
        } else {
            name.to_owned()
        };
        let planned = resident.facts["planned_bytes"].as_f64();
        Ok(Side { name, resident, planned, took: Vec::new(), peak: 0.0, sample: Vec::new() })
    }

    fn turn(&mut self, seconds: usize, counts: bool) -> Result<()> {
        sleep(PAUSE);
        let answer = self.resident.ask(&format!("audio {seconds}"))?;
        let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
        if counts {
            self.took.push(number(&answer["seconds"]));
        }
        self.peak = number(&answer["peak_bytes"]);
        let sample = answer["sample"].as_array();
        self.sample = sample.map(|a| a.iter().map(number).collect()).unwrap_or_default();
        Ok(())
    }
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() || a.is_empty() {
        return f64::INFINITY;
    }
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let d = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30);
    if d.is_nan() { f64::INFINITY } else { d }
}

/// A checkpoint of the base shape with random weights.
fn checkpoint(folder: &Path) -> Result<PathBuf> {
    let out = folder.join("wav2vec2-base");
    let program = std::env::current_exe().map_err(|e| Error::Command {
        command: "the bench itself".into(),
        what: format!("is nowhere: {e}"),
    })?;
    repo::run(Command::new(program).args(["synth", "wav2vec2-base", "--dtype", "f32"]).arg(&out))?;
    Ok(out)
}

/// The comparison of f32 and int8 with the peer, where there is a Python for it.
pub fn section(
    cpu: &Cpu,
    program: &Path,
    rounds: usize,
    python: Option<&Path>,
    seconds: usize,
) -> Result<String> {
    let work = Work::new("audio")?;
    let model = checkpoint(&work.0)?;
    let threads = cpu.threads().to_string();
    let length = seconds.to_string();
    let ours = |weights: &str| {
        let mut command = Command::new(program);
        command.args(["bench", "--serve", "--threads", &threads, "--seconds", &length]);
        command.args(["--audio-weights", weights, "--model"]);
        command.arg(&model);
        command
    };
    let mut sides =
        vec![Side::start("pocketglm f32", ours("stored"))?, Side::start("pocketglm int8", ours("int8"))?];
    if let Some(python) = python {
        let mut command = Command::new(python);
        command.arg(repo::root().join("bench/audio_peer.py")).args(["--threads", &threads, "--model"]);
        command.arg(&model).arg("--onnx").arg(work.0.join("model.onnx"));
        sides.push(Side::start("", command)?);
    }
    let mut limits = Vec::new();
    for round in 0..=rounds {
        limits.push(peak::fma_gflops(cpu, 20));
        // The first round touches everything for the first time; the order changes from round to round.
        let mut order: Vec<usize> = (0..sides.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for i in order {
            sides[i].turn(seconds, round > 0)?;
        }
    }
    let exact = sides.last().map(|s| s.sample.clone()).unwrap_or_default();
    let mut text = format!(
        "The shape of wav2vec2-base with a CTC head and random weights (`cargo xtask synth wav2vec2-base`), {seconds} seconds of \
         audio at once, f32 graph of transformers for the peer (`bench/audio_peer.py`). The programs take turns; a ratio above \
         1 means that pocketglm is faster: the ratio of the medians, and the median of the ratios of the rounds with the \
         smallest and the largest. Difference: relative L2 of the logits to the last row's.\n\n\
         | program | seconds | real-time factor | peak memory | planned | ratio | by round | difference |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    let theirs = if python.is_some() { sides.last().map(|s| s.took.clone()) } else { None };
    for side in &sides {
        let middle = median(side.took.clone());
        let (ratio, by_round) = match &theirs {
            Some(theirs) => {
                let each: Vec<f64> = theirs.iter().zip(&side.took).map(|(t, o)| t / o).collect();
                let low = each.iter().copied().fold(f64::INFINITY, f64::min);
                let high = each.iter().copied().fold(0.0, f64::max);
                let all = format!("{:.2} ({low:.2} to {high:.2})", median(each));
                (format!("{:.2}", median(theirs.clone()) / middle), all)
            }
            None => (String::new(), String::new()),
        };
        let apart = apart(&side.sample, &exact);
        let bound = if side.name.contains("int8") || exact.is_empty() { ROUNDED } else { EXACT };
        if apart > bound && python.is_some() {
            return Err(Error::Content {
                place: format!("logits of {}", side.name),
                wanted: format!("at most {bound:.0e} from the peer's"),
                found: format!("{apart:.1e}"),
            });
        }
        if side.planned.is_some_and(|planned| side.peak > planned) {
            return Err(Error::Content {
                place: format!("peak memory of {}", side.name),
                wanted: format!("at most {:.0} bytes, as planned", side.planned.unwrap_or_default()),
                found: format!("{:.0}", side.peak),
            });
        }
        let planned = side.planned.map_or(String::new(), |p| format!("{:.0} MB", p / 1e6));
        let _ = writeln!(
            text,
            "| {} | {middle:.3} | {:.4} | {:.0} MB | {planned} | {ratio} | {by_round} | {apart:.1e} |",
            side.name,
            middle / seconds as f64,
            side.peak / 1e6,
        );
    }
    let _ = writeln!(text, "\nMultiply-add peak meanwhile: {:.0} GFLOP/s.", median(limits));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_relative_and_never_nan() {
        assert_eq!(apart(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!((apart(&[3.0, 4.0], &[0.0, 4.0]) - 0.75).abs() < 1e-12);
        assert_eq!(apart(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(apart(&[f64::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(apart(&[], &[]), f64::INFINITY);
    }
}
