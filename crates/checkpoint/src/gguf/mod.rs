//! GGUF files: reading, writing, and the GLM family as llama.cpp's converters write it.
//!
//! The format (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): the magic, a version, two counts,
//! typed key-value pairs, the tensors' names, dimensions, types and offsets, and after padding the data. All numbers
//! are little-endian; dimensions are listed fastest first.

mod export;
mod glm;
mod read;
mod tokenizer;
mod write;

pub use export::{Convert, Converted, GgufExport, check_gguf, export_gguf, to_plain};
pub(crate) use glm::{
    GlmGguf, PROJECTOR, TEXT_ARCH, VISION_ARCH, architecture, lacking_picture_token, projector,
};
pub use read::{GgufArray, GgufFile, GgufValue};
pub use write::{GgufMeta, GgufWriter};

use pocketglm_tensor::{Block, DType};

/// First bytes of a file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data where `general.alignment` does not say otherwise.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// The key that says otherwise.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// Most dimensions of a tensor.
pub(crate) const MAX_DIMS: usize = 4;
/// Longest tensor name; llama.cpp has 64 bytes with a final zero.
pub(crate) const MAX_NAME_BYTES: usize = 64;
/// Longest key, from the specification.
pub(crate) const MAX_KEY_BYTES: usize = 65_535;
/// Most keys. Published files have fewer than 100.
pub(crate) const MAX_KEYS: usize = 65_536;

/// A number type of ggml: how many values share how many bytes, and whether anything here computes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GgmlType {
    pub(crate) id: u32,
    pub(crate) name: &'static str,
    pub(crate) values: u64,
    pub(crate) bytes: u64,
    pub(crate) dtype: Option<DType>,
}

const fn known(id: u32, dtype: DType) -> GgmlType {
    let (values, bytes) = match dtype {
        DType::Block(block) => block.layout(),
        other => match other.size() {
            Some(size) => (1, size),
            None => (1, 1),
        },
    };
    GgmlType { id, name: dtype.name(), values: values as u64, bytes: bytes as u64, dtype: Some(dtype) }
}

const fn foreign(id: u32, name: &'static str, values: u64, bytes: u64) -> GgmlType {
    GgmlType { id, name, values, bytes, dtype: None }
}

/// Every type of ggml. Those without a [`DType`] are known by size only, so that a file with one can be opened.
const TYPES: [GgmlType; 34] = [
    known(0, DType::F32),
    known(1, DType::F16),
    known(2, DType::Block(Block::Q4_0)),
    known(3, DType::Block(Block::Q4_1)),
    known(6, DType::Block(Block::Q5_0)),
    known(7, DType::Block(Block::Q5_1)),
    known(8, DType::Block(Block::Q8_0)),
    foreign(9, "Q8_1", 32, 36),
    known(10, DType::Block(Block::Q2_K)),
    known(11, DType::Block(Block::Q3_K)),
    known(12, DType::Block(Block::Q4_K)),
    known(13, DType::Block(Block::Q5_K)),
    known(14, DType::Block(Block::Q6_K)),
    foreign(15, "Q8_K", 256, 292),
    foreign(16, "IQ2_XXS", 256, 66),
    foreign(17, "IQ2_XS", 256, 74),
    foreign(18, "IQ3_XXS", 256, 98),
    foreign(19, "IQ1_S", 256, 50),
    known(20, DType::Block(Block::IQ4_NL)),
    foreign(21, "IQ3_S", 256, 110),
    foreign(22, "IQ2_S", 256, 82),
    known(23, DType::Block(Block::IQ4_XS)),
    foreign(24, "I8", 1, 1),
    foreign(25, "I16", 1, 2),
    known(26, DType::I32),
    known(27, DType::I64),
    foreign(28, "F64", 1, 8),
    foreign(29, "IQ1_M", 256, 56),
    known(30, DType::BF16),
    foreign(34, "TQ1_0", 256, 54),
    foreign(35, "TQ2_0", 256, 66),
    foreign(39, "MXFP4", 32, 17),
    foreign(40, "NVFP4", 64, 36),
    foreign(41, "Q1_0", 128, 18),
];

impl GgmlType {
    pub(crate) fn of_id(id: u32) -> Option<GgmlType> {
        TYPES.into_iter().find(|t| t.id == id)
    }

    pub(crate) fn of_dtype(dtype: DType) -> Option<GgmlType> {
        TYPES.into_iter().find(|t| t.dtype == Some(dtype))
    }
}

/// The floats and block formats that a tensor in a GGUF file can have here.
pub fn gguf_formats() -> impl Iterator<Item = DType> {
    let known = TYPES.into_iter().filter_map(|t| t.dtype);
    known.filter(|dtype| dtype.is_float() || dtype.is_quantised())
}

/// Type numbers of values in the key-value section.
pub(crate) mod kind {
    pub(crate) const U8: u32 = 0;
    pub(crate) const I8: u32 = 1;
    pub(crate) const U16: u32 = 2;
    pub(crate) const I16: u32 = 3;
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const STRING: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
    pub(crate) const U64: u32 = 10;
    pub(crate) const I64: u32 = 11;
    pub(crate) const F64: u32 = 12;

    /// Bytes of a number of this type; `None` for strings, arrays and numbers that are no type.
    pub(crate) const fn size(kind: u32) -> Option<usize> {
        match kind {
            U8 | I8 | BOOL => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            _ => None,
        }
    }

    /// The specification's name.
    pub(crate) const fn name(kind: u32) -> &'static str {
        match kind {
            U8 => "uint8",
            I8 => "int8",
            U16 => "uint16",
            I16 => "int16",
            U32 => "uint32",
            I32 => "int32",
            F32 => "float32",
            BOOL => "bool",
            STRING => "string",
            ARRAY => "array",
            U64 => "uint64",
            I64 => "int64",
            F64 => "float64",
            _ => "none",
        }
    }
}
