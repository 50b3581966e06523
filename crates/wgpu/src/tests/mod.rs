//! The case list on software Vulkan, and faults. Where there is no adapter, every test says aloud that it is skipped:
//! `cargo xtask check` counts that as no pass.

mod cases;
mod faults;
mod pace;
mod valid;

use std::sync::Arc;

use pocketglm_graph::Result;
use pocketglm_tensor::{Cpu, DType, Error as TensorError, Isa, Tensor, TensorInfo, WeightSource};

use crate::{GpuOptions, WgpuBackend};

/// The processor's scalar kernels.
fn scalar() -> Arc<Cpu> {
    Arc::new(Cpu::with_isa(Isa::Scalar, 1).unwrap())
}

/// One matrix, `table`.
struct Table(Tensor);

impl WeightSource for Table {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.info("table").into_iter().collect()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = TensorInfo { name: name.into(), dtype: DType::F32, shape: self.0.shape().to_vec() };
        (name == "table").then_some(info)
    }
    fn tensor(&self, name: &str) -> Result<Tensor, TensorError> {
        match name {
            "table" => Ok(self.0.clone()),
            _ => Err(TensorError::Missing { name: name.into(), place: "test".into() }),
        }
    }
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
