// o[h] = sum_s exp(m[h,s] - m[h]) part[h,s] / sum_s exp(m[h,s] - m[h]) l[h,s]: joins the splits of attention.wgsl.
// A workgroup owns one (token, head); SL lanes share its splits, D4 threads its components.
// OUT_QUANT writes int8 per 32 (head_dim a multiple of 32), else f32. Departs from the twin: order of sums.
const D4 = 32u;
const SL = 8u;
const WG = D4 * SL;
const MAXSPLIT = 256u;
struct P { nsplit: u32, part_off: u32, o_off: u32, pad: u32 }   // vec4; OUT_QUANT: o_off counts blocks of 32
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> part: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> ml: array<vec2<f32>>;
//#if OUT_QUANT
@group(0) @binding(3) var<storage, read_write> oq: array<u32>;
@group(0) @binding(4) var<storage, read_write> os: array<vec2<f32>>;
//#else
@group(0) @binding(3) var<storage, read_write> o: array<vec4<f32>>;
//#endif
var<workgroup> w: array<vec2<f32>, MAXSPLIT>;
var<workgroup> sh: array<vec4<f32>, WG>;
var<workgroup> top: array<f32, D4>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let h = wid.x; let d = t % D4; let sl = t / D4;
  for (var s = t; s < p.nsplit; s += WG) { w[s] = ml[h * p.nsplit + s]; }
  var acc = vec4<f32>(0.0);
  workgroupBarrier();
  var m = -1e30;
  for (var s = 0u; s < p.nsplit; s++) { m = max(m, w[s].x); }
  var l = 0.0;
  for (var s = 0u; s < p.nsplit; s++) { l += w[s].y * exp(w[s].x - m); }
  for (var s = sl; s < p.nsplit; s += SL) { acc = fma(part[p.part_off + (h * p.nsplit + s) * D4 + d], vec4<f32>(exp(w[s].x - m)), acc); }
  sh[t] = acc;
  workgroupBarrier();
  if (t < D4) {
    for (var i = 1u; i < SL; i++) { acc += sh[i * D4 + d]; }
    acc *= select(0.0, 1.0 / l, l > 0.0);
  }
//#if OUT_QUANT
  if (t < D4) {
    let a = abs(acc);
    top[d] = max(max(a.x, a.y), max(a.z, a.w));
  }
  workgroupBarrier();
  var q = 0u;
  if (t < D4) {
    var mx = 0.0;
    for (var i = 0u; i < 8u; i++) { mx = max(mx, top[(d & ~7u) + i]); }
    q = pack4xI8(vec4<i32>(round(acc * select(0.0, 127.0 / mx, mx > 0.0))));
    oq[p.o_off * 8u + h * D4 + d] = q;
    sh[t] = vec4<f32>(f32(dot4I8Packed(q, 0x01010101u)), mx, 0.0, 0.0);
  }
  workgroupBarrier();
  if (t < D4 && (d & 7u) == 0u) {
    var s = 0.0;
    for (var i = 0u; i < 8u; i++) { s += sh[d + i].x; }
    let sc = sh[t].y / 127.0;
    os[p.o_off + (h * D4 + d) / 8u] = vec2<f32>(sc, sc * s);
  }
//#else
  if (t < D4) { o[p.o_off + h * D4 + d] = acc; }
//#endif
}
