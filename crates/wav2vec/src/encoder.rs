//! The Wav2Vec2 encoder and its CTC head as graph functions.
//!
//! Letters: `N` samples, `T` frames, `C` channels of a convolution, `H` width of the transformer, `V` vocabulary.

use pocketglm_graph::ops::SoftmaxMask;
use pocketglm_graph::{Dim, GraphBuilder, Result, Value};
use pocketglm_tensor::DType;

use crate::weights::{conv_name, pos_conv_name};
use crate::{FeatureNorm, Wav2VecConfig};

/// Epsilon of the convolutions' norms, which the model's configuration does not carry.
const CONV_NORM_EPS: f32 = 1e-5;

/// Which intermediate results an encoder graph names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// None.
    Off,
    /// `hidden_states.{i}`: what enters each layer, and the result of the last, before the norm after it where the model
    /// has one, as in transformers 5.
    HiddenStates,
}

/// The encoder: reads the inputs `input_values [N, 1]` and `audio_segments [2]` (0 and `T`), and gives `[T, H]`.
///
/// Weights are taken from the current scope, `wav2vec2` in a checkpoint, as [`Prepared`](crate::Prepared) gives them.
///
/// # Errors
/// Missing or misshapen weights, by name.
pub fn encoder(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, trace: Trace) -> Result<Value> {
    let samples = g.input("input_values", DType::F32, &[Dim::symbol("N"), 1.into()])?;
    let segments = g.input("audio_segments", DType::I32, &[2.into()])?;
    let x = feature_extractor(g, config, samples)?;
    let x = g.scoped("feature_projection", |g| {
        let x = g.layer_norm("layer_norm", x, config.layer_norm_eps)?;
        g.linear("projection", x, config.hidden_size, true)
    })?;
    g.scoped("encoder", |g| transformer(g, config, x, segments, trace))
}

/// The CTC head: `[T, H]` to logits `[T, V]`, from the weights of `lm_head`.
///
/// # Errors
/// Missing or misshapen weights, by name.
pub fn ctc_head(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, x: Value) -> Result<Value> {
    g.linear("lm_head", x, config.vocab_size, true)
}

/// The convolutions, each with its norm where it has one, and GELU: `[N, 1]` to `[T, C]`.
fn feature_extractor(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, samples: Value) -> Result<Value> {
    let mut x = samples;
    let mut channels = 1;
    for i in 0..config.conv_dim.len() {
        let (out, kernel, stride) = (config.conv_dim[i], config.conv_kernel[i], config.conv_stride[i]);
        let weight = g.weight(&conv_name(i), &[out, kernel * channels])?;
        x = g.scoped(&format!("feature_extractor.conv_layers.{i}"), |g| {
            let bias = if config.conv_bias { Some(g.weight("conv.bias", &[out])?) } else { None };
            let y = g.frame_conv_by(x, weight, bias, [kernel, stride], [0, 0], 1)?;
            let y = match config.feat_extract_norm {
                FeatureNorm::Layer => g.layer_norm("layer_norm", y, CONV_NORM_EPS)?,
                FeatureNorm::Group if i == 0 => g.instance_norm("layer_norm", y, CONV_NORM_EPS)?,
                FeatureNorm::Group => y,
            };
            g.gelu(y)
        })?;
        channels = out;
    }
    Ok(x)
}

/// Positions from a convolution, then the layers; `x: [T, H]`.
fn transformer(
    g: &mut GraphBuilder<'_>,
    config: &Wav2VecConfig,
    x: Value,
    segments: Value,
    trace: Trace,
) -> Result<Value> {
    let (h, eps) = (config.hidden_size, config.layer_norm_eps);
    let (k, groups) = (config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups);
    // The reference pads both sides by k/2 and drops the last frame of an even kernel.
    let padding = [k / 2, k - 1 - k / 2];
    let weight = g.weight(pos_conv_name(), &[h, k * (h / groups)])?;
    let places = g.scoped("pos_conv_embed", |g| {
        let bias = g.weight("conv.bias", &[h])?;
        let y = g.frame_conv_by(x, weight, Some(bias), [k, 1], padding, groups)?;
        g.gelu(y)
    })?;
    let mut x = g.add(x, places)?;
    if !config.do_stable_layer_norm {
        x = g.layer_norm("layer_norm", x, eps)?;
    }
    for i in 0..config.num_hidden_layers {
        if trace == Trace::HiddenStates {
            g.output(&format!("hidden_states.{i}"), x);
        }
        x = g.scoped(&format!("layers.{i}"), |g| layer(g, config, x, segments))?;
    }
    if trace == Trace::HiddenStates {
        g.output(&format!("hidden_states.{}", config.num_hidden_layers), x);
    }
    if config.do_stable_layer_norm {
        x = g.layer_norm("layer_norm", x, eps)?;
    }
    Ok(x)
}

/// Norms after the residuals, `norm(x + attention(x))` and `norm(x + feed_forward(x))`, or before the blocks.
fn layer(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, x: Value, segments: Value) -> Result<Value> {
    let eps = config.layer_norm_eps;
    if config.do_stable_layer_norm {
        let a = g.layer_norm("layer_norm", x, eps)?;
        let a = g.scoped("attention", |g| attention(g, config, a, segments))?;
        let x = g.add(x, a)?;
        let f = g.layer_norm("final_layer_norm", x, eps)?;
        let f = g.scoped("feed_forward", |g| feed_forward(g, config, f))?;
        return g.add(x, f);
    }
    let a = g.scoped("attention", |g| attention(g, config, x, segments))?;
    let x = g.add(x, a)?;
    let x = g.layer_norm("layer_norm", x, eps)?;
    let f = g.scoped("feed_forward", |g| feed_forward(g, config, x))?;
    let x = g.add(x, f)?;
    g.layer_norm("final_layer_norm", x, eps)
}

/// Attention of every frame to every frame.
fn attention(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, x: Value, segments: Value) -> Result<Value> {
    let (h, heads, d) = (config.hidden_size, config.num_attention_heads, config.head_dim());
    let t = g.shape(x)[0].clone();
    let mut parts = Vec::with_capacity(3);
    for name in ["q_proj", "k_proj", "v_proj"] {
        let rows = g.linear(name, x, h, true)?;
        parts.push(g.reshape(rows, &[t.clone(), heads.into(), d.into()])?);
    }
    let scale = 1.0 / (d as f32).sqrt();
    let y = g.attention(parts[0], parts[1], parts[2], scale, SoftmaxMask::Segments, Some(segments))?;
    g.linear("out_proj", y, h, true)
}

/// `output_dense(gelu(intermediate_dense(x)))`.
fn feed_forward(g: &mut GraphBuilder<'_>, config: &Wav2VecConfig, x: Value) -> Result<Value> {
    let y = g.linear("intermediate_dense", x, config.intermediate_size, true)?;
    let y = g.gelu(y)?;
    g.linear("output_dense", y, config.hidden_size, true)
}
