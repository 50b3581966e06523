// The value i of a head of a cached row, from the words of its state; p has kv_heads, d and capacity. KV_ROWS: not a
// cache but rows of f32, each p.k_stride or p.v_stride apart, whose heads start at p.k or p.v.
fn key_at(row: u32, head: u32, i: u32) -> f32 {
//#if KV_ROWS
  return bitcast<f32>(keys[p.k + row * p.k_stride + head * p.d + i]);
//#else
  let at = (row * p.kv_heads + head) * p.d + i;
//#if KV_F32
  return bitcast<f32>(keys[at]);
//#endif
//#if KV_F16
  let pair = unpack2x16float(keys[at / 2u]);
  return select(pair.x, pair.y, (at & 1u) == 1u);
//#endif
//#if KV_INT8
  let code = extractBits(bitcast<i32>(keys[at / 4u]), at % 4u * 8u, 8u);
  return f32(code) * bitcast<f32>(keys[p.capacity * p.kv_heads * p.d / 4u + row * p.kv_heads + head]);
//#endif
//#endif
}
fn value_at(row: u32, head: u32, i: u32) -> f32 {
//#if KV_ROWS
  return bitcast<f32>(values[p.v + row * p.v_stride + head * p.d + i]);
//#else
  let at = (row * p.kv_heads + head) * p.d + i;
//#if KV_F32
  return bitcast<f32>(values[at]);
//#endif
//#if KV_F16
  let pair = unpack2x16float(values[at / 2u]);
  return select(pair.x, pair.y, (at & 1u) == 1u);
//#endif
//#if KV_INT8
  let code = extractBits(bitcast<i32>(values[at / 4u]), at % 4u * 8u, 8u);
  return f32(code) * bitcast<f32>(values[p.capacity * p.kv_heads * p.d / 4u + row * p.kv_heads + head]);
//#endif
//#endif
}
