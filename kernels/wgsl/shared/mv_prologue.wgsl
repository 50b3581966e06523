// x -> workgroup memory: h = x + rms(prev) * w1 (RESID; workgroup 0 also writes h), v = rms(h) * w2 (NORM), then int8
// per 32 with scale (QUANT) or f32. Thread t holds vec4 t, t + WG, ... (NV of them), so 8 neighbours hold a block of 32.
// All loads are issued before the first barrier. Sums over the workgroup run as subgroup or tree sums, and |h| comes from its
// expansion (below): f32 rounding only, unless h nearly cancels.
const NV = 4u;     // ceil(k / 4 / WG)
const KB = 128u;   // blocks of 32 that fit: at least p.kb
//#if QUANT
var<workgroup> xa: array<vec4<u32>, KB>;  // values 0..15 of block b
var<workgroup> xb: array<vec4<u32>, KB>;  // values 16..31
var<workgroup> xd: array<vec2<f32>, KB>;  // scale, scale * sum of the codes
//#else
var<workgroup> xf: array<vec4<f32>, KB * 8u>;
//#endif
//#if SUBGROUP
var<workgroup> psum: array<vec4<f32>, WG / 8u>;   // subgroups of 8 lanes or more
//#else
var<workgroup> psum: array<vec4<f32>, WG + 16u>;
//#endif
var<private> pv: array<vec4<f32>, NV>;

fn wg_sum(v: vec4<f32>, t: u32) -> vec4<f32> {
  var s = vec4<f32>(0.0);
//#if SUBGROUP
  let part = subgroupAdd(v);
  if (LANE == 0u) { psum[SID] = part; }
  workgroupBarrier();
  for (var i = LANE; i < NSG; i += TEAM) { s += psum[i]; }
  s = subgroupAdd(s);
//#else
  psum[t] = v;
  workgroupBarrier();
  if (t < 16u) { for (var i = t; i < WG; i += 16u) { s += psum[i]; } psum[WG + t] = s; }
  workgroupBarrier();
  s = vec4<f32>(0.0);
  for (var i = 0u; i < 16u; i++) { s += psum[WG + i]; }
//#endif
  return s;
}

fn prologue(t: u32, first: bool) {
  let k4 = p.kb * 8u; let real = (p.k + 3u) / 4u;
//#if RESID
  var px: array<vec4<f32>, NV>; var pw1: array<vec4<f32>, NV>;
//#endif
//#if NORM
  var pn: array<vec4<f32>, NV>;
//#endif
  for (var i = 0u; i < NV; i++) {
    let j = i * WG + t;
    pv[i] = vec4<f32>(0.0);
//#if RESID
    px[i] = pv[i]; pw1[i] = pv[i];
//#endif
//#if NORM
    pn[i] = pv[i];
//#endif
    if (j < real) {
//#if RESID
      pv[i] = act[p.prev_off + j]; px[i] = act[p.x_off + j]; pw1[i] = vecw[p.w1_off + j];
//#else
      pv[i] = act[p.x_off + j];
//#endif
//#if NORM
      pn[i] = vecw[p.w2_off + j];
//#endif
    }
  }
//#if RESID
  // One reduction for both norms: |h|^2 = |x|^2 + 2 r (x . pw) + r^2 |pw|^2 with pw = prev * w1, r = 1 / rms(prev).
  var s = vec4<f32>(0.0);
  for (var i = 0u; i < NV; i++) {
    let pw = pv[i] * pw1[i];
    s += vec4<f32>(dot(pv[i], pv[i]), dot(px[i], px[i]), dot(px[i], pw), dot(pw, pw));
    pv[i] = pw;
  }
  s = wg_sum(s, t);
  let r1 = inverseSqrt(s.x / f32(p.k) + p.eps);
  let r2 = inverseSqrt((s.y + 2.0 * r1 * s.z + r1 * r1 * s.w) / f32(p.k) + p.eps);
  for (var i = 0u; i < NV; i++) {
    let j = i * WG + t;
    pv[i] = px[i] + pv[i] * r1;
    if (first && j < real) { act[p.h_off + j] = pv[i]; }
    pv[i] *= r2 * pn[i];
  }
//#else
//#if NORM
  var s = vec4<f32>(0.0);
  for (var i = 0u; i < NV; i++) { s.x += dot(pv[i], pv[i]); }
  let r2 = inverseSqrt(wg_sum(s, t).x / f32(p.k) + p.eps);
  for (var i = 0u; i < NV; i++) { pv[i] *= r2 * pn[i]; }
//#endif
//#endif
//#if QUANT
  for (var i = 0u; i < NV; i++) {
    let j = i * WG + t;
    let a = abs(pv[i]);
    var m = max(max(a.x, a.y), max(a.z, a.w));
//#if SUBGROUP
    m = max(m, subgroupShuffleXor(m, 1u)); m = max(m, subgroupShuffleXor(m, 2u)); m = max(m, subgroupShuffleXor(m, 4u));
//#else
    workgroupBarrier();
    psum[t].x = m;
    workgroupBarrier();
    for (var e = 0u; e < 8u; e++) { m = max(m, psum[(t & ~7u) + e].x); }
//#endif
    let inv = select(0.0, 127.0 / m, m > 0.0);
    let q = pack4xI8(vec4<i32>(round(pv[i] * inv)));
    var sum = dot4I8Packed(q, 0x01010101u);
//#if SUBGROUP
    sum += subgroupShuffleXor(sum, 1u); sum += subgroupShuffleXor(sum, 2u); sum += subgroupShuffleXor(sum, 4u);
//#else
    psum[t].y = f32(sum);
    workgroupBarrier();
    var fs = 0.0;
    for (var e = 0u; e < 8u; e++) { fs += psum[(t & ~7u) + e].y; }
    sum = i32(fs);
//#endif
    if (j < k4) {
      let b = j >> 3u; let c = j & 3u;
      if ((j & 4u) == 0u) { xa[b][c] = q; } else { xb[b][c] = q; }
      if ((j & 7u) == 0u) { let d = m / 127.0; xd[b] = vec2<f32>(d, d * f32(sum)); }
    }
  }
//#else
  for (var i = 0u; i < NV; i++) { let j = i * WG + t; if (j < k4) { xf[j] = pv[i]; } }
//#endif
  workgroupBarrier();
}
