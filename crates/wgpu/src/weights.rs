//! Weights on the device: how formats are laid out there, and how they get there.
//!
//! A quantised matrix `[rows, k]` is three arrays. Codes of 2, 4 or 8 bits, row by row, in blocks of 32 values: of 8 bits
//! in order and signed; of 4 bits eight to a word, the first four in the lower halves of its bytes; of 2 bits sixteen to a
//! word, four bytes of one pair of bits after the other. So that four values that follow one another are four bytes of
//! one masked word, which is what packed byte products take. Scales in half precision times a power of two for the
//! whole matrix, and, where groups have a zero point or a minimum, minima likewise. Formats of 3 bits take 4 there, those of
//! 5 and 6 bits, and those whose codes are places in a table, take 8. Scales that are products, and minima, are rounded to
//! half precision: a weight moves by at most 2^-11 of its group's range. Rows of every type are padded to whole blocks.

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

impl Kind {
    /// The code of zero in formats without minima.
    fn zero(self) -> i32 {
        match self {
            Kind::Q4 => 8,
            Kind::Q2 => 2,
            _ => 0,
        }
    }
}

/// A format as the kernels know it: `w = s (q - zero)`, where the zero is the kind's, or `w = s q + m` with minima.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Form {
    pub kind: Kind,
    /// Values that share a scale; 0 for a whole row.
    pub group: usize,
    /// Whether each group has a minimum.
    pub minima: bool,
    /// Added to a code of the checkpoint's format before it is stored.
    plus: i32,
    /// Whether codes are places in the table of IQ4.
    table: bool,
}

impl Form {
    /// The form that a type takes on the device.
    pub fn of(dtype: DType) -> Option<Form> {
        let plain = |kind| Form { kind, group: 0, minima: false, plus: 0, table: false };
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
            ZeroKind::Fixed(zero) => form.plus = kind.zero() - i32::from(zero),
            ZeroKind::Codes => {
                form.minima = true;
                form.plus = if kind == Kind::Q8 { -128 } else { 0 };
            }
            ZeroKind::Minima => form.minima = true,
        }
        Some(form)
    }

    pub fn is_quantised(&self) -> bool {
        matches!(self.kind, Kind::Q8 | Kind::Q4 | Kind::Q2)
    }

    /// Adds what a kernel must know of the format.
    pub fn define(&self, variant: Variant) -> Variant {
        match self.kind {
            Kind::F32 => variant.flag("W_F32"),
            Kind::F16 => variant.flag("W_HALF").flag("W_F16"),
            Kind::BF16 => variant.flag("W_HALF").flag("W_BF16"),
            kind => variant
                .flag_if(kind == Kind::Q8, "BITS8")
                .flag_if(kind == Kind::Q2, "BITS2")
                .flag_if(self.group == 16, "GROUP16")
                .flag_if(self.minima, "ASYM"),
        }
    }

    /// The same for kernels on cooperative matrices, which tell the float formats apart by themselves.
    pub fn define_cooperative(&self, variant: Variant) -> Variant {
        match self.kind {
            Kind::F32 => variant.flag("W_FLOAT").flag("W_F32"),
            Kind::F16 => variant.flag("W_FLOAT").flag("W_F16"),
            Kind::BF16 => variant.flag("W_FLOAT").flag("W_BF16"),
            _ => self.define(variant),
        }
    }

    /// The same for kernels that read single values and have their zero as a constant.
    pub fn define_zero(&self, variant: Variant) -> Variant {
        let variant = self.define(variant);
        if !self.is_quantised() {
            return variant;
        }
        variant.number("ZERO", if self.minima { 0.0 } else { self.kind.zero() as f32 })
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
        (self.blocks(k) * BLOCK) as u64 * self.bits() / 8
    }

    /// Bytes of a matrix on the device.
    pub fn bytes(&self, rows: usize, k: usize) -> u64 {
        let arrays = if self.minima { 2 } else { 1 };
        rows as u64 * (self.row_bytes(k) + arrays * self.groups(k) as u64 * 2)
    }
}

/// Rows `first .. first + rows` of a matrix: what one binding holds.
pub(crate) struct Part {
    pub first: usize,
    pub rows: usize,
    pub codes: Buffer,
    pub scales: Option<Buffer>,
    pub minima: Option<Buffer>,
}

/// A matrix on the device.
pub(crate) struct Matrix {
    pub form: Form,
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

/// One matrix of the source: its name and its rows. Several of one form may be brought to the device as one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece<'n> {
    pub name: &'n str,
    pub dtype: DType,
    pub rows: usize,
}

impl Matrix {
    /// Brings matrices of the source to the device as one, the rows of one behind those of the other.
    pub fn load(
        device: &Device,
        cpu: &Cpu,
        weights: &dyn WeightSource,
        pieces: &[Piece<'_>],
        k: usize,
    ) -> Result<Matrix> {
        let Some(first) = pieces.first() else {
            return Err(device.error(DeviceFault::Unsupported, "a matrix without rows"));
        };
        let form = Form::of(first.dtype).ok_or_else(|| {
            device.error(
                DeviceFault::Unsupported,
                format!("tensor `{}` of type {} has no form on a GPU", first.name, first.dtype),
            )
        })?;
        let rows: usize = pieces.iter().map(|p| p.rows).sum();
        let row_bytes = form.row_bytes(k) as usize;
        let groups = form.groups(k);
        let mut loading = Loading {
            device,
            name: first.name,
            row_bytes,
            step: part_rows(device, &form, rows, k)?,
            rows,
            done: 0,
            parts: Vec::new(),
        };
        let mut scales = AlignedF32::zeroed(rows * groups)?;
        let mut minima = AlignedF32::zeroed(if form.minima { rows * groups } else { 0 })?;
        let mut before = 0;
        for piece in pieces {
            let source = Rows::open(device, weights, piece, &form, k)?;
            for at in (0..piece.rows).step_by(ROWS_AT_ONCE) {
                let count = ROWS_AT_ONCE.min(piece.rows - at);
                let bytes = source.codes(cpu, &form, k, at, count, before, [&mut scales, &mut minima])?;
                loading.push(&bytes)?;
                source.release(at, count);
            }
            before += piece.rows;
        }
        loading.flush()?;
        let factor = factor(&scales);
        let halves = |values: Option<&[f32]>| -> Vec<u8> {
            values.unwrap_or(&[]).iter().flat_map(|v| f16::from_f32(v / factor).to_le_bytes()).collect()
        };
        let mut parts = Vec::new();
        for (first_row, count, codes) in loading.parts {
            let range = first_row * groups..(first_row + count) * groups;
            let upload = |values: &AlignedF32| device.upload(first.name, &halves(values.get(range.clone())));
            let scales = form.is_quantised().then(|| upload(&scales)).transpose()?;
            let minima = form.minima.then(|| upload(&minima)).transpose()?;
            parts.push(Part { first: first_row, rows: count, codes, scales, minima });
        }
        Ok(Matrix { form, k, factor, parts })
    }
}

/// Codes on their way into the buffers of the parts.
struct Loading<'d> {
    device: &'d Device,
    name: &'d str,
    row_bytes: usize,
    /// Rows of a part, and of all.
    step: usize,
    rows: usize,
    done: usize,
    parts: Vec<(usize, usize, Buffer)>,
}

impl Loading<'_> {
    /// Appends rows.
    fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.done.is_multiple_of(self.step) {
                self.flush()?;
                let count = self.step.min(self.rows - self.done);
                let buffer = self.device.storage(self.name, (count * self.row_bytes) as u64)?;
                self.parts.push((self.done, count, buffer));
            }
            let Some((first, count, buffer)) = self.parts.last() else { return Ok(()) };
            let room = (first + count - self.done) * self.row_bytes;
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.device.write(buffer, ((self.done - first) * self.row_bytes) as u64, now)?;
            self.done += now.len() / self.row_bytes.max(1);
            bytes = rest;
        }
        Ok(())
    }

    /// What was written waits on the host until the device has taken it.
    fn flush(&self) -> Result<()> {
        let index = self.device.queue.submit([]);
        self.device.wait(index)
    }
}

/// The power of two that brings the largest scale to about one, so that half precision has room below it.
fn factor(scales: &[f32]) -> f32 {
    let most = scales.iter().fold(0.0f32, |m, s| m.max(s.abs()));
    if most > 0.0 && most.is_finite() { most.log2().floor().clamp(-100.0, 100.0).exp2() } else { 1.0 }
}

/// Where the rows of a matrix come from.
enum Rows<'a> {
    Packed(Packed),
    Stored { tensor: Tensor, dtype: DType, row_bytes: usize, name: &'a str },
}

impl<'a> Rows<'a> {
    fn open(
        device: &Device,
        weights: &dyn WeightSource,
        piece: &Piece<'a>,
        form: &Form,
        k: usize,
    ) -> Result<Rows<'a>> {
        let (name, dtype) = (piece.name, piece.dtype);
        if form.is_quantised()
            && let Some(packed) = weights.packed(name)?
        {
            return Ok(Rows::Packed(packed));
        }
        let row_bytes = dtype.row_bytes(k).ok_or_else(|| {
            device.error(DeviceFault::Unsupported, format!("tensor `{name}`: rows of {k} values of {dtype}"))
        })?;
        Ok(Rows::Stored { tensor: weights.tensor(name)?, dtype, row_bytes, name })
    }

    /// `count` rows from row `at` on as the device has them; their scales and minima go to the matrix's, which has
    /// `before` rows in front of these.
    fn codes(
        &self,
        cpu: &Cpu,
        form: &Form,
        k: usize,
        at: usize,
        count: usize,
        before: usize,
        [scales, minima]: [&mut AlignedF32; 2],
    ) -> Result<Vec<u8>> {
        let (row_bytes, groups) = (form.row_bytes(k) as usize, form.groups(k));
        let mut bytes = vec![0u8; count * row_bytes];
        if let (false, Rows::Stored { tensor, row_bytes: stored, .. }) = (form.is_quantised(), self) {
            let from = tensor.bytes().get(at * stored..(at + count) * stored).unwrap_or(&[]);
            for (to, from) in
                bytes.chunks_exact_mut(row_bytes.max(1)).zip(from.chunks_exact((*stored).max(1)))
            {
                to[..from.len()].copy_from_slice(from);
            }
            return Ok(bytes);
        }
        let range = (before + at) * groups..(before + at + count) * groups;
        let scales = scales.get_mut(range.clone()).unwrap_or(&mut []);
        let mut none = vec![0.0; count * groups];
        let minima = minima.get_mut(range).unwrap_or(&mut none);
        type Row<'r> = Mutex<(&'r mut [u8], &'r mut [f32], &'r mut [f32])>;
        let targets: Vec<Row<'_>> = bytes
            .chunks_exact_mut(row_bytes.max(1))
            .zip(scales.chunks_exact_mut(groups.max(1)))
            .zip(minima.chunks_exact_mut(groups.max(1)))
            .map(|((b, s), o)| Mutex::new((b, s, o)))
            .collect();
        let failed = Mutex::new(None);
        cpu.parallel(targets.len(), &|i| {
            let mut row = RowCodes::default();
            // Each row is one task's; the lock is never contended.
            let mut target = targets[i].lock().unwrap_or_else(PoisonError::into_inner);
            let (bytes, scales, minima) = &mut *target;
            let taken = self.row(at + i, k, &mut row).and_then(|()| {
                write_codes(form, &row.codes, bytes);
                self.scales(form, &row, scales, minima);
                match scales.iter().chain(minima.iter()).find(|v| !v.is_finite()) {
                    None => Ok(()),
                    Some(v) => Err(self.not_finite(at + i, *v)),
                }
            });
            if let Err(error) = taken {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
        drop(targets);
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(bytes),
        }
    }

    fn not_finite(&self, row: usize, value: f32) -> Error {
        let name = match self {
            Rows::Packed(_) => "a packed matrix",
            Rows::Stored { name, .. } => name,
        };
        pocketglm_tensor::Error::Source {
            name: name.into(),
            place: "the checkpoint".into(),
            what: format!("row {row} has the scale {value}, expected a finite number"),
        }
        .into()
    }

    fn row(&self, row: usize, k: usize, codes: &mut RowCodes) -> Result<()> {
        match self {
            Rows::Packed(packed) => packed.row_codes(row, codes).ok_or_else(|| Error::Name {
                kind: "weight",
                name: "packed".into(),
                what: format!("has no row {row}"),
            }),
            Rows::Stored { tensor, dtype, row_bytes, name } => {
                let stored = tensor.bytes().get(row * row_bytes..(row + 1) * row_bytes).unwrap_or(&[]);
                pocketglm_quant::take_apart(*dtype, stored, k, codes).map_err(|source| Error::Quantised {
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

    /// Scale and minimum of each group as numbers.
    fn scales(&self, form: &Form, row: &RowCodes, scales: &mut [f32], minima: &mut [f32]) {
        let Some(format) = self.format() else { return };
        let number = |bits: u16| match format.scale {
            ScaleKind::BF16 => f32::from_bits(u32::from(bits) << 16),
            _ => f16::from_bits(bits).to_f32(),
        };
        // Groups that share a nested scale: those of 256 values.
        let nested = if format.scale == ScaleKind::Nested { 256 / format.group.max(1) } else { 1 };
        for (g, (scale, minimum)) in scales.iter_mut().zip(minima).enumerate() {
            let at = g / nested;
            let of = |values: &[u16]| values.get(at).copied().map_or(0.0, number);
            *scale = of(&row.scales);
            if nested > 1 {
                *scale *= row.sub_scales.get(g).map_or(0.0, |&s| f32::from(s as i8));
            }
            let sub = row.sub_minima.get(g).map_or(0.0, |&m| f32::from(m));
            *minimum = match format.zero {
                ZeroKind::Fixed(_) => 0.0,
                // A code that is stored as q + plus stands for s (q + plus - (z + plus)).
                ZeroKind::Codes => -*scale * (sub + form.plus as f32),
                ZeroKind::Minima if nested > 1 => -of(&row.minima) * sub,
                ZeroKind::Minima => of(&row.minima),
            };
        }
    }

    /// Pages of a mapped file that are done with may leave memory.
    fn release(&self, at: usize, count: usize) {
        if let Rows::Stored { tensor, row_bytes, .. } = self {
            let part = tensor.shared_bytes().slice(at * row_bytes..(at + count) * row_bytes);
            part.iter().for_each(|b| b.release());
        }
    }
}

/// Codes of a row in the order of the device; what is behind them stays zero.
fn write_codes(form: &Form, codes: &[u8], out: &mut [u8]) {
    let value = |code: u8| {
        let code =
            if form.table { i32::from(IQ4_TABLE[usize::from(code & 15)]) - 128 } else { i32::from(code) };
        (code + form.plus) as u8
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
