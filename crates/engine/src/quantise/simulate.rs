//! What a policy would make of a model, without writing a file: the graph with quantise and dequantise nodes.

use std::collections::HashMap;
use std::path::PathBuf;

use pocketglm_glm::TextConfig;
use pocketglm_graph::passes::{Precision, matrices};
use pocketglm_tensor::{TensorInfo, WeightSource};
use pocketglm_vit::VisionConfig;

use super::policy::{Method, Policy};
use super::table::CalibrationTable;
use crate::model::{whole_graph, with_fusion};
use crate::{Error, Result};

/// What becomes of matrices, by name.
pub(crate) type Precisions = HashMap<String, Precision>;

/// A policy to be simulated, see [`EngineOptions::simulate`](crate::EngineOptions::simulate).
#[derive(Clone, Debug)]
pub struct Simulation {
    /// What becomes of which tensor. Methods that look at activations ([`Method::Gptq`], [`Method::Awq`]) need a file.
    pub policy: Policy,
    /// A calibration table whose ranges the inputs of quantised matrices are fixed to; else each block of an input has
    /// the range of its values.
    pub static_inputs: Option<PathBuf>,
}

impl Simulation {
    /// What becomes of each matrix of a model; `place` is the file of a tensor.
    pub(crate) fn precisions(
        &self,
        text: &TextConfig,
        vision: Option<&VisionConfig>,
        weights: &dyn WeightSource,
        place: &dyn Fn(&str) -> String,
    ) -> Result<Precisions> {
        let wrong = |what: String| Error::Policy { policy: self.policy.name.clone(), what };
        if self.policy.rotate {
            return Err(wrong("a rotation cannot be simulated: write a file with `quantize`".into()));
        }
        let table = self.static_inputs.as_ref().map(CalibrationTable::open).transpose()?;
        if let Some(table) = &table {
            table.check_of(text, vision, weights)?;
        }
        let info = |name: String| {
            let missing =
                || pocketglm_tensor::Error::Missing { name: name.clone(), place: "the model".into() };
            Ok(weights.info(&name).ok_or_else(missing)?)
        };
        let matrices: Vec<TensorInfo> = matrices(&whole_graph(text, with_fusion(vision, weights))?)
            .into_iter()
            .map(info)
            .collect::<Result<_>>()?;
        let made = self.policy.assign(&matrices, text.num_hidden_layers)?;
        let mut precisions = Precisions::new();
        for (info, made) in matrices.into_iter().zip(made).filter(|(info, made)| info.dtype != made.dtype) {
            if info.dtype.is_quantised() {
                let (found, wanted) = (info.dtype, made.dtype);
                let place = place(&info.name);
                return Err(Error::AlreadyQuantised { place, tensor: info.name, found, wanted });
            }
            let method = match made.method {
                None | Some(Method::Round) => pocketglm_quant::Method::Round,
                Some(Method::Search) => pocketglm_quant::Method::Search,
                Some(method @ (Method::Gptq | Method::Awq)) => {
                    return Err(wrong(format!("{method} cannot be simulated: write a file with `quantize`")));
                }
            };
            let k = info.shape.last().copied().unwrap_or(0);
            // An embedding table is read by the row: it has no input, unless it is the head as well.
            let table =
                table.as_ref().filter(|t| t.knows(&info.name) || !info.name.ends_with("embed_tokens.weight"));
            let input_range = match table.filter(|_| made.dtype.is_quantised()) {
                Some(table) => Some(table.input_range(&info.name, k, None)?),
                None => None,
            };
            precisions.insert(info.name, Precision { dtype: made.dtype, method, input_range });
        }
        Ok(precisions)
    }
}
