// y[n, c, :] = (x[n, c, :] - mean[c]) * rsqrt(variance[c] + eps) * weight[c] + bias[c]. One invocation an element.
const WG = 64u;
struct P { n: u32, channels: u32, inner: u32, eps: f32, x: u32, weight: u32, bias: u32, mean: u32, variance: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> mean: array<f32>;
@group(0) @binding(5) var<storage, read_write> variance: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let c = i / p.inner % p.channels;
  let scale = inverseSqrt(variance[p.variance + c] + p.eps) * weight[p.weight + c];
  y[p.y + i] = fma(x[p.x + i] - mean[p.mean + c], scale, bias[p.bias + c]);
}
