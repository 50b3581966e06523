//! `cargo xtask parity`: what a GPU computes, held against the processor's scalar kernels, op by op.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pocketglm::gpu::Gpu;
use pocketglm::{
    Engine, EngineOptions, GenerateOptions, KvFormat, Message, Part, Picture, Recogniser, Request, Sampling,
    Sound,
};
use pocketglm_checkpoint::{Checkpoint, OpenOptions};
use pocketglm_glm::{Trace, decoder};
use pocketglm_graph::ops::Op;
use pocketglm_graph::{
    Backend, Bindings, CpuBackend, DeviceFault, Graph, GraphBuilder, Inputs, Outputs, passes,
};
use pocketglm_tensor::{Cpu, Isa, WeightSource};
use pocketglm_wgpu::cases::{self, relative_l2};
use pocketglm_wgpu::{GpuOptions, WgpuBackend};

use crate::model::Model;
use crate::{Error, Result, repo};

/// How far any value of a model in f32 may be from the processor's.
const MODEL: f64 = 1e-4;

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// What is compared with the processor.
    #[arg(long, value_parser = ["wgpu"], default_value = "wgpu")]
    backend: String,
    /// Part of the adapter's name; without it the first one, software included.
    #[arg(long)]
    gpu: Option<String>,
    /// Compares every value of this checkpoint's decoder instead of the case list.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Only plain kernels: no subgroups, no packed byte products.
    #[arg(long)]
    plain: bool,
    /// Most bytes of a binding.
    #[arg(long)]
    binding_limit: Option<u64>,
}

/// What a comparison ended with.
pub enum Parity {
    /// So much was compared, and all of it was right.
    Compared(usize),
    /// There is no adapter.
    Skipped(String),
}

/// Runs the comparison. Without an adapter it says so, and that this is no pass.
pub fn run(arguments: &Arguments) -> Result<()> {
    match compare(arguments)? {
        Parity::Compared(0) => Err(Error::Content {
            place: "parity".into(),
            wanted: "at least one case".into(),
            found: "none".into(),
        }),
        Parity::Compared(_) => Ok(()),
        Parity::Skipped(why) => Err(Error::Content {
            place: "parity".into(),
            wanted: "an adapter".into(),
            found: format!("SKIPPED, which is no pass: {why}"),
        }),
    }
}

/// The case list, on any adapter: a step of `cargo xtask check`.
pub fn check() -> Result<Parity> {
    let backend = "wgpu".into();
    compare(&Arguments { backend, gpu: None, model: None, plain: false, binding_limit: None })
}

fn compare(arguments: &Arguments) -> Result<Parity> {
    let options = GpuOptions {
        adapter: arguments.gpu.clone(),
        software: true,
        plain: arguments.plain,
        binding_limit: arguments.binding_limit,
        guarded: true,
        ..GpuOptions::default()
    };
    let gpu = match WgpuBackend::open(Arc::new(Cpu::new(0)?), &options) {
        Ok(gpu) => gpu,
        Err(e) if e.device_fault() == Some(DeviceFault::Absent) => return Ok(Parity::Skipped(e.to_string())),
        Err(e) => return Err(e.into()),
    };
    repo::print(&format!("{}: {}\n", arguments.backend, gpu.describe()))?;
    let cpu = Arc::new(Cpu::with_isa(Isa::Scalar, 1)?);
    let compared = match &arguments.model {
        None => {
            let (compared, covered) = list(&gpu, &cpu)?;
            let used = models(&options)?;
            uncovered(&covered, &used)?;
            repo::print(&format!(
                "all {} kinds of kernels that models use are among the {} of the case list\n",
                used.len(),
                covered.len()
            ))?;
            compared
        }
        Some(folder) => model(&gpu, cpu, folder)?,
    };
    Ok(Parity::Compared(compared))
}

/// Runs the case list, fused and unfused; the first op that differs is named first. Gives the kinds of kernels that it ran as
/// well.
fn list(gpu: &WgpuBackend, cpu: &Arc<Cpu>) -> Result<(usize, BTreeSet<String>)> {
    let (mut compared, mut problems) = (0, Vec::new());
    let mut worst: Vec<(&str, usize, f64)> = Vec::new();
    let mut covered = BTreeSet::new();
    for case in cases::all()? {
        let wanted = case.wanted(cpu)?;
        for fuse in [false, true] {
            let how = if fuse { "fused" } else { "unfused" };
            gpu.take_kernels();
            let found = case.run(gpu, fuse);
            let kernels = gpu.take_kernels();
            let bound = case.bound_of(&kernels);
            covered.extend(kernels);
            let difference = match found {
                Ok(found) => cases::compare(&wanted, &found, bound).map_err(|d| d.to_string()),
                Err(e) => Err(e.to_string()),
            };
            compared += 1;
            match difference {
                Err(difference) => problems.push(format!("{}, {how}: {difference}", case.name())),
                Ok(distance) => match worst.iter_mut().find(|w| w.0 == case.op) {
                    Some(w) => (w.1, w.2) = (w.1 + 1, w.2.max(distance)),
                    None => worst.push((case.op, 1, distance)),
                },
            }
        }
    }
    let mut rows = vec![["op", "compared", "worst distance"].map(String::from).to_vec()];
    rows.extend(worst.iter().map(|(op, n, d)| vec![(*op).into(), n.to_string(), format!("{d:.1e}")]));
    repo::print(&repo::table(&rows))?;
    Ok((verdict(compared, problems)?, covered))
}

/// Kinds of kernels that the models' programs are made of on this device: every tiny checkpoint, with a prompt, a picture, a
/// recording, and tokens one at a time, in each type of cache.
fn models(options: &GpuOptions) -> Result<BTreeSet<String>> {
    let gpu = Gpu::open(options).map_err(|e| failed("parity", &e))?;
    for (checkpoint, kv, fuse) in MODELS {
        let engine = EngineOptions {
            backend: Some(gpu.backend()),
            kv: *kv,
            fuse: *fuse,
            context: 512,
            ..EngineOptions::default()
        };
        run_model(&repo::root().join("tests/golden").join(checkpoint), engine)
            .map_err(|e| failed(checkpoint, &e))?;
    }
    Ok(gpu.take_kernels())
}

/// The checkpoints that show what models use: heads, caches and formats of every kind.
const MODELS: &[(&str, KvFormat, bool)] = &[
    ("default", KvFormat::F32, true),
    ("default", KvFormat::F32, false),
    ("default", KvFormat::F16, true),
    ("default", KvFormat::Int8, true),
    ("real-head-dim", KvFormat::F16, true),
    ("kv-heads-1", KvFormat::F32, true),
    ("merge-3", KvFormat::F32, true),
    ("temporal-1", KvFormat::F32, true),
    ("bf16", KvFormat::F16, true),
    ("f16", KvFormat::F32, true),
    ("tied", KvFormat::F32, true),
    ("gguf/text.gguf", KvFormat::F16, true),
    ("gguf/text.gguf", KvFormat::Int8, true),
    ("hear/base", KvFormat::F32, true),
    ("hear/base", KvFormat::F32, false),
    ("hear/large", KvFormat::F32, true),
    ("hear/base-odd-kernel", KvFormat::F32, true),
];

fn run_model(folder: &Path, options: EngineOptions) -> pocketglm::Result<()> {
    if Recogniser::is_one(folder) {
        let samples: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.05).sin()).collect();
        let sound = Sound::frames(&samples, 1, 16_000)?;
        Recogniser::open(folder, options)?.transcribe(&sound, 1)?;
        return Ok(());
    }
    let engine = Engine::open(folder, options)?;
    let pixels = (0..64 * 90 * 3).map(|i| (i * 7 % 251) as u8).collect();
    let parts = vec![Part::Image(Picture::rgb8(64, 90, pixels)?), Part::Text("What is it?".into())];
    let ids = (0..70).map(|i| 3 + i * 31 % 300).collect();
    let sampling = Sampling { temperature: 1.0, top_k: 8, ..Sampling::default() };
    let greedy = GenerateOptions { max_new_tokens: 4, ignore_eos: true, ..GenerateOptions::default() };
    let drawn = GenerateOptions { sampling, ..greedy.clone() };
    let mut session = engine.session();
    let text = engine.prompt(&Request::InputIds(ids))?;
    session.generate(&text, &greedy)?.text()?;
    session.forward(&text)?;
    if engine.info().vision_blocks > 0 {
        let picture = engine.prompt(&Request::Messages(vec![Message::parts("user", parts)]))?;
        session.generate(&picture, &drawn)?.text()?;
    }
    Ok(())
}

fn failed(place: &str, error: &pocketglm::Error) -> Error {
    Error::Content { place: place.into(), wanted: "a run on the GPU".into(), found: error.to_string() }
}

/// Fails where models use kernels that no case holds against the processor.
fn uncovered(covered: &BTreeSet<String>, used: &BTreeSet<String>) -> Result<()> {
    let missing: Vec<String> = used
        .difference(covered)
        .map(|kernel| format!("no case runs the kernel `{kernel}`, which a model uses"))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::Problems { check: "parity", problems: missing }) }
}

fn verdict(compared: usize, problems: Vec<String>) -> Result<usize> {
    if let Some(first) = problems.first() {
        repo::print(&format!("first difference: {first}\n"))?;
        return Err(Error::Problems { check: "parity", problems });
    }
    repo::print(&format!("parity: {compared} comparisons, no difference\n"))?;
    Ok(compared)
}

/// A prompt and a few tokens through a checkpoint's decoder, fused, with every value of it compared.
fn model(gpu: &WgpuBackend, cpu: Arc<Cpu>, folder: &Path) -> Result<usize> {
    let description = Model::open(&folder.to_string_lossy())?;
    let source: Arc<dyn WeightSource> = Arc::new(Checkpoint::open(folder, &OpenOptions::default())?);
    let mut g = GraphBuilder::new(&*source);
    decoder(&mut g, &description.text, Trace::Off)?;
    let mut graph = g.finish();
    passes::optimise(&mut graph)?;
    // The GPU's own pass comes first, so that the values it joins are not asked for.
    passes::apply("norm and residual into the layer behind", passes::fuse_norm_add_linear, &mut graph)?;
    graph.name_every_value();
    let vocabulary = description.text.vocab_size as i32;
    let wanted = decode(&CpuBackend::new(cpu), &graph, &source, vocabulary)?;
    let found = decode(gpu, &graph, &source, vocabulary)?;
    let (mut compared, mut problems) = (0, Vec::new());
    for (step, (wanted, found)) in wanted.iter().zip(&found).enumerate() {
        for ((name, wanted), (_, found)) in wanted.0.iter().zip(&found.0) {
            let distance = match written(&graph, name) {
                Some((width, of)) => {
                    relative_l2(&left(&found.values, width, of), &left(&wanted.values, width, of))
                }
                None => relative_l2(&found.values, &wanted.values),
            };
            compared += 1;
            if distance > MODEL {
                problems.push(format!("run {step}, {name}: {distance:.1e}, bound {MODEL:.0e}"));
            }
        }
    }
    verdict(compared, problems)
}

/// Where a backend need not write whole rows of a value: how many columns it writes, and of how many. Keys and values that
/// go to their states have no other readers.
fn written(graph: &Graph, name: &str) -> Option<(usize, usize)> {
    let (_, value) = graph.outputs().iter().find(|(output, _)| output == name)?;
    match &graph.node(*value).op {
        Op::Qkv(qkv) if qkv.append.is_some() && value.port() == 0 => {
            let queries = qkv.heads * qkv.head_dim;
            Some((queries, queries + 2 * qkv.kv_heads * qkv.head_dim))
        }
        _ => None,
    }
}

/// The first `width` columns of rows of `of`.
fn left(values: &[f32], width: usize, of: usize) -> Vec<f32> {
    values.chunks(of.max(1)).flat_map(|row| &row[..width.min(row.len())]).copied().collect()
}

/// All values of a prompt of nine tokens and of three tokens after it.
fn decode(
    backend: &dyn Backend,
    graph: &Graph,
    source: &Arc<dyn WeightSource>,
    vocabulary: i32,
) -> Result<Vec<Outputs>> {
    let program = backend.compile(graph, source.clone())?;
    let mut state = program.new_state(&Bindings::new().with("C", 16))?;
    let mut all = Vec::new();
    for (t, past) in [(9usize, 0usize), (1, 9), (1, 10), (1, 11)] {
        let ids: Vec<i32> = (past..past + t).map(|i| (i as i32 * 7919 + 13) % vocabulary).collect();
        let positions: Vec<i32> = (0..3).flat_map(|_| (past..past + t).map(|p| p as i32)).collect();
        let last = [t as i32 - 1];
        let inputs = Inputs::new()
            .i32("input_ids", &ids)
            .i32("position_ids", &positions)
            .i32("image_at", &[])
            .f32("image_embeds", &[])
            .i32("logit_rows", &last);
        let bindings = Bindings::new().with("T", t).with("P", past).with("V", 0).with("R", 1);
        all.push(program.run(&mut state, &inputs, &bindings)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_rows_that_are_partly_written_the_rest_does_not_count() {
        let (wanted, found) = ([1.0, 2.0, 9.0, 3.0, 4.0, 9.0], [1.0, 2.0, f32::NAN, 3.0, 4.0, 2e37]);
        assert_eq!(relative_l2(&left(&found, 2, 3), &left(&wanted, 2, 3)), 0.0);
        assert_eq!(relative_l2(&left(&found, 3, 3), &left(&wanted, 3, 3)), f64::INFINITY);
    }

    #[test]
    fn a_kernel_that_only_models_use_is_told() {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        let covered = set(&["gemm BIAS", "norm", "rope HALF"]);
        assert!(uncovered(&covered, &set(&["norm", "gemm BIAS"])).is_ok());
        let error = uncovered(&covered, &set(&["norm", "rope", "gemm"])).unwrap_err().to_string();
        assert!(error.contains("`rope`") && error.contains("`gemm`") && !error.contains("`norm`"), "{error}");
    }
}
