//! A compiled graph on the device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pocketglm_graph::ops::Op;
use pocketglm_graph::{
    Bindings, DeviceFault, Error, Graph, InputData, Inputs, Program, ProgramMemory, ProgramState, Result,
    Running, Value, eval_shape, passes,
};
use pocketglm_tensor::{Cpu, DType, WeightSource};

use crate::backend::memory_of;
use crate::device::{Buffer, Device};
use crate::guard;
use crate::held::Held;
use crate::lower::Lowering;
use crate::plan::{Groups, PARAMETERS, Places, Recipe, Slot, Step, Word};
use crate::profile::{self, Stamps};
use crate::readback::{Pending, Piece, Pool};
use crate::state::{DeviceState, own, resized};

/// Recipes kept: prefill chunk, its remainder, decode, and one to spare.
pub(crate) const RECIPES: usize = 4;
/// Most workgroups along one dimension of a dispatch.
const MOST_GROUPS: u64 = 65_535;

pub(crate) struct WgpuProgram {
    device: Arc<Device>,
    graph: Graph,
    held: Held,
    pool: Arc<Pool>,
    sized_by: Vec<&'static str>,
    work: Mutex<Work>,
    generations: AtomicU64,
}

/// What runs use one after the other.
#[derive(Default)]
struct Work {
    arena: Option<Buffer>,
    /// Changes with the arena.
    generation: u64,
    recipes: Vec<(Bindings, Arc<Recipe>, Option<Bound>)>,
}

/// A recipe's bind groups, and what they were made for.
struct Bound {
    arena: u64,
    state: u64,
    groups: Vec<wgpu::BindGroup>,
    parameters: Buffer,
}

impl WgpuProgram {
    pub fn new(
        device: Arc<Device>,
        cpu: &Arc<Cpu>,
        graph: Graph,
        weights: &dyn WeightSource,
    ) -> Result<WgpuProgram> {
        let mut graph = graph;
        // A dispatch saved; a graph that was not fused has nothing to join.
        passes::apply("norm and residual into the layer behind", passes::fuse_norm_add_linear, &mut graph)?;
        let held = Held::load(&device, cpu, &graph, weights)?;
        Ok(WgpuProgram {
            sized_by: graph.sized_by(),
            pool: Arc::default(),
            work: Mutex::default(),
            generations: AtomicU64::new(1),
            device,
            graph,
            held,
        })
    }

    fn recipe(&self, bindings: &Bindings) -> Result<Recipe> {
        let places = Places::new(&self.graph, bindings, self.device.cooperative())?;
        let mut lowering = Lowering {
            device: &self.device,
            graph: &self.graph,
            held: &self.held,
            places: &places,
            bindings,
            steps: Vec::new(),
            node: 0,
        };
        lowering.all()?;
        let mut steps = lowering.steps;
        let mut last = None;
        for step in &mut steps {
            // Of several dispatches of a node the first counts for all.
            if last.replace(step.node) != Some(step.node) {
                step.operations = profile::cost(&self.graph, step.node, bindings)?.operations;
            }
        }
        let align = u64::from(self.device.limits.min_uniform_buffer_offset_alignment);
        Ok(Recipe { places, steps, stride: (PARAMETERS as u64 * 4).next_multiple_of(align) })
    }

    /// The entry of `work.recipes` for these sizes.
    fn find(&self, work: &mut Work, bindings: &Bindings) -> Result<usize> {
        let mut key = Bindings::new();
        for name in self.sized_by.iter().copied() {
            key.set(name, bindings.get(name).ok_or(Error::Unbound { name })?);
        }
        match work.recipes.iter().position(|(k, ..)| *k == key) {
            Some(at) => {
                let found = work.recipes.remove(at);
                work.recipes.push(found);
            }
            None => {
                let recipe = Arc::new(self.recipe(bindings)?);
                if work.recipes.len() == RECIPES {
                    work.recipes.remove(0);
                }
                work.recipes.push((key, recipe, None));
            }
        }
        Ok(work.recipes.len() - 1)
    }

    fn bind(&self, recipe: &Recipe, arena: &Buffer, state: &DeviceState, generation: u64) -> Result<Bound> {
        let bytes = recipe.stride * recipe.steps.len().max(1) as u64;
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let parameters = self.device.buffer("parameters", bytes, usage)?;
        let mut groups = Vec::with_capacity(recipe.steps.len());
        for (i, step) in recipe.steps.iter().enumerate() {
            let mut entries = vec![entry(0, &parameters, i as u64 * recipe.stride, PARAMETERS as u64 * 4)];
            for (number, slot) in &step.slots {
                entries.push(match slot {
                    Slot::Arena { at, bytes } => {
                        // Drivers drop writes behind a binding, so sentinels must be part of it.
                        let behind = if self.device.guarded { guard::BEHIND as u64 * 4 } else { 0 };
                        let most = (arena.bytes - at).min(self.device.binding_limit().max(*bytes));
                        entry(*number, arena, *at, (*bytes + behind).min(most))
                    }
                    other => {
                        let buffer = self.buffer(other, state)?;
                        entry(*number, buffer, 0, buffer.bytes)
                    }
                });
            }
            groups.push(self.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(&step.pipeline.name),
                layout: &step.pipeline.layout,
                entries: &entries,
            }));
        }
        self.device.check()?;
        Ok(Bound { arena: generation, state: state.generation, groups, parameters })
    }

    fn buffer<'a>(&'a self, slot: &Slot, state: &'a DeviceState) -> Result<&'a Buffer> {
        let found = match *slot {
            Slot::Vectors => Some(&self.held.vectors),
            Slot::Table(value) => self.held.large.get(&value),
            Slot::State(i) => state.buffers.get(i),
            Slot::Matrix { key, part, which } => {
                self.held.matrices.get(key).and_then(|m| m.parts.get(part)).and_then(|p| match which {
                    0 => Some(&p.codes),
                    1 => p.scales.as_ref(),
                    _ => p.minima.as_ref(),
                })
            }
            Slot::Arena { .. } => None,
        };
        found.ok_or_else(|| {
            self.device.error(DeviceFault::Unsupported, format!("{slot:?} is bound and not there"))
        })
    }

    /// Writes the inputs, and what the host computes of them, to their places.
    fn write_inputs(
        &self,
        recipe: &Recipe,
        arena: &Buffer,
        inputs: &Inputs<'_>,
        bindings: &Bindings,
        state: &DeviceState,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<()> {
        let queue = &self.device.queue;
        for (i, node) in self.graph.nodes().iter().enumerate() {
            let Some(&start) = recipe.places.written.get(&i) else { continue };
            let at = start as u64 * 4;
            match &node.op {
                Op::Input(input) => {
                    let elements: usize = eval_shape(&input.meta.shape, bindings)?.iter().product();
                    let wrong = |what: String| Error::Name { kind: "input", name: input.name.clone(), what };
                    let bytes: &[u8] = match (inputs.get(&input.name)?, input.meta.dtype) {
                        (InputData::F32(x), DType::F32) => bytemuck::cast_slice(x),
                        (InputData::I32(x), DType::I32) => bytemuck::cast_slice(x),
                        (InputData::Last(name), DType::I32) => {
                            let found =
                                state.indices.iter().find(|(n, ..)| n == name).zip(state.last.as_ref());
                            let Some(((_, from, count), last)) = found else {
                                return Err(wrong(format!(
                                    "wants `{name}`, which the last run did not give"
                                )));
                            };
                            if *count != elements as u64 {
                                return Err(wrong(format!(
                                    "needs {elements} elements, `{name}` has {count}"
                                )));
                            }
                            encoder.copy_buffer_to_buffer(&last.raw, *from, &arena.raw, at, count * 4);
                            continue;
                        }
                        _ => return Err(wrong(format!("needs elements of {}", input.meta.dtype))),
                    };
                    if bytes.len() != elements * 4 {
                        let found = bytes.len() / 4;
                        return Err(wrong(format!(
                            "needs {elements} elements of {}, found {found}",
                            input.meta.dtype
                        )));
                    }
                    self.check_indices(i, inputs.get(&input.name)?, bindings)?;
                    if !bytes.is_empty() {
                        queue.write_buffer(&arena.raw, at, bytes);
                    }
                }
                Op::RopeTable(table) => {
                    let source = self.graph.node(node.inputs[0]);
                    let Op::Input(input) = &source.op else {
                        return Err(self
                            .device
                            .error(DeviceFault::Unsupported, "positions that are no input"));
                    };
                    let InputData::I32(positions) = inputs.get(&input.name)? else {
                        return Err(self
                            .device
                            .error(DeviceFault::Unsupported, "positions that are no indices"));
                    };
                    let shape = eval_shape(&node.outputs[0].shape, bindings)?;
                    let axes = positions.len() / shape[0].max(1);
                    let mut values = vec![0.0; shape.iter().product()];
                    table.compute(positions, [axes, shape[0]], &mut values)?;
                    if !values.is_empty() {
                        queue.write_buffer(&arena.raw, at, bytemuck::cast_slice(&values));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Indices outside of what they name are refused here, as the processor's kernels refuse them: kernels do not check.
    fn check_indices(&self, input: usize, data: InputData<'_>, bindings: &Bindings) -> Result<()> {
        let InputData::I32(values) = data else { return Ok(()) };
        for user in self.graph.nodes() {
            let limit = match &user.op {
                Op::GatherRows(_) if user.inputs[1].node() == input => user.inputs[0],
                Op::WeightedGather(_) if user.inputs[1].node() == input => user.inputs[0],
                Op::ScatterRows(_) if user.inputs[1].node() == input => user.inputs[0],
                Op::Softmax(_) | Op::Attention(_)
                    if user.inputs.last().is_some_and(|v| v.node() == input) =>
                {
                    let t = eval_shape(&self.graph.meta(user.inputs[0]).shape, bindings)?;
                    let rows = if t.len() == 3 { t[1] } else { t[0] };
                    let ok = values.first() == Some(&0)
                        && values.windows(2).all(|w| w[0] <= w[1])
                        && values.last().is_some_and(|&l| usize::try_from(l) == Ok(rows));
                    if ok {
                        continue;
                    }
                    return Err(Error::Shape {
                        op: "segments",
                        wanted: format!("ascending boundaries from 0 to {rows}"),
                        found: format!("{:?}", &values[..values.len().min(8)]),
                    });
                }
                _ => continue,
            };
            let rows = eval_shape(&self.graph.meta(limit).shape, bindings)?.first().copied().unwrap_or(0);
            if let Some(wrong) = values.iter().find(|&&v| usize::try_from(v).map_or(true, |v| v >= rows)) {
                return Err(Error::Shape {
                    op: user.op.name(),
                    wanted: format!("indices below {rows}"),
                    found: wrong.to_string(),
                }
                .at(user.scope.clone()));
            }
        }
        Ok(())
    }

    /// The parameters of all steps, one slot after the other.
    fn parameters(&self, recipe: &Recipe, bindings: &Bindings) -> Result<Vec<u8>> {
        let stride = recipe.stride as usize;
        let mut bytes = vec![0u8; stride * recipe.steps.len()];
        for (step, slot) in recipe.steps.iter().zip(bytes.chunks_exact_mut(stride)) {
            for (word, to) in step.words.iter().zip(slot.chunks_exact_mut(4)) {
                to.copy_from_slice(&number(word, bindings)?.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    /// Refuses appends and reads beyond a state's capacity.
    fn check_capacity(&self, bindings: &Bindings) -> Result<()> {
        for node in self.graph.nodes() {
            let (op, rows, state) = match &node.op {
                Op::KvAppend(a) => {
                    ("kv_append", a.at.eval(bindings)? + self.rows(node.inputs[0], bindings)?, node.inputs[1])
                }
                Op::Qkv(q) => match (&q.append, node.inputs.last()) {
                    (Some(at), Some(state)) => {
                        ("kv_append", at.eval(bindings)? + self.rows(node.inputs[0], bindings)?, *state)
                    }
                    _ => continue,
                },
                Op::Attention(a) => ("attention", a.keys.eval(bindings)?, node.inputs[1]),
                _ => continue,
            };
            let found = self.rows(state, bindings)?;
            if rows > found {
                return Err(Error::Shape {
                    op,
                    wanted: format!("room for {rows} tokens"),
                    found: format!("a state of {found}"),
                }
                .at(node.scope.clone()));
            }
        }
        Ok(())
    }

    fn rows(&self, value: Value, bindings: &Bindings) -> Result<usize> {
        Ok(self.graph.meta(value).shape.first().map(|d| d.eval(bindings)).transpose()?.unwrap_or(0))
    }
}

/// A word as kernels get it.
fn number(word: &Word, bindings: &Bindings) -> Result<u32> {
    let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Ok(match word {
        Word::U(n) => *n,
        Word::F(x) => x.to_bits(),
        Word::D(d) => size(d.eval(bindings)?),
        Word::Of(d, f) => size(f(d.eval(bindings)?)),
    })
}

fn entry(binding: u32, buffer: &Buffer, offset: u64, size: u64) -> wgpu::BindGroupEntry<'_> {
    wgpu::BindGroupEntry {
        binding,
        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &buffer.raw,
            offset,
            size: std::num::NonZeroU64::new(size),
        }),
    }
}

/// The grid of a dispatch, within the limit of each dimension.
fn grid(groups: &Groups, bindings: &Bindings) -> Result<[u32; 3]> {
    Ok(match groups {
        Groups::Grid(columns, rows) => [number(columns, bindings)?, *rows, 1],
        Groups::Count(count) if *count <= MOST_GROUPS => [*count as u32, 1, 1],
        Groups::Count(count) => {
            let x = 32_768u64;
            [x as u32, count.div_ceil(x).min(MOST_GROUPS) as u32, 1]
        }
    })
}

impl Program for WgpuProgram {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn memory(&self, bindings: &Bindings) -> Result<ProgramMemory> {
        memory_of(&self.device, &self.graph, bindings)
    }

    fn new_state(&self, bindings: &Bindings) -> Result<ProgramState> {
        let state = DeviceState {
            buffers: Vec::new(),
            capacity: Vec::new(),
            generation: 0,
            indices: Vec::new(),
            last: None,
        };
        let mut state = ProgramState { inner: Box::new(state), bindings: bindings.clone() };
        self.resize_state(&mut state, bindings)?;
        Ok(state)
    }

    fn resize_state(&self, state: &mut ProgramState, bindings: &Bindings) -> Result<()> {
        let own = own(state)?;
        let (mut buffers, mut capacities) = (Vec::new(), Vec::new());
        for (i, (node, layout)) in self.held.states.iter().enumerate() {
            let capacity = self.rows(Value::of(*node, 0), bindings)?;
            let old = own.buffers.get(i).zip(own.capacity.get(i).copied());
            buffers.push(resized(&self.device, layout, old, capacity)?);
            capacities.push(capacity);
        }
        (own.buffers, own.capacity) = (buffers, capacities);
        own.generation = self.generations.fetch_add(1, Ordering::Relaxed);
        state.bindings = bindings.clone();
        Ok(())
    }

    fn trim(&self) {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = Work::default();
        self.pool.clear();
    }

    fn overlaps(&self) -> bool {
        true
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
        let needed = self.graph.needed(wanted)?;
        self.check_capacity(&all)?;
        let own = own(state)?;
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.find(&mut work, &all)?;
        let recipe = work.recipes[at].1.clone();
        let behind = if self.device.guarded { guard::BEHIND } else { 0 };
        let bytes = (recipe.places.total + behind) as u64 * 4;
        if work.arena.as_ref().is_none_or(|a| a.bytes < bytes) {
            work.arena = None;
            work.arena = Some(self.device.storage("activations", bytes)?);
            work.generation = self.generations.fetch_add(1, Ordering::Relaxed);
        }
        let work = &mut *work;
        let Some(arena) = work.arena.as_ref() else { return Err(Error::Unbound { name: "arena" }) };
        let entry = &mut work.recipes[at].2;
        let fits = |b: &Bound| b.arena == work.generation && b.state == own.generation;
        if !entry.as_ref().is_some_and(fits) {
            *entry = Some(self.bind(&recipe, arena, own, work.generation)?);
        }
        let Some(bound) = entry.as_ref() else { return Err(Error::Unbound { name: "bind groups" }) };

        if self.device.guarded {
            guard::fill(&self.device, arena)?;
        }
        let mut encoder = self.device.device.create_command_encoder(&Default::default());
        self.write_inputs(&recipe, arena, inputs, &all, own, &mut encoder)?;
        let parameters = self.parameters(&recipe, &all)?;
        if !parameters.is_empty() {
            self.device.queue.write_buffer(&bound.parameters.raw, 0, &parameters);
        }
        let dispatches = || recipe.steps.iter().zip(&bound.groups).filter(|(s, _)| needed[s.node]);
        let stamps = match self.device.profile.is_on() {
            true => Some(Stamps::new(&self.device, dispatches().count())?),
            false => None,
        };
        match &stamps {
            Some(stamps) => encode_timed(&mut encoder, dispatches(), stamps, &all)?,
            None => encoder = self.encode(encoder, dispatches(), &all)?,
        }
        let pending = self.collect(&recipe, arena, own, wanted, encoder)?;
        if let Some(stamps) = &stamps {
            let steps: Vec<&Step> = dispatches().map(|(step, _)| step).collect();
            let run = profile::of_ops(&self.graph, &steps, &stamps.seconds(&self.device)?, &all)?;
            self.device.profile.add(run);
        }
        if self.device.guarded {
            guard::check(&self.device, arena, &self.graph, &recipe.places)?;
        }
        Ok(Box::new(pending))
    }
}

/// The dispatches of a run, each a pass of its own between two timestamps.
fn encode_timed<'a>(
    encoder: &mut wgpu::CommandEncoder,
    dispatches: impl Iterator<Item = (&'a Step, &'a wgpu::BindGroup)>,
    stamps: &Stamps,
    bindings: &Bindings,
) -> Result<()> {
    for (i, (step, group)) in dispatches.enumerate() {
        let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes: stamps.of(i) };
        let mut pass = encoder.begin_compute_pass(&descriptor);
        pass.set_pipeline(&step.pipeline.raw);
        pass.set_bind_group(0, group, &[]);
        let [x, y, z] = grid(&step.groups, bindings)?;
        pass.dispatch_workgroups(x, y, z);
    }
    stamps.resolve(encoder);
    Ok(())
}

impl WgpuProgram {
    /// The dispatches of a run. A long run is submitted in parts; what is left for the last one is given back.
    fn encode<'a>(
        &self,
        mut encoder: wgpu::CommandEncoder,
        mut dispatches: impl Iterator<Item = (&'a Step, &'a wgpu::BindGroup)>,
        bindings: &Bindings,
    ) -> Result<wgpu::CommandEncoder> {
        let part = self.device.part.load(Ordering::Relaxed) as f64;
        let mut next = dispatches.next();
        loop {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            let (mut last, mut operations) = (None, 0.0);
            while let Some((step, group)) = next {
                if operations > 0.0 && operations + step.operations > part {
                    break;
                }
                operations += step.operations;
                let this = std::ptr::from_ref(&step.pipeline.raw);
                if last != Some(this) {
                    pass.set_pipeline(&step.pipeline.raw);
                    last = Some(this);
                }
                pass.set_bind_group(0, group, &[]);
                let [x, y, z] = grid(&step.groups, bindings)?;
                pass.dispatch_workgroups(x, y, z);
                next = dispatches.next();
            }
            drop(pass);
            if next.is_none() {
                return Ok(encoder);
            }
            self.device.submit(encoder)?;
            encoder = self.device.device.create_command_encoder(&Default::default());
        }
    }

    /// Copies the wanted results to where the host, or the next run, finds them, and submits.
    fn collect(
        &self,
        recipe: &Recipe,
        arena: &Buffer,
        state: &mut DeviceState,
        wanted: &[&str],
        mut encoder: wgpu::CommandEncoder,
    ) -> Result<Pending> {
        let mut pieces = Vec::new();
        let mut copies = Vec::new();
        let mut total = 0u64;
        for (name, value) in self.graph.outputs().iter().filter(|(n, _)| wanted.contains(&n.as_str())) {
            let shape = recipe.places.plan.shape(*value).to_vec();
            let bytes = shape.iter().product::<usize>() as u64 * 4;
            let Some(start) = recipe.places.start(*value) else {
                return Err(self
                    .device
                    .error(DeviceFault::Unsupported, format!("result `{name}` is not computed by the run")));
            };
            let indices = self.graph.meta(*value).dtype == DType::I32;
            copies.push((start as u64 * 4, total, bytes, indices.then(|| name.clone())));
            pieces.push(Piece { name: name.clone(), shape, at: total, indices });
            total += bytes;
        }
        let buffer = self.pool.take(&self.device, total.max(4))?;
        state.indices.clear();
        let indices: u64 =
            copies.iter().filter(|(.., name)| name.is_some()).map(|(_, _, bytes, _)| bytes).sum();
        if indices > 0 && state.last.as_ref().is_none_or(|l| l.bytes < indices) {
            state.last = Some(self.device.storage("indices", indices)?);
        }
        let mut at = 0;
        for (from, to, bytes, name) in copies.into_iter().filter(|(_, _, bytes, _)| *bytes > 0) {
            encoder.copy_buffer_to_buffer(&arena.raw, from, &buffer.raw, to, bytes);
            if let (Some(name), Some(last)) = (name, &state.last) {
                encoder.copy_buffer_to_buffer(&arena.raw, from, &last.raw, at, bytes);
                state.indices.push((name, at, bytes / 4));
                at += bytes;
            }
        }
        let index = self.device.submit(encoder)?;
        let mapped = Arc::new(Mutex::new(None));
        let told = mapped.clone();
        buffer.raw.map_async(wgpu::MapMode::Read, 0..total.max(4), move |result| {
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
        Ok(Pending {
            device: self.device.clone(),
            pool: self.pool.clone(),
            buffer: Some(buffer),
            bytes: total.max(4),
            index,
            pieces,
            mapped,
        })
    }
}
