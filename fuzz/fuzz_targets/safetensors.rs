//! A safetensors file: header, ranges, and every tensor that it claims to have.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_checkpoint::{FileBytes, SafetensorsFile};
use pocketglm_tensor::Bytes;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = SafetensorsFile::parse(FileBytes::from_bytes("fuzz", Bytes::from(data.to_vec()))) else {
        return;
    };
    for name in file.names() {
        // Whatever the header says, a tensor lies within the file.
        if let Ok(tensor) = file.get(name) {
            assert!(tensor.bytes().len() <= data.len());
        }
    }
    let _ = file.check_finite();
});
