//! The device: how it is chosen, what happens when it fails, and memory on it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
#[cfg(not(target_family = "wasm"))]
use std::time::Instant;

use pocketglm_graph::{DeviceFault, Error, Result};
#[cfg(target_family = "wasm")]
use web_time::Instant;

use crate::features::{Feature, denied};
use crate::options::{GpuInfo, GpuOptions};
use crate::pipelines::Pipelines;
use crate::profile::Profile;

/// Bytes of an upload that may wait on the host before the device has taken them.
const UPLOAD_STEP: usize = 16 << 20;
/// How long the device may show no progress, where the options say nothing: as long as amdgpu lets a job take before it resets
/// the card, and longer than the two seconds of Windows.
const PATIENCE: Duration = Duration::from_secs(10);
/// Operations of one submission of a longer run: half a second of a phone's GPU, a twentieth of what is waited for without progress,
/// and so much that nobody sees what a submission takes itself.
const PART: u64 = 500_000_000_000;
/// How often the device is asked for progress while something is waited for.
const GLANCE: Duration = Duration::from_millis(250);

/// What went wrong outside of a call: the first failure, which explains those that follow.
#[derive(Default)]
pub(crate) struct Faults(Mutex<Option<(DeviceFault, String)>>);

impl Faults {
    fn note(&self, fault: DeviceFault, what: String) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A loss explains everything else, so it replaces what came before.
        if first.is_none() || (fault == DeviceFault::Lost && first.as_ref().is_some_and(|f| f.0 != fault)) {
            *first = Some((fault, what));
        }
    }

    fn take(&self) -> Option<(DeviceFault, String)> {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*first {
            // A lost device stays lost.
            Some((DeviceFault::Lost, what)) => Some((DeviceFault::Lost, what.clone())),
            _ => first.take(),
        }
    }
}

/// An open device.
pub(crate) struct Device {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: GpuInfo,
    pub limits: wgpu::Limits,
    features: wgpu::Features,
    /// Lanes of the smallest and the largest subgroup.
    subgroup_sizes: [u32; 2],
    vendor: u32,
    pub pipelines: Pipelines,
    /// Whether runs are surrounded by sentinels.
    pub guarded: bool,
    /// Features that are not used though they are offered.
    refused: AtomicU8,
    faults: Arc<Faults>,
    /// Bytes of the buffers that are alive.
    allocated: Arc<AtomicU64>,
    /// Nanoseconds without progress after which the device counts as hanging.
    patience: AtomicU64,
    /// Submissions that have ended.
    pub ended: Arc<AtomicU64>,
    /// Operations of one submission of a longer run.
    pub part: AtomicU64,
    /// What runs took, while they are measured.
    pub profile: Profile,
}

/// A buffer that is counted while it lives.
pub(crate) struct Buffer {
    pub raw: wgpu::Buffer,
    pub bytes: u64,
    allocated: Arc<AtomicU64>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
        self.raw.destroy();
    }
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    // Resource creation fails as an error of ours before the driver has nothing left.
    descriptor.memory_budget_thresholds.for_resource_creation = Some(97);
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
}

/// All adapters, hardware before software, discrete before integrated.
pub(crate) fn adapters() -> Vec<wgpu::Adapter> {
    let mut all = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::PRIMARY));
    all.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    all
}

fn is_software(info: &wgpu::AdapterInfo) -> bool {
    info.device_type == wgpu::DeviceType::Cpu
}

/// Features that kernels use, with their names for people.
const FEATURES: [(wgpu::Features, &str); 4] = [
    (wgpu::Features::SUBGROUP, "subgroups"),
    (wgpu::Features::SHADER_F16, "f16"),
    (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, "cooperative matrices"),
    (wgpu::Features::TIMESTAMP_QUERY, "timestamps"),
];

pub(crate) fn info(adapter: &wgpu::Adapter) -> GpuInfo {
    let info = adapter.get_info();
    let offered = adapter.features();
    GpuInfo {
        software: is_software(&info),
        name: info.name,
        api: format!("{:?}", info.backend),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        binding_limit: adapter.limits().max_storage_buffer_binding_size,
        buffer_limit: adapter.limits().max_buffer_size,
        workgroup_memory: adapter.limits().max_compute_workgroup_storage_size,
        features: FEATURES.iter().filter(|(f, _)| offered.contains(*f)).map(|(_, name)| *name).collect(),
        refused: Vec::new(),
    }
}

fn absent(what: String) -> Error {
    Error::Device { device: "gpu".into(), fault: DeviceFault::Absent, what }
}

/// The adapter that the options ask for.
fn choose(options: &GpuOptions) -> Result<wgpu::Adapter> {
    let wanted =
        options.adapter.clone().or_else(|| std::env::var("POCKETGLM_GPU").ok()).filter(|w| !w.is_empty());
    let all = adapters();
    let names: Vec<String> = all.iter().map(|a| a.get_info().name).collect();
    let found = all.into_iter().find(|a| {
        let info = a.get_info();
        match &wanted {
            Some(w) => info.name.to_lowercase().contains(&w.to_lowercase()),
            None => options.software || !is_software(&info),
        }
    });
    found.ok_or_else(|| match (&wanted, names.is_empty()) {
        (_, true) => absent("no Vulkan, Metal, DX12 or WebGPU adapter was found".into()),
        (Some(w), false) => absent(format!("no adapter is called `{w}`; there are: {}", names.join(", "))),
        (None, false) => absent(format!(
            "only software adapters were found ({}); name one to use it all the same",
            names.join(", ")
        )),
    })
}

impl Device {
    pub fn open(options: &GpuOptions) -> Result<Device> {
        let adapter = choose(options)?;
        let mut info = info(&adapter);
        let mut limits = adapter.limits();
        let wanted = if options.plain { wgpu::Features::TIMESTAMP_QUERY } else { all_features() };
        let features = adapter.features() & wanted;
        info.features.retain(|name| FEATURES.iter().any(|(f, n)| n == name && features.contains(*f)));
        if let Some(most) = options.binding_limit {
            limits.max_storage_buffer_binding_size =
                limits.max_storage_buffer_binding_size.min(most.max(1 << 16));
            info.binding_limit = limits.max_storage_buffer_binding_size;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("pocketglm"),
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: crate::pipelines::experimental(features),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|e| absent(format!("{} gave no device: {e}", info.name)))?;
        let faults = Arc::new(Faults::default());
        let lost = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            lost.note(DeviceFault::Lost, format!("the device is lost ({reason:?}): {message}"));
        });
        let uncaptured = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let fault = match &error {
                wgpu::Error::OutOfMemory { .. } => DeviceFault::OutOfMemory,
                _ => DeviceFault::Driver,
            };
            uncaptured.note(fault, error.to_string());
        }));
        let raw = adapter.get_info();
        let mut refused = if options.plain { Feature::PackedDot.bit() } else { 0 };
        for row in denied(raw.vendor, &info.driver) {
            refused |= row.feature.bit();
            info.refused.push(format!("{} ({})", row.feature.name(), row.reason));
        }
        Ok(Device {
            device,
            queue,
            info,
            limits,
            features,
            subgroup_sizes: [raw.subgroup_min_size, raw.subgroup_max_size],
            vendor: raw.vendor,
            pipelines: Pipelines::new(options.checked),
            guarded: options.guarded,
            refused: AtomicU8::new(refused),
            faults,
            allocated: Arc::default(),
            patience: AtomicU64::new(nanoseconds(options.patience.unwrap_or(PATIENCE))),
            ended: Arc::default(),
            part: AtomicU64::new(PART),
            profile: Profile::default(),
        })
    }

    /// Waits for so long from now on.
    #[cfg(test)]
    pub fn set_patience(&self, patience: Duration) {
        self.patience.store(nanoseconds(patience), Ordering::Relaxed);
    }

    /// Whether dispatches can be timed.
    pub fn has_timestamps(&self) -> bool {
        self.features.contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Does without a feature from now on; what is lowered already keeps it.
    pub fn refuse(&self, feature: Feature) {
        self.refused.fetch_or(feature.bit(), Ordering::Relaxed);
    }

    fn allows(&self, feature: Feature) -> bool {
        self.refused.load(Ordering::Relaxed) & feature.bit() == 0
    }

    /// Whether kernels use a feature.
    pub fn uses(&self, feature: Feature) -> bool {
        match feature {
            Feature::Plain => true,
            Feature::Subgroups => self.subgroups(),
            Feature::PackedDot => self.packed_dot(),
            Feature::Cooperative => self.cooperative(),
        }
    }

    /// Whether kernels may use products of packed bytes.
    pub fn packed_dot(&self) -> bool {
        self.allows(Feature::PackedDot)
    }

    /// Whether kernels may use subgroups: theirs are of eight lanes at least.
    pub fn subgroups(&self) -> bool {
        self.features.contains(wgpu::Features::SUBGROUP)
            && self.subgroup_sizes[0] >= 8
            && self.allows(Feature::Subgroups)
    }

    /// Whether the kernels' shapes were measured on devices of this vendor.
    pub fn is_nvidia(&self) -> bool {
        const NVIDIA: u32 = 0x10de;
        self.vendor == NVIDIA
    }

    /// Whether kernels may use cooperative matrices: drivers of other vendors are known to offer emulated or broken ones.
    pub fn cooperative(&self) -> bool {
        let wanted = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
        self.allows(Feature::Cooperative)
            && self.is_nvidia()
            && self.subgroup_sizes == [32, 32]
            && self.features.contains(wanted)
    }

    /// An error that names this device.
    pub fn error(&self, fault: DeviceFault, what: impl Into<String>) -> Error {
        Error::Device { device: self.info.name.clone(), fault, what: what.into() }
    }

    /// What failed since the last check.
    pub fn check(&self) -> Result<()> {
        let Some((fault, what)) = self.faults.take() else { return Ok(()) };
        if fault != DeviceFault::Lost {
            self.hear_of_loss()?;
        }
        Err(self.error(fault, what))
    }

    /// Fails where the device is lost. A loss is told when the device is next polled, which may be after the first call
    /// that fails because of it.
    fn hear_of_loss(&self) -> Result<()> {
        let _ = self.device.poll(wgpu::PollType::Poll);
        match self.faults.take() {
            Some((fault, what)) => Err(self.error(fault, what)),
            None => Ok(()),
        }
    }

    /// The error of something that failed: the device's loss, where that is why.
    pub fn failed(&self, fault: DeviceFault, what: impl Into<String>) -> Error {
        // A loss is only told to who asks.
        let _ = self.device.poll(wgpu::PollType::Poll);
        match self.faults.take() {
            Some((DeviceFault::Lost, why)) => self.error(DeviceFault::Lost, why),
            _ => self.error(fault, what),
        }
    }

    /// Most bytes of one binding, in whole words.
    pub fn binding_limit(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size) / 256 * 256
    }

    /// Bytes of the buffers that are alive.
    pub fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// A buffer; memory that cannot be had is an error.
    pub fn buffer(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<Buffer> {
        self.check()?;
        let size = bytes.max(4).next_multiple_of(4);
        if size > self.limits.max_buffer_size {
            return Err(self.error(
                DeviceFault::Unsupported,
                format!("{what} needs a buffer of {size} bytes, the most is {}", self.limits.max_buffer_size),
            ));
        }
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage,
            mapped_at_creation: false,
        });
        let invalid = pollster::block_on(invalid.pop());
        let memory = pollster::block_on(memory.pop());
        if let Some(error) = memory {
            return Err(self.error(
                DeviceFault::OutOfMemory,
                format!("no memory for {size} bytes of {what}, beside {} in use: {error}", self.allocated()),
            ));
        }
        if let Some(error) = invalid {
            return Err(self.failed(DeviceFault::Driver, format!("{what}: {error}")));
        }
        self.allocated.fetch_add(size, Ordering::Relaxed);
        Ok(Buffer { raw, bytes: size, allocated: self.allocated.clone() })
    }

    /// A buffer that kernels read and write.
    pub fn storage(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        self.buffer(what, bytes, usage)
    }

    /// A buffer with this content, whose length counts as a multiple of four. It goes to the device in steps, so that no
    /// second copy waits on the host.
    pub fn upload(&self, what: &str, content: &[u8]) -> Result<Buffer> {
        let buffer = self.storage(what, content.len() as u64)?;
        self.write(&buffer, 0, content)?;
        Ok(buffer)
    }

    /// Writes content into a buffer from byte `at` on, in steps.
    pub fn write(&self, buffer: &Buffer, at: u64, content: &[u8]) -> Result<()> {
        for (i, step) in content.chunks(UPLOAD_STEP).enumerate() {
            let at = at + (i * UPLOAD_STEP) as u64;
            match step.len() % 4 {
                0 => self.queue.write_buffer(&buffer.raw, at, step),
                _ => {
                    let mut padded = step.to_vec();
                    padded.resize(step.len().next_multiple_of(4), 0);
                    self.queue.write_buffer(&buffer.raw, at, &padded);
                }
            }
            if step.len() == UPLOAD_STEP {
                let index = self.queue.submit([]);
                self.wait(index)?;
            }
        }
        Ok(())
    }

    /// What is in a buffer, when everything that was submitted has ended.
    pub fn read(&self, from: &Buffer) -> Result<Vec<u8>> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let to = self.buffer("a copy to read", from.bytes, usage)?;
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&from.raw, 0, &to.raw, 0, from.bytes);
        let index = self.submit(encoder)?;
        // An error of the mapping shows where the range is asked for.
        to.raw.map_async(wgpu::MapMode::Read, 0..from.bytes, |_| {});
        self.wait(index)?;
        match to.raw.get_mapped_range(0..from.bytes) {
            Ok(view) => Ok(view.to_vec()),
            Err(e) => Err(self.error(DeviceFault::Lost, format!("a buffer cannot be read: {e}"))),
        }
    }

    /// Waits for the end of a submission, as long as some submission ends now and then.
    pub fn wait(&self, index: wgpu::SubmissionIndex) -> Result<()> {
        let patience = Duration::from_nanos(self.patience.load(Ordering::Relaxed));
        let (mut ended, mut since) = (self.ended.load(Ordering::Relaxed), Instant::now());
        loop {
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                self.hear_of_loss()?;
                let what = format!(
                    "no progress within {} s: the device hangs, or is too slow",
                    patience.as_secs_f64()
                );
                return Err(self.error(DeviceFault::Timeout, what));
            }
            let timeout = Some(left.min(GLANCE));
            match self.device.poll(wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout }) {
                Ok(_) => return self.check(),
                Err(wgpu::PollError::Timeout) => {
                    self.hear_of_loss()?;
                    let now = self.ended.load(Ordering::Relaxed);
                    if now != ended {
                        (ended, since) = (now, Instant::now());
                    }
                }
                Err(error) => {
                    self.hear_of_loss()?;
                    let what = format!("the device is lost, it takes no more work: {error}");
                    return Err(self.error(DeviceFault::Lost, what));
                }
            }
        }
    }

    /// Runs what a closure encodes, between error scopes, so that a mistake in it is its own error.
    pub fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
        self.check()?;
        let index = self.queue.submit([encoder.finish()]);
        let ended = self.ended.clone();
        self.queue.on_submitted_work_done(move || {
            ended.fetch_add(1, Ordering::Relaxed);
        });
        self.check()?;
        Ok(index)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn all_features() -> wgpu::Features {
    FEATURES.iter().fold(wgpu::Features::empty(), |all, (f, _)| all | *f)
}
