//! Running a model on samples to learn what the inputs of its linear layers look like.

use std::collections::HashMap;
use std::path::Path;

use pocketglm_glm::{Trace, decoder};
use pocketglm_graph::passes::{Tap, optimise, tap_caches, tap_linear_inputs};
use pocketglm_graph::{Graph, GraphBuilder, Outputs, Program};
use pocketglm_quant::stats::ChannelStats;

use super::forward::Forward;
use super::policy::matches;
use super::table::{InputStats, RowSample, fingerprint, matrix_values, write};
use super::{CalibrationTable, Samples};
use crate::model::vision_encoder;
use crate::prompt::Encodable;
use crate::session::encode_with;
use crate::{Cancel, Engine, EngineOptions, Error, OutFile, Progress, Result};

/// Tokens of one step: every linear layer's input of a step is in memory at once.
const STEP: usize = 64;
/// Bytes of activations that one run of the vision encoder keeps; where a picture has more, it runs several times.
const TAPPED_BYTES: u64 = 1 << 30;

/// How a model is calibrated.
#[derive(Clone)]
pub struct CalibrateOptions {
    /// How the model runs. Its progress hears of samples, as the step "calibrate".
    pub engine: EngineOptions,
    /// Most tokens of a piece that text is cut into.
    pub window: usize,
    /// Patterns of weights whose input's matrix of second moments is recorded, for GPTQ.
    pub second_moments: Vec<String>,
    /// Most bytes that these matrices take together; those that do not fit are left out.
    pub second_moments_bytes: u64,
    /// Whether a file that stands under the table's name is replaced.
    pub overwrite: bool,
    /// Stops the work from another thread.
    pub cancel: Cancel,
}

impl Default for CalibrateOptions {
    fn default() -> CalibrateOptions {
        CalibrateOptions {
            engine: EngineOptions::default(),
            window: 512,
            second_moments: Vec::new(),
            second_moments_bytes: 2 << 30,
            overwrite: false,
            cancel: Cancel::default(),
        }
    }
}

/// What [`calibrate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibrated {
    /// Prompts that ran.
    pub prompts: usize,
    /// Tokens that ran.
    pub tokens: u64,
    /// Pictures and videos that ran.
    pub pictures: u64,
    /// Inputs with statistics.
    pub inputs: usize,
    /// Inputs that no sample reached: those of the vision encoder where there are no pictures.
    pub unseen: usize,
    /// Inputs with a matrix of second moments.
    pub second_moments: usize,
    /// Inputs whose matrix was asked for and did not fit.
    pub left_out: usize,
}

/// The statistics so far.
struct Gathered {
    inputs: Vec<InputStats>,
    by_output: HashMap<String, usize>,
    left_out: usize,
    left_bytes: u64,
}

impl Gathered {
    /// Of inputs whose name is `sampled` some rows are kept.
    fn declare(
        &mut self,
        taps: Vec<Tap>,
        sampled: fn(&str) -> bool,
        options: &CalibrateOptions,
    ) -> Result<()> {
        for tap in taps {
            let wanted = options.second_moments.iter().any(|p| tap.weights.iter().any(|w| matches(p, w)));
            let bytes = (tap.channels as u64).saturating_mul(tap.channels as u64).saturating_mul(4);
            let full = wanted && bytes <= self.left_bytes;
            self.left_out += usize::from(wanted && !full);
            self.left_bytes -= if full { bytes } else { 0 };
            let stats = ChannelStats::new(tap.channels, full)
                .map_err(|source| Error::Statistics { tensor: tap.output.clone(), source })?;
            let rows = sampled(&tap.output).then(RowSample::default);
            self.by_output.insert(tap.output, self.inputs.len());
            self.inputs.push(InputStats { weights: tap.weights, stats, rows });
        }
        Ok(())
    }

    fn take(&mut self, engine: &Engine, outputs: Outputs) -> Result<()> {
        for (name, output) in outputs.0 {
            let input = self.by_output.get(&name).and_then(|&i| self.inputs.get_mut(i));
            if let Some(input) = input {
                let added = input.stats.add(&engine.inner.cpu, &output.values);
                added.map_err(|source| Error::Statistics { tensor: name, source })?;
                let k = input.stats.channels();
                input.rows.iter_mut().for_each(|sample| sample.add(k, &output.values));
            }
        }
        Ok(())
    }
}

/// Runs a model on samples and writes a [`CalibrationTable`].
///
/// # Errors
/// As [`Engine::open`] and [`Engine::prompt`]; as [`OutFile::check`] for the table's name, [`Error::Samples`],
/// [`Error::Statistics`] for activations that are not finite, [`Error::Calibration`] for a pattern of second moments that names no
/// weight, [`Error::Cancelled`].
pub fn calibrate(
    model: impl AsRef<Path>,
    samples: &Samples,
    out: impl AsRef<Path>,
    options: &CalibrateOptions,
) -> Result<Calibrated> {
    let target = OutFile::new(out.as_ref(), options.overwrite).keeping(samples.files());
    let target = target.keeping_model(&model, &options.engine)?;
    target.check()?;
    let engine = Engine::open(model, options.engine.clone())?;
    let requests = samples.requests(&engine, options.window)?;
    let mut gathered = Gathered {
        inputs: Vec::new(),
        by_output: HashMap::new(),
        left_out: 0,
        left_bytes: options.second_moments_bytes,
    };
    let (graph, taps) = decoder_taps(&engine)?;
    gathered.declare(taps, is_cache, options)?;
    let weights = engine.inner.model.weights.clone();
    let program = engine.inner.backend.compile(&graph, weights)?;
    let mut vision = VisionTaps::new(&engine)?;
    gathered.declare(vision.taps.clone(), |_| false, options)?;

    for pattern in &options.second_moments {
        let weights = || gathered.inputs.iter().flat_map(|i| &i.weights);
        if !weights().any(|w| matches(pattern, w)) {
            let example = weights().next().map_or("", String::as_str);
            let what = format!(
                "`{pattern}` (--second-moments) names no weight of a linear layer, such as `{example}`"
            );
            return Err(Error::Calibration { path: target.path().to_owned(), what });
        }
    }

    let (mut tokens, mut pictures) = (0, 0);
    for (i, request) in requests.iter().enumerate() {
        report(&options.engine, i, requests.len());
        let prompt = engine.prompt(request)?;
        for picture in &prompt.pictures {
            vision.run(&engine, picture, &mut |outputs| gathered.take(&engine, outputs))?;
        }
        let mut forward = Forward::new(&engine, &*program, &prompt, STEP)?;
        while let Some((_, outputs)) = forward.next()? {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            gathered.take(&engine, outputs)?;
        }
        tokens += prompt.ids.len() as u64;
        pictures += prompt.pictures.len() as u64;
    }
    report(&options.engine, requests.len(), requests.len());

    let all = gathered.inputs.len();
    // What no sample reached has no range; its absence says so.
    gathered.inputs.retain(|i| i.stats.rows > 0);
    let inputs = &gathered.inputs;
    target.check()?;
    let out = target.path();
    let model = &engine.inner.model;
    let of = (fingerprint(model)?, matrix_values(model)?);
    write(out, (&of.0, &of.1), samples.hash(), tokens, pictures, inputs)?;
    // Read back, so that a table that cannot be used is noticed here.
    CalibrationTable::open(out)?.check(&engine.inner.model)?;
    Ok(Calibrated {
        prompts: requests.len(),
        tokens,
        pictures,
        inputs: inputs.len(),
        unseen: all - inputs.len(),
        second_moments: inputs.iter().filter(|i| i.stats.second_moments.is_some()).count(),
        left_out: gathered.left_out,
    })
}

fn report(options: &EngineOptions, done: usize, total: usize) {
    if let Some(progress) = &options.progress {
        progress(Progress { step: "calibrate", done, total });
    }
}

/// Whether a name is that of a cache, and not that of a weight or of queries.
fn is_cache(name: &str) -> bool {
    name.ends_with(".self_attn.k") || name.ends_with(".self_attn.v")
}

/// The decoder with the inputs of its linear layers, and what goes into its caches, as results.
fn decoder_taps(engine: &Engine) -> Result<(Graph, Vec<Tap>)> {
    let model = &engine.inner.model;
    let mut g = GraphBuilder::new(&*model.weights);
    decoder(&mut g, &model.text, Trace::Off)?;
    let mut graph = g.finish();
    let mut taps = tap_linear_inputs(&mut graph, &|_| true);
    taps.extend(tap_caches(&mut graph));
    // Attention must be fused, or its scores would fill the memory; passes keep results as they are.
    optimise(&mut graph)?;
    Ok((graph, taps))
}

/// The vision encoder, run in parts so that what one run keeps stays small.
struct VisionTaps {
    taps: Vec<Tap>,
    /// Programs by the number of parts.
    programs: HashMap<usize, Vec<Box<dyn Program>>>,
}

impl VisionTaps {
    fn new(engine: &Engine) -> Result<VisionTaps> {
        let Some(vision) = &engine.inner.model.vision else {
            return Ok(VisionTaps { taps: Vec::new(), programs: HashMap::new() });
        };
        let mut g = GraphBuilder::new(&*engine.inner.model.weights);
        vision_encoder(&mut g, &vision.config, vision.fusion)?;
        let taps = tap_linear_inputs(&mut g.finish(), &|_| true);
        Ok(VisionTaps { taps, programs: HashMap::new() })
    }

    fn run(
        &mut self,
        engine: &Engine,
        picture: &Encodable,
        sink: &mut dyn FnMut(Outputs) -> Result<()>,
    ) -> Result<()> {
        // Statistics of the audio encoder are not gathered.
        let Some(pixels) = picture.pixels() else { return Ok(()) };
        let patches: u64 = pixels.grid.iter().map(|&side| side as u64).product();
        let width: u64 = self.taps.iter().map(|t| t.channels as u64).sum();
        let parts = patches.saturating_mul(width).saturating_mul(4).div_ceil(TAPPED_BYTES).max(1) as usize;
        let parts = parts.min(self.taps.len().max(1));
        if !self.programs.contains_key(&parts) {
            let mut programs = Vec::new();
            for part in self.taps.chunks(self.taps.len().div_ceil(parts).max(1)) {
                programs.push(vision_part(engine, part)?);
            }
            // Compiled anew for each size of picture that needs another number of parts, of which there are few.
            self.programs.clear();
            self.programs.insert(parts, programs);
        }
        for program in self.programs.get(&parts).into_iter().flatten() {
            sink(encode_with(engine, &**program, picture)?)?;
            program.trim();
        }
        Ok(())
    }
}

fn vision_part(engine: &Engine, taps: &[Tap]) -> Result<Box<dyn Program>> {
    let model = &engine.inner.model;
    let vision = model.vision.as_ref().ok_or(Error::NoVision { found: 1 })?;
    let mut g = GraphBuilder::new(&*model.weights);
    vision_encoder(&mut g, &vision.config, vision.fusion)?;
    let mut graph = g.finish();
    tap_linear_inputs(&mut graph, &|name| taps.iter().any(|t| t.weights.iter().any(|w| w == name)));
    optimise(&mut graph)?;
    Ok(engine.inner.backend.compile(&graph, model.weights.clone())?)
}
