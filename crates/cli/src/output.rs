//! Writing: answers to stdout, notes to stderr, figures for people.

use std::io::{self, IsTerminal, Write};

use pocketglm::{MemoryPlan, Timings};
use serde_json::Value;

use crate::failure::Failure;

/// Standard output. Every write is flushed, so that an answer streams, and reported, so that nothing panics where
/// the reader went away.
pub struct Out {
    stdout: io::Stdout,
    terminal: bool,
    line_open: bool,
}

impl Out {
    /// Standard output of this process.
    pub fn new() -> Out {
        let stdout = io::stdout();
        Out { terminal: stdout.is_terminal(), stdout, line_open: false }
    }

    /// Writes a piece of an answer. On a terminal its control characters are shown as U+FFFD, because a model may
    /// emit sequences that would control the terminal; a file or a pipe gets the text as it is.
    pub fn piece(&mut self, text: &str) -> Result<(), Failure> {
        if self.terminal { self.write(&harmless(text)) } else { self.write(text) }
    }

    /// Ends the line if it is not ended.
    pub fn end_line(&mut self) -> Result<(), Failure> {
        if self.line_open { self.write("\n") } else { Ok(()) }
    }

    /// Writes a whole line.
    pub fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.write(&format!("{text}\n"))
    }

    /// Writes one JSON value on a line of its own.
    pub fn json(&mut self, value: &Value) -> Result<(), Failure> {
        self.line(&value.to_string())
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        if let Some(last) = text.chars().last() {
            self.line_open = last != '\n';
        }
        let mut stdout = self.stdout.lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
    }
}

/// Writes a line to stderr. Nobody can be told where that fails.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// `text` without the control characters that a terminal obeys; line ends and tabs stay.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{FFFD}' } else { c }).collect()
}

/// `text` as one line: control characters, which names and broken files may hold, are spelled out.
pub fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

/// A number with commas between its thousands.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the largest binary unit that they fill.
pub fn human(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} bytes");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.2} {unit}")
}

/// Bytes in a large unit and exactly.
pub fn bytes(n: u64) -> String {
    if n < 1024 { human(n) } else { format!("{} ({} bytes)", human(n), thousands(n)) }
}

/// A memory plan as a table: use, human size, exact bytes.
pub fn plan_table(plan: &MemoryPlan) -> String {
    let total = plan.total();
    let mut rows: Vec<(&str, u64, u64)> = plan.parts.iter().map(|p| (p.name, p.bytes, p.device)).collect();
    rows.push(("total", total, plan.device_total()));
    let name = rows.iter().map(|(n, ..)| n.len()).max().unwrap_or(0);
    let exact = thousands(total).len();
    let mut table = match plan.patches {
        // A checkpoint of speech has no context of tokens.
        0 if plan.context == 0 => "memory plan".to_owned(),
        0 => format!("memory plan for {} tokens", thousands(plan.context as u64)),
        patches => format!(
            "memory plan for {} tokens and a picture of {} patches",
            thousands(plan.context as u64),
            thousands(patches as u64)
        ),
    };
    for (label, n, device) in rows {
        table.push_str(&format!("\n  {label:name$}  {:>12}  {:>exact$} bytes", human(n), thousands(n)));
        if device > 0 {
            table.push_str(&format!(", {:>exact$} on the device", thousands(device)));
        }
    }
    if let Some(placement) = &plan.placement {
        table.push_str(&format!("\nplacement: {placement}"));
    }
    table
}

/// Where the time of an answer went, on one line.
pub fn timing_line(timings: &Timings, finish: &str) -> String {
    let mut line = format!("{} prompt tokens", timings.prompt_tokens + timings.reused_tokens);
    if timings.reused_tokens > 0 {
        line.push_str(&format!(", {} reused", timings.reused_tokens));
    }
    if timings.encoded_pictures > 0 {
        let s = if timings.encoded_pictures == 1 { "" } else { "s" };
        line.push_str(&format!(
            "; {} picture{s} encoded in {:.3} s",
            timings.encoded_pictures,
            timings.vision.as_secs_f64()
        ));
    }
    line.push_str(&format!(
        "; prefill {:.3} s, {:.1} tokens/s; {} new tokens in {:.3} s, {:.1} tokens/s; {finish}",
        timings.prefill.as_secs_f64(),
        timings.prefill_rate(),
        timings.generated_tokens,
        timings.decode.as_secs_f64(),
        timings.decode_rate(),
    ));
    line
}

#[cfg(test)]
mod tests {
    use pocketglm::MemoryUse;

    use super::*;

    #[test]
    fn thousands_are_separated() {
        let shown: Vec<String> = [0, 999, 1000, 123_456, 1_234_567].map(thousands).to_vec();
        assert_eq!(shown, ["0", "999", "1,000", "123,456", "1,234,567"]);
        assert_eq!(thousands(u64::MAX), "18,446,744,073,709,551,615");
    }

    #[test]
    fn bytes_take_the_largest_unit_that_they_fill() {
        assert_eq!(human(1023), "1023 bytes");
        assert_eq!(human(1024), "1.00 KiB");
        assert_eq!(human(6 << 30), "6.00 GiB");
        assert_eq!(bytes(1536), "1.50 KiB (1,536 bytes)");
        assert_eq!(human(u64::MAX), "16777216.00 TiB");
    }

    #[test]
    fn the_plan_table_has_every_part_and_the_total() {
        let part = |name, bytes| MemoryUse { name, bytes, device: 0 };
        let plan = MemoryPlan {
            parts: vec![part("weights", 2048), part("KV cache", 10)],
            context: 8192,
            patches: 60,
            placement: None,
        };
        assert_eq!(
            plan_table(&plan),
            "memory plan for 8,192 tokens and a picture of 60 patches\n  \
             weights       2.00 KiB  2,048 bytes\n  \
             KV cache      10 bytes     10 bytes\n  \
             total         2.01 KiB  2,058 bytes"
        );
    }

    #[test]
    fn text_cannot_control_a_terminal() {
        assert_eq!(harmless("a\u{1b}[2Jb\n\tc\u{9b}"), "a\u{FFFD}[2Jb\n\tc\u{FFFD}");
        assert_eq!(one_line("a\nb\u{7}好"), "a\\nb\\u{7}好");
    }

    #[test]
    fn the_timing_line_counts_reused_tokens_into_the_prompt() {
        let timings =
            Timings { prompt_tokens: 4, reused_tokens: 60, generated_tokens: 1, ..Timings::default() };
        let line = timing_line(&timings, "stop");
        assert!(line.starts_with("64 prompt tokens, 60 reused; prefill"), "{line}");
        assert!(!line.contains("picture"), "{line}");
    }
}
