//! One list of cases for every op that has kernels: tests, the start-up test, `cargo xtask parity` and the table of what is
//! supported share it.
//!
//! A case is a small graph of unfused ops with weights and inputs. Its reference is the processor's scalar kernels
//! running that graph over the values that its weights stand for; a device runs it fused and unfused.
//!
//! Not part of the interface: hidden from the documentation, and free to change.

mod attention;
mod comparison;
mod draft;
mod frames;
mod gather;
mod products;
mod simple;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use pocketglm_graph::{
    Backend, Bindings, CpuBackend, Error, Graph, Inputs, Outputs, ProgramState, Result, passes,
};
use pocketglm_tensor::{Cpu, Tensor, TensorInfo, WeightSource};

pub use crate::features::Feature;
pub use comparison::{Bound, Difference, bounds, compare, relative_l2};

/// A small graph with all that a run of it needs.
pub struct Case {
    /// The op, as the table names it.
    pub op: &'static str,
    /// What is special about this case.
    pub form: String,
    /// How far results may be from the reference.
    pub bound: Bound,
    /// How far they may be where products go through cooperative matrices.
    pub cooperative: Bound,
    /// Whether the start-up test runs it, and for which of a device's features.
    pub quick: Option<Feature>,
    /// Ops that the fused graph must have: a case that is not fused any more does not test what it says.
    pub fused: Vec<&'static str>,
    model: Model,
    /// The same over the values that the weights stand for.
    reference: Model,
    runs: Vec<Run>,
}

/// A graph of unfused ops and its weights.
struct Model {
    graph: Graph,
    weights: HashMap<String, Tensor>,
}

/// One of the runs that follow one another with the same state.
struct Run {
    bindings: Bindings,
    inputs: Vec<(String, Values)>,
}

#[derive(Clone, Debug)]
enum Values {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

/// The weights of a case.
struct Weights(HashMap<String, Tensor>);

impl WeightSource for Weights {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.keys().filter_map(|name| self.info(name)).collect()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let t = self.0.get(name)?;
        Some(TensorInfo { name: name.into(), dtype: t.dtype(), shape: t.shape().to_vec() })
    }
    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let missing = || pocketglm_tensor::Error::Missing { name: name.into(), place: "the case".into() };
        self.0.get(name).cloned().ok_or_else(missing)
    }
}

impl Case {
    /// Op and form.
    pub fn name(&self) -> String {
        format!("{}: {}", self.op, self.form)
    }

    /// How far results may be from the reference where these kinds of kernels gave them: half precision is allowed where it was
    /// used, and nowhere else.
    pub fn bound_of(&self, kernels: &BTreeSet<String>) -> Bound {
        match kernels.iter().any(|kernel| kernel.contains("_coop")) {
            true => self.cooperative,
            false => self.bound,
        }
    }

    /// The graph as it is built, or fused.
    ///
    /// # Errors
    /// A fused graph without an op that the case is about.
    pub fn graph(&self, fuse: bool) -> Result<Graph> {
        let mut graph = self.model.graph.clone();
        if !fuse {
            passes::prepare(&mut graph)?;
            return Ok(graph);
        }
        passes::optimise(&mut graph)?;
        let has = |name: &str| graph.nodes().iter().any(|n| n.op.name() == name);
        match self.fused.iter().find(|name| !has(name)) {
            None => Ok(graph),
            Some(name) => Err(Error::Name {
                kind: "op",
                name: (*name).into(),
                what: format!("is not in the fused graph of `{}`", self.name()),
            }),
        }
    }

    /// The results of all runs on a backend.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn run(&self, backend: &dyn Backend, fuse: bool) -> Result<Vec<Outputs>> {
        self.run_graph(backend, &self.graph(fuse)?, &self.model.weights)
    }

    /// What the results should be.
    ///
    /// # Errors
    /// What the processor's kernels report.
    pub fn wanted(&self, cpu: &Arc<Cpu>) -> Result<Vec<Outputs>> {
        let mut graph = self.reference.graph.clone();
        passes::prepare(&mut graph)?;
        self.run_graph(&CpuBackend::new(cpu.clone()), &graph, &self.reference.weights)
    }

    fn run_graph(
        &self,
        backend: &dyn Backend,
        graph: &Graph,
        weights: &HashMap<String, Tensor>,
    ) -> Result<Vec<Outputs>> {
        let program = backend.compile(graph, Arc::new(Weights(weights.clone())))?;
        let mut state: ProgramState = program.new_state(&Bindings::new())?;
        let run = |run: &Run| {
            let mut inputs = Inputs::new();
            for (name, values) in &run.inputs {
                inputs = match values {
                    Values::F32(x) => inputs.f32(name, x),
                    Values::I32(x) => inputs.i32(name, x),
                };
            }
            program.run(&mut state, &inputs, &run.bindings)
        };
        self.runs.iter().map(run).collect()
    }
}

/// Every case.
///
/// # Errors
/// A case that cannot be built: a defect of the list.
pub fn all() -> Result<Vec<Case>> {
    let mut list = Vec::new();
    simple::cases(&mut list)?;
    frames::cases(&mut list)?;
    gather::cases(&mut list)?;
    products::cases(&mut list)?;
    attention::cases(&mut list)?;
    Ok(list)
}

/// The cases of the start-up test.
///
/// # Errors
/// As [`all`].
pub fn quick() -> Result<Vec<Case>> {
    let mut list = Vec::new();
    products::quick(&mut list)?;
    Ok(list)
}

/// What the case list compares, as a table in Markdown: op, cases, bounds. Ops without kernels are not in it.
pub fn support_table(cases: &[Case]) -> String {
    let mut rows: Vec<(&str, usize, Vec<Bound>)> = Vec::new();
    for case in cases {
        match rows.iter_mut().find(|r| r.0 == case.op) {
            None => rows.push((case.op, 1, vec![case.bound])),
            Some(row) => {
                row.1 += 1;
                if !row.2.contains(&case.bound) {
                    row.2.push(case.bound);
                }
            }
        }
    }
    let mut text = String::from("| Op | Cases | Bounds |\n| --- | --: | --- |\n");
    for (op, count, mut bounds) in rows {
        bounds.sort_by(|a, b| a.most.total_cmp(&b.most));
        let names: Vec<&str> = bounds.iter().map(|b| b.name).collect();
        text.push_str(&format!("| {op} | {count} | {} |\n", names.join(", ")));
    }
    text.push_str("\n| Bound | Relative L2 distance | Why it is not smaller |\n| --- | --: | --- |\n");
    for b in bounds::ALL {
        let most = if b.most == 0.0 { "0".into() } else { format!("{:e}", b.most) };
        text.push_str(&format!("| {} | {most} | {} |\n", b.name, b.reason));
    }
    let formats: Vec<&str> = products::formats().map(|d| d.name()).collect();
    text.push_str(&format!("\nWeights may be {}.\n", formats.join(", ")));
    text
}
