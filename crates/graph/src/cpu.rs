//! The CPU backend: runs the nodes in order on the kernels of `pocketglm-tensor`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pocketglm_tensor::ops::{linear_fewer_scratch_bytes, linear_scratch_bytes, packed_scratch_bytes};
use pocketglm_tensor::{
    AlignedF32, Bytes, Cpu, DType, KvFormat, Packed, PackedFormat, RowCodes, ScaleKind, Tensor, Weight,
    WeightSource,
};

use crate::backend::{
    Backend, InputData, Inputs, Output, Outputs, Program, ProgramMemory, ProgramState, Running,
};
use crate::dim::{Bindings, eval_shape};
use crate::graph::{Graph, Value};
use crate::ops::{Call, Data, Op, Operand};
use crate::plan::{Place, Plan};
use crate::{Error, Result};

/// Runs graphs on the processor.
#[derive(Clone)]
pub struct CpuBackend {
    cpu: Arc<Cpu>,
}

impl CpuBackend {
    /// A backend on this execution context.
    pub fn new(cpu: Arc<Cpu>) -> CpuBackend {
        CpuBackend { cpu }
    }

    /// The execution context.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        format!("cpu ({:?}, {} threads)", self.cpu.isa(), self.cpu.threads()).to_lowercase()
    }

    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Result<ProgramMemory> {
        plan_memory(graph, bindings, &self.cpu)
    }

    fn compile(&self, graph: &Graph, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Program>> {
        Ok(Box::new(CpuProgram::new(self.cpu.clone(), graph.clone(), &*weights)?))
    }
}

/// What a source or load-time node holds.
enum Held {
    /// Nothing: an input, a state, or a node that runs.
    Nothing,
    /// A weight as stored.
    Stored(Tensor),
    /// A quantised matrix in the kernels' layout.
    Packed(Packed),
    /// A quantised table of which rows are read, as stored.
    Rows(Tensor),
    /// Values in f32.
    Values(AlignedF32),
}

struct CpuProgram {
    cpu: Arc<Cpu>,
    graph: Graph,
    held: Vec<Vec<Held>>,
    /// Names of the states, in the order of their buffers.
    states: Vec<(usize, String)>,
    /// The arena, and plans of the sizes used last.
    work: Mutex<Work>,
    /// The names that sizes of this graph depend on.
    sized_by: Vec<&'static str>,
}

#[derive(Default)]
struct Work {
    arena: AlignedF32,
    plans: Vec<(Bindings, Arc<Plan>)>,
}

/// Buffers of the states, in the program's order, and the indices that the last run gave.
#[derive(Default)]
struct CpuState {
    buffers: Vec<AlignedF32>,
    last: Vec<(String, Vec<i32>)>,
}

/// Plans kept: prefill chunk, its remainder, decode, and one to spare.
const PLANS: usize = 4;

impl CpuProgram {
    fn new(cpu: Arc<Cpu>, graph: Graph, weights: &dyn WeightSource) -> Result<CpuProgram> {
        let stored = graph.kept_as_stored();
        let by_row = read_by_row(&graph);
        let states = graph.nodes.iter().enumerate().filter_map(|(i, n)| match &n.op {
            Op::State(s) => Some((i, s.name.clone())),
            _ => None,
        });
        let mut program = CpuProgram {
            states: states.collect(),
            held: Vec::with_capacity(graph.nodes.len()),
            work: Mutex::new(Work::default()),
            sized_by: graph.sized_by(),
            cpu,
            graph,
        };
        for (i, keep) in stored.into_iter().enumerate() {
            let node = &program.graph.nodes[i];
            let held = match &node.op {
                Op::Weight(w) if keep && !by_row[i] && w.dtype.is_quantised() => {
                    vec![Held::Packed(pack(&program.cpu, weights, &w.name, &w.shape)?)]
                }
                Op::Weight(w) => {
                    let tensor = weights.tensor(&w.name)?;
                    if keep && by_row[i] && w.dtype.is_quantised() {
                        vec![Held::Rows(tensor)]
                    } else {
                        vec![hold(&tensor, &w.name, keep)?]
                    }
                }
                Op::Constant(c) => vec![hold(&c.tensor, "a constant", keep)?],
                op if node.load_time => {
                    program.load_time(i).map_err(|e| e.at(format!("{} {}", node.scope, op.name())))?
                }
                _ => node.outputs.iter().map(|_| Held::Nothing).collect(),
            };
            program.held.push(held);
        }
        Ok(program)
    }

    /// Computes a node that depends on weights alone.
    fn load_time(&self, i: usize) -> Result<Vec<Held>> {
        let node = &self.graph.nodes[i];
        let none = Bindings::new();
        let shapes: Vec<Vec<usize>> =
            node.outputs.iter().map(|m| eval_shape(&m.shape, &none)).collect::<Result<_>>()?;
        let input_shapes: Vec<Vec<usize>> = node
            .inputs
            .iter()
            .map(|v| eval_shape(&self.graph.meta(*v).shape, &none))
            .collect::<Result<_>>()?;
        let mut results: Vec<AlignedF32> = shapes
            .iter()
            .map(|s| AlignedF32::zeroed(s.iter().product()))
            .collect::<pocketglm_tensor::Result<_>>()?;
        let mut scratch = AlignedF32::zeroed(node.op.def().scratch(&input_shapes, &shapes))?;
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (v, shape) in node.inputs.iter().zip(&input_shapes) {
            inputs.push(Operand { data: self.held_data(*v)?, shape });
        }
        let mut outputs: Vec<&mut [f32]> = results.iter_mut().map(|r| &mut r[..]).collect();
        let (bindings, scratch) = (&none, &mut scratch[..]);
        node.op.def().run(&mut Call {
            cpu: &self.cpu,
            bindings,
            inputs: &inputs,
            outputs: &mut outputs,
            scratch,
        })?;
        Ok(results.into_iter().map(Held::Values).collect())
    }

    fn held_data(&self, v: Value) -> Result<Data<'_>> {
        Ok(match &self.held[v.node()][v.port()] {
            Held::Values(x) => Data::F32(x),
            Held::Stored(t) => Data::Weight(Weight::of(t)?),
            Held::Packed(p) => Data::Weight(Weight::Packed(p)),
            Held::Rows(t) => Data::Rows(t),
            Held::Nothing => {
                return Err(Error::Name {
                    kind: "state",
                    name: self.graph.node(v).scope.clone(),
                    what: "holds nothing".into(),
                });
            }
        })
    }

    fn plan(&self, work: &mut Work, bindings: &Bindings) -> Result<Arc<Plan>> {
        let mut key = Bindings::new();
        for name in self.sized_by.iter().copied() {
            key.set(name, bindings.get(name).ok_or(Error::Unbound { name })?);
        }
        if let Some(at) = work.plans.iter().position(|(k, _)| *k == key) {
            let found = work.plans.remove(at);
            work.plans.push(found);
        } else {
            let plan = Arc::new(Plan::new(&self.graph, bindings)?);
            if work.plans.len() == PLANS {
                work.plans.remove(0);
            }
            work.plans.push((key, plan));
        }
        // The entry was put last just now.
        work.plans.last().map(|(_, p)| p.clone()).ok_or(Error::Unbound { name: "plan" })
    }
}

/// For each node whether all that its users do is to read rows of it.
fn read_by_row(graph: &Graph) -> Vec<bool> {
    let mut by_row = vec![true; graph.nodes.len()];
    for node in &graph.nodes {
        for v in &node.inputs {
            by_row[v.node()] &= matches!(node.op, Op::GatherRows(_));
        }
    }
    by_row
}

/// Bytes of a stored matrix that may stay in memory while it is packed.
const RELEASE: usize = 8 << 20;
/// What the system may map around the ends of what is read: a page of the largest size.
const AROUND: usize = 2 << 20;

/// A quantised matrix in the kernels' layout: as the source has it, or packed now.
fn pack(cpu: &Cpu, weights: &dyn WeightSource, name: &str, shape: &[usize]) -> Result<Packed> {
    if let Some(packed) = weights.packed(name)? {
        return Ok(packed);
    }
    let tensor = weights.tensor(name)?;
    let dtype = tensor.dtype();
    let wrong = || pocketglm_tensor::Error::TooLarge { shape: shape.to_vec(), dtype };
    let (&[rows, k], Some(format)) = (shape, PackedFormat::of(dtype)) else { return Err(wrong().into()) };
    let row_bytes = dtype.row_bytes(k).ok_or_else(wrong)?;
    let bytes = tensor.bytes();
    let failed = Mutex::new(None);
    let stored_bytes = tensor.shared_bytes();
    let step = (RELEASE / row_bytes.max(1)).max(1);
    let take_apart = |row: usize, codes: &mut RowCodes| {
        if row >= 2 * step && row.is_multiple_of(step) {
            // Rows are packed about in order. A row that is still needed is read again.
            let done = stored_bytes.slice((row - 2 * step) * row_bytes..(row - step) * row_bytes);
            done.iter().for_each(Bytes::release);
        }
        let stored = bytes.get(row * row_bytes..(row + 1) * row_bytes).unwrap_or(&[]);
        pocketglm_quant::take_apart(dtype, stored, k, codes).map_err(|source| {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert(Error::Quantised { name: name.into(), row, source });
            wrong()
        })?;
        let finite = |bits: &u16| match format.scale {
            ScaleKind::BF16 => bits & 0x7f80 != 0x7f80,
            _ => bits & 0x7c00 != 0x7c00,
        };
        if codes.scales.iter().chain(&codes.minima).all(finite) {
            return Ok(());
        }
        Err(pocketglm_tensor::Error::Source {
            name: name.into(),
            place: "the checkpoint".into(),
            what: format!("row {row} has a scale that is not a finite number"),
        })
    };
    let packed = Packed::pack(cpu, format, rows, k, &take_apart);
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => {
            let packed = packed?;
            tensor.shared_bytes().release_around(AROUND);
            Ok(packed)
        }
    }
}

/// The values of a quantised tensor.
fn widened(tensor: &Tensor, name: &str) -> Result<AlignedF32> {
    let k = tensor.shape().last().copied().unwrap_or(1).max(1);
    let bytes = tensor.dtype().row_bytes(k).unwrap_or(0).max(1);
    let mut values = AlignedF32::zeroed(tensor.elements())?;
    for (row, (stored, values)) in tensor.bytes().chunks(bytes).zip(values.chunks_mut(k)).enumerate() {
        pocketglm_quant::dequantise_row(tensor.dtype(), stored, values)
            .map_err(|source| Error::Quantised { name: name.into(), row, source })?;
    }
    Ok(values)
}

/// The results of a graph's load-time nodes that other nodes use, computed on the processor: for devices that do not
/// compute them by themselves.
///
/// # Errors
/// As [`Backend::compile`] of the part of the graph that they depend on.
pub fn load_time_values(
    cpu: &Arc<Cpu>,
    graph: &Graph,
    weights: &dyn WeightSource,
) -> Result<Vec<(Value, Output)>> {
    let (values, part) = graph.load_time_part();
    if values.is_empty() {
        return Ok(Vec::new());
    }
    let program = CpuProgram::new(cpu.clone(), part, weights)?;
    let none = Bindings::new();
    let mut outputs = program.run(&mut program.new_state(&none)?, &Inputs::new(), &none)?;
    values.into_iter().enumerate().map(|(i, v)| Ok((v, outputs.take(&i.to_string())?))).collect()
}

/// The values of a weight in f32, checked to be finite.
///
/// # Errors
/// Values that are not finite, and types that are no numbers, naming the tensor.
pub fn widened_weight(tensor: &Tensor, name: &str) -> Result<AlignedF32> {
    match hold(tensor, name, false)? {
        Held::Values(values) => Ok(values),
        // Nothing is kept as it is stored unless it is asked for.
        _ => Ok(AlignedF32::default()),
    }
}

/// A weight as it will be used: as stored, or widened to f32. Widened values are checked, stored ones when the
/// results are not finite, because checking them here would read the whole file.
fn hold(tensor: &Tensor, name: &str, keep: bool) -> Result<Held> {
    if keep && tensor.dtype().is_float() {
        return Ok(Held::Stored(tensor.clone().aligned()?));
    }
    if tensor.dtype().is_quantised() {
        let values = widened(tensor, name)?;
        finite(&values, name)?;
        tensor.shared_bytes().release_around(AROUND);
        return Ok(Held::Values(values));
    }
    if !tensor.dtype().is_float() {
        return Err(pocketglm_tensor::Error::DType {
            op: "weight",
            wanted: "F32, F16 or BF16",
            found: tensor.dtype(),
        }
        .into());
    }
    let values = tensor.to_f32()?;
    finite(&values, name)?;
    let mut copy = AlignedF32::working(values.len())?;
    copy.copy_from_slice(&values);
    Ok(Held::Values(copy))
}

fn finite(values: &[f32], name: &str) -> Result<()> {
    // A sum that is no number says that there is something to look for; it is quicker to have than a place.
    let finite = |part: &[f32]| part.iter().map(|v| v * 0.0).sum::<f32>() == 0.0;
    if values.chunks(64).all(finite) {
        return Ok(());
    }
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(pocketglm_tensor::Error::Source {
            name: name.into(),
            place: "the checkpoint".into(),
            what: format!("element {i} is {}, expected a finite number", values[i]),
        }
        .into()),
    }
}

impl Program for CpuProgram {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn memory(&self, bindings: &Bindings) -> Result<ProgramMemory> {
        plan_memory(&self.graph, bindings, &self.cpu)
    }

    fn new_state(&self, bindings: &Bindings) -> Result<ProgramState> {
        let mut state = ProgramState { inner: Box::<CpuState>::default(), bindings: bindings.clone() };
        self.resize_state(&mut state, bindings)?;
        Ok(state)
    }

    fn resize_state(&self, state: &mut ProgramState, bindings: &Bindings) -> Result<()> {
        let buffers = &mut own(state)?.buffers;
        buffers.resize_with(self.states.len(), AlignedF32::default);
        for (buffer, (i, _)) in buffers.iter_mut().zip(&self.states) {
            let meta = &self.graph.nodes[*i].outputs[0];
            let len = state_bytes(meta.dtype, &eval_shape(&meta.shape, bindings)?)?.div_ceil(4);
            match buffer.is_empty() {
                true => *buffer = AlignedF32::room(len)?,
                false => buffer.resize(len)?,
            }
        }
        state.bindings = bindings.clone();
        Ok(())
    }

    fn trim(&self) {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = Work::default();
    }

    fn start(
        &self,
        state: &mut ProgramState,
        inputs: &Inputs<'_>,
        bindings: &Bindings,
        wanted: &[&str],
    ) -> Result<Box<dyn Running>> {
        let mut all = bindings.clone();
        for (name, size) in state.bindings.iter() {
            all.set(name, size);
        }
        let CpuState { buffers, last } = own(state)?;
        let mut given: HashMap<usize, InputData<'_>> = HashMap::new();
        for (i, node) in self.graph.nodes.iter().enumerate() {
            if let Op::Input(input) = &node.op {
                given.insert(i, checked_input(input, from_last(inputs.get(&input.name)?, last)?, &all)?);
            }
        }
        // A panic in an earlier run leaves only scratch data behind.
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = self.plan(&mut work, &all)?;
        if work.arena.len() < plan.arena {
            // The old one is freed first.
            work.arena = AlignedF32::default();
            work.arena = AlignedF32::working(plan.arena)?;
        }
        let run = Run { program: self, plan: &plan, given: &given, bindings: &all };
        let needed = self.graph.needed(wanted)?;
        for (i, node) in self.graph.nodes.iter().enumerate() {
            if needed[i] && !(node.op.is_source() || node.op.is_view() || node.load_time) {
                run.node(i, &mut work.arena, buffers)
                    .map_err(|e| e.at(format!("{} {}", node.scope, node.op.name())))?;
            }
        }
        let mut outputs = Outputs::default();
        let mut indices = Vec::new();
        for (name, v) in self.graph.outputs.iter().filter(|(name, _)| wanted.contains(&name.as_str())) {
            let operand = run.operand(*v, &Carved::whole(&work.arena), buffers)?;
            let Data::F32(values) = operand.data else { continue };
            if self.graph.meta(*v).dtype == DType::I32 {
                indices.push((name.clone(), values.iter().map(|&v| v as i32).collect()));
            }
            outputs.0.push((name.clone(), Output { shape: operand.shape.to_vec(), values: values.to_vec() }));
        }
        drop(given);
        *last = indices;
        Ok(Box::new(outputs))
    }
}

/// An input that is a result of the run before, as numbers; any other input as it is.
fn from_last<'a>(data: InputData<'a>, last: &'a [(String, Vec<i32>)]) -> Result<InputData<'a>> {
    let InputData::Last(wanted) = data else { return Ok(data) };
    match last.iter().find(|(name, _)| name == wanted) {
        Some((_, values)) => Ok(InputData::I32(values)),
        None => Err(Error::Name {
            kind: "output",
            name: wanted.into(),
            what: "is not one that the last run gave as indices".into(),
        }),
    }
}

/// Bytes of a state.
fn state_bytes(dtype: DType, shape: &[usize]) -> Result<usize> {
    let too_large = || pocketglm_tensor::Error::TooLarge { shape: shape.to_vec(), dtype };
    Ok(dtype.bytes(shape).ok_or_else(too_large)?)
}

fn own(state: &mut ProgramState) -> Result<&mut CpuState> {
    state.inner.downcast_mut::<CpuState>().ok_or_else(|| Error::Name {
        kind: "state",
        name: "program state".into(),
        what: "belongs to another backend".into(),
    })
}

fn checked_input<'a>(
    input: &crate::ops::Input,
    data: InputData<'a>,
    bindings: &Bindings,
) -> Result<InputData<'a>> {
    let wanted: usize = eval_shape(&input.meta.shape, bindings)?.iter().product();
    let (kind, len) = match data {
        InputData::F32(x) => (DType::F32, x.len()),
        InputData::I32(x) => (DType::I32, x.len()),
        // Resolved, or refused, before.
        InputData::Last(_) => (DType::I32, wanted),
    };
    if len != wanted || kind != input.meta.dtype {
        let what = format!("needs {wanted} elements of {}, found {len} of {kind}", input.meta.dtype);
        return Err(Error::Name { kind: "input", name: input.name.clone(), what });
    }
    Ok(data)
}

/// One run in progress.
struct Run<'a> {
    program: &'a CpuProgram,
    plan: &'a Plan,
    given: &'a HashMap<usize, InputData<'a>>,
    bindings: &'a Bindings,
}

impl Run<'_> {
    fn node(&self, i: usize, arena: &mut AlignedF32, buffers: &mut [AlignedF32]) -> Result<()> {
        let node = &self.program.graph.nodes[i];
        let states = node.op.state_results();
        // States that the node changes are taken out, so that they can be written while others are read.
        let mut taken: Vec<(usize, AlignedF32)> = Vec::with_capacity(states);
        for v in &node.inputs[node.inputs.len() - states..] {
            let (root, _) = self.plan.root(*v);
            let at = self.state_index(root)?;
            taken.push((at, std::mem::take(&mut buffers[at])));
        }
        let mut wanted: Vec<Range<usize>> = Vec::with_capacity(node.outputs.len() + 1);
        for place in &self.plan.places[i] {
            if let Place::Arena(range) = place {
                wanted.push(range.clone());
            }
        }
        wanted.push(self.plan.scratch[i].clone());
        let (mut pieces, rest) = carve(arena, &wanted)?;
        let scratch = pieces.pop().unwrap_or(&mut []);
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (k, v) in node.inputs.iter().enumerate() {
            inputs.push(if k + states >= node.inputs.len() {
                let format = KvFormat::of(self.program.graph.meta(*v).dtype).unwrap_or(KvFormat::F32);
                Operand { data: Data::Kv(format, &[]), shape: self.plan.shape(*v) }
            } else {
                self.operand(*v, &rest, buffers)?
            });
        }
        pieces.extend(taken.iter_mut().map(|(_, b)| &mut b[..]));
        let (cpu, bindings) = (&*self.program.cpu, self.bindings);
        let result =
            node.op.def().run(&mut Call { cpu, bindings, inputs: &inputs, outputs: &mut pieces, scratch });
        drop(inputs);
        for (at, buffer) in taken {
            buffers[at] = buffer;
        }
        result
    }

    fn state_index(&self, root: Value) -> Result<usize> {
        self.program.states.iter().position(|(n, _)| *n == root.node()).ok_or_else(|| Error::Name {
            kind: "state",
            name: self.program.graph.node(root).scope.clone(),
            what: "is not one of the program".into(),
        })
    }

    /// The data of a value: a view of its root's data.
    fn operand<'s>(&'s self, v: Value, rest: &Carved<'s>, buffers: &'s [AlignedF32]) -> Result<Operand<'s>> {
        let shape = self.plan.shape(v);
        let (root, offset) = self.plan.root(v);
        let part = offset..offset + shape.iter().product::<usize>();
        let outside = || Error::Shape { op: "view", wanted: format!("{part:?}"), found: "less".into() };
        let view = |x: &'s [f32]| x.get(part.clone()).map(Data::F32).ok_or_else(outside);
        let data = match &self.plan.places[root.node()][root.port()] {
            Place::Arena(range) => view(rest.get(range)?)?,
            _ => match &self.program.graph.node(root).op {
                Op::State(state) => {
                    let buffer = &buffers[self.state_index(root)?];
                    match KvFormat::of(state.dtype) {
                        // Codes have no elements that a view could begin at.
                        Some(format) if format != KvFormat::F32 && offset == 0 => {
                            Data::Kv(format, bytemuck::cast_slice(buffer))
                        }
                        _ => view(buffer)?,
                    }
                }
                Op::Input(_) => match self.given.get(&root.node()) {
                    Some(InputData::F32(x)) => view(x)?,
                    Some(InputData::I32(x)) => Data::I32(x.get(part.clone()).ok_or_else(outside)?),
                    Some(InputData::Last(_)) | None => return Err(outside()),
                },
                _ => match self.program.held_data(root)? {
                    Data::F32(x) => view(x)?,
                    stored => stored,
                },
            },
        };
        Ok(Operand { data, shape })
    }
}

/// The arena without the pieces that are being written.
struct Carved<'a> {
    gaps: Vec<(usize, &'a [f32])>,
}

impl<'a> Carved<'a> {
    fn whole(arena: &'a [f32]) -> Carved<'a> {
        Carved { gaps: vec![(0, arena)] }
    }

    fn get(&self, range: &Range<usize>) -> Result<&'a [f32]> {
        self.gaps
            .iter()
            .find_map(|(start, gap)| {
                gap.get(range.start.checked_sub(*start)?..range.end.checked_sub(*start)?)
            })
            .ok_or_else(|| Error::Shape {
                op: "plan",
                wanted: format!("{range:?} free of results"),
                found: "an overlap".into(),
            })
    }
}

/// Splits the arena into the ranges that are written, in their order, and the gaps between them.
fn carve<'a>(arena: &'a mut [f32], wanted: &[Range<usize>]) -> Result<(Vec<&'a mut [f32]>, Carved<'a>)> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&i| (wanted[i].start, wanted[i].end));
    let mut pieces: Vec<Option<&'a mut [f32]>> = wanted.iter().map(|_| None).collect();
    let mut gaps = Vec::with_capacity(wanted.len() + 1);
    let (mut at, mut rest) = (0, arena);
    for i in order {
        let Range { start, end } = wanted[i].clone();
        if start == end {
            pieces[i] = Some(&mut []);
            continue;
        }
        let overlap =
            || Error::Shape { op: "plan", wanted: "disjoint results".into(), found: format!("{wanted:?}") };
        if start < at || end - at > rest.len() {
            return Err(overlap());
        }
        let (gap, tail) = rest.split_at_mut(start - at);
        let (piece, tail) = tail.split_at_mut(end - start);
        gaps.push((at, &*gap));
        pieces[i] = Some(piece);
        (at, rest) = (end, tail);
    }
    gaps.push((at, &*rest));
    Ok((pieces.into_iter().flatten().collect(), Carved { gaps }))
}

/// Bytes of a graph by use, from shapes alone: what [`Program::memory`] gives once weights are resolved.
///
/// # Errors
/// Unbound or impossible sizes.
pub fn plan_memory(graph: &Graph, bindings: &Bindings, cpu: &Cpu) -> Result<ProgramMemory> {
    memory_of(graph, &Plan::new(graph, bindings)?, cpu)
}

fn memory_of(graph: &Graph, plan: &Plan, cpu: &Cpu) -> Result<ProgramMemory> {
    let working = |elements: u64| AlignedF32::working_bytes(elements as usize) as u64;
    let mut memory =
        ProgramMemory { activations: working(plan.arena_bytes() / 4), ..ProgramMemory::default() };
    let stored = graph.kept_as_stored();
    let by_row = read_by_row(graph);
    // What convolutions take besides the scratch memory that the context keeps between nodes.
    let mut besides = 0;
    for (i, node) in graph.nodes.iter().enumerate() {
        let elements: u64 = plan.shapes[i].iter().map(|s| s.iter().product::<usize>() as u64).sum();
        match &node.op {
            Op::Weight(w) if stored[i] && by_row[i] => {
                memory.gathered += w.dtype.bytes(&w.shape).unwrap_or(0) as u64
            }
            Op::Weight(w) if stored[i] && w.dtype.is_quantised() => {
                // Packed at load; the stored bytes are read once and are not in memory afterwards.
                if let (Some(format), &[rows, k]) = (PackedFormat::of(w.dtype), w.shape.as_slice()) {
                    memory.converted += Packed::bytes_for(format, rows, k)? as u64;
                }
            }
            Op::Weight(w) if stored[i] => memory.weights += w.dtype.bytes(&w.shape).unwrap_or(0) as u64,
            Op::Weight(_) | Op::Constant(_) => memory.converted += working(elements),
            Op::State(s) => memory.states += state_bytes(s.dtype, &plan.shapes[i][0])? as u64,
            _ if node.load_time => memory.converted += working(elements),
            Op::Linear(_) | Op::Qkv(_) | Op::MatMul(_) => {
                let x = plan.shape(node.inputs[0]);
                let k = x.last().copied().unwrap_or(0);
                let m = x.iter().rev().skip(1).product();
                let quantised = |v: &Value| graph.meta(*v).dtype.is_quantised();
                let packed = node.inputs.iter().any(quantised);
                let mut bytes = if packed { packed_scratch_bytes } else { linear_scratch_bytes }(cpu, m, k);
                if !packed && matches!(&node.op, Op::Linear(l) if l.fewer) {
                    let n = plan.shapes[i][0].last().copied().unwrap_or(0);
                    bytes = bytes.max(linear_fewer_scratch_bytes(cpu, [m, k, n]));
                }
                memory.scratch = memory.scratch.max(bytes as u64);
            }
            Op::FrameConv(c) => {
                let packed = graph.meta(node.inputs[1]).dtype.is_quantised();
                let (x, weight) = (plan.shape(node.inputs[0]), plan.shape(node.inputs[1]));
                let (padded, m, k) = c.product(x, weight, packed)?;
                if !packed {
                    memory.scratch = memory.scratch.max(c.fewer_scratch_bytes(cpu, x, weight) as u64);
                }
                if m > 0 {
                    let bytes = if packed { packed_scratch_bytes } else { linear_scratch_bytes }(cpu, m, k);
                    memory.scratch = memory.scratch.max(bytes as u64);
                }
                besides = besides.max(padded);
            }
            Op::Attention(a) => {
                let t = plan.shape(node.inputs[0])[0];
                let s = plan.shape(node.inputs[1])[0];
                let bytes = a.scratch_bytes(cpu, t, s)?;
                memory.scratch = memory.scratch.max(bytes);
            }
            _ => {}
        }
    }
    memory.scratch += besides;
    Ok(memory)
}
