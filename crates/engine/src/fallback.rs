//! The programs of an engine, and those that replace them when a device fails.

use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pocketglm_graph::{Backend, Program};
use pocketglm_tensor::WeightSource;

use crate::engine::Inner;
use crate::plan::plan;
use crate::{Engine, Error, Fallback, Result};

/// The decoder's program: the one that the engine began with, or the one on the processor that replaced it.
pub(crate) struct Decoder {
    first: Box<dyn Program>,
    second: OnceLock<Box<dyn Program>>,
}

impl Decoder {
    pub fn new(first: Box<dyn Program>) -> Decoder {
        Decoder { first, second: OnceLock::new() }
    }
}

impl Deref for Decoder {
    type Target = dyn Program;

    fn deref(&self) -> &(dyn Program + 'static) {
        &**self.second.get().unwrap_or(&self.first)
    }
}

/// A program that is compiled when it is first needed, and its replacement.
#[derive(Default)]
pub(crate) struct Encoder {
    first: OnceLock<Box<dyn Program>>,
    second: OnceLock<Box<dyn Program>>,
}

impl Encoder {
    /// The program, if it was compiled.
    pub fn get(&self) -> Option<&dyn Program> {
        self.second.get().or_else(|| self.first.get()).map(|p| &**p)
    }

    /// The program for `backend`, or the processor's one where the engine has moved there.
    pub fn compiled(
        &self,
        engine: &Engine,
        backend: &Arc<dyn Backend>,
        graph: &pocketglm_graph::Graph,
        weights: Arc<dyn WeightSource>,
    ) -> Result<&dyn Program> {
        let (place, backend) = match engine.has_moved() {
            true => (&self.second, &engine.inner.devices.cpu),
            false => (&self.first, backend),
        };
        if let Some(program) = place.get() {
            return Ok(&**program);
        }
        let program = backend.compile(graph, weights)?;
        // Another thread may have been faster; its program is as good.
        Ok(&**place.get_or_init(|| program))
    }
}

/// Whether and why an engine left its device.
#[derive(Default)]
pub(crate) struct Move {
    why: OnceLock<String>,
    /// Held while the replacement is compiled, so that it happens once.
    under_way: Mutex<()>,
}

impl Move {
    /// An engine that began on the processor because its device failed before.
    pub fn made(why: String) -> Move {
        Move { why: OnceLock::from(why), under_way: Mutex::default() }
    }
}

impl Engine {
    /// Whether the engine left its device for the processor.
    pub(crate) fn has_moved(&self) -> bool {
        self.inner.moved.why.get().is_some()
    }

    /// What made the engine leave its device for the processor, if it did: see [`Fallback::Cpu`].
    pub fn device_failure(&self) -> Option<&str> {
        self.inner.moved.why.get().map(String::as_str)
    }

    /// Whether the engine's options want the work that ended in `error` to go on with the processor.
    pub(crate) fn may_move(&self, error: &Error) -> bool {
        self.inner.options.fallback == Fallback::Cpu && !self.has_moved() && error.device_fault().is_some()
    }

    /// Makes the processor run everything from now on.
    ///
    /// # Errors
    /// [`Error::Budget`] where that needs more memory than the options allow, and what compiling reports.
    pub(crate) fn move_to_cpu(&self, why: &Error) -> Result<()> {
        let inner: &Inner = &self.inner;
        // Nothing is left half done by a panic: the programs are set whole.
        let _guard = inner.moved.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if self.has_moved() {
            return Ok(());
        }
        inner.options.report("move to the processor", 0, 1);
        let model = &inner.model;
        if inner.options.memory.is_some() {
            let devices = crate::placement::Devices::only(inner.devices.cpu.clone());
            plan(model, &devices, &crate::engine::text_size(model, &inner.options))?
                .check(inner.options.memory)?;
        }
        if inner.decoder.second.get().is_none() {
            let program = inner.devices.cpu.compile(&model.decoder, model.weights.clone())?;
            let _ = inner.decoder.second.set(program);
        }
        let _ = inner.moved.why.set(why.to_string());
        inner.options.report("move to the processor", 1, 1);
        Ok(())
    }
}
