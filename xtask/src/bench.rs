//! `cargo xtask bench`: how close kernels and whole models come to this machine's limits, and to llama.cpp.
//!
//! What is compared is measured in turn, round after round, because the machine is shared and its speed drifts;
//! medians of the rounds and their ratio are what `bench/RESULTS.md` gets. Nobody edits that file.

mod audio;
mod files;
mod gpu;
mod kernels;
mod measure;
mod models;
mod peer;
mod quality;
mod report;
mod resident;
#[path = "../../crates/tensor/benches/samples/mod.rs"]
mod samples;

use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;
use pocketglm_tensor::Cpu;

use crate::{Result, repo};
use report::{Report, TITLES, conditions};

/// Measure kernels and models against the machine's limits and against llama.cpp, and write bench/RESULTS.md.
#[derive(clap::Args)]
pub struct Arguments {
    /// Small sizes, one round and no peer: shows that everything runs; writes nothing.
    #[arg(long)]
    quick: bool,
    /// Rounds; medians count. What takes long gets three at most.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads; 0 takes all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Decoder layers of the synthetic models.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Measure these sections alone; the others stay in the file as they are.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Section>,
    /// The program of bench/peers, which runs llama.cpp.
    #[arg(long, conflicts_with = "quick")]
    peer: Option<PathBuf>,
    /// GGUF files that both sides run.
    #[arg(long, num_args = 1.., requires = "peer")]
    gguf: Vec<PathBuf>,
    /// Models in the project's own format, held against llama.cpp on the first GGUF file.
    #[arg(long, num_args = 1.., requires = "peer")]
    own: Vec<PathBuf>,
    /// Measure the models of --own alone.
    #[arg(long, requires = "own")]
    own_only: bool,
    /// The vision file of the first GGUF file: measures the vision encoder too.
    #[arg(long, requires = "peer")]
    mmproj: Option<PathBuf>,
    /// Size of the picture. llama.cpp needs minutes for a whole screen.
    #[arg(long, default_value = "540x1200", value_parser = size)]
    vision: (u32, u32),
    /// A Python with numpy, onnxruntime, onnx, torch and transformers, for the section `audio`.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Seconds of audio of that section.
    #[arg(long, default_value_t = 30)]
    seconds: usize,
    /// Context behind which decoding is measured as well; 0 leaves it out.
    #[arg(long, default_value_t = 4096)]
    deep: usize,
}

/// A section of the report, in the order of [`TITLES`].
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    /// Single kernels against the machine's limits.
    Kernels,
    /// Synthetic models against the machine's limits.
    Models,
    /// Quantising beside moving the bytes, and the start of a `.pglm`.
    Files,
    /// Models against llama.cpp on the same files.
    Peer,
    /// Our quantised files beside those of llama.cpp's quantiser, and the vision encoder by format.
    Quality,
    /// A speech encoder, in f32 and int8, against ONNX Runtime where there is a Python with it.
    Audio,
    /// What `bench/gpu.sh` measured on machines with a GPU.
    Gpu,
}

impl Section {
    /// What stands above it in the report.
    fn title(self) -> &'static str {
        TITLES[self as usize]
    }
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let side = |s: &str| s.parse::<u32>().ok().filter(|n| (1..=65_535).contains(n));
    text.split_once('x')
        .and_then(|(w, h)| Some((side(w)?, side(h)?)))
        .ok_or_else(|| format!("{text:?} is no size; write width x height, as in 540x1200"))
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if cfg!(debug_assertions) && !arguments.quick {
        return optimised();
    }
    let cpu = Cpu::new(arguments.threads)?;
    let rounds = if arguments.quick { 1 } else { arguments.rounds.max(1) };
    let path = (!arguments.quick).then(|| repo::root().join("bench/RESULTS.md"));
    let mut report = Report::open(&cpu, path)?;
    let wanted = |section| arguments.only.is_empty() || arguments.only.contains(&section);
    if wanted(Section::Kernels) {
        let conditions = conditions(&cpu, rounds);
        report
            .put(Section::Kernels.title(), conditions + &kernels::section(&cpu, rounds, arguments.quick)?)?;
    }
    if wanted(Section::Models) {
        let conditions = conditions(&cpu, rounds);
        report.put(Section::Models.title(), conditions + &models::section(&cpu, rounds, arguments)?)?;
    }
    if wanted(Section::Files) {
        let conditions = conditions(&cpu, rounds);
        report.put(Section::Files.title(), conditions + &files::section(&cpu, rounds, arguments)?)?;
    }
    if wanted(Section::Peer) && arguments.peer.is_some() {
        let program = models::build_program()?;
        let conditions = conditions(&cpu, rounds);
        peer::run(&cpu, &program, arguments, &mut |intro, heading, text| {
            report.put_part(Section::Peer.title(), intro, heading, &format!("{conditions}{text}"))
        })?;
    }
    if wanted(Section::Quality) && !arguments.quick {
        let conditions = conditions(&cpu, 1);
        report.put(
            Section::Quality.title(),
            conditions + &quality::section(arguments.peer.as_deref(), false)?,
        )?;
    }
    if wanted(Section::Audio) && !arguments.quick {
        let program = models::build_program()?;
        let conditions = conditions(&cpu, rounds);
        let python = arguments.python.as_deref();
        let text = audio::section(&cpu, &program, rounds, python, arguments.seconds.max(1))?;
        report.put(Section::Audio.title(), conditions + &text)?;
    }
    if wanted(Section::Gpu) && !arguments.quick {
        report.put(Section::Gpu.title(), gpu::section()?)?;
    }
    match report.path() {
        Some(path) => repo::print(&format!("written to {}\n", path.display())),
        None => Ok(()),
    }
}

/// Runs this command again as an optimised program: `cargo xtask` builds a debugging one.
fn optimised() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Not in the root: paths on the command line count from where we are.
    repo::run(
        Command::new(cargo)
            .args(["run", "--release", "--quiet", "--package", "xtask", "--manifest-path"])
            .arg(repo::root().join("Cargo.toml"))
            .arg("--")
            .args(std::env::args_os().skip(1)),
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &[&str]) -> Result<Arguments, String> {
        let parsed = Line::try_parse_from(["bench"].iter().chain(line));
        parsed.map(|l| l.arguments).map_err(|e| e.to_string())
    }

    #[test]
    fn the_quick_bench_runs_from_end_to_end_and_writes_nothing() {
        let results = repo::root().join("bench/RESULTS.md");
        let before = std::fs::read(&results).ok();
        run(&parse(&["--quick", "--threads", "1"]).unwrap()).unwrap();
        assert_eq!(before, std::fs::read(&results).ok());
    }

    #[test]
    fn files_need_a_peer() {
        let all = parse(&["--peer", "p", "--gguf", "a", "b", "--own", "c", "--vision", "56x84"]).unwrap();
        assert_eq!((all.gguf.len(), all.own.len(), all.vision), (2, 1, (56, 84)));
        assert!(parse(&["--peer", "p"]).unwrap().gguf.is_empty(), "the peer quantises without files");
        assert!(parse(&["--gguf", "a"]).is_err_and(|e| e.contains("--peer")));
        assert!(parse(&["--peer", "p", "--gguf", "a", "--quick"]).is_err());
        assert!(parse(&["--vision", "0x5"]).is_err_and(|e| e.contains("is no size")));
        assert_eq!(parse(&["--only", "kernels,peer"]).unwrap().only, [Section::Kernels, Section::Peer]);
    }
}
