//! `cargo xtask synth`: a checkpoint of a model's true shape, or with fewer layers, with random weights.
//!
//! The names and shapes are those that the model's own graphs ask for, so they cannot drift apart.

mod tokenizer;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use pocketglm_checkpoint::synth::{self, Fill};
use pocketglm_tensor::{DType, TensorInfo};
use serde_json::{Value, json};

use crate::error::io_error;
use crate::model::{Model, sizes};
use crate::speech::Speech;
use crate::{Error, Result, repo};

/// Shards are about as large as those of published checkpoints.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Small files that are taken over as they are, where the description has them.
const SIDE_FILES: &[&str] = &[
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// A folder under `models/`, a checkpoint folder, or a `config.json`.
    model: String,
    /// The folder that is written. It must not have weights yet.
    out: PathBuf,
    /// Decoder layers; all where left out.
    #[arg(long)]
    layers: Option<usize>,
    /// Blocks of the vision encoder; all where left out.
    #[arg(long)]
    vision_layers: Option<usize>,
    /// Type of the weights.
    #[arg(long, default_value = "bf16", value_parser = parse_dtype)]
    dtype: DType,
    /// How much the channels of norms differ: their standard deviation around 1.
    #[arg(long, default_value_t = 0.05)]
    norm_std: f32,
    /// Leave the weights as holes of the file: for `info` and `quantize --dry-run`.
    #[arg(long)]
    sparse: bool,
    /// Equal seeds make equal files.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A floating-point type by its short name.
pub fn parse_dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

/// Writes the checkpoint and prints its size and the seconds.
pub fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let written = write(arguments)?;
    let seconds = start.elapsed().as_secs_f64();
    repo::print(&format!(
        "{}: {} tensors, {} bytes of weights in {seconds:.1} s ({:.2} GB/s)\n",
        arguments.out.display(),
        written.tensors,
        written.bytes,
        written.bytes as f64 / 1e9 / seconds.max(1e-3),
    ))
}

/// What was written.
#[derive(Debug, PartialEq)]
struct Written {
    tensors: usize,
    bytes: u64,
}

/// A checkpoint of a speech model. Depth is that of its description.
fn write_speech(speech: &Speech, arguments: &Arguments) -> Result<Written> {
    let tensors = speech.tensors(arguments.dtype)?;
    let bytes = tensors.iter().map(|(t, _)| t.bytes() as u64).sum();
    let out = &arguments.out;
    fs::create_dir_all(out).map_err(io_error("create", out))?;
    let bar = progress_bar(bytes);
    synth::write(out, &tensors, arguments.seed, SHARD_BYTES, &mut |done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    write_json(&out.join("config.json"), &speech.json)?;
    for (name, path) in speech.side_files() {
        fs::copy(&path, out.join(name)).map(drop).map_err(io_error("copy", &path))?;
    }
    Ok(Written { tensors: tensors.len(), bytes })
}

fn write(arguments: &Arguments) -> Result<Written> {
    if let Some(speech) = Speech::open(&arguments.model)? {
        return write_speech(&speech, arguments);
    }
    let mut model = Model::open(&arguments.model)?;
    model.config = shortened(&model.config, arguments)?;
    (model.text, model.vision) = sizes(&model.config)?;

    let mut tensors = model.decoder(arguments.dtype)?.weights();
    tensors.extend(model.encoder(arguments.dtype)?.weights());
    let tensors: Vec<(TensorInfo, Fill)> =
        tensors.into_iter().map(|t| (t.clone(), fill(&t, arguments))).collect();
    let count = |t: &TensorInfo| t.bytes() as u64;
    let written = Written { tensors: tensors.len(), bytes: tensors.iter().map(|(t, _)| count(t)).sum() };

    let out = &arguments.out;
    fs::create_dir_all(out).map_err(io_error("create", out))?;
    let bar = progress_bar(written.bytes);
    synth::write(out, &tensors, arguments.seed, SHARD_BYTES, &mut |done, _| bar.set_position(done))?;
    bar.finish_and_clear();

    write_json(&out.join("config.json"), &model.config)?;
    for name in SIDE_FILES.iter().filter(|name| model.folder.join(name).is_file()) {
        copy(&model.folder, out, name)?;
    }
    if model.folder.join("tokenizer.json").is_file() {
        copy(&model.folder, out, "tokenizer.json")?;
        copy(&model.folder, out, "tokenizer_config.json")?;
    } else {
        let files = tokenizer::synthetic(&model.config, model.text.max_position_embeddings)?;
        write_json(&out.join("tokenizer.json"), &files.tokenizer)?;
        write_json(&out.join("tokenizer_config.json"), &files.config)?;
    }
    Ok(written)
}

fn copy(from: &Path, to: &Path, name: &str) -> Result<()> {
    let from = from.join(name);
    fs::copy(&from, to.join(name)).map(drop).map_err(io_error("copy", &from))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    repo::write(path, &format!("{value:#}\n"))
}

/// `config.json` with the depth and type that are asked for.
fn shortened(config: &Value, arguments: &Arguments) -> Result<Value> {
    let mut config = config.clone();
    let nested = config["text_config"].is_object();
    let full =
        if nested { &config["text_config"]["num_hidden_layers"] } else { &config["num_hidden_layers"] };
    let checked = |wanted: Option<usize>, least: u64, full: &Value, what: &str| -> Result<Option<Value>> {
        let Some(wanted) = wanted else { return Ok(None) };
        match full.as_u64() {
            Some(full) if (least..=full).contains(&(wanted as u64)) => Ok(Some(json!(wanted))),
            _ => Err(Error::Content {
                place: what.into(),
                wanted: format!("{least} to {full}"),
                found: wanted.to_string(),
            }),
        }
    };
    let layers = checked(arguments.layers, 1, full, "--layers")?;
    let blocks = checked(arguments.vision_layers, 0, &config["vision_config"]["depth"], "--vision-layers")?;
    if let Some(layers) = layers {
        let text = if nested { &mut config["text_config"] } else { &mut config };
        text["num_hidden_layers"] = layers;
    }
    if let Some(blocks) = blocks {
        config["vision_config"]["depth"] = blocks;
    }
    let dtype = match arguments.dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    for part in ["", "/text_config", "/vision_config"] {
        let Some(part) = config.pointer_mut(part) else { continue };
        for field in ["dtype", "torch_dtype"] {
            if let Some(old) = part.get_mut(field) {
                *old = dtype.into();
            }
        }
    }
    Ok(config)
}

/// Values that keep activations near unit size from layer to layer, in every type.
fn fill(tensor: &TensorInfo, arguments: &Arguments) -> Fill {
    if arguments.sparse {
        return Fill::Hole;
    }
    let name = tensor.name.as_str();
    if name.ends_with(".bias") {
        return Fill::Normal { std: 0.02 };
    }
    // Tables are looked up, not multiplied, so their rows are as large as activations should be.
    if name.ends_with("embed_tokens.weight") {
        return Fill::Normal { std: 1.0 };
    }
    if name.ends_with("position_embedding.weight") {
        return Fill::Normal { std: 0.02 };
    }
    match tensor.shape.get(1..) {
        Some([]) | None => Fill::NormalAround { mean: 1.0, std: arguments.norm_std },
        Some(rest) => {
            let inputs: usize = rest.iter().product();
            Fill::Normal { std: 1.0 / (inputs.max(1) as f32).sqrt() }
        }
    }
}

/// A bar on standard error that draws nothing where that is no terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    let bar = ProgressBar::new(bytes);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use pocketglm_bpe::{ContentFormat, Message, Part, RenderOptions};
    use pocketglm_checkpoint::{Checkpoint, OpenOptions};
    use pocketglm_glm::{Trace, decoder};
    use pocketglm_graph::GraphBuilder;
    use pocketglm_tensor::WeightSource;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("pocketglm-xtask-{name}-{}", std::process::id()));
            drop(fs::remove_dir_all(&path));
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    fn arguments(model: &str, out: &Folder) -> Arguments {
        Arguments {
            model: repo::root().join(model).to_string_lossy().into_owned(),
            out: out.0.clone(),
            layers: Some(2),
            vision_layers: Some(1),
            dtype: DType::F16,
            norm_std: 0.05,
            sparse: false,
            seed: 7,
        }
    }

    #[test]
    fn a_synthetic_checkpoint_opens_as_the_model_it_was_made_for() {
        let out = Folder::new("opens");
        let written = write(&arguments("tests/golden/default", &out)).unwrap();
        let checkpoint =
            Checkpoint::open(&out.0, &OpenOptions { check_finite: true, ..Default::default() }).unwrap();
        assert_eq!(checkpoint.tensors().len(), written.tensors);
        assert!(checkpoint.tensors().iter().all(|t| t.dtype == DType::F16));
        let model = Model::open(out.0.to_str().unwrap()).unwrap();
        assert_eq!((model.text.num_hidden_layers, model.vision.depth), (2, 1));
        assert_eq!(model.dtype(), Some(DType::F16));
        // Names and shapes are checked while the graph is built from the files.
        decoder(&mut GraphBuilder::new(&checkpoint), &model.text, Trace::Off).unwrap();
        for name in
            ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"]
        {
            assert!(out.0.join(name).is_file(), "{name}");
        }
    }

    #[test]
    fn the_seed_decides_the_bytes_and_weights_are_never_overwritten() {
        let (a, b, c) = (Folder::new("a"), Folder::new("b"), Folder::new("c"));
        let bytes = |f: &Folder| fs::read(f.0.join("model.safetensors")).unwrap();
        write(&arguments("tests/golden/bf16", &a)).unwrap();
        write(&arguments("tests/golden/bf16", &b)).unwrap();
        write(&Arguments { seed: 8, ..arguments("tests/golden/bf16", &c) }).unwrap();
        assert_eq!(bytes(&a), bytes(&b));
        assert_ne!(bytes(&a), bytes(&c));
        let error = write(&arguments("tests/golden/bf16", &a)).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }

    /// What issues of quantisation promise of the 9.4 B decoder with its head and vision encoder, in parts of f32.
    #[test]
    fn the_true_model_takes_the_promised_part_of_its_f32_size() {
        use pocketglm::quantise::{Policy, QuantiseOptions, Quantiser};
        let out = Folder::new("sizes");
        let all = Arguments {
            layers: None,
            vision_layers: None,
            sparse: true,
            ..arguments("models/autoglm-phone-9b", &out)
        };
        let written = write(&Arguments { dtype: DType::BF16, ..all }).unwrap();
        assert_eq!((written.tensors, written.bytes), (704, 20_585_554_944));
        for (policy, most) in [
            ("int8", 0.255),
            ("int4-g64", 0.135),
            ("int2-g64", 0.085),
            ("int2-g64-asym", 0.085),
            ("Q8_0", 0.27),
        ] {
            let options = QuantiseOptions::new(Policy::load(policy).unwrap());
            let plan = Quantiser::open(&out.0, options).unwrap().plan().clone();
            let part = plan.bytes() as f64 / (4 * plan.elements()) as f64;
            println!("{policy}: {} bytes, {:.2} % of f32", plan.bytes(), 100.0 * part);
            assert_eq!(plan.elements(), 10_292_777_472);
            assert!(part <= most && part > 0.8 * most, "{policy}: {part}");
        }
    }

    #[test]
    fn more_layers_than_the_model_has_are_refused() {
        let out = Folder::new("layers");
        let error =
            write(&Arguments { layers: Some(99), ..arguments("tests/golden/default", &out) }).unwrap_err();
        assert!(error.to_string().contains("--layers: expected 1 to 3, found 99"), "{error}");
        assert!(!out.0.exists());
    }

    #[test]
    fn the_described_models_own_small_files_are_valid() {
        let model = Model::open("autoglm-phone-9b").unwrap();
        let files = tokenizer::synthetic(&model.config, 65536).unwrap();
        let tokenizer = pocketglm_bpe::Tokenizer::from_json(files.tokenizer.to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.id_limit(), 151_349);
        for (token, id) in [
            ("<|endoftext|>", 151_329),
            ("<|user|>", 151_336),
            ("<|image|>", 151_343),
            ("</answer>", 151_348),
        ] {
            assert_eq!(tokenizer.token_id(token), Some(id));
            assert_eq!(tokenizer.encode(token).unwrap(), [id]);
        }
        let text = "Open 设置, then tap “WLAN” 42 times 🙂.\n";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
        assert!(
            ids.len() < text.chars().count(),
            "{} tokens for {} characters",
            ids.len(),
            text.chars().count()
        );
        assert_eq!(["设置", "42", " the"].map(|t| tokenizer.encode(t).unwrap().len()), [2, 1, 2]);

        let json = fs::read(model.folder.join("preprocessor_config.json")).unwrap();
        let read = pocketglm_vit::preprocess::PreprocessConfig::from_image_json(&json).unwrap();
        assert_eq!(read, pocketglm_vit::preprocess::PreprocessConfig::published());
    }

    #[test]
    fn our_transcription_of_the_template_renders_like_that_of_the_golden_files() {
        let ours = Model::open("autoglm-phone-9b").unwrap().folder.join("chat_template.jinja");
        let theirs = repo::root().join("tests/golden/default/chat_template.jinja");
        let template = |path: &Path| pocketglm_bpe::ChatTemplate::new(&repo::read(path).unwrap()).unwrap();
        let (ours, theirs) = (template(&ours), template(&theirs));
        let parts = vec![Part::Text("a\n".into()), Part::Image, Part::Video, Part::Text(" b".into())];
        let messages = [
            Message::text("system", "Be  brief.\n"),
            Message::parts("user", parts),
            Message::text("assistant", "ok"),
            Message::text("user", "\nagain "),
            Message::text("tool", "ignored"),
        ];
        for n in 0..=messages.len() {
            let options = RenderOptions { format: ContentFormat::Hf, ..RenderOptions::default() };
            let text = ours.render(&messages[..n], &options).unwrap();
            assert_eq!(text, theirs.render(&messages[..n], &options).unwrap());
            assert!(text.starts_with("[gMASK]<sop>"));
        }
    }
}
