//! Ranges of ops on a device, and how they find an op that is wrong there.

use pocketglm_tensor::{Result as Tensors, Tensor, TensorInfo};

use super::*;
use crate::{OpPlace, OpRange, Recogniser, Sound};

fn range(from: Option<usize>, until: Option<usize>) -> OpRange {
    OpRange { from: from.map(|n| n.to_string()), until: until.map(|n| n.to_string()) }
}

fn ranged(device: &Arc<dyn Backend>, device_ops: OpRange) -> EngineOptions {
    EngineOptions { device_ops, ..options(Some(device.clone())) }
}

/// The processor, wrong wherever it multiplies with one tensor.
struct Wrong {
    cpu: CpuBackend,
    tensor: &'static str,
}

struct WrongWeights {
    right: Arc<dyn WeightSource>,
    tensor: &'static str,
}

impl WeightSource for WrongWeights {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.right.tensors()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.right.info(name)
    }
    fn tensor(&self, name: &str) -> Tensors<Tensor> {
        let tensor = self.right.tensor(name)?;
        if name != self.tensor {
            return Ok(tensor);
        }
        let values: Vec<f32> = tensor.to_f32()?.iter().map(|v| v * 1.5).collect();
        Tensor::from_f32(tensor.shape(), &values)
    }
}

impl Backend for Wrong {
    fn describe(&self) -> String {
        "wrong".into()
    }
    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Graphs<ProgramMemory> {
        self.cpu.plan(graph, bindings)
    }
    fn compile(&self, graph: &Graph, right: Arc<dyn WeightSource>) -> Graphs<Box<dyn Program>> {
        self.cpu.compile(graph, Arc::new(WrongWeights { right, tensor: self.tensor }))
    }
}

/// The op whose end of the device's range makes a result wrong: found by halves, as a person would.
fn bisect(ops: &[OpPlace], is_right: impl Fn(OpRange) -> bool) -> OpPlace {
    let (mut right, mut wrong) = (None, ops.len() - 1);
    assert!(!is_right(OpRange::default()), "nothing is wrong");
    loop {
        let first = right.map_or(0, |n| n + 1);
        if first == wrong {
            // The op by itself is wrong too, and everything around it right.
            assert!(!is_right(range(Some(wrong), Some(wrong))));
            assert!(is_right(range(Some(wrong + 1), None)) || wrong + 1 == ops.len());
            return ops[wrong].clone();
        }
        let middle = first + (wrong - first) / 2;
        match is_right(range(None, Some(middle))) {
            true => right = Some(middle),
            false => wrong = middle,
        }
    }
}

fn wrong(tensor: &'static str) -> Arc<dyn Backend> {
    Arc::new(Wrong { cpu: CpuBackend::new(Arc::new(Cpu::new(1).unwrap())), tensor })
}

#[test]
fn bisecting_finds_the_op_that_is_wrong_in_decoder_and_vision_encoder() {
    let cpu = open(options(None));
    let prompt = |engine: &Engine| engine.prompt(&requests()[0]).unwrap();
    let logits = |engine: &Engine| engine.session().forward(&prompt(engine)).unwrap();
    let wanted = logits(&cpu);
    let ops = Engine::ops(golden("default"), &options(None)).unwrap();
    for (tensor, name) in [
        (
            "model.language_model.layers.1.mlp.down_proj.weight",
            "linear model.language_model.layers.1.mlp.down_proj",
        ),
        ("lm_head.weight", "norm_linear lm_head"),
        ("model.visual.blocks.1.mlp.gate_proj.weight", "norm_linear_swiglu model.visual.blocks.1.mlp"),
        ("model.visual.patch_embed.proj.bias", "linear model.visual.patch_embed.proj"),
    ] {
        let device = wrong(tensor);
        let found = bisect(&ops, |range| logits(&open(ranged(&device, range))) == wanted);
        assert_eq!(found.name, name);
    }
}

#[test]
fn bisecting_finds_the_op_that_is_wrong_in_a_speech_checkpoint() {
    let path = golden("hear/base");
    let samples: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.05).sin()).collect();
    let sound = Sound::frames(&samples, 1, 16_000).unwrap();
    let logits = |options: EngineOptions| {
        let trace = Recogniser::open(&path, options).unwrap().trace(&sound).unwrap();
        trace.get("logits").unwrap().to_f32().unwrap().into_owned()
    };
    let wanted = logits(options(None));
    let ops = Recogniser::ops(&path, &options(None)).unwrap();
    let tensor = "wav2vec2.encoder.layers.1.feed_forward.output_dense.weight";
    let device = wrong(tensor);
    let found = bisect(&ops, |range| logits(ranged(&device, range)) == wanted);
    assert_eq!(found.name, "linear_add wav2vec2.encoder.layers.1.feed_forward.output_dense");
}

#[test]
fn every_range_gives_the_answers_of_the_processor_and_says_what_it_holds() {
    let device = Pretend::healthy();
    for (kv, fuse) in [(KvFormat::F32, true), (KvFormat::F16, false)] {
        let with = |options: EngineOptions| EngineOptions { kv, fuse, ..options };
        let wanted = answers(&open(with(options(None))));
        let all = Engine::ops(golden("default"), &with(options(None))).unwrap().len();
        for first in (0..all).step_by(7) {
            for last in [first, (first + all) / 2] {
                let options = with(ranged(&device, range(Some(first), Some(last))));
                let ops = Engine::ops(golden("default"), &options).unwrap();
                assert!(ops[first].on_device && ops[last].on_device);
                let placement =
                    Engine::inspect(golden("default"), &options, None).unwrap().1.placement.unwrap();
                assert_eq!(placement.ops, Some((ops.iter().filter(|o| o.on_device).count(), all)));
                assert_eq!(answers(&open(options)), wanted, "{kv:?} {fuse}: {first} to {last}: {placement}");
            }
        }
    }
}

#[test]
fn a_trace_runs_the_range_too() {
    let cpu = open(options(None));
    let prompt = cpu.prompt(&requests()[0]).unwrap();
    let wanted = cpu.trace(&prompt).unwrap();
    let device = wrong("model.language_model.layers.1.mlp.down_proj.weight");
    let trace = |until: &str| {
        let range = OpRange { from: None, until: Some(until.into()) };
        open(ranged(&device, range)).trace(&prompt).unwrap()
    };
    let differs = |trace: &crate::Trace, name: &str| {
        trace.get(name).unwrap().to_f32().unwrap() != wanted.get(name).unwrap().to_f32().unwrap()
    };
    let before = trace("hidden_states.1");
    assert!(
        !differs(&before, "hidden_states.1")
            && !differs(&before, "hidden_states.3")
            && !differs(&before, "logits")
    );
    let with = trace("hidden_states.2");
    assert!(
        !differs(&with, "hidden_states.1") && differs(&with, "hidden_states.2") && differs(&with, "logits")
    );
}

#[test]
fn ends_that_name_no_op_are_told_with_names_that_are_close() {
    let device = Pretend::healthy();
    let fails = |from: Option<&str>, until: Option<&str>| {
        let [from, until] = [from, until].map(|end| end.map(str::to_owned));
        Engine::open(golden("default"), ranged(&device, OpRange { from, until })).err().unwrap()
    };
    let error = fails(Some("linear model.language_model.layers.1.mlp.dwon_proj"), None);
    assert!(
        matches!(&error, Error::NoOp { near, .. } if near[0] == "linear model.language_model.layers.1.mlp.down_proj")
    );
    for wrong in ["", "-1", "99999", "model.language_model.layers.3", "\u{1F600}"] {
        let error = fails(None, Some(wrong));
        assert!(matches!(&error, Error::NoOp { wanted, .. } if wanted == wrong), "{error}");
    }
    let error = fails(Some("lm_head"), Some("model.visual"));
    assert!(matches!(error, Error::NoOps { .. }), "{error}");
    let error = Recogniser::open(golden("hear/base"), ranged(&device, range(Some(500), None))).err().unwrap();
    assert!(matches!(error, Error::NoOp { .. }), "{error}");
}
