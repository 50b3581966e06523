use pocketglm_checkpoint::{Error, Fields};

/// Sizes of the vision encoder, from `vision_config` of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Transformer blocks.
    pub depth: usize,
    /// Width of a patch row.
    pub hidden_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Side, in patches, of the block that becomes one token.
    pub spatial_merge_size: usize,
    /// Colour channels.
    pub in_channels: usize,
    /// Side of the learned position table, in patches.
    pub table_side: usize,
    /// Width of the result, which is also the width of the blocks' MLP.
    pub out_hidden_size: usize,
    /// Width of the merger's MLP.
    pub intermediate_size: usize,
    /// Added to mean squares in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Whether qkv and proj have biases.
    pub attention_bias: bool,
}

impl VisionConfig {
    /// Reads the `vision_config` object.
    ///
    /// # Errors
    /// [`Error::Field`] with file, field and value where a number is missing, impossible or not supported.
    pub fn from_fields(f: &Fields<'_>) -> Result<VisionConfig, Error> {
        let patch_size = f.required("patch_size", 1..=256)?;
        let image_size = f.required("image_size", 1..=65_536)?;
        let config = VisionConfig {
            depth: f.required("depth", 0..=512)?,
            hidden_size: f.required("hidden_size", 4..=65_536)?,
            num_heads: f.required("num_heads", 1..=1024)?,
            patch_size,
            temporal_patch_size: f.integer("temporal_patch_size", 1..=16)?.unwrap_or(2),
            spatial_merge_size: f.integer("spatial_merge_size", 1..=16)?.unwrap_or(2),
            in_channels: f.integer("in_channels", 1..=4)?.unwrap_or(3),
            table_side: image_size / patch_size,
            out_hidden_size: f.required("out_hidden_size", 1..=65_536)?,
            intermediate_size: f.required("intermediate_size", 1..=1 << 20)?,
            rms_norm_eps: f.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
            rope_theta: match f.child("rope_parameters")? {
                Some(rope) => rope.number("rope_theta", 1.0..=1e9)?.unwrap_or(10_000.0) as f32,
                None => 10_000.0,
            },
            attention_bias: f.boolean("attention_bias")?.unwrap_or(false),
        };
        if config.table_side == 0 || config.table_side > 1024 {
            return Err(f.error("image_size", "1 to 1024 times patch_size"));
        }
        if !config.hidden_size.is_multiple_of(config.num_heads)
            || !(config.hidden_size / config.num_heads).is_multiple_of(4)
        {
            return Err(f.error("hidden_size", "num_heads heads of a multiple of 4 components"));
        }
        if config.in_channels != 3 {
            return Err(f.error("in_channels", "3 (RGB)"));
        }
        if f.string("hidden_act")?.is_some_and(|a| a != "silu") {
            return Err(f.error("hidden_act", "silu"));
        }
        Ok(config)
    }

    /// Components of an attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Numbers of one patch row: channels, frames, height, width.
    pub fn patch_elements(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }
}
