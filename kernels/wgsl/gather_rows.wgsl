// y[i, :] = table[ids[i], :] for the ids of rows first .. first + rows, which are the part of the table that is bound.
// One invocation an element of y. An id outside the table gives NaN, so that no one takes the result for one.
const WG = 64u;
const ZERO = 8.0;
struct P { n: u32, c: u32, first: u32, rows: u32, total: u32, ids: u32, y: u32,
           w_k: u32, w_kb: u32, w_groups: u32, w_shift: u32, w_factor: f32, table: u32 }
@group(0) @binding(0) var<uniform> p: P;
//#include "shared/weight.wgsl"
@group(0) @binding(4) var<storage, read_write> ids: array<i32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n * p.c { return; }
  let id = u32(ids[p.ids + i / p.c]);
  if id >= p.total {
    // A constant expression may not be NaN.
    y[p.y + i] = bitcast<f32>(0x7fc00000u | (id & 1u));
    return;
  }
  if id >= p.first && id - p.first < p.rows {
    y[p.y + i] = weight_at(id - p.first, i % p.c);
  }
}
