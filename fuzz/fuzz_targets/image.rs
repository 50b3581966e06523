//! A picture file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_vit::preprocess::{DecodeLimits, Image};

fuzz_target!(|data: &[u8]| {
    // Small limits keep one input fast; they go through the same checks as large ones.
    let limits = DecodeLimits { max_side: 4096, max_pixels: 1 << 20, max_file_bytes: 1 << 20 };
    if let Ok(image) = Image::decode(data, &limits) {
        assert_eq!(image.rgb().len(), image.width() * image.height() * 3);
        assert!((image.width() * image.height()) as u64 <= limits.max_pixels);
    }
});
