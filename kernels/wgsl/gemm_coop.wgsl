// y[m,n] = epilogue(f * sum_k f16(x[m,k]) * f16(w[n,k])) on cooperative matrices 16x16x16, f32 accumulators.
// A workgroup owns a BM x BN tile (128 x 128), a subgroup of 32 a 64 x 32 piece; K in steps of 32, the next step's global
// loads are in flight during the products. Weights become f16 on their way to workgroup memory.
// Departs from the twin: x and w rounded to f16 (relative 5e-4 each), f32 sums of 16 in the unit's order.
// SWIGLU: a subgroup's 32 columns are 16 gate rows and the 16 up rows of the same columns of y.
// Only where subgroups have 32 lanes in invocation order; no subgroup builtin in this module (a driver crashes on both).
// Flags: formats as w8.wgsl; ASYM; GROUP16; X16 (x is f16, rows padded to 32 with zeros); BIAS; SILU | GELU; RESIDUAL; SWIGLU.
//#include "shared/gemm_coop_head.wgsl"

// Four staged 16 x 32 pieces (the i-th of subgroups 4h..4h+3) to y.
fn put(m0: u32, n0: u32, i: u32, h: u32, t: u32) {
  for (var e = t; e < 4u * 16u * 32u; e += WG) {
    let s = e / 512u; let r0 = (e / 32u) & 15u; let c0 = e & 31u;
    let sg = h * 4u + s;
    let r = m0 + ((sg / SGN) * MF + i) * 16u + r0;
    let v = st[s * 576u + r0 * 36u + c0] * p.factor;
//#if SWIGLU
    let c = n0 + (sg % SGN) * 16u + (c0 & 15u);
    if (c0 < 16u && r < p.m && c < p.n) {
      y[p.y_off + r * p.y_stride + p.row0 + c] = v / (1.0 + exp(-v)) * st[s * 576u + r0 * 36u + c0 + 16u] * p.factor;
    }
//#else
    let c = n0 + (sg % SGN) * 32u + c0;
    if (r < p.m && c < p.n) { y[p.y_off + r * p.y_stride + p.row0 + c] = finish(v, r, p.row0 + c); }
//#endif
  }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
//#if SWIGLU
  let cols = BN / 2u;
//#else
  let cols = BN;
//#endif
  // Neighbouring workgroups share the weights of one column of tiles.
  let tile = wid.x + wid.y * nwg.x;
  let m0 = (tile % p.tiles_m) * BM; let n0 = (tile / p.tiles_m) * cols;
  if (n0 >= p.n) { return; }
  let sg = t / 32u;
  let S = UNIT; let lds = LD * S;
  let am = (sg / SGN) * MF * 16u * LD; let bn = (sg % SGN) * 32u * LD;
  var c00 = coop_mat16x16<f32, C>(); var c01 = coop_mat16x16<f32, C>();
  var c10 = coop_mat16x16<f32, C>(); var c11 = coop_mat16x16<f32, C>();
  var c20 = coop_mat16x16<f32, C>(); var c21 = coop_mat16x16<f32, C>();
  var c30 = coop_mat16x16<f32, C>(); var c31 = coop_mat16x16<f32, C>();
  fetch(m0, n0, 0u, t);
  for (var b = 0u; b < p.kb; b++) {
    store(t);
    workgroupBarrier();
    if (b + 1u < p.kb) { fetch(m0, n0, b + 1u, t); }
    {
      let b0 = coopLoad<coop_mat16x16<f16, B>>(&wsh[(bn + 0u * LD + 0u) * S], lds);
      let b1 = coopLoad<coop_mat16x16<f16, B>>(&wsh[(bn + 16u * LD + 0u) * S], lds);
      let a0 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 0u * LD + 0u) * S], lds);
      c00 = coopMultiplyAdd(a0, b0, c00); c01 = coopMultiplyAdd(a0, b1, c01);
      let a1 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 16u * LD + 0u) * S], lds);
      c10 = coopMultiplyAdd(a1, b0, c10); c11 = coopMultiplyAdd(a1, b1, c11);
      let a2 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 32u * LD + 0u) * S], lds);
      c20 = coopMultiplyAdd(a2, b0, c20); c21 = coopMultiplyAdd(a2, b1, c21);
      let a3 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 48u * LD + 0u) * S], lds);
      c30 = coopMultiplyAdd(a3, b0, c30); c31 = coopMultiplyAdd(a3, b1, c31);
    }
    {
      let b0 = coopLoad<coop_mat16x16<f16, B>>(&wsh[(bn + 0u * LD + 4u) * S], lds);
      let b1 = coopLoad<coop_mat16x16<f16, B>>(&wsh[(bn + 16u * LD + 4u) * S], lds);
      let a0 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 0u * LD + 4u) * S], lds);
      c00 = coopMultiplyAdd(a0, b0, c00); c01 = coopMultiplyAdd(a0, b1, c01);
      let a1 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 16u * LD + 4u) * S], lds);
      c10 = coopMultiplyAdd(a1, b0, c10); c11 = coopMultiplyAdd(a1, b1, c11);
      let a2 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 32u * LD + 4u) * S], lds);
      c20 = coopMultiplyAdd(a2, b0, c20); c21 = coopMultiplyAdd(a2, b1, c21);
      let a3 = coopLoadT<coop_mat16x16<f16, A>>(&xs[(am + 48u * LD + 4u) * S], lds);
      c30 = coopMultiplyAdd(a3, b0, c30); c31 = coopMultiplyAdd(a3, b1, c31);
    }
    workgroupBarrier();
  }
  for (var h = 0u; h < WG / 128u; h++) {
    if (sg / 4u == h) {
      let o0 = (sg & 3u) * 576u; let o1 = o0 + 16u; let ld = 36u;
      coopStoreT(c00, &st[o0], ld); coopStoreT(c01, &st[o1], ld);
    }
    workgroupBarrier();
    put(m0, n0, 0u, h, t);
    workgroupBarrier();
  }
  for (var h = 0u; h < WG / 128u; h++) {
    if (sg / 4u == h) {
      let o0 = (sg & 3u) * 576u; let o1 = o0 + 16u; let ld = 36u;
      coopStoreT(c10, &st[o0], ld); coopStoreT(c11, &st[o1], ld);
    }
    workgroupBarrier();
    put(m0, n0, 1u, h, t);
    workgroupBarrier();
  }
  for (var h = 0u; h < WG / 128u; h++) {
    if (sg / 4u == h) {
      let o0 = (sg & 3u) * 576u; let o1 = o0 + 16u; let ld = 36u;
      coopStoreT(c20, &st[o0], ld); coopStoreT(c21, &st[o1], ld);
    }
    workgroupBarrier();
    put(m0, n0, 2u, h, t);
    workgroupBarrier();
  }
  for (var h = 0u; h < WG / 128u; h++) {
    if (sg / 4u == h) {
      let o0 = (sg & 3u) * 576u; let o1 = o0 + 16u; let ld = 36u;
      coopStoreT(c30, &st[o0], ld); coopStoreT(c31, &st[o1], ld);
    }
    workgroupBarrier();
    put(m0, n0, 3u, h, t);
    workgroupBarrier();
  }
}
