// A weight matrix [rows, k] in one of the device's formats, the value at (row, k). p has w_kb (blocks of 32 values in a
// row), w_groups (scales in a row), w_shift (a block's scale is number block >> w_shift), w_factor, w_zero.
//#if W_VALUES
// Not a weight but rows that the run computed, from p.table on.
@group(0) @binding(1) var<storage, read_write> codes: array<f32>;
fn weight_at(row: u32, k: u32) -> f32 { return codes[p.table + row * p.w_k + k]; }
//#endif
//#if W_F32
@group(0) @binding(1) var<storage, read> codes: array<f32>;
fn weight_at(row: u32, k: u32) -> f32 { return codes[row * p.w_k + k]; }
//#endif
//#if W_F16
@group(0) @binding(1) var<storage, read> codes: array<u32>;
fn weight_at(row: u32, k: u32) -> f32 {
  let i = row * p.w_k + k;
  let pair = unpack2x16float(codes[i / 2u]);
  return select(pair.x, pair.y, (i & 1u) == 1u);
}
//#endif
//#if W_BF16
@group(0) @binding(1) var<storage, read> codes: array<u32>;
fn weight_at(row: u32, k: u32) -> f32 {
  let i = row * p.w_k + k;
  let word = codes[i / 2u];
  return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
}
//#endif
//#if W_QUANT
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
//#if W_OFFSETS
@group(0) @binding(3) var<storage, read> offsets: array<u32>;
//#endif
fn half_at(word: u32, i: u32) -> f32 {
  let pair = unpack2x16float(word);
  return select(pair.x, pair.y, (i & 1u) == 1u);
}
// Codes of 8 bits are signed; the others are not.
fn code_at(row: u32, k: u32) -> f32 {
  let block = row * p.w_kb + k / 32u;
  let e = k % 32u;
//#if W_Q8
  return f32(extractBits(bitcast<i32>(codes[block * 8u + e / 4u]), e % 4u * 8u, 8u));
//#endif
//#if W_Q4
  return f32(extractBits(codes[block * 4u + e / 8u], e % 4u * 8u + e % 8u / 4u * 4u, 4u));
//#endif
//#if W_Q2
  return f32(extractBits(codes[block * 2u + e / 16u], e % 4u * 8u + e % 16u / 4u * 2u, 2u));
//#endif
}
fn weight_at(row: u32, k: u32) -> f32 {
//#if W_GROUP16
  let group = row * p.w_groups + k / 16u;
//#else
  let group = row * p.w_groups + ((k / 32u) >> p.w_shift);
//#endif
  let scale = half_at(scales[group / 2u], group) * p.w_factor;
  let code = code_at(row, k);
//#if W_MINIMA
  return fma(scale, code, half_at(offsets[group / 2u], group) * p.w_factor);
//#else
//#if W_OFFSETS
  return scale * (code - half_at(offsets[group / 2u], group));
//#else
  return scale * (code - p.w_zero);
//#endif
//#endif
}
//#endif
