// RMSNorm: y[r, :] = x[r, :] * rsqrt(mean(x[r, :]^2) + eps) * weight, plus residual[r, :] with RESIDUAL.
// LayerNorm (LAYER): y[r, :] = (x[r, :] - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias.
// One workgroup a row; columns need not be a multiple of WG.
const WG = 64u;
struct P { rows: u32, c: u32, eps: f32, x: u32, weight: u32, other: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> weight: array<f32>;
//#if OTHER
@group(0) @binding(3) var<storage, read_write> other: array<f32>;
//#endif
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"
//#include "shared/reduce.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let r = group_index(wid, groups);
  if r >= p.rows { return; }
  let at = p.x + r * p.c;
  var mean = 0.0;
//#if LAYER
  var total = 0.0;
  for (var i = lane; i < p.c; i += WG) { total += x[at + i]; }
  mean = sum_all(total, lane) / f32(p.c);
//#endif
  var squares = 0.0;
  for (var i = lane; i < p.c; i += WG) {
    let v = x[at + i] - mean;
    squares = fma(v, v, squares);
  }
  let scale = inverseSqrt(sum_all(squares, lane) / f32(p.c) + p.eps);
  for (var i = lane; i < p.c; i += WG) {
    var v = (x[at + i] - mean) * scale * weight[p.weight + i];
//#if LAYER
    v += other[p.other + i];
//#endif
//#if RESIDUAL
    v += other[p.other + r * p.c + i];
//#endif
    y[p.y + r * p.c + i] = v;
  }
}
