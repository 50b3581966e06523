//! Reading a model tensor by tensor and writing it in the formats of a policy.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pocketglm_checkpoint::{PglmContents, PglmWriter, first_non_finite};
use pocketglm_graph::passes::NormedLinears;
use pocketglm_quant::awq::{AwqLinear, AwqOptions, Moments, awq};
use pocketglm_quant::gptq::{Feedback, GptqOptions};
use pocketglm_quant::hadamard::Rotation;
use pocketglm_quant::{RowOptions, dequantise_row, quantise_row, range};
use pocketglm_tensor::{Cpu, DType, Group, Tensor, TensorInfo, WeightSource};

use super::kv_scales::{Scaling, kv_scales};
use super::maker::Maker;
use super::plan::{Planned, QuantPlan, TensorPlan, plan};
use super::policy::{Method, Policy};
use super::rotate::{Turn, rotate_mean_squares, rotate_moments, rotate_rows};
use super::subject::Opened;
use super::table::CalibrationTable;
use super::verify::verify;
use crate::read_tokenizer::{JSON, tables};
use crate::{Cancel, EngineOptions, Error, OutFile, Progress, ProgressFn, Result};

/// Appends what a row of values becomes.
type Make<'a, T> = dyn Fn(&[f32], &mut Vec<T>) -> pocketglm_quant::Result<()> + Sync + 'a;

/// Values that are quantised before they are written: what keeps the memory small.
const BATCH_VALUES: usize = 16 << 20;
/// Bytes that are copied at once.
const BATCH_BYTES: usize = 8 << 20;
/// Rows of each matrix that the choice of AWQ's scales looks at.
const AWQ_ROWS: usize = 256;

/// How a model is quantised.
#[derive(Clone)]
pub struct QuantiseOptions {
    /// What becomes of which tensor.
    pub policy: Policy,
    /// The vision file of a GGUF model; where it is not given, the one beside the text file that fits.
    pub mmproj: Option<PathBuf>,
    /// What [`calibrate`](super::calibrate) wrote for this model.
    pub calibration: Option<PathBuf>,
    /// Whether scales of the KV cache's components, from the calibration table, are folded into the weights around it,
    /// for heads that then lose less on what calibration saw in a cache of 8 and of 4 bits. Results in f32 are the same.
    pub kv_scales: bool,
    /// Whether the inputs of quantised matrices get the fixed ranges of the calibration table; else each block of an
    /// input has the range of its values. Only for `.pglm` files.
    pub static_inputs: bool,
    /// Whether the plan's bytes are those of GGUF files, whose matrices are rows, not of a `.pglm` file's panels.
    pub gguf: bool,
    /// Whether a quantised tensor may be quantised again.
    pub force_requantise: bool,
    /// Whether a file that stands under the target's name is replaced.
    pub overwrite: bool,
    /// Files that are never replaced, besides those of the model and the calibration table: that of the policy.
    pub inputs: Vec<PathBuf>,
    /// Threads; 0 takes as many as the system offers.
    pub threads: usize,
    /// Hears of bytes read, as the step "quantise".
    pub progress: Option<ProgressFn>,
    /// Stops the work from another thread.
    pub cancel: Cancel,
}

impl QuantiseOptions {
    /// The options for a policy, with nothing forced.
    pub fn new(policy: Policy) -> QuantiseOptions {
        QuantiseOptions {
            policy,
            mmproj: None,
            calibration: None,
            kv_scales: false,
            static_inputs: false,
            gguf: false,
            force_requantise: false,
            overwrite: false,
            inputs: Vec::new(),
            threads: 0,
            progress: None,
            cancel: Cancel::default(),
        }
    }
}

/// A model about to be quantised. As a [`WeightSource`] it gives the tensors of the result.
pub struct Quantiser {
    pub(super) opened: Opened,
    pub(super) path: PathBuf,
    cpu: Cpu,
    pub(super) options: QuantiseOptions,
    table: Option<CalibrationTable>,
    plan: QuantPlan,
    by_name: HashMap<String, usize>,
    folds: Vec<Fold>,
    /// What tensors around the KV cache are multiplied with.
    kv: HashMap<String, Scaling>,
    /// What is rotated, by name.
    turns: HashMap<String, Turn>,
    /// The prepared second moments of the input that was needed last, by its name.
    feedback: Mutex<Option<(String, Arc<Feedback>)>>,
}

/// A norm and the linear layers that exchange scales with it.
struct Fold {
    linears: NormedLinears,
    scales: OnceLock<Arc<Vec<f32>>>,
}

impl Quantiser {
    /// Opens a model (a checkpoint folder, a GGUF or a `.pglm` file), or a speech checkpoint, and plans what becomes of it.
    ///
    /// # Errors
    /// As [`Engine::open`](crate::Engine::open); [`Error::Policy`], [`Error::AlreadyQuantised`],
    /// [`Error::NoCalibration`] and [`Error::Calibration`].
    pub fn open(path: impl AsRef<Path>, options: QuantiseOptions) -> Result<Quantiser> {
        let path = path.as_ref();
        let (threads, mmproj) = (options.threads, options.mmproj.clone());
        let opened = Opened::new(path, &EngineOptions { threads, mmproj, ..EngineOptions::default() })?;
        let subject = opened.subject();
        let table = options.calibration.as_ref().map(CalibrationTable::open).transpose()?;
        match (&table, subject.model()) {
            (Some(table), Some(model)) => table.check(model)?,
            (Some(table), None) => {
                let what =
                    "this is of a model that answers, and a speech checkpoint is quantised without one";
                return Err(Error::Calibration { path: table.path().to_owned(), what: what.into() });
            }
            (None, _) => {}
        }
        let needed = |method: &'static str, tensor: &str| match subject.model() {
            Some(_) => Error::NoCalibration { method, tensor: tensor.to_owned() },
            None => Error::Policy {
                policy: options.policy.name.clone(),
                what: format!("{method} needs a calibration table, which a speech checkpoint cannot have"),
            },
        };
        let planned = plan(subject, &options.policy, table.as_ref(), options.force_requantise, options.gguf);
        let Planned { plan, folds, turns } = planned.map_err(|error| match error {
            Error::NoCalibration { method, tensor } => needed(method, &tensor),
            other => other,
        })?;
        let first = plan.tensors.first().map_or("", |t| t.name.as_str());
        if options.static_inputs && table.is_none() {
            return Err(needed("--static-inputs", first));
        }
        let cpu = Cpu::new(options.threads)?;
        let kv = match (&table, options.kv_scales) {
            (_, false) => HashMap::new(),
            (None, true) => return Err(needed("--kv-scales", first)),
            (Some(table), true) => match subject.model() {
                Some(model) => kv_scales(&cpu, model, table, options.policy.rotate)?,
                None => HashMap::new(),
            },
        };
        if options.static_inputs && !turns.is_empty() {
            let what = "the table has no ranges of rotated inputs; write a file with the rotation alone (--policy F32 \
                        --rotate), calibrate that, and fix the inputs of what is made of it";
            return Err(Error::Policy { policy: plan.policy, what: what.into() });
        }
        let quantised =
            plan.tensors.iter().find(|t| kv.contains_key(&t.name) && t.from.is_quantised() && t.from == t.to);
        if let Some(t) = quantised.filter(|_| !options.force_requantise) {
            let (place, tensor) = (subject.place(&t.name), t.name.clone());
            return Err(Error::AlreadyQuantised { place, tensor, found: t.from, wanted: t.to });
        }
        let by_name = plan.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let folds = folds.into_iter().map(|linears| Fold { linears, scales: OnceLock::new() }).collect();
        let (path, feedback) = (path.to_owned(), Mutex::new(None));
        let this = Quantiser { opened, path, cpu, options, table, plan, by_name, folds, kv, turns, feedback };
        // What the table lacks is said before anything is written.
        this.input_ranges()?;
        Ok(this)
    }

    /// What becomes of each tensor.
    pub fn plan(&self) -> &QuantPlan {
        &self.plan
    }

    /// Refuses a name under which [`Quantiser::write_pglm`] would not write.
    ///
    /// # Errors
    /// As [`OutFile::check`].
    pub fn check_pglm(&self, out: impl AsRef<Path>) -> Result<()> {
        self.target(out.as_ref()).check()
    }

    /// Writes the quantised model, with everything that belongs to it, as one `.pglm` file.
    ///
    /// Until it is complete it has another name (see [`PglmWriter`]), so that nothing but a whole model ever stands
    /// under `out`.
    ///
    /// # Errors
    /// As [`OutFile::check`] for its name; [`Error::Quantise`] for values that a format cannot hold, [`Error::Cancelled`], and those of
    /// [`PglmWriter`].
    pub fn write_pglm(&self, out: impl AsRef<Path>) -> Result<()> {
        let out = out.as_ref();
        let checkpoint = self.opened.subject().checkpoint();
        let policy = self.options.policy.to_json();
        let calibration = self.table.as_ref().map(|t| {
            serde_json::json!({ "table": t.path().file_name().map(|n| n.to_string_lossy()), "samples": t.samples() })
                .to_string()
        });
        let files = checkpoint.side_files()?;
        let json = files.iter().find(|(name, _)| name == JSON);
        // A tokenizer that cannot be read is copied as it is: what opens the model says why.
        let tables = json.and_then(|(_, bytes)| tables(bytes.as_slice()));
        let files = files.iter().map(|(name, bytes)| (name.clone(), bytes.as_slice().to_vec()));
        let contents = PglmContents {
            tensors: self.tensors(),
            files: files.chain(tables).collect(),
            policy: Some(&policy),
            calibration: calibration.as_deref(),
            input_ranges: self.input_ranges()?,
            extra: BTreeMap::new(),
        };
        self.check_pglm(out)?;
        self.verify()?;
        let mut writer = PglmWriter::create(out, &contents, &checkpoint.files())?;
        drop(contents);
        // Another process may have finished meanwhile.
        self.check_pglm(out)?;
        self.report(0);
        // These choices run on all threads, which they cannot do beside other rows.
        for fold in &self.folds {
            self.check_cancelled()?;
            self.scales(fold)?;
        }
        // So does GPTQ, whose moments all rows of a matrix share.
        let alone = |t: &&TensorPlan| t.method == Some(Method::Gptq);
        let together: Vec<&str> =
            self.plan.tensors.iter().filter(|t| !alone(t)).map(|t| t.name.as_str()).collect();
        let maker = Maker::new(self);
        writer.write_together(&self.cpu, &together, &maker)?;
        let mut done = maker.done();
        for (i, tensor) in self.plan.tensors.iter().enumerate().filter(|(_, t)| alone(t)) {
            self.pieces(i, &mut |bytes, read| {
                writer.write(&tensor.name, bytes)?;
                done += read;
                self.report(done);
                Ok(())
            })?;
        }
        Ok(writer.finish()?)
    }

    /// The fixed range of the input of each quantised matrix; none where inputs are not fixed.
    fn input_ranges(&self) -> Result<BTreeMap<String, f32>> {
        let Some(table) = self.table.as_ref().filter(|_| self.options.static_inputs) else {
            return Ok(BTreeMap::new());
        };
        // Of the embedding table rows are read; a head that is tied to it rounds its input as it comes.
        let fixed = self
            .plan
            .tensors
            .iter()
            .filter(|t| t.to.is_quantised() && !t.name.ends_with("embed_tokens.weight"));
        let mut ranges = BTreeMap::new();
        for t in fixed {
            let k = t.shape.last().copied().unwrap_or(0);
            let scales = self.column_scales(&t.name)?;
            let range = table.input_range(&t.name, k, scales.as_ref().map(|s| s.as_slice()))?;
            ranges.insert(t.name.clone(), range);
        }
        Ok(ranges)
    }

    /// What the columns of a matrix are multiplied with, and its input is divided by.
    fn column_scales(&self, name: &str) -> Result<Option<Arc<Vec<f32>>>> {
        if let Some(Scaling::Columns(scales)) = self.kv.get(name) {
            return Ok(Some(scales.clone()));
        }
        let fold = self.folds.iter().find(|f| f.linears.weights.iter().any(|w| w == name));
        fold.map(|fold| self.scales(fold)).transpose()
    }

    /// A file that is to be written, guarding all that is read.
    pub(super) fn target(&self, out: &Path) -> OutFile {
        let files = self.opened.subject().checkpoint().files();
        let table = self.table.as_ref().map(CalibrationTable::path);
        OutFile::new(out, self.options.overwrite).keeping(files).keeping(table).keeping(&self.options.inputs)
    }

    /// The number of a tensor in the plan.
    pub(super) fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub(super) fn report(&self, done: u64) {
        if let Some(progress) = &self.options.progress {
            let total = self.plan.bytes_before() as usize;
            progress(Progress { step: "quantise", done: done as usize, total });
        }
    }

    /// The bytes of tensor `i` of the plan, in order; `sink` gets them with the number of bytes read for them.
    fn pieces(&self, i: usize, sink: &mut dyn FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        let Some(t) = self.plan.tensors.get(i) else { return Ok(()) };
        match self.prepare(t)? {
            Prepared::Bytes(bytes) => sink(&bytes, t.bytes_before),
            Prepared::Copy(tensor) => {
                self.check_copied(&t.name, 0, &tensor)?;
                tensor.bytes().chunks(BATCH_BYTES).try_for_each(|piece| {
                    self.check_cancelled()?;
                    sink(piece, read(t, piece, &tensor))
                })
            }
            Prepared::Rows(rows, tensor) => {
                for (batch, bytes) in tensor.bytes().chunks(rows.batch * rows.stored).enumerate() {
                    self.check_cancelled()?;
                    let read = read(t, bytes, &tensor);
                    let mut made = rows.quantise(batch * rows.batch, bytes)?.into_iter().peekable();
                    while let Some(part) = made.next() {
                        sink(&part, if made.peek().is_none() { read } else { 0 })?;
                    }
                }
                Ok(())
            }
        }
    }

    /// All bytes of a tensor of the plan; none where there is no such tensor.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        if let Some((i, t)) = self.index(name).and_then(|i| Some((i, self.plan.tensors.get(i)?))) {
            all.reserve_exact(t.bytes as usize);
            self.pieces(i, &mut |bytes, _| {
                all.extend_from_slice(bytes);
                Ok(())
            })?;
        }
        Ok(all)
    }

    /// Opens a tensor and finds out what has to be done with it.
    pub(super) fn prepare<'a>(&'a self, t: &'a TensorPlan) -> Result<Prepared<'a>> {
        let tensor = self.source(&t.name)?;
        let fold = self.folds.iter().find(|f| f.linears.norm == t.name);
        if let Some(fold) = fold {
            let scales = self.scales(fold)?;
            let scaled = tensor.to_f32()?.iter().zip(scales.iter()).map(|(w, s)| w / s).collect::<Vec<f32>>();
            if let Some(index) = scaled.iter().position(|v| !v.is_finite()) {
                return Err(self.not_finite(&t.name, index));
            }
            return Ok(Prepared::Bytes(scaled.iter().flat_map(|v| v.to_le_bytes()).collect()));
        }
        if let (Some(Scaling::Rows(scales)), &[_]) = (self.kv.get(&t.name), t.shape.as_slice()) {
            let scaled: Vec<f32> = tensor.to_f32()?.iter().zip(scales.iter()).map(|(v, s)| v * s).collect();
            let mut bytes = Vec::new();
            quantise_row(t.to, &scaled, &RowOptions::default(), &mut bytes)
                .map_err(|source| self.failed(&t.name, 0, source))?;
            return Ok(Prepared::Bytes(bytes));
        }
        let columns = matches!(self.turns.get(&t.name), Some(Turn::Columns(_)));
        if tensor.dtype() == t.to && !columns && !self.kv.contains_key(&t.name) {
            return Ok(Prepared::Copy(tensor));
        }
        Ok(Prepared::Rows(Rows::new(self, t, &tensor)?, tensor))
    }

    /// Looks for NaN and infinity in rows that are copied: quantising looks itself.
    pub(super) fn check_copied(&self, tensor: &str, first: usize, rows: &Tensor) -> Result<()> {
        let Some(index) = first_non_finite(rows) else { return Ok(()) };
        let k = rows.shape().last().copied().unwrap_or(1);
        Err(self.not_finite(tensor, first * k + index))
    }

    fn not_finite(&self, tensor: &str, index: usize) -> Error {
        let path = PathBuf::from(self.opened.subject().checkpoint().place(tensor));
        pocketglm_checkpoint::Error::NonFinite { path, tensor: tensor.to_owned(), index }.into()
    }

    /// Reads what has hashes: what is made of damaged bytes would get a hash that is right.
    pub(super) fn verify(&self) -> Result<()> {
        verify(self.opened.subject().checkpoint(), self.options.progress.as_ref(), &self.options.cancel)
    }

    pub(super) fn failed(&self, tensor: &str, row: usize, source: pocketglm_quant::Error) -> Error {
        let place = self.opened.subject().place(tensor);
        Error::Quantise { place, tensor: tensor.to_owned(), row, source: Box::new(source) }
    }

    /// A tensor as it is stored, or in f32 with its rows rotated.
    fn source(&self, name: &str) -> Result<Tensor> {
        let tensor = self.opened.subject().weights().tensor(name)?;
        match self.turns.get(name) {
            Some(Turn::Rows(rows, rotation)) => {
                rotate_rows(&|row, source| self.failed(name, row, source), &tensor, rows, rotation)
            }
            _ => Ok(tensor),
        }
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.options.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// The scales that a norm and its linear layers exchange.
    fn scales(&self, fold: &Fold) -> Result<Arc<Vec<f32>>> {
        if let Some(scales) = fold.scales.get() {
            return Ok(scales.clone());
        }
        let first = fold.linears.weights.first().map_or("", String::as_str);
        let none = || Error::NoCalibration { method: Method::Awq.name(), tensor: first.to_owned() };
        let table = self.table.as_ref().ok_or_else(none)?;
        let mut samples = Vec::new();
        let mut k = 0;
        for name in &fold.linears.weights {
            let tensor = self.source(name)?;
            k = tensor.shape().last().copied().unwrap_or(0);
            let dtype = self
                .by_name
                .get(name)
                .and_then(|&i| self.plan.tensors.get(i))
                .map_or(tensor.dtype(), |t| t.to);
            let failed = |row, source| self.failed(name, row, source);
            samples.push((dtype, sample_rows(&tensor, &failed)?));
        }
        let (mean_abs, squares) = (table.mean_abs(first, k)?, table.mean_squares(first, k)?);
        let (mean_abs, squares) = mean_abs.zip(squares).ok_or_else(none)?;
        let linears: Vec<AwqLinear<'_>> =
            samples.iter().map(|(dtype, rows)| AwqLinear { weights: rows, dtype: *dtype }).collect();
        let options = AwqOptions { rows: AWQ_ROWS, ..AwqOptions::default() };
        let found = awq(&self.cpu, &linears, &mean_abs, Moments::Diagonal(&squares), &options)
            .map_err(|source| Error::Statistics { tensor: first.to_owned(), source })?;
        Ok(fold.scales.get_or_init(|| Arc::new(found.scales)).clone())
    }

    /// The prepared second moments of a weight's input.
    fn feedback(&self, t: &TensorPlan, k: usize) -> Result<Arc<Feedback>> {
        let none = || Error::NoCalibration { method: Method::Gptq.name(), tensor: t.name.clone() };
        let table = self.table.as_ref().ok_or_else(none)?;
        let input = table.input(&t.name).ok_or_else(none)?;
        let mut kept = self.feedback.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, feedback)) = kept.as_ref()
            && name == input
        {
            return Ok(feedback.clone());
        }
        // Two of them need not be in memory at once.
        *kept = None;
        let moments = table.second_moments(&t.name, k)?.ok_or_else(none)?;
        let mut moments = moments.to_f32()?;
        if let Some(scales) = self.column_scales(&t.name)? {
            for (row, s) in moments.to_mut().chunks_exact_mut(k.max(1)).zip(scales.iter()) {
                row.iter_mut().zip(scales.iter()).for_each(|(m, t)| *m /= s * t);
            }
        }
        if let Some(Turn::Columns(rotation)) = self.turns.get(&t.name) {
            rotate_moments(moments.to_mut(), k, rotation)
                .map_err(|source| Error::Statistics { tensor: t.name.clone(), source })?;
        }
        let feedback = Feedback::new(&self.cpu, &moments, k, &GptqOptions::default())
            .map_err(|source| Error::Statistics { tensor: t.name.clone(), source })?;
        let feedback = Arc::new(feedback);
        *kept = Some((input.to_owned(), feedback.clone()));
        Ok(feedback)
    }
}

/// The part of the bytes before that `piece` stands for: a rotated tensor is not as it is stored.
fn read(t: &TensorPlan, piece: &[u8], all: &Tensor) -> u64 {
    (u128::from(t.bytes_before) * piece.len() as u128 / all.bytes().len().max(1) as u128) as u64
}

/// At most [`AWQ_ROWS`] rows, evenly spread.
pub(super) fn sample_rows(
    tensor: &Tensor,
    failed: &dyn Fn(usize, pocketglm_quant::Error) -> Error,
) -> Result<Vec<f32>> {
    let k = tensor.shape().last().copied().unwrap_or(0);
    let stored = tensor.dtype().row_bytes(k).unwrap_or(0).max(1);
    let n = tensor.bytes().len() / stored;
    let count = n.min(AWQ_ROWS);
    let mut rows = vec![0.0; count * k];
    for (i, out) in rows.chunks_exact_mut(k.max(1)).enumerate() {
        let row = i * n / count.max(1);
        let bytes = tensor.bytes().get(row * stored..(row + 1) * stored).unwrap_or_default();
        dequantise_row(tensor.dtype(), bytes, out).map_err(|e| failed(row, e))?;
    }
    Ok(rows)
}

/// How a tensor becomes what is written.
pub(super) enum Prepared<'a> {
    /// These are the bytes.
    Bytes(Vec<u8>),
    /// Its bytes are.
    Copy(Tensor),
    Rows(Rows<'a>, Tensor),
}

/// The rows of one matrix on their way from one format to another.
pub(super) struct Rows<'a> {
    of: &'a Quantiser,
    plan: &'a TensorPlan,
    /// The type of what is read.
    from: DType,
    pub k: usize,
    /// Bytes of a row as it is read.
    pub stored: usize,
    /// Rows that are made at once.
    batch: usize,
    /// What the columns, and the rows, are multiplied with.
    scales: Option<Arc<Vec<f32>>>,
    row_scales: Option<Arc<Vec<f32>>>,
    /// How the columns are rotated.
    turn: Option<Arc<Rotation>>,
    importance: Option<Vec<f32>>,
    /// Smallest and largest value of a matrix with one scale.
    range: Option<(f32, f32)>,
    feedback: Option<Arc<Feedback>>,
}

impl<'a> Rows<'a> {
    fn new(of: &'a Quantiser, plan: &'a TensorPlan, tensor: &Tensor) -> Result<Rows<'a>> {
        let k = tensor.shape().last().copied().unwrap_or(1).max(1);
        let from = tensor.dtype();
        let stored = from.row_bytes(k).unwrap_or(0).max(1);
        let scales = of.column_scales(&plan.name)?;
        let row_scales = match of.kv.get(&plan.name) {
            Some(Scaling::Rows(scales)) => Some(scales.clone()),
            _ => None,
        };
        let mut importance = match (plan.method, &of.table) {
            (Some(Method::Search | Method::Awq), Some(table)) => table.mean_squares(&plan.name, k)?,
            _ => None,
        };
        if let (Some(importance), Some(scales)) = (&mut importance, &scales) {
            // The input that the scaled weights meet is divided by the scales.
            importance.iter_mut().zip(scales.iter()).for_each(|(i, s)| *i /= s * s);
        }
        let turn = match of.turns.get(&plan.name) {
            Some(Turn::Columns(rotation)) => Some(rotation.clone()),
            _ => None,
        };
        if let (Some(importance), Some(rotation)) = (&mut importance, &turn) {
            rotate_mean_squares(importance, rotation);
        }
        let feedback = match plan.method {
            Some(Method::Gptq) => Some(of.feedback(plan, k)?),
            _ => None,
        };
        let batch = (BATCH_VALUES / k).max(1);
        let range = None;
        let mut rows =
            Rows { of, plan, from, k, stored, batch, scales, row_scales, turn, importance, range, feedback };
        if matches!(plan.to, DType::Affine(a) if a.group() == Group::Tensor) {
            rows.range = Some(rows.whole_range(tensor)?);
        }
        Ok(rows)
    }

    /// The smallest and the largest of all values, as they are quantised; of none, zeros.
    fn whole_range(&self, tensor: &Tensor) -> Result<(f32, f32)> {
        let (mut values, mut whole) = (vec![0.0; self.k], (0.0f32, 0.0f32));
        for (row, bytes) in tensor.bytes().chunks_exact(self.stored).enumerate() {
            let of_row = self.values(row, bytes, &mut values).and_then(|()| range(&values));
            let (least, most) = of_row.map_err(|source| self.failed(row, source))?;
            whole = (whole.0.min(least), whole.1.max(most));
        }
        Ok(whole)
    }

    /// The new bytes of some rows, in parts; `first` is the first one's number.
    fn quantise(&self, first: usize, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Some(feedback) = &self.feedback else {
            let options = self.options();
            return self.each(first, bytes, &|values, out| quantise_row(self.plan.to, values, &options, out));
        };
        let values = self.each(first, bytes, &|values, out: &mut Vec<f32>| {
            out.extend_from_slice(values);
            Ok(())
        })?;
        let made = feedback.quantise(&self.of.cpu, &values.concat(), self.plan.to).map_err(|source| {
            let row = match &source {
                pocketglm_quant::Error::NotFinite { index, .. }
                | pocketglm_quant::Error::Range { index, .. } => first + index / self.k,
                _ => first,
            };
            self.failed(row, source)
        })?;
        Ok(vec![made])
    }

    pub fn options(&self) -> RowOptions<'_> {
        let method = match self.plan.method {
            None | Some(Method::Round) => pocketglm_quant::Method::Round,
            Some(_) => pocketglm_quant::Method::Search,
        };
        RowOptions { method, importance: self.importance.as_deref(), range: self.range }
    }

    /// The values of a row from its bytes, scaled.
    pub fn values(&self, row: usize, bytes: &[u8], values: &mut [f32]) -> pocketglm_quant::Result<()> {
        dequantise_row(self.from, bytes, values)?;
        if let Some(rotation) = &self.turn {
            rotation.rotate_rows(values)?;
        }
        if let Some(scales) = &self.scales {
            values.iter_mut().zip(scales.iter()).for_each(|(v, s)| *v *= s);
        }
        if let Some(scale) = self.row_scales.as_ref().and_then(|s| s.get(row)) {
            values.iter_mut().for_each(|v| *v *= scale);
        }
        Ok(())
    }

    pub fn failed(&self, row: usize, source: pocketglm_quant::Error) -> Error {
        self.of.failed(&self.plan.name, row, source)
    }

    /// Calls `make` with the values of each row on all threads; what it appends comes back in the order of the rows.
    fn each<T: Send>(&self, first: usize, bytes: &[u8], make: &Make<'_, T>) -> Result<Vec<Vec<T>>> {
        let per_task = (bytes.len() / self.stored).div_ceil(self.of.cpu.threads() * 4).max(1);
        type Share<'a, T> = (&'a [u8], Mutex<Vec<T>>);
        let parts: Vec<Share<'_, T>> =
            bytes.chunks(per_task * self.stored).map(|part| (part, Mutex::new(Vec::new()))).collect();
        let failure: Mutex<Option<(usize, pocketglm_quant::Error)>> = Mutex::new(None);
        self.of.cpu.parallel(parts.len(), &|task| {
            let Some((part, out)) = parts.get(task) else { return };
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            let mut values = vec![0.0; self.k];
            for (i, row) in part.chunks(self.stored).enumerate() {
                let (bytes, row) = (row, first + task * per_task + i);
                let done = self.values(row, bytes, &mut values).and_then(|()| make(&values, &mut out));
                if let Err(error) = done {
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    // The first row that fails, whichever thread was faster.
                    if failure.as_ref().is_none_or(|(before, _)| row < *before) {
                        *failure = Some((row, error));
                    }
                    return;
                }
            }
        });
        if let Some((row, source)) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(self.failed(row, source));
        }
        Ok(parts
            .into_iter()
            .map(|(_, out)| out.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect())
    }
}

impl WeightSource for Quantiser {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.plan.tensors.iter().map(info).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.by_name.get(name).and_then(|&i| self.plan.tensors.get(i)).map(info)
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let missing = || pocketglm_tensor::Error::Missing {
            name: name.to_owned(),
            place: self.path.display().to_string(),
        };
        let info = self.info(name).ok_or_else(missing)?;
        let all = self.bytes(name).map_err(|e| pocketglm_tensor::Error::Source {
            name: name.to_owned(),
            place: self.path.display().to_string(),
            what: e.to_string(),
        })?;
        Tensor::new(info.dtype, &info.shape, all.into())
    }
}

fn info(t: &TensorPlan) -> TensorInfo {
    TensorInfo { name: t.name.clone(), dtype: t.to, shape: t.shape.clone() }
}
