// y = x, 16 bytes at a time, each invocation a stride apart: what a device's memory moves when nothing else limits it.
const WG = 256u;
struct P { n: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let step = groups.x * groups.y * WG;
  for (var i = (wid.x + wid.y * groups.x) * WG + lane; i < p.n; i += step) { y[i] = x[i]; }
}
