use std::ops::Range;

use half::{bf16, f16};

use crate::{DType, Error, Packed, Result, Tensor};

/// Stored floating-point values as kernels read them: borrowed, aligned, in one of three types.
///
/// Half-precision values are given by their bits.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// binary32 values.
    F32(&'a [f32]),
    /// Bits of binary16 values.
    F16(&'a [u16]),
    /// Bits of bfloat16 values.
    BF16(&'a [u16]),
    /// A quantised matrix in panels; only [`linear`](crate::ops::linear) takes it.
    Packed(&'a Packed),
}

impl<'a> Weight<'a> {
    /// The values of a tensor, without copying.
    ///
    /// # Errors
    /// [`Error::DType`] for integer tensors; [`Error::Value`] where the bytes are not aligned to the element type
    /// (see [`Tensor::aligned`]).
    pub fn of(tensor: &'a Tensor) -> Result<Weight<'a>> {
        const OP: &str = "weight";
        let bytes = tensor.bytes();
        let misaligned = |_| Error::Value {
            op: OP,
            what: format!("tensor of shape {:?} and type {} is not aligned", tensor.shape(), tensor.dtype()),
        };
        match tensor.dtype() {
            DType::F32 => bytemuck::try_cast_slice(bytes).map(Weight::F32).map_err(misaligned),
            DType::F16 => bytemuck::try_cast_slice(bytes).map(Weight::F16).map_err(misaligned),
            DType::BF16 => bytemuck::try_cast_slice(bytes).map(Weight::BF16).map_err(misaligned),
            found => Err(Error::DType { op: OP, wanted: "F32, F16 or BF16", found }),
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Weight::F32(v) => v.len(),
            Weight::F16(v) | Weight::BF16(v) => v.len(),
            Weight::Packed(p) => p.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a value as stored; `None` where values share bytes.
    pub fn size(&self) -> Option<usize> {
        match self {
            Weight::F32(_) => Some(4),
            Weight::F16(_) | Weight::BF16(_) => Some(2),
            Weight::Packed(_) => None,
        }
    }

    /// The value at `index`, or `None` past the end.
    pub fn get(&self, index: usize) -> Option<f32> {
        match self {
            Weight::F32(v) => v.get(index).copied(),
            Weight::F16(v) => v.get(index).map(|&b| f16::from_bits(b).to_f32()),
            Weight::BF16(v) => v.get(index).map(|&b| bf16::from_bits(b).to_f32()),
            Weight::Packed(p) => p.get(index.checked_div(p.k())?, index.checked_rem(p.k())?),
        }
    }

    /// The values in `range`, or `None` where it reaches past the end or values share bytes.
    pub fn slice(&self, range: Range<usize>) -> Option<Weight<'a>> {
        Some(match self {
            Weight::F32(v) => Weight::F32(v.get(range)?),
            Weight::F16(v) => Weight::F16(v.get(range)?),
            Weight::BF16(v) => Weight::BF16(v.get(range)?),
            Weight::Packed(_) => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bytes;

    #[test]
    fn all_three_types_are_read() {
        let f32s = Tensor::from_f32(&[2], &[1.5, -2.0]).unwrap();
        let f16s =
            Tensor::new(DType::F16, &[2], vec![0x00, 0x3e, 0x00, 0xc0].into()).unwrap().aligned().unwrap();
        let bf16s =
            Tensor::new(DType::BF16, &[2], vec![0xc0, 0x3f, 0x00, 0xc0].into()).unwrap().aligned().unwrap();
        for t in [&f32s, &f16s, &bf16s] {
            let w = Weight::of(t).unwrap();
            assert_eq!((w.get(0), w.get(1), w.get(2)), (Some(1.5), Some(-2.0), None));
            assert_eq!(w.slice(1..2).unwrap().get(0), Some(-2.0));
            assert!(w.slice(1..3).is_none());
        }
    }

    #[test]
    fn misaligned_bytes_are_refused_until_copied() {
        let all = Bytes::from(vec![0u8; 64]);
        let odd = (0..2)
            .map(|i| all.slice(i..i + 8).unwrap())
            .find(|b| !b.as_slice().as_ptr().addr().is_multiple_of(4));
        let tensor = Tensor::new(DType::F32, &[2], odd.unwrap()).unwrap();
        assert!(matches!(Weight::of(&tensor), Err(Error::Value { .. })));
        assert!(Weight::of(&tensor.aligned().unwrap()).is_ok());
    }

    #[test]
    fn integer_tensors_are_refused() {
        let tensor = Tensor::from_i64(&[1], &[3]).unwrap();
        assert!(matches!(Weight::of(&tensor), Err(Error::DType { found: DType::I64, .. })));
    }
}
