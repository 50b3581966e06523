// xq[m,b] = round(x / d), d = max |x| / 127 of each block of 32; xs = (d, d * sum of codes). Eight threads a block, all of
// which read the whole block: no subgroup, no barrier. k4: vec4 of a row that exist; the rest of the last block is zero.
const WG = 128u;
struct P { m: u32, k4: u32, kb: u32, x_off: u32, x_stride: u32, o_off: u32, pad0: u32, pad1: u32 }  // vec4; o_off: blocks
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> oq: array<u32>;
@group(0) @binding(3) var<storage, read_write> os: array<vec2<f32>>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (wid.x + wid.y * nwg.x) * WG + t;
  let row = i / (p.kb * 8u); let j = i % (p.kb * 8u);
  if (row >= p.m) { return; }
  let base = p.x_off + row * p.x_stride;
  var m = 0.0;
  for (var e = j & ~7u; e < min((j | 7u) + 1u, p.k4); e++) { let a = abs(x[base + e]); m = max(m, max(max(a.x, a.y), max(a.z, a.w))); }
  let inv = select(0.0, 127.0 / m, m > 0.0);
  var v = vec4<f32>(0.0);
  if (j < p.k4) { v = x[base + j]; }
  oq[p.o_off * 8u + i] = pack4xI8(vec4<i32>(round(v * inv)));
  if ((j & 7u) == 0u) {
    var s = vec4<f32>(0.0);
    for (var e = j; e < min(j + 8u, p.k4); e++) { s += round(x[base + e] * inv); }
    let d = m / 127.0;
    os[p.o_off + i / 8u] = vec2<f32>(d, d * (s.x + s.y + s.z + s.w));
  }
}
