// What both mat-vec kernels share: outputs, epilogues, entry point. They supply fetch_first() and rows(): the sums of one
// item's R rows into acc. An item is R adjacent rows, or with SWIGLU R/2 gate rows and the R/2 up rows beside them. Items go
// round the workgroups first, so that every workgroup gets the same share of the last round.
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
//#if VECW
@group(0) @binding(6) var<storage, read> vecw: array<vec4<f32>>;
//#endif
//#if KV_STATE
@group(0) @binding(7) var<storage, read_write> kst: array<u32>;
@group(0) @binding(8) var<storage, read_write> vst: array<u32>;
//#endif
var<private> SID: u32; var<private> LANE: u32; var<private> NSG: u32; var<private> TEAM: u32;
var<private> acc: array<f32, R * MB>;  // of this thread
var<private> tot: array<f32, R * MB>;  // of the team
//#if !SUBGROUP
var<workgroup> red: array<f32, WG * R>;
//#endif
//#if !X_GLOBAL
//#include "shared/mv_prologue.wgsl"
//#endif

// Row r of item i, in the binding; clamped, so that every load is inside.
fn row_at(i: u32, r: u32) -> u32 {
//#if SWIGLU
  return min(i * (R / 2u) + r % (R / 2u), p.n - 1u) + select(0u, p.n, r >= R / 2u);
//#else
  return min(i * R + r, p.n - 1u);
//#endif
}

//#if QKV
// What the epilogue of an item needs from memory, asked for before its weights: bias, and cosine and sine (1, 0 where
// nothing rotates) of each pair of rows.
var<private> pre_bias: array<vec2<f32>, R / 2u>;
var<private> pre_rope: array<vec2<f32>, R / 2u>;
fn prepare(i: u32) {
  for (var r = 0u; r < R / 2u; r++) {
    let row = min(i * R + 2u * r, p.n - 2u); let d = row % p.head_dim;
    let bv = vecw[p.bias_off + row / 4u];
    pre_bias[r] = select(bv.xy, bv.zw, (row & 2u) != 0u);
    pre_rope[r] = vec2<f32>(1.0, 0.0);
    if (row < p.q_rows + p.kv_rows && d < p.rot) { pre_rope[r] = vec2<f32>(y[p.rope_off + d / 2u], y[p.rope_off + p.rot / 2u + d / 2u]); }
  }
}
// Bias, rotary embedding of adjacent pairs, q to y, k and v to row `past` of the state (KV_STAGE: to y, after q).
fn put_pair(row: u32, s: vec2<f32>, rope: vec2<f32>) {
  let a = s.x * rope.x - s.y * rope.y; let b = s.y * rope.x + s.x * rope.y;
//#if KV_STAGE
  y[p.y_off + row] = a; y[p.y_off + row + 1u] = b;
//#else
  let o = p.past * p.kv_rows + row - p.q_rows;
  if (row < p.q_rows) {
    y[p.y_off + row] = a; y[p.y_off + row + 1u] = b;
  } else if (row < p.q_rows + p.kv_rows) {
//#if KV_F16
    kst[o / 2u] = pack2x16float(vec2<f32>(a, b));
//#else
    kst[o] = bitcast<u32>(a); kst[o + 1u] = bitcast<u32>(b);
//#endif
  } else {
//#if KV_F16
    vst[(o - p.kv_rows) / 2u] = pack2x16float(vec2<f32>(a, b));
//#else
    vst[o - p.kv_rows] = bitcast<u32>(a); vst[o - p.kv_rows + 1u] = bitcast<u32>(b);
//#endif
  }
//#endif
}
//#endif

// The sums of item i to where they go; one thread of the team.
fn finish(i: u32) {
  for (var r = 0u; r < R * MB; r++) { tot[r] *= p.factor; }
//#if QKV
  for (var r = 0u; r < R; r += 2u) { if (i * R + r < p.n) { put_pair(i * R + r, vec2<f32>(tot[r], tot[r + 1u]) + pre_bias[r / 2u], pre_rope[r / 2u]); } }
//#else
//#if SWIGLU
  for (var r = 0u; r < R / 2u; r++) {
    let row = i * (R / 2u) + r; let g = tot[r];
    if (row < p.n) { y[p.y_off + p.row0 + row] = g / (1.0 + exp(-g)) * tot[R / 2u + r]; }
  }
//#else
  for (var m = 0u; m < MB; m++) {
    for (var r = 0u; r < R; r++) {
      let row = i * R + r; var s = tot[m * R + r];
      if (row < p.n) {
        let at = p.row0 + row;
//#if BIAS
        s += vecw[p.bias_off + at / 4u][at & 3u];
//#endif
        y[p.y_off + m * p.y_stride + at] = s;
      }
    }
  }
//#endif
//#endif
}

@compute @workgroup_size(WG)
//#if SUBGROUP
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32,
        @builtin(subgroup_id) sid: u32, @builtin(num_subgroups) nsg: u32, @builtin(subgroup_size) sgs: u32, @builtin(subgroup_invocation_id) lane: u32) {
  SID = sid; LANE = lane; NSG = nsg; TEAM = sgs;
//#else
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  SID = t / 32u; LANE = t % 32u; NSG = WG / 32u; TEAM = 32u;
//#endif
  let g0 = wid.x + wid.y * nwg.x; let ng = nwg.x * nwg.y;
//#if SWIGLU
  let items = (p.n + R / 2u - 1u) / (R / 2u);
//#else
  let items = (p.n + R - 1u) / R;
//#endif
//#if !X_GLOBAL
  // The first weights are on their way while the prologue waits for x.
  fetch_first(SID * ng + g0);
  prologue(t, g0 == 0u);
//#endif
//#if SUBGROUP
  for (var i = SID * ng + g0; i < items; i += NSG * ng) {
//#if QKV
    prepare(i);
//#endif
    rows(i);
    for (var r = 0u; r < R * MB; r++) { tot[r] = subgroupAdd(acc[r]); }
    if (LANE == 0u) { finish(i); }
  }
//#else
  for (var base = 0u; base < items; base += NSG * ng) {
    let i = base + SID * ng + g0;
    if (i < items) { rows(i); }
    for (var m = 0u; m < MB; m++) {
      for (var r = 0u; r < R; r++) { red[r * WG + t] = acc[m * R + r]; }
      workgroupBarrier();
      var s = 0.0;
      if (t < NSG * R) { for (var e = 0u; e < 32u; e++) { s += red[(t % R) * WG + (t / R) * 32u + ((e + t) & 31u)]; } }
      workgroupBarrier();
      if (t < NSG * R) { red[t] = s; }
      workgroupBarrier();
      if (t < NSG) { for (var r = 0u; r < R; r++) { tot[m * R + r] = red[t * R + r]; } }
      workgroupBarrier();
    }
    // Thread t finishes the item of team t.
    let it = base + t * ng + g0;
    if (t < NSG && it < items) {
//#if QKV
      prepare(it);
//#endif
      finish(it);
    }
  }
//#endif
}
