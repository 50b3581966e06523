// o[h] = sum_s exp(m[h,s] - m[h]) part[h,s] / sum_s exp(m[h,s] - m[h]) l[h,s]: joins the splits of the attention kernels.
// A workgroup owns one (token, head); SL lanes share its splits, D4 threads its components. Departs from the twin: order of sums.
const D4 = 32u;
const SL = 8u;
const WG = D4 * SL;
struct P { nsplit: u32, part_off: u32, o_off: u32, pad: u32 }   // vec4
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> part: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> ml: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> o: array<vec4<f32>>;
var<workgroup> tops: array<vec2<f32>, SL>;
var<workgroup> sums: array<vec4<f32>, WG>;
@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let h = wid.x; let d = t % D4; let sl = t / D4;
  var m = -1e30; var l = 0.0; var acc = vec4<f32>(0.0);
  for (var s = sl; s < p.nsplit; s += SL) {
    let x = ml[h * p.nsplit + s];
    let v = part[p.part_off + (h * p.nsplit + s) * D4 + d];
    let top = max(m, x.x);
    let a = exp(m - top); let b = exp(x.x - top);
    acc = acc * a + v * b; l = l * a + x.y * b; m = top;
  }
  if (d == 0u) { tops[sl] = vec2<f32>(m, l); }
  sums[t] = acc;
  workgroupBarrier();
  if (t >= D4) { return; }
  for (var i = 0u; i < SL; i++) { m = max(m, tops[i].x); }
  l = 0.0; acc = vec4<f32>(0.0);
  for (var i = 0u; i < SL; i++) {
    let b = exp(tops[i].x - m);
    acc += sums[i * D4 + d] * b; l += tops[i].y * b;
  }
  o[p.o_off + h * D4 + d] = acc * select(0.0, 1.0 / l, l > 0.0);
}
