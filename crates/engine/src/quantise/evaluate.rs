//! Comparing models with the one that they were made of: perplexity, divergence, agreement, sizes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pocketglm_tensor::{KvFormat, WeightSource};

use super::forward::Forward;
use super::plan::{panel_bytes, plan};
use super::samples::begin;
use super::subject::Subject;
use super::verify::verify;
use super::{Samples, Simulation};
use crate::{Cancel, Engine, EngineOptions, Error, Progress, Prompt, Result};

/// Tokens of one step: the logits of two models for them are in memory at once.
const STEP: usize = 64;

/// How models are compared.
#[derive(Clone)]
pub struct EvalOptions {
    /// How the models run. Its progress hears of samples, as the step "compare".
    pub engine: EngineOptions,
    /// Most tokens of a piece that text is cut into.
    pub window: usize,
    /// How the judged models store keys and values; the reference does as `engine` says.
    pub kv: KvFormat,
    /// Policies that are judged as well, on the reference's weights and without writing files.
    pub simulate: Vec<Simulation>,
    /// Stops the work from another thread.
    pub cancel: Cancel,
}

impl Default for EvalOptions {
    fn default() -> EvalOptions {
        EvalOptions {
            engine: EngineOptions::default(),
            window: 512,
            kv: KvFormat::default(),
            simulate: Vec::new(),
            cancel: Cancel::default(),
        }
    }
}

/// The model that others are compared with.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Its folder or file.
    pub path: PathBuf,
    /// Bytes of its tensors as they are stored.
    pub bytes: u64,
    /// Stored bits of a value.
    pub bits_per_weight: f64,
    /// Perplexity on the samples.
    pub perplexity: f64,
}

/// How a model compares with the reference.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Its folder or file.
    pub path: PathBuf,
    /// Bytes of its tensors as they are stored.
    pub bytes: u64,
    /// Stored bits of a value.
    pub bits_per_weight: f64,
    /// Tokens that were predicted by both: every one but those that all prompts begin with, or the first of a prompt without
    /// them, and those of pictures.
    pub positions: u64,
    /// Perplexity on the samples.
    pub perplexity: f64,
    /// Mean over the positions of the Kullback-Leibler divergence of its prediction from the reference's, in nats.
    pub kl: f64,
    /// The divergence that one position in a hundred exceeds.
    pub kl_99: f64,
    /// The largest divergence.
    pub kl_max: f64,
    /// Part of the positions where both find the same token most likely.
    pub same_top: f64,
    /// How the encoded pictures of the samples differ; `None` where the samples have none.
    pub pictures: Option<PictureDifference>,
}

/// How the vision encoder's results differ from the reference's, over all rows of all pictures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PictureDifference {
    /// Pictures and videos.
    pub pictures: u64,
    /// Rows: tokens of pictures.
    pub rows: u64,
    /// The length of the difference over the length of the reference.
    pub relative_l2: f64,
    /// Mean over the rows of the cosine between a row and the reference's.
    pub cosine: f64,
    /// The least of these cosines.
    pub least_cosine: f64,
}

/// Sums of a [`PictureDifference`].
#[derive(Clone, Copy)]
struct PictureSums {
    pictures: u64,
    rows: u64,
    difference: f64,
    reference: f64,
    cosines: f64,
    least: f64,
}

impl PictureSums {
    const NONE: PictureSums =
        PictureSums { pictures: 0, rows: 0, difference: 0.0, reference: 0.0, cosines: 0.0, least: 1.0 };

    /// Rows of `width`, as many in both; values are finite.
    fn add(&mut self, width: usize, wanted: &[f32], found: &[f32]) {
        self.pictures += 1;
        for (wanted, found) in wanted.chunks_exact(width.max(1)).zip(found.chunks_exact(width.max(1))) {
            let [mut difference, mut dot, mut wanted_squares, mut found_squares] = [0.0f64; 4];
            for (&w, &f) in wanted.iter().zip(found) {
                let (w, f) = (f64::from(w), f64::from(f));
                difference += (w - f) * (w - f);
                dot += w * f;
                wanted_squares += w * w;
                found_squares += f * f;
            }
            let lengths = (wanted_squares * found_squares).sqrt();
            let cosine = if lengths > 0.0 { dot / lengths } else { f64::from(u8::from(difference == 0.0)) };
            self.rows += 1;
            self.difference += difference;
            self.reference += wanted_squares;
            self.cosines += cosine;
            self.least = self.least.min(cosine);
        }
    }

    fn result(&self) -> Option<PictureDifference> {
        (self.rows > 0).then(|| PictureDifference {
            pictures: self.pictures,
            rows: self.rows,
            relative_l2: (self.difference / self.reference.max(f64::MIN_POSITIVE)).sqrt(),
            cosine: self.cosines / self.rows as f64,
            least_cosine: self.least,
        })
    }
}

/// What is known of one position.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    kl: f64,
    /// The negative logarithms of the probabilities of the token that comes next.
    surprise: f64,
    reference_surprise: f64,
    same: bool,
}

/// A model in a comparison.
#[derive(Clone, Copy)]
struct Side<'a> {
    role: &'static str,
    path: &'a Path,
    engine: &'a Engine,
}

impl Side<'_> {
    /// The error for a value that is not finite: names the weight that is to blame, where there is one.
    fn not_finite(&self, place: &str, value: f32) -> Error {
        let because = match self.engine.non_finite_weight() {
            Some((tensor, index, value)) => {
                format!("because tensor `{tensor}` has {value} at element {index}")
            }
            None => "although every weight is finite".to_owned(),
        };
        let what = format!("{place} is {value} {because}");
        Error::NotFinite { role: self.role, model: self.path.to_owned(), what }
    }
}

/// A logit that is not finite.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Broken {
    /// Whether it is the reference's.
    reference: bool,
    token: usize,
    value: f32,
}

/// Compares each of `models`, and each simulated policy, with `reference` on the same samples. Two models are in memory
/// at a time. The `path` of a simulated one is the policy's name.
///
/// # Errors
/// As [`Engine::open`] and [`Engine::prompt`]; [`Error::Compare`] where the models' tokens differ, [`Error::NotFinite`]
/// where one of the two computes NaN or an infinity, [`Error::Samples`], [`Error::Cancelled`].
pub fn evaluate(
    models: &[PathBuf],
    reference: impl AsRef<Path>,
    samples: &Samples,
    options: &EvalOptions,
) -> Result<(Reference, Vec<Evaluation>)> {
    let path = reference.as_ref();
    let engine = Engine::open(path, options.engine.clone())?;
    let (bytes, bits_per_weight) = size(&engine)?;
    let mut of = Reference { path: path.to_owned(), bytes, bits_per_weight, perplexity: f64::NAN };
    let mut all = Vec::new();
    let mut judge = |path: &Path, other: &Engine, (bytes, bits_per_weight): (u64, f64)| -> Result<()> {
        let theirs = Side { role: "reference", path: &of.path, engine: &engine };
        let ours = Side { role: "candidate", path, engine: other };
        let (positions, pictures) = compare(theirs, ours, samples, options)?;
        let count = positions.len().max(1) as f64;
        let mean = |f: fn(&Position) -> f64| positions.iter().map(f).sum::<f64>() / count;
        of.perplexity = mean(|p| p.reference_surprise).exp();
        let mut kl: Vec<f64> = positions.iter().map(|p| p.kl).collect();
        kl.sort_by(f64::total_cmp);
        all.push(Evaluation {
            path: path.to_owned(),
            bytes,
            bits_per_weight,
            positions: positions.len() as u64,
            perplexity: mean(|p| p.surprise).exp(),
            kl: mean(|p| p.kl),
            kl_99: kl.get(kl.len().saturating_sub(1) * 99 / 100).copied().unwrap_or(0.0),
            kl_max: kl.last().copied().unwrap_or(0.0),
            same_top: mean(|p| f64::from(u8::from(p.same))),
            pictures,
        });
        Ok(())
    };
    for model in models {
        let other = Engine::open(model, EngineOptions { kv: options.kv, ..options.engine.clone() })?;
        verify(other.inner.model.weights.source(), None, &options.cancel)?;
        let size = size(&other)?;
        judge(model, &other, size)?;
    }
    for simulation in &options.simulate {
        let policy = &simulation.policy;
        let simulate = Some(simulation.clone());
        let simulated = EngineOptions { simulate, kv: options.kv, ..options.engine.clone() };
        // Says first what cannot be simulated; a plan would ask for what a file needs.
        let simulated = Engine::open(path, simulated)?;
        let planned = plan(Subject::Model(&engine.inner.model), policy, None, false, false)?.plan;
        let fixed = if simulation.static_inputs.is_some() { ", fixed inputs" } else { "" };
        let name = PathBuf::from(format!("policy {}{fixed}", policy.name));
        judge(&name, &simulated, (planned.bytes(), planned.bits_per_weight()))?;
    }
    Ok((of, all))
}

/// Stored bytes of the tensors that a model uses, and bits of a value.
fn size(engine: &Engine) -> Result<(u64, f64)> {
    let weights = &engine.inner.model.weights;
    let tensors = weights.tensors();
    let mut bytes = 0;
    for t in &tensors {
        let panels = match weights.packed(&t.name)? {
            Some(_) => panel_bytes(t.dtype, &t.shape)?,
            None => None,
        };
        bytes += panels.unwrap_or(t.bytes() as u64);
    }
    let values: u64 = tensors.iter().map(|t| t.elements() as u64).sum();
    Ok((bytes, bytes as f64 * 8.0 / values.max(1) as f64))
}

fn compare(
    reference: Side<'_>,
    model: Side<'_>,
    samples: &Samples,
    options: &EvalOptions,
) -> Result<(Vec<Position>, Option<PictureDifference>)> {
    let different = |what: String| Error::Compare {
        model: model.path.to_owned(),
        reference: reference.path.to_owned(),
        what,
    };
    let sizes = [reference, model].map(|side| side.engine.inner.model.text.vocab_size);
    if sizes[0] != sizes[1] {
        return Err(different(format!("it has {} tokens, the other {}", sizes[1], sizes[0])));
    }
    let requests = [reference, model].map(|side| samples.requests(side.engine, options.window));
    let [theirs, ours] = requests;
    let (theirs, ours) = (theirs?, ours?);
    let (mut positions, mut pictures) = (Vec::new(), PictureSums::NONE);
    for (i, (a, b)) in theirs.iter().zip(&ours).enumerate() {
        if let Some(progress) = &options.engine.progress {
            progress(Progress { step: "compare", done: i, total: theirs.len() });
        }
        let (a, b) = (reference.engine.prompt(a)?, model.engine.prompt(b)?);
        if a.ids != b.ids {
            return Err(different(format!("sample {} becomes other tokens", i + 1)));
        }
        let mut steps = (
            Forward::new(reference.engine, &*reference.engine.inner.decoder, &a, STEP)?,
            Forward::new(model.engine, &*model.engine.inner.decoder, &b, STEP)?,
        );
        let width = reference.engine.inner.model.text.hidden_size;
        for (n, (wanted, found)) in steps.0.pictures().iter().zip(steps.1.pictures()).enumerate() {
            for (side, rows) in [(reference, wanted), (model, found)] {
                if let Some(at) = rows.iter().position(|v| !v.is_finite()) {
                    let (row, value) = (at / width.max(1), rows.get(at).copied().unwrap_or(f32::NAN));
                    let place = format!("row {row} of picture {} of sample {}, encoded,", n + 1, i + 1);
                    return Err(side.not_finite(&place, value));
                }
            }
            pictures.add(width, wanted, found);
        }
        while let (Some((range, mut wanted)), Some((_, mut found))) = (steps.0.next()?, steps.1.next()?) {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (wanted, found) = (wanted.take("logits")?.values, found.take("logits")?.values);
            let step = predictions(reference.engine, &a, range.start, &wanted, &found);
            positions.extend(step.map_err(|Broken { reference: theirs, token, value }| {
                let place = format!("the logit of token {token} in sample {}", i + 1);
                if theirs { reference } else { model }.not_finite(&place, value)
            })?);
        }
    }
    if let Some(progress) = &options.engine.progress {
        progress(Progress { step: "compare", done: theirs.len(), total: theirs.len() });
    }
    if positions.is_empty() {
        return Err(Error::Samples {
            path: samples.path().to_owned(),
            what: "no token to predict in it".into(),
        });
    }
    Ok((positions, pictures.result()))
}

/// The positions of one step whose next token is one of text, and none that every prompt begins with; logits are `[tokens, vocabulary]` from `first` on.
fn predictions(
    engine: &Engine,
    prompt: &Prompt,
    first: usize,
    wanted: &[f32],
    found: &[f32],
) -> Result<Vec<Position>, Broken> {
    let vocabulary = engine.inner.model.text.vocab_size.max(1);
    let fixed = begin(engine, &prompt.ids);
    type Row<'a> = (u32, &'a [f32], &'a [f32], Mutex<Result<Position, Broken>>);
    let rows: Vec<Row<'_>> = wanted
        .chunks_exact(vocabulary)
        .zip(found.chunks_exact(vocabulary))
        .enumerate()
        .filter_map(|(i, (wanted, found))| {
            let next = first + i + 1;
            let text = next >= fixed && prompt.visual.get(next).is_some_and(Option::is_none);
            let out = Mutex::new(Ok(Position::default()));
            text.then(|| Some((*prompt.ids.get(next)?, wanted, found, out)))?
        })
        .collect();
    engine.inner.cpu.parallel(rows.len(), &|i| {
        if let Some((next, wanted, found, out)) = rows.get(i) {
            *out.lock().unwrap_or_else(PoisonError::into_inner) = position(*next, wanted, found);
        }
    });
    rows.into_iter().map(|row| row.3.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

/// Compares two predictions of token `next`, which is one of the vocabulary.
fn position(next: u32, wanted: &[f32], found: &[f32]) -> Result<Position, Broken> {
    for (reference, logits) in [(true, wanted), (false, found)] {
        if let Some((token, &value)) = logits.iter().enumerate().find(|(_, l)| !l.is_finite()) {
            return Err(Broken { reference, token, value });
        }
    }
    let log_sum = |logits: &[f32]| {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
        f64::from(most) + sum.ln()
    };
    let (a, b) = (log_sum(wanted), log_sum(found));
    let mut kl = 0.0;
    for (&w, &f) in wanted.iter().zip(found) {
        let (p, q) = (f64::from(w) - a, f64::from(f) - b);
        kl += p.exp() * (p - q);
    }
    let surprise =
        |logits: &[f32], sum: f64| sum - logits.get(next as usize).map_or(f64::NAN, |&l| f64::from(l));
    let top = |logits: &[f32]| {
        let better = |best: (usize, f32), (i, &l): (usize, &f32)| if l > best.1 { (i, l) } else { best };
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0
    };
    Ok(Position {
        // Rounding may leave it a little below its least value.
        kl: kl.max(0.0),
        surprise: surprise(found, b),
        reference_surprise: surprise(wanted, a),
        same: top(wanted) == top(found),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_difference_of_pictures_is_what_the_definitions_say() {
        let mut sums = PictureSums::NONE;
        assert_eq!(sums.result(), None);
        sums.add(2, &[3.0, 4.0, 1.0, 0.0], &[3.0, 4.0, 0.0, 1.0]);
        let d = sums.result().unwrap();
        assert_eq!((d.pictures, d.rows, d.cosine, d.least_cosine), (1, 2, 0.5, 0.0));
        assert!((d.relative_l2 - (2.0f64 / 26.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_position_is_what_the_definitions_say() {
        // Probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4, with an offset that must not matter.
        let ln = |p: [f64; 3], offset: f64| p.map(|p| (p.ln() + offset) as f32);
        let (a, b) = (ln([0.5, 0.25, 0.25], 3.0), ln([0.25, 0.5, 0.25], -40.0));
        let position = |next, a, b| super::position(next, a, b).unwrap();
        let p = position(1, &a, &b);
        assert!((p.kl - 0.25 * 2.0f64.ln()).abs() < 1e-5, "{}", p.kl);
        assert!((p.surprise - 2.0f64.ln()).abs() < 1e-5);
        assert!((p.reference_surprise - 4.0f64.ln()).abs() < 1e-5);
        assert!(!p.same && position(1, &a, &a).same);
        assert!(position(1, &a, &a).kl < 1e-12);
        assert!(position(7, &a, &b).surprise.is_nan());
    }

    #[test]
    fn a_logit_that_is_no_number_is_nobodys_agreement() {
        let good = [1.0, 2.0, 3.0];
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let bad = [1.0, value, 3.0];
            for (wanted, found, reference) in [(bad, good, true), (good, bad, false), (bad, bad, true)] {
                let broken = position(0, &wanted, &found).unwrap_err();
                assert_eq!((broken.reference, broken.token), (reference, 1));
                assert!(broken.value.to_bits() == value.to_bits());
            }
        }
        assert!(position(0, &good, &good).is_ok());
    }
}
