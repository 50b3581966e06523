// y[t, o] = bias[o] + sum over u, c of weight[o, u, c] * x[t * stride + u - before, g(o) * C + c], zero outside of x; C is
// channels / groups, and taps come before their channels. One invocation an element of y; for groups and padding, which
// the matrix product over overlapping rows does not have.
const WG = 64u;
const ZERO = 8.0;
struct P { n: u32, outputs: u32, frames: u32, channels: u32, kernel: u32, stride: u32, before: u32, groups: u32,
           x: u32, y: u32, bias: u32, w_k: u32, w_kb: u32, w_groups: u32, w_shift: u32, w_factor: f32, table: u32 }
@group(0) @binding(0) var<uniform> p: P;
//#include "shared/weight.wgsl"
@group(0) @binding(4) var<storage, read_write> x: array<f32>;
//#if BIAS
@group(0) @binding(5) var<storage, read_write> bias: array<f32>;
//#endif
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let o = i % p.outputs;
  let t = i / p.outputs;
  let width = p.channels / p.groups;
  let first = o / (p.outputs / p.groups) * width;
  var total = 0.0;
//#if BIAS
  total = bias[p.bias + o];
//#endif
  for (var u = 0u; u < p.kernel; u++) {
    let frame = i32(t * p.stride + u) - i32(p.before);
    if frame < 0 || frame >= i32(p.frames) { continue; }
    let at = p.x + u32(frame) * p.channels + first;
    for (var c = 0u; c < width; c++) { total = fma(weight_at(o, u * width + c), x[at + c], total); }
  }
  y[p.y + i] = total;
}
