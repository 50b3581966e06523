// Rotates the first r components of each head: x[t, h, :] by table[t, :] (r/2 cosines, then r/2 sines).
// Interleaved pairs are (2j, 2j + 1); HALF pairs are (j, j + r/2). Other components are copied.
// One invocation a pair of components of a head.
const WG = 64u;
struct P { t: u32, heads: u32, d: u32, r: u32, stride: u32, x: u32, table: u32, y: u32, y_stride: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> table: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = group_index(wid, groups) * WG + lane;
  let pairs = (p.d + 1u) / 2u;
  if i >= p.t * p.heads * pairs { return; }
  let j = i % pairs;
  let head = i / pairs % p.heads;
  let t = i / (pairs * p.heads);
  let half = p.r / 2u;
  var a = 2u * j;
  var b = 2u * j + 1u;
//#if HALF
  // Pairs j < half rotate; the components behind them follow in order.
  if j < half { a = j; b = j + half; }
//#endif
  let source = p.x + t * p.stride + head * p.d;
  let to = p.y + t * p.y_stride + head * p.d;
  let u = x[source + a];
  if j >= half {
    y[to + a] = u;
    if b < p.d { y[to + b] = x[source + b]; }
    return;
  }
  let v = x[source + b];
  let c = table[p.table + t * p.r + j];
  let s = table[p.table + t * p.r + half + j];
  y[to + a] = u * c - v * s;
  y[to + b] = v * c + u * s;
}
