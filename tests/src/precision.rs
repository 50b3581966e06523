//! Mixed precision without a file, fixed ranges of inputs, and calibrated scales of the KV cache.

use std::path::{Path, PathBuf};

use pocketglm::quantise::{
    CalibrateOptions, EvalOptions, Method, Policy, QuantiseOptions, Quantiser, Samples, Simulation,
    calibrate, evaluate,
};
use pocketglm::{Engine, EngineOptions, Error, KvFormat, Result};

use crate::checkpoints::edited;
use crate::golden::{path, relative_l2};
use crate::quantise::samples;
use crate::support::{Folder, Random, case, options};

fn quantise(name: &str, table: Option<&Path>) -> QuantiseOptions {
    let calibration = table.map(Path::to_owned);
    QuantiseOptions { threads: 2, calibration, ..QuantiseOptions::new(Policy::load(name).unwrap()) }
}

fn table(folder: &Folder, model: &Path, samples: &Samples) -> PathBuf {
    let out = folder.file("calibration.safetensors");
    let options = CalibrateOptions { engine: options(), overwrite: true, ..CalibrateOptions::default() };
    calibrate(model, samples, &out, &options).unwrap();
    out
}

fn simulated(policy: &str, static_inputs: Option<&Path>) -> EngineOptions {
    let policy = Policy::load(policy).unwrap();
    let simulate = Some(Simulation { policy, static_inputs: static_inputs.map(Path::to_owned) });
    EngineOptions { simulate, ..options() }
}

/// Encoded picture and logits of a prompt with one.
fn results(model: impl AsRef<Path>, options: EngineOptions) -> Result<[Vec<f32>; 2]> {
    let engine = Engine::open(model, options)?;
    let trace = engine.trace(&engine.prompt(&case("default", "image").request)?)?;
    Ok(["image_embeds", "logits"].map(|name| trace.get(name).unwrap().to_f32().unwrap().into_owned()))
}

/// The part of the rows of encoded pictures that are the same but for rounding in f32. A value that lies between two
/// codes may fall to either, and takes its row along.
fn same_rows(a: &[f32], b: &[f32]) -> f64 {
    let rows: Vec<bool> = a.chunks(64).zip(b.chunks(64)).map(|(a, b)| relative_l2(a, b) < 1e-5).collect();
    rows.iter().filter(|same| **same).count() as f64 / rows.len() as f64
}

#[test]
fn a_simulated_policy_computes_what_its_file_does() {
    let folder = Folder::new();
    let original = results(path("default"), options()).unwrap();
    let mut last: Option<Vec<f32>> = None;
    for name in ["int8", "int4", "int2", "int4-g64", "Q8_0", "Q4_0", "Q5_1", "F16"] {
        let out = folder.file(&format!("{name}.pglm"));
        Quantiser::open(path("default"), quantise(name, None)).unwrap().write_pglm(&out).unwrap();
        for fuse in [true, false] {
            let [rows, logits] = results(&out, EngineOptions { fuse, ..options() }).unwrap();
            let [found_rows, found] =
                results(path("default"), EngineOptions { fuse, ..simulated(name, None) }).unwrap();
            let same = same_rows(&found_rows, &rows);
            let (apart, lost) = (relative_l2(&found, &logits), relative_l2(&logits, &original[1]));
            println!(
                "{name} fuse {fuse}: {same:.2} of the rows, logits {apart:.1e}; the file lost {lost:.1e}"
            );
            assert!(same >= 0.5 && apart < 0.5 * lost, "{name} {fuse}: {same} {apart} {lost}");
            // The negative control: another format's rows, unless both are of eight bits in the vision encoder.
            if let Some(last) = last.filter(|_| name.starts_with(['Q', 'F'])) {
                assert_eq!(same_rows(&found_rows, &last), 0.0, "{name}");
            }
            last = None;
            if !fuse {
                last = Some(found_rows);
            }
        }
    }
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let folder = Folder::new();
    let policy = Policy::load("int4").unwrap().with_method(Method::Gptq);
    let simulate = Some(Simulation { policy, static_inputs: None });
    let found = Engine::open(path("default"), EngineOptions { simulate, ..options() }).err().unwrap();
    assert!(matches!(&found, Error::Policy { what, .. } if what.contains("write a file")), "{found}");
    let out = folder.file("a.pglm");
    Quantiser::open(path("default"), quantise("int8", None)).unwrap().write_pglm(&out).unwrap();
    let found = Engine::open(&out, simulated("int4", None)).err().unwrap();
    assert!(matches!(found, Error::AlreadyQuantised { .. }), "{found}");
}

#[test]
fn eval_judges_policies_without_files_and_pictures_by_themselves() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 11, 3);
    let mut models = Vec::new();
    for name in ["int8", "int4"] {
        models.push(folder.file(&format!("{name}.pglm")));
        let quantiser = Quantiser::open(path("default"), quantise(name, None)).unwrap();
        quantiser.write_pglm(&models[models.len() - 1]).unwrap();
    }
    let simulate = ["int8", "int4"]
        .map(|name| Simulation { policy: Policy::load(name).unwrap(), static_inputs: None })
        .into();
    let eval = EvalOptions { engine: options(), simulate, ..EvalOptions::default() };
    let (_, all) = evaluate(&models, path("default"), &samples, &eval).unwrap();
    assert_eq!(all.len(), 4);
    for (file, simulated) in all[..2].iter().zip(&all[2..]) {
        assert!((file.kl / simulated.kl - 1.0).abs() < 0.1, "{file:?} {simulated:?}");
        assert!((file.perplexity / simulated.perplexity - 1.0).abs() < 0.01, "{file:?} {simulated:?}");
        assert_eq!(file.bytes, simulated.bytes);
        let (a, b) = (file.pictures.unwrap(), simulated.pictures.unwrap());
        assert!(a.pictures == 1 && a.rows > 0 && a.rows == b.rows, "{a:?} {b:?}");
        assert!(a.relative_l2 > 1e-4 && (a.relative_l2 / b.relative_l2 - 1.0).abs() < 0.1, "{a:?} {b:?}");
        assert!(a.cosine < 1.0 && a.cosine > 0.99 && a.least_cosine <= a.cosine, "{a:?}");
    }
}

#[test]
fn inputs_keep_the_ranges_of_the_calibration_table() {
    let folder = Folder::new();
    let seen = samples(&folder, "seen.jsonl", 21, 12);
    let table = table(&folder, &path("default"), &seen);
    for name in ["int8", "int4"] {
        let fixed = QuantiseOptions { static_inputs: true, ..quantise(name, Some(&table)) };
        let (out, free) = (folder.file(&format!("{name}-fixed.pglm")), folder.file(&format!("{name}.pglm")));
        Quantiser::open(path("default"), fixed).unwrap().write_pglm(&out).unwrap();
        Quantiser::open(path("default"), quantise(name, Some(&table))).unwrap().write_pglm(&free).unwrap();
        let [fixed, free] = [&out, &free].map(|file| results(file, options()).unwrap());
        // A scale for a whole tensor loses more than one for each block, but not much.
        assert!((1e-4..0.3).contains(&relative_l2(&fixed[1], &free[1])), "{name}");
        if name == "int8" {
            // Searched scales differ with the table's importance, which is not simulated; rounded ones do not.
            let simulated = results(path("default"), simulated(name, Some(&table))).unwrap();
            for (a, b) in simulated.iter().zip(&fixed) {
                assert!(relative_l2(a, b) < 0.05, "{}", relative_l2(a, b));
            }
        }
    }
}

#[test]
fn ranges_that_are_absent_or_of_another_model_are_refused() {
    let folder = Folder::new();
    let fixed = |table: Option<&Path>| QuantiseOptions { static_inputs: true, ..quantise("int8", table) };
    let none = Quantiser::open(path("default"), fixed(None)).err().unwrap();
    assert!(none.to_string().contains("--static-inputs needs a calibration table"), "{none}");
    let text = folder.file("text.txt");
    std::fs::write(&text, "open the settings and tap on wifi").unwrap();
    let table = table(&folder, &path("default"), &Samples::read(&text).unwrap());
    // No picture was seen, so the vision encoder has no ranges.
    for found in [
        Quantiser::open(path("default"), fixed(Some(&table))).err().unwrap(),
        Engine::open(path("default"), simulated("int8", Some(&table))).err().unwrap(),
    ] {
        assert!(
            matches!(&found, Error::Calibration { what, .. } if what.contains("model.visual")),
            "{found}"
        );
    }
    for found in [
        Quantiser::open(path("bf16"), fixed(Some(&table))).err().unwrap(),
        Engine::open(path("bf16"), simulated("int8", Some(&table))).err().unwrap(),
    ] {
        let other = matches!(&found, Error::Calibration { what, .. } if what.contains("another model"));
        assert!(other, "{found}");
    }
    let kv = QuantiseOptions { kv_scales: true, ..quantise("keep", None) };
    let none = Quantiser::open(path("default"), kv).err().unwrap();
    assert!(none.to_string().contains("--kv-scales needs a calibration table"), "{none}");
}

/// The checkpoint `default` with keys and values whose components differ in size by up to `2^6`, and the same results.
fn uneven(seed: u64) -> Folder {
    let folder = Folder::copy_of("default");
    let mut random = Random::new(seed);
    let file = edited(&folder.read("model.safetensors"), |tensors| {
        let mut scaled = |name: &str, by: &dyn Fn(usize, usize) -> f32| {
            let Some((_, shape, bytes)) = tensors.get_mut(name) else { return };
            let width = if shape.len() == 2 { shape[1] } else { 1 };
            for (i, four) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *four = (f32::from_le_bytes(*four) * by(i / width, i % width)).to_le_bytes();
            }
        };
        let (kv_heads, d) = (2, 16);
        for layer in 0..3 {
            // Rotation mixes neighbours, which stay alike.
            let mut scales = || -> Vec<f32> {
                let pairs: Vec<i32> = (0..kv_heads * d / 2).map(|_| random.below(7) as i32 - 3).collect();
                (0..kv_heads * d).map(|c| 2f32.powi(pairs[c / 2])).collect()
            };
            let (k, v) = (scales(), scales());
            let of_query = |s: &[f32], c: usize| 1.0 / s[c / d / 2 * d + c % d];
            for part in ["weight", "bias"] {
                let name = |p: &str| format!("model.language_model.layers.{layer}.self_attn.{p}.{part}");
                scaled(&name("q_proj"), &|r, _| of_query(&k, r));
                scaled(&name("k_proj"), &|r, _| k[r]);
                scaled(&name("v_proj"), &|r, _| v[r]);
                scaled(&name("o_proj"), &|_, c| of_query(&v, c));
            }
        }
    });
    folder.write("model.safetensors", file);
    folder
}

#[test]
fn calibrated_scales_of_the_cache_change_nothing_in_f32_and_help_where_components_differ() {
    let folder = Folder::new();
    let model = uneven(3);
    let original = results(path("default"), options()).unwrap();
    let same = relative_l2(&results(model.path(), options()).unwrap()[1], &original[1]);
    assert!(same < 1e-5, "the uneven model is another one: {same}");
    let table = table(&folder, model.path(), &samples(&folder, "seen.jsonl", 31, 12));
    let scaled = folder.file("scaled.pglm");
    let with = QuantiseOptions { kv_scales: true, ..quantise("keep", Some(&table)) };
    Quantiser::open(model.path(), with).unwrap().write_pglm(&scaled).unwrap();
    let same = relative_l2(&results(&scaled, options()).unwrap()[1], &original[1]);
    assert!(same < 1e-5, "{same}");

    let other = samples(&folder, "other.jsonl", 32, 6);
    for kv in [KvFormat::Int8, KvFormat::Int4] {
        let eval = EvalOptions { engine: options(), kv, ..EvalOptions::default() };
        let models = [model.path().to_owned(), scaled.clone()];
        let (_, found) = evaluate(&models, model.path(), &other, &eval).unwrap();
        println!("{kv}: KL {:.2e}, with calibrated scales {:.2e}", found[0].kl, found[1].kl);
        assert!(found[1].kl < 0.5 * found[0].kl, "{kv}: {found:?}");
    }
    // In one file with quantised weights, whose inputs are fixed as well.
    let both = QuantiseOptions { kv_scales: true, static_inputs: true, ..quantise("int8", Some(&table)) };
    let out = folder.file("both.pglm");
    Quantiser::open(model.path(), both).unwrap().write_pglm(&out).unwrap();
    let lost = relative_l2(&results(&out, options()).unwrap()[1], &original[1]);
    println!("eight bits with fixed inputs: {lost:.2}");
    assert!(lost < 0.5, "{lost}");
}
