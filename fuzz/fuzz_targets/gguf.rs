//! A GGUF file: header, keys, ranges, and every tensor that it claims to have; then the model that it would be.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use pocketglm_bpe::Tokenizer;
use pocketglm_checkpoint::{Checkpoint, FileBytes, GgufFile, GgufValue, OpenOptions, ReadMode};
use pocketglm_tensor::{Bytes, WeightSource};

/// A file of this process; a run with several workers has several.
fn path() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("pocketglm-fuzz-gguf-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the temporary folder can be written");
        folder.join("model.gguf")
    })
}

fuzz_target!(|data: &[u8]| {
    let Ok(file) = GgufFile::parse(FileBytes::from_bytes("fuzz", Bytes::from(data.to_vec()))) else {
        return;
    };
    for name in file.names() {
        // Whatever the header says, a tensor lies within the file.
        if let Ok(tensor) = file.get(name) {
            assert!(tensor.bytes().len() <= data.len());
        }
    }
    for (_, value) in file.keys() {
        if let GgufValue::Array(array) = value {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    let _ = file.check_finite();
    fs::write(path(), data).expect("the temporary folder can be written");
    let options = OpenOptions { mode: ReadMode::Read, ..OpenOptions::default() };
    let Ok(checkpoint) = Checkpoint::open(path(), &options) else { return };
    for info in checkpoint.tensors() {
        if let Ok(tensor) = checkpoint.tensor(&info.name) {
            assert_eq!((tensor.dtype(), tensor.shape()), (info.dtype, &info.shape[..]));
        }
    }
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        checkpoint.required_json(name).expect("a file that was made here can be read");
    }
    if let Ok(Some(json)) = checkpoint.bytes("tokenizer.json") {
        let _ = Tokenizer::from_json(json.as_slice());
    }
});
