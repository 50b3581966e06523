//! Weights on the device: how formats are laid out there, and how they get there.
//!
//! A quantised matrix `[rows, k]` is three arrays. Codes of 2, 4 or 8 bits, row by row, in blocks of 32 values: of 8 bits
//! in order and signed; of 4 bits eight to a word, the first four in the lower halves of its bytes; of 2 bits sixteen to a
//! word, four bytes of one pair of bits after the other. So that four values that follow one another are four bytes of
//! one masked word, which is what packed byte products take. Scales in half precision times a power of two for the
//! whole matrix, and, where the format has them, zero points or minima likewise. Formats of 3 bits take 4 there, those of
//! 5 and 6 bits, and those whose codes are places in a table, take 8.

use half::f16;
use pocketglm_graph::{DeviceFault, Error, Result};
use pocketglm_kernels::Variant;
use pocketglm_tensor::{
    AlignedF32, Cpu, DType, IQ4_TABLE, Packed, PackedFormat, RowCodes, ScaleKind, Tensor, WeightSource,
    ZeroKind,
};
use std::sync::{Mutex, PoisonError};

use crate::device::{Buffer, Device};

/// Values of a block.
const BLOCK: usize = 32;
/// Rows that are taken apart before they go to the device.
const ROWS_AT_ONCE: usize = 256;
/// Bytes of a matrix that is used as stored that go to the device at once; then the file's pages may leave memory.
const STEP: usize = 16 << 20;

/// Element types on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    F32,
    F16,
    BF16,
    Q8,
    Q4,
    Q2,
}

/// What stands beside the scales of a quantised matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Offsets {
    /// Nothing: `w = s (q - zero)`.
    None,
    /// A zero point for each group: `w = s (q - z)`.
    Zeros,
    /// A minimum for each group: `w = s q + m`.
    Minima,
}

/// A format as the kernels know it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Form {
    pub kind: Kind,
    /// Values that share a scale; 0 for a whole row.
    pub group: usize,
    pub offsets: Offsets,
    /// The code of zero where all groups share it.
    pub zero: f32,
    /// Subtracted from a code of the checkpoint's format before it is stored.
    minus: i32,
    /// Whether codes are places in the table of IQ4.
    table: bool,
}

impl Form {
    /// The form that a type takes on the device.
    pub fn of(dtype: DType) -> Option<Form> {
        let plain = |kind| Form { kind, group: 0, offsets: Offsets::None, zero: 0.0, minus: 0, table: false };
        match dtype {
            DType::F32 => return Some(plain(Kind::F32)),
            DType::F16 => return Some(plain(Kind::F16)),
            DType::BF16 => return Some(plain(Kind::BF16)),
            _ => {}
        }
        let format = PackedFormat::of(dtype)?;
        if format.table {
            return Some(Form { table: true, group: format.group, ..plain(Kind::Q8) });
        }
        let kind = match format.bits {
            2 => Kind::Q2,
            3 | 4 => Kind::Q4,
            _ => Kind::Q8,
        };
        let mut form = Form { group: format.group, ..plain(kind) };
        match format.zero {
            // Signed codes around zero.
            ZeroKind::Fixed(zero) if kind == Kind::Q8 => form.minus = i32::from(zero),
            ZeroKind::Fixed(zero) => form.zero = f32::from(zero),
            ZeroKind::Codes => {
                form.offsets = Offsets::Zeros;
                form.minus = if kind == Kind::Q8 { 128 } else { 0 };
            }
            ZeroKind::Minima => form.offsets = Offsets::Minima,
        }
        Some(form)
    }

    pub fn is_quantised(&self) -> bool {
        matches!(self.kind, Kind::Q8 | Kind::Q4 | Kind::Q2)
    }

    /// Adds what a kernel must know of the format.
    pub fn define(&self, variant: Variant) -> Variant {
        let variant = match self.kind {
            Kind::F32 => return variant.flag("W_F32"),
            Kind::F16 => return variant.flag("W_F16"),
            Kind::BF16 => return variant.flag("W_BF16"),
            Kind::Q8 => variant.flag("W_Q8"),
            Kind::Q4 => variant.flag("W_Q4"),
            Kind::Q2 => variant.flag("W_Q2"),
        };
        variant
            .flag("W_QUANT")
            .flag_if(self.group == 16, "W_GROUP16")
            .flag_if(self.offsets != Offsets::None, "W_OFFSETS")
            .flag_if(self.offsets == Offsets::Minima, "W_MINIMA")
    }

    fn bits(&self) -> u64 {
        match self.kind {
            Kind::F32 => 32,
            Kind::F16 | Kind::BF16 => 16,
            Kind::Q8 => 8,
            Kind::Q4 => 4,
            Kind::Q2 => 2,
        }
    }

    /// Blocks of a row.
    pub fn blocks(&self, k: usize) -> usize {
        k.div_ceil(BLOCK)
    }

    /// Scales of a row.
    pub fn groups(&self, k: usize) -> usize {
        match (self.is_quantised(), self.group) {
            (false, _) => 0,
            (true, 0) => 1,
            (true, group) => k.div_ceil(group),
        }
    }

    /// A block's scale is number `block >> shift`.
    pub fn shift(&self) -> u32 {
        if self.group == 0 { 31 } else { (self.group / BLOCK).max(1).trailing_zeros() }
    }

    fn row_bytes(&self, k: usize) -> u64 {
        let values = if self.is_quantised() { self.blocks(k) * BLOCK } else { k };
        values as u64 * self.bits() / 8
    }

    /// Bytes of a matrix on the device.
    pub fn bytes(&self, rows: usize, k: usize) -> u64 {
        let arrays = if self.offsets == Offsets::None { 1 } else { 2 };
        rows as u64 * (self.row_bytes(k) + arrays * self.groups(k) as u64 * 2)
    }
}

/// Rows `first .. first + rows` of a matrix: what one binding holds.
pub(crate) struct Part {
    pub first: usize,
    pub rows: usize,
    pub codes: Buffer,
    pub scales: Option<Buffer>,
    pub offsets: Option<Buffer>,
}

/// A matrix on the device.
pub(crate) struct Matrix {
    pub form: Form,
    pub rows: usize,
    pub k: usize,
    /// Power of two that all scales and minima are multiplied with.
    pub factor: f32,
    pub parts: Vec<Part>,
}

/// Rows of each part of a matrix.
fn part_rows(device: &Device, form: &Form, rows: usize, k: usize) -> Result<usize> {
    let row = form.row_bytes(k).max(1);
    // Sixty-four, so that a part begins at a whole word whatever the format.
    let fit = (device.binding_limit() / row) as usize / 64 * 64;
    if fit == 0 {
        return Err(device.error(
            DeviceFault::Unsupported,
            format!("64 rows of {row} bytes do not fit a binding of {} bytes", device.binding_limit()),
        ));
    }
    Ok(fit.min(rows.max(1)))
}

impl Matrix {
    /// Brings a matrix of the source to the device.
    pub fn load(
        device: &Device,
        cpu: &Cpu,
        weights: &dyn WeightSource,
        name: &str,
        dtype: DType,
        [rows, k]: [usize; 2],
    ) -> Result<Matrix> {
        let form = Form::of(dtype).ok_or_else(|| {
            device.error(
                DeviceFault::Unsupported,
                format!("tensor `{name}` of type {dtype} has no form on a GPU"),
            )
        })?;
        if form.is_quantised() {
            return Matrix::quantised(device, cpu, weights, (name, dtype, form), [rows, k]);
        }
        let tensor = weights.tensor(name)?;
        let matrix = Matrix::stored(device, name, form, [rows, k], &tensor)?;
        tensor.shared_bytes().release();
        Ok(matrix)
    }

    fn stored(
        device: &Device,
        name: &str,
        form: Form,
        [rows, k]: [usize; 2],
        tensor: &Tensor,
    ) -> Result<Matrix> {
        let row = form.row_bytes(k) as usize;
        let step = part_rows(device, &form, rows, k)?;
        let mut parts = Vec::new();
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let bytes = tensor.bytes().get(first * row..(first + count) * row).unwrap_or(&[]);
            let codes = device.storage(name, (count * row) as u64)?;
            for (i, piece) in bytes.chunks(STEP).enumerate() {
                device.write(&codes, (i * STEP) as u64, piece)?;
                let from = first * row + i * STEP;
                tensor.shared_bytes().slice(from..from + piece.len()).iter().for_each(|b| b.release());
            }
            parts.push(Part { first, rows: count, codes, scales: None, offsets: None });
        }
        Ok(Matrix { form, rows, k, factor: 1.0, parts })
    }

    fn quantised(
        device: &Device,
        cpu: &Cpu,
        weights: &dyn WeightSource,
        (name, dtype, form): (&str, DType, Form),
        [rows, k]: [usize; 2],
    ) -> Result<Matrix> {
        let source = Rows::open(device, weights, name, dtype, k)?;
        let step = part_rows(device, &form, rows, k)?;
        let row_bytes = form.row_bytes(k) as usize;
        let groups = form.groups(k);
        let mut scales = AlignedF32::zeroed(rows * groups)?;
        let mut offsets = AlignedF32::zeroed(if form.offsets == Offsets::None { 0 } else { rows * groups })?;
        let mut buffers = Vec::new();
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let codes = device.storage(name, (count * row_bytes) as u64)?;
            for at in (first..first + count).step_by(ROWS_AT_ONCE) {
                let these = ROWS_AT_ONCE.min(first + count - at);
                let bytes = source.codes(cpu, &form, at, these, [&mut scales, &mut offsets])?;
                device.write(&codes, ((at - first) * row_bytes) as u64, &bytes)?;
            }
            // What was written waits on the host until the device takes it.
            let index = device.queue.submit([]);
            device.wait(index)?;
            buffers.push((first, count, codes));
        }
        source.release();
        let factor = factor(&scales);
        let halves = |values: &[f32], by: f32| -> Vec<u8> {
            values.iter().flat_map(|v| f16::from_f32(v * by).to_le_bytes()).collect()
        };
        let by = if form.offsets == Offsets::Minima { 1.0 / factor } else { 1.0 };
        let mut parts = Vec::new();
        for (first, count, codes) in buffers {
            let range = first * groups..(first + count) * groups;
            let part_scales = halves(scales.get(range.clone()).unwrap_or(&[]), 1.0 / factor);
            let part_offsets = offsets.get(range).map(|v| halves(v, by));
            let part_offsets = part_offsets.filter(|_| form.offsets != Offsets::None);
            parts.push(Part {
                first,
                rows: count,
                codes,
                scales: Some(device.upload(name, &part_scales)?),
                offsets: part_offsets.map(|v| device.upload(name, &v)).transpose()?,
            });
        }
        Ok(Matrix { form, rows, k, factor, parts })
    }
}

/// The power of two that brings the largest scale to about one, so that half precision has room below it.
fn factor(scales: &[f32]) -> f32 {
    let most = scales.iter().fold(0.0f32, |m, s| m.max(s.abs()));
    if most > 0.0 && most.is_finite() { most.log2().floor().clamp(-100.0, 100.0).exp2() } else { 1.0 }
}

/// Where the rows of a quantised matrix come from.
enum Rows<'a> {
    Packed(Packed),
    Stored { tensor: Tensor, dtype: DType, k: usize, row_bytes: usize, name: &'a str },
}

impl<'a> Rows<'a> {
    fn open(
        device: &Device,
        weights: &dyn WeightSource,
        name: &'a str,
        dtype: DType,
        k: usize,
    ) -> Result<Rows<'a>> {
        if let Some(packed) = weights.packed(name)? {
            return Ok(Rows::Packed(packed));
        }
        let row_bytes = dtype.row_bytes(k).ok_or_else(|| {
            device.error(DeviceFault::Unsupported, format!("tensor `{name}`: rows of {k} values of {dtype}"))
        })?;
        Ok(Rows::Stored { tensor: weights.tensor(name)?, dtype, k, row_bytes, name })
    }

    /// Codes of `count` rows from row `at` on as the device has them; their scales and offsets go to the matrix's.
    fn codes(
        &self,
        cpu: &Cpu,
        form: &Form,
        at: usize,
        count: usize,
        [scales, offsets]: [&mut AlignedF32; 2],
    ) -> Result<Vec<u8>> {
        let k = match self {
            Rows::Packed(p) => p.k(),
            Rows::Stored { k, .. } => *k,
        };
        let (row_bytes, groups) = (form.row_bytes(k) as usize, form.groups(k));
        let mut bytes = vec![0u8; count * row_bytes];
        let scales = &mut scales[at * groups..(at + count) * groups];
        let mut none = vec![0.0; count * groups];
        let offsets = offsets.get_mut(at * groups..(at + count) * groups).unwrap_or(&mut none);
        type Row<'r> = Mutex<(&'r mut [u8], &'r mut [f32], &'r mut [f32])>;
        let targets: Vec<Row<'_>> = bytes
            .chunks_exact_mut(row_bytes.max(1))
            .zip(scales.chunks_exact_mut(groups.max(1)))
            .zip(offsets.chunks_exact_mut(groups.max(1)))
            .map(|((b, s), o)| Mutex::new((b, s, o)))
            .collect();
        let failed = Mutex::new(None);
        cpu.parallel(targets.len(), &|i| {
            let mut row = RowCodes::default();
            if let Err(error) = self.row(at + i, &mut row) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
            // Each row is one task's; the lock is never contended.
            let mut target = targets[i].lock().unwrap_or_else(PoisonError::into_inner);
            let (bytes, scales, offsets) = &mut *target;
            write_codes(form, &row.codes, bytes);
            self.scales(form, &row, scales, offsets);
        });
        drop(targets);
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(bytes),
        }
    }

    fn row(&self, row: usize, codes: &mut RowCodes) -> Result<()> {
        match self {
            Rows::Packed(packed) => packed.row_codes(row, codes).ok_or_else(|| Error::Name {
                kind: "weight",
                name: "packed".into(),
                what: format!("has no row {row}"),
            }),
            Rows::Stored { tensor, dtype, k, row_bytes, name } => {
                let stored = tensor.bytes().get(row * row_bytes..(row + 1) * row_bytes).unwrap_or(&[]);
                pocketglm_quant::take_apart(*dtype, stored, *k, codes).map_err(|source| Error::Quantised {
                    name: (*name).into(),
                    row,
                    source,
                })
            }
        }
    }

    fn format(&self) -> Option<PackedFormat> {
        match self {
            Rows::Packed(p) => Some(p.format()),
            Rows::Stored { dtype, .. } => PackedFormat::of(*dtype),
        }
    }

    /// Scale and offset of each group as numbers.
    fn scales(&self, form: &Form, row: &RowCodes, scales: &mut [f32], offsets: &mut [f32]) {
        let Some(format) = self.format() else { return };
        let number = |bits: u16| match format.scale {
            ScaleKind::BF16 => f32::from_bits(u32::from(bits) << 16),
            _ => f16::from_bits(bits).to_f32(),
        };
        // Groups that share a nested scale: those of 256 values.
        let nested = if format.scale == ScaleKind::Nested { 256 / format.group.max(1) } else { 1 };
        for (g, scale) in scales.iter_mut().enumerate() {
            let at = g / nested;
            let of = |values: &[u16]| values.get(at).copied().map_or(0.0, number);
            *scale = of(&row.scales);
            if nested > 1 {
                *scale *= row.sub_scales.get(g).map_or(0.0, |&s| f32::from(s as i8));
            }
            let sub = row.sub_minima.get(g).map_or(0.0, |&m| f32::from(m));
            offsets[g] = match form.offsets {
                Offsets::None => 0.0,
                Offsets::Zeros => sub - form.minus as f32,
                Offsets::Minima if nested > 1 => -of(&row.minima) * sub,
                Offsets::Minima => of(&row.minima),
            };
        }
    }

    fn release(&self) {
        if let Rows::Stored { tensor, .. } = self {
            tensor.shared_bytes().release();
        }
    }
}

/// Codes of a row in the order of the device; what is behind them stays zero.
fn write_codes(form: &Form, codes: &[u8], out: &mut [u8]) {
    let value = |code: u8| {
        let code =
            if form.table { i32::from(IQ4_TABLE[usize::from(code & 15)]) - 128 } else { i32::from(code) };
        (code - form.minus) as u8
    };
    let (block_bytes, per_word) = match form.kind {
        Kind::Q8 => (32, 4),
        Kind::Q4 => (16, 8),
        _ => (8, 16),
    };
    let bits = 32 / per_word;
    for (block, out) in codes.chunks(BLOCK).zip(out.chunks_exact_mut(block_bytes)) {
        for (i, &code) in block.iter().enumerate() {
            let (word, e) = (i / per_word, i % per_word);
            out[word * 4 + e % 4] |= value(code) << (e / 4 * bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pocketglm_tensor::{Affine, Block, Group};

    #[test]
    fn every_format_has_a_form() {
        let affine = Affine::all().map(DType::Affine);
        let blocks = Block::ALL.iter().map(|b| DType::Block(*b));
        for dtype in affine.chain(blocks).chain([DType::F32, DType::F16, DType::BF16]) {
            assert!(Form::of(dtype).is_some(), "{dtype}");
        }
        assert_eq!(Form::of(DType::I32), None);
    }

    #[test]
    fn four_values_that_follow_one_another_are_four_bytes_of_a_masked_word() {
        let codes: Vec<u8> = (0..32).map(|i| i % 16).collect();
        let mut out = [0u8; 16];
        write_codes(&Form::of(DType::Block(Block::Q4_0)).unwrap(), &codes, &mut out);
        let word = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
        assert_eq!((word & 0x0f0f_0f0f).to_le_bytes(), codes[8..12]);
        assert_eq!(((word >> 4) & 0x0f0f_0f0f).to_le_bytes(), codes[12..16]);
        let two: Vec<u8> = (0..32).map(|i| (i / 3) % 4).collect();
        let mut out = [0u8; 8];
        write_codes(&Form::of(DType::Block(Block::Q2_K)).unwrap(), &two, &mut out);
        let word = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
        for i in 0..4 {
            assert_eq!(((word >> (2 * i)) & 0x0303_0303).to_le_bytes(), two[16 + 4 * i..20 + 4 * i]);
        }
    }

    #[test]
    fn a_group_of_a_row_has_one_scale() {
        let affine = Affine::all().find(|a| a.group() == Group::Row && a.bits() == 4).unwrap();
        let form = Form::of(DType::Affine(affine)).unwrap();
        assert_eq!((form.groups(4096), form.shift()), (1, 31));
        let form = Form::of(DType::Block(Block::Q4_0)).unwrap();
        assert_eq!((form.groups(13696), form.shift(), form.bytes(2, 64)), (428, 0, 2 * (32 + 4)));
    }
}
