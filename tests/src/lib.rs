//! Tests across the crates: what a user of the facade sees, against the reference implementation's numbers.
//!
//! Each module is one kind of behaviour. This crate knows nothing of private items: it uses the facade alone.
//! Start at [`golden`], which finds the golden files.
//!
//! Invariant: a comparison counts what it compared, so that a test cannot pass because nothing ran.

#![forbid(unsafe_code)]

pub mod golden;

#[cfg(test)]
mod checkpoints;
#[cfg(test)]
mod conversation;
#[cfg(test)]
mod generation;
#[cfg(test)]
mod gguf;
#[cfg(test)]
mod gpu;
#[cfg(test)]
mod gpu_hybrid;
#[cfg(test)]
mod hear;
#[cfg(test)]
mod kv;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod parity;
#[cfg(test)]
mod pictures;
#[cfg(test)]
mod precision;
#[cfg(test)]
mod quantise;
#[cfg(test)]
mod rotation;
#[cfg(test)]
mod senses;
#[cfg(test)]
mod support;
#[cfg(test)]
mod templates;
