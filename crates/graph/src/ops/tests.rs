//! Shape rules: what an op refuses, and that the refusal names the op and all operands.

use pocketglm_tensor::DType;

use crate::{Bindings, Dim, Error, Graph, GraphBuilder, Plan, Value};

fn builder() -> GraphBuilder<'static> {
    GraphBuilder::assuming(DType::F32)
}

fn f32s(g: &mut GraphBuilder<'_>, name: &str, shape: &[Dim]) -> Value {
    g.input(name, DType::F32, shape).unwrap()
}

#[test]
fn a_wrong_operand_is_named_with_the_op_its_place_and_all_shapes() {
    let mut g = builder();
    let x = f32s(&mut g, "x", &[Dim::symbol("T"), 4.into()]);
    let error = g
        .scoped("layers.3.mlp", |g| {
            let w = g.weight("up.weight", &[8, 5])?;
            g.matmul(x, w, true)
        })
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "layers.3.mlp: matmul: expected a [.., k] and b [n, k], or batches of both, found F32[T, 4], F32[8, 5]"
    );
}

#[test]
fn shape_rules_refuse_what_does_not_fit() {
    let t = || Dim::symbol("T");
    let mut g = builder();
    let x = f32s(&mut g, "x", &[t(), 6.into()]);
    let y = f32s(&mut g, "y", &[6.into(), t()]);
    let ids = g.input("ids", DType::I32, &[t()]).unwrap();
    let heads = g.reshape(x, &[t(), 2.into(), 3.into()]).unwrap();
    let w = g.weight("w", &[5]).unwrap();
    assert!(g.add(x, y).is_err());
    assert!(g.rms_norm_by(x, w, 1e-5).is_err());
    assert!(g.reshape(x, &[t(), 5.into()]).is_err());
    assert!(g.reshape(x, &[t() + 1.into(), 6.into()]).is_err());
    assert!(g.permute(x, &[0, 0]).is_err());
    assert!(g.slice(x, 1, 4, 3).is_err());
    assert!(g.slice(x, 2, 0, 1).is_err());
    assert!(g.concat(&[x, y], 0).is_err());
    assert!(g.concat(&[], 0).is_err());
    assert!(g.gather_rows(x, x).is_err());
    assert!(g.matmul(ids, x, true).is_err());
    let table = f32s(&mut g, "table", &[t(), 4.into()]);
    assert!(g.rope(heads, table, crate::ops::RopeLayout::Half).is_err(), "rotates more than a head has");
    let positions = g.input("p", DType::I32, &[2.into(), t()]).unwrap();
    assert!(g.rope_table(positions, 1e4, &[0, 2], 1).is_err(), "axis 2 of 2");
}

#[test]
fn sizes_that_were_symbols_are_checked_when_they_are_known() {
    let mut g = builder();
    let x = f32s(&mut g, "x", &[Dim::symbol("T"), 6.into()]);
    let y = g.slice(x, 0, Dim::symbol("A"), 2).unwrap();
    let y = g.scale(y, 2.0).unwrap();
    g.output("y", y);
    let graph = g.finish();
    assert!(Plan::new(&graph, &Bindings::new().with("T", 5).with("A", 3)).is_ok());
    assert!(Plan::new(&graph, &Bindings::new().with("T", 5).with("A", 4)).is_err());
    assert!(matches!(
        Plan::new(&graph, &Bindings::new().with("T", 5)),
        Err(Error::In { .. } | Error::Unbound { .. })
    ));
}

fn chain(length: usize) -> Graph {
    let mut g = builder();
    let mut x = f32s(&mut g, "x", &[Dim::symbol("T"), 64.into()]);
    for _ in 0..length {
        x = g.scale(x, 2.0).unwrap();
    }
    g.output("y", x);
    g.finish()
}

#[test]
fn a_chain_needs_two_places_however_long_it_is() {
    let bindings = Bindings::new().with("T", 10);
    let plan = Plan::new(&chain(50), &bindings).unwrap();
    assert_eq!(plan.arena_bytes(), 2 * 10 * 64 * 4);
    assert_eq!(plan.bytes_without_reuse(), 50 * 10 * 64 * 4);
}

#[test]
fn values_that_live_at_once_never_share_a_place() {
    // A diamond with skips: every value is read again much later.
    let mut g = builder();
    let x = f32s(&mut g, "x", &[Dim::symbol("T"), 8.into()]);
    let mut values = vec![g.scale(x, 1.5).unwrap()];
    for i in 1..12 {
        let (a, b) = (values[i - 1], values[i / 2]);
        values.push(g.add(a, b).unwrap());
    }
    let y = g.concat(&values[6..], 1).unwrap();
    g.output("y", y);
    let graph = g.finish();
    let plan = Plan::new(&graph, &Bindings::new().with("T", 3)).unwrap();
    let last_use = |v: usize| {
        graph.nodes().iter().rposition(|n| n.inputs.iter().any(|i| i.node() == v)).unwrap_or(usize::MAX)
    };
    let mut compared = 0;
    for (i, a) in plan.places.iter().enumerate() {
        for (j, b) in plan.places.iter().enumerate().skip(i + 1) {
            if let (crate::plan::Place::Arena(a), crate::plan::Place::Arena(b)) = (&a[0], &b[0])
                && last_use(i) >= j
            {
                assert!(a.end <= b.start || b.end <= a.start, "nodes {i} and {j} overlap");
                compared += 1;
            }
        }
    }
    assert!(compared > 20);
}

#[test]
fn a_plan_too_large_for_memory_is_an_error() {
    let bindings = Bindings::new().with("T", usize::MAX / 128);
    assert!(Plan::new(&chain(2), &bindings).is_err());
}
