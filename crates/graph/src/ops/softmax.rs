//! `y[.., :] = exp(x - max) / sum(exp(x - max))` over the columns that the mask admits; 0 elsewhere.

use pocketglm_tensor::ops as kernels;

use super::{Call, OpDef, count, shape_error};
use crate::Result;
use crate::dim::Dim;
use crate::graph::Meta;

/// Softmax over the last dimension of `[b, t, s]`.
#[derive(Clone, Debug)]
pub struct Softmax {
    /// Which columns a row sees.
    pub mask: SoftmaxMask,
}

/// Which columns a row of attention scores sees.
#[derive(Clone, Debug, PartialEq)]
pub enum SoftmaxMask {
    /// Row `i` sees the columns `0 ..= past + i`.
    Causal {
        /// Columns before the first row's own.
        past: Dim,
    },
    /// Row `i` sees the columns of its own segment; operand 1 holds the boundaries `[0, .., t]`.
    Segments,
}

impl OpDef for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }
    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let ok = match (&self.mask, inputs) {
            (SoftmaxMask::Causal { past }, [x]) => {
                x.shape.len() == 3 && x.shape[2] == x.shape[1].clone() + past.clone()
            }
            (SoftmaxMask::Segments, [x, segments]) => {
                x.shape.len() == 3 && x.shape[1] == x.shape[2] && segments.shape.len() == 1
            }
            _ => false,
        };
        if !ok {
            return Err(shape_error("softmax", "scores [b, t, past + t], or [b, t, t] and segments", inputs));
        }
        Ok(vec![Meta::f32(inputs[0].shape.clone())])
    }
    fn operations(&self, inputs: &[Vec<usize>], _: &[Vec<usize>]) -> f64 {
        4.0 * count(&inputs[0])
    }
    fn run(&self, call: &mut Call<'_, '_>) -> Result<()> {
        let x = call.f32("softmax", 0)?;
        let &[b, t, s] = call.shape("softmax", 0)? else { return Ok(()) };
        match &self.mask {
            SoftmaxMask::Causal { past } => {
                let past = past.eval(call.bindings)?;
                Ok(kernels::softmax_causal(call.cpu, x, [b, t, s], past, call.output("softmax", 0)?)?)
            }
            SoftmaxMask::Segments => {
                let segments = super::attention::boundaries(call.i32("softmax", 1)?, t)?;
                let cpu = call.cpu;
                let y = call.output("softmax", 0)?;
                y.fill(0.0);
                for pair in segments.windows(2) {
                    let (from, to) = (pair[0] as usize, pair[1] as usize);
                    for row in (0..b).flat_map(|i| (from..to).map(move |j| i * t + j)) {
                        let at = row * s + from..row * s + to;
                        kernels::softmax(cpu, &x[at.clone()], to - from, &mut y[at])?;
                    }
                }
                Ok(())
            }
        }
    }
}
