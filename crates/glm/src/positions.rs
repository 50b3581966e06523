//! Three-dimensional positions: text advances all axes together, a picture spreads over rows and columns.

use crate::{Error, Result, VisualTokens};

/// Patches of a picture or of one temporal patch of a video: frames, rows, columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Temporal patches.
    pub t: usize,
    /// Rows of patches.
    pub h: usize,
    /// Columns of patches.
    pub w: usize,
}

/// What a token of a prompt stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text, including the tokens around pictures.
    Text,
    /// One merged patch of a picture.
    Image,
    /// One merged patch of a video frame.
    Video,
}

/// Positions of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Time, row and column position of each token.
    pub axes: [Vec<i32>; 3],
    /// What is added to a sequence index to get the position of a token after the prompt. Not positive.
    pub rope_delta: i32,
}

/// What each token stands for: picture tokens between the marks of a video belong to it.
pub fn token_kinds(ids: &[u32], tokens: &VisualTokens) -> Vec<TokenKind> {
    let mut videos = 0usize;
    ids.iter()
        .map(|&id| {
            if id == tokens.video_start {
                videos += 1;
            } else if id == tokens.video_end {
                videos = videos.saturating_sub(1);
            }
            match id {
                id if id == tokens.video => TokenKind::Video,
                id if id == tokens.image && videos > 0 => TokenKind::Video,
                id if id == tokens.image => TokenKind::Image,
                _ => TokenKind::Text,
            }
        })
        .collect()
}

/// Positions of a prompt whose pictures have the grids `images` and whose videos `videos`, in prompt order;
/// `merge²` patches make one token.
///
/// # Errors
/// [`Error::VisualRun`] and [`Error::UnusedVisual`] where tokens and grids do not match.
pub fn positions(kinds: &[TokenKind], images: &[Grid], videos: &[Grid], merge: usize) -> Result<Positions> {
    // Each temporal patch of a video is a run of its own.
    let frames: Vec<Grid> =
        videos.iter().flat_map(|g| std::iter::repeat_n(Grid { t: 1, ..*g }, g.t)).collect();
    let (mut image, mut frame) = (images.iter(), frames.iter());
    let mut result = Positions::default();
    let mut next = 0usize;
    let mut at = 0;
    for run in kinds.chunk_by(|a, b| a == b) {
        let (kind, grid) = match run[0] {
            TokenKind::Text => {
                for i in 0..run.len() {
                    result.push([next + i; 3])?;
                }
                next += run.len();
                at += run.len();
                continue;
            }
            TokenKind::Image => ("image", image.next()),
            TokenKind::Video => ("video frame", frame.next()),
        };
        let (h, w) = grid.map_or((0, 0), |g| (g.h / merge.max(1), g.w / merge.max(1)));
        let t = grid.map_or(0, |g| g.t);
        let wanted = t.saturating_mul(h).saturating_mul(w);
        if wanted != run.len() {
            return Err(Error::VisualRun { kind, at, wanted, found: run.len() });
        }
        for i in 0..run.len() {
            let (time, inside) = (i / (h * w), i % (h * w));
            result.push([next + time, next + inside / w, next + inside % w])?;
        }
        next += h.max(w);
        at += run.len();
    }
    for (kind, left, given) in
        [("image", image.len(), images.len()), ("video frame", frame.len(), frames.len())]
    {
        if left > 0 {
            return Err(Error::UnusedVisual { kind, left, given });
        }
    }
    let last = result.axes.iter().flatten().max().map_or(-1, |&p| p);
    let length = i32::try_from(kinds.len()).map_err(|_| Error::TooLong)?;
    result.rope_delta = last + 1 - length;
    Ok(result)
}

impl Positions {
    fn push(&mut self, position: [usize; 3]) -> Result<()> {
        for (axis, p) in self.axes.iter_mut().zip(position) {
            axis.push(i32::try_from(p).map_err(|_| Error::TooLong)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<TokenKind> {
        let kind = |c| match c {
            'i' => TokenKind::Image,
            'v' => TokenKind::Video,
            _ => TokenKind::Text,
        };
        text.chars().map(kind).collect()
    }

    #[test]
    fn a_picture_advances_the_counter_by_its_longer_side() {
        let grid = Grid { t: 1, h: 4, w: 6 };
        let p = positions(&kinds("tttttiiiiiittt"), &[grid], &[], 2).unwrap();
        assert_eq!(p.axes[0], [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 8, 9, 10]);
        assert_eq!(p.axes[1], [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 8, 9, 10]);
        assert_eq!(p.axes[2], [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10]);
        assert_eq!(p.rope_delta, -3);
    }

    #[test]
    fn each_temporal_patch_of_a_video_is_a_run() {
        let grid = Grid { t: 2, h: 2, w: 4 };
        let p = positions(&kinds("tvvtvvt"), &[], &[grid], 2).unwrap();
        assert_eq!(p.axes[0], [0, 1, 1, 3, 4, 4, 6]);
        assert_eq!(p.axes[2], [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn tokens_and_pictures_that_do_not_match_are_an_error() {
        let grid = Grid { t: 1, h: 2, w: 2 };
        let wrong = positions(&kinds("tii"), &[grid], &[], 2);
        assert!(matches!(wrong, Err(Error::VisualRun { kind: "image", at: 1, wanted: 1, found: 2 })));
        assert!(matches!(positions(&kinds("ti"), &[], &[], 2), Err(Error::VisualRun { wanted: 0, .. })));
        assert!(matches!(positions(&kinds("t"), &[grid], &[], 2), Err(Error::UnusedVisual { left: 1, .. })));
    }

    #[test]
    fn picture_tokens_between_video_marks_belong_to_the_video() {
        let tokens = VisualTokens { image: 1, video: 2, video_start: 3, video_end: 4 };
        let kinds = token_kinds(&[9, 1, 3, 1, 9, 1, 4, 1, 2, 4], &tokens);
        use TokenKind::{Image, Text, Video};
        assert_eq!(kinds, [Text, Image, Text, Video, Text, Video, Text, Image, Video, Text]);
    }
}
