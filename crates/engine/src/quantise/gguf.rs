//! A quantised model as GGUF: what has a form there, and the two files.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use pocketglm_checkpoint::{GgufExport, check_gguf, export_gguf, gguf_formats};
use pocketglm_tensor::{Tensor, TensorInfo, WeightSource};

use super::convert::Quantiser;
use crate::model::VISION_SCOPE;
use crate::{Error, Result};

/// The tensors of the result. The writer knows errors as text alone, so the one that stopped it is kept.
struct Source<'a> {
    of: &'a Quantiser,
    failure: Mutex<Option<Error>>,
}

impl WeightSource for Source<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.of.tensors()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.of.info(name)
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let place = || self.of.path.display().to_string();
        let Some(info) = self.info(name) else {
            return Err(pocketglm_tensor::Error::Missing { name: name.to_owned(), place: place() });
        };
        let bytes = self.of.bytes(name).map_err(|error| {
            let what = error.to_string();
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            pocketglm_tensor::Error::Source { name: name.to_owned(), place: place(), what }
        })?;
        Tensor::new(info.dtype, &info.shape, bytes.into())
    }
}

impl Quantiser {
    /// Whether the model has a vision encoder, and so a vision file beside the text file in GGUF.
    pub fn has_vision(&self) -> bool {
        self.opened.subject().model().is_some_and(|model| model.vision.is_some())
    }

    /// Refuses a model or a policy that has no form in GGUF.
    ///
    /// # Errors
    /// [`Error::Policy`], with policies that have one.
    pub fn fits_gguf(&self) -> Result<()> {
        let subject = self.opened.subject();
        let wrong = |what: String| Error::Policy { policy: self.plan().policy.clone(), what };
        let other = |what: &str| Err(wrong(format!("{what}; write a .pglm file")));
        if subject.model().is_none() {
            return other("a speech checkpoint has no form in GGUF");
        }
        if !subject.others().is_empty() {
            return other("an audio branch has no form in GGUF");
        }
        if self.options.static_inputs {
            return other("fixed input ranges have no place in a GGUF file");
        }
        let stray = self.plan().tensors.iter().find(|t| gguf_formats().all(|format| format != t.to));
        let Some(t) = stray else { return Ok(()) };
        let formats: Vec<&str> = gguf_formats().map(|format| format.name()).collect();
        let what = format!(
            "GGUF has no format {}, which `{}` would have; take one of its formats as policy ({}), a file of rules with \
             nothing else, or write a .pglm file",
            t.to,
            t.name,
            formats.join(", ")
        );
        Err(wrong(what))
    }

    /// Everything that [`Quantiser::write_gguf`] would refuse, without writing.
    ///
    /// # Errors
    /// As [`Quantiser::write_gguf`].
    pub fn check_gguf(&self, text: impl AsRef<Path>, vision: Option<&Path>) -> Result<()> {
        let text = text.as_ref();
        self.with_export(text, vision, &mut |export, files| Ok(check_gguf(export, text, vision, files)?))
    }

    /// Writes the quantised model as GGUF: a text file and, where a name is given for it, its vision file. Either both
    /// get their names or none.
    ///
    /// # Errors
    /// As [`Quantiser::write_pglm`] and [`Quantiser::fits_gguf`]; [`Error::Policy`] also where there is no vision encoder
    /// for the vision file.
    pub fn write_gguf(&self, text: impl AsRef<Path>, vision: Option<&Path>) -> Result<()> {
        let text = text.as_ref();
        let mut progress = |done: u64, total: u64| {
            let part = done as f64 / total.max(1) as f64;
            self.report((part * self.plan().bytes_before() as f64) as u64);
        };
        self.with_export(text, vision, &mut |export, files| {
            self.verify()?;
            Ok(export_gguf(export, text, vision, files, &mut progress)?)
        })
    }

    /// Calls `run` with what is to be written and the files that are read, unless something speaks against it.
    fn with_export(
        &self,
        text: &Path,
        vision: Option<&Path>,
        run: &mut dyn FnMut(&GgufExport<'_>, &[&Path]) -> Result<()>,
    ) -> Result<()> {
        self.fits_gguf()?;
        if let Some(vision) = vision.filter(|_| !self.has_vision()) {
            let what =
                format!("the model has no tensors {VISION_SCOPE}.* for the vision file {}", vision.display());
            return Err(Error::Policy { policy: self.plan().policy.clone(), what });
        }
        self.target(text).check()?;
        vision.map(|v| self.target(v).check()).transpose()?;
        let checkpoint = self.opened.subject().checkpoint();
        let config = checkpoint.required_json("config.json")?;
        let lacking = || pocketglm_checkpoint::Error::NoFile {
            wanted: "tokenizer.json".into(),
            folder: self.path.clone(),
        };
        let tokenizer = checkpoint.bytes("tokenizer.json")?.ok_or_else(lacking)?;
        let template = crate::model::template_source(checkpoint)?;
        let preprocessor = checkpoint.json("preprocessor_config.json")?;
        let name = self.path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let source = Source { of: self, failure: Mutex::new(None) };
        let export = GgufExport {
            source: &source,
            config: &config,
            tokenizer: tokenizer.as_slice(),
            chat_template: template.as_deref(),
            preprocessor: preprocessor.as_ref(),
            name: &name,
            extra: Vec::new(),
        };
        let done = run(&export, &checkpoint.files());
        let failure = source.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        // What stopped the source is the cause of what the writer says.
        done.map_err(|error| failure.unwrap_or(error))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::quantise::{Policy, QuantiseOptions};

    fn options(policy: &str) -> QuantiseOptions {
        QuantiseOptions { threads: 2, ..QuantiseOptions::new(Policy::named(policy).unwrap()) }
    }

    fn quantiser(options: QuantiseOptions) -> Quantiser {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/default");
        Quantiser::open(model, options).unwrap()
    }

    fn folder(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pocketglm-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn a_policy_of_other_formats_is_refused_with_those_that_gguf_has() {
        let folder = folder("gguf-formats");
        let (text, vision) = (folder.join("a.gguf"), folder.join("b.gguf"));
        for policy in ["int4", "int8-row"] {
            let quantiser = quantiser(options(policy));
            let found = [
                quantiser.fits_gguf(),
                quantiser.check_gguf(&text, Some(&vision)),
                quantiser.write_gguf(&text, Some(&vision)),
            ]
            .map(|found| found.unwrap_err().to_string());
            assert!(found[0] == found[1] && found[1] == found[2], "{found:?}");
            for wanted in ["has no format int8-", "Q4_K", "IQ4_XS", "F16"] {
                assert!(found[0].contains(wanted), "{}", found[0]);
            }
        }
        // The control: what it names is written.
        for format in gguf_formats() {
            quantiser(options(format.name())).check_gguf(&text, Some(&vision)).unwrap();
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        quantiser(options("Q4_K")).write_gguf(&text, Some(&vision)).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_cancelled_export_says_so_and_leaves_nothing() {
        let folder = folder("gguf-cancelled");
        let quantiser = quantiser(options("Q8_0"));
        quantiser.options.cancel.cancel();
        let found = quantiser.write_gguf(folder.join("a.gguf"), Some(&folder.join("b.gguf"))).unwrap_err();
        assert!(matches!(found, Error::Cancelled), "{found}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn text_and_vision_are_two_names_that_both_appear_or_none() {
        let folder = folder("gguf-names");
        let text = folder.join("a.gguf");
        let same = folder.join("../").join(folder.file_name().unwrap()).join("a.gguf");
        let plain = quantiser(options("Q8_0"));
        for found in [plain.check_gguf(&text, Some(&same)), plain.write_gguf(&text, Some(&same))] {
            assert!(found.unwrap_err().to_string().contains("must have two names"));
        }
        // The vision file's name is taken when all bytes have been made.
        let vision = folder.join("b.gguf");
        let taken = vision.clone();
        let progress: crate::ProgressFn = std::sync::Arc::new(move |p: crate::Progress| {
            if p.done == p.total {
                std::fs::create_dir(&taken).unwrap();
            }
        });
        let late = quantiser(QuantiseOptions { progress: Some(progress), ..options("Q8_0") });
        let found = late.write_gguf(&text, Some(&vision)).unwrap_err().to_string();
        assert!(found.contains("b.gguf is a folder"), "{found}");
        assert!(!text.exists() && std::fs::read_dir(&folder).unwrap().count() == 1);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
