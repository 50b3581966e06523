//! The audio branch of a checkpoint: in its own files, or in an adapter file beside it.

use std::path::Path;
use std::sync::Arc;

use pocketglm_bpe::Tokenizer;
use pocketglm_checkpoint::{ExpectedTensor, Fields, ReadMode, SafetensorsFile, check_tensors};
use pocketglm_glm::{AUDIO_SCOPE, AudioTokens, Fusion, Modality, TextConfig};
use pocketglm_graph::{Graph, GraphBuilder, passes};
use pocketglm_tensor::{DType, Packed, Tensor, TensorInfo, WeightSource};
use pocketglm_wav2vec::{Precision, Prepared, Trace, Wav2VecConfig, encoder, expected_tensors};

use crate::{EngineOptions, Error, Result};

/// The metadata key under which an adapter file describes itself.
const KEY: &str = "pocketglm.adapter";
/// The version of that description.
const FORMAT: usize = 1;

/// Two sources as one; what the first has counts.
pub(crate) struct Joined {
    first: Arc<dyn WeightSource>,
    second: Arc<dyn WeightSource>,
}

impl WeightSource for Joined {
    fn tensors(&self) -> Vec<TensorInfo> {
        let mut all = self.first.tensors();
        all.extend(self.second.tensors().into_iter().filter(|t| self.first.info(&t.name).is_none()));
        all
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.first.info(name).or_else(|| self.second.info(name))
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        if self.first.info(name).is_some() { self.first.tensor(name) } else { self.second.tensor(name) }
    }

    fn packed(&self, name: &str) -> pocketglm_tensor::Result<Option<Packed>> {
        if self.first.info(name).is_some() { self.first.packed(name) } else { self.second.packed(name) }
    }
}

/// An adapter file: tensors that are added to a checkpoint, and their configuration in the file's metadata.
pub(crate) struct Adapter {
    file: Arc<SafetensorsFile>,
    config: serde_json::Value,
}

impl Adapter {
    /// Opens the file of `options`, where they name one.
    pub fn open(options: &EngineOptions) -> Result<Option<Adapter>> {
        let Some(path) = &options.adapter else { return Ok(None) };
        let file = SafetensorsFile::open(path, ReadMode::Map)?;
        let wrong = |what: String| Error::Adapter { path: path.clone(), what };
        let json = file.metadata().get(KEY).ok_or_else(|| wrong(format!("its metadata has no `{KEY}`")))?;
        let config: serde_json::Value =
            serde_json::from_str(json).map_err(|e| wrong(format!("`{KEY}` is not JSON: {e}")))?;
        let format = Fields::new(KEY, &config)?.required("format", 0..=1 << 20)?;
        if format != FORMAT {
            return Err(wrong(format!("`format` must be {FORMAT}, found {format}")));
        }
        Ok(Some(Adapter { file: Arc::new(file), config }))
    }

    /// The checkpoint with what the adapter adds.
    pub fn joined(&self, checkpoint: Arc<dyn WeightSource>) -> Arc<dyn WeightSource> {
        Arc::new(Joined { first: self.file.clone(), second: checkpoint })
    }

    pub fn fields(&self) -> Result<Fields<'_>> {
        Ok(Fields::new(KEY, &self.config)?)
    }

    /// Refuses tensors that are no part of an extension, so that a file for something else is noticed.
    pub fn check(&self, path: &Path) -> Result<()> {
        let known = ["model.audio_tower.", "model.audio_projection.", "model.image_projection."];
        let known = |name: &str| {
            known.iter().any(|prefix| name.starts_with(prefix))
                || matches!(name, "model.audio_tag" | "model.image_tag")
        };
        match self.file.tensors().into_iter().find(|t| !known(&t.name)) {
            Some(t) => Err(Error::Adapter {
                path: path.to_owned(),
                what: format!("tensor `{}` is no part of an extension", t.name),
            }),
            None => Ok(()),
        }
    }
}

/// What turns sound into rows for the decoder.
pub(crate) struct AudioModel {
    pub config: Wav2VecConfig,
    pub tokens: AudioTokens,
    /// Text of the placeholder token, and of a clip in a message.
    pub placeholder: String,
    pub mark: String,
    pub normalise: bool,
    pub weights: Arc<Prepared<Arc<dyn WeightSource>>>,
    pub graph: Graph,
}

impl AudioModel {
    /// The branch that `fields` describe, `config.json` or an adapter's; `None` where they have no `audio_config`.
    pub fn new(
        fields: &Fields<'_>,
        weights: &Arc<dyn WeightSource>,
        text: &TextConfig,
        tokenizer: &Tokenizer,
        precision: Precision,
        fuse: bool,
    ) -> Result<Option<AudioModel>> {
        let Some(child) = fields.child("audio_config")? else { return Ok(None) };
        let config = Wav2VecConfig::from_fields(&child)?;
        let tokens = AudioTokens::from_fields(fields)?;
        let text_of = |field: &str, id: u32| -> Result<String> {
            let text = tokenizer.is_special(id).then(|| tokenizer.decode(&[id], false));
            let text = text.filter(|t| !t.is_empty() && tokenizer.token_id(t) == Some(id));
            Ok(text.ok_or_else(|| fields.error(field, "the id of a special token of the tokenizer"))?)
        };
        let placeholder = text_of("audio_token_id", tokens.audio)?;
        let mut mark = String::new();
        if let Some(id) = tokens.start {
            mark += &text_of("audio_start_token_id", id)?;
        }
        mark += &placeholder;
        if let Some(id) = tokens.end {
            mark += &text_of("audio_end_token_id", id)?;
        }
        let normalise = fields.boolean("audio_do_normalize")?.unwrap_or(true);
        let weights = Arc::new(Prepared::new(weights.clone(), AUDIO_SCOPE, &config, precision));
        let mut g = GraphBuilder::new(&*weights);
        audio_encoder(&mut g, &config, text.hidden_size)?;
        let mut graph = crate::model::finish(g.finish(), fuse, &Default::default())?;
        if fuse {
            passes::apply("attention over bytes", passes::attend_in_int8, &mut graph)?;
            passes::apply("fewer products", passes::fewer_products, &mut graph)?;
        }
        Ok(Some(AudioModel { config, tokens, placeholder, mark, normalise, weights, graph }))
    }
}

/// Appends the encoder, the projection and the tag.
fn audio_encoder(
    g: &mut GraphBuilder<'_>,
    config: &Wav2VecConfig,
    width: usize,
) -> pocketglm_graph::Result<()> {
    let x = g.scoped(AUDIO_SCOPE, |g| encoder(g, config, Trace::Off))?;
    let x = Fusion::WHOLE.apply(g, Modality::Audio, x, width)?;
    g.output("audio_embeds", x);
    Ok(())
}

/// The tensors of an audio branch that `source` must have.
pub(crate) fn audio_tensors(
    source: &dyn WeightSource,
    config: &Wav2VecConfig,
    width: usize,
) -> Result<Vec<ExpectedTensor>> {
    let mut expected = expected_tensors(source, AUDIO_SCOPE, config)?;
    let mut g = GraphBuilder::assuming(DType::F32);
    audio_encoder(&mut g, config, width)?;
    let fusion = g.finish().weights().into_iter().filter(|t| !t.name.starts_with(AUDIO_SCOPE));
    expected.extend(fusion.map(|t| ExpectedTensor { name: t.name, shape: t.shape, optional: false }));
    Ok(expected)
}

/// Checks the tensors of an adapter's audio branch.
pub(crate) fn check_adapter(adapter: &Adapter, path: &Path, text: &TextConfig) -> Result<()> {
    adapter.check(path)?;
    let fields = adapter.fields()?;
    let mut expected = Vec::new();
    if let Some(child) = fields.child("audio_config")? {
        expected = audio_tensors(&*adapter.file, &Wav2VecConfig::from_fields(&child)?, text.hidden_size)?;
    }
    let mut g = GraphBuilder::assuming(DType::F32);
    let d = text.hidden_size;
    let x = g.input("x", DType::F32, &[1.into(), d.into()])?;
    Fusion::found(&*adapter.file, Modality::Image).apply(&mut g, Modality::Image, x, d)?;
    let image = |t: TensorInfo| ExpectedTensor { name: t.name, shape: t.shape, optional: false };
    expected.extend(g.finish().weights().into_iter().map(image));
    let place = |_: &str| path.display().to_string();
    Ok(check_tensors(&*adapter.file, &place, &expected, &["model.audio_tower.masked_spec_embed"])?)
}
