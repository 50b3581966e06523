//! States on the device: the caches of keys and values.

use pocketglm_graph::{DeviceFault, Error, ProgramState, Result};
use pocketglm_tensor::KvFormat;

use crate::device::{Buffer, Device};

/// How a cache lies in its buffer: rows of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvLayout {
    pub format: KvFormat,
    pub heads: usize,
    pub d: usize,
}

impl KvLayout {
    /// The layout of a cache, where kernels can take it.
    pub fn new(device: &Device, format: KvFormat, heads: usize, d: usize) -> Result<KvLayout> {
        let multiple = match format {
            KvFormat::F32 => 1,
            KvFormat::F16 => 2,
            KvFormat::Int8 => 4,
            _ => 0,
        };
        if multiple == 0 || !d.is_multiple_of(multiple) {
            let what = format!(
                "keys and values in {format} with heads of {d} have no form on a GPU: take f32 or f16"
            );
            return Err(device.error(DeviceFault::Unsupported, what));
        }
        Ok(KvLayout { format, heads, d })
    }

    /// Bytes of a row: in int8 a head is a word with its scale, then its codes.
    fn row(&self) -> u64 {
        let head = match self.format {
            KvFormat::F32 => self.d * 4,
            KvFormat::F16 => self.d * 2,
            _ => self.d + 4,
        };
        (self.heads * head) as u64
    }

    pub fn bytes(&self, capacity: usize) -> u64 {
        capacity as u64 * self.row()
    }

    /// Names the format for kernels.
    pub fn flag(&self) -> &'static str {
        match self.format {
            KvFormat::F32 => "KV_F32",
            KvFormat::F16 => "KV_F16",
            _ => "KV_I8",
        }
    }
}

/// The buffers of one state of a program.
pub(crate) struct DeviceState {
    pub buffers: Vec<Buffer>,
    pub capacity: Vec<usize>,
    /// Changes whenever a buffer does, so that what is bound to them is bound again.
    pub generation: u64,
    /// The indices that the last run gave: their names, where they begin in `last`, and how many.
    pub indices: Vec<(String, u64, u64)>,
    /// Where those indices are.
    pub last: Option<Buffer>,
}

pub(crate) fn own(state: &mut ProgramState) -> Result<&mut DeviceState> {
    state.inner.downcast_mut::<DeviceState>().ok_or_else(|| Error::Name {
        kind: "state",
        name: "program state".into(),
        what: "belongs to another backend".into(),
    })
}

/// A cache of another capacity with the rows of an old one, up to the smaller capacity.
pub(crate) fn resized(
    device: &Device,
    layout: &KvLayout,
    old: Option<(&Buffer, usize)>,
    capacity: usize,
) -> Result<Buffer> {
    let buffer = device.storage("keys and values", layout.bytes(capacity))?;
    if let Some((from, old_capacity)) = old {
        let bytes = old_capacity.min(capacity) as u64 * layout.row();
        let mut encoder = device.device.create_command_encoder(&Default::default());
        if bytes > 0 {
            encoder.copy_buffer_to_buffer(&from.raw, 0, &buffer.raw, 0, bytes);
        }
        let index = device.submit(encoder)?;
        // The old buffer is destroyed when it is dropped, so the copy must have ended.
        device.wait(index)?;
    }
    Ok(buffer)
}
