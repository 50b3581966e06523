//! The case list on software Vulkan, and faults. Where there is no adapter, every test says aloud that it is skipped:
//! `cargo xtask check` counts that as no pass.

mod cases;
mod faults;
mod pace;
mod valid;

use std::sync::Arc;

use pocketglm_tensor::{Cpu, Isa};

use crate::{GpuOptions, WgpuBackend};

/// The processor's scalar kernels.
fn scalar() -> Arc<Cpu> {
    Arc::new(Cpu::with_isa(Isa::Scalar, 1).unwrap())
}

/// A backend on any adapter, software included; `None`, said aloud, where there is none.
fn open(options: &GpuOptions) -> Option<WgpuBackend> {
    let options = GpuOptions { software: true, ..options.clone() };
    match WgpuBackend::open(Arc::new(Cpu::new(1).unwrap()), &options) {
        Ok(backend) => Some(backend),
        Err(e) if e.device_fault() == Some(pocketglm_graph::DeviceFault::Absent) => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}
