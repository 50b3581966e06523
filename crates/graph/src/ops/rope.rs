//! Rotary position embedding (Su et al. 2021) over one or several position axes.

use pocketglm_tensor::ops as kernels;
pub use pocketglm_tensor::ops::RopeLayout;

use super::{Call, OpDef, count, operands, shape_error};
use crate::graph::Meta;
use crate::{Error, Result};

/// Angles of every token: `positions [axes, t]` to `[t, 2·len(axis_of_frequency)]`, cosines then sines.
///
/// `angle_j = positions[axis_of_frequency[j]] * theta^(-2·(j mod period)/(2·period))`.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Base of the frequencies.
    pub theta: f32,
    /// The position axis that each rotated pair follows.
    pub axis_of_frequency: Vec<u8>,
    /// Number of distinct frequencies; the exponent starts again after this many pairs.
    pub period: usize,
}

impl OpDef for RopeTable {
    fn name(&self) -> &'static str {
        "rope_table"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [positions] = operands::<1>("rope_table", inputs)?;
        let axes = positions.shape.first().and_then(|d| d.as_fixed()).unwrap_or(0);
        if positions.shape.len() != 2
            || self.axis_of_frequency.iter().any(|&a| usize::from(a) >= axes)
            || self.period == 0
        {
            return Err(shape_error("rope_table", "positions [axes, t] for every axis used", inputs));
        }
        let width = 2 * self.axis_of_frequency.len();
        Ok(vec![Meta::f32(vec![positions.shape[1].clone(), width.into()])])
    }
    fn operations(&self, _: &[Vec<usize>], outputs: &[Vec<usize>]) -> f64 {
        20.0 * count(&outputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let positions = call.i32("rope_table", 0)?;
        let &[axes, t] = call.shape("rope_table", 0)? else { return Ok(()) };
        self.compute(positions, [axes, t], call.output("rope_table", 0)?)
    }
}

impl RopeTable {
    /// The table `y` for `positions [axes, t]`. Sines of large angles need more digits than a GPU's have, so other
    /// backends call this too.
    ///
    /// # Errors
    /// Frequencies that do not come in whole runs, or of axes that are not there.
    pub fn compute(&self, positions: &[i32], [axes, t]: [usize; 2], y: &mut [f32]) -> Result<()> {
        let pairs = self.axis_of_frequency.len();
        // One table for each run of frequencies; its cosines and sines go to their columns of the result.
        let mut run = vec![0.0; t * 2 * self.period];
        for (i, axes_used) in self.axis_of_frequency.chunks(self.period).enumerate() {
            let (r, at) = (2 * axes_used.len(), i * self.period);
            if axes_used.len() != self.period || axes_used.iter().any(|&a| usize::from(a) >= axes) {
                return Err(Error::Shape {
                    op: "rope_table",
                    wanted: format!("whole runs of {} frequencies over {axes} axes", self.period),
                    found: format!("{:?}", self.axis_of_frequency),
                });
            }
            kernels::rope_table(positions, t, axes_used, self.theta, r, &mut run)?;
            for (from, to) in run.chunks_exact(r).zip(y.chunks_exact_mut(2 * pairs)) {
                to[at..at + r / 2].copy_from_slice(&from[..r / 2]);
                to[pairs + at..pairs + at + r / 2].copy_from_slice(&from[r / 2..]);
            }
        }
        Ok(())
    }
}

/// Rotates the first components of each head: `x [t, h, d]`, `table [t, r]` to `[t, h, d]`.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Which components form a pair.
    pub layout: RopeLayout,
}

impl OpDef for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, table] = operands::<2>("rope", inputs)?;
        let ok = match (x.shape.as_slice(), table.shape.as_slice()) {
            ([t, _, d], [tt, r]) => {
                t == tt && matches!((d.as_fixed(), r.as_fixed()), (Some(d), Some(r)) if r <= d)
            }
            _ => false,
        };
        if !ok {
            return Err(shape_error("rope", "x [t, h, d] and table [t, r] with r <= d", inputs));
        }
        Ok(vec![Meta::f32(x.shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        3.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let (x, table) = (call.f32("rope", 0)?, call.f32("rope", 1)?);
        let &[t, h, d] = call.shape("rope", 0)? else { return Ok(()) };
        let r = call.shape("rope", 1)?.last().copied().unwrap_or(0);
        let cpu = call.cpu;
        let y = call.output("rope", 0)?;
        y.copy_from_slice(x);
        Ok(kernels::rope_in_place(cpu, y, h * d, [t, h, d], table, r, self.layout)?)
    }
}
