//! The GLM-4.1V vision encoder and merger as graph functions.
//!
//! Letters: `M` merged tokens, `N = M·merge²` patches, `G` segments + 1, `C` width, `O` out width.

use pocketglm_graph::ops::{RopeLayout, SoftmaxMask};
use pocketglm_graph::{Dim, GraphBuilder, Result, Value};
use pocketglm_tensor::DType;

use crate::VisionConfig;

/// Epsilon of the merger's LayerNorm, which the model's configuration does not carry.
const MERGER_EPS: f32 = 1e-5;

/// The encoder: reads the inputs `pixel_values [N, patch]`, `taps` and `tap_weights` `[N, 16]`, `patch_positions
/// [2, N]`, `segments [G]`, and gives `[M, O]`, one row for each token that a picture becomes.
///
/// Weights are taken from the current scope, `model.visual` in a checkpoint.
///
/// # Errors
/// Missing or misshapen weights, by name.
pub fn encoder(g: &mut GraphBuilder<'_>, config: &VisionConfig) -> Result<Value> {
    let c = config.hidden_size;
    let merge = config.spatial_merge_size;
    let m = Dim::symbol("M");
    let n = m.clone() * (merge * merge).into();

    let pixels = g.input("pixel_values", DType::F32, &[n.clone(), config.patch_elements().into()])?;
    let taps = g.input("taps", DType::I32, &[n.clone(), 16.into()])?;
    let tap_weights = g.input("tap_weights", DType::F32, &[n.clone(), 16.into()])?;
    let positions = g.input("patch_positions", DType::I32, &[2.into(), n.clone()])?;
    let segments = g.input("segments", DType::I32, &[Dim::symbol("G")])?;

    // The kernel is as large as its stride, so the 3-D convolution is one matrix product.
    let x = g.scoped("patch_embed.proj", |g| {
        let (p, t) = (config.patch_size, config.temporal_patch_size);
        let w = g.weight_as("weight", &[c, config.in_channels, t, p, p], &[c, config.patch_elements()])?;
        let b = g.weight("bias", &[c])?;
        let x = g.matmul(pixels, w, true)?;
        g.add(x, b)
    })?;
    let x = g.rms_norm("post_conv_layernorm", x, config.rms_norm_eps)?;
    let side = config.table_side;
    let table = g.weight("embeddings.position_embedding.weight", &[side * side, c])?;
    let places = g.weighted_gather(table, taps, tap_weights)?;
    let mut x = g.add(x, places)?;

    // Half of a head's pairs follow the row, half the column, each with the same frequencies.
    let quarter = config.head_dim() / 4;
    let axes: Vec<u8> = (0..2 * quarter).map(|j| u8::from(j >= quarter)).collect();
    let rope = g.rope_table(positions, config.rope_theta, &axes, quarter)?;
    for i in 0..config.depth {
        x = g.scoped(&format!("blocks.{i}"), |g| block(g, config, x, rope, segments))?;
    }
    let x = g.rms_norm("post_layernorm", x, config.rms_norm_eps)?;
    let x = downsample(g, config, x, &m)?;
    g.scoped("merger", |g| merger(g, config, x))
}

/// `x + attention(norm1(x))`, then `x + mlp(norm2(x))`; `x: [N, C]`.
fn block(
    g: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    x: Value,
    rope: Value,
    segments: Value,
) -> Result<Value> {
    let a = g.rms_norm("norm1", x, config.rms_norm_eps)?;
    let a = g.scoped("attn", |g| attention(g, config, a, rope, segments))?;
    let x = g.add(x, a)?;
    let m = g.rms_norm("norm2", x, config.rms_norm_eps)?;
    let m = g.scoped("mlp", |g| swiglu(g, m, config.out_hidden_size, config.hidden_size))?;
    g.add(x, m)
}

/// Attention within each segment (one picture, or one temporal patch of a video).
fn attention(
    g: &mut GraphBuilder<'_>,
    config: &VisionConfig,
    x: Value,
    rope: Value,
    segments: Value,
) -> Result<Value> {
    let (c, h, d) = (config.hidden_size, config.num_heads, config.head_dim());
    let n = g.shape(x)[0].clone();
    let qkv = g.linear("qkv", x, 3 * c, config.attention_bias)?;
    let mut heads = Vec::with_capacity(3);
    for part in 0..3 {
        let rows = g.slice(qkv, 1, part * c, c)?;
        let rows = g.reshape(rows, &[n.clone(), h.into(), d.into()])?;
        heads.push(if part < 2 { g.rope(rows, rope, RopeLayout::Half)? } else { rows });
    }
    let scale = 1.0 / (d as f32).sqrt();
    let y = g.attention(heads[0], heads[1], heads[2], scale, SoftmaxMask::Segments, Some(segments))?;
    g.linear("proj", y, c, config.attention_bias)
}

/// `down(silu(gate(x)) * up(x))`.
fn swiglu(g: &mut GraphBuilder<'_>, x: Value, inner: usize, out: usize) -> Result<Value> {
    let gate = g.linear("gate_proj", x, inner, false)?;
    let up = g.linear("up_proj", x, inner, false)?;
    let gate = g.silu(gate)?;
    let y = g.mul(gate, up)?;
    g.linear("down_proj", y, out, false)
}

/// The 2-D convolution whose kernel is as large as its stride: `[N, C]` in block order to `[M, O]`.
fn downsample(g: &mut GraphBuilder<'_>, config: &VisionConfig, x: Value, m: &Dim) -> Result<Value> {
    let (c, o, side) = (config.hidden_size, config.out_hidden_size, config.spatial_merge_size);
    let area = side * side;
    // The weight has channels before the kernel's rows and columns, so the rows of a block are turned likewise.
    let x = g.reshape(x, &[m.clone(), area.into(), c.into()])?;
    let x = g.permute(x, &[0, 2, 1])?;
    let x = g.reshape(x, &[m.clone(), (c * area).into()])?;
    g.scoped("downsample", |g| {
        let w = g.weight_as("weight", &[o, c, side, side], &[o, c * area])?;
        let b = g.weight("bias", &[o])?;
        let y = g.matmul(x, w, true)?;
        g.add(y, b)
    })
}

/// `swiglu(gelu(layer_norm(proj(x))))`, all `[M, O]`.
fn merger(g: &mut GraphBuilder<'_>, config: &VisionConfig, x: Value) -> Result<Value> {
    let o = config.out_hidden_size;
    let h = g.linear("proj", x, o, false)?;
    let h = g.layer_norm("post_projection_norm", h, MERGER_EPS)?;
    let h = g.gelu(h)?;
    swiglu(g, h, config.intermediate_size, o)
}
