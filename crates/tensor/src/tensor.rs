use std::borrow::Cow;

use half::{bf16, f16};

use crate::{AlignedF32, Bytes, DType, Error, Packed, Result};

/// Name, element type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the checkpoint.
    pub name: String,
    /// Element type as stored.
    pub dtype: DType,
    /// Shape, slowest dimension first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes as stored; 0 for a shape that its type cannot have.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(&self.shape).unwrap_or(0)
    }
}

/// Where weights come from: a name gives element type, shape and bytes.
///
/// Implementations map files, so asking for a tensor is cheap and copies nothing.
pub trait WeightSource: Send + Sync {
    /// Every tensor, in a stable order.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// Element type and shape of one tensor.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The tensor.
    ///
    /// # Errors
    /// [`Error::Missing`] where there is none of that name, [`Error::Source`] where its bytes cannot be had.
    fn tensor(&self, name: &str) -> Result<Tensor>;

    /// The matrix in the layout of the kernels, where the source has it so; `None` where it must be packed.
    ///
    /// # Errors
    /// As for [`WeightSource::tensor`].
    fn packed(&self, name: &str) -> Result<Option<Packed>> {
        let _ = name;
        Ok(None)
    }
}

impl<W: WeightSource + ?Sized> WeightSource for std::sync::Arc<W> {
    fn tensors(&self) -> Vec<TensorInfo> {
        (**self).tensors()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        (**self).info(name)
    }
    fn tensor(&self, name: &str) -> Result<Tensor> {
        (**self).tensor(name)
    }
    fn packed(&self, name: &str) -> Result<Option<Packed>> {
        (**self).packed(name)
    }
}

/// An immutable, contiguous, row-major host tensor over shared bytes. Cloning copies no data.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl Tensor {
    /// A tensor over `bytes`, little-endian.
    ///
    /// # Errors
    /// [`Error::ByteLength`] or [`Error::TooLarge`] where the bytes do not match.
    pub fn new(dtype: DType, shape: &[usize], bytes: Bytes) -> Result<Tensor> {
        let wanted = dtype.bytes(shape).ok_or_else(|| Error::TooLarge { shape: shape.to_vec(), dtype })?;
        if wanted != bytes.len() {
            return Err(Error::ByteLength { shape: shape.to_vec(), dtype, wanted, found: bytes.len() });
        }
        Ok(Tensor { dtype, shape: shape.to_vec(), bytes })
    }

    /// A copy of `values` as f32.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<Tensor> {
        let mut buffer = AlignedF32::zeroed(values.len())?;
        buffer.copy_from_slice(values);
        Tensor::new(DType::F32, shape, buffer.into())
    }

    /// A copy of `values` as i64.
    pub fn from_i64(shape: &[usize], values: &[i64]) -> Result<Tensor> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::new(DType::I64, shape, bytes.into())
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, slowest dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The stored bytes, little-endian.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The stored bytes as a shared run.
    pub fn shared_bytes(&self) -> Bytes {
        self.bytes.clone()
    }

    /// The same bytes under another shape of as many elements.
    pub fn reshaped(&self, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(self.dtype, shape, self.bytes.clone())
    }

    /// This tensor if its bytes are aligned to its element type, else a copy whose bytes are aligned to 64.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there is none for the copy.
    pub fn aligned(self) -> Result<Tensor> {
        let bytes = self.bytes();
        if bytes.as_ptr().addr().is_multiple_of(self.dtype.alignment()) {
            return Ok(self);
        }
        let mut copy = AlignedF32::zeroed(bytes.len().div_ceil(4))?;
        bytemuck::cast_slice_mut(&mut copy)[..bytes.len()].copy_from_slice(bytes);
        let bytes = Bytes::from(copy)
            .slice(0..bytes.len())
            .ok_or_else(|| Error::TooLarge { shape: self.shape.clone(), dtype: self.dtype })?;
        Tensor::new(self.dtype, &self.shape, bytes)
    }

    /// The values as f32: borrowed where they are stored so and aligned, converted otherwise.
    ///
    /// # Errors
    /// [`Error::DType`] for integer tensors.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>> {
        let b = self.bytes();
        Ok(match self.dtype {
            DType::F32 => match bytemuck::try_cast_slice(b) {
                Ok(s) => Cow::Borrowed(s),
                Err(_) => Cow::Owned(b.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()),
            },
            DType::F16 => {
                Cow::Owned(b.as_chunks::<2>().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect())
            }
            DType::BF16 => {
                Cow::Owned(b.as_chunks::<2>().0.iter().map(|c| bf16::from_le_bytes(*c).to_f32()).collect())
            }
            found => return Err(Error::DType { op: "to_f32", wanted: "F32, F16 or BF16", found }),
        })
    }

    /// The values as i64.
    ///
    /// # Errors
    /// [`Error::DType`] for floating-point tensors.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let b = self.bytes();
        Ok(match self.dtype {
            DType::I64 => b.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect(),
            DType::I32 => b.as_chunks::<4>().0.iter().map(|c| i32::from_le_bytes(*c) as i64).collect(),
            DType::U8 => b.iter().map(|&c| c as i64).collect(),
            found => return Err(Error::DType { op: "to_i64", wanted: "I64, I32 or U8", found }),
        })
    }
}
