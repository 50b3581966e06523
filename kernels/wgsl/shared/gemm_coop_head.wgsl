enable f16;
enable wgpu_cooperative_matrix;
const BM = WG / 32u / SGN * MF * 16u;
const BN = SGN * NF * 16u;
const LD = 10u;                // row of a tile in vec4<f16>: 32 f16 and 8 of padding, free of bank conflicts
const NA = BM * 8u / WG;       // vec4 of x a thread moves for a step of 32
const NB = (BN * PER + WG - 1u) / WG;  // units of W a thread moves
alias MA = coop_mat16x16<f16, A>;
alias MB = coop_mat16x16<f16, B>;
alias MC = coop_mat16x16<f32, C>;
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
var<workgroup> xs: array<H4, NBUF * BM * LD>;
var<workgroup> wsh: array<H4, NBUF * BN * LD>;
var<workgroup> st: array<f32, SLOTS * 16u * 36u>;   // 16 x 32 pieces of the result
//#if X16
alias Xr = array<H4, NA>;
//#else
alias Xr = array<vec4<f32>, NA>;
//#endif
alias Wr = array<Raw, NB>;

// The row of the binding behind row l of the tile at c0, clamped. SWIGLU: 16 gate rows, then the 16 up rows beside them.
fn w_row(c0: u32, l: u32) -> u32 {
//#if SWIGLU
  let c = min(c0 + (l >> 5u) * 16u + (l & 15u), p.n - 1u);
  return select(c, c + p.n, (l & 16u) != 0u);
//#else
  return min(c0 + l, p.n - 1u);
//#endif
}

fn fetch(xr: ptr<function, Xr>, wr: ptr<function, Wr>, m0: u32, n0: u32, b0: u32, t: u32) {
  let b = min(b0, p.kb - 1u);   // a step past the end reloads the last one, for nothing
  for (var e = 0u; e < NA; e++) {
    let i = e * WG + t; let r = min(m0 + (i >> 3u), p.m - 1u); let c = i & 7u;
    let o = p.x_off + r * p.x_stride + b * 8u + c;
//#if X16
    (*xr)[e] = x[o];
//#else
    (*xr)[e] = vec4<f32>(0.0);
    if (b * 32u + c * 4u < p.k) { (*xr)[e] = x[o]; }
//#endif
  }
  for (var e = 0u; e < NB; e++) {
    let i = e * WG + t;
    (*wr)[e] = raw(w_row(n0, min(i / PER, BN - 1u)), b, i % PER);
  }
}

fn store(xr: ptr<function, Xr>, wr: ptr<function, Wr>, xo: u32, wo: u32, t: u32) {
  for (var e = 0u; e < NA; e++) { let i = e * WG + t; xs[xo + (i >> 3u) * LD + (i & 7u)] = H4((*xr)[e]); }
  for (var e = 0u; e < NB; e++) {
    let i = e * WG + t;
    if (NB * WG == BN * PER || i < BN * PER) {
      let o = wo + (i / PER) * LD + (8u / PER) * (i % PER);
      let v = halves((*wr)[e]);
//#if W_FLOAT
      wsh[o] = v[0];
//#else
      wsh[o] = v[0]; wsh[o + 1u] = v[1]; wsh[o + 2u] = v[2]; wsh[o + 3u] = v[3];
//#endif
    }
  }
}
