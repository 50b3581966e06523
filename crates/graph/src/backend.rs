//! What runs a graph: a narrow interface, so that a backend is chosen at run time.

use std::any::Any;
use std::sync::Arc;

use pocketglm_tensor::WeightSource;

use crate::dim::Bindings;
use crate::graph::Graph;
use crate::ops::Cost;
use crate::{Error, Result};

/// Compiles graphs for one device.
pub trait Backend: Send + Sync {
    /// The device, for people: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Bytes read and written in a second by a large copy in the device's own memory, measured now: what speeds are held
    /// against. `None` for the processor, whose limits are measured by other means.
    ///
    /// # Errors
    /// Memory that cannot be had, and a device that fails.
    fn copy_rate(&self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Operations that the device does in a second where no memory limits it, by the kind of arithmetic, measured now. Empty for
    /// the processor, whose limits are measured by other means.
    ///
    /// # Errors
    /// As [`Backend::copy_rate`].
    fn arithmetic_rates(&self) -> Result<Vec<(Arithmetic, f64)>> {
        Ok(Vec::new())
    }

    /// Begins or ends measuring what each op of a run takes on the device. Runs take longer meanwhile, since each op is timed
    /// by itself and each run is waited for; the times of ops do not.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the backend or its device cannot time ops.
    fn profile(&self, on: bool) -> Result<()> {
        match on {
            false => Ok(()),
            true => Err(crate::Error::Device {
                device: self.describe(),
                fault: crate::DeviceFault::Unsupported,
                what: "times of single ops are measured on GPUs alone".into(),
            }),
        }
    }

    /// What was measured since the last call, one entry for each run.
    fn take_profile(&self) -> Vec<RunProfile> {
        Vec::new()
    }

    /// Bytes that a program of `graph` takes under `bindings`, by use, from shapes alone: nothing is allocated.
    ///
    /// # Errors
    /// Unbound or impossible sizes.
    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Result<ProgramMemory>;

    /// The same, apart by where it lies; the host's memory unless a backend says otherwise.
    ///
    /// # Errors
    /// As [`Backend::plan`].
    fn plan_placed(&self, graph: &Graph, bindings: &Bindings) -> Result<PlacedMemory> {
        Ok(PlacedMemory { host: self.plan(graph, bindings)?, device: ProgramMemory::default() })
    }

    /// Resolves the weights of a graph and makes it ready to run.
    ///
    /// # Errors
    /// Weights that are missing or not finite, and memory that cannot be had, each naming the tensor.
    fn compile(&self, graph: &Graph, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Program>>;
}

/// What one run took on a device.
#[derive(Clone, Debug)]
pub struct RunProfile {
    /// The sizes of the run.
    pub sizes: Bindings,
    /// Its ops in the order in which they ran.
    pub ops: Vec<OpProfile>,
}

/// What one op took on a device.
#[derive(Clone, Debug)]
pub struct OpProfile {
    /// Kind of op and block, as [`Graph::op_names`] has them.
    pub name: String,
    /// The kernels, one for each dispatch.
    pub kernels: Vec<String>,
    /// Seconds from the beginning of each dispatch to its end, added up.
    pub seconds: f64,
    /// Operations, and the bytes that move if every operand moves once, weights as the device holds them.
    pub cost: Cost,
    /// What the operations are done with.
    pub arithmetic: Arithmetic,
}

/// The kinds of arithmetic that a device has, each with a limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Arithmetic {
    /// Single precision.
    F32,
    /// Products of packed bytes, summed as integers.
    PackedBytes,
    /// Matrices in half precision, summed in single precision.
    F16Matrices,
}

impl Arithmetic {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::PackedBytes => "packed bytes",
            Arithmetic::F16Matrices => "f16 matrices",
        }
    }
}

/// A compiled graph. One program serves every length; runs from several threads follow one another.
pub trait Program: Send + Sync {
    /// The graph that runs, after all passes.
    fn graph(&self) -> &Graph;

    /// Bytes that a run under `bindings` takes, by use.
    ///
    /// # Errors
    /// Unbound or impossible sizes.
    fn memory(&self, bindings: &Bindings) -> Result<ProgramMemory>;

    /// Empty states for a graph whose capacities are bound in `bindings`.
    ///
    /// # Errors
    /// Memory that cannot be had.
    fn new_state(&self, bindings: &Bindings) -> Result<ProgramState>;

    /// Gives the states other capacities; what they hold up to the smaller capacity stays.
    ///
    /// # Errors
    /// Memory that cannot be had; the states keep their old capacities then.
    fn resize_state(&self, state: &mut ProgramState, bindings: &Bindings) -> Result<()>;

    /// Gives memory back that only runs need; the next run takes it again.
    fn trim(&self);

    /// Whether [`Program::start`] returns before the run has ended, so that the next one can be prepared meanwhile.
    fn overlaps(&self) -> bool {
        false
    }

    /// Starts a run for the results in `wanted`; what only other results need is not computed. `bindings` give every
    /// size but the capacities, which the state knows.
    ///
    /// Runs of one program take place in the order in which they are started.
    ///
    /// # Errors
    /// Inputs that are missing or have the wrong size, results that the program does not have, and what the kernels
    /// report.
    fn start(
        &self,
        state: &mut ProgramState,
        inputs: &Inputs<'_>,
        bindings: &Bindings,
        wanted: &[&str],
    ) -> Result<Box<dyn Running>>;

    /// Runs the graph once, for all its results.
    ///
    /// # Errors
    /// As [`Program::start`].
    fn run(&self, state: &mut ProgramState, inputs: &Inputs<'_>, bindings: &Bindings) -> Result<Outputs> {
        let all: Vec<&str> = self.graph().outputs().iter().map(|(name, _)| name.as_str()).collect();
        self.start(state, inputs, bindings, &all)?.finish()
    }
}

/// A run that was started. Dropping it gives its results up, not the changes of its states.
pub trait Running: Send {
    /// Waits for the end.
    ///
    /// # Errors
    /// What happened on the device, such as its loss.
    fn finish(self: Box<Self>) -> Result<Outputs>;
}

/// Results that were there at once.
impl Running for Outputs {
    fn finish(self: Box<Self>) -> Result<Outputs> {
        Ok(*self)
    }
}

/// Bytes of one program, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramMemory {
    /// Weights used as the checkpoint stores them (mapped where they come from a file).
    pub weights: u64,
    /// Of tables that are read by row: the whole tables, of which only the rows asked for come into memory. Not
    /// part of the total.
    pub gathered: u64,
    /// Weights held in another form: widened vectors, load-time results.
    pub converted: u64,
    /// States, such as KV caches.
    pub states: u64,
    /// Intermediates, with reuse.
    pub activations: u64,
    /// Working memory of kernels.
    pub scratch: u64,
}

impl ProgramMemory {
    /// The sum of what is in memory in full.
    pub fn total(&self) -> u64 {
        self.weights + self.converted + self.states + self.activations + self.scratch
    }
}

impl std::ops::AddAssign for ProgramMemory {
    fn add_assign(&mut self, other: ProgramMemory) {
        self.weights += other.weights;
        self.gathered += other.gathered;
        self.converted += other.converted;
        self.states += other.states;
        self.activations += other.activations;
        self.scratch += other.scratch;
    }
}

/// Bytes of one program, by use and by where they lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlacedMemory {
    /// In the host's memory.
    pub host: ProgramMemory,
    /// In the memory of a device of its own.
    pub device: ProgramMemory,
}

impl PlacedMemory {
    /// All of it.
    pub fn sum(&self) -> ProgramMemory {
        let mut sum = self.host;
        sum += self.device;
        sum
    }
}

impl std::ops::AddAssign for PlacedMemory {
    fn add_assign(&mut self, other: PlacedMemory) {
        self.host += other.host;
        self.device += other.device;
    }
}

/// What a program keeps from run to run. It belongs to the backend that made it.
pub struct ProgramState {
    /// The backend's own representation.
    pub inner: Box<dyn Any + Send>,
    /// Sizes that the state's capacities were made for.
    pub bindings: Bindings,
}

/// Values that the caller gives to one run.
#[derive(Clone, Default)]
pub struct Inputs<'a> {
    values: Vec<(&'a str, InputData<'a>)>,
}

/// The elements of an input.
#[derive(Clone, Copy, Debug)]
pub enum InputData<'a> {
    /// Numbers.
    F32(&'a [f32]),
    /// Indices and positions.
    I32(&'a [i32]),
    /// A result of the run before with the same state, by name: it need not leave the device.
    Last(&'a str),
}

impl<'a> Inputs<'a> {
    /// No inputs.
    pub fn new() -> Inputs<'a> {
        Inputs::default()
    }

    /// Adds numbers.
    pub fn f32(mut self, name: &'a str, values: &'a [f32]) -> Inputs<'a> {
        self.values.push((name, InputData::F32(values)));
        self
    }

    /// Adds indices or positions.
    pub fn i32(mut self, name: &'a str, values: &'a [i32]) -> Inputs<'a> {
        self.values.push((name, InputData::I32(values)));
        self
    }

    /// Adds indices that are a result of the run before with the same state.
    pub fn last(mut self, name: &'a str, output: &'a str) -> Inputs<'a> {
        self.values.push((name, InputData::Last(output)));
        self
    }

    /// The same, with the results of the run before in place of their names.
    ///
    /// # Errors
    /// [`Error::Name`] for a result that the run before did not give.
    pub(crate) fn resolved<'b>(&self, last: impl Fn(&str) -> Option<&'b [i32]>) -> Result<Inputs<'b>>
    where
        'a: 'b,
    {
        let mut resolved = Inputs::new();
        for (name, data) in &self.values {
            let data = match *data {
                InputData::Last(output) => InputData::I32(last(output).ok_or_else(|| Error::Name {
                    kind: "input",
                    name: (*name).into(),
                    what: format!("wants `{output}`, which the last run did not give"),
                })?),
                other => other,
            };
            resolved.values.push((*name, data));
        }
        Ok(resolved)
    }

    /// The input of this name.
    ///
    /// # Errors
    /// [`Error::Name`] where it was not given.
    pub fn get(&self, name: &str) -> Result<InputData<'a>> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, d)| *d).ok_or_else(|| Error::Name {
            kind: "input",
            name: name.into(),
            what: "was not given".into(),
        })
    }
}

/// Named results of one run.
#[derive(Clone, Debug, Default)]
pub struct Outputs(pub Vec<(String, Output)>);

/// One result.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major; indices as numbers.
    pub values: Vec<f32>,
}

impl Outputs {
    /// Takes the result of this name out.
    ///
    /// # Errors
    /// [`Error::Name`] where the program has no such result.
    pub fn take(&mut self, name: &str) -> Result<Output> {
        match self.0.iter().position(|(n, _)| n == name) {
            Some(i) => Ok(self.0.swap_remove(i).1),
            None => Err(Error::Name {
                kind: "output",
                name: name.into(),
                what: "is not one of the program".into(),
            }),
        }
    }
}
