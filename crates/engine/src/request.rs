//! What a user asks: messages with pictures and sounds, token ids, or a sound alone.

use std::path::Path;

use serde_json::Value;

use crate::picture::{Picture, read_capped};
use crate::sound::Sound;
use crate::{Error, Result};

/// Largest request file: room for a few screenshots as data URLs.
const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// A prompt in one of two forms.
#[derive(Clone, Debug)]
pub enum Request {
    /// A conversation, rendered by the checkpoint's chat template.
    Messages(Vec<Message>),
    /// Token ids, taken as they are. They stand for text only.
    InputIds(Vec<u32>),
    /// A sound alone, for a checkpoint that only hears.
    Audio(Sound),
}

/// One message of a conversation.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What it says.
    pub content: Content,
}

/// Content of a message.
#[derive(Clone, Debug)]
pub enum Content {
    /// Text alone.
    Text(String),
    /// Text and pictures in their order.
    Parts(Vec<Part>),
}

/// Part of a message.
#[derive(Clone, Debug)]
pub enum Part {
    /// Text.
    Text(String),
    /// One picture.
    Image(Picture),
    /// One sound.
    Audio(Sound),
    /// A video: its frames, and the second at which each was taken (empty: two frames a second).
    Video {
        /// Frames in order, all of one size.
        frames: Vec<Picture>,
        /// Seconds from the start, one for each frame, or none.
        seconds: Vec<u32>,
    },
}

impl Part {
    /// The files that it names.
    fn files(&self) -> Vec<&Path> {
        match self {
            Part::Text(_) => Vec::new(),
            Part::Image(picture) => picture.path().into_iter().collect(),
            Part::Audio(sound) => sound.path().into_iter().collect(),
            Part::Video { frames, .. } => frames.iter().filter_map(Picture::path).collect(),
        }
    }
}

impl Message {
    /// A message of text.
    pub fn text(role: impl Into<String>, text: impl Into<String>) -> Message {
        Message { role: role.into(), content: Content::Text(text.into()) }
    }

    /// A message of parts.
    pub fn parts(role: impl Into<String>, parts: Vec<Part>) -> Message {
        Message { role: role.into(), content: Content::Parts(parts) }
    }
}

impl Request {
    /// Reads `{"messages": [..]}` (OpenAI-style), `{"input_ids": [..]}` or `{"audio": path or URL}`.
    ///
    /// Parts are `{"type": "text", "text"}`, `{"type": "image_url", "image_url": {"url"}}` (a path, a `file://` or
    /// a data URL), `{"type": "image", "image"}`, `{"type": "video", "video": [url, ..], "seconds": [..]}`,
    /// `{"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}}` and `{"type": "audio", "audio": url}`.
    ///
    /// # Errors
    /// [`Error::Request`] with the place, what was wanted and what was found.
    pub fn from_json(json: &[u8]) -> Result<Request> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|e| Error::Request { what: format!("not JSON of the expected form: {e}") })?;
        if let (Some(audio), None, None) = (value.get("audio"), value.get("messages"), value.get("input_ids"))
        {
            return Ok(Request::Audio(Sound::url(string(Some(audio), "audio", &value)?)?));
        }
        match (value.get("messages"), value.get("input_ids")) {
            (Some(messages), None) => {
                let list = array(messages, "messages")?;
                let messages: Result<_> = list.iter().enumerate().map(|(i, m)| message(m, i)).collect();
                Ok(Request::Messages(messages?))
            }
            (None, Some(ids)) => {
                let list = array(ids, "input_ids")?;
                let id = |(i, v): (usize, &Value)| {
                    v.as_u64()
                        .and_then(|n| u32::try_from(n).ok())
                        .ok_or_else(|| wrong(&format!("input_ids[{i}]"), "a token id", v))
                };
                Ok(Request::InputIds(list.iter().enumerate().map(id).collect::<Result<_>>()?))
            }
            (Some(_), Some(_)) => Err(Error::Request { what: "has both `messages` and `input_ids`".into() }),
            (None, None) => {
                Err(wrong("the top level", "an object with `messages`, `input_ids` or `audio`", &value))
            }
        }
    }

    /// The files that it names: pictures, frames and sounds.
    pub fn files(&self) -> Vec<&Path> {
        match self {
            Request::Messages(messages) => {
                let parts = messages.iter().filter_map(|m| match &m.content {
                    Content::Parts(parts) => Some(parts),
                    Content::Text(_) => None,
                });
                parts.flatten().flat_map(Part::files).collect()
            }
            Request::InputIds(_) => Vec::new(),
            Request::Audio(sound) => sound.path().into_iter().collect(),
        }
    }

    /// Reads a request file; see [`Request::from_json`].
    ///
    /// # Errors
    /// Also [`Error::Read`] and [`Error::FileSize`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Request> {
        Request::from_json(&read_capped(path.as_ref(), MAX_REQUEST_BYTES)?)
    }
}

fn wrong(place: &str, wanted: &str, found: &Value) -> Error {
    let mut text = found.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push_str("..");
    }
    Error::Request { what: format!("{place} must be {wanted}, found {text}") }
}

fn array<'v>(value: &'v Value, place: &str) -> Result<&'v [Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| wrong(place, "a list", value))
}

fn string<'v>(value: Option<&'v Value>, place: &str, within: &Value) -> Result<&'v str> {
    value.and_then(Value::as_str).ok_or_else(|| wrong(place, "a string", value.unwrap_or(within)))
}

fn message(value: &Value, i: usize) -> Result<Message> {
    let place = format!("messages[{i}]");
    let role = string(value.get("role"), &format!("{place}.role"), value)?.to_string();
    let content = match value.get("content") {
        Some(Value::String(text)) => Content::Text(text.clone()),
        Some(Value::Array(parts)) => {
            let parts: Result<_> =
                parts.iter().enumerate().map(|(k, p)| part(p, &format!("{place}.content[{k}]"))).collect();
            Content::Parts(parts?)
        }
        other => {
            return Err(wrong(
                &format!("{place}.content"),
                "a string or a list of parts",
                other.unwrap_or(value),
            ));
        }
    };
    Ok(Message { role, content })
}

fn part(value: &Value, place: &str) -> Result<Part> {
    let kind = string(value.get("type"), &format!("{place}.type"), value)?;
    // A URL stands alone or in an object with `url`.
    let url = |v: &Value| {
        string(Some(v.get("url").unwrap_or(v)), &format!("{place}.{kind}"), value).and_then(Picture::url)
    };
    match kind {
        "text" => Ok(Part::Text(string(value.get("text"), &format!("{place}.text"), value)?.to_string())),
        "image_url" | "image" => {
            let field =
                value.get(kind).ok_or_else(|| wrong(place, &format!("a part with `{kind}`"), value))?;
            Ok(Part::Image(url(field)?))
        }
        "audio" => {
            let field = value.get(kind).ok_or_else(|| wrong(place, "a part with `audio`", value))?;
            let field = field.get("url").unwrap_or(field);
            Ok(Part::Audio(Sound::url(string(Some(field), &format!("{place}.audio"), value)?)?))
        }
        "input_audio" => {
            let field = value.get(kind).ok_or_else(|| wrong(place, "a part with `input_audio`", value))?;
            if let Some(format) = field.get("format").filter(|f| f.as_str() != Some("wav")) {
                return Err(wrong(&format!("{place}.input_audio.format"), "\"wav\"", format));
            }
            let data = string(field.get("data"), &format!("{place}.input_audio.data"), field)?;
            Ok(Part::Audio(Sound::base64(data)))
        }
        "video" => {
            let frames = array(value.get("video").unwrap_or(&Value::Null), &format!("{place}.video"))?;
            let frames: Vec<Picture> = frames.iter().map(url).collect::<Result<_>>()?;
            let seconds = match value.get("seconds") {
                None => Vec::new(),
                Some(list) => array(list, &format!("{place}.seconds"))?
                    .iter()
                    .map(|s| {
                        s.as_u64()
                            .and_then(|n| u32::try_from(n).ok())
                            .ok_or_else(|| wrong(&format!("{place}.seconds"), "whole seconds", s))
                    })
                    .collect::<Result<_>>()?,
            };
            Ok(Part::Video { frames, seconds })
        }
        _ => Err(wrong(
            &format!("{place}.type"),
            "text, image_url, image, video, input_audio or audio",
            &value["type"],
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        Request::from_json(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn openai_style_messages_are_read() {
        let json = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "t"},
            {"type": "video", "video": ["b.png", {"url": "c.png"}], "seconds": [0, 1]}]}]}"#;
        let Request::Messages(m) = Request::from_json(json.as_bytes()).unwrap() else { panic!() };
        let Content::Parts(parts) = &m[1].content else { panic!() };
        assert!(matches!(&parts[0], Part::Image(p) if p.name() == "a.png"));
        assert!(
            matches!(&parts[2], Part::Video { frames, seconds } if frames.len() == 2 && seconds == &[0, 1])
        );
    }

    #[test]
    fn input_ids_are_read() {
        let ids = Request::from_json(br#"{"input_ids": [1, 2, 300000]}"#).unwrap();
        assert!(matches!(ids, Request::InputIds(v) if v == [1, 2, 300_000]));
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_place() {
        assert_eq!(
            error("[]"),
            "request: the top level must be an object with `messages`, `input_ids` or `audio`, found []"
        );
        assert!(error(r#"{"input_ids": [1, -2]}"#).contains("input_ids[1] must be a token id, found -2"));
        assert!(
            error(r#"{"messages": [{"role": "user"}]}"#)
                .contains("messages[0].content must be a string or a list")
        );
        let http = r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}]}"#;
        assert!(error(http).contains("found https://"));
        assert!(error(&"[".repeat(100_000)).contains("recursion limit"));
    }

    #[test]
    fn every_prefix_of_a_request_is_an_error_and_no_panic() {
        let json = br#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "\u00e9"}]}]}"#;
        for end in 0..json.len() {
            assert!(Request::from_json(&json[..end]).is_err());
        }
    }
}
