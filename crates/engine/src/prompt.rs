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

/// One picture or video, ready for the encoder.
pub(crate) struct Encodable {
    pub pixels: Pixels,
    /// SHA-256 of the pixels and their size: what the caches know a picture by.
    pub hash: [u8; 32],
    pub tokens: usize,
    pub video: bool,
    /// Pixels of the largest decoded picture in it.
    pub decoded: usize,
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
        self.pictures.iter().map(|p| p.pixels.grid).collect()
    }

    pub(crate) fn new(model: &Model, request: &Request, options: &EngineOptions) -> Result<Prompt> {
        let (ids, text, pictures) = match request {
            Request::InputIds(ids) => (ids.clone(), None, Vec::new()),
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
        let Some(vision) = &model.vision else {
            let kinds = vec![TokenKind::Text; ids.len()];
            let visual = vec![None; ids.len()];
            return Ok(Prompt { positions: positions(&kinds, &[], &[], 1)?, visual, ids, text, pictures });
        };
        let kinds = token_kinds(&ids, &vision.tokens);
        let grids = |video: bool| -> Vec<Grid> {
            let grid = |p: &&Arc<Encodable>| (p.video == video).then_some(p.pixels.grid);
            pictures.iter().filter_map(|p| grid(&p)).map(|[t, h, w]| Grid { t, h, w }).collect()
        };
        let positions = positions(&kinds, &grids(false), &grids(true), vision.config.spatial_merge_size)?;
        // Pictures and videos each come in prompt order, so their rows are dealt out in order as well.
        let mut rows = [false, true].map(|video| {
            let of_kind = pictures.iter().enumerate().filter(move |(_, p)| p.video == video);
            of_kind.flat_map(|(i, p)| (0..p.tokens).map(move |row| (i, row)))
        });
        let visual = kinds
            .iter()
            .map(|kind| match kind {
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
    let Some(vision) = &model.vision else {
        return if parts.is_empty() { Ok(Vec::new()) } else { Err(Error::NoVision { found: parts.len() }) };
    };
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
            Part::Text(_) => continue,
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
    Ok(Encodable { pixels, hash: hash.finalize().into(), tokens, video, decoded })
}

/// Renders the conversation and repeats each placeholder as often as its picture has tokens.
fn render(
    model: &Model,
    messages: &[Message],
    pictures: &[(Arc<Encodable>, Vec<u32>)],
    options: &EngineOptions,
) -> Result<String> {
    let template = model.template.as_ref().ok_or(Error::NoTemplate)?;
    let messages: Vec<bpe::Message> = messages.iter().map(plain_message).collect();
    let settings = RenderOptions {
        format: options.content_format,
        placeholders: model.placeholders.clone(),
        variables: model.template_variables.clone(),
        ..RenderOptions::default()
    };
    let rendered = template
        .render(&messages, &settings)
        .map_err(|source| Error::Text { what: "chat template", source })?;
    let images: Vec<usize> = pictures.iter().filter(|(p, _)| !p.video).map(|(p, _)| p.tokens).collect();
    let videos: Vec<VideoFrames> = pictures
        .iter()
        .filter(|(p, _)| p.video)
        .map(|(p, seconds)| VideoFrames {
            tokens_per_frame: p.tokens / p.pixels.grid[0].max(1),
            seconds: seconds.clone(),
        })
        .collect();
    expand_placeholders(&rendered, &images, &videos, &model.placeholders)
        .map_err(|source| Error::Text { what: "prompt", source })
}

/// A message as the template sees it: pictures without their pixels.
fn plain_message(message: &Message) -> bpe::Message {
    match &message.content {
        Content::Text(text) => bpe::Message::text(&message.role, text),
        Content::Parts(parts) => {
            let part = |p: &Part| match p {
                Part::Text(text) => bpe::Part::Text(text.clone()),
                Part::Image(_) => bpe::Part::Image,
                Part::Video { .. } => bpe::Part::Video,
            };
            bpe::Message::parts(&message.role, parts.iter().map(part).collect())
        }
    }
}
