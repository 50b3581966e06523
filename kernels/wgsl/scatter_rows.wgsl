// y[at[i], :] = rows[i, :] for i below n; other rows of y keep what they hold. at[i] outside y is passed over, because
// the host refuses it before. One invocation an element of rows.
const WG = 64u;
struct P { n: u32, c: u32, t: u32, at: u32, rows: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> at: array<i32>;
@group(0) @binding(2) var<storage, read_write> rows: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n * p.c { return; }
  let row = u32(at[p.at + i / p.c]);
  if row < p.t { y[p.y + row * p.c + i % p.c] = rows[p.rows + i]; }
}
