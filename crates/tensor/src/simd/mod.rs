//! Vectors of f32 behind one trait, one thin implementation per instruction set, one dispatch point.
//!
//! A kernel is a struct that implements [`Kernel`]; its `run` is written once, generic over [`Simd`], and everything
//! that it calls is `#[inline(always)]`. [`Isa::run`] enters it inside a function that has the right target features,
//! into which all of that is inlined.

// Kernels index by pointers and counters on purpose: these are the inner loops.
#![allow(clippy::needless_range_loop)]

use std::fmt;

use half::{bf16, f16};

use crate::ops::pairs;

pub(crate) mod dot;
pub(crate) mod math;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

/// An instruction set that kernels can use.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Isa {
    /// Plain Rust, any machine.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL: 16 lanes.
    Avx512,
    /// aarch64 with NEON: 4 lanes.
    Neon,
    /// The same with products of byte matrices (i8mm).
    NeonI8mm,
}

impl Isa {
    /// The best instruction set of this machine.
    pub fn detect() -> Isa {
        Isa::BEST_FIRST.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    const BEST_FIRST: [Isa; 5] = [Isa::Avx512, Isa::Avx2, Isa::NeonI8mm, Isa::Neon, Isa::Scalar];

    /// Every instruction set of this machine, the best first.
    pub fn available() -> Vec<Isa> {
        Isa::BEST_FIRST.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine has it. The standard library asks the processor once and remembers.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => {
                Isa::Neon.is_available()
                    && std::arch::is_aarch64_feature_detected!("dotprod")
                    && std::arch::is_aarch64_feature_detected!("i8mm")
            }
            #[allow(unreachable_patterns, reason = "which arms remain depends on the target")]
            _ => false,
        }
    }

    /// f32 lanes of one vector.
    pub fn width(self) -> usize {
        match self {
            Isa::Scalar => 1,
            Isa::Avx2 => 8,
            Isa::Avx512 => 16,
            Isa::Neon | Isa::NeonI8mm => 4,
        }
    }

    /// Whether additions of vectors run in units of their own beside those of multiply-adds, one for one, as in AMD's Zen.
    /// Where both share their units, an addition costs as much as a multiply-add.
    pub(crate) fn adds_beside_products(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Isa::Avx512 {
            static AMD: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
                let id = std::arch::x86_64::__cpuid(0);
                [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
            });
            return *AMD;
        }
        false
    }

    /// Runs work as compiled for this instruction set, or for the target's baseline where the machine lacks it.
    /// Results are the same everywhere: the compiler neither reorders nor fuses floating-point operations.
    #[inline]
    pub fn vectorise<W: Vectorise>(self, work: W) -> W::Output {
        self.run(Plain(work))
    }

    /// The dispatch point: runs `kernel` with this instruction set, or scalar where the machine lacks it.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if self.is_available() => {
                // SAFETY: the features were just found.
                unsafe { avx512::enter(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if self.is_available() => {
                // SAFETY: the features were just found.
                unsafe { avx2::enter(kernel) }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonI8mm if self.is_available() => {
                // SAFETY: the feature was just found.
                unsafe { neon::enter(kernel) }
            }
            _ => kernel.run(scalar::Scalar),
        }
    }
}

/// Work in plain Rust whose loops the compiler vectorises anew for each instruction set, see [`Isa::vectorise`].
pub trait Vectorise {
    /// What it returns.
    type Output;
    /// The work. Implementations, and all in them that is to be vectorised, are `#[inline(always)]`: what is not, is
    /// compiled for the target's baseline.
    fn run(self) -> Self::Output;
}

/// A [`Kernel`] that leaves its vectors to the compiler.
struct Plain<W>(W);

impl<W: Vectorise> Kernel for Plain<W> {
    type Output = W::Output;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> W::Output {
        self.0.run()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::NeonI8mm => "neon-i8mm",
        })
    }
}

/// An algorithm over vectors of any width.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// The algorithm. Implementations are `#[inline(always)]`, see the module's head.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Vectors of f32. A value of an implementing type is the proof that the machine has the instructions, so arithmetic
/// is safe; loads and stores take pointers and are not.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// `WIDTH` floats.
    type V: Copy;
    /// Lanes.
    const WIDTH: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `WIDTH` readable floats at `p`, of any alignment.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// The first `n <= WIDTH` lanes; the others are zero.
    /// # Safety
    /// `n` readable floats at `p`.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::V;
    /// # Safety
    /// `WIDTH` writable floats at `p`, of any alignment.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// As [`Simd::store`], past the caches where there is such an instruction: nothing is read before it is overwritten.
    ///
    /// # Safety
    /// As for [`Simd::store`], at a multiple of the vector's size; [`Simd::fence`] follows before others read it.
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { self.store(p, v) }
    }
    /// What was streamed comes before what this thread stores afterwards.
    #[inline(always)]
    fn fence(self) {}
    /// Stores the first `n <= WIDTH` lanes.
    /// # Safety
    /// `n` writable floats at `p`.
    unsafe fn store_n(self, p: *mut f32, n: usize, v: Self::V);
    /// Widens `WIDTH` values.
    /// # Safety
    /// `WIDTH` readable values at `p`.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// Widens `WIDTH` values.
    /// # Safety
    /// `WIDTH` readable values at `p`.
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    /// Widens `WIDTH` values.
    /// # Safety
    /// `WIDTH` readable values at `p`.
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// The lower halves of `WIDTH` bytes, and their upper halves.
    /// # Safety
    /// `WIDTH` readable bytes at `p`.
    unsafe fn load_nibbles(self, p: *const u8) -> (Self::V, Self::V);

    /// Stores integral lanes in -127..=127 as `WIDTH` signed bytes.
    /// # Safety
    /// `WIDTH` writable bytes at `p`.
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);

    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, so a NaN on either side gives `b`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`, so a NaN on either side gives `b`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `a * 2^n` for an integral `n` in -252..=252, with one rounding where the result is subnormal or nearly so.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// Lanes `a > b ? x : y`; a NaN compares false.
    fn select_gt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Sum of the lanes, as a tree.
    fn reduce_add(self, a: Self::V) -> f32;
    /// Lane `i` is the sum of the lanes of `a[i]`, as a tree; `a` has `WIDTH` elements.
    fn reduce_add_each(self, a: &[Self::V]) -> Self::V;
    /// Largest lane; unspecified if a lane is NaN.
    fn reduce_max(self, a: Self::V) -> f32;

    /// `dst[c * dst_stride + r] = widened src[r * src_stride + c]` for `r, c < WIDTH`.
    /// # Safety
    /// Those elements are readable and writable.
    unsafe fn transpose<E: Element>(self, src: *const E, src_stride: usize, dst: *mut f32, dst_stride: usize);

    /// The same for `WIDTH` rows of `2 * WIDTH` bfloat16 columns: whole cache lines of each row, and half the shuffles
    /// where two neighbours are moved as one lane.
    /// # Safety
    /// Those elements are readable and writable.
    #[inline(always)]
    unsafe fn transpose_bf16(self, src: *const bf16, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's promise, for both halves of the columns.
        unsafe {
            self.transpose(src, src_stride, dst, dst_stride);
            self.transpose(src.add(Self::WIDTH), src_stride, dst.add(Self::WIDTH * dst_stride), dst_stride);
        }
    }

    /// Runs a kernel as a call instead of inlining it: one copy for all its callers.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// [`pairs::six_steps`], which asks for [`pairs::SOON`] lines at `soon` in each group meanwhile, into the second-level
    /// cache.
    /// # Safety
    /// As for that.
    #[inline(always)]
    unsafe fn six_steps<const MR: usize, const A_STRIDE: usize>(
        self,
        groups: usize,
        a: *const f32,
        b: *const f32,
        _soon: *const u8,
        sums: &mut [[Self::V; pairs::VECTORS]; MR],
    ) {
        // SAFETY: the caller's promise.
        unsafe { pairs::six_steps(self, groups, [a, b], A_STRIDE, sums) }
    }

    /// The first `WIDTH` floats of `x`; zeros where it is shorter.
    #[inline(always)]
    fn load_slice(self, x: &[f32]) -> Self::V {
        // SAFETY: no more than `x` has.
        unsafe {
            if x.len() >= Self::WIDTH { self.load(x.as_ptr()) } else { self.load_n(x.as_ptr(), x.len()) }
        }
    }

    /// Asks for the cache line at `p`, which may be any address, into the second-level cache.
    fn prefetch(self, p: *const u8);

    /// The same into the first-level cache.
    fn prefetch_near(self, p: *const u8);
}

/// A stored element type that widens to f32.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// `WIDTH` readable values at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// # Safety
    /// `n <= WIDTH` readable values at `p`.
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::V {
        let mut lanes = [0f32; 16];
        for i in 0..n.min(16) {
            // SAFETY: `i < n`.
            lanes[i] = unsafe { p.add(i).read_unaligned() }.widen();
        }
        // SAFETY: `WIDTH <= 16` floats.
        unsafe { s.load(lanes.as_ptr()) }
    }
    /// [`Simd::transpose`] for `WIDTH` rows of `2 * WIDTH` columns.
    /// # Safety
    /// Those elements are readable and writable.
    #[inline(always)]
    unsafe fn transpose_wide<S: Simd>(
        s: S,
        src: *const Self,
        stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller's promise, for both halves of the columns.
        unsafe {
            s.transpose(src, stride, dst, dst_stride);
            s.transpose(src.add(S::WIDTH), stride, dst.add(S::WIDTH * dst_stride), dst_stride);
        }
    }
    /// The value.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_n(p, n) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32_const()
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn transpose_wide<S: Simd>(
        s: S,
        src: *const bf16,
        stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { s.transpose_bf16(src, stride, dst, dst_stride) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const i8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_i8(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

/// `x * 2^n` in two steps, so that neither factor leaves the range of normal numbers.
#[inline(always)]
fn scale2_scalar(x: f32, n: f32) -> f32 {
    let n = n as i32;
    let half = n >> 1;
    let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    x * power(half) * power(n - half)
}

#[cfg(test)]
mod tests;
