// Parameters of every mat-vec kernel. Offsets count elements of the binding they index: vec4 in `act` and `vecw`,
// f32 in `y`, vec4 for bias_off too.
struct P {
  n: u32,         // rows; with SWIGLU the rows of one half
  kb: u32,        // blocks of 32 along k (k padded)
  groups: u32,    // scales per row
  shift: u32,     // scale of block b is b >> shift
  factor: f32,    // of the whole matrix
  eps: f32,
  k: u32,         // components of x
  x_off: u32,
  prev_off: u32,
  h_off: u32,
  y_off: u32,
  w1_off: u32,
  w2_off: u32,
  bias_off: u32,
  past: u32,      // row of the KV state that k and v go to
  q_rows: u32,
  kv_rows: u32,
  rope_off: u32,  // f32 index in y: rot/2 cosines, then rot/2 sines
  rot: u32,       // rotated components of a head
  head_dim: u32,
  x_stride: u32,  // MB > 1: elements of x's binding between rows
  y_stride: u32,  // MB > 1: f32 between rows of y
  row0: u32,      // first row of this chunk of the matrix, for y, bias and the epilogue (weights split by rows)
  pad0: u32,
}
@group(0) @binding(0) var<uniform> p: P;
