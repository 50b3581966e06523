//! Making a tokenizer of its file beside everything else: half of the time that opening a model takes, on one thread.

use std::thread::{Builder, JoinHandle};

use pocketglm_bpe::{Result, Tokenizer};
use pocketglm_tensor::Bytes;

/// A tokenizer in the making.
pub(crate) struct ReadTokenizer {
    /// `tokenizer.json`.
    pub json: Bytes,
    /// `None` where there are no threads.
    thread: Option<JoinHandle<Result<Tokenizer>>>,
}

impl ReadTokenizer {
    /// Begins, on a thread of its own where there is one to be had.
    pub fn start(json: Bytes) -> ReadTokenizer {
        let own = json.clone();
        let work = move || Tokenizer::from_json(own.as_slice());
        ReadTokenizer { json, thread: Builder::new().name("pocketglm-tokenizer".into()).spawn(work).ok() }
    }

    /// Waits for it.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn done(self) -> Result<Tokenizer> {
        match self.thread.map(JoinHandle::join) {
            Some(Ok(tokenizer)) => tokenizer,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Tokenizer::from_json(self.json.as_slice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_is_the_same_with_and_without_a_thread_and_so_is_its_error() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/default/tokenizer.json");
        let good = Bytes::from(std::fs::read(golden).unwrap());
        let bad = Bytes::from(b"{\"model\": 3".to_vec());
        let alone = |json: &Bytes| ReadTokenizer { json: json.clone(), thread: None };
        let text = "打开 settings";
        let ids = |reading: ReadTokenizer| reading.done().unwrap().encode(text).unwrap();
        assert_eq!(ids(ReadTokenizer::start(good.clone())), ids(alone(&good)));
        let error = |reading: ReadTokenizer| reading.done().unwrap_err().to_string();
        assert_eq!(error(ReadTokenizer::start(bad.clone())), error(alone(&bad)));
    }
}
