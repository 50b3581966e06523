// o[m,k] = f16(x[m,k]), rows padded to 32 with zeros: what gemm_coop's X16 and attention_coop's *_F16 read. A thread makes 4.
const WG = 256u;
struct P { m: u32, k4: u32, kp4: u32, x_off: u32, x_stride: u32, o_off: u32, pad0: u32, pad1: u32 }  // counts of 4 values
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> o: array<vec2<u32>>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let i = (wid.x + wid.y * nwg.x) * WG + t;
  let r = i / p.kp4; let c = i % p.kp4;
  if (r >= p.m) { return; }
  var v = vec4<f32>(0.0);
  if (c < p.k4) { v = x[p.x_off + r * p.x_stride + c]; }
  o[p.o_off + i] = vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
}
