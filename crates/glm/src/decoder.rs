//! The GLM-4 decoder as graph functions.
//!
//! Letters: `T` new tokens, `P` past tokens, `C` capacity of the KV cache, `V` picture rows among the new
//! tokens, `R` rows whose logits are wanted; `D` width, `H` heads, `K` key heads, `d` head width.

use pocketglm_graph::ops::{RopeLayout, SoftmaxMask};
use pocketglm_graph::{Dim, GraphBuilder, Result, Value};
use pocketglm_tensor::DType;

use crate::TextConfig;

/// Most tokens that a run names as the likeliest ones.
pub const TOP: usize = 64;

/// The results that say which logits are the largest, instead of all logits.
pub const BEST: [&str; 3] = ["best", "top_ids", "top_values"];

/// Which intermediate results a decoder graph names besides `logits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// None.
    Off,
    /// `hidden_states.{i}`: the embeddings, then each layer's result, the last one after the final norm.
    HiddenStates,
}

/// The decoder: reads `input_ids [T]`, `position_ids [3, T]`, `image_at [V]`, `image_embeds [V, D]`, `logit_rows
/// [R]`, appends to the states `k` and `v` of each layer, and names the results `logits [R, vocabulary]`, `best [R, 1]`
/// (the index of the largest logit), and `top_ids` and `top_values` `[R, TOP]`. A run computes those that are wanted.
///
/// Weights are taken from `model.language_model` and `lm_head`.
///
/// # Errors
/// Missing or misshapen weights, by name.
pub fn decoder(g: &mut GraphBuilder<'_>, config: &TextConfig, trace: Trace) -> Result<()> {
    let (t, v, r) = (Dim::symbol("T"), Dim::symbol("V"), Dim::symbol("R"));
    let d = config.hidden_size;
    let ids = g.input("input_ids", DType::I32, std::slice::from_ref(&t))?;
    let positions = g.input("position_ids", DType::I32, &[3.into(), t.clone()])?;
    let image_at = g.input("image_at", DType::I32, std::slice::from_ref(&v))?;
    let image_embeds = g.input("image_embeds", DType::F32, &[v, d.into()])?;
    let logit_rows = g.input("logit_rows", DType::I32, std::slice::from_ref(&r))?;

    let x = g.scoped("model.language_model", |g| {
        let table = g.weight("embed_tokens.weight", &[config.vocab_size, d])?;
        let x = g.gather_rows(table, ids)?;
        let mut x = g.scatter_rows(x, image_at, image_embeds)?;
        let rope =
            g.rope_table(positions, config.rope_theta, &config.axis_of_frequency(), config.rotary_dim / 2)?;
        for i in 0..config.num_hidden_layers {
            if trace == Trace::HiddenStates {
                g.output(&format!("hidden_states.{i}"), x);
            }
            // Behind the last layer's attention nothing looks at other rows, so those that are wanted are enough.
            let wanted = (trace == Trace::Off && i + 1 == config.num_hidden_layers).then_some(logit_rows);
            x = g.scoped(&format!("layers.{i}"), |g| layer(g, config, x, rope, wanted))?;
        }
        let x = g.rms_norm("norm", x, config.rms_norm_eps)?;
        if trace == Trace::Off {
            return Ok(x);
        }
        g.output(&format!("hidden_states.{}", config.num_hidden_layers), x);
        g.gather_rows(x, logit_rows)
    })?;
    let logits = if config.tie_word_embeddings {
        let head = g.weight("model.language_model.embed_tokens.weight", &[config.vocab_size, d])?;
        g.matmul(x, head, true)?
    } else {
        g.linear("lm_head", x, config.vocab_size, false)?
    };
    g.output("logits", logits);
    if trace == Trace::HiddenStates {
        return Ok(());
    }
    let [best, _] = g.top_k(logits, 1)?;
    g.output("best", best);
    let [ids, values] = g.top_k(logits, TOP.min(config.vocab_size))?;
    g.output("top_ids", ids);
    g.output("top_values", values);
    Ok(())
}

/// One decoder layer: each half has a norm before it and a norm before its residual; `x: [T, D]`. The result has the
/// `wanted` rows, or all.
fn layer(
    g: &mut GraphBuilder<'_>,
    config: &TextConfig,
    x: Value,
    rope: Value,
    wanted: Option<Value>,
) -> Result<Value> {
    let eps = config.rms_norm_eps;
    let a = g.rms_norm("input_layernorm", x, eps)?;
    let a = g.scoped("self_attn", |g| attention(g, config, a, rope, wanted))?;
    let a = g.rms_norm("post_self_attn_layernorm", a, eps)?;
    let x = rows(g, x, wanted)?;
    let x = g.add(x, a)?;
    let m = g.rms_norm("post_attention_layernorm", x, eps)?;
    let m = g.scoped("mlp", |g| mlp(g, config, m))?;
    let m = g.rms_norm("post_mlp_layernorm", m, eps)?;
    g.add(x, m)
}

/// The `wanted` rows of `x`, or all.
fn rows(g: &mut GraphBuilder<'_>, x: Value, wanted: Option<Value>) -> Result<Value> {
    match wanted {
        Some(wanted) => g.gather_rows(x, wanted),
        None => Ok(x),
    }
}

/// Causal attention over the cache; `x: [T, D]`, the result as in [`layer`].
fn attention(
    g: &mut GraphBuilder<'_>,
    config: &TextConfig,
    x: Value,
    rope: Value,
    wanted: Option<Value>,
) -> Result<Value> {
    let (h, k, d) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let (t, past) = (g.shape(x)[0].clone(), Dim::symbol("P"));
    let keys = past.clone() + t.clone();
    let rotated = |g: &mut GraphBuilder<'_>, name: &str, heads: usize| {
        let y = g.linear(name, x, heads * d, config.attention_bias)?;
        let y = g.reshape(y, &[t.clone(), heads.into(), d.into()])?;
        g.rope(y, rope, RopeLayout::Interleaved)
    };
    let q = rotated(g, "q_proj", h)?;
    let new_k = rotated(g, "k_proj", k)?;
    let new_k = g.reshape(new_k, &[t.clone(), (k * d).into()])?;
    let new_v = g.linear("v_proj", x, k * d, config.attention_bias)?;
    let cached = |g: &mut GraphBuilder<'_>, name: &str, rows: Value| {
        let state = g.kv_state(name, Dim::symbol("C"), k, d)?;
        let state = g.kv_append(rows, state, past.clone())?;
        g.kv_read(state, keys.clone())
    };
    let keys_now = cached(g, "k", new_k)?;
    let values_now = cached(g, "v", new_v)?;
    let scale = 1.0 / (d as f32).sqrt();
    let mask = SoftmaxMask::Causal { past: past.clone() };
    let y = g.attention(q, keys_now, values_now, scale, mask, None)?;
    let y = rows(g, y, wanted)?;
    g.linear("o_proj", y, config.hidden_size, false)
}

/// `down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate rows first.
fn mlp(g: &mut GraphBuilder<'_>, config: &TextConfig, x: Value) -> Result<Value> {
    let inner = config.intermediate_size;
    let both = g.linear("gate_up_proj", x, 2 * inner, false)?;
    let gate = g.slice(both, 1, 0, inner)?;
    let up = g.slice(both, 1, inner, inner)?;
    let gate = g.silu(gate)?;
    let y = g.mul(gate, up)?;
    g.linear("down_proj", y, config.hidden_size, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> TextConfig {
        TextConfig {
            vocab_size: 20,
            hidden_size: 8,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            intermediate_size: 12,
            rms_norm_eps: 1e-5,
            attention_bias: true,
            max_position_embeddings: 64,
            rope_theta: 10_000.0,
            rotary_dim: 2,
            mrope_section: [1, 0, 0],
            tie_word_embeddings: false,
        }
    }

    /// Rows of every result of the MLP in each layer.
    fn mlp_rows(trace: Trace) -> [Vec<Dim>; 2] {
        let mut g = GraphBuilder::assuming(DType::F32);
        decoder(&mut g, &config(), trace).unwrap();
        let graph = g.finish();
        [0, 1].map(|layer| {
            let scope = format!("model.language_model.layers.{layer}.mlp");
            let nodes = graph.nodes().iter().filter(|n| n.scope == scope && !n.op.is_source());
            nodes.flat_map(|n| &n.outputs).map(|meta| meta.shape[0].clone()).collect()
        })
    }

    #[test]
    fn the_last_layer_computes_the_wanted_rows_alone_unless_it_is_traced() {
        let all =
            |rows: &[Dim], dim: &'static str| !rows.is_empty() && rows.iter().all(|r| *r == Dim::symbol(dim));
        let [first, last] = mlp_rows(Trace::Off);
        assert!(all(&first, "T") && all(&last, "R"), "{first:?} {last:?}");
        let [first, last] = mlp_rows(Trace::HiddenStates);
        assert!(all(&first, "T") && all(&last, "T"), "{first:?} {last:?}");
    }
}
