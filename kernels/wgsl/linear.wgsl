// y[i, column + j] = act(sum over k of x[i, k] * w[j, k] + bias[j]) + residual, for the rows j of the part of a matrix
// that is bound. A workgroup owns a tile of 32 x 32; each of its 64 invocations a square of 4 x 4. Weights and x pass
// through workgroup memory in steps of 16 of k; sums are in f32. Runs everywhere: no subgroups, 4 KiB of memory.
const WG = 64u;
const ZERO = 8.0;
const KIND = 0u;
struct P { m: u32, rows: u32, k: u32, x: u32, y: u32, stride: u32, column: u32, bias: u32, residual: u32,
           w_k: u32, w_kb: u32, w_groups: u32, w_shift: u32, w_factor: f32 }
@group(0) @binding(0) var<uniform> p: P;
//#include "shared/weight.wgsl"
@group(0) @binding(4) var<storage, read_write> x: array<f32>;
//#if BIAS
@group(0) @binding(5) var<storage, read_write> bias: array<f32>;
//#endif
//#if RESIDUAL
@group(0) @binding(6) var<storage, read_write> residual: array<f32>;
//#endif
@group(0) @binding(7) var<storage, read_write> y: array<f32>;
//#include "shared/functions.wgsl"
//#include "shared/grid.wgsl"
var<workgroup> tile_x: array<f32, 528>;
var<workgroup> tile_w: array<f32, 528>;
// Rows of a tile are this far apart, so that a column does not fall into one bank.
const PITCH = 33u;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let across = (p.rows + 31u) / 32u;
  let tile = group_index(wid, groups);
  let i0 = tile / across * 32u;
  let j0 = tile % across * 32u;
  if i0 >= p.m { return; }
  let row = lane / 8u * 4u;
  let column = lane % 8u * 4u;
  var acc: array<vec4<f32>, 4>;
  for (var k0 = 0u; k0 < p.k; k0 += 16u) {
    for (var e = lane; e < 512u; e += WG) {
      let u = e / 16u;
      let v = e % 16u;
      var vx = 0.0;
      var vw = 0.0;
      if k0 + v < p.k {
        if i0 + u < p.m { vx = x[p.x + (i0 + u) * p.k + k0 + v]; }
        if j0 + u < p.rows { vw = weight_at(j0 + u, k0 + v); }
      }
      tile_x[v * PITCH + u] = vx;
      tile_w[v * PITCH + u] = vw;
    }
    workgroupBarrier();
    for (var k = 0u; k < 16u; k++) {
      let at = k * PITCH + column;
      let w = vec4<f32>(tile_w[at], tile_w[at + 1u], tile_w[at + 2u], tile_w[at + 3u]);
      let source = k * PITCH + row;
      acc[0] = fma(vec4<f32>(tile_x[source]), w, acc[0]);
      acc[1] = fma(vec4<f32>(tile_x[source + 1u]), w, acc[1]);
      acc[2] = fma(vec4<f32>(tile_x[source + 2u]), w, acc[2]);
      acc[3] = fma(vec4<f32>(tile_x[source + 3u]), w, acc[3]);
    }
    workgroupBarrier();
  }
  for (var u = 0u; u < 4u; u++) {
    for (var v = 0u; v < 4u; v++) {
      let i = i0 + row + u;
      let j = j0 + column + v;
      if i >= p.m || j >= p.rows { continue; }
      var value = acc[u][v];
      let at = i * p.stride + p.column + j;
//#if BIAS
      value += bias[p.bias + j];
//#endif
      switch KIND {
        case 1u: { value = silu(value); }
        case 2u: { value = gelu(value); }
        case 4u: { value = max(value, 0.0); }
        default: {}
      }
//#if RESIDUAL
      value += residual[p.residual + at];
//#endif
      y[p.y + at] = value;
    }
  }
}
