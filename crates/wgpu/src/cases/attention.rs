//! Attention over rows and over caches, with all that is fused around it.

use pocketglm_graph::ops::{RopeLayout, SoftmaxMask};
use pocketglm_graph::{Bindings, Dim, GraphBuilder, Result, Value};
use pocketglm_tensor::{Block, DType, KvFormat};

use super::comparison::Bound;
use super::comparison::bounds::{F32, INT8_ATTENTION, KV_F16, KV_INT8, wider};
use super::draft::{About, Draft, Fill};
use super::{Case, Values};

pub(super) fn cases(list: &mut Vec<Case>) -> Result<()> {
    rows(list)?;
    decode(list)?;
    heads(list)?;
    caches(list)
}

/// Rows of a picture or a prompt: whole, and cut into segments.
fn rows(list: &mut Vec<Case>) -> Result<()> {
    // Heads, key heads, components.
    for (h, kv, d) in [(2, 2, 16), (4, 2, 20), (3, 1, 64), (4, 1, 6), (2, 2, 7), (1, 1, 128), (2, 1, 256)] {
        for bounds in [None, Some(&[0, 1][..]), Some(&[0, 5, 5, 37][..]), Some(&[0, 64, 65, 70][..])] {
            let t = bounds.and_then(|b| b.last()).map_or(35, |&t| t as usize);
            for fill in [Fill::Spread, Fill::Large, Fill::Equal, Fill::Negative] {
                if fill != Fill::Spread && (t != 35 || d > 64) {
                    continue;
                }
                let mask = bounds.map_or("causal".into(), |b| format!("segments {b:?}"));
                let form = format!("{mask}, {t} rows, {h} heads of {d} on {kv}, {} values", fill.name());
                let about = About::new("attention", form, F32).filled(fill).fused(&["attention"]);
                list.push(about.build(|draft, g| {
                    let q = draft.x(g, "q", &[t, h, d])?;
                    let k = draft.x_of(g, "k", &[t, kv, d], Fill::Spread)?;
                    let v = draft.x(g, "v", &[t, kv, d])?;
                    let scale = 1.0 / (d as f32).sqrt();
                    match bounds {
                        None => g.attention(q, k, v, scale, SoftmaxMask::Causal { past: 0.into() }, None),
                        Some(b) => {
                            let segments = draft.ids(g, "segments", &[b.len()], b)?;
                            g.attention(q, k, v, scale, SoftmaxMask::Segments, Some(segments))
                        }
                    }
                })?);
            }
        }
    }
    Ok(())
}

/// One row after many: keys are split between workgroups.
fn decode(list: &mut Vec<Case>) -> Result<()> {
    for (h, kv, d) in [(4, 2, 16), (6, 1, 64), (2, 2, 6)] {
        for s in [1, 31, 33, 64, 65, 200, 4200] {
            let form = format!("1 row of {s} keys, {h} heads of {d} on {kv}");
            list.push(About::new("attention", form, F32).fused(&["attention"]).build(|draft, g| {
                let q = draft.x(g, "q", &[1, h, d])?;
                let k = draft.x_of(g, "k", &[s, kv, d], Fill::Large)?;
                let k = g.scale(k, 3e-4)?;
                let v = draft.x(g, "v", &[s, kv, d])?;
                let mask = SoftmaxMask::Causal { past: (s - 1).into() };
                g.attention(q, k, v, 1.0, mask, None)
            })?);
        }
    }
    Ok(())
}

/// How an attention block is shaped.
#[derive(Clone, Copy)]
struct AttentionBlock {
    heads: usize,
    kv_heads: usize,
    d: usize,
    /// Components that are rotated.
    r: usize,
    layout: RopeLayout,
    /// Types of the three projections.
    types: [DType; 3],
    bias: bool,
    /// Whether all of them are one matrix.
    joined: bool,
}

impl AttentionBlock {
    /// q, k and v from normed rows `x [t, c]`; q and k rotated.
    fn project(
        &self,
        draft: &Draft,
        g: &mut GraphBuilder<'_>,
        x: Value,
        table: Value,
        c: usize,
    ) -> Result<[Value; 3]> {
        let t = g.shape(x)[0].clone();
        let (h, kv, d) = (self.heads, self.kv_heads, self.d);
        let sizes = [h, kv, kv];
        let mut parts = Vec::new();
        if self.joined {
            let all = draft.linear(g, "qkv", self.types[0], x, [(h + 2 * kv) * d, c], self.bias)?;
            let mut at = 0;
            for size in sizes {
                parts.push(g.slice(all, 1, at * d, size * d)?);
                at += size;
            }
        } else {
            for (i, name) in ["q", "k", "v"].into_iter().enumerate() {
                parts.push(draft.linear(g, name, self.types[i], x, [sizes[i] * d, c], self.bias)?);
            }
        }
        for (i, part) in parts.iter_mut().enumerate() {
            *part = g.reshape(*part, &[t.clone(), sizes[i].into(), d.into()])?;
            if i < 2 {
                *part = g.rope(*part, table, self.layout)?;
            }
        }
        Ok([parts[0], parts[1], parts[2]])
    }

    fn name(&self) -> String {
        let types = if self.joined {
            format!("{} in one", self.types[0])
        } else {
            self.types.map(|t| t.name()).join(" ")
        };
        format!(
            "{} heads of {} on {}, {} rotated, {:?}, {types}{}",
            self.heads,
            self.d,
            self.kv_heads,
            self.r,
            self.layout,
            if self.bias { ", bias" } else { "" }
        )
    }
}

const Q4: DType = DType::Block(Block::Q4_0);
const Q8: DType = DType::Block(Block::Q8_0);
const FLOAT: [DType; 3] = [DType::F32; 3];

/// The head of an attention block without a cache: norm, projections, rotary embedding; then attention.
fn heads(list: &mut Vec<Case>) -> Result<()> {
    use RopeLayout::{Half, Interleaved};
    let block = |heads, kv_heads, d, r, layout, types, bias, joined| AttentionBlock {
        heads,
        kv_heads,
        d,
        r,
        layout,
        types,
        bias,
        joined,
    };
    // Heads of 64, 80 and 128 have kernels of their own on cooperative matrices, where weights are no better than f16.
    let wide = |heads, d| block(heads, heads, d, d, Half, [DType::F16; 3], true, true);
    for b in [
        wide(2, 64),
        wide(1, 80),
        wide(1, 128),
        block(2, 2, 8, 8, Half, FLOAT, true, true),
        block(4, 1, 12, 8, Interleaved, FLOAT, false, false),
        block(2, 2, 16, 16, Half, [DType::F16; 3], true, true),
        block(4, 2, 16, 8, Interleaved, [Q4, Q8, DType::F32], true, false),
        block(3, 3, 6, 6, Half, FLOAT, true, true),
    ] {
        for (t, bounds) in [(1, &[0, 1][..]), (13, &[0, 4, 13][..]), (40, &[0, 40][..])] {
            let c = 64;
            let rounds = t == 1 && b.types.iter().any(|t| t.is_quantised());
            let form = format!("{t} rows, {}", b.name());
            let about = About::new("norm_qkv_rope", form, if rounds { INT8_ATTENTION } else { F32 });
            list.push(about.fused(&["norm_qkv_rope", "attention"]).build(|draft, g| {
                let x = draft.x(g, "x", &[t, c])?;
                let x = draft.rms(g, "n", x, c)?;
                let positions: Vec<i32> = (0..2 * t as i32).map(|i| (i * 37) % 900).collect();
                let positions = draft.ids(g, "positions", &[2, t], &positions)?;
                let axes: Vec<u8> = (0..b.r / 2).map(|i| (i % 2) as u8).collect();
                let table = g.rope_table(positions, 10_000.0, &axes, b.r / 2)?;
                let [q, k, v] = b.project(draft, g, x, table, c)?;
                let segments = draft.ids(g, "segments", &[bounds.len()], bounds)?;
                let scale = 1.0 / (b.d as f32).sqrt();
                g.attention(q, k, v, scale, SoftmaxMask::Segments, Some(segments))
            })?);
        }
    }
    Ok(())
}

fn cache_bound(kv: KvFormat) -> Bound {
    match kv {
        KvFormat::F16 => KV_F16,
        KvFormat::Int8 => KV_INT8,
        _ => F32,
    }
}

/// An attention block with its caches: a prompt, one token, two tokens, one token; and the whole caches, of which what is behind
/// the tokens must still be zero.
fn caches(list: &mut Vec<Case>) -> Result<()> {
    use RopeLayout::{Half, Interleaved};
    const CAPACITY: usize = 21;
    const STEPS: [(usize, usize); 5] = [(9, 0), (1, 9), (2, 10), (1, 12), (1, 13)];
    const BF16: [DType; 3] = [DType::BF16; 3];
    const F16: [DType; 3] = [DType::F16; 3];
    let q6k = DType::Block(Block::Q6_K);
    for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        for (heads, kv_heads, d, r, layout, types, bias, joined) in [
            (4, 2, 8, 8, Interleaved, FLOAT, true, false),
            (4, 1, 16, 8, Interleaved, F16, false, true),
            (2, 1, 16, 8, Interleaved, BF16, true, false),
            (2, 2, 8, 8, Half, FLOAT, true, false),
            (8, 2, 16, 8, Interleaved, [Q4; 3], true, false),
            (2, 1, 12, 4, Interleaved, [Q8, Q4, DType::F32], false, false),
            (2, 1, 16, 8, Interleaved, [Q8, Q8, q6k], true, false),
            // Components that vectors of four do not divide.
            (3, 1, 6, 6, Interleaved, FLOAT, true, false),
            // Heads that have kernels of their own on cooperative matrices.
            (4, 2, 64, 32, Interleaved, F16, true, false),
            (1, 1, 80, 40, Half, F16, true, false),
            (16, 1, 128, 64, Interleaved, F16, false, false),
        ] {
            // Bytes of a head come four to a word.
            if kv == KvFormat::Int8 && d % 4 != 0 {
                continue;
            }
            let b = AttentionBlock { heads, kv_heads, d, r, layout, types, bias, joined };
            // A prompt that cooperative matrices take, and keys in more than one part.
            let (capacity, steps) = match d >= 64 {
                true => (80, &[(40, 0), (1, 40), (30, 41), (1, 71)][..]),
                false => (CAPACITY, &STEPS[..]),
            };
            let c = if types.contains(&q6k) { 256 } else { 64 };
            let rounds = types.iter().any(|t| t.is_quantised());
            let bound = wider(cache_bound(kv), if rounds { INT8_ATTENTION } else { F32 });
            // Scores of a trained model's size: larger ones pick single keys, and multiply what rounding does to them.
            let scale = if rounds { 0.25 } else { 1.0 };
            for sum in [false, true] {
                let behind = if sum { ", behind a sum and two norms" } else { "" };
                let form = format!("cache in {kv}, {}{behind}", b.name());
                let about = About::new("norm_qkv_rope_append", form, bound).kv(kv);
                let (t, past) = (Dim::symbol("T"), Dim::symbol("P"));
                let body = |draft: &Draft, g: &mut GraphBuilder<'_>| {
                    let mut x = g.input("x", DType::F32, &[t.clone(), c.into()])?;
                    let positions = g.input("positions", DType::I32, &[1.into(), t.clone()])?;
                    if sum {
                        let y = g.scale(x, -0.3)?;
                        let y = draft.rms(g, "inner", y, c)?;
                        x = g.add(x, y)?;
                        let h = g.scale(x, 0.5)?;
                        g.output("h", h);
                    }
                    let x = draft.rms(g, "n", x, c)?;
                    let table = g.rope_table(positions, 10_000.0, &vec![0; b.r / 2], b.r / 2)?;
                    let [q, k, v] = b.project(draft, g, x, table, c)?;
                    let mut now = Vec::new();
                    for (name, rows) in [("k", k), ("v", v)] {
                        let rows = g.reshape(rows, &[t.clone(), (kv_heads * d).into()])?;
                        let state = g.kv_state(name, capacity.into(), kv_heads, d)?;
                        let state = g.kv_append(rows, state, past.clone())?;
                        now.push(g.kv_read(state, past.clone() + t.clone())?);
                    }
                    let mask = SoftmaxMask::Causal { past: past.clone() };
                    g.attention(q, now[0], now[1], scale / (d as f32).sqrt(), mask, None)
                };
                let runs = steps.iter().map(|&(t, past)| {
                    let bindings = Bindings::new().with("T", t).with("P", past);
                    let x = Fill::Spread.values((past + 1) as u32, t * c);
                    let positions = (past..past + t).map(|p| p as i32).collect();
                    let positions = ("positions".into(), Values::I32(positions));
                    (bindings, vec![("x".into(), Values::F32(x)), positions])
                });
                list.push(
                    about.fused(&["norm_qkv_rope_append", "attention"]).build_runs(body, runs.collect())?,
                );
            }
        }
        // Append and read by themselves; the read of the whole cache shows what was not written.
        for (heads, d) in [(1, 4), (3, 8), (2, 68)] {
            let form = format!("{heads} heads of {d}, {kv}");
            // Given the same rows, both round to the same codes.
            let bound = if kv == KvFormat::Int8 { F32 } else { cache_bound(kv) };
            let (t, past) = (Dim::symbol("T"), Dim::symbol("P"));
            let body = |_: &Draft, g: &mut GraphBuilder<'_>| {
                let x = g.input("x", DType::F32, &[t.clone(), (heads * d).into()])?;
                let state = g.kv_state("k", CAPACITY.into(), heads, d)?;
                let state = g.kv_append(x, state, past.clone())?;
                let y = g.kv_read(state, CAPACITY.into())?;
                g.scale(y, 1.0)
            };
            let runs = STEPS.iter().map(|&(t, past)| {
                let fill = [Fill::Spread, Fill::Large, Fill::Negative, Fill::Equal, Fill::Zero][past % 5];
                let x = fill.values((past + 1) as u32, t * heads * d);
                (Bindings::new().with("T", t).with("P", past), vec![("x".into(), Values::F32(x))])
            });
            let about = About::new("kv_append, kv_read", form, bound).kv(kv);
            list.push(about.build_runs(body, runs.collect())?);
        }
    }
    Ok(())
}
