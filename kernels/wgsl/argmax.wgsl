// The index of the largest of n values, the lowest among equals; the largest index there is where a value is
// not finite. Two dispatches: the first (no flag) gives one
// (value, index) for each workgroup's stride of x, the second (SECOND, one workgroup) joins them.
const WG = 256u;
struct P { n: u32, x_off: u32, o_off: u32, pad: u32 }  // o_off: pairs; SECOND: the word that gets the index
@group(0) @binding(0) var<uniform> p: P;
//#if SECOND
@group(0) @binding(1) var<storage, read_write> pairs: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> o: array<u32>;
//#else
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> pairs: array<vec2<u32>>;
//#endif
var<workgroup> sv: array<f32, WG>;
var<workgroup> si: array<u32, WG>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  var bv = bitcast<f32>(0xff7fffffu); var bi = 0xffffffffu;
//#if SECOND
  for (var i = t; i < p.n; i += WG) {
    let c = pairs[p.x_off + i]; let v = bitcast<f32>(c.x);
    if (v > bv || (v == bv && c.y < bi)) { bv = v; bi = c.y; }
  }
//#else
  for (var i = wid.x * WG + t; i < p.n; i += nwg.x * WG) {
    let v = x[p.x_off + i];
    // Not finite: no other value is larger than infinity.
    if ((bitcast<u32>(v) & 0x7f800000u) == 0x7f800000u) { bv = bitcast<f32>(0x7f800000u | (bi & 0u)); bi = 0xffffffffu; }
    else if (v > bv || (v == bv && i < bi)) { bv = v; bi = i; }
  }
//#endif
  sv[t] = bv; si[t] = bi;
  workgroupBarrier();
  // 16 threads take 16 values each, then one takes 16: two barriers where a tree would need eight.
  if (t < 16u) {
    for (var e = t + 16u; e < WG; e += 16u) { if (sv[e] > bv || (sv[e] == bv && si[e] < bi)) { bv = sv[e]; bi = si[e]; } }
    sv[t] = bv; si[t] = bi;
  }
  workgroupBarrier();
  if (t == 0u) {
    for (var e = 1u; e < 16u; e++) { if (sv[e] > bv || (sv[e] == bv && si[e] < bi)) { bv = sv[e]; bi = si[e]; } }
//#if SECOND
    o[p.o_off] = bi;
//#else
    pairs[p.o_off + wid.x] = vec2<u32>(bitcast<u32>(bv), bi);
//#endif
  }
}
