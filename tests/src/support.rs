//! What several modules need: engines, answers, temporary folders, random numbers.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use pocketglm::{Engine, EngineOptions, GenerateOptions, PreparedPrompt, Request, Session, Timings};

use crate::golden::{Case, cases, path};

/// Small sizes, so that no test depends on the machine.
pub fn options() -> EngineOptions {
    EngineOptions { threads: 2, context: 2048, ..EngineOptions::default() }
}

pub fn engine(checkpoint: &str) -> Engine {
    Engine::open(path(checkpoint), options()).unwrap()
}

pub fn case(checkpoint: &str, name: &str) -> Case {
    cases(checkpoint).into_iter().find(|c| c.name == name).unwrap()
}

pub fn prompt(engine: &Engine, checkpoint: &str, name: &str) -> PreparedPrompt {
    engine.prompt(&case(checkpoint, name).request).unwrap()
}

/// A greedy answer of exactly `tokens` tokens.
pub fn exactly(tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens: tokens, ignore_eos: true, ..GenerateOptions::default() }
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub text: String,
    pub ids: Vec<u32>,
    pub timings: Timings,
}

/// Answers are equal when their text and tokens are.
impl PartialEq for Answer {
    fn eq(&self, other: &Answer) -> bool {
        (&self.text, &self.ids) == (&other.text, &other.ids)
    }
}

pub fn answer(session: &mut Session, prompt: &PreparedPrompt, options: &GenerateOptions) -> Answer {
    let mut generation = session.generate(prompt, options).unwrap();
    let text = generation.text().unwrap();
    Answer { text, ids: generation.token_ids().to_vec(), timings: generation.timings() }
}

pub fn ids_prompt(engine: &Engine, ids: &[u32]) -> PreparedPrompt {
    engine.prompt(&Request::InputIds(ids.to_vec())).unwrap()
}

/// The error text of something that must fail.
pub fn error<T>(result: pocketglm::Result<T>) -> String {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(e) => e.to_string(),
    }
}

/// A folder that is removed at the end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("pocketglm-tests-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// A copy of a checkpoint that may be broken.
    pub fn copy_of(checkpoint: &str) -> Folder {
        let folder = Folder::new();
        for entry in std::fs::read_dir(path(checkpoint)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), folder.0.join(entry.file_name())).unwrap();
            }
        }
        folder
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.file(name)).unwrap()
    }

    /// Replaces a file. The old one is unlinked first, because a running engine may have it mapped.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let _ = std::fs::remove_file(self.file(name));
        std::fs::write(self.file(name), bytes).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Marsaglia's xorshift64: the same numbers in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }
}

pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let get = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = get(0) << 16 | get(1) << 8 | get(2);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63];
            text.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[test]
fn base64_is_that_of_the_rfc() {
    assert_eq!([&b"f"[..], b"fo", b"foo"].map(base64), ["Zg==", "Zm8=", "Zm9v"]);
}
