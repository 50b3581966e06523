// y[b, i, j] = sum over k of a[b, i, k] * w[b, k, j], or of w[b, j, k] with TRANSPOSED: batches of activations.
// A workgroup owns a tile of 16 x 16 of one batch; each of its 64 invocations a row of 4.
const WG = 64u;
struct P { batch: u32, m: u32, k: u32, n: u32, a: u32, b: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> a: array<f32>;
@group(0) @binding(2) var<storage, read_write> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
var<workgroup> tile_a: array<f32, 256>;
var<workgroup> tile_b: array<f32, 256>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let across = (p.n + 15u) / 16u;
  let down = (p.m + 15u) / 16u;
  let tile = group_index(wid, groups);
  let batch = tile / (across * down);
  if batch >= p.batch { return; }
  let i0 = tile / across % down * 16u;
  let j0 = tile % across * 16u;
  let row = lane / 4u;
  let column = lane % 4u * 4u;
  var acc = vec4<f32>(0.0);
  for (var k0 = 0u; k0 < p.k; k0 += 16u) {
    for (var e = lane; e < 256u; e += WG) {
      let u = e / 16u;
      let v = e % 16u;
      var va = 0.0;
      var vb = 0.0;
      if i0 + u < p.m && k0 + v < p.k { va = a[p.a + (batch * p.m + i0 + u) * p.k + k0 + v]; }
//#if TRANSPOSED
      if j0 + u < p.n && k0 + v < p.k { vb = b[p.b + (batch * p.n + j0 + u) * p.k + k0 + v]; }
      tile_b[v * 16u + u] = vb;
//#else
      if k0 + u < p.k && j0 + v < p.n { vb = b[p.b + (batch * p.k + k0 + u) * p.n + j0 + v]; }
      tile_b[u * 16u + v] = vb;
//#endif
      tile_a[e] = va;
    }
    workgroupBarrier();
    for (var k = 0u; k < 16u; k++) {
      let at = k * 16u + column;
      acc = fma(vec4<f32>(tile_a[row * 16u + k]), vec4<f32>(tile_b[at], tile_b[at + 1u], tile_b[at + 2u], tile_b[at + 3u]), acc);
    }
    workgroupBarrier();
  }
  for (var j = 0u; j < 4u; j++) {
    if i0 + row < p.m && j0 + column + j < p.n { y[p.y + (batch * p.m + i0 + row) * p.n + j0 + column + j] = acc[j]; }
  }
}
