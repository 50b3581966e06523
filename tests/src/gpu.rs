//! The GPU computes what the processor computes: whole models on any adapter, software included. Where there is none, each test
//! says that it is skipped.

use std::sync::Arc;

use pocketglm::gpu::{self, GpuOptions};
use pocketglm::{
    AudioPrecision, Backend, Engine, EngineOptions, GenerateOptions, KvFormat, Message, Part, Picture,
    PreparedPrompt, Recogniser, Request, Sampling, Sound,
};

use crate::golden::{CHECKPOINTS, cases, path, relative_l2};
use crate::support::{Random, answer, exactly, options};

/// Logits in f32, as the issue of the GPU has it.
const LOGITS: f64 = 1e-4;
/// Rows that stand for a picture: the same bound as against the reference implementation.
const MERGER: f64 = 2e-5;
/// Tokens of each answer.
const TOKENS: usize = 6;

fn open(options: GpuOptions) -> Option<Arc<dyn Backend>> {
    match gpu::open(&GpuOptions { software: true, ..options }) {
        Ok(backend) => Some(backend),
        Err(e) if e.to_string().contains("adapter") => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn engine(checkpoint: &str, backend: Option<&Arc<dyn Backend>>, other: EngineOptions) -> Engine {
    let backend = backend.cloned();
    Engine::open(path(checkpoint), EngineOptions { backend, threads: 2, context: 2048, ..other }).unwrap()
}

/// Answers and logits of a prompt on both, and their distance.
fn compare(cpu: &Engine, gpu: &Engine, prompt: &PreparedPrompt, what: &str, bound: f64) {
    let wanted = cpu.session().forward(prompt).unwrap();
    let found = gpu.session().forward(prompt).unwrap();
    let distance = relative_l2(&found, &wanted);
    assert!(distance <= bound, "{what}: logits {distance:.1e}, bound {bound:.0e}");
    let wanted = answer(&mut cpu.session(), prompt, &exactly(TOKENS));
    let found = answer(&mut gpu.session(), prompt, &exactly(TOKENS));
    assert_eq!(found, wanted, "{what}");
}

/// The checkpoints, or those in a list, with text and one picture.
fn every(only: &[&str], backend: &Arc<dyn Backend>, other: impl Fn() -> EngineOptions, bound: f64) -> usize {
    let mut compared = 0;
    for (checkpoint, expected_in) in CHECKPOINTS.iter().filter(|(c, _)| only.is_empty() || only.contains(c)) {
        let cpu = engine(checkpoint, None, other());
        let gpu = engine(checkpoint, Some(backend), other());
        for case in cases(expected_in).iter().filter(|c| ["text", "image"].contains(&c.name.as_str())) {
            let prompt = cpu.prompt(&case.request).unwrap();
            compare(&cpu, &gpu, &prompt, &format!("{checkpoint} {}", case.name), bound);
            compared += 1;
        }
    }
    compared
}

#[test]
fn every_tiny_checkpoint_gives_the_processor_s_tokens_and_logits() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    assert!(every(&[], &backend, EngineOptions::default, LOGITS) >= 14);
}

#[test]
fn so_it_does_without_fusion() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let unfused = || EngineOptions { fuse: false, ..EngineOptions::default() };
    assert!(every(&["default", "kv-heads-1", "merge-3", "f16"], &backend, unfused, LOGITS) >= 4);
}

#[test]
fn so_it_does_with_small_bindings_and_with_plain_kernels() {
    for options in [
        GpuOptions { binding_limit: Some(128 << 20), ..GpuOptions::default() },
        GpuOptions { plain: true, ..GpuOptions::default() },
        GpuOptions { guarded: true, checked: true, ..GpuOptions::default() },
    ] {
        let what = format!("{options:?}");
        let Some(backend) = open(options) else { return };
        assert!(every(&["default"], &backend, EngineOptions::default, LOGITS) >= 1, "{what}");
    }
}

/// 64 KiB do not hold the logits of a whole prompt, so answers are compared, in steps of few tokens.
#[test]
fn a_matrix_in_many_parts_gives_the_processor_s_tokens() {
    for plain in [false, true] {
        let small = GpuOptions { binding_limit: Some(1 << 16), plain, ..GpuOptions::default() };
        let Some(backend) = open(small) else { return };
        let options = || EngineOptions { prefill_chunk: 16, ..EngineOptions::default() };
        let (cpu, gpu) = (engine("default", None, options()), engine("default", Some(&backend), options()));
        let case = cases("default").into_iter().find(|c| c.name == "text").unwrap();
        let prompt = cpu.prompt(&case.request).unwrap();
        let wanted = answer(&mut cpu.session(), &prompt, &exactly(TOKENS));
        assert_eq!(answer(&mut gpu.session(), &prompt, &exactly(TOKENS)), wanted, "plain: {plain}");
    }
}

#[test]
fn caches_in_f16_and_int8_give_the_processor_s_tokens() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    // A last bit of a key may round the other way on the two: steps of 2^-11 and 1/127 of a head's largest value.
    for (kv, bound) in [(KvFormat::F16, 1e-3), (KvFormat::Int8, 1e-3)] {
        let options = || EngineOptions { kv, ..EngineOptions::default() };
        assert!(every(&["default", "kv-heads-8-2"], &backend, options, bound) >= 2);
    }
}

/// Settings that 64 candidates decide, that they may fail to, and that need every logit.
#[test]
fn sampling_gives_the_processor_s_text_for_the_same_seed() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let base = Sampling { temperature: 6.0, ..Sampling::default() };
    let settings = [
        Sampling { top_k: 1, ..base.clone() },
        Sampling { top_k: 7, temperature: 3.0, ..base.clone() },
        Sampling { top_k: 64, top_p: 0.9, ..base.clone() },
        Sampling { top_k: 40, top_p: 0.95, min_p: 0.05, temperature: 9.0, ..base.clone() },
        Sampling { min_p: 0.3, ..base.clone() },
        Sampling { min_p: 1e-6, ..base.clone() },
        Sampling { top_k: 100, ..base.clone() },
        Sampling { top_p: 0.7, ..base.clone() },
        Sampling { top_k: 20, repetition_penalty: 1.3, frequency_penalty: 0.2, ..base },
    ];
    for checkpoint in ["default", "tied", "kv-heads-1"] {
        let (cpu, gpu) = (engine(checkpoint, None, options()), engine(checkpoint, Some(&backend), options()));
        let case =
            cases(checkpoint).into_iter().find(|c| ["text", "image"].contains(&c.name.as_str())).unwrap();
        let prompt = cpu.prompt(&case.request).unwrap();
        let mut texts = Vec::new();
        for (i, sampling) in settings.iter().enumerate() {
            let how = GenerateOptions {
                sampling: Sampling { seed: 11 + i as u64, ..sampling.clone() },
                ..exactly(16)
            };
            let wanted = answer(&mut cpu.session(), &prompt, &how);
            assert_eq!(answer(&mut gpu.session(), &prompt, &how), wanted, "{checkpoint} {sampling:?}");
            texts.push(wanted.text);
        }
        // How many tokens came from candidates: all but the first where they decide, none where every logit is needed.
        for (at, wanted) in [(1, 15), (3, 15), (7, 0), (8, 0)] {
            let how = GenerateOptions { sampling: settings[at].clone(), ..exactly(16) };
            if backend.profile(true).is_err() {
                break;
            }
            answer(&mut gpu.session(), &prompt, &how);
            let of_candidates = |run: &pocketglm::RunProfile| {
                run.ops.iter().any(|op| op.kernels.iter().any(|kernel| kernel.starts_with("top_k")))
            };
            let found = backend.take_profile().iter().filter(|run| of_candidates(run)).count();
            backend.profile(false).unwrap();
            assert_eq!(found, wanted, "{checkpoint} {:?}", settings[at]);
        }
        texts.sort();
        texts.dedup();
        assert!(texts.len() > settings.len() / 2, "the settings make no difference: {texts:?}");
    }
}

#[test]
fn pictures_of_64_sizes_are_encoded_as_on_the_processor() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let cpu = engine("default", None, options());
    let gpu = engine("default", Some(&backend), options());
    let mut random = Random::new(64);
    let mut worst = 0f64;
    for i in 0..64 {
        let (w, h) = (28 + random.below(90), 28 + random.below(90));
        let pixels: Vec<u8> = (0..w * h * 3).map(|_| random.below(256) as u8).collect();
        let parts = vec![Part::Image(Picture::rgb8(w, h, pixels).unwrap()), Part::Text("?".into())];
        let prompt = cpu.prompt(&Request::Messages(vec![Message::parts("user", parts)])).unwrap();
        let rows = |engine: &Engine| {
            let trace = engine.trace(&prompt).unwrap();
            trace.get("image_embeds").unwrap().to_f32().unwrap().into_owned()
        };
        let distance = relative_l2(&rows(&gpu), &rows(&cpu));
        assert!(distance <= MERGER, "picture {i} of {w}x{h}: {distance:.1e}");
        worst = worst.max(distance);
    }
    println!("64 pictures, worst distance {worst:.1e}");
    assert!(worst > 0.0, "the same numbers to the last bit: were both on the processor?");
}

#[test]
fn an_adapter_that_is_not_there_is_an_error() {
    let options = GpuOptions { adapter: Some("no such adapter".into()), ..GpuOptions::default() };
    let error = gpu::open(&options).err().unwrap().to_string();
    assert!(error.contains("adapter"), "{error}");
}

#[test]
fn a_budget_that_is_too_small_is_refused_before_weights_are_read() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let options = EngineOptions { backend: Some(backend), memory: Some(1 << 10), ..options() };
    let error = Engine::open(path("default"), options).err().unwrap().to_string();
    assert!(error.contains("bytes"), "{error}");
}

#[test]
fn speech_checkpoints_of_both_families_give_the_processor_s_text_and_hidden_states() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let mut random = Random::new(5);
    let samples: Vec<f32> = (0..20_000).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let sound = Sound::frames(&samples, 1, 16_000).unwrap();
    for name in ["base", "base-odd-kernel", "large", "large-old-names"] {
        let open = |backend: Option<&Arc<dyn Backend>>| {
            let options = EngineOptions { backend: backend.cloned(), threads: 2, ..EngineOptions::default() };
            Recogniser::open(path(&format!("hear/{name}")), options).unwrap()
        };
        let (cpu, gpu) = (open(None), open(Some(&backend)));
        let text = |r: &Recogniser| r.transcribe(&sound, 1).unwrap().text;
        assert_eq!(text(&gpu), text(&cpu), "{name}");
        let (wanted, found) = (cpu.trace(&sound).unwrap(), gpu.trace(&sound).unwrap());
        for tensor in ["hidden_states.0", "last_hidden_state", "logits"] {
            let values = |t: &pocketglm::Trace| t.get(tensor).unwrap().to_f32().unwrap().into_owned();
            let distance = relative_l2(&values(&found), &values(&wanted));
            assert!(distance <= 1e-5, "{name}: {tensor} {distance:.1e}");
        }
    }
}

#[test]
fn speech_in_eight_bits_is_on_the_gpu_as_near_to_f32_as_on_the_processor() {
    let Some(backend) = open(GpuOptions::default()) else { return };
    let mut random = Random::new(6);
    let samples: Vec<f32> = (0..20_000).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let sound = Sound::frames(&samples, 1, 16_000).unwrap();
    for name in ["base", "large"] {
        let logits = |backend: Option<&Arc<dyn Backend>>, audio_precision: AudioPrecision| {
            let options = EngineOptions {
                backend: backend.cloned(),
                threads: 2,
                audio_precision,
                ..EngineOptions::default()
            };
            let trace =
                Recogniser::open(path(&format!("hear/{name}")), options).unwrap().trace(&sound).unwrap();
            trace.get("logits").unwrap().to_f32().unwrap().into_owned()
        };
        let exact = logits(None, AudioPrecision::Stored);
        let [on_cpu, on_gpu] =
            [None, Some(&backend)].map(|backend| relative_l2(&logits(backend, AudioPrecision::Int8), &exact));
        println!("{name}: {on_cpu:.1e} from f32 on the processor, {on_gpu:.1e} on the GPU");
        // Convolutions and attention stay in f32 there; what is left are the weights' roundings.
        assert!(
            on_gpu > 1e-6 && on_gpu <= 1.2 * on_cpu,
            "{name}: {on_gpu:.1e}, {on_cpu:.1e} on the processor"
        );
    }
}
