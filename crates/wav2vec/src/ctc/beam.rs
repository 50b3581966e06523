//! Prefix beam search (Hannun et al. 2014) without a language model.

use std::collections::HashMap;

use super::Emission;
use crate::{Error, Result};

/// Widest beam.
const MAX_WIDTH: usize = 1000;
/// Tokens of a frame whose probability is below `exp` of this are not tried.
const LEAST: f64 = -14.0;
/// No token before this one.
const ROOT: u32 = 0;

/// Keeps the most probable beginnings of the text, each with the sum over all its alignments.
#[derive(Clone, Debug)]
pub struct Beam {
    vocabulary: usize,
    blank: u32,
    width: usize,
    pub(super) frame: usize,
    /// A tree of tokens; node 0 stands before the first one.
    pub(super) nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
    beams: Vec<Prefix>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    parent: u32,
    id: u32,
    start: usize,
    end: usize,
    /// Log probability of the frame at which `start` was set: the alignment that counts for the time.
    best: f64,
}

/// A text, and the log probabilities of its alignments that end with a blank and with its last token.
#[derive(Clone, Copy, Debug)]
struct Prefix {
    node: u32,
    blank: f64,
    token: f64,
}

impl Prefix {
    fn total(&self) -> f64 {
        log_add(self.blank, self.token)
    }
}

/// `ln(e^a + e^b)`.
fn log_add(a: f64, b: f64) -> f64 {
    let (high, low) = if a > b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

impl Beam {
    /// A decoder that keeps `width` texts.
    ///
    /// # Errors
    /// [`Error::Setting`] for a width of 0 or above 1000.
    pub fn new(vocabulary: usize, blank: u32, width: usize) -> Result<Beam> {
        if width == 0 || width > MAX_WIDTH {
            let wanted = format!("1 to {MAX_WIDTH}");
            return Err(Error::Setting { field: "beam", wanted, found: width.to_string() });
        }
        let root = Node { parent: ROOT, id: u32::MAX, start: 0, end: 0, best: 0.0 };
        Ok(Beam {
            vocabulary: vocabulary.max(1),
            blank,
            width,
            frame: 0,
            nodes: vec![root],
            children: HashMap::new(),
            beams: vec![Prefix { node: ROOT, blank: 0.0, token: f64::NEG_INFINITY }],
        })
    }

    /// Texts that are kept, the most probable first: log probability and tokens.
    pub fn texts(&self) -> Vec<(f64, Vec<u32>)> {
        let text = |p: &Prefix| (p.total(), self.path(p.node).iter().map(|&n| self.node(n).id).collect());
        self.beams.iter().map(text).collect()
    }

    fn node(&self, i: u32) -> &Node {
        &self.nodes[i as usize]
    }

    /// Nodes from the first token to `node`.
    fn path(&self, mut node: u32) -> Vec<u32> {
        let mut path = Vec::new();
        while node != ROOT {
            path.push(node);
            node = self.node(node).parent;
        }
        path.reverse();
        path
    }

    pub(super) fn push(&mut self, logits: &[f32], out: &mut Vec<Emission>) {
        for frame in logits.chunks_exact(self.vocabulary) {
            self.step(frame);
            self.frame += 1;
        }
        self.commit(out);
    }

    pub(super) fn finish(&mut self, out: &mut Vec<Emission>) {
        if let Some(best) = self.beams.first() {
            for node in self.path(best.node) {
                let Node { id, start, end, .. } = *self.node(node);
                out.push(Emission { id, start, end });
            }
        }
        self.nodes.truncate(1);
        self.children.clear();
        self.beams = vec![Prefix { node: ROOT, blank: 0.0, token: f64::NEG_INFINITY }];
    }

    /// One frame.
    pub(super) fn step(&mut self, logits: &[f32]) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&v| f64::from(v - most).exp()).sum();
        let log = |i: usize| f64::from(logits[i] - most) - sum.ln();
        let tried: Vec<(u32, f64)> =
            (0..logits.len()).map(|i| (i as u32, log(i))).filter(|(_, p)| *p > LEAST).collect();
        let best = logits.iter().position(|&v| v == most).map_or(self.blank, |i| i as u32);
        let mut next: Vec<Prefix> = Vec::new();
        let mut place: HashMap<u32, usize> = HashMap::new();
        let mut at = |node: u32, next: &mut Vec<Prefix>| -> usize {
            *place.entry(node).or_insert_with(|| {
                next.push(Prefix { node, blank: f64::NEG_INFINITY, token: f64::NEG_INFINITY });
                next.len() - 1
            })
        };
        for prefix in std::mem::take(&mut self.beams) {
            let last = self.node(prefix.node).id;
            let total = prefix.total();
            for &(id, p) in &tried {
                if id == self.blank {
                    let i = at(prefix.node, &mut next);
                    next[i].blank = log_add(next[i].blank, total + p);
                    continue;
                }
                if id == last {
                    // The token goes on; behind a blank it is said again.
                    let i = at(prefix.node, &mut next);
                    next[i].token = log_add(next[i].token, prefix.token + p);
                    if prefix.token > prefix.blank && id == best {
                        self.nodes[prefix.node as usize].end = self.frame + 1;
                    }
                }
                let said = if id == last { prefix.blank } else { total };
                if said == f64::NEG_INFINITY {
                    continue;
                }
                let child = self.child(prefix.node, id, said + p);
                let i = at(child, &mut next);
                next[i].token = log_add(next[i].token, said + p);
            }
        }
        next.sort_by(|a, b| b.total().total_cmp(&a.total()).then(a.node.cmp(&b.node)));
        next.truncate(self.width);
        self.beams = next;
    }

    /// The node of `id` behind `parent`, with the time of its most probable beginning.
    fn child(&mut self, parent: u32, id: u32, probability: f64) -> u32 {
        let (frame, count) = (self.frame, self.nodes.len() as u32);
        let child = *self.children.entry((parent, id)).or_insert(count);
        if child == count {
            self.nodes.push(Node { parent, id, start: frame, end: frame + 1, best: probability });
        } else if probability > self.nodes[child as usize].best {
            let node = &mut self.nodes[child as usize];
            (node.start, node.end, node.best) = (frame, frame + 1, probability);
        }
        child
    }

    /// Gives the tokens that all texts begin with, except the last of them, which may go on; and forgets what no text
    /// has.
    fn commit(&mut self, out: &mut Vec<Emission>) {
        let paths: Vec<Vec<u32>> = self.beams.iter().map(|p| self.path(p.node)).collect();
        let Some(first) = paths.first() else { return };
        let same = (0..first.len()).take_while(|&i| paths.iter().all(|p| p.get(i) == first.get(i))).count();
        let sure = same.saturating_sub(1);
        for &node in &first[..sure] {
            let Node { id, start, end, .. } = *self.node(node);
            out.push(Emission { id, start, end });
        }
        // The tree of what is left. The token before the root still decides what counts as a repeat.
        let root_id = if sure > 0 { self.node(first[sure - 1]).id } else { self.node(ROOT).id };
        let mut nodes = vec![Node { id: root_id, ..self.nodes[0] }];
        let mut moved: HashMap<u32, u32> = HashMap::new();
        self.children.clear();
        for (path, prefix) in paths.iter().zip(&mut self.beams) {
            let mut parent = ROOT;
            for &old in &path[sure..] {
                let next = nodes.len() as u32;
                let new = *moved.entry(old).or_insert(next);
                if new == next {
                    let node = Node { parent, ..self.nodes[old as usize] };
                    self.children.insert((parent, node.id), new);
                    nodes.push(node);
                }
                parent = new;
            }
            prefix.node = parent;
        }
        self.nodes = nodes;
    }
}
