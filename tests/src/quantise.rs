//! Quantising: what is lost with how many bits, what is refused, and that no accident leaves a damaged file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pocketglm::quantise::{
    CalibrateOptions, CalibrationTable, EvalOptions, Evaluation, Method, Policy, QuantiseOptions, Quantiser,
    Samples, Simulation, calibrate, evaluate,
};
use pocketglm::{Engine, Error, Result};

use crate::checkpoints::edited;
use crate::golden::{CHECKPOINTS, cases, path, relative_l2};
use crate::support::{Folder, Random, answer, engine, exactly, ids_prompt, options};

/// Set for a child process of these tests: where it writes.
const CHILD: &str = "POCKETGLM_TEST_QUANTISE_TO";

fn policy(name: &str) -> QuantiseOptions {
    QuantiseOptions { threads: 2, ..QuantiseOptions::new(Policy::load(name).unwrap()) }
}

fn with_method(name: &str, method: Method, table: Option<&Path>) -> QuantiseOptions {
    let policy = Policy::load(name).unwrap().with_method(method);
    let calibration = table.map(Path::to_owned);
    QuantiseOptions { threads: 2, calibration, ..QuantiseOptions::new(policy) }
}

fn write(model: impl AsRef<Path>, out: impl AsRef<Path>, options: QuantiseOptions) -> Result<()> {
    Quantiser::open(model, options)?.write_pglm(out)
}

fn error<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(e) => e,
    }
}

/// Words in any order, a request with a picture, and token ids.
pub fn samples(folder: &Folder, name: &str, seed: u64, prompts: usize) -> Samples {
    const WORDS: &str = "the quick fox opens settings and taps on wifi then scrolls down to find battery usage \
        please answer with action tap element swipe 打开 设置 点击 按钮 搜索 天气 今天";
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut random = Random::new(seed);
    let mut lines = String::new();
    for _ in 0..prompts {
        let text: Vec<&str> = (0..40).map(|_| words[random.below(words.len())]).collect();
        lines.push_str(&format!("{{\"text\": \"{}\"}}\n", text.join(" ")));
    }
    let picture = serde_json::json!(path("odd-sizes/57x31.png"));
    let parts = format!(
        r#"[{{"type": "image", "image": {picture}}}, {{"type": "text", "text": "What is on the screen?"}}]"#
    );
    lines.push_str(&format!("{{\"messages\": [{{\"role\": \"user\", \"content\": {parts}}}]}}\n"));
    let ids: Vec<usize> = (0..40).map(|_| random.below(300)).collect();
    lines.push_str(&format!("{{\"input_ids\": {ids:?}}}\n"));
    fs::write(folder.file(name), lines).unwrap();
    Samples::read(folder.file(name)).unwrap()
}

fn compare(models: &[PathBuf], reference: &str, samples: &Samples) -> Vec<Evaluation> {
    let options = EvalOptions { engine: options(), ..EvalOptions::default() };
    let (reference, all) = evaluate(models, path(reference), samples, &options).unwrap();
    assert!(reference.perplexity.is_finite() && reference.perplexity > 1.0);
    assert!(all.iter().all(|m| m.positions >= 100), "{all:?}");
    all
}

#[test]
fn a_model_compared_with_itself_differs_in_nothing() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 1, 2);
    write(path("default"), folder.file("same.pglm"), policy("keep")).unwrap();
    for m in compare(&[path("default"), folder.file("same.pglm")], "default", &samples) {
        assert_eq!((m.kl, m.kl_max, m.same_top), (0.0, 0.0, 1.0));
    }
    let (theirs, ours) = (engine("default"), Engine::open(folder.file("same.pglm"), options()).unwrap());
    for case in cases("default") {
        let (a, b) = (theirs.prompt(&case.request).unwrap(), ours.prompt(&case.request).unwrap());
        let wanted = answer(&mut theirs.session(), &a, &exactly(12));
        assert_eq!(answer(&mut ours.session(), &b, &exactly(12)), wanted, "{}", case.name);
    }
}

#[test]
fn eight_bits_keep_the_predictions_of_every_golden_model() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 2, 4);
    let mut worst: f64 = 1.0;
    for (checkpoint, _) in CHECKPOINTS {
        let out = folder.file(&format!("{checkpoint}.pglm"));
        write(path(checkpoint), &out, policy("int8")).unwrap();
        let m = &compare(&[out], checkpoint, &samples)[0];
        println!("{checkpoint}: KL {:.2e}, same top {:.3}, {:.3} bits", m.kl, m.same_top, m.bits_per_weight);
        assert!(m.kl < MOST_KL_OF_INT8 && m.kl > 0.0 && m.positions > 300, "{checkpoint}: {m:?}");
        worst = worst.min(m.same_top);
    }
    assert!(worst >= LEAST_SAME_OF_INT8, "{worst}");
}

/// Measured over the golden models, whose random weights amplify errors as no trained model does: 0.013 and 0.89.
const MOST_KL_OF_INT8: f64 = 0.1;
const LEAST_SAME_OF_INT8: f64 = 0.8;

#[test]
fn more_bits_lose_less_and_a_search_loses_less_than_rounding() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 3, 6);
    let mut sums = [0.0; 2];
    for checkpoint in ["default", "bf16", "real-head-dim"] {
        let mut models = Vec::new();
        for method in [Method::Round, Method::Search] {
            for format in ["int8-g64", "int4-g32", "int2-g32-asym"] {
                let out = folder.file(&format!("{checkpoint}-{format}-{method}.pglm"));
                write(path(checkpoint), &out, with_method(format, method, None)).unwrap();
                models.push(out);
            }
        }
        let found = compare(&models, checkpoint, &samples);
        let kl: Vec<f64> = found.iter().map(|m| m.kl).collect();
        println!("{checkpoint}: {kl:.3?}");
        for three in kl.chunks(3) {
            assert!(three[0] * 4.0 < three[1] && three[1] * 2.0 < three[2], "{checkpoint}: {kl:?}");
        }
        assert!(found[0].bytes > found[1].bytes && found[1].bytes > found[2].bytes);
        for (round, search) in kl[..3].iter().zip(&kl[3..]) {
            sums = [sums[0] + round, sums[1] + search];
        }
    }
    assert!(sums[1] < sums[0], "search {}, rounding {}", sums[1], sums[0]);
}

/// Of no weight.
const NONE: &str = "none";

fn calibrated(folder: &Folder, model: &str, second_moments: &str) -> PathBuf {
    let samples = samples(folder, "calibration.jsonl", 77, 24);
    let out = folder.file(&format!("{model}.calibration"));
    let options = CalibrateOptions {
        engine: options(),
        second_moments: Some(second_moments).filter(|p| *p != NONE).map(str::to_owned).into_iter().collect(),
        overwrite: true,
        ..CalibrateOptions::default()
    };
    let done = calibrate(path(model), &samples, &out, &options).unwrap();
    assert_eq!((done.prompts, done.pictures, done.unseen, done.left_out), (26, 1, 0, 0));
    assert_eq!(done.second_moments > 0, second_moments != NONE);
    out
}

#[test]
fn error_feedback_and_scaling_by_activations_beat_rounding() {
    let folder = Folder::new();
    let other = samples(&folder, "s.jsonl", 4, 6);
    let table = calibrated(&folder, "default", "*");
    let mut models = Vec::new();
    for method in Method::ALL {
        for format in ["int4", "int2", "int8-g32"] {
            let out = folder.file(&format!("{format}-{method}.pglm"));
            write(path("default"), &out, with_method(format, method, Some(&table))).unwrap();
            models.push(out);
        }
    }
    let kl: Vec<f64> = compare(&models, "default", &other).iter().map(|m| m.kl).collect();
    println!("{kl:.4?}");
    let [round, _, gptq, awq] = [0, 1, 2, 3].map(|m| &kl[3 * m..3 * m + 3]);
    assert!(gptq[0] < 0.9 * round[0] && gptq[1] < 0.9 * round[1], "{kl:?}");
    assert!(awq[0] < round[0] && awq[1] < round[1], "{kl:?}");
    // With eight bits next to nothing is lost, so that scales that did not cancel would show.
    assert!(awq[2] < 2.0 * round[2], "{kl:?}");
}

#[test]
fn a_calibration_table_has_ranges_of_every_input() {
    let folder = Folder::new();
    let table = CalibrationTable::open(calibrated(&folder, "default", "*.down_proj.weight")).unwrap();
    let (q, k) = ("self_attn.q_proj.weight", "self_attn.k_proj.weight");
    let layer = |name: &str| format!("model.language_model.layers.1.{name}");
    assert_eq!(table.input(&layer(q)), table.input(&layer(k)));
    assert!(table.has_second_moments(&layer("mlp.down_proj.weight")) && !table.has_second_moments(&layer(q)));
    for weight in
        ["lm_head.weight", "model.visual.blocks.1.attn.qkv.weight", "model.visual.merger.proj.weight"]
    {
        assert!(table.knows(weight), "{weight}");
    }
    let (least, most) = table.range(&layer(q)).unwrap();
    let (min, max) = table.channel_ranges(&layer(q), 64).unwrap().unwrap();
    assert_eq!(min.iter().copied().fold(f32::MAX, f32::min), least);
    assert_eq!(max.iter().copied().fold(f32::MIN, f32::max), most);
    let (mean, squares) = (table.mean_abs(&layer(q), 64), table.mean_squares(&layer(q), 64));
    let (mean, squares) = (mean.unwrap().unwrap(), squares.unwrap().unwrap());
    assert!(mean.iter().zip(&squares).all(|(m, s)| *m > 0.0 && m * m <= *s * 1.0001));
    assert!(table.mean_abs(&layer(q), 65).is_err(), "another width is an error");
}

#[test]
fn a_table_that_is_absent_or_of_another_model_is_refused() {
    let folder = Folder::new();
    let table = calibrated(&folder, "default", NONE);
    let open = |model: &str, method, table: Option<&Path>| {
        error(Quantiser::open(path(model), with_method("int4-g64", method, table)))
    };
    for method in [Method::Gptq, Method::Awq] {
        let found = open("default", method, None);
        assert!(matches!(found, Error::NoCalibration { .. }), "{found}");
    }
    for other in ["bf16", "eps", "real-head-dim"] {
        let found = open(other, Method::Awq, Some(&table));
        assert!(
            matches!(&found, Error::Calibration { what, .. } if what.contains("another model")),
            "{found}"
        );
    }
    let absent = open("default", Method::Awq, Some(&folder.file("absent")));
    assert!(absent.to_string().contains("absent"), "{absent}");
    let model = path("default/model.safetensors");
    let none = open("default", Method::Awq, Some(&model));
    assert!(matches!(&none, Error::Calibration { what, .. } if what.contains("calibrate")), "{none}");
}

#[test]
fn a_method_that_no_tensor_can_have_is_refused_and_one_that_some_lack_is_a_warning() {
    let folder = Folder::new();
    let table = calibrated(&folder, "default", NONE);
    let open = |policy, table: &Path| {
        Quantiser::open(path("default"), with_method(policy, Method::Gptq, Some(table)))
    };
    let none = error(open("int4-g64", &table)).to_string();
    assert!(none.contains("none of the") && none.contains("no matrix of second moments"), "{none}");
    let table = calibrated(&folder, "default", "*.down_proj.weight");
    let quantiser = open("int4-g64", &table).unwrap();
    let plan = quantiser.plan();
    let of = |name: &str| plan.tensors.iter().find(|t| t.name.ends_with(name)).unwrap();
    assert_eq!(of("0.mlp.down_proj.weight").method, Some(Method::Gptq));
    assert_eq!(of("0.mlp.gate_up_proj.weight").method, Some(Method::Search));
    assert!(of("0.mlp.gate_up_proj.weight").note.as_ref().unwrap().contains("no matrix of second moments"));
    assert_eq!(plan.warnings.len(), 1, "{:?}", plan.warnings);
    assert!(plan.warnings[0].starts_with("gptq makes "), "{:?}", plan.warnings);

    // One scale for a matrix leaves nothing for GPTQ to choose.
    let whole =
        Quantiser::open(path("default"), with_method("int8-tensor", Method::Gptq, Some(&table))).unwrap();
    let methods = whole.plan().tensors.iter().filter_map(|t| t.method);
    assert!(methods.clone().count() > 10 && methods.into_iter().all(|m| m == Method::Round));
    let rules =
        r#"{"rules": [{"tensors": "*", "format": "Q8_0"}, {"tensors": "*.q_proj.*", "format": "Q4_0"}]}"#;
    let late = QuantiseOptions::new(Policy::from_json("p", rules.as_bytes()).unwrap());
    let quantiser = Quantiser::open(path("default"), late).unwrap();
    assert!(quantiser.plan().warnings[0].contains("rules[1]"), "{:?}", quantiser.plan().warnings);
}

#[test]
fn a_table_of_a_model_with_other_matrices_is_refused_where_both_have_them_unquantised() {
    let folder = Folder::new();
    let table = calibrated(&folder, "default", NONE);
    let other = Folder::copy_of("default");
    let file = edited(&other.read("model.safetensors"), |tensors| {
        for (_, (_, shape, bytes)) in tensors.iter_mut().filter(|(_, t)| t.1.len() == 2) {
            // The same values in another order: rows are turned round.
            let row = 4 * shape[1];
            *bytes = bytes.chunks(row).rev().flatten().copied().collect();
        }
    });
    other.write("model.safetensors", file);
    let awq = || with_method("int4-g64", Method::Awq, Some(&table));
    let found = error(Quantiser::open(other.path(), awq()));
    assert!(
        matches!(&found, Error::Calibration { what, .. } if what.contains("has other values")),
        "{found}"
    );
    // In another floating-point type it is the same model, and quantised matrices are not compared.
    write(path("default"), folder.file("f16.pglm"), policy("F16")).unwrap();
    Quantiser::open(folder.file("f16.pglm"), awq()).unwrap();
    write(path("default"), folder.file("int8.pglm"), policy("int8")).unwrap();
    Quantiser::open(folder.file("int8.pglm"), QuantiseOptions { force_requantise: true, ..awq() }).unwrap();
}

#[test]
fn a_pattern_of_second_moments_that_names_nothing_is_refused() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 8, 1);
    let options = CalibrateOptions {
        engine: options(),
        second_moments: vec!["*.down_proj.weight".into(), "nothing*".into()],
        ..CalibrateOptions::default()
    };
    let found = error(calibrate(path("default"), &samples, folder.file("table"), &options));
    let named = matches!(&found, Error::Calibration { what, .. } if what.contains("`nothing*`"));
    assert!(named && !folder.file("table").exists(), "{found}");
}

#[test]
fn one_scale_for_a_matrix_stands_in_every_row_and_loses_more_than_one_for_each() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 9, 4);
    let names = ["int8-tensor", "int8-tensor-asym", "int8-row", "int4-tensor"];
    let models = names.map(|name| {
        let out = folder.file(&format!("{name}.pglm"));
        write(path("default"), &out, policy(name)).unwrap();
        out
    });
    let kl: Vec<f64> = compare(&models, "default", &samples).iter().map(|m| m.kl).collect();
    println!("{kl:.4?}");
    assert!(kl[2] < kl[0] && kl[0] < 0.3 && kl[1] < 0.3 && kl[0] < kl[3], "{kl:?}");
    // Without a file: the same numbers.
    let simulate = vec![Simulation { policy: Policy::load("int8-tensor").unwrap(), static_inputs: None }];
    let eval = EvalOptions { engine: options(), simulate, ..EvalOptions::default() };
    let (_, simulated) = evaluate(&[], path("default"), &samples, &eval).unwrap();
    assert!((simulated[0].kl / kl[0] - 1.0).abs() < 0.2, "{simulated:?} {kl:?}");
}

#[test]
fn sizes_are_those_of_the_file_that_is_written() {
    let folder = Folder::new();
    let samples = samples(&folder, "s.jsonl", 10, 1);
    for name in ["Q2_K", "int4", "Q4_0"] {
        let (out, text) = (folder.file(&format!("{name}.pglm")), folder.file(&format!("{name}.gguf")));
        let quantiser = Quantiser::open(path("real-head-dim"), policy(name)).unwrap();
        quantiser.write_pglm(&out).unwrap();
        let planned = quantiser.plan().bytes();
        // Tensors of the file but those that are no weights: side files and fillers.
        let bytes = fs::read(&out).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let size = |t: &serde_json::Value| {
            t["data_offsets"][1].as_u64().unwrap() - t["data_offsets"][0].as_u64().unwrap()
        };
        let weights = json
            .as_object()
            .unwrap()
            .iter()
            .filter(|(n, _)| n.starts_with("model.") || n.starts_with("lm_head"));
        assert_eq!(planned, weights.map(|(_, t)| size(t)).sum::<u64>(), "{name}");
        assert_eq!(compare(&[out], "real-head-dim", &samples)[0].bytes, planned, "{name}");
        if name != "int4" {
            let gguf = QuantiseOptions { gguf: true, ..policy(name) };
            let quantiser = Quantiser::open(path("real-head-dim"), gguf).unwrap();
            quantiser.write_gguf(&text, None).unwrap();
            let of_text =
                quantiser.plan().tensors.iter().filter(|t| !t.name.contains(".visual.")).map(|t| t.bytes);
            let (of_text, file) = (of_text.sum::<u64>(), fs::metadata(&text).unwrap().len());
            assert!(of_text < file && file < of_text + 200_000, "{name}: {of_text} {file}");
            // Panels of Q2_K have a scale of their own for each group; those of Q4_0 are as large as its blocks.
            let (gguf, most) = (quantiser.plan().bytes(), if name == "Q2_K" { planned - 1 } else { planned });
            assert!(gguf <= most, "{name}: {gguf} {planned}");
        }
    }
}

#[test]
fn broken_tables_are_errors() {
    let folder = Folder::new();
    let bytes = fs::read(calibrated(&folder, "bf16", NONE)).unwrap();
    let mut random = Random::new(5);
    let mut refused = 0;
    for _ in 0..300 {
        let mut broken = bytes.clone();
        let header = 8 + u64::from_le_bytes(broken[..8].try_into().unwrap()) as usize;
        for _ in 0..1 + random.below(3) {
            let at = random.below(header);
            broken[at] = random.next() as u8;
        }
        folder.write("broken", &broken);
        let options = with_method("int4-g64", Method::Awq, Some(&folder.file("broken")));
        let made = Quantiser::open(path("bf16"), options).and_then(|q| {
            let _ = fs::remove_file(folder.file("out.pglm"));
            q.write_pglm(folder.file("out.pglm"))
        });
        refused += usize::from(made.is_err());
    }
    assert!(refused > 200, "{refused}");
}

#[test]
fn nothing_is_replaced_or_quantised_twice_without_leave() {
    let folder = Folder::new();
    let out = folder.file("a.pglm");
    write(path("default"), &out, policy("int8")).unwrap();
    let before = fs::read(&out).unwrap();
    let found = error(write(path("default"), &out, policy("int4")));
    assert!(matches!(found, Error::Exists { .. }), "{found}");

    let found = error(Quantiser::open(&out, policy("int4")));
    assert!(
        matches!(&found, Error::AlreadyQuantised { found, .. } if found.name() == "int8-g128"),
        "{found}"
    );
    let force = QuantiseOptions { force_requantise: true, overwrite: true, ..policy("int4") };
    // The input itself is never written over, whatever is forced.
    let found = error(write(&out, &out, force.clone()));
    assert!(found.to_string().contains("is being read"), "{found}");
    let found = error(write(path("default"), path("default/model.safetensors"), force.clone()));
    assert!(found.to_string().contains("is being read"), "{found}");
    assert_eq!(fs::read(&out).unwrap(), before);
    write(&out, folder.file("b.pglm"), force).unwrap();
    // Keeping the formats it has is no quantising.
    write(&out, folder.file("c.pglm"), policy("keep")).unwrap();
    assert_eq!(names(&folder), ["a.pglm", "b.pglm", "c.pglm"]);
}

fn names(folder: &Folder) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_policy_that_names_nothing_is_refused() {
    let folder = Folder::new();
    folder.write(
        "p.json",
        r#"{"rules": [{"tensors": "*.q_proj.*", "format": "Q8_0"}, {"tensors": "*.no_proj.*", "format": "Q8_0"}]}"#,
    );
    let file = folder.file("p.json");
    let options = QuantiseOptions::new(Policy::load(file.to_str().unwrap()).unwrap());
    let found = error(Quantiser::open(path("default"), options)).to_string();
    assert!(found.contains("rules[1] names no tensor") && found.contains("*.no_proj.*"), "{found}");
    // Norms are no tensors that can be quantised.
    folder.write("p.json", r#"{"rules": [{"tensors": "*.input_layernorm.*", "format": "Q8_0"}]}"#);
    let options = QuantiseOptions::new(Policy::load(file.to_str().unwrap()).unwrap());
    assert!(matches!(error(Quantiser::open(path("default"), options)), Error::Policy { .. }));
}

#[test]
fn every_prefix_of_a_policy_is_an_error_and_no_panic() {
    let json = Policy::named("int4").unwrap().to_json();
    for end in 0..json.len() {
        if let Some(part) = json.get(..end) {
            assert!(Policy::from_json("p", part.as_bytes()).is_err());
        }
    }
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    let folder = Folder::copy_of("default");
    let mut bytes = folder.read("model.safetensors");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let name = "model.language_model.layers.1.self_attn.o_proj.weight";
    let begin = 8 + header + json[name]["data_offsets"][0].as_u64().unwrap() as usize;
    // Row 5 of a matrix with rows of 64.
    let at = begin + (5 * 64 + 7) * 4;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    folder.write("model.safetensors", &bytes);
    for name in ["int8", "int4", "Q4_0"] {
        let found = error(write(folder.path(), folder.file("out.pglm"), policy(name))).to_string();
        assert!(found.contains("layers.1.self_attn.o_proj.weight`, row 5"), "{found}");
    }
    assert!(!folder.file("out.pglm").exists() && !folder.file(".out.pglm.partial").exists());
}

#[test]
fn gguf_in_and_out() {
    let folder = Folder::new();
    // From GGUF to pglm.
    write(path("gguf/text.gguf"), folder.file("from-gguf.pglm"), policy("int8")).unwrap();
    // From a folder to GGUF and to pglm, in the same format: the same numbers.
    let eight = policy("Q8_0");
    write(path("bf16"), folder.file("q8.pglm"), eight.clone()).unwrap();
    let (text, vision) = (folder.file("q8.gguf"), folder.file("mmproj-q8.gguf"));
    Quantiser::open(path("bf16"), eight).unwrap().write_gguf(&text, Some(&vision)).unwrap();
    let [a, b, original, int8] = [folder.file("q8.pglm"), text, path("bf16"), folder.file("from-gguf.pglm")]
        .map(|p| Engine::open(p, options()).unwrap());
    for case in cases("bf16") {
        let forward =
            |engine: &Engine| engine.session().forward(&engine.prompt(&case.request).unwrap()).unwrap();
        let (a, b, original, int8) = (forward(&a), forward(&b), forward(&original), forward(&int8));
        assert!(relative_l2(&a, &b) < 1e-5, "{}: {}", case.name, relative_l2(&a, &b));
        // Random weights amplify errors as no trained model does.
        for other in [&a, &int8] {
            let distance = relative_l2(other, &original);
            assert!(distance > 1e-4 && distance < 0.3, "{}: {distance}", case.name);
        }
    }
}

#[test]
fn a_quantised_model_answers() {
    let folder = Folder::new();
    for name in ["int8", "int4", "int2", "Q4_0", "int4-row-asym"] {
        let out = folder.file("m.pglm");
        let options = QuantiseOptions { overwrite: true, ..policy(name) };
        write(path("real-head-dim"), &out, options).unwrap();
        let engine = Engine::open(&out, crate::support::options()).unwrap();
        let prompt = ids_prompt(&engine, &(1..40).collect::<Vec<_>>());
        assert_eq!(answer(&mut engine.session(), &prompt, &exactly(8)).ids.len(), 8, "{name}");
    }
}

/// The work of a child process; nothing where there is none.
#[test]
#[ignore = "the child process of the tests below"]
fn child_that_quantises_over_and_over() {
    let Some(out) = std::env::var_os(CHILD) else { return };
    loop {
        let options = QuantiseOptions { overwrite: true, ..policy("int4") };
        write(path("default"), &out, options).unwrap();
    }
}

#[test]
#[ignore = "the child process of the tests below"]
fn child_that_quantises_once() {
    let Some(out) = std::env::var_os(CHILD) else { return };
    let found = error(write(path("default"), &out, policy("int8"))).to_string();
    assert!(found.contains("File too large"), "{found}");
}

fn child(test: &str) -> Vec<String> {
    let name = format!("quantise::{test}");
    [name.as_str(), "--exact", "--ignored", "--test-threads=1"].map(str::to_owned).into()
}

fn kill_during_quantise(times: usize) {
    let folder = Folder::new();
    write(path("default"), folder.file("good.pglm"), policy("int4")).unwrap();
    let good = fs::read(folder.file("good.pglm")).unwrap();
    let out = folder.file("out.pglm");
    let (mut whole, mut partial) = (0, 0);
    let mut random = Random::new(9);
    for round in 0..times {
        // Every other time nothing stands under the name at first.
        if round % 2 == 0 {
            let _ = fs::remove_file(&out);
        }
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(child("child_that_quantises_over_and_over"))
            .env(CHILD, &out)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(2000 + random.below(60_000) as u64));
        process.kill().unwrap();
        process.wait().unwrap();
        partial += usize::from(folder.file(".out.pglm.partial").exists());
        if out.exists() {
            whole += 1;
            assert!(fs::read(&out).unwrap() == good, "round {round}: the file is damaged");
        }
    }
    println!("{times} kills: {whole} whole files, {partial} leftovers");
    assert!(partial * 4 > times, "{partial} of {times} kills hit the writing: too few to say anything");
    // What was left is replaced by the next run, and gone after it.
    let _ = fs::remove_file(&out);
    write(path("default"), &out, policy("int4")).unwrap();
    assert_eq!(fs::read(&out).unwrap(), good);
    assert_eq!(names(&folder), ["good.pglm", "out.pglm"]);
}

#[test]
fn a_kill_leaves_the_old_file_or_the_new_one() {
    kill_during_quantise(20);
}

#[test]
#[ignore = "takes a while"]
fn two_hundred_kills_leave_no_damaged_file() {
    kill_during_quantise(200);
}

/// The system refuses to make a file longer than a limit, as a full disk does.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let folder = Folder::new();
    for blocks in [1, 100, 500] {
        let exe = std::env::current_exe().unwrap();
        let status = Command::new("sh")
            .args(["-c", &format!(r#"trap "" XFSZ; ulimit -f {blocks}; exec "$0" "$@""#)])
            .arg(exe)
            .args(child("child_that_quantises_once"))
            .env(CHILD, folder.file("out.pglm"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{blocks} blocks: {status}");
        assert_eq!(names(&folder), Vec::<String>::new());
    }
}
