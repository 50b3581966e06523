// How many operations a device does in a second where no memory limits it: every invocation works on its own registers, and writes
// what came of it so that nothing can be left out.
// Flags: DOT (products of packed bytes, 128 operations a round), COOP (cooperative matrices 16x16x16 of f16, sums in f32, 8 products
// a round and subgroup of 32); otherwise f32, 256 operations a round.
//#if COOP
enable f16;
enable wgpu_cooperative_matrix;
alias H4 = vec4<f16>;
alias MA = coop_mat16x16<f16, A>;
alias MB = coop_mat16x16<f16, B>;
alias MC = coop_mat16x16<f32, C>;
var<workgroup> a: array<H4, 128>;
var<workgroup> b: array<H4, 128>;
var<workgroup> st: array<f32, WG / 32u * 256u>;
//#endif
const WG = 256u;
struct P { rounds: u32, seed: u32 }
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
//#if COOP
  if (t < 128u) {
    a[t] = H4(f16(f32(t + p.seed) * 1e-4));
    b[t] = H4(f16(f32(t * 3u + p.seed) * 1e-4));
  }
  workgroupBarrier();
  let ld = 4u;
  let a0 = coopLoadT<MA>(&a[0u], ld);
  let a1 = coopLoadT<MA>(&a[64u], ld);
  let b0 = coopLoad<MB>(&b[0u], ld);
  let b1 = coopLoad<MB>(&b[64u], ld);
  var c0 = MC(); var c1 = MC(); var c2 = MC(); var c3 = MC();
  var c4 = MC(); var c5 = MC(); var c6 = MC(); var c7 = MC();
  for (var r = 0u; r < p.rounds; r++) {
    c0 = coopMultiplyAdd(a0, b0, c0); c1 = coopMultiplyAdd(a0, b1, c1);
    c2 = coopMultiplyAdd(a1, b0, c2); c3 = coopMultiplyAdd(a1, b1, c3);
    c4 = coopMultiplyAdd(a0, b0, c4); c5 = coopMultiplyAdd(a0, b1, c5);
    c6 = coopMultiplyAdd(a1, b0, c6); c7 = coopMultiplyAdd(a1, b1, c7);
  }
  let at = t / 32u * 256u;
  let l = 16u;
  var sum = 0.0;
  coopStoreT(c0, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c1, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c2, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c3, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c4, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c5, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c6, &st[at], l); workgroupBarrier(); sum += st[t]; workgroupBarrier();
  coopStoreT(c7, &st[at], l); workgroupBarrier(); sum += st[t];
  y[wid.x * WG + t] = sum;
//#else
//#if DOT
  let m = 0x01010101u * (p.seed & 1u) + 0x7f03u;
  var c0 = vec4<i32>(i32(t)); var c1 = c0 + 1i; var c2 = c0 + 2i; var c3 = c0 + 3i;
  for (var r = 0u; r < p.rounds; r++) {
    c0 += vec4<i32>(dot4I8Packed(u32(c0.x), m), dot4I8Packed(u32(c0.y), m), dot4I8Packed(u32(c0.z), m), dot4I8Packed(u32(c0.w), m));
    c1 += vec4<i32>(dot4I8Packed(u32(c1.x), m), dot4I8Packed(u32(c1.y), m), dot4I8Packed(u32(c1.z), m), dot4I8Packed(u32(c1.w), m));
    c2 += vec4<i32>(dot4I8Packed(u32(c2.x), m), dot4I8Packed(u32(c2.y), m), dot4I8Packed(u32(c2.z), m), dot4I8Packed(u32(c2.w), m));
    c3 += vec4<i32>(dot4I8Packed(u32(c3.x), m), dot4I8Packed(u32(c3.y), m), dot4I8Packed(u32(c3.z), m), dot4I8Packed(u32(c3.w), m));
  }
  let c = c0 + c1 + c2 + c3;
  y[wid.x * WG + t] = f32(c.x + c.y + c.z + c.w);
//#else
  let m = vec4<f32>(f32(p.seed) * 1e-3 + 0.5);
  var c0 = vec4<f32>(f32(t)); var c1 = c0 + 1.0; var c2 = c0 + 2.0; var c3 = c0 + 3.0;
  var c4 = c0 + 4.0; var c5 = c0 + 5.0; var c6 = c0 + 6.0; var c7 = c0 + 7.0;
  for (var r = 0u; r < p.rounds; r++) {
    c0 = fma(c0, m, m); c1 = fma(c1, m, m); c2 = fma(c2, m, m); c3 = fma(c3, m, m);
    c4 = fma(c4, m, m); c5 = fma(c5, m, m); c6 = fma(c6, m, m); c7 = fma(c7, m, m);
    c0 = fma(c0, m, m); c1 = fma(c1, m, m); c2 = fma(c2, m, m); c3 = fma(c3, m, m);
    c4 = fma(c4, m, m); c5 = fma(c5, m, m); c6 = fma(c6, m, m); c7 = fma(c7, m, m);
    c0 = fma(c0, m, m); c1 = fma(c1, m, m); c2 = fma(c2, m, m); c3 = fma(c3, m, m);
    c4 = fma(c4, m, m); c5 = fma(c5, m, m); c6 = fma(c6, m, m); c7 = fma(c7, m, m);
    c0 = fma(c0, m, m); c1 = fma(c1, m, m); c2 = fma(c2, m, m); c3 = fma(c3, m, m);
    c4 = fma(c4, m, m); c5 = fma(c5, m, m); c6 = fma(c6, m, m); c7 = fma(c7, m, m);
  }
  let c = c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7;
  y[wid.x * WG + t] = c.x + c.y + c.z + c.w;
//#endif
//#endif
}
