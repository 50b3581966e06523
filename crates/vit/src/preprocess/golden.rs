//! Reading the golden files of `tests/golden`, for the tests of this crate.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::{Image, PreprocessConfig};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

pub fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

pub fn text(name: &str) -> String {
    String::from_utf8(bytes(name)).unwrap()
}

/// The preprocessing config of a golden checkpoint.
pub fn config(checkpoint: &str, video: bool) -> PreprocessConfig {
    if video {
        let file = bytes(&format!("{checkpoint}/video_preprocessor_config.json"));
        PreprocessConfig::from_video_json(&file).unwrap()
    } else {
        let file = bytes(&format!("{checkpoint}/preprocessor_config.json"));
        PreprocessConfig::from_image_json(&file).unwrap()
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The deterministic picture `noise` of `tests/golden/make.py`.
pub fn noise(h: usize, w: usize, seed: u32) -> Image {
    let byte = |i: u32| {
        let mut x = i.wrapping_add(seed.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B);
        x ^= x >> 13;
        x = x.wrapping_mul(0xC2B2_AE35);
        x ^= x >> 16;
        (x >> 24) as u8
    };
    Image::from_rgb8(w, h, (0..(h * w * 3) as u32).map(byte).collect()).unwrap()
}

/// A safetensors file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn open(name: &str) -> Self {
        Self(bytes(name))
    }

    fn get(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), dtype, "{name}");
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    pub fn names(&self) -> Vec<String> {
        SafeTensors::deserialize(&self.0).unwrap().names().iter().map(|n| n.to_string()).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.get(name, Dtype::F32).1.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        self.get(name, Dtype::I64).1.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    /// A `[h, w, 3]` tensor of bytes.
    pub fn image(&self, name: &str) -> Image {
        let (shape, data) = self.get(name, Dtype::U8);
        assert_eq!((shape.len(), shape[2]), (3, 3));
        Image::from_rgb8(shape[1], shape[0], data).unwrap()
    }

    /// A `[t, h, w, 3]` tensor of bytes.
    pub fn frames(&self, name: &str) -> Vec<Image> {
        let (shape, data) = self.get(name, Dtype::U8);
        assert_eq!((shape.len(), shape[3]), (4, 3));
        let frame = |rgb: &[u8]| Image::from_rgb8(shape[2], shape[1], rgb.to_vec()).unwrap();
        data.chunks_exact(shape[1] * shape[2] * 3).map(frame).collect()
    }
}
