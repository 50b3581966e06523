//! `preprocessor_config.json`, and the size of a small picture under it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_vit::preprocess::{PreprocessConfig, smart_resize};

fuzz_target!(|data: &[u8]| {
    for config in [PreprocessConfig::from_image_json(data), PreprocessConfig::from_video_json(data)] {
        let Ok(config) = config else { continue };
        if let Ok((h, w)) = smart_resize(config.temporal_patch_size(), 37, 91, &config) {
            assert!(h % config.factor() == 0 && w % config.factor() == 0 && h > 0 && w > 0);
        }
    }
});
