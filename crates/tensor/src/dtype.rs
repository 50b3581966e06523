use std::fmt;

use crate::KvFormat;

/// Element type of a tensor.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// Two's complement, 64 bits.
    I64,
    /// Two's complement, 32 bits.
    I32,
    /// Unsigned byte.
    U8,
    /// Blocks of quantised values as GGUF files store them.
    Block(Block),
    /// Groups of quantised values with a scale of their own: this project's integer formats.
    Affine(Affine),
    /// Rows that are heads of a cache of keys or values, [`KvFormat::Int8`](crate::KvFormat::Int8).
    Kv8,
    /// The same, [`KvFormat::Int4`](crate::KvFormat::Int4).
    Kv4,
}

/// A block format of GGUF (ggml's names): so many values of a row share the bytes of one block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are the formats'")]
pub enum Block {
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

impl Block {
    /// Every format.
    pub const ALL: [Block; 12] = [
        Block::Q8_0,
        Block::Q4_0,
        Block::Q4_1,
        Block::Q5_0,
        Block::Q5_1,
        Block::Q2_K,
        Block::Q3_K,
        Block::Q4_K,
        Block::Q5_K,
        Block::Q6_K,
        Block::IQ4_NL,
        Block::IQ4_XS,
    ];

    /// Values and bytes of a block.
    pub const fn layout(self) -> (usize, usize) {
        match self {
            Block::Q8_0 => (32, 34),
            Block::Q4_0 | Block::IQ4_NL => (32, 18),
            Block::Q4_1 => (32, 20),
            Block::Q5_0 => (32, 22),
            Block::Q5_1 => (32, 24),
            Block::Q2_K => (256, 84),
            Block::Q3_K => (256, 110),
            Block::Q4_K => (256, 144),
            Block::Q5_K => (256, 176),
            Block::Q6_K => (256, 210),
            Block::IQ4_XS => (256, 136),
        }
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        match self {
            Block::Q8_0 => "Q8_0",
            Block::Q4_0 => "Q4_0",
            Block::Q4_1 => "Q4_1",
            Block::Q5_0 => "Q5_0",
            Block::Q5_1 => "Q5_1",
            Block::Q2_K => "Q2_K",
            Block::Q3_K => "Q3_K",
            Block::Q4_K => "Q4_K",
            Block::Q5_K => "Q5_K",
            Block::Q6_K => "Q6_K",
            Block::IQ4_NL => "IQ4_NL",
            Block::IQ4_XS => "IQ4_XS",
        }
    }
}

/// Integers of 8, 4 or 2 bits with a bfloat16 scale for each group of a row: `w = scale * (q - zero)`.
///
/// A row is its groups one after the other; a group is its scale (2 bytes), the zero point (1 byte, only where the
/// format is asymmetric), and its codes `q >= 0`, the first in the lowest bits of the first byte, padded to a whole
/// byte. The last group of a row may be shorter. One scale for a whole matrix stands at the beginning of each of its rows, so that
/// a row can be read alone. A symmetric format's zero point is `2^(bits - 1)`.
///
/// bfloat16 has the range of f32, so no finite weight makes a scale overflow or vanish.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Affine {
    bits: u8,
    group: Group,
    symmetric: bool,
}

/// How many values of a row share a scale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Group {
    /// 32 values.
    G32,
    /// 64 values.
    G64,
    /// 128 values.
    G128,
    /// The whole row.
    Row,
    /// The whole matrix: all rows have one scale and one zero point.
    Tensor,
}

impl Group {
    /// Values of a group in a row of `k`.
    pub const fn of(self, k: usize) -> usize {
        match self {
            Group::G32 => 32,
            Group::G64 => 64,
            Group::G128 => 128,
            Group::Row | Group::Tensor => {
                if k == 0 {
                    1
                } else {
                    k
                }
            }
        }
    }
}

impl Affine {
    /// A format of `bits` 8, 4 or 2; `None` for others.
    pub const fn new(bits: u8, group: Group, symmetric: bool) -> Option<Affine> {
        match bits {
            8 | 4 | 2 => Some(Affine { bits, group, symmetric }),
            _ => None,
        }
    }

    /// Every format.
    pub fn all() -> impl Iterator<Item = Affine> {
        let groups = [Group::G32, Group::G64, Group::G128, Group::Row, Group::Tensor];
        [8, 4, 2].into_iter().flat_map(move |bits| {
            groups
                .into_iter()
                .flat_map(move |group| [true, false].map(|symmetric| Affine { bits, group, symmetric }))
        })
    }

    /// Bits of a code.
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// What shares a scale.
    pub const fn group(self) -> Group {
        self.group
    }

    /// Whether the zero point is fixed.
    pub const fn symmetric(self) -> bool {
        self.symmetric
    }

    /// Bytes before the codes of a group.
    pub const fn header(self) -> usize {
        if self.symmetric { 2 } else { 3 }
    }

    /// Bytes of a group of `values`.
    pub const fn group_bytes(self, values: usize) -> Option<usize> {
        let bits = match values.checked_mul(self.bits as usize) {
            Some(bits) => bits,
            None => return None,
        };
        bits.div_ceil(8).checked_add(self.header())
    }

    /// Bytes of a row of `k` values; `None` where that overflows.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        let group = self.group.of(k);
        let Some(whole) = self.group_bytes(group) else { return None };
        let Some(bytes) = whole.checked_mul(k / group) else { return None };
        if k.is_multiple_of(group) {
            return Some(bytes);
        }
        match self.group_bytes(k % group) {
            Some(last) => bytes.checked_add(last),
            None => None,
        }
    }

    /// The name in files and on the command line, such as `int4-g64` or `int8-row-asym`.
    pub const fn name(self) -> &'static str {
        const NAMES: [[[&str; 2]; 5]; 3] = [
            [
                ["int8-g32", "int8-g32-asym"],
                ["int8-g64", "int8-g64-asym"],
                ["int8-g128", "int8-g128-asym"],
                ["int8-row", "int8-row-asym"],
                ["int8-tensor", "int8-tensor-asym"],
            ],
            [
                ["int4-g32", "int4-g32-asym"],
                ["int4-g64", "int4-g64-asym"],
                ["int4-g128", "int4-g128-asym"],
                ["int4-row", "int4-row-asym"],
                ["int4-tensor", "int4-tensor-asym"],
            ],
            [
                ["int2-g32", "int2-g32-asym"],
                ["int2-g64", "int2-g64-asym"],
                ["int2-g128", "int2-g128-asym"],
                ["int2-row", "int2-row-asym"],
                ["int2-tensor", "int2-tensor-asym"],
            ],
        ];
        let bits = match self.bits {
            8 => 0,
            4 => 1,
            _ => 2,
        };
        NAMES[bits][self.group as usize][if self.symmetric { 0 } else { 1 }]
    }
}

impl DType {
    /// Bytes of one element; `None` for formats whose elements share bytes.
    pub const fn size(self) -> Option<usize> {
        match self {
            DType::F32 | DType::I32 => Some(4),
            DType::F16 | DType::BF16 => Some(2),
            DType::I64 => Some(8),
            DType::U8 => Some(1),
            DType::Block(_) | DType::Affine(_) | DType::Kv8 | DType::Kv4 => None,
        }
    }

    /// What the address of stored elements must be a multiple of for kernels to read them in place.
    pub const fn alignment(self) -> usize {
        match self.size() {
            Some(size) => size,
            None => 1,
        }
    }

    /// Bytes of a row of `k` elements; `None` where the format has no such rows or the number overflows.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        match self {
            DType::Block(b) => {
                let (values, bytes) = b.layout();
                if k.is_multiple_of(values) { (k / values).checked_mul(bytes) } else { None }
            }
            DType::Affine(a) => a.row_bytes(k),
            DType::Kv8 => KvFormat::Int8.head_bytes(k),
            DType::Kv4 => KvFormat::Int4.head_bytes(k),
            DType::F32 | DType::I32 | DType::F16 | DType::BF16 | DType::I64 | DType::U8 => {
                match self.size() {
                    Some(size) => k.checked_mul(size),
                    None => None,
                }
            }
        }
    }

    /// Bytes of a tensor of this shape, whose rows run along the last dimension; `None` as for
    /// [`row_bytes`](DType::row_bytes).
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (&k, rows) = shape.split_last().unwrap_or((&1, &[]));
        let rows = rows.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        self.row_bytes(k)?.checked_mul(rows)
    }

    /// Whether the type is one of the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Whether the type is one of the formats of quantised weights.
    pub const fn is_quantised(self) -> bool {
        matches!(self, DType::Block(_) | DType::Affine(_))
    }

    /// The name that safetensors files use, or the format's own.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I64 => "I64",
            DType::I32 => "I32",
            DType::U8 => "U8",
            DType::Block(b) => b.name(),
            DType::Affine(a) => a.name(),
            DType::Kv8 => "kv-int8",
            DType::Kv4 => "kv-int4",
        }
    }

    /// The type of this [`name`](DType::name), in upper or lower case; not those of caches, which no file has.
    pub fn from_name(name: &str) -> Option<DType> {
        let plain = [DType::F32, DType::F16, DType::BF16, DType::I64, DType::I32, DType::U8];
        let blocks = Block::ALL.into_iter().map(DType::Block);
        let affine = Affine::all().map(DType::Affine);
        plain.into_iter().chain(blocks).chain(affine).find(|d| d.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        let all = Block::ALL.map(DType::Block).into_iter().chain(Affine::all().map(DType::Affine));
        let mut count = 0;
        for dtype in all {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
            assert_eq!(DType::from_name(&dtype.name().to_lowercase()), Some(dtype));
            count += 1;
        }
        assert_eq!(count, 12 + 30);
        assert_eq!(DType::from_name("Q4_X"), None);
    }

    #[test]
    fn rows_of_blocks_are_whole_and_rows_of_groups_may_end_short() {
        let q4 = DType::Block(Block::Q4_0);
        assert_eq!((q4.row_bytes(64), q4.row_bytes(65)), (Some(36), None));
        assert_eq!(q4.bytes(&[3, 64]), Some(108));
        let int4 = Affine::new(4, Group::G64, false).unwrap();
        // 3 + 32 bytes for the first group, 3 + 1 for the value that is left.
        assert_eq!(int4.row_bytes(65), Some(39));
        assert_eq!(Affine::new(2, Group::Row, true).unwrap().row_bytes(9), Some(5));
        assert_eq!(DType::F16.bytes(&[]), Some(2));
        assert_eq!(DType::F32.bytes(&[usize::MAX, 2]), None);
    }
}
