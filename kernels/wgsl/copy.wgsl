// y[i0, i1, i2, i3] = x[i0, i1, i2, i3], each side with strides of its own: permute, slice and concat.
// One invocation an element.
const WG = 64u;
struct P { n: u32, d1: u32, d2: u32, d3: u32, x: u32, y: u32, x0: u32, x1: u32, x2: u32, x3: u32, y0: u32, y1: u32, y2: u32, y3: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let i3 = i % p.d3;
  let i2 = i / p.d3 % p.d2;
  let i1 = i / (p.d3 * p.d2) % p.d1;
  let i0 = i / (p.d3 * p.d2 * p.d1);
  y[p.y + i0 * p.y0 + i1 * p.y1 + i2 * p.y2 + i3 * p.y3] = x[p.x + i0 * p.x0 + i1 * p.x1 + i2 * p.x2 + i3 * p.x3];
}
