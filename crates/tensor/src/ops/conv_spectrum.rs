//! A grouped convolution over frames with a long kernel and stride one, `y = act(sum w x + bias)` as in
//! [`conv_frames`](super::conv_frames), by products of spectra (overlap-save; Oppenheim and Schafer, Discrete-Time Signal
//! Processing, 8.7).
//!
//! Blocks of `N` frames give `N - kernel + 1` positions each. Weights are real, so two blocks are transformed at once, as
//! real and imaginary part, and come back apart. Lanes are channels: a butterfly is plain vector arithmetic. Spectra
//! stay in the order in which the transform leaves them, and a group's are made when its turn comes, so that no form of
//! the weights is kept.
//!
//! A position's error depends on the magnitude of all frames of its two blocks: callers ask for this explicitly.

use super::conv_frames::{FrameConv, activated};
use super::{Epilogue, SharedMut};
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Result};

/// Channels and outputs of a group are multiples of this, and so of every vector.
const LANES: usize = 16;
/// Pairs of blocks that meet a spectrum of the weights together, and those whose sums are in registers.
const PAIRS: usize = 6;
const NEAR: usize = 3;
/// Kernels for which this pays, and whose transforms stay in the second-level cache.
const KERNELS: std::ops::RangeInclusive<usize> = 32..=256;

/// Sizes, in floats where nothing else is said.
#[derive(Clone, Copy)]
struct Sizes {
    /// Frames of a block, and positions that it gives.
    n: usize,
    step: usize,
    /// Pairs of blocks, in all and at a time.
    pairs: usize,
    batch: usize,
    /// Channels and outputs of a group.
    inner: usize,
    outer: usize,
    /// Of one thread: weights of 16 channels turned, a transform, spectra of weights, of inputs and of outputs.
    turned: usize,
    transform: usize,
    weights: usize,
    x: usize,
    y: usize,
}

impl Sizes {
    fn new(conv: &FrameConv, width: usize) -> Option<Sizes> {
        let groups = conv.groups.max(1);
        let (inner, outer) = (conv.channels / groups, conv.outputs / groups);
        let whole = |n: usize| n > 0 && n.is_multiple_of(LANES);
        let fits = groups > 1 && conv.stride == 1 && KERNELS.contains(&conv.kernel);
        if !fits || !whole(inner) || !whole(outer) {
            return None;
        }
        let n = (2 * conv.kernel).next_power_of_two();
        let step = n - conv.kernel + 1;
        let pairs = conv.out_frames().ok()?.div_ceil(2 * step);
        let batch = pairs.min(PAIRS);
        Some(Sizes {
            n,
            step,
            pairs,
            batch,
            inner,
            outer,
            turned: conv.kernel * LANES * width,
            transform: 2 * n * width,
            weights: (n / 2 + 1) * 2 * inner * outer,
            x: batch * 2 * n * inner,
            y: batch * 2 * n * outer,
        })
    }

    fn own(&self) -> usize {
        (self.turned + self.transform + self.weights + self.x + self.y).next_multiple_of(16)
    }
}

/// Whether this convolution is one for spectra.
pub(super) fn pays(conv: &FrameConv) -> bool {
    Sizes::new(conv, 1).is_some()
}

/// Floats of scratch that [`convolve`] takes from the context.
pub(super) fn scratch_floats(cpu: &Cpu, conv: &FrameConv) -> usize {
    Sizes::new(conv, cpu.isa().width()).map_or(0, |s| cpu.threads() * s.own())
}

/// The operands were checked. Does nothing and gives `false` where this convolution is none for spectra.
pub(super) fn convolve(
    cpu: &Cpu,
    conv: &FrameConv,
    out: usize,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    y: &mut [f32],
) -> Result<bool> {
    let isa = cpu.isa();
    let Some(sizes) = Sizes::new(conv, isa.width()) else { return Ok(false) };
    let roots: Vec<[f32; 2]> = (0..sizes.n / 2)
        .map(|i| -std::f64::consts::TAU * i as f64 / sizes.n as f64)
        .map(|angle| [angle.cos() as f32, angle.sin() as f32])
        .collect();
    let mut scratch = cpu.scratch(scratch_floats(cpu, conv))?;
    let (scratch, y) = (SharedMut::new(&mut scratch), SharedMut::new(y));
    cpu.parallel_slots(conv.groups, &|slot, group| {
        let own = scratch.at(slot * sizes.own());
        isa.run(Grouped { conv, sizes, roots: &roots, group, out, x, weight, bias, epilogue, own, y });
    });
    Ok(true)
}

/// One group.
struct Grouped<'a> {
    conv: &'a FrameConv,
    sizes: Sizes,
    /// `exp(-2 pi i k / N)` for the first half.
    roots: &'a [[f32; 2]],
    group: usize,
    out: usize,
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    epilogue: Epilogue,
    own: *mut f32,
    y: SharedMut<f32>,
}

impl Kernel for Grouped<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Sizes { n, batch, pairs, inner, outer, turned, transform, weights, x, .. } = self.sizes;
        let spare = self.own.wrapping_add(turned);
        let spectra = spare.wrapping_add(transform);
        let xs = spectra.wrapping_add(weights);
        let ys = xs.wrapping_add(x);
        let vector = 2 * n * S::WIDTH;
        // SAFETY: the buffers have the sizes of `Sizes`; what is read was written before.
        unsafe {
            self.spectra_of_weights(s, spare, spectra);
            for first in (0..pairs).step_by(batch) {
                let count = batch.min(pairs - first);
                for pair in 0..count {
                    for c in 0..inner / S::WIDTH {
                        let to = xs.add((pair * (inner / S::WIDTH) + c) * vector);
                        self.fetch(s, first + pair, c * S::WIDTH, to);
                        self.forward(s, to);
                    }
                }
                for frequency in 0..=n / 2 {
                    for pair in (0..count).step_by(NEAR) {
                        let (x, y) = (xs.add(pair * 2 * n * inner), ys.add(pair * 2 * n * outer));
                        match count - pair {
                            1 => self.multiply::<S, 1>(s, frequency, spectra, x, y),
                            2 => self.multiply::<S, 2>(s, frequency, spectra, x, y),
                            _ => self.multiply::<S, NEAR>(s, frequency, spectra, x, y),
                        }
                    }
                }
                for pair in 0..count {
                    for o in 0..outer / S::WIDTH {
                        let from = ys.add((pair * (outer / S::WIDTH) + o) * vector);
                        self.inverse(s, from);
                        self.finish(s, first + pair, o * S::WIDTH, from);
                    }
                }
            }
        }
    }
}

impl Grouped<'_> {
    /// Where a transform leaves a frequency.
    #[inline(always)]
    fn place(&self, frequency: usize) -> usize {
        let n = self.sizes.n;
        (frequency % n).reverse_bits() >> (usize::BITS - n.trailing_zeros())
    }

    /// Spectra of a group's weights, conjugated and over `N`: `to[frequency][output vector][channel][re, im][lane]` for the
    /// first half of the frequencies; the others are their conjugates.
    ///
    /// # Safety
    /// `spare` has room for a transform, `to` for the spectra.
    #[inline(always)]
    unsafe fn spectra_of_weights<S: Simd>(&self, s: S, spare: *mut f32, to: *mut f32) {
        let Sizes { n, inner, outer, .. } = self.sizes;
        let (kernel, w) = (self.conv.kernel, S::WIDTH);
        let turned = self.own;
        let half = s.splat(0.5 / n as f32);
        for o in 0..outer / w {
            for channel in (0..inner).step_by(LANES) {
                let rows = (self.group * outer + o * w) * kernel * inner + channel;
                // SAFETY: `w` rows of the weights, 16 channels of each tap; buffers as the caller promises.
                unsafe {
                    for tap in 0..kernel {
                        for c in (0..LANES).step_by(w) {
                            let src = self.weight.as_ptr().add(rows + tap * inner + c);
                            s.transpose(src, kernel * inner, turned.add((tap * LANES + c) * w), w);
                        }
                    }
                    // Two channels at a time are real and imaginary part.
                    for c in (0..LANES).step_by(2) {
                        for tap in 0..kernel {
                            for i in 0..2 {
                                let v = s.load(turned.add((tap * LANES + c + i) * w));
                                s.store(spare.add((2 * tap + i) * w), v);
                            }
                        }
                        for i in 2 * kernel..2 * n {
                            s.store(spare.add(i * w), s.splat(0.0));
                        }
                        self.forward(s, spare);
                        for frequency in 0..=n / 2 {
                            let (f, g) = (self.place(frequency), self.place(n - frequency));
                            let (a, b) = (s.load(spare.add(2 * f * w)), s.load(spare.add((2 * f + 1) * w)));
                            let (p, q) = (s.load(spare.add(2 * g * w)), s.load(spare.add((2 * g + 1) * w)));
                            let at = to.add(((frequency * (outer / w) + o) * inner + channel + c) * 2 * w);
                            s.store(at, s.mul(s.add(a, p), half));
                            s.store(at.add(w), s.mul(s.sub(q, b), half));
                            s.store(at.add(2 * w), s.mul(s.add(b, q), half));
                            s.store(at.add(3 * w), s.mul(s.sub(a, p), half));
                        }
                    }
                }
            }
        }
    }

    /// Two blocks of frames, `to[frame][first, second][lane]`, of the channels from `channel` on.
    ///
    /// # Safety
    /// `to` has room for a transform.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, s: S, pair: usize, channel: usize, to: *mut f32) {
        let FrameConv { frames, channels, padding, .. } = *self.conv;
        let channel = self.group * self.sizes.inner + channel;
        for i in 0..2 {
            let first = (2 * pair + i) * self.sizes.step;
            for t in 0..self.sizes.n {
                let frame = (first + t).checked_sub(padding[0]).filter(|&f| f < frames);
                // SAFETY: a vector of channels of a frame of `x`; the caller's promise.
                unsafe {
                    let v =
                        frame.map_or(s.splat(0.0), |f| s.load(self.x.as_ptr().add(f * channels + channel)));
                    s.store(to.add((2 * t + i) * S::WIDTH), v);
                }
            }
        }
    }

    /// Vectors of complex numbers to their spectrum, which is left in the order of reversed bits.
    ///
    /// # Safety
    /// `N` pairs of vectors at `x`.
    #[inline(always)]
    unsafe fn forward<S: Simd>(&self, s: S, x: *mut f32) {
        let (n, w) = (self.sizes.n, S::WIDTH);
        let mut half = n / 2;
        while half > 0 {
            for j in 0..half {
                let [re, im] = self.roots[j * (n / 2 / half)].map(|v| s.splat(v));
                for start in (j..n).step_by(2 * half) {
                    // SAFETY: both below `N`.
                    unsafe {
                        let (p, q) = (x.add(2 * start * w), x.add(2 * (start + half) * w));
                        let (a, b) = (s.load(p), s.load(p.add(w)));
                        let (c, d) = (s.load(q), s.load(q.add(w)));
                        s.store(p, s.add(a, c));
                        s.store(p.add(w), s.add(b, d));
                        let (c, d) = (s.sub(a, c), s.sub(b, d));
                        s.store(q, s.sub(s.mul(c, re), s.mul(d, im)));
                        s.store(q.add(w), s.fma(c, im, s.mul(d, re)));
                    }
                }
            }
            half /= 2;
        }
    }

    /// The way back, times `N`.
    ///
    /// # Safety
    /// As for [`Grouped::forward`].
    #[inline(always)]
    unsafe fn inverse<S: Simd>(&self, s: S, x: *mut f32) {
        let (n, w) = (self.sizes.n, S::WIDTH);
        let mut half = 1;
        while half < n {
            for j in 0..half {
                let [re, im] = self.roots[j * (n / 2 / half)].map(|v| s.splat(v));
                for start in (j..n).step_by(2 * half) {
                    // SAFETY: both below `N`.
                    unsafe {
                        let (p, q) = (x.add(2 * start * w), x.add(2 * (start + half) * w));
                        let (a, b) = (s.load(p), s.load(p.add(w)));
                        let (c, d) = (s.load(q), s.load(q.add(w)));
                        // Times the conjugate of the root.
                        let (c, d) = (s.fma(c, re, s.mul(d, im)), s.sub(s.mul(d, re), s.mul(c, im)));
                        s.store(p, s.add(a, c));
                        s.store(p.add(w), s.add(b, d));
                        s.store(q, s.sub(a, c));
                        s.store(q.add(w), s.sub(b, d));
                    }
                }
            }
            half *= 2;
        }
    }

    /// Sums over channels at a frequency and at its mirror image, for `P` pairs of blocks.
    ///
    /// # Safety
    /// Spectra as made above, for `P` pairs at `x`, and room for as many at `y`.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const P: usize>(
        &self,
        s: S,
        frequency: usize,
        spectra: *const f32,
        x: *const f32,
        y: *mut f32,
    ) {
        let Sizes { n, inner, outer, .. } = self.sizes;
        let w = S::WIDTH;
        let (place, mirror) = (self.place(frequency), self.place(n - frequency));
        for o in 0..outer / w {
            let h = spectra.wrapping_add((frequency * (outer / w) + o) * inner * 2 * w);
            for (at, sign) in
                [(place, 1.0), (mirror, -1.0)].into_iter().take(1 + usize::from(mirror != place))
            {
                let sign = s.splat(sign);
                let (mut re, mut im) = ([s.splat(0.0); P], [s.splat(0.0); P]);
                // SAFETY: the caller's promise.
                unsafe {
                    for c in 0..inner {
                        let hr = s.load(h.add(2 * c * w));
                        let hi = s.mul(s.load(h.add((2 * c + 1) * w)), sign);
                        let minus = s.sub(s.splat(0.0), hi);
                        let x = x.add((c / w * n + at) * 2 * w + c % w);
                        for i in 0..P {
                            let x = x.add(i * 2 * n * inner);
                            let (a, b) = (s.splat(*x), s.splat(*x.add(w)));
                            re[i] = s.fma(b, minus, s.fma(a, hr, re[i]));
                            im[i] = s.fma(b, hr, s.fma(a, hi, im[i]));
                        }
                    }
                    for i in 0..P {
                        let to = y.add(i * 2 * n * outer + (o * n + at) * 2 * w);
                        s.store(to, re[i]);
                        s.store(to.add(w), im[i]);
                    }
                }
            }
        }
    }

    /// Biases, activation, and to the result's rows.
    ///
    /// # Safety
    /// A transform at `from`.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, s: S, pair: usize, output: usize, from: *const f32) {
        let column = self.group * self.sizes.outer + output;
        // SAFETY: a vector of outputs of this group.
        let bias = self.bias.map_or(s.splat(0.0), |b| unsafe { s.load(b.as_ptr().add(column)) });
        for i in 0..2 {
            let first = (2 * pair + i) * self.sizes.step;
            for t in 0..self.sizes.step.min(self.out.saturating_sub(first)) {
                // SAFETY: these outputs of this position belong to this task.
                unsafe {
                    let v = s.add(s.load(from.add((2 * t + i) * S::WIDTH)), bias);
                    let v = activated(s, self.epilogue, v);
                    s.store(self.y.at((first + t) * self.conv.outputs + column), v);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "conv_spectrum_tests.rs"]
mod tests;
