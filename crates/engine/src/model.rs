//! A checkpoint opened and checked: configuration, graphs, text tools. Nothing large is allocated yet.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pocketglm_bpe::{ChatTemplate, Placeholders, Tokenizer, template_from_config};
use pocketglm_checkpoint::{
    Checkpoint, ExpectedTensor, Fields, NameRules, OpenOptions, Renamed, check_tensors,
};
use pocketglm_glm::{
    AUDIO_SCOPE, Fusion, LAYOUTS, Modality, Sampling, TextConfig, Trace, VisualTokens, decoder,
};
use pocketglm_graph::{Graph, GraphBuilder, passes};
use pocketglm_tensor::{DType, KvFormat, TensorInfo, WeightSource};
use pocketglm_vit::VisionConfig;
use pocketglm_vit::preprocess::PreprocessConfig;
use pocketglm_wav2vec::Wav2VecConfig;

use crate::audio::{Adapter, AudioModel, audio_tensors, check_adapter};
use crate::quantise::Precisions;
use crate::read_tokenizer::{JSON, ReadTokenizer};
use crate::{EngineOptions, Error, Result};

/// Scope of the vision encoder's weights.
pub(crate) const VISION_SCOPE: &str = "model.visual";

/// What a checkpoint is, for people: sizes and counts, without loading it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `model_type` of the configuration.
    pub model_type: String,
    /// Parameters of the decoder, without the head.
    pub decoder: Parameters,
    /// Parameters of the head; 0 where it is the embedding table.
    pub head: Parameters,
    /// Parameters of the vision encoder.
    pub vision: Parameters,
    /// Parameters of the audio branch: encoder, projection and tag.
    pub audio: Parameters,
    /// Tensors in all.
    pub tensors: usize,
    /// Bytes as stored, by element type.
    pub bytes: BTreeMap<&'static str, u64>,
    /// Decoder layers.
    pub layers: usize,
    /// Blocks of the vision encoder.
    pub vision_blocks: usize,
    /// Layers of the audio encoder.
    pub audio_layers: usize,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Bytes of one token in the KV cache.
    pub kv_bytes_per_token: u64,
}

/// A number of parameters and its bytes in several element types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Elements of all tensors.
    pub count: u64,
}

impl Parameters {
    /// Bytes if every element took `bits` bits.
    pub fn bytes_at(&self, bits: u64) -> u64 {
        self.count * bits / 8
    }
}

pub(crate) struct VisionModel {
    pub config: VisionConfig,
    /// What stands between the encoder and the decoder.
    pub fusion: Fusion,
    pub tokens: VisualTokens,
    pub images: PreprocessConfig,
    pub videos: PreprocessConfig,
    pub graph: Graph,
}

/// Everything but the compiled programs.
pub(crate) struct Model {
    pub model_type: String,
    pub text: TextConfig,
    pub vision: Option<VisionModel>,
    pub audio: Option<AudioModel>,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub template_variables: Vec<(String, serde_json::Value)>,
    pub placeholders: Placeholders,
    pub eos: Vec<u32>,
    pub sampling: Sampling,
    pub weights: Arc<Renamed<Checkpoint>>,
    /// The same, with what an adapter file adds.
    pub extended: Arc<dyn WeightSource>,
    pub decoder: Graph,
    /// Bytes of the tokenizer's tables, about.
    pub tokenizer_memory: u64,
    pub kv: KvFormat,
    pub fuse: bool,
    /// What a simulated policy makes of the matrices; empty without one.
    pub precisions: Precisions,
}

fn text_error(what: &'static str) -> impl FnOnce(pocketglm_bpe::Error) -> Error {
    move |source| Error::Text { what, source }
}

impl Model {
    pub fn open(path: &Path, options: &EngineOptions) -> Result<Model> {
        Model::open_and(path, options, &mut |_| {})
    }

    /// The same; `begin` gets the weights as soon as they have names, before they are checked and the text tools are read.
    pub fn open_and(
        path: &Path,
        options: &EngineOptions,
        begin: &mut dyn FnMut(&Arc<Renamed<Checkpoint>>),
    ) -> Result<Model> {
        const STEPS: usize = 5;
        options.report("load", 0, STEPS);
        let (mode, mmproj) = (options.read_mode, options.mmproj.clone());
        let checkpoint = Checkpoint::open(path, &OpenOptions { mode, mmproj, check_finite: false })?;
        // Its errors are told where they always were: behind those of the tensors.
        let tokenizer = ReadTokenizer::of(&checkpoint);
        let config = checkpoint.required_json("config.json")?;
        let fields = Fields::new("config.json", &config)?;
        let model_type = fields.string("model_type")?.unwrap_or("(none)").to_string();
        if !matches!(model_type.as_str(), "glm4v" | "glm4v_text" | "glm4") {
            let place = format!("{}: config.json", path.display());
            return Err(Error::ModelType { place, found: model_type });
        }
        let text = TextConfig::from_fields(&fields)?;
        let vision_config =
            fields.child("vision_config")?.map(|v| VisionConfig::from_fields(&v)).transpose()?;
        if let Some(v) = &vision_config
            && v.out_hidden_size != text.hidden_size
        {
            let wanted = format!("text_config.hidden_size {}", text.hidden_size);
            let child = fields.child("vision_config")?.unwrap_or(fields);
            return Err(child.error("out_hidden_size", wanted).into());
        }
        options.report("load", 1, STEPS);

        let rules = NameRules::detect(&checkpoint, LAYOUTS, &["model.language_model.embed_tokens.weight"])?;
        let weights = Arc::new(Renamed::new(checkpoint, rules)?);
        begin(&weights);
        // A graph that can be built from the checkpoint says what it takes from it. Where it cannot, and where an adapter adds
        // to it, the list of all that there must be is made without one.
        let built = match &options.adapter {
            None => built_graphs(&text, vision_config.as_ref(), &*weights, options.kv).ok(),
            Some(_) => None,
        };
        let mut expected = match &built {
            Some((decoder, vision)) => expected_by([Some(decoder), vision.as_ref()]),
            None => {
                let whole = whole_graph(&text, with_fusion(vision_config.as_ref(), &*weights))?;
                expected_by([Some(&whole), None])
            }
        };
        if let Some(child) = fields.child("audio_config")? {
            let config = Wav2VecConfig::from_fields(&child)?;
            expected.extend(audio_tensors(&*weights, &config, text.hidden_size)?);
        }
        let adapter = Adapter::open(options)?;
        if let (Some(adapter), Some(path)) = (&adapter, &options.adapter) {
            check_adapter(adapter, path, &text)?;
        }
        // A tied checkpoint may store its head again; rotary buffers of old files are not weights.
        let unused = format!("{AUDIO_SCOPE}.masked_spec_embed");
        let mut ignore = vec![unused.as_str()];
        ignore.extend(text.tie_word_embeddings.then_some("lm_head."));
        let place = |name: &str| match weights.stored_name(name) {
            Some(stored) => weights.source().place(&stored),
            None => path.display().to_string(),
        };
        check_tensors(&*weights, &place, &expected, &ignore)?;
        let precisions = match &options.simulate {
            Some(simulation) => simulation.precisions(&text, vision_config.as_ref(), &*weights, &place)?,
            None => Precisions::default(),
        };
        options.report("load", 2, STEPS);

        let extended = match &adapter {
            Some(adapter) => adapter.joined(weights.clone()),
            None => weights.clone(),
        };
        let checkpoint = weights.source();
        let (graph, vision_graph) = match built {
            Some(built) => built,
            None => built_graphs(&text, vision_config.as_ref(), &*extended, options.kv)?,
        };
        let graph = finish(graph, options.fuse, &precisions)?;
        let tokenizer = tokenizer?.ok_or_else(|| pocketglm_checkpoint::Error::NoFile {
            wanted: JSON.into(),
            folder: path.to_owned(),
        })?;
        let tokenizer_memory = tokenizer.memory;
        let tokenizer = tokenizer.done()?;
        options.report("load", 3, STEPS);
        let template = template(checkpoint)?;
        let vision = match vision_config.zip(vision_graph) {
            Some((config, graph)) => {
                let graph = finish(graph, options.fuse, &precisions)?;
                let fusion = Fusion::found(&*extended, Modality::Image);
                Some(VisionModel::new(config, &fields, checkpoint, &tokenizer, fusion, graph, options)?)
            }
            None => None,
        };
        let described = match &adapter {
            Some(adapter) => adapter.fields()?,
            None => Fields::new("config.json", &config)?,
        };
        let audio =
            AudioModel::new(&described, &extended, &text, &tokenizer, options.audio_precision, options.fuse)?;
        options.report("load", 4, STEPS);
        let (eos, sampling) = generation(checkpoint, &fields)?;
        options.report("load", STEPS, STEPS);
        Ok(Model {
            model_type,
            vision,
            audio,
            extended,
            template_variables: template_variables(checkpoint)?,
            template,
            tokenizer,
            placeholders: Placeholders::default(),
            eos,
            sampling,
            decoder: graph,
            text,
            tokenizer_memory,
            weights,
            kv: options.kv,
            fuse: options.fuse,
            precisions,
        })
    }

    pub fn info(&self) -> ModelInfo {
        let mut info = ModelInfo {
            model_type: self.model_type.clone(),
            decoder: Parameters::default(),
            head: Parameters::default(),
            vision: Parameters::default(),
            audio: Parameters::default(),
            tensors: 0,
            bytes: BTreeMap::new(),
            layers: self.text.num_hidden_layers,
            vision_blocks: self.vision.as_ref().map_or(0, |v| v.config.depth),
            audio_layers: self.audio.as_ref().map_or(0, |a| a.config.num_hidden_layers),
            max_position_embeddings: self.text.max_position_embeddings,
            vocabulary: self.text.vocab_size,
            kv_bytes_per_token: self.kv_bytes_per_token(),
        };
        for t in self.extended.tensors() {
            let part = match () {
                () if t.name.starts_with("model.audio_") => &mut info.audio,
                () if t.name.starts_with("model.image_") => &mut info.vision,
                () if t.name.starts_with(VISION_SCOPE) => &mut info.vision,
                () if t.name.starts_with("lm_head.") => &mut info.head,
                () => &mut info.decoder,
            };
            part.count += t.elements() as u64;
            info.tensors += 1;
            *info.bytes.entry(t.dtype.name()).or_insert(0) += t.bytes() as u64;
        }
        info
    }

    pub fn kv_bytes_per_token(&self) -> u64 {
        let t = &self.text;
        let head = self.kv.head_bytes(t.head_dim).unwrap_or(usize::MAX);
        head.saturating_mul(2 * t.num_hidden_layers * t.num_key_value_heads) as u64
    }

    /// The graphs in the order in which a run with everything takes them.
    pub fn programs(&self) -> Vec<(&'static str, &Graph)> {
        let vision = self.vision.iter().map(|v| ("vision", &v.graph));
        let audio = self.audio.iter().map(|a| ("audio", &a.graph));
        vision.chain(audio).chain([("decoder", &self.decoder)]).collect()
    }

    /// Most tokens of a conversation.
    pub fn context(&self, options: &EngineOptions) -> usize {
        options.context.min(self.text.max_position_embeddings).max(1)
    }
}

/// The decoder's graph over `weights`, after the passes.
pub(crate) fn text_graph(
    text: &TextConfig,
    weights: &dyn WeightSource,
    kv: KvFormat,
    fuse: bool,
    trace: Trace,
    precisions: &Precisions,
) -> Result<Graph> {
    let mut g = GraphBuilder::new(weights).with_kv_format(kv);
    decoder(&mut g, text, trace)?;
    finish(g.finish(), fuse, precisions)
}

/// The graph that a checkpoint runs, of the one that was built.
pub(crate) fn finish(mut graph: Graph, fuse: bool, precisions: &Precisions) -> Result<Graph> {
    if !precisions.is_empty() {
        passes::insert_quantise(&mut graph, &|name| precisions.get(name).copied())?;
    }
    if fuse {
        passes::optimise(&mut graph)?;
    } else {
        passes::prepare(&mut graph)?;
    }
    Ok(graph)
}

pub(crate) fn vision_encoder(
    g: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    fusion: Fusion,
) -> pocketglm_graph::Result<()> {
    let y = g.scoped(VISION_SCOPE, |g| pocketglm_vit::encoder(g, config))?;
    let y = fusion.apply(g, Modality::Image, y, config.out_hidden_size)?;
    g.output("image_embeds", y);
    Ok(())
}

/// A vision encoder with the fusion tensors that a checkpoint has for it.
pub(crate) fn with_fusion<'v>(
    vision: Option<&'v VisionConfig>,
    weights: &dyn WeightSource,
) -> Option<(&'v VisionConfig, Fusion)> {
    vision.map(|v| (v, Fusion::found(weights, Modality::Image)))
}

/// Decoder and vision encoder in one graph, as they were built and without a checkpoint.
pub(crate) fn whole_graph(text: &TextConfig, vision: Option<(&VisionConfig, Fusion)>) -> Result<Graph> {
    let mut g = GraphBuilder::assuming(DType::F32);
    decoder(&mut g, text, Trace::Off)?;
    if let Some((config, fusion)) = vision {
        vision_encoder(&mut g, config, fusion)?;
    }
    Ok(g.finish())
}

/// Decoder and vision encoder as they are built over `weights`.
fn built_graphs(
    text: &TextConfig,
    vision: Option<&VisionConfig>,
    weights: &dyn WeightSource,
    kv: KvFormat,
) -> Result<(Graph, Option<Graph>)> {
    let mut g = GraphBuilder::new(weights).with_kv_format(kv);
    decoder(&mut g, text, Trace::Off)?;
    let vision = with_fusion(vision, weights).map(|(config, fusion)| -> Result<Graph> {
        let mut g = GraphBuilder::new(weights);
        vision_encoder(&mut g, config, fusion)?;
        Ok(g.finish())
    });
    Ok((g.finish(), vision.transpose()?))
}

/// Every tensor that graphs ask for: taken from the graphs themselves, so that the two cannot differ.
fn expected_by<'g>(graphs: impl IntoIterator<Item = Option<&'g Graph>>) -> Vec<ExpectedTensor> {
    let tensor = |TensorInfo { name, shape, .. }| ExpectedTensor { name, shape, optional: false };
    graphs.into_iter().flatten().flat_map(Graph::weights).map(tensor).collect()
}

impl VisionModel {
    fn new(
        config: VisionConfig,
        fields: &Fields<'_>,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        fusion: Fusion,
        graph: Graph,
        options: &EngineOptions,
    ) -> Result<VisionModel> {
        let tokens = VisualTokens::from_fields(fields)?;
        let names = [
            ("<|image|>", tokens.image),
            ("<|begin_of_video|>", tokens.video_start),
            ("<|end_of_video|>", tokens.video_end),
        ];
        for (token, id) in names {
            if tokenizer.token_id(token) != Some(id) {
                return Err(Error::SpecialToken { token, id });
            }
        }
        let mut images = match checkpoint.bytes("preprocessor_config.json")? {
            Some(json) => PreprocessConfig::from_image_json(json.as_slice())?,
            None => PreprocessConfig::published(),
        };
        let mut videos = match checkpoint.bytes("video_preprocessor_config.json")? {
            Some(json) => PreprocessConfig::from_video_json(json.as_slice())?,
            None => images.clone(),
        };
        for (file, p) in [("preprocessor_config.json", &images), ("video_preprocessor_config.json", &videos)]
        {
            let found = (p.patch_size(), p.temporal_patch_size(), p.merge_size());
            let wanted = (config.patch_size, config.temporal_patch_size, config.spatial_merge_size);
            if found != wanted {
                return Err(pocketglm_checkpoint::Error::Field {
                    file: file.into(),
                    field: "patch_size, temporal_patch_size, merge_size".into(),
                    wanted: format!("those of config.json, {wanted:?}"),
                    found: format!("{found:?}"),
                }
                .into());
            }
        }
        if let Some(cap) = options.max_pixels {
            images = images.with_max_pixels(cap)?;
            videos = videos.with_max_pixels(cap)?;
        }
        Ok(VisionModel { config, fusion, tokens, images, videos, graph })
    }
}

/// The chat template's text: its own file first, then the one in the tokenizer's configuration.
pub(crate) fn template_source(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let mut source = checkpoint.text("chat_template.jinja")?;
    for file in ["chat_template.json", "tokenizer_config.json"] {
        if source.is_none()
            && let Some(json) = checkpoint.bytes(file)?
        {
            source = template_from_config(json.as_slice()).map_err(text_error(file))?;
        }
    }
    Ok(source)
}

fn template(checkpoint: &Checkpoint) -> Result<Option<ChatTemplate>> {
    let source = template_source(checkpoint)?;
    source.map(|s| ChatTemplate::new(&s)).transpose().map_err(text_error("chat template"))
}

/// The special tokens that templates may name.
fn template_variables(checkpoint: &Checkpoint) -> Result<Vec<(String, serde_json::Value)>> {
    let Some(config) = checkpoint.json("tokenizer_config.json")? else { return Ok(Vec::new()) };
    let names = ["bos_token", "eos_token", "pad_token", "unk_token"];
    let value = |name: &&str| {
        let v = config.get(*name)?;
        // Either the text or an object that holds it.
        v.as_str().or_else(|| v.get("content")?.as_str()).map(|s| (name.to_string(), s.into()))
    };
    Ok(names.iter().filter_map(value).collect())
}

/// End-of-sequence tokens of all places that name them, and the sampling that the checkpoint recommends.
fn generation(checkpoint: &Checkpoint, config: &Fields<'_>) -> Result<(Vec<u32>, Sampling)> {
    let mut eos = Vec::new();
    let mut collect = |f: &Fields<'_>| -> Result<()> {
        eos.extend(
            f.integers("eos_token_id", 64, 0..=1 << 24)?.unwrap_or_default().iter().map(|&id| id as u32),
        );
        Ok(())
    };
    collect(config)?;
    if let Some(text) = config.child("text_config")? {
        collect(&text)?;
    }
    let mut sampling = Sampling::default();
    if let Some(json) = checkpoint.json("generation_config.json")? {
        let f = Fields::new("generation_config.json", &json)?;
        collect(&f)?;
        if let Some(p) = f.number("repetition_penalty", 1e-3..=1e3)? {
            sampling.repetition_penalty = p as f32;
        }
        if f.boolean("do_sample")?.unwrap_or(false) {
            sampling.temperature = f.number("temperature", 0.0..=1e3)?.unwrap_or(1.0) as f32;
            sampling.top_k = f.integer("top_k", 0..=1 << 24)?.unwrap_or(50);
            sampling.top_p = f.number("top_p", 1e-9..=1.0)?.unwrap_or(1.0) as f32;
            sampling.min_p = f.number("min_p", 0.0..=1.0)?.unwrap_or(0.0) as f32;
        }
    }
    eos.sort_unstable();
    eos.dedup();
    Ok((eos, sampling))
}
