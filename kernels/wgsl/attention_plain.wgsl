// y[t, head, :] = softmax(q[t, head, :] . keys^T * scale + mask) . values, one pass over the keys (Milakov & Gimelshein
// 2018). Causal: query t sees 0 ..= past + t. SEGMENTS: query t sees its own segment of the boundaries [0, .., t].
// A workgroup owns a head of a query; an invocation scores a key, then owns up to four components of the result.
const WG = 64u;
struct P { t: u32, heads: u32, kv_heads: u32, d: u32, keys: u32, past: u32, scale: f32, bounds: u32,
           q: u32, q_stride: u32, k: u32, k_stride: u32, v: u32, v_stride: u32, segments: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> q: array<f32>;
@group(0) @binding(2) var<storage, read_write> keys: array<u32>;
@group(0) @binding(3) var<storage, read_write> values: array<u32>;
//#if SEGMENTS
@group(0) @binding(4) var<storage, read_write> segments: array<i32>;
//#endif
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
var<workgroup> query: array<f32, 256>;
var<workgroup> weights: array<f32, WG>;
//#include "shared/grid.wgsl"
//#include "shared/reduce.wgsl"
//#include "shared/kv_load.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let item = group_index(wid, groups);
  if item >= p.t * p.heads { return; }
  let head = item % p.heads;
  let t = item / p.heads;
  let kv_head = head / (p.heads / p.kv_heads);
  var first = 0u;
  var end = min(p.past + t + 1u, p.keys);
//#if SEGMENTS
  end = 0u;
  for (var i = 0u; i + 1u < p.bounds; i++) {
    if t >= u32(segments[p.segments + i]) { first = u32(segments[p.segments + i]); end = u32(segments[p.segments + i + 1u]); }
  }
//#endif
  for (var i = lane; i < p.d; i += WG) { query[i] = q[p.q + t * p.q_stride + head * p.d + i] * p.scale; }
  workgroupBarrier();
  var most = -3.4e38;
  var total = 0.0;
  var acc = vec4<f32>(0.0);
  for (var j0 = first; j0 < end; j0 += WG) {
    let j = j0 + lane;
    var score = -3.4e38;
    if j < end {
      score = 0.0;
      for (var i = 0u; i < p.d; i++) { score = fma(query[i], key_at(j, kv_head, i), score); }
    }
    let next = max(most, max_all(score, lane));
    var w = 0.0;
    if j < end { w = exp(score - next); }
    weights[lane] = w;
    let shrink = exp(most - next);
    total = total * shrink + sum_all(w, lane);
    most = next;
    acc *= shrink;
    let count = min(WG, end - j0);
    for (var i = 0u; i < count; i++) {
      for (var c = 0u; c < 4u; c++) {
        let at = lane + c * WG;
        if at < p.d { acc[c] = fma(weights[i], value_at(j0 + i, kv_head, at), acc[c]); }
      }
    }
    workgroupBarrier();
  }
  for (var c = 0u; c < 4u; c++) {
    let at = lane + c * WG;
    if at < p.d { y[p.y + (t * p.heads + head) * p.d + at] = acc[c] / max(total, 1e-30); }
  }
}
