// Sum and maximum over a workgroup of WG invocations, a power of two. Each call is a barrier for everybody.
var<workgroup> partial: array<f32, WG>;

fn sum_all(own: f32, lane: u32) -> f32 {
  partial[lane] = own;
  workgroupBarrier();
  for (var half = WG / 2u; half > 0u; half = half / 2u) {
    if lane < half {
      partial[lane] += partial[lane + half];
    }
    workgroupBarrier();
  }
  let total = partial[0];
  workgroupBarrier();
  return total;
}

fn max_all(own: f32, lane: u32) -> f32 {
  partial[lane] = own;
  workgroupBarrier();
  for (var half = WG / 2u; half > 0u; half = half / 2u) {
    if lane < half {
      partial[lane] = max(partial[lane], partial[lane + half]);
    }
    workgroupBarrier();
  }
  let most = partial[0];
  workgroupBarrier();
  return most;
}
