use std::fmt;
use std::time::Duration;

use pocketglm_graph::Result;

use crate::device;

/// How a GPU is chosen and used.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// Part of the adapter's name, in any case; the environment variable `POCKETGLM_GPU` where it is not given; without
    /// both the most capable one.
    pub adapter: Option<String>,
    /// Whether an adapter that is a program on the processor may be taken. Off, because it is slower than this
    /// project's own processor backend; for tests.
    pub software: bool,
    /// Most bytes of one binding; the adapter's own limit where it is not given. Lower values split tensors into more
    /// parts: for tests of what phones need.
    pub binding_limit: Option<u64>,
    /// Leaves out what the adapter offers beyond the plain kernels: subgroups, packed byte products, cooperative
    /// matrices. For tests, and for drivers that get them wrong.
    pub plain: bool,
    /// Lets the driver check every index of every kernel: for looking for defects.
    pub checked: bool,
    /// Surrounds everything that runs compute with a pattern, and fails a run that overwrites it: for looking for defects.
    /// Runs do not overlap then.
    pub guarded: bool,
    /// How long the device may show no progress before it counts as hanging; 10 s where it is not given, which is as long as a
    /// driver's own watchdog lets a piece of work take. Long runs are submitted in parts, each of which is progress. Nothing at
    /// all is waited for where it is zero.
    pub patience: Option<Duration>,
    /// Leaves the start-up test out, which compares the kernels that the adapter would get with the processor's and takes about
    /// a tenth of a second.
    pub untested: bool,
}

/// What an adapter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its name.
    pub name: String,
    /// Vulkan, Metal, DX12 or WebGPU.
    pub api: String,
    /// The driver and its version.
    pub driver: String,
    /// Whether it is a program on the processor.
    pub software: bool,
    /// Most bytes of one binding.
    pub binding_limit: u64,
    /// Most bytes of one buffer.
    pub buffer_limit: u64,
    /// Bytes that the lanes of a workgroup share.
    pub workgroup_memory: u32,
    /// What it offers that kernels use, such as `subgroups`.
    pub features: Vec<&'static str>,
    /// What it offers that is not used, each with the reason.
    pub refused: Vec<String>,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}", self.name, self.api, self.driver)?;
        for feature in &self.features {
            write!(f, ", {feature}")?;
        }
        f.write_str(")")?;
        for refused in &self.refused {
            write!(f, "; not used: {refused}")?;
        }
        Ok(())
    }
}

/// Every adapter of this machine, the ones that [`WgpuBackend::open`](crate::WgpuBackend::open) prefers first.
///
/// # Errors
/// None at present; a machine without adapters gives an empty list.
pub fn adapters() -> Result<Vec<GpuInfo>> {
    Ok(device::adapters().iter().map(device::info).collect())
}
