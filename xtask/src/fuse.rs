//! `cargo xtask fuse`: what the passes make of a model's graphs, in figures and as drawings.

mod view;

use std::fs;
use std::path::PathBuf;

use pocketglm_graph::ops::Cost;
use pocketglm_graph::passes::{self, Report};
use pocketglm_graph::{Bindings, Graph, Plan, eval_shape};
use pocketglm_tensor::DType;
use pocketglm_vit::preprocess::{PreprocessConfig, smart_resize};

use crate::draw::svg::{self, Column};
use crate::error::io_error;
use crate::model::Model;
use crate::speech::Speech;
use crate::synth::parse_dtype;
use crate::{Error, Result, repo};

/// The decode program must lose at least this part of its nodes.
const LEAST_REDUCTION: f64 = 0.6;

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// A folder under `models/`, a checkpoint folder, or a `config.json`.
    model: String,
    /// Folder for the drawings.
    #[arg(long, default_value = "target/fuse")]
    out: PathBuf,
    /// Type of the weights; that of `config.json` where left out.
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
}

/// A graph before and after the passes.
struct Rewritten {
    before: Graph,
    after: Graph,
    reports: Vec<Report>,
}

/// A graph with sizes: what one call of it costs.
struct Program {
    name: &'static str,
    sizes: String,
    before: Totals,
    after: Totals,
}

/// Figures of one graph under one set of sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    nodes: usize,
    dispatches: usize,
    cost: Cost,
    arena: u64,
    without_reuse: u64,
}

impl Totals {
    /// Bytes that move, operations and memory of a graph, for one call under `bindings`.
    fn new(graph: &Graph, bindings: &Bindings) -> Result<Totals> {
        let mut cost = Cost::default();
        for node in graph.nodes().iter().filter(|n| !n.load_time) {
            let input = |v: &pocketglm_graph::Value| {
                let meta = graph.meta(*v);
                eval_shape(&meta.shape, bindings).map(|shape| (meta.dtype, shape))
            };
            let inputs = node.inputs.iter().map(input).collect::<Result<Vec<_>, _>>()?;
            let output = |m: &pocketglm_graph::Meta| eval_shape(&m.shape, bindings);
            let outputs = node.outputs.iter().map(output).collect::<Result<Vec<_>, _>>()?;
            cost += node.op.cost(&inputs, &outputs);
        }
        let plan = Plan::new(graph, bindings)?;
        Ok(Totals {
            nodes: graph.compute_nodes(),
            dispatches: graph.dispatches(),
            cost,
            arena: plan.arena_bytes(),
            without_reuse: plan.bytes_without_reuse(),
        })
    }
}

/// Prints the figures, draws the graphs, and fails where the decode program is not reduced enough.
pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(speech) = Speech::open(&arguments.model)? {
        return run_speech(&speech, arguments);
    }
    let model = Model::open(&arguments.model)?;
    let dtype = arguments.dtype.or(model.dtype()).unwrap_or(DType::BF16);
    let decoder = rewrite(model.decoder(dtype)?)?;
    let encoder = rewrite(model.encoder(dtype)?)?;
    let decoder_programs = [
        program(&decoder, "decode", &decoder_sizes(1, 1024))?,
        program(&decoder, "prefill", &decoder_sizes(512, 0))?,
    ];
    let encoder_programs = [program(&encoder, "picture 540x1200", &picture_sizes(&model, 1200, 540)?)?];

    let mut text = format!("{}, weights in {dtype}\n", model.name);
    for (name, rewritten, programs) in
        [("decoder", &decoder, &decoder_programs[..]), ("vision encoder", &encoder, &encoder_programs[..])]
    {
        text.push_str(&format!("\n{name}: passes\n{}", repo::table(&pass_rows(&rewritten.reports))));
        for program in programs {
            text.push_str(&format!("\n{name}, {} ({})\n", program.name, program.sizes));
            text.push_str(&repo::table(&total_rows(program)));
        }
    }

    let out = repo::root().join(&arguments.out);
    fs::create_dir_all(&out).map_err(io_error("create", &out))?;
    for (kind, rewritten, programs, layers) in [
        ("decoder", &decoder, &decoder_programs[..], model.text.num_hidden_layers),
        ("vision encoder", &encoder, &encoder_programs[..], model.vision.depth),
    ] {
        let file = out.join(format!("{}-{}.svg", model.name, kind.replace(' ', "-")));
        repo::write(&file, &drawing(&model.name, kind, rewritten, programs, layers))?;
        text.push_str(&format!("\ndrawn: {}", file.display()));
    }
    let reduction = reduction(&decoder_programs[0]);
    text.push_str(&format!("\ndecode program: {:.1} % fewer nodes\n", reduction * 100.0));
    repo::print(&text)?;
    require(reduction)
}

/// Width of the decoder that the projection of a speech model's report goes to.
const DECODER_WIDTH: usize = 4096;

/// The report of a speech model: with its head, and as the audio branch of a decoder.
fn run_speech(speech: &Speech, arguments: &Arguments) -> Result<()> {
    let sizes = Bindings::new().with("N", 30 * 16_000);
    let mut text = format!("{}, weights in F32\n", speech.name);
    let out = repo::root().join(&arguments.out);
    fs::create_dir_all(&out).map_err(io_error("create", &out))?;
    let branch = format!("audio branch of a decoder {DECODER_WIDTH} wide");
    for (kind, file, graph) in [
        ("speech recogniser", "recogniser", speech.recogniser()?),
        (branch.as_str(), "audio-branch", speech.branch(DECODER_WIDTH)?),
    ] {
        let rewritten = rewrite(graph)?;
        let programs = [program(&rewritten, "30 seconds", &sizes)?];
        text.push_str(&format!("\n{kind}: passes\n{}", repo::table(&pass_rows(&rewritten.reports))));
        text.push_str(&format!("\n{kind}, {} ({})\n", programs[0].name, programs[0].sizes));
        text.push_str(&repo::table(&total_rows(&programs[0])));
        let file = out.join(format!("{}-{file}.svg", speech.name));
        let layers = speech.config.num_hidden_layers;
        repo::write(&file, &drawing(&speech.name, kind, &rewritten, &programs, layers))?;
        text.push_str(&format!("\ndrawn: {}\n", file.display()));
    }
    repo::print(&text)
}

fn require(reduction: f64) -> Result<()> {
    if reduction >= LEAST_REDUCTION {
        return Ok(());
    }
    Err(Error::Content {
        place: "nodes of the decode program".into(),
        wanted: format!("at least {:.0} % fewer", LEAST_REDUCTION * 100.0),
        found: format!("{:.1} %", reduction * 100.0),
    })
}

fn rewrite(before: Graph) -> Result<Rewritten> {
    let mut after = before.clone();
    let reports = passes::optimise(&mut after)?;
    Ok(Rewritten { before, after, reports })
}

/// `T` new tokens after `P` past ones, logits for the last, no picture among the new ones.
fn decoder_sizes(new: usize, past: usize) -> Bindings {
    Bindings::new().with("T", new).with("P", past).with("C", new + past).with("R", 1).with("V", 0)
}

/// One picture, resized as the model's preprocessing says.
fn picture_sizes(model: &Model, height: usize, width: usize) -> Result<Bindings> {
    let path = model.folder.join("preprocessor_config.json");
    let config = if path.is_file() {
        PreprocessConfig::from_image_json(&fs::read(&path).map_err(io_error("read", &path))?)?
    } else {
        PreprocessConfig::published()
    };
    let (height, width) = smart_resize(config.temporal_patch_size(), height, width, &config)?;
    let tokens = (height / config.factor()) * (width / config.factor());
    Ok(Bindings::new().with("M", tokens).with("G", 2))
}

fn program(graph: &Rewritten, name: &'static str, bindings: &Bindings) -> Result<Program> {
    let sizes: Vec<String> = bindings.iter().map(|(name, size)| format!("{name} = {size}")).collect();
    let before = Totals::new(&graph.before, bindings)?;
    let after = Totals::new(&graph.after, bindings)?;
    Ok(Program { name, sizes: sizes.join(", "), before, after })
}

fn reduction(program: &Program) -> f64 {
    1.0 - program.after.nodes as f64 / program.before.nodes.max(1) as f64
}

fn pass_rows(reports: &[Report]) -> Vec<Vec<String>> {
    let mut rows = vec![["pass", "applied", "nodes before", "after"].map(str::to_owned).to_vec()];
    rows.extend(reports.iter().map(|r| {
        vec![r.pass.to_owned(), r.applied.to_string(), grouped(r.before as u64), grouped(r.after as u64)]
    }));
    rows
}

fn total_rows(program: &Program) -> Vec<Vec<String>> {
    let (a, b) = (&program.before, &program.after);
    let row = |name: &str, a: f64, b: f64, show: &dyn Fn(f64) -> String| {
        let change = if a > 0.0 { format!("{:+.1} %", (b / a - 1.0) * 100.0) } else { "-".into() };
        vec![name.to_owned(), show(a), show(b), change]
    };
    let number = |n: f64| grouped(n as u64);
    vec![
        ["", "before", "after", "change"].map(str::to_owned).to_vec(),
        row("nodes", a.nodes as f64, b.nodes as f64, &number),
        row("dispatches", a.dispatches as f64, b.dispatches as f64, &number),
        row("operations", a.cost.operations, b.cost.operations, &scaled),
        row("bytes moved", a.cost.bytes, b.cost.bytes, &bytes),
        row("arena", a.arena as f64, b.arena as f64, &bytes),
        row("arena without reuse", a.without_reuse as f64, b.without_reuse as f64, &bytes),
    ]
}

/// `1234567` as `1,234,567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn scaled(n: f64) -> String {
    match n {
        n if n >= 1e12 => format!("{:.3} T", n / 1e12),
        n if n >= 1e9 => format!("{:.3} G", n / 1e9),
        n if n >= 1e6 => format!("{:.3} M", n / 1e6),
        n => format!("{n:.0}"),
    }
}

fn bytes(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.3} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.3} MB", n / 1e6),
        n => format!("{:.1} kB", n / 1e3),
    }
}

fn drawing(model: &str, kind: &str, graph: &Rewritten, programs: &[Program], layers: usize) -> String {
    let column = |title: &str, graph: &Graph| Column {
        title: title.into(),
        subtitle: format!(
            "{} nodes, {} dispatches",
            grouped(graph.compute_nodes() as u64),
            grouped(graph.dispatches() as u64)
        ),
        sketch: view::sketch(graph),
        tables: Vec::new(),
    };
    let before = column("before", &graph.before);
    let mut after = column("after", &graph.after);
    after.tables.push(("what each pass did".into(), pass_rows(&graph.reports)));
    for program in programs {
        after.tables.push((format!("{} ({})", program.name, program.sizes), total_rows(program)));
    }
    let subtitle = format!(
        "{layers} layers, the first of them drawn. A reshape or a cut along the first dimension is a view: a node, and no dispatch."
    );
    svg::page(&format!("{model}: {kind}"), &subtitle, &[before, after])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Model {
        Model::open(repo::root().join("tests/golden/default").to_str().unwrap()).unwrap()
    }

    #[test]
    fn the_decode_program_loses_enough_nodes_and_no_work() {
        let graph = rewrite(Model::open("autoglm-phone-9b").unwrap().decoder(DType::BF16).unwrap()).unwrap();
        let decode = program(&graph, "decode", &decoder_sizes(1, 1024)).unwrap();
        require(reduction(&decode)).unwrap();
        assert!(decode.after.dispatches < decode.before.dispatches);
        assert!(decode.after.arena <= decode.after.without_reuse);
        // Two operations for each of 8.8e9 weights; 2 bytes each.
        let Cost { operations, bytes } = decode.after.cost;
        assert!((17.5e9..18.5e9).contains(&operations), "{operations}");
        assert!((17.5e9..18.0e9).contains(&bytes), "{bytes}");
    }

    #[test]
    fn too_small_a_reduction_fails() {
        assert!(require(0.6).is_ok());
        assert!(require(0.59).unwrap_err().to_string().contains("59.0 %"));
    }

    #[test]
    fn a_picture_makes_as_many_tokens_as_the_reference_says() {
        let model = Model::open("autoglm-phone-9b").unwrap();
        assert_eq!(picture_sizes(&model, 2400, 1080).unwrap().get("M"), Some(3354));
        assert_eq!(picture_sizes(&model, 336, 336).unwrap().get("M"), Some(144));
    }

    #[test]
    fn the_drawing_shows_both_sides_and_folds_equal_layers() {
        let model = tiny();
        let graph = rewrite(model.decoder(DType::F32).unwrap()).unwrap();
        let programs = [program(&graph, "decode", &decoder_sizes(1, 8)).unwrap()];
        let page = drawing("tiny", "decoder", &graph, &programs, 3);
        assert!(page.starts_with("<svg") && page.trim_end().ends_with("</svg>"));
        assert_eq!(
            page.matches("2 more layers, 1 of them like this").count(),
            4,
            "a box and its hint on each side"
        );
        assert_eq!(page.matches("logit_rows [R]").count(), 2, "named where the last layer reads it");
        for word in ["before", "after", "logits", "lm_head", "embed_tokens", "attention", "@BOTTOM@"] {
            assert_eq!(page.contains(word), word != "@BOTTOM@", "{word}");
        }
    }

    #[test]
    fn both_speech_families_lose_their_norms_activations_and_the_tag_to_their_neighbours() {
        let ops = |graph: &Graph, prefix: &str| {
            graph.nodes().iter().filter(|n| n.op.name().starts_with(prefix)).count()
        };
        for (name, normed, layers) in [("wav2vec2-base", 1, 12), ("wav2vec2-large", 7, 24)] {
            let speech = Speech::open(name).unwrap().unwrap();
            let Rewritten { before, after, .. } = rewrite(speech.branch(4096).unwrap()).unwrap();
            // Seven convolutions and the positional one, all with GELU.
            assert_eq!(ops(&before, "frame_conv"), 8);
            assert_eq!(ops(&after, "frame_conv_norm_act"), normed, "{name}");
            assert_eq!(ops(&after, "frame_conv_act"), 8 - normed, "{name}");
            assert_eq!((ops(&before, "gelu"), ops(&after, "gelu")), (8 + layers, 0), "{name}");
            assert_eq!(ops(&after, "attention"), layers, "{name}");
            // The tag is a part of the projection's bias, which is computed once.
            let tag = after.nodes().iter().find(|n| n.load_time && n.op.name() == "add");
            assert!(tag.is_some(), "{name}: no bias with the tag in it");
            let last = after.nodes().iter().rev().find(|n| !n.load_time && !n.op.is_source()).unwrap();
            assert!(last.op.name().contains("linear"), "{name} ends with {}", last.op.name());
            assert!(after.compute_nodes() * 4 < before.compute_nodes(), "{name}");
        }
    }

    #[test]
    fn numbers_are_grouped_and_scaled() {
        assert_eq!([grouped(5), grouped(1234), grouped(1_234_567)], ["5", "1,234", "1,234,567"]);
        assert_eq!([scaled(12.0), scaled(2.5e9), bytes(1500.0)], ["12", "2.500 G", "1.5 kB"]);
    }
}
