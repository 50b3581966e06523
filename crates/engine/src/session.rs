//! A conversation: its KV cache, what of it can be reused, and the generation of answers.

use std::sync::Arc;
use std::time::Duration;
#[cfg(not(target_family = "wasm"))]
use std::time::Instant;

use pocketglm_bpe::{Detokenizer, StopStrings};
use pocketglm_glm::{Sampler, TOP, Trace};
use pocketglm_graph::{Inputs, Program, ProgramState, Running};
use pocketglm_tensor::KvFormat;
use pocketglm_vit::preprocess::vision_positions;
#[cfg(target_family = "wasm")]
use web_time::Instant;

use crate::plan::{decoder_bindings, vision_bindings};
use crate::prompt::Encodable;
use crate::{Engine, Error, GenerateOptions, Prompt, Result};

/// Tokens by which the KV cache grows.
const GROWTH: usize = 256;
/// Encoded pictures that a session keeps for reuse.
const CACHED_PICTURES: usize = 4;

/// Capacity of the KV cache for `tokens` tokens, in steps and at most `most`.
pub(crate) fn capacity(tokens: usize, most: usize) -> usize {
    tokens.div_ceil(GROWTH).saturating_mul(GROWTH).min(most)
}

/// What the cache holds at one position. Equal entries at equal positions, and equal entries before them, mean
/// equal keys and values.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    id: u32,
    position: [i32; 3],
    /// For a picture token: SHA-256 of the picture and the row of it.
    picture: Option<([u8; 32], usize)>,
}

/// Encoded pictures by content.
#[derive(Default)]
struct PictureCache(Vec<([u8; 32], Arc<Vec<f32>>)>);

impl PictureCache {
    fn get(&mut self, hash: &[u8; 32]) -> Option<Arc<Vec<f32>>> {
        let at = self.0.iter().position(|(h, _)| h == hash)?;
        let entry = self.0.remove(at);
        self.0.push(entry.clone());
        Some(entry.1)
    }

    fn put(&mut self, hash: [u8; 32], rows: Arc<Vec<f32>>) {
        if self.0.len() == CACHED_PICTURES {
            self.0.remove(0);
        }
        self.0.push((hash, rows));
    }
}

/// A conversation. It keeps the KV cache of what it saw last and reuses the part that a new prompt begins with;
/// unchanged pictures are not encoded again.
pub struct Session {
    engine: Engine,
    state: Option<ProgramState>,
    cached: Vec<Entry>,
    pictures: PictureCache,
    /// Whether the engine had left its device when the cache was begun.
    moved: bool,
}

impl Session {
    pub(crate) fn new(engine: Engine) -> Session {
        let moved = engine.has_moved();
        Session { engine, state: None, cached: Vec::new(), pictures: PictureCache::default(), moved }
    }

    /// Whether the cache is on a device that the engine has left.
    fn is_stale(&self) -> bool {
        self.moved != self.engine.has_moved()
    }

    /// Forgets a cache on a device that the engine has left; encoded pictures are on the host and stay.
    fn refresh(&mut self) {
        if self.is_stale() {
            (self.state, self.moved) = (None, self.engine.has_moved());
            self.cached.clear();
        }
    }

    /// The engine that runs this conversation.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Tokens whose keys and values are in the cache.
    pub fn cached_tokens(&self) -> usize {
        self.cached.len()
    }

    /// Forgets the conversation and gives its memory back.
    pub fn clear(&mut self) {
        *self = Session::new(self.engine.clone());
    }

    /// Tokens of `prompt` that need no work because the cache begins with them. The last one always needs work,
    /// because its logits choose the first token of the answer.
    pub fn reusable_tokens(&self, prompt: &Prompt) -> usize {
        if self.is_stale() {
            return 0;
        }
        let same = entries(prompt).zip(&self.cached).take_while(|(a, b)| a == *b).count();
        same.min(prompt.ids.len().saturating_sub(1))
    }

    /// Answers a prompt: an iterator of pieces of text. Work happens in `next`, so dropping the iterator stops it.
    ///
    /// # Errors
    /// [`Error::Context`], [`Error::Budget`], and settings or stop strings outside their ranges.
    pub fn generate(&mut self, prompt: &Prompt, options: &GenerateOptions) -> Result<Generation<'_>> {
        let inner = &self.engine.inner;
        let context = inner.model.context(&inner.options);
        if prompt.ids.len() > context {
            return Err(Error::Context { prompt: prompt.ids.len(), context });
        }
        let (memory, device_memory) = (inner.options.memory, inner.options.device_memory);
        if memory.or(device_memory).is_some() {
            let plan = self.engine.plan(prompt, options.max_new_tokens)?;
            plan.check(memory)?;
            plan.check_device(device_memory)?;
        }
        self.refresh();
        let stops: Vec<&str> = options.stop.iter().map(String::as_str).collect();
        let stops =
            StopStrings::new(&stops).map_err(|source| Error::Text { what: "stop strings", source })?;
        let sampler = Sampler::new(options.sampling.clone(), &prompt.ids)?;
        let reused = self.reusable_tokens(prompt);
        Ok(Generation {
            prompt: prompt.clone(),
            options: options.clone(),
            engine: self.engine.clone(),
            session: self,
            sampler,
            top_decides: true,
            stops,
            text: Detokenizer::new(true),
            token_ids: Vec::new(),
            logits: None,
            ahead: None,
            finished: None,
            failed: false,
            moved: false,
            timings: Timings { prompt_tokens: 0, reused_tokens: reused, ..Timings::default() },
            context,
        })
    }

    /// Logits of every token of `prompt`, without touching the conversation: `[tokens, vocabulary]`. It runs in
    /// steps of `prefill_chunk` tokens, so that its activations stay within the plan.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn forward(&self, prompt: &Prompt) -> Result<Vec<f32>> {
        let inner = &self.engine.inner;
        let (n, context) = (prompt.ids.len(), inner.model.context(&inner.options));
        if n > context {
            return Err(Error::Context { prompt: n, context });
        }
        match self.engine.session().all_logits(prompt) {
            Err(error) if self.engine.may_move(&error) => {
                self.engine.move_to_cpu(&error)?;
                self.engine.session().all_logits(prompt)
            }
            logits => logits,
        }
    }

    /// Logits of every token of a prompt, in a session that is given up for it.
    fn all_logits(mut self, prompt: &Prompt) -> Result<Vec<f32>> {
        let fresh = &mut self;
        let n = prompt.ids.len();
        let encoded = fresh.encode_from(prompt, 0, &GenerateOptions::default(), &mut Timings::default())?;
        fresh.reserve(n)?;
        let chunk = fresh.engine.inner.options.prefill_chunk.max(1);
        let mut logits = Vec::new();
        let mut at = 0;
        while at < n {
            let end = at.saturating_add(chunk).min(n);
            logits.extend(fresh.step(prompt, &encoded, at..end, (0..end - at).collect())?);
            at = end;
        }
        Ok(logits)
    }

    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let inner = &self.engine.inner;
        let wanted = capacity(tokens, inner.model.context(&inner.options));
        let bindings = |c| pocketglm_graph::Bindings::new().with("C", c);
        match &mut self.state {
            None => self.state = Some(inner.decoder.new_state(&bindings(wanted))?),
            Some(state) if state.bindings.get("C").unwrap_or(0) < wanted => {
                inner.decoder.resize_state(state, &bindings(wanted))?;
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Encodes the pictures that `prompt` shows from token `from` on; others stay `None`.
    fn encode_from(
        &mut self,
        prompt: &Prompt,
        from: usize,
        options: &GenerateOptions,
        timings: &mut Timings,
    ) -> Result<Vec<Option<Arc<Vec<f32>>>>> {
        let mut encoded = vec![None; prompt.pictures.len()];
        let mut wanted: Vec<usize> = prompt.visual[from..].iter().flatten().map(|(i, _)| *i).collect();
        wanted.dedup();
        let start = Instant::now();
        for (done, &i) in wanted.iter().enumerate() {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.engine.inner.options.report("encode pictures", done, wanted.len());
            let picture = &prompt.pictures[i];
            let rows = match self.pictures.get(&picture.hash) {
                Some(rows) => rows,
                None => {
                    let rows = Arc::new(encode(&self.engine, picture)?);
                    self.pictures.put(picture.hash, rows.clone());
                    timings.encoded_pictures += 1;
                    rows
                }
            };
            encoded[i] = Some(rows);
        }
        if !wanted.is_empty() {
            self.engine.inner.options.report("encode pictures", wanted.len(), wanted.len());
            for program in [&self.engine.inner.vision, &self.engine.inner.audio] {
                if let Some(program) = program.get() {
                    program.trim();
                }
            }
            timings.vision += start.elapsed();
        }
        Ok(encoded)
    }

    /// Runs the tokens `range` of `prompt` and gives the logits of `rows`, counted within the range.
    fn step(
        &mut self,
        prompt: &Prompt,
        encoded: &[Option<Arc<Vec<f32>>>],
        range: std::ops::Range<usize>,
        rows: Vec<usize>,
    ) -> Result<Vec<f32>> {
        let width = self.engine.inner.model.text.hidden_size;
        let ids: Vec<i32> = prompt.ids[range.clone()].iter().map(|&id| id as i32).collect();
        let positions: Vec<i32> =
            prompt.positions.axes.iter().flat_map(|axis| &axis[range.clone()]).copied().collect();
        let (mut at, mut embeds) = (Vec::new(), Vec::new());
        for (row, visual) in prompt.visual[range.clone()].iter().enumerate() {
            if let Some((picture, part)) = visual {
                let all = encoded.get(*picture).and_then(Option::as_ref);
                let part = all.and_then(|rows| rows.get(part * width..(part + 1) * width));
                embeds.extend_from_slice(part.ok_or(Error::NoVision { found: 1 })?);
                at.push(row as i32);
            }
        }
        let added: Vec<Entry> = entries(prompt).skip(range.start).take(range.len()).collect();
        self.run(&ids, &positions, &at, &embeds, &rows, added)
    }

    /// One run of the decoder after the tokens that are cached.
    fn run(
        &mut self,
        ids: &[i32],
        positions: &[i32],
        at: &[i32],
        embeds: &[f32],
        rows: &[usize],
        added: Vec<Entry>,
    ) -> Result<Vec<f32>> {
        let past = self.cached.len();
        self.reserve(past + ids.len())?;
        let rows: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
        let inputs = Inputs::new()
            .i32("input_ids", ids)
            .i32("position_ids", positions)
            .i32("image_at", at)
            .f32("image_embeds", embeds)
            .i32("logit_rows", &rows);
        let mut bindings = decoder_bindings(ids.len(), past, at.len(), rows.len(), 0);
        let state = self.state.as_mut().ok_or(Error::EmptyPrompt)?;
        bindings.set("C", state.bindings.get("C").unwrap_or(0));
        let mut outputs =
            self.engine.inner.decoder.start(state, &inputs, &bindings, &["logits"])?.finish()?;
        self.cached.extend(added);
        Ok(outputs.take("logits")?.values)
    }

    /// Starts a run of one token behind `past` others, for what is wanted of its logits. Without an id the token is
    /// the one that the run before this one names: then the host need not know it yet.
    fn start_one(
        &mut self,
        id: Option<u32>,
        past: usize,
        position: i32,
        wanted: &[&str],
    ) -> Result<Box<dyn Running>> {
        self.reserve(past + 1)?;
        let (ids, positions) = ([id.unwrap_or(0) as i32], [position; 3]);
        let inputs = Inputs::new()
            .i32("position_ids", &positions)
            .i32("image_at", &[])
            .f32("image_embeds", &[])
            .i32("logit_rows", &[0]);
        let inputs = match id {
            Some(_) => inputs.i32("input_ids", &ids),
            None => inputs.last("input_ids", "best"),
        };
        let mut bindings = decoder_bindings(1, past, 0, 1, 0);
        let state = self.state.as_mut().ok_or(Error::EmptyPrompt)?;
        bindings.set("C", state.bindings.get("C").unwrap_or(0));
        Ok(self.engine.inner.decoder.start(state, &inputs, &bindings, wanted)?)
    }
}

/// What the cache will hold for each token of a prompt.
fn entries(prompt: &Prompt) -> impl Iterator<Item = Entry> + '_ {
    (0..prompt.ids.len()).map(|i| Entry {
        id: prompt.ids[i],
        position: [0, 1, 2].map(|axis| prompt.positions.axes[axis][i]),
        picture: prompt.visual[i].map(|(picture, row)| (prompt.pictures[picture].hash, row)),
    })
}

/// Rows of one picture or video: `[tokens, width]`.
pub(crate) fn encode(engine: &Engine, picture: &Encodable) -> Result<Vec<f32>> {
    match picture.samples() {
        Some(samples) => hear(engine, samples),
        None => Ok(encode_with(engine, engine.vision()?, picture)?.take("image_embeds")?.values),
    }
}

/// Rows of one sound: `[frames, width]`.
fn hear(engine: &Engine, samples: &[f32]) -> Result<Vec<f32>> {
    let model = engine.inner.model.audio.as_ref().ok_or(Error::NoAudio { found: 1 })?;
    let frames = i32::try_from(model.config.frames(samples.len())).unwrap_or(i32::MAX);
    let segments = [0, frames];
    let inputs = Inputs::new().f32("input_values", samples).i32("audio_segments", &segments);
    let bindings = pocketglm_graph::Bindings::new().with("N", samples.len());
    let program = engine.audio()?;
    let mut state = program.new_state(&bindings)?;
    Ok(program.run(&mut state, &inputs, &bindings)?.take("audio_embeds")?.values)
}

/// Runs one picture or video through a program of the vision encoder.
pub(crate) fn encode_with(
    engine: &Engine,
    program: &dyn Program,
    picture: &Encodable,
) -> Result<pocketglm_graph::Outputs> {
    let model = engine.inner.model.vision.as_ref().ok_or(Error::NoVision { found: 1 })?;
    let merge = model.config.spatial_merge_size;
    let pixels = picture.pixels().ok_or(Error::NoVision { found: 1 })?;
    let place = vision_positions(&[pixels.grid], merge, model.config.table_side)?;
    let signed = |v: &[u32]| -> Vec<i32> { v.iter().map(|&x| x as i32).collect() };
    let taps: Vec<i32> = place.taps.iter().flatten().map(|&t| t as i32).collect();
    let weights: Vec<f32> = place.tap_weights.iter().flatten().copied().collect();
    let positions = [signed(&place.rows), signed(&place.cols)].concat();
    let segments = signed(&place.segments);
    let inputs = Inputs::new()
        .f32("pixel_values", &pixels.values)
        .i32("taps", &taps)
        .f32("tap_weights", &weights)
        .i32("patch_positions", &positions)
        .i32("segments", &segments);
    let bindings = vision_bindings(place.rows.len(), merge, segments.len() - 1);
    let mut state = program.new_state(&bindings)?;
    Ok(program.run(&mut state, &inputs, &bindings)?)
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// An end-of-sequence token.
    Eos,
    /// A stop string.
    StopString,
    /// The token limit, or the end of the context.
    Length,
    /// The caller cancelled.
    Cancelled,
}

impl FinishReason {
    /// The word that OpenAI-style answers use.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Eos | FinishReason::StopString => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Where the time of an answer went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Prompt tokens that were run.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were reused.
    pub reused_tokens: usize,
    /// Pictures that were encoded, not reused.
    pub encoded_pictures: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Encoding pictures.
    pub vision: Duration,
    /// Running the prompt.
    pub prefill: Duration,
    /// Generating tokens after the first.
    pub decode: Duration,
    /// Computing again, on the processor, what a device that failed had.
    pub recovery: Duration,
}

impl Timings {
    /// Prompt tokens run in a second.
    pub fn prefill_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Tokens generated in a second, not counting the first, which the prefill gives.
    pub fn decode_rate(&self) -> f64 {
        self.generated_tokens.saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// A piece of an answer: the text of one token, or of several where a character or a stop string was pending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text. May be empty at the end of an answer.
    pub text: String,
}

/// An answer in progress: a blocking iterator of pieces. Dropping it stops the work; the conversation keeps what
/// was computed.
pub struct Generation<'s> {
    session: &'s mut Session,
    engine: Engine,
    prompt: Prompt,
    options: GenerateOptions,
    sampler: Sampler,
    /// Whether the largest logits have decided so far, where they were asked for.
    top_decides: bool,
    stops: StopStrings,
    text: Detokenizer,
    token_ids: Vec<u32>,
    logits: Option<Vec<f32>>,
    /// A run of the last token that was told, whose result is the next one; only where a device works by itself.
    ahead: Option<Box<dyn Running>>,
    finished: Option<FinishReason>,
    /// Whether an error ended the answer.
    failed: bool,
    /// Whether the answer went on with the processor because the device failed.
    moved: bool,
    timings: Timings,
    context: usize,
}

impl Generation<'_> {
    /// Tokens generated so far, an end-of-sequence token included.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Why the answer ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finished
    }

    /// Where the time went so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// What happened to the device, where the answer went on with the processor: see
    /// [`Fallback::Cpu`](crate::Fallback::Cpu).
    pub fn device_failure(&self) -> Option<&str> {
        self.engine.device_failure().filter(|_| self.moved)
    }

    /// Makes the processor go on after the device failed, or another conversation found out that it had: what the cache
    /// had is computed again.
    fn recover(&mut self, why: &Error) -> Result<()> {
        self.engine.move_to_cpu(why)?;
        self.session.refresh();
        (self.moved, self.logits, self.ahead) = (true, None, None);
        self.timings.reused_tokens = 0;
        if self.token_ids.is_empty() {
            // The answer begins with its prompt, as ever.
            return Ok(());
        }
        let (before, start) = (self.timings, Instant::now());
        self.prefill()?;
        let chunk = self.engine.inner.options.prefill_chunk.max(1);
        let said = self.token_ids.clone();
        for (i, ids) in said.chunks(chunk).enumerate() {
            if self.options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let last = (i + 1) * chunk >= said.len();
            let rows = if last { vec![ids.len() - 1] } else { Vec::new() };
            let logits = self.replay(ids, &rows)?;
            self.logits = last.then_some(logits);
        }
        self.timings = Timings { recovery: before.recovery + start.elapsed(), ..before };
        Ok(())
    }

    /// Runs tokens of the answer behind what is cached.
    fn replay(&mut self, ids: &[u32], rows: &[usize]) -> Result<Vec<f32>> {
        let past = self.session.cached.len();
        let first = i32::try_from(past + ids.len()).map_err(|_| pocketglm_glm::Error::TooLong)?
            - ids.len() as i32
            + self.prompt.positions.rope_delta;
        let along: Vec<i32> = (first..).take(ids.len()).collect();
        let added = ids
            .iter()
            .zip(&along)
            .map(|(&id, &position)| Entry { id, position: [position; 3], picture: None })
            .collect();
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        self.session.run(&ids, &along.repeat(3), &[], &[], rows, added)
    }

    /// The whole remaining answer as one text.
    ///
    /// # Errors
    /// What [`Generation::next`] gives.
    pub fn text(&mut self) -> Result<String> {
        let mut text = String::new();
        for piece in self {
            text.push_str(&piece?.text);
        }
        Ok(text)
    }

    /// Runs the prompt from the first token that is not cached, in steps, and keeps the last token's logits.
    fn prefill(&mut self) -> Result<()> {
        let n = self.prompt.ids.len();
        let from = self.timings.reused_tokens;
        self.session.cached.truncate(from);
        let encoded = self.session.encode_from(&self.prompt, from, &self.options, &mut self.timings)?;
        let start = Instant::now();
        let expected = n.saturating_add(self.options.max_new_tokens).min(self.context);
        self.session.reserve(expected.min(n + GROWTH))?;
        let chunk = self.engine.inner.options.prefill_chunk.max(1);
        let mut at = from;
        while at < n {
            if self.options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            self.engine.inner.options.report("read prompt", at - from, n - from);
            let end = at.saturating_add(chunk).min(n);
            let rows = if end == n { vec![end - at - 1] } else { Vec::new() };
            let logits = self.session.step(&self.prompt, &encoded, at..end, rows)?;
            if end == n {
                self.logits = Some(logits);
            }
            at = end;
        }
        self.engine.inner.options.report("read prompt", n - from, n - from);
        self.timings.prompt_tokens = n - from;
        self.timings.prefill = start.elapsed();
        Ok(())
    }

    /// The position of the token behind `past` others.
    fn position_behind(&self, past: usize) -> Result<i32> {
        let index = i32::try_from(past).map_err(|_| pocketglm_glm::Error::TooLong)?;
        Ok(index + self.prompt.positions.rope_delta)
    }

    /// Runs the token that was chosen last.
    fn decode(&mut self, id: u32) -> Result<Vec<f32>> {
        let position = self.position_behind(self.session.cached.len())?;
        let entry = Entry { id, position: [position; 3], picture: None };
        self.session.run(&[id as i32], &[position; 3], &[], &[], &[0], vec![entry])
    }

    /// The token behind `last` where the device chooses it. The run of that token is started before this one is known
    /// on the host, so that the device never waits; what it computes beyond the end of an answer is overwritten.
    fn decode_best(&mut self, last: u32) -> Result<u32> {
        let past = self.session.cached.len();
        let position = self.position_behind(past)?;
        let running = match self.ahead.take() {
            Some(running) => running,
            None => self.session.start_one(Some(last), past, position, &["best"])?,
        };
        // As many tokens as are still wanted, and as fit.
        if self.token_ids.len() + 1 < self.options.max_new_tokens && past + 2 < self.context {
            self.ahead = Some(self.session.start_one(None, past + 1, position + 1, &["best"])?);
        }
        let best = running.finish()?.take("best")?.values.first().copied().unwrap_or(-1.0);
        if best < 0.0 {
            // Some logit is not finite. The plain way, over the same place of the cache, says which one.
            self.ahead = None;
            let mut logits = self.decode(last)?;
            return self.sampler.sample(&mut logits).map_err(|e| self.engine.explain(e));
        }
        self.session.cached.push(Entry { id: last, position: [position; 3], picture: None });
        Ok(best as u32)
    }

    /// The token behind `last` where the largest logits decide, so that the device need not give all of them.
    fn decode_top(&mut self, last: u32) -> Result<u32> {
        let past = self.session.cached.len();
        let position = self.position_behind(past)?;
        let running = self.session.start_one(Some(last), past, position, &["top_ids", "top_values"])?;
        let mut outputs = running.finish()?;
        let (ids, values) = (outputs.take("top_ids")?.values, outputs.take("top_values")?.values);
        if ids.iter().all(|id| *id >= 0.0) {
            let top: Vec<(u32, f32)> = ids.iter().map(|id| *id as u32).zip(values).collect();
            let vocabulary = self.engine.inner.model.text.vocab_size;
            let chosen = self.sampler.sample_top(&top, vocabulary).map_err(|e| self.engine.explain(e))?;
            if let Some(id) = chosen {
                self.session.cached.push(Entry { id: last, position: [position; 3], picture: None });
                return Ok(id);
            }
        }
        // They do not decide, or some logit is not finite. The plain way, over the same place of the cache, and for the
        // tokens to come as well: where 64 are too few once, they would often be, and each time costs a run.
        self.top_decides = false;
        let mut logits = self.decode(last)?;
        self.sampler.sample(&mut logits).map_err(|e| self.engine.explain(e))
    }

    /// Whether the device is asked for the largest logits alone.
    fn wants_top(&self) -> bool {
        self.top_decides
            && self.engine.inner.decoder.overlaps()
            && self.sampler.may_be_decided_by_top()
            && self.sampler.most_wanted().is_none_or(|k| k <= TOP)
    }

    /// The next token.
    fn choose(&mut self) -> Result<u32> {
        let start = Instant::now();
        let mut logits = match (self.logits.take(), self.token_ids.last()) {
            (Some(logits), _) => logits,
            (None, Some(&last)) if self.engine.inner.decoder.overlaps() && self.sampler.takes_largest() => {
                let id = self.decode_best(last)?;
                self.timings.decode += start.elapsed();
                return Ok(id);
            }
            (None, Some(&last)) if self.wants_top() => {
                let id = self.decode_top(last)?;
                self.timings.decode += start.elapsed();
                return Ok(id);
            }
            (None, Some(&last)) => {
                let logits = self.decode(last)?;
                self.timings.decode += start.elapsed();
                logits
            }
            (None, None) => {
                self.prefill()?;
                self.logits.take().ok_or(Error::EmptyPrompt)?
            }
        };
        self.sampler.sample(&mut logits).map_err(|e| self.engine.explain(e))
    }

    /// One token: its text, and whether the answer goes on.
    fn advance(&mut self) -> Result<Piece> {
        if self.options.max_new_tokens == 0 {
            return Ok(self.end(FinishReason::Length));
        }
        if self.options.cancel.is_cancelled() {
            return Ok(self.end(FinishReason::Cancelled));
        }
        let id = self.choose()?;
        self.token_ids.push(id);
        self.timings.generated_tokens += 1;
        if !self.options.ignore_eos && self.engine.inner.model.eos.contains(&id) {
            return Ok(self.end(FinishReason::Eos));
        }
        let text = self.text.push(&self.engine.inner.model.tokenizer, id).unwrap_or_default();
        let text = match self.stops.push(&text) {
            Ok(text) => text,
            Err(stopped) => {
                self.finished = Some(FinishReason::StopString);
                return Ok(Piece { text: stopped.text });
            }
        };
        let full = self.session.cached.len() + 1 > self.context;
        if self.token_ids.len() >= self.options.max_new_tokens || full {
            let mut last = self.end(FinishReason::Length);
            last.text.insert_str(0, &text);
            return Ok(last);
        }
        Ok(Piece { text })
    }

    /// Ends the answer with the text that was held back.
    fn end(&mut self, reason: FinishReason) -> Piece {
        self.finished = Some(reason);
        let rest = self.text.finish().unwrap_or_default();
        match self.stops.push(&rest) {
            Ok(text) => Piece { text: text + &self.stops.finish() },
            Err(stopped) => {
                self.finished = Some(FinishReason::StopString);
                Piece { text: stopped.text }
            }
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if self.finished.is_some() || self.failed {
            return None;
        }
        let mut piece = self.advance();
        if let Err(error) = &piece
            && (self.engine.may_move(error) || self.session.is_stale())
        {
            piece = self.recover(error).and_then(|()| self.advance());
        }
        match &piece {
            Err(Error::Cancelled) => {
                self.finished = Some(FinishReason::Cancelled);
                return None;
            }
            Err(_) => self.failed = true,
            Ok(_) => {}
        }
        Some(piece)
    }
}

/// A decoder that also names its hidden states, over the same weights. Its cache is in f32, since a trace is made to be
/// compared with a reference.
pub(crate) fn tracing_decoder(engine: &Engine) -> Result<Box<dyn Program>> {
    let model = &engine.inner.model;
    let graph = crate::model::text_graph(
        &model.text,
        &*model.weights,
        KvFormat::F32,
        model.fuse,
        Trace::HiddenStates,
        &model.precisions,
    )?;
    Ok(engine.inner.backend.compile(&graph, model.weights.clone())?)
}
