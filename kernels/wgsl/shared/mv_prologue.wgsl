// x -> workgroup memory: h = x + rms(prev) * w1 (RESID; workgroup 0 also writes h), v = rms(h) * w2 (NORM), then int8
// per 32 with scale (QUANT) or f32. Thread t holds vec4 t, t + WG, ... (NV of them), so 8 neighbours hold a block of 32.
// All loads are issued before the first barrier. Sums over the workgroup run as subgroup or tree sums: f32 rounding only.
const NV = 4u;     // ceil(k / 4 / WG)
const KB = 128u;   // blocks of 32 that fit: at least p.kb
const SGMIN = 8u;  // smallest subgroup of the device
//#if QUANT
var<workgroup> xa: array<vec4<u32>, KB>;  // values 0..15 of block b
var<workgroup> xb: array<vec4<u32>, KB>;  // values 16..31
var<workgroup> xd: array<vec2<f32>, KB>;  // scale, scale * sum of the codes
//#else
var<workgroup> xf: array<vec4<f32>, KB * 8u>;
//#endif
var<workgroup> psum: array<f32, 2u * WG + 32u>;
var<private> pv: array<vec4<f32>, NV>;

fn wg_sum(v: f32, t: u32, at: u32) -> f32 {
  var s = 0.0;
//#if SUBGROUP
  let part = subgroupAdd(v);
  if (LANE == 0u) { psum[at + SID] = part; }
  workgroupBarrier();
  for (var i = 0u; i < WG / SGMIN; i++) { s += select(0.0, psum[at + i], i < NSG); }
//#else
  psum[at + t] = v;
  workgroupBarrier();
  var q = 0.0;
  if (t < 16u) { for (var i = t; i < WG; i += 16u) { q += psum[at + i]; } }
  workgroupBarrier();
  if (t < 16u) { psum[at + t] = q; }
  workgroupBarrier();
  for (var i = 0u; i < 16u; i++) { s += psum[at + i]; }
//#endif
  return s;
}

fn prologue(t: u32, first: bool) {
  let k4 = p.kb * 8u; let real = (p.k + 3u) / 4u;
//#if RESID
  var px: array<vec4<f32>, NV>; var pw: array<vec4<f32>, NV>;
//#endif
//#if NORM
  var pn: array<vec4<f32>, NV>;
//#endif
  for (var i = 0u; i < NV; i++) {
    let j = i * WG + t;
    pv[i] = vec4<f32>(0.0);
    if (j < real) {
//#if RESID
      pv[i] = act[p.prev_off + j]; px[i] = act[p.x_off + j]; pw[i] = vecw[p.w1_off + j];
//#else
      pv[i] = act[p.x_off + j];
//#endif
//#if NORM
      pn[i] = vecw[p.w2_off + j];
//#endif
    }
  }
//#if RESID
  var s1 = 0.0;
  for (var i = 0u; i < NV; i++) { s1 += dot(pv[i], pv[i]); }
  let r1 = inverseSqrt(wg_sum(s1, t, 0u) / f32(p.k) + p.eps);
  for (var i = 0u; i < NV; i++) {
    let j = i * WG + t;
    if (j < real) {
      pv[i] = px[i] + pv[i] * r1 * pw[i];
      if (first) { act[p.h_off + j] = pv[i]; }
    }
  }
//#endif
//#if NORM
  var s2 = 0.0;
  for (var i = 0u; i < NV; i++) { s2 += dot(pv[i], pv[i]); }
  let r2 = inverseSqrt(wg_sum(s2, t, WG) / f32(p.k) + p.eps);
  for (var i = 0u; i < NV; i++) { if (i * WG + t < real) { pv[i] = pv[i] * r2 * pn[i]; } }
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
    psum[t] = m;
    workgroupBarrier();
    for (var e = 0u; e < 8u; e++) { m = max(m, psum[(t & ~7u) + e]); }
//#endif
    let inv = select(0.0, 127.0 / m, m > 0.0);
    let q = pack4xI8(vec4<i32>(round(pv[i] * inv)));
    var sum = dot4I8Packed(q, 0x01010101u);
//#if SUBGROUP
    sum += subgroupShuffleXor(sum, 1u); sum += subgroupShuffleXor(sum, 2u); sum += subgroupShuffleXor(sum, 4u);
//#else
    psum[WG + t] = f32(sum);
    workgroupBarrier();
    var fs = 0.0;
    for (var e = 0u; e < 8u; e++) { fs += psum[WG + (t & ~7u) + e]; }
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
