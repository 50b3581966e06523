//! Four lanes: NEON.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::{Element, Kernel, Simd};

/// Proof that the machine has NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// Runs a kernel with the feature enabled.
#[target_feature(enable = "neon")]
pub(super) fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

/// As [`enter`], one copy for all callers.
#[inline(never)]
#[target_feature(enable = "neon")]
fn call<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

impl Simd for Neon {
    type V = float32x4_t;
    const WIDTH: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> float32x4_t {
        let mut lanes = [0f32; 4];
        for i in 0..n.min(4) {
            // SAFETY: `i < n`.
            lanes[i] = unsafe { p.add(i).read_unaligned() };
        }
        // SAFETY: four floats.
        unsafe { self.load(lanes.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: float32x4_t) {
        let mut lanes = [0f32; 4];
        // SAFETY: four floats.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for i in 0..n.min(4) {
            // SAFETY: `i < n`.
            unsafe { p.add(i).write_unaligned(lanes[i]) };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> float32x4_t {
        // The conversion intrinsic is not stable; exponent and mantissa are moved into place instead, and the
        // multiplication by 2^112 corrects the exponent's bias, subnormal numbers included.
        // SAFETY: `self` proves the feature; the caller promises the memory.
        unsafe {
            let bits = vmovl_u16(vld1_u16(p.cast()));
            let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
            let magnitude = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
            let scaled =
                vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits((127 + 112) << 23)));
            // Infinity and NaN have the largest exponent, which the multiplication does not reach.
            let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00 << 13));
            let exponent = vandq_u32(special, vdupq_n_u32(0xff << 23));
            vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), exponent), sign))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> float32x4_t {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (float32x4_t, float32x4_t) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            let widen = |x| vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))));
            (widen(vand_u8(bytes, vdup_n_u8(15))), widen(vshr_n_u8::<4>(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: float32x4_t) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let words = vmovn_s32(vcvtnq_s32_f32(v));
            let bytes = vmovn_s16(vcombine_s16(words, words));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(bytes)));
        }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vsqrtq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn scale2(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the feature.
        unsafe {
            // Two steps, so that neither factor leaves the range of normal numbers.
            let n = vcvtnq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            let bias = vdupq_n_s32(127);
            let first = vshlq_n_s32::<23>(vaddq_s32(half, bias));
            let second = vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias));
            vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second))
        }
    }
    #[inline(always)]
    fn select_gt(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vbslq_f32(vcgtq_f32(a, b), x, y) }
    }
    #[inline(always)]
    fn reduce_add(self, a: float32x4_t) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { vaddvq_f32(a) }
    }
    #[inline(always)]
    fn reduce_add_each(self, a: &[float32x4_t]) -> float32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])) }
    }
    #[inline(always)]
    fn reduce_max(self, a: float32x4_t) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { vmaxvq_f32(a) }
    }

    #[inline(always)]
    unsafe fn transpose<E: Element>(
        self,
        src: *const E,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller promises four elements in each of four rows and four floats at each destination.
        unsafe {
            let r0 = E::load(self, src);
            let r1 = E::load(self, src.add(src_stride));
            let r2 = E::load(self, src.add(2 * src_stride));
            let r3 = E::load(self, src.add(3 * src_stride));
            let (a, b) = (vtrn1q_f32(r0, r1), vtrn2q_f32(r0, r1));
            let (c, d) = (vtrn1q_f32(r2, r3), vtrn2q_f32(r2, r3));
            self.store(dst, vcombine_f32(vget_low_f32(a), vget_low_f32(c)));
            self.store(dst.add(dst_stride), vcombine_f32(vget_low_f32(b), vget_low_f32(d)));
            self.store(dst.add(2 * dst_stride), vcombine_f32(vget_high_f32(a), vget_high_f32(c)));
            self.store(dst.add(3 * dst_stride), vcombine_f32(vget_high_f32(b), vget_high_f32(d)));
        }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { call(kernel) }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {
        // The prefetch intrinsic is not stable on aarch64; its hardware prefetchers follow the streams.
    }

    #[inline(always)]
    fn prefetch_near(self, _: *const u8) {}
}
