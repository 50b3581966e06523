use pocketglm_tensor::{DType, Tensor};

/// Elements tested between two looks at the result: large enough to vectorise, small enough for a cache.
const BLOCK: usize = 4096;

/// Index of the first NaN or infinity of a floating-point tensor; `None` for integer types.
///
/// A value is such where all bits of its exponent are set, so the test is on integers and runs about as
/// fast as memory.
pub fn first_non_finite(tensor: &Tensor) -> Option<usize> {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DType::F32 => first_with_full_exponent_32(bytes.as_chunks().0),
        DType::F16 => first_with_full_exponent_16(bytes.as_chunks().0, 0x7c00),
        DType::BF16 => first_with_full_exponent_16(bytes.as_chunks().0, 0x7f80),
        _ => None,
    }
}

fn first_with_full_exponent_16(values: &[[u8; 2]], mask: u16) -> Option<usize> {
    let hit = |v: &[u8; 2]| u16::from_le_bytes(*v) & mask == mask;
    for (i, block) in values.chunks(BLOCK).enumerate() {
        // Folding without an early exit lets the compiler use vectors.
        if block.iter().fold(0u16, |any, v| any | u16::from(hit(v))) != 0 {
            return block.iter().position(hit).map(|j| i * BLOCK + j);
        }
    }
    None
}

fn first_with_full_exponent_32(values: &[[u8; 4]]) -> Option<usize> {
    const MASK: u32 = 0x7f80_0000;
    let hit = |v: &[u8; 4]| u32::from_le_bytes(*v) & MASK == MASK;
    for (i, block) in values.chunks(BLOCK).enumerate() {
        if block.iter().fold(0u32, |any, v| any | u32::from(hit(v))) != 0 {
            return block.iter().position(hit).map(|j| i * BLOCK + j);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use pocketglm_tensor::Bytes;

    use super::*;

    fn bytes_of(dtype: DType, values: &[f32]) -> Vec<u8> {
        let each = |v: &f32| match dtype {
            DType::F32 => v.to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
            _ => bf16::from_f32(*v).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(each).collect()
    }

    #[test]
    fn first_nan_or_infinity_is_found_at_every_alignment_and_block_edge() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 1] {
                    let mut values = vec![65504.0; 2 * BLOCK + 3];
                    values[at] = bad;
                    values[2 * BLOCK + 2] = f32::NAN;
                    for shift in 0..3 {
                        let mut bytes = vec![0xff; shift];
                        bytes.extend(bytes_of(dtype, &values));
                        let n = bytes.len();
                        let bytes = Bytes::from(bytes).slice(shift..n).unwrap();
                        let tensor = Tensor::new(dtype, &[values.len()], bytes).unwrap();
                        assert_eq!(first_non_finite(&tensor), Some(at), "{dtype} {bad} shift {shift}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_16_bit_pattern_is_judged_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            for (dtype, finite) in [
                (DType::F16, f16::from_bits(bits).is_finite()),
                (DType::BF16, bf16::from_bits(bits).is_finite()),
            ] {
                let tensor = Tensor::new(dtype, &[1], bits.to_le_bytes().to_vec().into()).unwrap();
                assert_eq!(first_non_finite(&tensor).is_none(), finite, "{dtype} {bits:#06x}");
            }
        }
    }

    #[test]
    fn finite_integer_and_empty_tensors_have_none() {
        let extremes = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 0.0, -0.0, 1e-45];
        assert_eq!(first_non_finite(&Tensor::from_f32(&[6], &extremes).unwrap()), None);
        assert_eq!(first_non_finite(&Tensor::from_f32(&[0], &[]).unwrap()), None);
        assert_eq!(first_non_finite(&Tensor::from_i64(&[1], &[-1]).unwrap()), None);
    }
}
