use std::path::Path;
use std::sync::Arc;

use pocketglm_checkpoint::first_non_finite;
use pocketglm_glm::Sampling;
use pocketglm_graph::{Backend, CpuBackend, Graph, Program};
use pocketglm_tensor::{Cpu, WeightSource};
use pocketglm_vit::preprocess::{PreprocessConfig, resized_size};

use crate::ahead::ReadAhead;
use crate::fallback::{Decoder, Encoder, Move};
use crate::model::{Model, ModelInfo};
use crate::placement::Devices;
use crate::plan::{RunSize, plan};
use crate::range::Ranged;
use crate::{EngineOptions, Error, Fallback, MemoryPlan, OpPlace, Prompt, Request, Result, Session};

/// A loaded checkpoint. Clones share it; it can be used from any thread.
#[derive(Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub model: Model,
    pub options: EngineOptions,
    /// What runs the decoder.
    pub backend: Arc<dyn Backend>,
    pub devices: Devices,
    /// For the work around the programs.
    pub cpu: Arc<Cpu>,
    pub decoder: Decoder,
    /// Compiled with the first picture, so that text alone never touches the vision weights.
    pub vision: Encoder,
    /// Compiled with the first sound.
    pub audio: Encoder,
    /// Whether the device was given up.
    pub moved: Move,
    /// Reads the decoder's weights while the rest is made ready; ends with the engine.
    _ahead: Option<ReadAhead>,
}

impl Engine {
    /// Opens and checks a checkpoint folder, plans its memory, and makes it ready to run.
    ///
    /// Weights are mapped: they are read from the file when they are first used, but for the decoder's matrices in a `.pglm`
    /// file, which the processor's kernels use where they lie: a thread begins to read those at once.
    ///
    /// # Errors
    /// What the folder lacks or holds wrongly, with file and tensor; [`Error::Budget`] where the plan for the
    /// options' context and prefill step does not fit `options.memory`.
    pub fn open(path: impl AsRef<Path>, options: EngineOptions) -> Result<Engine> {
        let mut ahead = None;
        let model = Model::open_and(path.as_ref(), &options, &mut |weights| {
            // A device takes the weights away from the mapping while it is made ready.
            if options.backend.is_none() {
                ahead = ReadAhead::start(&**weights);
            }
        })?;
        let cpu = Arc::new(Cpu::new(options.threads)?);
        let begun = Devices::choose(&model, &options, &cpu).and_then(|devices| {
            let decoder = load(&model, &options, &devices)?;
            Ok((devices, decoder, Move::default()))
        });
        let (devices, decoder, moved) = match begun {
            Err(error) if options.fallback == Fallback::Cpu && error.device_fault().is_some() => {
                let devices = Devices::only(Arc::new(CpuBackend::new(cpu.clone())));
                let decoder = load(&model, &options, &devices)?;
                (devices, decoder, Move::made(error.to_string()))
            }
            begun => begun?,
        };
        let backend = devices.decoder.clone();
        let (vision, audio) = (Encoder::default(), Encoder::default());
        let inner =
            Inner { model, options, backend, devices, cpu, decoder, vision, audio, moved, _ahead: ahead };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// What a checkpoint is, and what running it will take, without loading it.
    ///
    /// `screen` is the width and height of the largest picture, or `None` for text alone.
    ///
    /// # Errors
    /// As [`Engine::open`], except that the budget is not checked: see [`MemoryPlan::check`].
    pub fn inspect(
        path: impl AsRef<Path>,
        options: &EngineOptions,
        screen: Option<(usize, usize)>,
    ) -> Result<(ModelInfo, MemoryPlan)> {
        let model = Model::open(path.as_ref(), options)?;
        let devices = Devices::choose(&model, options, &Arc::new(Cpu::new(options.threads)?))?;
        let mut size = text_size(&model, options);
        if let (Some((width, height)), Some(vision)) = (screen, &model.vision) {
            size.patches = patches(&vision.images, width, height)?;
            size.all_patches = size.patches;
            // The tokens of a picture are one token, over and over.
            let merge = vision.config.spatial_merge_size.max(1);
            size.rows = size.rows.saturating_sub(size.patches / (merge * merge)).max(1);
            size.pixels = width * height;
        }
        let memory = plan(&model, &devices, &size)?;
        Ok((model.info(), memory))
    }

    /// The ops of a checkpoint in the order in which they run, and which of them are in the range of
    /// [`EngineOptions::device_ops`].
    ///
    /// # Errors
    /// As [`Engine::inspect`], and a range that names no op.
    pub fn ops(path: impl AsRef<Path>, options: &EngineOptions) -> Result<Vec<OpPlace>> {
        let model = Model::open(path.as_ref(), options)?;
        let programs = model.programs();
        Ok(Ranged::new(&options.device_ops, &programs)?.places(&programs))
    }

    /// What the checkpoint is.
    pub fn info(&self) -> ModelInfo {
        self.inner.model.info()
    }

    /// What runs it: after a failure of the device the processor.
    pub fn device(&self) -> String {
        match self.has_moved() {
            true => self.inner.devices.cpu.describe(),
            false => self.inner.backend.describe(),
        }
    }

    /// The backend of the options, for measuring it.
    pub fn device_backend(&self) -> Option<&Arc<dyn Backend>> {
        self.inner.options.backend.as_ref()
    }

    /// Bytes that a large copy in the device's memory moves in a second, where the device is not the processor.
    ///
    /// # Errors
    /// A device that fails.
    pub fn copy_rate(&self) -> Result<Option<f64>> {
        match &self.inner.options.backend {
            Some(device) => Ok(device.copy_rate()?),
            None => Ok(None),
        }
    }

    /// The graphs that run, by name: for reports.
    pub fn graphs(&self) -> Vec<(&'static str, &Graph)> {
        let vision = self.inner.model.vision.iter().map(|v| ("vision", &v.graph));
        let audio = self.inner.model.audio.iter().map(|a| ("audio", &a.graph));
        std::iter::once(("decoder", self.inner.decoder.graph())).chain(vision).chain(audio).collect()
    }

    /// The plan for one prompt and an answer of `max_new_tokens`.
    ///
    /// # Errors
    /// Sizes that make no sense.
    pub fn plan(&self, prompt: &Prompt, max_new_tokens: usize) -> Result<MemoryPlan> {
        let model = &self.inner.model;
        let patches =
            |p: &crate::prompt::Encodable| p.pixels().map_or(0, |p| p.grid.iter().product::<usize>());
        let samples = || prompt.pictures.iter().map(|p| p.samples().map_or(0, <[f32]>::len));
        let context = prompt.ids.len().saturating_add(max_new_tokens).min(model.context(&self.inner.options));
        let different = prompt.ids.iter().collect::<std::collections::HashSet<_>>().len();
        let size = RunSize {
            rows: different.saturating_add(max_new_tokens).min(context),
            context: crate::session::capacity(context, model.context(&self.inner.options)),
            chunk: self.inner.options.prefill_chunk.min(prompt.ids.len()),
            patches: prompt.pictures.iter().map(|p| patches(p)).max().unwrap_or(0),
            all_patches: prompt.pictures.iter().map(|p| patches(p)).sum(),
            pixels: prompt.pictures.iter().map(|p| p.decoded).max().unwrap_or(0),
            samples: [samples().max().unwrap_or(0), samples().sum()],
        };
        match self.has_moved() {
            true => plan(model, &Devices::only(self.inner.devices.cpu.clone()), &size),
            false => plan(model, &self.inner.devices, &size),
        }
    }

    /// The sampling that the checkpoint's `generation_config.json` recommends; greedy where it has none.
    pub fn default_sampling(&self) -> Sampling {
        self.inner.model.sampling.clone()
    }

    /// Renders, tokenizes and places a request, and prepares its pictures.
    ///
    /// # Errors
    /// Pictures that cannot be read, placeholders in the text of a message, token ids outside the vocabulary.
    pub fn prompt(&self, request: &Request) -> Result<Prompt> {
        Prompt::new(&self.inner.model, request, &self.inner.options)
    }

    /// A new, empty conversation.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// Token ids of a text; the spelling of a special token counts as that token.
    ///
    /// # Errors
    /// A text beyond the tokenizer's limits.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        self.inner.model.tokenizer.encode(text).map_err(|source| Error::Text { what: "text", source })
    }

    /// Text of token ids; bytes that are no UTF-8 give U+FFFD.
    pub fn detokenize(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.model.tokenizer.decode(ids, skip_special)
    }

    /// The error for logits that are not finite: names the weight that is to blame, where there is one.
    pub(crate) fn explain(&self, error: pocketglm_glm::Error) -> Error {
        let pocketglm_glm::Error::NotFinite { token, value } = error else { return error.into() };
        if let Some((tensor, index, value)) = self.non_finite_weight() {
            return Error::WeightNotFinite { tensor, index, value };
        }
        Error::LogitNotFinite { token, value }
    }

    /// The first weight that is NaN or infinite: its tensor, its index there and the value.
    pub(crate) fn non_finite_weight(&self) -> Option<(String, usize, f32)> {
        let weights = &self.inner.model.weights;
        weights.tensors().into_iter().find_map(|info| {
            let tensor = weights.tensor(&info.name).ok()?;
            let index = first_non_finite(&tensor)?;
            let value = tensor.to_f32().ok().and_then(|v| v.get(index).copied()).unwrap_or(f32::NAN);
            Some((info.name, index, value))
        })
    }

    /// The compiled vision encoder.
    pub(crate) fn vision(&self) -> Result<&dyn Program> {
        let Inner { model, devices, vision, .. } = &*self.inner;
        let found = model.vision.as_ref().ok_or(Error::NoVision { found: 1 })?;
        vision.compiled(self, &devices.vision, &found.graph, model.extended.clone())
    }

    /// The compiled audio encoder.
    pub(crate) fn audio(&self) -> Result<&dyn Program> {
        let Inner { model, devices, audio, .. } = &*self.inner;
        let found = model.audio.as_ref().ok_or(Error::NoAudio { found: 1 })?;
        audio.compiled(self, &devices.audio, &found.graph, found.weights.clone())
    }
}

/// The backend that the options name; the processor where they name none.
pub(crate) fn backend(options: &EngineOptions, cpu: &Arc<Cpu>) -> Arc<dyn Backend> {
    options.backend.clone().unwrap_or_else(|| Arc::new(CpuBackend::new(cpu.clone())))
}

/// The decoder's program on these devices, if its plan fits.
fn load(model: &Model, options: &EngineOptions, devices: &Devices) -> Result<Decoder> {
    if options.memory.is_some() {
        // Text alone must fit; a prompt with pictures is checked again when its pictures are known.
        plan(model, devices, &text_size(model, options))?.check(options.memory)?;
    }
    Ok(Decoder::new(devices.decoder.compile(&model.decoder, model.weights.clone())?))
}

pub(crate) fn text_size(model: &Model, options: &EngineOptions) -> RunSize {
    let context = model.context(options);
    RunSize {
        rows: context,
        context,
        chunk: options.prefill_chunk.min(context),
        patches: 0,
        all_patches: 0,
        pixels: 0,
        samples: [0; 2],
    }
}

/// Patches of a still picture of this size.
pub(crate) fn patches(config: &PreprocessConfig, width: usize, height: usize) -> Result<usize> {
    let (h, w) = resized_size(config.temporal_patch_size(), height, width, config)?;
    Ok((h / config.patch_size()) * (w / config.patch_size()))
}
