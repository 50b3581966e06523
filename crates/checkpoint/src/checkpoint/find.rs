//! Which of a folder's files make up a model.

use std::path::{Path, PathBuf};

use crate::error::{io_error, shown};
use crate::gguf::{PROJECTOR, TEXT_ARCH, VISION_ARCH, architecture, lacking_picture_token, projector};
use crate::{Error, GgufFile, ReadMode, Result};

use super::{INDEX_FILE, SINGLE_FILE};

/// Most files of a folder that are looked at.
const MAX_FILES: usize = 10_000;

/// The names of a folder's files that end in one of `extensions`, sorted.
fn names(folder: &Path, extensions: &[&str]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io_error("list", folder))?.take(MAX_FILES) {
        let name = entry.map_err(io_error("list", folder))?.file_name();
        // A name that is no text can be opened by its path, just not found.
        let Some(name) = name.to_str() else { continue };
        let extension = Path::new(name).extension().and_then(|e| e.to_str());
        // Files of hidden names are copies that are under way.
        if !name.starts_with('.')
            && extension.is_some_and(|e| extensions.iter().any(|x| e.eq_ignore_ascii_case(x)))
        {
            found.push(name.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

fn is_mmproj(name: &str) -> bool {
    name.to_ascii_lowercase().contains("mmproj")
}

/// The one model among the folder's GGUF and `.pglm` files.
///
/// # Errors
/// [`Error::NoFile`], [`Error::Several`], and the errors of [`GgufFile::open`].
pub(super) fn model_in(folder: &Path) -> Result<PathBuf> {
    let mut models = Vec::new();
    for name in names(folder, &["gguf", "pglm"])? {
        let path = folder.join(&name);
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        // Mapped in any mode: only headers are looked at, and there may be many gigabytes behind them.
        if is_gguf && architecture(&GgufFile::open(&path, ReadMode::Map)?)? == VISION_ARCH {
            continue;
        }
        models.push(name);
    }
    match &models[..] {
        [one] => Ok(folder.join(one)),
        [] => {
            let wanted = format!("{SINGLE_FILE}, {INDEX_FILE}, .gguf or .pglm file of a model");
            Err(Error::NoFile { wanted, folder: folder.to_owned() })
        }
        _ => Err(several(folder, "models", &models, "open one of them by its path")),
    }
}

fn several(folder: &Path, what: &'static str, names: &[String], hint: &'static str) -> Error {
    let names = names.iter().map(|n| shown(n)).collect();
    Error::Several { folder: folder.to_owned(), what, names, hint }
}

/// The vision file of a text file: the one beside it that is named so and that fits; those that do not are noted. Of several
/// it is `mmproj-` and the text file's name.
///
/// # Errors
/// [`Error::Several`] where more than one fits, and the errors of [`GgufFile::open`].
pub(super) fn vision_of(
    text: &GgufFile,
    folder: &Path,
    mode: ReadMode,
    notes: &mut Vec<String>,
) -> Result<Option<GgufFile>> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    // Only a text file of the family has something to say here; another one is refused later.
    if architecture(text)? != TEXT_ARCH {
        return Ok(None);
    }
    let width = text.integer(&format!("{TEXT_ARCH}.embedding_length"), 0..=usize::MAX)?;
    let mut fitting = Vec::new();
    for name in names(folder, &["gguf"])?.into_iter().filter(|n| is_mmproj(n)) {
        // A file that cannot be read is an error: leaving it out would leave the model blind without a word.
        let file = GgufFile::open(&folder.join(&name), mode)?;
        match misfit(&file, width)? {
            None => fitting.push((name, file)),
            Some(why) => notes.push(format!("{} is left out: {why}", folder.join(&name).display())),
        }
    }
    // A text model of the same width may lie beside another one's eyes.
    if !fitting.is_empty()
        && let Some(token) = lacking_picture_token(text)?
    {
        let why = format!("{} has no token {token}", text.path().display());
        notes.extend(
            fitting.iter().map(|(name, _)| format!("{} is left out: {why}", folder.join(name).display())),
        );
        return Ok(None);
    }
    let names: Vec<String> = fitting.iter().map(|(name, _)| name.clone()).collect();
    let text_name = text.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if let Some(own) = names.iter().position(|name| name.strip_prefix("mmproj-") == Some(text_name)) {
        return Ok(Some(fitting.swap_remove(own).1));
    }
    let mut fitting = fitting.into_iter();
    match (fitting.next(), fitting.next()) {
        (Some((_, file)), None) => Ok(Some(file)),
        (None, _) => Ok(None),
        _ => Err(several(folder, "vision files", &names, "say which one is meant with --mmproj")),
    }
}

/// Why a vision file is none of this family and width; `None` where it is one.
fn misfit(file: &GgufFile, width: Option<usize>) -> Result<Option<String>> {
    let found = architecture(file)?;
    if found != VISION_ARCH {
        return Ok(Some(format!("its architecture is `{}`, expected {VISION_ARCH}", shown(found))));
    }
    let found = projector(file)?;
    if found != PROJECTOR {
        return Ok(Some(format!("its projector is `{}`, expected {PROJECTOR}", shown(found))));
    }
    let found = file.integer("clip.vision.projection_dim", 0..=usize::MAX)?;
    Ok(match (found, width) {
        (Some(found), Some(width)) if found != width => {
            Some(format!("it projects to {found} components, expected {width}"))
        }
        _ => None,
    })
}
