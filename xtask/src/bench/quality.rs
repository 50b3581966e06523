//! What quantising loses: our files beside those of llama.cpp's own quantiser, from the same weights and judged by the
//! same program; and the vision encoder by format.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use pocketglm_tensor::DType;
use serde_json::{Value, json};

use super::models::{Work, build_program};
use crate::error::io_error;
use crate::{Error, Result, repo};

/// Every so many components of a head is an outlier, this many times as large.
const OUTLIERS: (usize, f32) = (16, 12.0);

/// Models by where they have outliers: projections, and whether these are rows or columns.
const MODELS: [(&str, &[(&str, bool)]); 3] = [
    ("nowhere", &[]),
    ("keys and values", &[(".k_proj.", true), (".v_proj.", true)]),
    ("values and behind them", &[(".v_proj.", true), (".o_proj.", false)]),
];

/// What is folded into the weights around the cache; the matrices stay in F32.
const FOLDS: [(&str, &[&str]); 4] = [
    ("nothing", &[]),
    ("--kv-scales", &["--kv-scales"]),
    ("--rotate", &["--rotate"]),
    ("--kv-scales --rotate", &["--kv-scales", "--rotate"]),
];

/// Whose tokenizer and small files the synthetic models have.
const BASE: &str = "tests/golden/default";
const SIDE_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"];
/// Ids below are ordinary tokens of that tokenizer.
const ORDINARY: u64 = 900;
/// Tiny checkpoints that are judged as well, and the ids below which tokens are ordinary. Rows of 64 and 112 values in the
/// first, of 256 and 64 in the second: where a format's blocks do not divide them, both quantisers take other ones.
const TINY: [(&str, u64); 2] = [(BASE, ORDINARY), ("tests/golden/real-head-dim", 300)];

/// Formats that llama.cpp's quantiser is asked for, and ours of at most as many bits.
const PAIRS: [(&str, &[&str]); 5] = [
    ("Q8_0", &["Q8_0", "int8-g128"]),
    ("Q4_K", &["Q4_K", "int4-g64"]),
    ("Q4_0", &["Q4_0", "int4-g64"]),
    ("Q3_K", &["Q3_K"]),
    ("Q2_K", &["Q2_K", "int2-g64-asym"]),
];

/// Formats of the vision encoder; the decoder stays as it is.
const VISION: [&str; 6] = ["F16", "Q8_0", "int8-g128", "int8-row", "int4-g64", "Q4_0"];

/// Pictures that are encoded.
const PICTURES: [&str; 2] = ["tests/golden/odd-sizes/640x97.png", "tests/golden/odd-sizes/113x450.png"];

/// Sizes of a synthetic model.
struct Shape {
    layers: usize,
    hidden: usize,
    /// Components of a head.
    head: usize,
    inner: usize,
    /// Blocks and width of the vision encoder.
    vision: (usize, usize),
}

/// What is measured.
struct Sizes {
    text: Shape,
    vision: Shape,
    /// Prompts and tokens of each.
    prompts: (usize, usize),
    tiny: usize,
    vision_formats: usize,
}

impl Sizes {
    fn new(quick: bool) -> Sizes {
        match quick {
            false => Sizes {
                text: Shape { layers: 6, hidden: 512, head: 64, inner: 1536, vision: (0, 64) },
                vision: Shape { layers: 1, hidden: 4096, head: 128, inner: 13_696, vision: (24, 1536) },
                prompts: (24, 128),
                tiny: TINY.len(),
                vision_formats: VISION.len(),
            },
            true => {
                let small =
                    |blocks| Shape { layers: 1, hidden: 256, head: 64, inner: 256, vision: (blocks, 64) };
                Sizes { text: small(0), vision: small(1), prompts: (2, 16), tiny: 1, vision_formats: 2 }
            }
        }
    }
}

impl Shape {
    /// The base's configuration with these sizes.
    fn config(&self) -> Result<Value> {
        let path = repo::root().join(BASE).join("config.json");
        let mut config: Value = serde_json::from_str(&repo::read(&path)?).map_err(|e| Error::Content {
            place: path.display().to_string(),
            wanted: "JSON".into(),
            found: e.to_string(),
        })?;
        let (blocks, width) = self.vision;
        let rope = json!({
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [self.head / 16, self.head * 3 / 32, self.head * 3 / 32],
        });
        for (part, field, value) in [
            ("text_config", "hidden_size", json!(self.hidden)),
            ("text_config", "intermediate_size", json!(self.inner)),
            ("text_config", "num_hidden_layers", json!(self.layers)),
            ("text_config", "num_attention_heads", json!(self.hidden / self.head)),
            ("text_config", "rope_parameters", rope),
            ("vision_config", "depth", json!(blocks)),
            ("vision_config", "hidden_size", json!(width)),
            ("vision_config", "num_heads", json!((width / 128).max(1))),
            ("vision_config", "image_size", json!(336)),
            ("vision_config", "out_hidden_size", json!(self.hidden)),
            ("vision_config", "intermediate_size", json!(self.inner)),
        ] {
            config[part][field] = value;
        }
        Ok(config)
    }
}

/// Everything that is run and written here.
struct Bench<'a> {
    program: PathBuf,
    peer: Option<&'a Path>,
    work: Work,
    sizes: Sizes,
}

impl Bench<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.work.0.join(name)
    }

    /// A checkpoint whose norms amplify some channels, as trained ones do: that is what importance is about.
    fn model(&self, name: &str, dtype: DType, shape: &Shape) -> Result<PathBuf> {
        let base = self.file(&format!("{name}-base"));
        std::fs::create_dir_all(&base).map_err(io_error("create", &base))?;
        for file in SIDE_FILES {
            let from = repo::root().join(BASE).join(file);
            std::fs::copy(&from, base.join(file)).map_err(io_error("copy", &from))?;
        }
        repo::write(&base.join("config.json"), &shape.config()?.to_string())?;
        let out = self.file(name);
        crate::synth::make(&base, &out, dtype, 0.5)?;
        Ok(out)
    }

    fn run(&self, arguments: &[&str], paths: &[(&str, &Path)]) -> Result<Value> {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        for (flag, path) in paths {
            command.arg(flag).arg(path);
        }
        let output = repo::output_of(&mut command)?;
        Ok(serde_json::from_slice(&output).unwrap_or(Value::Null))
    }

    /// Prompts of ordinary tokens: what an untrained model reads does not matter, as long as both read the same.
    fn samples(&self, name: &str, seed: u64, ordinary: u64) -> Result<PathBuf> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % ordinary
        };
        let mut text = String::new();
        for _ in 0..self.sizes.prompts.0 {
            let ids: Vec<u64> = (0..self.sizes.prompts.1).map(|_| next()).collect();
            let _ = writeln!(text, "{}", json!({ "input_ids": ids }));
        }
        let path = self.file(name);
        repo::write(&path, &text)?;
        Ok(path)
    }

    fn eval(&self, reference: &Path, models: &[PathBuf], samples: &Path, kv: &str) -> Result<Vec<Value>> {
        let mut paths = vec![("--reference", reference), ("--samples", samples)];
        paths.extend(models.iter().map(|m| ("--model", m.as_path())));
        let report = self.run(&["eval", "--json", "--kv", kv], &paths)?;
        let all = report["models"].as_array().cloned().unwrap_or_default();
        if all.len() != models.len() {
            return Err(Error::Content {
                place: "pocketglm eval".into(),
                wanted: format!("{} models", models.len()),
                found: all.len().to_string(),
            });
        }
        Ok(all)
    }

    /// A model's decoder by format, as Markdown. Its prompts have ids below `ordinary`.
    fn text(&self, model: &Path, ordinary: u64) -> Result<String> {
        let folder = Work::new("quality-text")?;
        let whole = folder.0.join("f32.gguf");
        self.run(&["quantize", "--policy", "F32", "--quiet"], &[("--model", model), ("--out", &whole)])?;
        // The decoder alone is judged; llama.cpp's files have no vision part either.
        let vision = folder.0.join("mmproj-f32.gguf");
        std::fs::remove_file(&vision).map_err(io_error("remove", &vision))?;
        let (seen, other) =
            (self.samples("seen.jsonl", 1, ordinary)?, self.samples("other.jsonl", 2, ordinary)?);
        let table = folder.0.join("table");
        self.run(
            &["calibrate", "--second-moments", "*", "--quiet"],
            &[("--model", &whole), ("--samples", &seen), ("--out", &table)],
        )?;
        let mut rows: Vec<(String, String, PathBuf)> = Vec::new();
        for (theirs, ours) in PAIRS {
            if let Some(peer) = self.peer {
                let out = folder.0.join(format!("llama-{theirs}.gguf"));
                let mut quantize = Command::new(peer);
                quantize.arg("quantize").args(["--type", theirs, "--pure", "--in"]).arg(&whole);
                repo::output_of(quantize.arg("--out").arg(&out))?;
                rows.push((theirs.into(), "llama.cpp".into(), out));
            }
            for format in ours {
                for method in ["round", "round --rotate", "search", "gptq", "awq"] {
                    let block = format.starts_with('Q');
                    let kind = if block { "gguf" } else { "pglm" };
                    let out = folder.0.join(format!("{theirs}-{format}-{method}.{kind}"));
                    let mut arguments = vec!["quantize", "--policy", format, "--quiet", "--method"];
                    arguments.extend(method.split(' '));
                    self.run(&arguments, &[("--model", &whole), ("--calibration", &table), ("--out", &out)])?;
                    rows.push(((*format).into(), format!("ours, {method}"), out));
                }
            }
        }
        let paths: Vec<PathBuf> = rows.iter().map(|r| r.2.clone()).collect();
        let found = self.eval(&whole, &paths, &other, "f32")?;
        let number = |v: &Value, name: &str| v[name].as_f64().unwrap_or(f64::NAN);
        let mut text = String::from(
            "| format | made by | bits | KL | of llama.cpp's | perplexity | same top |\n| --- | --- | --- | --- | --- | --- | --- |\n",
        );
        let mut theirs = f64::NAN;
        for ((format, by, _), v) in rows.iter().zip(&found) {
            let kl = number(v, "kl");
            if by == "llama.cpp" {
                theirs = kl;
            }
            let ratio = if theirs.is_nan() { String::new() } else { format!("{:.2}", kl / theirs) };
            let _ = writeln!(
                text,
                "| {format} | {by} | {:.3} | {kl:.2e} | {ratio} | {:.2} | {:.1} % |",
                number(v, "bits_per_weight"),
                number(v, "perplexity"),
                100.0 * number(v, "same_top")
            );
        }
        Ok(text)
    }

    /// The cache by format and by what is folded into the weights around it, for models with and without outliers, as
    /// Markdown.
    fn cache(&self) -> Result<String> {
        let (seen, other) =
            (self.samples("cache-seen.jsonl", 3, ORDINARY)?, self.samples("cache-other.jsonl", 4, ORDINARY)?);
        let mut text = String::from(
            "| outliers | folded | int8: KL | same top | int4: KL | same top | int4-row weights around it: KL |\n| --- | --- | --- | --- | --- | --- | --- |\n",
        );
        let number = |v: &Value, name: &str| v[name].as_f64().unwrap_or(f64::NAN);
        let policy = self.file("around.json");
        let rules =
            json!({ "rules": [{ "tensors": ["*.v_proj.weight", "*.o_proj.weight"], "format": "int4-row" }] });
        repo::write(&policy, &rules.to_string())?;
        for (what, outliers) in MODELS {
            let model = &self.model(&what.replace(' ', "-"), DType::F32, &self.sizes.text)?;
            add_outliers(&model.join("model.safetensors"), self.sizes.text.head, outliers)?;
            let table = self.file(&format!("{what}-table"));
            self.run(
                &["calibrate", "--quiet"],
                &[("--model", model), ("--samples", &seen), ("--out", &table)],
            )?;
            let (mut exact, mut rounded) = (Vec::new(), Vec::new());
            for (i, (_, flags)) in FOLDS.iter().enumerate() {
                for (kind, policy, list) in
                    [("exact", Path::new("F32"), &mut exact), ("rounded", policy.as_path(), &mut rounded)]
                {
                    let out = self.file(&format!("{what}-{kind}-{i}.pglm"));
                    let mut arguments = vec!["quantize", "--quiet"];
                    arguments.extend(*flags);
                    let paths = [
                        ("--policy", policy),
                        ("--model", model),
                        ("--calibration", &table),
                        ("--out", &out),
                    ];
                    self.run(&arguments, &paths)?;
                    list.push(out);
                }
            }
            let eight = self.eval(model, &exact, &other, "int8")?;
            let four = self.eval(model, &exact, &other, "int4")?;
            let weights = self.eval(model, &rounded, &other, "f32")?;
            for (((fold, _), eight), (four, weights)) in
                FOLDS.iter().zip(&eight).zip(four.iter().zip(&weights))
            {
                let _ = writeln!(
                    text,
                    "| {what} | {fold} | {:.2e} | {:.1} % | {:.2e} | {:.1} % | {:.2e} |",
                    number(eight, "kl"),
                    100.0 * number(eight, "same_top"),
                    number(four, "kl"),
                    100.0 * number(four, "same_top"),
                    number(weights, "kl")
                );
            }
            for file in exact.iter().chain(&rounded) {
                std::fs::remove_file(file).map_err(io_error("remove", file))?;
            }
        }
        Ok(text)
    }

    /// The vision encoder by format, as Markdown.
    fn vision(&self) -> Result<String> {
        let model = self.model("vision", DType::BF16, &self.sizes.vision)?;
        let samples = self.file("pictures.jsonl");
        let mut parts: Vec<Value> =
            PICTURES.map(|p| json!({ "type": "image", "image": repo::root().join(p) })).into();
        parts.push(
            json!({ "type": "text", "text": "What is on the screen? Tap the button and open the settings." }),
        );
        repo::write(&samples, &json!({ "messages": [{ "role": "user", "content": parts }] }).to_string())?;
        let mut text = String::from(
            "| format | bits | relative L2 | cosine | least cosine | KL | same top |\n| --- | --- | --- | --- | --- | --- | --- |\n",
        );
        for format in &VISION[..self.sizes.vision_formats] {
            let policy = self.file("vision-policy.json");
            let rules = json!({ "name": format, "rules": [
                { "tensors": "model.visual.*", "format": format },
                { "tensors": "*", "format": "keep" },
            ] });
            repo::write(&policy, &rules.to_string())?;
            let out = self.file(&format!("vision-{format}.pglm"));
            self.run(
                &["quantize", "--quiet"],
                &[("--policy", &policy), ("--model", &model), ("--out", &out)],
            )?;
            let found = self.eval(&model, std::slice::from_ref(&out), &samples, "f32")?;
            std::fs::remove_file(&out).map_err(io_error("remove", &out))?;
            let Some(v) = found.first() else { continue };
            let p = &v["pictures"];
            let number = |v: &Value, name: &str| v[name].as_f64().unwrap_or(f64::NAN);
            let _ = writeln!(
                text,
                "| {format} | {:.3} | {:.2e} | {:.6} | {:.6} | {:.2e} | {:.1} % |",
                number(v, "bits_per_weight"),
                number(p, "relative_l2"),
                number(p, "cosine"),
                number(p, "least_cosine"),
                number(v, "kl"),
                100.0 * number(v, "same_top")
            );
        }
        Ok(text)
    }
}

/// Makes some rows or columns of projections larger, the same components of each head, in a checkpoint of f32.
fn add_outliers(path: &Path, head: usize, projections: &[(&str, bool)]) -> Result<()> {
    let bad = |found: &str| Error::Content {
        place: path.display().to_string(),
        wanted: "a safetensors file with these projections".into(),
        found: found.into(),
    };
    let mut file = std::fs::read(path).map_err(io_error("read", path))?;
    let length = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b) as usize);
    let length = length.ok_or_else(|| bad("no header"))?;
    let (header, data) = file.split_at_mut_checked(8 + length).ok_or_else(|| bad("a short header"))?;
    let header: Value =
        serde_json::from_slice(header.get(8..).unwrap_or_default()).map_err(|e| bad(&e.to_string()))?;
    for (projection, rows) in projections {
        let tensors = header.as_object().into_iter().flatten();
        let mut found = 0;
        for (_, tensor) in tensors.filter(|(name, _)| name.contains(projection)) {
            let number = |v: &Value| v.as_u64().unwrap_or(0) as usize;
            let width = tensor["shape"].get(1).map_or(1, number).max(1);
            let [from, to] = [0, 1].map(|i| number(&tensor["data_offsets"][i]));
            let values = data.get_mut(from..to).ok_or_else(|| bad("offsets past the end"))?;
            for (i, four) in values.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let component = if *rows { i / width } else { i % width };
                if component % head % OUTLIERS.0 == OUTLIERS.0 / 2 {
                    *four = (f32::from_le_bytes(*four) * OUTLIERS.1).to_le_bytes();
                }
            }
            found += 1;
        }
        if found == 0 {
            return Err(bad(&format!("no `{projection}`")));
        }
    }
    std::fs::write(path, file).map_err(io_error("write", path))
}

/// The section of the report.
pub fn section(peer: Option<&Path>, quick: bool) -> Result<String> {
    let bench =
        Bench { program: build_program()?, peer, work: Work::new("quality")?, sizes: Sizes::new(quick) };
    let Sizes {
        text: Shape { layers, hidden, inner, .. },
        vision: Shape { vision: (blocks, width), .. },
        prompts,
        ..
    } = bench.sizes;
    let intro = format!(
        "Synthetic weights, since no trained model belongs to the repository: normally distributed matrices, and norms \
         whose channels differ (standard deviation 0.5). Ratios count, not sizes: an untrained model amplifies errors.\n\n\
         The decoder: {layers} layers, {hidden} wide, MLP {inner}, 1024 tokens; {} predictions. llama.cpp's files come from \
         its own quantiser (`peers quantize --pure`, no importance matrix), ours from the same F32 GGUF file: plain \
         rounding (with attention's values rotated as well), and search, GPTQ and AWQ with a calibration table of other \
         samples. `pocketglm eval` judges all; every \
         matrix has the format, the embedding table and the head too. Formats whose name begins with Q are GGUF's, in \
         GGUF files with the same bits on both sides; `bits` are those of the file that was judged, of a `.pglm` file the \
         kernels' panels.\n\n",
        prompts.0 * (prompts.1 - 1)
    );
    let mut text = bench.text(&bench.model("text", DType::F32, &bench.sizes.text)?, ORDINARY)?;
    for (model, ordinary) in &TINY[..bench.sizes.tiny] {
        let _ = write!(
            text,
            "\nThe same of the decoder in `{model}`. Some of its rows are no whole number of a format's blocks; both \
             quantisers then take another format, of the same size on both sides.\n\n{}",
            bench.text(&repo::root().join(model), *ordinary)?
        );
    }
    let cache = format!(
        "\nThe cache by format, and what is folded into the weights around it (F32, so that nothing else is lost), against \
         a cache in f32. Where a model of the same sizes has outliers, every {}th component of a head is {} times as large: \
         in the rows that make keys and values, or in the columns behind the values. The last column has the cache in f32 and \
         int4-row weights (of the least squared error) before and behind the values.\n\n{}",
        OUTLIERS.0,
        OUTLIERS.1,
        bench.cache()?
    );
    let middle = format!(
        "\nThe vision encoder: {blocks} blocks, {width} wide, two pictures (640x97, 113x450), a decoder of {} layer in bf16. \
         The merger's rows against those of the original (bf16), and what the difference does to the decoder's \
         predictions.\n\n",
        bench.sizes.vision.layers
    );
    Ok(intro + &text + &cache + &middle + &bench.vision()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_tables_has_numbers() {
        let text = section(None, true).unwrap();
        let rows: Vec<&str> =
            text.lines().filter(|l| l.starts_with("| Q") || l.starts_with("| int")).collect();
        // Nine formats with five methods each for two models, and those of the vision encoder but F16.
        assert_eq!(rows.len(), 2 * 9 * 5 + 1, "{text}");
        let cache = |l: &&str| MODELS.iter().any(|(what, _)| l.starts_with(&format!("| {what} |")));
        assert_eq!(text.lines().filter(cache).count(), MODELS.len() * FOLDS.len(), "{text}");
        assert!(!text.contains("NaN"), "{text}");
    }
}
