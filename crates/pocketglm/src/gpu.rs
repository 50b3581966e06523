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

use std::sync::Arc;

pub use pocketglm_wgpu::{GpuInfo, GpuOptions};

use crate::{Backend, Result};

/// Opens a GPU as a backend for [`EngineOptions`](crate::EngineOptions). Engines may share it.
///
/// # Errors
/// [`Error::Graph`](crate::Error::Graph) where there is no such adapter, or it cannot be used.
pub fn open(options: &GpuOptions) -> Result<Arc<dyn Backend>> {
    let cpu = Arc::new(pocketglm_tensor::Cpu::new(0)?);
    Ok(Arc::new(pocketglm_wgpu::WgpuBackend::open(cpu, options)?))
}

/// Every adapter of this machine, the one that would be chosen first.
///
/// # Errors
/// None at present; a machine without adapters gives an empty list.
pub fn adapters() -> Result<Vec<GpuInfo>> {
    Ok(pocketglm_wgpu::adapters()?)
}
