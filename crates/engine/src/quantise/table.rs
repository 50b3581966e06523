//! The calibration table: what the inputs of a model's linear layers look like on a user's samples.
//!
//! A safetensors file. For each input, under the name of the first weight that it meets, and for what goes into each
//! KV cache and the queries that meet it, under the cache's name (`model.language_model.layers.N.self_attn.k`, `.v`, and
//! `.q`): `{name}.min`, `.max`, `.mean_abs`, `.mean_squares`, each `[k]`, `.second_moments [k, k]` where they were asked
//! for and fit, and for the caches some of the rows that were seen, `.rows [n, k]`. The string
//! `pocketglm.calibration` under `__metadata__` is a JSON object with the version, the hashes of the model and of the
//! samples, some values of each matrix, and for each input its weights, the rows seen, and its smallest and largest value.
//!
//! A table belongs to a model with the same sizes, tensor names and vectors, and with the same matrices as far as both the
//! model that was calibrated and the one at hand hold them unquantised: calibration may run on a quantised model, whose
//! matrices say nothing of the original's. They are compared by some of their values, to the precision of bfloat16,
//! since a model in another floating-point type is the same one.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use pocketglm_checkpoint::{ReadMode, SafetensorsFile, SafetensorsWriter};
use pocketglm_glm::TextConfig;
use pocketglm_quant::dequantise_row;
use pocketglm_quant::stats::ChannelStats;
use pocketglm_tensor::{DType, Tensor, TensorInfo, WeightSource};
use pocketglm_vit::VisionConfig;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::model::Model;
use crate::{Error, Result};

const METADATA: &str = "pocketglm.calibration";
const VERSION: u64 = 2;
const MIN: &str = "min";
const MAX: &str = "max";
const MEAN_ABS: &str = "mean_abs";
const MEAN_SQUARES: &str = "mean_squares";
const SECOND_MOMENTS: &str = "second_moments";
const ROWS: &str = "rows";
/// Values of a matrix that are compared: this many rows, and one value of each.
const COMPARED: usize = 16;
/// How far these may be apart, as a part of the largest: bfloat16 and f16 round by less.
const SAME: f32 = 1.0 / 128.0;
/// Fewest rows of a cache that are kept of as many, and half of the most.
const KEPT_ROWS: usize = 256;

/// What is known of the inputs of a model's linear layers.
#[derive(Debug)]
pub struct CalibrationTable {
    path: PathBuf,
    file: SafetensorsFile,
    model: String,
    samples: String,
    /// Some values of each matrix that was held unquantised.
    matrices: HashMap<String, Vec<f32>>,
    /// The input that a weight meets.
    inputs: HashMap<String, String>,
    /// Smallest and largest value of an input.
    ranges: HashMap<String, (f32, f32)>,
}

/// The statistics of one input, as they are gathered.
pub(super) struct InputStats {
    /// The weights that it meets; the first one names it.
    pub weights: Vec<String>,
    pub stats: ChannelStats,
    /// Some of its rows, where they are wanted.
    pub rows: Option<RowSample>,
}

/// Some of the rows that were seen, evenly spread over all of them.
#[derive(Default)]
pub(super) struct RowSample {
    seen: usize,
    /// How many doublings apart the rows are.
    doublings: u32,
    rows: Vec<f32>,
}

impl RowSample {
    /// Takes in rows of `k` values each.
    pub fn add(&mut self, k: usize, rows: &[f32]) {
        for row in rows.chunks_exact(k.max(1)) {
            if self.seen.is_multiple_of(1 << self.doublings) {
                self.rows.extend_from_slice(row);
            }
            self.seen += 1;
            if self.rows.len() >= 2 * KEPT_ROWS * k {
                self.rows = self.rows.chunks_exact(k.max(1)).step_by(2).flatten().copied().collect();
                self.doublings += 1;
            }
        }
    }
}

/// Digits of a hash.
pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// A hash of what makes a model this one but for its matrices: its sizes, its tensors, and the values of its vectors
/// (which no quantisation changes).
pub(super) fn fingerprint(model: &Model) -> Result<String> {
    fingerprint_of(&model.text, model.vision.as_ref().map(|v| &v.config), &*model.weights)
}

fn fingerprint_of(
    t: &TextConfig,
    vision: Option<&VisionConfig>,
    weights: &dyn WeightSource,
) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!(
        "{} {} {} {} {} {} {} {} {} {} {} {:?} {}\n",
        t.vocab_size,
        t.hidden_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.head_dim,
        t.intermediate_size,
        t.rms_norm_eps,
        t.attention_bias,
        t.rope_theta,
        t.rotary_dim,
        t.mrope_section,
        t.tie_word_embeddings
    ));
    let graph = crate::model::whole_graph(t, crate::model::with_fusion(vision, weights))?;
    for info in graph.weights() {
        hash.update(format!("{} {:?}\n", info.name, info.shape));
        if info.shape.len() == 1 {
            for value in weights.tensor(&info.name)?.to_f32()?.iter() {
                hash.update(value.to_le_bytes());
            }
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Some values of each matrix that a model holds unquantised, by name.
pub(super) fn matrix_values(model: &Model) -> Result<BTreeMap<String, Vec<f32>>> {
    matrix_values_of(&model.text, model.vision.as_ref().map(|v| &v.config), &*model.weights)
}

fn matrix_values_of(
    text: &TextConfig,
    vision: Option<&VisionConfig>,
    weights: &dyn WeightSource,
) -> Result<BTreeMap<String, Vec<f32>>> {
    let graph = crate::model::whole_graph(text, crate::model::with_fusion(vision, weights))?;
    let mut all = BTreeMap::new();
    for TensorInfo { name, shape, .. } in graph.weights() {
        let &[n, k] = shape.as_slice() else { continue };
        if n == 0 || k == 0 || !weights.info(&name).is_some_and(|info| info.dtype.is_float()) {
            continue;
        }
        let tensor = weights.tensor(&name)?;
        let (dtype, stored) = (tensor.dtype(), tensor.dtype().row_bytes(k).unwrap_or(0));
        let mut row = vec![0.0; k];
        let mut values = Vec::new();
        for i in 0..COMPARED.min(n) {
            let at = i * n / COMPARED.min(n);
            let bytes = tensor.bytes().get(at * stored..(at + 1) * stored).unwrap_or_default();
            dequantise_row(dtype, bytes, &mut row).map_err(|source| Error::Quantise {
                place: "the model".to_owned(),
                tensor: name.clone(),
                row: at,
                source: Box::new(source),
            })?;
            values.push(row.get(i * k / COMPARED).copied().unwrap_or(0.0));
        }
        all.insert(name, values);
    }
    Ok(all)
}

/// Writes a table.
pub(super) fn write(
    path: &Path,
    (model, matrices): (&str, &BTreeMap<String, Vec<f32>>),
    samples: &str,
    tokens: u64,
    pictures: u64,
    inputs: &[InputStats],
) -> Result<()> {
    let infos = |i: &InputStats| -> Vec<TensorInfo> {
        let k = i.stats.channels();
        let name = i.weights.first().map_or("", String::as_str);
        let info =
            |what: &str, shape| TensorInfo { name: format!("{name}.{what}"), dtype: DType::F32, shape };
        let mut all: Vec<TensorInfo> =
            [MIN, MAX, MEAN_ABS, MEAN_SQUARES].map(|what| info(what, vec![k])).into();
        if i.stats.second_moments.is_some() {
            all.push(info(SECOND_MOMENTS, vec![k, k]));
        }
        if let Some(sample) = &i.rows {
            all.push(info(ROWS, vec![sample.rows.len() / k.max(1), k]));
        }
        all
    };
    let range = |i: &InputStats| {
        let least = i.stats.min.iter().copied().fold(f32::INFINITY, f32::min);
        let most = i.stats.max.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        json!({ "weights": i.weights, "rows": i.stats.rows, "min": least, "max": most })
    };
    let metadata = json!({
        "version": VERSION,
        "model": model,
        "samples": samples,
        "matrices": matrices,
        "tokens": tokens,
        "pictures": pictures,
        "inputs": inputs.iter().map(range).collect::<Vec<_>>(),
    });
    let declared: Vec<TensorInfo> = inputs.iter().flat_map(infos).collect();
    let metadata = BTreeMap::from([(METADATA.to_owned(), metadata.to_string())]);
    let mut writer = SafetensorsWriter::create(path, &declared, &metadata)?;
    for i in inputs {
        let name = i.weights.first().map_or("", String::as_str);
        let mut put = |what: &str, values: &[f32]| -> Result<()> {
            for part in values.chunks(1 << 16) {
                let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
                writer.write(&format!("{name}.{what}"), &bytes)?;
            }
            Ok(())
        };
        put(MIN, &i.stats.min)?;
        put(MAX, &i.stats.max)?;
        put(MEAN_ABS, &i.stats.mean_abs())?;
        put(MEAN_SQUARES, &i.stats.mean_squares())?;
        if let Some(moments) = &i.stats.second_moments {
            put(SECOND_MOMENTS, moments)?;
        }
        if let Some(sample) = &i.rows {
            put(ROWS, &sample.rows)?;
        }
    }
    Ok(writer.finish()?)
}

impl CalibrationTable {
    /// Opens a table.
    ///
    /// # Errors
    /// [`Error::Calibration`] where it is not there or is none, and as [`SafetensorsFile::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<CalibrationTable> {
        let path = path.as_ref();
        let wrong = |what: String| Error::Calibration { path: path.to_owned(), what };
        let file = SafetensorsFile::open(path, ReadMode::Map)?;
        let text = file.metadata().get(METADATA).ok_or_else(|| {
            wrong(format!("no `{METADATA}` in its metadata: expected a file that `calibrate` wrote"))
        })?;
        let value: Value =
            serde_json::from_str(text).map_err(|e| wrong(format!("its metadata is not JSON: {e}")))?;
        if value["version"] != VERSION {
            return Err(wrong(format!("version {}, expected {VERSION}", value["version"])));
        }
        let string = |key: &str| {
            value[key].as_str().map(str::to_owned).ok_or_else(|| wrong(format!("its metadata lacks `{key}`")))
        };
        let (model, samples) = (string("model")?, string("samples")?);
        let of_matrix = |(name, values): (&String, &Value)| -> Option<(String, Vec<f32>)> {
            let values = values.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32));
            Some((name.clone(), values.collect::<Option<_>>()?))
        };
        let matrices = value["matrices"].as_object().and_then(|all| all.iter().map(of_matrix).collect());
        let matrices = matrices.ok_or_else(|| wrong("its metadata lacks `matrices`".into()))?;
        let (mut inputs, mut ranges) = (HashMap::new(), HashMap::new());
        let list = value["inputs"].as_array().ok_or_else(|| wrong("its metadata lacks `inputs`".into()))?;
        for (i, input) in list.iter().enumerate() {
            let weights: Option<Vec<&str>> =
                input["weights"].as_array().and_then(|list| list.iter().map(Value::as_str).collect());
            let (Some(&[first, ..]), Some(least), Some(most)) =
                (weights.as_deref(), input["min"].as_f64(), input["max"].as_f64())
            else {
                return Err(wrong(format!("inputs[{i}] must have `weights`, `min` and `max`")));
            };
            ranges.insert(first.to_owned(), (least as f32, most as f32));
            inputs.extend(weights.iter().flatten().map(|w| ((*w).to_owned(), first.to_owned())));
        }
        Ok(CalibrationTable { path: path.to_owned(), file, model, samples, matrices, inputs, ranges })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The hash of the samples.
    pub fn samples(&self) -> &str {
        &self.samples
    }

    /// Whether the input of a weight was seen.
    pub fn knows(&self, weight: &str) -> bool {
        self.inputs.contains_key(weight)
    }

    /// Whether the matrix of second moments of a weight's input is there.
    pub fn has_second_moments(&self, weight: &str) -> bool {
        self.input(weight).is_some_and(|i| self.file.contains(&format!("{i}.{SECOND_MOMENTS}")))
    }

    /// The name of the input that a weight meets: equal for weights of one input.
    pub fn input(&self, weight: &str) -> Option<&str> {
        self.inputs.get(weight).map(String::as_str)
    }

    /// The smallest and the largest value of a weight's input.
    pub fn range(&self, weight: &str) -> Option<(f32, f32)> {
        self.ranges.get(self.input(weight)?).copied()
    }

    /// The smallest and the largest value of each channel of a weight's input.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the table is damaged.
    pub fn channel_ranges(&self, weight: &str, k: usize) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
        let both = (self.vector(weight, MIN, k)?, self.vector(weight, MAX, k)?);
        Ok(both.0.zip(both.1))
    }

    /// The largest magnitude of a weight's input whose channels were divided by `scales`.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the input was not seen, holds nothing but zeros, or the table is damaged.
    pub fn input_range(&self, weight: &str, k: usize, scales: Option<&[f32]>) -> Result<f32> {
        let wrong = |what: String| Error::Calibration { path: self.path.clone(), what };
        let Some((least, most)) = self.channel_ranges(weight, k)? else {
            let hint = "give samples that reach it (pictures, for the vision encoder)";
            return Err(wrong(format!("it has no range for the input of `{weight}`: {hint}")));
        };
        let sizes = least.iter().zip(&most).map(|(least, most)| least.abs().max(most.abs()));
        let range = match scales {
            Some(scales) => sizes.zip(scales).map(|(size, scale)| size / scale).fold(0.0, f32::max),
            None => sizes.fold(0.0, f32::max),
        };
        if range > 0.0 && range.is_finite() {
            return Ok(range);
        }
        Err(wrong(format!("the range of the input of `{weight}` is {range}, expected a number above 0")))
    }

    /// The mean magnitude of each of the `k` channels of a weight's input.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the table is damaged.
    pub fn mean_abs(&self, weight: &str, k: usize) -> Result<Option<Vec<f32>>> {
        self.vector(weight, MEAN_ABS, k)
    }

    /// The mean square of each of the `k` channels of a weight's input.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the table is damaged.
    pub fn mean_squares(&self, weight: &str, k: usize) -> Result<Option<Vec<f32>>> {
        self.vector(weight, MEAN_SQUARES, k)
    }

    /// The `[k, k]` sums of products of channels of a weight's input.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the table is damaged.
    pub fn second_moments(&self, weight: &str, k: usize) -> Result<Option<Tensor>> {
        self.tensor(weight, SECOND_MOMENTS, &[k, k])
    }

    /// Some of the rows `[n, k]` that went into a cache.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the table is damaged.
    pub fn rows(&self, cache: &str, k: usize) -> Result<Option<Vec<f32>>> {
        let stored = self.input(cache).and_then(|i| self.file.info(&format!("{i}.{ROWS}")));
        let n = stored.and_then(|info| info.shape.first().copied()).unwrap_or(0);
        if n > 2 * KEPT_ROWS {
            let what = format!("it has {n} rows of `{cache}`, expected at most {}", 2 * KEPT_ROWS);
            return Err(Error::Calibration { path: self.path.clone(), what });
        }
        let Some(tensor) = self.tensor(cache, ROWS, &[n, k])? else { return Ok(None) };
        Ok(Some(tensor.to_f32()?.into_owned()))
    }

    fn vector(&self, weight: &str, what: &str, k: usize) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.tensor(weight, what, &[k])? else { return Ok(None) };
        Ok(Some(tensor.to_f32()?.into_owned()))
    }

    fn tensor(&self, weight: &str, what: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(input) = self.input(weight) else { return Ok(None) };
        let name = format!("{input}.{what}");
        if !self.file.contains(&name) {
            return Ok(None);
        }
        let tensor = self.file.tensor(&name)?;
        if tensor.dtype() != DType::F32 || tensor.shape() != shape {
            let found = format!("{} of shape {:?}", tensor.dtype(), tensor.shape());
            let what = format!("tensor `{name}` is {found}, expected F32 of shape {shape:?}");
            return Err(Error::Calibration { path: self.path.clone(), what });
        }
        Ok(Some(tensor))
    }

    /// Refuses a table of another model.
    pub(super) fn check(&self, model: &Model) -> Result<()> {
        self.check_of(&model.text, model.vision.as_ref().map(|v| &v.config), &*model.weights)
    }

    /// Refuses other values of a matrix than those of the model that was calibrated.
    fn check_matrices(&self, found: &BTreeMap<String, Vec<f32>>) -> Result<()> {
        for (name, found) in found {
            let Some(wanted) = self.matrices.get(name) else { continue };
            let most = wanted.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= most * SAME;
            if found.len() != wanted.len() || !found.iter().zip(wanted).all(close) {
                let what = format!(
                    "it was made with another model (`{name}` has other values); run `calibrate` on this one"
                );
                return Err(Error::Calibration { path: self.path.clone(), what });
            }
        }
        Ok(())
    }

    /// The same for the parts of a model.
    pub(super) fn check_of(
        &self,
        text: &TextConfig,
        vision: Option<&VisionConfig>,
        weights: &dyn WeightSource,
    ) -> Result<()> {
        let found = fingerprint_of(text, vision, weights)?;
        if found == self.model {
            return self.check_matrices(&matrix_values_of(text, vision, weights)?);
        }
        let what = format!(
            "it was made with another model (hash {}, this one has {found}); run `calibrate` on this one",
            self.model
        );
        Err(Error::Calibration { path: self.path.clone(), what })
    }
}
