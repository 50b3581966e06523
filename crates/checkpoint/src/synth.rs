//! Checkpoints with seeded random weights of any size, for measuring and testing without the real ones.
//!
//! The bytes of a tensor depend only on the seed, its name, type, length and [`Fill`], on every platform:
//! nothing here calls a mathematical library whose last bit could differ.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use half::{bf16, f16};
use pocketglm_tensor::{DType, TensorInfo};

use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::error::shown;
use crate::file::stands;
use crate::{Error, Result, SafetensorsWriter, write_atomic};

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    /// Normally distributed around 0, cut at about 3.7 standard deviations.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Normally distributed around a mean, as the weights of norms are around 1.
    NormalAround {
        /// Mean.
        mean: f32,
        /// Standard deviation.
        std: f32,
    },
    /// One value.
    Constant(f32),
    /// Zeros that take no room in file systems that have holes: for what reads headers alone.
    Hole,
}

/// Bytes made and written at a time: whole elements of every type, and small enough for a cache.
const CHUNK: usize = 256 << 10;
/// Levels of the normal distribution that values take; 12 random bits choose one.
const LEVELS: usize = 1 << 12;

/// Writes a checkpoint: one file, or shards of at most `max_shard_bytes` (but at least one tensor) and
/// their index. Memory stays at about one megabyte whatever the size. `progress` gets (bytes written,
/// bytes in all) after each chunk.
///
/// # Errors
/// [`Error::Write`] where the folder has weights already, or a tensor's type is not F32, F16 or BF16;
/// and those of [`SafetensorsWriter`].
pub fn write(
    folder: &Path,
    tensors: &[(TensorInfo, Fill)],
    seed: u64,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let wrong = |what| Error::Write { path: folder.to_owned(), what };
    for name in [SINGLE_FILE, INDEX_FILE] {
        if stands(&folder.join(name)) {
            return Err(wrong(format!("expected a folder without weights, found {name}")));
        }
    }
    let mut total = 0u64;
    let mut sized = Vec::with_capacity(tensors.len());
    for (info, fill) in tensors {
        if !info.dtype.is_float() {
            let what =
                format!("tensor `{}` has type {}, expected F32, F16 or BF16", shown(&info.name), info.dtype);
            return Err(wrong(what));
        }
        let bytes = info.dtype.bytes(&info.shape).map(|n| n as u64);
        let sum = bytes.and_then(|n| total.checked_add(n));
        let (Some(bytes), Some(sum)) = (bytes, sum) else {
            return Err(wrong(format!(
                "tensor `{}` of shape {:?} is too large",
                shown(&info.name),
                info.shape
            )));
        };
        total = sum;
        sized.push((info, *fill, bytes));
    }
    let shards = divide(&sized, max_shard_bytes);
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut weight_map = serde_json::Map::new();
    let mut done = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let infos: Vec<TensorInfo> = shard.iter().map(|(info, _, _)| (*info).clone()).collect();
        let mut writer = SafetensorsWriter::create(&folder.join(&name), &infos, &metadata)?;
        for (info, fill, bytes) in *shard {
            weight_map.insert(info.name.clone(), name.clone().into());
            if *fill == Fill::Hole {
                writer.leave_zeros(&info.name)?;
                done += bytes;
                progress(done, total);
                continue;
            }
            let mut values = Values::new(seed, info, *fill);
            let mut left = *bytes;
            while left > 0 {
                let n = left.min(CHUNK as u64);
                writer.write(&info.name, values.next(n as usize))?;
                left -= n;
                done += n;
                progress(done, total);
            }
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        // Written last: without it a half-written folder does not open.
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_atomic(&folder.join(INDEX_FILE), |file| {
            serde_json::to_writer_pretty(&mut *file, &index)?;
            file.write_all(b"\n")
        })?;
    }
    Ok(())
}

type SizedTensor<'a> = (&'a TensorInfo, Fill, u64);

/// Cuts a list into runs of at most `most` bytes, or of one tensor.
fn divide<'a, 'b>(tensors: &'b [SizedTensor<'a>], most: u64) -> Vec<&'b [SizedTensor<'a>]> {
    let mut shards = Vec::new();
    let mut rest = tensors;
    loop {
        let mut sum = 0u64;
        let fitting = rest.iter().take_while(|(_, _, bytes)| {
            sum = sum.saturating_add(*bytes);
            sum <= most
        });
        let (shard, after) = rest.split_at(fitting.count().max(1).min(rest.len()));
        shards.push(shard);
        rest = after;
        if rest.is_empty() {
            return shards;
        }
    }
}

/// The endless bytes of one tensor.
struct Values {
    random: Xoshiro,
    table: Table,
    buffer: Vec<u8>,
}

/// The little-endian elements among which random bits choose.
enum Table {
    Two(Box<[[u8; 2]; LEVELS]>),
    Four(Box<[[u8; 4]; LEVELS]>),
}

impl Values {
    fn new(seed: u64, info: &TensorInfo, fill: Fill) -> Values {
        let value = |i: usize| match fill {
            Fill::Normal { std } => std * normal_levels()[i],
            Fill::NormalAround { mean, std } => mean + std * normal_levels()[i],
            Fill::Constant(value) => value,
            Fill::Hole => 0.0,
        };
        let table = match info.dtype {
            DType::F16 => {
                Table::Two(Box::new(std::array::from_fn(|i| f16::from_f32(value(i)).to_le_bytes())))
            }
            DType::BF16 => {
                Table::Two(Box::new(std::array::from_fn(|i| bf16::from_f32(value(i)).to_le_bytes())))
            }
            _ => Table::Four(Box::new(std::array::from_fn(|i| value(i).to_le_bytes()))),
        };
        Values { random: Xoshiro::new(seed, &info.name), table, buffer: vec![0; CHUNK] }
    }

    /// The next `n` bytes, at most [`CHUNK`].
    fn next(&mut self, n: usize) -> &[u8] {
        match &self.table {
            Table::Two(table) => fill(self.buffer.as_chunks_mut().0, table, &mut self.random),
            Table::Four(table) => fill(self.buffer.as_chunks_mut().0, table, &mut self.random),
        }
        &self.buffer[..n]
    }
}

/// Fills `out` from `table`, with five choices from each random number.
fn fill<const N: usize>(out: &mut [[u8; N]], table: &[[u8; N]; LEVELS], random: &mut Xoshiro) {
    for five in out.chunks_mut(5) {
        let mut bits = random.next();
        for value in five {
            *value = table[bits as usize % LEVELS];
            bits >>= 12;
        }
    }
}

/// xoshiro256++ (Blackman and Vigna, 2019).
struct Xoshiro([u64; 4]);

impl Xoshiro {
    fn new(seed: u64, name: &str) -> Xoshiro {
        // FNV-1a makes a number of the name; splitmix64 spreads it over the state, as the authors advise.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        let mut x = hash ^ seed.wrapping_mul(0xd134_2543_de82_ef95);
        let mut next = || {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Xoshiro([next(), next(), next(), next()])
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }
}

/// The quantiles of the standard normal distribution at (i + 1/2) / LEVELS, scaled to unit variance.
fn normal_levels() -> &'static [f32; LEVELS] {
    static TABLE: OnceLock<Box<[f32; LEVELS]>> = OnceLock::new();
    TABLE.get_or_init(|| {
        // The upper half from the middle outwards: Newton's method from the quantile before.
        let mut upper = [0f64; LEVELS / 2];
        let mut x = 0f64;
        for (i, quantile) in upper.iter_mut().enumerate() {
            let p = (i as f64 + 0.5) / LEVELS as f64;
            for _ in 0..8 {
                let (above_middle, density) = normal(x);
                x += (p - above_middle) / density;
            }
            *quantile = x;
        }
        let variance = upper.iter().map(|x| x * x).sum::<f64>() / upper.len() as f64;
        let scale = 1.0 / variance.sqrt();
        let half = LEVELS / 2;
        Box::new(std::array::from_fn(|i| {
            let x = if i < half { -upper[half - 1 - i] } else { upper[i - half] };
            (x * scale) as f32
        }))
    })
}

/// Probability between 0 and `x` and density at `x` of the standard normal distribution, for `x` from 0 to
/// about 4: `density * (x + x^3/3 + x^5/15 + ...)`. Only exactly rounded operations.
fn normal(x: f64) -> (f64, f64) {
    const INVERSE_ROOT_TWO_PI: f64 = 0.398_942_280_401_432_7;
    // exp(-x^2/2) from a short series at a 64th of the argument, squared six times.
    let t = -x * x / 2.0 / 64.0;
    let mut exp =
        1.0 + t * (1.0 + t / 2.0 * (1.0 + t / 3.0 * (1.0 + t / 4.0 * (1.0 + t / 5.0 * (1.0 + t / 6.0)))));
    for _ in 0..6 {
        exp *= exp;
    }
    let density = INVERSE_ROOT_TWO_PI * exp;
    let (mut term, mut sum) = (x, x);
    for k in 1..80 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    (density * sum, density)
}

#[cfg(test)]
mod tests;
