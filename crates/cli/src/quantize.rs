//! `pocketglm quantize`: a checkpoint in, a smaller one out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use pocketglm::Error;
use pocketglm::quantise::{Method, Policy, QuantPlan, QuantiseOptions, Quantiser, TensorPlan};
use serde_json::{Value, json};

use crate::args::policy_file;
use crate::failure::Failure;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::output::{Out, bytes, complain, human, thousands};
use crate::progress::{Bars, Work};

/// Quantise a model.
#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Checkpoint folder (of a Wav2Vec2 model too), GGUF or .pglm file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// The vision file of a GGUF model; where it is not given, the mmproj file beside it.
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// The file to write: .pglm, or .gguf for the text part of a GGUF model.
    #[arg(long, value_name = "FILE", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// What becomes of which tensor: int8, int4, int2, keep, a format for all matrices (int4-g64, int8-row, Q4_K, F16, ..), or
    /// a policy file.
    #[arg(long, value_name = "NAME|FILE", default_value = "int4")]
    policy: String,
    /// How numbers are chosen, for every rule of the policy.
    #[arg(long, value_enum)]
    method: Option<MethodArg>,
    /// Calibration table of this model, which `calibrate` writes.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Fold scales of the KV cache's components, from --calibration, into the weights, for heads that then lose less on what
    /// calibration saw in a cache of int8 and of int4. Helps where a few components are large; heads without such ones
    /// stay as they are. Weights of 4 bits and one scale a row may lose by it.
    #[arg(long)]
    kv_scales: bool,
    /// Rotate attention's values by Hadamard matrices, folded into the weights: outliers are spread before they are rounded,
    /// and --kv int8 and int4 hold the rotated values. Nothing changes in f32.
    #[arg(long)]
    rotate: bool,
    /// Fix the ranges of the inputs of quantised matrices to those of --calibration.
    #[arg(long)]
    static_inputs: bool,
    /// Kind of file; by the ending of --out where it is not given.
    #[arg(long, value_enum)]
    to: Option<Target>,
    /// The vision file of a GGUF model; mmproj-NAME beside --out where it is not given. A .pglm file has none.
    #[arg(long, value_name = "FILE")]
    mmproj_out: Option<PathBuf>,
    /// Show what would become of each tensor, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Replace a file that stands under the name of --out; files that are read are never replaced.
    #[arg(long)]
    force: bool,
    /// Quantise tensors that are quantised already.
    #[arg(long)]
    force_requantise: bool,
    /// Threads; 0 takes as many as the system offers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Show no progress and no summary.
    #[arg(long)]
    quiet: bool,
}

/// How numbers are chosen.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum MethodArg {
    /// Plain rounding.
    Round,
    /// The scale of least squared error.
    Search,
    /// Error feedback; needs a calibration table with second moments.
    Gptq,
    /// Activation-aware scales, folded into norms; needs a calibration table.
    Awq,
}

/// Kind of file.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// One file with everything in it.
    Pglm,
    /// A text file and a vision file, for llama.cpp as well.
    Gguf,
}

/// Runs the command.
pub fn run(args: &QuantizeArgs) -> Result<ExitCode, Failure> {
    let mut policy = Policy::load(&args.policy)?;
    if let Some(method) = args.method {
        policy = policy.with_method(match method {
            MethodArg::Round => Method::Round,
            MethodArg::Search => Method::Search,
            MethodArg::Gptq => Method::Gptq,
            MethodArg::Awq => Method::Awq,
        });
    }
    policy.rotate |= args.rotate;
    let kind = kind(args)?;
    let work = Work::new(args.quiet || args.json, true);
    let interrupt = if args.dry_run { None } else { Some(Interrupt::install(&Bars::new(true))?) };
    let options = QuantiseOptions {
        mmproj: args.mmproj.clone(),
        calibration: args.calibration.clone(),
        kv_scales: args.kv_scales,
        static_inputs: args.static_inputs,
        gguf: kind == Target::Gguf,
        force_requantise: args.force_requantise,
        overwrite: args.force,
        inputs: policy_file(&args.policy).into_iter().collect(),
        threads: args.threads,
        progress: work.hook(),
        cancel: interrupt.as_ref().map(Interrupt::begin).unwrap_or_default(),
        ..QuantiseOptions::new(policy)
    };
    let start = Instant::now();
    let quantiser = Quantiser::open(&args.model, options).map_err(|error| match error {
        error @ Error::AlreadyQuantised { .. } => Failure::Twice(error),
        other => other.into(),
    })?;
    let plan = quantiser.plan();
    if !args.quiet && !args.json {
        plan.warnings.iter().for_each(|warning| complain(warning));
    }
    let mut out = Out::new();
    let beside = |text: &PathBuf| quantiser.has_vision().then(|| mmproj_beside(text));
    let vision = args.mmproj_out.clone().or_else(|| args.out.as_ref().and_then(beside));
    let Some(target) = args.out.as_ref().filter(|_| !args.dry_run) else {
        match (kind, &args.out) {
            (Target::Gguf, Some(text)) => quantiser.check_gguf(text, vision.as_deref())?,
            (Target::Gguf, None) => quantiser.fits_gguf()?,
            (Target::Pglm, Some(file)) => quantiser.check_pglm(file)?,
            (Target::Pglm, None) => {}
        }
        if args.json {
            out.json(&plan_json(plan))?;
        } else {
            out.line(&plan_table(plan, true))?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let written = match kind {
        Target::Gguf => quantiser.write_gguf(target, vision.as_deref()),
        Target::Pglm => quantiser.write_pglm(target),
    };
    work.clear();
    match written {
        Err(Error::Cancelled) => {
            complain("stopped: nothing was written");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        other => other?,
    }
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let mut object = plan_json(plan);
        object["out"] = json!(target.display().to_string());
        object["seconds"] = json!(seconds);
        out.json(&object)?;
    } else if !args.quiet {
        out.line(&plan_table(plan, false))?;
        out.line(&format!("written to {} in {seconds:.1} s", target.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The kind of file that is asked for: by --to, or by the name of --out.
fn kind(args: &QuantizeArgs) -> Result<Target, Failure> {
    let named = |kind: &str| {
        args.out.as_ref().and_then(|o| o.extension()).is_some_and(|e| e.eq_ignore_ascii_case(kind))
    };
    let kind = match (args.to, &args.out) {
        (Some(kind), _) => kind,
        (None, Some(_)) if named("gguf") => Target::Gguf,
        (None, Some(out)) if !named("pglm") => return Err(Failure::FileKind { path: out.clone() }),
        (None, _) => Target::Pglm,
    };
    match (&args.mmproj_out, kind) {
        (Some(path), Target::Pglm) => Err(Failure::VisionFile { path: path.clone() }),
        _ => Ok(kind),
    }
}

fn mmproj_beside(text: &Path) -> PathBuf {
    let name = text.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    text.with_file_name(format!("mmproj-{name}"))
}

/// The sum of each format: tensors, values, bytes.
fn by_format(plan: &QuantPlan) -> BTreeMap<&'static str, (u64, u64, u64)> {
    let mut sums = BTreeMap::new();
    for t in &plan.tensors {
        let sum: &mut (u64, u64, u64) = sums.entry(t.to.name()).or_default();
        *sum = (sum.0 + 1, sum.1 + t.elements(), sum.2 + t.bytes);
    }
    sums
}

/// What is said of a tensor besides its figures.
fn notes(t: &TensorPlan) -> String {
    let rotated = t.rotated.then_some("rotated");
    rotated.into_iter().chain(t.note.as_deref()).collect::<Vec<_>>().join("; ")
}

/// The plan for people: every tensor with `all`, and the totals.
fn plan_table(plan: &QuantPlan, all: bool) -> String {
    let mut lines = Vec::new();
    let width = plan.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
    if all {
        lines.push(format!(
            "{:width$}  {:>14}  {:>8}  {:13}  {:6}  {:>6}  {:>15}  {:>15}",
            "tensor", "shape", "from", "to", "method", "bits", "bytes", "memory"
        ));
    }
    for t in plan.tensors.iter().filter(|_| all) {
        let shape = t.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        lines.push(
            format!(
                "{:width$}  {shape:>14}  {:>8}  {:13}  {:6}  {:>6.3}  {:>15}  {:>15}  {}",
                t.name,
                t.from.name(),
                t.to.name(),
                t.method.map_or("", Method::name),
                t.bits_per_weight(),
                thousands(t.bytes),
                thousands(t.memory),
                notes(t)
            )
            .trim_end()
            .to_owned(),
        );
    }
    if !all {
        for t in &plan.tensors {
            lines.extend(t.note.as_ref().map(|note| format!("{}: {} ({note})", t.name, t.to.name())));
        }
    }
    for (format, (tensors, values, size)) in by_format(plan) {
        let bits = size as f64 * 8.0 / values.max(1) as f64;
        lines.push(format!("{format:13}  {tensors:>5} tensors  {bits:>6.3} bits  {}", bytes(size)));
    }
    let rotated = plan.tensors.iter().filter(|t| t.rotated).count();
    lines.extend((rotated > 0).then(|| format!("{rotated} tensors rotated")));
    let (before, after) = (plan.bytes_before(), plan.bytes());
    lines.push(format!(
        "policy {}: {} becomes {}, {:.3} bits a weight, {:.2} % of f32; {} in memory",
        plan.policy,
        human(before),
        bytes(after),
        plan.bits_per_weight(),
        plan.bits_per_weight() / 32.0 * 100.0,
        human(plan.memory())
    ));
    lines.join("\n")
}

fn plan_json(plan: &QuantPlan) -> Value {
    let tensor = |t: &TensorPlan| {
        json!({
            "name": t.name,
            "shape": t.shape,
            "from": t.from.name(),
            "to": t.to.name(),
            "method": t.method.map(Method::name),
            "bytes_before": t.bytes_before,
            "bytes": t.bytes,
            "memory": t.memory,
            "bits_per_weight": t.bits_per_weight(),
            "rotated": t.rotated,
            "note": t.note,
        })
    };
    json!({
        "policy": plan.policy,
        "warnings": plan.warnings,
        "tensors": plan.tensors.iter().map(tensor).collect::<Vec<_>>(),
        "values": plan.elements(),
        "bytes_before": plan.bytes_before(),
        "bytes": plan.bytes(),
        "memory": plan.memory(),
        "bits_per_weight": plan.bits_per_weight(),
    })
}

#[cfg(test)]
mod tests {
    use pocketglm::DType;

    use super::*;

    fn example() -> QuantPlan {
        let q8 = DType::from_name("Q8_0").unwrap();
        let tensor = |name: &str, to, bytes, note: Option<&str>| TensorPlan {
            name: name.into(),
            shape: vec![2, 32],
            from: DType::F32,
            to,
            method: Some(Method::Round),
            bytes_before: 256,
            bytes,
            memory: bytes + 1000,
            rotated: name == "a.weight",
            note: note.map(str::to_owned),
        };
        let tensors = vec![
            tensor("a.weight", q8, 68, None),
            tensor("b.weight", q8, 68, Some("Q6_K has no rows of 32")),
            tensor("c.weight", DType::F32, 256, None),
        ];
        QuantPlan { policy: "mine".into(), tensors, warnings: vec!["too late".into()] }
    }

    #[test]
    fn the_table_has_every_tensor_and_the_totals() {
        let text = plan_table(&example(), true);
        for wanted in [
            "a.weight",
            "1,068  rotated\n",
            "1 tensors rotated",
            "c.weight",
            "Q6_K has no rows of 32",
            "Q8_0               2 tensors   8.500 bits  136 bytes",
            "policy mine: 768 bytes becomes 392 bytes, 16.333 bits a weight, 51.04 % of f32; 3.31 KiB in memory",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        let short = plan_table(&example(), false);
        assert!(short.contains("b.weight: Q8_0 (Q6_K has no rows of 32)") && !short.contains("a.weight"));
    }

    #[test]
    fn the_json_adds_up() {
        let json = plan_json(&example());
        assert_eq!((&json["bytes"], &json["values"]), (&json!(392), &json!(192)));
        assert_eq!(json["tensors"][1]["note"], "Q6_K has no rows of 32");
        assert_eq!((&json["tensors"][0]["rotated"], &json["warnings"]), (&json!(true), &json!(["too late"])));
    }

    #[test]
    fn the_vision_file_stands_beside_the_text_file() {
        assert_eq!(mmproj_beside(Path::new("a/b.gguf")), Path::new("a/mmproj-b.gguf"));
    }
}
