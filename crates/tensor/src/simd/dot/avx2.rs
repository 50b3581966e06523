//! AVX2: products of an unsigned and a signed byte, added in pairs to i16 and then to i32.
//!
//! The pairs saturate, so codes stay below 128: two products are then at most `2 * 127 * 127 < 2^15`. Codes of eight
//! bits are taken as signed, `code - 128`; their sign goes to the other factor, and `2 * 128 * 127 < 2^15` too.

use std::arch::x86_64::*;

use super::{DotKernel, Dots};

/// Proof that the machine has the features of [`enter`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn enter<K: DotKernel>(kernel: K) {
    kernel.run(Avx2(()))
}

macro_rules! shift {
    ($by:expr, $shift:ident, $q:expr) => {
        match $by {
            1 => $shift::<1>($q),
            2 => $shift::<2>($q),
            3 => $shift::<3>($q),
            4 => $shift::<4>($q),
            5 => $shift::<5>($q),
            6 => $shift::<6>($q),
            7 => $shift::<7>($q),
            _ => $q,
        }
    };
}

impl Dots for Avx2 {
    type I = [__m256i; 2];
    type F = [__m256; 2];
    type Q = [__m256i; 2];
    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const BIAS8: i32 = 128;

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    unsafe fn dot(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let x = _mm256_set1_epi32(x.read_unaligned());
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_maddubs_epi16(_mm256_abs_epi8(w[0]), _mm256_sign_epi8(x, w[0]));
            let high = _mm256_maddubs_epi16(_mm256_abs_epi8(w[1]), _mm256_sign_epi8(x, w[1]));
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(low, ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(high, ones)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot16(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let x = _mm256_set1_epi32(x.read_unaligned());
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(w[0], x)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(w[1], x)),
            ]
        }
    }
    #[inline(always)]
    fn to_f(self, a: Self::I) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }
    #[inline(always)]
    unsafe fn load_q(self, p: *const u8) -> Self::Q {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store_q(self, p: *mut u8, q: Self::Q) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            _mm256_storeu_si256(p.cast(), q[0]);
            _mm256_storeu_si256(p.add(32).cast(), q[1]);
        }
    }
    #[inline(always)]
    fn shr(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe {
            let mask = _mm256_set1_epi8(mask as i8);
            [
                _mm256_and_si256(shift!(n, _mm256_srli_epi16, q[0]), mask),
                _mm256_and_si256(shift!(n, _mm256_srli_epi16, q[1]), mask),
            ]
        }
    }
    #[inline(always)]
    fn shl(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe {
            let mask = _mm256_set1_epi8(mask as i8);
            [
                _mm256_and_si256(shift!(n, _mm256_slli_epi16, q[0]), mask),
                _mm256_and_si256(shift!(n, _mm256_slli_epi16, q[1]), mask),
            ]
        }
    }
    #[inline(always)]
    fn or(self, a: Self::Q, b: Self::Q) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn bias8(self, q: Self::Q) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe {
            let top = _mm256_set1_epi8(-128);
            [_mm256_xor_si256(q[0], top), _mm256_xor_si256(q[1], top)]
        }
    }
    #[inline(always)]
    fn table(self, q: Self::Q, table: &[u8; 16]) -> Self::Q {
        // SAFETY: `self` proves the features; the table has sixteen bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, q[0]), _mm256_shuffle_epi8(table, q[1])]
        }
    }
    #[inline(always)]
    fn splat_f(self, x: f32) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn load_f(self, p: *const f32) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store_f(self, p: *mut f32, v: Self::F) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(16).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            ]
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
