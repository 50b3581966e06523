//! What adapters offer beyond plain kernels, and what of it is not used: because its drivers are known to get it wrong, or because the
//! start-up test found it wrong.

use std::sync::Arc;

use pocketglm_graph::{Backend, DeviceFault, Result};
use pocketglm_tensor::Cpu;

use crate::WgpuBackend;
use crate::cases::{self, Case, compare};

/// What an adapter may offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Nothing beyond plain kernels.
    Plain,
    /// Sums over subgroups.
    Subgroups,
    /// Products of packed bytes.
    PackedDot,
    /// Cooperative matrices.
    Cooperative,
}

impl Feature {
    /// Its name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Feature::Plain => "plain kernels",
            Feature::Subgroups => "subgroups",
            Feature::PackedDot => "packed byte products",
            Feature::Cooperative => "cooperative matrices",
        }
    }

    /// Its bit in a set.
    pub(crate) const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A feature that is not used with some drivers.
pub(crate) struct Denied {
    /// PCI number of the vendor.
    vendor: u32,
    /// What the driver's name and version must contain, in lower case; all drivers where it is empty.
    driver: &'static str,
    pub feature: Feature,
    pub reason: &'static str,
}

const AMD: u32 = 0x1002;
const INTEL: u32 = 0x8086;
const APPLE: u32 = 0x106b;

/// What is known. Cooperative matrices of vendors that are not here are not used either, see `Device::cooperative`.
pub(crate) const DENIED: &[Denied] = &[
    Denied {
        vendor: AMD,
        driver: "",
        feature: Feature::Cooperative,
        reason: "some drivers emulate the shapes that they offer (llama.cpp #10597)",
    },
    Denied {
        vendor: INTEL,
        driver: "",
        feature: Feature::Cooperative,
        reason: "drivers offer shapes that they compute wrong (llama.cpp #22750, intel-graphics-compiler #1487)",
    },
    Denied {
        vendor: APPLE,
        driver: "",
        feature: Feature::PackedDot,
        reason: "slower than dequantising (llama.cpp #23594)",
    },
];

/// The rows for an adapter.
pub(crate) fn denied(vendor: u32, driver: &str) -> impl Iterator<Item = &'static Denied> {
    let driver = driver.to_lowercase();
    DENIED.iter().filter(move |d| d.vendor == vendor && driver.contains(d.driver))
}

/// Runs the start-up test, and refuses the features that fail it. Gives what was refused and why.
///
/// # Errors
/// Plain kernels that fail, and a device that is lost.
pub(crate) fn start_up_test(backend: &WgpuBackend, cpu: &Arc<Cpu>) -> Result<Vec<String>> {
    let mut refused = Vec::new();
    for case in cases::quick()? {
        let Some(feature) = case.quick.filter(|f| backend.device.uses(*f)) else { continue };
        let Some(what) = failure(backend, &case, cpu)? else { continue };
        if feature == Feature::Plain {
            return Err(backend.device.error(DeviceFault::Driver, format!("start-up test: {what}")));
        }
        backend.device.refuse(feature);
        refused.push(format!("{} (start-up test: {what})", feature.name()));
    }
    Ok(refused)
}

/// What is wrong with the results of a case.
fn failure(backend: &WgpuBackend, case: &Case, cpu: &Arc<Cpu>) -> Result<Option<String>> {
    let wanted = case.wanted(cpu)?;
    let bound = if case.quick == Some(Feature::Cooperative) { case.cooperative } else { case.bound };
    let backend: &dyn Backend = backend;
    let found = match case.run(backend, true) {
        Ok(found) => found,
        // A kernel that the driver refuses is a feature that it does not have; anything else is not about the feature.
        Err(error) if error.device_fault() == Some(DeviceFault::Driver) => {
            return Ok(Some(error.to_string()));
        }
        Err(error) => return Err(error),
    };
    Ok(compare(&wanted, &found, bound).err().map(|d| format!("{}: {d}", case.name())))
}
