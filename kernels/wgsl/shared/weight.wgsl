// A weight matrix [rows, k], the value at (row, k), for kernels that take any size: p has w_kb (blocks of 32 values in a
// row), w_groups (scales in a row), w_shift (a block's scale is number block >> w_shift) and w_factor. Formats as in w8.wgsl;
// W_VALUES: not a weight but rows of w_k values that the run computed, from p.table on.
//#if W_VALUES
@group(0) @binding(1) var<storage, read_write> wq: array<f32>;
fn weight_at(row: u32, k: u32) -> f32 { return wq[p.table + row * p.w_k + k]; }
//#else
//#if W_F32
@group(0) @binding(1) var<storage, read> wq: array<f32>;
fn weight_at(row: u32, k: u32) -> f32 { return wq[row * p.w_kb * 32u + k]; }
//#else
@group(0) @binding(1) var<storage, read> wq: array<u32>;
//#if W_HALF
fn weight_at(row: u32, k: u32) -> f32 {
  let word = wq[row * p.w_kb * 16u + k / 2u];
//#if W_F16
  return unpack2x16float(word >> (16u * (k & 1u))).x;
//#endif
//#if W_BF16
  return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (k & 1u) == 1u));
//#endif
}
//#else
@group(0) @binding(2) var<storage, read> ws: array<u32>;
//#if ASYM
@group(0) @binding(3) var<storage, read> wm: array<u32>;
//#endif
// Codes of 8 bits are signed; the others are not.
fn code_at(row: u32, k: u32) -> f32 {
  let block = row * p.w_kb + k / 32u;
  let e = k % 32u;
//#if BITS8
  return f32(extractBits(bitcast<i32>(wq[block * 8u + e / 4u]), e % 4u * 8u, 8u));
//#else
//#if BITS2
  return f32(extractBits(wq[block * 2u + e / 16u], e % 4u * 8u + e % 16u / 4u * 2u, 2u));
//#else
  return f32(extractBits(wq[block * 4u + e / 8u], e % 4u * 8u + e % 8u / 4u * 4u, 4u));
//#endif
//#endif
}
fn weight_at(row: u32, k: u32) -> f32 {
//#if GROUP16
  let g = row * p.w_groups + k / 16u;
//#else
  let g = row * p.w_groups + ((k / 32u) >> p.w_shift);
//#endif
  let s = unpack2x16float(ws[g / 2u] >> (16u * (g & 1u))).x;
  var m = 0.0;
//#if ASYM
  m = unpack2x16float(wm[g / 2u] >> (16u * (g & 1u))).x;
//#endif
  return fma(s, code_at(row, k) - ZERO, m) * p.w_factor;
}
//#endif
//#endif
//#endif
