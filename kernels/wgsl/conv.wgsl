// y[n, o, i, j] = bias[o] + sum over c, u, v of weight[o, c, u, v] * x[n, g + c, i * stride - padding + u, ..], zeros
// outside x; then the activation KIND. One invocation an element of y.
const WG = 64u;
const KIND = 0u;
struct P { n: u32, channels: u32, h: u32, w: u32, outputs: u32, oh: u32, ow: u32, kh: u32, kw: u32, sy: u32, sx: u32,
           py: u32, px: u32, groups: u32, x: u32, weight: u32, bias: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
//#include "shared/functions.wgsl"
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let ox = i % p.ow;
  let oy = i / p.ow % p.oh;
  let o = i / (p.ow * p.oh) % p.outputs;
  let n = i / (p.ow * p.oh * p.outputs);
  let per_group = p.channels / p.groups;
  let first = o / (p.outputs / p.groups) * per_group;
  var total = bias[p.bias + o];
  for (var c = 0u; c < per_group; c++) {
    for (var u = 0u; u < p.kh; u++) {
      let yy = i32(oy * p.sy + u) - i32(p.py);
      if yy < 0 || yy >= i32(p.h) { continue; }
      let source = p.x + ((n * p.channels + first + c) * p.h + u32(yy)) * p.w;
      let wat = p.weight + ((o * per_group + c) * p.kh + u) * p.kw;
      for (var v = 0u; v < p.kw; v++) {
        let xx = i32(ox * p.sx + v) - i32(p.px);
        if xx >= 0 && xx < i32(p.w) { total = fma(weight[wat + v], x[source + u32(xx)], total); }
      }
    }
  }
  switch KIND {
    case 1u: { total = silu(total); }
    case 2u: { total = gelu(total); }
    case 4u: { total = max(total, 0.0); }
    default: {}
  }
  y[p.y + i] = total;
}
