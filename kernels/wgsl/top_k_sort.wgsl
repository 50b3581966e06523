// The k largest of n values, the largest first, equal ones in the order of their indices; all indices are -1 where a value is not
// finite. Several dispatches: each workgroup sorts N pairs and keeps k, until one workgroup is left.
// A pair is a key, which orders as the value does, and the value's index. Keys are integers, because what a device makes of
// comparisons with infinity and NaN is its own business.
// FIRST: reads values, otherwise the pairs of the dispatch before. LAST: one workgroup, which writes indices and values.
const WG = 256u;
const N = 1024u;
struct P { n: u32, k: u32, x: u32, pairs: u32, ids: u32, best: u32 }
@group(0) @binding(0) var<uniform> p: P;
//#if FIRST
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
//#else
@group(0) @binding(1) var<storage, read_write> x: array<vec2<u32>>;
//#endif
//#if LAST
@group(0) @binding(2) var<storage, read_write> ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> best: array<f32>;
//#else
@group(0) @binding(2) var<storage, read_write> pairs: array<vec2<u32>>;
//#endif
var<workgroup> key: array<u32, N>;
var<workgroup> place: array<u32, N>;
const BAD = 0xffffffffu;   // above every finite value
const NONE = 0xffffffffu;
//#include "shared/grid.wgsl"

//#if FIRST
fn key_of(v: f32) -> u32 {
  let bits = bitcast<u32>(v);
  if (bits & 0x7f800000u) == 0x7f800000u { return BAD; }
  // Both zeros are the same value.
  if (bits & 0x7fffffffu) == 0u { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}
//#endif

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let group = group_index(wid, groups);
  for (var e = lane; e < N; e += WG) {
    let i = group * N + e;
    // What is missing comes last.
    key[e] = 0u;
    place[e] = NONE;
    if i < p.n {
//#if FIRST
      key[e] = key_of(x[p.x + i]);
      place[e] = i;
//#else
      let pair = x[p.x + i];
      key[e] = pair.x;
      place[e] = pair.y;
//#endif
    }
  }
  workgroupBarrier();
  // Batcher's bitonic sort.
  for (var size = 2u; size <= N; size = size * 2u) {
    for (var step = size / 2u; step > 0u; step = step / 2u) {
      for (var e = lane; e < N / 2u; e += WG) {
        let a = 2u * step * (e / step) + e % step;
        let b = a + step;
        let forward = (a & size) == 0u;
        let ordered = key[a] > key[b] || (key[a] == key[b] && place[a] < place[b]);
        if ordered != forward {
          let k = key[a]; key[a] = key[b]; key[b] = k;
          let i = place[a]; place[a] = place[b]; place[b] = i;
        }
      }
      workgroupBarrier();
    }
  }
  for (var j = lane; j < p.k; j += WG) {
//#if LAST
    let bits = select(~key[j], key[j] & 0x7fffffffu, key[j] >= 0x80000000u);
    ids[p.ids + j] = select(i32(place[j]), -1i, key[0] == BAD);
    best[p.best + j] = bitcast<f32>(bits);
//#else
    pairs[p.pairs + group * p.k + j] = vec2<u32>(key[j], place[j]);
//#endif
  }
}
