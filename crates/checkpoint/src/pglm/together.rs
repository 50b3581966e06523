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
    /// What is in memory beside the maker's own is a few pieces of half a megabyte, or of one panel or row where that is
    /// larger, for each thread.
    ///
    /// # Errors
    /// What the maker reports, for the first rows in the order of `tensors` that it fails for; [`Error::Write`] for a tensor
    /// that was not declared or has bytes already; [`Error::Io`], also where the disk is full. After a failure nothing can be
    /// written any more, and [`PglmWriter::finish`] is an error.
    pub fn write_together<M: RowMaker>(
        &mut self,
        cpu: &Cpu,
        tensors: &[&str],
        maker: &M,
    ) -> Result<(), M::Error> {
        self.file.usable()?;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pocketglm_quant::{RowOptions, quantise_codes, quantise_row};
    use pocketglm_tensor::{DType, TensorInfo};

    use super::*;
    use crate::test_support::TempDir;
    use crate::{PglmContents, PglmFile, ReadMode};

    /// A matrix in panels, the last of which is not full, of many pieces; one that stays in rows; a vector; a number;
    /// and a matrix without rows.
    fn declared() -> Vec<TensorInfo> {
        let int4 = DType::from_name("int4-g64").unwrap();
        let info =
            |name: &str, dtype, shape: &[usize]| TensorInfo { name: name.into(), dtype, shape: shape.into() };
        vec![
            info("w", int4, &[4999, 704]),
            info("embed_tokens.weight", DType::from_name("int8-g128").unwrap(), &[1500, 768]),
            info("norm", DType::F32, &[300]),
            info("scalar", DType::F32, &[]),
            info("none", int4, &[0, 64]),
        ]
    }

    fn values(row: usize, k: usize) -> Vec<f32> {
        (0..k).map(|i| ((i * 31 + row * 17) % 257) as f32 / 64.0 - 2.0).collect()
    }

    /// Rows by a formula; those of `w` from `fails` on cannot be made, and one panics.
    #[derive(Default)]
    struct Formula {
        fails: Option<usize>,
        panics: Option<usize>,
        short: bool,
    }

    impl RowMaker for Formula {
        type Error = Error;

        fn rows(&self, tensor: &str, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
            let info = declared().into_iter().find(|t| t.name == tensor).unwrap();
            let k = info.shape.last().copied().unwrap_or(1);
            for row in rows.skip(usize::from(self.short)) {
                quantise_row(info.dtype, &values(row, k), &RowOptions::default(), out).unwrap();
            }
            Ok(())
        }

        fn codes(&self, tensor: &str, first: usize, out: &mut [RowCodes]) -> Result<()> {
            assert_eq!(tensor, "w");
            for (row, codes) in (first..).zip(out) {
                assert!(self.panics != Some(row), "row {row} panics");
                if self.fails.is_some_and(|fails| row >= fails) {
                    return Err(Error::Write { path: "a test".into(), what: format!("row {row} fails") });
                }
                let format = DType::from_name("int4-g64").unwrap();
                quantise_codes(format, &values(row, 704), &RowOptions::default(), codes).unwrap();
            }
            Ok(())
        }

        fn written(&self, _: &str, _: Range<usize>) -> Result<()> {
            Ok(())
        }
    }

    fn writer(path: &Path) -> PglmWriter {
        let contents = PglmContents { tensors: declared(), ..PglmContents::default() };
        PglmWriter::create(path, &contents, &[]).unwrap()
    }

    const ALL: [&str; 5] = ["w", "embed_tokens.weight", "norm", "scalar", "none"];

    #[test]
    fn any_number_of_threads_writes_the_bytes_of_one_tensor_after_the_other() {
        let dir = TempDir::new();
        let path = dir.path().join("x.pglm");
        let mut one = writer(&path);
        for info in declared() {
            let k = info.shape.last().copied().unwrap_or(1);
            for row in 0..info.elements() / k.max(1) {
                let mut bytes = Vec::new();
                quantise_row(info.dtype, &values(row, k), &RowOptions::default(), &mut bytes).unwrap();
                one.write(&info.name, &bytes).unwrap();
            }
        }
        one.finish().unwrap();
        let wanted = std::fs::read(&path).unwrap();
        PglmFile::open(&path, ReadMode::Map).unwrap().verify(&mut |_, _| {}).unwrap();
        for threads in [1, 2, 5] {
            let mut together = writer(&path);
            // In another order than they lie in the file.
            let tensors: Vec<&str> = ALL.into_iter().rev().collect();
            together.write_together(&Cpu::new(threads).unwrap(), &tensors, &Formula::default()).unwrap();
            together.finish().unwrap();
            assert!(std::fs::read(&path).unwrap() == wanted, "{threads} threads");
        }
    }

    #[test]
    fn the_first_row_that_fails_is_named_whichever_thread_was_faster_and_nothing_is_left() {
        for threads in [1, 2, 5] {
            let dir = TempDir::new();
            let mut writer = writer(&dir.path().join("x.pglm"));
            let cpu = Cpu::new(threads).unwrap();
            let maker = Formula { fails: Some(2345), ..Formula::default() };
            let error = writer.write_together(&cpu, &ALL, &maker).unwrap_err().to_string();
            assert!(error.ends_with("row 2345 fails"), "{error}");
            // A writer that failed stays so: no hole gets under the final name.
            let failed = |error: Error| error.to_string().ends_with("failed before");
            assert!(failed(writer.write_together(&cpu, &ALL, &Formula::default()).unwrap_err()));
            assert!(failed(writer.write("norm", &[0; 1200]).unwrap_err()));
            for part in &mut writer.parts {
                part.written = part.end - part.begin;
            }
            assert!(failed(writer.finish().unwrap_err()));
            assert!(dir.names().is_empty());
        }
    }

    #[test]
    fn rows_that_are_too_few_and_tensors_twice_or_undeclared_are_refused() {
        let dir = TempDir::new();
        let path = dir.path().join("x.pglm");
        let cpu = Cpu::new(2).unwrap();
        let message = |tensors: &[&str], maker: &Formula| {
            writer(&path).write_together(&cpu, tensors, maker).unwrap_err().to_string()
        };
        let plain = Formula::default();
        assert!(message(&["w", "x"], &plain).ends_with("`x` was not declared"));
        assert!(message(&["norm", "norm"], &plain).ends_with("`norm` is written twice"));
        let short = Formula { short: true, ..Formula::default() };
        assert!(message(&["norm"], &short).contains("0 bytes were made, expected 1200"));
        // What is left out is missed at the end.
        let mut some = writer(&path);
        some.write_together(&cpu, &ALL[..2], &plain).unwrap();
        assert!(some.finish().unwrap_err().to_string().contains("`norm`"));
    }

    #[test]
    fn a_panic_of_one_thread_ends_the_others_and_comes_back() {
        let dir = TempDir::new();
        let path = dir.path().join("x.pglm");
        let caught = std::panic::catch_unwind(|| {
            let maker = Formula { panics: Some(40), ..Formula::default() };
            writer(&path).write_together(&Cpu::new(4).unwrap(), &ALL, &maker)
        });
        assert!(caught.is_err());
        assert!(dir.names().is_empty());
    }
}
