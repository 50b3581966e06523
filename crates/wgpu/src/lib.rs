//! The GPU backend: runs graphs on Vulkan, Metal, DX12 and WebGPU devices through wgpu.
//!
//! Start at [`WgpuBackend::open`], which chooses an adapter, checks that its kernels compute what their twins on the
//! processor do, and is a [`Backend`](pocketglm_graph::Backend) like the one of the processor.
//!
//! This crate knows nothing of models, tokens or files. It is the only one that names wgpu, and no type of wgpu is part of
//! its interface.
//!
//! Invariants: error and loss handlers are installed before the first resource; a failure of the device is a typed error
//! ([`Error::Device`](pocketglm_graph::Error::Device)), never a panic; weights are bound read-only and everything else lies in
//! one arena, in places that the plan gave; a run ends on the device in the order in which it was started.

#![deny(unsafe_code)]

mod backend;
#[doc(hidden)]
pub mod cases;
mod device;
mod features;
mod guard;
mod held;
mod lower;
mod options;
mod pipelines;
mod plan;
mod profile;
mod program;
mod rates;
mod readback;
mod state;
mod weights;

pub use backend::WgpuBackend;
pub use options::{GpuInfo, GpuOptions, adapters};

#[cfg(test)]
mod tests;
