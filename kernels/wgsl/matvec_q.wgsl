// y[m,r] = epilogue(sum_b f * s[r,b] * d[m,b] * (dot(q[r,b], xq[m,b]) - zero * sum(xq[m,b]))), asymmetric: + mn[r,b] * d * sum.
// A team (subgroup, or 32 threads) owns an item of R rows at a time and strides over their blocks of 32 with U blocks in flight;
// workgroups stride over the matrix, so that each pays its prologue once.
// Departs from the twin: int8 activations per 32 (exact int32 inside a block), f32 sums in another order.
// Flags: SUBGROUP; BITS8 | BITS2 (else 4); ASYM; GROUP16; X_GLOBAL (x comes quantised) | QUANT [RESID] [NORM] (prologue);
// QKV [KV_STATE [KV_F16] | KV_STAGE] | SWIGLU | [BIAS]; VECW where norm weights or a bias are read; R even for QKV and
// SWIGLU; MB > 1 only with X_GLOBAL and neither of them; NO_EARLY: no weights are asked for before the prologue.
const WG = 256u;
const R = 2u;
const U = 4u;
const MB = 1u;
const ZERO = 8.0;
//#include "shared/mv_params.wgsl"
//#if BITS2
@group(0) @binding(1) var<storage, read> wq: array<vec2<u32>>;
//#else
@group(0) @binding(1) var<storage, read> wq: array<vec4<u32>>;
//#endif
@group(0) @binding(2) var<storage, read> ws: array<u32>;
//#if ASYM
@group(0) @binding(3) var<storage, read> wm: array<u32>;
//#endif
//#if X_GLOBAL
@group(0) @binding(4) var<storage, read_write> xq: array<vec4<u32>>;
@group(0) @binding(9) var<storage, read_write> xs: array<vec2<f32>>;
//#else
@group(0) @binding(4) var<storage, read_write> act: array<vec4<f32>>;
//#endif
var<private> rb: array<u32, R>;   // first block of row r
var<private> rs: array<u32, R>;   // first scale of row r
//#if BITS2
var<private> w0: array<vec2<u32>, R * U>;
//#else
var<private> w0: array<vec4<u32>, R * U>;
//#endif
//#if BITS8
var<private> w1: array<vec4<u32>, R * U>;
//#endif
var<private> sw: array<u32, R * U>;
//#if ASYM
var<private> mw: array<u32, R * U>;
//#endif
//#include "shared/mv_main.wgsl"

fn half_of(word: u32, j: u32) -> f32 { return unpack2x16float(word >> (16u * (j & 1u))).x; }

fn fetch(u: u32, b: u32) {
  for (var r = 0u; r < R; r++) {
    let j = rb[r] + b;
//#if BITS8
    w0[u * R + r] = wq[2u * j]; w1[u * R + r] = wq[2u * j + 1u];
//#else
    w0[u * R + r] = wq[j];
//#endif
//#if GROUP16
    sw[u * R + r] = ws[j];
//#if ASYM
    mw[u * R + r] = wm[j];
//#endif
//#else
    sw[u * R + r] = ws[(rs[r] + (b >> p.shift)) >> 1u];
//#if ASYM
    mw[u * R + r] = wm[(rs[r] + (b >> p.shift)) >> 1u];
//#endif
//#endif
  }
}

// The int8 products of values 0..15 and 16..31 of a block.
fn dots(i: u32, a0: vec4<u32>, a1: vec4<u32>) -> vec2<i32> {
  let v = w0[i];
//#if BITS8
  let z = w1[i];
  return vec2<i32>(
    dot4I8Packed(v.x, a0.x) + dot4I8Packed(v.y, a0.y) + dot4I8Packed(v.z, a0.z) + dot4I8Packed(v.w, a0.w),
    dot4I8Packed(z.x, a1.x) + dot4I8Packed(z.y, a1.y) + dot4I8Packed(z.z, a1.z) + dot4I8Packed(z.w, a1.w));
//#else
//#if BITS2
  let c = 0x03030303u;
  return vec2<i32>(
    dot4I8Packed(v.x & c, a0.x) + dot4I8Packed((v.x >> 2u) & c, a0.y) + dot4I8Packed((v.x >> 4u) & c, a0.z) + dot4I8Packed((v.x >> 6u) & c, a0.w),
    dot4I8Packed(v.y & c, a1.x) + dot4I8Packed((v.y >> 2u) & c, a1.y) + dot4I8Packed((v.y >> 4u) & c, a1.z) + dot4I8Packed((v.y >> 6u) & c, a1.w));
//#else
  let lo = v & vec4<u32>(0x0f0f0f0fu);
  let hi = (v >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu);
  return vec2<i32>(
    dot4I8Packed(lo.x, a0.x) + dot4I8Packed(hi.x, a0.y) + dot4I8Packed(lo.y, a0.z) + dot4I8Packed(hi.y, a0.w),
    dot4I8Packed(lo.z, a1.x) + dot4I8Packed(hi.z, a1.y) + dot4I8Packed(lo.w, a1.z) + dot4I8Packed(hi.w, a1.w));
//#endif
//#endif
}

// Adds the products of block b; what is past the row's end counts nothing.
fn consume(u: u32, b0: u32) {
  let b = min(b0, p.kb - 1u);
  for (var m = 0u; m < MB; m++) {
//#if X_GLOBAL
    let o = m * p.kb + b;
    let a0 = xq[2u * o]; let a1 = xq[2u * o + 1u]; var d = xs[o];
//#else
    let a0 = xa[b]; let a1 = xb[b]; var d = xd[b];
//#endif
    d = select(vec2<f32>(0.0), d, b0 < p.kb);
//#if GROUP16
    let one = 0x01010101u;
    let s0 = d.x * f32(dot4I8Packed(a0.x, one) + dot4I8Packed(a0.y, one) + dot4I8Packed(a0.z, one) + dot4I8Packed(a0.w, one));
//#endif
    for (var r = 0u; r < R; r++) {
      let i = u * R + r;
      let q = dots(i, a0, a1);
//#if GROUP16
      let s = unpack2x16float(sw[i]);
      var v = s.x * (f32(q.x) * d.x - ZERO * s0) + s.y * (f32(q.y) * d.x - ZERO * (d.y - s0));
//#if ASYM
      let mn = unpack2x16float(mw[i]);
      v += mn.x * s0 + mn.y * (d.y - s0);
//#endif
//#else
      let j = rs[r] + (b >> p.shift);
      var v = half_of(sw[i], j) * (f32(q.x + q.y) * d.x - ZERO * d.y);
//#if ASYM
      v += half_of(mw[i], j) * d.y;
//#endif
//#endif
      acc[m * R + r] += v;
    }
  }
}

fn span(b0: u32) { for (var u = 0u; u < U; u++) { fetch(u, min(b0 + u * TEAM, p.kb - 1u)); } }
fn point(i: u32) { for (var r = 0u; r < R; r++) { let row = row_at(i, r); rb[r] = row * p.kb; rs[r] = row * p.groups; } }
var<private> ready: bool;   // the first span of the item is in registers
fn fetch_first(i: u32) {
//#if !NO_EARLY
  point(i); span(LANE); ready = true;
//#endif
}

fn rows(i: u32) {
  point(i);
  for (var j = 0u; j < R * MB; j++) { acc[j] = 0.0; }
  for (var b0 = LANE; b0 < p.kb + LANE; b0 += U * TEAM) {
    if (!ready) { span(b0); }
    ready = false;
    for (var u = 0u; u < U; u++) { consume(u, b0 + u * TEAM); }
  }
}
