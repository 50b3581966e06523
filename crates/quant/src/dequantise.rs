//! Bytes of a row to f32.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use pocketglm_tensor::{Affine, Block, DType, Isa, Vectorise};

use crate::blocks::{self, Simple, Super};
use crate::codes::{affine_lattice, check_bytes, grid, nested_lattice, simple_lattice, unpack_sequence};
use crate::{Error, Result};

/// The values of a row of `out.len()` values: exactly ggml's for its formats, `scale * (q - zero)` for affine ones.
///
/// # Errors
/// [`Error::DType`] for integer types, [`Error::RowLength`] where the format has no rows of that length, and
/// [`Error::Bytes`] where the bytes are too few or too many.
pub fn dequantise_row(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check_bytes(dtype, bytes.len(), out.len())?;
    dequantise_row_on(Isa::detect(), dtype, bytes, out)
}

/// The same as compiled for one instruction set, of bytes of the right number.
pub(crate) fn dequantise_row_on(isa: Isa, dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    isa.vectorise(Values { dtype, bytes, out })
}

/// A row whose sizes fit.
struct Values<'a> {
    dtype: DType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Vectorise for Values<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run(self) -> Result<()> {
        values(self.dtype, self.bytes, self.out)
    }
}

#[inline(always)]
fn values(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        DType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            // In pieces, because the bytes may lie at any address and the conversion wants aligned halves.
            let mut halves = [f16::ZERO; 256];
            for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
                for (h, b) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *h = f16::from_le_bytes(*b);
                }
                halves[..out.len()].convert_to_f32_slice(out);
            }
        }
        DType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = bf16::from_le_bytes(*b).to_f32();
            }
        }
        DType::Affine(format) => affine_row(format, bytes, out),
        DType::Block(block) => match block {
            Block::Q8_0 => simple_row::<blocks::Q8_0, 34>(block, bytes, out),
            Block::Q4_0 | Block::IQ4_NL => simple_row::<blocks::Q4_0, 18>(block, bytes, out),
            Block::Q4_1 => simple_row::<blocks::Q4_1, 20>(block, bytes, out),
            Block::Q5_0 => simple_row::<blocks::Q5_0, 22>(block, bytes, out),
            Block::Q5_1 => simple_row::<blocks::Q5_1, 24>(block, bytes, out),
            Block::Q2_K => nested_row::<blocks::Q2K, 16, 84>(block, bytes, out),
            Block::Q3_K => nested_row::<blocks::Q3K, 16, 110>(block, bytes, out),
            Block::Q4_K => nested_row::<blocks::Q4K, 8, 144>(block, bytes, out),
            Block::Q5_K => nested_row::<blocks::Q5K, 8, 176>(block, bytes, out),
            Block::Q6_K => nested_row::<blocks::Q6K, 16, 210>(block, bytes, out),
            Block::IQ4_XS => nested_row::<blocks::Iq4Xs, 8, 136>(block, bytes, out),
        },
        found => {
            return Err(Error::DType {
                op: "dequantise",
                wanted: "a floating-point or quantised type",
                found,
            });
        }
    }
    Ok(())
}

#[inline(always)]
fn simple_row<F: Simple<B>, const B: usize>(block: Block, bytes: &[u8], out: &mut [f32]) {
    let grid = grid(block);
    let mut codes = [0; 32];
    for (out, bytes) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<B>().0) {
        let (d, m) = F::unpack(bytes, &mut codes);
        simple_lattice(grid, d, m).values(&codes, out);
    }
}

#[inline(always)]
fn nested_row<F: Super<G, B>, const G: usize, const B: usize>(block: Block, bytes: &[u8], out: &mut [f32]) {
    let grid = grid(block);
    let mut codes = [0; 256];
    for (out, bytes) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<B>().0) {
        let scales = F::unpack(bytes, &mut codes);
        let groups = out.chunks_exact_mut(256 / G).zip(codes.chunks_exact(256 / G));
        for (g, (out, codes)) in groups.enumerate() {
            nested_lattice(grid, &scales, g).values(codes, out);
        }
    }
}

#[inline(always)]
fn affine_row(format: Affine, bytes: &[u8], out: &mut [f32]) {
    let group = format.group().of(out.len());
    let bytes = bytes.chunks(format.group_bytes(group).unwrap_or(usize::MAX));
    let per_byte = 8 / usize::from(format.bits());
    let mut codes = [0; 128];
    for (bytes, out) in bytes.zip(out.chunks_mut(group)) {
        let (header, packed) = bytes.split_at(format.header());
        let scale = u16::from_le_bytes([header[0], header[1]]);
        let lattice = affine_lattice(format, scale, header.get(2).copied().unwrap_or(0));
        for (out, packed) in out.chunks_mut(128).zip(packed.chunks(128 / per_byte)) {
            let codes = &mut codes[..out.len()];
            unpack_sequence(format.bits(), packed, codes);
            lattice.values(codes, out);
        }
    }
}
