//! Runs that are waited for in vain, runs in parts, and the times of ops.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pocketglm_graph::{
    Arithmetic, Backend, Bindings, DeviceFault, GraphBuilder, Inputs, Outputs, Program, ProgramState, Result,
    passes,
};
use pocketglm_tensor::{Cpu, DType, Tensor};

use super::{Table, open};
use crate::{GpuOptions, WgpuBackend};

/// `layers` products of `rows` rows with a table of `n` columns, each scaled.
fn program(backend: &dyn Backend, [rows, n, layers]: [usize; 3]) -> Box<dyn Program> {
    let values: Vec<f32> = (0..n * n).map(|i| ((i % 97) as f32 - 48.0) / (24 * n) as f32).collect();
    let source = Table(Tensor::from_f32(&[n, n], &values).unwrap());
    let mut g = GraphBuilder::new(&source);
    let mut x = g.input("x", DType::F32, &[rows.into(), n.into()]).unwrap();
    let table = g.weight("table", &[n, n]).unwrap();
    for i in 0..layers {
        x = g.scoped(&format!("layers.{i}"), |g| {
            let y = g.matmul(x, table, true).unwrap();
            g.scale(y, 0.25).unwrap()
        });
    }
    g.output("y", x);
    let mut graph = g.finish();
    passes::prepare(&mut graph).unwrap();
    backend.compile(&graph, Arc::new(source)).unwrap()
}

fn run(program: &dyn Program, state: &mut ProgramState, [rows, n, _]: [usize; 3]) -> Result<Outputs> {
    let x: Vec<f32> = (0..rows * n).map(|i| ((i % 13) as f32 - 6.0) * 0.1).collect();
    program.run(state, &Inputs::new().f32("x", &x), &Bindings::new())
}

fn values(mut outputs: Outputs) -> Vec<f32> {
    outputs.take("y").unwrap().values
}

fn untested() -> Option<WgpuBackend> {
    open(&GpuOptions { untested: true, ..GpuOptions::default() })
}

#[test]
fn a_result_that_does_not_come_in_time_is_a_typed_error_after_which_everything_goes_on() {
    let Some(backend) = untested() else { return };
    // A tenth of a second on software Vulkan, at the least.
    let sizes = [64, 1024, 3];
    let slow = program(&backend, sizes);
    let mut state = slow.new_state(&Bindings::new()).unwrap();
    let wanted = values(run(&*slow, &mut state, sizes).unwrap());
    let held = backend.allocated();
    for patience in [Duration::ZERO, Duration::from_millis(1)] {
        backend.device.set_patience(patience);
        let start = Instant::now();
        let error = run(&*slow, &mut state, sizes).unwrap_err();
        assert_eq!(error.device_fault(), Some(DeviceFault::Timeout), "{error}");
        assert!(error.to_string().contains("no progress within"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        // The buffer of the result that did not come is given up.
        assert!(backend.allocated() <= held, "{} of {held}", backend.allocated());
    }
    backend.device.set_patience(Duration::from_secs(60));
    assert_eq!(values(run(&*slow, &mut state, sizes).unwrap()), wanted);
    backend.device.set_patience(Duration::ZERO);
    assert!(run(&*slow, &mut state, sizes).is_err());
    drop(state);
    drop(slow);
    assert_eq!(backend.allocated(), 0);
}

#[test]
fn a_run_in_parts_gives_the_same_and_each_part_is_progress() {
    let Some(backend) = untested() else { return };
    let sizes = [3, 64, 5];
    let program = program(&backend, sizes);
    let mut state = program.new_state(&Bindings::new()).unwrap();
    let submissions = |state: &mut ProgramState| {
        let before = backend.device.ended.load(Ordering::Relaxed);
        let found = values(run(&*program, state, sizes).unwrap());
        let _ = backend.device.device.poll(wgpu::PollType::Poll);
        (found, backend.device.ended.load(Ordering::Relaxed) - before)
    };
    let (wanted, one) = submissions(&mut state);
    assert_eq!(one, 1);
    backend.device.part.store(1, Ordering::Relaxed);
    assert_eq!(submissions(&mut state), (wanted, 10), "one for each op");
}

#[test]
fn every_op_of_a_run_is_timed_and_the_result_stays_the_same() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    if !backend.device.has_timestamps() {
        eprintln!("SKIPPED: the adapter offers no timestamps");
        return;
    }
    // More dispatches than one set has timestamps for.
    for sizes in [[40, 64, 2], [1, 8, 1100]] {
        let program = program(&backend, sizes);
        let mut state = program.new_state(&Bindings::new()).unwrap();
        let wanted = values(run(&*program, &mut state, sizes).unwrap());
        assert!(backend.take_profile().is_empty(), "nobody asked for it");
        backend.profile(true).unwrap();
        assert_eq!(values(run(&*program, &mut state, sizes).unwrap()), wanted);
        let runs = backend.take_profile();
        assert_eq!(runs.len(), 1);
        let ops = &runs[0].ops;
        let names: Vec<String> = program.graph().op_names().into_iter().map(|(_, name)| name).collect();
        assert_eq!(ops.iter().map(|o| o.name.clone()).collect::<Vec<_>>(), names);
        assert!(ops.iter().all(|o| o.seconds >= 0.0 && o.seconds < 10.0 && !o.kernels.is_empty()));
        assert!(ops.iter().map(|o| o.seconds).sum::<f64>() > 0.0);
        let [rows, n, layers] = sizes.map(|s| s as f64);
        let operations: f64 = ops.iter().map(|o| o.cost.operations).sum();
        assert_eq!(operations, layers * (2.0 * rows * n * n + rows * n));
        // The device pads rows to 32 values.
        let held = n * (n / 32.0).ceil() * 32.0;
        assert_eq!(ops[0].cost.bytes, 4.0 * (held + 2.0 * rows * n));
        backend.profile(false).unwrap();
        run(&*program, &mut state, sizes).unwrap();
        assert!(backend.take_profile().is_empty());
    }
}

#[test]
fn rates_are_measured_for_the_arithmetic_that_kernels_use() {
    let Some(backend) = open(&GpuOptions::default()) else { return };
    let rates = backend.arithmetic_rates().unwrap();
    let rate = |kind| rates.iter().find(|(k, _)| *k == kind).map(|(_, rate)| *rate);
    assert!(rate(Arithmetic::F32).unwrap() > 1e6, "{rates:?}");
    assert_eq!(rate(Arithmetic::PackedBytes).is_some(), backend.device.packed_dot());
    assert_eq!(rate(Arithmetic::F16Matrices).is_some(), backend.device.cooperative());
    assert!(backend.copy_rate().unwrap().unwrap() > 1e6);
    assert_eq!(backend.allocated(), 0);
}

#[test]
fn the_processor_says_that_it_times_no_ops() {
    let cpu = pocketglm_graph::CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
    let error = cpu.profile(true).unwrap_err();
    assert_eq!(error.device_fault(), Some(DeviceFault::Unsupported));
    assert!(error.to_string().contains("on GPUs alone"), "{error}");
    assert!(cpu.profile(false).is_ok() && cpu.take_profile().is_empty());
}
