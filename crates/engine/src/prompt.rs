//! From a request to tokens, positions and pixels.

use std::sync::Arc;

use pocketglm_bpe as bpe;
use pocketglm_bpe::{RenderOptions, VideoFrames, expand_placeholders};
use pocketglm_glm::{Grid, Positions, TokenKind, positions, token_kinds};
use pocketglm_vit::preprocess::{
    DecodeLimits, Image, Pixels, PreprocessConfig, preprocess_image, preprocess_video, resized_size,
    visual_tokens,
};
use sha2::{Digest, Sha256};

use crate::model::{Model, VisionModel};
use crate::sound::Sound;
use crate::{Content, EngineOptions, Error, Message, Part, Request, Result};

/// A request made ready: token ids, positions, and the patch rows of its pictures.
#[derive(Clone)]
pub struct Prompt {
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Positions,
    /// For each token the picture that it shows a part of, and which part.
    pub(crate) visual: Vec<Option<(usize, usize)>>,
    pub(crate) pictures: Vec<Arc<Encodable>>,
    /// The rendered and expanded text, where the request was a conversation.
    pub(crate) text: Option<String>,
}

/// What an encoder reads.
pub(crate) enum Media {
    Picture { pixels: Pixels, video: bool },
    Sound { values: Vec<f32> },
}

/// One picture, video or sound, ready for its encoder.
pub(crate) struct Encodable {
    pub media: Media,
    /// SHA-256 of the pixels and their size, or of the samples: what the caches know it by.
    pub hash: [u8; 32],
    pub tokens: usize,
    /// Pixels of the largest decoded picture in it.
    pub decoded: usize,
}

impl Encodable {
    /// The patch rows of a picture or video.
    pub fn pixels(&self) -> Option<&Pixels> {
        match &self.media {
            Media::Picture { pixels, .. } => Some(pixels),
            Media::Sound { .. } => None,
        }
    }

    /// Whether it is a video, where it is something to see.
    pub fn is_video(&self) -> Option<bool> {
        match self.media {
            Media::Picture { video, .. } => Some(video),
            Media::Sound { .. } => None,
        }
    }

    /// The normalised samples of a sound.
    pub fn samples(&self) -> Option<&[f32]> {
        match &self.media {
            Media::Picture { .. } => None,
            Media::Sound { values } => Some(values),
        }
    }
}

impl Prompt {
    /// Token ids, picture placeholders included.
    pub fn token_ids(&self) -> &[u32] {
        &self.ids
    }

    /// The text that was encoded, where the request was a conversation.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Patches (temporal, rows, columns) of each picture and video.
    pub fn grids(&self) -> Vec<[usize; 3]> {
        self.pictures.iter().filter_map(|p| p.pixels()).map(|p| p.grid).collect()
    }

    pub(crate) fn new(model: &Model, request: &Request, options: &EngineOptions) -> Result<Prompt> {
        let (ids, text, pictures) = match request {
            Request::InputIds(ids) => (ids.clone(), None, Vec::new()),
            Request::Audio(_) => {
                let what = "a sound alone is for a speech checkpoint; put it into a message";
                return Err(Error::Request { what: what.into() });
            }
            Request::Messages(messages) => {
                let pictures = load_pictures(model, messages, options)?;
                let text = render(model, messages, &pictures, options)?;
                let source = |source| Error::Text { what: "prompt", source };
                (
                    model.tokenizer.encode(&text).map_err(source)?,
                    Some(text),
                    pictures.into_iter().map(|p| p.0).collect(),
                )
            }
        };
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(at) = ids.iter().position(|&id| id as usize >= model.text.vocab_size) {
            return Err(Error::TokenId { at, id: ids[at], vocabulary: model.text.vocab_size });
        }
        Prompt::place(model, ids, text, pictures)
    }

    fn place(
        model: &Model,
        ids: Vec<u32>,
        text: Option<String>,
        pictures: Vec<Arc<Encodable>>,
    ) -> Result<Prompt> {
        let kinds = match &model.vision {
            Some(vision) => token_kinds(&ids, &vision.tokens),
            None => vec![TokenKind::Text; ids.len()],
        };
        let merge = model.vision.as_ref().map_or(1, |v| v.config.spatial_merge_size);
        let grids = |video: bool| -> Vec<Grid> {
            let of_kind = pictures.iter().filter(|p| p.is_video() == Some(video));
            of_kind.filter_map(|p| p.pixels()).map(|p| p.grid).map(|[t, h, w]| Grid { t, h, w }).collect()
        };
        // A frame of a sound takes a position like a token of text.
        let positions = positions(&kinds, &grids(false), &grids(true), merge)?;
        // Pictures, videos and sounds each come in prompt order, so their rows are dealt out in order as well.
        let mut rows = [Some(false), Some(true), None].map(|video| {
            let of_kind = pictures.iter().enumerate().filter(move |(_, p)| p.is_video() == video);
            of_kind.flat_map(|(i, p)| (0..p.tokens).map(move |row| (i, row)))
        });
        let audio = model.audio.as_ref().map(|a| a.tokens.audio);
        let frames: usize = pictures.iter().filter(|p| p.is_video().is_none()).map(|p| p.tokens).sum();
        let found = ids.iter().filter(|id| Some(**id) == audio).count();
        if found != frames {
            let what = format!("the prompt has {found} audio tokens for {frames} frames of sound");
            return Err(Error::Request { what });
        }
        let visual = kinds
            .iter()
            .zip(&ids)
            .map(|(kind, id)| match kind {
                TokenKind::Text if Some(*id) == audio => rows[2].next(),
                TokenKind::Text => None,
                TokenKind::Image => rows[0].next(),
                TokenKind::Video => rows[1].next(),
            })
            .collect();
        drop(rows);
        Ok(Prompt { ids, positions, visual, pictures, text })
    }
}

/// The pictures and videos of all messages in prompt order, each with the seconds of its frames.
fn load_pictures(
    model: &Model,
    messages: &[Message],
    options: &EngineOptions,
) -> Result<Vec<(Arc<Encodable>, Vec<u32>)>> {
    let parts: Vec<&Part> = messages
        .iter()
        .filter_map(|m| match &m.content {
            Content::Parts(parts) => Some(parts),
            Content::Text(_) => None,
        })
        .flatten()
        .filter(|p| !matches!(p, Part::Text(_)))
        .collect();
    let count = |sounds: bool| parts.iter().filter(|p| matches!(p, Part::Audio(_)) == sounds).count();
    if model.vision.is_none() && count(false) > 0 {
        return Err(Error::NoVision { found: count(false) });
    }
    if model.audio.is_none() && count(true) > 0 {
        return Err(Error::NoAudio { found: count(true) });
    }
    let limits = DecodeLimits::default();
    let context = model.context(options);
    let mut loaded: Vec<(Arc<Encodable>, Vec<u32>)> = Vec::with_capacity(parts.len());
    for part in parts {
        // Counted before the pixels are resized, because a checkpoint may ask for enormous pictures.
        let taken: usize = loaded.iter().map(|(p, _)| p.tokens).sum();
        let fits = |tokens: usize| match taken.saturating_add(tokens) {
            prompt if prompt > context => Err(Error::Context { prompt, context }),
            _ => Ok(()),
        };
        if let Part::Audio(sound) = part {
            loaded.push((Arc::new(listen(model, sound, options, &fits)?), Vec::new()));
            continue;
        }
        let Some(vision) = &model.vision else { continue };
        loaded.push(match part {
            Part::Image(picture) => {
                let image = picture.load(&limits)?;
                let name = |source| Error::Picture { picture: picture.name(), source };
                fits(tokens_after_resize(&image, None, &vision.images).map_err(name)?)?;
                let pixels = preprocess_image(&image, &vision.images).map_err(name)?;
                (Arc::new(encodable(vision, pixels, &[image], false)?), Vec::new())
            }
            Part::Video { frames, seconds } => {
                let name =
                    |source| Error::Picture { picture: format!("video of {} frames", frames.len()), source };
                if let Some(first) = frames.first() {
                    let first = first.load(&limits)?;
                    fits(tokens_after_resize(&first, Some(frames.len()), &vision.videos).map_err(name)?)?;
                }
                let images: Vec<Arc<Image>> =
                    frames.iter().map(|f| f.load(&limits)).collect::<Result<_>>()?;
                let plain: Vec<Image> = images.iter().map(|i| Image::clone(i)).collect();
                let pixels = preprocess_video(&plain, &vision.videos).map_err(name)?;
                if !seconds.is_empty() && seconds.len() != frames.len() {
                    let what = format!("a video of {} frames has {} seconds", frames.len(), seconds.len());
                    return Err(Error::Request { what });
                }
                // The reference looks at two frames a second.
                let second = |i: usize| seconds.get(i).copied().unwrap_or((i / 2) as u32);
                let each = (0..frames.len()).step_by(vision.config.temporal_patch_size).map(second).collect();
                (Arc::new(encodable(vision, pixels, &images, true)?), each)
            }
            Part::Text(_) | Part::Audio(_) => continue,
        });
    }
    Ok(loaded)
}

/// Tokens of a still picture (`None` frames) or of a video, before any pixel is touched.
fn tokens_after_resize(
    image: &Image,
    frames: Option<usize>,
    config: &PreprocessConfig,
) -> pocketglm_vit::Result<usize> {
    let temporal = config.temporal_patch_size();
    let frames = frames.unwrap_or(temporal);
    let (h, w) = resized_size(frames, image.height(), image.width(), config)?;
    Ok(frames.div_ceil(temporal).saturating_mul((h / config.factor()).saturating_mul(w / config.factor())))
}

fn encodable(vision: &VisionModel, pixels: Pixels, images: &[Arc<Image>], video: bool) -> Result<Encodable> {
    let mut hash = Sha256::new();
    // Pictures and frames of videos may be resized and normalised differently.
    hash.update([u8::from(video)]);
    for size in pixels.grid {
        hash.update(size.to_le_bytes());
    }
    for image in images {
        hash.update(image.width().to_le_bytes());
        hash.update(image.rgb());
    }
    let tokens = visual_tokens(pixels.grid, vision.config.spatial_merge_size)?;
    let decoded = images.iter().map(|i| i.width() * i.height()).max().unwrap_or(0);
    let media = Media::Picture { pixels, video };
    Ok(Encodable { media, hash: hash.finalize().into(), tokens, decoded })
}

/// Reads a sound and normalises it; `fits` says whether its tokens have room.
fn listen(
    model: &Model,
    sound: &Sound,
    options: &EngineOptions,
    fits: &dyn Fn(usize) -> Result<()>,
) -> Result<Encodable> {
    let audio = model.audio.as_ref().ok_or(Error::NoAudio { found: 1 })?;
    let clip = sound.load(&options.audio_limits)?;
    let (found, wanted) = (clip.samples().len(), audio.config.receptive_field());
    if found < wanted {
        let source = pocketglm_wav2vec::Error::TooShort { wanted, found };
        return Err(Error::Sound { sound: sound.name(), source: Box::new(source) });
    }
    let tokens = audio.config.frames(found);
    fits(tokens)?;
    let values = clip.input_values(audio.normalise);
    let mut hash = Sha256::new();
    // No picture begins with this byte.
    hash.update([2]);
    for v in &values {
        hash.update(v.to_le_bytes());
    }
    Ok(Encodable { media: Media::Sound { values }, hash: hash.finalize().into(), tokens, decoded: 0 })
}

/// Renders the conversation and repeats each placeholder as often as its picture has tokens.
fn render(
    model: &Model,
    messages: &[Message],
    pictures: &[(Arc<Encodable>, Vec<u32>)],
    options: &EngineOptions,
) -> Result<String> {
    let template = model.template.as_ref().ok_or(Error::NoTemplate)?;
    let audio = model.audio.as_ref();
    for text in messages.iter().flat_map(texts) {
        // Only the program may write it.
        if let Some(audio) = audio.filter(|a| text.contains(&a.placeholder)) {
            let what = format!("a text of a message has the audio placeholder {}", audio.placeholder);
            return Err(Error::Request { what });
        }
    }
    let mark = audio.map_or("", |a| &a.mark);
    let messages: Vec<bpe::Message> = messages.iter().map(|m| plain_message(m, mark)).collect();
    let settings = RenderOptions {
        format: options.content_format,
        placeholders: model.placeholders.clone(),
        variables: model.template_variables.clone(),
        ..RenderOptions::default()
    };
    let rendered = template
        .render(&messages, &settings)
        .map_err(|source| Error::Text { what: "chat template", source })?;
    let rendered = match audio {
        Some(audio) => {
            let frames = pictures.iter().filter(|(p, _)| p.is_video().is_none()).map(|(p, _)| p.tokens);
            with_frames(&rendered, &audio.placeholder, frames.collect())?
        }
        None => rendered,
    };
    let of_kind = |video: bool| pictures.iter().filter(move |(p, _)| p.is_video() == Some(video));
    let images: Vec<usize> = of_kind(false).map(|(p, _)| p.tokens).collect();
    let videos: Vec<VideoFrames> = of_kind(true)
        .map(|(p, seconds)| VideoFrames {
            tokens_per_frame: p.tokens / p.pixels().map_or(1, |p| p.grid[0]).max(1),
            seconds: seconds.clone(),
        })
        .collect();
    expand_placeholders(&rendered, &images, &videos, &model.placeholders)
        .map_err(|source| Error::Text { what: "prompt", source })
}

/// Repeats the n-th audio placeholder as often as the n-th sound has frames.
fn with_frames(rendered: &str, placeholder: &str, frames: Vec<usize>) -> Result<String> {
    let pieces: Vec<&str> = rendered.split(placeholder).collect();
    if pieces.len() != frames.len() + 1 {
        let (found, wanted) = (pieces.len() - 1, frames.len());
        let what =
            format!("the rendered prompt has {found} audio placeholders {placeholder} for {wanted} sounds");
        return Err(Error::Request { what });
    }
    let mut out = String::with_capacity(rendered.len());
    for (piece, frames) in pieces.iter().zip(frames.into_iter().chain([0])) {
        out.push_str(piece);
        out.push_str(&placeholder.repeat(frames));
    }
    Ok(out)
}

/// The texts of a message.
fn texts(message: &Message) -> Vec<&str> {
    match &message.content {
        Content::Text(text) => vec![text],
        Content::Parts(parts) => parts
            .iter()
            .filter_map(|p| match p {
                Part::Text(text) => Some(text.as_str()),
                _ => None,
            })
            .collect(),
    }
}

/// A message as the template sees it: pictures without their pixels, and sounds, which templates of the family do not
/// know, as a text that marks their place.
fn plain_message(message: &Message, mark: &str) -> bpe::Message {
    match &message.content {
        Content::Text(text) => bpe::Message::text(&message.role, text),
        Content::Parts(parts) => {
            let part = |p: &Part| match p {
                Part::Text(text) => bpe::Part::Text(text.clone()),
                Part::Image(_) => bpe::Part::Image,
                Part::Audio(_) => bpe::Part::Text(mark.to_owned()),
                Part::Video { .. } => bpe::Part::Video,
            };
            bpe::Message::parts(&message.role, parts.iter().map(part).collect())
        }
    }
}
