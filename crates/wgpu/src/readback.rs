//! Results on their way back: buffers that the host can map, reused from run to run.

use std::sync::{Arc, Mutex, PoisonError};

use pocketglm_graph::{DeviceFault, Output, Outputs, Result, Running};

use crate::device::{Buffer, Device};

/// Mappable buffers that nobody uses now.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Vec<Buffer>>);

/// Buffers that are kept.
const KEPT: usize = 4;

impl Pool {
    pub fn take(&self, device: &Device, bytes: u64) -> Result<Buffer> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = free.iter().position(|b| b.bytes >= bytes && b.bytes <= 4 * bytes.max(1024)) {
            return Ok(free.swap_remove(at));
        }
        device.buffer("results", bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)
    }

    fn give(&self, buffer: Buffer) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(buffer);
        }
    }

    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// One result in a mappable buffer.
pub(crate) struct Piece {
    pub name: String,
    pub shape: Vec<usize>,
    /// Where it begins, in bytes.
    pub at: u64,
    /// Whether its elements are indices.
    pub indices: bool,
}

/// A run on the device.
pub(crate) struct Pending {
    pub device: Arc<Device>,
    pub pool: Arc<Pool>,
    pub buffer: Option<Buffer>,
    pub bytes: u64,
    pub index: wgpu::SubmissionIndex,
    pub pieces: Vec<Piece>,
    pub mapped: Arc<Mutex<Option<std::result::Result<(), wgpu::BufferAsyncError>>>>,
}

impl Running for Pending {
    fn finish(mut self: Box<Self>) -> Result<Outputs> {
        let Some(buffer) = self.buffer.take() else { return Ok(Outputs::default()) };
        self.device.wait(self.index.clone())?;
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner).take();
        let failed = |what: String| {
            self.device.check()?;
            Err(self.device.error(DeviceFault::Lost, what))
        };
        match mapped {
            Some(Ok(())) => {}
            Some(Err(e)) => return failed(format!("results cannot be read: {e}")),
            None => return failed("results were not made available".into()),
        }
        let view = match buffer.raw.get_mapped_range(0..self.bytes) {
            Ok(view) => view,
            Err(e) => return failed(format!("results cannot be read: {e}")),
        };
        let mut outputs = Outputs::default();
        for piece in &self.pieces {
            let elements: usize = piece.shape.iter().product();
            let from = piece.at as usize;
            let words: Vec<u32> =
                bytemuck::pod_collect_to_vec(view.get(from..from + elements * 4).unwrap_or(&[]));
            let values = match piece.indices {
                true => words.iter().map(|&w| (w as i32) as f32).collect(),
                false => words.iter().map(|&w| f32::from_bits(w)).collect(),
            };
            outputs.0.push((piece.name.clone(), Output { shape: piece.shape.clone(), values }));
        }
        drop(view);
        buffer.raw.unmap();
        self.pool.give(buffer);
        Ok(outputs)
    }
}
