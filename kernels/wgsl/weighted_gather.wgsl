// y[i, :] = sum over j < 16 of weights[i, j] * table[taps[i, j], :]. One invocation an element of y.
const WG = 64u;
struct P { n: u32, c: u32, rows: u32, table: u32, taps: u32, weights: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> table: array<f32>;
@group(0) @binding(2) var<storage, read_write> taps: array<i32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n * p.c { return; }
  let row = i / p.c * 16u;
  var total = 0.0;
  for (var j = 0u; j < 16u; j++) {
    let tap = min(u32(taps[p.taps + row + j]), p.rows - 1u);
    total = fma(weights[p.weights + row + j], table[p.table + tap * p.c + i % p.c], total);
  }
  y[p.y + i] = total;
}
