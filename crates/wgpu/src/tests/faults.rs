//! Devices that fail, kernels that are refused, inputs that are wrong: typed errors, memory back to where it was.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pocketglm_graph::{
    Backend, Bindings, DeviceFault, Dim, Error, GraphBuilder, Inputs, Program, Result, passes,
};
use pocketglm_tensor::{Cpu, DType, Tensor};

use super::{Table, open};
use crate::cases::{all, compare, quick};
use crate::features::Feature;
use crate::{GpuOptions, WgpuBackend};

#[test]
fn an_adapter_that_is_not_there_is_named() {
    let options = GpuOptions { adapter: Some("no such adapter".into()), ..GpuOptions::default() };
    let error = WgpuBackend::open(Arc::new(Cpu::new(1).unwrap()), &options).err().unwrap();
    assert_eq!(error.device_fault(), Some(DeviceFault::Absent));
    let text = error.to_string();
    assert!(text.contains("no such adapter") || text.contains("no Vulkan"), "{text}");
}

/// Kernels that are compiled wrong, or that a driver refuses.
fn spoiled(key: &'static str, from: &'static str, to: &'static str) -> Option<WgpuBackend> {
    let mut backend = open(&GpuOptions { untested: true, ..GpuOptions::default() })?;
    backend.device.pipelines.spoil(key, from, to);
    backend.test().unwrap();
    Some(backend)
}

#[test]
fn features_that_compute_wrong_results_are_refused_and_the_rest_is_right() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    assert!(backend.info().refused.is_empty(), "{:?}", backend.info().refused);
    for (feature, key, from, to) in [
        (Feature::Subgroups, "SUBGROUP", "subgroupAdd(", "0.5 * subgroupAdd("),
        (Feature::PackedDot, "QUANT", "dot4I8Packed(", "1 + dot4I8Packed("),
        (Feature::PackedDot, "QUANT", "fn main(", "fn main(garbage"),
    ] {
        if !backend.device.uses(feature) {
            eprintln!("SKIPPED: the adapter does not offer {}", feature.name());
            continue;
        }
        let Some(spoiled) = spoiled(key, from, to) else { return };
        assert!(!spoiled.device.uses(feature), "{} with `{to}` was not noticed", feature.name());
        let shown = spoiled.describe();
        assert!(shown.contains("not used: ") && shown.contains(feature.name()), "{shown}");
        // What was spoiled is not used any more: every case of the start-up test is right without it.
        for case in quick().unwrap() {
            let wanted = case.wanted(&super::scalar()).unwrap();
            compare(&wanted, &case.run(&spoiled, true).unwrap(), case.bound).unwrap();
        }
    }
}

#[test]
fn plain_kernels_that_are_wrong_or_refused_are_an_error_of_opening() {
    for (from, to, said) in [
        ("fn main(", "fn main(garbage", "refused"),
        ("acc[i] * p.factor", "acc[i] * p.factor * 2.0", "start-up test"),
    ] {
        let Some(mut backend) = open(&GpuOptions { untested: true, ..GpuOptions::default() }) else { return };
        assert!(backend.device.pipelines.spoil("gemm", from, to), "nothing has `{from}`");
        let error = backend.test().unwrap_err();
        assert_eq!(error.device_fault(), Some(DeviceFault::Driver), "{error}");
        assert!(error.to_string().contains(said) || error.to_string().contains("start-up test"), "{error}");
    }
}

#[test]
fn a_kernel_that_writes_beside_its_result_fails_a_guarded_run() {
    let guarded = GpuOptions { guarded: true, ..GpuOptions::default() };
    let Some(backend) = open(&guarded) else { return };
    let cases = all().unwrap();
    let case = cases.iter().find(|c| c.op == "scale").unwrap();
    case.run(&backend, true).unwrap();
    // One element too many.
    assert!(backend.device.pipelines.spoil("unary", "i >= p.n", "i > p.n"));
    backend.device.pipelines.forget();
    let error = case.run(&backend, true).unwrap_err();
    assert!(error.to_string().contains("where no value lies"), "{error}");
}

// Rows of a table by index, into a cache, and attention of a kind: what a step of a generation does.
const ROWS: usize = 40;
const WIDTH: usize = 16;
const CAPACITY: usize = 12;

fn program(backend: &WgpuBackend) -> Result<Box<dyn Program>> {
    let values: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i as f32).sin()).collect();
    let source = Table(Tensor::from_f32(&[ROWS, WIDTH], &values)?);
    let mut g = GraphBuilder::new(&source);
    let (t, past) = (Dim::symbol("T"), Dim::symbol("P"));
    let ids = g.input("ids", DType::I32, std::slice::from_ref(&t))?;
    let table = g.weight("table", &[ROWS, WIDTH])?;
    let x = g.gather_rows(table, ids)?;
    let state = g.kv_state("k", CAPACITY.into(), 2, WIDTH / 2)?;
    let state = g.kv_append(x, state, past)?;
    let all = g.kv_read(state, CAPACITY.into())?;
    let all = g.scale(all, 2.0)?;
    let logits = g.matmul(x, table, true)?;
    let [best, _] = g.top_k(logits, 1)?;
    g.output("all", all);
    g.output("best", best);
    let mut graph = g.finish();
    passes::optimise(&mut graph)?;
    backend.compile(&graph, Arc::new(source))
}

fn sizes(t: usize, past: usize) -> Bindings {
    Bindings::new().with("T", t).with("P", past)
}

#[test]
fn a_device_that_goes_at_any_point_of_a_generation_is_a_typed_error_and_leaks_nothing() {
    let mut failed = 0;
    for point in 0..50 {
        let Some(backend) = open(&GpuOptions { untested: true, ..GpuOptions::default() }) else { return };
        let start = std::cell::Cell::new(None);
        let at = std::cell::Cell::new(0);
        // Counts the points of the generation, and loses the device at one of them.
        let pass = || {
            if at.replace(at.get() + 1) == point {
                backend.destroy();
                start.set(Some(Instant::now()));
            }
        };
        let generation = || -> Result<()> {
            pass();
            let program = program(&backend)?;
            pass();
            let mut state = program.new_state(&Bindings::new())?;
            pass();
            for step in 0..10 {
                let inputs = Inputs::new();
                let inputs = if step == 0 { inputs.i32("ids", &[3]) } else { inputs.last("ids", "best") };
                let running = program.start(&mut state, &inputs, &sizes(1, step), &["best", "all"])?;
                pass();
                running.finish()?;
                pass();
                program.memory(&sizes(1, step))?;
                pass();
                if step % 3 == 2 {
                    program.trim();
                }
                pass();
                program.resize_state(&mut state, &Bindings::new())?;
                pass();
            }
            Ok(())
        };
        let result = generation();
        assert!(at.get() > point, "the generation has only {} points", at.get());
        let Err(error) = result else { panic!("the loss at point {point} was not noticed") };
        failed += 1;
        assert_eq!(error.device_fault(), Some(DeviceFault::Lost), "point {point}: {error}");
        let took = start.get().map(|s| s.elapsed());
        assert!(took.is_some_and(|t| t < Duration::from_secs(1)), "point {point}: {took:?}");
        assert_eq!(backend.allocated(), 0, "point {point}");
    }
    assert_eq!(failed, 50);
}

#[test]
fn the_largest_of_a_row_that_is_not_finite_are_none() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    let source = Table(Tensor::from_f32(&[1, 1], &[1.0]).unwrap());
    for (n, k) in [(1025, 1), (1025, 64), (20_000, 64)] {
        let mut g = GraphBuilder::new(&source);
        let x = g.input("x", DType::F32, &[1.into(), n.into()]).unwrap();
        let x = g.scale(x, 1.0).unwrap();
        let [ids, values] = g.top_k(x, k).unwrap();
        g.output("ids", ids);
        g.output("values", values);
        let mut graph = g.finish();
        passes::optimise(&mut graph).unwrap();
        let program = backend.compile(&graph, Arc::new(Table(source.0.clone()))).unwrap();
        let mut state = program.new_state(&Bindings::new()).unwrap();
        let mut ids = |bad: Option<(usize, f32)>| {
            let mut x: Vec<f32> = (0..n).map(|i| -(i as f32)).collect();
            bad.into_iter().for_each(|(at, value)| x[at] = value);
            program
                .run(&mut state, &Inputs::new().f32("x", &x), &Bindings::new())
                .unwrap()
                .take("ids")
                .unwrap()
                .values
        };
        assert_eq!(ids(None), (0..k).map(|i| i as f32).collect::<Vec<_>>());
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1023, n - 1] {
                assert!(ids(Some((at, value))).iter().all(|id| *id == -1.0), "{value} at {at} of {n}, {k}");
            }
        }
    }
}

#[test]
fn programs_give_their_memory_back() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    assert_eq!(backend.allocated(), 0);
    for _ in 0..3 {
        let program = program(&backend).unwrap();
        let held = backend.allocated();
        assert!(held >= (ROWS * WIDTH * 4) as u64);
        let mut state = program.new_state(&Bindings::new()).unwrap();
        program.run(&mut state, &Inputs::new().i32("ids", &[1, 2]), &sizes(2, 0)).unwrap();
        assert!(backend.allocated() > held);
        program.trim();
        drop(state);
        assert!(backend.allocated() <= held + 1024, "{} of {held}", backend.allocated());
        drop(program);
        assert_eq!(backend.allocated(), 0);
    }
}

#[test]
fn indices_and_sizes_out_of_range_are_refused_before_anything_runs() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    let program = program(&backend).unwrap();
    let mut state = program.new_state(&Bindings::new()).unwrap();
    for ids in [[-1], [ROWS as i32], [i32::MAX], [i32::MIN]] {
        let error = program.run(&mut state, &Inputs::new().i32("ids", &ids), &sizes(1, 0)).unwrap_err();
        assert!(error.to_string().contains("indices below 40"), "{error}");
        assert_eq!(error.device_fault(), None);
    }
    for (t, past) in [(1, CAPACITY), (CAPACITY + 1, 0), (2, CAPACITY - 1), (1, usize::MAX / 2)] {
        let ids = vec![1; t];
        let error = program.run(&mut state, &Inputs::new().i32("ids", &ids), &sizes(t, past)).unwrap_err();
        assert!(error.to_string().contains("a state of 12"), "{t} after {past}: {error}");
    }
    for inputs in [Inputs::new(), Inputs::new().i32("ids", &[1, 2]), Inputs::new().f32("ids", &[1.0])] {
        let error = program.run(&mut state, &inputs, &sizes(1, 0)).unwrap_err();
        assert!(error.to_string().contains("input `ids`"), "{error}");
    }
    let error = program.run(&mut state, &Inputs::new().last("ids", "best"), &sizes(1, 0)).unwrap_err();
    assert!(error.to_string().contains("the last run did not give"), "{error}");
    let error = program.run(&mut state, &Inputs::new().i32("ids", &[1]), &Bindings::new()).unwrap_err();
    assert!(matches!(error, Error::Unbound { .. }) || error.to_string().contains("not bound"), "{error}");
    // After all of them it still runs.
    program.run(&mut state, &Inputs::new().i32("ids", &[1]), &sizes(1, 0)).unwrap();
}

#[test]
fn rows_that_no_binding_holds_are_refused_with_the_tensor_s_size() {
    let Some(backend) = open(&GpuOptions { binding_limit: Some(1 << 16), ..GpuOptions::default() }) else {
        return;
    };
    // Sixty-four rows of 2,048 values in f32 take 512 KiB.
    let source = Table(Tensor::from_f32(&[64, 2048], &vec![0.5; 64 * 2048]).unwrap());
    let mut g = GraphBuilder::new(&source);
    let x = g.input("x", DType::F32, &[1.into(), 2048.into()]).unwrap();
    let table = g.weight("table", &[64, 2048]).unwrap();
    let y = g.matmul(x, table, true).unwrap();
    g.output("y", y);
    let mut graph = g.finish();
    passes::optimise(&mut graph).unwrap();
    let error = backend.compile(&graph, Arc::new(source)).err().unwrap();
    assert_eq!(error.device_fault(), Some(DeviceFault::Unsupported));
    assert!(error.to_string().contains("do not fit a binding of"), "{error}");
    assert_eq!(backend.allocated(), 0);
}
