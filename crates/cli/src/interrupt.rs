//! Ctrl-C: the first one cancels the answer that is being made, within a token; any other one ends the program.

use std::sync::{Arc, Mutex, PoisonError};

use pocketglm::Cancel;

use crate::failure::Failure;
use crate::output::complain;
use crate::progress::Bars;

/// Exit status of a program that an interrupt ended, by convention 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// The switch of the running answer, shared with the signal handler.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<Option<Cancel>>>);

impl Interrupt {
    /// Installs the handler. Once per process. Where `bars` are shown, so is that an answer is being stopped:
    /// a picture or a prefill step that runs comes to its end first.
    pub fn install(bars: &Bars) -> Result<Interrupt, Failure> {
        let interrupt = Interrupt::default();
        let (handler, bars) = (interrupt.clone(), bars.clone());
        ctrlc::set_handler(move || {
            let cancelled = handler.cancel();
            bars.clear();
            if !cancelled {
                std::process::exit(i32::from(INTERRUPTED));
            }
            if bars.are_shown() {
                complain("\nstopping; Ctrl-C again ends the program");
            }
        })
        .map_err(Failure::Signal)?;
        Ok(interrupt)
    }

    /// An answer begins: the next Ctrl-C cancels it.
    pub fn begin(&self) -> Cancel {
        let cancel = Cancel::default();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(cancel.clone());
        cancel
    }

    /// The answer has ended: the next Ctrl-C ends the program.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Cancels the running answer, once. False where none is running or it was cancelled already.
    fn cancel(&self) -> bool {
        let running = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        running.is_some_and(|cancel| {
            cancel.cancel();
            true
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_cancelled_once_and_only_while_it_runs() {
        let interrupt = Interrupt::default();
        assert!(!interrupt.cancel());
        let first = interrupt.begin();
        assert!(interrupt.cancel() && first.is_cancelled());
        assert!(!interrupt.cancel());
        let second = interrupt.begin();
        interrupt.end();
        assert!(!interrupt.cancel() && !second.is_cancelled());
    }
}
