//! A grouped convolution over frames with weights of eight bits, `y = act(sum w x + bias)` as in
//! [`conv_frames`](super::conv_frames).
//!
//! The channels of a group in one frame become bytes with a scale of their own, once for all positions. A tap of a group
//! is then an exact integer sum, and taps are added in f32 in one order: a position's result depends on the frames under
//! the kernel alone. Rows of a tile are positions, whose codes overlap as the frames do; columns are panels of outputs. A
//! panel that two groups share is computed for both.

use super::conv_frames::{FrameConv, activated};
use super::linear::quantise;
use super::{Epilogue, SharedMut, count, for_rows};
use crate::packed::{MAX_BLOCK, Packed};
use crate::simd::dot::{self, DotKernel, Dots, LANES};
use crate::simd::{Kernel, Simd};
use crate::{Affine, AlignedF32, Cpu, DType, Group, PackedFormat, Result};

/// Positions of one task: a multiple of the rows of every tile.
const ROWS: usize = 36;
/// Most panels of outputs side by side.
const PANELS: usize = 4;
/// Taps whose weights stay in the first-level cache while the positions of a task pass by.
const TAPS: usize = 8;

/// Whether weights of this format are multiplied as they are, for groups of `channels` channels.
pub fn conv_groups_take(format: PackedFormat, channels: usize) -> bool {
    let int8 = Affine::new(8, Group::Row, true).and_then(|a| PackedFormat::of(DType::Affine(a)));
    Some(format) == int8 && channels.is_multiple_of(4) && (4..=MAX_BLOCK).contains(&channels)
}

/// Where things are in the working memory.
#[derive(Clone, Copy)]
struct Sizes {
    /// Frames of a group, zeros and what a task reads beyond its last position included.
    length: usize,
    /// Floats of all codes, `[group][frame][channel]`, and of all scales or sums, `[group][frame]`.
    codes: usize,
    scales: usize,
}

impl Sizes {
    fn new(conv: &FrameConv) -> Result<Sizes> {
        let spare = ROWS.saturating_mul(conv.stride);
        let length =
            [conv.frames, conv.padding[0], conv.padding[1]].into_iter().fold(spare, usize::saturating_add);
        let codes = count("conv_groups", "codes", &[length, conv.channels])?.div_ceil(4).next_multiple_of(16);
        let scales = count("conv_groups", "scales", &[length, conv.groups])?.next_multiple_of(16);
        Ok(Sizes { length, codes, scales })
    }

    fn floats(self) -> usize {
        self.codes.saturating_add(self.scales.saturating_mul(2))
    }
}

/// Floats of working memory.
pub(super) fn scratch_floats(conv: &FrameConv) -> Result<usize> {
    Ok(Sizes::new(conv)?.floats())
}

/// The operands were checked, and [`conv_groups_take`] them; `out` positions.
pub(super) fn convolve(
    cpu: &Cpu,
    conv: &FrameConv,
    out: usize,
    x: &[f32],
    weight: &Packed,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<()> {
    let sizes = Sizes::new(conv)?;
    // Frames outside of the signal keep codes and scales of zero.
    let mut memory = AlignedF32::working(sizes.floats())?;
    let memory = SharedMut::new(&mut memory);
    let isa = cpu.isa();
    for_rows(cpu, conv.frames, conv.channels, &|frames| {
        dot::run(isa, Quantise { conv, sizes, x, range: weight.input_range(), memory: &memory, frames });
    });
    let (inner, outer) = (conv.channels / conv.groups, conv.outputs / conv.groups);
    let y = SharedMut::new(y);
    let blocks = out.div_ceil(ROWS);
    cpu.parallel(conv.groups * blocks, &|task| {
        let (group, first) = (task / blocks, task % blocks * ROWS);
        let outputs = group * outer..(group + 1) * outer;
        let frame = group * sizes.length + first * conv.stride;
        let mut sums = [0f32; ROWS * PANELS * LANES];
        for panel in (outputs.start / LANES..outputs.end.div_ceil(LANES)).step_by(PANELS) {
            let panels = PANELS.min(outputs.end.div_ceil(LANES) - panel);
            dot::run(
                isa,
                Taps {
                    weight,
                    panel,
                    panels,
                    steps: inner / 4,
                    kernel: conv.kernel,
                    stride: conv.stride,
                    codes: memory.at(0).cast::<u8>().wrapping_add(frame * inner),
                    scales: memory.at(sizes.codes + frame),
                    zeros: memory.at(sizes.codes + sizes.scales + frame).cast(),
                    sums: &mut sums,
                },
            );
            let first_output = outputs.start.max(panel * LANES);
            let columns = first_output..outputs.end.min((panel + panels) * LANES);
            let bias = bias.map(|b| &b[columns.clone()]);
            for i in 0..ROWS.min(out - first) {
                let at = (i * PANELS * LANES) + columns.start - panel * LANES;
                let row = (first + i) * conv.outputs;
                // SAFETY: these outputs at this position belong to this task.
                let y = unsafe { y.slice(row + columns.start..row + columns.end) };
                isa.run(Finish { sums: &sums[at..at + columns.len()], bias, epilogue, y });
            }
        }
    });
    Ok(())
}

/// Frames to bytes, a scale for each group.
struct Quantise<'a> {
    conv: &'a FrameConv,
    sizes: Sizes,
    x: &'a [f32],
    range: Option<f32>,
    memory: &'a SharedMut<f32>,
    frames: std::ops::Range<usize>,
}

impl DotKernel for Quantise<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, _: D) {
        let Quantise { conv, sizes, x, range, memory, frames } = self;
        let inner = conv.channels / conv.groups;
        for frame in frames {
            let row = &x[frame * conv.channels..][..conv.channels];
            for (group, part) in row.chunks_exact(inner).enumerate() {
                let mut codes = [0i8; MAX_BLOCK];
                let scale = quantise(part, range, &mut codes);
                let sum: i32 = codes[..inner].iter().map(|&c| i32::from(c)).sum();
                let at = group * sizes.length + conv.padding[0] + frame;
                // SAFETY: this frame belongs to this task, in memory that `Sizes` counted.
                unsafe {
                    let to = memory.at(0).cast::<i8>().add(at * inner);
                    std::ptr::copy_nonoverlapping(codes.as_ptr(), to, inner);
                    *memory.at(sizes.codes + at) = scale;
                    *memory.at(sizes.codes + sizes.scales + at).cast::<i32>() = (D::BIAS8 - 128) * sum;
                }
            }
        }
    }
}

/// Sums of [`ROWS`] positions and a few panels, `[position][panel][lane]`.
struct Taps<'a> {
    weight: &'a Packed,
    panel: usize,
    panels: usize,
    /// Groups of four channels.
    steps: usize,
    kernel: usize,
    stride: usize,
    /// Of the first frame under the first position: codes, scales, and what sums begin with.
    codes: *const u8,
    scales: *const f32,
    zeros: *const i32,
    sums: &'a mut [f32; ROWS * PANELS * LANES],
}

impl DotKernel for Taps<'_> {
    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        // As many sums as leave registers for as many more and for the weights.
        match (D::PANELS, self.panels) {
            (1, _) if D::ROWS < 4 => self.each::<D, 1>(d),
            (1, _) => self.each::<D, 2>(d),
            (_, 1) => self.of::<D, 6, 1>(d, 0),
            (_, 2) => self.of::<D, 6, 2>(d, 0),
            (_, 3) => self.of::<D, 4, 3>(d, 0),
            _ => self.of::<D, 3, 4>(d, 0),
        }
    }
}

impl Taps<'_> {
    /// One panel after the other.
    #[inline(always)]
    fn each<D: Dots, const R: usize>(self, d: D) {
        for place in 0..self.panels {
            let sums = &mut *self.sums;
            Taps { sums, ..self }.of::<D, R, 1>(d, place);
        }
    }

    /// The panels from `place` on.
    #[inline(always)]
    fn of<D: Dots, const R: usize, const NP: usize>(self, d: D, place: usize) {
        let layout = &self.weight.layout;
        let inner = 4 * self.steps;
        let at = |j: usize| self.weight.panel(self.panel + place + j);
        let mut panels = [at(0); NP];
        for j in 1..NP {
            panels[j] = at(j);
        }
        for first in (0..self.kernel).step_by(TAPS) {
            let taps = first..(first + TAPS).min(self.kernel);
            for row in (0..ROWS).step_by(R) {
                let sums = self.sums[(row * PANELS + place) * LANES..].as_mut_ptr();
                let mut f = [[d.splat_f(0.0); NP]; R];
                // SAFETY: rows and panels of the sums; frames that `Sizes` counted; taps of whole panels.
                unsafe {
                    if first > 0 {
                        for i in 0..R {
                            for j in 0..NP {
                                f[i][j] = d.load_f(sums.add((i * PANELS + j) * LANES));
                            }
                        }
                    }
                    for tap in taps.clone() {
                        let frame = |i: usize| (row + i) * self.stride + tap;
                        let mut acc = [[d.splat_i(0); NP]; R];
                        for i in 0..R {
                            acc[i] = [d.splat_i(*self.zeros.add(frame(i))); NP];
                        }
                        for step in 0..self.steps {
                            let code = layout.header + (tap * self.steps + step) * 4 * LANES;
                            let mut w = [d.bias8(d.load_q(panels[0].add(code))); NP];
                            for j in 1..NP {
                                w[j] = d.bias8(d.load_q(panels[j].add(code)));
                            }
                            for i in 0..R {
                                let x = self.codes.add(frame(i) * inner + 4 * step).cast();
                                for j in 0..NP {
                                    acc[i][j] = d.dot(acc[i][j], w[j], x);
                                }
                            }
                        }
                        for i in 0..R {
                            let scale = d.splat_f(*self.scales.add(frame(i)));
                            for j in 0..NP {
                                f[i][j] = d.fma(d.to_f(acc[i][j]), scale, f[i][j]);
                            }
                        }
                    }
                    let last = taps.end == self.kernel;
                    for j in 0..NP {
                        let scale = if last { d.load_bf16(panels[j]) } else { d.splat_f(1.0) };
                        for i in 0..R {
                            d.store_f(sums.add((i * PANELS + j) * LANES), d.mul(f[i][j], scale));
                        }
                    }
                }
            }
        }
    }
}

/// Adds biases and applies the epilogue.
struct Finish<'a> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    epilogue: Epilogue,
    y: &'a mut [f32],
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in (0..self.y.len()).step_by(S::WIDTH) {
            let n = (self.y.len() - i).min(S::WIDTH);
            // SAFETY: `n` sums, biases and outputs from `i`.
            unsafe {
                let mut v = s.load_n(self.sums.as_ptr().add(i), n);
                if let Some(bias) = self.bias {
                    v = s.add(v, s.load_n(bias.as_ptr().add(i), n));
                }
                s.store_n(self.y.as_mut_ptr().add(i), n, activated(s, self.epilogue, v));
            }
        }
    }
}

#[cfg(test)]
#[path = "conv_groups_tests.rs"]
mod tests;
