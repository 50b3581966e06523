//! Dot products of bytes behind one trait: sixteen rows of weights side by side, four steps of `k` at a time.
//!
//! As in the parent module, an algorithm is a [`DotKernel`] written once over [`Dots`] and entered by [`run`] inside a
//! function with the right target features. Sums of products are exact integers, so every instruction set gives the
//! same bits for them.

use super::Isa;

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// Rows of a panel: lanes of [`Dots::I`] and [`Dots::F`].
pub(crate) const LANES: usize = 16;

/// An algorithm over any [`Dots`].
pub(crate) trait DotKernel {
    /// The algorithm. Implementations are `#[inline(always)]`.
    fn run<D: Dots>(self, d: D);
}

/// Whether `isa` has an implementation of its own here on this machine.
fn best(isa: Isa) -> Isa {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if isa.is_available() => {
            if is_x86_feature_detected!("avx512vnni") {
                Isa::Avx512
            } else {
                Isa::Avx2
            }
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if !std::arch::is_aarch64_feature_detected!("dotprod") => Isa::Scalar,
        isa if isa.is_available() => isa,
        _ => Isa::Scalar,
    }
}

/// Rows of `x` in a tile, and panels side by side, on `isa`.
pub(crate) fn tile_shape(isa: Isa) -> (usize, usize) {
    match best(isa) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (vnni::Vnni::ROWS, vnni::Vnni::PANELS),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (avx2::Avx2::ROWS, avx2::Avx2::PANELS),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonI8mm => (neon::Neon::<false>::ROWS, neon::Neon::<false>::PANELS),
        _ => (scalar::Scalar::ROWS, scalar::Scalar::PANELS),
    }
}

/// What [`Dots::bias8`] subtracts on `isa`.
pub(crate) fn bias8(isa: Isa) -> i32 {
    match best(isa) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => vnni::Vnni::BIAS8,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::Avx2::BIAS8,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonI8mm => neon::Neon::<false>::BIAS8,
        _ => scalar::Scalar::BIAS8,
    }
}

/// Whether tiles on `isa` multiply two rows of `x` at a time: see [`Dots::PAIRS`].
pub(crate) fn pairs(isa: Isa) -> bool {
    best(isa) == Isa::NeonI8mm
}

/// The dispatch point.
#[inline]
pub(crate) fn run<K: DotKernel>(isa: Isa, kernel: K) {
    match best(isa) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // SAFETY: `best` found the features.
            unsafe { vnni::enter(kernel) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: `best` found the features.
            unsafe { avx2::enter(kernel) }
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => {
            // SAFETY: `best` found the features.
            unsafe { neon::enter(kernel) }
        }
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => {
            // SAFETY: `best` found the features.
            unsafe { neon::enter_i8mm(kernel) }
        }
        _ => kernel.run(scalar::Scalar),
    }
}

/// Vectors of sixteen rows. A value of an implementing type is the proof that the machine has the instructions.
pub(crate) trait Dots: Copy + Send + Sync + 'static {
    /// Sixteen sums, i32.
    type I: Copy;
    /// Sixteen f32.
    type F: Copy;
    /// Codes of sixteen rows for four steps of `k`: byte `4 r + j` belongs to row `r` and step `j`.
    type Q: Copy;
    /// Rows of `x` in a full tile of a matrix product.
    const ROWS: usize;
    /// Panels side by side in a tile.
    const PANELS: usize;
    /// Whether tiles use [`Dots::dot_pair`]: one instruction for two rows of `x`, two of weights and eight steps.
    const PAIRS: bool = false;
    /// What codes of eight bits are less by after [`Dots::bias8`]. Codes of fewer bits are taken as they are.
    const BIAS8: i32;

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// `acc[r] + sum_j w[r][j] * x[j]` for the four bytes `x`, taken as signed and never -128.
    /// # Safety
    /// A readable i32 at `x`.
    unsafe fn dot(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I;
    /// `acc[r] + w[r][0] * x[0] + w[r][1] * x[1]` for the two signed integers of 16 bits in `x` and in each lane of `w`.
    /// # Safety
    /// A readable i32 at `x`.
    unsafe fn dot16(self, acc: Self::I, w: Self::Q, x: *const i32) -> Self::I;
    /// The sums of two rows of `x` as [`Dots::dot_pair`] keeps them.
    #[inline(always)]
    fn join(self, rows: [Self::I; 2]) -> [Self::I; 2] {
        rows
    }
    /// The sums of each of the two rows.
    #[inline(always)]
    fn split(self, pair: [Self::I; 2]) -> [Self::I; 2] {
        pair
    }
    /// [`Dots::dot`] for two rows of `x` and eight steps: `x[0]` points to four steps of the first row and, right behind,
    /// of the second, `x[1]` to the next four; `w` is what [`Dots::store_eight`] stored.
    /// # Safety
    /// Two readable i32 at each of `x`, 128 readable bytes at `w`.
    #[inline(always)]
    unsafe fn dot_pair(self, acc: [Self::I; 2], w: *const u8, x: [*const i32; 2]) -> [Self::I; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let [low, high] = [self.load_q(w), self.load_q(w.add(64))];
            let first = self.dot(self.dot(acc[0], low, x[0]), high, x[1]);
            let second = self.dot(self.dot(acc[1], low, x[0].add(1)), high, x[1].add(1));
            [first, second]
        }
    }
    /// Stores the codes of eight steps as [`Dots::dot_pair`] reads them: the eight of a row side by side where the
    /// instruction set has [`Dots::PAIRS`], else as they are.
    /// # Safety
    /// 128 writable bytes at `p`.
    #[inline(always)]
    unsafe fn store_eight(self, p: *mut u8, q: [Self::Q; 2]) {
        // SAFETY: the caller's promise.
        unsafe {
            self.store_q(p, q[0]);
            self.store_q(p.add(64), q[1]);
        }
    }

    /// The lanes as floats.
    fn to_f(self, a: Self::I) -> Self::F;

    /// 64 codes.
    /// # Safety
    /// 64 readable bytes at `p`.
    unsafe fn load_q(self, p: *const u8) -> Self::Q;
    /// # Safety
    /// 64 writable bytes at `p`.
    unsafe fn store_q(self, p: *mut u8, q: Self::Q);
    /// `(q >> n) & mask` in each byte, `n < 8`; `mask` leaves no bit of a neighbour.
    fn shr(self, q: Self::Q, n: u32, mask: u8) -> Self::Q;
    /// `(q << n) & mask` in each byte, `n < 8`; `mask` leaves no bit of a neighbour.
    fn shl(self, q: Self::Q, n: u32, mask: u8) -> Self::Q;
    /// `a | b`
    fn or(self, a: Self::Q, b: Self::Q) -> Self::Q;
    /// Codes of eight bits as [`Dots::dot`] takes them: less by `BIAS8`.
    fn bias8(self, q: Self::Q) -> Self::Q;
    /// `table[code]` in each byte; codes are below 16.
    fn table(self, q: Self::Q, table: &[u8; 16]) -> Self::Q;

    /// All lanes `x`.
    fn splat_f(self, x: f32) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// Sixteen readable floats at `p`.
    unsafe fn load_f(self, p: *const f32) -> Self::F;
    /// # Safety
    /// Sixteen writable floats at `p`.
    unsafe fn store_f(self, p: *mut f32, v: Self::F);
    /// Widens sixteen binary16 values.
    /// # Safety
    /// Sixteen readable values at `p`.
    unsafe fn load_f16(self, p: *const u8) -> Self::F;
    /// Widens sixteen bfloat16 values.
    /// # Safety
    /// Sixteen readable values at `p`.
    unsafe fn load_bf16(self, p: *const u8) -> Self::F;
    /// Sixteen signed bytes as floats.
    /// # Safety
    /// Sixteen readable bytes at `p`.
    unsafe fn load_i8(self, p: *const u8) -> Self::F;
    /// Sixteen unsigned bytes as floats.
    /// # Safety
    /// Sixteen readable bytes at `p`.
    unsafe fn load_u8(self, p: *const u8) -> Self::F;

    /// Asks for the cache line at `p`, which may be any address, in the second-level cache.
    fn prefetch(self, p: *const u8);
}
