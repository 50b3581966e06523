use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pocketglm_bpe::ContentFormat;
use pocketglm_checkpoint::ReadMode;
use pocketglm_glm::Sampling;
use pocketglm_graph::Backend;
use pocketglm_tensor::KvFormat;
use pocketglm_wav2vec::Precision;
use pocketglm_wav2vec::audio::AudioLimits;

use crate::OpRange;
use crate::quantise::Simulation;

/// How far a long step has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The step: "load", "encode pictures", "read prompt", "move to the processor", "listen" or "transcribe".
    pub step: &'static str,
    /// Units done.
    pub done: usize,
    /// Units in all.
    pub total: usize,
}

/// Hears of progress, from the threads that do the work, one at a time.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// How a checkpoint is loaded.
#[derive(Clone)]
pub struct EngineOptions {
    /// Threads; 0 takes as many as the system offers.
    pub threads: usize,
    /// Most tokens of a conversation, prompt and answer; at most what the model was made for.
    pub context: usize,
    /// Most tokens that one prefill step takes. Larger is faster and needs more memory.
    pub prefill_chunk: usize,
    /// Cap on the pixels of a picture, counted as the checkpoint does: a still picture counts as two frames.
    pub max_pixels: Option<u64>,
    /// Most bytes that the plan may need; loading is refused above.
    pub memory: Option<u64>,
    /// How messages reach the chat template.
    pub content_format: ContentFormat,
    /// Whether weights are mapped or copied into memory.
    pub read_mode: ReadMode,
    /// The vision file of a GGUF model; where it is not given, the one beside the text file that fits.
    pub mmproj: Option<PathBuf>,
    /// How keys and values of the conversation are stored.
    pub kv: KvFormat,
    /// A file that adds an audio branch, or a projection of pictures, to the checkpoint.
    pub adapter: Option<PathBuf>,
    /// How the matrices of the audio encoder are kept.
    pub audio_precision: Precision,
    /// How much audio a prompt or a recording may have.
    pub audio_limits: AudioLimits,
    /// Whether the graph is fused. Off only for comparisons.
    pub fuse: bool,
    /// What runs the graphs; the processor where none is given.
    pub backend: Option<Arc<dyn Backend>>,
    /// Most bytes of the backend's device that the model may take: layers that do not fit run on the processor. Without
    /// it the backend runs everything.
    pub device_memory: Option<u64>,
    /// The ops that the backend runs, where it is not to run all: the processor runs the others. For tracing a wrong result
    /// to an op; what fits [`device_memory`](EngineOptions::device_memory) is then only checked, not chosen.
    pub device_ops: OpRange,
    /// What happens when the backend's device fails.
    pub fallback: Fallback,
    /// Makes the model compute, in f32, what it would as a file of this policy: slow and large, for judging policies.
    pub simulate: Option<Simulation>,
    /// Hears of loading and encoding.
    pub progress: Option<ProgressFn>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            threads: 0,
            context: 8192,
            prefill_chunk: 512,
            max_pixels: None,
            memory: None,
            content_format: ContentFormat::Hf,
            read_mode: ReadMode::Map,
            mmproj: None,
            kv: KvFormat::default(),
            adapter: None,
            audio_precision: Precision::default(),
            audio_limits: AudioLimits::default(),
            fuse: true,
            backend: None,
            device_memory: None,
            device_ops: OpRange::default(),
            fallback: Fallback::default(),
            simulate: None,
            progress: None,
        }
    }
}

impl EngineOptions {
    pub(crate) fn report(&self, step: &'static str, done: usize, total: usize) {
        if let Some(progress) = &self.progress {
            progress(Progress { step, done, total });
        }
    }
}

/// What happens when a device fails: when it is lost, has no memory left, or does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fallback {
    /// The call that met the failure returns it.
    #[default]
    Error,
    /// The engine goes on with the processor, from then on and for all of its sessions. What a conversation had on the
    /// device is computed again; [`Generation::device_failure`](crate::Generation::device_failure) says what happened.
    Cpu,
}

/// How an answer is generated.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Whether to go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Stops the work from another thread.
    pub cancel: Cancel,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            sampling: Sampling::default(),
            max_new_tokens: 1024,
            stop: Vec::new(),
            ignore_eos: false,
            cancel: Cancel::default(),
        }
    }
}

/// A switch that stops a generation from another thread, within one token or one step of the prefill.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Stops every generation that was given this switch.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was used.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
