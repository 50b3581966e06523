use pocketglm_checkpoint::{Error, Fields};

/// Samples in a second of what the encoder hears.
pub const SAMPLE_RATE: u32 = 16_000;

/// Most convolutions of the feature extractor.
const MAX_CONVS: usize = 16;
/// Most samples from one frame to the next, so that sums of samples stay small numbers.
const MAX_STRIDE: usize = 1 << 16;

/// What the feature extractor normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureNorm {
    /// `feat_extract_norm` "group": the first convolution's channels, each over time.
    Group,
    /// "layer": every frame of every convolution, over its channels.
    Layer,
}

/// Sizes of a Wav2Vec2 encoder, from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Wav2VecConfig {
    /// Channels of each convolution.
    pub conv_dim: Vec<usize>,
    /// Frames under each convolution's kernel.
    pub conv_kernel: Vec<usize>,
    /// Frames between each convolution's positions.
    pub conv_stride: Vec<usize>,
    /// Whether the convolutions have biases.
    pub conv_bias: bool,
    /// What they normalise.
    pub feat_extract_norm: FeatureNorm,
    /// Width of a frame in the transformer.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Frames under the positional convolution's kernel.
    pub num_conv_pos_embeddings: usize,
    /// Its groups of channels.
    pub num_conv_pos_embedding_groups: usize,
    /// Added to variances of the transformer's norms.
    pub layer_norm_eps: f32,
    /// Whether norms stand before the blocks ("large") or after the residuals ("base").
    pub do_stable_layer_norm: bool,
    /// Rows of the CTC head.
    pub vocab_size: usize,
    /// The token that stands for "nothing new": CTC's blank.
    pub pad_token_id: usize,
}

impl Wav2VecConfig {
    /// Reads the object that has the encoder's fields: `config.json` of a Wav2Vec2 checkpoint, or `audio_config` of a
    /// model that hears.
    ///
    /// # Errors
    /// [`Error::Field`] with file, field and value where a number is missing, impossible or not supported.
    pub fn from_fields(f: &Fields<'_>) -> Result<Wav2VecConfig, Error> {
        let list = |name: &str, most: usize, default: &[usize]| {
            Ok::<_, Error>(f.integers(name, MAX_CONVS, 1..=most)?.unwrap_or_else(|| default.to_vec()))
        };
        let config = Wav2VecConfig {
            conv_dim: list("conv_dim", 8192, &[512; 7])?,
            conv_kernel: list("conv_kernel", 1024, &[10, 3, 3, 3, 3, 2, 2])?,
            conv_stride: list("conv_stride", 1024, &[5, 2, 2, 2, 2, 2, 2])?,
            conv_bias: f.boolean("conv_bias")?.unwrap_or(false),
            feat_extract_norm: match f.string("feat_extract_norm")?.unwrap_or("group") {
                "group" => FeatureNorm::Group,
                "layer" => FeatureNorm::Layer,
                _ => return Err(f.error("feat_extract_norm", "group or layer")),
            },
            hidden_size: f.required("hidden_size", 1..=65_536)?,
            num_hidden_layers: f.required("num_hidden_layers", 0..=512)?,
            num_attention_heads: f.required("num_attention_heads", 1..=1024)?,
            intermediate_size: f.required("intermediate_size", 1..=1 << 20)?,
            num_conv_pos_embeddings: f.integer("num_conv_pos_embeddings", 1..=4096)?.unwrap_or(128),
            num_conv_pos_embedding_groups: f
                .integer("num_conv_pos_embedding_groups", 1..=65_536)?
                .unwrap_or(16),
            layer_norm_eps: f.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
            do_stable_layer_norm: f.boolean("do_stable_layer_norm")?.unwrap_or(false),
            vocab_size: f.integer("vocab_size", 1..=1 << 20)?.unwrap_or(32),
            pad_token_id: f.integer("pad_token_id", 0..=1 << 20)?.unwrap_or(0),
        };
        let n = config.conv_dim.len();
        if n == 0 || config.conv_kernel.len() != n || config.conv_stride.len() != n {
            return Err(f.error("conv_dim", "as many numbers as conv_kernel and conv_stride have"));
        }
        let samples =
            config.conv_stride.iter().try_fold(1usize, |p, &s| p.checked_mul(s).filter(|&p| p <= MAX_STRIDE));
        if samples.is_none() {
            return Err(f.error("conv_stride", format!("numbers whose product is at most {MAX_STRIDE}")));
        }
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(f.error("num_attention_heads", format!("a divisor of {}", config.hidden_size)));
        }
        if !config.hidden_size.is_multiple_of(config.num_conv_pos_embedding_groups) {
            return Err(
                f.error("num_conv_pos_embedding_groups", format!("a divisor of {}", config.hidden_size))
            );
        }
        for field in ["hidden_act", "feat_extract_activation"] {
            if f.string(field)?.is_some_and(|a| a != "gelu") {
                return Err(f.error(field, "gelu"));
            }
        }
        if f.boolean("add_adapter")?.unwrap_or(false) {
            return Err(f.error("add_adapter", "false: layers after the encoder are not supported"));
        }
        if f.get("adapter_attn_dim").is_some() {
            return Err(f.error("adapter_attn_dim", "absent: adapters of languages are not supported"));
        }
        Ok(config)
    }

    /// Components of an attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Frames that `samples` samples become; 0 where they are too few for one.
    pub fn frames(&self, samples: usize) -> usize {
        let step = |n: usize, (&k, &s): (&usize, &usize)| n.checked_sub(k).map(|rest| rest / s + 1);
        let mut layers = self.conv_kernel.iter().zip(&self.conv_stride);
        layers.try_fold(samples, step).unwrap_or(0)
    }

    /// Samples from one frame to the next: 320 in the published models.
    pub fn samples_per_frame(&self) -> usize {
        self.conv_stride.iter().product()
    }

    /// Samples that one frame sees, which is also the shortest clip: 400 in the published models.
    pub fn receptive_field(&self) -> usize {
        let layers = self.conv_kernel.iter().zip(&self.conv_stride).rev();
        layers.fold(1, |n, (&k, &s)| (n - 1) * s + k)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(change: Value) -> Result<Wav2VecConfig, Error> {
        let mut config = json!({"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 96});
        for (k, v) in change.as_object().unwrap() {
            config[k] = v.clone();
        }
        Wav2VecConfig::from_fields(&Fields::new("config.json", &config).unwrap())
    }

    #[test]
    fn frames_are_those_of_the_published_models() {
        let c = read(json!({})).unwrap();
        let wanted =
            [(399, 0), (400, 1), (719, 1), (720, 2), (1000, 2), (16_000, 49), (16_080, 50), (160_000, 499)];
        for (samples, frames) in wanted {
            assert_eq!(c.frames(samples), frames, "{samples} samples");
        }
        assert_eq!((c.samples_per_frame(), c.receptive_field()), (320, 400));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (change, field) in [
            (json!({"add_adapter": true}), "add_adapter"),
            (json!({"adapter_attn_dim": 16}), "adapter_attn_dim"),
            (json!({"hidden_act": "relu"}), "hidden_act"),
            (json!({"feat_extract_norm": "batch"}), "feat_extract_norm"),
            (json!({"conv_dim": [32, 32]}), "conv_dim"),
            (json!({"conv_dim": []}), "conv_dim"),
            (json!({"conv_stride": [0, 1, 1, 1, 1, 1, 1]}), "conv_stride"),
            (json!({"conv_stride": [1024, 1024, 1024, 1024, 1024, 1024, 1024]}), "conv_stride"),
            (json!({"num_attention_heads": 5}), "num_attention_heads"),
            (json!({"num_conv_pos_embedding_groups": 7}), "num_conv_pos_embedding_groups"),
        ] {
            let error = read(change).unwrap_err().to_string();
            assert!(error.contains(field), "{field} in {error}");
        }
    }
}
