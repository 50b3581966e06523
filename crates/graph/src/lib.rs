//! The graph that a model builds, the passes that rewrite it, the memory plan, and the CPU backend.
//!
//! Start at [`GraphBuilder`]: a model is a function that appends nodes. [`passes::optimise`] fuses them,
//! [`Plan`] gives each intermediate a place, and a [`Backend`] makes a [`Program`] of the result.
//!
//! This crate knows nothing of models, tokens, files or GPUs.
//!
//! Invariants: nodes stand in topological order; the shape of every value was checked by its op when the node
//! was made; a pass changes neither the named results nor the states of a graph.

#![forbid(unsafe_code)]

mod backend;
mod builder;
mod cpu;
mod dim;
mod error;
mod graph;
pub mod ops;
pub mod passes;
mod plan;
mod stages;

pub use backend::{
    Arithmetic, Backend, InputData, Inputs, OpProfile, Output, Outputs, PlacedMemory, Program, ProgramMemory,
    ProgramState, RunProfile, Running,
};
pub use builder::GraphBuilder;
pub use cpu::{CpuBackend, load_time_values, plan_memory, widened_weight};
pub use dim::{Bindings, Dim, eval_shape, product};
pub use error::{DeviceFault, Error};
pub use graph::{Graph, Meta, Node, Value};
pub use plan::{Plan, Scratch};
pub use stages::{StageOf, StagedBackend};

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod quantised_tests;
