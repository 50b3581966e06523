// o[t,h] = softmax(scale * q[t,h] . k[j,h/G] over keys lo..hi) v[j,h/G], online in f32.
// A workgroup owns BQ rows, (token, head of one KV head) pairs, so that K and V are read once for the G heads that
// share them, and keys of one split; it walks them in tiles of KT: scores, running maximum, weighted sum of V.
// Row ranges: causal 0..past + t + 1, SEGMENTS: the segment of t, else all keys. SPLIT writes partial sums with their
// (maximum, sum) for attention_combine.wgsl. Departs from the twin: tile-wise rescaling, sums in another order.
// Flags: KV_F16 | KV_I8 (else f32 rows of a strided buffer); CAUSAL | SEGMENTS; SPLIT.
const WG = 256u;
const BQ = 32u;
const KT = 16u;
const D4 = 32u;   // head_dim / 4
const NLD = (KT * D4 + WG - 1u) / WG;
const GROUPS = WG / D4;                   // threads past GROUPS * D4 idle in the weighted sum
const HO = (BQ + GROUPS - 1u) / GROUPS;   // rows a thread sums
const TPR = WG / BQ;                      // threads of a row in the softmax
const LOW = -1e30;
struct P {
  tokens: u32, group: u32,      // G = query heads of one KV head
  keys: u32, past: u32,
  split: u32, nsplit: u32,      // keys of a split (a multiple of KT), number of splits
  scale: f32, segs: u32,        // number of boundaries
  q_off: u32, q_stride: u32,    // vec4
  k_off: u32, k_stride: u32,    // vec4 (f32), 4 values (f16), words (int8: a head is a scale word, then D4 words)
  v_off: u32, v_stride: u32,
  o_off: u32, o_stride: u32,    // vec4; SPLIT: o_off alone
  segs_off: u32,                // words
}
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> q: array<vec4<f32>>;
//#if KV_F16
@group(0) @binding(2) var<storage, read_write> kst: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> vst: array<vec2<u32>>;
//#else
//#if KV_I8
@group(0) @binding(2) var<storage, read_write> kst: array<u32>;
@group(0) @binding(3) var<storage, read_write> vst: array<u32>;
//#else
@group(0) @binding(2) var<storage, read_write> kst: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> vst: array<vec4<f32>>;
//#endif
//#endif
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
//#if SPLIT
@group(0) @binding(5) var<storage, read_write> ml: array<vec2<f32>>;
//#endif
//#if SEGMENTS
@group(0) @binding(6) var<storage, read_write> bounds: array<u32>;
//#endif
var<workgroup> qsh: array<vec4<f32>, BQ * D4>;
var<workgroup> ksh: array<vec4<f32>, KT * (D4 + 1u)>;
var<workgroup> ssh: array<f32, BQ * KT>;
var<workgroup> psh: array<f32, BQ * KT>;
var<workgroup> msh: array<f32, 2u * BQ>;
var<workgroup> lo_hi: array<vec2<u32>, BQ>;

//#if KV_F16
fn val(w: vec2<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)); }
fn k4(j: u32, kvh: u32, d: u32) -> vec4<f32> { return val(kst[p.k_off + j * p.k_stride + kvh * D4 + d]); }
fn v4(j: u32, kvh: u32, d: u32) -> vec4<f32> { return val(vst[p.v_off + j * p.v_stride + kvh * D4 + d]); }
//#else
//#if KV_I8
fn k4(j: u32, kvh: u32, d: u32) -> vec4<f32> {
  let a = p.k_off + j * p.k_stride + kvh * (D4 + 1u);
  return vec4<f32>(unpack4xI8(kst[a + 1u + d])) * bitcast<f32>(kst[a]);
}
fn v4(j: u32, kvh: u32, d: u32) -> vec4<f32> {
  let a = p.v_off + j * p.v_stride + kvh * (D4 + 1u);
  return vec4<f32>(unpack4xI8(vst[a + 1u + d])) * bitcast<f32>(vst[a]);
}
//#else
fn k4(j: u32, kvh: u32, d: u32) -> vec4<f32> { return kst[p.k_off + j * p.k_stride + kvh * D4 + d]; }
fn v4(j: u32, kvh: u32, d: u32) -> vec4<f32> { return vst[p.v_off + j * p.v_stride + kvh * D4 + d]; }
//#endif
//#endif

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  // x: row tile and split, y: KV head.
  let kvh = wid.y; let part = wid.x % p.nsplit; let r0 = (wid.x / p.nsplit) * BQ;
  let rows = p.tokens * p.group;
  for (var i = t; i < BQ * D4; i += WG) {
    let r = r0 + i / D4; var x = vec4<f32>(0.0);
    if (r < rows) { x = q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + i % D4] * p.scale; }
    qsh[i] = x;
  }
  for (var i = t; i < BQ; i += WG) {
    var lh = vec2<u32>(0u, 0u);
    if (r0 + i < rows) {
      let tok = (r0 + i) / p.group;
//#if CAUSAL
      lh = vec2<u32>(0u, min(p.keys, p.past + tok + 1u));
//#else
//#if SEGMENTS
      var s = 1u;
      while (s + 1u < p.segs && bounds[p.segs_off + s] <= tok) { s++; }
      lh = vec2<u32>(bounds[p.segs_off + s - 1u], bounds[p.segs_off + s]);
//#else
      lh = vec2<u32>(0u, p.keys);
//#endif
//#endif
    }
    lo_hi[i] = lh;
    msh[i] = LOW;
  }
  workgroupBarrier();
  // Rows are in token order, so the ranges only grow: the first and the last real row bound the tile's keys.
  let last = min(BQ, rows - r0) - 1u;
  let first = max(lo_hi[0].x / KT * KT, part * p.split);
  let end = min(lo_hi[last].y, (part + 1u) * p.split);
  var acc: array<vec4<f32>, HO>;
  var sum: array<f32, HO>;
  for (var i = 0u; i < HO; i++) { acc[i] = vec4<f32>(0.0); sum[i] = 0.0; }
  var par = 0u;
  let d4 = t % D4; let g = t / D4;
  for (var j0 = first; j0 < end; j0 += KT) {
    let count = min(KT, end - j0);
    var vreg: array<vec4<f32>, NLD>;
    for (var i = 0u; i < NLD; i++) {
      let e = i * WG + t; let j = j0 + e / D4;
      var kv = vec4<f32>(0.0); var vv = vec4<f32>(0.0);
      if (e < KT * D4 && j < end) { kv = k4(j, kvh, e % D4); vv = v4(j, kvh, e % D4); }
      if (e < KT * D4) { ksh[(e / D4) * (D4 + 1u) + e % D4] = kv; }
      vreg[i] = vv;
    }
    workgroupBarrier();
    for (var i = t; i < BQ * KT; i += WG) {
      let r = i / KT; let j = i % KT;
      var s = vec4<f32>(0.0);
      for (var d = 0u; d < D4; d++) { s = fma(qsh[r * D4 + d], ksh[j * (D4 + 1u) + d], s); }
      let lh = lo_hi[r];
      ssh[i] = select(LOW, s.x + s.y + s.z + s.w, j0 + j >= lh.x && j0 + j < min(lh.y, end));
    }
    workgroupBarrier();
    if (t < TPR * BQ) {
      let r = t / TPR;
      let old = msh[par * BQ + r];
      var m = old;
      for (var j = 0u; j < count; j++) { m = max(m, ssh[r * KT + j]); }
      // A masked score is LOW: zero weight even where every score so far was masked.
      for (var j = t % TPR; j < KT; j += TPR) {
        let s = ssh[r * KT + j];
        psh[r * KT + j] = select(0.0, exp(s - m), s > LOW);
      }
      if (t % TPR == 0u) { msh[(1u - par) * BQ + r] = m; }
    }
    for (var i = 0u; i < NLD; i++) {
      let e = i * WG + t;
      if (e < KT * D4) { ksh[(e / D4) * (D4 + 1u) + e % D4] = vreg[i]; }
    }
    workgroupBarrier();
    if (g < GROUPS) {
      for (var i = 0u; i < HO; i++) {
        let r = i * GROUPS + g;
        if (r < BQ) {
          let a = exp(msh[par * BQ + r] - msh[(1u - par) * BQ + r]);
          acc[i] *= a; sum[i] *= a;
        }
      }
      for (var j = 0u; j < count; j++) {
        let v = ksh[j * (D4 + 1u) + d4];
        for (var i = 0u; i < HO; i++) {
          let w = psh[min(i * GROUPS + g, BQ - 1u) * KT + j];
          acc[i] = fma(vec4<f32>(w), v, acc[i]); sum[i] += w;
        }
      }
    }
    par = 1u - par;
    workgroupBarrier();
  }
  if (g >= GROUPS) { return; }
  for (var i = 0u; i < HO; i++) {
    let r = r0 + i * GROUPS + g;
    if (i * GROUPS + g >= BQ || r >= rows) { continue; }
    let head = kvh * p.group + r % p.group;
//#if SPLIT
    let at = (r / p.group * (nwg.y * p.group) + head) * p.nsplit + part;
    o[p.o_off + at * D4 + d4] = acc[i];
    if (d4 == 0u) { ml[at] = vec2<f32>(msh[par * BQ + i * GROUPS + g], sum[i]); }
//#else
    o[p.o_off + (r / p.group) * p.o_stride + head * D4 + d4] = acc[i] * select(0.0, 1.0 / sum[i], sum[i] > 0.0);
//#endif
  }
}
