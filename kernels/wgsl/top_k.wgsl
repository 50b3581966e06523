// ids[r, j] and best[r, j] = the j-th largest element of x[r, :], equal ones in the order of their indices; -1 where x
// has an element that is not finite. One workgroup a row: k passes, each for the largest element behind the one found before.
const WG = 256u;
struct P { rows: u32, c: u32, k: u32, x: u32, ids: u32, best: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> best: array<f32>;
var<workgroup> value: array<f32, WG>;
var<workgroup> place: array<u32, WG>;
const NONE = 0xffffffffu;
//#include "shared/grid.wgsl"

// Whether (v, i) comes before (u, j) in the order of results; NONE comes last.
fn before(v: f32, i: u32, u: f32, j: u32) -> bool {
  if i == NONE { return false; }
  if j == NONE { return true; }
  return v > u || (v == u && i < j);
}

// Comparisons with NaN may be optimised away, so its bits are looked at.
fn is_finite(v: f32) -> bool { return (bitcast<u32>(v) & 0x7f800000u) != 0x7f800000u; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let r = group_index(wid, groups);
  if r >= p.rows { return; }
  let at = p.x + r * p.c;
  var last_value = 0.0;
  var last_place = NONE;
  var bad = 0u;
  for (var j = 0u; j < p.k; j++) {
    var v = 0.0;
    var i = NONE;
    for (var e = lane; e < p.c; e += WG) {
      let u = x[at + e];
      if j == 0u && !is_finite(u) { bad = 1u; }
      let behind = j == 0u || before(last_value, last_place, u, e);
      if behind && before(u, e, v, i) { v = u; i = e; }
    }
    value[lane] = v;
    place[lane] = i;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half = half / 2u) {
      if lane < half && before(value[lane + half], place[lane + half], value[lane], place[lane]) {
        value[lane] = value[lane + half];
        place[lane] = place[lane + half];
      }
      workgroupBarrier();
    }
    last_value = value[0];
    last_place = place[0];
    workgroupBarrier();
    if lane == 0u {
      ids[p.ids + r * p.k + j] = i32(last_place);
      best[p.best + r * p.k + j] = last_value;
    }
  }
  place[lane] = bad;
  workgroupBarrier();
  if lane == 0u {
    var any = 0u;
    for (var e = 0u; e < WG; e++) { any |= place[e]; }
    if any != 0u { for (var j = 0u; j < p.k; j++) { ids[p.ids + r * p.k + j] = -1; } }
  }
}
