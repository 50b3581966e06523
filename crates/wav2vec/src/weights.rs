//! The weights as the graph takes them: kernels with their taps before their channels, the weight norm of the
//! positional convolution folded, matrices rounded to INT8 where that is wanted. A source may have them so already, as
//! `.pglm` files do; such tensors pass as they are.

use std::collections::HashMap;

use pocketglm_checkpoint::{ExpectedTensor, NameRules};
use pocketglm_graph::GraphBuilder;
use pocketglm_quant::{Method, RowOptions, dequantise_row, quantise_row};
use pocketglm_tensor::ops::conv_groups_take;
use pocketglm_tensor::{
    Affine, AlignedF32, Bytes, DType, Error, Group, Packed, PackedFormat, Result, Tensor, TensorInfo,
    WeightSource,
};

use crate::{Trace, Wav2VecConfig, encoder};

/// Scope of the encoder in a Wav2Vec2 checkpoint.
pub(crate) const SCOPE: &str = "wav2vec2";

/// Names of a checkpoint with a head, and of a bare encoder.
pub(crate) const LAYOUTS: &[NameRules] = &[
    NameRules { layout: "with a head", prefixes: &[("wav2vec2.", "wav2vec2."), ("lm_head.", "lm_head.")] },
    NameRules {
        layout: "bare",
        prefixes: &[
            ("feature_extractor.", "wav2vec2.feature_extractor."),
            ("feature_projection.", "wav2vec2.feature_projection."),
            ("encoder.", "wav2vec2.encoder."),
            ("masked_spec_embed", "wav2vec2.masked_spec_embed"),
        ],
    },
];

/// Tensors of training that inference does not need.
pub(crate) const IGNORED: &[&str] =
    &["wav2vec2.masked_spec_embed", "quantizer.", "project_q.", "project_hid."];

/// The name of convolution `i`'s kernel, in the encoder's scope.
pub(crate) fn conv_name(i: usize) -> String {
    format!("feature_extractor.conv_layers.{i}.conv.weight")
}

/// The name of the positional convolution's folded kernel, in the scope `encoder`.
pub(crate) fn pos_conv_name() -> &'static str {
    "pos_conv_embed.conv.weight"
}

/// The two spellings of weight norm: magnitude and direction.
const SPELLINGS: [[&str; 2]; 2] =
    [["weight_g", "weight_v"], ["parametrizations.weight.original0", "parametrizations.weight.original1"]];

/// Fewest inputs of an output whose weights are rounded: the first convolution has ten.
const FEWEST: usize = 32;

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As the checkpoint stores them.
    #[default]
    Stored,
    /// Eight bits, a scale for each row; rounded while they are loaded. The first convolution and vectors stay as they
    /// are, and a positional convolution whose groups have no channels in fours, or very many.
    Int8,
}

const fn int8() -> DType {
    match Affine::new(8, Group::Row, true) {
        Some(affine) => DType::Affine(affine),
        None => DType::F32,
    }
}

/// What becomes of a tensor.
#[derive(Clone, Copy)]
enum Change {
    /// `[o, c, k]` to `[o, k·c]`.
    Turn,
    /// Weight norm is folded, then as `Turn`.
    Fold,
    /// Only rounded.
    Round,
}

/// A source that gives the encoder's weights as its graph takes them, and all others as they are.
pub struct Prepared<W> {
    source: W,
    /// By canonical name: what is done, and the shape that results.
    changes: HashMap<String, (Change, [usize; 2])>,
    /// Scope of the positional convolution.
    pos_conv: String,
    stored_pos_conv: [usize; 3],
    precision: Precision,
}

impl<W: WeightSource> Prepared<W> {
    /// Prepares the encoder whose weights have the prefix `scope` in `source`.
    pub fn new(source: W, scope: &str, config: &Wav2VecConfig, precision: Precision) -> Prepared<W> {
        let mut changes = HashMap::new();
        let mut channels = 1;
        for (i, (&out, &kernel)) in config.conv_dim.iter().zip(&config.conv_kernel).enumerate() {
            let name = format!("{scope}.{}", conv_name(i));
            if !is_matrix(&source, &name) {
                changes.insert(name, (Change::Turn, [out, kernel * channels]));
            }
            channels = out;
        }
        let (h, k) = (config.hidden_size, config.num_conv_pos_embeddings);
        let inner = h / config.num_conv_pos_embedding_groups;
        let pos_conv = format!("{scope}.encoder.{}", pos_conv_name());
        let ready = is_matrix(&source, &pos_conv);
        if !ready {
            changes.insert(pos_conv.clone(), (Change::Fold, [h, k * inner]));
        }
        if precision == Precision::Int8 {
            for info in source.tensors() {
                let matrix = info.shape.len() == 2
                    && info.dtype.is_float()
                    && (info.name.starts_with(&format!("{scope}.")) || info.name == "lm_head.weight");
                if matrix {
                    changes.insert(info.name.clone(), (Change::Round, [info.shape[0], info.shape[1]]));
                }
            }
        }
        Prepared { source, changes, pos_conv, stored_pos_conv: [h, inner, k], precision }
    }

    /// Whether a tensor under this name is a matrix that can be quantised: one of a linear layer, or of a convolution with
    /// enough numbers under its kernel. See [`Prepared::takes`] for the formats.
    pub fn quantises(&self, info: &TensorInfo) -> bool {
        info.shape.len() == 2 && info.shape[1] >= FEWEST && self.takes(&info.name, int8())
    }

    /// Whether there is a kernel for a matrix in this type. There are for all, but for the positional convolution: that takes
    /// f32 and eight bits with a scale for each row.
    pub fn takes(&self, name: &str, dtype: DType) -> bool {
        let [_, inner, _] = self.stored_pos_conv;
        let packs = |format| conv_groups_take(format, inner);
        name != self.pos_conv || dtype == DType::F32 || PackedFormat::of(dtype).is_some_and(packs)
    }

    /// The source below.
    pub fn source(&self) -> &W {
        &self.source
    }

    /// Magnitude and direction of the positional convolution, under the names that the source has.
    fn weight_norm(&self) -> Option<[String; 2]> {
        let prefix = self.pos_conv.strip_suffix("weight").unwrap_or(&self.pos_conv);
        let names = SPELLINGS.map(|pair| pair.map(|name| format!("{prefix}{name}")));
        names.into_iter().find(|[g, _]| self.source.info(g).is_some())
    }

    /// Whether a changed matrix is rounded, see [`Prepared::quantises`].
    fn rounds(&self, name: &str, [_, k]: [usize; 2]) -> bool {
        self.precision == Precision::Int8 && k >= FEWEST && self.takes(name, int8())
    }

    /// The changed matrix in f32. What was read of the source may leave memory: it is not read again.
    fn changed(&self, name: &str, change: Change, shape: [usize; 2]) -> Result<AlignedF32> {
        let wrong = |found: &[usize]| Error::Source {
            name: name.into(),
            place: "the checkpoint".into(),
            what: format!("has the shape {found:?}, expected one that makes {shape:?}"),
        };
        let [h, inner, k] = self.stored_pos_conv;
        let weight_norm = self.weight_norm().filter(|_| matches!(change, Change::Fold));
        let stored = weight_norm.as_ref().map_or(name, |[_, v]| v.as_str());
        let tensor = self.source.tensor(stored)?;
        let [o, c, taps] = *tensor.shape() else { return Err(wrong(tensor.shape())) };
        let fits = match change {
            Change::Fold => [o, c, taps] == [h, inner, k],
            _ => o == shape[0] && c * taps == shape[1],
        };
        if !fits {
            return Err(wrong(tensor.shape()));
        }
        let values = tensor.to_f32()?;
        let mut factors = vec![1.0; taps];
        if let Some([g, _]) = &weight_norm {
            let magnitudes = self.source.tensor(g)?;
            if magnitudes.shape() != [1, 1, k] {
                return Err(wrong(magnitudes.shape()));
            }
            factors = norm_factors(&magnitudes.to_f32()?, &values);
        }
        let turned = turned(&values, &factors, c)?;
        drop(values);
        tensor.shared_bytes().release();
        Ok(turned)
    }

    /// The matrix rounded, row after row.
    fn rounded(&self, name: &str, change: Change, shape: [usize; 2]) -> Result<Tensor> {
        let dtype = int8();
        let options = RowOptions { method: Method::Round, ..RowOptions::default() };
        let mut bytes = Vec::with_capacity(dtype.bytes(&shape).unwrap_or(0));
        let failed = |e: pocketglm_quant::Error| Error::Source {
            name: name.into(),
            place: "the checkpoint".into(),
            what: e.to_string(),
        };
        if matches!(change, Change::Round) {
            let tensor = self.source.tensor(name)?;
            let stored = tensor.dtype().row_bytes(shape[1]).unwrap_or(0).max(1);
            let mut row = vec![0.0; shape[1]];
            for part in tensor.bytes().chunks_exact(stored) {
                dequantise_row(tensor.dtype(), part, &mut row).map_err(failed)?;
                quantise_row(dtype, &row, &options, &mut bytes).map_err(failed)?;
            }
            tensor.shared_bytes().release();
        } else {
            for row in self.changed(name, change, shape)?.chunks_exact(shape[1].max(1)) {
                quantise_row(dtype, row, &options, &mut bytes).map_err(failed)?;
            }
        }
        Tensor::new(dtype, &shape, Bytes::from(bytes))
    }
}

/// Whether the source has this kernel as a matrix, as a graph takes it.
fn is_matrix(source: &(impl WeightSource + ?Sized), name: &str) -> bool {
    source.info(name).is_some_and(|info| info.shape.len() == 2)
}

/// `[o, c, k]` to `[o, k, c]`, each tap times its factor.
fn turned(kernel: &[f32], factors: &[f32], c: usize) -> Result<AlignedF32> {
    let k = factors.len();
    let mut out = AlignedF32::working(kernel.len())?;
    let size = (c * k).max(1);
    for (block, out) in kernel.chunks_exact(size).zip(out.chunks_exact_mut(size)) {
        for ((tap, factor), out) in factors.iter().enumerate().zip(out.chunks_exact_mut(c.max(1))) {
            for (channel, out) in out.iter_mut().enumerate() {
                *out = block[channel * k + tap] * factor;
            }
        }
    }
    Ok(out)
}

/// Weight norm (Salimans & Kingma 2016) with one magnitude for each tap: `g[j] / |v[.., j]|`.
fn norm_factors(g: &[f32], v: &[f32]) -> Vec<f32> {
    let k = g.len().max(1);
    let mut squares = vec![0f64; k];
    for taps in v.chunks_exact(k) {
        for (sum, v) in squares.iter_mut().zip(taps) {
            *sum += f64::from(*v) * f64::from(*v);
        }
    }
    g.iter().zip(&squares).map(|(g, s)| (f64::from(*g) / s.sqrt()) as f32).collect()
}

impl<W: WeightSource> WeightSource for Prepared<W> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let mut infos: Vec<TensorInfo> =
            self.source.tensors().into_iter().map(|t| self.info(&t.name).unwrap_or(t)).collect();
        if self.weight_norm().is_some() {
            infos.extend(self.info(&self.pos_conv));
        }
        infos
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let Some(&(change, shape)) = self.changes.get(name) else { return self.source.info(name) };
        let stored = match (change, self.weight_norm()) {
            (Change::Fold, Some([_, v])) => self.source.info(&v)?,
            _ => self.source.info(name)?,
        };
        let wanted = match change {
            Change::Fold => stored.shape == self.stored_pos_conv,
            _ => stored.shape.iter().product::<usize>() == shape[0] * shape[1] && stored.shape[0] == shape[0],
        };
        // A kernel of another shape keeps it, so that the graph names it.
        let shape_now = if wanted { shape.to_vec() } else { stored.shape };
        let dtype = match change {
            _ if !wanted => stored.dtype,
            _ if self.rounds(name, shape) => int8(),
            Change::Round => stored.dtype,
            _ => DType::F32,
        };
        Some(TensorInfo { name: name.into(), dtype, shape: shape_now })
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(&(change, shape)) = self.changes.get(name) else { return self.source.tensor(name) };
        if matches!(change, Change::Round) && !self.rounds(name, shape) {
            return self.source.tensor(name);
        }
        if self.rounds(name, shape) {
            return self.rounded(name, change, shape);
        }
        Tensor::new(DType::F32, &shape, self.changed(name, change, shape)?.into())
    }

    fn packed(&self, name: &str) -> Result<Option<Packed>> {
        if self.changes.contains_key(name) { Ok(None) } else { self.source.packed(name) }
    }
}

/// Every tensor that an encoder's checkpoint must have, under its stored shape, with the prefix `scope`.
///
/// `source` tells which of the two spellings of weight norm is meant; the older one where it has neither.
///
/// # Errors
/// Only those of building the graph.
pub fn expected_tensors(
    source: &dyn WeightSource,
    scope: &str,
    config: &Wav2VecConfig,
) -> pocketglm_graph::Result<Vec<ExpectedTensor>> {
    let mut g = GraphBuilder::assuming(DType::F32);
    g.scoped(scope, |g| encoder(g, config, Trace::Off))?;
    let pos_conv = format!("{scope}.encoder.{}", pos_conv_name());
    let prefix = pos_conv.strip_suffix("weight").unwrap_or(&pos_conv).to_owned();
    let (h, k) = (config.hidden_size, config.num_conv_pos_embeddings);
    let kernel = vec![h, h / config.num_conv_pos_embedding_groups, k];
    let tensor = |name: String, shape: Vec<usize>| ExpectedTensor { name, shape, optional: false };
    let mut expected = Vec::new();
    let mut channels = 1;
    for info in g.finish().weights() {
        let conv = (0..config.conv_dim.len()).find(|i| info.name == format!("{scope}.{}", conv_name(*i)));
        if let Some(i) = conv {
            let (o, k) = (config.conv_dim[i], config.conv_kernel[i]);
            let shape = if is_matrix(source, &info.name) { info.shape } else { vec![o, channels, k] };
            expected.push(tensor(info.name, shape));
            channels = config.conv_dim[i];
        } else if info.name == pos_conv {
            let found = SPELLINGS.iter().find(|[g, v]| {
                source.info(&format!("{prefix}{g}")).is_some()
                    || source.info(&format!("{prefix}{v}")).is_some()
            });
            if found.is_none() && source.info(&pos_conv).is_some() {
                let shape = if is_matrix(source, &pos_conv) { info.shape } else { kernel.clone() };
                expected.push(tensor(info.name, shape));
                continue;
            }
            let [g, v] = found.unwrap_or(&SPELLINGS[0]);
            expected.push(tensor(format!("{prefix}{g}"), vec![1, 1, k]));
            expected.push(tensor(format!("{prefix}{v}"), kernel.clone()));
        } else {
            expected.push(tensor(info.name, info.shape));
        }
    }
    Ok(expected)
}
