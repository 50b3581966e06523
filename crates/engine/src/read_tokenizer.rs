//! A tokenizer of a checkpoint: found ready-made, or made of its file beside everything else, which otherwise takes half of the
//! time that opening a model takes.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use pocketglm_bpe::Tokenizer;
use pocketglm_checkpoint::{Checkpoint, PglmFile, Unchecked};
use pocketglm_tensor::Bytes;

use crate::plan::TOKENIZER_FACTOR;
use crate::{Error, Result};

/// The file that every checkpoint has.
pub(crate) const JSON: &str = "tokenizer.json";
/// The side file of a `.pglm` file with what was made of it.
const TABLES: &str = "tokenizer.tables";

/// A tokenizer in the making.
pub(crate) struct ReadTokenizer {
    /// Bytes that its tables take.
    pub memory: u64,
    source: Source,
    /// `None` where there are no threads.
    thread: Option<JoinHandle<Result<Tokenizer>>>,
}

#[derive(Clone)]
enum Source {
    Tables(Unchecked),
    Json(Bytes),
}

impl Source {
    fn read(self) -> Result<Tokenizer> {
        let text_error = |what| move |source| Error::Text { what, source };
        match self {
            Source::Tables(tables) => {
                let tables = Tables(tables.check()?);
                Tokenizer::from_tables(Arc::new(tables)).map_err(text_error(TABLES))
            }
            Source::Json(json) => Tokenizer::from_json(json.as_slice()).map_err(text_error(JSON)),
        }
    }
}

struct Tables(Bytes);

impl AsRef<[u8]> for Tables {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// The content of the side file with the tables of a tokenizer, and its name; `None` where there are none to be had.
pub(crate) fn tables(json: &[u8]) -> Option<(String, Vec<u8>)> {
    let tables = Tokenizer::from_json(json).ok()?.to_tables()?;
    Some((TABLES.into(), PglmFile::content_made_of(json, &tables)))
}

impl ReadTokenizer {
    /// Begins, for a checkpoint that has a tokenizer, on a thread of its own where there is one to be had.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn of(checkpoint: &Checkpoint) -> pocketglm_checkpoint::Result<Option<ReadTokenizer>> {
        let tables = checkpoint.made_of(JSON, TABLES)?;
        Ok(match tables.filter(|tables| Tokenizer::are_tables(tables.bytes())) {
            Some(tables) => Some(ReadTokenizer::start(Source::Tables(tables))),
            None => checkpoint.bytes(JSON)?.map(Source::Json).map(ReadTokenizer::start),
        })
    }

    fn start(source: Source) -> ReadTokenizer {
        let own = source.clone();
        let thread = Builder::new().name("pocketglm-tokenizer".into()).spawn(move || own.read()).ok();
        let memory = match &source {
            Source::Tables(tables) => tables.bytes().len() as u64,
            Source::Json(json) => json.len() as u64 * TOKENIZER_FACTOR,
        };
        ReadTokenizer { memory, source, thread }
    }

    /// Waits for it.
    ///
    /// # Errors
    /// [`Error::Text`] for what [`Tokenizer::from_json`] and [`Tokenizer::from_tables`] report, and tables with another hash
    /// than they should have.
    pub fn done(self) -> Result<Tokenizer> {
        match self.thread.map(JoinHandle::join) {
            Some(Ok(tokenizer)) => tokenizer,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => self.source.read(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pocketglm_checkpoint::{OpenOptions, PglmContents, export_pglm};

    use super::*;

    #[test]
    fn a_tokenizer_is_the_same_with_and_without_a_thread_and_so_is_its_error() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/default/tokenizer.json");
        let good = Bytes::from(std::fs::read(golden).unwrap());
        let bad = Bytes::from(b"{\"model\": 3".to_vec());
        let alone =
            |json: &Bytes| ReadTokenizer { memory: 0, source: Source::Json(json.clone()), thread: None };
        let text = "打开 settings";
        let ids = |reading: ReadTokenizer| reading.done().unwrap().encode(text).unwrap();
        let start = |json: &Bytes| ReadTokenizer::start(Source::Json(json.clone()));
        assert_eq!(ids(start(&good)), ids(alone(&good)));
        let error = |reading: ReadTokenizer| reading.done().unwrap_err().to_string();
        assert_eq!(error(start(&bad)), error(alone(&bad)));
    }

    #[test]
    fn a_pglm_file_has_its_tokenizer_ready_made_unless_it_is_that_of_another_file() {
        let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/default"));
        let folder = Checkpoint::open(golden, &OpenOptions::default()).unwrap();
        let json = folder.bytes(JSON).unwrap().unwrap();
        let (name, made) = tables(json.as_slice()).unwrap();
        let [mut of_another, mut newer] = [made.clone(), made.clone()];
        of_another[0] ^= 1;
        newer[32 + 7] += 1;
        let file = std::env::temp_dir().join(format!("pocketglm-tables-{}.pglm", std::process::id()));
        let text = "打开 settings";
        let wanted = Tokenizer::from_json(json.as_slice()).unwrap().encode(text).unwrap();
        for (content, ready) in
            [(Some(made), true), (Some(of_another), false), (Some(newer), false), (None, false)]
        {
            let mut files = vec![(JSON.to_owned(), json.as_slice().to_vec())];
            files.extend(content.map(|content| (name.clone(), content)));
            let contents = PglmContents { files, ..PglmContents::default() };
            export_pglm(&file, &folder, contents, &[], &mut |_, _| {}).unwrap();
            let checkpoint = Checkpoint::open(&file, &OpenOptions::default()).unwrap();
            let reading = ReadTokenizer::of(&checkpoint).unwrap().unwrap();
            assert_eq!(matches!(reading.source, Source::Tables(_)), ready);
            assert_eq!(reading.done().unwrap().encode(text).unwrap(), wanted);
        }
        std::fs::remove_file(&file).unwrap();
    }
}
