//! From a checkpoint to a quantised one, and how much of it is lost on the way.
//!
//! Start at [`Quantiser::open`] with a [`Policy`]; [`calibrate`] gathers what the better methods need to know of a
//! model's activations in a [`CalibrationTable`], and [`evaluate`] compares the result with the original. A [`Simulation`]
//! shows what a policy would do without writing a file.
//!
//! Invariant: nothing is quantised, twice or in another format than asked for, without the [`QuantPlan`] saying so.

mod calibrate;
mod convert;
mod evaluate;
mod forward;
mod gguf;
mod kv_scales;
mod maker;
mod plan;
mod policy;
mod rotate;
mod samples;
mod simulate;
mod subject;
mod table;
mod verify;

pub use calibrate::{CalibrateOptions, Calibrated, calibrate};
pub use convert::{QuantiseOptions, Quantiser};
pub use evaluate::{EvalOptions, Evaluation, PictureDifference, Reference, evaluate};
pub use plan::{QuantPlan, TensorPlan};
pub use policy::{BUILT_IN, Format, Method, Policy, Rule};
pub use samples::{Sample, Samples};
pub(crate) use simulate::Precisions;
pub use simulate::Simulation;
pub use table::CalibrationTable;
pub use verify::{Verified, verify_model};
