// y[b, t, s] = exp(x - max) / sum(exp(x - max)) over the columns that the mask admits, 0 elsewhere.
// Causal: row t sees 0 ..= past + t. SEGMENTS: row t sees its own segment of the boundaries [0, .., t].
// One workgroup a row of s.
const WG = 64u;
struct P { rows: u32, t: u32, s: u32, past: u32, bounds: u32, x: u32, segments: u32, y: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
//#if SEGMENTS
@group(0) @binding(2) var<storage, read_write> segments: array<i32>;
//#endif
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
//#include "shared/grid.wgsl"
//#include "shared/reduce.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let r = group_index(wid, groups);
  if r >= p.rows { return; }
  let t = r % p.t;
  var first = 0u;
  var end = min(p.past + t + 1u, p.s);
//#if SEGMENTS
  first = 0u;
  end = 0u;
  for (var i = 0u; i + 1u < p.bounds; i++) {
    if t >= u32(segments[p.segments + i]) { first = u32(segments[p.segments + i]); end = u32(segments[p.segments + i + 1u]); }
  }
//#endif
  let at = p.x + r * p.s;
  var most = -3.4e38;
  for (var i = first + lane; i < end; i += WG) { most = max(most, x[at + i]); }
  most = max_all(most, lane);
  var total = 0.0;
  for (var i = first + lane; i < end; i += WG) { total += exp(x[at + i] - most); }
  total = sum_all(total, lane);
  for (var i = lane; i < p.s; i += WG) {
    let inside = i >= first && i < end;
    // An index outside the mask may hold anything, so it is not read.
    var v = 0.0;
    if inside { v = exp(x[at + i] - most) / total; }
    y[p.y + r * p.s + i] = v;
  }
}
