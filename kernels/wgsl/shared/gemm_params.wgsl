// Parameters of every matrix product. x_off, x_stride count vec4 of f32 (f16: vec4 of f16), the others f32; bias_off vec4.
struct P {
  m: u32, n: u32,               // rows of x; rows of W (SWIGLU: of one half)
  kb: u32, groups: u32,         // blocks of 32 along k; scales per row
  shift: u32, factor: f32,
  k: u32, bias_off: u32,
  x_off: u32, x_stride: u32,
  y_off: u32, y_stride: u32,
  res_off: u32, res_stride: u32,
  row0: u32, tiles_m: u32,      // first row of this chunk of W, for y and bias
  n_begin: u32, pad0: u32, pad1: u32, pad2: u32,   // first column of this dispatch (another tile shape does the rest)
}
@group(0) @binding(0) var<uniform> p: P;
