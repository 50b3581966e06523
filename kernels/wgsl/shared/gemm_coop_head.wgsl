enable f16;
enable wgpu_cooperative_matrix;
const WG = 256u;
const MF = 4u;                 // 16-row pieces of a subgroup
const SGN = 4u;                // subgroups along n; WG / 32 / SGN along m
const BM = WG / 32u / SGN * MF * 16u;
const BN = SGN * 32u;
const LD = 10u;                // row of a tile in vec4<f16>: 32 f16 and 8 of padding, free of bank conflicts
const NA = BM * 8u / WG;       // vec4 of x a thread moves for a step of 32
const NB = (BN * 2u + WG - 1u) / WG;  // halves of a block of W a thread moves
//#include "shared/gemm_params.wgsl"
//#include "shared/gemm_coop_load.wgsl"
//#if X16
@group(0) @binding(4) var<storage, read_write> x: array<vec4<f16>>;
//#else
@group(0) @binding(4) var<storage, read_write> x: array<vec4<f32>>;
//#endif
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
//#if BIAS
@group(0) @binding(6) var<storage, read> vecw: array<vec4<f32>>;
//#endif
//#if RESIDUAL
@group(0) @binding(7) var<storage, read_write> res: array<f32>;
//#endif
//#include "shared/gemm_epilogue.wgsl"
//#if SCALAR
var<workgroup> xs: array<f16, BM * LD * 4u>;
var<workgroup> wsh: array<f16, BN * LD * 4u>;
//#else
var<workgroup> xs: array<H4, BM * LD>;
var<workgroup> wsh: array<H4, BN * LD>;
//#endif
var<workgroup> st: array<f32, 4u * 16u * 36u>;   // four 16 x 32 pieces of the result
//#if X16
var<private> xr: array<H4, NA>;
//#else
var<private> xr: array<vec4<f32>, NA>;
//#endif
//#if SCALAR
const UNIT = 4u;
//#else
const UNIT = 1u;
//#endif
var<private> wr: array<Raw, NB>;

// The row of the binding behind row l of the tile at c0, clamped. SWIGLU: 16 gate rows, then the 16 up rows beside them.
fn w_row(c0: u32, l: u32) -> u32 {
//#if SWIGLU
  let c = min(c0 + (l >> 5u) * 16u + (l & 15u), p.n - 1u);
  return select(c, c + p.n, (l & 16u) != 0u);
//#else
  return min(c0 + l, p.n - 1u);
//#endif
}

fn fetch(m0: u32, n0: u32, b: u32, t: u32) {
  for (var e = 0u; e < NA; e++) {
    let i = e * WG + t; let r = min(m0 + (i >> 3u), p.m - 1u); let c = i & 7u;
    let o = p.x_off + r * p.x_stride + b * 8u + c;
//#if X16
    xr[e] = x[o];
//#else
    xr[e] = vec4<f32>(0.0);
    if (b * 32u + c * 4u < p.k) { xr[e] = x[o]; }
//#endif
  }
  for (var e = 0u; e < NB; e++) {
    let i = e * WG + t;
    wr[e] = raw(w_row(n0, min(i >> 1u, BN - 1u)), b, i & 1u);
  }
}

fn store(t: u32) {
  for (var e = 0u; e < NA; e++) {
    let i = e * WG + t; let o = (i >> 3u) * LD + (i & 7u);
//#if SCALAR
    let v = H4(xr[e]);
    xs[o * 4u] = v.x; xs[o * 4u + 1u] = v.y; xs[o * 4u + 2u] = v.z; xs[o * 4u + 3u] = v.w;
//#else
    xs[o] = H4(xr[e]);
//#endif
  }
  for (var e = 0u; e < NB; e++) {
    let i = e * WG + t;
    if (NB * WG == BN * 2u || i < BN * 2u) {
      let o = (i >> 1u) * LD + 4u * (i & 1u);
      let v = sixteen(wr[e]);
//#if SCALAR
      for (var c = 0u; c < 4u; c++) { let h = v[c]; let q = (o + c) * 4u; wsh[q] = h.x; wsh[q + 1u] = h.y; wsh[q + 2u] = h.z; wsh[q + 3u] = h.w; }
//#else
      wsh[o] = v[0]; wsh[o + 1u] = v[1]; wsh[o + 2u] = v[2]; wsh[o + 3u] = v[3];
//#endif
    }
  }
}
