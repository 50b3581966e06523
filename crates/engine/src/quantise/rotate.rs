//! Rotated values of attention: outliers among a head's components are spread over all of them before they are rounded.
//!
//! Attention averages a head's values over tokens and does not mix their components, so `H D` before it and `D H` behind
//! it cancel: the rows of `v_proj` (of the values' part of the vision encoder's `qkv`) and their bias are rotated, and
//! so are the columns of `o_proj` (`proj`) of every query head. The cache then holds rotated values as well.
//!
//! Nowhere else does a rotation fold: queries and keys are rotated by their positions in between, SiLU and the
//! product in the MLP are not linear, and the decoder norms what attention and MLP give before it is added
//! (`post_self_attn_layernorm`, `post_mlp_layernorm`), which a rotation of the residual stream does not pass.

use std::ops::Range;
use std::sync::Arc;

use pocketglm_quant::dequantise_row;
use pocketglm_quant::hadamard::Rotation;
use pocketglm_tensor::{DType, Tensor};

use crate::model::Model;
use crate::{Error, Result};

/// Picks the signs: one choice for every file, so that equal weights make equal files.
const SIGNS: u64 = 1;

/// How a tensor is rotated.
#[derive(Clone)]
pub(super) enum Turn {
    /// These rows (elements of a vector), a head at a time.
    Rows(Range<usize>, Arc<Rotation>),
    /// All columns, a head at a time.
    Columns(Arc<Rotation>),
}

/// The matrix that makes values and the one that takes what attention makes of them.
pub(super) struct Pair {
    pub values: String,
    pub bias: Option<String>,
    pub output: String,
    rows: Range<usize>,
    rotation: Arc<Rotation>,
}

impl Pair {
    /// What is rotated, by name.
    pub fn turns(&self) -> impl Iterator<Item = (String, Turn)> {
        let rows = [Some(&self.values), self.bias.as_ref()].into_iter().flatten();
        let rows = rows.map(|name| (name.clone(), Turn::Rows(self.rows.clone(), self.rotation.clone())));
        rows.chain([(self.output.clone(), Turn::Columns(self.rotation.clone()))])
    }
}

/// The pairs of a model whose heads have an even number of components; others have nothing to mix.
pub(super) fn pairs(model: &Model) -> Result<Vec<Pair>> {
    let rotation = |d: usize| -> Result<Option<Arc<Rotation>>> {
        let made = Rotation::new(d, d, Some(SIGNS))
            .map_err(|source| Error::Statistics { tensor: format!("a head of {d}"), source })?;
        Ok((made.block() > 1).then(|| Arc::new(made)))
    };
    let mut pairs = Vec::new();
    let mut add = |block: &str, [values, output]: [&str; 2], rows: &Range<usize>, bias, rotation: &_| {
        let name = |linear: &str, part: &str| format!("{block}.{linear}.{part}");
        pairs.push(Pair {
            values: name(values, "weight"),
            bias: Some(name(values, "bias")).filter(|_| bias),
            output: name(output, "weight"),
            rows: rows.clone(),
            rotation: Arc::clone(rotation),
        });
    };
    let text = &model.text;
    if let Some(rotation) = rotation(text.head_dim)? {
        let rows = 0..text.num_key_value_heads * text.head_dim;
        for i in 0..text.num_hidden_layers {
            let block = format!("model.language_model.layers.{i}.self_attn");
            add(&block, ["v_proj", "o_proj"], &rows, text.attention_bias, &rotation);
        }
    }
    if let Some(vision) = model.vision.as_ref().map(|v| &v.config)
        && let Some(rotation) = rotation(vision.head_dim())?
    {
        let c = vision.hidden_size;
        for i in 0..vision.depth {
            let block = format!("model.visual.blocks.{i}.attn");
            add(&block, ["qkv", "proj"], &(2 * c..3 * c), vision.attention_bias, &rotation);
        }
    }
    Ok(pairs)
}

/// A tensor with some rows rotated, in f32.
pub(super) fn rotate_rows(
    failed: &dyn Fn(usize, pocketglm_quant::Error) -> Error,
    tensor: &Tensor,
    rows: &Range<usize>,
    rotation: &Rotation,
) -> Result<Tensor> {
    let k = tensor.shape().get(1).copied().unwrap_or(1).max(1);
    let mut values = vec![0.0; tensor.shape().iter().product()];
    // A vector's elements are a row of the stored format, and rows of one value for the rotation.
    let width = tensor.shape().last().copied().unwrap_or(1).max(1);
    let stored = tensor.dtype().row_bytes(width).unwrap_or(0).max(1);
    for (row, (bytes, out)) in
        tensor.bytes().chunks_exact(stored).zip(values.chunks_exact_mut(width)).enumerate()
    {
        dequantise_row(tensor.dtype(), bytes, out).map_err(|e| failed(row, e))?;
    }
    let part = values.get_mut(rows.start * k..rows.end * k).unwrap_or_default();
    for (head, part) in part.chunks_mut(rotation.values() * k).enumerate() {
        let row = rows.start + head * rotation.values();
        rotation.rotate_outputs(part, k).map_err(|e| failed(row, e))?;
    }
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(Tensor::new(DType::F32, tensor.shape(), bytes.into())?)
}

/// The second moments `[k, k]` of an input whose channels are rotated: `R M Rᵀ`.
pub(super) fn rotate_moments(
    moments: &mut [f32],
    k: usize,
    rotation: &Rotation,
) -> pocketglm_quant::Result<()> {
    rotation.rotate_rows(moments)?;
    moments.chunks_mut(rotation.values() * k).try_for_each(|head| rotation.rotate_outputs(head, k))
}

/// The mean squares of rotated channels, of which only those before are known: each block's mean, which is right where
/// channels are not correlated, and has the right sum in any case.
pub(super) fn rotate_mean_squares(squares: &mut [f32], rotation: &Rotation) {
    for block in squares.chunks_mut(rotation.block()) {
        let mean = block.iter().sum::<f32>() / block.len().max(1) as f32;
        block.fill(mean);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values of either sign.
    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn rotated_moments_are_those_of_rotated_rows() {
        let (k, n) = (24, 40);
        let rotation = Rotation::new(8, 8, Some(SIGNS)).unwrap();
        let moments = |rows: &[f32]| -> Vec<f32> {
            let sum = |i: usize, j: usize| rows.chunks_exact(k).map(|r| r[i] * r[j]).sum();
            (0..k * k).map(|at| sum(at / k, at % k)).collect()
        };
        let mut rows = values(n * k);
        let mut found = moments(&rows);
        rotation.rotate_rows(&mut rows).unwrap();
        let wanted = moments(&rows);
        assert!(found.iter().zip(&wanted).any(|(a, b)| (a - b).abs() > 0.1), "nothing was rotated");
        rotate_moments(&mut found, k, &rotation).unwrap();
        assert!(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-4));
        let mut squares: Vec<f32> = (0..k).map(|i| i as f32).collect();
        rotate_mean_squares(&mut squares, &rotation);
        assert_eq!([squares[0], squares[7], squares[8], squares[23]], [3.5, 3.5, 11.5, 19.5]);
    }

    #[test]
    fn only_the_rows_that_are_named_are_rotated_and_a_bias_as_its_weights_are() {
        let rotation = Rotation::new(4, 4, Some(SIGNS)).unwrap();
        let (n, k) = (12, 3);
        let weights = values(n * k);
        let tensor = |shape: &[usize], v: &[f32]| {
            let bytes: Vec<u8> = v.iter().flat_map(|v| v.to_le_bytes()).collect();
            Tensor::new(DType::F32, shape, bytes.into()).unwrap()
        };
        let failed = |row: usize, e| panic!("row {row}: {e}");
        let turned = rotate_rows(&failed, &tensor(&[n, k], &weights), &(4..12), &rotation).unwrap();
        let turned = turned.to_f32().unwrap().into_owned();
        assert_eq!(turned[..4 * k], weights[..4 * k]);
        // A column as a bias.
        let column = |w: &[f32]| w.iter().skip(1).step_by(k).copied().collect::<Vec<f32>>();
        let bias = rotate_rows(&failed, &tensor(&[n], &column(&weights)), &(4..12), &rotation).unwrap();
        assert_eq!(*bias.to_f32().unwrap(), column(&turned));
        assert_ne!(column(&turned), column(&weights));
    }
}
