//! What a device does at most: bytes that a copy moves, operations that registers alone do.

#[cfg(not(target_family = "wasm"))]
use std::time::Instant;

use pocketglm_graph::{Arithmetic, DeviceFault, Result};
use pocketglm_kernels::Variant;
#[cfg(target_family = "wasm")]
use web_time::Instant;

use crate::device::{Buffer, Device};
use crate::features::Feature;

/// Blocks of work of which the fastest counts, because a card that was idle takes a moment to clock up.
const BLOCKS: usize = 8;

/// Seconds of a dispatch beside which its submission does not matter.
const LONG_ENOUGH: f64 = 5e-3;
/// Rounds of arithmetic in a dispatch, at most.
const MOST_ROUNDS: u32 = 1 << 16;

/// Seconds of the fastest of several blocks of `rounds` dispatches.
fn fastest(
    device: &Device,
    variant: &Variant,
    numbers: [u32; 2],
    buffers: &[&Buffer],
    groups: u32,
    rounds: u64,
) -> Result<f64> {
    let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
    let parameters = device.buffer("parameters", 16, usage)?;
    device.write(&parameters, 0, bytemuck::cast_slice(&numbers))?;
    let pipeline = device.pipelines.get(device, variant)?;
    let bound = std::iter::once(&parameters).chain(buffers.iter().copied());
    let entries: Vec<wgpu::BindGroupEntry<'_>> = (0..)
        .zip(bound)
        .map(|(binding, b)| wgpu::BindGroupEntry { binding, resource: b.raw.as_entire_binding() })
        .collect();
    let group = device.device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("rate"),
        layout: &pipeline.layout,
        entries: &entries,
    });
    let mut best = f64::INFINITY;
    for _ in 0..BLOCKS {
        let mut encoder = device.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline.raw);
        pass.set_bind_group(0, &group, &[]);
        for _ in 0..rounds {
            pass.dispatch_workgroups(groups, 1, 1);
        }
        drop(pass);
        let start = Instant::now();
        let index = device.submit(encoder)?;
        device.wait(index)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best.max(1e-9))
}

/// Bytes read and written in a second by a large copy.
pub(crate) fn copy(device: &Device) -> Result<f64> {
    const ROUNDS: u64 = 20;
    let bytes = (1u64 << 30).min(device.binding_limit()) / 16 * 16;
    let buffers = [device.storage("copy", bytes)?, device.storage("copy", bytes)?];
    let numbers = [(bytes / 16) as u32, 0];
    let variant = Variant::new("copy_rate.wgsl");
    let seconds = fastest(device, &variant, numbers, &[&buffers[0], &buffers[1]], 4096, ROUNDS)?;
    Ok((2 * bytes * ROUNDS) as f64 / seconds)
}

/// Operations in a second of each kind of arithmetic that kernels use on this device.
pub(crate) fn arithmetic(device: &Device) -> Result<Vec<(Arithmetic, f64)>> {
    const LANES: u32 = 256;
    // Enough invocations for the widest devices, and few rounds: systems end what runs for seconds.
    let (groups, few) = if device.info.software { (16u32, 64u32) } else { (2048, 64) };
    let y = device.storage("rate", u64::from(groups) * u64::from(LANES) * 4)?;
    let mut rates = Vec::new();
    for (kind, flag, feature, of_invocation) in [
        (Arithmetic::F32, None, Feature::Plain, 256.0),
        (Arithmetic::PackedBytes, Some("DOT"), Feature::PackedDot, 128.0),
        // Eight products of 16 by 16 by 16 for each 32 invocations.
        (Arithmetic::F16Matrices, Some("COOP"), Feature::Cooperative, 8.0 * 2.0 * 4096.0 / 32.0),
    ] {
        if !device.uses(feature) {
            continue;
        }
        let mut variant = Variant::new("arithmetic_rate.wgsl");
        if let Some(flag) = flag {
            variant = variant.flag(flag);
        }
        let mut rounds = few;
        let measured = loop {
            match fastest(device, &variant, [rounds, 1], &[&y], groups, 1) {
                // More, until what a submission takes does not matter.
                Ok(seconds) if seconds < LONG_ENOUGH && rounds < MOST_ROUNDS => rounds *= 4,
                other => break other,
            }
        };
        match measured {
            Ok(seconds) => {
                let work = f64::from(groups) * f64::from(LANES) * f64::from(rounds) * of_invocation;
                rates.push((kind, work / seconds));
            }
            // A limit that cannot be measured is left out; what is held against it says so.
            Err(error) if error.device_fault() == Some(DeviceFault::Driver) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rates)
}
