//! What runs where: a whole model on one backend, or as much of it on a device as fits and the rest on the processor.

use std::fmt;
use std::sync::Arc;

use pocketglm_graph::ops::Op;
use pocketglm_graph::{Backend, CpuBackend, Graph, StagedBackend};
use pocketglm_tensor::Cpu;

use crate::engine::{patches, text_size};
use crate::model::Model;
use crate::plan::{RunSize, decoder_bindings, vision_bindings};
use crate::range::Ranged;
use crate::{EngineOptions, OpPlace, Result};

/// Scope of the decoder's layers.
const LAYERS: &str = "model.language_model.layers.";
/// The picture for which the device keeps room, where it runs the vision encoder: the screen of a common phone.
const PLACED_PICTURE: (usize, usize) = (1080, 2400);

/// Which parts of a model a device runs; the processor runs the others.
///
/// Within a budget the order is: the vision encoder, because each of its weights works for thousands of patches; then
/// the decoder's layers from the first on, because each works for every token of a prompt; then the head, which is the
/// largest matrix and works for one token of a prompt alone; then the embedding table, of which the processor needs only
/// the rows of the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The device.
    pub device: String,
    /// Decoder layers on the device, from the first on.
    pub layers: usize,
    /// Decoder layers in all.
    pub all_layers: usize,
    /// Whether the head is on the device.
    pub head: bool,
    /// Whether the embedding table is on the device.
    pub embedding: bool,
    /// Whether the vision encoder is on the device; `None` for a model without one.
    pub vision: Option<bool>,
    /// Bytes that the device was allowed.
    pub budget: Option<u64>,
    /// Bytes of the device that one decoder layer would have needed, where none fits.
    pub least: Option<u64>,
    /// How many ops are on the device and how many there are, where the options name a range of them.
    pub ops: Option<(usize, usize)>,
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Placement { layers, all_layers, .. } = self;
        if let Some((on, all)) = self.ops {
            let off = all - on;
            return write!(
                f,
                "{on} of {all} ops on the device, as asked for; the other {off} on the processor"
            );
        }
        let mut on = vec![format!("{layers} of {all_layers} decoder layers")];
        let mut off = Vec::new();
        let parts =
            [("vision encoder", self.vision), ("head", Some(self.head)), ("embedding", Some(self.embedding))];
        for (name, place) in parts {
            match place {
                Some(true) => on.push(name.into()),
                Some(false) => off.push(name),
                None => {}
            }
        }
        write!(f, "{} on the device", on.join(", "))?;
        if layers < all_layers {
            off.insert(0, "the other layers");
        }
        if !off.is_empty() {
            write!(f, "; {} on the processor", off.join(", "))?;
        }
        if let (Some(least), Some(budget)) = (self.least, self.budget) {
            write!(f, " (one layer needs {least} bytes of the device, {budget} are allowed)")?;
        }
        Ok(())
    }
}

/// The backends of a model's parts.
pub(crate) struct Devices {
    pub decoder: Arc<dyn Backend>,
    pub vision: Arc<dyn Backend>,
    pub audio: Arc<dyn Backend>,
    /// The processor, for what a device does not take over or no longer can.
    pub cpu: Arc<dyn Backend>,
    /// `None` where there is no device.
    pub placement: Option<Placement>,
}

impl Devices {
    /// The backends that the options ask for.
    ///
    /// # Errors
    /// Sizes that make no sense.
    pub fn choose(model: &Model, options: &EngineOptions, cpu: &Arc<Cpu>) -> Result<Devices> {
        let cpu: Arc<dyn Backend> = Arc::new(CpuBackend::new(cpu.clone()));
        let Some(device) = options.backend.clone() else { return Ok(Devices::only(cpu)) };
        let all_layers = model.text.num_hidden_layers;
        let whole = Placement {
            device: device.describe(),
            layers: all_layers,
            all_layers,
            head: true,
            embedding: true,
            vision: model.vision.as_ref().map(|_| true),
            budget: options.device_memory,
            least: None,
            ops: None,
        };
        if !options.device_ops.is_all() {
            return ranged(model, options, &device, cpu, whole);
        }
        match options.device_memory {
            None => Ok(Devices {
                decoder: device.clone(),
                vision: device.clone(),
                audio: device,
                cpu,
                placement: Some(whole),
            }),
            Some(budget) => within(model, options, &device, cpu, budget, whole),
        }
    }

    /// The processor for everything.
    pub fn only(cpu: Arc<dyn Backend>) -> Devices {
        Devices { decoder: cpu.clone(), vision: cpu.clone(), audio: cpu.clone(), cpu, placement: None }
    }
}

/// The ops that the options name on the device, the others on the processor.
fn ranged(
    model: &Model,
    options: &EngineOptions,
    device: &Arc<dyn Backend>,
    cpu: Arc<dyn Backend>,
    whole: Placement,
) -> Result<Devices> {
    let programs = model.programs();
    let range = Ranged::new(&options.device_ops, &programs)?;
    let places = range.places(&programs);
    let all_on = |inside: &dyn Fn(&OpPlace) -> bool| places.iter().filter(|p| inside(p)).all(|p| p.on_device);
    let of_decoder =
        |name: &str, scope: &str| all_on(&|p| p.program == "decoder" && p.name == format!("{name} {scope}"));
    let layer = |p: &OpPlace| p.name.split_once(' ').and_then(|(_, scope)| layer_of(scope));
    let placement = Placement {
        layers: (0..whole.all_layers).filter(|i| all_on(&|p| layer(p) == Some(*i))).count(),
        head: all_on(&|p| p.program == "decoder" && p.name.contains("lm_head")),
        embedding: of_decoder("gather_rows", "model.language_model"),
        vision: whole.vision.map(|_| all_on(&|p| p.program == "vision")),
        ops: Some((places.iter().filter(|p| p.on_device).count(), places.len())),
        ..whole
    };
    let [decoder, vision, audio] = ["decoder", "vision", "audio"].map(|p| range.backend(p, device, &cpu));
    Ok(Devices { decoder, vision, audio, cpu, placement: Some(placement) })
}

/// As much on the device as `budget` allows. The audio branch stays on the processor.
fn within(
    model: &Model,
    options: &EngineOptions,
    device: &Arc<dyn Backend>,
    cpu: Arc<dyn Backend>,
    budget: u64,
    whole: Placement,
) -> Result<Devices> {
    let mut left = budget;
    let mut vision = cpu.clone();
    let mut placement = Placement { vision: model.vision.as_ref().map(|_| false), ..whole };
    if let Some(encoder) = &model.vision {
        let (width, height) = PLACED_PICTURE;
        let patches = patches(&encoder.images, width, height)?;
        let bindings = vision_bindings(patches, encoder.config.spatial_merge_size, 1);
        let needed = device.plan_placed(&encoder.graph, &bindings)?.device.total();
        if let Some(rest) = left.checked_sub(needed) {
            (vision, left) = (device.clone(), rest);
            placement.vision = Some(true);
        }
    }
    let RunSize { context, chunk, .. } = text_size(model, options);
    let visual = if model.vision.is_some() { chunk } else { 0 };
    // A step of a prompt has the larger activations, a single token the larger working memory of attention.
    let steps = [chunk, 1].map(|t| decoder_bindings(t, context - t, visual.min(t), 1, context));
    let needed = |backend: &dyn Backend| -> Result<u64> {
        let mut most = 0;
        for step in &steps {
            most = most.max(backend.plan_placed(&model.decoder, step)?.device.total());
        }
        Ok(most)
    };
    let mut decoder = cpu.clone();
    let all = placement.all_layers;
    if needed(&**device)? <= left {
        decoder = device.clone();
    } else {
        (placement.layers, placement.head, placement.embedding) = (0, false, false);
        for (layers, head) in std::iter::once((all, true)).chain((1..=all).rev().map(|n| (n, false))) {
            let staged = staged(device, &cpu, layers, head);
            let bytes = needed(&*staged)?;
            if bytes <= left {
                (placement.layers, placement.head, decoder) = (layers, head, staged);
                break;
            }
            placement.least = Some(bytes);
        }
        placement.least = placement.least.filter(|_| placement.layers == 0);
    }
    Ok(Devices { decoder, vision, audio: cpu.clone(), cpu, placement: Some(placement) })
}

/// The decoder in stages: what stands before the layers, the device's layers, the rest.
fn staged(device: &Arc<dyn Backend>, cpu: &Arc<dyn Backend>, layers: usize, head: bool) -> Arc<dyn Backend> {
    let backends = vec![cpu.clone(), device.clone(), cpu.clone()];
    Arc::new(StagedBackend::new(backends, Arc::new(move |graph| stages(graph, layers, head))))
}

/// The stage of each node where the first `layers` layers, and perhaps the head, are in the middle one.
fn stages(graph: &Graph, layers: usize, head: bool) -> Vec<usize> {
    let mut stages: Vec<usize> = Vec::with_capacity(graph.nodes().len());
    let mut behind = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        // What comes from weights or inputs alone belongs to whoever uses it.
        let runs = !node.op.is_source() && !node.load_time;
        let layer = layer_of(&node.scope).filter(|_| runs);
        let after = runs && node.inputs.iter().any(|v| behind[v.node()]);
        stages.push(match layer {
            Some(layer) if layer < layers => 1,
            Some(_) => 2,
            // The rows that are wanted are chosen where the last layer ran, so that the others need not move.
            None if matches!(node.op, Op::GatherRows(_)) => 0,
            None if after && head => 1,
            None if after => 2,
            None => 0,
        });
        behind.push(layer.is_some() || after);
    }
    stages
}

fn layer_of(scope: &str) -> Option<usize> {
    scope.strip_prefix(LAYERS)?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests;
