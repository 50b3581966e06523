//! Writing many tensors on all threads: each makes some rows, packs, hashes and writes them while they are in its cache.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pocketglm_tensor::{Cpu, Packed, PackedFormat, RowCodes};

use super::{PANELS, Part, PglmWriter};
use crate::error::shown;
use crate::target::{Place, Target};
use crate::{Error, Result};

/// Bytes that are made at a time: with what they are made from, they fit in a core's second-level cache.
const PIECE: usize = 512 << 10;
/// Pieces for each thread that may wait to be hashed.
const WAITING: usize = 4;

/// Makes the rows of tensors for [`PglmWriter::write_together`], on any thread and in any order.
///
/// A row is what lies along the last dimension; a tensor without dimensions is one row.
pub trait RowMaker: Sync {
    /// What can go wrong besides writing.
    type Error: From<Error> + Send;

    /// Appends the bytes of rows in the tensor's format, row after row.
    ///
    /// # Errors
    /// Of the first row that cannot be made.
    fn rows(&self, tensor: &str, rows: Range<usize>, out: &mut Vec<u8>) -> Result<(), Self::Error>;

    /// Gives the codes and scales of as many rows as `out` has, the first of which is `first`.
    ///
    /// # Errors
    /// Of the first row that cannot be made.
    fn codes(&self, tensor: &str, first: usize, out: &mut [RowCodes]) -> Result<(), Self::Error>;

    /// Hears that rows were written, for progress.
    ///
    /// # Errors
    /// Where the work is to stop.
    fn written(&self, tensor: &str, rows: Range<usize>) -> Result<(), Self::Error>;
}

/// A tensor on its way.
struct Run<'a> {
    name: &'a str,
    part: usize,
    rows: usize,
    /// Rows of a piece.
    step: usize,
    /// Bytes of a row, or of the rows of a panel.
    unit_bytes: usize,
    /// Where it is in panels: their format, and values of a row.
    panels: Option<(PackedFormat, usize)>,
    /// Where its first byte is in the file.
    at: u64,
}

impl<'a> Run<'a> {
    fn new(name: &'a str, index: usize, part: &Part, data: u64) -> Result<Run<'a>, String> {
        let bytes = (part.end - part.begin) as usize;
        let k = part.shape.last().copied().unwrap_or(1);
        let rows = if bytes == 0 { 0 } else { part.shape.iter().rev().skip(1).product() };
        let format = PackedFormat::of(part.dtype).filter(|_| part.layout == PANELS);
        let unit_rows = if format.is_some() { Packed::PANEL_ROWS } else { 1 };
        let units = rows.div_ceil(unit_rows);
        let unit_bytes = bytes / units.max(1);
        if unit_bytes * units != bytes {
            return Err(format!("{bytes} bytes are no whole number of {units} runs of rows"));
        }
        let step = unit_rows * (PIECE / unit_bytes.max(1)).max(1);
        let panels = format.map(|format| (format, k));
        Ok(Run { name, part: index, rows, step, unit_bytes, panels, at: data + part.begin })
    }

    /// Bytes before a row that begins a piece.
    fn before(&self, row: usize) -> u64 {
        let unit = if self.panels.is_some() { Packed::PANEL_ROWS } else { 1 };
        (row.div_ceil(unit) * self.unit_bytes) as u64
    }

    /// Makes the bytes of some rows.
    fn make<M: RowMaker>(
        &self,
        maker: &M,
        rows: Range<usize>,
        codes: &mut [RowCodes],
        out: &mut Vec<u8>,
    ) -> Result<(), M::Error> {
        let wrong = |what: String| Error::Weights {
            source: pocketglm_tensor::Error::Value {
                op: "pack",
                what: format!("tensor `{}`: {what}", shown(self.name)),
            },
        };
        let wanted = (self.before(rows.end) - self.before(rows.start)) as usize;
        let Some((format, k)) = self.panels else {
            maker.rows(self.name, rows, out)?;
            if out.len() != wanted {
                return Err(wrong(format!("{} bytes were made, expected {wanted}", out.len())).into());
            }
            return Ok(());
        };
        out.resize(wanted, 0);
        let firsts = rows.clone().step_by(Packed::PANEL_ROWS);
        for (first, panel) in firsts.zip(out.chunks_exact_mut(self.unit_bytes)) {
            let count = Packed::PANEL_ROWS.min(rows.end - first);
            let codes = codes.get_mut(..count).unwrap_or_default();
            maker.codes(self.name, first, codes)?;
            Packed::pack_panel(format, k, codes, panel)
                .map_err(|e| wrong(format!("rows from {first}: {e}")))?;
        }
        Ok(())
    }
}

/// The next rows to be made, in the order of the tensors.
struct Queue {
    run: usize,
    row: usize,
}

impl Queue {
    fn next(&mut self, runs: &[Run<'_>]) -> Option<(usize, Range<usize>)> {
        loop {
            let (run, first) = (self.run, self.row);
            let of = runs.get(run)?;
            if first < of.rows {
                self.row = of.rows.min(first + of.step);
                return Some((run, first..self.row));
            }
            (self.run, self.row) = (run + 1, 0);
        }
    }
}

/// Stops the others where a thread does not come to its end.
struct Stop<'a>(Option<&'a Target>);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        if let Some(target) = self.0 {
            target.stop();
        }
    }
}

impl PglmWriter {
    /// Makes and writes whole tensors on the threads of `cpu`. The bytes are the same for any number of them.
    ///
    /// What is in memory beside the maker's own is a few pieces of half a megabyte, or of one panel where that is larger,
    /// for each thread.
    ///
    /// # Errors
    /// What the maker reports, for the first rows in the order of `tensors` that it fails for; [`Error::Write`] for a tensor
    /// that was not declared or has bytes already; [`Error::Io`], also where the disk is full. Then the file is of no more use.
    pub fn write_together<M: RowMaker>(
        &mut self,
        cpu: &Cpu,
        tensors: &[&str],
        maker: &M,
    ) -> Result<(), M::Error> {
        let runs = self.runs(tensors)?;
        let queue = Mutex::new(Queue { run: 0, row: 0 });
        let failed: Mutex<Option<(usize, usize, M::Error)>> = Mutex::new(None);
        let target = &self.file;
        cpu.parallel(cpu.threads(), &|_| {
            let mut stop = Stop(Some(target));
            let mut codes = vec![RowCodes::default(); Packed::PANEL_ROWS];
            // A buffer comes before the rows: who waits for one keeps nobody else waiting.
            while let Some(mut out) = target.buffer(WAITING * cpu.threads()) {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next(&runs);
                let Some((index, rows)) = next else { break };
                let Some(run) = runs.get(index) else { break };
                let before = run.before(rows.start);
                let done = run.make(maker, rows.clone(), &mut codes, &mut out).and_then(|()| {
                    target.add(Place { at: run.at + before, hash: run.part, from: before }, out)?;
                    maker.written(run.name, rows.clone())
                });
                if let Err(error) = done {
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    let first = failed.as_ref().map(|(run, row, _)| (*run, *row));
                    // All rows before these are being made: the first error does not depend on which thread was faster.
                    if first.is_none_or(|first| (index, rows.start) < first) {
                        *failed = Some((index, rows.start, error));
                    }
                    return;
                }
            }
            stop.0 = None;
        });
        if let Some((.., error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        for run in &runs {
            if let Some(part) = self.parts.get_mut(run.part) {
                part.written = part.end - part.begin;
            }
        }
        Ok(())
    }

    /// The tensors, each of which must be declared and have no bytes.
    fn runs<'a>(&self, tensors: &[&'a str]) -> Result<Vec<Run<'a>>> {
        let wrong = |what: String| Error::Write { path: self.path.clone(), what };
        let mut seen = std::collections::HashSet::new();
        let mut runs = Vec::with_capacity(tensors.len());
        for &name in tensors {
            let index = self.by_name.get(name).copied().filter(|_| super::is_weight(name));
            let Some((index, part)) = index.and_then(|i| Some((i, self.parts.get(i)?))) else {
                return Err(wrong(format!("tensor `{}` was not declared", shown(name))));
            };
            if part.written > 0 || !part.pending.is_empty() || !seen.insert(index) {
                return Err(wrong(format!("tensor `{}` is written twice", shown(name))));
            }
            let run = Run::new(name, index, part, 8 + self.header_length);
            runs.push(run.map_err(|what| wrong(format!("tensor `{}`: {what}", shown(name))))?);
        }
        Ok(runs)
    }
}
