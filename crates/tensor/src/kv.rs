//! How keys and values of a cache are stored.

use std::fmt;

use half::{bf16, f16};

use crate::DType;

/// Values of an [`Int4`](KvFormat::Int4) group.
pub(crate) const GROUP4: usize = 32;
/// Bytes of such a group: scale, minimum, codes.
pub(crate) const GROUP4_BYTES: usize = 2 + 2 + GROUP4 / 2;
/// Bytes before the codes of an [`Int8`](KvFormat::Int8) head.
pub(crate) const SCALE_BYTES: usize = 2;

/// How a cache stores the components of one head at one token. Scales are bfloat16, which has the range of f32, and
/// are rounded up, so that no value falls outside the codes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvFormat {
    /// As computed: what the reference implementation does in f32.
    #[default]
    F32,
    /// IEEE 754 binary16; what is larger than 65504 becomes infinite.
    F16,
    /// One scale, then codes of 8 bits in -127..=127: `x = scale * code`. Half a step of error at most.
    Int8,
    /// For every 32 components a scale, a minimum and codes in 0..=15, the first 16 in the lower halves of 16 bytes:
    /// `x = minimum + scale * code`. The last group is padded. Half a step of error at most.
    Int4,
}

impl KvFormat {
    /// Every format, the most exact first.
    pub const ALL: [KvFormat; 4] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8, KvFormat::Int4];

    /// Bytes of a head of `d` components; `None` where the number overflows.
    pub const fn head_bytes(self, d: usize) -> Option<usize> {
        match self {
            KvFormat::F32 => d.checked_mul(4),
            KvFormat::F16 => d.checked_mul(2),
            KvFormat::Int8 => d.checked_add(SCALE_BYTES),
            KvFormat::Int4 => d.div_ceil(GROUP4).checked_mul(GROUP4_BYTES),
        }
    }

    /// The element type of a state whose rows are heads in this format.
    pub const fn dtype(self) -> DType {
        match self {
            KvFormat::F32 => DType::F32,
            KvFormat::F16 => DType::F16,
            KvFormat::Int8 => DType::Kv8,
            KvFormat::Int4 => DType::Kv4,
        }
    }

    /// The format of such a state.
    pub const fn of(dtype: DType) -> Option<KvFormat> {
        match dtype {
            DType::F32 => Some(KvFormat::F32),
            DType::F16 => Some(KvFormat::F16),
            DType::Kv8 => Some(KvFormat::Int8),
            DType::Kv4 => Some(KvFormat::Int4),
            _ => None,
        }
    }

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::Int8 => "int8",
            KvFormat::Int4 => "int4",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Keys or values of several tokens: rows of heads, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) format: KvFormat,
}

impl<'a> KvRows<'a> {
    /// Rows that are `stride` floats apart.
    pub fn f32(values: &'a [f32], stride: usize) -> KvRows<'a> {
        KvRows {
            bytes: bytemuck::cast_slice(values),
            stride: stride.saturating_mul(4),
            format: KvFormat::F32,
        }
    }

    /// Rows of a cache, `stride` bytes apart.
    pub fn new(format: KvFormat, bytes: &'a [u8], stride: usize) -> KvRows<'a> {
        KvRows { bytes, stride, format }
    }

    /// How they are stored.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// The components of one head of one row, as many as `out` has; the scalar twin of what kernels read. Zeros where
    /// the rows are too short.
    pub fn head(&self, row: usize, head: usize, out: &mut [f32]) {
        out.fill(0.0);
        let Some(bytes) = self.format.head_bytes(out.len()) else { return };
        let at = row.saturating_mul(self.stride).saturating_add(head.saturating_mul(bytes));
        let Some(stored) = at.checked_add(bytes).and_then(|end| self.bytes.get(at..end)) else { return };
        match self.format {
            KvFormat::F32 => {
                for (x, b) in out.iter_mut().zip(stored.chunks_exact(4)) {
                    *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            KvFormat::F16 => {
                for (x, b) in out.iter_mut().zip(stored.chunks_exact(2)) {
                    *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            KvFormat::Int8 => {
                let scale = bf16::from_le_bytes([stored[0], stored[1]]).to_f32();
                for (x, &code) in out.iter_mut().zip(&stored[SCALE_BYTES..]) {
                    *x = scale * f32::from(code as i8);
                }
            }
            KvFormat::Int4 => {
                for (x, group) in out.chunks_mut(GROUP4).zip(stored.chunks_exact(GROUP4_BYTES)) {
                    let scale = bf16::from_le_bytes([group[0], group[1]]).to_f32();
                    let minimum = bf16::from_le_bytes([group[2], group[3]]).to_f32();
                    for (i, x) in x.iter_mut().enumerate() {
                        let byte = group[4 + i % (GROUP4 / 2)];
                        let code = if i < GROUP4 / 2 { byte & 15 } else { byte >> 4 };
                        *x = minimum + scale * f32::from(code);
                    }
                }
            }
        }
    }
}
