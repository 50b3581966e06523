// What a thread moves of W: 4 weights of a float format, else half a block (16), from memory to registers, then as f16 to
// workgroup memory: v = s * (q - zero) [+ m].
alias H4 = vec4<f16>;
//#if W_F32
@group(0) @binding(1) var<storage, read> wq: array<vec4<f32>>;
alias Raw = vec4<f32>;
//#else
//#if W_F16
@group(0) @binding(1) var<storage, read> wq: array<H4>;
alias Raw = H4;
//#else
//#if W_BF16
@group(0) @binding(1) var<storage, read> wq: array<vec2<u32>>;
alias Raw = vec2<u32>;
//#else
//#if BITS8
@group(0) @binding(1) var<storage, read> wq: array<vec4<u32>>;
struct Raw { q: vec4<u32>, s: u32, m: u32 }
//#else
//#if BITS2
@group(0) @binding(1) var<storage, read> wq: array<u32>;
struct Raw { q: u32, s: u32, m: u32 }
//#else
@group(0) @binding(1) var<storage, read> wq: array<vec2<u32>>;
struct Raw { q: vec2<u32>, s: u32, m: u32 }
//#endif
//#endif
@group(0) @binding(2) var<storage, read> ws: array<u32>;
//#if ASYM
@group(0) @binding(3) var<storage, read> wm: array<u32>;
//#endif
//#endif
//#endif
//#endif

//#if W_FLOAT
const PER = 8u;   // units of a row in a step of 32
fn raw(row: u32, b: u32, h: u32) -> Raw { return wq[(row * p.kb + b) * 8u + h]; }
//#else
const PER = 2u;
fn raw(row: u32, b: u32, h: u32) -> Raw {
  let j = (row * p.kb + b) * 2u + h;
//#if GROUP16
  let g = row * p.groups + 2u * b + h;
//#else
  let g = row * p.groups + (b >> p.shift);
//#endif
  let sh = 16u * (g & 1u);
//#if ASYM
  return Raw(wq[j], ws[g >> 1u] >> sh, wm[g >> 1u] >> sh);
//#else
  return Raw(wq[j], ws[g >> 1u] >> sh, 0u);
//#endif
}
//#endif

//#if W_FLOAT
//#if W_BF16
fn halves(r: Raw) -> array<H4, 1> {
  return array<H4, 1>(H4(vec4<f32>(bitcast<f32>(r.x << 16u), bitcast<f32>(r.x & 0xffff0000u), bitcast<f32>(r.y << 16u), bitcast<f32>(r.y & 0xffff0000u))));
}
//#else
fn halves(r: Raw) -> array<H4, 1> { return array<H4, 1>(H4(r)); }
//#endif
//#else
// Four codes, which `mask` leaves in place of bytes 0 and 1 of w and of u = w >> 16. 2^23 + code * at is the bit pattern
// 0x4b000000 | bits, so a subtraction of that with the zero point makes it a float exactly; s is the scale.
fn four(w: u32, u: u32, mask: u32, at: f32, s: f32, m: f32) -> H4 {
  let o = 0x4b000000u;
  let c = vec4<f32>(bitcast<f32>((w & mask) | o), bitcast<f32>((w & (mask << 8u)) | o), bitcast<f32>((u & mask) | o), bitcast<f32>((u & (mask << 8u)) | o));
  let k = vec4<f32>(1.0, 256.0, 1.0, 256.0) * at;
  let sk = vec2<f32>(s / at, s / at / 256.0).xyxy;
//#if ASYM
  return H4(fma(c - 8388608.0, sk, vec4<f32>(m)));
//#else
  return H4((c - (8388608.0 + ZERO_CODE * k)) * sk);
//#endif
}
//#if BITS8
const ZERO_CODE = 128.0;   // a signed byte with its top bit flipped
fn halves(r: Raw) -> array<H4, 4> {
  let v = r.q ^ vec4<u32>(0x80808080u);
  let s = unpack2x16float(r.s).x;
  let m = unpack2x16float(r.m).x - 128.0 * s;
  return array<H4, 4>(four(v.x, v.x >> 16u, 0xffu, 1.0, s, m), four(v.y, v.y >> 16u, 0xffu, 1.0, s, m),
                      four(v.z, v.z >> 16u, 0xffu, 1.0, s, m), four(v.w, v.w >> 16u, 0xffu, 1.0, s, m));
}
//#else
//#if BITS2
const ZERO_CODE = 2.0;
fn halves(r: Raw) -> array<H4, 4> {
  let s = unpack2x16float(r.s).x; let m = unpack2x16float(r.m).x;
  let v = r.q; let u = v >> 16u;
  return array<H4, 4>(four(v, u, 3u, 1.0, s, m), four(v, u, 0xcu, 4.0, s, m), four(v, u, 0x30u, 16.0, s, m), four(v, u, 0xc0u, 64.0, s, m));
}
//#else
const ZERO_CODE = 8.0;
fn halves(r: Raw) -> array<H4, 4> {
  let s = unpack2x16float(r.s).x; let m = unpack2x16float(r.m).x;
  let u = r.q >> vec2<u32>(16u);
  return array<H4, 4>(four(r.q.x, u.x, 0xfu, 1.0, s, m), four(r.q.x, u.x, 0xf0u, 16.0, s, m),
                      four(r.q.y, u.y, 0xfu, 1.0, s, m), four(r.q.y, u.y, 0xf0u, 16.0, s, m));
}
//#endif
//#endif
//#endif
