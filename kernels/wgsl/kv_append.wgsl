// state[at + t, head, :] = x[t, column + head * d ..]: one workgroup a head of a token. KV_F32 keeps the values,
// KV_F16 rounds them to half precision, KV_I8 to codes of largest / 127; there
// a head is a word with its scale, then words of four codes.
const WG = 64u;
struct P { t: u32, kv_heads: u32, d: u32, at: u32, x: u32, stride: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
//#include "shared/grid.wgsl"
//#include "shared/reduce.wgsl"

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let item = group_index(wid, groups);
  if item >= p.t * p.kv_heads { return; }
  let head = item % p.kv_heads;
  let t = item / p.kv_heads;
  let source = p.x + t * p.stride + head * p.d;
  let row = (p.at + t) * p.kv_heads + head;
//#if KV_F32
  for (var i = lane; i < p.d; i += WG) { state[row * p.d + i] = bitcast<u32>(x[source + i]); }
//#endif
//#if KV_F16
  for (var i = lane; i < p.d / 2u; i += WG) {
    state[row * p.d / 2u + i] = pack2x16float(vec2<f32>(x[source + 2u * i], x[source + 2u * i + 1u]));
  }
//#endif
//#if KV_I8
  var own = 0.0;
  for (var i = lane; i < p.d; i += WG) { own = max(own, abs(x[source + i])); }
  // Rounded up to bfloat16, as the processor stores it, so that both give the same codes.
  let scale = bitcast<f32>((bitcast<u32>(max_all(own, lane) / 127.0) + 0xffffu) & 0xffff0000u);
  let by = select(1.0, scale, scale > 0.0);
  for (var i = lane; i < p.d / 4u; i += WG) {
    let v = vec4<f32>(x[source + 4u * i], x[source + 4u * i + 1u], x[source + 4u * i + 2u], x[source + 4u * i + 3u]);
    let q = vec4<u32>(vec4<i32>(clamp(round(v / by), vec4<f32>(-127.0), vec4<f32>(127.0)))) & vec4<u32>(255u);
    state[row * (p.d / 4u + 1u) + 1u + i] = q.x | (q.y << 8u) | (q.z << 16u) | (q.w << 24u);
  }
  if lane == 0u { state[row * (p.d / 4u + 1u)] = bitcast<u32>(scale); }
//#endif
}
