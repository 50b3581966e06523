//! Where the bits of a GGUF block lie: each format's bytes to codes and scales, and back.
//!
//! The layouts are ggml's. Codes come out unsigned and in row order; what a code means is in
//! [`Lattice`](crate::codes::Lattice).

/// Scales of a block of 256 values in `G` sub-groups.
#[derive(Clone, Copy)]
pub(crate) struct Nested<const G: usize> {
    /// f16 bits.
    pub d: u16,
    /// f16 bits, zero for formats without minima.
    pub dmin: u16,
    /// Integer sub-scales as i8 bits.
    pub scales: [u8; G],
    /// Integer minima, zero for formats without.
    pub minima: [u8; G],
}

/// A block of 32 values in `B` bytes to codes and back.
pub(crate) trait Simple<const B: usize> {
    /// Returns the f16 bits of scale and minimum (0 for formats without).
    fn unpack(block: &[u8; B], codes: &mut [u8; 32]) -> (u16, u16);
    fn pack(d: u16, m: u16, codes: &[u8; 32], block: &mut [u8; B]);
}

/// A block of 256 values in `B` bytes to codes and back.
pub(crate) trait Super<const G: usize, const B: usize> {
    fn unpack(block: &[u8; B], codes: &mut [u8; 256]) -> Nested<G>;
    fn pack(scales: &Nested<G>, codes: &[u8; 256], block: &mut [u8; B]);
}

fn half_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn put_half(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// ggml's planar order: of each `RUN` bytes, the lowest `BITS` bits are the first `RUN` codes, and so on.
/// The bits are set at position `up` of codes that are zero there.
#[inline(always)]
fn spread<const RUN: usize, const BITS: usize>(packed: &[u8], codes: &mut [u8], up: u32) {
    let mask = ((1u16 << BITS) - 1) as u8;
    for (packed, codes) in packed.as_chunks::<RUN>().0.iter().zip(codes.chunks_exact_mut(RUN * 8 / BITS)) {
        for (j, codes) in codes.chunks_exact_mut(RUN).enumerate() {
            for (code, p) in codes.iter_mut().zip(packed) {
                *code |= ((p >> (j * BITS)) & mask) << up;
            }
        }
    }
}

/// The inverse of [`spread`]: bits `down..down + BITS` of the codes into bytes that are zero.
#[inline(always)]
fn gather<const RUN: usize, const BITS: usize>(codes: &[u8], packed: &mut [u8], down: u32) {
    let mask = ((1u16 << BITS) - 1) as u8;
    for (packed, codes) in packed.as_chunks_mut::<RUN>().0.iter_mut().zip(codes.chunks_exact(RUN * 8 / BITS))
    {
        for (j, codes) in codes.chunks_exact(RUN).enumerate() {
            for (p, code) in packed.iter_mut().zip(codes) {
                *p |= ((code >> down) & mask) << (j * BITS);
            }
        }
    }
}

/// Bit `i` of the word is bit 4 of code `i`.
#[inline(always)]
fn spread_fifth(word: u32, codes: &mut [u8; 32]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (((word >> i) & 1) << 4) as u8;
    }
}

fn gather_fifth(codes: &[u8; 32]) -> u32 {
    codes.iter().enumerate().fold(0, |word, (i, &code)| word | u32::from(code >> 4 & 1) << i)
}

/// d, 32 signed bytes; the code is the value plus 128.
pub(crate) struct Q8_0;

impl Simple<34> for Q8_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 34], codes: &mut [u8; 32]) -> (u16, u16) {
        for (code, b) in codes.iter_mut().zip(&block[2..]) {
            *code = b ^ 0x80;
        }
        (half_at(block, 0), 0)
    }

    fn pack(d: u16, _: u16, codes: &[u8; 32], block: &mut [u8; 34]) {
        put_half(block, 0, d);
        for (b, code) in block[2..].iter_mut().zip(codes) {
            *b = code ^ 0x80;
        }
    }
}

/// d, 16 bytes of two codes. IQ4_NL has the same layout.
pub(crate) struct Q4_0;

impl Simple<18> for Q4_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 18], codes: &mut [u8; 32]) -> (u16, u16) {
        *codes = [0; 32];
        spread::<16, 4>(&block[2..], codes, 0);
        (half_at(block, 0), 0)
    }

    fn pack(d: u16, _: u16, codes: &[u8; 32], block: &mut [u8; 18]) {
        *block = [0; 18];
        put_half(block, 0, d);
        gather::<16, 4>(codes, &mut block[2..], 0);
    }
}

/// d, m, 16 bytes of two codes.
pub(crate) struct Q4_1;

impl Simple<20> for Q4_1 {
    #[inline(always)]
    fn unpack(block: &[u8; 20], codes: &mut [u8; 32]) -> (u16, u16) {
        *codes = [0; 32];
        spread::<16, 4>(&block[4..], codes, 0);
        (half_at(block, 0), half_at(block, 2))
    }

    fn pack(d: u16, m: u16, codes: &[u8; 32], block: &mut [u8; 20]) {
        *block = [0; 20];
        put_half(block, 0, d);
        put_half(block, 2, m);
        gather::<16, 4>(codes, &mut block[4..], 0);
    }
}

/// d, a word of fifth bits, 16 bytes of two codes.
pub(crate) struct Q5_0;

impl Simple<22> for Q5_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 22], codes: &mut [u8; 32]) -> (u16, u16) {
        *codes = [0; 32];
        spread::<16, 4>(&block[6..], codes, 0);
        spread_fifth(u32::from_le_bytes([block[2], block[3], block[4], block[5]]), codes);
        (half_at(block, 0), 0)
    }

    fn pack(d: u16, _: u16, codes: &[u8; 32], block: &mut [u8; 22]) {
        *block = [0; 22];
        put_half(block, 0, d);
        block[2..6].copy_from_slice(&gather_fifth(codes).to_le_bytes());
        gather::<16, 4>(codes, &mut block[6..], 0);
    }
}

/// d, m, a word of fifth bits, 16 bytes of two codes.
pub(crate) struct Q5_1;

impl Simple<24> for Q5_1 {
    #[inline(always)]
    fn unpack(block: &[u8; 24], codes: &mut [u8; 32]) -> (u16, u16) {
        *codes = [0; 32];
        spread::<16, 4>(&block[8..], codes, 0);
        spread_fifth(u32::from_le_bytes([block[4], block[5], block[6], block[7]]), codes);
        (half_at(block, 0), half_at(block, 2))
    }

    fn pack(d: u16, m: u16, codes: &[u8; 32], block: &mut [u8; 24]) {
        *block = [0; 24];
        put_half(block, 0, d);
        put_half(block, 2, m);
        block[4..8].copy_from_slice(&gather_fifth(codes).to_le_bytes());
        gather::<16, 4>(codes, &mut block[8..], 0);
    }
}

/// 16 bytes of sub-scale (low nibble) and minimum (high), 64 bytes of four codes, d, dmin.
pub(crate) struct Q2K;

impl Super<16, 84> for Q2K {
    #[inline(always)]
    fn unpack(block: &[u8; 84], codes: &mut [u8; 256]) -> Nested<16> {
        *codes = [0; 256];
        spread::<32, 2>(&block[16..80], codes, 0);
        Nested {
            d: half_at(block, 80),
            dmin: half_at(block, 82),
            scales: std::array::from_fn(|g| block[g] & 15),
            minima: std::array::from_fn(|g| block[g] >> 4),
        }
    }

    fn pack(scales: &Nested<16>, codes: &[u8; 256], block: &mut [u8; 84]) {
        *block = [0; 84];
        for (b, (s, m)) in block.iter_mut().zip(scales.scales.iter().zip(&scales.minima)) {
            *b = s & 15 | m << 4;
        }
        gather::<32, 2>(codes, &mut block[16..80], 0);
        put_half(block, 80, scales.d);
        put_half(block, 82, scales.dmin);
    }
}

/// 32 bytes of the codes' third bits, 64 bytes of four codes' lower bits, 12 bytes of sub-scales, d.
pub(crate) struct Q3K;

impl Super<16, 110> for Q3K {
    #[inline(always)]
    fn unpack(block: &[u8; 110], codes: &mut [u8; 256]) -> Nested<16> {
        *codes = [0; 256];
        spread::<32, 1>(&block[..32], codes, 2);
        spread::<32, 2>(&block[32..96], codes, 0);
        // Sub-scale `g`: its lower four bits are a nibble of bytes 0..8, its upper two lie in bytes 8..12.
        let packed = &block[96..108];
        let scales = std::array::from_fn(|g| {
            let low = packed[g % 8] >> (4 * (g / 8)) & 15;
            let high = packed[8 + g % 4] >> (2 * (g / 4)) & 3;
            (low | high << 4).wrapping_sub(32)
        });
        Nested { d: half_at(block, 108), dmin: 0, scales, minima: [0; 16] }
    }

    fn pack(scales: &Nested<16>, codes: &[u8; 256], block: &mut [u8; 110]) {
        *block = [0; 110];
        gather::<32, 1>(codes, &mut block[..32], 2);
        gather::<32, 2>(codes, &mut block[32..96], 0);
        for (g, s) in scales.scales.iter().enumerate() {
            let s = s.wrapping_add(32) & 63;
            block[96 + g % 8] |= (s & 15) << (4 * (g / 8));
            block[104 + g % 4] |= (s >> 4) << (2 * (g / 4));
        }
        put_half(block, 108, scales.d);
    }
}

/// The eight 6-bit sub-scales and minima of Q4_K and Q5_K in 12 bytes: the first four of each whole in the lower six
/// bits of bytes 0..4 and 4..8, the last four split between bytes 8..12 and the upper two bits of the others.
#[inline(always)]
fn six_bits(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let mut scales = [0; 8];
    let mut minima = [0; 8];
    for g in 0..4 {
        let (s, m, both) = (packed[g], packed[4 + g], packed[8 + g]);
        scales[g] = s & 63;
        minima[g] = m & 63;
        scales[4 + g] = both & 15 | (s >> 6) << 4;
        minima[4 + g] = both >> 4 | (m >> 6) << 4;
    }
    (scales, minima)
}

fn put_six_bits(scales: &[u8; 8], minima: &[u8; 8], packed: &mut [u8]) {
    for g in 0..4 {
        packed[g] = scales[g] & 63 | (scales[4 + g] >> 4) << 6;
        packed[4 + g] = minima[g] & 63 | (minima[4 + g] >> 4) << 6;
        packed[8 + g] = scales[4 + g] & 15 | minima[4 + g] << 4;
    }
}

/// d, dmin, 12 bytes of sub-scales and minima, 128 bytes of two codes.
pub(crate) struct Q4K;

impl Super<8, 144> for Q4K {
    #[inline(always)]
    fn unpack(block: &[u8; 144], codes: &mut [u8; 256]) -> Nested<8> {
        *codes = [0; 256];
        spread::<32, 4>(&block[16..], codes, 0);
        let (scales, minima) = six_bits(&block[4..16]);
        Nested { d: half_at(block, 0), dmin: half_at(block, 2), scales, minima }
    }

    fn pack(scales: &Nested<8>, codes: &[u8; 256], block: &mut [u8; 144]) {
        *block = [0; 144];
        put_half(block, 0, scales.d);
        put_half(block, 2, scales.dmin);
        put_six_bits(&scales.scales, &scales.minima, &mut block[4..16]);
        gather::<32, 4>(codes, &mut block[16..], 0);
    }
}

/// As Q4_K with 32 bytes of the codes' fifth bits before the others.
pub(crate) struct Q5K;

impl Super<8, 176> for Q5K {
    #[inline(always)]
    fn unpack(block: &[u8; 176], codes: &mut [u8; 256]) -> Nested<8> {
        *codes = [0; 256];
        spread::<32, 1>(&block[16..48], codes, 4);
        spread::<32, 4>(&block[48..], codes, 0);
        let (scales, minima) = six_bits(&block[4..16]);
        Nested { d: half_at(block, 0), dmin: half_at(block, 2), scales, minima }
    }

    fn pack(scales: &Nested<8>, codes: &[u8; 256], block: &mut [u8; 176]) {
        *block = [0; 176];
        put_half(block, 0, scales.d);
        put_half(block, 2, scales.dmin);
        put_six_bits(&scales.scales, &scales.minima, &mut block[4..16]);
        gather::<32, 1>(codes, &mut block[16..48], 4);
        gather::<32, 4>(codes, &mut block[48..], 0);
    }
}

/// 128 bytes of the codes' lower four bits, 64 of their upper two, 16 signed sub-scales, d.
pub(crate) struct Q6K;

impl Super<16, 210> for Q6K {
    #[inline(always)]
    fn unpack(block: &[u8; 210], codes: &mut [u8; 256]) -> Nested<16> {
        *codes = [0; 256];
        spread::<64, 4>(&block[..128], codes, 0);
        spread::<32, 2>(&block[128..192], codes, 4);
        let scales = std::array::from_fn(|g| block[192 + g]);
        Nested { d: half_at(block, 208), dmin: 0, scales, minima: [0; 16] }
    }

    fn pack(scales: &Nested<16>, codes: &[u8; 256], block: &mut [u8; 210]) {
        *block = [0; 210];
        gather::<64, 4>(codes, &mut block[..128], 0);
        gather::<32, 2>(codes, &mut block[128..192], 4);
        block[192..208].copy_from_slice(&scales.scales);
        put_half(block, 208, scales.d);
    }
}

/// d, the sub-scales' upper two bits in 2 bytes, their lower four in 4 bytes, 128 bytes of two codes.
pub(crate) struct Iq4Xs;

impl Super<8, 136> for Iq4Xs {
    #[inline(always)]
    fn unpack(block: &[u8; 136], codes: &mut [u8; 256]) -> Nested<8> {
        *codes = [0; 256];
        spread::<16, 4>(&block[8..], codes, 0);
        let high = half_at(block, 2);
        let scales = std::array::from_fn(|g| {
            let low = block[4 + g / 2] >> (4 * (g % 2)) & 15;
            (low | ((high >> (2 * g) & 3) << 4) as u8).wrapping_sub(32)
        });
        Nested { d: half_at(block, 0), dmin: 0, scales, minima: [0; 8] }
    }

    fn pack(scales: &Nested<8>, codes: &[u8; 256], block: &mut [u8; 136]) {
        *block = [0; 136];
        put_half(block, 0, scales.d);
        let mut high = 0;
        for (g, s) in scales.scales.iter().enumerate() {
            let s = s.wrapping_add(32) & 63;
            block[4 + g / 2] |= (s & 15) << (4 * (g % 2));
            high |= u16::from(s >> 4) << (2 * g);
        }
        put_half(block, 2, high);
        gather::<16, 4>(codes, &mut block[8..], 0);
    }
}
