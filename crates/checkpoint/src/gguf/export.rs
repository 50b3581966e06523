//! Writing a model of the GLM family as GGUF, under the names and in the row order of llama.cpp's converters.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pocketglm_tensor::{Bytes, DType, Tensor, TensorInfo, WeightSource};
use serde_json::Value;

use crate::error::shown;
use crate::file::{check_target, one_name};
use crate::gguf::glm::{
    BLOCK, Direction, LAYER, LAYER_SCOPE, PATCH_FRAME, PATCHES, PROJECTOR, TEXT, TEXT_ARCH, VISION,
    VISION_ARCH, VISION_SCOPE, permute_rows,
};
use crate::gguf::tokenizer::token_kind;
use crate::gguf::write::check_layout;
use crate::gguf::{GgmlType, GgufMeta, GgufWriter};
use crate::{Error, Fields, Result};

/// Most rows of an embedding table, and so tokens.
const MAX_TOKENS: usize = 1 << 20;

/// A model to be written.
pub struct GgufExport<'a> {
    /// Tensors under the family's own names (`model.language_model.*`, `model.visual.*`, `lm_head.weight`), each in
    /// the format that the file shall have. [`Converted`] changes formats on the way.
    pub source: &'a dyn WeightSource,
    /// The content of `config.json`.
    pub config: &'a Value,
    /// The content of `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// The chat template.
    pub chat_template: Option<&'a str>,
    /// The content of `preprocessor_config.json`.
    pub preprocessor: Option<&'a Value>,
    /// What to call the model.
    pub name: &'a str,
    /// More keys for the text file.
    pub extra: Vec<(String, GgufMeta)>,
}

/// Brings a tensor of this name into this format.
pub type Convert<'a> = dyn Fn(&str, Tensor, DType) -> pocketglm_tensor::Result<Tensor> + Send + Sync + 'a;

/// A source whose tensors change their format when they are asked for.
pub struct Converted<'a> {
    /// Where tensors come from.
    pub source: &'a dyn WeightSource,
    /// The format that a tensor shall have.
    pub dtype: Box<dyn Fn(&TensorInfo) -> DType + Send + Sync + 'a>,
    /// Brings a tensor of this name into that format.
    pub convert: Box<Convert<'a>>,
}

impl WeightSource for Converted<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let change = |info: TensorInfo| TensorInfo { dtype: (self.dtype)(&info), ..info };
        self.source.tensors().into_iter().map(change).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name).map(|info| TensorInfo { dtype: (self.dtype)(&info), ..info })
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let tensor = self.source.tensor(name)?;
        match self.info(name) {
            Some(info) if info.dtype != tensor.dtype() => (self.convert)(name, tensor, info.dtype),
            _ => Ok(tensor),
        }
    }
}

/// One tensor of the file, and how it comes from the source's.
struct Planned {
    info: TensorInfo,
    from: String,
    change: Change,
}

#[derive(Clone, Copy)]
enum Change {
    None,
    /// Rows of so many heads into the order of halves.
    Rows(usize),
    /// One frame of the patch embedding.
    Frame(usize),
}

/// The sizes of the decoder that the row order depends on.
struct Heads {
    heads: usize,
    kv_heads: usize,
    rotary: usize,
    mrope: bool,
}

/// One file that is to be written.
struct Part {
    path: PathBuf,
    plan: Vec<Planned>,
    metadata: Vec<(String, GgufMeta)>,
}

impl Part {
    fn infos(&self) -> Vec<TensorInfo> {
        self.plan.iter().map(|p| p.info.clone()).collect()
    }
}

/// The text file and, if a path is given for it, the vision file.
fn parts(model: &GgufExport<'_>, text: &Path, vision: Option<&Path>) -> Result<(Vec<Part>, Heads)> {
    if let Some(vision) = vision.filter(|vision| one_name(text, vision)) {
        let what = "the text file and the vision file must have two names".to_owned();
        return Err(Error::Write { path: vision.to_owned(), what });
    }
    let fields = Fields::new("config.json", model.config)?;
    let (mut metadata, heads) = text_keys(model, &fields)?;
    metadata.extend(tokenizer_keys(model, &fields, text)?);
    metadata.extend(model.extra.iter().cloned());
    let plan = text_plan(model.source, &heads, text)?;
    let mut parts = vec![Part { path: text.to_owned(), plan, metadata }];
    if let Some(path) = vision {
        let (plan, frames) = vision_plan(model.source, path)?;
        let metadata = vision_keys(model, &fields, frames)?;
        parts.push(Part { path: path.to_owned(), plan, metadata });
    }
    for part in &mut parts {
        part.metadata.push(("general.file_type".to_owned(), file_type(&part.plan).into()));
        part.metadata.push(("general.quantization_version".to_owned(), 2u32.into()));
    }
    Ok((parts, heads))
}

/// Whether [`export_gguf`] could write this model: everything that it would say before it writes a tensor.
///
/// # Errors
/// As [`export_gguf`].
pub fn check_gguf(
    model: &GgufExport<'_>,
    text: &Path,
    vision: Option<&Path>,
    inputs: &[&Path],
) -> Result<()> {
    for part in parts(model, text, vision)?.0 {
        check_target(&part.path, inputs)?;
        check_layout(&part.path, &part.metadata, &part.infos())?;
    }
    Ok(())
}

/// Writes the text file and, if a path is given for it, the vision file. `progress` hears of bytes done and in all.
///
/// Vectors, and the tables that llama.cpp wants so, become F32; everything else keeps the source's format. For
/// configurations with M-RoPE sections, the rows of q and k are permuted as the converters do.
///
/// # Errors
/// [`Error::Field`] where the configuration lacks something, [`Error::Write`] where a tensor has no name or format in
/// GGUF or both files have one name, [`Error::Weights`] where the source fails, [`Error::Json`] for the tokenizer, and
/// those of [`GgufWriter`].
pub fn export_gguf(
    model: &GgufExport<'_>,
    text: &Path,
    vision: Option<&Path>,
    inputs: &[&Path],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let (parts, heads) = parts(model, text, vision)?;
    let bytes = |p: &Planned| p.info.bytes() as u64;
    let total: u64 = parts.iter().flat_map(|part| part.plan.iter().map(bytes)).sum();
    let mut done = 0;
    let mut writers = Vec::new();
    for part in parts {
        let mut writer = GgufWriter::create(&part.path, &part.metadata, &part.infos(), inputs)?;
        for planned in &part.plan {
            let tensor = planned.tensor(model.source, heads.rotary, &part.path)?;
            writer.write(&planned.info.name, tensor.bytes())?;
            done += bytes(planned);
            progress(done, total);
        }
        writers.push(writer);
    }
    // All files are on the disk before one gets its name, so that a failure leaves none.
    writers.iter_mut().try_for_each(GgufWriter::complete)?;
    writers.into_iter().try_for_each(GgufWriter::finish)
}

impl Planned {
    fn tensor(&self, source: &dyn WeightSource, rotary: usize, path: &Path) -> Result<Tensor> {
        let failed = |source| Error::Weights { source };
        let wrong = |what: String| Error::Write {
            path: path.to_owned(),
            what: format!("tensor `{}`: {what}", shown(&self.from)),
        };
        let tensor = source.tensor(&self.from).map_err(failed)?;
        let tensor = match self.change {
            Change::None => tensor,
            Change::Rows(heads) => {
                permute_rows(&tensor, heads, rotary, Direction::ToHalves).map_err(wrong)?
            }
            Change::Frame(index) => frame(&tensor, index).map_err(wrong)?,
        };
        let tensor = match (self.info.dtype, tensor.dtype()) {
            (wanted, found) if wanted == found => tensor,
            (DType::F32, _) => {
                let values = tensor.to_f32().map_err(failed)?;
                Tensor::from_f32(tensor.shape(), &values).map_err(failed)?
            }
            (wanted, found) => return Err(wrong(format!("has the type {found}, expected {wanted}"))),
        };
        if tensor.shape() != self.info.shape {
            return Err(wrong(format!("has shape {:?}, expected {:?}", tensor.shape(), self.info.shape)));
        }
        Ok(tensor)
    }
}

/// Frame `index` of `[out, channels, frames, h, w]` as `[out, channels, h, w]`.
fn frame(tensor: &Tensor, index: usize) -> Result<Tensor, String> {
    let (&[out, channels, frames, h, w], Some(size)) = (tensor.shape(), tensor.dtype().size()) else {
        return Err(format!("shape {:?} of type {} has no frames", tensor.shape(), tensor.dtype()));
    };
    let piece = (h * w * size).max(1);
    let pieces = tensor.bytes().chunks_exact(piece).skip(index).step_by(frames.max(1));
    let bytes: Vec<u8> = pieces.flatten().copied().collect();
    Tensor::new(tensor.dtype(), &[out, channels, h, w], Bytes::from(bytes)).map_err(|e| e.to_string())
}

/// The GGUF name of a numbered tensor.
fn numbered(name: &str, scope: &str, prefix: &str, suffixes: &[(&str, &str)]) -> Option<String> {
    let (number, suffix) = name.strip_prefix(scope)?.split_once('.')?;
    let (gguf, _) = suffixes.iter().find(|(_, here)| *here == suffix)?;
    number.parse::<u32>().ok().map(|n| format!("{prefix}{n}.{gguf}"))
}

fn plan_one(info: TensorInfo, name: String, change: Change, plain: bool) -> Planned {
    // Vectors stay F32, as do tables that llama.cpp reads as such.
    let widen = info.shape.len() == 1 || plain;
    let dtype = if widen && info.dtype.is_float() { DType::F32 } else { info.dtype };
    Planned { from: info.name, info: TensorInfo { name, dtype, shape: info.shape }, change }
}

fn no_name(path: &Path, name: &str) -> Error {
    Error::Write { path: path.to_owned(), what: format!("tensor `{}` has no name in GGUF", shown(name)) }
}

fn text_plan(source: &dyn WeightSource, heads: &Heads, path: &Path) -> Result<Vec<Planned>> {
    let mut plan = Vec::new();
    for info in source.tensors() {
        if info.name.starts_with(VISION_SCOPE) {
            continue;
        }
        let name = TEXT.iter().find(|(_, here)| *here == info.name).map(|(gguf, _)| (*gguf).to_owned());
        let name = name.or_else(|| numbered(&info.name, LAYER_SCOPE, "blk.", LAYER));
        let name = name.ok_or_else(|| no_name(path, &info.name))?;
        let change = match name.rsplit('.').nth(1) {
            Some("attn_q") if heads.mrope => Change::Rows(heads.heads),
            Some("attn_k") if heads.mrope => Change::Rows(heads.kv_heads),
            _ => Change::None,
        };
        plan.push(plan_one(info, name, change, false));
    }
    Ok(plan)
}

/// The vision file's tensors and the frames of a patch.
fn vision_plan(source: &dyn WeightSource, path: &Path) -> Result<(Vec<Planned>, usize)> {
    let mut plan = Vec::new();
    let mut frames = 0;
    for info in source.tensors() {
        let Some(inner) = info.name.strip_prefix(VISION_SCOPE) else { continue };
        if info.name == PATCHES {
            let &[out, channels, count, h, w] = &info.shape[..] else {
                let what = format!("tensor `{PATCHES}` has shape {:?}, expected 5 dimensions", info.shape);
                return Err(Error::Write { path: path.to_owned(), what });
            };
            frames = count;
            for i in 0..count {
                let name = if i == 0 { PATCH_FRAME.to_owned() } else { format!("{PATCH_FRAME}.{i}") };
                let frame = TensorInfo { shape: vec![out, channels, h, w], ..info.clone() };
                plan.push(plan_one(frame, name, Change::Frame(i), info.dtype == DType::BF16));
            }
            continue;
        }
        let name = VISION.iter().find(|(_, here)| *here == inner).map(|(gguf, _)| (*gguf).to_owned());
        let name = name.or_else(|| numbered(inner, "blocks.", "v.blk.", BLOCK));
        let name = name.ok_or_else(|| no_name(path, &info.name))?;
        // The table is resized by llama.cpp in F32; its convolution knows F16 and F32.
        let plain = name.starts_with("v.position_embd")
            || (name.starts_with("mm.patch_merger") && info.dtype == DType::BF16);
        plan.push(plan_one(info, name, Change::None, plain));
    }
    if frames == 0 {
        let what = format!("the source has no tensor `{PATCHES}`");
        return Err(Error::Write { path: path.to_owned(), what });
    }
    Ok((plan, frames))
}

fn small(n: usize) -> GgufMeta {
    // Every number here was checked against a limit far below.
    GgufMeta::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

/// Keys of the text file but for its tokenizer, and what the row order depends on.
fn text_keys(model: &GgufExport<'_>, top: &Fields<'_>) -> Result<(Vec<(String, GgufMeta)>, Heads)> {
    let text = top.child("text_config")?;
    let f = text.as_ref().unwrap_or(top);
    let hidden = f.required("hidden_size", 1..=1 << 17)?;
    let heads = f.required("num_attention_heads", 1..=4096)?;
    let kv_heads = f.integer("num_key_value_heads", 1..=4096)?.unwrap_or(heads);
    let head_dim = f.integer("head_dim", 2..=4096)?.unwrap_or(hidden / heads);
    let parameters = f.child("rope_parameters")?;
    let scaling = f.child("rope_scaling")?;
    let rope = parameters.as_ref().unwrap_or(f);
    let mrope = parameters.as_ref().or(scaling.as_ref()).unwrap_or(f);
    if let Some(kind) = mrope.string("rope_type")?.or(mrope.string("type")?)
        && !matches!(kind, "default" | "mrope")
    {
        return Err(mrope.error("rope_type", "default (other kinds of scaling are not written)"));
    }
    let factor = rope
        .number("partial_rotary_factor", 0.0..=1.0)?
        .ok_or_else(|| rope.error("partial_rotary_factor", "a number from 0 to 1"))?;
    let rotary = (head_dim as f64 * factor) as usize;
    let sections = mrope.integers("mrope_section", 4, 0..=4096)?;
    let theta = rope.number("rope_theta", 1.0..=1e9)?.unwrap_or(10_000.0);
    let eps = f.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5);
    let mut keys: Vec<(String, GgufMeta)> =
        vec![("general.architecture".into(), TEXT_ARCH.into()), ("general.name".into(), model.name.into())];
    let mut put = |key: &str, value: GgufMeta| keys.push((format!("{TEXT_ARCH}.{key}"), value));
    put("block_count", small(f.required("num_hidden_layers", 1..=512)?));
    put("context_length", small(f.integer("max_position_embeddings", 1..=1 << 24)?.unwrap_or(32_768)));
    put("embedding_length", small(hidden));
    put("feed_forward_length", small(f.required("intermediate_size", 1..=1 << 20)?));
    put("attention.head_count", small(heads));
    put("attention.head_count_kv", small(kv_heads));
    put("attention.key_length", small(head_dim));
    put("attention.value_length", small(head_dim));
    put("attention.layer_norm_rms_epsilon", (eps as f32).into());
    put("vocab_size", small(f.required("vocab_size", 1..=MAX_TOKENS)?));
    put("rope.freq_base", (theta as f32).into());
    put("rope.dimension_count", small(rotary));
    if let Some(sections) = &sections {
        let mut list: Vec<u32> = sections.iter().map(|&n| n as u32).collect();
        list.resize(4, 0);
        put("rope.dimension_sections", GgufMeta::U32s(list));
    }
    Ok((keys, Heads { heads, kv_heads, rotary, mrope: sections.is_some() }))
}

/// The tokenizer's keys, from `tokenizer.json`.
fn tokenizer_keys(model: &GgufExport<'_>, top: &Fields<'_>, path: &Path) -> Result<Vec<(String, GgufMeta)>> {
    const FILE: &str = "tokenizer.json";
    let wrong = |what: String| Error::Json { path: PathBuf::from(FILE), what };
    let json: Value = serde_json::from_slice(model.tokenizer).map_err(|e| wrong(shown(&e.to_string())))?;
    let text = top.child("text_config")?;
    let size = text.as_ref().unwrap_or(top).required("vocab_size", 1..=MAX_TOKENS)?;
    let mut tokens: Vec<String> = (0..size).map(|i| format!("[PAD{i}]")).collect();
    let mut kinds = vec![token_kind::UNUSED as i32; size];
    let mut put = |id: u64, token: &str, kind: u64| -> Result<()> {
        let slot = usize::try_from(id).ok();
        let slots = slot.and_then(|i| Some((tokens.get_mut(i)?, kinds.get_mut(i)?)));
        let Some((text, slot)) = slots else {
            let token = shown(token);
            return Err(wrong(format!(
                "token `{token}` has the id {id}, expected less than vocab_size {size}"
            )));
        };
        token.clone_into(text);
        *slot = kind as i32;
        Ok(())
    };
    let vocab = json.pointer("/model/vocab").and_then(Value::as_object);
    for (token, id) in vocab.ok_or_else(|| wrong("no object `model.vocab`".into()))? {
        let id = id.as_u64().ok_or_else(|| wrong(format!("the id of `{}` is no number", shown(token))))?;
        put(id, token, token_kind::NORMAL)?;
    }
    let mut ids = HashMap::new();
    for added in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let (id, content) = (added.get("id").and_then(Value::as_u64), added.get("content"));
        let (Some(id), Some(content)) = (id, content.and_then(Value::as_str)) else {
            return Err(wrong("an added token without id and content".into()));
        };
        let special = added.get("special").and_then(Value::as_bool).unwrap_or(false);
        put(id, content, if special { token_kind::CONTROL } else { token_kind::USER_DEFINED })?;
        ids.insert(content, id as u32);
    }
    let merges = json.pointer("/model/merges").and_then(Value::as_array);
    let merge = |m: &Value| match m {
        Value::String(s) => Some(s.clone()),
        Value::Array(pair) => match &pair[..] {
            [Value::String(a), Value::String(b)] => Some(format!("{a} {b}")),
            _ => None,
        },
        _ => None,
    };
    let merges: Option<Vec<String>> =
        merges.ok_or_else(|| wrong("no list `model.merges`".into()))?.iter().map(merge).collect();
    let merges = merges.ok_or_else(|| wrong("a merge that is no pair of tokens".into()))?;
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut keys: Vec<(String, GgufMeta)> = vec![
        (key("model"), "gpt2".into()),
        (key("pre"), "glm4".into()),
        (key("tokens"), GgufMeta::Strings(tokens)),
        (key("token_type"), GgufMeta::I32s(kinds)),
        (key("merges"), GgufMeta::Strings(merges)),
    ];
    let Some(&end) = ids.get("<|endoftext|>") else {
        let what = "tokenizer.json has no token <|endoftext|>".to_owned();
        return Err(Error::Write { path: path.to_owned(), what });
    };
    for name in ["eos_token_id", "bos_token_id", "unknown_token_id", "padding_token_id"] {
        keys.push((key(name), end.into()));
    }
    for (name, token) in [("eot_token_id", "<|user|>"), ("eom_token_id", "<|observation|>")] {
        keys.extend(ids.get(token).map(|&id| (key(name), id.into())));
    }
    keys.extend(model.chat_template.map(|t| ("tokenizer.chat_template".to_owned(), t.into())));
    Ok(keys)
}

/// Keys of the vision file.
fn vision_keys(model: &GgufExport<'_>, top: &Fields<'_>, frames: usize) -> Result<Vec<(String, GgufMeta)>> {
    let f = top.child("vision_config")?.ok_or_else(|| top.error("vision_config", "an object"))?;
    let eps = f.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5);
    let merge = f.integer("spatial_merge_size", 1..=16)?.unwrap_or(2);
    let mut keys: Vec<(String, GgufMeta)> = vec![
        ("general.architecture".into(), VISION_ARCH.into()),
        ("general.name".into(), model.name.into()),
        ("clip.has_vision_encoder".into(), true.into()),
        ("clip.projector_type".into(), PROJECTOR.into()),
        ("clip.use_silu".into(), true.into()),
    ];
    let mut put = |key: &str, value: GgufMeta| keys.push((format!("clip.vision.{key}"), value));
    put("image_size", small(f.required("image_size", 1..=65_536)?));
    put("patch_size", small(f.required("patch_size", 1..=256)?));
    put("embedding_length", small(f.required("hidden_size", 1..=65_536)?));
    put("feed_forward_length", small(f.required("intermediate_size", 1..=1 << 20)?));
    put("block_count", small(f.required("depth", 0..=512)?));
    put("projection_dim", small(f.required("out_hidden_size", 1..=65_536)?));
    put("attention.head_count", small(f.required("num_heads", 1..=1024)?));
    put("attention.layer_norm_epsilon", (eps as f32).into());
    put("spatial_merge_size", small(merge));
    let published = Value::Object(serde_json::Map::new());
    let images = Fields::new("preprocessor_config.json", model.preprocessor.unwrap_or(&published))?;
    if let Some(size) = images.child("size")? {
        for (field, key) in [("shortest_edge", "image_min_pixels"), ("longest_edge", "image_max_pixels")] {
            // Of one picture here, of all frames of a patch there.
            if let Some(n) = size.integer(field, 1..=1 << 26)? {
                put(key, small(n / frames.max(1)));
            }
        }
    }
    for (field, clip) in [
        ("image_mean", [0.481_454_66, 0.457_827_5, 0.408_210_73]),
        ("image_std", [0.268_629_54, 0.261_302_6, 0.275_777_1]),
    ] {
        let list = match images.get(field).and_then(Value::as_array) {
            Some(list) => list.iter().filter_map(Value::as_f64).map(|x| x as f32).collect(),
            None => clip.to_vec(),
        };
        if list.len() != 3 {
            return Err(images.error(field, "3 numbers"));
        }
        put(field, GgufMeta::F32s(list));
    }
    Ok(keys)
}

/// llama.cpp's number for the format that most bytes of the file have.
fn file_type(plan: &[Planned]) -> u32 {
    let mut bytes: HashMap<&str, u64> = HashMap::new();
    for planned in plan {
        let name = GgmlType::of_dtype(planned.info.dtype).map_or("F32", |t| t.name);
        *bytes.entry(name).or_insert(0) += planned.info.bytes() as u64;
    }
    let most = bytes.into_iter().max_by_key(|&(name, n)| (n, name)).map_or("F32", |(name, _)| name);
    match most {
        "F16" => 1,
        "Q4_0" => 2,
        "Q4_1" => 3,
        "Q8_0" => 7,
        "Q5_0" => 8,
        "Q5_1" => 9,
        "Q2_K" => 10,
        "Q3_K" => 12,
        "Q4_K" => 15,
        "Q5_K" => 17,
        "Q6_K" => 18,
        "IQ4_NL" => 25,
        "IQ4_XS" => 30,
        "BF16" => 32,
        _ => 0,
    }
}

/// A plain tensor's values in another plain format, rounded to nearest even.
///
/// # Errors
/// [`pocketglm_tensor::Error::DType`] where one of the two is not F32, F16 or BF16.
pub fn to_plain(tensor: &Tensor, dtype: DType) -> pocketglm_tensor::Result<Tensor> {
    let values = tensor.to_f32()?;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => return Tensor::from_f32(tensor.shape(), &values),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        found => {
            return Err(pocketglm_tensor::Error::DType { op: "to_plain", wanted: "F32, F16 or BF16", found });
        }
    };
    Tensor::new(dtype, tensor.shape(), bytes.into())
}
