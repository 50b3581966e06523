//! `pocketglm eval`: how much a quantised model differs from the original.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args};
use pocketglm::quantise::{EvalOptions, Evaluation, Policy, Reference, Samples, Simulation, evaluate};
use pocketglm::{EngineOptions, Error, OutFile};
use serde_json::{Value, json};

use crate::args::{Kv, RunArgs, policy_file, positive};
use crate::failure::Failure;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::output::{Out, complain, human, thousands};
use crate::plot;
use crate::progress::{Bars, Work};

/// Compare models with the original.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("judged").args(["model", "policy"]).required(true).multiple(true)))]
pub struct EvalArgs {
    /// The model to judge: checkpoint folder, GGUF or .pglm file. May be given several times.
    #[arg(long, value_name = "PATH")]
    model: Vec<PathBuf>,
    /// A policy to judge on the reference's weights without writing a file: a name or a file, as for `quantize`. Slow and
    /// large: it computes in f32. May be given several times.
    #[arg(long, value_name = "NAME|FILE")]
    policy: Vec<String>,
    /// Calibration table of the reference: judges the policies with inputs of fixed ranges.
    #[arg(long, value_name = "FILE", requires = "policy")]
    static_inputs: Option<PathBuf>,
    /// How the judged models store keys and values; the reference has f32.
    #[arg(long, value_enum, default_value_t = Kv::F32)]
    kv: Kv,
    /// The model that it was made of.
    #[arg(long, value_name = "PATH")]
    reference: PathBuf,
    /// Text, or .jsonl with one {"text": ..} or request on each line; requests may have pictures.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    /// Most tokens of a piece that text is cut into.
    #[arg(long, value_name = "N", default_value_t = EvalOptions::default().window, value_parser = positive)]
    window: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Draw divergence and agreement over bits per weight into this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Replace a file that stands under the name of --plot; files that are read are never replaced.
    #[arg(long, requires = "plot")]
    force: bool,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<ExitCode, Failure> {
    let samples = Samples::read(&args.samples)?;
    let work = Work::new(args.run.quiet || args.json, false);
    let interrupt = Interrupt::install(&Bars::new(true))?;
    let simulation = |name: &String| -> Result<Simulation, Failure> {
        Ok(Simulation { policy: Policy::load(name)?, static_inputs: args.static_inputs.clone() })
    };
    let options = EvalOptions {
        engine: args.run.options(&work),
        window: args.window,
        kv: args.kv.into(),
        simulate: args.policy.iter().map(simulation).collect::<Result<_, _>>()?,
        cancel: interrupt.begin(),
    };
    let plot = args.plot.as_ref().map(|path| guarded(path, args, &samples, &options.engine)).transpose()?;
    let compared = evaluate(&args.model, &args.reference, &samples, &options);
    work.clear();
    let (reference, models) = match compared {
        Err(Error::Cancelled) => {
            complain("stopped");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        other => other?,
    };
    if let Some(plot) = plot {
        plot.write(plot::draw(&models)?.as_bytes())?;
    }
    let mut out = Out::new();
    match args.json {
        true => out.json(&report(&reference, &models, &samples))?,
        false => out.line(&table(&reference, &models))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The file of the chart, which must be none of those that are read.
fn guarded(
    path: &PathBuf,
    args: &EvalArgs,
    samples: &Samples,
    engine: &EngineOptions,
) -> Result<OutFile, Failure> {
    let policies = args.policy.iter().filter_map(|name| policy_file(name));
    let mut out = OutFile::new(path, args.force)
        .keeping(samples.files())
        .keeping(policies)
        .keeping(&args.static_inputs)
        .keeping_model(&args.reference, engine)?;
    for model in &args.model {
        out = out.keeping_model(model, engine)?;
    }
    out.check()?;
    Ok(out)
}

fn table(reference: &Reference, models: &[Evaluation]) -> String {
    let name = |path: &PathBuf| path.display().to_string();
    let width = models.iter().map(|m| name(&m.path).chars().count());
    let width = width.chain([name(&reference.path).chars().count(), 5]).max().unwrap_or(0);
    let mut lines = vec![
        format!(
            "{:width$}  {:>10}  {:>6}  {:>6}  {:>10}  {:>9}  {:>9}  {:>8}",
            "model", "size", "of ref", "bits", "perplexity", "KL", "KL 99 %", "same top"
        ),
        format!(
            "{:width$}  {:>10}  {:>6}  {:>6.3}  {:>10.4}",
            name(&reference.path),
            human(reference.bytes),
            "",
            reference.bits_per_weight,
            reference.perplexity
        ),
    ];
    for m in models {
        lines.push(format!(
            "{:width$}  {:>10}  {:>5.1}%  {:>6.3}  {:>10.4}  {:>9.2e}  {:>9.2e}  {:>7.2}%",
            name(&m.path),
            human(m.bytes),
            m.bytes as f64 * 100.0 / reference.bytes.max(1) as f64,
            m.bits_per_weight,
            m.perplexity,
            m.kl,
            m.kl_99,
            m.same_top * 100.0
        ));
    }
    let positions = models.first().map_or(0, |m| m.positions);
    lines.push(format!("{} predictions of text tokens", thousands(positions)));
    if let Some(of) = models.iter().find_map(|m| m.pictures) {
        lines.push(format!(
            "\n{:width$}  {:>11}  {:>9}  {:>12}",
            "pictures, encoded", "relative L2", "cosine", "least cosine"
        ));
        for m in models {
            let Some(p) = m.pictures else { continue };
            let (name, l2) = (name(&m.path), p.relative_l2);
            lines.push(format!("{name:width$}  {l2:>11.2e}  {:>9.6}  {:>12.6}", p.cosine, p.least_cosine));
        }
        lines.push(format!("{} rows of {} pictures", thousands(of.rows), thousands(of.pictures)));
    }
    lines.join("\n")
}

fn report(reference: &Reference, models: &[Evaluation], samples: &Samples) -> Value {
    let model = |m: &Evaluation| {
        json!({
            "path": m.path.display().to_string(),
            "bytes": m.bytes,
            "bits_per_weight": m.bits_per_weight,
            "positions": m.positions,
            "perplexity": m.perplexity,
            "kl": m.kl,
            "kl_99": m.kl_99,
            "kl_max": m.kl_max,
            "same_top": m.same_top,
            "pictures": m.pictures.map(|p| json!({
                "pictures": p.pictures,
                "rows": p.rows,
                "relative_l2": p.relative_l2,
                "cosine": p.cosine,
                "least_cosine": p.least_cosine,
            })),
        })
    };
    json!({
        "samples": samples.hash(),
        "reference": {
            "path": reference.path.display().to_string(),
            "bytes": reference.bytes,
            "bits_per_weight": reference.bits_per_weight,
            "perplexity": reference.perplexity,
        },
        "models": models.iter().map(model).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use pocketglm::quantise::PictureDifference;

    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_model() {
        let reference =
            Reference { path: "ref".into(), bytes: 4096, bits_per_weight: 32.0, perplexity: 12.5 };
        let model = Evaluation {
            path: "small.pglm".into(),
            bytes: 1024,
            bits_per_weight: 8.125,
            positions: 1234,
            perplexity: 12.75,
            kl: 0.00123,
            kl_99: 0.01,
            kl_max: 0.02,
            same_top: 0.987,
            pictures: Some(PictureDifference {
                pictures: 2,
                rows: 1500,
                relative_l2: 0.0123,
                cosine: 0.9995,
                least_cosine: 0.99,
            }),
        };
        let text = table(&reference, std::slice::from_ref(&model));
        for wanted in [
            "ref",
            "small.pglm",
            "25.0%",
            "8.125",
            "12.7500",
            "1.23e-3",
            "98.70%",
            "1,234",
            "1.23e-2",
            "0.999500",
            "1,500 rows of 2 pictures",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert_eq!(text.lines().count(), 8);
        let plain = Evaluation { pictures: None, ..model.clone() };
        assert_eq!(table(&reference, &[plain]).lines().count(), 4);
        let svg = plot::draw(&[model.clone(), model]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("small") && svg.ends_with("</svg>\n"), "{svg}");
    }
}
