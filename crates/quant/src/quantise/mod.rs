//! Rows of f32 to the bytes of a format.
//!
//! A row is encoded unit by unit (an affine group, a block), each into [`RowCodes`], from which the bytes are packed.
//! Every unit is first rounded plainly; a search then replaces it where its weighted error is smaller, so that
//! searching is never worse than rounding.

mod affine;
mod lanes;
mod nested;
mod search;
mod simple;

use half::{bf16, f16};
use pocketglm_tensor::{Block, DType, Group, Isa, RowCodes, Vectorise};

use crate::codes::put_together;
use crate::{Error, Result};

/// How scales are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[non_exhaustive]
pub enum Method {
    /// From the smallest and largest value of each group; for Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 exactly as ggml does.
    #[default]
    Round,
    /// The scale (and zero point or minimum) among many that has the least squared error, weighted by importance.
    Search,
}

/// Options of [`quantise_row`].
#[derive(Clone, Copy, Default, Debug)]
pub struct RowOptions<'a> {
    /// How scales are chosen.
    pub method: Method,
    /// Weight of each value's squared error for [`Method::Search`], such as the second moment of the activation that
    /// meets it: `values.len()` finite numbers of at least 0. Without it all values weigh the same.
    pub importance: Option<&'a [f32]>,
    /// The smallest and the largest value of the whole matrix, see [`range`]: what the one scale of
    /// [`Group::Tensor`] is chosen by, which is always plain rounding's. Without it the row is the matrix.
    pub range: Option<(f32, f32)>,
}

/// The smallest and the largest value of a row; of none, `(infinity, -infinity)`.
///
/// # Errors
/// [`Error::NotFinite`] naming the first NaN or infinity.
pub fn range(values: &[f32]) -> Result<(f32, f32)> {
    check_finite("weights", values)?;
    Ok(values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v))))
}

/// A unit holds a value whose scale is beyond f16.
#[derive(Debug)]
struct TooLarge;

/// Appends the `dtype.row_bytes(values.len())` bytes of a row; nothing on an error.
///
/// With [`Method::Round`] an affine value's error is at most half of its group's scale (and f32's own rounding), and
/// zero is kept exactly. The GGUF formats' f16 scales lose values below about 1e-7, as they do in ggml.
///
/// # Errors
/// [`Error::DType`] for integer types, [`Error::RowLength`] where the format has no rows of that length,
/// [`Error::NotFinite`] naming the first NaN or infinity, [`Error::Range`] for values beyond what an f16 scale or
/// an f16 holds, [`Error::Size`] where the importance has another length.
pub fn quantise_row(dtype: DType, values: &[f32], options: &RowOptions<'_>, out: &mut Vec<u8>) -> Result<()> {
    let k = values.len();
    let bytes = dtype.row_bytes(k).ok_or(Error::RowLength { dtype, values: k })?;
    check_finite("weights", values)?;
    let too_large = |at: usize, value: f32| Error::Range { index: at, value, dtype };
    match dtype {
        DType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        DType::BF16 => {
            // The largest f32 values would round to an infinity; they are held by the largest bf16.
            let limit = |v: f32| if v.is_infinite() { bf16::MAX.to_f32().copysign(v) } else { v };
            out.extend(
                values.iter().flat_map(|&v| bf16::from_f32(limit(bf16::from_f32(v).to_f32())).to_le_bytes()),
            );
        }
        DType::F16 => {
            if let Some(at) = values.iter().position(|&v| f16::from_f32(v).is_infinite()) {
                return Err(too_large(at, values[at]));
            }
            out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
        }
        DType::Affine(_) | DType::Block(_) => {
            let mut row = RowCodes::default();
            encode_row(dtype, values, options, &mut row)?;
            out.reserve(bytes);
            put_together(dtype, &row, out)?;
        }
        found => {
            return Err(Error::DType { op: "quantise", wanted: "a floating-point or quantised type", found });
        }
    }
    Ok(())
}

/// The codes and scales of a row, as [`take_apart`](crate::take_apart) gives them of the bytes of [`quantise_row`]: what
/// kernels' layouts are packed from, without those bytes. The vectors' memory is reused.
///
/// # Errors
/// As [`quantise_row`], and [`Error::DType`] for types that are not quantised.
pub fn quantise_codes(
    dtype: DType,
    values: &[f32],
    options: &RowOptions<'_>,
    row: &mut RowCodes,
) -> Result<()> {
    dtype.row_bytes(values.len()).ok_or(Error::RowLength { dtype, values: values.len() })?;
    check_finite("weights", values)?;
    encode_row(dtype, values, options, row)
}

/// The codes and scales of finite values that are a row of the format.
fn encode_row(dtype: DType, values: &[f32], options: &RowOptions<'_>, row: &mut RowCodes) -> Result<()> {
    let importance = Importance::new(values.len(), options)?;
    for v in [&mut row.codes, &mut row.sub_scales, &mut row.sub_minima] {
        v.clear();
    }
    row.scales.clear();
    row.minima.clear();
    row.codes.reserve(values.len());
    if let DType::Affine(format) = dtype
        && format.group() == Group::Tensor
    {
        let (least, most) = options.range.unwrap_or((0.0, 0.0));
        if let Some(value) = [least, most].into_iter().find(|v| !v.is_finite()) {
            return Err(Error::NotFinite { what: "range", index: 0, value, kind: "number" });
        }
        if !values.is_empty() {
            affine::round_in_range(format, values, (least, most), row);
        }
        return Ok(());
    }
    encode_units(dtype, values, importance.all(), row)
}

/// Values that are encoded together.
pub(crate) fn unit_of(dtype: DType, k: usize) -> usize {
    match dtype {
        DType::Affine(format) => format.group().of(k),
        DType::Block(block) => block.layout().0,
        _ => 1,
    }
}

/// Weights of a row's squared errors, checked; `None` for plain rounding.
pub(crate) struct Importance(Option<Vec<f32>>);

impl Importance {
    pub fn new(k: usize, options: &RowOptions<'_>) -> Result<Importance> {
        if let Some(importance) = options.importance {
            check_importance(importance, k)?;
        }
        Ok(Importance(match options.method {
            Method::Round => None,
            Method::Search => Some(options.importance.map_or_else(|| vec![1.0; k], <[f32]>::to_vec)),
        }))
    }

    pub fn all(&self) -> Option<&[f32]> {
        self.0.as_deref()
    }
}

/// Whether each of `k` weights is a finite number of at least 0.
pub(crate) fn check_importance(importance: &[f32], k: usize) -> Result<()> {
    if importance.len() != k {
        return Err(Error::Size {
            op: "quantise",
            operand: "importance",
            wanted: k,
            found: importance.len(),
        });
    }
    match importance.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            what: "importance",
            index,
            value: importance[index],
            kind: "number of at least 0",
        }),
    }
}

/// Whether there is a NaN or an infinity. Without early exits the test vectorises; almost every row passes it.
struct AnyNotFinite<'a>(&'a [f32]);

impl Vectorise for AnyNotFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        self.0.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff)) >= 0x7f80_0000
    }
}

/// Names the first NaN or infinity.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<()> {
    for (i, part) in values.chunks(4096).enumerate() {
        if Isa::detect().vectorise(AnyNotFinite(part))
            && let Some(at) = part.iter().position(|v| !v.is_finite())
        {
            return Err(Error::NotFinite { what, index: i * 4096 + at, value: part[at], kind: "number" });
        }
    }
    Ok(())
}

/// Appends the codes and scales of whole units of finite values.
///
/// With `importance` (of the same length) scales are searched, without it values are plainly rounded.
pub(crate) fn encode_units(
    dtype: DType,
    values: &[f32],
    importance: Option<&[f32]>,
    row: &mut RowCodes,
) -> Result<()> {
    encode_units_on(Isa::detect(), dtype, values, importance, row)
}

/// The same as compiled for one instruction set.
pub(crate) fn encode_units_on(
    isa: Isa,
    dtype: DType,
    values: &[f32],
    importance: Option<&[f32]>,
    row: &mut RowCodes,
) -> Result<()> {
    isa.vectorise(Units { dtype, values, importance, row })
}

struct Units<'a> {
    dtype: DType,
    values: &'a [f32],
    importance: Option<&'a [f32]>,
    row: &'a mut RowCodes,
}

impl Vectorise for Units<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run(self) -> Result<()> {
        let Units { dtype, values, importance, row } = self;
        let unit = unit_of(dtype, values.len());
        if let (DType::Affine(format), None) = (dtype, importance) {
            affine::round_row(format, values, unit.max(1), row);
            return Ok(());
        }
        for (i, values) in values.chunks(unit.max(1)).enumerate() {
            let importance = importance.map(|w| &w[i * unit..][..values.len()]);
            encode_unit(dtype, values, importance, row).map_err(|error| match error {
                Error::Range { index, value, dtype } => {
                    Error::Range { index: i * unit + index, value, dtype }
                }
                other => other,
            })?;
        }
        Ok(())
    }
}

/// Appends the codes and scales of one unit.
#[inline(always)]
fn encode_unit(dtype: DType, values: &[f32], importance: Option<&[f32]>, row: &mut RowCodes) -> Result<()> {
    let scaled = importance.and_then(search::Weights::new);
    let weights = scaled.as_ref();
    let done = match dtype {
        DType::Affine(format) => {
            affine::encode(format, values, weights, row);
            Ok(())
        }
        DType::Block(block) => match block {
            Block::Q8_0 | Block::Q4_0 | Block::Q4_1 | Block::Q5_0 | Block::Q5_1 | Block::IQ4_NL => {
                simple::encode(block, values, weights, row)
            }
            Block::Q2_K | Block::Q3_K | Block::Q6_K => nested::encode::<16>(block, values, weights, row),
            Block::Q4_K | Block::Q5_K | Block::IQ4_XS => nested::encode::<8>(block, values, weights, row),
        },
        found => return Err(Error::DType { op: "encode", wanted: "a quantised type", found }),
    };
    done.map_err(|TooLarge| {
        let index =
            (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())).unwrap_or(0);
        Error::Range { index, value: values[index], dtype }
    })
}

#[cfg(test)]
mod tests {
    use pocketglm_tensor::Affine;

    use super::*;
    use crate::take_apart;

    #[test]
    fn codes_of_a_row_are_those_of_its_bytes_for_all_types_and_methods() {
        // The vectors go from type to type: what one leaves must not show in the next.
        let (mut made, mut stored) = (RowCodes::default(), RowCodes::default());
        let types = Block::ALL.map(DType::Block).into_iter().chain(Affine::all().map(DType::Affine));
        for dtype in types {
            for (method, seed) in [(Method::Round, 3), (Method::Search, 7)] {
                let values: Vec<f32> =
                    (0..512).map(|i| ((i * 37 + seed * i * i) % 251) as f32 / 50.0 - 2.3).collect();
                let options = RowOptions { method, ..RowOptions::default() };
                quantise_codes(dtype, &values, &options, &mut made).unwrap();
                let mut bytes = Vec::new();
                quantise_row(dtype, &values, &options, &mut bytes).unwrap();
                take_apart(dtype, &bytes, values.len(), &mut stored).unwrap();
                assert_eq!(made, stored, "{dtype} {method:?}");
            }
        }
        let refused = quantise_codes(DType::F16, &[1.0; 32], &RowOptions::default(), &mut made);
        assert!(matches!(refused, Err(Error::DType { .. })));
    }
}
