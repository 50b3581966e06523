//! AVX-512 with VNNI: 64 products of an unsigned and a signed byte in one instruction.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{DotKernel, Dots};

/// Proof that the machine has the features of [`enter`].
#[derive(Clone, Copy)]
pub(super) struct Vnni(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn enter<K: DotKernel>(kernel: K) {
    kernel.run(Vnni(()))
}

/// `_mm512_dpwssd_epi32` as it stands: unless they are tuned for a processor of which they know better, compilers make two
/// instructions of it, a product and a sum, which take a third more time in tiles.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
    let mut sum = acc;
    // SAFETY: registers only; the features are those of this function.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {w}, {x}",
            sum = inout(zmm_reg) sum,
            w = in(zmm_reg) w,
            x = in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// A shift by a number that is known once the loops around it are unrolled.
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

impl Dots for Vnni {
    type I = __m512i;
    type F = __m512;
    type Q = __m512i;
    const ROWS: usize = 6;
    const PANELS: usize = 4;
    const BIAS8: i32 = 0;

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn dot(self, acc: __m512i, w: __m512i, x: *const i32) -> __m512i {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn dot16(self, acc: __m512i, w: __m512i, x: *const i32) -> __m512i {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { dpwssd(acc, w, _mm512_set1_epi32(x.read_unaligned())) }
    }
    #[inline(always)]
    fn to_f(self, a: __m512i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn load_q(self, p: *const u8) -> __m512i {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_q(self, p: *mut u8, q: __m512i) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_storeu_si512(p.cast(), q) }
    }
    #[inline(always)]
    fn shr(self, q: __m512i, n: u32, mask: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_and_si512(shift!(n, _mm512_srli_epi16, q), _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn shl(self, q: __m512i, n: u32, mask: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_and_si512(shift!(n, _mm512_slli_epi16, q), _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn bias8(self, q: __m512i) -> __m512i {
        q
    }
    #[inline(always)]
    fn table(self, q: __m512i, table: &[u8; 16]) -> __m512i {
        // SAFETY: `self` proves the features; the table has sixteen bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, q)
        }
    }
    #[inline(always)]
    fn splat_f(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn load_f(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_f(self, p: *mut f32, v: __m512) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m512 {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
