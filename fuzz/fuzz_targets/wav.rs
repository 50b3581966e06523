//! A WAV file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_wav2vec::audio::{AudioLimits, Clip};

fuzz_target!(|data: &[u8]| {
    // Small limits keep one input fast; they go through the same checks as large ones.
    let limits = AudioLimits { max_seconds: 10, max_file_bytes: 1 << 20 };
    if let Ok(clip) = Clip::decode_wav(data, &limits) {
        assert!(clip.seconds() <= limits.max_seconds as f64 + 0.1);
        assert!(clip.samples().iter().all(|v| v.is_finite()));
    }
});
