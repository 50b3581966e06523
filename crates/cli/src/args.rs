//! Flags that mean the same in every command.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pocketglm::quantise::Policy;
use pocketglm::{
    AudioPrecision, ContentFormat, Engine, EngineOptions, Error, GenerateOptions, KvFormat, Model, ReadMode,
};

use crate::failure::Failure;
use crate::output::complain;
#[cfg(feature = "wgpu")]
use crate::output::human;
use crate::progress::{Bars, Work};

/// Which checkpoint runs, and how.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint folder: config.json, *.safetensors, tokenizer.json.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The vision file of a GGUF model; where it is not given, the mmproj file beside it.
    #[arg(long, value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// What runs the model.
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// The GPU to take: part of its name, as in `--gpu radeon`; software adapters are only taken by name.
    #[cfg(feature = "wgpu")]
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// Most bytes of the GPU's memory, as in 3GiB: the layers that do not fit run on the processor.
    #[cfg(feature = "wgpu")]
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub gpu_memory: Option<u64>,
    /// What happens when the GPU is not there, is lost or has no memory left: an error, or the processor goes on.
    #[cfg(feature = "wgpu")]
    #[arg(long, value_enum, default_value_t = Fallback::Error)]
    pub gpu_fallback: Fallback,
    #[cfg(feature = "wgpu")]
    #[command(flatten)]
    pub range: RangeArgs,
    /// Threads; 0 takes as many as the system offers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Shrink pictures to at most this many pixels, counted as the checkpoint does: a still picture counts twice.
    #[arg(long, value_name = "N")]
    pub max_pixels: Option<u64>,
    /// Most tokens of a conversation, prompt and answer.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().context, value_parser = positive)]
    pub context: usize,
    /// Most prompt tokens in one step; larger is faster and needs more memory.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().prefill_chunk, value_parser = positive)]
    pub prefill_chunk: usize,
    /// Refuse to run where the memory plan needs more, for example 6GiB, 800MB or a number of bytes.
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    pub memory: Option<u64>,
    /// How messages reach the chat template: as transformers gives them, or as one string, like servers do.
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    pub content_format: Format,
    /// Map the weights into memory, or read them.
    #[arg(long, value_enum, default_value_t = Read::Map)]
    pub read_mode: Read,
    /// How keys and values of the conversation are stored: f16, int8 and int4 need less memory and time at long contexts, and are less exact.
    #[arg(long, value_enum, default_value_t = Kv::F32)]
    pub kv: Kv,
    /// File that adds an audio branch to the checkpoint.
    #[arg(long, value_name = "FILE")]
    pub adapter: Option<PathBuf>,
    /// How the matrices of an audio encoder are kept: int8 is faster and less exact.
    #[arg(long, value_enum, default_value_t = AudioWeights::Stored)]
    pub audio_weights: AudioWeights,
    /// Run the graph as it was built, without fusing operations: for comparisons.
    #[arg(long)]
    pub no_fuse: bool,
    /// Show no progress and no statistics.
    #[arg(long)]
    pub quiet: bool,
}

/// Which ops the GPU runs, where it is not to run all.
#[cfg(feature = "wgpu")]
#[derive(Args, Clone, Debug, Default)]
pub struct RangeArgs {
    /// Run the ops before OP on the processor, to find the one that computes a wrong result. OP is a number or name as
    /// `info --ops` lists them, or a block such as model.language_model.layers.3.
    #[arg(long, value_name = "OP")]
    pub gpu_from: Option<String>,
    /// Run the ops behind OP on the processor.
    #[arg(long, value_name = "OP")]
    pub gpu_until: Option<String>,
}

#[cfg(feature = "wgpu")]
impl RangeArgs {
    /// The engine's option.
    pub fn ops(&self) -> pocketglm::OpRange {
        pocketglm::OpRange { from: self.gpu_from.clone(), until: self.gpu_until.clone() }
    }
}

/// What runs the model.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The processor.
    Cpu,
    /// A GPU, through Vulkan, Metal, DX12 or WebGPU.
    #[cfg(feature = "wgpu")]
    Wgpu,
}

/// What happens when the GPU fails.
#[cfg(feature = "wgpu")]
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The command ends with an error.
    Error,
    /// The processor goes on, and a note says so.
    Cpu,
}

/// What runs the model, opened.
pub struct Opened {
    /// The backend.
    pub backend: std::sync::Arc<dyn pocketglm::Backend>,
    /// What a report says about it: labels and texts.
    pub facts: Vec<(&'static str, String)>,
}

/// How messages reach the chat template.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As transformers does: lists of parts stay lists.
    Hf,
    /// As servers do: text parts are joined to a string behind the pictures.
    String,
}

/// How weights get into memory.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// Mapped: read when they are first used, and shared with other processes.
    Map,
    /// Copied at the start.
    Read,
}

/// How matrices of an audio encoder are kept.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AudioWeights {
    /// As the checkpoint stores them.
    Stored,
    /// 8 bits, a scale for every row.
    Int8,
}

impl From<AudioWeights> for AudioPrecision {
    fn from(weights: AudioWeights) -> AudioPrecision {
        match weights {
            AudioWeights::Stored => AudioPrecision::Stored,
            AudioWeights::Int8 => AudioPrecision::Int8,
        }
    }
}

/// How keys and values are stored.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kv {
    /// As computed, 4 bytes a value.
    F32,
    /// Half precision, 2 bytes.
    F16,
    /// 8 bits, with a scale for each head of a token.
    Int8,
    /// 4 bits, with a scale and a minimum for every 32 values.
    Int4,
}

impl From<Kv> for KvFormat {
    fn from(kv: Kv) -> KvFormat {
        match kv {
            Kv::F32 => KvFormat::F32,
            Kv::F16 => KvFormat::F16,
            Kv::Int8 => KvFormat::Int8,
            Kv::Int4 => KvFormat::Int4,
        }
    }
}

impl ModelArgs {
    /// The engine's options.
    ///
    /// # Errors
    /// A GPU that was asked for and is not there.
    pub fn options(&self, bars: &Bars) -> Result<EngineOptions, Failure> {
        Ok(self.options_on(self.backend()?.map(|opened| opened.backend), bars))
    }

    /// The engine's options with a backend that is open.
    pub fn options_on(
        &self,
        backend: Option<std::sync::Arc<dyn pocketglm::Backend>>,
        bars: &Bars,
    ) -> EngineOptions {
        let options = EngineOptions {
            backend,
            threads: self.threads,
            context: self.context,
            prefill_chunk: self.prefill_chunk,
            max_pixels: self.max_pixels,
            memory: self.memory,
            content_format: match self.content_format {
                Format::Hf => ContentFormat::Hf,
                Format::String => ContentFormat::String,
            },
            read_mode: match self.read_mode {
                Read::Map => ReadMode::Map,
                Read::Read => ReadMode::Read,
            },
            mmproj: self.mmproj.clone(),
            kv: self.kv.into(),
            adapter: self.adapter.clone(),
            audio_precision: self.audio_weights.into(),
            fuse: !self.no_fuse,
            simulate: None,
            progress: bars.hook(),
            ..EngineOptions::default()
        };
        #[cfg(feature = "wgpu")]
        let options = EngineOptions {
            device_memory: self.gpu_memory,
            device_ops: self.range.ops(),
            fallback: match self.gpu_fallback {
                Fallback::Error => pocketglm::Fallback::Error,
                Fallback::Cpu => pocketglm::Fallback::Cpu,
            },
            ..options
        };
        options
    }

    /// What runs the model; `None` is the processor.
    ///
    /// # Errors
    /// A GPU that was asked for and is not there, unless the processor may go on.
    pub fn backend(&self) -> Result<Option<Opened>, Failure> {
        match self.backend {
            Backend::Cpu => Ok(None),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => match open_gpu(self.gpu.as_deref()) {
                Ok(gpu) => Ok(Some(Opened { backend: gpu.backend(), facts: gpu_facts(gpu.info()) })),
                Err(error) if self.gpu_fallback == Fallback::Cpu => {
                    complain(&format!("note: the processor runs the model: {error}"));
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Opens the checkpoint. A plan beyond `--memory` is an error that carries the plan.
    pub fn open(&self, bars: &Bars) -> Result<Model, Failure> {
        let opened = Model::open_with(&self.model, self.options(bars)?);
        bars.clear();
        match (opened, self.memory) {
            (Err(Error::Budget { .. }), Some(budget)) => {
                let (_, plan) = Engine::inspect(&self.model, &self.options(&Bars::new(true))?, None)?;
                Err(Failure::Budget { plan: Box::new(plan), budget, shown: false })
            }
            (opened, _) => Ok(opened?),
        }
    }
}

/// What a report says about a GPU.
#[cfg(feature = "wgpu")]
pub fn gpu_facts(info: &pocketglm::gpu::GpuInfo) -> Vec<(&'static str, String)> {
    let kind = if info.software { ", a program on the processor" } else { "" };
    let features = if info.features.is_empty() { "none".into() } else { info.features.join(", ") };
    let limits = format!(
        "{} in a binding, {} in a buffer, {} of workgroup memory",
        human(info.binding_limit),
        human(info.buffer_limit),
        human(info.workgroup_memory.into())
    );
    vec![
        ("gpu", format!("{}{kind}", info.name)),
        ("  driver", format!("{}, {}", info.api, info.driver)),
        ("  features", features),
        ("  limits", limits),
    ]
}

/// The GPU that a name asks for, or the most capable one.
#[cfg(feature = "wgpu")]
pub fn open_gpu(name: Option<&str>) -> pocketglm::Result<pocketglm::gpu::Gpu> {
    let adapter = name.map(str::to_owned);
    pocketglm::gpu::Gpu::open(&pocketglm::gpu::GpuOptions {
        adapter,
        ..pocketglm::gpu::GpuOptions::default()
    })
}

/// How a model runs where it only reads prompts.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Run")]
pub struct RunArgs {
    /// Threads; 0 takes as many as the system offers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Shrink pictures to at most this many pixels, counted as the checkpoint does: a still picture counts twice.
    #[arg(long, value_name = "N")]
    pub max_pixels: Option<u64>,
    /// Most tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().context, value_parser = positive)]
    pub context: usize,
    /// Show no progress.
    #[arg(long)]
    pub quiet: bool,
}

impl RunArgs {
    /// The engine's options.
    pub fn options(&self, work: &Work) -> EngineOptions {
        EngineOptions {
            threads: self.threads,
            context: self.context,
            max_pixels: self.max_pixels,
            progress: work.hook(),
            ..EngineOptions::default()
        }
    }
}

/// How tokens are chosen. What is not given comes from the checkpoint's `generation_config.json`.
#[derive(Args, Clone, Debug, Default)]
#[command(
    next_help_heading = "Sampling (what is not given comes from the checkpoint's generation_config.json)"
)]
pub struct SamplingArgs {
    /// Randomness; 0 always takes the most likely token.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 takes all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the most likely tokens whose probabilities reach this sum.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Choose among tokens at least this times as likely as the most likely one.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Makes tokens of prompt and answer less likely; 1 changes nothing.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it was generated.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Subtracted from the logit of every token that was generated.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Start of the random numbers: the same seed gives the same answer.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Text that ends the answer and is not part of it; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Most tokens of the answer.
    #[arg(long, value_name = "N", default_value_t = GenerateOptions::default().max_new_tokens)]
    pub max_new_tokens: usize,
    /// Go on after an end-of-sequence token.
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArgs {
    /// What is given, over what the checkpoint recommends.
    ///
    /// # Errors
    /// Settings outside their ranges, so that a mistake shows before any work.
    pub fn options(&self, engine: &Engine) -> Result<GenerateOptions, Failure> {
        let mut sampling = engine.default_sampling();
        let set = |place: &mut f32, value: Option<f32>| *place = value.unwrap_or(*place);
        set(&mut sampling.temperature, self.temperature);
        set(&mut sampling.top_p, self.top_p);
        set(&mut sampling.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, self.repetition_penalty);
        set(&mut sampling.frequency_penalty, self.frequency_penalty);
        set(&mut sampling.presence_penalty, self.presence_penalty);
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.seed = self.seed.unwrap_or(sampling.seed);
        sampling.validate().map_err(Error::from)?;
        Ok(GenerateOptions {
            sampling,
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ..GenerateOptions::default()
        })
    }

    /// Says so where a setting has no effect because the choice is greedy.
    pub fn warn(&self, options: &GenerateOptions) {
        let flags = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        if options.sampling.temperature == 0.0
            && let Some((flag, _)) = flags.iter().find(|(_, given)| *given)
        {
            complain(&format!("note: {flag} has no effect at temperature 0; give --temperature as well"));
        }
    }
}

/// A count of at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("not a count: {e}")),
    }
}

/// The file that a policy is read from; `None` for one that has a name.
pub fn policy_file(policy: &str) -> Option<PathBuf> {
    Policy::named(policy).is_none().then(|| PathBuf::from(policy))
}

/// Bytes: a number, alone or with a decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB) unit.
pub fn byte_size(text: &str) -> Result<u64, String> {
    let wanted = || format!("{text:?} is no size; write bytes, or a unit as in 6GiB or 800MB");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wanted()),
    };
    let large = || format!("{text} is more than {} bytes", u64::MAX);
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(large);
    }
    let value: f64 = number.parse().map_err(|_| wanted())?;
    let total = value * factor as f64;
    // 2^64 and above do not fit.
    if total < 18_446_744_073_709_551_616.0 { Ok(total as u64) } else { Err(large()) }
}

/// `WIDTHxHEIGHT` in pixels.
pub fn screen(text: &str) -> Result<(u32, u32), String> {
    let side = |s: &str| s.parse::<u32>().ok().filter(|n| (1..=65_535).contains(n));
    text.split_once(['x', 'X']).and_then(|(w, h)| Some((side(w)?, side(h)?))).ok_or_else(|| {
        format!("{text:?} is no screen; write width x height from 1 to 65535, as in 1080x2400")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units_are_read() {
        let sizes = [
            ("0", 0),
            ("1234", 1234),
            ("800MB", 800_000_000),
            ("6GiB", 6 << 30),
            ("1.5 GiB", 3 << 29),
            ("2kib", 2048),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in sizes {
            assert_eq!(byte_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "GiB", "6 G", "-1", "1.2.3GB", "1e9", "6GiBs", ".", "六", "NaN", "inf"] {
            assert!(byte_size(text).unwrap_err().contains("is no size"), "{text}");
        }
        for text in ["18446744073709551616", "20000000TiB", "99999999999999999999.5"] {
            assert!(byte_size(text).unwrap_err().contains("is more than"), "{text}");
        }
    }

    #[test]
    fn screens_are_two_sides() {
        assert_eq!(screen("1080x2400"), Ok((1080, 2400)));
        for text in ["", "x", "1080", "0x5", "5x0", "70000x5", "1x2x3", "-1x5", "a x b"] {
            assert!(screen(text).unwrap_err().contains("is no screen"), "{text}");
        }
    }

    #[test]
    fn counts_start_at_one() {
        assert_eq!(positive("1"), Ok(1));
        assert!(positive("0").is_err() && positive("-1").is_err() && positive("x").is_err());
    }
}
