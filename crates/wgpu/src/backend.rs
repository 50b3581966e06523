//! The backend: an open device that compiles graphs.

use std::sync::Arc;

use pocketglm_graph::ops::Op;
use pocketglm_graph::{
    Arithmetic, Backend, Bindings, DeviceFault, Graph, PlacedMemory, Program, ProgramMemory, Result,
    RunProfile, Value,
};
use pocketglm_tensor::{Cpu, KvFormat, WeightSource};

use crate::device::Device;
use crate::features::start_up_test;
use crate::held::joined_biases;
use crate::options::{GpuInfo, GpuOptions};
use crate::plan::{PARAMETERS, Places};
use crate::program::{RECIPES, WgpuProgram};
use crate::rates;
use crate::state::KvLayout;
use crate::weights::Form;

/// Runs graphs on a GPU.
#[derive(Clone)]
pub struct WgpuBackend {
    pub(crate) device: Arc<Device>,
    info: GpuInfo,
    /// For what is computed once at load time, and for taking formats apart.
    cpu: Arc<Cpu>,
}

impl WgpuBackend {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::Device`](pocketglm_graph::Error::Device) where there is no such adapter, it gives no device, or its plain kernels
    /// fail the start-up test.
    pub fn open(cpu: Arc<Cpu>, options: &GpuOptions) -> Result<WgpuBackend> {
        let device = Arc::new(Device::open(options)?);
        let mut backend = WgpuBackend { info: device.info.clone(), device, cpu };
        if !options.untested {
            backend.test()?;
        }
        Ok(backend)
    }

    /// The start-up test; what it refuses is shown in [`WgpuBackend::info`].
    pub(crate) fn test(&mut self) -> Result<()> {
        let refused = start_up_test(self, &self.cpu)?;
        self.info.refused.extend(refused);
        Ok(())
    }

    /// What the adapter is, and what of it is used.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Bytes of the buffers that are alive on the device.
    pub fn allocated(&self) -> u64 {
        self.device.allocated()
    }

    /// Kinds of the kernels that runs were made of since the last call: files with their flags.
    #[doc(hidden)]
    pub fn take_kernels(&self) -> std::collections::BTreeSet<String> {
        self.device.pipelines.take_asked()
    }

    /// Destroys the device, as a driver's reset would: for testing how a program recovers. Everything that was made with
    /// it fails from now on.
    pub fn destroy(&self) {
        self.device.device.destroy();
    }
}

impl Backend for WgpuBackend {
    fn describe(&self) -> String {
        format!("gpu {}", self.info)
    }

    fn copy_rate(&self) -> Result<Option<f64>> {
        rates::copy(&self.device).map(Some)
    }

    fn arithmetic_rates(&self) -> Result<Vec<(Arithmetic, f64)>> {
        rates::arithmetic(&self.device)
    }

    fn profile(&self, on: bool) -> Result<()> {
        if on && !self.device.has_timestamps() {
            let what = "the adapter offers no timestamps, so that ops cannot be timed";
            return Err(self.device.error(DeviceFault::Unsupported, what));
        }
        self.device.profile.set(on);
        Ok(())
    }

    fn take_profile(&self) -> Vec<RunProfile> {
        self.device.profile.take()
    }

    fn plan(&self, graph: &Graph, bindings: &Bindings) -> Result<ProgramMemory> {
        memory_of(&self.device, graph, bindings)
    }

    fn plan_placed(&self, graph: &Graph, bindings: &Bindings) -> Result<PlacedMemory> {
        Ok(PlacedMemory { host: ProgramMemory::default(), device: self.plan(graph, bindings)? })
    }

    fn compile(&self, graph: &Graph, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Program>> {
        Ok(Box::new(WgpuProgram::new(self.device.clone(), &self.cpu, graph.clone(), &*weights)?))
    }
}

/// Bytes of a graph on the device, from shapes alone.
pub(crate) fn memory_of(device: &Device, graph: &Graph, bindings: &Bindings) -> Result<ProgramMemory> {
    let places = Places::new(graph, bindings, device.cooperative())?;
    let mut memory = ProgramMemory { activations: places.total as u64 * 4, ..ProgramMemory::default() };
    let kept = graph.kept_as_stored();
    let mut used = vec![false; graph.nodes().len()];
    for node in graph.nodes().iter().filter(|n| !n.load_time) {
        node.inputs.iter().for_each(|v| used[v.node()] = true);
    }
    for (i, node) in graph.nodes().iter().enumerate().filter(|(i, _)| used[*i]) {
        let elements: u64 = node.outputs.iter().enumerate().map(|(port, _)| size(&places, i, port)).sum();
        match &node.op {
            Op::Weight(w) if kept[i] => {
                if let (Some(form), &[rows, k]) = (Form::of(w.dtype), w.shape.as_slice()) {
                    memory.weights += form.bytes(rows, k);
                }
            }
            Op::Weight(_) | Op::Constant(_) => memory.converted += elements.next_multiple_of(4) * 4,
            Op::State(s) => {
                let shape = places.plan.shape(Value::of(i, 0));
                let format = KvFormat::of(s.dtype).unwrap_or_default();
                if let &[capacity, heads, d] = shape {
                    memory.states += KvLayout::new(device, format, heads, d)?.bytes(capacity);
                }
            }
            _ if node.load_time => memory.converted += elements.next_multiple_of(4) * 4,
            _ => {}
        }
    }
    let rows = |v: Value| places.plan.shape(v).first().copied().unwrap_or(0);
    for node in graph.nodes().iter().filter(|n| !n.load_time) {
        memory.converted += joined_biases(node, rows);
    }
    // Vectors are one buffer, which has a word at least.
    memory.converted = memory.converted.max(4);
    memory.scratch = parameters(device, graph) + results(graph, &places);
    Ok(memory)
}

/// Bytes of the parameters of all dispatches: of as many recipes as are kept, with no more than three dispatches for a node of a
/// prompt on average.
fn parameters(device: &Device, graph: &Graph) -> u64 {
    let align = u64::from(device.limits.min_uniform_buffer_offset_alignment);
    let slot = (PARAMETERS as u64 * 4).next_multiple_of(align);
    RECIPES as u64 * graph.dispatches() as u64 * 3 * slot
}

/// Bytes of the buffers that results are read from. A buffer serves results down to a quarter of its size, so that those of
/// smaller runs are at most a third of the largest again.
fn results(graph: &Graph, places: &Places) -> u64 {
    let of = |(_, value): &(String, Value)| places.plan.shape(*value).iter().product::<usize>() as u64 * 4;
    let largest: u64 = graph.outputs().iter().map(of).sum();
    largest + largest / 3 + 4096
}

fn size(places: &Places, node: usize, port: usize) -> u64 {
    places.plan.shape(Value::of(node, port)).iter().product::<usize>() as u64
}
