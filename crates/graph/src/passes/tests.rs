//! Each pass on numbers: the graph before and after gives the same results, and the pass applied where it should.

use std::sync::Arc;

use pocketglm_tensor::{Cpu, DType, Error as TensorError, KvFormat, Tensor, TensorInfo, WeightSource};

use super::*;
use crate::ops::{RopeLayout, SoftmaxMask, UnaryKind};
use crate::{Backend, Bindings, CpuBackend, Dim, GraphBuilder, Inputs, Outputs, Value, plan_memory};

/// Any tensor that is asked for, with numbers that depend on its name alone.
pub(crate) struct Invented;

fn noise(name: &str, n: usize) -> Vec<f32> {
    let mut state =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    // Variances must be positive.
    (0..n).map(|_| if name.contains("var@") { 1.5 + next() } else { next() }).collect()
}

fn shape_of(name: &str) -> Vec<usize> {
    let (_, shape) = name.rsplit_once('@').unwrap();
    shape.split('x').map(|d| d.parse().unwrap()).collect()
}

/// Weights are named `name@2x3`, so the source knows their shapes.
impl WeightSource for Invented {
    fn tensors(&self) -> Vec<TensorInfo> {
        Vec::new()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(TensorInfo { name: name.into(), dtype: DType::F32, shape: shape_of(name) })
    }
    fn tensor(&self, name: &str) -> Result<Tensor, TensorError> {
        let shape = shape_of(name);
        Tensor::from_f32(&shape, &noise(name, shape.iter().product()))
    }
}

pub(crate) fn weight(g: &mut GraphBuilder<'_>, name: &str, shape: &[usize]) -> Value {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    g.weight(&format!("{name}@{}", dims.join("x")), shape).unwrap()
}

fn t() -> Dim {
    Dim::symbol("T")
}

fn f32_input(g: &mut GraphBuilder<'_>, name: &str, shape: &[Dim]) -> Value {
    g.input(name, DType::F32, shape).unwrap()
}

/// Runs a graph on invented inputs: numbers for f32 inputs, `0..n` positions for i32 ones.
fn run(graph: &Graph, bindings: &Bindings, segments: &[i32]) -> Outputs {
    let backend = CpuBackend::new(Arc::new(Cpu::new(1).unwrap()));
    let mut graph = graph.clone();
    mark_load_time(&mut graph).unwrap();
    let program = backend.compile(&graph, Arc::new(Invented)).unwrap();
    let mut given: Vec<(String, Vec<f32>, Vec<i32>)> = Vec::new();
    for node in graph.nodes() {
        if let Op::Input(i) = &node.op {
            let n: usize = crate::eval_shape(&i.meta.shape, bindings).unwrap().iter().product();
            let whole = if i.name == "segments" { segments.to_vec() } else { (0..n as i32).collect() };
            given.push((i.name.clone(), noise(&i.name, n), whole));
        }
    }
    let mut inputs = Inputs::new();
    for node in graph.nodes() {
        if let Op::Input(i) = &node.op {
            let (name, floats, whole) = given.iter().find(|(n, _, _)| *n == i.name).unwrap();
            inputs =
                if i.meta.dtype == DType::F32 { inputs.f32(name, floats) } else { inputs.i32(name, whole) };
        }
    }
    let mut state = program.new_state(bindings).unwrap();
    program.run(&mut state, &inputs, bindings).unwrap()
}

/// The largest difference between two runs, relative to the largest value.
fn distance(a: &Outputs, b: &Outputs) -> f32 {
    assert_eq!(a.0.len(), b.0.len());
    let mut worst = 0f32;
    for ((name, x), (other, y)) in a.0.iter().zip(&b.0) {
        assert_eq!((name, &x.shape), (other, &y.shape));
        let scale = y.values.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        for (x, y) in x.values.iter().zip(&y.values) {
            assert!(x.is_finite() && y.is_finite());
            worst = worst.max((x - y).abs() / scale);
        }
    }
    worst
}

/// Applies passes in order and checks the numbers; gives how often the last one applied.
#[track_caller]
fn check(build: impl Fn(&mut GraphBuilder<'_>) -> Value, passes: &[Pass]) -> (usize, Graph) {
    let mut g = GraphBuilder::new(&Invented);
    let y = build(&mut g);
    g.output("y", y);
    let before = g.finish();
    let mut after = before.clone();
    let mut applied = 0;
    for pass in passes {
        applied = pass(&mut after).unwrap();
        after.prune_and_sort();
    }
    for size in [1, 5] {
        let bindings = Bindings::new().with("T", size).with("P", 3).with("C", 16).with("G", 2);
        // States start as zeros in both runs, so the three past tokens are zeros.
        let segments = [0, size as i32];
        let (a, b) = (run(&after, &bindings, &segments), run(&before, &bindings, &segments));
        let d = distance(&a, &b);
        assert!(d < 2e-6, "T = {size}: results differ by {d:e}");
    }
    (applied, after)
}

fn names(graph: &Graph) -> Vec<&'static str> {
    graph.nodes().iter().filter(|n| !n.op.is_source() && !n.load_time).map(|n| n.op.name()).collect()
}

/// Builds with relative weight names: `linear` of the builder needs names without shapes, so tests spell it out.
fn linear(g: &mut GraphBuilder<'_>, name: &str, x: Value, n: usize, k: usize, bias: bool) -> Value {
    let w = weight(g, &format!("{name}.weight"), &[n, k]);
    let y = g.matmul(x, w, true).unwrap();
    if !bias {
        return y;
    }
    let b = weight(g, &format!("{name}.bias"), &[n]);
    g.add(y, b).unwrap()
}

#[test]
fn a_bias_becomes_part_of_its_matmul() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 7.into()]);
            linear(g, "a", x, 5, 7, true)
        },
        &[fuse_bias],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["linear"]));
}

#[test]
fn swiglu_of_one_matrix_becomes_its_epilogue() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let both = linear(g, "gate_up", x, 14, 6, false);
            let (gate, up) = (g.slice(both, 1, 0, 7).unwrap(), g.slice(both, 1, 7, 7).unwrap());
            let gate = g.silu(gate).unwrap();
            g.mul(up, gate).unwrap()
        },
        &[fuse_bias, fuse_swiglu],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["linear_swiglu"]));
}

#[test]
fn swiglu_with_exchanged_halves_is_left_alone() {
    let (applied, _) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let both = linear(g, "gate_up", x, 14, 6, false);
            let (gate, up) = (g.slice(both, 1, 7, 7).unwrap(), g.slice(both, 1, 0, 7).unwrap());
            let gate = g.silu(gate).unwrap();
            g.mul(up, gate).unwrap()
        },
        &[fuse_bias, fuse_swiglu],
    );
    assert_eq!(applied, 0);
}

#[test]
fn swiglu_of_two_matrices_becomes_one_layer() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let (gate, up) = (linear(g, "gate", x, 9, 6, true), linear(g, "up", x, 9, 6, false));
            let gate = g.silu(gate).unwrap();
            g.mul(gate, up).unwrap()
        },
        &[fuse_bias, fuse_swiglu],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["linear_swiglu"]));
}

#[test]
fn a_value_that_is_also_a_result_is_not_fused_away() {
    let mut g = GraphBuilder::new(&Invented);
    let x = f32_input(&mut g, "x", &[t(), 6.into()]);
    let (gate, up) = (linear(&mut g, "gate", x, 9, 6, false), linear(&mut g, "up", x, 9, 6, false));
    g.output("gate", gate);
    let a = g.silu(gate).unwrap();
    let y = g.mul(a, up).unwrap();
    g.output("y", y);
    let mut graph = g.finish();
    fuse_bias(&mut graph).unwrap();
    graph.prune_and_sort();
    assert_eq!(fuse_swiglu(&mut graph).unwrap(), 0);
}

#[test]
fn an_activation_becomes_the_epilogue_of_its_layer() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let y = linear(g, "a", x, 9, 6, true);
            g.gelu(y).unwrap()
        },
        &[fuse_bias, fuse_linear_activation],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["linear_act"]));
}

#[test]
fn a_residual_becomes_part_of_its_layer() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let r = f32_input(g, "r", &[t(), 9.into()]);
            let y = linear(g, "a", x, 9, 6, true);
            g.add(r, y).unwrap()
        },
        &[fuse_bias, fuse_linear_residual],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["linear_add"]));
}

fn rms_norm(g: &mut GraphBuilder<'_>, name: &str, x: Value, c: usize) -> Value {
    // The builder reads `{name}.weight`; the test's source wants the shape in the name.
    g.scoped(name, |g| {
        let w = weight(g, "weight", &[c]);
        g.rms_norm_by(x, w, 1e-5).unwrap()
    })
}

#[test]
fn a_norm_and_its_residual_become_one_node() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let r = f32_input(g, "r", &[t(), 6.into()]);
            let y = rms_norm(g, "n", x, 6);
            g.add(r, y).unwrap()
        },
        &[fuse_norm_add],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["norm_add"]));
}

#[test]
fn a_norm_becomes_the_prologue_of_the_layer_after_it() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let y = rms_norm(g, "n", x, 6);
            linear(g, "a", y, 4, 6, true)
        },
        &[fuse_bias, fuse_norm_linear],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["norm_linear"]));
}

#[test]
fn a_norm_with_two_users_stays() {
    let (applied, _) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let y = rms_norm(g, "n", x, 6);
            let (a, b) = (linear(g, "a", y, 4, 6, true), linear(g, "b", y, 4, 6, true));
            g.add(a, b).unwrap()
        },
        &[fuse_bias, fuse_norm_linear],
    );
    assert_eq!(applied, 0);
}

#[test]
fn a_norm_and_its_residual_become_part_of_the_layer_that_norms_the_sum() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let r = f32_input(g, "r", &[t(), 6.into()]);
            let y = rms_norm(g, "n", x, 6);
            let sum = g.add(r, y).unwrap();
            let z = rms_norm(g, "m", sum, 6);
            let z = linear(g, "a", z, 6, 6, true);
            // The sum is used again behind the layer, as a residual stream is.
            g.add(sum, z).unwrap()
        },
        &[fuse_bias, fuse_norm_add, fuse_norm_linear, fuse_norm_add_linear],
    );
    assert_eq!((applied, names(&graph)), (1, vec!["norm_linear", "add"]));
}

#[test]
fn a_sum_joins_the_head_of_an_attention_block_and_its_states_stay_last() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x0", &[t(), 10.into()]);
            let r = f32_input(g, "r", &[t(), 10.into()]);
            let y = rms_norm(g, "n", x, 10);
            let sum = g.add(r, y).unwrap();
            let z = rms_norm(g, "m", sum, 10);
            let a = cached_attention_of(g, z);
            let a = linear(g, "o", a, 10, 24, true);
            g.add(sum, a).unwrap()
        },
        &[fuse_bias, fuse_attention, fuse_qkv, fuse_norm_add, fuse_norm_linear, fuse_norm_add_linear],
    );
    assert_eq!(applied, 1);
    assert!(names(&graph).contains(&"norm_qkv_rope_append"));
}

/// An attention block over a cache, as the decoder builds it: 4 query heads, 2 key heads of 6, 4 rotated.
fn cached_attention(g: &mut GraphBuilder<'_>) -> Value {
    let x = f32_input(g, "x", &[t(), 10.into()]);
    cached_attention_of(g, x)
}

fn cached_attention_of(g: &mut GraphBuilder<'_>, x: Value) -> Value {
    let positions = g.input("positions", DType::I32, &[3.into(), t()]).unwrap();
    let table = g.rope_table(positions, 100.0, &[0, 2], 2).unwrap();
    let keys = Dim::symbol("P") + t();
    let rotated = |g: &mut GraphBuilder<'_>, name: &str, heads: usize| {
        let y = linear(g, name, x, heads * 6, 10, true);
        let y = g.reshape(y, &[t(), heads.into(), 6.into()]).unwrap();
        g.rope(y, table, RopeLayout::Interleaved).unwrap()
    };
    let q = rotated(g, "q", 4);
    let k = rotated(g, "k", 2);
    let k = g.reshape(k, &[t(), 12.into()]).unwrap();
    let v = linear(g, "v", x, 12, 10, true);
    let cached = |g: &mut GraphBuilder<'_>, name: &str, rows: Value| {
        let state = g.kv_state(name, Dim::symbol("C"), 2, 6).unwrap();
        let state = g.kv_append(rows, state, Dim::symbol("P")).unwrap();
        g.kv_read(state, keys.clone()).unwrap()
    };
    let (k, v) = (cached(g, "ks", k), cached(g, "vs", v));
    g.attention(q, k, v, 0.4, SoftmaxMask::Causal { past: Dim::symbol("P") }, None).unwrap()
}

#[test]
fn attention_over_a_cache_becomes_one_node() {
    let (applied, graph) = check(cached_attention, &[fuse_bias, fuse_attention]);
    assert_eq!(applied, 1);
    assert!(!names(&graph).contains(&"softmax"));
}

#[test]
fn projections_rope_and_append_become_one_node() {
    let (applied, graph) = check(cached_attention, &[fuse_bias, fuse_attention, fuse_qkv]);
    assert_eq!(applied, 1);
    assert_eq!(names(&graph), ["rope_table", "norm_qkv_rope_append", "attention"]);
}

/// How far two runs over a cache of a format may lie apart where one of them rounds a key or value the other way: a
/// step of the format, of one of several keys.
const STEPS: [(KvFormat, f32); 4] =
    [(KvFormat::F32, 2e-6), (KvFormat::F16, 1e-3), (KvFormat::Int8, 8e-3), (KvFormat::Int4, 7e-2)];

fn cache_graph(format: KvFormat, passes: &[Pass]) -> Graph {
    let mut g = GraphBuilder::new(&Invented).with_kv_format(format);
    let y = cached_attention(&mut g);
    g.output("y", y);
    let mut graph = g.finish();
    for pass in passes {
        pass(&mut graph).unwrap();
        graph.prune_and_sort();
    }
    mark_load_time(&mut graph).unwrap();
    graph
}

const FUSED: &[Pass] = &[fuse_bias, fuse_attention, fuse_qkv];

/// Runs the steps `lengths` one after the other, with room for `capacity` tokens at first and more when needed, and
/// gives the results of all tokens.
fn in_steps(graph: &Graph, lengths: &[usize], capacity: usize) -> Vec<f32> {
    let program = CpuBackend::new(Arc::new(Cpu::new(1).unwrap())).compile(graph, Arc::new(Invented)).unwrap();
    let x = noise("x", 10 * lengths.iter().sum::<usize>());
    let mut state = program.new_state(&Bindings::new().with("C", capacity)).unwrap();
    let (mut past, mut results) = (0, Vec::new());
    for &t in lengths {
        let positions: Vec<i32> = (0..3 * t).map(|i| (past + i % t) as i32).collect();
        if past + t > state.bindings.get("C").unwrap() {
            program.resize_state(&mut state, &Bindings::new().with("C", past + t)).unwrap();
        }
        let capacity = state.bindings.get("C").unwrap();
        let inputs = Inputs::new().f32("x", &x[10 * past..10 * (past + t)]).i32("positions", &positions);
        let bindings = Bindings::new().with("T", t).with("P", past).with("C", capacity);
        results.extend(program.run(&mut state, &inputs, &bindings).unwrap().take("y").unwrap().values);
        past += t;
    }
    results
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f32::max)
}

#[test]
fn caches_of_every_format_are_fused_and_compute_the_same() {
    for (format, step) in STEPS {
        let (fused, plain) = (cache_graph(format, FUSED), cache_graph(format, &[]));
        assert_eq!(names(&fused), ["rope_table", "norm_qkv_rope_append", "attention"], "{format}");
        let (a, b) = (in_steps(&fused, &[5, 1, 3], 16), in_steps(&plain, &[5, 1, 3], 16));
        assert!(apart(&a, &b) <= step, "{format}: {}", apart(&a, &b));
    }
}

#[test]
fn step_by_step_equals_one_step_in_every_format() {
    for (format, step) in STEPS {
        let graph = cache_graph(format, FUSED);
        let whole = in_steps(&graph, &[12], 12);
        for lengths in [&[1; 12][..], &[5, 1, 6], &[11, 1]] {
            // From the smallest capacity, so that the cache grows with what it holds.
            let steps = in_steps(&graph, lengths, 1);
            assert!(apart(&steps, &whole) <= step, "{format} {lengths:?}: {}", apart(&steps, &whole));
        }
    }
}

#[test]
fn formats_differ_from_f32_by_their_steps_only() {
    let exact = in_steps(&cache_graph(KvFormat::F32, FUSED), &[7, 1, 1], 9);
    let mut last = 0.0;
    for (format, most) in [(KvFormat::F16, 1e-3), (KvFormat::Int8, 2e-2), (KvFormat::Int4, 2e-1)] {
        let found = apart(&in_steps(&cache_graph(format, FUSED), &[7, 1, 1], 9), &exact);
        assert!(found <= most && found > last, "{format}: {found}, after {last}");
        last = found;
    }
}

#[test]
fn the_plan_counts_the_bytes_of_the_format() {
    let cpu = Cpu::new(1).unwrap();
    let bindings = Bindings::new().with("T", 1).with("P", 3).with("C", 16);
    // Two states of 16 tokens with two heads of six.
    for (format, head) in
        [(KvFormat::F32, 24), (KvFormat::F16, 12), (KvFormat::Int8, 2 + 6), (KvFormat::Int4, 4 + 16)]
    {
        let memory = plan_memory(&cache_graph(format, FUSED), &bindings, &cpu).unwrap();
        assert_eq!(memory.states, 2 * 16 * 2 * head, "{format}");
    }
}

/// Attention of a vision block: one matrix for q, k and v; two segments.
fn segment_attention(g: &mut GraphBuilder<'_>) -> Value {
    let x = f32_input(g, "x", &[t(), 8.into()]);
    let positions = g.input("positions", DType::I32, &[2.into(), t()]).unwrap();
    let segments = g.input("segments", DType::I32, &[Dim::symbol("G")]).unwrap();
    let table = g.rope_table(positions, 100.0, &[0, 1], 1).unwrap();
    let qkv = linear(g, "qkv", x, 24, 8, false);
    let heads: Vec<Value> = (0..3)
        .map(|i| {
            let rows = g.slice(qkv, 1, i * 8, 8).unwrap();
            let rows = g.reshape(rows, &[t(), 2.into(), 4.into()]).unwrap();
            if i < 2 { g.rope(rows, table, RopeLayout::Half).unwrap() } else { rows }
        })
        .collect();
    g.attention(heads[0], heads[1], heads[2], 0.5, SoftmaxMask::Segments, Some(segments)).unwrap()
}

#[test]
fn attention_within_segments_becomes_two_nodes() {
    let (applied, graph) = check(segment_attention, &[fuse_bias, fuse_attention, fuse_qkv]);
    assert_eq!(applied, 1);
    assert_eq!(names(&graph), ["rope_table", "norm_qkv_rope", "attention"]);
}

#[test]
fn attention_with_another_scale_per_pass_is_noticed_by_the_checker() {
    // The negative control: a fused node with a wrong number makes the comparison fail.
    let mut g = GraphBuilder::new(&Invented);
    let y = cached_attention(&mut g);
    g.output("y", y);
    let before = g.finish();
    let mut after = before.clone();
    fuse_bias(&mut after).unwrap();
    fuse_attention(&mut after).unwrap();
    after.prune_and_sort();
    for node in &mut after.nodes {
        if let Op::Attention(a) = &mut node.op {
            a.scale *= 1.001;
        }
    }
    let bindings = Bindings::new().with("T", 5).with("P", 3).with("C", 16);
    assert!(distance(&run(&after, &bindings, &[]), &run(&before, &bindings, &[])) > 2e-6);
}

/// A small convolutional net: conv, batch norm, ReLU, then a grouped strided conv with batch norm and SiLU.
fn conv_net(g: &mut GraphBuilder<'_>) -> Value {
    let x = f32_input(g, "x", &[t(), 4.into(), 9.into(), 7.into()]);
    let mut block = |x: Value, name: &str, shape: [usize; 4], stride, groups, act| {
        let w = weight(g, &format!("{name}.w"), &shape);
        let b = weight(g, &format!("{name}.b"), &[shape[0]]);
        let y = g.conv_by(x, w, b, [stride, 1], [1, 0], groups).unwrap();
        let parts: Vec<Value> = ["weight", "bias", "mean", "var"]
            .iter()
            .map(|p| weight(g, &format!("{name}.{p}"), &[shape[0]]))
            .collect();
        let y = g.batch_norm_by(y, [parts[0], parts[1], parts[2], parts[3]], 1e-3).unwrap();
        g.unary(act, y).unwrap()
    };
    let x = block(x, "a", [6, 4, 3, 2], 1, 1, UnaryKind::Relu);
    block(x, "b", [4, 3, 3, 3], 2, 2, UnaryKind::Silu)
}

#[test]
fn batch_norm_and_activation_fold_into_their_convolution() {
    let (applied, graph) = check(conv_net, &[fold_batch_norm]);
    assert_eq!(applied, 2);
    let (applied, graph2) = check(conv_net, &[fold_batch_norm, fuse_conv_activation, mark_load_time]);
    assert!(applied > 0);
    assert!(graph.compute_nodes() > graph2.compute_nodes());
    assert_eq!(names(&graph2), ["conv_act", "conv_act"]);
}

#[test]
fn load_time_nodes_are_computed_once_and_not_counted_as_dispatches() {
    let (applied, graph) = check(
        |g| {
            let x = f32_input(g, "x", &[t(), 6.into()]);
            let (a, b) = (weight(g, "a", &[6]), weight(g, "b", &[6]));
            let sum = g.add(a, b).unwrap();
            let doubled = g.scale(sum, 2.0).unwrap();
            g.mul(x, doubled).unwrap()
        },
        &[mark_load_time],
    );
    assert_eq!((applied, graph.dispatches()), (2, 1));
}

#[test]
fn every_pass_of_the_list_runs_and_keeps_the_results() {
    let all: Vec<Pass> = ALL.iter().map(|(_, pass)| *pass).collect();
    for build in [cached_attention, segment_attention, conv_net] {
        check(build, &all);
    }
}

#[test]
fn the_users_of_every_node_stay_counted_while_passes_rewrite() {
    let mut rewritten = 0;
    for build in [cached_attention, segment_attention, conv_net] {
        let mut builder = GraphBuilder::new(&Invented);
        let y = build(&mut builder);
        builder.output("y", y);
        let mut graph = builder.finish();
        for (name, pass) in ALL {
            rewritten += pass(&mut graph).unwrap();
            let mut wanted = vec![Vec::new(); graph.nodes.len()];
            for (i, node) in graph.nodes.iter().enumerate() {
                node.inputs.iter().for_each(|v| wanted[v.node()].push(i));
            }
            let mut users = graph.users().to_vec();
            users.iter_mut().for_each(|u| u.sort_unstable());
            assert_eq!(users, wanted, "after {name}");
            graph.prune_and_sort();
        }
    }
    assert!(rewritten > 10, "only {rewritten} places were rewritten");
}

/// A signal, a convolution, a norm over time or over channels, and GELU; then a grouped, padded convolution.
fn frame_convs(instance: bool) -> Graph {
    let mut g = GraphBuilder::new(&Invented);
    let x = f32_input(&mut g, "x", &[t(), 3.into()]);
    let (w, b) = (weight(&mut g, "w", &[8, 12]), weight(&mut g, "b", &[8]));
    let y = g.frame_conv_by(x, w, Some(b), [4, 2], [0, 0], 1).unwrap();
    let (nw, nb) = (weight(&mut g, "nw", &[8]), weight(&mut g, "nb", &[8]));
    let y = match instance {
        true => g.instance_norm_by(y, nw, nb, 1e-5).unwrap(),
        false => g.layer_norm_by(y, nw, nb, 1e-5).unwrap(),
    };
    let y = g.gelu(y).unwrap();
    let w = weight(&mut g, "grouped", &[8, 20]);
    let z = g.frame_conv_by(y, w, None, [5, 1], [2, 2], 2).unwrap();
    let z = g.gelu(z).unwrap();
    let z = g.add(y, z).unwrap();
    g.output("z", z);
    g.finish()
}

#[test]
fn norm_and_activation_become_part_of_a_convolution_over_frames() {
    for instance in [false, true] {
        let before = frame_convs(instance);
        let mut after = before.clone();
        assert_eq!(fuse_frame_conv_norm(&mut after).unwrap(), 1);
        after.prune_and_sort();
        assert_eq!(fuse_frame_conv_activation(&mut after).unwrap(), 2);
        after.prune_and_sort();
        assert_eq!(names(&after), ["frame_conv_norm_act", "frame_conv_act", "add"]);
        for frames in [8, 9, 30] {
            let bindings = Bindings::new().with("T", frames);
            let d = distance(&run(&before, &bindings, &[]), &run(&after, &bindings, &[]));
            assert!(d < 1e-5, "{frames} frames: results differ by {d:e}");
        }
    }
}

#[test]
fn a_tag_becomes_part_of_the_bias_of_its_projection() {
    for bias in [false, true] {
        let mut g = GraphBuilder::new(&Invented);
        let x = f32_input(&mut g, "x", &[t(), 3.into()]);
        let w = weight(&mut g, "w", &[5, 3]);
        let mut y = g.matmul(x, w, true).unwrap();
        if bias {
            let b = weight(&mut g, "b", &[5]);
            y = g.add(y, b).unwrap();
        }
        let tag = weight(&mut g, "tag", &[5]);
        let y = g.add(y, tag).unwrap();
        g.output("y", y);
        let before = g.finish();
        let mut after = before.clone();
        optimise(&mut after).unwrap();
        assert_eq!(after.compute_nodes(), 1, "{:?}", names(&after));
        let bindings = Bindings::new().with("T", 4);
        assert!(distance(&run(&before, &bindings, &[]), &run(&after, &bindings, &[])) < 2e-6);
    }
}

#[test]
fn projections_of_attention_without_rotation_are_merged() {
    let mut g = GraphBuilder::new(&Invented);
    let x = f32_input(&mut g, "x", &[t(), 6.into()]);
    let segments = g.input("segments", DType::I32, &[2.into()]).unwrap();
    let mut heads = Vec::new();
    for name in ["q", "k", "v"] {
        let (w, b) = (weight(&mut g, name, &[8, 6]), weight(&mut g, &format!("{name}b"), &[8]));
        let y = g.matmul(x, w, true).unwrap();
        let y = g.add(y, b).unwrap();
        heads.push(g.reshape(y, &[t(), 2.into(), 4.into()]).unwrap());
    }
    let y = g.attention(heads[0], heads[1], heads[2], 0.5, SoftmaxMask::Segments, Some(segments)).unwrap();
    g.output("y", y);
    let before = g.finish();
    let mut after = before.clone();
    optimise(&mut after).unwrap();
    assert_eq!(names(&after), ["linear", "attention"]);
    let bindings = Bindings::new().with("T", 7);
    assert!(distance(&run(&before, &bindings, &[0, 7]), &run(&after, &bindings, &[0, 7])) < 2e-6);
}

#[test]
fn products_have_fewer_multiplications_only_where_it_is_asked_for() {
    let mut g = GraphBuilder::new(&Invented);
    let x = f32_input(&mut g, "x", &[t(), 256.into()]);
    let w = weight(&mut g, "taps", &[256, 3 * 256]);
    let x = g.frame_conv_by(x, w, None, [3, 2], [0, 0], 1).unwrap();
    let w = weight(&mut g, "w", &[288, 256]);
    let y = g.matmul(x, w, true).unwrap();
    g.output("y", y);
    let mut plain = g.finish();
    optimise(&mut plain).unwrap();
    let fewer = |graph: &Graph| {
        let asked = |op: &Op| match op {
            Op::Linear(linear) => linear.fewer,
            Op::FrameConv(conv) => conv.fewer,
            _ => false,
        };
        graph.nodes.iter().filter(|n| asked(&n.op)).count()
    };
    assert_eq!(fewer(&plain), 0, "no pass of the list asks for it");
    let mut asked = plain.clone();
    assert_eq!((fewer_products(&mut asked).unwrap(), fewer(&asked)), (2, 2));
    assert_eq!(fewer_products(&mut asked).unwrap(), 0, "it is done once");
    for (frames, differs) in [(9, false), (151, true)] {
        let bindings = Bindings::new().with("T", frames);
        let d = distance(&run(&asked, &bindings, &[]), &run(&plain, &bindings, &[]));
        assert!(d < 1e-5 && (d > 0.0) == differs, "{frames} frames: {d:e}");
        let cpu = Cpu::new(1).unwrap();
        let [with, without] = [&asked, &plain].map(|g| plan_memory(g, &bindings, &cpu).unwrap().scratch);
        assert_eq!(with > without, differs, "{with} bytes, {without} without");
    }
}
