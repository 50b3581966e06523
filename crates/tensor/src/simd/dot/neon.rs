//! NEON with the dot product extension: 16 products of signed bytes in one instruction.
//!
//! The intrinsics of `sdot` are not stable, so it is inline assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{DotKernel, Dots};

/// Proof that the machine has the features of [`enter`].
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn enter<K: DotKernel>(kernel: K) {
    kernel.run(Neon(()))
}

/// Not a closure: what is called from one need not be inlined where the target features are.
macro_rules! four {
    (|$i:ident| $e:expr) => {{
        macro_rules! at {
            ($n:literal) => {{
                const $i: usize = $n;
                $e
            }};
        }
        [at!(0), at!(1), at!(2), at!(3)]
    }};
}

impl Dots for Neon {
    type I = [int32x4_t; 4];
    type F = [float32x4_t; 4];
    type Q = [uint8x16_t; 4];
    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const BIAS8: i32 = 128;

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        // SAFETY: `self` proves the features.
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    unsafe fn dot(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let x = vdupq_n_s32(x.read_unaligned());
            four!(|I| {
                let mut sum = acc[I];
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                    sum = inout(vreg) sum,
                    w = in(vreg) w[I],
                    x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags)
                );
                sum
            })
        }
    }
    #[inline(always)]
    fn to_f(self, a: Self::I) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { four!(|I| vcvtq_f32_s32(a[I])) }
    }
    #[inline(always)]
    unsafe fn load_q(self, p: *const u8) -> Self::Q {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { four!(|I| vld1q_u8(p.add(16 * I))) }
    }
    #[inline(always)]
    unsafe fn store_q(self, p: *mut u8, q: Self::Q) {
        for i in 0..4 {
            // SAFETY: `self` proves the features; the caller promises the memory.
            unsafe { vst1q_u8(p.add(16 * i), q[i]) };
        }
    }
    #[inline(always)]
    fn shr(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe {
            let (by, mask) = (vdupq_n_s8(-(n as i8)), vdupq_n_u8(mask));
            four!(|I| vandq_u8(vshlq_u8(q[I], by), mask))
        }
    }
    #[inline(always)]
    fn shl(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe {
            let (by, mask) = (vdupq_n_s8(n as i8), vdupq_n_u8(mask));
            four!(|I| vandq_u8(vshlq_u8(q[I], by), mask))
        }
    }
    #[inline(always)]
    fn or(self, a: Self::Q, b: Self::Q) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe { four!(|I| vorrq_u8(a[I], b[I])) }
    }
    #[inline(always)]
    fn bias8(self, q: Self::Q) -> Self::Q {
        // SAFETY: `self` proves the features.
        unsafe { four!(|I| veorq_u8(q[I], vdupq_n_u8(128))) }
    }
    #[inline(always)]
    fn table(self, q: Self::Q, table: &[u8; 16]) -> Self::Q {
        // SAFETY: `self` proves the features; the table has sixteen bytes.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            four!(|I| vqtbl1q_u8(table, q[I]))
        }
    }
    #[inline(always)]
    fn splat_f(self, x: f32) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { four!(|I| vfmaq_f32(c[I], a[I], b[I])) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves the features.
        unsafe { four!(|I| vmulq_f32(a[I], b[I])) }
    }
    #[inline(always)]
    unsafe fn load_f(self, p: *const f32) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { four!(|I| vld1q_f32(p.add(4 * I))) }
    }
    #[inline(always)]
    unsafe fn store_f(self, p: *mut f32, v: Self::F) {
        for i in 0..4 {
            // SAFETY: `self` proves the features; the caller promises the memory.
            unsafe { vst1q_f32(p.add(4 * i), v[i]) };
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe { four!(|I| vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p.add(8 * I))))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            four!(|I| vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p.add(8 * I))))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let v = vreinterpretq_s8_u8(vld1q_u8(p));
            let (a, b) = (vmovl_s8(vget_low_s8(v)), vmovl_s8(vget_high_s8(v)));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(a))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(b))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::F {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let v = vld1q_u8(p);
            let (a, b) = (vmovl_u8(vget_low_u8(v)), vmovl_u8(vget_high_u8(v)));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(a))),
                vcvtq_f32_u32(vmovl_u16(vget_high_u16(a))),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(b))),
                vcvtq_f32_u32(vmovl_u16(vget_high_u16(b))),
            ]
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags)) }
    }
}
