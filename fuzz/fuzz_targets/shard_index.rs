//! `model.safetensors.index.json`, in a folder with two shards.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use pocketglm_checkpoint::{Checkpoint, OpenOptions};
use pocketglm_tensor::WeightSource;

/// A folder of this process; a run with several workers has several.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("pocketglm-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the temporary folder can be written");
        for (shard, tensor) in [("a", "x"), ("b", "y")] {
            let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(&1f32.to_le_bytes());
            fs::write(folder.join(format!("{shard}.safetensors")), bytes).expect("a shard can be written");
        }
        folder
    })
}

fuzz_target!(|data: &[u8]| {
    fs::write(folder().join("model.safetensors.index.json"), data).expect("the index can be written");
    if let Ok(checkpoint) = Checkpoint::open(folder(), &OpenOptions::default()) {
        assert!(checkpoint.tensors().len() <= 2);
    }
});
