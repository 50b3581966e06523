//! `pocketglm bench --step`: one step of an agent by its parts.

use std::process::ExitCode;
use std::time::Instant;

use pocketglm::{Engine, GenerateOptions, Message, Part, Picture, PreparedPrompt, Request};
use serde_json::{Value, json};

use super::{BenchArgs, add, median, ops, peak_memory};
use crate::failure::Failure;
use crate::generate::begin;
use crate::output::{Out, bytes};

/// Most pixels of a made-up picture: more than any screen has.
const MOST_PIXELS: u64 = 64 << 20;

/// What an agent is told before every step, of the length that such instructions have.
const INSTRUCTIONS: &str = "You operate a phone. You see a screenshot and a task, and you answer with exactly one action \
in the form do(action=..., ...), or with finish(message=...) when the task is done. Coordinates run from 0 to 999 in \
both directions, from the upper left corner.
Actions:
- do(action=\"Launch\", app=\"name\"): opens an app. It is faster than looking for its icon.
- do(action=\"Tap\", element=[x, y]): taps a point.
- do(action=\"Long Press\", element=[x, y]): presses a point for a second.
- do(action=\"Type\", text=\"...\"): types into the field that has the focus; what is in it is replaced.
- do(action=\"Swipe\", start=[x1, y1], end=[x2, y2]): drags, to scroll or to move.
- do(action=\"Back\") and do(action=\"Home\"): the system's buttons.
- do(action=\"Wait\", duration=\"x seconds\"): waits for a page that loads.
Rules: if an app is not the right one, go back first. If a page is still empty, wait up to three times. If the thing you \
look for is not on the screen, scroll. Do not pay, delete or send anything that the task does not name. Think in a \
<think> block about what the screen shows and what comes next, then give the action in an <answer> block.";
/// What the user wants.
const QUESTION: &str = "打开设置，进入“显示与亮度”，把屏幕亮度调到一半，然后打开深色模式。";

/// The part of an agent's step, in the order in which they run.
const PARTS: [&str; 4] = ["preprocess", "vision", "prefill", "decode"];

/// One measured step.
struct Step {
    /// Seconds of [`PARTS`].
    seconds: [f64; 4],
    /// Tokens of [`PARTS`]: of the picture, of the picture, of the prompt, generated after the first.
    tokens: [usize; 4],
    /// Seconds of everything, sampling and text included.
    total: f64,
    /// Bytes that the plan for it has.
    planned: u64,
}

/// Runs the command.
pub fn run(args: &BenchArgs, engine: &Engine, load: f64, size: (u32, u32)) -> Result<ExitCode, Failure> {
    let mut rounds = Vec::with_capacity(args.rounds);
    for round in 0..args.rounds {
        rounds.push(measure(args, engine, size, round as u32 + 1)?);
    }
    let Some(first) = rounds.first() else { return Err(Failure::NotMeasured { wanted: 1, found: 0 }) };
    let (tokens, planned) = (first.tokens, first.planned);
    let seconds = [0, 1, 2, 3].map(|part| median(rounds.iter().map(|r| r.seconds[part]).collect()));
    let total = median(rounds.iter().map(|r| r.total).collect());
    let rate = |part: usize| tokens[part] as f64 / seconds[part].max(1e-9);
    let again = || measure(args, engine, size, args.rounds as u32 + 1).map(|_| ());
    let per_op = args.per_op.then(|| ops::measure(engine.device_backend(), again)).transpose()?;
    let mut out = Out::new();
    if args.json {
        let mut parts = serde_json::Map::new();
        for (part, name) in PARTS.into_iter().enumerate() {
            let value = json!({
                "seconds": seconds[part],
                "tokens": tokens[part],
                "tokens_per_s": rate(part),
                "rounds_s": rounds.iter().map(|r| r.seconds[part]).collect::<Vec<_>>(),
            });
            parts.insert(name.into(), value);
        }
        let mut object = json!({
            "device": engine.device(),
            "screen": [size.0, size.1],
            "load_s": load,
            "rounds": args.rounds,
            "parts": Value::Object(parts),
            "total_s": total,
            "peak_memory_bytes": peak_memory(),
            "planned_memory_bytes": planned,
        });
        add(&mut object, per_op.as_ref());
        out.json(&object)?;
        return Ok(ExitCode::SUCCESS);
    }
    out.line(&format!("device   {}", engine.device()))?;
    out.line(&format!("load     {load:.3} s"))?;
    out.line(&format!("screen   {}x{}, median of {} round(s)", size.0, size.1, args.rounds))?;
    out.line(&format!("\n{:<12}{:>10}{:>10}{:>12}{:>8}", "part", "seconds", "tokens", "tokens/s", "share"))?;
    for (part, name) in PARTS.into_iter().enumerate() {
        out.line(&format!(
            "{name:<12}{:>10.3}{:>10}{:>12.1}{:>6.0} %",
            seconds[part],
            tokens[part],
            rate(part),
            100.0 * seconds[part] / total.max(1e-9)
        ))?;
    }
    out.line(&format!("{:<12}{total:>10.3}", "total"))?;
    if let Some(peak) = peak_memory() {
        out.line(&format!("\nmemory   {} at the peak, {} planned", bytes(peak), bytes(planned)))?;
    }
    per_op.iter().try_for_each(|p| p.print(&mut out))?;
    Ok(ExitCode::SUCCESS)
}

/// One step in a fresh session, on a screenshot that no round before had.
fn measure(args: &BenchArgs, engine: &Engine, size: (u32, u32), seed: u32) -> Result<Step, Failure> {
    let request = request(screenshot(size, seed)?, size)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let mut session = engine.session();
    let start = Instant::now();
    let prompt = engine.prompt(&request)?;
    let preprocess = start.elapsed().as_secs_f64();
    let planned = engine.plan(&prompt, args.max_new_tokens)?.total();
    let mut answer = begin(&mut session, engine, &prompt, &options, args.model.memory)?;
    answer.text()?;
    let total = start.elapsed().as_secs_f64();
    let timings = answer.timings();
    let picture = picture_tokens(&prompt);
    Ok(Step {
        seconds: [
            preprocess,
            timings.vision.as_secs_f64(),
            timings.prefill.as_secs_f64(),
            timings.decode.as_secs_f64(),
        ],
        tokens: [picture, picture, timings.prompt_tokens, timings.generated_tokens.saturating_sub(1)],
        total,
        planned,
    })
}

/// Instructions, the screenshot and the task, as an agent sends them.
fn request(pixels: Vec<u8>, (width, height): (u32, u32)) -> Result<Request, Failure> {
    let picture = Picture::rgb8(width as usize, height as usize, pixels)?;
    Ok(Request::Messages(vec![
        Message::text("system", INSTRUCTIONS),
        Message::parts("user", vec![Part::Image(picture), Part::Text(QUESTION.into())]),
    ]))
}

/// Tokens of a prompt that show a picture: the text has one placeholder for each.
pub fn picture_tokens(prompt: &PreparedPrompt) -> usize {
    prompt.text().map_or(0, |text| text.matches("<|image|>").count())
}

/// RGB bytes of something like a screenshot: a background that changes slowly, cards, and lines of small dark blocks
/// where text would be. The same for the same seed.
pub fn screenshot((width, height): (u32, u32), seed: u32) -> Result<Vec<u8>, Failure> {
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        return Err(Failure::ScreenSize { width, height, limit: MOST_PIXELS });
    }
    let (width, height) = (width as usize, height as usize);
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            let shade = |at: usize, all: usize| (160 + 80 * at / all.max(1)) as u8;
            pixels.extend([shade(x, width), shade(y, height), 230]);
        }
    }
    // The generator of Numerical Recipes; its high bits are good enough for pictures.
    let mut state = seed;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below.max(1)
    };
    let mut fill = |left: usize, top: usize, w: usize, h: usize, colour: [u8; 3]| {
        for y in top..(top + h).min(height) {
            let (begin, end) = ((y * width + left.min(width)) * 3, (y * width + (left + w).min(width)) * 3);
            for pixel in pixels[begin..end].chunks_exact_mut(3) {
                pixel.copy_from_slice(&colour);
            }
        }
    };
    // A unit is about the height of a line of text.
    let unit = (width / 36).max(2);
    let mut top = unit;
    while top < height {
        let card = unit * (4 + random(8));
        fill(unit, top, width.saturating_sub(2 * unit), card, [250, 250, 252]);
        fill(
            2 * unit,
            top + unit,
            2 * unit,
            2 * unit,
            [random(256) as u8, random(256) as u8, random(256) as u8],
        );
        let mut line = top + unit;
        while line + unit < top + card {
            let mut left = 5 * unit;
            let end = width.saturating_sub(unit * (2 + random(10)));
            while left < end {
                let word = unit / 2 + random(3 * unit);
                let dark = random(90) as u8;
                fill(left, line, word, unit * 2 / 3, [dark, dark, dark]);
                left += word + unit / 2;
            }
            line += unit * 3 / 2;
        }
        top += card + unit;
    }
    Ok(pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn screenshots_have_their_size_and_repeat_with_their_seed_alone() {
        for size in [(540, 1200), (1, 1), (3, 7), (1200, 1)] {
            let pixels = screenshot(size, 1).unwrap();
            assert_eq!(pixels.len(), size.0 as usize * size.1 as usize * 3);
            assert_eq!(pixels, screenshot(size, 1).unwrap());
        }
        assert_ne!(screenshot((540, 1200), 1).unwrap(), screenshot((540, 1200), 2).unwrap());
    }

    #[test]
    fn screenshots_have_flat_and_busy_places() {
        let pixels = screenshot((540, 1200), 1).unwrap();
        let dark = pixels.chunks(3).filter(|p| p.iter().all(|&v| v < 90)).count();
        let share = dark as f64 / (540.0 * 1200.0);
        assert!((0.05..0.5).contains(&share), "{share} of the pixels are dark");
    }

    #[test]
    fn a_screen_beyond_any_device_is_refused_before_memory_is_taken() {
        assert!(matches!(screenshot((65_535, 65_535), 1), Err(Failure::ScreenSize { .. })));
    }
}
