// y[i] = f(x[i]); KIND names f. One invocation an element.
const WG = 64u;
const KIND = 0u;
struct P { n: u32, x: u32, y: u32, factor: f32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
//#include "shared/functions.wgsl"
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let v = x[p.x + i];
  var f = v * p.factor;
  switch KIND {
    case 1u: { f = silu(v); }
    case 2u: { f = gelu(v); }
    case 3u: { f = gelu_tanh(v); }
    case 4u: { f = max(v, 0.0); }
    case 5u: { f = sigmoid(v); }
    case 6u: { f = tanh_of(v); }
    case 7u: { f = erf(v); }
    case 8u: { f = exp(v); }
    case 9u: { f = log(v); }
    case 10u: { f = sqrt(v); }
    case 11u: { f = inverseSqrt(v); }
    case 12u: { f = 1.0 / v; }
    case 13u: { f = -v; }
    case 14u: { f = abs(v); }
    case 15u: { f = v * v; }
    default: {}
  }
  y[p.y + i] = f;
}
