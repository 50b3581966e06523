// y[m,r] = epilogue(sum_k w[r,k] * x[m,k]) with w dequantised to f32 in registers: no packed dot product, f32 throughout.
// A team (subgroup, or 32 threads) owns R rows and strides over units of 8 values; prologue and epilogue as matvec_q.wgsl.
// Rows of every format are padded to whole blocks of 32 values. Departs from the twin: order of the f32 sums.
// Flags: SUBGROUP; W_F32 | W_F16 | W_BF16 | BITS8 | BITS2 (else 4 bits); ASYM; GROUP16; X_GLOBAL | [RESID] [NORM]; epilogues
// and VECW as matvec_q.wgsl; MB > 1 as matvec_q.wgsl.
const WG = 256u;
const R = 2u;
const U = 4u;
const MB = 1u;
const ZERO = 8.0;
//#include "shared/mv_params.wgsl"
//#include "shared/w8.wgsl"
@group(0) @binding(4) var<storage, read_write> act: array<vec4<f32>>;
//#include "shared/mv_main.wgsl"
var<private> row_of: array<u32, R>;

fn consume(i: u32) {
  for (var r = 0u; r < R; r++) {
    w8(row_of[r], i);
    for (var m = 0u; m < MB; m++) {
//#if X_GLOBAL
      let o = p.x_off + m * p.x_stride + 2u * i;
      acc[m * R + r] += dot(WLO, act[o]) + dot(WHI, act[o + 1u]);
//#else
      acc[m * R + r] += dot(WLO, xf[2u * i]) + dot(WHI, xf[2u * i + 1u]);
//#endif
    }
  }
}

fn fetch_first(i: u32) {}
fn rows(i: u32) {
  for (var r = 0u; r < R; r++) { row_of[r] = row_at(i, r); }
  for (var j = 0u; j < R * MB; j++) { acc[j] = 0.0; }
  let units = p.kb * 4u;
  let full = units - units % (U * TEAM);
  var b = LANE;
  for (; b < full; b += U * TEAM) { for (var u = 0u; u < U; u++) { consume(b + u * TEAM); } }
  for (; b < units; b += TEAM) { consume(b); }
}
