//! A sound of a request, from wherever it comes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pocketglm_wav2vec::audio::{AudioLimits, Clip};

use crate::{Error, Result};

/// A sound: where its samples come from. Files are read when the prompt is made.
#[derive(Clone, Debug)]
pub struct Sound(Source);

#[derive(Clone, Debug)]
enum Source {
    File(PathBuf),
    Bytes(Arc<[u8]>),
    Base64(Arc<str>),
    Clip(Arc<Clip>),
}

impl Sound {
    /// A WAV file.
    pub fn file(path: impl Into<PathBuf>) -> Sound {
        Sound(Source::File(path.into()))
    }

    /// The bytes of a WAV file.
    pub fn bytes(bytes: impl Into<Arc<[u8]>>) -> Sound {
        Sound(Source::Bytes(bytes.into()))
    }

    /// A `data:audio/...;base64,...` URL, or the bare base64 of a WAV file.
    pub fn base64(text: &str) -> Sound {
        Sound(Source::Base64(text.into()))
    }

    /// Interleaved frames of `channels` samples each, `rate` frames a second, as a microphone gives them.
    ///
    /// # Errors
    /// [`Error::Sound`] where frames, channels or rate make no sense.
    pub fn frames(samples: &[f32], channels: u16, rate: u32) -> Result<Sound> {
        let clip = Clip::from_frames(samples, channels, rate, &AudioLimits::default())
            .map_err(|source| Error::Sound { sound: "from frames".into(), source: Box::new(source) })?;
        Ok(Sound(Source::Clip(Arc::new(clip))))
    }

    /// What a request gives as URL: a data URL, a `file://` URL or a path.
    pub(crate) fn url(url: &str) -> Result<Sound> {
        if url.starts_with("data:") {
            return Ok(Sound::base64(url));
        }
        match url.split_once("://") {
            Some(("file", path)) => Ok(Sound::file(path)),
            Some((scheme, _)) => Err(Error::Request {
                what: format!("audio must be a path, a file:// URL or a data URL, found {scheme}://"),
            }),
            None => Ok(Sound::file(url)),
        }
    }

    /// The file that it is read from.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.0 {
            Source::File(path) => Some(path),
            Source::Bytes(_) | Source::Base64(_) | Source::Clip(_) => None,
        }
    }

    /// Name for messages.
    pub(crate) fn name(&self) -> String {
        match &self.0 {
            Source::File(path) => path.display().to_string(),
            Source::Bytes(b) => format!("of {} bytes", b.len()),
            Source::Base64(u) => format!("in base64 of {} characters", u.len()),
            Source::Clip(c) => format!("of {:.1} seconds", c.seconds()),
        }
    }

    /// Reads and decodes it.
    pub(crate) fn load(&self, limits: &AudioLimits) -> Result<Arc<Clip>> {
        let decoded = match &self.0 {
            Source::File(path) => return Ok(Arc::new(read(path, limits)?)),
            Source::Bytes(bytes) => Clip::decode_wav(bytes, limits),
            Source::Base64(text) => Clip::decode_base64(text, limits),
            Source::Clip(clip) => return Ok(clip.clone()),
        };
        decoded.map(Arc::new).map_err(|source| Error::Sound { sound: self.name(), source: Box::new(source) })
    }
}

/// Opens a plain file. Folders, pipes and devices are refused before they are opened.
pub(crate) fn open(path: &Path) -> Result<File> {
    let error = |source| Error::Read { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(error)?.is_file() {
        return Err(error(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file")));
    }
    File::open(path).map_err(error)
}

/// Reads a WAV file as it goes, so that only its samples at 16 kHz are held.
fn read(path: &Path, limits: &AudioLimits) -> Result<Clip> {
    Clip::read_wav(open(path)?, limits)
        .map_err(|source| Error::Sound { sound: path.display().to_string(), source: Box::new(source) })
}
