//! bench/RESULTS.md: a head and sections, each of which is replaced when it is measured again.

use std::path::{Path, PathBuf};
use std::process::Command;

use pocketglm_tensor::Cpu;

use crate::error::io_error;
use crate::{Result, repo};

/// Titles in the order in which they stand in the file.
pub const TITLES: [&str; 7] =
    ["Kernels", "Models", "Files", "Against llama.cpp", "What quantising loses", "Speech", "On a GPU"];

/// The file, or only the terminal.
pub struct Report {
    path: Option<PathBuf>,
    head: String,
    sections: Vec<(String, String)>,
}

impl Report {
    /// The report at `path`, with the sections that are there already. Without a path nothing is written.
    pub fn open(cpu: &Cpu, path: Option<PathBuf>) -> Result<Report> {
        let old = match &path {
            Some(path) if path.is_file() => repo::read(path)?,
            _ => String::new(),
        };
        let report = Report { path, head: head(cpu), sections: sections(&old) };
        repo::print(&report.head)?;
        Ok(report)
    }

    /// Puts a section in its place, prints it, and writes the file.
    pub fn put(&mut self, title: &str, text: String) -> Result<()> {
        repo::print(&format!("\n## {title}\n\n{}\n", text.trim()))?;
        self.sections.retain(|(t, _)| t != title);
        self.sections.push((title.to_owned(), text));
        let place = |title: &str| TITLES.iter().position(|t| *t == title).unwrap_or(TITLES.len());
        self.sections.sort_by_key(|(title, _)| place(title));
        let Some(path) = &self.path else { return Ok(()) };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        }
        let text = self.text();
        pocketglm_checkpoint::write_atomic(path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
        Ok(())
    }

    /// Replaces one part of a section, or adds it; the other parts stay, `intro` stands before them.
    pub fn put_part(&mut self, title: &str, intro: &str, heading: &str, text: &str) -> Result<()> {
        let old = self.sections.iter().find(|(t, _)| t == title).map_or("", |(_, text)| text);
        let mut parts = parts(old);
        let part = format!("{}\n", text.trim());
        match parts.iter_mut().find(|(h, _)| h == heading) {
            Some(old) => old.1 = part,
            None => parts.push((heading.to_owned(), part)),
        }
        let mut whole = format!("{}\n", intro.trim());
        for (heading, text) in parts {
            whole.push_str(&format!("\n### {heading}\n\n{}\n", text.trim()));
        }
        self.put(title, whole)
    }

    /// Where it is written.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    fn text(&self) -> String {
        let mut text = self.head.clone();
        for (title, section) in &self.sections {
            text.push_str(&format!("\n## {title}\n\n{}\n", section.trim()));
        }
        text
    }
}

/// The sections of a report that this program wrote; those of older titles are left out.
fn sections(text: &str) -> Vec<(String, String)> {
    let mut sections: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push((title.trim().to_owned(), String::new()));
        } else if let Some((_, section)) = sections.last_mut() {
            section.push_str(line);
            section.push('\n');
        }
    }
    sections.retain(|(title, _)| TITLES.contains(&title.as_str()));
    sections
}

/// The parts of a section, by their headings.
fn parts(section: &str) -> Vec<(String, String)> {
    let mut parts: Vec<(String, String)> = Vec::new();
    for line in section.lines() {
        if let Some(heading) = line.strip_prefix("### ") {
            parts.push((heading.trim().to_owned(), String::new()));
        } else if let Some((_, part)) = parts.last_mut() {
            part.push_str(line);
            part.push('\n');
        }
    }
    parts
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(repo::root()).output().ok();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

/// The machine.
fn head(cpu: &Cpu) -> String {
    let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("unknown");
        line.trim_start_matches([' ', '\t', ':']).trim().to_owned()
    };
    let memory = field(&file("/proc/meminfo"), "MemTotal");
    let memory = memory.strip_suffix(" kB").and_then(|kib| kib.parse::<f64>().ok());
    let cache = file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    format!(
        "# Results\n\nWritten by `cargo xtask bench`; do not edit. What is compared takes turns, round after round, because \
         a shared machine drifts; medians count. Each section says when and from which commit it was measured.\n\n\
         * processor: {}, {} processors, {}, last-level cache {}\n* memory: {}\n* system: {}\n",
        field(&file("/proc/cpuinfo"), "model name"),
        std::thread::available_parallelism().map_or(0, usize::from),
        cpu.isa(),
        if cache.is_empty() { "unknown" } else { cache.trim() },
        memory.map_or("unknown".into(), |kib| format!("{:.1} GiB", kib / (1 << 20) as f64)),
        run("uname", &["-sr"]),
    )
}

/// The line that begins a section: when, what and under which conditions.
pub fn conditions(cpu: &Cpu, rounds: usize) -> String {
    let dirty =
        if run("git", &["status", "--porcelain"]).is_empty() { "" } else { " with uncommitted changes" };
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{}, commit {}{dirty}, {}, {} threads, {rounds} rounds, load of the machine before: {}\n\n",
        run("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        run("git", &["rev-parse", "--short=12", "HEAD"]),
        run("rustc", &["--version"]),
        cpu.threads(),
        load.split(' ').next().filter(|l| !l.is_empty()).unwrap_or("unknown"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let folder = std::env::temp_dir().join(format!("xtask-report-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("RESULTS.md");
        std::fs::write(&path, "# Results\n\nold head\n\n## Models\n\nm1\n\n### part\n\nm2\n\n## Gone\n\nx\n")
            .unwrap();
        let cpu = Cpu::new(1).unwrap();
        let mut report = Report::open(&cpu, Some(path.clone())).unwrap();
        report.put("Kernels", "k".into()).unwrap();
        report.put("Kernels", "k2\n".into()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(text.ends_with("\n## Kernels\n\nk2\n\n## Models\n\nm1\n\n### part\n\nm2\n"), "{text}");
        assert!(!text.contains("old head") && !text.contains("Gone"), "{text}");
    }

    #[test]
    fn a_part_is_replaced_and_the_other_parts_stay() {
        let mut report = Report::open(&Cpu::new(1).unwrap(), None).unwrap();
        for (heading, text) in [("a", "1"), ("b", "2\n\n3"), ("a", "4")] {
            report.put_part("Models", "intro", heading, text).unwrap();
        }
        assert!(
            report.text().ends_with("\n## Models\n\nintro\n\n### a\n\n4\n\n### b\n\n2\n\n3\n"),
            "{}",
            report.text()
        );
    }

    #[test]
    fn without_a_path_nothing_is_written() {
        let mut report = Report::open(&Cpu::new(1).unwrap(), None).unwrap();
        report.put("Kernels", "k".into()).unwrap();
        assert!(report.path().is_none());
    }
}
