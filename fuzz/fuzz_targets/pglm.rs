//! A `.pglm` file: header, metadata, and every tensor and side file that it claims to have. The hash of the header is
//! put right first where there is a place for it, or nothing behind that check would ever be reached.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_checkpoint::{FileBytes, PglmFile, SafetensorsFile};
use pocketglm_tensor::{Bytes, WeightSource};
use sha2::{Digest, Sha256};

/// The file with the hash that its header has.
fn rehashed(mut bytes: Vec<u8>) -> Vec<u8> {
    const KEY: &[u8] = b"\"pglm.header\":\"";
    let Some(length) = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else { return bytes };
    let Some(end) = usize::try_from(length).ok().and_then(|n| n.checked_add(8)) else { return bytes };
    let Some(header) = bytes.get(8..end) else { return bytes };
    let Some(at) = header.windows(KEY.len()).position(|w| w == KEY) else { return bytes };
    let digits = 8 + at + KEY.len()..8 + at + KEY.len() + 64;
    if digits.end > end {
        return bytes;
    }
    bytes[digits.clone()].fill(b'0');
    let hash: String = Sha256::digest(&bytes[8..end]).iter().map(|b| format!("{b:02x}")).collect();
    bytes[digits].copy_from_slice(hash.as_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::from(rehashed(data.to_vec()));
    let Ok(file) = SafetensorsFile::parse(FileBytes::from_bytes("fuzz", bytes)) else {
        return;
    };
    let Ok(file) = PglmFile::new(file) else { return };
    for info in file.tensors() {
        let tensor = file.get(&info.name).expect("a listed tensor can be had");
        assert!(tensor.bytes().len() <= data.len());
    }
    for name in file.files() {
        assert!(file.file(name).is_ok_and(|f| f.is_some()));
    }
    let _ = file.check_finite();
    let _ = file.verify(&mut |done, total| assert!(done <= total));
});
