//! The rows of a quantised model, made on whichever thread asks for them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pocketglm_checkpoint::{RowMaker, system_memory};
use pocketglm_quant::{quantise_codes, quantise_row, take_apart};
use pocketglm_tensor::{RowCodes, Tensor};

use super::convert::{Prepared, Quantiser, Rows};
use super::plan::TensorPlan;
use crate::{Error, Result};

/// Gives [`PglmWriter::write_together`](pocketglm_checkpoint::PglmWriter::write_together) the rows of all tensors. A
/// tensor is open from its first row to its last one.
pub(super) struct Maker<'a> {
    of: &'a Quantiser,
    open: Vec<Mutex<Open<'a>>>,
    /// Bytes that were read.
    done: Mutex<u64>,
    /// Whether the model would fill most of the system's cache: then what was read goes out of it, and what is written stays.
    outgrows: bool,
}

#[derive(Default)]
struct Open<'a> {
    prepared: Option<Arc<Prepared<'a>>>,
    written: usize,
}

impl<'a> Maker<'a> {
    pub fn new(of: &'a Quantiser) -> Maker<'a> {
        let open = of.plan().tensors.iter().map(|_| Mutex::default()).collect();
        let read = of.plan().bytes_before();
        let outgrows = system_memory().is_some_and(|memory| read > memory / 2);
        Maker { of, open, done: Mutex::new(0), outgrows }
    }

    /// Bytes that were read.
    pub fn done(&self) -> u64 {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of a tensor whose rows were all written.
    fn leave(&self, prepared: Option<Arc<Prepared<'_>>>) {
        let Some(Prepared::Rows(_, tensor) | Prepared::Copy(tensor)) = prepared.as_deref() else { return };
        match self.outgrows {
            true => tensor.shared_bytes().forget(),
            false => tensor.shared_bytes().release(),
        }
    }

    /// A tensor of the plan, with the lock that is its own.
    fn find(&self, name: &str) -> Result<(&'a TensorPlan, &Mutex<Open<'a>>)> {
        let i = self.of.index(name);
        let found = i.and_then(|i| Some((self.of.plan().tensors.get(i)?, self.open.get(i)?)));
        let missing = || pocketglm_tensor::Error::Missing { name: name.to_owned(), place: "the plan".into() };
        Ok(found.ok_or_else(missing)?)
    }

    fn prepared(&self, name: &str) -> Result<(&'a TensorPlan, Arc<Prepared<'a>>)> {
        let (plan, open) = self.find(name)?;
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        let prepared = match &open.prepared {
            Some(prepared) => prepared.clone(),
            None => open.prepared.insert(Arc::new(self.of.prepare(plan)?)).clone(),
        };
        Ok((plan, prepared))
    }
}

/// Values of a row, and rows.
fn sizes(plan: &TensorPlan) -> (usize, usize) {
    let k = plan.shape.last().copied().unwrap_or(1);
    (k, plan.shape.iter().rev().skip(1).product())
}

/// The stored bytes of a row.
fn stored(tensor: &Tensor, row_bytes: usize, row: usize) -> &[u8] {
    tensor.bytes().get(row * row_bytes..(row + 1) * row_bytes).unwrap_or_default()
}

/// Some rows of a tensor.
fn part(tensor: &Tensor, row_bytes: usize, k: usize, rows: &Range<usize>) -> Result<Tensor> {
    let bytes = tensor.shared_bytes().slice(rows.start * row_bytes..rows.end * row_bytes);
    Ok(Tensor::new(tensor.dtype(), &[rows.len(), k], bytes.unwrap_or_else(|| Vec::new().into()))?)
}

/// Calls `each` with the number and the values of every row.
fn each_row(
    rows: &Rows<'_>,
    tensor: &Tensor,
    range: Range<usize>,
    each: &mut dyn FnMut(usize, &[f32]) -> pocketglm_quant::Result<()>,
) -> Result<()> {
    let mut values = vec![0.0; rows.k];
    for row in range {
        let bytes = stored(tensor, rows.stored, row);
        rows.values(row, bytes, &mut values)
            .and_then(|()| each(row, &values))
            .map_err(|source| rows.failed(row, source))?;
    }
    Ok(())
}

impl RowMaker for Maker<'_> {
    type Error = Error;

    fn rows(&self, tensor: &str, range: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        self.of.check_cancelled()?;
        let (plan, prepared) = self.prepared(tensor)?;
        let (k, _) = sizes(plan);
        let row_bytes = plan.to.row_bytes(k).unwrap_or(0);
        let bytes = match &*prepared {
            Prepared::Bytes(bytes) => bytes.as_slice(),
            Prepared::Copy(tensor) => {
                let rows = part(tensor, row_bytes, k, &range)?;
                self.of.check_copied(&plan.name, range.start, &rows)?;
                out.extend_from_slice(rows.bytes());
                return Ok(());
            }
            Prepared::Rows(rows, tensor) => {
                let options = rows.options();
                return each_row(rows, tensor, range, &mut |_, values| {
                    quantise_row(plan.to, values, &options, out)
                });
            }
        };
        out.extend_from_slice(bytes.get(range.start * row_bytes..range.end * row_bytes).unwrap_or_default());
        Ok(())
    }

    fn codes(&self, tensor: &str, first: usize, out: &mut [RowCodes]) -> Result<()> {
        self.of.check_cancelled()?;
        let (plan, prepared) = self.prepared(tensor)?;
        let (k, _) = sizes(plan);
        match &*prepared {
            Prepared::Rows(rows, tensor) => {
                let options = rows.options();
                each_row(rows, tensor, first..first + out.len(), &mut |row, values| {
                    let Some(codes) = out.get_mut(row - first) else { return Ok(()) };
                    quantise_codes(plan.to, values, &options, codes)
                })
            }
            Prepared::Copy(tensor) => {
                let row_bytes = plan.to.row_bytes(k).unwrap_or(0);
                let rows = part(tensor, row_bytes, k, &(first..first + out.len()))?;
                self.of.check_copied(&plan.name, first, &rows)?;
                for (row, codes) in (first..).zip(out) {
                    take_apart(plan.to, stored(tensor, row_bytes, row), k, codes)
                        .map_err(|e| self.of.failed(&plan.name, row, e))?;
                }
                Ok(())
            }
            // No norm and no bias is in panels.
            Prepared::Bytes(_) => {
                let what = format!("tensor `{tensor}` has bytes, no rows of {}", plan.to);
                Err(pocketglm_tensor::Error::Value { op: "quantise", what }.into())
            }
        }
    }

    fn written(&self, tensor: &str, rows: Range<usize>) -> Result<()> {
        let (plan, open) = self.find(tensor)?;
        let (_, all) = sizes(plan);
        let read = |rows: usize| (u128::from(plan.bytes_before) * rows as u128 / all.max(1) as u128) as u64;
        {
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            *done += read(rows.end) - read(rows.start);
            // Told under the lock, so that it never goes back.
            self.of.report(*done);
        }
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        open.written += rows.len();
        if open.written >= all {
            self.leave(open.prepared.take());
        }
        Ok(())
    }
}
