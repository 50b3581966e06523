//! Running models on a GPU: Vulkan, Metal, DX12 or WebGPU.
//!
//! ```no_run
//! use pocketglm::{EngineOptions, Model, gpu};
//!
//! # fn main() -> pocketglm::Result<()> {
//! let backend = gpu::open(&gpu::GpuOptions::default())?;
//! let options = EngineOptions { backend: Some(backend), ..EngineOptions::default() };
//! let model = Model::open_with("AutoGLM-Phone-9B", options)?;
//! # Ok(())
//! # }
//! ```
//!
//! With [`EngineOptions::device_memory`](crate::EngineOptions::device_memory) as many layers run on the GPU as fit, and the
//! processor runs the rest; with [`Fallback::Cpu`](crate::Fallback::Cpu) it takes over when the GPU fails.
//!
//! In a browser: the crate builds for `wasm32-unknown-unknown`, where wgpu speaks WebGPU. Opening a GPU and reading results
//! wait for the device, which the main thread of a page may not do, and there are no files, so that [`Model::open`](crate::Model::open)
//! is an error there. What exists is the ground for a port, not one.

use std::sync::Arc;

use pocketglm_wgpu::WgpuBackend;
pub use pocketglm_wgpu::{GpuInfo, GpuOptions};

use crate::{Backend, Result};

/// An open GPU. Clones share it, and so may engines.
#[derive(Clone)]
pub struct Gpu(WgpuBackend);

impl Gpu {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) where there is no such adapter, or it cannot be used.
    pub fn open(options: &GpuOptions) -> Result<Gpu> {
        let cpu = Arc::new(pocketglm_tensor::Cpu::new(0)?);
        Ok(Gpu(WgpuBackend::open(cpu, options)?))
    }

    /// The backend for [`EngineOptions`](crate::EngineOptions).
    pub fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.0.clone())
    }

    /// What the adapter is, and what of it is used.
    pub fn info(&self) -> &GpuInfo {
        self.0.info()
    }

    /// Bytes that are allocated on it.
    pub fn allocated(&self) -> u64 {
        self.0.allocated()
    }

    /// Kinds of the kernels that runs were made of since the last call: for checking that each is tested.
    #[doc(hidden)]
    pub fn take_kernels(&self) -> std::collections::BTreeSet<String> {
        self.0.take_kernels()
    }

    /// Ends the device, as a driver's reset would: for testing what an application does then.
    pub fn destroy(&self) {
        self.0.destroy();
    }
}

/// Opens a GPU as a backend for [`EngineOptions`](crate::EngineOptions).
///
/// # Errors
/// As [`Gpu::open`].
pub fn open(options: &GpuOptions) -> Result<Arc<dyn Backend>> {
    Ok(Gpu::open(options)?.backend())
}

/// Every adapter of this machine, the one that would be chosen first.
///
/// # Errors
/// None at present; a machine without adapters gives an empty list.
pub fn adapters() -> Result<Vec<GpuInfo>> {
    Ok(pocketglm_wgpu::adapters()?)
}
