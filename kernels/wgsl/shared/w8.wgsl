// Unit i of a row: 8 weights dequantised to f32, into WLO and WHI. Rows of every format are padded to blocks of 32.
// Needs p.kb, p.groups, p.shift and ZERO. Formats: W_F32 | W_HALF with W_F16 or W_BF16 | BITS8 | BITS2 | else 4 bits.
//#if W_F32
@group(0) @binding(1) var<storage, read> wq: array<vec4<f32>>;
//#else
//#if W_HALF
@group(0) @binding(1) var<storage, read> wq: array<vec4<u32>>;
//#else
//#if BITS8
@group(0) @binding(1) var<storage, read> wq: array<vec2<u32>>;
//#else
@group(0) @binding(1) var<storage, read> wq: array<u32>;
//#endif
@group(0) @binding(2) var<storage, read> ws: array<u32>;
//#if ASYM
@group(0) @binding(3) var<storage, read> wm: array<u32>;
//#endif
//#endif
//#endif
var<private> WLO: vec4<f32>;
var<private> WHI: vec4<f32>;
fn half_at(word: u32, j: u32) -> f32 { return unpack2x16float(word >> (16u * (j & 1u))).x; }
fn w8(row: u32, i: u32) {
  let j = row * p.kb * 4u + i;
//#if W_F32
  WLO = wq[2u * j]; WHI = wq[2u * j + 1u];
//#else
//#if BITS2
  let w = wq[j >> 1u];
//#else
  let w = wq[j];
//#endif
//#if W_F16
  WLO = vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)); WHI = vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w));
//#else
//#if W_BF16
  let even = bitcast<vec4<f32>>(w << vec4<u32>(16u)); let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
  WLO = vec4<f32>(even.x, odd.x, even.y, odd.y); WHI = vec4<f32>(even.z, odd.z, even.w, odd.w);
//#else
//#if BITS8
  let c0 = vec4<f32>(unpack4xI8(w.x)) - ZERO; let c1 = vec4<f32>(unpack4xI8(w.y)) - ZERO;
//#else
//#if BITS2
  let h = w >> (4u * (j & 1u));
  let c0 = vec4<f32>(unpack4xU8(h & 0x03030303u)) - ZERO; let c1 = vec4<f32>(unpack4xU8((h >> 2u) & 0x03030303u)) - ZERO;
//#else
  let c0 = vec4<f32>(unpack4xU8(w & 0x0f0f0f0fu)) - ZERO; let c1 = vec4<f32>(unpack4xU8((w >> 4u) & 0x0f0f0f0fu)) - ZERO;
//#endif
//#endif
//#if GROUP16
  let g = row * p.groups + (i >> 1u);
//#else
  let g = row * p.groups + ((i >> 2u) >> p.shift);
//#endif
  let s = half_at(ws[g >> 1u], g);
//#if ASYM
  let mn = half_at(wm[g >> 1u], g);
  WLO = c0 * s + mn; WHI = c1 * s + mn;
//#else
  WLO = c0 * s; WHI = c1 * s;
//#endif
//#endif
//#endif
//#endif
}
