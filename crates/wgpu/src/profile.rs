//! What each op of a run takes on the device, by timestamps: every dispatch is a pass of its own then, with one at its
//! beginning and one at its end.

use std::sync::{Mutex, PoisonError};

use pocketglm_graph::ops::{Cost, Op};
use pocketglm_graph::{Arithmetic, Bindings, Graph, OpProfile, Result, RunProfile, eval_shape};

use crate::device::{Buffer, Device};
use crate::plan::Step;
use crate::weights::Form;

/// Most timestamps of one query set, an even number.
const QUERIES: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2 * 2;

/// What was measured; `None` while nothing is.
#[derive(Default)]
pub(crate) struct Profile(Mutex<Option<Vec<RunProfile>>>);

impl Profile {
    fn with<R>(&self, f: impl FnOnce(&mut Option<Vec<RunProfile>>) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Begins anew, or ends.
    pub fn set(&self, on: bool) {
        self.with(|p| *p = on.then(Vec::new));
    }

    pub fn is_on(&self) -> bool {
        self.with(|p| p.is_some())
    }

    pub fn add(&self, run: RunProfile) {
        self.with(|p| p.iter_mut().for_each(|runs| runs.push(run.clone())));
    }

    pub fn take(&self) -> Vec<RunProfile> {
        self.with(|p| p.as_mut().map(std::mem::take).unwrap_or_default())
    }
}

/// Timestamps of the dispatches of one run.
pub(crate) struct Stamps {
    sets: Vec<wgpu::QuerySet>,
    resolved: Buffer,
    dispatches: usize,
}

impl Stamps {
    /// Room for two timestamps of each of `dispatches`.
    pub fn new(device: &Device, dispatches: usize) -> Result<Stamps> {
        let wanted = 2 * dispatches.max(1);
        let count = |set: usize| QUERIES.min(wanted - set * QUERIES) as u32;
        let sets = (0..wanted.div_ceil(QUERIES)).map(|set| {
            device.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("times of dispatches"),
                ty: wgpu::QueryType::Timestamp,
                count: count(set),
            })
        });
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let bytes = (wanted * 8).next_multiple_of(wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT as usize) as u64;
        let sets = sets.collect();
        Ok(Stamps { sets, resolved: device.buffer("times of dispatches", bytes, usage)?, dispatches })
    }

    /// Where dispatch `i` leaves its timestamps.
    pub fn of(&self, i: usize) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let (set, at) = (2 * i / QUERIES, (2 * i % QUERIES) as u32);
        Some(wgpu::ComputePassTimestampWrites {
            query_set: self.sets.get(set)?,
            beginning_of_pass_write_index: Some(at),
            end_of_pass_write_index: Some(at + 1),
        })
    }

    /// Brings them to where they can be read.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut left = 2 * self.dispatches;
        for (i, set) in self.sets.iter().enumerate() {
            let count = left.min(QUERIES);
            if count > 0 {
                encoder.resolve_query_set(set, 0..count as u32, &self.resolved.raw, (i * QUERIES * 8) as u64);
            }
            left -= count;
        }
    }

    /// Seconds of each dispatch, when everything that was submitted has ended.
    pub fn seconds(&self, device: &Device) -> Result<Vec<f64>> {
        let stamps: Vec<u64> = bytemuck::pod_collect_to_vec(&device.read(&self.resolved)?);
        let period = f64::from(device.queue.get_timestamp_period()) * 1e-9;
        let of = |pair: &[u64]| pair[1].saturating_sub(pair[0]) as f64 * period;
        Ok(stamps.chunks_exact(2).take(self.dispatches).map(of).collect())
    }
}

/// Times of dispatches as those of ops.
pub(crate) fn of_ops(
    graph: &Graph,
    steps: &[&Step],
    seconds: &[f64],
    bindings: &Bindings,
) -> Result<RunProfile> {
    let mut ops: Vec<(usize, OpProfile)> = Vec::new();
    for (step, seconds) in steps.iter().zip(seconds) {
        let kernel = step.pipeline.name.clone();
        let arithmetic = arithmetic(&kernel);
        match ops.last_mut().filter(|(node, _)| *node == step.node) {
            Some((_, op)) => {
                op.seconds += seconds;
                op.kernels.push(kernel);
                if arithmetic != Arithmetic::F32 {
                    op.arithmetic = arithmetic;
                }
            }
            None => {
                let node = &graph.nodes()[step.node];
                let name = format!("{} {}", node.op.name(), node.scope);
                let cost = cost(graph, step.node, bindings)?;
                let kernels = vec![kernel];
                ops.push((step.node, OpProfile { name, kernels, seconds: *seconds, cost, arithmetic }));
            }
        }
    }
    Ok(RunProfile { sizes: bindings.clone(), ops: ops.into_iter().map(|(_, op)| op).collect() })
}

/// What a kernel's products are done with, by its name.
fn arithmetic(kernel: &str) -> Arithmetic {
    match () {
        () if kernel.contains("_coop") => Arithmetic::F16Matrices,
        () if kernel.starts_with("matvec_q") => Arithmetic::PackedBytes,
        () => Arithmetic::F32,
    }
}

/// Operations and bytes of a node: keys and values count as far as they are read, weights as the device holds them.
pub(crate) fn cost(graph: &Graph, node: usize, bindings: &Bindings) -> Result<Cost> {
    let node = &graph.nodes()[node];
    let (mut inputs, mut held) = (Vec::with_capacity(node.inputs.len()), 0.0);
    for (i, v) in node.inputs.iter().enumerate() {
        let meta = graph.meta(*v);
        let mut shape = eval_shape(&meta.shape, bindings)?;
        match (&node.op, &graph.node(*v).op) {
            (Op::Attention(a), _) if i == 1 || i == 2 => {
                if let Some(rows) = shape.first_mut() {
                    *rows = (*rows).min(a.keys.eval(bindings)?);
                }
            }
            (Op::GatherRows(_), _) => {}
            (_, Op::Weight(w)) => {
                if let (Some(form), &[rows, k]) = (Form::of(w.dtype), shape.as_slice()) {
                    let stored = w.dtype.row_bytes(k).unwrap_or(0) as f64 * rows as f64;
                    held += form.bytes(rows, k) as f64 - stored;
                }
            }
            _ => {}
        }
        inputs.push((meta.dtype, shape));
    }
    let outputs = node.outputs.iter().map(|m| eval_shape(&m.shape, bindings)).collect::<Result<Vec<_>>>()?;
    let mut cost = node.op.cost(&inputs, &outputs);
    cost.bytes = (cost.bytes + held).max(0.0);
    Ok(cost)
}
