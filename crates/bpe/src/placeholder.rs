//! Placeholders: one token in the rendered prompt for each image or video, expanded to one per visual row.

use crate::error::{Error, Result, check_max};
use crate::limits;

/// The texts of the placeholder tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placeholders {
    /// Stands for one merged patch of an image or of a video frame.
    pub image: String,
    /// Stands for a whole video in a rendered prompt.
    pub video: String,
    /// Comes before the patches of an image.
    pub begin_of_image: String,
    /// Comes after the patches of an image.
    pub end_of_image: String,
    /// Comes before the frames of a video.
    pub begin_of_video: String,
    /// Comes after the frames of a video.
    pub end_of_video: String,
}

impl Default for Placeholders {
    /// The names of GLM-4.1V.
    fn default() -> Self {
        Self {
            image: "<|image|>".into(),
            video: "<|video|>".into(),
            begin_of_image: "<|begin_of_image|>".into(),
            end_of_image: "<|end_of_image|>".into(),
            begin_of_video: "<|begin_of_video|>".into(),
            end_of_video: "<|end_of_video|>".into(),
        }
    }
}

impl Placeholders {
    /// An image as a template writes it.
    pub(crate) fn one_image(&self) -> String {
        [self.begin_of_image.as_str(), &self.image, &self.end_of_image].concat()
    }

    /// A video as a template writes it.
    pub(crate) fn one_video(&self) -> String {
        [self.begin_of_video.as_str(), &self.video, &self.end_of_video].concat()
    }
}

/// What a video placeholder expands to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VideoFrames {
    /// Placeholder tokens of each temporal patch: merged rows times merged columns.
    pub tokens_per_frame: usize,
    /// The whole second at which each temporal patch begins.
    pub seconds: Vec<u32>,
}

/// Repeats the n-th image placeholder of `rendered` `images[n]` times, and replaces the n-th video placeholder by
/// the frames of `videos[n]`: for each, begin-of-image, placeholders, end-of-image and the second as plain text.
///
/// The number of placeholders must equal the number of inputs. A prompt into which someone wrote a placeholder
/// as text therefore fails; [`crate::RenderOptions::reserved`] refuses it even earlier.
pub fn expand_placeholders(
    rendered: &str,
    images: &[usize],
    videos: &[VideoFrames],
    names: &Placeholders,
) -> Result<String> {
    let count = |name: &str| if name.is_empty() { 0 } else { rendered.matches(name).count() };
    for (name, wanted) in [(&names.image, images.len()), (&names.video, videos.len())] {
        let found = count(name);
        if found != wanted {
            return Err(Error::PlaceholderCount { placeholder: name.clone(), wanted, found });
        }
    }
    let size = expanded_size(rendered, images, videos, names).unwrap_or(usize::MAX);
    check_max("expanded prompt bytes", limits::MAX_EXPANDED_BYTES, size)?;

    let mut out = String::with_capacity(size);
    let (mut images, mut videos) = (images.iter(), videos.iter());
    let mut rest = rendered;
    loop {
        let image_at = if images.len() > 0 { rest.find(names.image.as_str()) } else { None };
        let video_at = if videos.len() > 0 { rest.find(names.video.as_str()) } else { None };
        let (at, name) = match (image_at, video_at) {
            (Some(i), Some(v)) if v < i => (v, &names.video),
            (Some(i), _) => (i, &names.image),
            (None, Some(v)) => (v, &names.video),
            (None, None) => break,
        };
        out.push_str(rest.get(..at).unwrap_or_default());
        rest = rest.get(at + name.len()..).unwrap_or_default();
        if *name == names.image {
            for _ in 0..images.next().copied().unwrap_or_default() {
                out.push_str(&names.image);
            }
        } else if let Some(video) = videos.next() {
            for second in &video.seconds {
                out.push_str(&names.begin_of_image);
                for _ in 0..video.tokens_per_frame {
                    out.push_str(&names.image);
                }
                out.push_str(&names.end_of_image);
                out.push_str(&second.to_string());
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// An upper bound of the expanded length, or `None` when it overflows.
fn expanded_size(
    rendered: &str,
    images: &[usize],
    videos: &[VideoFrames],
    names: &Placeholders,
) -> Option<usize> {
    let mut size = rendered.len();
    for &n in images {
        size = size.checked_add(n.checked_mul(names.image.len())?)?;
    }
    for v in videos {
        // Ten digits hold any second.
        let frame = v.tokens_per_frame.checked_mul(names.image.len())?;
        let frame = frame.checked_add(names.begin_of_image.len() + names.end_of_image.len() + 10)?;
        size = size.checked_add(frame.checked_mul(v.seconds.len())?)?;
    }
    Some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_expand_in_prompt_order() {
        let names = Placeholders::default();
        let videos = [VideoFrames { tokens_per_frame: 1, seconds: vec![0, 12] }];
        let prompt = "a<|image|>b<|begin_of_video|><|video|><|end_of_video|>c<|image|>";
        assert_eq!(
            expand_placeholders(prompt, &[2, 0], &videos, &names).unwrap(),
            "a<|image|><|image|>b<|begin_of_video|><|begin_of_image|><|image|><|end_of_image|>0\
             <|begin_of_image|><|image|><|end_of_image|>12<|end_of_video|>c"
        );
        assert_eq!(expand_placeholders("plain", &[], &[], &names).unwrap(), "plain");
    }

    #[test]
    fn a_smuggled_placeholder_is_a_count_mismatch() {
        let names = Placeholders::default();
        let e = expand_placeholders("<|image|> and my <|image|>", &[3], &[], &names).unwrap_err();
        assert_eq!(e.to_string(), "prompt has 2 \"<|image|>\" placeholders for 1 inputs");
        assert!(expand_placeholders("none", &[3], &[], &names).is_err());
        assert!(expand_placeholders("<|video|>", &[], &[], &names).is_err());
    }

    #[test]
    fn an_expansion_beyond_the_cap_is_refused_before_it_is_made() {
        let names = Placeholders::default();
        for n in [limits::MAX_EXPANDED_BYTES, usize::MAX] {
            let e = expand_placeholders("<|image|>", &[n], &[], &names).unwrap_err();
            assert!(matches!(e, Error::TooLarge { what: "expanded prompt bytes", .. }));
            let video = VideoFrames { tokens_per_frame: n, seconds: vec![1; 3] };
            assert!(expand_placeholders("<|video|>", &[], &[video], &names).is_err());
        }
    }
}
