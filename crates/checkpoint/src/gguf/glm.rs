//! The GLM family in GGUF: a text file, and a vision file (mmproj) beside it, served under the names and with the side
//! files that a checkpoint folder of the family has.
//!
//! Three things differ from a folder. For M-RoPE files the converters permute the rows of q and k, which is undone
//! here; the patch embedding is stored one frame a tensor and is joined again; and configuration, tokenizer and the
//! rest are keys, from which the JSON files are made.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use pocketglm_tensor::{AlignedF32, Bytes, DType, Tensor, TensorInfo, WeightSource};
use serde_json::{Map, Value, json};

use crate::error::shown;
use crate::gguf::read::GgufFile;
use crate::gguf::tokenizer;
use crate::safetensors::source_error;
use crate::{Error, Result};

/// `general.architecture` of text files.
pub(crate) const TEXT_ARCH: &str = "glm4";
/// `general.architecture` of vision files.
pub(crate) const VISION_ARCH: &str = "clip";
/// The projector of the family's vision files.
pub(crate) const PROJECTOR: &str = "glm4v";
/// Suffixes of a decoder layer: in GGUF, and in the family's own naming.
pub(crate) const LAYER: &[(&str, &str)] = &[
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    // Mind the trap: the norm after attention and the norm before the MLP exchange their names.
    ("post_attention_norm.weight", "post_self_attn_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_up.weight", "mlp.gate_up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
    ("post_ffw_norm.weight", "post_mlp_layernorm.weight"),
];
/// The rest of the text file.
pub(crate) const TEXT: &[(&str, &str)] = &[
    ("token_embd.weight", "model.language_model.embed_tokens.weight"),
    ("output_norm.weight", "model.language_model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];
/// Suffixes of a vision block.
pub(crate) const BLOCK: &[(&str, &str)] = &[
    ("ln1.weight", "norm1.weight"),
    ("ln2.weight", "norm2.weight"),
    ("attn_qkv.weight", "attn.qkv.weight"),
    ("attn_qkv.bias", "attn.qkv.bias"),
    ("attn_out.weight", "attn.proj.weight"),
    ("attn_out.bias", "attn.proj.bias"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];
/// The rest of the vision file, but for the patch embedding's weight.
pub(crate) const VISION: &[(&str, &str)] = &[
    ("v.patch_embd.bias", "patch_embed.proj.bias"),
    ("v.norm_embd.weight", "post_conv_layernorm.weight"),
    ("v.position_embd.weight", "embeddings.position_embedding.weight"),
    ("v.post_ln.weight", "post_layernorm.weight"),
    ("mm.patch_merger.weight", "downsample.weight"),
    ("mm.patch_merger.bias", "downsample.bias"),
    ("mm.model.fc.weight", "merger.proj.weight"),
    ("mm.post_norm.weight", "merger.post_projection_norm.weight"),
    ("mm.post_norm.bias", "merger.post_projection_norm.bias"),
    ("mm.gate.weight", "merger.gate_proj.weight"),
    ("mm.up.weight", "merger.up_proj.weight"),
    ("mm.down.weight", "merger.down_proj.weight"),
];
pub(crate) const LAYER_SCOPE: &str = "model.language_model.layers.";
pub(crate) const VISION_SCOPE: &str = "model.visual.";
/// The patch embedding: one tensor of all frames here, one a frame in GGUF.
pub(crate) const PATCHES: &str = "model.visual.patch_embed.proj.weight";
/// Its first frame in GGUF; the others append `.1`, `.2`, ...
pub(crate) const PATCH_FRAME: &str = "v.patch_embd.weight";
/// Most frames of a patch.
const MAX_FRAMES: usize = 16;

/// Texts that end an answer wherever the vocabulary has them: GGUF has no list of them as `config.json` has.
const END_TOKENS: [&str; 4] = ["<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"];

/// Tokens that a model with a vision file must have, and where the configuration names them.
const PICTURE_TOKENS: [(&str, &str); 6] = [
    ("image_start_token_id", "<|begin_of_image|>"),
    ("image_end_token_id", "<|end_of_image|>"),
    ("image_token_id", "<|image|>"),
    ("video_token_id", "<|video|>"),
    ("video_start_token_id", "<|begin_of_video|>"),
    ("video_end_token_id", "<|end_of_video|>"),
];

/// How a served tensor comes from the file's.
#[derive(Clone, Debug)]
enum Origin {
    /// As it stands.
    Same(String),
    /// Rows of so many heads, permuted.
    Rows { stored: String, heads: usize },
    /// Frames of the patch embedding.
    Frames(Vec<String>),
}

#[derive(Debug)]
struct Served {
    info: Option<TensorInfo>,
    name: String,
    file: Part,
    origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Text,
    Vision,
}

/// A model in one or two GGUF files.
#[derive(Debug)]
pub(crate) struct GlmGguf {
    text: GgufFile,
    vision: Option<GgufFile>,
    served: Vec<Served>,
    by_name: HashMap<String, usize>,
    /// Components of a head that rotate.
    rotary: usize,
    config: Vec<u8>,
    preprocessor: Option<Vec<u8>>,
    generation: Vec<u8>,
    tokenizer_config: Vec<u8>,
    tokenizer: OnceLock<Bytes>,
    notes: Vec<String>,
}

/// Sizes of the decoder, from the keys.
struct Text {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rotary: usize,
    mrope: bool,
}

/// What `general.architecture` says.
pub(crate) fn architecture(file: &GgufFile) -> Result<&str> {
    const KEY: &str = "general.architecture";
    file.string(KEY)?.ok_or_else(|| file.key_error(KEY, "a string"))
}

/// What kind of projector a vision file has; empty where it does not say.
pub(crate) fn projector(file: &GgufFile) -> Result<&str> {
    let newer = file.string("clip.projector_type")?;
    Ok(match newer {
        Some(kind) => kind,
        None => file.string("clip.vision.projector_type")?.unwrap_or_default(),
    })
}

/// The first token that a text file would need for pictures and does not have.
///
/// # Errors
/// Those of the tokenizer's keys.
pub(crate) fn lacking_picture_token(text: &GgufFile) -> Result<Option<&'static str>> {
    let vocabulary = tokenizer::Vocabulary::new(text)?;
    Ok(PICTURE_TOKENS.iter().map(|(_, token)| *token).find(|token| vocabulary.special(token).is_none()))
}

impl GlmGguf {
    /// Checks the keys of both files against each other, and makes the side files.
    ///
    /// # Errors
    /// [`Error::GgufKey`], [`Error::Duplicate`], [`Error::Json`].
    pub(crate) fn new(text: GgufFile, vision: Option<GgufFile>) -> Result<GlmGguf> {
        if architecture(&text)? != TEXT_ARCH {
            return Err(text.key_error("general.architecture", TEXT_ARCH));
        }
        if text.integer("split.count", 0..=usize::MAX)?.is_some_and(|n| n > 1) {
            return Err(text.key_error("split.count", "1: join split files first (llama-gguf-split --merge)"));
        }
        let mut notes = Vec::new();
        let (config, sizes) = config(&text, vision.as_ref())?;
        if vision.is_some() && !sizes.mrope {
            notes.push(format!(
                "{}: no key `{TEXT_ARCH}.rope.dimension_sections`: converted without picture positions, so \
                 answers about pictures will be poor; convert it again",
                text.path().display()
            ));
        }
        let vocabulary = tokenizer::Vocabulary::new(&text)?;
        let mut config = config;
        if vision.is_some()
            && let Some(object) = config.as_object_mut()
        {
            for (field, token) in PICTURE_TOKENS {
                let id = vocabulary.special(token).ok_or_else(|| {
                    text.key_error(tokenizer::TOKENS, format!("a list with the control token {token}"))
                })?;
                object.insert(field.into(), id.into());
            }
        }
        let mut served = Vec::new();
        serve_text(&text, &sizes, &mut served);
        if let Some(vision) = &vision {
            serve_vision(vision, &mut served);
        }
        let mut by_name = HashMap::with_capacity(served.len());
        for (i, tensor) in served.iter().enumerate() {
            if let Some(first) = by_name.insert(tensor.name.clone(), i) {
                let place = |i: usize| match served.get(i).map(|s: &Served| s.file) {
                    Some(Part::Vision) => vision.as_ref().unwrap_or(&text).path().display().to_string(),
                    _ => text.path().display().to_string(),
                };
                let tensor = shown(&tensor.name);
                return Err(Error::Duplicate { tensor, first: place(first), second: place(i) });
            }
        }
        let preprocessor = vision.as_ref().map(preprocessor).transpose()?;
        let generation = generation(&text, &vocabulary)?;
        let tokenizer_config = tokenizer_config(&text, &vocabulary)?;
        drop(vocabulary);
        let file = |value: &Value, path: &Path| {
            serde_json::to_vec_pretty(value)
                .map_err(|e| Error::Json { path: path.to_owned(), what: e.to_string() })
        };
        Ok(GlmGguf {
            config: file(&config, text.path())?,
            preprocessor: preprocessor.map(|v| file(&v, text.path())).transpose()?,
            generation: file(&generation, text.path())?,
            tokenizer_config: file(&tokenizer_config, text.path())?,
            tokenizer: OnceLock::new(),
            rotary: sizes.rotary,
            text,
            vision,
            served,
            by_name,
            notes,
        })
    }

    /// The files that were opened.
    pub(crate) fn files(&self) -> impl Iterator<Item = &GgufFile> {
        std::iter::once(&self.text).chain(&self.vision)
    }

    /// What a user should know.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A side file by the name that it has in a checkpoint folder.
    ///
    /// # Errors
    /// Those of the tokenizer's keys.
    pub(crate) fn side_file(&self, name: &str) -> Result<Option<Bytes>> {
        let made = |bytes: &Vec<u8>| Some(Bytes::from(bytes.clone()));
        Ok(match name {
            "config.json" => made(&self.config),
            "generation_config.json" => made(&self.generation),
            "tokenizer_config.json" => made(&self.tokenizer_config),
            "preprocessor_config.json" | "video_preprocessor_config.json" => {
                self.preprocessor.as_ref().and_then(made)
            }
            "chat_template.jinja" => {
                self.text.string(tokenizer::TEMPLATE)?.map(|t| Bytes::from(t.as_bytes().to_vec()))
            }
            "tokenizer.json" => Some(match self.tokenizer.get() {
                Some(made) => made.clone(),
                None => {
                    let made = Bytes::from(tokenizer::Vocabulary::new(&self.text)?.to_json()?);
                    self.tokenizer.get_or_init(|| made).clone()
                }
            }),
            _ => None,
        })
    }

    /// The file of a tensor.
    pub(crate) fn path_of(&self, name: &str) -> Option<&Path> {
        self.served(name).map(|s| self.file(s.file).path())
    }

    /// Reads every tensor and looks for NaN and infinity.
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub(crate) fn check_finite(&self) -> Result<()> {
        self.files().try_for_each(GgufFile::check_finite)
    }

    fn file(&self, part: Part) -> &GgufFile {
        match (part, &self.vision) {
            (Part::Vision, Some(vision)) => vision,
            _ => &self.text,
        }
    }

    fn served(&self, name: &str) -> Option<&Served> {
        self.by_name.get(name).and_then(|&i| self.served.get(i))
    }

    /// The tensor under its name here.
    fn get(&self, name: &str) -> Result<Tensor> {
        let Some(served) = self.served(name) else {
            return Err(Error::NoTensor { tensor: shown(name), place: self.text.path().to_owned() });
        };
        let file = self.file(served.file);
        match &served.origin {
            Origin::Same(stored) => file.get(stored),
            Origin::Rows { stored, heads } => {
                let tensor = file.get(stored)?;
                permute_rows(&tensor, *heads, self.rotary, Direction::ToPairs)
                    .map_err(|what| wrong_tensor(file, stored, what))
            }
            Origin::Frames(frames) => {
                let tensors = frames.iter().map(|f| file.get(f)).collect::<Result<Vec<_>>>()?;
                let first = frames.first().map_or(PATCH_FRAME, String::as_str);
                join_frames(&tensors).map_err(|what| wrong_tensor(file, first, what))
            }
        }
    }
}

fn wrong_tensor(file: &GgufFile, tensor: &str, what: String) -> Error {
    Error::Tensor { path: file.path().to_owned(), tensor: shown(tensor), offset: file.offset(tensor), what }
}

impl WeightSource for GlmGguf {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.served.iter().filter_map(|s| s.info.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.served(name).and_then(|s| s.info.clone())
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        self.get(name).map_err(|e| source_error(e, name, self.path_of(name).unwrap_or(self.text.path())))
    }
}

/// The name here of a numbered tensor such as `blk.7.attn_q.weight`; the number must be written plainly.
fn numbered(stored: &str, prefix: &str, scope: &str, suffixes: &[(&str, &str)]) -> Option<String> {
    let (number, suffix) = stored.strip_prefix(prefix)?.split_once('.')?;
    let plain = number.parse::<u32>().is_ok_and(|n| n.to_string() == number);
    let (_, here) = suffixes.iter().find(|(gguf, _)| *gguf == suffix)?;
    plain.then(|| format!("{scope}{number}.{here}"))
}

fn serve(file: &GgufFile, part: Part, name: String, origin: Origin) -> Served {
    let stored = match &origin {
        Origin::Same(stored) | Origin::Rows { stored, .. } => Some(stored),
        Origin::Frames(frames) => frames.first(),
    };
    let info = stored.and_then(|s| file.info(s)).map(|info| {
        let mut shape = info.shape;
        if let Origin::Frames(frames) = &origin {
            // [out, channels, h, w] becomes [out, channels, frames, h, w].
            shape.insert(shape.len().min(2), frames.len());
        }
        TensorInfo { name: name.clone(), dtype: info.dtype, shape }
    });
    Served { info, name, file: part, origin }
}

fn serve_text(file: &GgufFile, sizes: &Text, served: &mut Vec<Served>) {
    for stored in file.names() {
        let here = TEXT
            .iter()
            .find(|(gguf, _)| *gguf == stored)
            .map(|(_, here)| (*here).to_owned())
            .or_else(|| numbered(stored, "blk.", LAYER_SCOPE, LAYER));
        let heads = match stored.rsplit('.').nth(1) {
            Some("attn_q") => sizes.heads,
            Some("attn_k") => sizes.kv_heads,
            _ => 0,
        };
        let origin = match &here {
            Some(_) if sizes.mrope && heads > 0 => Origin::Rows { stored: stored.to_owned(), heads },
            _ => Origin::Same(stored.to_owned()),
        };
        // What has no name here keeps its own, so that a check of the tensors finds and names it.
        let name = here.unwrap_or_else(|| stored.to_owned());
        served.push(serve(file, Part::Text, name, origin));
    }
}

fn serve_vision(file: &GgufFile, served: &mut Vec<Served>) {
    let frame = |i: usize| if i == 0 { PATCH_FRAME.to_owned() } else { format!("{PATCH_FRAME}.{i}") };
    let frames: Vec<String> = (0..MAX_FRAMES).map(frame).take_while(|name| file.contains(name)).collect();
    for stored in file.names() {
        if frames.iter().skip(1).any(|f| f == stored) {
            continue;
        }
        if frames.first().is_some_and(|f| f == stored) {
            served.push(serve(file, Part::Vision, PATCHES.to_owned(), Origin::Frames(frames.clone())));
            continue;
        }
        let here = VISION
            .iter()
            .find(|(gguf, _)| *gguf == stored)
            .map(|(_, here)| format!("{VISION_SCOPE}{here}"))
            .or_else(|| numbered(stored, "v.blk.", "model.visual.blocks.", BLOCK));
        let name = here.unwrap_or_else(|| stored.to_owned());
        served.push(serve(file, Part::Vision, name, Origin::Same(stored.to_owned())));
    }
}

/// Which order of the rotating rows of a head is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Row 2i turns with row 2i+1, as the family's own files have it.
    ToPairs,
    /// Row i turns with row n+i, n being half of the rotating rows, as M-RoPE files of the converters have it.
    ToHalves,
}

/// The tensor with the first `rotary` rows of each of `heads` heads in another order. Rows of any format move whole.
pub(crate) fn permute_rows(
    tensor: &Tensor,
    heads: usize,
    rotary: usize,
    direction: Direction,
) -> Result<Tensor, String> {
    let (&rows, inner) = tensor.shape().split_first().ok_or("a scalar has no rows")?;
    let columns = inner.iter().product::<usize>();
    let row = match inner {
        [] => tensor.dtype().size(),
        _ => tensor.dtype().row_bytes(columns),
    };
    let (Some(row), Some(head)) = (row, rows.checked_div(heads)) else {
        return Err(format!("rows of type {} cannot move", tensor.dtype()));
    };
    if head * heads != rows || rotary > head || !rotary.is_multiple_of(2) || row == 0 {
        return Err(format!("{rows} rows are not {heads} heads of which {rotary} rows each rotate"));
    }
    let mut copy = buffer(tensor.bytes().len())?;
    let half = rotary / 2;
    let target: &mut [u8] = bytemuck::cast_slice_mut(&mut copy);
    for (into, from) in target.chunks_exact_mut(head * row).zip(tensor.bytes().chunks_exact(head * row)) {
        for (i, into) in into.chunks_exact_mut(row).enumerate() {
            let source = match direction {
                _ if i >= rotary => i,
                // Row 2i was stored as row i, row 2i+1 as row half + i.
                Direction::ToPairs => i / 2 + if i % 2 == 0 { 0 } else { half },
                Direction::ToHalves if i < half => 2 * i,
                Direction::ToHalves => 2 * (i - half) + 1,
            };
            if let Some(from) = from.get(source * row..(source + 1) * row) {
                into.copy_from_slice(from);
            }
        }
    }
    finish(tensor.dtype(), tensor.shape(), copy, tensor.bytes().len())
}

/// One tensor `[out, channels, frames, h, w]` of frames `[out, channels, h, w]`.
fn join_frames(frames: &[Tensor]) -> Result<Tensor, String> {
    let first = frames.first().ok_or("no frames")?;
    let (dtype, shape) = (first.dtype(), first.shape());
    let (&[out, channels, h, w], Some(size)) = (shape, dtype.size()) else {
        return Err(format!("shape {shape:?} of type {dtype}, expected 4 dimensions of a plain type"));
    };
    for frame in frames {
        if (frame.dtype(), frame.shape()) != (dtype, shape) {
            return Err(format!(
                "frames differ: shape {shape:?} of type {dtype} and {:?} of type {}",
                frame.shape(),
                frame.dtype()
            ));
        }
    }
    let piece = h * w * size;
    let total = first.bytes().len().checked_mul(frames.len()).ok_or("too many frames")?;
    let mut copy = buffer(total)?;
    let target: &mut [u8] = bytemuck::cast_slice_mut(&mut copy);
    if piece > 0 {
        for (i, into) in target.get_mut(..total).unwrap_or_default().chunks_exact_mut(piece).enumerate() {
            let (index, frame) = (i / frames.len(), i % frames.len());
            let from = frames.get(frame).and_then(|f| f.bytes().get(index * piece..(index + 1) * piece));
            if let Some(from) = from {
                into.copy_from_slice(from);
            }
        }
    }
    finish(dtype, &[out, channels, frames.len(), h, w], copy, total)
}

fn buffer(bytes: usize) -> Result<AlignedF32, String> {
    AlignedF32::zeroed(bytes.div_ceil(4)).map_err(|e| e.to_string())
}

fn finish(dtype: DType, shape: &[usize], copy: AlignedF32, bytes: usize) -> Result<Tensor, String> {
    let bytes = Bytes::from(copy).slice(0..bytes).ok_or("a copy that is too short")?;
    Tensor::new(dtype, shape, bytes).map_err(|e| e.to_string())
}

/// `config.json` and the sizes that it was made of.
fn config(text: &GgufFile, vision: Option<&GgufFile>) -> Result<(Value, Text)> {
    let key = |name: &str| format!("{TEXT_ARCH}.{name}");
    let required = |name: &str, most: usize| text.required(&key(name), 1..=most);
    let hidden = required("embedding_length", 1 << 17)?;
    let heads = required("attention.head_count", 4096)?;
    let kv_heads = text.integer(&key("attention.head_count_kv"), 1..=4096)?.unwrap_or(heads);
    let layers = required("block_count", 512)?;
    let head_dim = match text.integer(&key("attention.key_length"), 2..=4096)? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let wanted = format!("a divisor of {}, {hidden}", key("embedding_length"));
            return Err(text.key_error(&key("attention.head_count"), wanted));
        }
    };
    if let Some(n) = text.integer(&key("attention.value_length"), 1..=4096)?
        && n != head_dim
    {
        return Err(text.key_error(&key("attention.value_length"), format!("the key length {head_dim}")));
    }
    let rotary = text.required(&key("rope.dimension_count"), 2..=head_dim)?;
    if !rotary.is_multiple_of(2) {
        return Err(text.key_error(&key("rope.dimension_count"), "an even number"));
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let eps = text.number(&eps, 0.0..=1.0)?.ok_or_else(|| text.key_error(&eps, "a number from 0 to 1"))?;
    let theta = text.number(&key("rope.freq_base"), 1.0..=1e9)?.unwrap_or(10_000.0);
    let mut rope = Map::new();
    // The kinds of scaling that files of the family could ask for are refused where the configuration is read.
    let scaling = text.string(&key("rope.scaling.type"))?.filter(|kind| *kind != "none");
    rope.insert("rope_type".into(), scaling.unwrap_or("default").into());
    rope.insert("rope_theta".into(), theta.into());
    rope.insert("partial_rotary_factor".into(), factor(rotary, head_dim).into());
    let sections_key = key("rope.dimension_sections");
    let sections = sections(text, &sections_key, rotary)?;
    if let Some(sections) = sections {
        rope.insert("mrope_section".into(), json!(sections));
    }
    let embeddings = "token_embd.weight";
    let vocab = text
        .shape(embeddings)
        .and_then(|s| s.first().copied())
        .ok_or_else(|| Error::NoTensor { tensor: embeddings.to_owned(), place: text.path().to_owned() })?;
    let tied = !text.contains("output.weight");
    let mut object = json!({
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length", 1 << 20)?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length", 1 << 24)?,
        "rms_norm_eps": eps,
        "attention_bias": text.contains("blk.0.attn_q.bias"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    });
    let sizes = Text { layers, heads, kv_heads, head_dim, rotary, mrope: sections.is_some() };
    check_heads(text, &sizes)?;
    let Some(vision) = vision else {
        if let Some(object) = object.as_object_mut() {
            object.insert("model_type".into(), "glm4".into());
        }
        return Ok((object, sizes));
    };
    let whole = json!({
        "model_type": "glm4v",
        "tie_word_embeddings": tied,
        "text_config": object,
        "vision_config": vision_config(vision)?,
    });
    Ok((whole, sizes))
}

/// Rows of q and k are moved by head, so their number must be right before any is.
fn check_heads(text: &GgufFile, sizes: &Text) -> Result<()> {
    if !sizes.mrope {
        return Ok(());
    }
    for layer in 0..sizes.layers {
        for (part, heads) in [("attn_q", sizes.heads), ("attn_k", sizes.kv_heads)] {
            for end in ["weight", "bias"] {
                let name = format!("blk.{layer}.{part}.{end}");
                let rows = text.shape(&name).and_then(|s| s.first().copied());
                let wanted = heads.saturating_mul(sizes.head_dim);
                if rows.is_some_and(|rows| rows != wanted) {
                    let found = text.shape(&name).unwrap_or_default();
                    let what = format!("shape {found:?}, expected {wanted} rows");
                    return Err(wrong_tensor(text, &name, what));
                }
            }
        }
    }
    Ok(())
}

/// The part of a head that rotates, as the fraction that gives back exactly `rotary` when it is multiplied out and
/// rounded down.
fn factor(rotary: usize, head_dim: usize) -> f64 {
    let factor = rotary as f64 / head_dim as f64;
    if ((head_dim as f64 * factor) as usize) < rotary { factor.next_up() } else { factor }
}

/// The frequencies of the three axes; `None` where the file has no such key.
fn sections(text: &GgufFile, key: &str, rotary: usize) -> Result<Option<[usize; 3]>> {
    let Some(array) = text.array(key)? else { return Ok(None) };
    let list: Vec<u64> = array
        .iter()
        .take(5)
        .map_while(|v| match v {
            crate::gguf::GgufValue::Unsigned(n) if n <= 4096 => Some(n),
            _ => None,
        })
        .collect();
    let three = match list[..] {
        [t, h, w] | [t, h, w, 0] if list.len() == array.len() => Some([t as usize, h as usize, w as usize]),
        _ => None,
    };
    let three = three.filter(|s| s.iter().sum::<usize>() == rotary / 2);
    let wanted = || format!("3 numbers that sum to {}, and a 0", rotary / 2);
    three.map(Some).ok_or_else(|| text.key_error(key, wanted()))
}

/// `vision_config`.
fn vision_config(file: &GgufFile) -> Result<Value> {
    check_vision(file)?;
    let required = |name: &str, most: usize| file.required(&format!("clip.vision.{name}"), 1..=most);
    let eps = "clip.vision.attention.layer_norm_epsilon";
    let (frames, merge) = frames_and_merge(file)?;
    Ok(json!({
        "model_type": "glm4v_vision",
        "depth": file.required("clip.vision.block_count", 0..=512)?,
        "hidden_size": required("embedding_length", 65_536)?,
        "num_heads": required("attention.head_count", 1024)?,
        "hidden_act": "silu",
        "in_channels": 3,
        "image_size": required("image_size", 65_536)?,
        "patch_size": required("patch_size", 256)?,
        "temporal_patch_size": frames,
        "spatial_merge_size": merge,
        "out_hidden_size": required("projection_dim", 65_536)?,
        // The key holds the width of the merger's MLP; that of the blocks is the projection's.
        "intermediate_size": required("feed_forward_length", 1 << 20)?,
        "rms_norm_eps": file.number(eps, 0.0..=1.0)?.unwrap_or(1e-5),
        "attention_bias": file.contains("v.blk.0.attn_qkv.bias"),
    }))
}

fn check_vision(file: &GgufFile) -> Result<()> {
    if architecture(file)? != VISION_ARCH {
        return Err(file.key_error("general.architecture", VISION_ARCH));
    }
    if projector(file)? != PROJECTOR {
        return Err(file.key_error("clip.projector_type", PROJECTOR));
    }
    if file.boolean("clip.has_vision_encoder")? == Some(false) {
        return Err(file.key_error("clip.has_vision_encoder", "true"));
    }
    Ok(())
}

/// Frames of a patch and side of the block that becomes a token: from the tensors, since no key need have them.
fn frames_and_merge(file: &GgufFile) -> Result<(usize, usize)> {
    let frames = (0..MAX_FRAMES)
        .take_while(|i| {
            let name = if *i == 0 { PATCH_FRAME.to_owned() } else { format!("{PATCH_FRAME}.{i}") };
            file.contains(&name)
        })
        .count();
    let merge = match file.shape("mm.patch_merger.weight") {
        Some(&[_, _, rows, _]) if (1..=16).contains(&rows) => rows,
        Some(found) => {
            let what = format!("shape {found:?}, expected [width, hidden, merge, merge]");
            return Err(wrong_tensor(file, "mm.patch_merger.weight", what));
        }
        None => file.integer("clip.vision.spatial_merge_size", 1..=16)?.unwrap_or(2),
    };
    Ok((frames.max(1), merge))
}

/// `preprocessor_config.json`. Budgets are pixels of one picture in GGUF, of all frames of a patch here.
fn preprocessor(file: &GgufFile) -> Result<Value> {
    let (frames, merge) = frames_and_merge(file)?;
    let budget = |key: &str, published: usize| -> Result<usize> {
        Ok(file.integer(key, 1..=1 << 26)?.map_or(published, |n| n.saturating_mul(frames)))
    };
    let mut object = json!({
        "size": {
            "shortest_edge": budget("clip.vision.image_min_pixels", 12_544)?,
            "longest_edge": budget("clip.vision.image_max_pixels", 9_633_792)?,
        },
        "patch_size": file.required("clip.vision.patch_size", 1..=256)?,
        "temporal_patch_size": frames,
        "merge_size": merge,
    });
    if let Some(object) = object.as_object_mut() {
        for (field, key) in [("image_mean", "clip.vision.image_mean"), ("image_std", "clip.vision.image_std")]
        {
            if let Some(numbers) = file.numbers::<3>(key, -1e3..=1e6)? {
                object.insert(field.into(), json!(numbers));
            }
        }
    }
    Ok(object)
}

/// `generation_config.json`: every token that ends an answer.
fn generation(text: &GgufFile, vocabulary: &tokenizer::Vocabulary<'_>) -> Result<Value> {
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(vocabulary.id(text, key)?);
    }
    ends.extend(END_TOKENS.iter().filter_map(|token| vocabulary.special(token)));
    ends.sort_unstable();
    ends.dedup();
    let mut object = Map::new();
    object.insert("do_sample".into(), false.into());
    object.insert("eos_token_id".into(), json!(ends));
    if let Some(pad) = vocabulary.id(text, "padding_token_id")? {
        object.insert("pad_token_id".into(), pad.into());
    }
    Ok(Value::Object(object))
}

/// `tokenizer_config.json`: the texts of the tokens that templates name.
fn tokenizer_config(text: &GgufFile, vocabulary: &tokenizer::Vocabulary<'_>) -> Result<Value> {
    let mut object = Map::new();
    for (field, key) in [("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")] {
        if let Some(token) = vocabulary.id(text, key)?.and_then(|id| vocabulary.text(id)) {
            object.insert(field.into(), token.into());
        }
    }
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(dtype: DType, rows: usize, columns: usize) -> Tensor {
        let size = dtype.bytes(&[rows, columns]).unwrap();
        let row = size / rows;
        let bytes: Vec<u8> = (0..size).map(|i| (i / row) as u8).collect();
        Tensor::new(dtype, &[rows, columns], bytes.into()).unwrap()
    }

    /// The number that each row was filled with.
    fn order(tensor: &Tensor) -> Vec<u8> {
        let row = tensor.bytes().len() / tensor.shape()[0];
        tensor.bytes().chunks(row).map(|r| r[0]).collect()
    }

    #[test]
    fn rows_of_any_format_move_by_head_and_back() {
        for name in ["F32", "BF16", "Q4_0", "Q8_0", "int4-g32-asym"] {
            let dtype = DType::from_name(name).unwrap();
            let tensor = rows(dtype, 12, 64);
            let halves = permute_rows(&tensor, 2, 4, Direction::ToHalves).unwrap();
            // The order that the converters' documentation gives: new row i is 2i, new row n + i is 2i + 1.
            assert_eq!(order(&halves), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11], "{name}");
            let back = permute_rows(&halves, 2, 4, Direction::ToPairs).unwrap();
            assert_eq!(back.bytes(), tensor.bytes(), "{name}");
        }
    }

    #[test]
    fn rows_that_are_no_heads_are_refused() {
        let tensor = rows(DType::F32, 12, 2);
        for (heads, rotary) in [(5, 2), (2, 8), (2, 3), (0, 2)] {
            assert!(permute_rows(&tensor, heads, rotary, Direction::ToPairs).is_err(), "{heads} {rotary}");
        }
        // Values of a quantised vector share bytes and cannot move alone.
        let vector = Tensor::new(DType::Block(pocketglm_tensor::Block::Q8_0), &[32], vec![0; 34].into());
        assert!(permute_rows(&vector.unwrap(), 2, 4, Direction::ToPairs).is_err());
    }

    #[test]
    fn frames_are_joined_patch_by_patch() {
        let frame = |first: u8| {
            Tensor::new(DType::F16, &[2, 1, 1, 2], (first..first + 8).collect::<Vec<u8>>().into()).unwrap()
        };
        let joined = join_frames(&[frame(0), frame(100)]).unwrap();
        assert_eq!(joined.shape(), [2, 1, 2, 1, 2]);
        assert_eq!(joined.bytes(), [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107]);
        assert!(join_frames(&[frame(0), frame(0).reshaped(&[1, 2, 1, 2]).unwrap()]).is_err());
        assert!(join_frames(&[]).is_err());
    }

    #[test]
    fn the_rotating_part_survives_as_a_fraction() {
        for head_dim in 2..=512 {
            for rotary in (2..=head_dim).step_by(2) {
                assert_eq!((head_dim as f64 * factor(rotary, head_dim)) as usize, rotary);
            }
        }
    }

    #[test]
    fn numbers_in_names_are_plain() {
        let name = |s: &str| numbered(s, "blk.", LAYER_SCOPE, LAYER);
        let ffn = name("blk.12.ffn_norm.weight").unwrap();
        assert_eq!(ffn, "model.language_model.layers.12.post_attention_layernorm.weight");
        for bad in
            ["blk.012.ffn_norm.weight", "blk.+1.ffn_norm.weight", "blk..ffn_norm.weight", "blk.1.x.weight"]
        {
            assert_eq!(name(bad), None, "{bad}");
        }
    }
}
