//! `pocketglm bench --per-op`: what the kinds of ops of each program take on a GPU, beside what the GPU does at most.

use std::collections::BTreeSet;

use pocketglm::{Arithmetic, Backend, OpProfile, RunProfile};
use serde_json::{Value, json};

use super::median;
use crate::failure::Failure;
use crate::output::Out;

/// The programs, in the order in which a step runs them.
const PROGRAMS: [&str; 4] = ["vision", "audio", "prefill", "decode"];

/// What was measured, or why nothing was.
pub enum PerOp {
    /// The ops of each program that ran, and the device's limits.
    Measured { programs: Vec<Program>, limits: Limits },
    /// The backend or its device times no ops.
    Absent(String),
}

/// One program.
pub struct Program {
    name: &'static str,
    /// Runs that were measured; figures are those of one.
    runs: usize,
    rows: Vec<Row>,
}

/// Ops of one kind in blocks of one kind.
struct Row {
    name: String,
    kernels: BTreeSet<String>,
    ops: usize,
    dispatches: usize,
    seconds: f64,
    bytes: f64,
    operations: f64,
    arithmetic: Arithmetic,
}

/// What the device does at most in a second.
pub struct Limits {
    copy: Option<f64>,
    arithmetic: Vec<(Arithmetic, f64)>,
}

/// Measures the ops of what `work` runs.
///
/// # Errors
/// What the work reports, and a device that fails.
pub fn measure(
    backend: Option<&std::sync::Arc<dyn Backend>>,
    work: impl FnOnce() -> Result<(), Failure>,
) -> Result<PerOp, Failure> {
    let Some(backend) = backend else {
        return Ok(PerOp::Absent("times of single ops are measured on GPUs alone (--backend wgpu)".into()));
    };
    if let Err(error) = backend.profile(true) {
        return Ok(PerOp::Absent(error.to_string()));
    }
    let worked = work();
    let runs = backend.take_profile();
    backend.profile(false).map_err(pocketglm::Error::from)?;
    worked?;
    let limits = Limits {
        copy: backend.copy_rate().map_err(pocketglm::Error::from)?,
        arithmetic: backend.arithmetic_rates().map_err(pocketglm::Error::from)?,
    };
    let of = |name: &'static str| {
        let these: Vec<&RunProfile> = runs.iter().filter(|run| program_of(run) == name).collect();
        Program::new(name, &these)
    };
    Ok(PerOp::Measured { programs: PROGRAMS.into_iter().filter_map(of).collect(), limits })
}

/// The program of a run, which its sizes tell: samples, merged patches, or new tokens.
fn program_of(run: &RunProfile) -> &'static str {
    match (run.sizes.get("N"), run.sizes.get("M"), run.sizes.get("T")) {
        (Some(_), ..) => "audio",
        (_, Some(_), _) => "vision",
        (.., Some(1)) => "decode",
        _ => "prefill",
    }
}

/// The name of an op with the numbers of its blocks left out, so that layers are one row.
fn kind_of(op: &str) -> String {
    let part = |p: &str| if p.parse::<usize>().is_ok() { "*".to_owned() } else { p.to_owned() };
    op.trim_end().split('.').map(part).collect::<Vec<_>>().join(".")
}

impl Program {
    fn new(name: &'static str, runs: &[&RunProfile]) -> Option<Program> {
        // A prompt in chunks is one piece of work; every token of decoding is another one, and the first compiles.
        let pieces: Vec<Vec<&OpProfile>> = match name {
            "decode" => {
                runs.iter().skip(usize::from(runs.len() > 2)).map(|r| r.ops.iter().collect()).collect()
            }
            _ => vec![runs.iter().flat_map(|r| &r.ops).collect()],
        };
        let first = pieces.first().filter(|ops| !ops.is_empty())?;
        let mut rows: Vec<Row> = Vec::new();
        for op in first {
            let kind = kind_of(&op.name);
            let row = match rows.iter_mut().position(|r| r.name == kind) {
                Some(at) => &mut rows[at],
                None => {
                    rows.push(Row {
                        name: kind,
                        kernels: BTreeSet::new(),
                        ops: 0,
                        dispatches: 0,
                        seconds: 0.0,
                        bytes: 0.0,
                        operations: 0.0,
                        arithmetic: Arithmetic::F32,
                    });
                    let last = rows.len() - 1;
                    &mut rows[last]
                }
            };
            row.ops += 1;
            row.dispatches += op.kernels.len();
            row.kernels.extend(op.kernels.iter().cloned());
            row.bytes += op.cost.bytes;
            row.operations += op.cost.operations;
            if op.arithmetic != Arithmetic::F32 {
                row.arithmetic = op.arithmetic;
            }
        }
        for row in &mut rows {
            let of = |ops: &Vec<&OpProfile>| {
                ops.iter().filter(|o| kind_of(&o.name) == row.name).map(|o| o.seconds).sum::<f64>()
            };
            row.seconds = median(pieces.iter().map(of).collect());
        }
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Some(Program { name, runs: pieces.len(), rows })
    }

    fn seconds(&self) -> f64 {
        self.rows.iter().map(|r| r.seconds).sum()
    }
}

impl Limits {
    fn arithmetic(&self, kind: Arithmetic) -> Option<f64> {
        self.arithmetic.iter().find(|(k, _)| *k == kind).map(|(_, rate)| *rate)
    }

    /// What part of the copy limit, and of the limit of its arithmetic, a row reaches.
    fn shares(&self, row: &Row) -> [Option<f64>; 2] {
        let of = |amount: f64, limit: Option<f64>| {
            limit.filter(|l| *l > 0.0 && row.seconds > 0.0).map(|l| amount / row.seconds / l)
        };
        [of(row.bytes, self.copy), of(row.operations, self.arithmetic(row.arithmetic))]
    }
}

/// A kernel without what is defined in it.
fn file(kernel: &str) -> &str {
    kernel.split([' ', '.']).next().unwrap_or(kernel)
}

impl PerOp {
    /// As JSON.
    pub fn json(&self) -> Value {
        let (programs, limits) = match self {
            PerOp::Absent(why) => return json!({"absent": why}),
            PerOp::Measured { programs, limits } => (programs, limits),
        };
        let row = |row: &Row| {
            let [copy, arithmetic] = limits.shares(row);
            json!({
                "op": row.name,
                "kernels": row.kernels,
                "ops": row.ops,
                "dispatches": row.dispatches,
                "seconds": row.seconds,
                "bytes": row.bytes,
                "operations": row.operations,
                "copy_share": copy,
                "arithmetic": row.arithmetic.name(),
                "arithmetic_share": arithmetic,
            })
        };
        let program = |p: &Program| {
            let rows: Vec<Value> = p.rows.iter().map(row).collect();
            json!({"program": p.name, "runs": p.runs, "seconds": p.seconds(), "rows": rows})
        };
        let peaks: serde_json::Map<String, Value> =
            limits.arithmetic.iter().map(|(kind, rate)| (kind.name().into(), json!(rate))).collect();
        json!({
            "copy_bytes_per_s": limits.copy,
            "operations_per_s": peaks,
            "programs": programs.iter().map(program).collect::<Vec<_>>(),
        })
    }

    /// As tables.
    pub fn print(&self, out: &mut Out) -> Result<(), Failure> {
        let (programs, limits) = match self {
            PerOp::Absent(why) => return out.line(&format!("per op   {why}")),
            PerOp::Measured { programs, limits } => (programs, limits),
        };
        let mut rates: Vec<String> =
            limits.copy.iter().map(|r| format!("copy {:.1} GB/s", r / 1e9)).collect();
        rates.extend(
            limits.arithmetic.iter().map(|(kind, r)| format!("{} {:.3} TFLOP/s", kind.name(), r / 1e12)),
        );
        out.line(&format!("limits   {}", rates.join(", ")))?;
        let share = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s));
        for program in programs {
            let total = program.seconds();
            out.line(&format!(
                "\n{}, one of {} runs: {:.3} ms in ops",
                program.name,
                program.runs,
                total * 1e3
            ))?;
            out.line(&format!(
                "{:>6}{:>11}{:>12}{:>12}{:>8}{:>8}{:>8}  op, block, kernels",
                "ops", "ms", "MB", "MFLOP", "copy", "arith.", "time"
            ))?;
            for row in &program.rows {
                let [copy, arithmetic] = limits.shares(row);
                let files: BTreeSet<&str> = row.kernels.iter().map(|k| file(k)).collect();
                out.line(&format!(
                    "{:>6}{:>11.4}{:>12.3}{:>12.3}{:>8}{:>8}{:>8}  {} [{}]",
                    row.ops,
                    row.seconds * 1e3,
                    row.bytes / 1e6,
                    row.operations / 1e6,
                    share(copy),
                    share(arithmetic),
                    share((total > 0.0).then(|| row.seconds / total)),
                    row.name,
                    files.into_iter().collect::<Vec<_>>().join(", ")
                ))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_one_kind_and_other_names_stay() {
        assert_eq!(kind_of("linear model.layers.17.mlp.down_proj"), "linear model.layers.*.mlp.down_proj");
        assert_eq!(kind_of("conv layers.0"), "conv layers.*");
        assert_eq!(kind_of("top_k "), "top_k");
        assert_eq!(file("matvec_q.wgsl NORM WG=64"), "matvec_q");
    }

    #[test]
    fn the_processor_gives_a_statement_and_no_zeros() {
        let measured = measure(None, || panic!("nothing is run for it")).unwrap();
        assert!(measured.json()["absent"].as_str().unwrap().contains("--backend wgpu"));
        assert!(measured.json().get("programs").is_none());
    }
}
