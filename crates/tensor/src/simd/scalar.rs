//! One lane of plain Rust.

use half::{bf16, f16};

use super::{Element, Kernel, Simd, scale2_scalar};

/// The scalar instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type V = f32;
    const WIDTH: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> f32 {
        if n == 0 {
            return 0.0;
        }
        // SAFETY: the caller's promise.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: f32) {
        // SAFETY: the caller's promise.
        unsafe { p.write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize, v: f32) {
        if n != 0 {
            // SAFETY: the caller's promise.
            unsafe { p.write_unaligned(v) }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { p.read_unaligned() }.widen()
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { p.read_unaligned() }.widen()
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> f32 {
        // SAFETY: the caller's promise.
        f32::from(unsafe { *p })
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (f32, f32) {
        // SAFETY: the caller's promise.
        let byte = unsafe { *p };
        (f32::from(byte & 15), f32::from(byte >> 4))
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: f32) {
        // SAFETY: the caller's promise.
        unsafe { p.write(v as i8) };
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        // Without the instruction, `f32::mul_add` is a slow library call; two roundings are accurate enough here.
        a * b + c
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn sqrt(self, a: f32) -> f32 {
        a.sqrt()
    }
    #[inline(always)]
    fn round(self, a: f32) -> f32 {
        a.round_ties_even()
    }
    #[inline(always)]
    fn scale2(self, a: f32, n: f32) -> f32 {
        scale2_scalar(a, n)
    }
    #[inline(always)]
    fn select_gt(self, a: f32, b: f32, x: f32, y: f32) -> f32 {
        if a > b { x } else { y }
    }
    #[inline(always)]
    fn reduce_add(self, a: f32) -> f32 {
        a
    }
    #[inline(always)]
    fn reduce_add_each(self, a: &[f32]) -> f32 {
        a[0]
    }
    #[inline(always)]
    fn reduce_max(self, a: f32) -> f32 {
        a
    }
    #[inline(always)]
    unsafe fn transpose<E: Element>(self, src: *const E, _: usize, dst: *mut f32, _: usize) {
        // SAFETY: the caller's promise.
        unsafe { dst.write_unaligned(src.read_unaligned().widen()) }
    }
    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_near(self, _: *const u8) {}
}
