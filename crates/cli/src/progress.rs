//! Progress bars on a terminal while loading, encoding pictures and reading the prompt.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use pocketglm::{Progress, ProgressFn};

/// The bar of the step that runs now. Without a terminal, or when the user wants quiet, there is none.
#[derive(Clone)]
pub struct Bars {
    current: Option<Arc<Mutex<Option<Bar>>>>,
}

struct Bar {
    step: &'static str,
    bar: ProgressBar,
}

impl Bars {
    /// Bars on stderr, if it is a terminal and `quiet` is not set.
    pub fn new(quiet: bool) -> Bars {
        let shown = !quiet && std::io::stderr().is_terminal();
        Bars { current: shown.then(|| Arc::new(Mutex::new(None))) }
    }

    /// Whether a user sees bars.
    pub fn are_shown(&self) -> bool {
        self.current.is_some()
    }

    /// What the engine calls.
    pub fn hook(&self) -> Option<ProgressFn> {
        let current = self.current.clone()?;
        Some(Arc::new(move |progress| {
            let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
            update(&mut current, progress);
        }))
    }

    /// Takes the bar off the screen, before something else is written.
    pub fn clear(&self) {
        if let Some(current) = &self.current {
            let bar = current.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Bar { bar, .. }) = bar {
                bar.finish_and_clear();
            }
        }
    }
}

/// The bar of one long piece of work, with the time that is left. Without a terminal, or in quiet, there is none.
#[derive(Clone)]
pub struct Work {
    bar: Option<ProgressBar>,
}

impl Work {
    /// A bar that counts bytes, or whole units.
    pub fn new(quiet: bool, counts_bytes: bool) -> Work {
        if quiet || !std::io::stderr().is_terminal() {
            return Work { bar: None };
        }
        let counts = if counts_bytes { "{bytes}/{total_bytes} {bytes_per_sec}" } else { "{pos}/{len}" };
        let template = format!("{{spinner}} {{msg}} [{{bar:30}}] {counts}, {{eta}} left");
        let style = ProgressStyle::with_template(&template)
            .map(|s| s.progress_chars("=> "))
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::no_length().with_finish(ProgressFinish::AndClear);
        bar.set_style(style);
        bar.enable_steady_tick(Duration::from_millis(120));
        Work { bar: Some(bar) }
    }

    /// What the engine calls. Loading takes a moment, so it is not shown.
    pub fn hook(&self) -> Option<ProgressFn> {
        let bar = self.bar.clone()?;
        Some(Arc::new(move |progress: Progress| {
            if matches!(progress.step, "quantise" | "calibrate" | "compare" | "verify") {
                if bar.message() != progress.step {
                    // The time that is left is that of this step.
                    bar.reset();
                }
                bar.set_message(progress.step);
                bar.set_length(progress.total as u64);
                bar.set_position(progress.done as u64);
            }
        }))
    }

    /// Takes the bar off the screen.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn update(current: &mut Option<Bar>, progress: Progress) {
    if current.as_ref().is_some_and(|c| c.step != progress.step || progress.done >= progress.total)
        && let Some(Bar { bar, .. }) = current.take()
    {
        bar.finish_and_clear();
    }
    if progress.done >= progress.total {
        return;
    }
    let bar = current.get_or_insert_with(|| Bar { step: progress.step, bar: new_bar(&progress) });
    bar.bar.set_length(progress.total as u64);
    bar.bar.set_position(progress.done as u64);
}

fn new_bar(progress: &Progress) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {pos}/{len} {elapsed}")
        .map(|s| s.progress_chars("=> "))
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(progress.total as u64).with_finish(ProgressFinish::AndClear);
    bar.set_style(style);
    bar.set_message(progress.step);
    // One picture or one prefill step may take long: the clock shows that work goes on.
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_lives_as_long_as_its_step() {
        let mut current = None;
        let mut at = |step, done, total| {
            update(&mut current, Progress { step, done, total });
            current.as_ref().map(|c| (c.step, c.bar.position()))
        };
        assert_eq!(at("load", 0, 5), Some(("load", 0)));
        assert_eq!(at("load", 3, 5), Some(("load", 3)));
        assert_eq!(at("load", 5, 5), None);
        assert_eq!(at("encode pictures", 0, 1), Some(("encode pictures", 0)));
        assert_eq!(at("read prompt", 0, 9), Some(("read prompt", 0)));
        assert_eq!(at("read prompt", 9, 9), None);
    }

    #[test]
    fn quiet_has_no_bars() {
        assert!(Bars::new(true).hook().is_none());
    }
}
