//! `pocketglm info`: what a checkpoint is and what running it takes, before anything is allocated.

use std::process::ExitCode;

use clap::Args;
use pocketglm::{
    Engine, EngineOptions, MemoryPlan, MemoryUse, ModelInfo, OpPlace, Placement, Recogniser, RecogniserInfo,
    quantise::{Verified, verify_model},
};
use serde_json::{Value, json};

use crate::args::{ModelArgs, screen};
use crate::failure::Failure;
use crate::output::{Out, bytes, human, plan_table, thousands};
use crate::progress::{Bars, Work};

/// The screen of a common phone.
const PHONE: Screen = Screen(Some((1080, 2400)));

/// The largest picture that the plan provides for, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Screen(Option<(u32, u32)>);

fn screen_or_none(text: &str) -> Result<Screen, String> {
    if text == "none" { Ok(Screen(None)) } else { screen(text).map(|s| Screen(Some(s))) }
}

/// Show what a checkpoint is.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Largest picture that the memory plan provides for, or `none`; 1080x2400 where the checkpoint takes pictures.
    #[arg(long, value_name = "WxH|none", value_parser = screen_or_none)]
    screen: Option<Screen>,
    /// List the model's ops instead, in the order in which they run, with those that run on the GPU marked.
    #[arg(long)]
    ops: bool,
    /// Read all weights as well: compare their hashes, which .pglm files have, and look for NaN and infinity.
    #[arg(long, conflicts_with = "ops")]
    verify: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub fn run(args: &InfoArgs) -> Result<ExitCode, Failure> {
    // Inspecting takes a moment at most, so there is no bar.
    let opened = args.model.backend()?;
    let options = args.model.options_on(opened.as_ref().map(|o| o.backend.clone()), &Bars::new(true));
    if args.ops {
        return ops(args, &options);
    }
    let verified = args.verify.then(|| verify(args, &options)).transpose()?;
    if Recogniser::is_one(&args.model.model) {
        return hears(args, verified);
    }
    let Screen(wanted) = args.screen.unwrap_or(PHONE);
    let picture = wanted.map(|(w, h)| (w as usize, h as usize));
    let (info, plan) = Engine::inspect(&args.model.model, &options, picture)?;
    let screen = wanted.filter(|_| info.vision_blocks > 0);
    let refused = args.model.memory.filter(|budget| plan.total() > *budget);
    // A device is told by its backend, which is open; the processor by an engine, which shows that the checkpoint loads.
    let device = || match &opened {
        Some(opened) => Ok(opened.backend.describe()),
        None => device(args),
    };

    let mut out = Out::new();
    if args.json {
        let mut object = report_json(&info, &plan, screen);
        object["memory"] = json!(args.model.memory);
        object["fits"] = json!(refused.is_none());
        object["verified"] = verified_json(verified);
        object["device"] = if refused.is_none() { json!(device()?) } else { Value::Null };
        out.json(&object)?;
    } else {
        out.line(&report(&info, &plan, screen))?;
        verified.map_or(Ok(()), |v| out.line(&verified_line(v)))?;
        for (label, text) in opened.iter().flat_map(|o| &o.facts) {
            out.line(&format!("{label:LABEL$}{text}"))?;
        }
    }
    if let Some(budget) = refused {
        return Err(Failure::Budget { plan: Box::new(plan), budget, shown: true });
    }
    if !args.json && opened.is_none() {
        out.line(&format!("{:LABEL$}{}", "device", device()?))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads everything.
fn verify(args: &InfoArgs, options: &EngineOptions) -> Result<Verified, Failure> {
    let work = Work::new(args.model.quiet || args.json, true);
    let options = EngineOptions { progress: work.hook(), ..options.clone() };
    let verified = verify_model(&args.model.model, &options);
    work.clear();
    Ok(verified?)
}

fn verified_json(verified: Option<Verified>) -> Value {
    verified.map_or(Value::Null, |v| json!({"tensors": v.tensors, "hashes": v.hashes, "finite": true}))
}

fn verified_line(verified: Verified) -> String {
    let hashes = if verified.hashes { "hashes are right" } else { "this kind of file has no hashes" };
    format!("{:LABEL$}{} tensors, all finite; {hashes}", "verified", thousands(verified.tensors as u64))
}

/// The list of ops, for `--gpu-from` and `--gpu-until`.
fn ops(args: &InfoArgs, options: &EngineOptions) -> Result<ExitCode, Failure> {
    let model = &args.model.model;
    let ops = if Recogniser::is_one(model) {
        Recogniser::ops(model, options)
    } else {
        Engine::ops(model, options)
    }?;
    let on_gpu = |op: &OpPlace| op.on_device && options.backend.is_some();
    let mut out = Out::new();
    if args.json {
        let entry = |(i, op): (usize, &OpPlace)| json!({"op": i, "program": op.program, "name": op.name, "gpu": on_gpu(op)});
        out.json(&json!({"ops": ops.iter().enumerate().map(entry).collect::<Vec<_>>()}))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (i, op) in ops.iter().enumerate() {
        let place = if on_gpu(op) { "gpu" } else { "cpu" };
        out.line(&format!("{i:>5}  {place}  {:8}{}", op.program, op.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds of audio that the plan of a speech checkpoint provides for: a chunk of `transcribe` with its context.
const SECONDS: f64 = 30.0;

/// The report of a speech checkpoint.
fn hears(args: &InfoArgs, verified: Option<Verified>) -> Result<ExitCode, Failure> {
    let options = args.model.options(&Bars::new(true))?;
    let (info, plan) = Recogniser::inspect(&args.model.model, &options, SECONDS)?;
    let refused = args.model.memory.filter(|budget| plan.total() > *budget);
    let mut out = Out::new();
    match args.json {
        true => {
            let mut object = speech_json(&info, &plan);
            object["memory"] = json!(args.model.memory);
            object["fits"] = json!(refused.is_none());
            object["verified"] = verified_json(verified);
            out.json(&object)?;
        }
        false => {
            out.line(&speech(&info, &plan))?;
            verified.map_or(Ok(()), |v| out.line(&verified_line(v)))?;
        }
    }
    match refused {
        Some(budget) => Err(Failure::Budget { plan: Box::new(plan), budget, shown: true }),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn family(info: &RecogniserInfo) -> &'static str {
    if info.config.do_stable_layer_norm { "norms before the blocks" } else { "norms after the residuals" }
}

fn speech(info: &RecogniserInfo, plan: &MemoryPlan) -> String {
    let mut lines = Vec::new();
    let mut line = |label: &str, text: String| lines.push(format!("{label:LABEL$}{text}"));
    let c = &info.config;
    line("model", format!("wav2vec2, {} layers of {}, {}", c.num_hidden_layers, c.hidden_size, family(info)));
    line(
        "vocabulary",
        match (info.head, info.vocabulary) {
            (0, _) => "none: features only".into(),
            (_, None) => format!("{} tokens without vocab.json", thousands(c.vocab_size as u64)),
            (_, Some(n)) => format!("{} tokens", thousands(n as u64)),
        },
    );
    let rate = 16_000.0 / c.samples_per_frame() as f64;
    line("frames", format!("{rate} a second, the shortest clip has {} samples", c.receptive_field()));
    let all = info.encoder + info.head;
    let width = thousands(all).len();
    for (i, (name, n)) in [("encoder", info.encoder), ("head", info.head), ("total", all)].iter().enumerate()
    {
        line(if i == 0 { "parameters" } else { "" }, format!("{name:8}{:>width$}", thousands(*n)));
    }
    for (i, (name, n)) in info.bytes.iter().enumerate() {
        line(
            if i == 0 { "stored as" } else { "" },
            format!("{name:8}{} bytes  {:>12}", thousands(*n), human(*n)),
        );
    }
    line("plan for", format!("{SECONDS} seconds at once, a chunk of `transcribe` with its context"));
    lines.push(plan_table(plan));
    lines.join("\n")
}

fn parts_json(plan: &MemoryPlan) -> Vec<Value> {
    let part = |p: &MemoryUse| json!({"name": p.name, "bytes": p.bytes, "device_bytes": p.device});
    plan.parts.iter().map(part).collect()
}

fn placement_json(placement: &Placement) -> Value {
    json!({
        "device": placement.device,
        "layers": placement.layers,
        "of": placement.all_layers,
        "head": placement.head,
        "embedding": placement.embedding,
        "vision": placement.vision,
        "budget": placement.budget,
        "least": placement.least,
        "ops": placement.ops,
    })
}

fn speech_json(info: &RecogniserInfo, plan: &MemoryPlan) -> Value {
    let parts = parts_json(plan);
    json!({
        "model_type": "wav2vec2",
        "layers": info.config.num_hidden_layers,
        "hidden_size": info.config.hidden_size,
        "do_stable_layer_norm": info.config.do_stable_layer_norm,
        "vocabulary": info.vocabulary,
        "samples_per_frame": info.config.samples_per_frame(),
        "shortest_clip": info.config.receptive_field(),
        "tensors": info.tensors,
        "parameters": {"encoder": info.encoder, "head": info.head, "total": info.encoder + info.head},
        "stored_bytes": info.bytes,
        "seconds": SECONDS,
        "plan": {"parts": parts, "total": plan.total()},
    })
}

/// The device that would run the checkpoint.
fn device(args: &InfoArgs) -> Result<String, Failure> {
    Ok(args.model.open(&Bars::new(true))?.engine().device())
}

/// Width of the labels.
const LABEL: usize = 17;

/// The names of the element types and the bits of one element.
const TYPES: [(&str, u64); 4] = [("f32", 32), ("bf16", 16), ("int8", 8), ("int4", 4)];

fn total(info: &ModelInfo) -> pocketglm::Parameters {
    pocketglm::Parameters {
        count: info.decoder.count + info.head.count + info.vision.count + info.audio.count,
    }
}

fn report(info: &ModelInfo, plan: &MemoryPlan, screen: Option<(u32, u32)>) -> String {
    let mut lines = Vec::new();
    let mut line = |label: &str, text: String| lines.push(format!("{label:LABEL$}{text}"));
    let sight = match info.vision_blocks {
        0 => "text only".to_string(),
        blocks => format!("{blocks} vision blocks"),
    };
    let hearing = match info.audio_layers {
        0 => String::new(),
        layers => format!(", {layers} audio layers"),
    };
    line("model", format!("{}, {} decoder layers, {sight}{hearing}", info.model_type, info.layers));
    line("vocabulary", format!("{} tokens", thousands(info.vocabulary as u64)));
    line("made for", format!("{} tokens", thousands(info.max_position_embeddings as u64)));
    let total = total(info);
    let mut parts = vec![("decoder", info.decoder), ("head", info.head), ("vision", info.vision)];
    parts.extend((info.audio_layers > 0).then_some(("audio", info.audio)));
    parts.push(("total", total));
    let width = thousands(total.count).len();
    for (i, (name, p)) in parts.into_iter().enumerate() {
        let label = if i == 0 { "parameters" } else { "" };
        let tied = if name == "head" && p.count == 0 { "  (the embedding table)" } else { "" };
        line(label, format!("{name:8}{:>width$}{tied}", thousands(p.count)));
    }
    let width = thousands(total.bytes_at(32)).len();
    for (i, (name, bits)) in TYPES.into_iter().enumerate() {
        let label = if i == 0 { "size as" } else { "" };
        let n = total.bytes_at(bits);
        line(label, format!("{name:8}{:>width$} bytes  {:>12}", thousands(n), human(n)));
    }
    for (i, (name, n)) in info.bytes.iter().enumerate() {
        let label = if i == 0 { "stored as" } else { "" };
        line(label, format!("{name:8}{:>width$} bytes  {:>12}", thousands(*n), human(*n)));
    }
    let kv = info.kv_bytes_per_token.saturating_mul(plan.context as u64);
    let per_token = thousands(info.kv_bytes_per_token);
    line(
        "KV cache",
        format!("{per_token} bytes per token, {} at {} tokens", bytes(kv), thousands(plan.context as u64)),
    );
    if let Some((w, h)) = screen {
        line("largest picture", format!("{w}x{h}"));
    }
    lines.push(plan_table(plan));
    lines.join("\n")
}

fn report_json(info: &ModelInfo, plan: &MemoryPlan, screen: Option<(u32, u32)>) -> Value {
    let total = total(info);
    let sizes: serde_json::Map<String, Value> =
        TYPES.into_iter().map(|(name, bits)| (name.into(), total.bytes_at(bits).into())).collect();
    let parts = parts_json(plan);
    json!({
        "model_type": info.model_type,
        "layers": info.layers,
        "vision_blocks": info.vision_blocks,
        "audio_layers": info.audio_layers,
        "vocabulary": info.vocabulary,
        "max_position_embeddings": info.max_position_embeddings,
        "tensors": info.tensors,
        "parameters": {
            "decoder": info.decoder.count,
            "head": info.head.count,
            "vision": info.vision.count,
            "audio": info.audio.count,
            "total": total.count,
        },
        "size_bytes": sizes,
        "stored_bytes": info.bytes,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "context": plan.context,
        "kv_bytes": info.kv_bytes_per_token.saturating_mul(plan.context as u64),
        "screen": screen,
        "placement": plan.placement.as_ref().map(placement_json),
        "plan": {
            "parts": parts,
            "patches": plan.patches,
            "total": plan.total(),
            "device_total": plan.device_total(),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pocketglm::Parameters;

    use super::*;

    fn example() -> (ModelInfo, MemoryPlan) {
        let info = ModelInfo {
            model_type: "glm4v".into(),
            decoder: Parameters { count: 8_000_000_001 },
            head: Parameters::default(),
            vision: Parameters { count: 500 },
            audio: Parameters::default(),
            audio_layers: 0,
            tensors: 3,
            bytes: BTreeMap::from([("BF16", 16_000_001_002)]),
            layers: 40,
            vision_blocks: 24,
            max_position_embeddings: 65_536,
            vocabulary: 151_552,
            kv_bytes_per_token: 163_840,
        };
        let part = |name, bytes| MemoryUse { name, bytes, device: 0 };
        let parts = vec![part("weights", 5), part("KV cache", 7)];
        (info, MemoryPlan { parts, context: 8192, patches: 13_416, placement: None })
    }

    #[test]
    fn the_report_has_exact_counts_and_sizes() {
        let (info, plan) = example();
        let text = report(&info, &plan, Some((1080, 2400)));
        for wanted in [
            "glm4v, 40 decoder layers, 24 vision blocks",
            "8,000,000,501",
            "32,000,002,004 bytes",
            "4,000,000,250 bytes",
            "163,840 bytes per token, 1.25 GiB (1,342,177,280 bytes) at 8,192 tokens",
            "(the embedding table)",
            "1080x2400",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
    }

    #[test]
    fn the_json_report_adds_up() {
        let (info, plan) = example();
        let json = report_json(&info, &plan, None);
        assert_eq!(json["parameters"]["total"], 8_000_000_501u64);
        assert_eq!(json["size_bytes"]["bf16"], 16_000_001_002u64);
        assert_eq!(json["plan"]["total"], 12);
        assert_eq!(json["kv_bytes"], 1_342_177_280u64);
        assert!(json["screen"].is_null());
    }

    #[test]
    fn a_screen_may_be_none() {
        assert_eq!(screen_or_none("none"), Ok(Screen(None)));
        assert_eq!(screen_or_none("10x20"), Ok(Screen(Some((10, 20)))));
        assert!(screen_or_none("some").is_err());
    }
}
