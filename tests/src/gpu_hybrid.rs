//! Models on a GPU and the processor together, and a GPU that goes away.
//!
//! Software Vulkan is enough. A machine without any adapter fails these tests, so that they cannot pass because nothing
//! ran, unless `POCKETGLM_WITHOUT_GPU` says that there is none; then they say that they are skipped.

use std::time::{Duration, Instant};

use pocketglm::gpu::{Gpu, GpuOptions};
use pocketglm::{
    DeviceFault, Engine, EngineOptions, Error, Fallback, GenerateOptions, KvFormat, Message, OpRange, Part,
    Picture, PreparedPrompt, Recogniser, Request, Session, Sound,
};

use crate::golden::path;
use crate::support::{exactly, options};

fn gpu() -> Option<Gpu> {
    match Gpu::open(&GpuOptions { software: true, ..GpuOptions::default() }) {
        Ok(gpu) => Some(gpu),
        Err(e) if std::env::var_os("POCKETGLM_WITHOUT_GPU").is_some() => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}; set POCKETGLM_WITHOUT_GPU=1 to skip what needs one"),
    }
}

fn with(gpu: &Gpu, device_memory: Option<u64>) -> EngineOptions {
    EngineOptions { backend: Some(gpu.backend()), device_memory, prefill_chunk: 61, ..options() }
}

fn open(options: EngineOptions) -> Engine {
    Engine::open(path("default"), options).unwrap()
}

/// A picture with text, and token ids behind which the cache grows.
fn requests() -> [Request; 2] {
    let pixels = (0..64 * 90 * 3).map(|i| (i * 7 % 251) as u8).collect();
    let parts = vec![Part::Image(Picture::rgb8(64, 90, pixels).unwrap()), Part::Text("What is it?".into())];
    let ids = (0..250).map(|i| 3 + i * 31 % 900).collect();
    [Request::Messages(vec![Message::parts("user", parts)]), Request::InputIds(ids)]
}

fn tokens(session: &mut Session, prompt: &PreparedPrompt, how: &GenerateOptions) -> Result<Vec<u32>, Error> {
    let mut generation = session.generate(prompt, how)?;
    generation.text()?;
    Ok(generation.token_ids().to_vec())
}

fn answers(engine: &Engine) -> Vec<Vec<u32>> {
    let mut session = engine.session();
    requests()
        .iter()
        .map(|r| tokens(&mut session, &engine.prompt(r).unwrap(), &exactly(10)).unwrap())
        .collect()
}

#[test]
fn every_number_of_layers_on_the_gpu_gives_the_answers_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let wanted = [KvFormat::F32, KvFormat::F16]
        .map(|kv| answers(&open(EngineOptions { kv, prefill_chunk: 61, ..options() })));
    let inspect = |budget| Engine::inspect(path("default"), &with(&gpu, Some(budget)), None).unwrap().1;
    let least = inspect(0).placement.unwrap().least.unwrap();
    let all = inspect(u64::MAX).device_total();
    let mut seen = Vec::new();
    for budget in [0, least, 2 * least, 3 * least, 5 * least, u64::MAX] {
        for (kv, wanted) in [KvFormat::F32, KvFormat::F16].into_iter().zip(&wanted) {
            let before = gpu.allocated();
            let engine = open(EngineOptions { kv, ..with(&gpu, Some(budget)) });
            assert_eq!(&answers(&engine), wanted, "{budget} {kv:?}");
            let placement = inspect(budget).placement.unwrap();
            seen.push(placement.layers);
            if placement.layers == 0 {
                assert_eq!(gpu.allocated(), before);
            }
            drop(engine);
            assert_eq!(gpu.allocated(), before, "{placement}");
        }
    }
    assert!(all > least);
    for layers in [0, 1, 3] {
        assert!(seen.contains(&layers), "{seen:?}");
    }
}

/// Ops before, in and behind layers, in the vision encoder, and the cache's writer and reader apart.
#[test]
fn every_range_of_ops_on_the_gpu_gives_the_answers_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let wanted = answers(&open(EngineOptions { prefill_chunk: 61, ..options() }));
    let all = Engine::ops(path("default"), &options()).unwrap();
    let last = all.len() - 1;
    let append = all.iter().position(|op| op.name.starts_with("norm_qkv_rope_append")).unwrap();
    for (first, until) in [
        (0, 0),
        (0, 9),
        (3, append),
        (append, append),
        (append + 1, last),
        (append + 3, append + 12),
        (last - 3, last),
        (last, last),
        (0, last),
    ] {
        let before = gpu.allocated();
        let end = |n: usize| Some(n.to_string());
        let device_ops = OpRange { from: end(first), until: end(until) };
        let engine = open(EngineOptions { device_ops, ..with(&gpu, None) });
        assert_eq!(answers(&engine), wanted, "{first} to {until}");
        let names = format!("{} to {}", all[first].name, all[until].name);
        assert!(engine.device().contains("gpu") || until < append, "{names}: {}", engine.device());
        drop(engine);
        assert_eq!(gpu.allocated(), before, "{names}");
    }
}

#[test]
fn ranges_of_a_speech_checkpoint_on_the_gpu_give_the_processor_s_text() {
    let Some(gpu) = gpu() else { return };
    let samples: Vec<f32> = (0..20_000).map(|i| ((i * i % 977) as f32 / 488.0 - 1.0) * 0.7).collect();
    let sound = Sound::frames(&samples, 1, 16_000).unwrap();
    let text = |options: EngineOptions| {
        Recogniser::open(path("hear/base"), options).unwrap().transcribe(&sound, 1).unwrap().text
    };
    let wanted = text(options());
    let ops = Recogniser::ops(path("hear/base"), &options()).unwrap().len();
    for first in 0..ops {
        let [from, until] = [first, (first + 4).min(ops - 1)].map(|n| Some(n.to_string()));
        let device_ops = OpRange { from, until };
        assert_eq!(text(EngineOptions { device_ops, ..with(&gpu, None) }), wanted, "from {first}");
    }
}

#[test]
fn a_gpu_that_goes_away_is_a_typed_error_within_a_second() {
    for at in [0, 1, 4] {
        let Some(gpu) = gpu() else { return };
        let engine = open(with(&gpu, None));
        let prompt = engine.prompt(&requests()[0]).unwrap();
        let (mut session, how) = (engine.session(), exactly(10));
        let mut generation = session.generate(&prompt, &how).unwrap();
        for _ in 0..at {
            generation.next().unwrap().unwrap();
        }
        gpu.destroy();
        let start = Instant::now();
        let error = generation.find_map(Result::err).expect("a GPU that is gone gave an answer");
        assert_eq!(error.device_fault(), Some(DeviceFault::Lost), "{error}");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        drop(generation);
        drop((session, engine));
        assert_eq!(gpu.allocated(), 0);
    }
}

#[test]
fn the_plan_holds_what_is_allocated_and_hardly_more() {
    let Some(gpu) = gpu() else { return };
    // Parameters of dispatches and read-back buffers are planned for more sizes of runs than a short answer has.
    let allowed = |most: u64| most + most / 33 + (48 << 10);
    for checkpoint in ["default", "real-head-dim", "tied"] {
        let inspect = |budget| Engine::inspect(path(checkpoint), &with(&gpu, Some(budget)), None).unwrap().1;
        let least = inspect(0).placement.unwrap().least.unwrap();
        for (what, budget) in [("all", None), ("one layer", Some(least)), ("two layers", Some(2 * least))] {
            for kv in [KvFormat::F32, KvFormat::F16] {
                let before = gpu.allocated();
                let options = EngineOptions { kv, ..with(&gpu, budget) };
                let engine = Engine::open(path(checkpoint), options).unwrap();
                let loaded = gpu.allocated() - before;
                let ids = (0..250u32).map(|i| 3 + i * 31 % 300).collect();
                let prompt = engine.prompt(&Request::InputIds(ids)).unwrap();
                let plan = engine.plan(&prompt, 10).unwrap();
                let planned = plan.device_total();
                let weights: u64 =
                    plan.parts.iter().filter(|p| p.name.ends_with("weights")).map(|p| p.device).sum();
                let (mut session, how) = (engine.session(), exactly(10));
                let mut most = loaded;
                for piece in session.generate(&prompt, &how).unwrap() {
                    piece.unwrap();
                    most = most.max(gpu.allocated() - before);
                }
                let told =
                    format!("{checkpoint} {what} {kv:?}: loaded {loaded}, most {most}, planned {plan}");
                assert!(weights >= loaded && weights <= allowed(loaded), "{told}");
                assert!(planned >= most && planned <= allowed(most), "{planned}; {told}");
                // Small as they are, the models are not so small that the allowance decides.
                assert!(what != "all" || most > 4 * (48 << 10), "{told}");
            }
        }
    }
}

#[test]
fn a_gpu_that_does_not_answer_in_time_is_a_typed_error_or_the_processor_goes_on() {
    let wanted = answers(&open(EngineOptions { prefill_chunk: 61, ..options() }));
    // No patience at all: what is waited for never comes.
    let hanging = GpuOptions {
        software: true,
        untested: true,
        patience: Some(Duration::ZERO),
        ..GpuOptions::default()
    };
    if gpu().is_none() {
        return;
    }
    for fallback in [Fallback::Error, Fallback::Cpu] {
        let gpu = Gpu::open(&hanging).unwrap();
        let engine = Engine::open(path("default"), EngineOptions { fallback, ..with(&gpu, None) });
        if fallback == Fallback::Cpu {
            let engine = engine.unwrap();
            assert_eq!(answers(&engine), wanted);
            assert!(engine.device_failure().unwrap().contains("no progress within 0 s"));
        } else {
            let answer = |engine: Engine| {
                let prompt = engine.prompt(&requests()[1])?;
                tokens(&mut engine.session(), &prompt, &exactly(10))
            };
            let error = engine.and_then(answer).unwrap_err();
            assert_eq!(error.device_fault(), Some(DeviceFault::Timeout), "{error}");
        }
        assert_eq!(gpu.allocated(), 0);
    }
}

#[test]
fn the_processor_goes_on_with_the_same_text_when_the_gpu_goes_away() {
    let wanted = answers(&open(EngineOptions { prefill_chunk: 61, ..options() }));
    let whole = |gpu: &Gpu| with(gpu, None);
    let hybrid = |gpu: &Gpu| {
        let plan = Engine::inspect(path("default"), &with(gpu, Some(0)), None).unwrap().1;
        with(gpu, Some(2 * plan.placement.unwrap().least.unwrap()))
    };
    let placements: [&dyn Fn(&Gpu) -> EngineOptions; 2] = [&whole, &hybrid];
    for options in placements {
        for at in [0, 1, 2, 5, 9] {
            let Some(gpu) = gpu() else { return };
            let engine = open(EngineOptions { fallback: Fallback::Cpu, ..options(&gpu) });
            let mut session = engine.session();
            for (request, wanted) in requests().iter().zip(&wanted) {
                let prompt = engine.prompt(request).unwrap();
                let how = exactly(10);
                let mut generation = session.generate(&prompt, &how).unwrap();
                for _ in 0..at {
                    generation.next().unwrap().unwrap();
                }
                gpu.destroy();
                generation.text().unwrap();
                assert_eq!(generation.token_ids(), wanted, "{at}");
            }
            let why = engine.device_failure().expect("nothing says that the GPU is gone");
            assert!(why.contains("lost"), "{why}");
            assert!(engine.device().starts_with("cpu"), "{}", engine.device());
        }
    }
}
