//! Quantised matrices as the kernels read them: panels of sixteen rows, one sequential stream of bytes each.

#[cfg(not(target_family = "wasm"))]
use memmap2::MmapMut;
use std::sync::Arc;

use crate::simd::dot::LANES;
use crate::{Block, Bytes, BytesOwner, Cpu, DType, Error, Group, Result};

/// Steps of `k` whose codes lie together.
pub(crate) const UNIT: usize = 32;
/// Most values of a row that are made bytes with one scale.
pub(crate) const MAX_BLOCK: usize = 128;
/// Rows are padded with zero codes to a multiple of this.
const NESTED: usize = 256;

/// How codes of one row become values: `w = scale * q + minimum`, scale and minimum shared by a group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PackedFormat {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Values that share a scale: 16, 32, 64, 128, or 0 for the whole row.
    pub group: usize,
    /// How scales are stored.
    pub scale: ScaleKind,
    /// Where the zero of a group lies.
    pub zero: ZeroKind,
    /// Whether a code is an index into [`IQ4_TABLE`].
    pub table: bool,
}

/// How the scales of groups are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScaleKind {
    /// A binary16 number each.
    F16,
    /// A bfloat16 number each.
    BF16,
    /// A signed byte each, times a binary16 number for every 256 values.
    Nested,
}

/// Where the zero of a group lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ZeroKind {
    /// At this code, always.
    Fixed(u8),
    /// At a code that each group stores.
    Codes,
    /// A minimum is stored as the scale is: added where that is a number of its own, subtracted where nested.
    Minima,
}

/// Values of the codes of IQ4_NL and IQ4_XS, plus 128.
pub const IQ4_TABLE: [u8; 16] = {
    let values: [i16; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    let mut table = [0u8; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (values[i] + 128) as u8;
        i += 1;
    }
    table
};

impl PackedFormat {
    /// The layout that matrices of a quantised type are packed into.
    pub const fn of(dtype: DType) -> Option<PackedFormat> {
        use ScaleKind::{F16, Nested};
        use ZeroKind::{Fixed, Minima};
        let (bits, group, scale, zero, table) = match dtype {
            DType::Block(block) => match block {
                Block::Q8_0 => (8, 32, F16, Fixed(128), false),
                Block::Q4_0 => (4, 32, F16, Fixed(8), false),
                Block::Q4_1 => (4, 32, F16, Minima, false),
                Block::Q5_0 => (5, 32, F16, Fixed(16), false),
                Block::Q5_1 => (5, 32, F16, Minima, false),
                Block::Q2_K => (2, 16, Nested, Minima, false),
                Block::Q3_K => (3, 16, Nested, Fixed(4), false),
                Block::Q4_K => (4, 32, Nested, Minima, false),
                Block::Q5_K => (5, 32, Nested, Minima, false),
                Block::Q6_K => (6, 16, Nested, Fixed(32), false),
                Block::IQ4_NL => (4, 32, F16, Fixed(128), true),
                Block::IQ4_XS => (4, 32, Nested, Fixed(128), true),
            },
            DType::Affine(affine) => {
                let group = match affine.group() {
                    // One scale for the matrix is the same one in every row.
                    Group::Row | Group::Tensor => 0,
                    group => group.of(1),
                };
                let zero = if affine.symmetric() { Fixed(1 << (affine.bits() - 1)) } else { ZeroKind::Codes };
                (affine.bits(), group, ScaleKind::BF16, zero, false)
            }
            _ => return None,
        };
        Some(PackedFormat { bits, group, scale, zero, table })
    }

    /// Steps of `k` that share a header of scales.
    fn span(&self, k: usize) -> usize {
        match self.scale {
            ScaleKind::Nested => NESTED,
            _ if self.group == 0 => k.next_multiple_of(UNIT).max(UNIT),
            _ => self.group.max(UNIT),
        }
    }

    /// Bytes of `units` units of codes, sixteen rows.
    const fn code_bytes(&self, units: usize) -> usize {
        units * 64 * self.bits as usize
    }
}

/// Where things are in a panel of rows of `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) format: PackedFormat,
    /// Steps with a header of their own.
    pub(crate) span: usize,
    /// Values that share a scale, in steps.
    pub(crate) group: usize,
    /// Spans of a row.
    pub(crate) spans: usize,
    /// Bytes of a header.
    pub(crate) header: usize,
    /// Bytes of a span, header included.
    pub(crate) span_bytes: usize,
    /// In the header, behind the scales: 16-bit minima, then signed bytes of scales, then bytes of minima or zeros.
    pub(crate) minima: usize,
    pub(crate) sub_scales: usize,
    pub(crate) sub_minima: usize,
}

impl Layout {
    pub(crate) fn new(format: PackedFormat, k: usize) -> Layout {
        let span = format.span(k);
        let group = if format.group == 0 { span } else { format.group };
        let groups = span / group;
        let has_minima = format.zero == ZeroKind::Minima;
        let nested = format.scale == ScaleKind::Nested;
        // One 16-bit number per group, or per span where nested.
        let halves = 2 * LANES * if nested { 1 } else { groups };
        let minima = halves;
        let sub_scales = minima + if has_minima { halves } else { 0 };
        let sub_minima = sub_scales + if nested { LANES * groups } else { 0 };
        let bytes = nested && has_minima || format.zero == ZeroKind::Codes;
        let header = sub_minima + if bytes { LANES * groups } else { 0 };
        Layout {
            format,
            span,
            group,
            spans: k.div_ceil(span),
            header,
            span_bytes: header + format.code_bytes(span / UNIT),
            minima,
            sub_scales,
            sub_minima,
        }
    }

    pub(crate) fn panel_bytes(&self) -> Option<usize> {
        self.span_bytes.checked_mul(self.spans)
    }
}

/// One row of quantised values, taken apart. The vectors are reused from row to row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowCodes {
    /// One code for each value, in order.
    pub codes: Vec<u8>,
    /// Bits of the scales: one 16-bit number for each group, or for each 256 values where nested.
    pub scales: Vec<u16>,
    /// Bits of the minima, as many as scales; empty for formats without.
    pub minima: Vec<u16>,
    /// Nested formats: the factor of each group's scale, a signed byte.
    pub sub_scales: Vec<u8>,
    /// The factor of each group's minimum where nested, its zero point where it stores one; else empty.
    pub sub_minima: Vec<u8>,
}

/// A quantised matrix `[rows, k]` in panels of sixteen rows.
///
/// Each panel is a run of spans; a span is its header (scales of its groups, sixteen rows side by side) and its codes,
/// in units of 32 steps: planes of 4, 2 and 1 bits (8 bits as they are), so arranged that the 64 bytes of a vector
/// are four steps of sixteen rows.
#[derive(Clone, Debug)]
pub struct Packed {
    pub(crate) layout: Layout,
    rows: usize,
    k: usize,
    bytes: Bytes,
    input_range: Option<f32>,
}

fn too_large(rows: usize, k: usize) -> Error {
    Error::Value { op: "pack", what: format!("a matrix of {rows} x {k} does not fit in memory addresses") }
}

impl Packed {
    /// Bytes of a packed matrix of `rows` rows of `k`.
    ///
    /// # Errors
    /// [`Error::Value`] where that does not fit in memory addresses.
    pub fn bytes_for(format: PackedFormat, rows: usize, k: usize) -> Result<usize> {
        let too_large = || too_large(rows, k);
        if rows > isize::MAX as usize / LANES || k > isize::MAX as usize / NESTED {
            return Err(too_large());
        }
        let panel = Layout::new(format, k).panel_bytes().ok_or_else(too_large)?;
        panel.checked_mul(rows.div_ceil(LANES)).filter(|&n| isize::try_from(n).is_ok()).ok_or_else(too_large)
    }

    /// Packs rows that `row(index, &mut codes)` takes apart, into huge pages where the system has them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what `row` reports; [`Error::Size`] where a row does not have the codes or scales that
    /// the format implies.
    pub fn pack(
        cpu: &Cpu,
        format: PackedFormat,
        rows: usize,
        k: usize,
        row: &(dyn Fn(usize, &mut RowCodes) -> Result<()> + Sync),
    ) -> Result<Packed> {
        let bytes = Packed::bytes_for(format, rows, k)?;
        let mut memory = Memory::new(bytes, "packed weights")?;
        pack_into(cpu, format, rows, k, row, memory.writable())?;
        Packed::from_bytes(format, rows, k, Bytes::from_owner(Arc::new(memory)))
    }

    /// The same into memory of the caller: how files are packed beforehand.
    ///
    /// # Errors
    /// As [`Packed::pack`], and [`Error::Size`] where `out` is not [`Packed::bytes_for`] long.
    pub fn pack_to(
        cpu: &Cpu,
        format: PackedFormat,
        rows: usize,
        k: usize,
        row: &(dyn Fn(usize, &mut RowCodes) -> Result<()> + Sync),
        out: &mut [u8],
    ) -> Result<()> {
        let wanted = Packed::bytes_for(format, rows, k)?;
        if out.len() != wanted {
            return Err(Error::Size { op: "pack", operand: "out", wanted, found: out.len() });
        }
        pack_into(cpu, format, rows, k, row, out)
    }

    /// Rows of a panel.
    pub const PANEL_ROWS: usize = LANES;

    /// Packs one panel on the calling thread: `rows` are the at most [`Packed::PANEL_ROWS`] rows that it has, each of `k` values.
    ///
    /// # Errors
    /// [`Error::Size`] where a row does not have the codes or scales that the format implies, there is none or there are too
    /// many, or `out` is not [`Packed::bytes_for`] of a panel long.
    pub fn pack_panel(format: PackedFormat, k: usize, rows: &[RowCodes], out: &mut [u8]) -> Result<()> {
        if rows.is_empty() || rows.len() > LANES {
            return Err(Error::Size { op: "pack", operand: "rows", wanted: LANES, found: rows.len() });
        }
        let wanted = Packed::bytes_for(format, LANES, k)?;
        if out.len() != wanted {
            return Err(Error::Size { op: "pack", operand: "out", wanted, found: out.len() });
        }
        pack_one(&Layout::new(format, k), k, rows, out)
    }

    /// A matrix that was packed before, such as a part of a mapped file.
    ///
    /// # Errors
    /// [`Error::Size`] where the bytes are not as many as the format needs.
    pub fn from_bytes(format: PackedFormat, rows: usize, k: usize, bytes: Bytes) -> Result<Packed> {
        let wanted = Packed::bytes_for(format, rows, k)?;
        if bytes.len() != wanted {
            return Err(Error::Size { op: "pack", operand: "bytes", wanted, found: bytes.len() });
        }
        Ok(Packed { layout: Layout::new(format, k), rows, k, bytes, input_range: None })
    }

    /// The same matrix for an input whose values lie in `-range..=range`: it is quantised with that fixed scale, and what
    /// lies outside is cut off.
    ///
    /// # Errors
    /// [`Error::Value`] where the range is not a finite number above 0.
    pub fn with_input_range(mut self, range: f32) -> Result<Packed> {
        if !(range > 0.0 && range.is_finite()) {
            let what = format!("{range} as the range of an input, expected a finite number above 0");
            return Err(Error::Value { op: "pack", what });
        }
        self.input_range = Some(range);
        Ok(self)
    }

    /// The largest magnitude of the input, where it is fixed.
    pub fn input_range(&self) -> Option<f32> {
        self.input_range
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.rows * self.k
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The format.
    pub fn format(&self) -> PackedFormat {
        self.layout.format
    }

    /// All panels.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The same, sharing them.
    pub fn shared_bytes(&self) -> Bytes {
        self.bytes.clone()
    }

    /// The panel that holds row `16 i`, with all that is behind it.
    #[inline(always)]
    pub(crate) fn panel(&self, i: usize) -> *const u8 {
        // At most the address past the end.
        let at = (i * self.layout.span_bytes * self.layout.spans).min(self.bytes.len());
        self.bytes.as_slice()[at..].as_ptr()
    }

    /// The value at `(row, step)`, from the definition of the layout; `None` outside.
    pub fn get(&self, row: usize, step: usize) -> Option<f32> {
        if row >= self.rows || step >= self.k {
            return None;
        }
        let l = &self.layout;
        let group = step % l.span / l.group;
        let (scale, minimum) = self.scale(row, step / l.span, group);
        let panel = l.span_bytes * l.spans;
        let at = row / LANES * panel + step / l.span * l.span_bytes + l.header;
        let unit = at + l.format.code_bytes(step % l.span / UNIT);
        let codes = &self.bytes()[unit..][..l.format.code_bytes(1)];
        Some(scale.mul_add(self.code(codes, step % UNIT, row % LANES), minimum))
    }

    /// All values of a row; those of `out` beyond its end are left alone.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let l = &self.layout;
        let panel = &self.bytes()[row / LANES * l.span_bytes * l.spans..][..l.span_bytes * l.spans];
        let units = panel.chunks_exact(l.span_bytes).enumerate().flat_map(|(s, span)| {
            span[l.header..]
                .chunks_exact(l.format.code_bytes(1))
                .enumerate()
                .map(move |(u, unit)| (s, u, unit))
        });
        // A group is at least half a unit.
        for ((s, u, unit), out) in units.zip(out[..self.k].chunks_mut(UNIT)) {
            for (half, out) in out.chunks_mut(UNIT / 2).enumerate() {
                let first = half * (UNIT / 2);
                let (scale, minimum) = self.scale(row, s, (u * UNIT + first) / l.group);
                for (step, out) in out.iter_mut().enumerate() {
                    *out = scale.mul_add(self.code(unit, first + step, row % LANES), minimum);
                }
            }
        }
    }

    /// Takes a row out again: what it was packed from. `None` where there is no such row.
    pub fn row_codes(&self, row: usize, out: &mut RowCodes) -> Option<()> {
        if row >= self.rows {
            return None;
        }
        let l = &self.layout;
        let lane = row % LANES;
        for v in [&mut out.codes, &mut out.sub_scales, &mut out.sub_minima] {
            v.clear();
        }
        out.scales.clear();
        out.minima.clear();
        let nested = l.format.scale == ScaleKind::Nested;
        let panel = self.bytes().get(row / LANES * l.span_bytes * l.spans..)?;
        for (s, span) in panel.chunks_exact(l.span_bytes).take(l.spans).enumerate() {
            let values = l.span.min(self.k - s * l.span);
            let groups = values.div_ceil(l.group);
            let halves = if nested { 1 } else { groups };
            let half = |at: usize| Some(u16::from_le_bytes([*span.get(at)?, *span.get(at + 1)?]));
            for g in 0..halves {
                out.scales.push(half(2 * (g * LANES + lane))?);
                if l.format.zero == ZeroKind::Minima {
                    out.minima.push(half(l.minima + 2 * (g * LANES + lane))?);
                }
            }
            for g in 0..groups {
                if nested {
                    out.sub_scales.push(*span.get(l.sub_scales + g * LANES + lane)?);
                }
                if nested && l.format.zero == ZeroKind::Minima || l.format.zero == ZeroKind::Codes {
                    out.sub_minima.push(*span.get(l.sub_minima + g * LANES + lane)?);
                }
            }
            let units = span.get(l.header..)?.chunks_exact(l.format.code_bytes(1));
            for (u, unit) in units.enumerate() {
                for step in 0..UNIT.min(values.saturating_sub(u * UNIT)) {
                    out.codes.push(read_code(unit, l.format.bits, step, lane));
                }
            }
        }
        Some(())
    }

    /// The code as a number, before scaling.
    #[inline]
    fn code(&self, unit: &[u8], step: usize, lane: usize) -> f32 {
        let code = read_code(unit, self.layout.format.bits, step, lane);
        f32::from(if self.layout.format.table { IQ4_TABLE[usize::from(code & 15)] } else { code })
    }

    /// Scale and minimum of a group: `w = scale * code + minimum`.
    fn scale(&self, row: usize, span: usize, group: usize) -> (f32, f32) {
        let l = &self.layout;
        let lane = row % LANES;
        let at = (row / LANES * l.spans + span) * l.span_bytes;
        let span = &self.bytes()[at..][..l.header];
        let half = |at: usize| u16::from_le_bytes([span[at], span[at + 1]]);
        let f16 = |at: usize| half::f16::from_bits(half(at)).to_f32();
        let byte = |at: usize| span[at + group * LANES + lane];
        let scale = match l.format.scale {
            ScaleKind::F16 => f16(2 * (group * LANES + lane)),
            ScaleKind::BF16 => f32::from_bits(u32::from(half(2 * (group * LANES + lane))) << 16),
            ScaleKind::Nested => f16(2 * lane) * f32::from(byte(l.sub_scales) as i8),
        };
        let minimum = match l.format.zero {
            ZeroKind::Fixed(zero) => -scale * f32::from(zero),
            ZeroKind::Codes => -scale * f32::from(byte(l.sub_minima)),
            ZeroKind::Minima if l.format.scale == ScaleKind::Nested => {
                -f16(l.minima + 2 * lane) * f32::from(byte(l.sub_minima))
            }
            ZeroKind::Minima => f16(l.minima + 2 * (group * LANES + lane)),
        };
        (scale, minimum)
    }
}

/// Where there is no virtual memory to map, the allocator's.
#[cfg(target_family = "wasm")]
pub(crate) struct Memory(Box<crate::AlignedF32>);

#[cfg(target_family = "wasm")]
impl Memory {
    pub(crate) fn new(bytes: usize, _: &str) -> Result<Memory> {
        // Panels are whole cache lines, so the length in bytes is kept.
        crate::AlignedF32::zeroed(bytes.div_ceil(4)).map(|m| Memory(Box::new(m)))
    }

    pub(crate) fn by_page(bytes: usize, what: &str) -> Result<Memory> {
        Memory::new(bytes, what)
    }

    pub(crate) fn writable(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0[..])
    }
}

#[cfg(target_family = "wasm")]
impl BytesOwner for Memory {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0[..])
    }
}

/// Anonymous memory in huge pages where they are offered.
#[cfg(not(target_family = "wasm"))]
pub(crate) struct Memory(MmapMut);

#[cfg(not(target_family = "wasm"))]
impl Memory {
    pub(crate) fn new(bytes: usize, what: &str) -> Result<Memory> {
        let memory = Memory::by_page(bytes, what)?;
        // Small pages work too, only slower.
        #[cfg(target_os = "linux")]
        let _ = memory.0.advise(memmap2::Advice::HugePage);
        Ok(memory)
    }

    /// The same in pages of the usual size.
    pub(crate) fn by_page(bytes: usize, what: &str) -> Result<Memory> {
        let map =
            MmapMut::map_anon(bytes.max(1)).map_err(|_| Error::OutOfMemory { bytes, what: what.into() })?;
        Ok(Memory(map))
    }

    pub(crate) fn writable(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(not(target_family = "wasm"))]
impl BytesOwner for Memory {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The planes of a code of `bits`: bits of each, the lowest first.
const fn planes(bits: u8) -> &'static [u32] {
    match bits {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        _ => &[8],
    }
}

/// Where the part of a code that belongs to a plane of `bits` lies: byte in the plane, and shift.
#[inline(always)]
fn place(bits: u32, step: usize, lane: usize) -> (usize, u32) {
    // Four steps are a quarter; a vector of 64 bytes holds `8 / bits` quarters, far apart.
    let (quarter, j) = (step / 4, step % 4);
    let vectors = bits as usize;
    (quarter % vectors * 64 + lane * 4 + j, (quarter / vectors) as u32 * bits)
}

fn read_code(unit: &[u8], bits: u8, step: usize, lane: usize) -> u8 {
    let (mut code, mut low, mut at) = (0, 0, 0);
    for &plane in planes(bits) {
        let (byte, shift) = place(plane, step, lane);
        code |= ((u32::from(unit[at + byte]) >> shift) & ((1 << plane) - 1)) << low;
        low += plane;
        at += 64 * plane as usize;
    }
    code as u8
}

/// Four codes of each of sixteen rows, as words.
type Words = [u32; LANES];

/// Writes the codes of a unit: `quarters[i]` are the steps `4 i .. 4 i + 4`.
#[inline(always)]
fn write_unit(unit: &mut [u8], bits: u8, quarters: &[Words; UNIT / 4]) {
    let (mut low, mut at) = (0, 0);
    for &plane in planes(bits) {
        let vectors = plane as usize;
        // No shift moves a bit to a neighbour.
        let mask = if plane == 8 { u32::MAX } else { ((1 << plane) - 1) * 0x0101_0101 };
        let out = unit[at..at + 64 * vectors].as_chunks_mut::<64>().0;
        for (vector, out) in out.iter_mut().enumerate() {
            let mut words = [0; LANES];
            for (i, quarter) in quarters[vector..].iter().step_by(vectors).enumerate() {
                for (word, four) in words.iter_mut().zip(quarter) {
                    *word |= ((four >> low) & mask) << (i as u32 * plane);
                }
            }
            for (out, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                *out = word.to_le_bytes();
            }
        }
        low += plane;
        at += 64 * vectors;
    }
}

/// The codes of all units of a panel; `rows` are those that there are.
fn pack_codes(layout: &Layout, k: usize, rows: &[RowCodes], panel: &mut [u8]) {
    let unit_bytes = layout.format.code_bytes(1);
    for (s, span) in panel.chunks_exact_mut(layout.span_bytes).enumerate() {
        for (u, unit) in span[layout.header..].chunks_exact_mut(unit_bytes).enumerate() {
            let from = s * layout.span + u * UNIT;
            if from >= k {
                break;
            }
            let mut quarters = [[0; LANES]; UNIT / 4];
            for (lane, row) in rows.iter().enumerate() {
                let mut steps = [0; UNIT];
                match row.codes.get(from..from + UNIT) {
                    Some(codes) => steps.copy_from_slice(codes),
                    None => steps[..k - from].copy_from_slice(&row.codes[from..k]),
                }
                for (quarter, four) in quarters.iter_mut().zip(steps.as_chunks::<4>().0) {
                    quarter[lane] = u32::from_le_bytes(*four);
                }
            }
            // Constant bits let the planes be unrolled.
            match layout.format.bits {
                2 => write_unit(unit, 2, &quarters),
                3 => write_unit(unit, 3, &quarters),
                4 => write_unit(unit, 4, &quarters),
                5 => write_unit(unit, 5, &quarters),
                6 => write_unit(unit, 6, &quarters),
                _ => write_unit(unit, 8, &quarters),
            }
        }
    }
}

fn pack_into(
    cpu: &Cpu,
    format: PackedFormat,
    rows: usize,
    k: usize,
    row: &(dyn Fn(usize, &mut RowCodes) -> Result<()> + Sync),
    out: &mut [u8],
) -> Result<()> {
    let layout = Layout::new(format, k);
    let panel_bytes = layout.span_bytes * layout.spans;
    if panel_bytes == 0 || rows == 0 {
        return Ok(());
    }
    let panels: Vec<std::sync::Mutex<&mut [u8]>> =
        out.chunks_exact_mut(panel_bytes).map(std::sync::Mutex::new).collect();
    let failed = std::sync::Mutex::new(None);
    cpu.parallel(panels.len(), &|i| {
        // Each panel is one task's; the lock is never contended.
        let mut panel = panels[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut all = vec![RowCodes::default(); LANES.min(rows - i * LANES)];
        let made = all.iter_mut().enumerate().try_for_each(|(lane, codes)| row(i * LANES + lane, codes));
        if let Err(error) = made.and_then(|()| pack_one(&layout, k, &all, &mut panel)) {
            failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
        }
    });
    match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Writes one panel.
fn pack_one(layout: &Layout, k: usize, rows: &[RowCodes], panel: &mut [u8]) -> Result<()> {
    panel.fill(0);
    for (lane, codes) in rows.iter().enumerate() {
        pack_header(layout, k, lane, codes, panel)?;
    }
    pack_codes(layout, k, rows, panel);
    Ok(())
}

/// Checks the sizes of a row and writes its scales.
fn pack_header(layout: &Layout, k: usize, lane: usize, row: &RowCodes, panel: &mut [u8]) -> Result<()> {
    let size = |operand, wanted: usize, found: usize| {
        if wanted == found { Ok(()) } else { Err(Error::Size { op: "pack", operand, wanted, found }) }
    };
    let nested = layout.format.scale == ScaleKind::Nested;
    let minima = layout.format.zero == ZeroKind::Minima;
    let groups = k.div_ceil(layout.group);
    let halves = if nested { layout.spans } else { groups };
    let bytes = nested && minima || layout.format.zero == ZeroKind::Codes;
    size("codes", k, row.codes.len())?;
    size("scales", halves, row.scales.len())?;
    size("minima", if minima { halves } else { 0 }, row.minima.len())?;
    size("sub_scales", if nested { groups } else { 0 }, row.sub_scales.len())?;
    size("sub_minima", if bytes { groups } else { 0 }, row.sub_minima.len())?;
    let per_span = layout.span / layout.group;
    let halves_per_span = if nested { 1 } else { per_span };
    for (s, span) in panel.chunks_exact_mut(layout.span_bytes).enumerate() {
        let header = &mut span[..layout.header];
        let mut halves = |values: &[u16], at: usize| {
            for (i, v) in values.iter().skip(s * halves_per_span).take(halves_per_span).enumerate() {
                header[at + 2 * (i * LANES + lane)..][..2].copy_from_slice(&v.to_le_bytes());
            }
        };
        halves(&row.scales, 0);
        halves(&row.minima, layout.minima);
        let mut bytes = |values: &[u8], at: usize| {
            for (i, v) in values.iter().skip(s * per_span).take(per_span).enumerate() {
                header[at + i * LANES + lane] = *v;
            }
        };
        bytes(&row.sub_scales, layout.sub_scales);
        bytes(&row.sub_minima, layout.sub_minima);
    }
    Ok(())
}
