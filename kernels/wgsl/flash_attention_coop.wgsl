// o[t,h] = softmax(scale * q[t,h] . k[j,h/G] over keys lo..hi) v[j,h/G] on cooperative matrices 16x16x16, head_dim 64, 80 or 128.
// A workgroup owns BQ = 16 NS rows, (token, head of one KV head) pairs; a subgroup of 32 owns 16 of them: q and the sums in
// registers. Keys in tiles of 32 as f16 in workgroup memory, the next tile's loads in flight meanwhile.
// The weights are exp(s - ref), ref a row's maximum when it was last taken: it is taken again, and the sums rescaled through
// workgroup memory, only when a score exceeds it by more than 8 (weights stay below exp(8), far inside f16).
// Departs from the twin: q, k, v and the weights rounded to f16, f32 sums in another order.
// Only where subgroups have 32 lanes in invocation order; no subgroup builtin here (a driver crashes on both).
// Flags: D80, D128 (with D4 20 and 32; else head_dim 64): what heads beyond 64 have more; Q_F16; KV_F16 (else f32 rows of a strided buffer); CAUSAL | SEGMENTS. Workgroup memory: NS 4: 32 KiB, NS 8: 47 KiB at head_dim 128.
enable f16;
enable wgpu_cooperative_matrix;
const NS = 4u;
const WG = NS * 32u;
const BQ = NS * 16u;
const KT = 32u;
const D4 = 16u;
const LDK = D4 + 2u;     // row of a K or V tile, vec4<f16>
const LDS = 9u;          // row of scores, vec4<f32>; read 16 bytes at a time without bank conflicts
const LDP = 10u;         // row of weights, vec4<f16>
const NL = (KT * D4 + WG - 1u) / WG; // vec4 of K a thread moves
const LOW = -1e30;
alias H4 = vec4<f16>;
alias MA = coop_mat16x16<f16, A>;
alias MB = coop_mat16x16<f16, B>;
alias MC = coop_mat16x16<f32, C>;
struct P {
  tokens: u32, group: u32, keys: u32, past: u32,
  split: u32, nsplit: u32, scale: f32, segs: u32,
  q_off: u32, q_stride: u32, k_off: u32, k_stride: u32, v_off: u32, v_stride: u32, o_off: u32, o_stride: u32,   // vec4
  segs_off: u32,   // words
}
@group(0) @binding(0) var<uniform> p: P;
//#if Q_F16
@group(0) @binding(1) var<storage, read_write> q: array<H4>;
//#else
@group(0) @binding(1) var<storage, read_write> q: array<vec4<f32>>;
//#endif
//#if KV_F16
@group(0) @binding(2) var<storage, read_write> kst: array<H4>;
@group(0) @binding(3) var<storage, read_write> vst: array<H4>;
//#else
@group(0) @binding(2) var<storage, read_write> kst: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> vst: array<vec4<f32>>;
//#endif
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
//#if SEGMENTS
@group(0) @binding(6) var<storage, read_write> bounds: array<u32>;
//#endif
var<workgroup> ksh: array<H4, KT * LDK>;
var<workgroup> vsh: array<H4, KT * LDK>;
var<workgroup> ssh: array<vec4<f32>, BQ * LDS>;
var<workgroup> psh: array<H4, BQ * LDP>;
var<workgroup> lsh: array<f32, WG>;
var<workgroup> range: array<u32, 2>;
var<workgroup> rescale: u32;
var<private> kr: array<H4, NL>;
var<private> vr: array<H4, NL>;

fn fetch(j0: u32, end: u32, kvh: u32, t: u32) {
  for (var i = 0u; i < NL; i++) {
    let e = i * WG + t; let j = min(j0 + e / D4, end - 1u); let d = kvh * D4 + e % D4;
    kr[i] = H4(kst[p.k_off + j * p.k_stride + d]); vr[i] = H4(vst[p.v_off + j * p.v_stride + d]);
  }
}
fn key_range(r: u32) -> vec2<u32> {
  let tok = r / p.group;
//#if CAUSAL
  return vec2<u32>(0u, min(p.keys, p.past + tok + 1u));
//#else
//#if SEGMENTS
  var s = 1u;
  while (s + 1u < p.segs && bounds[p.segs_off + s] <= tok) { s++; }
  return vec2<u32>(bounds[p.segs_off + s - 1u], bounds[p.segs_off + s]);
//#else
  return vec2<u32>(0u, p.keys);
//#endif
//#endif
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let kvh = wid.y; let r0 = wid.x * BQ; let rows = p.tokens * p.group;
  let sg = t / 32u; let lr = t / 2u; let half = t & 1u;   // the row and half of a tile that this thread weighs
  let mine = key_range(min(r0 + lr, rows - 1u));
  if (t == 0u) { range[0] = mine.x; }
  if (lr == min(BQ, rows - r0) - 1u) { range[1] = mine.y; }
  let lk = LDK; let ls = LDS; let lp = LDP;
  let pa = sg * 16u * LDP; let sa = sg * 16u * LDS;
  // q to registers, 32 components at a time through the room of the weights.
  for (var i = t; i < BQ * 8u; i += WG) {
    let r = r0 + i / 8u; var x = vec4<f32>(0.0);
    if (r < rows) { x = vec4<f32>(q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + 0u + i % 8u]) * p.scale; }
    psh[(i / 8u) * LDP + i % 8u] = H4(x);
  }
  workgroupBarrier();
  let q0 = coopLoadT<MA>(&psh[pa + 0u], lp);
  let q1 = coopLoadT<MA>(&psh[pa + 4u], lp);
  workgroupBarrier();
  for (var i = t; i < BQ * 8u; i += WG) {
    let r = r0 + i / 8u; var x = vec4<f32>(0.0);
    if (r < rows) { x = vec4<f32>(q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + 8u + i % 8u]) * p.scale; }
    psh[(i / 8u) * LDP + i % 8u] = H4(x);
  }
  workgroupBarrier();
  let q2 = coopLoadT<MA>(&psh[pa + 0u], lp);
  let q3 = coopLoadT<MA>(&psh[pa + 4u], lp);
  workgroupBarrier();
//#if D128
  for (var i = t; i < BQ * 8u; i += WG) {
    let r = r0 + i / 8u; var x = vec4<f32>(0.0);
    if (r < rows) { x = vec4<f32>(q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + 16u + i % 8u]) * p.scale; }
    psh[(i / 8u) * LDP + i % 8u] = H4(x);
  }
  workgroupBarrier();
  let q4 = coopLoadT<MA>(&psh[pa + 0u], lp);
  let q5 = coopLoadT<MA>(&psh[pa + 4u], lp);
  workgroupBarrier();
  for (var i = t; i < BQ * 8u; i += WG) {
    let r = r0 + i / 8u; var x = vec4<f32>(0.0);
    if (r < rows) { x = vec4<f32>(q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + 24u + i % 8u]) * p.scale; }
    psh[(i / 8u) * LDP + i % 8u] = H4(x);
  }
  workgroupBarrier();
  let q6 = coopLoadT<MA>(&psh[pa + 0u], lp);
  let q7 = coopLoadT<MA>(&psh[pa + 4u], lp);
  workgroupBarrier();
  var o0 = MC(); var o1 = MC(); var o2 = MC(); var o3 = MC(); var o4 = MC(); var o5 = MC(); var o6 = MC(); var o7 = MC();
//#else
//#if D80
  for (var i = t; i < BQ * 4u; i += WG) {
    let r = r0 + i / 4u; var x = vec4<f32>(0.0);
    if (r < rows) { x = vec4<f32>(q[p.q_off + (r / p.group) * p.q_stride + (kvh * p.group + r % p.group) * D4 + 16u + i % 4u]) * p.scale; }
    psh[(i / 4u) * LDP + i % 4u] = H4(x);
  }
  workgroupBarrier();
  let q4 = coopLoadT<MA>(&psh[pa + 0u], lp);
  workgroupBarrier();
  var o0 = MC(); var o1 = MC(); var o2 = MC(); var o3 = MC(); var o4 = MC();
//#else
  var o0 = MC(); var o1 = MC(); var o2 = MC(); var o3 = MC();
//#endif
//#endif
  let first = range[0] / KT * KT; let end = range[1];
  var ref_max = LOW; var sum = 0.0;
  fetch(first, end, kvh, t);
  for (var j0 = first; j0 < end; j0 += KT) {
    for (var i = 0u; i < NL; i++) {
      let e = i * WG + t; let a = (e / D4) * LDK + e % D4;
      if (NL * WG == KT * D4 || e < KT * D4) { ksh[a] = kr[i]; vsh[a] = vr[i]; }
    }
    workgroupBarrier();
    if (j0 + KT < end) { fetch(j0 + KT, end, kvh, t); }
    var s0 = MC(); var s1 = MC();
    s0 = coopMultiplyAdd(q0, coopLoad<MB>(&ksh[0u], lk), s0); s1 = coopMultiplyAdd(q0, coopLoad<MB>(&ksh[16u * LDK + 0u], lk), s1);
    s0 = coopMultiplyAdd(q1, coopLoad<MB>(&ksh[4u], lk), s0); s1 = coopMultiplyAdd(q1, coopLoad<MB>(&ksh[16u * LDK + 4u], lk), s1);
    s0 = coopMultiplyAdd(q2, coopLoad<MB>(&ksh[8u], lk), s0); s1 = coopMultiplyAdd(q2, coopLoad<MB>(&ksh[16u * LDK + 8u], lk), s1);
    s0 = coopMultiplyAdd(q3, coopLoad<MB>(&ksh[12u], lk), s0); s1 = coopMultiplyAdd(q3, coopLoad<MB>(&ksh[16u * LDK + 12u], lk), s1);
//#if D128
    s0 = coopMultiplyAdd(q4, coopLoad<MB>(&ksh[16u], lk), s0); s1 = coopMultiplyAdd(q4, coopLoad<MB>(&ksh[16u * LDK + 16u], lk), s1);
    s0 = coopMultiplyAdd(q5, coopLoad<MB>(&ksh[20u], lk), s0); s1 = coopMultiplyAdd(q5, coopLoad<MB>(&ksh[16u * LDK + 20u], lk), s1);
    s0 = coopMultiplyAdd(q6, coopLoad<MB>(&ksh[24u], lk), s0); s1 = coopMultiplyAdd(q6, coopLoad<MB>(&ksh[16u * LDK + 24u], lk), s1);
    s0 = coopMultiplyAdd(q7, coopLoad<MB>(&ksh[28u], lk), s0); s1 = coopMultiplyAdd(q7, coopLoad<MB>(&ksh[16u * LDK + 28u], lk), s1);
//#else
//#if D80
    s0 = coopMultiplyAdd(q4, coopLoad<MB>(&ksh[16u], lk), s0); s1 = coopMultiplyAdd(q4, coopLoad<MB>(&ksh[16u * LDK + 16u], lk), s1);
//#endif
//#endif
    let sb = sa + 4u;
    coopStoreT(s0, &ssh[sa], ls); coopStoreT(s1, &ssh[sb], ls);
    if (t == 0u) { rescale = 0u; }
    workgroupBarrier();
    // Both threads of a row see its whole tile, so that they agree on ref_max; each weighs 16 keys.
    var v: array<vec4<f32>, 4>;
    var top4 = vec4<f32>(LOW);
    let inside = j0 >= mine.x && j0 + KT <= mine.y;
    for (var c = 0u; c < 4u; c++) {
      let a = lr * LDS + c;
      v[c] = ssh[a + half * 4u];
      var w = ssh[a + 4u - half * 4u];
      if (!inside) {
        let own = vec4<u32>(0u, 1u, 2u, 3u) + (j0 + half * 16u + c * 4u); let other = own + select(16u, 0xfffffff0u, half == 1u);
        v[c] = select(vec4<f32>(LOW), v[c], own >= vec4<u32>(mine.x) & own < vec4<u32>(mine.y));
        w = select(vec4<f32>(LOW), w, other >= vec4<u32>(mine.x) & other < vec4<u32>(mine.y));
      }
      top4 = max(top4, max(v[c], w));
    }
    let top = max(max(top4.x, top4.y), max(top4.z, top4.w));
    var scale_by = 1.0;
    if (top > ref_max + 8.0) {
      // Every writer writes the same word.
      if (ref_max > LOW) { scale_by = exp(ref_max - top); rescale = 1u; }
      ref_max = top;
    }
    sum *= scale_by;
    for (var c = 0u; c < 4u; c++) {
      let w = select(vec4<f32>(0.0), exp(v[c] - ref_max), v[c] > vec4<f32>(LOW));
      sum += w.x + w.y + w.z + w.w;
      psh[lr * LDP + half * 4u + c] = H4(w);
    }
    if (workgroupUniformLoad(&rescale) != 0u) {
      coopStoreT(o0, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o0 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o1, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o1 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o2, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o2 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o3, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o3 = coopLoadT<MC>(&ssh[sa], ls);
//#if D128
      coopStoreT(o4, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o4 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o5, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o5 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o6, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o6 = coopLoadT<MC>(&ssh[sa], ls);
      coopStoreT(o7, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o7 = coopLoadT<MC>(&ssh[sa], ls);
//#else
//#if D80
      coopStoreT(o4, &ssh[sa], ls);
      workgroupBarrier();
      for (var c = 0u; c < 2u; c++) { ssh[lr * LDS + half * 2u + c] *= scale_by; }
      workgroupBarrier();
      o4 = coopLoadT<MC>(&ssh[sa], ls);
//#endif
//#endif
    }
    let p0 = coopLoadT<MA>(&psh[pa], lp); let p1 = coopLoadT<MA>(&psh[pa + 4u], lp);
    o0 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[0u], lk), o0); o0 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 0u], lk), o0);
    o1 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[4u], lk), o1); o1 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 4u], lk), o1);
    o2 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[8u], lk), o2); o2 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 8u], lk), o2);
    o3 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[12u], lk), o3); o3 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 12u], lk), o3);
//#if D128
    o4 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[16u], lk), o4); o4 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 16u], lk), o4);
    o5 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[20u], lk), o5); o5 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 20u], lk), o5);
    o6 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[24u], lk), o6); o6 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 24u], lk), o6);
    o7 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[28u], lk), o7); o7 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 28u], lk), o7);
//#else
//#if D80
    o4 = coopMultiplyAdd(p0, coopLoadT<MB>(&vsh[16u], lk), o4); o4 = coopMultiplyAdd(p1, coopLoadT<MB>(&vsh[16u * LDK + 16u], lk), o4);
//#endif
//#endif
    workgroupBarrier();
  }
  lsh[t] = sum;
  workgroupBarrier();
  let total = lsh[t & ~1u] + lsh[t | 1u];
  let inv = select(0.0, 1.0 / total, total > 0.0);
  let r = r0 + lr;
  let oa = p.o_off + (r / p.group) * p.o_stride + (kvh * p.group + r % p.group) * D4 + half * 2u;
  coopStoreT(o0, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 0u] = ssh[a] * inv; o[oa + 1u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o1, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 4u] = ssh[a] * inv; o[oa + 5u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o2, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 8u] = ssh[a] * inv; o[oa + 9u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o3, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 12u] = ssh[a] * inv; o[oa + 13u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
//#if D128
  coopStoreT(o4, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 16u] = ssh[a] * inv; o[oa + 17u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o5, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 20u] = ssh[a] * inv; o[oa + 21u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o6, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 24u] = ssh[a] * inv; o[oa + 25u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
  coopStoreT(o7, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 28u] = ssh[a] * inv; o[oa + 29u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
//#else
//#if D80
  coopStoreT(o4, &ssh[sa], ls);
  workgroupBarrier();
  if (r < rows) {
    let a = lr * LDS + half * 2u;
    o[oa + 16u] = ssh[a] * inv; o[oa + 17u] = ssh[a + 1u] * inv;
  }
  workgroupBarrier();
//#endif
//#endif
}
