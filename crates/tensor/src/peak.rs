//! What this machine can do at most, measured: the yardstick of the benchmarks.

use std::hint::black_box;
use std::time::Instant;

use crate::BytesOwner;
use crate::packed::Memory;
use crate::simd::dot::{self, DotKernel, Dots};
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Result};

/// Fused multiply-adds into independent accumulators that stay in registers.
struct FmaLoop {
    rounds: usize,
}

/// Accumulators: enough to hide the latency, few enough for sixteen registers.
const ACCUMULATORS: usize = 12;

impl Kernel for FmaLoop {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.0001)));
        // Different starts, or the compiler finds that all accumulators are the same.
        let mut sums = [s.splat(0.0); ACCUMULATORS];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.splat(black_box(i as f32));
        }
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, b);
            }
        }
        let mut all = s.splat(0.0);
        for sum in sums {
            all = s.add(all, sum);
        }
        s.reduce_add(all)
    }
}

/// Sums a run of floats with eight accumulators, in four places at once: one stream alone does not keep the memory busy.
struct ReadLoop<'a> {
    x: &'a [f32],
}

impl Kernel for ReadLoop<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 8];
        let step = 2 * S::WIDTH;
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
            let quarter = self.x.len() / 4;
            self.x[i * quarter..(i + 1) * quarter].chunks_exact(step)
        });
        for (((a, b), c), d) in a.zip(b).zip(c).zip(d) {
            for (i, part) in [a, b, c, d].into_iter().enumerate() {
                for line in (0..step).step_by(16) {
                    s.prefetch(part.as_ptr().wrapping_add(line + 1024).cast());
                }
                sums[2 * i] = s.add(sums[2 * i], s.load_slice(&part[..S::WIDTH]));
                sums[2 * i + 1] = s.add(sums[2 * i + 1], s.load_slice(&part[S::WIDTH..]));
            }
        }
        let mut all = s.splat(0.0);
        for sum in sums {
            all = s.add(all, sum);
        }
        s.reduce_add(all)
    }
}

/// Arithmetic peak: f32 multiply-adds of all threads of `cpu` for about `milliseconds`, in 1e9 operations a second
/// (a multiply-add is two).
pub fn fma_gflops(cpu: &Cpu, milliseconds: u32) -> f64 {
    let per_round = 2.0 * (ACCUMULATORS * cpu.isa().width()) as f64;
    let time = |rounds: usize| {
        let start = Instant::now();
        cpu.parallel(cpu.threads(), &|_| {
            black_box(cpu.isa().run(FmaLoop { rounds }));
        });
        start.elapsed().as_secs_f64()
    };
    let trial = 200_000;
    let rounds = (trial as f64 * f64::from(milliseconds) * 1e-3 / time(trial).max(1e-9)) as usize + 1;
    per_round * rounds as f64 * cpu.threads() as f64 / time(rounds) * 1e-9
}

/// Dot products of bytes into independent sums that stay in registers.
struct DotLoop {
    rounds: usize,
}

impl DotKernel for DotLoop {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        let codes = black_box([3u8; 64]);
        let steps = black_box([0x0102_0304i32; DOT_ACCUMULATORS]);
        // SAFETY: 64 codes; each step is one number.
        unsafe {
            let w = d.load_q(codes.as_ptr());
            let mut sums = steps.map(|s| d.splat_i(s));
            for _ in 0..self.rounds {
                for (sum, step) in sums.iter_mut().zip(&steps) {
                    *sum = d.dot(*sum, w, step);
                }
            }
            let mut all = d.splat_f(0.0);
            for sum in sums {
                all = d.fma(d.to_f(sum), d.splat_f(1.0), all);
            }
            let mut out = [0f32; 16];
            d.store_f(out.as_mut_ptr(), all);
            black_box(out);
        }
    }
}

/// Sums in registers: enough to hide the latency.
const DOT_ACCUMULATORS: usize = 12;

/// Peak of dot products of bytes, all threads of `cpu`, for about `milliseconds`, in 1e9 operations a second (a product
/// and its addition are two).
pub fn dot_gops(cpu: &Cpu, milliseconds: u32) -> f64 {
    let per_round = 2.0 * 64.0 * DOT_ACCUMULATORS as f64;
    let time = |rounds: usize| {
        let start = Instant::now();
        cpu.parallel(cpu.threads(), &|_| dot::run(cpu.isa(), DotLoop { rounds: black_box(rounds) }));
        start.elapsed().as_secs_f64()
    };
    let trial = 50_000;
    let rounds = (trial as f64 * f64::from(milliseconds) * 1e-3 / time(trial).max(1e-9)) as usize + 1;
    per_round * rounds as f64 * cpu.threads() as f64 / time(rounds) * 1e-9
}

/// A buffer to measure reading with, in memory as packed weights have it.
pub struct ReadBuffer(Memory);

impl std::ops::Deref for ReadBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(self.0.bytes())
    }
}

/// A buffer to measure reading with; it should be several times larger than the last-level cache.
///
/// # Errors
/// [`crate::Error::OutOfMemory`]
pub fn read_buffer(bytes: usize) -> Result<ReadBuffer> {
    let mut memory = Memory::new(bytes.next_multiple_of(4), "a buffer to read")?;
    // Pages that were never written may all be the same one.
    memory.writable().fill(1);
    Ok(ReadBuffer(memory))
}

/// Bandwidth: all threads of `cpu` read `buffer` once, each one contiguous part; in 1e9 bytes a second.
pub fn read_gbytes(cpu: &Cpu, buffer: &[f32]) -> f64 {
    let share = buffer.len().div_ceil(cpu.threads()).next_multiple_of(1024);
    let start = Instant::now();
    cpu.parallel(cpu.threads(), &|thread| {
        let begin = (thread * share).min(buffer.len());
        let end = (begin + share).min(buffer.len());
        black_box(cpu.isa().run(ReadLoop { x: &buffer[begin..end] }));
    });
    buffer.len() as f64 * 4.0 / start.elapsed().as_secs_f64() * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn peaks_are_positive_for_every_instruction_set() {
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(isa, 1).unwrap();
            assert!(fma_gflops(&cpu, 1) > 0.0);
            assert!(dot_gops(&cpu, 1) > 0.0);
            assert!(read_gbytes(&cpu, &read_buffer(1 << 20).unwrap()) > 0.0);
        }
    }
}
