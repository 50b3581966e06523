//! Descriptions of speech models: their graphs, and checkpoints of their shape.

use std::path::Path;

use pocketglm_checkpoint::Fields;
use pocketglm_checkpoint::synth::Fill;
use pocketglm_glm::{Fusion, Modality};
use pocketglm_graph::{Graph, GraphBuilder};
use pocketglm_tensor::{DType, TensorInfo, WeightSource};
use pocketglm_wav2vec::{Trace, Wav2VecConfig, ctc_head, encoder, expected_tensors};

use crate::Result;
use crate::model::described;

/// A speech model as its `config.json` describes it.
pub struct Speech {
    pub folder: std::path::PathBuf,
    pub name: String,
    pub json: serde_json::Value,
    pub config: Wav2VecConfig,
}

/// A source without tensors: the older spelling of weight norm is written.
struct Nothing;

impl WeightSource for Nothing {
    fn tensors(&self) -> Vec<TensorInfo> {
        Vec::new()
    }
    fn info(&self, _: &str) -> Option<TensorInfo> {
        None
    }
    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<pocketglm_tensor::Tensor> {
        Err(pocketglm_tensor::Error::Missing { name: name.into(), place: "nothing".into() })
    }
}

impl Speech {
    /// The model, where its `model_type` is `wav2vec2`; found as [`Model::open`](crate::model::Model::open) finds one.
    pub fn open(model: &str) -> Result<Option<Speech>> {
        let (folder, name, json) = described(model)?;
        if json["model_type"] != "wav2vec2" {
            return Ok(None);
        }
        let config = Wav2VecConfig::from_fields(&Fields::new("config.json", &json)?)?;
        Ok(Some(Speech { folder, name, json, config }))
    }

    /// The encoder with its head, as it is built.
    pub fn recogniser(&self) -> Result<Graph> {
        let mut g = GraphBuilder::assuming(DType::F32);
        let x = g.scoped("wav2vec2", |g| encoder(g, &self.config, Trace::Off))?;
        let logits = ctc_head(&mut g, &self.config, x)?;
        g.output("logits", logits);
        Ok(g.finish())
    }

    /// The encoder with the projection to a decoder of this width and the tag.
    pub fn branch(&self, width: usize) -> Result<Graph> {
        let mut g = GraphBuilder::assuming(DType::F32);
        let x = g.scoped("model.audio_tower", |g| encoder(g, &self.config, Trace::Off))?;
        let x = Fusion::WHOLE.apply(&mut g, Modality::Audio, x, width)?;
        g.output("audio_embeds", x);
        Ok(g.finish())
    }

    /// The tensors of a checkpoint, with numbers that keep activations near unit size.
    pub fn tensors(&self, dtype: DType) -> Result<Vec<(TensorInfo, Fill)>> {
        let mut all: Vec<(String, Vec<usize>)> = expected_tensors(&Nothing, "wav2vec2", &self.config)?
            .into_iter()
            .map(|t| (t.name, t.shape))
            .collect();
        let (v, h) = (self.config.vocab_size, self.config.hidden_size);
        all.extend([("lm_head.weight".into(), vec![v, h]), ("lm_head.bias".into(), vec![v])]);
        let fill = |name: &str, shape: &[usize]| {
            let inputs: usize = shape[1..].iter().product();
            match name {
                n if n.ends_with(".bias") => Fill::Normal { std: 0.02 },
                // One magnitude for each tap: the taps together have about unit gain.
                n if n.ends_with("weight_g") => {
                    let taps = shape.last().copied().unwrap_or(1) as f32;
                    Fill::NormalAround { mean: (h as f32 / taps).sqrt(), std: 0.05 }
                }
                _ if shape.len() == 1 => Fill::NormalAround { mean: 1.0, std: 0.05 },
                n if n.contains("conv_layers") => Fill::Normal { std: 2.0 / (inputs.max(1) as f32).sqrt() },
                _ => Fill::Normal { std: 1.0 / (inputs.max(1) as f32).sqrt() },
            }
        };
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let fill = fill(&name, &shape);
            (TensorInfo { name, dtype, shape }, fill)
        };
        Ok(all.into_iter().map(tensor).collect())
    }

    /// Files beside the weights that are taken over as they are.
    pub fn side_files(&self) -> impl Iterator<Item = (&'static str, std::path::PathBuf)> + '_ {
        let names = ["preprocessor_config.json", "vocab.json", "tokenizer_config.json"];
        names.into_iter().map(|n| (n, self.folder.join(n))).filter(|(_, path): &(_, _)| Path::is_file(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_model_has_the_published_number_of_parameters() {
        let base = Speech::open("wav2vec2-base").unwrap().unwrap();
        let tensors = base.tensors(DType::F32).unwrap();
        let count: usize = tensors.iter().map(|(t, _)| t.shape.iter().product::<usize>()).sum();
        // Published, less the vector that masks frames in training.
        assert_eq!(count, 94_396_320 - 768);
        assert_eq!(tensors.len(), 213 - 1);
        let large = Speech::open("wav2vec2-large").unwrap().unwrap();
        let tensors = large.tensors(DType::F32).unwrap();
        let count: usize = tensors.iter().map(|(t, _)| t.shape.iter().product::<usize>()).sum();
        assert_eq!((count, tensors.len()), (315_438_720 + 1025 * 40 - 1024, 424 - 1));
        assert!(Speech::open("autoglm-phone-9b").unwrap().is_none());
    }
}
