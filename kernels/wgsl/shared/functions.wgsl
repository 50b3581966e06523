// Element-wise functions. A polynomial is given by its factors, the highest power first.

fn erf_near(x: f32) -> f32 {
  let z = x * x;
  var p = 7.875875e-5;
  p = fma(p, z, -8.016864e-4);
  p = fma(p, z, 5.1890874e-3);
  p = fma(p, z, -2.6854212e-2);
  p = fma(p, z, 1.1283595e-1);
  p = fma(p, z, -3.7612627e-1);
  p = fma(p, z, 1.1283791671);
  return x * p;
}

// Absolute error below 1e-7: near zero x P(x^2), elsewhere 1 - exp(Q(|x|)), which is 1 beyond 4.
fn erf(x: f32) -> f32 {
  let a = abs(x);
  let z = min(a, 4.0);
  var q = 1.6371514e-6;
  q = fma(q, z, -4.605805e-5);
  q = fma(q, z, 5.968056e-4);
  q = fma(q, z, -4.759596e-3);
  q = fma(q, z, 2.6421136e-2);
  q = fma(q, z, -1.1008008e-1);
  q = fma(q, z, -6.31826e-1);
  q = fma(q, z, -1.1302334);
  q = fma(q, z, 3.2013805e-4);
  let far = sign(x) * (1.0 - exp(q));
  return select(erf_near(x), far, a > 1.0);
}

fn sigmoid(x: f32) -> f32 {
  // exp of a large positive number is infinite, and its reciprocal zero: no branch is needed.
  return 1.0 / (1.0 + exp(-x));
}

fn silu(x: f32) -> f32 {
  return x / (1.0 + exp(-x));
}

fn gelu(x: f32) -> f32 {
  return 0.5 * x * (1.0 + erf(x * 0.70710678));
}

// The built-in tanh may be computed from exponentials that overflow.
fn tanh_of(x: f32) -> f32 {
  let e = exp(-2.0 * abs(x));
  let far = sign(x) * (1.0 - e) / (1.0 + e);
  let z = x * x;
  var p = -8.863235e-3;
  p = fma(p, z, 2.1869488e-2);
  p = fma(p, z, -5.3968254e-2);
  p = fma(p, z, 1.3333333e-1);
  p = fma(p, z, -3.3333333e-1);
  p = p * z;
  return select(fma(x, p, x), far, abs(x) > 0.35);
}

fn gelu_tanh(x: f32) -> f32 {
  return 0.5 * x * (1.0 + tanh_of(0.7978846 * fma(0.044715 * x * x, x, x)));
}
