//! pocketglm against llama.cpp on the same files: both models stay in memory and take turns.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use pocketglm_tensor::{Cpu, peak};
use serde_json::Value;

use super::measure::{Sides, median};
use super::models::{Cost, Work, cost};
use super::resident::Resident;
use crate::Result;
use crate::error::io_error;

/// Before every request: the threads of the program that had its turn may still look for work for a while.
const PAUSE: Duration = Duration::from_millis(400);
/// Rounds at most of what takes long: the encoder, a deep context, starting anew.
const FEW: usize = 3;
/// Tokens of the prompt whose first answer is waited for.
const SHORT: usize = 16;

/// What is measured of every pair.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: usize,
    pub prefill: usize,
    pub decode: usize,
    /// Tokens decoded behind the deep context, and its depth.
    pub deep: Option<(usize, usize)>,
    /// Size of the picture, where the vision encoder is measured.
    pub vision: Option<(u32, u32)>,
    /// Milliseconds of a measurement of the byte dot products, and bytes of the buffer that is read.
    pub limits: (u32, usize),
    pub pause: Duration,
}

impl Plan {
    pub fn new(rounds: usize, deep: usize, vision: Option<(u32, u32)>) -> Plan {
        Plan {
            rounds,
            prefill: 512,
            decode: 64,
            deep: (deep > 0).then_some((32, deep)),
            vision,
            limits: (20, 1 << 29),
            pause: PAUSE,
        }
    }

    /// Room that the caches need: for the measured tokens, or for the picture with its prompt, and some more.
    pub fn context(&self) -> usize {
        let deep = self.deep.map_or(0, |(n, depth)| n + depth);
        // A token of a picture is 28 pixels wide and high; a small picture is made larger.
        let picture = self.vision.map_or(0, |(w, h)| w.div_ceil(28) as usize * h.div_ceil(28) as usize + 512);
        self.prefill.max(self.decode).max(deep).max(picture).max(SHORT) + 64
    }
}

/// A program and its model, to be started as often as needed.
pub struct Side {
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

impl Side {
    /// `pocketglm bench --serve`, with keys and values in f16 as the peer has them.
    pub fn ours(program: &Path, model: &Path, threads: usize, context: usize) -> Side {
        let mut arguments: Vec<String> =
            ["bench", "--serve", "--model"].into_iter().map(String::from).collect();
        arguments.push(model.display().to_string());
        arguments.extend(["--threads".into(), threads.to_string(), "--context".into(), context.to_string()]);
        arguments.extend(["--kv", "f16"].map(String::from));
        Side { program: program.to_owned(), arguments }
    }

    /// `peers serve`, with fused attention and keys and values in f16.
    fn theirs(program: &Path, model: &Path, threads: usize, context: usize, mmproj: Option<&Path>) -> Side {
        let mut arguments: Vec<String> = ["serve", "--model"].into_iter().map(String::from).collect();
        arguments.push(model.display().to_string());
        arguments.extend(["--threads".into(), threads.to_string(), "--context".into(), context.to_string()]);
        arguments.extend(["--flash-attn", "--kv", "f16"].map(String::from));
        if let Some(mmproj) = mmproj {
            arguments.extend(["--mmproj".into(), mmproj.display().to_string()]);
        }
        Side { program: program.to_owned(), arguments }
    }

    fn start(&self) -> Result<Resident> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        Resident::start(command)
    }
}

/// Runs the comparison of all files; `put` gets what stands before all parts, and the heading and text of each.
pub fn run(
    cpu: &Cpu,
    program: &Path,
    arguments: &super::Arguments,
    put: &mut dyn FnMut(&str, &str, &str) -> Result<()>,
) -> Result<()> {
    let Some(peer) = &arguments.peer else { return Ok(()) };
    let Some(first) = arguments.gguf.first() else { return Ok(()) };
    let intro = "Both models are in memory and take turns; the order changes from round to round. A ratio above 1 means that \
         pocketglm is faster: the ratio of the medians, and the median of the ratios of the rounds with the smallest \
         and the largest. Both keep keys and values in f16; llama.cpp runs with fused attention. The first token is that of a \
         prompt of 16 tokens, counted from the start of the process with a warm page cache. The limits are those of reading memory \
         and of byte dot products, measured between the rounds: where a share is above 100 %, neighbours on the machine left \
         more to the model than to that measurement, and it says no more than that the kernel is near the limit.";
    let same = arguments.gguf.iter().filter(|_| !arguments.own_only).map(|gguf| (gguf, gguf));
    let own = arguments.own.iter().map(|own| (own, first));
    for (at, (ours, theirs)) in same.chain(own).enumerate() {
        // One encoder is measured once.
        let mmproj = arguments.mmproj.as_deref().filter(|_| at == 0);
        let plan = Plan::new(arguments.rounds.max(1), arguments.deep, mmproj.map(|_| arguments.vision));
        let work = Work::new("pair")?;
        let model = if ours == theirs { alone(ours, mmproj, &work.0)? } else { ours.clone() };
        let threads = cpu.threads();
        let sides = (
            Side::ours(program, &model, threads, plan.context()),
            Side::theirs(peer, theirs, threads, plan.context(), mmproj),
        );
        let title = if ours == theirs {
            name(ours)
        } else {
            format!("{} against {} in llama.cpp", name(ours), name(theirs))
        };
        put(intro, &title, &table(cpu, &plan, &sides, &cost(&model)?)?)?;
    }
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The model in a folder of its own, with the vision file that is meant and no other beside it.
fn alone(model: &Path, mmproj: Option<&Path>, folder: &Path) -> Result<PathBuf> {
    let place = folder.join("model.gguf");
    link(model, &place)?;
    if let Some(mmproj) = mmproj {
        link(mmproj, &folder.join("mmproj.gguf"))?;
    }
    Ok(place)
}

/// A second name for a file; no byte is copied.
fn link(file: &Path, name: &Path) -> Result<()> {
    let file = file.canonicalize().map_err(io_error("find", file))?;
    let linked = std::fs::hard_link(&file, name);
    // Another file system has no second name for it.
    #[cfg(unix)]
    let linked = linked.or_else(|_| std::os::unix::fs::symlink(&file, name));
    linked.map_err(io_error("link", &file))
}

/// Whether it is our turn, first and second in a round.
fn turns(round: usize) -> [bool; 2] {
    if round.is_multiple_of(2) { [true, false] } else { [false, true] }
}

/// Seconds from the start of a process to the first token, and those of the same prefill when all is warm.
pub fn first_token(side: &Side, pause: Duration) -> Result<[f64; 2]> {
    sleep(pause);
    let mut resident = side.start()?;
    let request = format!("prefill {SHORT}");
    resident.ask(&request)?;
    let first = resident.age();
    let warm = (0..FEW).map(|_| resident.seconds(&request)).collect::<Result<Vec<f64>>>()?;
    Ok([first, median(warm)])
}

/// One thing that is measured.
struct Item {
    what: String,
    request: String,
    /// Tokens, or 0 where seconds are shown as they are.
    tokens: usize,
    rounds: usize,
    limit: Limit,
}

/// What an item is held against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// Byte dot products where the weights are quantised, f32 multiply-adds elsewhere.
    Operations,
    Bytes,
    None,
}

fn items(plan: &Plan) -> Vec<Item> {
    let few = plan.rounds.min(FEW);
    let mut items = vec![
        Item {
            what: format!("prefill of {}", plan.prefill),
            request: format!("prefill {}", plan.prefill),
            tokens: plan.prefill,
            rounds: plan.rounds,
            limit: Limit::Operations,
        },
        Item {
            what: format!("decode of {}", plan.decode),
            request: format!("decode {}", plan.decode),
            tokens: plan.decode,
            rounds: plan.rounds,
            limit: Limit::Bytes,
        },
    ];
    if let Some((n, depth)) = plan.deep {
        items.push(Item {
            what: format!("decode of {n} behind {depth}"),
            request: format!("decode {n} {depth}"),
            tokens: n,
            rounds: few,
            // The cache is read as well, in another format on each side.
            limit: Limit::None,
        });
    }
    if let Some((width, height)) = plan.vision {
        items.push(Item {
            what: format!("vision encoder, {width}x{height}"),
            request: format!("vision {width} {height}"),
            tokens: 0,
            rounds: few,
            limit: Limit::None,
        });
    }
    items
}

/// Everything about one pair.
pub fn table(cpu: &Cpu, plan: &Plan, (ours, theirs): &(Side, Side), cost: &Cost) -> Result<String> {
    let (mut started, mut warm) = (Sides::default(), Sides::default());
    for round in 0..=plan.rounds.min(FEW) {
        for our_turn in turns(round) {
            let [first, pure] = first_token(if our_turn { ours } else { theirs }, plan.pause)?;
            // The first round warms the page cache.
            if round > 0 {
                started.push(our_turn, first);
                warm.push(our_turn, pure);
            }
        }
    }
    let (mut ours, mut theirs) = (ours.start()?, theirs.start()?);
    let mut text = facts(&theirs.facts);
    text.push_str("| what | pocketglm | llama.cpp | ratio | by round | of the limit |\n| --- | --- | --- | --- | --- | --- |\n");
    let buffer = peak::read_buffer(plan.limits.1)?;
    for item in items(plan) {
        // Pages are touched for the first time, and a deep context is computed.
        ours.ask(&item.request)?;
        // A picture takes llama.cpp minutes, of which the first touch is a small part.
        if item.tokens > 0 {
            theirs.ask(&item.request)?;
        }
        let (mut sides, mut limits) = (Sides::default(), Vec::new());
        for round in 0..item.rounds {
            for our_turn in turns(round) {
                sleep(plan.pause);
                if our_turn {
                    limits.push(match item.limit {
                        Limit::Operations if cost.is_quantised() => peak::dot_gops(cpu, plan.limits.0),
                        Limit::Operations => peak::fma_gflops(cpu, plan.limits.0),
                        Limit::Bytes => peak::read_gbytes(cpu, &buffer),
                        Limit::None => 0.0,
                    });
                    sides.push(true, ours.seconds(&item.request)?);
                } else {
                    sides.push(false, theirs.seconds(&item.request)?);
                }
            }
        }
        text.push_str(&row(&item, &sides, median(limits), cost));
    }
    let seconds = |item: &str| Item {
        what: item.to_owned(),
        request: String::new(),
        tokens: 0,
        rounds: 0,
        limit: Limit::None,
    };
    text.push_str(&row(&seconds(&format!("start to first token of {SHORT}")), &started, 0.0, cost));
    text.push_str(&row(&seconds(&format!("prefill of {SHORT} alone")), &warm, 0.0, cost));
    let over = |started: &[f64], warm: &[f64]| median(started.to_vec()) / median(warm.to_vec());
    let _ = writeln!(
        text,
        "\nStart to first token over the prefill alone: pocketglm {:.2}, llama.cpp {:.2}.",
        over(&started.ours, &warm.ours),
        over(&started.theirs, &warm.theirs)
    );
    Ok(text)
}

/// What the peer says about itself and the model.
fn facts(peer: &Value) -> String {
    let word = |name: &str| match &peer[name] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let bytes = peer["model_bytes"].as_f64().unwrap_or(0.0);
    format!(
        "{} {} ({}), {} threads, fused attention {}, keys and values {}; the model: {}, {:.2} GB.\n\n",
        word("peer"),
        word("version"),
        word("package"),
        word("threads"),
        word("flash_attn"),
        word("kv"),
        word("model"),
        bytes / 1e9
    )
}

fn row(item: &Item, sides: &Sides, limit: f64, cost: &Cost) -> String {
    let (ours, theirs) = (median(sides.ours.clone()), median(sides.theirs.clone()));
    let rate = |seconds: f64| match item.tokens {
        0 => format!("{seconds:.3} s"),
        n => format!("{:.2} tokens/s", n as f64 / seconds),
    };
    let rates = item.tokens as f64 / ours / 1e9;
    let share = match item.limit {
        Limit::Operations => {
            format!("{:.0} % of {limit:.0} GOP/s", 100.0 * rates * 2.0 * cost.prefill / limit)
        }
        Limit::Bytes => format!("{:.0} % of {limit:.1} GB/s", 100.0 * rates * cost.read / limit),
        Limit::None => String::new(),
    };
    let [middle, low, high] = sides.by_round();
    format!(
        "| {} | {} | {} | {:.2} | {middle:.2} ({low:.2} to {high:.2}) | {share} |\n",
        item.what,
        rate(ours),
        rate(theirs),
        sides.ratio()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::models::build_program;
    use crate::repo;

    #[test]
    fn a_share_of_the_limit_counts_what_a_token_costs() {
        let cost = Cost { layers: 1e9, prefill: 1e9, layer_bytes: 5e8, read: 5e8 };
        let plan = Plan::new(3, 0, None);
        let [prefill, decode] = &items(&plan)[..] else { panic!("two items without depth and picture") };
        let sides = |ours: f64| Sides { ours: vec![ours; 3], theirs: vec![2.0 * ours; 3] };
        // 512 tokens of 2e9 operations in 2 s are 512e9 a second; 64 tokens of 0.5e9 bytes in 4 s are 8e9.
        let text = row(prefill, &sides(2.0), 1024.0, &cost);
        assert_eq!(
            text,
            "| prefill of 512 | 256.00 tokens/s | 128.00 tokens/s | 2.00 | 2.00 (2.00 to 2.00) | 50 % of 1024 GOP/s |\n"
        );
        let text = row(decode, &sides(4.0), 10.0, &cost);
        assert!(text.ends_with("| 80 % of 10.0 GB/s |\n"), "{text}");
    }

    #[test]
    fn every_second_round_begins_with_the_peer() {
        assert_eq!([turns(0), turns(1), turns(2)], [[true, false], [false, true], [true, false]]);
    }

    /// The program stands on both sides, so that no other one is needed.
    #[test]
    fn two_resident_models_take_turns() {
        let program = build_program().unwrap();
        let work = Work::new("test-pair").unwrap();
        let golden = repo::root().join("tests/golden/gguf");
        let model = alone(&golden.join("text.gguf"), Some(&golden.join("mmproj.gguf")), &work.0).unwrap();
        let plan = Plan {
            rounds: 2,
            prefill: 24,
            decode: 4,
            deep: Some((3, 40)),
            vision: Some((56, 56)),
            limits: (1, 1 << 20),
            pause: Duration::ZERO,
        };
        let side = || Side::ours(&program, &model, 1, plan.context());
        let text = table(&Cpu::new(1).unwrap(), &plan, &(side(), side()), &cost(&model).unwrap()).unwrap();
        for what in
            ["prefill of 24", "decode of 4 ", "decode of 3 behind 40", "vision", "first token", "alone"]
        {
            assert_eq!(
                text.lines().filter(|l| l.contains(what) && l.starts_with('|')).count(),
                1,
                "{what}: {text}"
            );
        }
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");

        let missing = Side::ours(&program, Path::new("no-such-model"), 1, 100);
        let error = table(&Cpu::new(1).unwrap(), &plan, &(side(), missing), &cost(&model).unwrap());
        assert!(error.unwrap_err().to_string().contains("no-such-model"));
    }
}
