// y[m,n] = epilogue(f * sum_k x[m,k] * w[n,k]), f32 throughout, weights dequantised on their way to workgroup memory.
// A workgroup of 128 threads owns a 64 x 64 tile, a thread 8 x 4; K in steps of 32, 16 KiB of workgroup memory.
// SWIGLU: the tile is 32 gate rows and the 32 up rows of the same columns of y, y = silu(gate) * up.
// Departs from the twin only in the order of the f32 sums (by 32s).
// Flags: weight formats of w8.wgsl; ASYM; GROUP16; BIAS; SILU | GELU | SWIGLU; RESIDUAL.
const ZERO = 8.0;
//#include "shared/gemm_params.wgsl"
//#include "shared/w8.wgsl"
@group(0) @binding(4) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
//#if BIAS
@group(0) @binding(6) var<storage, read> vecw: array<vec4<f32>>;
//#endif
//#if RESIDUAL
@group(0) @binding(7) var<storage, read_write> res: array<f32>;
//#endif
//#include "shared/gemm_epilogue.wgsl"
var<workgroup> xs: array<f32, 2048>;   // [32 k][64 rows of x]
var<workgroup> wsh: array<f32, 2048>;  // [32 k][64 rows of W]

// The row of the binding that local row l of the tile at c0 is, clamped.
fn w_row(c0: u32, l: u32) -> u32 {
//#if SWIGLU
  let c = min(c0 + (l >> 2u) * 2u + (l & 1u), p.n - 1u);
  return select(c, c + p.n, (l & 2u) != 0u);
//#else
  return min(c0 + l, p.n - 1u);
//#endif
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
//#if SWIGLU
  let cols = 32u;
//#else
  let cols = 64u;
//#endif
  // x runs over tiles of rows of x first: neighbours share the weights, which are read from memory once.
  let tile = wid.x + wid.y * nwg.x;
  let m0 = (tile % p.tiles_m) * 64u; let n0 = p.n_begin + (tile / p.tiles_m) * cols;
  if (n0 >= p.n) { return; }
  let tx = t % 16u; let ty = t / 16u;
  var acc: array<vec4<f32>, 8>;
  for (var i = 0u; i < 8u; i++) { acc[i] = vec4<f32>(0.0); }
  for (var b = 0u; b < p.kb; b++) {
    for (var e = 0u; e < 4u; e++) {
      let i = e * 128u + t; let r = i & 63u; let k4 = i >> 6u;
      var v = vec4<f32>(0.0);
      let k = b * 32u + k4 * 4u;
      if (m0 + r < p.m && k < p.k) { v = x[p.x_off + (m0 + r) * p.x_stride + b * 8u + k4]; }
      for (var c = 0u; c < 4u; c++) { xs[(k4 * 4u + c) * 64u + r] = v[c]; }
    }
    for (var e = 0u; e < 2u; e++) {
      let i = e * 128u + t; let r = i & 63u; let u = i >> 6u;
      w8(w_row(n0, r), b * 4u + u);
      for (var c = 0u; c < 4u; c++) {
        wsh[(u * 8u + c) * 64u + r] = WLO[c];
        wsh[(u * 8u + 4u + c) * 64u + r] = WHI[c];
      }
    }
    workgroupBarrier();
    for (var k = 0u; k < 32u; k++) {
      let w = vec4<f32>(wsh[k * 64u + tx * 4u], wsh[k * 64u + tx * 4u + 1u], wsh[k * 64u + tx * 4u + 2u], wsh[k * 64u + tx * 4u + 3u]);
      for (var i = 0u; i < 8u; i++) { acc[i] = fma(vec4<f32>(xs[k * 64u + ty * 8u + i]), w, acc[i]); }
    }
    workgroupBarrier();
  }
  for (var i = 0u; i < 8u; i++) {
    let r = m0 + ty * 8u + i;
    if (r >= p.m) { break; }
    let a = acc[i] * p.factor;
//#if SWIGLU
    for (var j = 0u; j < 2u; j++) {
      let c = n0 + tx * 2u + j;
      if (c < p.n) { y[p.y_off + r * p.y_stride + p.row0 + c] = a[j] / (1.0 + exp(-a[j])) * a[j + 2u]; }
    }
//#else
    for (var j = 0u; j < 4u; j++) {
      let c = n0 + tx * 4u + j;
      if (c < p.n) { y[p.y_off + r * p.y_stride + p.row0 + c] = finish(a[j], r, p.row0 + c); }
    }
//#endif
  }
}
