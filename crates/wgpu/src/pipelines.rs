//! Compiled kernels, by variant. The only place of this crate with `unsafe`: kernels are compiled without the checks that
//! wgpu would add to every index and loop, and experimental features are asked for.

#![allow(unsafe_code, reason = "kernels without added checks; experimental features")]

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use pocketglm_graph::{DeviceFault, Error, Result};
use pocketglm_kernels::{Access, Binding, Variant, bindings};

use crate::device::Device;

/// A compiled kernel.
pub(crate) struct Pipeline {
    pub name: String,
    pub raw: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    pub bindings: Vec<Binding>,
}

/// The kernels compiled so far.
pub(crate) struct Pipelines {
    known: Mutex<HashMap<Variant, Arc<Pipeline>>>,
    /// Kinds of the kernels that were asked for since somebody last wanted to know.
    asked: Mutex<BTreeSet<String>>,
    checked: bool,
    /// Kernels that tests compile wrong: part of a name, and what of the source is replaced by what.
    #[cfg(test)]
    spoiled: Mutex<Vec<[&'static str; 3]>>,
}

/// Permission for the experimental features among `features`.
pub(crate) fn experimental(features: wgpu::Features) -> wgpu::ExperimentalFeatures {
    if features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        // SAFETY: what may go wrong are kernels with cooperative matrices; they are only compiled on adapters where the
        // start-up test finds them right, and index within the tiles that the host sizes.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    }
}

impl Pipelines {
    pub fn new(checked: bool) -> Pipelines {
        Pipelines {
            known: Mutex::default(),
            asked: Mutex::default(),
            checked,
            #[cfg(test)]
            spoiled: Mutex::default(),
        }
    }

    /// Compiles kernels wrong from now on; says whether there is something to replace in one of them.
    #[cfg(test)]
    pub fn spoil(&self, key: &'static str, from: &'static str, to: &'static str) -> bool {
        self.spoiled.lock().unwrap_or_else(PoisonError::into_inner).push([key, from, to]);
        pocketglm_kernels::FILES.iter().any(|(_, text)| text.contains(from))
    }

    /// Compiles everything anew.
    #[cfg(test)]
    pub fn forget(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The kernel of a variant, compiled when it is first asked for.
    pub fn get(&self, device: &Device, variant: &Variant) -> Result<Arc<Pipeline>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(variant.kind());
        if let Some(known) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(variant) {
            return Ok(known.clone());
        }
        // Two threads may compile the same kernel; the second one's is dropped.
        let pipeline = Arc::new(self.compile(device, variant)?);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(variant.clone()).or_insert(pipeline).clone())
    }

    /// Kinds of the kernels that were asked for since the last call.
    pub fn take_asked(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn compile(&self, device: &Device, variant: &Variant) -> Result<Pipeline> {
        let name = variant.to_string();
        let defect = |e: pocketglm_kernels::Error| {
            device.error(DeviceFault::Driver, format!("kernel `{name}` cannot be made: {e}"))
        };
        let source = variant.source().map_err(defect)?;
        let bound = bindings(&source).map_err(defect)?;
        #[cfg(test)]
        let source = {
            let spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
            let these = spoiled.iter().filter(|[key, ..]| name.contains(key));
            these.fold(source, |source, [_, from, to]| source.replace(from, to))
        };
        let raw = &device.device;
        let scope = raw.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = raw.push_error_scope(wgpu::ErrorFilter::Internal);
        let entries: Vec<wgpu::BindGroupLayoutEntry> = bound.iter().map(entry).collect();
        let layout = raw.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(&name),
            entries: &entries,
        });
        let pipeline_layout = raw.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&name),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        };
        let module = if self.checked {
            raw.create_shader_module(descriptor)
        } else {
            // SAFETY: kernels index only within the sizes that they are given, which the host computed from the shapes
            // of the buffers that it binds; their loops count up to such sizes. `checked` is there to look for defects.
            unsafe { raw.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let pipeline = raw.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let internal = pollster::block_on(internal.pop());
        let invalid = pollster::block_on(scope.pop());
        device.check()?;
        match internal.or(invalid) {
            None => Ok(Pipeline { name, raw: pipeline, layout, bindings: bound }),
            Some(error) => Err(refused(device, &name, &error)),
        }
    }
}

fn refused(device: &Device, name: &str, error: &wgpu::Error) -> Error {
    device.failed(DeviceFault::Driver, format!("kernel `{name}` was refused: {error}"))
}

fn entry(binding: &Binding) -> wgpu::BindGroupLayoutEntry {
    let ty = match binding.access {
        Access::Uniform => wgpu::BufferBindingType::Uniform,
        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
        Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
    };
    wgpu::BindGroupLayoutEntry {
        binding: binding.number,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    }
}
