// y[i] = f(a[i], b[i mod nb]): b has the shape of a, or its last dimensions. One invocation an element.
const WG = 64u;
const KIND = 0u;
struct P { n: u32, nb: u32, a: u32, b: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> a: array<f32>;
@group(0) @binding(2) var<storage, read_write> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  if i >= p.n { return; }
  let u = a[p.a + i];
  let v = b[p.b + i % p.nb];
  var f = u + v;
  switch KIND {
    case 1u: { f = u - v; }
    case 2u: { f = u * v; }
    case 3u: { f = u / v; }
    case 4u: { f = max(u, v); }
    case 5u: { f = min(u, v); }
    default: {}
  }
  y[p.y + i] = f;
}
