// One element of the result: v = f * sum; BIAS, SILU | GELU, RESIDUAL, in this order. c is the row of W.
//#if GELU
// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
fn gelu(x: f32) -> f32 {
  let z = abs(x) * 0.70710678118654752;
  let u = 1.0 / (1.0 + 0.3275911 * z);
  let e = 1.0 - u * (0.254829592 + u * (-0.284496736 + u * (1.421413741 + u * (-1.453152027 + u * 1.061405429)))) * exp(-z * z);
  return 0.5 * x * (1.0 + sign(x) * e);
}
//#endif
fn finish(sum: f32, r: u32, c: u32) -> f32 {
  var v = sum;
//#if BIAS
  v += vecw[p.bias_off + c / 4u][c & 3u];
//#endif
//#if SILU
  v = v / (1.0 + exp(-v));
//#endif
//#if GELU
  v = gelu(v);
//#endif
//#if RELU
  v = max(v, 0.0);
//#endif
//#if RESIDUAL
  v += res[p.res_off + r * p.res_stride + c];
//#endif
  return v;
}
