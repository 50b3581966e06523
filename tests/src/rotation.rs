//! Rotated values of attention: the same results in f32, less lost where components of a head differ, and what is refused.

use std::path::{Path, PathBuf};

use pocketglm::quantise::{
    CalibrateOptions, EvalOptions, Method, Policy, QuantiseOptions, Quantiser, Simulation, calibrate,
    evaluate,
};
use pocketglm::{Engine, EngineOptions, Error, KvFormat, Result};

use crate::checkpoints::edited;
use crate::golden::{path, relative_l2};
use crate::quantise::samples;
use crate::support::{Folder, case, options};

/// The decoder's matrices around attention's values.
const AROUND: &str = r#"{"tensors": ["*.v_proj.weight", "*.o_proj.weight"], "format": "int4-row"}"#;

fn rotating(name: &str) -> QuantiseOptions {
    let mut policy = Policy::load(name).unwrap();
    policy.rotate = true;
    QuantiseOptions { threads: 2, ..QuantiseOptions::new(policy) }
}

fn rules(rules: &str, rotate: bool) -> QuantiseOptions {
    let json = format!(r#"{{"rotate": {rotate}, "rules": [{rules}]}}"#);
    QuantiseOptions { threads: 2, ..QuantiseOptions::new(Policy::from_json("p", json.as_bytes()).unwrap()) }
}

fn write(model: impl AsRef<Path>, out: &Path, options: QuantiseOptions) -> Result<()> {
    Quantiser::open(model, options)?.write_pglm(out)
}

fn refused<T>(result: Result<T>, wanted: &str) {
    let error = result.err().unwrap_or_else(|| panic!("nothing was refused, wanted {wanted:?}"));
    assert!(matches!(&error, Error::Policy { what, .. } if what.contains(wanted)), "{error}");
}

fn calibrated(folder: &Folder, model: &Path, name: &str) -> PathBuf {
    let samples = samples(folder, "calibration.jsonl", 77, 12);
    let out = folder.file(name);
    let options = CalibrateOptions {
        engine: options(),
        second_moments: vec!["*".into()],
        ..CalibrateOptions::default()
    };
    calibrate(model, &samples, &out, &options).unwrap();
    out
}

/// Encoded picture and logits of a prompt with one, and a layer's weights.
fn results(model: impl AsRef<Path>) -> [Vec<f32>; 2] {
    let engine = Engine::open(model, options()).unwrap();
    let trace = engine.trace(&engine.prompt(&case("default", "image").request).unwrap()).unwrap();
    ["image_embeds", "logits"].map(|name| trace.get(name).unwrap().to_f32().unwrap().into_owned())
}

/// A checkpoint in bf16 in which every eighth row, or column, of such a projection is so many times as large, a power of
/// two.
fn with_outliers(checkpoint: &str, projection: &str, rows: bool, times: f32) -> Folder {
    let folder = Folder::copy_of(checkpoint);
    let file = edited(&folder.read("model.safetensors"), |tensors| {
        for (name, (_, shape, bytes)) in tensors.iter_mut().filter(|(name, _)| name.contains(projection)) {
            let width = if shape.len() == 2 { shape[1] } else { 1 };
            let halves = bytes.as_chunks_mut::<2>().0;
            assert_eq!(halves.len(), shape.iter().product::<usize>(), "{name} is not of bf16");
            for (i, half) in halves.iter_mut().enumerate() {
                if (if rows { i / width } else { i % width }) % 8 == 3 {
                    let value = f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16) * times;
                    *half = ((value.to_bits() >> 16) as u16).to_le_bytes();
                }
            }
        }
    });
    folder.write("model.safetensors", file);
    folder
}

#[test]
fn a_rotation_changes_other_weights_and_the_same_results_in_f32() {
    let folder = Folder::new();
    for checkpoint in ["default", "real-head-dim", "kv-heads-1", "kv-heads-8-2", "patch-8"] {
        let out = folder.file(&format!("{checkpoint}.pglm"));
        write(path(checkpoint), &out, rotating("F32")).unwrap();
        let [original, rotated] = [path(checkpoint), out.clone()].map(results);
        for (a, b) in original.iter().zip(&rotated) {
            let apart = relative_l2(a, b);
            assert!(apart < 1e-5 && a != b, "{checkpoint}: {apart:.1e}");
        }
        let bytes = std::fs::read(&out).unwrap();
        assert!(String::from_utf8_lossy(&bytes[..1 << 14]).contains(r#"\"rotate\":true"#), "{checkpoint}");
    }
}

#[test]
fn rotated_values_lose_less_where_components_differ() {
    let folder = Folder::new();
    let other = samples(&folder, "other.jsonl", 41, 6);
    let kl = |model: &Folder, kv: KvFormat, pair: [QuantiseOptions; 2]| -> [f64; 2] {
        let models: Vec<PathBuf> = ["plain.pglm", "rotated.pglm"].map(|name| folder.file(name)).into();
        for (out, options) in models.iter().zip(pair) {
            write(model.path(), out, QuantiseOptions { overwrite: true, ..options }).unwrap();
        }
        let eval = EvalOptions { engine: options(), kv, ..EvalOptions::default() };
        let (_, found) = evaluate(&models, model.path(), &other, &eval).unwrap();
        [found[0].kl, found[1].kl]
    };
    // Outliers among the values are the cache's.
    let model = with_outliers("real-head-dim", ".v_proj.", true, 16.0);
    for kv in [KvFormat::Int8, KvFormat::Int4] {
        let keep = QuantiseOptions { policy: Policy::load("keep").unwrap(), ..rotating("F32") };
        let [plain, rotated] = kl(&model, kv, [keep, rotating("F32")]);
        println!("cache of {kv}: KL {plain:.2e}, rotated {rotated:.2e}");
        assert!(rotated < 0.8 * plain, "{kv}: {plain} {rotated}");
    }
    // Outliers among the columns behind them are the weights'.
    let model = with_outliers("real-head-dim", ".o_proj.", false, 16.0);
    let [plain, rotated] = kl(&model, KvFormat::F32, [rules(AROUND, false), rules(AROUND, true)]);
    println!("weights: KL {plain:.2e}, rotated {rotated:.2e}");
    assert!(rotated < 0.8 * plain, "{plain} {rotated}");
}

#[test]
fn statistics_of_the_output_projections_input_are_rotated_with_it() {
    let folder = Folder::new();
    let model = path("real-head-dim");
    let rotated = folder.file("f32.pglm");
    write(&model, &rotated, rotating("F32")).unwrap();
    let (before, after) =
        (calibrated(&folder, &model, "table"), calibrated(&folder, &rotated, "rotated-table"));
    let rule = r#"{"tensors": "*.o_proj.weight", "format": "int2-row-asym", "method": "gptq"},
        {"tensors": "*", "format": "F32"}"#;
    // Rotated while it is quantised, and calibrated after the rotation.
    let [at_once, later] = [folder.file("at-once.pglm"), folder.file("later.pglm")];
    write(&model, &at_once, QuantiseOptions { calibration: Some(before.clone()), ..rules(rule, true) })
        .unwrap();
    write(&rotated, &later, QuantiseOptions { calibration: Some(after), ..rules(rule, false) }).unwrap();
    let [original, at_once, later] = [model.clone(), at_once, later].map(|m| results(m)[1].clone());
    let (apart, lost) = (relative_l2(&at_once, &later), relative_l2(&later, &original));
    println!("apart {apart:.2e}, lost {lost:.2e}");
    assert!(apart < 0.3 * lost && lost > 1e-3, "{apart} {lost}");
    // With every method, and with scales of the cache's keys.
    for method in Method::ALL {
        let out = folder.file(&format!("{method}.pglm"));
        let policy = rotating("int4-g64").policy.with_method(method);
        let options = QuantiseOptions {
            policy,
            kv_scales: true,
            calibration: Some(before.clone()),
            ..rotating("keep")
        };
        write(&model, &out, options).unwrap();
        let lost = relative_l2(&results(&out)[1], &original);
        assert!(lost < 0.6, "{method}: {lost}");
    }
}

#[test]
fn what_a_rotation_does_not_fold_into_is_refused_or_named() {
    let folder = Folder::new();
    let out = folder.file("out.pglm");
    // Matrices that stay in 16 bits would be rounded once more.
    refused(write(path("bf16"), &out, rotating("keep")), "nothing to rotate");
    let partly = rules(r#"{"tensors": "model.visual.*", "format": "int8-g64"}"#, true);
    let plan = Quantiser::open(path("bf16"), partly).unwrap().plan().clone();
    let of = |name: &str| plan.tensors.iter().find(|t| t.name == name).unwrap();
    let (text, vision) = ("model.language_model.layers.0.self_attn.v_proj", "model.visual.blocks.0.attn");
    assert!(of(&format!("{vision}.qkv.weight")).rotated && of(&format!("{vision}.proj.weight")).rotated);
    let (weight, bias) = (of(&format!("{text}.weight")), of(&format!("{text}.bias")));
    assert!(!weight.rotated && weight.note.as_ref().unwrap().ends_with("stays BF16"), "{weight:?}");
    assert!(!bias.rotated && bias.to.name() == "BF16", "{bias:?}");

    let table = calibrated(&folder, &path("default"), "table");
    let fixed = QuantiseOptions { static_inputs: true, calibration: Some(table), ..rotating("int8") };
    refused(write(path("default"), &out, fixed), "no ranges of rotated inputs");
    refused(write(path("hear/base"), &out, rotating("int8-row")), "found a speech checkpoint");
    let simulate = Some(Simulation { policy: rotating("int4").policy, static_inputs: None });
    refused(Engine::open(path("default"), EngineOptions { simulate, ..options() }), "cannot be simulated");
    assert!(!out.exists());
}
