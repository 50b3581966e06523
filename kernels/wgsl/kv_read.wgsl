// y[row, head, :] = the first rows of a cache as f32. One invocation an element.
const WG = 64u;
struct P { n: u32, kv_heads: u32, d: u32, y: u32, k: u32, k_stride: u32, v: u32, v_stride: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> keys: array<u32>;
@group(0) @binding(2) var<storage, read_write> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"
//#include "shared/kv_load.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  y[p.y + i] = key_at(i / (p.d * p.kv_heads), i / p.d % p.kv_heads, i % p.d);
}
