//! A data URL with a picture, as a chat message carries it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_vit::preprocess::{DecodeLimits, Image};

fuzz_target!(|url: &str| {
    let limits = DecodeLimits { max_side: 4096, max_pixels: 1 << 20, max_file_bytes: 1 << 20 };
    if let Ok(image) = Image::decode_data_url(url, &limits) {
        assert_eq!(image.rgb().len(), image.width() * image.height() * 3);
    }
});
