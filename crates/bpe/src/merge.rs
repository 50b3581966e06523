//! The BPE merge loop for one piece.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Merge rules: (left id, right id) -> (rank, merged id). A lower rank is applied first. There are hundreds of thousands, so
/// the hash is a quick one; its seed is random, as that of the standard library's.
pub(crate) type Merges = HashMap<(u32, u32), (u32, u32), foldhash::fast::RandomState>;

/// Marks the end of the linked list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    /// Position of the next symbol, or `NONE`.
    next: u32,
    /// Position of the previous symbol, or `NONE`.
    prev: u32,
    live: bool,
}

/// Scratch memory for merging, reused between pieces.
#[derive(Debug, Default)]
pub(crate) struct Merger {
    symbols: Vec<Symbol>,
    /// Candidates as (rank, position of the left symbol, left id, right id), lowest first. An entry is stale when
    /// the symbols at that position have changed since.
    heap: BinaryHeap<Reverse<(u32, u32, u32, u32)>>,
}

impl Merger {
    /// Applies the rules to `ids` until none fits, lowest rank first and leftmost among equals, and appends the result to
    /// `out`. `merges` gives rank and merged id of a pair. n ids cost O(n log n): each merge removes a symbol and adds at
    /// most two candidates.
    pub(crate) fn merge(
        &mut self,
        ids: impl Iterator<Item = u32>,
        merges: impl Fn((u32, u32)) -> Option<(u32, u32)>,
        out: &mut Vec<u32>,
    ) {
        self.symbols.clear();
        self.heap.clear();
        for (at, id) in ids.enumerate() {
            let at = at as u32;
            self.symbols.push(Symbol { id, prev: at.wrapping_sub(1), next: at + 1, live: true });
        }
        if let Some(last) = self.symbols.last_mut() {
            last.next = NONE;
        }
        for at in 0..self.symbols.len() as u32 {
            self.push_pair(at, &merges);
        }
        while let Some(Reverse((_, at, left, right))) = self.heap.pop() {
            let Some(a) = self.get(at).filter(|s| s.live && s.id == left) else { continue };
            let Some(b) = self.get(a.next).filter(|s| s.id == right) else { continue };
            let Some((_, merged)) = merges((left, right)) else { continue };
            if let Some(s) = self.symbols.get_mut(a.next as usize) {
                s.live = false;
            }
            if let Some(s) = self.symbols.get_mut(at as usize) {
                s.id = merged;
                s.next = b.next;
            }
            if let Some(s) = self.symbols.get_mut(b.next as usize) {
                s.prev = at;
            }
            self.push_pair(a.prev, &merges);
            self.push_pair(at, &merges);
        }
        out.extend(self.symbols.iter().filter(|s| s.live).map(|s| s.id));
    }

    fn get(&self, at: u32) -> Option<Symbol> {
        self.symbols.get(at as usize).copied()
    }

    /// Adds the pair that starts at `at` as a candidate, when a rule fits it.
    fn push_pair(&mut self, at: u32, merges: &impl Fn((u32, u32)) -> Option<(u32, u32)>) {
        let Some(left) = self.get(at) else { return };
        let Some(right) = self.get(left.next) else { return };
        if let Some((rank, _)) = merges((left.id, right.id)) {
            self.heap.push(Reverse((rank, at, left.id, right.id)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: scan all pairs for the lowest rank, merge the leftmost, repeat.
    fn naive(mut ids: Vec<u32>, merges: &Merges) -> Vec<u32> {
        loop {
            let best = ids
                .windows(2)
                .enumerate()
                .filter_map(|(i, w)| merges.get(&(w[0], w[1])).map(|&(rank, id)| (rank, i, id)))
                .min();
            let Some((_, i, id)) = best else { return ids };
            ids.splice(i..i + 2, [id]);
        }
    }

    #[test]
    fn heap_merging_equals_the_definition_on_random_rules() {
        let mut state = 7u64;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % n) as u32
        };
        let mut merger = Merger::default();
        for _ in 0..500 {
            let mut merges = Merges::default();
            for rank in 0..12 {
                // A merged id is always new or larger, as a longer token is in a real vocabulary.
                let (a, b) = (next(3 + u64::from(rank)), next(3 + u64::from(rank)));
                merges.insert((a, b), (rank, 3 + rank));
            }
            let ids: Vec<u32> = (0..40).map(|_| next(3)).collect();
            let mut out = Vec::new();
            merger.merge(ids.iter().copied(), |pair| merges.get(&pair).copied(), &mut out);
            assert_eq!(out, naive(ids, &merges));
        }
    }
}
