use pocketglm_checkpoint::{Error, Fields};

/// Sizes of the decoder, from `text_config` of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Added to mean squares in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether q, k and v have biases (o never has).
    pub attention_bias: bool,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Components of a head that rotate.
    pub rotary_dim: usize,
    /// How many frequencies follow the temporal, the row and the column position.
    pub mrope_section: [usize; 3],
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Ids of the tokens that stand for pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisualTokens {
    /// Stands for one merged patch of a picture (and, in the reference, of a video).
    pub image: u32,
    /// Stands for one merged patch of a video in prompts that other servers write.
    pub video: u32,
    /// Begins a video.
    pub video_start: u32,
    /// Ends a video.
    pub video_end: u32,
}

impl TextConfig {
    /// Reads `text_config`, or a text-only configuration that has its fields at the top level.
    ///
    /// Both spellings of the family are read: `rope_parameters` (transformers 5) and `rope_theta`,
    /// `partial_rotary_factor`, `rope_scaling` (transformers 4).
    ///
    /// # Errors
    /// [`Error::Field`] with file, field and value where a number is missing, impossible or not supported.
    pub fn from_fields(top: &Fields<'_>) -> Result<TextConfig, Error> {
        let text = top.child("text_config")?;
        let f = text.as_ref().unwrap_or(top);
        let hidden_size = f.required("hidden_size", 1..=1 << 17)?;
        let heads = f.required("num_attention_heads", 1..=4096)?;
        let head_dim = match f.integer("head_dim", 2..=4096)? {
            Some(d) => d,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(f.error("num_attention_heads", format!("a divisor of hidden_size {hidden_size}")));
            }
        };
        let kv_heads = f.integer("num_key_value_heads", 1..=4096)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(f.error("num_key_value_heads", format!("a divisor of num_attention_heads {heads}")));
        }
        if f.string("hidden_act")?.is_some_and(|a| a != "silu") {
            return Err(f.error("hidden_act", "silu"));
        }

        let parameters = f.child("rope_parameters")?;
        let scaling = f.child("rope_scaling")?;
        let rope = parameters.as_ref().unwrap_or(f);
        let sections = parameters.as_ref().or(scaling.as_ref()).unwrap_or(f);
        if let Some(kind) = sections.string("rope_type")?.or(sections.string("type")?)
            && !matches!(kind, "default" | "mrope")
        {
            return Err(sections.error("rope_type", "default (other kinds of scaling are not supported)"));
        }
        // Transformers 4 and 5 disagree on what an absent factor means, so it must be there.
        let factor = rope
            .number("partial_rotary_factor", 0.0..=1.0)?
            .ok_or_else(|| rope.error("partial_rotary_factor", "a number from 0 to 1"))?;
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(rope.error("partial_rotary_factor", format!("an even part of head_dim {head_dim}")));
        }
        let mrope_section = match sections.integers("mrope_section", 4, 0..=4096)? {
            Some(list) => <[usize; 3]>::try_from(list)
                .ok()
                .filter(|s| s.iter().sum::<usize>() == rotary_dim / 2)
                .ok_or_else(|| {
                    sections.error("mrope_section", format!("3 numbers that sum to {}", rotary_dim / 2))
                })?,
            None => [rotary_dim / 2, 0, 0],
        };
        Ok(TextConfig {
            vocab_size: f.required("vocab_size", 1..=1 << 24)?,
            hidden_size,
            num_hidden_layers: f.required("num_hidden_layers", 1..=512)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            intermediate_size: f.required("intermediate_size", 1..=1 << 20)?,
            rms_norm_eps: f.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
            attention_bias: f.boolean("attention_bias")?.unwrap_or(true),
            max_position_embeddings: f.integer("max_position_embeddings", 1..=1 << 24)?.unwrap_or(32_768),
            rope_theta: rope.number("rope_theta", 1.0..=1e9)?.unwrap_or(10_000.0) as f32,
            rotary_dim,
            mrope_section,
            tie_word_embeddings: match top.boolean("tie_word_embeddings")? {
                Some(tied) => tied,
                None => f.boolean("tie_word_embeddings")?.unwrap_or(false),
            },
        })
    }

    /// The position axis (0 time, 1 row, 2 column) that each rotary frequency follows.
    pub fn axis_of_frequency(&self) -> Vec<u8> {
        let axes = self.mrope_section.iter().zip(0u8..);
        axes.flat_map(|(&n, axis)| std::iter::repeat_n(axis, n)).collect()
    }
}

impl VisualTokens {
    /// Reads the token ids at the top level of `config.json`.
    ///
    /// # Errors
    /// [`Error::Field`] where one is missing or no token id.
    pub fn from_fields(f: &Fields<'_>) -> Result<VisualTokens, Error> {
        let id = |name| f.required(name, 0..=(1 << 24)).map(|n| n as u32);
        Ok(VisualTokens {
            image: id("image_token_id")?,
            video: id("video_token_id")?,
            video_start: id("video_start_token_id")?,
            video_end: id("video_end_token_id")?,
        })
    }
}
