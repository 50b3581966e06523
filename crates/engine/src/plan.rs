//! The memory plan: what a run will take, printed before anything is allocated.

use std::fmt;

use pocketglm_graph::{Bindings, PlacedMemory, ProgramMemory};

use crate::model::Model;
use crate::placement::{Devices, Placement};
use crate::{Error, Result};

/// Bytes of program code, stacks and the allocator's rest: what `pocketglm info` on a tiny checkpoint takes at its peak
/// in a release build on Linux.
pub(crate) const PROGRAM_BYTES: u64 = 8 << 20;
/// Bytes of tables, and of work while they are made, per byte of `tokenizer.json`: the same command on a checkpoint with
/// a vocabulary of 151,552, less the program's own bytes.
pub(crate) const TOKENIZER_FACTOR: u64 = 4;
/// Bytes of a cached file that Linux maps around a page that is touched: the growth of the peak with the prompt's tokens
/// in `pocketglm bench` (Linux 6.18, whose cache has large pages), less the row itself.
const FAULT_AROUND_BYTES: u64 = 352 << 10;

/// One part of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// What it is for.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: u64,
    /// How many of them lie in the memory of a device. A phone has one memory for both.
    pub device: u64,
}

impl MemoryUse {
    pub(crate) fn host(name: &'static str, bytes: u64) -> MemoryUse {
        MemoryUse { name, bytes, device: 0 }
    }

    fn of(name: &'static str, memory: &PlacedMemory, part: impl Fn(&ProgramMemory) -> u64) -> MemoryUse {
        let device = part(&memory.device);
        MemoryUse { name, bytes: part(&memory.host) + device, device }
    }

    /// What serves both where they are not needed at once.
    fn larger(&self, other: MemoryUse) -> MemoryUse {
        let host = (self.bytes - self.device).max(other.bytes - other.device);
        let device = self.device.max(other.device);
        MemoryUse { name: self.name, bytes: host + device, device }
    }
}

/// What a run takes, by use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The parts, in the order in which they are taken.
    pub parts: Vec<MemoryUse>,
    /// Tokens that the KV cache holds.
    pub context: usize,
    /// Patches of the largest picture.
    pub patches: usize,
    /// What a device runs; `None` where there is none.
    pub placement: Option<Placement>,
}

impl MemoryPlan {
    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes).sum()
    }

    /// The sum of what lies in the memory of a device.
    pub fn device_total(&self) -> u64 {
        self.parts.iter().map(|p| p.device).sum()
    }

    /// Refuses a plan that needs more of the device than its budget.
    ///
    /// # Errors
    /// [`Error::DeviceBudget`] with the figures.
    pub fn check_device(&self, budget: Option<u64>) -> Result<()> {
        let needed = self.device_total();
        match budget {
            Some(budget) if needed > budget => {
                Err(Error::DeviceBudget { needed, plan: self.to_string(), budget })
            }
            _ => Ok(()),
        }
    }

    /// Refuses a plan above `budget`.
    ///
    /// # Errors
    /// [`Error::Budget`] with the figures.
    pub fn check(&self, budget: Option<u64>) -> Result<()> {
        match budget {
            Some(budget) if self.total() > budget => {
                Err(Error::Budget { needed: self.total(), plan: self.to_string(), budget })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.parts.iter().filter(|p| p.bytes > 0).enumerate() {
            write!(f, "{}{} {}", if i > 0 { ", " } else { "" }, part.name, part.bytes)?;
            if part.device > 0 {
                write!(f, " ({} on the device)", part.device)?;
            }
        }
        Ok(())
    }
}

/// Sizes of one run, as the plan needs them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunSize {
    /// Rows of the embedding table that are read: one for each token, but equal tokens share theirs.
    pub rows: usize,
    /// Tokens that the KV cache has room for.
    pub context: usize,
    /// Tokens of the largest prefill step.
    pub chunk: usize,
    /// Patches of the largest picture; 0 for text alone.
    pub patches: usize,
    /// Patches of all pictures of the prompt.
    pub all_patches: usize,
    /// Pixels of the largest picture as decoded.
    pub pixels: usize,
    /// Samples of the longest clip, and of all clips.
    pub samples: [usize; 2],
}

/// Bindings of one decoder step.
pub(crate) fn decoder_bindings(
    chunk: usize,
    past: usize,
    visual: usize,
    rows: usize,
    capacity: usize,
) -> Bindings {
    Bindings::new().with("T", chunk).with("P", past).with("V", visual).with("R", rows).with("C", capacity)
}

/// Bindings of one picture of `patches` patches in `segments` temporal patches.
pub(crate) fn vision_bindings(patches: usize, merge: usize, segments: usize) -> Bindings {
    Bindings::new().with("M", patches / (merge * merge).max(1)).with("G", segments + 1)
}

/// Bytes that come into memory of an embedding table of `table` bytes when `rows` rows are read, and what the system
/// maps around each.
fn gathered_bytes(model: &Model, rows: usize, table: u64) -> u64 {
    let row = table / model.text.vocab_size as u64;
    table.min(rows as u64 * (row + FAULT_AROUND_BYTES))
}

pub(crate) fn plan(model: &Model, devices: &Devices, size: &RunSize) -> Result<MemoryPlan> {
    let chunk = size.chunk.min(size.context).max(1);
    let past = size.context - chunk;
    let visual = if size.patches > 0 || size.samples[0] > 0 { chunk } else { 0 };
    let text = devices
        .decoder
        .plan_placed(&model.decoder, &decoder_bindings(chunk, past, visual, 1, size.context))?;
    let mut parts = vec![
        MemoryUse::host("program", PROGRAM_BYTES),
        MemoryUse::host("tokenizer", model.tokenizer_memory),
        MemoryUse::of("decoder weights", &text, |m| m.weights + m.converted),
        MemoryUse::host("embedding rows", gathered_bytes(model, size.rows, text.host.gathered)),
        MemoryUse::of("KV cache", &text, |m| m.states),
        MemoryUse::of("decoder activations", &text, |m| m.activations),
    ];
    let mut scratch = MemoryUse::of("kernel scratch", &text, |m| m.scratch);
    if let Some(vision) = model.vision.as_ref().filter(|_| size.patches > 0) {
        let merge = vision.config.spatial_merge_size;
        let memory = devices.vision.plan_placed(&vision.graph, &vision_bindings(size.patches, merge, 1))?;
        let row = vision.config.patch_elements() as u64 * 4;
        let tokens = (size.all_patches / (merge * merge)) as u64;
        parts.push(MemoryUse::of("vision weights", &memory, |m| m.weights + m.converted));
        parts.push(MemoryUse::of("vision activations", &memory, |m| m.activations));
        // Decoded pixels and their resized copy, patch rows, and the encoded rows.
        let pictures = size.pixels as u64 * 3 * 2
            + size.all_patches as u64 * row
            + tokens * vision.config.out_hidden_size as u64 * 4;
        parts.push(MemoryUse::host("pictures", pictures));
        scratch = scratch.larger(MemoryUse::of("kernel scratch", &memory, |m| m.scratch));
    }
    if let Some(audio) = model.audio.as_ref().filter(|_| size.samples[0] > 0) {
        let memory = devices.audio.plan_placed(&audio.graph, &Bindings::new().with("N", size.samples[0]))?;
        let frames = (size.samples[1] / audio.config.samples_per_frame()) as u64;
        parts.push(MemoryUse::of("audio weights", &memory, |m| m.weights + m.converted));
        parts.push(MemoryUse::of("audio activations", &memory, |m| m.activations));
        // The samples, their normalised copy, and the encoded rows.
        let sounds = size.samples[1] as u64 * 8 + frames * model.text.hidden_size as u64 * 4;
        parts.push(MemoryUse::host("sounds", sounds));
        scratch = scratch.larger(MemoryUse::of("kernel scratch", &memory, |m| m.scratch));
    }
    parts.push(scratch);
    let placement = devices.placement.clone();
    Ok(MemoryPlan { parts, context: size.context, patches: size.patches, placement })
}
