//! Programs over quantised weights, against the same programs over the values that those weights stand for.

use std::collections::HashMap;
use std::sync::Arc;

use pocketglm_quant::{Method, RowOptions, dequantise_row, quantise_row};
use pocketglm_tensor::{Cpu, DType, Error as TensorError, Tensor, TensorInfo, WeightSource};

use crate::passes::Precision;
use crate::{Backend, Bindings, CpuBackend, Dim, Graph, GraphBuilder, Inputs, passes};

struct Source(HashMap<String, Tensor>);

impl WeightSource for Source {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.keys().filter_map(|name| self.info(name)).collect()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let t = self.0.get(name)?;
        Some(TensorInfo { name: name.into(), dtype: t.dtype(), shape: t.shape().to_vec() })
    }
    fn tensor(&self, name: &str) -> Result<Tensor, TensorError> {
        self.0
            .get(name)
            .cloned()
            .ok_or_else(|| TensorError::Missing { name: name.into(), place: "test".into() })
    }
}

const K: usize = 256;

fn noise(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn quantised(dtype: DType, rows: usize, seed: u32) -> Tensor {
    let mut bytes = Vec::new();
    for row in noise(seed, rows * K).chunks(K) {
        let mut out = Vec::new();
        quantise_row(dtype, row, &RowOptions::default(), &mut out).unwrap();
        bytes.extend(out);
    }
    Tensor::new(dtype, &[rows, K], bytes.into()).unwrap()
}

fn widened(t: &Tensor) -> Tensor {
    let mut values = vec![0.0; t.elements()];
    let bytes = t.dtype().row_bytes(K).unwrap();
    for (row, out) in t.bytes().chunks(bytes).zip(values.chunks_mut(K)) {
        dequantise_row(t.dtype(), row, out).unwrap();
    }
    Tensor::from_f32(t.shape(), &values).unwrap()
}

/// Embedding, norm, q and k and v of three formats, gate and up in one, and back.
fn model(dtype: DType, seed: u32) -> Source {
    let other = DType::from_name("Q6_K").unwrap();
    let tensors = [
        ("table", quantised(dtype, 40, seed)),
        ("q.weight", quantised(dtype, 64, seed + 1)),
        ("k.weight", quantised(other, 24, seed + 2)),
        ("gate_up.weight", quantised(dtype, 2 * K, seed + 3)),
        ("down.weight", quantised(other, K, seed + 4)),
        ("norm.weight", Tensor::from_f32(&[K], &vec![0.5; K]).unwrap()),
    ];
    Source(tensors.into_iter().map(|(name, t)| (name.to_string(), t)).collect())
}

fn graph(source: &Source, fuse: bool) -> Graph {
    let mut graph = built(source);
    passed(&mut graph, fuse);
    graph
}

fn passed(graph: &mut Graph, fuse: bool) {
    if fuse { passes::optimise(graph) } else { passes::prepare(graph) }.unwrap();
}

fn built(source: &Source) -> Graph {
    let mut g = GraphBuilder::new(source);
    let t = Dim::symbol("T");
    let ids = g.input("ids", DType::I32, std::slice::from_ref(&t)).unwrap();
    let table = g.weight("table", &[40, K]).unwrap();
    let x = g.gather_rows(table, ids).unwrap();
    let x = g.rms_norm("norm", x, 1e-5).unwrap();
    let q = g.linear("q", x, 64, false).unwrap();
    let k = g.linear("k", x, 24, false).unwrap();
    let both = g.linear("gate_up", x, 2 * K, false).unwrap();
    let gate = g.slice(both, 1, 0, K).unwrap();
    let up = g.slice(both, 1, K, K).unwrap();
    let gate = g.silu(gate).unwrap();
    let h = g.mul(gate, up).unwrap();
    let y = g.linear("down", h, K, false).unwrap();
    for (name, v) in [("q", q), ("k", k), ("y", y)] {
        g.output(name, v);
    }
    g.finish()
}

fn run(source: Source, fuse: bool, ids: &[i32]) -> Vec<Vec<f32>> {
    let graph = graph(&source, fuse);
    run_graph(graph, source, ids)
}

fn run_graph(graph: Graph, source: Source, ids: &[i32]) -> Vec<Vec<f32>> {
    let backend = CpuBackend::new(Arc::new(Cpu::new(2).unwrap()));
    let program = backend.compile(&graph, Arc::new(source)).unwrap();
    let mut bindings = Bindings::new();
    bindings.set("T", ids.len());
    let mut state = program.new_state(&bindings).unwrap();
    let mut outputs = program.run(&mut state, &Inputs::new().i32("ids", ids), &bindings).unwrap();
    ["q", "k", "y"].map(|name| outputs.take(name).unwrap().values).into()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let squares = |x: f32, y: f32| f64::from(x - y).powi(2);
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| squares(a, b)).sum();
    (difference / b.iter().map(|&b| squares(b, 0.0)).sum::<f64>()).sqrt() as f32
}

/// Rounding activations to a byte of 128 steps costs 0.6 % of their size, twice in a row for `y`.
const ACTIVATIONS: f32 = 0.02;

#[test]
fn programs_over_quantised_weights_are_those_over_their_values() {
    for name in ["Q8_0", "Q4_0", "Q4_K", "Q5_1", "Q2_K", "IQ4_XS", "int8-row", "int4-g64-asym", "int2-g32"] {
        let dtype = DType::from_name(name).unwrap();
        let values = || {
            Source(
                model(dtype, 7)
                    .0
                    .iter()
                    .map(|(n, t)| {
                        (
                            n.clone(),
                            match t.dtype() {
                                DType::F32 => t.clone(),
                                _ => widened(t),
                            },
                        )
                    })
                    .collect(),
            )
        };
        for ids in [&[3][..], &[0, 39, 7, 7, 12, 20, 1]] {
            let wanted = run(values(), false, ids);
            for fuse in [false, true] {
                let found = run(model(dtype, 7), fuse, ids);
                for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                    let d = distance(found, wanted);
                    assert!(d < ACTIVATIONS, "{name} fuse {fuse} output {i}: {d}");
                }
                // The checker sees other weights.
                let other = run(model(dtype, 8), fuse, ids);
                assert!(distance(&other[0], &wanted[0]) > 0.5);
            }
        }
    }
}

/// The values that [`model`] was quantised from.
fn floats(seed: u32) -> Source {
    let of = |rows: usize, seed| Tensor::from_f32(&[rows, K], &noise(seed, rows * K)).unwrap();
    let tensors = [
        ("table", of(40, seed)),
        ("q.weight", of(64, seed + 1)),
        ("k.weight", of(24, seed + 2)),
        ("gate_up.weight", of(2 * K, seed + 3)),
        ("down.weight", of(K, seed + 4)),
        ("norm.weight", Tensor::from_f32(&[K], &vec![0.5; K]).unwrap()),
    ];
    Source(tensors.into_iter().map(|(name, t)| (name.to_string(), t)).collect())
}

#[test]
fn quantise_and_dequantise_nodes_make_a_float_graph_compute_what_a_quantised_one_does() {
    let ids = [0, 39, 7, 7, 12, 20, 1];
    for name in ["Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "int8-row", "int4-g64-asym", "int2-g32"] {
        let dtype = DType::from_name(name).unwrap();
        let wanted = run(model(dtype, 7), true, &ids);
        let precision = |name: &str| {
            let other = matches!(name, "k.weight" | "down.weight");
            let dtype = if other { DType::from_name("Q6_K").unwrap() } else { dtype };
            Some(Precision { dtype, method: Method::Round, input_range: None })
        };
        for fuse in [false, true] {
            let source = floats(7);
            let mut graph = built(&source);
            let nodes = passes::insert_quantise(&mut graph, &precision).unwrap();
            // Five weights; the norm's result for two kinds of weights, or one where their inputs are rounded alike.
            assert!((7..=8).contains(&nodes), "{name}: {nodes}");
            passed(&mut graph, fuse);
            let found = run_graph(graph, source, &ids);
            let plain = run(floats(7), fuse, &ids);
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                // `y` rounds what was rounded: a value between two codes may fall to either.
                let most = if i < 2 { 1e-5 } else { 2e-3 };
                let d = distance(found, wanted);
                assert!(d < most, "{name} fuse {fuse} output {i}: {d}");
                assert!(distance(&plain[i], wanted) > most, "{name}: the plain graph is no worse");
            }
        }
    }
}

#[test]
fn a_format_that_cannot_hold_a_row_is_refused_by_its_node() {
    let source = floats(7);
    let mut graph = built(&source);
    let precision = |_: &str| {
        let dtype = DType::from_name("I32").unwrap_or(DType::I32);
        Some(Precision { dtype, method: Method::Round, input_range: None })
    };
    passes::insert_quantise(&mut graph, &precision).unwrap();
    passed(&mut graph, false);
    let backend = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
    assert!(backend.compile(&graph, Arc::new(source)).is_err());
}

#[test]
fn the_plan_counts_packed_matrices_and_leaves_the_table_in_its_file() {
    let source = model(DType::from_name("Q4_0").unwrap(), 7);
    let graph = graph(&source, true);
    let backend = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
    let program = backend.compile(&graph, Arc::new(source)).unwrap();
    let mut bindings = Bindings::new();
    bindings.set("T", 4);
    let memory = program.memory(&bindings).unwrap();
    let q4 = |rows: u64| rows * (K as u64) / 32 * 18;
    // k has 24 rows, which are padded to 32 in panels.
    let q6 = |rows: u64| rows * 210;
    assert_eq!(memory.weights, 0);
    assert_eq!(memory.gathered, q4(40));
    assert_eq!(memory.converted, q4(64) + q4(512) + q6(32) + q6(256) + 4 * K as u64);
}

#[test]
fn a_scale_that_is_no_number_is_refused_with_its_place() {
    let mut source = model(DType::from_name("Q4_0").unwrap(), 7);
    let mut bytes = source.0["q.weight"].bytes().to_vec();
    // The scale of row 3's first block: NaN.
    bytes[3 * 144..3 * 144 + 2].copy_from_slice(&[0xff, 0x7f]);
    let bad = Tensor::new(DType::from_name("Q4_0").unwrap(), &[64, K], bytes.into()).unwrap();
    source.0.insert("q.weight".into(), bad);
    let graph = graph(&source, true);
    let backend = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
    let error = backend.compile(&graph, Arc::new(source)).err().unwrap().to_string();
    assert!(error.contains("q.weight") && error.contains("row 3"), "{error}");
}

/// Attention between positions over projections of the source's type.
fn between_positions(source: &Source) -> Graph {
    let mut g = GraphBuilder::new(source);
    let t = Dim::symbol("T");
    let x = g.input("x", DType::F32, &[t.clone(), K.into()]).unwrap();
    let segments = g.input("segments", DType::I32, &[2.into()]).unwrap();
    let heads = ["q", "k", "v"].map(|name| {
        let y = g.linear(name, x, 64, false).unwrap();
        g.reshape(y, &[t.clone(), 2.into(), 32.into()]).unwrap()
    });
    let mask = crate::ops::SoftmaxMask::Segments;
    let y = g.attention(heads[0], heads[1], heads[2], 0.05, mask, Some(segments)).unwrap();
    g.output("y", y);
    let mut graph = g.finish();
    passes::optimise(&mut graph).unwrap();
    graph
}

#[test]
fn attention_behind_quantised_projections_may_be_over_bytes_and_no_other() {
    let int8 = DType::from_name("int8-row").unwrap();
    let source = |dtype: Option<DType>| {
        let of = |seed| {
            let stored = quantised(int8, 64, seed);
            if dtype.is_some() { stored } else { widened(&stored) }
        };
        let tensors = [("q.weight", of(1)), ("k.weight", of(2)), ("v.weight", of(3))];
        Source(tensors.into_iter().map(|(name, t)| (name.to_string(), t)).collect())
    };
    let apply = |graph: &mut Graph| passes::apply("", passes::attend_in_int8, graph).unwrap().applied;
    assert_eq!(apply(&mut between_positions(&source(None))), 0, "f32 stays f32");
    let exact = between_positions(&source(Some(int8)));
    let mut bytes = exact.clone();
    assert_eq!(apply(&mut bytes), 1);
    assert_eq!(apply(&mut bytes), 0, "it is done once");
    let x = noise(9, 70 * K);
    let bindings = Bindings::new().with("T", 70);
    let inputs = Inputs::new().f32("x", &x).i32("segments", &[0, 70]);
    let run = |graph: &Graph| {
        let backend = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
        let program = backend.compile(graph, Arc::new(source(Some(int8)))).unwrap();
        assert!(program.memory(&bindings).unwrap().scratch > 0);
        program
            .run(&mut program.new_state(&bindings).unwrap(), &inputs, &bindings)
            .unwrap()
            .take("y")
            .unwrap()
    };
    let apart = distance(&run(&bytes).values, &run(&exact).values);
    // The result is the small mean of many values, whose errors are some thousandths of their size.
    assert!(apart > 1e-6 && apart < 4e-2, "{apart}");
}
