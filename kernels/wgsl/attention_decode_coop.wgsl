// One token: part[h] = sum_j exp(s_j - m) v_j over this workgroup's 64 keys, s = scale * q[h] . k_j, with (m, sum): what
// flash_attention.wgsl gives with SPLIT and split = 64, for 16 query heads of one KV head as one 16-row matrix. head_dim 128.
// Eight subgroups of 32: scores are 16 keys x half the components each, the weighted sum 16 components each.
// Departs from the twin: q and the weights exp(s - m) <= 1 rounded to f16, f32 sums in another order.
// Needs group 16 and an f16 state (rows past `keys` are not read). Without SPLIT (keys <= 64) it writes o itself.
// Only where subgroups have 32 lanes in invocation order; no subgroup builtin here (a driver crashes on both).
enable f16;
enable wgpu_cooperative_matrix;
const WG = 256u;
const KEYS = 64u;
const D4 = 32u;
const LDK = 34u;    // row of K, V and q, vec4<f16>
const LDS = 68u;    // row of scores, f32
struct P {
  tokens: u32, group: u32, keys: u32, past: u32,
  split: u32, nsplit: u32, scale: f32, segs: u32,
  q_off: u32, q_stride: u32, k_off: u32, k_stride: u32, v_off: u32, v_stride: u32, o_off: u32, o_stride: u32,   // 4 values
}
@group(0) @binding(0) var<uniform> p: P;
@group(0) @binding(1) var<storage, read_write> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> kst: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> vst: array<vec4<f16>>;
//#if SPLIT
@group(0) @binding(4) var<storage, read_write> o: array<f32>;
@group(0) @binding(5) var<storage, read_write> ml: array<vec2<f32>>;
//#else
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
//#endif
alias H4 = vec4<f16>;
alias MA = coop_mat16x16<f16, A>;
alias MB = coop_mat16x16<f16, B>;
alias MC = coop_mat16x16<f32, C>;
var<workgroup> ksh: array<H4, KEYS * LDK>;       // K, then V
var<workgroup> qsh: array<H4, 16u * LDK>;        // q, then the weights
var<workgroup> ssh: array<f32, 2u * 16u * LDS>;  // scores of each half of the components; then the result
var<workgroup> red: array<vec2<f32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let kvh = wid.y; let j0 = wid.x * KEYS; let sg = t / 32u;
  // Everything from memory is asked for at once.
  var kr: array<H4, 8>; var vr: array<H4, 8>; var qr: array<vec4<f32>, 2>;
  for (var i = 0u; i < 8u; i++) {
    let j = min(j0 + sg + 8u * i, p.keys - 1u); let d = kvh * D4 + t % 32u;
    kr[i] = kst[p.k_off + j * p.k_stride + d]; vr[i] = vst[p.v_off + j * p.v_stride + d];
  }
  for (var i = 0u; i < 2u; i++) { qr[i] = q[p.q_off + (kvh * 16u + sg + 8u * i) * D4 + t % 32u]; }
  for (var i = 0u; i < 8u; i++) { ksh[(sg + 8u * i) * LDK + t % 32u] = kr[i]; }
  for (var i = 0u; i < 2u; i++) { qsh[(sg + 8u * i) * LDK + t % 32u] = H4(qr[i] * p.scale); }
  workgroupBarrier();
  let lk = LDK; let ls = LDS;
  let ka = (sg & 3u) * 16u * LDK + (sg >> 2u) * 16u; let qa = (sg >> 2u) * 16u;
  let sa = (sg >> 2u) * 16u * LDS + (sg & 3u) * 16u;
  var s = MC();
  s = coopMultiplyAdd(coopLoadT<MA>(&qsh[qa + 0u], lk), coopLoad<MB>(&ksh[ka + 0u], lk), s);
  s = coopMultiplyAdd(coopLoadT<MA>(&qsh[qa + 4u], lk), coopLoad<MB>(&ksh[ka + 4u], lk), s);
  s = coopMultiplyAdd(coopLoadT<MA>(&qsh[qa + 8u], lk), coopLoad<MB>(&ksh[ka + 8u], lk), s);
  s = coopMultiplyAdd(coopLoadT<MA>(&qsh[qa + 12u], lk), coopLoad<MB>(&ksh[ka + 12u], lk), s);
  coopStoreT(s, &ssh[sa], ls);
  workgroupBarrier();
  // 16 threads a row, four keys each.
  let r = t / 16u; let c = (t % 16u) * 4u; let n = min(KEYS, p.keys - j0);
  var v: vec4<f32>;
  for (var e = 0u; e < 4u; e++) {
    let a = r * LDS + c + e;
    v[e] = select(-1e30, ssh[a] + ssh[16u * LDS + a], c + e < n);
  }
  var m = max(max(v.x, v.y), max(v.z, v.w));
  red[t].x = m;
  for (var i = 0u; i < 8u; i++) { ksh[(sg + 8u * i) * LDK + t % 32u] = vr[i]; }
  workgroupBarrier();
  for (var i = 0u; i < 16u; i++) { m = max(m, red[r * 16u + i].x); }
  var w: vec4<f32>;
  for (var e = 0u; e < 4u; e++) { w[e] = select(0.0, exp(v[e] - m), c + e < n); }
  qsh[r * LDK + t % 16u] = H4(w);
  red[t].y = w.x + w.y + w.z + w.w;
  workgroupBarrier();
  let va = sg * 4u; let oa = sg * 16u;
  var acc = MC();
  acc = coopMultiplyAdd(coopLoadT<MA>(&qsh[0u], lk), coopLoadT<MB>(&ksh[va + 0u * LDK], lk), acc);
  acc = coopMultiplyAdd(coopLoadT<MA>(&qsh[4u], lk), coopLoadT<MB>(&ksh[va + 16u * LDK], lk), acc);
  acc = coopMultiplyAdd(coopLoadT<MA>(&qsh[8u], lk), coopLoadT<MB>(&ksh[va + 32u * LDK], lk), acc);
  acc = coopMultiplyAdd(coopLoadT<MA>(&qsh[12u], lk), coopLoadT<MB>(&ksh[va + 48u * LDK], lk), acc);
//#if SPLIT
  let at = p.o_off * 4u + (kvh * 16u * p.nsplit + wid.x) * D4 * 4u + oa; let ld = p.nsplit * D4 * 4u;
  coopStoreT(acc, &o[at], ld);
  if (t < 16u) {
    var sum = 0.0; var top = -1e30;
    for (var i = 0u; i < 16u; i++) { let x = red[t * 16u + i]; sum += x.y; top = max(top, x.x); }
    ml[(kvh * 16u + t) * p.nsplit + wid.x] = vec2<f32>(top, sum);
  }
//#else
  // A row of 128 spans both halves' rooms: rows 132 apart.
  let lo = 132u;
  coopStoreT(acc, &ssh[oa], lo);
  workgroupBarrier();
  for (var i = t; i < 16u * D4; i += WG) {
    let row = i / D4; let a = row * 132u + (i % D4) * 4u;
    var sum = 0.0;
    for (var e = 0u; e < 16u; e++) { sum += red[row * 16u + e].y; }
    o[p.o_off + kvh * 16u * D4 + i] = vec4<f32>(ssh[a], ssh[a + 1u], ssh[a + 2u], ssh[a + 3u]) / sum;
  }
//#endif
}
