//! Finding a model's description, and building its graphs.

use std::path::{Path, PathBuf};

use pocketglm_checkpoint::Fields;
use pocketglm_glm::{TextConfig, Trace, decoder};
use pocketglm_graph::{Graph, GraphBuilder};
use pocketglm_tensor::DType;
use pocketglm_vit::{VisionConfig, encoder};
use serde_json::Value;

use crate::{Error, Result, repo};

/// A model as its `config.json` describes it.
pub struct Model {
    /// Where the description stands, with the other small files beside it.
    pub folder: PathBuf,
    /// Name for people and for file names.
    pub name: String,
    /// The whole of `config.json`.
    pub config: Value,
    /// The decoder's sizes.
    pub text: TextConfig,
    /// The vision encoder's sizes.
    pub vision: VisionConfig,
}

/// Folder, name and `config.json` of a model: a folder under `models/` by name, a checkpoint folder, or the file itself.
pub fn described(model: &str) -> Result<(PathBuf, String, Value)> {
    let named = repo::root().join("models").join(model);
    let given = Path::new(model);
    let plain = !model.is_empty() && !model.contains(['/', '\\', '.']);
    let file = if plain && named.join("config.json").is_file() {
        named.join("config.json")
    } else if given.is_dir() {
        given.join("config.json")
    } else {
        given.to_owned()
    };
    let text = repo::read(&file)?;
    let config: Value = serde_json::from_str(&text).map_err(|e| Error::Content {
        place: file.display().to_string(),
        wanted: "JSON".into(),
        found: e.to_string(),
    })?;
    let folder = file.parent().unwrap_or(Path::new("")).to_owned();
    let name = folder.canonicalize().unwrap_or_else(|_| folder.clone());
    let name = name.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    Ok((folder, name, config))
}

impl Model {
    /// Opens a folder under `models/` by name, a checkpoint folder, or a `config.json`.
    pub fn open(model: &str) -> Result<Model> {
        let (folder, name, config) = described(model)?;
        let (text, vision) = sizes(&config)?;
        Ok(Model { folder, name, config, text, vision })
    }

    /// The type of the weights that `config.json` names, where it names one that we know.
    pub fn dtype(&self) -> Option<DType> {
        let name = [&self.config["dtype"], &self.config["torch_dtype"], &self.config["text_config"]["dtype"]];
        match name.iter().find_map(|v| v.as_str())? {
            "float32" => Some(DType::F32),
            "float16" => Some(DType::F16),
            "bfloat16" => Some(DType::BF16),
            _ => None,
        }
    }

    /// The graph of the vision encoder, with the result `image_embeds`.
    pub fn encoder(&self, dtype: DType) -> Result<Graph> {
        let mut g = GraphBuilder::assuming(dtype);
        let y = g.scoped("model.visual", |g| encoder(g, &self.vision))?;
        g.output("image_embeds", y);
        Ok(g.finish())
    }

    /// The graph of the decoder, with the result `logits`.
    pub fn decoder(&self, dtype: DType) -> Result<Graph> {
        let mut g = GraphBuilder::assuming(dtype);
        decoder(&mut g, &self.text, Trace::Off)?;
        Ok(g.finish())
    }
}

/// The sizes of both parts, from `config.json`.
pub fn sizes(config: &Value) -> Result<(TextConfig, VisionConfig)> {
    let top = Fields::new("config.json", config)?;
    let vision = top.child("vision_config")?.ok_or_else(|| top.error("vision_config", "an object"))?;
    Ok((TextConfig::from_fields(&top)?, VisionConfig::from_fields(&vision)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_described_model_has_the_published_number_of_parameters() {
        let model = Model::open("autoglm-phone-9b").unwrap();
        let count = |graph: Graph| {
            let weights = graph.weights();
            let elements: u64 = weights.iter().map(|w| w.shape.iter().product::<usize>() as u64).sum();
            (weights.len(), elements)
        };
        let (tensors, parameters) = count(model.decoder(DType::BF16).unwrap());
        let (visual_tensors, visual_parameters) = count(model.encoder(DType::BF16).unwrap());
        assert_eq!(parameters, 9_400_279_040);
        assert_eq!(visual_parameters, 892_498_432);
        assert_eq!(tensors + visual_tensors, 704);
        assert_eq!(model.dtype(), Some(DType::BF16));
    }

    #[test]
    fn a_folder_and_its_config_file_are_the_same_model() {
        let folder = repo::root().join("tests/golden/default");
        let a = Model::open(folder.to_str().unwrap()).unwrap();
        let b = Model::open(folder.join("config.json").to_str().unwrap()).unwrap();
        assert_eq!((&a.name, &a.text, &a.vision), (&b.name, &b.text, &b.vision));
        assert_eq!(a.name, "default");
    }

    #[test]
    fn a_model_that_is_not_there_is_named() {
        let error = Model::open("no-such-model").err().unwrap().to_string();
        assert!(error.contains("no-such-model"), "{error}");
    }
}
