use pocketglm_tensor::{Cpu, KvFormat};

use super::*;
use crate::ops::{RopeLayout, SoftmaxMask};
use crate::passes;
use crate::passes::tests::{Invented, weight};
use crate::{CpuBackend, Dim, GraphBuilder, Output};

const LAYERS: usize = 3;

/// Ids to logits through layers with a cache each: embedding and head share a table, positions go to every layer.
fn small(kv: KvFormat) -> Graph {
    let (t, past) = (Dim::symbol("T"), Dim::symbol("P"));
    let all = past.clone() + t.clone();
    let mut g = GraphBuilder::new(&Invented).with_kv_format(kv);
    let ids = g.input("ids", DType::I32, std::slice::from_ref(&t)).unwrap();
    let positions = g.input("positions", DType::I32, &[1.into(), t.clone()]).unwrap();
    let table = weight(&mut g, "table", &[11, 8]);
    let mut x = g.gather_rows(table, ids).unwrap();
    let rope = g.rope_table(positions, 10.0, &[0, 0], 2).unwrap();
    for i in 0..LAYERS {
        x = g.scoped(&format!("layers.{i}"), |g| {
            let w = weight(g, "w", &[8, 8]);
            let y = g.matmul(x, w, true).unwrap();
            let y = g.reshape(y, &[t.clone(), 2.into(), 4.into()]).unwrap();
            let y = g.rope(y, rope, RopeLayout::Interleaved).unwrap();
            let y = g.reshape(y, &[t.clone(), 8.into()]).unwrap();
            let cache = g.kv_state("cache", Dim::symbol("C"), 2, 4).unwrap();
            let cache = g.kv_append(y, cache, past.clone()).unwrap();
            let seen = g.kv_read(cache, all.clone()).unwrap();
            let seen = g.reshape(seen, &[1.into(), all.clone(), 8.into()]).unwrap();
            let y = g.reshape(y, &[1.into(), t.clone(), 8.into()]).unwrap();
            let scores = g.matmul(y, seen, true).unwrap();
            let scores = g.softmax(scores, SoftmaxMask::Causal { past: past.clone() }, None).unwrap();
            let y = g.matmul(scores, seen, false).unwrap();
            let y = g.reshape(y, &[t.clone(), 8.into()]).unwrap();
            g.add(x, y).unwrap()
        });
    }
    let logits = g.matmul(x, table, true).unwrap();
    g.output("logits", logits);
    let [best, _] = g.top_k(logits, 1).unwrap();
    g.output("best", best);
    let mut graph = g.finish();
    passes::prepare(&mut graph).unwrap();
    graph
}

/// Layers below `first` go to stage 0, others to stage 1, and what comes behind to `head`.
fn by_layer(first: usize, head: usize) -> StageOf {
    Arc::new(move |graph| {
        let of = |node: &Node| match node.scope.strip_prefix("layers.").and_then(|s| s.parse::<usize>().ok())
        {
            Some(layer) => usize::from(layer >= first),
            None => 0,
        };
        let mut stages: Vec<usize> = graph.nodes().iter().map(of).collect();
        for (i, node) in graph.nodes().iter().enumerate() {
            let head_op =
                matches!(node.op, Op::TopK(_)) || graph.outputs().iter().any(|(_, v)| v.node() == i);
            stages[i] = if head_op { head } else { stages[i] };
        }
        stages
    })
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(Arc::new(Cpu::new(1).unwrap())))
}

fn staged(stage_of: StageOf, stages: usize) -> StagedBackend {
    StagedBackend::new((0..stages).map(|_| cpu()).collect(), stage_of)
}

/// A prompt of four tokens, a larger cache, then tokens that each run takes from the one before.
fn answer(program: &dyn Program) -> Vec<Output> {
    let bindings = |t, p| Bindings::new().with("T", t).with("P", p);
    let mut state = program.new_state(&Bindings::new().with("C", 4)).unwrap();
    let inputs = Inputs::new().i32("ids", &[3, 1, 4, 1]).i32("positions", &[0, 1, 2, 3]);
    let mut given = vec![program.run(&mut state, &inputs, &bindings(4, 0)).unwrap().take("logits").unwrap()];
    program.resize_state(&mut state, &Bindings::new().with("C", 9)).unwrap();
    let inputs = Inputs::new().i32("ids", &[5]).i32("positions", &[4]);
    let running = program.start(&mut state, &inputs, &bindings(1, 4), &["best"]).unwrap();
    given.push(running.finish().unwrap().take("best").unwrap());
    for past in 5..9 {
        let positions = [past as i32];
        let inputs = Inputs::new().last("ids", "best").i32("positions", &positions);
        let outputs = program.start(&mut state, &inputs, &bindings(1, past), &["logits", "best"]).unwrap();
        let mut outputs = outputs.finish().unwrap();
        given.extend([outputs.take("logits").unwrap(), outputs.take("best").unwrap()]);
    }
    given
}

fn values(outputs: &[Output]) -> Vec<(&[usize], &[f32])> {
    outputs.iter().map(|o| (&o.shape[..], &o.values[..])).collect()
}

#[test]
fn every_cut_between_layers_computes_what_the_whole_graph_does() {
    for kv in [KvFormat::F32, KvFormat::F16] {
        let graph = small(kv);
        let whole = answer(&*cpu().compile(&graph, Arc::new(Invented)).unwrap());
        for first in 0..=LAYERS {
            for (head, stages) in [(0, 2), (1, 2), (2, 3)] {
                let backend = staged(by_layer(first, head), stages);
                let program = backend.compile(&graph, Arc::new(Invented)).unwrap();
                assert_eq!(values(&answer(&*program)), values(&whole), "{kv:?} {first} {head}");
            }
        }
    }
}

#[test]
fn a_weight_is_only_where_it_is_used_and_the_plan_adds_up() {
    let graph = small(KvFormat::F32);
    let bindings = Bindings::new().with("T", 4).with("P", 0).with("C", 8);
    let whole = cpu().plan(&graph, &bindings).unwrap();
    let parts = cut(&graph, &by_layer(2, 1)(&graph), 2).unwrap();
    let plans: Vec<ProgramMemory> = parts.iter().map(|p| cpu().plan(&p.graph, &bindings).unwrap()).collect();
    // Two layers and a table of which rows are read; one layer and the table as a matrix.
    assert_eq!([plans[0].weights, plans[1].weights], [2 * 8 * 8 * 4, (8 * 8 + 11 * 8) * 4]);
    assert_eq!([plans[0].gathered, plans[1].gathered], [11 * 8 * 4, 0]);
    assert_eq!(plans[0].states + plans[1].states, whole.states);
    let sum = staged(by_layer(2, 1), 2).plan_placed(&graph, &bindings).unwrap();
    assert_eq!(sum.device, ProgramMemory::default());
    assert_eq!(sum.host.weights, plans[0].weights + plans[1].weights);
    let program = staged(by_layer(2, 1), 2).compile(&graph, Arc::new(Invented)).unwrap();
    assert_eq!(program.memory(&bindings).unwrap(), sum.host);
}

#[test]
fn a_node_never_runs_before_its_operands() {
    // The assignment is the wrong way round: everything joins the stage of the first layer.
    let graph = small(KvFormat::F32);
    let backwards: StageOf = Arc::new(|g| by_layer(1, 0)(g).into_iter().map(|s| 1 - s).collect());
    let parts = cut(&graph, &backwards(&graph), 2).unwrap();
    assert_eq!(parts[0].nodes, Vec::<usize>::new());
    let whole = answer(&*cpu().compile(&graph, Arc::new(Invented)).unwrap());
    let program = staged(backwards, 2).compile(&graph, Arc::new(Invented)).unwrap();
    assert_eq!(values(&answer(&*program)), values(&whole));
}

#[test]
fn a_cut_through_a_state_is_refused() {
    let graph = small(KvFormat::F16);
    let stages: StageOf =
        Arc::new(|g| g.nodes().iter().map(|n| usize::from(matches!(n.op, Op::KvRead(_)))).collect());
    let error = staged(stages, 2).compile(&graph, Arc::new(Invented)).err().unwrap().to_string();
    assert!(error.contains("layers.0") && error.contains("found a state"), "{error}");
}

#[test]
fn what_the_last_run_did_not_give_is_refused_by_name() {
    let graph = small(KvFormat::F32);
    let program = staged(by_layer(1, 1), 2).compile(&graph, Arc::new(Invented)).unwrap();
    let mut state = program.new_state(&Bindings::new().with("C", 4)).unwrap();
    let inputs = Inputs::new().last("ids", "best").i32("positions", &[0]);
    let run = program.run(&mut state, &inputs, &Bindings::new().with("T", 1).with("P", 0));
    assert!(run.unwrap_err().to_string().contains("`best`, which the last run did not give"));
}

#[test]
fn every_range_of_ops_computes_what_the_whole_graph_does() {
    for kv in [KvFormat::F32, KvFormat::F16] {
        let graph = small(kv);
        let whole = answer(&*cpu().compile(&graph, Arc::new(Invented)).unwrap());
        let ops: Vec<usize> = graph.op_names().into_iter().map(|(i, _)| i).collect();
        for (n, &first) in ops.iter().enumerate() {
            for &last in
                [ops[n], ops[(n + ops.len()) / 2], ops[ops.len() - 1]].iter().filter(|l| **l >= first)
            {
                let backend = staged(Arc::new(move |g: &Graph| g.stages_around(first, last)), 3);
                let program = backend.compile(&graph, Arc::new(Invented)).unwrap();
                assert_eq!(values(&answer(&*program)), values(&whole), "{kv:?} {first} to {last}");
            }
        }
    }
}

#[test]
fn a_range_grows_until_it_holds_whole_states() {
    let graph = small(KvFormat::F16);
    let at =
        |name: &str| graph.nodes().iter().position(|n| n.op.name() == name && n.scope == "layers.1").unwrap();
    let (append, read) = (at("kv_append"), at("kv_read"));
    for (first, last) in [(append, append), (read, read), (append, read)] {
        let stages = graph.stages_around(first, last);
        let inside: Vec<usize> = (0..stages.len()).filter(|i| stages[*i] == 1).collect();
        assert_eq!((inside[0], inside[inside.len() - 1]), (append, read));
    }
    let rope = at("rope");
    assert_eq!(graph.stages_around(rope, rope).iter().filter(|s| **s == 1).count(), 1);
}
