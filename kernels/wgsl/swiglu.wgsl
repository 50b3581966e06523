// y[r, j] = silu(x[r, j]) * x[r, n + j]; x: [rows, 2 n], y: [rows, n]. One invocation an element of y.
const WG = 64u;
struct P { rows: u32, n: u32, x: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
//#include "shared/functions.wgsl"
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.rows * p.n { return; }
  let at = p.x + i / p.n * 2u * p.n + i % p.n;
  y[p.y + i] = silu(x[at]) * x[at + p.n];
}
