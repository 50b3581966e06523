//! NEON with the dot product extension, 16 products of signed bytes in one instruction, and with the matrix extension,
//! 32 products: two rows of `x` times two of weights, eight steps each.
//!
//! The intrinsics of `sdot` and `smmla` are not stable, so they are inline assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{DotKernel, Dots};

/// Proof that the machine has the features of [`enter`], or those of [`enter_i8mm`].
#[derive(Clone, Copy)]
pub(super) struct Neon<const I8MM: bool>(());

/// Runs a kernel with the features enabled.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn enter<K: DotKernel>(kernel: K) {
    kernel.run(Neon::<false>(()))
}

/// Runs a kernel with the features enabled.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn enter_i8mm<K: DotKernel>(kernel: K) {
    kernel.run(Neon::<true>(()))
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

/// The lower halves of two vectors, or with `upper` 1 their upper halves.
#[inline(always)]
fn halves(a: int32x4_t, b: int32x4_t, upper: usize) -> int32x4_t {
    // SAFETY: NEON is part of every aarch64 that this is compiled for.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
        vreinterpretq_s32_s64(if upper == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) })
    }
}

/// `acc + x · wᵀ`, both of two rows of eight signed bytes.
///
/// # Safety
/// The machine has i8mm.
#[inline(always)]
unsafe fn matrix(mut acc: int32x4_t, x: int32x4_t, w: uint8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {acc:v}.4s, {x:v}.16b, {w:v}.16b",
            acc = inout(vreg) acc,
            x = in(vreg) x,
            w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

impl<const I8MM: bool> Dots for Neon<I8MM> {
    type I = [int32x4_t; 4];
    type F = [float32x4_t; 4];
    type Q = [uint8x16_t; 4];
    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const PAIRS: bool = I8MM;
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
    unsafe fn dot16(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            let x = vreinterpretq_s16_s32(vdupq_n_s32(x.read_unaligned()));
            four!(|I| {
                let w = vreinterpretq_s16_u8(w[I]);
                let low = vmull_s16(vget_low_s16(w), vget_low_s16(x));
                vaddq_s32(acc[I], vpaddq_s32(low, vmull_high_s16(w, x)))
            })
        }
    }
    #[inline(always)]
    fn join(self, [a, b]: [Self::I; 2]) -> [Self::I; 2] {
        if !I8MM {
            return [a, b];
        }
        // Lanes of a pair: two sums of the first row of x, then two of the second.
        [
            [halves(a[0], b[0], 0), halves(a[0], b[0], 1), halves(a[1], b[1], 0), halves(a[1], b[1], 1)],
            [halves(a[2], b[2], 0), halves(a[2], b[2], 1), halves(a[3], b[3], 0), halves(a[3], b[3], 1)],
        ]
    }
    #[inline(always)]
    fn split(self, [a, b]: [Self::I; 2]) -> [Self::I; 2] {
        if !I8MM {
            return [a, b];
        }
        [
            [halves(a[0], a[1], 0), halves(a[2], a[3], 0), halves(b[0], b[1], 0), halves(b[2], b[3], 0)],
            [halves(a[0], a[1], 1), halves(a[2], a[3], 1), halves(b[0], b[1], 1), halves(b[2], b[3], 1)],
        ]
    }
    #[inline(always)]
    unsafe fn dot_pair(self, acc: [Self::I; 2], w: *const u8, x: [*const i32; 2]) -> [Self::I; 2] {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            if !I8MM {
                let [low, high] = [self.load_q(w), self.load_q(w.add(64))];
                let first = self.dot(self.dot(acc[0], low, x[0]), high, x[1]);
                let second = self.dot(self.dot(acc[1], low, x[0].add(1)), high, x[1].add(1));
                return [first, second];
            }
            // Eight steps of the first row, then of the second.
            let (low, high) = (vld1_s32(x[0]), vld1_s32(x[1]));
            let x = vcombine_s32(vzip1_s32(low, high), vzip2_s32(low, high));
            [
                four!(|I| matrix(acc[0][I], x, vld1q_u8(w.add(16 * I)))),
                four!(|I| matrix(acc[1][I], x, vld1q_u8(w.add(64 + 16 * I)))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_eight(self, p: *mut u8, q: [Self::Q; 2]) {
        // SAFETY: `self` proves the features; the caller promises the memory.
        unsafe {
            if !I8MM {
                self.store_q(p, q[0]);
                self.store_q(p.add(64), q[1]);
                return;
            }
            for i in 0..4 {
                let (low, high) = (vreinterpretq_u32_u8(q[0][i]), vreinterpretq_u32_u8(q[1][i]));
                vst1q_u8(p.add(32 * i), vreinterpretq_u8_u32(vzip1q_u32(low, high)));
                vst1q_u8(p.add(32 * i + 16), vreinterpretq_u8_u32(vzip2q_u32(low, high)));
            }
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
        unsafe { asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags)) }
    }
}
