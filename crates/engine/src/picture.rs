//! A picture of a request, from wherever it comes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pocketglm_vit::preprocess::{DecodeLimits, Image};

use crate::{Error, Result};

/// A picture: where its pixels come from. Files are read when the prompt is made.
#[derive(Clone, Debug)]
pub struct Picture(Source);

#[derive(Clone, Debug)]
enum Source {
    File(PathBuf),
    Bytes(Arc<[u8]>),
    DataUrl(Arc<str>),
    Image(Arc<Image>),
}

impl Picture {
    /// A PNG, JPEG or WebP file.
    pub fn file(path: impl Into<PathBuf>) -> Picture {
        Picture(Source::File(path.into()))
    }

    /// The bytes of a PNG, JPEG or WebP file.
    pub fn bytes(bytes: impl Into<Arc<[u8]>>) -> Picture {
        Picture(Source::Bytes(bytes.into()))
    }

    /// A `data:image/...;base64,...` URL, or the bare base64 of a picture file.
    pub fn base64(text: &str) -> Picture {
        if text.starts_with("data:") {
            Picture(Source::DataUrl(text.into()))
        } else {
            Picture(Source::DataUrl(format!("data:image/png;base64,{text}").into()))
        }
    }

    /// Pixels as they are: `width * height * 3` bytes, rows from the top, red first.
    ///
    /// # Errors
    /// [`Error::Picture`] where the length does not fit.
    pub fn rgb8(width: usize, height: usize, pixels: Vec<u8>) -> Result<Picture> {
        let image = Image::from_rgb8(width, height, pixels)
            .map_err(|source| Error::Picture { picture: "from pixels".into(), source })?;
        Ok(Picture(Source::Image(Arc::new(image))))
    }

    /// What an OpenAI-style request gives as URL: a data URL, a `file://` URL or a path.
    pub(crate) fn url(url: &str) -> Result<Picture> {
        if url.starts_with("data:") {
            return Ok(Picture::base64(url));
        }
        match url.split_once("://") {
            Some(("file", path)) => Ok(Picture::file(path)),
            Some((scheme, _)) => Err(Error::Request {
                what: format!("image_url must be a path, a file:// URL or a data URL, found {scheme}://"),
            }),
            None => Ok(Picture::file(url)),
        }
    }

    /// The file that it is read from.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.0 {
            Source::File(path) => Some(path),
            Source::Bytes(_) | Source::DataUrl(_) | Source::Image(_) => None,
        }
    }

    /// Name for messages.
    pub(crate) fn name(&self) -> String {
        match &self.0 {
            Source::File(path) => path.display().to_string(),
            Source::Bytes(b) => format!("of {} bytes", b.len()),
            Source::DataUrl(u) => format!("in a data URL of {} characters", u.len()),
            Source::Image(i) => format!("of {}x{} pixels", i.width(), i.height()),
        }
    }

    /// Reads and decodes it.
    pub(crate) fn load(&self, limits: &DecodeLimits) -> Result<Arc<Image>> {
        let decoded = match &self.0 {
            Source::File(path) => Image::decode(&read_capped(path, limits.max_file_bytes)?, limits),
            Source::Bytes(bytes) => Image::decode(bytes, limits),
            Source::DataUrl(url) => Image::decode_data_url(url, limits),
            Source::Image(image) => return Ok(image.clone()),
        };
        decoded.map(Arc::new).map_err(|source| Error::Picture { picture: self.name(), source })
    }
}

/// The bytes of a plain file of at most `limit` bytes. Folders, pipes and devices are refused before they are
/// opened, because opening a pipe waits for a writer.
pub(crate) fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let error = |source| Error::Read { path: path.to_owned(), source };
    let meta = std::fs::metadata(path).map_err(error)?;
    if !meta.is_file() {
        return Err(error(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file")));
    }
    if meta.len() > limit {
        return Err(Error::FileSize { path: path.to_owned(), limit, found: meta.len() });
    }
    let mut bytes = Vec::new();
    // The file may grow meanwhile, so the cap counts here as well.
    File::open(path).map_err(error)?.take(limit).read_to_end(&mut bytes).map_err(error)?;
    Ok(bytes)
}
