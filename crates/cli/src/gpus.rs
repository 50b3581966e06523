//! `pocketglm gpus`: the adapters of this machine.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use crate::args::gpu_facts;
use crate::failure::Failure;
use crate::output::Out;

/// List GPUs.
#[derive(Args, Debug)]
pub struct GpusArgs {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &GpusArgs) -> Result<ExitCode, Failure> {
    let found = pocketglm::gpu::adapters()?;
    let mut out = Out::new();
    if args.json {
        let entry = |info: &pocketglm::gpu::GpuInfo| {
            json!({
                "name": info.name,
                "api": info.api,
                "driver": info.driver,
                "software": info.software,
                "features": info.features,
                "binding_limit": info.binding_limit,
                "buffer_limit": info.buffer_limit,
                "workgroup_memory": info.workgroup_memory,
            })
        };
        out.json(&Value::Array(found.iter().map(entry).collect()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        out.line("no Vulkan, Metal, DX12 or WebGPU adapter was found")?;
    }
    for (label, text) in found.iter().flat_map(gpu_facts) {
        out.line(&format!("{label:LABEL$}{text}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Width of the labels.
const LABEL: usize = 12;
