//! `pocketglm generate`: one prompt, one answer.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use pocketglm::{
    Engine, Error, FinishReason, GenerateOptions, Generation, Message, Part, Picture, PreparedPrompt,
    Request, Session, Sound, Timings,
};
use serde_json::{Value, json};

use crate::args::{ModelArgs, SamplingArgs, screen};
use crate::failure::Failure;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::output::{Out, complain, one_line, timing_line};
use crate::progress::Bars;
use crate::taps;

/// Largest request on standard input: as large as a request file may be.
const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// Answer one prompt.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("input").args(["prompt", "image", "video", "audio", "request"]).required(true).multiple(true))]
pub struct GenerateArgs {
    /// What the user says.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Instructions before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// PNG, JPEG or WebP file that stands before the text; may be given several times.
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Frames of one video, all of one size, two for each second.
    #[arg(long, value_name = "FRAME", num_args = 1..)]
    video: Vec<PathBuf>,
    /// WAV file that stands before the text, behind the pictures; may be given several times. The checkpoint needs an
    /// audio branch, of its own or by --adapter.
    #[arg(long, value_name = "FILE")]
    audio: Vec<PathBuf>,
    /// Request file, `-` for standard input: {"messages": [...]} as OpenAI-style APIs take it, with paths or data
    /// URLs for pictures, or {"input_ids": [...]}.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "system", "image", "video", "audio"])]
    request: Option<PathBuf>,
    /// Print one JSON object instead of the text.
    #[arg(long)]
    json: bool,
    /// Screen of the device: also shows each point of the answer as a pixel of it.
    #[arg(long, value_name = "WxH", value_parser = screen)]
    device_size: Option<(u32, u32)>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn run(args: &GenerateArgs) -> Result<ExitCode, Failure> {
    let request = match &args.request {
        Some(path) => read_request(path)?,
        None => Request::Messages(messages(args)),
    };
    let quiet = args.model.quiet || args.json;
    let bars = Bars::new(quiet);
    let interrupt = Interrupt::install(&bars)?;
    let start = Instant::now();
    let model = args.model.open(&bars)?;
    let load = start.elapsed();

    let engine = model.engine();
    let options = GenerateOptions { cancel: interrupt.begin(), ..args.sampling.options(engine)? };
    if !quiet {
        args.sampling.warn(&options);
    }
    let prompt = engine.prompt(&request)?;
    let mut session = engine.session();
    let mut answer = begin(&mut session, engine, &prompt, &options, args.model.memory)?;
    let mut out = Out::new();
    let mut text = String::new();
    for piece in answer.by_ref() {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                // What was streamed so far must not share a line with the error.
                bars.clear();
                out.end_line()?;
                return Err(error.into());
            }
        };
        if !args.json {
            out.piece(&piece.text)?;
        }
        text.push_str(&piece.text);
    }
    bars.clear();
    if !args.json {
        out.end_line()?;
    }

    let finish = answer.finish_reason().unwrap_or(FinishReason::Cancelled);
    let timings = answer.timings();
    let taps = args.device_size.map(|size| (size, taps::find(&text, size)));
    if args.json {
        let mut object = json!({
            "text": text,
            "token_ids": answer.token_ids(),
            "prompt_tokens": prompt.token_ids().len(),
            "finish_reason": finish.as_str(),
            "timings": timings_json(load, &timings),
        });
        if let Some(why) = engine.device_failure() {
            object["device_failure"] = why.into();
        }
        if let Some((_, taps)) = &taps {
            object["taps"] = taps.iter().map(taps::Tap::json).collect();
        }
        out.json(&object)?;
    }
    for (size, tap) in taps.iter().flat_map(|(size, taps)| taps.iter().map(move |t| (size, t))) {
        complain(&tap.line(*size));
    }
    tell_failure(engine);
    if !quiet {
        complain(&format!("[{}]", timing_line(&timings, finish.as_str())));
    }
    Ok(if finish == FinishReason::Cancelled { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// Says so where the processor took over from a device: that is never silent.
pub fn tell_failure(engine: &Engine) {
    if let Some(why) = engine.device_failure() {
        complain(&format!("note: the device failed, and the processor went on: {}", one_line(why)));
    }
}

/// The conversation that the flags describe: pictures, the video and sounds stand before the text.
fn messages(args: &GenerateArgs) -> Vec<Message> {
    let mut parts: Vec<Part> = args.image.iter().map(|path| Part::Image(Picture::file(path))).collect();
    if !args.video.is_empty() {
        parts.push(Part::Video {
            frames: args.video.iter().map(Picture::file).collect(),
            seconds: Vec::new(),
        });
    }
    parts.extend(args.audio.iter().map(|path| Part::Audio(Sound::file(path))));
    parts.extend(args.prompt.clone().map(Part::Text));
    let user = match parts.as_slice() {
        [Part::Text(text)] => Message::text("user", text),
        _ => Message::parts("user", parts),
    };
    args.system.iter().map(|s| Message::text("system", s)).chain([user]).collect()
}

/// A request from a file or, for `-`, from standard input.
pub fn read_request(path: &Path) -> Result<Request, Failure> {
    if path.as_os_str() != "-" {
        return Ok(Request::from_file(path)?);
    }
    let mut json = Vec::new();
    std::io::stdin().take(MAX_REQUEST_BYTES + 1).read_to_end(&mut json).map_err(Failure::Input)?;
    if json.len() as u64 > MAX_REQUEST_BYTES {
        return Err(Failure::InputSize { limit: MAX_REQUEST_BYTES });
    }
    Ok(Request::from_json(&json)?)
}

/// Begins an answer. A plan beyond `--memory` is an error that carries the plan.
pub fn begin<'s>(
    session: &'s mut Session,
    engine: &Engine,
    prompt: &PreparedPrompt,
    options: &GenerateOptions,
    memory: Option<u64>,
) -> Result<Generation<'s>, Failure> {
    match (session.generate(prompt, options), memory) {
        (Err(Error::Budget { .. }), Some(budget)) => {
            let plan = engine.plan(prompt, options.max_new_tokens)?;
            Err(Failure::Budget { plan: Box::new(plan), budget, shown: false })
        }
        (begun, _) => Ok(begun?),
    }
}

fn timings_json(load: Duration, timings: &Timings) -> Value {
    json!({
        "load_s": load.as_secs_f64(),
        "vision_s": timings.vision.as_secs_f64(),
        "prefill_s": timings.prefill.as_secs_f64(),
        "decode_s": timings.decode.as_secs_f64(),
        "prefill_tokens_per_s": timings.prefill_rate(),
        "decode_tokens_per_s": timings.decode_rate(),
        "reused_tokens": timings.reused_tokens,
        "encoded_pictures": timings.encoded_pictures,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use pocketglm::Content;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: GenerateArgs,
    }

    fn parse(line: &[&str]) -> Result<GenerateArgs, String> {
        let line = ["generate", "--model", "m"].iter().chain(line);
        Line::try_parse_from(line).map(|l| l.args).map_err(|e| e.to_string())
    }

    #[test]
    fn pictures_stand_before_the_text_in_the_user_s_message() {
        let args =
            parse(&["--prompt", "t", "--image", "a.png", "--image", "b.png", "--system", "s"]).unwrap();
        let [system, user] = &messages(&args)[..] else { panic!("two messages") };
        assert_eq!(system.role, "system");
        assert_eq!(user.role, "user");
        let Content::Parts(parts) = &user.content else { panic!("parts") };
        assert!(matches!(&parts[..], [Part::Image(_), Part::Image(_), Part::Text(t)] if t == "t"));
    }

    #[test]
    fn text_alone_is_a_plain_message() {
        let args = parse(&["--prompt", "t"]).unwrap();
        assert!(matches!(&messages(&args)[..], [Message { content: Content::Text(t), .. }] if t == "t"));
    }

    #[test]
    fn one_video_takes_many_frames() {
        let args = parse(&["--video", "a", "b", "c", "--prompt", "t"]).unwrap();
        let Content::Parts(parts) = &messages(&args)[0].content else { panic!("parts") };
        assert!(matches!(&parts[..], [Part::Video { frames, .. }, Part::Text(_)] if frames.len() == 3));
    }

    #[test]
    fn something_must_be_asked_and_in_one_way() {
        assert!(parse(&[]).unwrap_err().contains("--prompt"));
        assert!(parse(&["--request", "r", "--prompt", "t"]).unwrap_err().contains("cannot be used with"));
        assert!(parse(&["--prompt", "t", "--backend", "gpu"]).unwrap_err().contains("possible values: cpu"));
        assert!(parse(&["--prompt", "t", "--context", "0"]).unwrap_err().contains("at least 1"));
    }

    #[test]
    fn timings_have_the_names_that_scripts_use() {
        let timings = Timings { prompt_tokens: 8, prefill: Duration::from_secs(2), ..Timings::default() };
        let json = timings_json(Duration::from_millis(1500), &timings);
        let names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "load_s",
                "vision_s",
                "prefill_s",
                "decode_s",
                "prefill_tokens_per_s",
                "decode_tokens_per_s",
                "reused_tokens",
                "encoded_pictures"
            ]
        );
        assert_eq!((json["load_s"].as_f64(), json["prefill_tokens_per_s"].as_f64()), (Some(1.5), Some(4.0)));
    }
}
