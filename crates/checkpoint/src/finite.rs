use pocketglm_tensor::{Affine, Block, DType, Tensor};

/// Elements tested between two looks at the result: large enough to vectorise, small enough for a cache.
const BLOCK: usize = 4096;

/// Index of the first NaN or infinity of a floating-point tensor; `None` for integer types. In a quantised tensor
/// only scales can be such: the index is that of the first value under that scale.
///
/// A value is such where all bits of its exponent are set, so the test is on integers and runs about as
/// fast as memory.
pub fn first_non_finite(tensor: &Tensor) -> Option<usize> {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DType::F32 => first_with_full_exponent_32(bytes.as_chunks().0),
        DType::F16 => first_with_full_exponent_16(bytes.as_chunks().0, 0x7c00),
        DType::BF16 => first_with_full_exponent_16(bytes.as_chunks().0, 0x7f80),
        DType::Block(block) => first_bad_block(block, bytes),
        DType::Affine(affine) => first_bad_group(affine, tensor.shape().last().copied().unwrap_or(1), bytes),
        _ => None,
    }
}

/// Where in a block its binary16 scales stand.
const fn scales(block: Block) -> &'static [usize] {
    match block {
        Block::Q8_0 | Block::Q4_0 | Block::Q5_0 | Block::IQ4_NL | Block::IQ4_XS => &[0],
        Block::Q4_1 | Block::Q5_1 | Block::Q4_K | Block::Q5_K => &[0, 2],
        Block::Q2_K => &[80, 82],
        Block::Q3_K => &[108],
        Block::Q6_K => &[208],
    }
}

fn is_bad(bytes: Option<&[u8]>, mask: u16) -> bool {
    let value = bytes.and_then(|b| b.first_chunk::<2>()).map_or(0, |b| u16::from_le_bytes(*b));
    value & mask == mask
}

fn first_bad_block(block: Block, bytes: &[u8]) -> Option<usize> {
    let (values, size) = block.layout();
    let bad = |b: &[u8]| scales(block).iter().any(|&at| is_bad(b.get(at..), 0x7c00));
    bytes.chunks_exact(size).position(bad).map(|i| i * values)
}

fn first_bad_group(affine: Affine, columns: usize, bytes: &[u8]) -> Option<usize> {
    let row = affine.row_bytes(columns).filter(|&n| n > 0)?;
    let group = affine.group().of(columns);
    let size = affine.group_bytes(group)?;
    for (i, row) in bytes.chunks_exact(row).enumerate() {
        // The last group may be shorter, but begins where a whole one would.
        if let Some(j) = row.chunks(size).position(|g| is_bad(Some(g), 0x7f80)) {
            return Some(i * columns + j * group);
        }
    }
    None
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
    fn scales_of_quantised_tensors_are_looked_at_and_codes_are_not() {
        for dtype in Block::ALL.map(DType::Block).into_iter().chain(Affine::all().map(DType::Affine)) {
            let columns = if matches!(dtype, DType::Block(_)) { 512 } else { 200 };
            let size = dtype.bytes(&[3, columns]).unwrap();
            // Codes of all ones are infinite in no format, so finite scales are put among them.
            let mut bytes = vec![0xff; size];
            let mut places = Vec::new();
            match dtype {
                DType::Block(block) => {
                    let (values, length) = block.layout();
                    for i in 0..3 * columns / values {
                        places.extend(scales(block).iter().map(|at| (i * length + at, i * values)));
                    }
                }
                DType::Affine(affine) => {
                    let group = affine.group().of(columns);
                    for i in 0..3 {
                        let row = i * affine.row_bytes(columns).unwrap();
                        for j in 0..columns.div_ceil(group) {
                            let at = row + j * affine.group_bytes(group).unwrap();
                            places.push((at, i * columns + j * group));
                        }
                    }
                }
                _ => unreachable!(),
            }
            for &(at, _) in &places {
                bytes[at..at + 2].fill(0x31);
            }
            let tensor = |bytes: &[u8]| Tensor::new(dtype, &[3, columns], bytes.to_vec().into()).unwrap();
            assert_eq!(first_non_finite(&tensor(&bytes)), None, "{dtype}");
            for &(at, index) in &places {
                let mut bad = bytes.clone();
                bad[at..at + 2].copy_from_slice(&[0xff, 0xff]);
                assert_eq!(first_non_finite(&tensor(&bad)), Some(index), "{dtype} at {at}");
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
