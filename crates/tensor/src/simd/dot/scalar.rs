//! Plain Rust, any machine.

use half::f16;

use super::{Dots, LANES};

/// Most operations are calls: inlined into every kernel they would be most of the crate's code.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Scalar {
    #[inline(always)]
    fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
        std::array::from_fn(f)
    }
}

impl Dots for Scalar {
    type I = [i32; LANES];
    type F = [f32; LANES];
    type Q = [u8; 64];
    const ROWS: usize = 2;
    const PANELS: usize = 1;
    const BIAS8: i32 = 0;

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(never)]
    unsafe fn dot(self, mut acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: the caller's promise.
        let x = unsafe { x.read_unaligned() }.to_le_bytes();
        for r in 0..LANES {
            for j in 0..4 {
                acc[r] += i32::from(w[4 * r + j]) * i32::from(x[j] as i8);
            }
        }
        acc
    }
    #[inline(never)]
    unsafe fn dot16(self, mut acc: Self::I, w: Self::Q, x: *const i32) -> Self::I {
        // SAFETY: the caller's promise.
        let x = unsafe { x.read_unaligned() };
        let x = [i32::from(x as i16), x >> 16];
        for (acc, w) in acc.iter_mut().zip(w.as_chunks::<4>().0) {
            let pair = [i16::from_le_bytes([w[0], w[1]]), i16::from_le_bytes([w[2], w[3]])];
            *acc += i32::from(pair[0]) * x[0] + i32::from(pair[1]) * x[1];
        }
        acc
    }
    #[inline(never)]
    fn to_f(self, a: Self::I) -> Self::F {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn load_q(self, p: *const u8) -> Self::Q {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u8; 64]>().read() }
    }
    #[inline(always)]
    unsafe fn store_q(self, p: *mut u8, q: Self::Q) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u8; 64]>().write(q) }
    }
    #[inline(never)]
    fn shr(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        q.map(|v| (v >> n) & mask)
    }
    #[inline(never)]
    fn shl(self, q: Self::Q, n: u32, mask: u8) -> Self::Q {
        q.map(|v| (v << n) & mask)
    }
    #[inline(never)]
    fn or(self, a: Self::Q, b: Self::Q) -> Self::Q {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn bias8(self, q: Self::Q) -> Self::Q {
        q
    }
    #[inline(never)]
    fn table(self, q: Self::Q, table: &[u8; 16]) -> Self::Q {
        q.map(|v| table[usize::from(v & 15)])
    }
    #[inline(always)]
    fn splat_f(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(never)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Scalar::lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(never)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        Scalar::lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn load_f(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f(self, p: *mut f32, v: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(never)]
    unsafe fn load_f16(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[[u8; 2]; LANES]>().read() };
        bits.map(|b| f16::from_le_bytes(b).to_f32_const())
    }
    #[inline(never)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { p.cast::<[[u8; 2]; LANES]>().read() };
        bits.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
