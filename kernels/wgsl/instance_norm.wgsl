// y[t, c] = (x[t, c] - mean[c]) * rsqrt(variance[c] + eps) * weight[c] + bias[c], each channel over all frames. One
// workgroup a channel; y may be x.
const WG = 64u;
struct P { frames: u32, c: u32, eps: f32, x: u32, weight: u32, bias: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"
//#include "shared/reduce.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let c = group_index(wid, groups);
  if c >= p.c { return; }
  var total = 0.0;
  for (var t = lane; t < p.frames; t += WG) { total += x[p.x + t * p.c + c]; }
  let mean = sum_all(total, lane) / f32(p.frames);
  var squares = 0.0;
  for (var t = lane; t < p.frames; t += WG) {
    let v = x[p.x + t * p.c + c] - mean;
    squares = fma(v, v, squares);
  }
  let scale = inverseSqrt(sum_all(squares, lane) / f32(p.frames) + p.eps) * weight[p.weight + c];
  for (var t = lane; t < p.frames; t += WG) {
    let at = t * p.c + c;
    y[p.y + at] = fma(x[p.x + at] - mean, scale, bias[p.bias + c]);
  }
}
