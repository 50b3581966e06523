//! A checkpoint that only hears: Wav2Vec2, with or without a CTC head.

use std::path::Path;
use std::sync::Arc;

use pocketglm_graph::{Backend, Bindings, CpuBackend, Graph};
use pocketglm_tensor::Cpu;
use pocketglm_wav2vec as wav2vec;
use pocketglm_wav2vec::audio::{Level, LevelMeter, WavBlocks};
use pocketglm_wav2vec::{Chunking, Precision, RecogniserInfo, Stream, Transcript};

use crate::engine::backend;
use crate::plan::PROGRAM_BYTES;
use crate::range::Ranged;
use crate::sound::open;
use crate::{Cancel, EngineOptions, Error, MemoryPlan, MemoryUse, OpPlace, Result, Sound, Trace};

/// Bytes of the program: code that speech needs besides, and what the allocator keeps of the work while matrices are
/// rounded or turned. Measured: up to 20 MiB with a base-size encoder.
const SPEECH_PROGRAM_BYTES: u64 = PROGRAM_BYTES + (14 << 20);

/// A loaded Wav2Vec2 checkpoint. Clones share it; it can be used from any thread.
#[derive(Clone)]
pub struct Recogniser {
    inner: wav2vec::Recogniser,
    options: EngineOptions,
}

/// How a recording is transcribed.
#[derive(Clone, Debug, Default)]
pub struct TranscribeOptions {
    /// How long audio is cut.
    pub chunking: Chunking,
    /// Texts that are kept while decoding; 0 or 1 takes the best token of each frame.
    pub beam: usize,
    /// Stops the work from another thread, after the chunk that runs.
    pub cancel: Cancel,
}

/// Whether a checkpoint is one of speech: `model_type` of its `config.json` is `wav2vec2`.
pub(crate) fn hears_only(path: &Path) -> bool {
    let config = pocketglm_checkpoint::Checkpoint::open(path, &Default::default())
        .and_then(|c| c.required_json("config.json"));
    config.is_ok_and(|c| c.get("model_type").and_then(|t| t.as_str()) == Some("wav2vec2"))
}

fn options(options: &EngineOptions) -> wav2vec::RecogniserOptions {
    wav2vec::RecogniserOptions {
        precision: options.audio_precision,
        read_mode: options.read_mode,
        fuse: options.fuse,
        limits: options.audio_limits.clone(),
    }
}

/// What runs the graph of a checkpoint, which is only looked at where a range of its ops is wanted.
fn backend_for(path: &Path, engine: &EngineOptions) -> Result<Arc<dyn Backend>> {
    if engine.device_ops.is_all() || engine.backend.is_none() {
        return Ok(backend(engine, &Arc::new(Cpu::new(engine.threads)?)));
    }
    backend_of(&wav2vec::Recogniser::inspect(path, &options(engine))?.1, engine)
}

fn backend_of(graph: &Graph, engine: &EngineOptions) -> Result<Arc<dyn Backend>> {
    let cpu = Arc::new(Cpu::new(engine.threads)?);
    let Some(device) = engine.backend.as_ref().filter(|_| !engine.device_ops.is_all()) else {
        return Ok(backend(engine, &cpu));
    };
    let range = Ranged::new(&engine.device_ops, &[(PROGRAM, graph)])?;
    let cpu: Arc<dyn Backend> = Arc::new(CpuBackend::new(cpu));
    Ok(range.backend(PROGRAM, device, &cpu))
}

/// How lists of ops call the one program of a speech checkpoint.
const PROGRAM: &str = "speech";

impl Recogniser {
    /// The ops of a checkpoint in the order in which they run, and which of them are in the range of
    /// [`EngineOptions::device_ops`].
    ///
    /// # Errors
    /// As [`Recogniser::inspect`], and a range that names no op.
    pub fn ops(path: impl AsRef<Path>, engine: &EngineOptions) -> Result<Vec<OpPlace>> {
        let programs = [(PROGRAM, &wav2vec::Recogniser::inspect(path, &options(engine))?.1)];
        Ok(Ranged::new(&engine.device_ops, &programs)?.places(&programs))
    }

    /// Opens and checks a checkpoint folder or `.pglm` file and makes it ready to run.
    ///
    /// # Errors
    /// What the folder lacks or holds wrongly, with file and tensor; [`Error::Budget`] where the plan for a chunk
    /// does not fit `options.memory`.
    pub fn open(path: impl AsRef<Path>, engine: EngineOptions) -> Result<Recogniser> {
        engine.report("load", 0, 1);
        if engine.memory.is_some() {
            let chunking = Chunking::default();
            let seconds = chunking.seconds + 2.0 * chunking.context;
            Recogniser::inspect(path.as_ref(), &engine, seconds)?.1.check(engine.memory)?;
        }
        let backend = backend_for(path.as_ref(), &engine)?;
        let inner = wav2vec::Recogniser::open(path, backend, options(&engine))?;
        engine.report("load", 1, 1);
        Ok(Recogniser { inner, options: engine })
    }

    /// Whether `path` is a checkpoint of speech alone, for programs that take any model.
    pub fn is_one(path: impl AsRef<Path>) -> bool {
        hears_only(path.as_ref())
    }

    /// What a checkpoint is, and what encoding `seconds` of audio at once will take, without loading it.
    ///
    /// # Errors
    /// As [`Recogniser::open`], except that the budget is not checked: see [`MemoryPlan::check`].
    pub fn inspect(
        path: impl AsRef<Path>,
        engine: &EngineOptions,
        seconds: f64,
    ) -> Result<(RecogniserInfo, MemoryPlan)> {
        let (info, graph) = wav2vec::Recogniser::inspect(path, &options(engine))?;
        let backend = backend_of(&graph, engine)?;
        let samples = (seconds.max(0.0) * f64::from(wav2vec::SAMPLE_RATE)) as usize;
        let samples = samples.max(info.config.receptive_field());
        let memory = backend.plan(&graph, &Bindings::new().with("N", samples))?;
        let part = MemoryUse::host;
        let parts = vec![
            part("program", SPEECH_PROGRAM_BYTES),
            part("weights", memory.weights + memory.converted),
            part("activations", memory.activations),
            // The samples and their normalised copy.
            part("audio", samples as u64 * 8),
            part("kernel scratch", memory.scratch),
        ];
        Ok((info, MemoryPlan { parts, context: 0, patches: 0, placement: None }))
    }

    /// The model below.
    pub fn model(&self) -> &wav2vec::Recogniser {
        &self.inner
    }

    /// The text of a sound, encoded as a whole.
    ///
    /// # Errors
    /// What reading the sound reports, [`pocketglm_wav2vec::Error::TooShort`], a checkpoint without head or vocabulary.
    pub fn transcribe(&self, sound: &Sound, beam: usize) -> Result<Transcript> {
        let clip = sound.load(&self.options.audio_limits)?;
        Ok(self.inner.transcribe(&clip, beam)?)
    }

    /// The features of a sound, `[frames, hidden_size]`.
    ///
    /// # Errors
    /// As [`Recogniser::transcribe`], except that no head is needed.
    pub fn features(&self, sound: &Sound) -> Result<Vec<f32>> {
        let clip = sound.load(&self.options.audio_limits)?;
        Ok(self.inner.features(&clip.input_values(self.inner.normalises()))?.values)
    }

    /// Logits `[frames, vocabulary]` of samples at 16 kHz that are normalised already.
    ///
    /// # Errors
    /// As [`Recogniser::transcribe`].
    pub fn logits(&self, input_values: &[f32]) -> Result<Vec<f32>> {
        Ok(self.inner.logits(input_values)?.values)
    }

    /// The text of a WAV file of any length up to the limit, chunk by chunk, with memory for one chunk. Reads the file
    /// twice: first for mean and variance.
    ///
    /// # Errors
    /// As [`Recogniser::transcribe`], and [`Error::Cancelled`].
    pub fn transcribe_file(&self, path: impl AsRef<Path>, how: &TranscribeOptions) -> Result<Transcript> {
        let path = path.as_ref();
        let named = |source| Error::Sound { sound: path.display().to_string(), source: Box::new(source) };
        let level = match how.chunking.level {
            Some(level) => level,
            None => self.level(path, how)?,
        };
        let chunking = Chunking { level: Some(level), ..how.chunking.clone() };
        let mut stream = self.inner.stream(wav2vec::SAMPLE_RATE, &chunking, how.beam)?;
        let mut tokens = Vec::new();
        self.each_block(path, how, "transcribe", &mut |samples| {
            tokens.extend(stream.push(samples).map_err(named)?);
            Ok(())
        })?;
        let seconds = stream.seconds();
        tokens.extend(stream.finish().map_err(named)?);
        Ok(self.inner.transcript(tokens, seconds))
    }

    /// A stream of audio of `rate` frames a second, such as a microphone gives.
    ///
    /// # Errors
    /// A rate or chunks that make no sense, a checkpoint without head or vocabulary.
    pub fn stream(&self, rate: u32, how: &TranscribeOptions) -> Result<Stream> {
        Ok(self.inner.stream(rate, &how.chunking, how.beam)?)
    }

    /// Everything that the reference names, of one clip: `input_values [1, N]`, `hidden_states.{i} [1, T, H]`,
    /// `last_hidden_state`, and `logits [1, T, V]` where there is a head.
    ///
    /// # Errors
    /// As [`Recogniser::features`].
    pub fn trace(&self, sound: &Sound) -> Result<Trace> {
        let clip = sound.load(&self.options.audio_limits)?;
        Ok(Trace::of(self.inner.trace(&clip)?))
    }

    /// Mean and variance of a whole file.
    fn level(&self, path: &Path, how: &TranscribeOptions) -> Result<Level> {
        let mut meter = LevelMeter::default();
        self.each_block(path, how, "listen", &mut |samples| {
            meter.push(samples);
            Ok(())
        })?;
        Ok(meter.level())
    }

    /// Gives the samples of a file at 16 kHz, block by block.
    fn each_block(
        &self,
        path: &Path,
        how: &TranscribeOptions,
        step: &'static str,
        take: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let named = |source| Error::Sound { sound: path.display().to_string(), source: Box::new(source) };
        let mut blocks = WavBlocks::new(open(path)?, &self.options.audio_limits).map_err(named)?;
        let rate = u64::from(blocks.info().sample_rate.max(1));
        let total = (blocks.info().frames / rate) as usize + 1;
        let mut samples = Vec::new();
        while blocks.read(&mut samples).map_err(named)? {
            if how.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.options.report(step, (blocks.frames_read() / rate) as usize, total);
            take(&samples)?;
            samples.clear();
        }
        self.options.report(step, total, total);
        Ok(())
    }

    /// How matrices are kept.
    pub fn precision(&self) -> Precision {
        self.options.audio_precision
    }
}
