//! `config.json`: sizes of both parts of the model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pocketglm_checkpoint::Fields;
use pocketglm_glm::{TextConfig, VisualTokens};
use pocketglm_vit::VisionConfig;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice(data) else { return };
    let Ok(top) = Fields::new("config.json", &value) else { return };
    if let Ok(config) = TextConfig::from_fields(&top) {
        assert_eq!(config.axis_of_frequency().len(), config.rotary_dim / 2);
    }
    let _ = VisualTokens::from_fields(&top);
    if let Ok(Some(vision)) = top.child("vision_config")
        && let Ok(config) = VisionConfig::from_fields(&vision)
    {
        assert!(config.head_dim() * config.num_heads == config.hidden_size && config.patch_elements() > 0);
    }
});
