mod range;

use std::path::PathBuf;
use std::sync::atomic::{AtomicIsize, Ordering};

use pocketglm_graph::{
    Bindings, DeviceFault, Inputs, PlacedMemory, Program, ProgramMemory, ProgramState, Running,
};
use pocketglm_tensor::{KvFormat, WeightSource};

use super::*;
use crate::{Engine, Error, Fallback, GenerateOptions, Message, Part, Picture, Prompt, Request, Session};

type Graphs<T> = pocketglm_graph::Result<T>;

/// The processor in the part of a device with memory of its own, which fails after a number of runs.
struct Pretend {
    cpu: CpuBackend,
    left: Arc<AtomicIsize>,
    fault: DeviceFault,
}

impl Pretend {
    fn failing_after(runs: isize, fault: DeviceFault) -> Arc<dyn Backend> {
        let cpu = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
        Arc::new(Pretend { cpu, left: Arc::new(AtomicIsize::new(runs)), fault })
    }

    fn healthy() -> Arc<dyn Backend> {
        Pretend::failing_after(isize::MAX, DeviceFault::Lost)
    }
}

fn failed(fault: DeviceFault) -> pocketglm_graph::Error {
    pocketglm_graph::Error::Device { device: "pretended".into(), fault, what: "it failed".into() }
}

impl Backend for Pretend {
    fn describe(&self) -> String {
        "pretended".into()
    }

    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Graphs<ProgramMemory> {
        self.cpu.plan(graph, bindings)
    }

    fn plan_placed(&self, graph: &Graph, bindings: &Bindings) -> Graphs<PlacedMemory> {
        Ok(PlacedMemory { host: ProgramMemory::default(), device: self.plan(graph, bindings)? })
    }

    fn compile(&self, graph: &Graph, weights: Arc<dyn WeightSource>) -> Graphs<Box<dyn Program>> {
        if self.left.load(Ordering::Relaxed) < 0 {
            return Err(failed(self.fault));
        }
        let program = self.cpu.compile(graph, weights)?;
        Ok(Box::new(PretendProgram { program, left: self.left.clone(), fault: self.fault }))
    }
}

struct PretendProgram {
    program: Box<dyn Program>,
    left: Arc<AtomicIsize>,
    fault: DeviceFault,
}

struct PretendState(ProgramState);

fn own(state: &mut ProgramState) -> Graphs<&mut ProgramState> {
    match state.inner.downcast_mut::<PretendState>() {
        Some(PretendState(own)) => Ok(own),
        None => Err(failed(DeviceFault::Driver)),
    }
}

impl Program for PretendProgram {
    fn graph(&self) -> &Graph {
        self.program.graph()
    }

    fn memory(&self, bindings: &Bindings) -> Graphs<ProgramMemory> {
        self.program.memory(bindings)
    }

    fn new_state(&self, bindings: &Bindings) -> Graphs<ProgramState> {
        let inner = Box::new(PretendState(self.program.new_state(bindings)?));
        Ok(ProgramState { inner, bindings: bindings.clone() })
    }

    fn resize_state(&self, state: &mut ProgramState, bindings: &Bindings) -> Graphs<()> {
        self.program.resize_state(own(state)?, bindings)?;
        state.bindings = bindings.clone();
        Ok(())
    }

    fn trim(&self) {
        self.program.trim();
    }

    fn start(
        &self,
        state: &mut ProgramState,
        inputs: &Inputs<'_>,
        bindings: &Bindings,
        wanted: &[&str],
    ) -> Graphs<Box<dyn Running>> {
        if self.left.fetch_sub(1, Ordering::Relaxed) <= 0 {
            self.left.store(-1, Ordering::Relaxed);
            return Err(failed(self.fault));
        }
        self.program.start(own(state)?, inputs, bindings, wanted)
    }
}

fn golden(checkpoint: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(checkpoint)
}

fn options(backend: Option<Arc<dyn Backend>>) -> EngineOptions {
    EngineOptions { threads: 1, context: 1024, prefill_chunk: 29, backend, ..EngineOptions::default() }
}

fn open(options: EngineOptions) -> Engine {
    Engine::open(golden("default"), options).unwrap()
}

/// A picture and text; long enough for the cache to grow behind it.
fn requests() -> [Request; 2] {
    let pixels = (0..64 * 90 * 3).map(|i| (i * 7 % 251) as u8).collect();
    let parts = vec![Part::Image(Picture::rgb8(64, 90, pixels).unwrap()), Part::Text("What is it?".into())];
    let ids = (0..250).map(|i| 3 + i * 31 % 900).collect();
    [Request::Messages(vec![Message::parts("user", parts)]), Request::InputIds(ids)]
}

fn generate_options() -> GenerateOptions {
    GenerateOptions { max_new_tokens: 12, ignore_eos: true, ..GenerateOptions::default() }
}

/// Tokens of a greedy answer.
fn tokens(session: &mut Session, prompt: &Prompt) -> Result<Vec<u32>> {
    let mut generation = session.generate(prompt, &generate_options())?;
    generation.text()?;
    Ok(generation.token_ids().to_vec())
}

fn answers(engine: &Engine) -> Vec<Vec<u32>> {
    let mut session = engine.session();
    requests().iter().map(|r| tokens(&mut session, &engine.prompt(r).unwrap()).unwrap()).collect()
}

#[test]
fn every_split_gives_the_answers_of_the_processor() {
    let cpu: Arc<dyn Backend> = Arc::new(CpuBackend::new(Arc::new(Cpu::new(1).unwrap())));
    for (kv, fuse) in [(KvFormat::F32, true), (KvFormat::F16, true), (KvFormat::F32, false)] {
        let with = |backend| EngineOptions { kv, fuse, ..options(backend) };
        let wanted = answers(&open(with(None)));
        let layers = Engine::inspect(golden("default"), &with(None), None).unwrap().0.layers;
        for (first, head) in (0..=layers).map(|n| (n, false)).chain([(layers, true)]) {
            let engine = open(with(Some(staged(&Pretend::healthy(), &cpu, first, head))));
            assert_eq!(answers(&engine), wanted, "{kv:?} {fuse} {first} {head}");
        }
    }
}

#[test]
fn a_budget_holds_as_many_layers_as_fit() {
    let with = |device_memory| EngineOptions {
        device_memory: Some(device_memory),
        ..options(Some(Pretend::healthy()))
    };
    let inspect = |budget| {
        let plan = Engine::inspect(golden("default"), &with(budget), None).unwrap().1;
        assert!(plan.device_total() <= budget, "{plan}");
        (plan.placement.clone().unwrap(), plan)
    };
    let (all, whole) = inspect(u64::MAX);
    assert_eq!((all.layers, all.head, all.embedding, all.vision), (3, true, true, Some(true)));
    let (none, plan) = inspect(0);
    assert_eq!((none.layers, none.head, none.vision, plan.device_total()), (0, false, Some(false), 0));
    let least = none.least.unwrap();
    let text = none.to_string();
    assert!(
        text.starts_with("0 of 3 decoder layers on the device") && text.contains(&least.to_string()),
        "{text}"
    );
    assert_eq!((inspect(least).0.layers, inspect(least - 1).0.layers), (1, 0));

    // Without room for the vision encoder, more budget is never fewer layers.
    let wanted = answers(&open(options(None)));
    let mut layers = Vec::new();
    for budget in [0, least, least + least / 2, 2 * least, 3 * least] {
        let (placement, plan) = inspect(budget);
        assert_eq!(placement.vision, Some(false));
        assert_eq!(plan.total() - plan.device_total() + plan.device_total(), plan.total());
        assert_eq!(answers(&open(with(budget))), wanted, "{placement}");
        layers.push(placement.layers);
    }
    assert!(layers.is_sorted() && layers.contains(&2) && layers.last() == Some(&3), "{layers:?}");
    // Everything but the embedding: the last step before all.
    let (most, _) = inspect(whole.device_total() + (1 << 30));
    assert_eq!(most, Placement { budget: most.budget, ..all });
}

#[test]
fn a_picture_beyond_the_device_is_refused_with_figures() {
    let with = |budget| EngineOptions {
        device_memory: Some(budget),
        context: 8192,
        ..options(Some(Pretend::healthy()))
    };
    let screen = Some((1080, 2400));
    let needed = Engine::inspect(golden("default"), &with(u64::MAX), screen).unwrap().1.device_total();
    let engine = open(with(needed));
    let image = Picture::rgb8(1232, 2492, vec![9; 1232 * 2492 * 3]).unwrap();
    let request = Request::Messages(vec![Message::parts("user", vec![Part::Image(image)])]);
    let prompt = engine.prompt(&request).unwrap();
    let refused = engine.session().generate(&prompt, &generate_options()).map(|_| ());
    assert!(
        matches!(refused, Err(Error::DeviceBudget { budget, needed: n, .. }) if budget == needed && n > needed)
    );
}

#[test]
fn a_device_that_fails_is_a_typed_error_or_the_processor_goes_on() {
    let wanted = answers(&open(options(None)));
    let mut moved = 0;
    for runs in 0..40 {
        for fault in [DeviceFault::Lost, DeviceFault::OutOfMemory] {
            let device = Pretend::failing_after(runs, fault);
            let engine = open(EngineOptions { fallback: Fallback::Cpu, ..options(Some(device)) });
            assert_eq!(answers(&engine), wanted, "{runs} {fault:?}");
            assert_eq!(engine.device_failure().is_some(), engine.device().starts_with("cpu"));
            moved += usize::from(engine.device_failure().is_some_and(|why| why.contains("it failed")));

            let engine = open(options(Some(Pretend::failing_after(runs, fault))));
            let mut session = engine.session();
            for request in requests() {
                if let Err(error) = tokens(&mut session, &engine.prompt(&request).unwrap()) {
                    assert_eq!(error.device_fault(), Some(fault));
                }
            }
        }
    }
    // Both answers together take fewer runs than the last ones allow.
    assert!(moved > 60 && moved < 80, "{moved}");
}

#[test]
fn an_answer_says_that_the_device_failed_under_it_and_others_follow() {
    let device = Pretend::failing_after(20, DeviceFault::Lost);
    let engine = open(EngineOptions { fallback: Fallback::Cpu, ..options(Some(device)) });
    let wanted = answers(&open(options(None)));
    let prompts = requests().map(|r| engine.prompt(&r).unwrap());
    let (mut first, mut second) = (engine.session(), engine.session());
    let (mut said, mut failure) = (Vec::new(), Vec::new());
    let (a, b) = (generate_options(), generate_options());
    let mut first = first.generate(&prompts[0], &a).unwrap();
    let mut second = second.generate(&prompts[1], &b).unwrap();
    // Token by token in turn: the second conversation finds out that the first one moved, or the other way round.
    loop {
        let (x, y) = (first.next(), second.next());
        if x.is_none() && y.is_none() {
            break;
        }
        x.into_iter().chain(y).for_each(|piece| drop(piece.unwrap()));
    }
    for generation in [&first, &second] {
        said.push(generation.token_ids().to_vec());
        failure.push(generation.device_failure().map(str::to_owned));
        assert!(generation.timings().recovery.as_nanos() > 0);
    }
    assert_eq!(said, wanted);
    assert!(failure.iter().all(|f| f.as_deref().is_some_and(|f| f.contains("pretended"))), "{failure:?}");
}

#[test]
fn a_device_that_fails_at_load_is_replaced_where_that_is_wanted() {
    let broken = || Some(Pretend::failing_after(-1, DeviceFault::OutOfMemory));
    let refused = Engine::open(golden("default"), options(broken())).map(|_| ());
    assert_eq!(refused.unwrap_err().device_fault(), Some(DeviceFault::OutOfMemory));
    let engine = open(EngineOptions { fallback: Fallback::Cpu, ..options(broken()) });
    assert!(engine.device().starts_with("cpu"));
    assert!(engine.device_failure().is_some_and(|why| why.contains("it failed")));
    assert_eq!(answers(&engine), answers(&open(options(None))));
}
