//! `pocketglm transcribe`: speech to text with times.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use pocketglm::{
    AudioLimits, Chunking, EngineOptions, Error, Recogniser, Sound, TranscribeOptions, Transcript, Word,
};
use serde_json::json;

#[cfg(feature = "wgpu")]
use crate::args::open_gpu;
use crate::args::{AudioWeights, Backend, byte_size};
use crate::failure::Failure;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::output::{Out, complain};
use crate::progress::Bars;

/// A caption ends where nothing is said for so many seconds, ...
const PAUSE: f64 = 0.8;
/// ... before it is longer than so many characters, ...
const MAX_CHARS: usize = 80;
/// ... or takes longer than so many seconds.
const MAX_SECONDS: f64 = 7.0;

/// Turn a recording into text.
#[derive(Args, Debug)]
pub struct TranscribeArgs {
    /// WAV files: any rate, mono or more channels, integers of 8 to 32 bits or 32-bit floats.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A Wav2Vec2 model with a CTC head: its checkpoint folder (config.json, *.safetensors, vocab.json), or a .pglm file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// What is printed.
    #[arg(long, value_enum, default_value_t = Form::Times)]
    format: Form,
    /// Texts that are kept while decoding; 1 takes the best token of each frame, as the reference does.
    #[arg(long, value_name = "N", default_value_t = 1)]
    beam: usize,
    /// Seconds of audio that are encoded at a time; 0 encodes each file as a whole, which takes more memory.
    #[arg(long, value_name = "SECONDS", default_value_t = Chunking::default().seconds, allow_negative_numbers = true)]
    chunk: f64,
    /// Seconds before and after a chunk that are encoded along, so that its ends have context.
    #[arg(long, value_name = "SECONDS", default_value_t = Chunking::default().context, allow_negative_numbers = true)]
    context: f64,
    /// How matrices are kept: int8 is faster and less exact.
    #[arg(long, value_enum, default_value_t = AudioWeights::Stored)]
    weights: AudioWeights,
    /// Longest recording that is taken, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 24 * 3600)]
    max_seconds: u64,
    /// What runs the model.
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    backend: Backend,
    /// The GPU to take: part of its name; software adapters are only taken by name.
    #[cfg(feature = "wgpu")]
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    #[cfg(feature = "wgpu")]
    #[command(flatten)]
    range: crate::args::RangeArgs,
    /// Threads; 0 takes as many as the system offers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Refuse to run where the memory plan of a chunk needs more, for example 600MB.
    #[arg(long, value_name = "BYTES", value_parser = byte_size)]
    memory: Option<u64>,
    /// Show no progress and no statistics.
    #[arg(long)]
    quiet: bool,
}

/// How a transcript is written.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A line for each caption, with its times.
    Times,
    /// Text alone.
    Plain,
    /// SubRip captions.
    Srt,
    /// One JSON object for each file.
    Json,
}

/// Runs the command.
pub fn run(args: &TranscribeArgs) -> Result<ExitCode, Failure> {
    let bars = Bars::new(args.quiet);
    let interrupt = Interrupt::install(&bars)?;
    let backend = match args.backend {
        Backend::Cpu => None,
        #[cfg(feature = "wgpu")]
        Backend::Wgpu => Some(open_gpu(args.gpu.as_deref())?.backend()),
    };
    let options = EngineOptions {
        backend,
        threads: args.threads,
        memory: args.memory,
        audio_precision: args.weights.into(),
        audio_limits: AudioLimits { max_seconds: args.max_seconds, ..AudioLimits::default() },
        progress: bars.hook(),
        ..EngineOptions::default()
    };
    #[cfg(feature = "wgpu")]
    let options = EngineOptions { device_ops: args.range.ops(), ..options };
    let recogniser = Recogniser::open(&args.model, options)?;
    let mut out = Out::new();
    for path in &args.files {
        let start = Instant::now();
        let how = TranscribeOptions {
            chunking: Chunking { seconds: args.chunk, context: args.context, level: None },
            beam: args.beam,
            cancel: interrupt.begin(),
        };
        let transcript = match args.chunk == 0.0 {
            true => recogniser.transcribe(&Sound::file(path), args.beam),
            false => recogniser.transcribe_file(path, &how),
        };
        bars.clear();
        let transcript = match transcript {
            Err(Error::Cancelled) => return Ok(ExitCode::from(INTERRUPTED)),
            other => other?,
        };
        let took = start.elapsed().as_secs_f64();
        if args.format == Form::Json {
            let mut object = as_json(&transcript);
            object["file"] = json!(path.display().to_string());
            object["took_s"] = json!(took);
            out.json(&object)?;
        } else {
            out.line(&written(&transcript, args.format))?;
        }
        if !args.quiet {
            let factor = took / transcript.seconds.max(1e-9);
            complain(&format!(
                "[{}: {:.1} s of audio in {took:.1} s, real-time factor {factor:.3}]",
                path.display(),
                transcript.seconds
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(t: &Transcript) -> serde_json::Value {
    let word = |w: &Word| json!({"text": w.text, "start": w.start, "end": w.end});
    json!({"text": t.text, "seconds": t.seconds, "words": t.words.iter().map(word).collect::<Vec<_>>()})
}

fn written(t: &Transcript, form: Form) -> String {
    let captions = captions(&t.words);
    match form {
        Form::Srt => {
            let caption = |(i, c): (usize, &Word)| {
                format!("{}\n{} --> {}\n{}\n", i + 1, clock(c.start, ','), clock(c.end, ','), c.text)
            };
            captions.iter().enumerate().map(caption).collect::<Vec<_>>().join("\n")
        }
        Form::Times => {
            let line = |c: &Word| format!("[{} - {}] {}", clock(c.start, '.'), clock(c.end, '.'), c.text);
            captions.iter().map(line).collect::<Vec<_>>().join("\n")
        }
        Form::Plain | Form::Json => t.text.clone(),
    }
}

/// Words put together to captions of a size that can be read.
fn captions(words: &[Word]) -> Vec<Word> {
    let mut captions: Vec<Word> = Vec::new();
    for word in words.iter().flat_map(pieces) {
        match captions.last_mut() {
            Some(last)
                if word.start - last.end < PAUSE
                    && last.text.chars().count() + word.text.chars().count() < MAX_CHARS
                    && word.end - last.start <= MAX_SECONDS =>
            {
                last.text.push(' ');
                last.text.push_str(&word.text);
                last.end = word.end;
            }
            _ => captions.push(word),
        }
    }
    captions
}

/// A word, cut where it is longer than a caption: writing without spaces is one word to the decoder. Its time is shared
/// out by characters.
fn pieces(word: &Word) -> Vec<Word> {
    let chars: Vec<char> = word.text.chars().collect();
    let seconds = word.end - word.start;
    let by_time = (seconds / MAX_SECONDS).ceil() as usize;
    let count = chars.len().div_ceil(MAX_CHARS).max(by_time).clamp(1, chars.len().max(1));
    let share = chars.len().div_ceil(count).max(1);
    let at = |i: usize| word.start + seconds * i as f64 / chars.len().max(1) as f64;
    let piece = |(i, part): (usize, &[char])| Word {
        text: part.iter().collect(),
        start: at(i * share),
        end: at(i * share + part.len()),
    };
    chars.chunks(share).enumerate().map(piece).collect()
}

/// `01:02:03,456`.
fn clock(seconds: f64, point: char) -> String {
    let ms = (seconds.max(0.0) * 1000.0).round() as u64;
    let (s, m, h) = (ms / 1000 % 60, ms / 60_000 % 60, ms / 3_600_000);
    format!("{h:02}:{m:02}:{s:02}{point}{:03}", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(text: &str, start: f64, end: f64) -> Word {
        Word { text: text.into(), start, end }
    }

    fn transcript(words: Vec<Word>) -> Transcript {
        let text = words.iter().map(|w| w.text.as_str()).collect::<Vec<_>>().join(" ");
        Transcript { text, words, seconds: 4000.0, tokens: Vec::new() }
    }

    #[test]
    fn captions_end_at_pauses_and_before_they_are_too_long() {
        let words = [word("A", 0.0, 0.1), word("B", 0.5, 0.6), word("C", 1.6, 1.7), word("D", 1.8, 9.0)];
        let texts: Vec<String> = captions(&words).into_iter().map(|c| c.text).collect();
        assert_eq!(texts, ["A B", "C", "D"]);
        let many: Vec<Word> =
            (0..30).map(|i| word("TEN CHARS.", i as f64 * 0.1, i as f64 * 0.1 + 0.1)).collect();
        assert!(captions(&many).iter().all(|c| c.text.chars().count() <= MAX_CHARS));
    }

    #[test]
    fn writing_without_spaces_is_cut_to_captions() {
        let long = word(&"字".repeat(200), 10.0, 40.0);
        let pieces = captions(&[long]);
        assert!(pieces.len() >= 5);
        assert!(
            pieces
                .iter()
                .all(|c| c.end - c.start <= MAX_SECONDS + 1e-9 && c.text.chars().count() <= MAX_CHARS)
        );
        assert_eq!(pieces.iter().map(|c| c.text.chars().count()).sum::<usize>(), 200);
    }

    #[test]
    fn every_format_has_its_form() {
        let t = transcript(vec![word("HELLO", 0.02, 0.5), word("THERE", 3661.5, 3662.0)]);
        assert_eq!(written(&t, Form::Plain), "HELLO THERE");
        assert_eq!(
            written(&t, Form::Times),
            "[00:00:00.020 - 00:00:00.500] HELLO\n[01:01:01.500 - 01:01:02.000] THERE"
        );
        assert_eq!(
            written(&t, Form::Srt),
            "1\n00:00:00,020 --> 00:00:00,500\nHELLO\n\n2\n01:01:01,500 --> 01:01:02,000\nTHERE\n"
        );
        assert_eq!(as_json(&t)["words"][1]["start"], 3661.5);
        assert_eq!(written(&transcript(Vec::new()), Form::Srt), "");
    }
}
