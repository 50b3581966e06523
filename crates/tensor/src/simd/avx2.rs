//! Eight lanes: AVX2, FMA, F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Element, Kernel, Simd};

/// Proof that the machine has the features of [`enter`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// Lanes below `n` have all bits set.
#[inline(always)]
fn mask(n: usize) -> __m256i {
    const BITS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: at most 8 is subtracted from 8, so eight values remain; only called with the features.
    unsafe { _mm256_loadu_si256(BITS.as_ptr().add(8 - n.min(8)).cast()) }
}

/// As [`enter`], one copy for all callers.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn call<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

impl Simd for Avx2 {
    type V = __m256;
    const WIDTH: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m256 {
        // SAFETY: `self` proves the features; masked lanes are not accessed.
        unsafe { _mm256_maskload_ps(p, mask(n)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: __m256) {
        // SAFETY: `self` proves the features; masked lanes are not accessed.
        unsafe { _mm256_maskstore_ps(p, mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m256, __m256) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let (bytes, mask) = (_mm_loadl_epi64(p.cast()), _mm_set1_epi8(15));
            let low = _mm_and_si128(bytes, mask);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
            let widen = |x| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
            (widen(low), widen(high))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m256) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let lanes = _mm256_cvtps_epi32(v);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(words, words));
        }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe {
            // Two steps, so that neither factor leaves the range of normal numbers.
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
        }
    }
    #[inline(always)]
    fn select_gt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn reduce_add_each(self, a: &[__m256]) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe {
            // Sums of neighbours twice: each 128-bit half has four sums of its own four lanes.
            let low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
            let high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
            let even = _mm256_permute2f128_ps::<0x20>(low, high);
            _mm256_add_ps(even, _mm256_permute2f128_ps::<0x31>(low, high))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    unsafe fn transpose<E: Element>(
        self,
        src: *const E,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        let mut rows = [self.splat(0.0); 8];
        for r in 0..8 {
            // SAFETY: the caller promises eight elements in each of eight rows.
            rows[r] = unsafe { E::load(self, src.add(r * src_stride)) };
        }
        // SAFETY: `self` proves the features.
        let columns = unsafe { transpose8(rows) };
        for c in 0..8 {
            // SAFETY: the caller promises eight floats at each of eight destinations.
            unsafe { self.store(dst.add(c * dst_stride), columns[c]) };
        }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { call(kernel) }
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

/// Rows to columns.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller promises the features.
    unsafe {
        let zero = _mm256_setzero_ps();
        let (mut a, mut b, mut out) = ([zero; 8], [zero; 8], [zero; 8]);
        for i in 0..4 {
            a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // b[4g + j] holds, in its 128-bit lane l, column 4l + j of rows 4g..4g+4.
        for g in 0..2 {
            for j in 0..2 {
                let lo = _mm256_castps_pd(a[4 * g + j]);
                let hi = _mm256_castps_pd(a[4 * g + 2 + j]);
                b[4 * g + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
                b[4 * g + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
            }
        }
        for j in 0..4 {
            out[j] = _mm256_permute2f128_ps::<0x20>(b[j], b[4 + j]);
            out[4 + j] = _mm256_permute2f128_ps::<0x31>(b[j], b[4 + j]);
        }
        out
    }
}
