//! What can go wrong in the program, and how it is told.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use pocketglm::MemoryPlan;

use crate::output::{bytes, complain, one_line, plan_table};

/// Why a command ended without its result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] pocketglm::Error),
    /// A tensor would be quantised twice.
    #[error("{0} (--force-requantise allows it)")]
    Twice(#[source] pocketglm::Error),
    /// The memory plan does not fit `--memory`.
    #[error("the plan needs {}, --memory allows {}", bytes(plan.total()), bytes(*budget))]
    Budget {
        /// The plan, printed as a table before the error.
        plan: Box<MemoryPlan>,
        /// Bytes allowed.
        budget: u64,
        /// Whether the table has been printed already.
        shown: bool,
    },
    /// Standard output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[source] io::Error),
    /// Standard input cannot be read.
    #[error("cannot read standard input: {0}")]
    Input(#[source] io::Error),
    /// Standard input holds more than its cap.
    #[error("standard input has more than {limit} bytes")]
    InputSize {
        /// The cap.
        limit: u64,
    },
    /// The line editor failed.
    #[error("cannot read a line: {0}")]
    Line(#[source] rustyline::error::ReadlineError),
    /// A picture named in a chat is not there.
    #[error("{path}: not a file")]
    NoPicture {
        /// The path as given.
        path: String,
    },
    /// The handler of Ctrl-C cannot be installed.
    #[error("cannot handle Ctrl-C: {0}")]
    Signal(#[source] ctrlc::Error),
    /// A file whose name does not say what it is to be.
    #[error("{path}: the name ends in neither .pglm nor .gguf; say which it is to be (--to)")]
    FileKind {
        /// The file.
        path: PathBuf,
    },
    /// A vision file beside a file that has the vision encoder in it.
    #[error(
        "{path} is not written: only GGUF has a vision file of its own (--mmproj-out), a .pglm file holds everything"
    )]
    VisionFile {
        /// The file.
        path: PathBuf,
    },
    /// A chart cannot be drawn.
    #[error("cannot draw the chart: {0}")]
    Plot(String),
    /// The vocabulary has nothing but special tokens.
    #[error("the tokenizer has no ordinary token to make a prompt of")]
    NoOrdinaryToken,
    /// A picture to be made up that is larger than any screen.
    #[error("a screen of {width}x{height} was asked for, at most {limit} pixels are made up")]
    ScreenSize {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
        /// The cap.
        limit: u64,
    },
    /// A measured run was not the run that was asked for.
    #[error("a run of {wanted} tokens was asked for, {found} were run")]
    NotMeasured {
        /// Tokens asked for.
        wanted: usize,
        /// Tokens that were run.
        found: usize,
    },
    /// A line on standard input that is no request.
    #[error(
        "{line:?} is no request; send `prefill N [DEPTH]`, `decode N [DEPTH]`, `vision WIDTH HEIGHT` or `quit`"
    )]
    BenchRequest {
        /// The line's beginning.
        line: String,
    },
}

impl Failure {
    /// Whether the reader of stdout went away, which is no error.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Failure::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Tells the user: one line for the error and one for each cause that the line does not name yet.
    pub fn report(&self) {
        if let Failure::Budget { plan, shown: false, .. } = self {
            complain(&plan_table(plan));
        }
        let mut said = self.to_string();
        complain(&format!("error: {}", one_line(&said)));
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                complain(&format!("  caused by: {}", one_line(&text)));
                said = text;
            }
            cause = error.source();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_that_went_away_is_a_broken_pipe() {
        assert!(Failure::Output(io::ErrorKind::BrokenPipe.into()).is_broken_pipe());
        assert!(!Failure::Output(io::ErrorKind::StorageFull.into()).is_broken_pipe());
        assert!(!Failure::Input(io::ErrorKind::BrokenPipe.into()).is_broken_pipe());
    }

    #[test]
    fn a_refused_plan_names_both_figures() {
        let plan = MemoryPlan { parts: vec![], context: 0, patches: 0, placement: None };
        let text = Failure::Budget { plan: Box::new(plan), budget: 2048, shown: true }.to_string();
        assert_eq!(text, "the plan needs 0 bytes, --memory allows 2.00 KiB (2,048 bytes)");
    }
}
