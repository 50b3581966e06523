//! Sentinels around everything that a run computes: where no value lies, a pattern is written before the run, and must still be
//! there afterwards.

use std::ops::Range;

use pocketglm_graph::{DeviceFault, Graph, Result, Value};

use crate::device::{Buffer, Device};
use crate::plan::{Places, is_written};

/// The pattern: large numbers, each another one, so that neither what was not computed nor what was copied from beside an
/// operand looks right. No NaN, because products with one may be the same NaN.
fn sentinel(at: usize) -> u32 {
    0x7e00_0000 | (at as u32).wrapping_mul(2_654_435_761) >> 9
}

/// Elements behind the arena that are watched as well.
pub(crate) const BEHIND: usize = 1024;

/// Fills an arena with the pattern.
pub(crate) fn fill(device: &Device, arena: &Buffer) -> Result<()> {
    let words: Vec<u32> = (0..(arena.bytes / 4) as usize).map(sentinel).collect();
    device.write(arena, 0, bytemuck::cast_slice(&words))
}

/// Checks an arena after a run.
pub(crate) fn check(device: &Device, arena: &Buffer, graph: &Graph, places: &Places) -> Result<()> {
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&device.read(arena)?);
    let owned = owned(graph, places);
    match overwritten(&words, &owned) {
        None => Ok(()),
        Some(at) => {
            let before = owned.iter().rev().find(|r| r.end <= at).map_or(0, |r| r.end);
            let what = format!(
                "a kernel wrote {:#x} to element {at}, where no value lies, {} behind one",
                words[at],
                at - before
            );
            Err(device.error(DeviceFault::Driver, what))
        }
    }
}

/// The elements of the arena that belong to something.
fn owned(graph: &Graph, places: &Places) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    for (i, node) in graph.nodes().iter().enumerate().filter(|(_, n)| !n.load_time) {
        for port in 0..node.outputs.len() {
            let value = Value::of(i, port);
            if node.op.is_source() && !is_written(&node.op) {
                continue;
            }
            if let Some(start) = places.start(value) {
                ranges.push(start..start + places.plan.shape(value).iter().product::<usize>());
            }
        }
        let scratch = places.plan.scratch_of(i);
        ranges.push(places.scratch(i)..places.scratch(i) + scratch.len());
    }
    ranges.retain(|r| !r.is_empty());
    ranges.sort_by_key(|r| r.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// The first element that belongs to nothing and is not the pattern.
fn overwritten(words: &[u32], owned: &[Range<usize>]) -> Option<usize> {
    let mut from = 0;
    for range in owned.iter().cloned().chain(std::iter::once(words.len()..words.len())) {
        let gap = from..range.start.min(words.len()).max(from);
        if let Some(at) = gap.into_iter().find(|&at| words[at] != sentinel(at)) {
            return Some(at);
        }
        from = range.end.min(words.len()).max(from);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_overwritten_sentinel_is_found_wherever_it_is() {
        let owned = [0..3, 8..10, 10..12];
        let mut words: Vec<u32> = (0..20).map(sentinel).collect();
        for i in [0, 2, 8, 11] {
            words[i] = 1;
        }
        assert_eq!(overwritten(&words, &owned), None);
        for at in [3, 7, 12, 19] {
            let mut words = words.clone();
            words[at] ^= 1;
            assert_eq!(overwritten(&words, &owned), Some(at));
        }
    }
}
