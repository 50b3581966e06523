// The value i of a head of a row of keys or values, from words. KV_F32: a cache [capacity, kv_heads, d] of f32. KV_F16: two
// values a word. KV_I8: a head is a word with its scale, then words of four codes. KV_ROWS: not a cache but rows of f32
// whose heads start at `first`, `stride` apart. p has kv_heads and d.
fn read_cached(word: u32, at: u32) -> f32 {
//#if KV_F16
  return unpack2x16float(word >> (16u * (at & 1u))).x;
//#else
  return bitcast<f32>(word);
//#endif
}
fn place_of(row: u32, head: u32, i: u32, first: u32, stride: u32) -> u32 {
//#if KV_ROWS
  return first + row * stride + head * p.d + i;
//#else
  return (row * p.kv_heads + head) * p.d + i;
//#endif
}
fn key_at(row: u32, head: u32, i: u32) -> f32 {
//#if KV_I8
  let from_word = (row * p.kv_heads + head) * (p.d / 4u + 1u);
  let code = extractBits(bitcast<i32>(keys[from_word + 1u + i / 4u]), i % 4u * 8u, 8u);
  return f32(code) * bitcast<f32>(keys[from_word]);
//#else
  let at = place_of(row, head, i, p.k, p.k_stride);
//#if KV_F16
  return read_cached(keys[at / 2u], at);
//#else
  return read_cached(keys[at], at);
//#endif
//#endif
}
fn value_at(row: u32, head: u32, i: u32) -> f32 {
//#if KV_I8
  let from_word = (row * p.kv_heads + head) * (p.d / 4u + 1u);
  let code = extractBits(bitcast<i32>(values[from_word + 1u + i / 4u]), i % 4u * 8u, 8u);
  return f32(code) * bitcast<f32>(values[from_word]);
//#else
  let at = place_of(row, head, i, p.v, p.v_stride);
//#if KV_F16
  return read_cached(values[at / 2u], at);
//#else
  return read_cached(values[at], at);
//#endif
//#endif
}
