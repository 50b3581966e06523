use super::Emission;

/// The best token of each frame; repeats are merged, then blanks dropped.
#[derive(Clone, Debug)]
pub struct Greedy {
    vocabulary: usize,
    blank: u32,
    frame: usize,
    /// The token that the last frame said.
    open: Option<Emission>,
}

impl Greedy {
    /// A decoder of logits of `vocabulary` tokens, one of which is the blank.
    pub fn new(vocabulary: usize, blank: u32) -> Greedy {
        Greedy { vocabulary: vocabulary.max(1), blank, frame: 0, open: None }
    }

    pub(super) fn push(&mut self, logits: &[f32], out: &mut Vec<Emission>) {
        for frame in logits.chunks_exact(self.vocabulary) {
            // The first of equals, as in the reference.
            let mut best = 0;
            for (i, v) in frame.iter().enumerate() {
                if *v > frame[best] {
                    best = i;
                }
            }
            let id = best as u32;
            match &mut self.open {
                Some(open) if open.id == id => open.end += 1,
                open => {
                    out.extend(open.take().filter(|e| e.id != self.blank));
                    *open = Some(Emission { id, start: self.frame, end: self.frame + 1 });
                }
            }
            self.frame += 1;
        }
    }

    pub(super) fn finish(&mut self, out: &mut Vec<Emission>) {
        out.extend(self.open.take().filter(|e| e.id != self.blank));
    }
}
