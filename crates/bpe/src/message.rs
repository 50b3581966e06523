//! Chat messages and the two ways of handing them to a template.

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or another role that the template knows.
    pub role: String,
    /// What it says.
    pub content: Content,
    /// Text that the family's template prints after the assistant tag.
    pub metadata: Option<String>,
}

/// The content of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// One text.
    Text(String),
    /// Parts in order.
    Parts(Vec<Part>),
}

/// One part of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// An image; its pixels travel separately, in prompt order.
    Image,
    /// A video.
    Video,
    /// A sound.
    Audio,
}

impl Part {
    /// The name that templates know the part by.
    pub fn kind(&self) -> &'static str {
        match self {
            Part::Text(_) => "text",
            Part::Image => "image",
            Part::Video => "video",
            Part::Audio => "audio",
        }
    }
}

/// How the content of a message reaches the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ContentFormat {
    /// As given: text stays text and a list of parts stays a list. What `apply_chat_template` does.
    Hf,
    /// One text per message, with the placeholders of its images and videos first and everything joined by
    /// newlines. What vLLM does with `--chat-template-content-format string`, which is how the phone agent's
    /// reference server runs.
    #[default]
    String,
}

impl Message {
    /// A message of plain text.
    pub fn text(role: &str, text: &str) -> Self {
        Self { role: role.to_owned(), content: Content::Text(text.to_owned()), metadata: None }
    }

    /// A message of several parts.
    pub fn parts(role: &str, parts: Vec<Part>) -> Self {
        Self { role: role.to_owned(), content: Content::Parts(parts), metadata: None }
    }

    /// The texts of the message.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        let (whole, parts) = match &self.content {
            Content::Text(t) => (Some(t.as_str()), &[][..]),
            Content::Parts(p) => (None, p.as_slice()),
        };
        whole.into_iter().chain(parts.iter().filter_map(|p| match p {
            Part::Text(t) => Some(t.as_str()),
            _ => None,
        }))
    }

    /// The content as one text, by the rules of [`ContentFormat::String`]. `index` is for the error.
    pub(crate) fn joined(&self, index: usize, image: &str, video: &str) -> Result<String> {
        let parts = match &self.content {
            Content::Text(t) => return Ok(t.clone()),
            Content::Parts(parts) => parts,
        };
        if parts.contains(&Part::Audio) {
            return Err(Error::UnsupportedPart { message: index, kind: Part::Audio.kind() });
        }
        let count = |kind: &Part| parts.iter().filter(|p| *p == kind).count();
        let images = vec![image; count(&Part::Image)];
        let videos = vec![video; count(&Part::Video)];
        // The server groups placeholders by kind, the kind that occurs first coming first.
        let video_first =
            parts.iter().find(|p| matches!(p, Part::Image | Part::Video)).is_some_and(|p| *p == Part::Video);
        let mut lines = if video_first { [videos, images].concat() } else { [images, videos].concat() };
        lines.extend(self.texts());
        Ok(lines.join("\n"))
    }
}
