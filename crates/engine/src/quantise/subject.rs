//! What is quantised: a model that answers, or a speech checkpoint.

use std::path::Path;
use std::sync::Arc;

use pocketglm_checkpoint::Checkpoint;
use pocketglm_graph::Graph;
use pocketglm_graph::passes::matrices;
use pocketglm_tensor::{DType, TensorInfo, WeightSource};
use pocketglm_wav2vec as wav2vec;

use crate::model::{Model, whole_graph};
use crate::recogniser::hears_only;
use crate::{EngineOptions, Result};

/// The table of which rows are read.
const TABLE: &str = "model.language_model.embed_tokens.weight";
/// What the names of an audio branch begin with.
const AUDIO: &str = "model.audio_";

/// What was opened.
pub(super) enum Opened {
    Model(Box<Model>),
    Speech(Speech),
}

/// A speech checkpoint; its tensors are written as its graph takes them: kernels turned, the weight norm folded.
pub(super) struct Speech {
    weights: Arc<wav2vec::Weights>,
    /// As it is built.
    graph: Graph,
    layers: usize,
}

impl Opened {
    /// # Errors
    /// What opening reports.
    pub fn new(path: &Path, options: &EngineOptions) -> Result<Opened> {
        if !hears_only(path) {
            return Ok(Opened::Model(Box::new(Model::open(path, options)?)));
        }
        let options = wav2vec::RecogniserOptions::default();
        let (weights, graph) = wav2vec::Recogniser::source(path, &options)?;
        let layers = wav2vec::Recogniser::inspect(path, &options)?.0.config.num_hidden_layers;
        Ok(Opened::Speech(Speech { weights, graph, layers }))
    }

    pub fn subject(&self) -> Subject<'_> {
        match self {
            Opened::Model(model) => Subject::Model(model),
            Opened::Speech(speech) => Subject::Speech(speech),
        }
    }
}

/// What is quantised.
#[derive(Clone, Copy)]
pub(super) enum Subject<'a> {
    Model(&'a Model),
    Speech(&'a Speech),
}

impl<'a> Subject<'a> {
    pub fn weights(self) -> &'a dyn WeightSource {
        match self {
            Subject::Model(model) => &*model.weights,
            Subject::Speech(speech) => &*speech.weights,
        }
    }

    pub fn checkpoint(self) -> &'a Checkpoint {
        match self {
            Subject::Model(model) => model.weights.source(),
            Subject::Speech(speech) => speech.weights.source().source(),
        }
    }

    /// The file of a tensor, for messages.
    pub fn place(self, tensor: &str) -> String {
        let named = match self {
            Subject::Model(model) => &*model.weights,
            Subject::Speech(speech) => speech.weights.source(),
        };
        let stored = named.stored_name(tensor);
        named.source().place(stored.as_deref().unwrap_or(tensor))
    }

    pub fn model(self) -> Option<&'a Model> {
        match self {
            Subject::Model(model) => Some(model),
            Subject::Speech(_) => None,
        }
    }

    /// Layers of the transformer.
    pub fn layers(self) -> usize {
        match self {
            Subject::Model(model) => model.text.num_hidden_layers,
            Subject::Speech(speech) => speech.layers,
        }
    }

    /// The graph as it is built, without fusions.
    pub fn graph(self) -> Result<Graph> {
        match self {
            Subject::Model(model) => {
                whole_graph(&model.text, model.vision.as_ref().map(|v| (&v.config, v.fusion)))
            }
            Subject::Speech(speech) => Ok(speech.graph.clone()),
        }
    }

    /// The tensors that can be quantised.
    pub fn matrices(self, graph: &Graph) -> Vec<String> {
        match self {
            Subject::Model(_) => matrices(graph),
            Subject::Speech(speech) => {
                graph.weights().into_iter().filter(|w| speech.weights.quantises(w)).map(|w| w.name).collect()
            }
        }
    }

    /// Whether a matrix can be computed with in this type.
    pub fn takes(self, name: &str, dtype: DType) -> bool {
        match self {
            Subject::Model(_) => true,
            Subject::Speech(speech) => speech.weights.takes(name, dtype),
        }
    }

    /// Tensors that belong to the model and are none of the graph's: an audio branch stays as it is.
    pub fn others(self) -> Vec<TensorInfo> {
        let Subject::Model(model) = self else { return Vec::new() };
        model.weights.tensors().into_iter().filter(|t| t.name.starts_with(AUDIO)).collect()
    }

    /// Whether rows of this matrix are read, and whether it is the head as well.
    pub fn table(self, name: &str) -> Option<bool> {
        let model = self.model().filter(|_| name == TABLE)?;
        Some(model.text.tie_word_embeddings)
    }
}
