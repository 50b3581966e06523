//! Folders, sources and files that several test modules make.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pocketglm_tensor::{Error, Result, Tensor, TensorInfo, WeightSource};

/// A fresh folder that is removed when dropped.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> TempDir {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pocketglm-checkpoint-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        TempDir(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The names of all files in it, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A source of one-element tensors; the value is the tensor's index.
#[derive(Debug)]
pub(crate) struct Memory {
    names: Vec<String>,
    unreadable: Vec<String>,
}

impl Memory {
    pub(crate) fn with(names: &[&str]) -> Memory {
        Memory { names: names.iter().map(|n| n.to_string()).collect(), unreadable: vec![] }
    }

    pub(crate) fn unreadable(mut self, name: &str) -> Memory {
        self.unreadable.push(name.into());
        self
    }
}

impl WeightSource for Memory {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.names.iter().filter_map(|n| self.info(n)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let dtype = pocketglm_tensor::DType::F32;
        let there = self.names.iter().any(|n| n == name);
        there.then(|| TensorInfo { name: name.into(), dtype, shape: vec![1] })
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let (name, place) = (name.to_owned(), "memory".to_owned());
        if self.unreadable.contains(&name) {
            return Err(Error::Source { name, place, what: "unreadable on purpose".into() });
        }
        match self.names.iter().position(|n| *n == name) {
            Some(i) => Tensor::from_f32(&[1], &[i as f32]),
            None => Err(Error::Missing { name, place }),
        }
    }
}

/// A safetensors file from a header's text and data.
pub(crate) fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A small valid file of two tensors: `a` F32 [2] = 1, 2 and `b` BF16 [1, 3] = 0.
pub(crate) fn small_file() -> Vec<u8> {
    let mut data = [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat();
    data.extend([0; 6]);
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}"#;
    raw_file(header, &data)
}

/// A fixed sequence of numbers (an LCG's upper bits), for deterministic mutations.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % limit
    }

    /// `bytes` with one to three bytes changed, removed, doubled, or swapped with another place's.
    pub(crate) fn mutated(&mut self, bytes: &[u8]) -> Vec<u8> {
        const TELLING: &[u8] = b"0129-{}[]\",:.eE\\u\0\x7f\x80\xff";
        let mut out = bytes.to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(out.len());
            match self.below(6) {
                0 => out[at] ^= 1 << self.below(8),
                1 => out[at] = TELLING[self.below(TELLING.len())],
                2 => drop(out.remove(at)),
                3 => out.insert(at, TELLING[self.below(TELLING.len())]),
                4 => {
                    let other = self.below(out.len());
                    out.swap(at, other);
                }
                _ => {
                    let end = (at + 1 + self.below(40)).min(out.len());
                    let piece = out[at..end].to_vec();
                    let to = self.below(out.len());
                    out.splice(to..to, piece);
                }
            }
        }
        out
    }
}

/// Runs a test body that must neither hang nor crawl. A slow run is repeated twice before it counts,
/// because the machine may have been busy with something else.
pub(crate) fn within_two_seconds<T>(what: &str, body: impl Fn() -> T) -> T {
    let mut seconds = Vec::new();
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let result = body();
        seconds.push(start.elapsed().as_secs_f64());
        if seconds.last().is_some_and(|&s| s < 2.0) {
            return result;
        }
    }
    panic!("{what} took {seconds:.1?} s");
}

/// The folder of golden checkpoints that the whole workspace's tests read.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// Makes a FIFO, which nobody will ever write to.
#[cfg(unix)]
pub(crate) fn make_fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}
