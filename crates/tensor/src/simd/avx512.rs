//! Sixteen lanes: AVX-512 F, BW, DQ, VL.

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Element, Kernel, Simd};
use crate::ops::pairs;

/// Proof that the machine has the features of [`enter`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    // A shift by 16 is within u32, so n == 16 gives all lanes.
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// As [`enter`], one copy for all callers.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn call<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// Three steps of a row for both vectors of a panel: steps `$p` of the row at `$at`, which begin and end at the given bytes.
macro_rules! row {
    ($sum:literal, $fma:literal, [$p0:literal $p1:literal $p2:literal], $at:literal, $s0:literal, $s1:literal) => {
        concat!(
            $sum,
            " zmm30, zmm26, dword ptr [",
            $at,
            " + ",
            $p0,
            "]{{1to16}}\n",
            $sum,
            " zmm31, zmm24, dword ptr [",
            $at,
            " + ",
            $p1,
            "]{{1to16}}\n",
            "vfmadd231ps {",
            $s0,
            "}, zmm28, dword ptr [",
            $at,
            " + ",
            $p2,
            "]{{1to16}}\n",
            $fma,
            " {",
            $s0,
            "}, zmm30, zmm31\n",
            $sum,
            " zmm30, zmm27, dword ptr [",
            $at,
            " + ",
            $p0,
            "]{{1to16}}\n",
            $sum,
            " zmm31, zmm25, dword ptr [",
            $at,
            " + ",
            $p1,
            "]{{1to16}}\n",
            "vfmadd231ps {",
            $s1,
            "}, zmm29, dword ptr [",
            $at,
            " + ",
            $p2,
            "]{{1to16}}\n",
            $fma,
            " {",
            $s1,
            "}, zmm30, zmm31\n",
        )
    };
}

/// The rows of [`six_steps`]: each row's number, its address and the names of its sums.
macro_rules! rows {
    ($sums:ident, $a:ident, $stride:expr, $b:ident, $groups:ident, $soon:ident, [$($i:literal $at:literal $s0:ident $n0:literal $s1:ident $n1:literal),*]) => {
        asm!(
            "2:",
            "vmovups zmm24, zmmword ptr [{b}]",
            "vmovups zmm25, zmmword ptr [{b} + 64]",
            "vmovups zmm26, zmmword ptr [{b} + 128]",
            "vmovups zmm27, zmmword ptr [{b} + 192]",
            "vmovups zmm28, zmmword ptr [{b} + 256]",
            "vmovups zmm29, zmmword ptr [{b} + 320]",
            "prefetcht1 [{soon}]",
            $(row!("vaddps", "vfmadd231ps", [0 4 8], $at, $n0, $n1),)*
            "prefetcht1 [{soon} + 64]",
            "vmovups zmm24, zmmword ptr [{b} + 384]",
            "vmovups zmm25, zmmword ptr [{b} + 448]",
            "vmovups zmm26, zmmword ptr [{b} + 512]",
            "vmovups zmm27, zmmword ptr [{b} + 576]",
            "vmovups zmm28, zmmword ptr [{b} + 640]",
            "vmovups zmm29, zmmword ptr [{b} + 704]",
            "prefetcht1 [{soon} + 128]",
            $(row!("vsubps", "vfnmadd231ps", [12 16 20], $at, $n0, $n1),)*
            "prefetcht1 [{soon} + 192]",
            "add {a0}, 24",
            "add {a3}, 24",
            "add {a6}, 24",
            "add {a9}, 24",
            "add {b}, 768",
            "add {soon}, 256",
            "dec {groups}",
            "jnz 2b",
            "/* {r} */",
            b = inout(reg) $b => _,
            a0 = inout(reg) $a => _,
            a3 = inout(reg) $a.wrapping_add(3 * $stride) => _,
            a6 = inout(reg) $a.wrapping_add(6 * $stride) => _,
            a9 = inout(reg) $a.wrapping_add(9 * $stride) => _,
            soon = inout(reg) $soon => _,
            groups = inout(reg) $groups => _,
            r = in(reg) 4 * $stride,
            $($s0 = inout(zmm_reg) $sums[$i][0], $s1 = inout(zmm_reg) $sums[$i][1],)*
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(readonly, nostack)
        )
    };
}

/// Calls [`rows`] for the first so many rows.
macro_rules! first_rows {
    ($macro:ident, $mr:expr, $args:tt, $otherwise:expr) => {
        first_rows!(@ $macro, $mr, $args, $otherwise, [
            0 "{a0}" s00 "s00" s01 "s01", 1 "{a0} + {r}" s10 "s10" s11 "s11", 2 "{a0} + 2*{r}" s20 "s20" s21 "s21",
            3 "{a3}" s30 "s30" s31 "s31", 4 "{a3} + {r}" s40 "s40" s41 "s41", 5 "{a3} + 2*{r}" s50 "s50" s51 "s51",
            6 "{a6}" s60 "s60" s61 "s61", 7 "{a6} + {r}" s70 "s70" s71 "s71"],
            [8 "{a6} + 2*{r}" s80 "s80" s81 "s81"], [9 "{a9}" s90 "s90" s91 "s91"],
            [10 "{a9} + {r}" s100 "s100" s101 "s101"], [11 "{a9} + 2*{r}" s110 "s110" s111 "s111"])
    };
    (@ $macro:ident, $mr:expr, ($($args:tt)*), $otherwise:expr,
        [$($r:tt)*], [$($r9:tt)*], [$($r10:tt)*], [$($r11:tt)*], [$($r12:tt)*]) => {
        match $mr {
            8 => $macro!($($args)*, [$($r)*]),
            9 => $macro!($($args)*, [$($r)*, $($r9)*]),
            10 => $macro!($($args)*, [$($r)*, $($r9)*, $($r10)*]),
            11 => $macro!($($args)*, [$($r)*, $($r9)*, $($r10)*, $($r11)*]),
            12 => $macro!($($args)*, [$($r)*, $($r9)*, $($r10)*, $($r11)*, $($r12)*]),
            _ => $otherwise,
        }
    };
}

/// [`Simd::six_steps`] for 8 to 12 rows. A broadcast that is part of an addition or a multiply-add takes no turn in their
/// units, as one of its own does; compilers make one of its own for both vectors.
///
/// # Safety
/// As for [`Simd::six_steps`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn six_steps<const MR: usize, const A_STRIDE: usize>(
    groups: usize,
    a: *const f32,
    b: *const f32,
    soon: *const u8,
    sums: &mut [[__m512; 2]; MR],
) {
    if groups == 0 {
        return;
    }
    // SAFETY: the caller promises the rows and the panel; nothing else is read, nothing is written, and the features are
    // those of this function.
    unsafe {
        first_rows!(
            rows,
            MR,
            (sums, a, A_STRIDE, b, groups, soon),
            pairs::six_steps(Avx512(()), groups, [a, b], A_STRIDE, sums)
        )
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDTH: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: `self` proves the features; masked lanes are not accessed.
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: __m512) {
        // SAFETY: `self` proves the features; the caller promises the memory, a whole cache line, and the fence.
        unsafe { _mm512_stream_ps(p, v) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: every x86-64 has the instruction.
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: __m512) {
        // SAFETY: `self` proves the features; masked lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m512, __m512) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let (bytes, mask) = (_mm_loadu_si128(p.cast()), _mm_set1_epi8(15));
            let low = _mm_and_si128(bytes, mask);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
            let widen = |x| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
            (widen(low), widen(high))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m512) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn reduce_add_each(self, a: &[__m512]) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            // Each step adds halves of two vectors, so that both go on in one: first within quarters, then across.
            let quarter = |a: __m512, b: __m512, c: __m512, d: __m512| {
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                // Lanes of each quarter: the sums of a's, b's, c's and d's lanes in it.
                _mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
                )
            };
            let half = |x: __m512, y: __m512| {
                let even = _mm512_shuffle_f32x4::<0x88>(x, y);
                _mm512_add_ps(even, _mm512_shuffle_f32x4::<0xdd>(x, y))
            };
            let (x, y) = (quarter(a[0], a[1], a[2], a[3]), quarter(a[4], a[5], a[6], a[7]));
            let (z, w) = (quarter(a[8], a[9], a[10], a[11]), quarter(a[12], a[13], a[14], a[15]));
            half(half(x, y), half(z, w))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    unsafe fn transpose<E: Element>(
        self,
        src: *const E,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        let mut rows = [self.splat(0.0); 16];
        for r in 0..16 {
            // SAFETY: the caller promises sixteen elements in each of sixteen rows.
            rows[r] = unsafe { E::load(self, src.add(r * src_stride)) };
        }
        // SAFETY: `self` proves the features.
        let columns = unsafe { transpose16(rows) };
        for c in 0..16 {
            // SAFETY: the caller promises sixteen floats at each of sixteen destinations.
            unsafe { self.store(dst.add(c * dst_stride), columns[c]) };
        }
    }

    #[inline(always)]
    unsafe fn transpose_bf16(self, src: *const bf16, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        let mut rows = [self.splat(0.0); 16];
        for r in 0..16 {
            // SAFETY: the caller promises 32 values, 16 lanes of two, in each of sixteen rows.
            rows[r] = unsafe { self.load(src.add(r * src_stride).cast()) };
        }
        // SAFETY: `self` proves the features; the caller promises 16 floats at each of 32 destinations.
        unsafe {
            let pairs = transpose16(rows);
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            for c in 0..16 {
                let pair = _mm512_castps_si512(pairs[c]);
                let (even, odd) = (_mm512_slli_epi32::<16>(pair), _mm512_and_si512(pair, upper));
                self.store(dst.add(2 * c * dst_stride), _mm512_castsi512_ps(even));
                self.store(dst.add((2 * c + 1) * dst_stride), _mm512_castsi512_ps(odd));
            }
        }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { call(kernel) }
    }

    #[inline(always)]
    unsafe fn six_steps<const MR: usize, const A_STRIDE: usize>(
        self,
        groups: usize,
        a: *const f32,
        b: *const f32,
        soon: *const u8,
        sums: &mut [[__m512; 2]; MR],
    ) {
        // SAFETY: `self` proves the features; the caller promises the operands.
        unsafe { six_steps::<MR, A_STRIDE>(groups, a, b, soon, sums) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Rows to columns: pairs of lanes, then quarters, then halves of the vectors change places.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn transpose16(r: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: the caller promises the features.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut a, mut b, mut c, mut out) = ([zero; 16], [zero; 16], [zero; 16], [zero; 16]);
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // b[4g + j] holds, in its 128-bit lane l, column 4l + j of rows 4g..4g+4.
        for g in 0..4 {
            for j in 0..2 {
                let lo = _mm512_castps_pd(a[4 * g + j]);
                let hi = _mm512_castps_pd(a[4 * g + 2 + j]);
                b[4 * g + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
                b[4 * g + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
            }
        }
        // c[j]: lanes 0, 2 of row groups 0, 1; c[4 + j]: lanes 1, 3; c[8..]: the same of groups 2, 3.
        for j in 0..4 {
            c[j] = _mm512_shuffle_f32x4::<0x88>(b[j], b[4 + j]);
            c[4 + j] = _mm512_shuffle_f32x4::<0xdd>(b[j], b[4 + j]);
            c[8 + j] = _mm512_shuffle_f32x4::<0x88>(b[8 + j], b[12 + j]);
            c[12 + j] = _mm512_shuffle_f32x4::<0xdd>(b[8 + j], b[12 + j]);
        }
        for j in 0..4 {
            out[j] = _mm512_shuffle_f32x4::<0x88>(c[j], c[8 + j]);
            out[4 + j] = _mm512_shuffle_f32x4::<0x88>(c[4 + j], c[12 + j]);
            out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(c[j], c[8 + j]);
            out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(c[4 + j], c[12 + j]);
        }
        out
    }
}
