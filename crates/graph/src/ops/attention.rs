//! Fused attention (Dao et al. 2022): scores are never stored.

use pocketglm_tensor::{Cpu, KvRows, ops as kernels};

use super::{Call, OpDef, shape_error};
use crate::dim::Dim;
use crate::graph::Meta;
use crate::{Error, Result};

/// `softmax(q · kᵀ * scale + mask) · v`, per head; key head of query head `h` is `h / (heads / kv_heads)`.
///
/// Operands: `q [t, ..]`, `k` and `v` `[>= keys, ..]`, each a matrix whose heads start at the column given, or for k
/// and v a cache `[capacity, kv_heads, head_dim]` in any format; then the segment boundaries where the mask has them.
/// Result `[t, heads·head_dim]`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Number of keys.
    pub keys: Dim,
    /// Which keys a query sees.
    pub mask: AttentionMask,
    /// First column of q, k and v in their operands.
    pub columns: [usize; 3],
    /// Whether queries and keys may be rounded to twelve bits and values to bytes. A backend may compute more exactly.
    pub int8: bool,
    /// Whether rows may share their errors' magnitudes, see [`fewer_products`](crate::passes::fewer_products).
    pub fewer: bool,
}

/// Which keys a query sees.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionMask {
    /// Query `i` sees the keys `0 ..= past + i`.
    Causal {
        /// Keys before the first query's own.
        past: Dim,
    },
    /// Query `i` sees the keys of its own segment; operand 3 holds the boundaries `[0, .., t]`.
    Segments,
}

/// Segment boundaries as the kernels take them, checked: ascending from 0 to `t`.
pub(crate) fn boundaries(segments: &[i32], t: usize) -> Result<Vec<u32>> {
    let ok = segments.first() == Some(&0)
        && segments.windows(2).all(|w| w[0] <= w[1])
        && segments.last().is_some_and(|&l| usize::try_from(l) == Ok(t));
    if !ok {
        return Err(Error::Shape {
            op: "segments",
            wanted: format!("ascending boundaries from 0 to {t}"),
            found: format!("{:?}", &segments[..segments.len().min(8)]),
        });
    }
    Ok(segments.iter().map(|&b| b.unsigned_abs()).collect())
}

impl Attention {
    /// Working memory of the kernel for `t` queries and `s` keys, in bytes.
    pub(crate) fn scratch_bytes(&self, cpu: &Cpu, t: usize, s: usize) -> Result<u64> {
        // One segment needs the most.
        let whole = [0, t.try_into().unwrap_or(u32::MAX)];
        let mask = match self.mask {
            AttentionMask::Causal { .. } => kernels::Mask::Causal { past: s.saturating_sub(t) },
            AttentionMask::Segments => kernels::Mask::Segments(&whole),
        };
        let none = KvRows::f32(&[], 0);
        let arguments = self.arguments((&[], 0), [none; 2], t, s, mask);
        let bytes =
            if self.int8 { kernels::attention_int8_scratch_bytes } else { kernels::attention_scratch_bytes };
        Ok(bytes(cpu, &arguments)? as u64)
    }

    fn arguments<'a>(
        &self,
        (q, q_stride): (&'a [f32], usize),
        [k, v]: [KvRows<'a>; 2],
        t: usize,
        s: usize,
        mask: kernels::Mask<'a>,
    ) -> kernels::Attention<'a> {
        kernels::Attention {
            q,
            q_stride,
            k,
            v,
            t,
            s,
            h: self.heads,
            kvh: self.kv_heads,
            d: self.head_dim,
            scale: self.scale,
            mask,
            out_stride: self.heads * self.head_dim,
            fewer: self.fewer,
        }
    }
}

impl OpDef for Attention {
    fn name(&self) -> &'static str {
        if self.int8 { "attention_int8" } else { "attention" }
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let wrong =
            || shape_error("attention", "q [t, heads·d], k and v [keys, kv_heads·d], segments", inputs);
        let wanted = if self.mask == AttentionMask::Segments { 4 } else { 3 };
        if inputs.len() != wanted || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(wrong());
        }
        let parts = self.columns.iter().zip([self.heads, self.kv_heads, self.kv_heads]);
        for (i, (m, (column, heads))) in inputs.iter().zip(parts).enumerate() {
            if i > 0 && *column == 0 && super::kv::is_cache(m, heads, self.head_dim) {
                continue;
            }
            let wide = |d: &Dim| d.as_fixed().is_some_and(|w| column + heads * self.head_dim <= w);
            if m.shape.len() != 2 || !wide(&m.shape[1]) {
                return Err(wrong());
            }
        }
        let t = inputs[0].shape[0].clone();
        Ok(vec![Meta::f32(vec![t, (self.heads * self.head_dim).into()])])
    }
    fn operations(&self, inputs: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        // Keys as the operand has them; a state counts to its capacity, so callers give it cut to the keys.
        4.0 * super::count(&outputs[0]) * inputs[1][0] as f64
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let keys = self.keys.eval(call.bindings)?;
        let t = call.shape("attention", 0)?[0];
        let from = |x: &'_ [f32], column: usize| column.min(x.len());
        let (q, q_stride) = (call.f32("attention", 0)?, call.shape("attention", 0)?[1]);
        let q = &q[from(q, self.columns[0])..];
        let mut cached = [KvRows::f32(&[], 0); 2];
        for (i, slot) in (1..).zip(&mut cached) {
            let shape = call.shape("attention", i)?;
            if shape[0] < keys {
                return Err(Error::Shape {
                    op: "attention",
                    wanted: format!("{keys} keys"),
                    found: format!("a state of {}", shape[0]),
                });
            }
            *slot = match *shape {
                [_, width] => {
                    let x = call.f32("attention", i)?;
                    KvRows::f32(&x[from(x, self.columns[i])..], width)
                }
                _ => call.kv_rows("attention", i)?,
            };
        }
        let segments;
        let mask = match &self.mask {
            AttentionMask::Causal { past } => kernels::Mask::Causal { past: past.eval(call.bindings)? },
            AttentionMask::Segments => {
                segments = boundaries(call.i32("attention", 3)?, t)?;
                kernels::Mask::Segments(&segments)
            }
        };
        let arguments = self.arguments((q, q_stride), cached, t, keys, mask);
        let attention = if self.int8 { kernels::attention_int8 } else { kernels::attention };
        Ok(attention(call.cpu, &arguments, call.output("attention", 0)?)?)
    }
}
