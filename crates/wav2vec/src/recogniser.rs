//! A Wav2Vec2 checkpoint that runs: audio in, logits or text out.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use pocketglm_checkpoint::{
    Checkpoint, Fields, NameRules, OpenOptions, ReadMode, Renamed, check_tensors, first_non_finite,
};
use pocketglm_graph::{
    Backend, Bindings, Graph, GraphBuilder, Inputs, Output, Outputs, Program, ProgramMemory, passes,
};
use pocketglm_tensor::{Tensor, WeightSource};

use crate::audio::{AudioLimits, Clip};
use crate::ctc::{Decoder, Emission, Span, Vocabulary};
use crate::weights::{IGNORED, LAYOUTS, SCOPE};
use crate::{
    Chunking, Error, Precision, Prepared, Result, SAMPLE_RATE, Stream, Trace, Wav2VecConfig, ctc_head,
    encoder, expected_tensors,
};

/// How a checkpoint is loaded.
#[derive(Clone, Debug)]
pub struct RecogniserOptions {
    /// How matrices are kept.
    pub precision: Precision,
    /// Whether weights are mapped or copied into memory.
    pub read_mode: ReadMode,
    /// Whether the graph is fused. Off only for comparisons.
    pub fuse: bool,
    /// How much audio is taken at once.
    pub limits: AudioLimits,
}

impl Default for RecogniserOptions {
    fn default() -> Self {
        RecogniserOptions {
            precision: Precision::Stored,
            read_mode: ReadMode::Map,
            fuse: true,
            limits: AudioLimits::default(),
        }
    }
}

/// What a checkpoint is, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct RecogniserInfo {
    /// Sizes.
    pub config: Wav2VecConfig,
    /// Parameters of the encoder.
    pub encoder: u64,
    /// Parameters of the head; 0 where there is none.
    pub head: u64,
    /// Tensors in all.
    pub tensors: usize,
    /// Bytes as stored, by element type.
    pub bytes: BTreeMap<&'static str, u64>,
    /// Whether there is a vocabulary.
    pub vocabulary: Option<usize>,
}

/// The weights of a checkpoint under canonical names.
pub type Weights = Prepared<Renamed<Checkpoint>>;

struct Inner {
    config: Wav2VecConfig,
    vocabulary: Option<Vocabulary>,
    head: bool,
    normalise: bool,
    weights: Arc<Weights>,
    backend: Arc<dyn Backend>,
    program: Box<dyn Program>,
    /// Gives `last_hidden_state`; compiled when it is first wanted.
    features: OnceLock<Box<dyn Program>>,
    options: RecogniserOptions,
}

/// A loaded Wav2Vec2 checkpoint. Clones share it; it can be used from any thread.
#[derive(Clone)]
pub struct Recogniser {
    inner: Arc<Inner>,
}

/// Text with its times.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transcript {
    /// The whole text.
    pub text: String,
    /// Its words.
    pub words: Vec<Word>,
    /// Its tokens, in frames.
    pub tokens: Vec<Emission>,
    /// Length of the audio.
    pub seconds: f64,
}

/// A word of a transcript.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    /// Its text.
    pub text: String,
    /// The second at which it begins.
    pub start: f64,
    /// The second at which it ends.
    pub end: f64,
}

/// What a graph gives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Logits,
    Features,
    Everything,
}

impl Recogniser {
    /// Opens and checks a checkpoint folder or `.pglm` file and makes it ready to run on `backend`.
    ///
    /// # Errors
    /// What the folder lacks or holds wrongly, with file and tensor.
    pub fn open(
        path: impl AsRef<Path>,
        backend: Arc<dyn Backend>,
        options: RecogniserOptions,
    ) -> Result<Recogniser> {
        let opened = Opened::new(path.as_ref(), &options)?;
        let wanted = if opened.head { Wanted::Logits } else { Wanted::Features };
        let graph = graph(&opened.config, &opened.weights, wanted, options.fuse)?;
        let program = backend.compile(&graph, opened.weights.clone())?;
        let Opened { config, vocabulary, head, normalise, weights } = opened;
        let features = OnceLock::new();
        let inner =
            Inner { config, vocabulary, head, normalise, weights, backend, program, features, options };
        Ok(Recogniser { inner: Arc::new(inner) })
    }

    /// What a checkpoint is, and the graph that would run, without loading it.
    ///
    /// # Errors
    /// As [`Recogniser::open`].
    pub fn inspect(path: impl AsRef<Path>, options: &RecogniserOptions) -> Result<(RecogniserInfo, Graph)> {
        let opened = Opened::new(path.as_ref(), options)?;
        let wanted = if opened.head { Wanted::Logits } else { Wanted::Features };
        let graph = graph(&opened.config, &opened.weights, wanted, options.fuse)?;
        Ok((opened.info(), graph))
    }

    /// The weights of a checkpoint as its graph takes them, and the graph as it is built: for programs that write them.
    ///
    /// # Errors
    /// As [`Recogniser::open`].
    pub fn source(path: impl AsRef<Path>, options: &RecogniserOptions) -> Result<(Arc<Weights>, Graph)> {
        let opened = Opened::new(path.as_ref(), options)?;
        let wanted = if opened.head { Wanted::Logits } else { Wanted::Features };
        let graph = built(&opened.config, &opened.weights, wanted)?;
        Ok((opened.weights, graph))
    }

    /// Sizes of the encoder.
    pub fn config(&self) -> &Wav2VecConfig {
        &self.inner.config
    }

    /// The tokens, where the checkpoint has them.
    pub fn vocabulary(&self) -> Option<&Vocabulary> {
        self.inner.vocabulary.as_ref()
    }

    /// How it was loaded.
    pub fn options(&self) -> &RecogniserOptions {
        &self.inner.options
    }

    /// Whether clips are normalised before they are encoded (`do_normalize`).
    pub fn normalises(&self) -> bool {
        self.inner.normalise
    }

    /// The graph that runs.
    pub fn graph(&self) -> &Graph {
        self.inner.program.graph()
    }

    /// Bytes that a clip of so many samples takes, by use.
    ///
    /// # Errors
    /// [`Error::TooShort`], and sizes beyond any memory.
    pub fn memory(&self, samples: usize) -> Result<ProgramMemory> {
        self.check_length(samples)?;
        Ok(self.inner.program.memory(&bindings(samples))?)
    }

    /// Logits `[frames, vocabulary]` of normalised samples.
    ///
    /// # Errors
    /// [`Error::TooShort`], [`Error::NoText`] where the checkpoint has no head, [`Error::ResultNotFinite`].
    pub fn logits(&self, input_values: &[f32]) -> Result<Output> {
        if !self.inner.head {
            return Err(Error::NoText { what: "lm_head.weight" });
        }
        self.checked(self.run(&*self.inner.program, input_values)?.take("logits")?)
    }

    /// Features `[frames, hidden_size]` of normalised samples, the encoder's result.
    ///
    /// # Errors
    /// As [`Recogniser::logits`].
    pub fn features(&self, input_values: &[f32]) -> Result<Output> {
        let inner = &self.inner;
        let program = match (inner.head, inner.features.get()) {
            (false, _) => &inner.program,
            (true, Some(program)) => program,
            (true, None) => {
                let graph = graph(&inner.config, &inner.weights, Wanted::Features, inner.options.fuse)?;
                let program = inner.backend.compile(&graph, inner.weights.clone())?;
                // Another thread may have been faster; its program is as good.
                inner.features.get_or_init(|| program)
            }
        };
        self.checked(self.run(&**program, input_values)?.take("last_hidden_state")?)
    }

    /// Everything that the reference names: `input_values [1, N]`, `hidden_states.{i} [1, T, H]`, `last_hidden_state`,
    /// and `logits [1, T, V]` where there is a head.
    ///
    /// # Errors
    /// As [`Recogniser::logits`].
    pub fn trace(&self, clip: &Clip) -> Result<Vec<(String, Tensor)>> {
        let inner = &self.inner;
        let values = clip.input_values(inner.normalise);
        self.check_length(values.len())?;
        let graph = graph(&inner.config, &inner.weights, Wanted::Everything, inner.options.fuse)?;
        let program = inner.backend.compile(&graph, inner.weights.clone())?;
        let mut tensors = vec![("input_values".to_owned(), Tensor::from_f32(&[1, values.len()], &values)?)];
        for (name, output) in self.run(&*program, &values)?.0 {
            let shape: Vec<usize> = std::iter::once(1).chain(output.shape).collect();
            tensors.push((name, Tensor::from_f32(&shape, &output.values)?));
        }
        Ok(tensors)
    }

    /// The text of a clip, encoded as a whole.
    ///
    /// `beam` 0 or 1 decodes greedily, as the reference does.
    ///
    /// # Errors
    /// As [`Recogniser::logits`], and [`Error::NoText`] where the checkpoint has no vocabulary.
    pub fn transcribe(&self, clip: &Clip, beam: usize) -> Result<Transcript> {
        let mut decoder = self.decoder(beam)?;
        let logits = self.logits(&clip.input_values(self.inner.normalise))?;
        let mut tokens = Vec::new();
        decoder.push(&logits.values, &mut tokens);
        decoder.finish(&mut tokens);
        Ok(self.transcript(tokens, clip.seconds()))
    }

    /// A stream of audio of `rate` frames a second, encoded in overlapping chunks.
    ///
    /// # Errors
    /// [`Error::Format`] for the rate, [`Error::Setting`] for chunks that make no sense, [`Error::NoText`].
    pub fn stream(&self, rate: u32, chunking: &Chunking, beam: usize) -> Result<Stream> {
        Stream::new(self.clone(), rate, chunking, self.decoder(beam)?)
    }

    /// Text, words and times of tokens.
    pub fn transcript(&self, tokens: Vec<Emission>, seconds: f64) -> Transcript {
        let Some(vocabulary) = &self.inner.vocabulary else {
            return Transcript { tokens, seconds, ..Transcript::default() };
        };
        let word =
            |Span { text, start, end }| Word { text, start: self.second(start), end: self.second(end) };
        let words = vocabulary.words(&tokens).into_iter().map(word).collect();
        Transcript { text: vocabulary.join(&tokens), words, tokens, seconds }
    }

    /// The second at which a frame begins.
    pub fn second(&self, frame: usize) -> f64 {
        frame as f64 * self.inner.config.samples_per_frame() as f64 / f64::from(SAMPLE_RATE)
    }

    fn decoder(&self, beam: usize) -> Result<Decoder> {
        if !self.inner.head {
            return Err(Error::NoText { what: "lm_head.weight" });
        }
        let vocabulary = self.inner.vocabulary.as_ref().ok_or(Error::NoText { what: "vocab.json" })?;
        Decoder::new(vocabulary.len(), vocabulary.blank(), beam)
    }

    fn check_length(&self, samples: usize) -> Result<()> {
        let wanted = self.inner.config.receptive_field();
        if samples < wanted {
            return Err(Error::TooShort { wanted, found: samples });
        }
        let (limit, found) =
            (self.inner.options.limits.max_seconds, samples.div_ceil(SAMPLE_RATE as usize) as u64);
        if found > limit {
            return Err(Error::Limit { what: "length in seconds", limit, found });
        }
        Ok(())
    }

    fn run(&self, program: &dyn Program, input_values: &[f32]) -> Result<Outputs> {
        self.check_length(input_values.len())?;
        let frames = self.inner.config.frames(input_values.len());
        let segments = [0, i32::try_from(frames).unwrap_or(i32::MAX)];
        let inputs = Inputs::new().f32("input_values", input_values).i32("audio_segments", &segments);
        let bindings = bindings(input_values.len());
        let mut state = program.new_state(&bindings)?;
        Ok(program.run(&mut state, &inputs, &bindings)?)
    }

    /// The result, if all of it is finite; else the weight that is to blame.
    fn checked(&self, output: Output) -> Result<Output> {
        if output.values.iter().all(|v| v.is_finite()) {
            return Ok(output);
        }
        let source = self.inner.weights.source();
        let blame = |info: pocketglm_tensor::TensorInfo| {
            source.tensor(&info.name).is_ok_and(|t| first_non_finite(&t).is_some()).then_some(info.name)
        };
        Err(Error::ResultNotFinite { tensor: source.tensors().into_iter().find_map(blame) })
    }
}

/// Sizes of a run.
fn bindings(samples: usize) -> Bindings {
    Bindings::new().with("N", samples)
}

/// A checkpoint before anything runs.
struct Opened {
    config: Wav2VecConfig,
    vocabulary: Option<Vocabulary>,
    head: bool,
    normalise: bool,
    weights: Arc<Weights>,
}

impl Opened {
    fn new(path: &Path, options: &RecogniserOptions) -> Result<Opened> {
        let checkpoint =
            Checkpoint::open(path, &OpenOptions { mode: options.read_mode, ..OpenOptions::default() })?;
        let json = checkpoint.required_json("config.json")?;
        let fields = Fields::new("config.json", &json)?;
        let found = fields.string("model_type")?.unwrap_or("(none)");
        if found != "wav2vec2" {
            let place = format!("{}: config.json", path.display());
            return Err(Error::ModelType { place, found: found.to_owned() });
        }
        let config = Wav2VecConfig::from_fields(&fields)?;
        let mut normalise = true;
        if let Some(json) = checkpoint.json("preprocessor_config.json")? {
            let f = Fields::new("preprocessor_config.json", &json)?;
            normalise = f.boolean("do_normalize")?.unwrap_or(true);
            if f.integer("sampling_rate", 1..=1 << 24)?.is_some_and(|r| r != SAMPLE_RATE as usize) {
                return Err(f.error("sampling_rate", SAMPLE_RATE.to_string()).into());
            }
        }
        let rules =
            NameRules::detect(&checkpoint, LAYOUTS, &["wav2vec2.feature_projection.projection.weight"])?;
        let renamed = Renamed::new(checkpoint, rules)?;
        let head = renamed.info("lm_head.weight").is_some();
        let mut expected = expected_tensors(&renamed, SCOPE, &config)?;
        if head {
            let (v, h) = (config.vocab_size, config.hidden_size);
            for (name, shape) in [("lm_head.weight", vec![v, h]), ("lm_head.bias", vec![v])] {
                let name = name.to_owned();
                expected.push(pocketglm_checkpoint::ExpectedTensor { name, shape, optional: false });
            }
        }
        let place = |name: &str| match renamed.stored_name(name) {
            Some(stored) => renamed.source().place(&stored),
            None => path.display().to_string(),
        };
        check_tensors(&renamed, &place, &expected, IGNORED)?;
        let vocabulary = match renamed.source().json("vocab.json")? {
            Some(json) if head => {
                let delimiter = renamed.source().json("tokenizer_config.json")?;
                let delimiter = delimiter.as_ref().and_then(|c| c.get("word_delimiter_token")?.as_str());
                let blank = config.pad_token_id as u32;
                Some(Vocabulary::from_json(&json, config.vocab_size, blank, delimiter.unwrap_or("|"))?)
            }
            _ => None,
        };
        let weights = Arc::new(Prepared::new(renamed, SCOPE, &config, options.precision));
        Ok(Opened { config, vocabulary, head, normalise, weights })
    }

    fn info(&self) -> RecogniserInfo {
        let mut info = RecogniserInfo {
            config: self.config.clone(),
            encoder: 0,
            head: 0,
            tensors: 0,
            bytes: BTreeMap::new(),
            vocabulary: self.vocabulary.as_ref().map(Vocabulary::len),
        };
        for t in self.weights.source().tensors() {
            if IGNORED.iter().any(|prefix| t.name.starts_with(prefix)) {
                continue;
            }
            let part = if t.name.starts_with("lm_head.") { &mut info.head } else { &mut info.encoder };
            *part += t.elements() as u64;
            info.tensors += 1;
            *info.bytes.entry(t.dtype.name()).or_insert(0) += t.bytes() as u64;
        }
        info
    }
}

/// The graph of a checkpoint, after the passes.
fn graph(config: &Wav2VecConfig, weights: &Weights, wanted: Wanted, fuse: bool) -> Result<Graph> {
    let mut graph = built(config, weights, wanted)?;
    if fuse {
        passes::optimise(&mut graph)?;
        passes::apply("attention over bytes", passes::attend_in_int8, &mut graph)?;
        passes::apply("fewer products", passes::fewer_products, &mut graph)?;
    } else {
        passes::prepare(&mut graph)?;
    }
    Ok(graph)
}

/// The same as it is built.
fn built(config: &Wav2VecConfig, weights: &Weights, wanted: Wanted) -> Result<Graph> {
    let mut g = GraphBuilder::new(weights);
    let trace = if wanted == Wanted::Everything { Trace::HiddenStates } else { Trace::Off };
    let x = g.scoped(SCOPE, |g| encoder(g, config, trace))?;
    if wanted != Wanted::Logits {
        g.output("last_hidden_state", x);
    }
    if wanted == Wanted::Logits || wanted == Wanted::Everything && weights.info("lm_head.weight").is_some() {
        let logits = ctc_head(&mut g, config, x)?;
        g.output("logits", logits);
    }
    Ok(g.finish())
}
