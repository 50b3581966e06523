// The KTOP largest of each run of CHUNK values, sorted (value down, index up). Applied again to its own output (PAIRS) until
// one run is left. A workgroup sorts its run bitonically in workgroup memory. NaN sorts last.
const WG = 256u;
const CHUNK = 1024u;
const KTOP = 64u;
struct P { n: u32, x_off: u32, o_off: u32, pad: u32 }   // o_off: pairs
@group(0) @binding(0) var<uniform> p: P;
//#if PAIRS
@group(0) @binding(1) var<storage, read_write> x: array<vec2<u32>>;
//#else
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
//#endif
@group(0) @binding(2) var<storage, read_write> o: array<vec2<u32>>;
var<workgroup> sv: array<f32, CHUNK>;
var<workgroup> si: array<u32, CHUNK>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  for (var i = t; i < CHUNK; i += WG) {
    let j = wid.x * CHUNK + i;
    var v = bitcast<f32>(0xff7fffffu); var id = 0xffffffffu;
    if (j < p.n) {
//#if PAIRS
      let c = x[p.x_off + j]; id = c.y; let f = bitcast<f32>(c.x);
//#else
      id = j; let f = x[p.x_off + j];
//#endif
      if (f >= v) { v = f; }
    }
    sv[i] = v; si[i] = id;
  }
  workgroupBarrier();
  for (var k = 2u; k <= CHUNK; k = k << 1u) {
    for (var j = k >> 1u; j > 0u; j = j >> 1u) {
      for (var e = t; e < CHUNK / 2u; e += WG) {
        let a = ((e & ~(j - 1u)) << 1u) | (e & (j - 1u)); let b = a | j;
        let va = sv[a]; let vb = sv[b]; let ia = si[a]; let ib = si[b];
        let wrong = vb > va || (vb == va && ib < ia);   // b belongs before a
        if (wrong == ((a & k) == 0u)) { sv[a] = vb; sv[b] = va; si[a] = ib; si[b] = ia; }
      }
      workgroupBarrier();
    }
  }
  for (var i = t; i < KTOP; i += WG) { o[p.o_off + wid.x * KTOP + i] = vec2<u32>(bitcast<u32>(sv[i]), si[i]); }
}
