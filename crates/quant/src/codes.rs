//! Rows as plain codes and scales: what kernels pack from, what encoders write to.
//!
//! With `q` a code, `g` the value's (sub-)group and `b` its block of 256, a value is
//!
//! | formats | value |
//! |---|---|
//! | Q8_0, Q4_0, Q5_0 | `scales[g] * (q - 128 or 8 or 16)` |
//! | IQ4_NL | `scales[g] * table[q]` |
//! | Q4_1, Q5_1 | `scales[g] * q + minima[g]` |
//! | Q2_K, Q4_K, Q5_K | `(scales[b] * sub_scales[g]) * q - minima[b] * sub_minima[g]` |
//! | Q3_K, Q6_K | `(scales[b] * sub_scales[g]) * (q - 4 or 32)` |
//! | IQ4_XS | `(scales[b] * sub_scales[g]) * table[q]` |
//! | affine | `scales[g] * (q - sub_minima[g])`, or `q - 2^(bits - 1)` where symmetric |
//!
//! in f32, with groups of 32 values (Q2_K, Q3_K, Q6_K: 16; affine: the format's) and `sub_scales` signed. Scales and
//! minima are the bits of f16 numbers, of bf16 ones in affine formats. Fields that a format lacks are empty.

use half::{bf16, f16};
use pocketglm_tensor::{Affine, Block, DType, IQ4_TABLE, RowCodes};

use crate::blocks::{self, Nested, Simple, Super};
use crate::{Error, Result};

/// The values of the codes of IQ4_NL and IQ4_XS; the kernels' table has them with 128 added.
pub(crate) const IQ4_VALUES: [i8; 16] = {
    let mut values = [0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = (IQ4_TABLE[i] as i16 - 128) as i8;
        i += 1;
    }
    values
};

/// Halfway between the table's neighbours; every one is exact in f32.
pub(crate) const MIDDLE: [f32; 15] = {
    let mut middle = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middle[i] = (IQ4_VALUES[i] as f32 + IQ4_VALUES[i + 1] as f32) / 2.0;
        i += 1;
    }
    middle
};

/// How a block format uses its codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grid {
    /// Bits of a code.
    pub bits: u32,
    /// The smallest code that encoders give: ggml's Q8_0 leaves out -128, and kernels count on it.
    pub low: i32,
    /// The code of zero; for formats with minima 0.
    pub zero: i32,
    /// Values that share a scale or a sub-scale.
    pub group: usize,
    /// Whether groups have a minimum.
    pub minima: bool,
    /// Whether codes are places in [`IQ4_VALUES`].
    pub table: bool,
    /// Smallest and largest sub-scale; `None` for blocks of one scale.
    pub sub: Option<(i32, i32)>,
}

impl Grid {
    #[inline(always)]
    pub fn lattice(self, scale: f32, offset: f32) -> Lattice {
        let Grid { bits, low, zero, table, .. } = self;
        Lattice { scale, zero, offset, table, low, top: (1 << bits) - 1 }
    }
}

/// The [`Grid`] of each format.
pub(crate) const fn grid(block: Block) -> Grid {
    let (bits, zero, group, minima, table, sub) = match block {
        Block::Q8_0 => (8, 128, 32, false, false, None),
        Block::Q4_0 => (4, 8, 32, false, false, None),
        Block::Q4_1 => (4, 0, 32, true, false, None),
        Block::Q5_0 => (5, 16, 32, false, false, None),
        Block::Q5_1 => (5, 0, 32, true, false, None),
        Block::Q2_K => (2, 0, 16, true, false, Some((0, 15))),
        Block::Q3_K => (3, 4, 16, false, false, Some((-32, 31))),
        Block::Q4_K => (4, 0, 32, true, false, Some((0, 63))),
        Block::Q5_K => (5, 0, 32, true, false, Some((0, 63))),
        Block::Q6_K => (6, 32, 16, false, false, Some((-128, 127))),
        Block::IQ4_NL => (4, 0, 32, false, true, None),
        Block::IQ4_XS => (4, 0, 32, false, true, Some((-32, 31))),
    };
    let low = if bits == 8 { 1 } else { 0 };
    Grid { bits, low, zero, group, minima, table, sub }
}

/// What the codes of one group mean: `scale * (q - zero) - offset`, or `scale * table[q]`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Lattice {
    pub scale: f32,
    pub zero: i32,
    pub offset: f32,
    pub table: bool,
    /// The smallest code that encoders give.
    pub low: i32,
    /// The largest code.
    pub top: i32,
}

impl Lattice {
    /// The value of a code.
    #[inline(always)]
    pub fn value(&self, code: u8) -> f32 {
        if self.table {
            self.scale * f32::from(IQ4_VALUES[usize::from(code & 15)])
        } else {
            self.scale * (i32::from(code) - self.zero) as f32 - self.offset
        }
    }

    /// The values of codes.
    #[inline(always)]
    pub fn values(&self, codes: &[u8], out: &mut [f32]) {
        if self.table {
            let table = IQ4_VALUES.map(|t| self.scale * f32::from(t));
            for (o, &code) in out.iter_mut().zip(codes) {
                *o = table[usize::from(code & 15)];
            }
        } else {
            let Lattice { scale, zero, offset, .. } = *self;
            for (o, &code) in out.iter_mut().zip(codes) {
                *o = scale * (i32::from(code) - zero) as f32 - offset;
            }
        }
    }

    /// The code whose value is nearest.
    #[inline(always)]
    pub fn nearest(&self, value: f32) -> u8 {
        if self.scale == 0.0 {
            return self.zero as u8;
        }
        if self.table {
            return nearest_in_table(value / self.scale);
        }
        let q = ((value + self.offset) / self.scale).clamp(-512.0, 512.0);
        (round(q) + self.zero).clamp(self.low, self.top) as u8
    }
}

/// Adding this to a number below 2^22 leaves its rounded value in the mantissa's low bits, ties to even.
/// The baseline instruction set has no rounding instruction, and this vectorises.
pub(crate) const MAGIC: f32 = 12_582_912.0;

/// The nearest integer of a number within +-2^22, ties to even.
#[inline(always)]
pub(crate) fn round(x: f32) -> i32 {
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// The code of the table's value that is nearest to `x`.
#[inline(always)]
pub(crate) fn nearest_in_table(x: f32) -> u8 {
    MIDDLE.iter().fold(0, |code, &middle| code + u8::from(x > middle))
}

/// The lattice of sub-group `g` of a block of 256.
#[inline(always)]
pub(crate) fn nested_lattice<const G: usize>(grid: Grid, scales: &Nested<G>, g: usize) -> Lattice {
    let d = f16::from_bits(scales.d).to_f32();
    let offset = match grid.minima {
        true => f16::from_bits(scales.dmin).to_f32() * f32::from(scales.minima[g]),
        false => 0.0,
    };
    let scale = d * f32::from(scales.scales[g] as i8);
    grid.lattice(scale, offset)
}

/// The lattice of a block of 32.
#[inline(always)]
pub(crate) fn simple_lattice(grid: Grid, d: u16, m: u16) -> Lattice {
    let offset = if grid.minima { -f16::from_bits(m).to_f32() } else { 0.0 };
    let scale = f16::from_bits(d).to_f32();
    grid.lattice(scale, offset)
}

/// The lattice of an affine group.
#[inline(always)]
pub(crate) fn affine_lattice(format: Affine, scale: u16, zero: u8) -> Lattice {
    let scale = bf16::from_bits(scale).to_f32();
    let zero = if format.symmetric() { 1 << (format.bits() - 1) } else { i32::from(zero) };
    Lattice { scale, zero, offset: 0.0, table: false, low: 0, top: (1 << format.bits()) - 1 }
}

/// Bytes of a row, checked against what is there.
pub(crate) fn check_bytes(dtype: DType, bytes: usize, k: usize) -> Result<()> {
    let wanted = dtype.row_bytes(k).ok_or(Error::RowLength { dtype, values: k })?;
    if bytes == wanted {
        return Ok(());
    }
    Err(Error::Bytes { dtype, values: k, wanted, found: bytes })
}

/// Splits the bytes of a row of `k` values into codes and scales. The vectors' memory is reused.
///
/// Codes are unsigned and in row order; scales are as stored (f16 bits, bf16 in affine formats; sub-scales with 32
/// already taken off where the format says so). Fields that a format lacks are empty.
///
/// # Errors
/// [`Error::DType`] for types that are not quantised, [`Error::RowLength`] and [`Error::Bytes`] for a wrong size.
pub fn take_apart(dtype: DType, bytes: &[u8], k: usize, row: &mut RowCodes) -> Result<()> {
    check_bytes(dtype, bytes.len(), k)?;
    row.scales.clear();
    row.minima.clear();
    row.sub_scales.clear();
    row.sub_minima.clear();
    // Every code is overwritten, so those of the row before need no clearing.
    row.codes.resize(k, 0);
    match dtype {
        DType::Affine(format) => affine_apart(format, bytes, k, row),
        DType::Block(block) => {
            let has_minima = grid(block).minima;
            match block {
                Block::Q8_0 => simple_apart::<blocks::Q8_0, 34>(bytes, has_minima, row),
                Block::Q4_0 | Block::IQ4_NL => simple_apart::<blocks::Q4_0, 18>(bytes, has_minima, row),
                Block::Q4_1 => simple_apart::<blocks::Q4_1, 20>(bytes, has_minima, row),
                Block::Q5_0 => simple_apart::<blocks::Q5_0, 22>(bytes, has_minima, row),
                Block::Q5_1 => simple_apart::<blocks::Q5_1, 24>(bytes, has_minima, row),
                Block::Q2_K => nested_apart::<blocks::Q2K, 16, 84>(bytes, has_minima, row),
                Block::Q3_K => nested_apart::<blocks::Q3K, 16, 110>(bytes, has_minima, row),
                Block::Q4_K => nested_apart::<blocks::Q4K, 8, 144>(bytes, has_minima, row),
                Block::Q5_K => nested_apart::<blocks::Q5K, 8, 176>(bytes, has_minima, row),
                Block::Q6_K => nested_apart::<blocks::Q6K, 16, 210>(bytes, has_minima, row),
                Block::IQ4_XS => nested_apart::<blocks::Iq4Xs, 8, 136>(bytes, has_minima, row),
            }
        }
        found => return Err(not_quantised("take apart", found)),
    }
    Ok(())
}

fn not_quantised(op: &'static str, found: DType) -> Error {
    Error::DType { op, wanted: "a quantised type", found }
}

fn simple_apart<F: Simple<B>, const B: usize>(bytes: &[u8], has_minima: bool, row: &mut RowCodes) {
    let (blocks, _) = bytes.as_chunks::<B>();
    for (block, codes) in blocks.iter().zip(row.codes.as_chunks_mut::<32>().0) {
        let (d, m) = F::unpack(block, codes);
        row.scales.push(d);
        if has_minima {
            row.minima.push(m);
        }
    }
}

fn nested_apart<F: Super<G, B>, const G: usize, const B: usize>(
    bytes: &[u8],
    has_minima: bool,
    row: &mut RowCodes,
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    for (block, codes) in blocks.iter().zip(row.codes.as_chunks_mut::<256>().0) {
        let scales = F::unpack(block, codes);
        row.scales.push(scales.d);
        row.sub_scales.extend_from_slice(&scales.scales);
        if has_minima {
            row.minima.push(scales.dmin);
            row.sub_minima.extend_from_slice(&scales.minima);
        }
    }
}

fn affine_apart(format: Affine, bytes: &[u8], k: usize, row: &mut RowCodes) {
    let group = format.group().of(k);
    let bytes = bytes.chunks(format.group_bytes(group).unwrap_or(usize::MAX));
    for (bytes, codes) in bytes.zip(row.codes.chunks_mut(group)) {
        let (header, packed) = bytes.split_at(format.header());
        row.scales.push(u16::from_le_bytes([header[0], header[1]]));
        if !format.symmetric() {
            row.sub_minima.push(header[2]);
        }
        unpack_sequence(format.bits(), packed, codes);
    }
}

/// Codes one after the other, the first in the lowest bits.
#[inline(always)]
pub(crate) fn unpack_sequence(bits: u8, packed: &[u8], codes: &mut [u8]) {
    match bits {
        8 => codes.copy_from_slice(&packed[..codes.len()]),
        4 => unpack_each::<2>(packed, codes, |b| [b & 15, b >> 4]),
        _ => unpack_each::<4>(packed, codes, |b| [b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6]),
    }
}

#[inline(always)]
fn unpack_each<const PER: usize>(packed: &[u8], codes: &mut [u8], split: impl Fn(u8) -> [u8; PER]) {
    let (whole, rest) = codes.as_chunks_mut::<PER>();
    for (codes, &b) in whole.iter_mut().zip(packed) {
        *codes = split(b);
    }
    if let Some(&last) = packed.get(whole.len()) {
        let last = split(last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// The inverse of [`unpack_sequence`], appended.
#[inline(always)]
fn pack_sequence(bits: u8, codes: &[u8], out: &mut Vec<u8>) {
    match bits {
        8 => out.extend_from_slice(codes),
        4 => pack_each::<2>(codes, out, |c| c[0] & 15 | c[1] << 4),
        _ => pack_each::<4>(codes, out, |c| c[0] & 3 | (c[1] & 3) << 2 | (c[2] & 3) << 4 | c[3] << 6),
    }
}

#[inline(always)]
fn pack_each<const PER: usize>(codes: &[u8], out: &mut Vec<u8>, join: impl Fn(&[u8; PER]) -> u8) {
    let (whole, rest) = codes.as_chunks::<PER>();
    out.extend(whole.iter().map(&join));
    if !rest.is_empty() {
        let mut last = [0; PER];
        last[..rest.len()].copy_from_slice(rest);
        out.push(join(&last));
    }
}

/// Appends the bytes of a row that was [taken apart](take_apart). Bits of a code beyond the format's are dropped.
///
/// # Errors
/// As [`take_apart`], and [`Error::Size`] where the fields do not have the format's lengths.
pub fn put_together(dtype: DType, row: &RowCodes, out: &mut Vec<u8>) -> Result<()> {
    let k = row.codes.len();
    let bytes = dtype.row_bytes(k).ok_or(Error::RowLength { dtype, values: k })?;
    let lengths = field_lengths(dtype, k).ok_or_else(|| not_quantised("put together", dtype))?;
    let found = [
        ("scales", row.scales.len()),
        ("minima", row.minima.len()),
        ("sub-scales", row.sub_scales.len()),
        ("sub-minima", row.sub_minima.len()),
    ];
    for ((operand, found), wanted) in found.into_iter().zip(lengths) {
        if found != wanted {
            return Err(Error::Size { op: "put together", operand, wanted, found });
        }
    }
    match dtype {
        DType::Affine(format) => {
            out.reserve(bytes);
            for (g, codes) in row.codes.chunks(format.group().of(k)).enumerate() {
                out.extend_from_slice(&row.scales[g].to_le_bytes());
                if !format.symmetric() {
                    out.push(row.sub_minima[g]);
                }
                pack_sequence(format.bits(), codes, out);
            }
        }
        DType::Block(block) => {
            let first = out.len();
            out.resize(first + bytes, 0);
            let out = &mut out[first..];
            match block {
                Block::Q8_0 => simple_together::<blocks::Q8_0, 34>(row, out),
                Block::Q4_0 | Block::IQ4_NL => simple_together::<blocks::Q4_0, 18>(row, out),
                Block::Q4_1 => simple_together::<blocks::Q4_1, 20>(row, out),
                Block::Q5_0 => simple_together::<blocks::Q5_0, 22>(row, out),
                Block::Q5_1 => simple_together::<blocks::Q5_1, 24>(row, out),
                Block::Q2_K => nested_together::<blocks::Q2K, 16, 84>(row, out),
                Block::Q3_K => nested_together::<blocks::Q3K, 16, 110>(row, out),
                Block::Q4_K => nested_together::<blocks::Q4K, 8, 144>(row, out),
                Block::Q5_K => nested_together::<blocks::Q5K, 8, 176>(row, out),
                Block::Q6_K => nested_together::<blocks::Q6K, 16, 210>(row, out),
                Block::IQ4_XS => nested_together::<blocks::Iq4Xs, 8, 136>(row, out),
            }
        }
        _ => return Err(not_quantised("put together", dtype)),
    }
    Ok(())
}

/// Lengths of `scales`, `minima`, `sub_scales` and `sub_minima`.
fn field_lengths(dtype: DType, k: usize) -> Option<[usize; 4]> {
    match dtype {
        DType::Affine(format) => {
            let groups = k.div_ceil(format.group().of(k));
            Some([groups, 0, 0, if format.symmetric() { 0 } else { groups }])
        }
        DType::Block(block) => {
            let Grid { group, minima, sub, .. } = grid(block);
            let blocks = k / block.layout().0;
            let minima = |n| if minima { n } else { 0 };
            Some(match sub {
                None => [blocks, minima(blocks), 0, 0],
                Some(_) => [blocks, minima(blocks), k / group, minima(k / group)],
            })
        }
        _ => None,
    }
}

fn simple_together<F: Simple<B>, const B: usize>(row: &RowCodes, out: &mut [u8]) {
    let codes = row.codes.as_chunks::<32>().0;
    for (i, (block, codes)) in out.as_chunks_mut::<B>().0.iter_mut().zip(codes).enumerate() {
        F::pack(row.scales[i], row.minima.get(i).copied().unwrap_or(0), codes, block);
    }
}

fn nested_together<F: Super<G, B>, const G: usize, const B: usize>(row: &RowCodes, out: &mut [u8]) {
    let codes = row.codes.as_chunks::<256>().0;
    for (i, (block, codes)) in out.as_chunks_mut::<B>().0.iter_mut().zip(codes).enumerate() {
        F::pack(&nested_of(row, i), codes, block);
    }
}

/// The scales of block `i` of 256 values.
pub(crate) fn nested_of<const G: usize>(row: &RowCodes, i: usize) -> Nested<G> {
    let field = |values: &[u8]| {
        let values = values.as_chunks::<G>().0;
        values.get(i).copied().unwrap_or([0; G])
    };
    Nested {
        d: row.scales[i],
        dmin: row.minima.get(i).copied().unwrap_or(0),
        scales: field(&row.sub_scales),
        minima: field(&row.sub_minima),
    }
}
