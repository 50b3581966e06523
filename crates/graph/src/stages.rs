//! Graphs that run on several backends: contiguous parts, each compiled for its own.

mod range;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pocketglm_tensor::{DType, WeightSource};

use crate::backend::{Backend, Inputs, Outputs, PlacedMemory, Program, ProgramMemory, ProgramState, Running};
use crate::dim::Bindings;
use crate::graph::{Graph, Node, Value};
use crate::ops::{Input, Op};
use crate::{Error, Result};

/// Says for each node of a graph which stage it belongs to. A node whose operands come from a later stage joins that
/// one, so that data only ever moves forward.
pub type StageOf = Arc<dyn Fn(&Graph) -> Vec<usize> + Send + Sync>;

/// Runs a graph in stages, each on a backend of its own.
///
/// Values that a later stage needs leave their stage as results and enter the next as inputs, through the memory of the
/// host. What comes from weights, inputs and positions alone is made in each stage that uses it. A state belongs to one
/// stage.
pub struct StagedBackend {
    backends: Vec<Arc<dyn Backend>>,
    stage_of: StageOf,
}

impl StagedBackend {
    /// A backend that runs stage `i` of a graph on `backends[i]`. Stages without a node cost nothing.
    pub fn new(backends: Vec<Arc<dyn Backend>>, stage_of: StageOf) -> StagedBackend {
        StagedBackend { backends, stage_of }
    }

    fn cut(&self, graph: &Graph) -> Result<Vec<(usize, Part)>> {
        let parts = cut(graph, &(self.stage_of)(graph), self.backends.len())?;
        Ok(parts.into_iter().enumerate().filter(|(_, p)| !(p.nodes.is_empty() && p.own.is_empty())).collect())
    }
}

impl Backend for StagedBackend {
    fn describe(&self) -> String {
        let mut names: Vec<String> = Vec::new();
        for backend in &self.backends {
            let name = backend.describe();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.join(" + ")
    }

    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Result<ProgramMemory> {
        Ok(self.plan_placed(graph, bindings)?.sum())
    }

    fn plan_placed(&self, graph: &Graph, bindings: &Bindings) -> Result<PlacedMemory> {
        let mut memory = PlacedMemory::default();
        for (stage, part) in self.cut(graph)? {
            memory += self.backends[stage].plan_placed(&part.graph, bindings)?;
        }
        Ok(memory)
    }

    fn compile(&self, graph: &Graph, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Program>> {
        let mut stages = Vec::new();
        for (stage, part) in self.cut(graph)? {
            let program = self.backends[stage].compile(&part.graph, weights.clone())?;
            stages.push(Stage { program, nodes: part.nodes, crossing: part.crossing, own: part.own });
        }
        Ok(Box::new(StagedProgram { graph: graph.clone(), stages }))
    }
}

/// The part of a graph that is one stage.
struct Part {
    graph: Graph,
    /// Nodes of the whole graph that compute something here.
    nodes: Vec<usize>,
    /// Results for later stages.
    crossing: Vec<String>,
    /// Results of the whole graph that come from here.
    own: Vec<String>,
}

/// Whether a stage that needs this node makes it itself: it depends on weights, inputs and positions alone.
fn is_repeated(node: &Node) -> bool {
    node.op.is_source() || node.load_time || matches!(node.op, Op::RopeTable(_))
}

fn crossing_name(value: Value) -> String {
    format!("stage value {}.{}", value.node(), value.port())
}

fn cut(graph: &Graph, wanted: &[usize], stages: usize) -> Result<Vec<Part>> {
    let last = stages.saturating_sub(1);
    let mut stage = vec![0usize; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate().filter(|(_, n)| !is_repeated(n)) {
        let made = node.inputs.iter().map(|v| stage[v.node()]).max().unwrap_or(0);
        stage[i] = wanted.get(i).copied().unwrap_or(0).min(last).max(made);
    }
    // Where each value crosses to: results of a stage, with the later nodes that use them.
    let mut crossing: BTreeMap<Value, Vec<usize>> = BTreeMap::new();
    for (i, node) in graph.nodes.iter().enumerate().filter(|(_, n)| !is_repeated(n)) {
        for v in node.inputs.iter().filter(|v| !is_repeated(graph.node(**v)) && stage[v.node()] < stage[i]) {
            crossing.entry(*v).or_default().push(i);
        }
    }
    for v in crossing.keys() {
        check_crossing(graph, *v)?;
    }
    // A result that no stage computes, such as a weight, is given by the last that computes anything.
    let giver = stage.iter().copied().max().unwrap_or(0);
    let mut parts = Vec::with_capacity(stages);
    for s in 0..stages {
        let here = |i: usize| !is_repeated(&graph.nodes[i]) && stage[i] == s;
        let mut needed: BTreeSet<usize> = (0..graph.nodes.len()).filter(|i| here(*i)).collect();
        let nodes = needed.iter().copied().collect();
        let own: Vec<&(String, Value)> = graph
            .outputs
            .iter()
            .filter(|(_, v)| here(v.node()) || (s == giver && is_repeated(graph.node(*v))))
            .collect();
        let mut stack: Vec<usize> = needed.iter().copied().chain(own.iter().map(|(_, v)| v.node())).collect();
        while let Some(i) = stack.pop() {
            needed.insert(i);
            stack.extend(
                graph.nodes[i]
                    .inputs
                    .iter()
                    .map(|v| v.node())
                    .filter(|&p| is_repeated(&graph.nodes[p]) && !needed.contains(&p)),
            );
        }
        let mut part = Graph::default();
        let mut moved: BTreeMap<Value, Value> = BTreeMap::new();
        let append = |part: &mut Graph, node: Node| {
            part.nodes.push(node);
            part.nodes.len() - 1
        };
        for (v, users) in &crossing {
            if stage[v.node()] < s && users.iter().any(|&i| stage[i] == s) {
                let meta = graph.meta(*v).clone();
                let node = Node {
                    op: Op::Input(Input { name: crossing_name(*v), meta: meta.clone() }),
                    inputs: Vec::new(),
                    outputs: vec![meta],
                    scope: graph.node(*v).scope.clone(),
                    load_time: false,
                };
                moved.insert(*v, Value::of(append(&mut part, node), 0));
            }
        }
        for i in needed {
            let mut node = graph.nodes[i].clone();
            for v in &mut node.inputs {
                *v = *moved.get(v).ok_or_else(|| lost(graph, *v))?;
            }
            let outputs = node.outputs.len();
            let at = append(&mut part, node);
            moved.extend((0..outputs).map(|port| (Value::of(i, port), Value::of(at, port))));
        }
        let find = |v: &Value| moved.get(v).copied().ok_or_else(|| lost(graph, *v));
        for (name, v) in &own {
            part.outputs.push((name.clone(), find(v)?));
        }
        let mut sent = Vec::new();
        for v in crossing.keys().filter(|v| here(v.node())) {
            part.outputs.push((crossing_name(*v), find(v)?));
            sent.push(crossing_name(*v));
        }
        part.count_users();
        let own = own.iter().map(|(name, _)| name.clone()).collect();
        parts.push(Part { graph: part, nodes, crossing: sent, own });
    }
    check_states(graph, &stage)?;
    Ok(parts)
}

fn lost(graph: &Graph, v: Value) -> Error {
    Error::Name { kind: "value", name: graph.node(v).scope.clone(), what: "is not part of its stage".into() }
}

/// What leaves a stage is numbers or indices that the stage computed, not a state.
fn check_crossing(graph: &Graph, value: Value) -> Result<()> {
    let node = graph.node(value);
    let is_state = value.port() + node.op.state_results() >= node.outputs.len();
    let dtype = graph.meta(value).dtype;
    if is_state || !matches!(dtype, DType::F32 | DType::I32) {
        return Err(Error::Shape {
            op: "stage",
            wanted: "a cut through results in F32 or I32".into(),
            found: if is_state { "a state".into() } else { dtype.to_string() },
        }
        .at(format!("{} {}", node.scope, node.op.name())));
    }
    Ok(())
}

/// A state has one owner.
fn check_states(graph: &Graph, stage: &[usize]) -> Result<()> {
    for (i, node) in graph.nodes.iter().enumerate() {
        let Op::State(state) = &node.op else { continue };
        let mut users = graph.users()[i].iter().map(|&u| stage[u]);
        let first = users.next();
        if users.any(|s| Some(s) != first) {
            let what = "is used in two stages".into();
            return Err(Error::Name { kind: "state", name: state.name.clone(), what });
        }
    }
    Ok(())
}

struct Stage {
    program: Box<dyn Program>,
    nodes: Vec<usize>,
    crossing: Vec<String>,
    own: Vec<String>,
}

impl Stage {
    /// A result as the next stage takes it.
    fn carried(&self, name: &str, values: Vec<f32>) -> Carried {
        let graph = self.program.graph();
        match graph.outputs().iter().find(|(n, _)| n == name).map(|(_, v)| graph.meta(*v).dtype) {
            Some(DType::I32) => Carried::Indices(indices(&values)),
            _ => Carried::Numbers(values),
        }
    }
}

struct StagedProgram {
    graph: Graph,
    stages: Vec<Stage>,
}

/// A state for each stage, and the indices that the last run gave.
struct StagedState {
    states: Vec<ProgramState>,
    last: Vec<(String, Vec<i32>)>,
}

fn own(state: &mut ProgramState) -> Result<&mut StagedState> {
    state.inner.downcast_mut::<StagedState>().ok_or_else(|| Error::Name {
        kind: "state",
        name: "program state".into(),
        what: "belongs to another backend".into(),
    })
}

/// A result on its way to a later stage, as that stage takes it.
enum Carried {
    Numbers(Vec<f32>),
    Indices(Vec<i32>),
}

impl Program for StagedProgram {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn memory(&self, bindings: &Bindings) -> Result<ProgramMemory> {
        let mut memory = ProgramMemory::default();
        for stage in &self.stages {
            memory += stage.program.memory(bindings)?;
        }
        Ok(memory)
    }

    fn new_state(&self, bindings: &Bindings) -> Result<ProgramState> {
        let states: Result<_> = self.stages.iter().map(|s| s.program.new_state(bindings)).collect();
        let inner = StagedState { states: states?, last: Vec::new() };
        Ok(ProgramState { inner: Box::new(inner), bindings: bindings.clone() })
    }

    fn resize_state(&self, state: &mut ProgramState, bindings: &Bindings) -> Result<()> {
        let before = state.bindings.clone();
        let states = &mut own(state)?.states;
        for i in 0..states.len() {
            if let Err(error) = self.stages[i].program.resize_state(&mut states[i], bindings) {
                // Those that were resized go back. Should one refuse, its capacity is its own business still.
                for (stage, done) in self.stages.iter().zip(states.iter_mut()).take(i) {
                    let _ = stage.program.resize_state(done, &before);
                }
                return Err(error);
            }
        }
        state.bindings = bindings.clone();
        Ok(())
    }

    fn trim(&self) {
        self.stages.iter().for_each(|s| s.program.trim());
    }

    /// Runs all stages: the next run could not begin before this one has ended, since its first stage needs the host.
    fn start(
        &self,
        state: &mut ProgramState,
        inputs: &Inputs<'_>,
        bindings: &Bindings,
        wanted: &[&str],
    ) -> Result<Box<dyn Running>> {
        let needed = self.graph.needed(wanted)?;
        let StagedState { states, last } = own(state)?;
        let mut carried: Vec<(&str, Carried)> = Vec::new();
        let mut results = Outputs::default();
        for (stage, state) in self.stages.iter().zip(states) {
            let mut names: Vec<&str> =
                stage.own.iter().map(String::as_str).filter(|n| wanted.contains(n)).collect();
            if names.is_empty() && !stage.nodes.iter().any(|&i| needed[i]) {
                continue;
            }
            names.extend(stage.crossing.iter().map(String::as_str));
            let mut given = inputs.resolved(|output| {
                last.iter().find(|(name, _)| name == output).map(|(_, values)| values.as_slice())
            })?;
            for (name, value) in &carried {
                given = match value {
                    Carried::Numbers(x) => given.f32(name, x),
                    Carried::Indices(x) => given.i32(name, x),
                };
            }
            let outputs = stage.program.start(state, &given, bindings, &names)?.finish()?;
            for (name, output) in outputs.0 {
                match stage.crossing.iter().find(|n| **n == name) {
                    Some(crossing) => carried.push((crossing, stage.carried(&name, output.values))),
                    None => results.0.push((name, output)),
                }
            }
        }
        last.clear();
        for (name, output) in &results.0 {
            let found = self.graph.outputs.iter().find(|(n, _)| n == name);
            if found.is_some_and(|(_, v)| self.graph.meta(*v).dtype == DType::I32) {
                last.push((name.clone(), indices(&output.values)));
            }
        }
        Ok(Box::new(results))
    }
}

/// Indices as numbers, which are exact: no table has 2^24 rows.
fn indices(values: &[f32]) -> Vec<i32> {
    values.iter().map(|&x| x as i32).collect()
}

#[cfg(test)]
mod tests;
