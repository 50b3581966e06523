use std::path::PathBuf;

/// What can go wrong between a checkpoint and an answer.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be read, or does not hold what the model needs.
    #[error(transparent)]
    Checkpoint(#[from] pocketglm_checkpoint::Error),
    /// The checkpoint is of another model family.
    #[error("{place}: `model_type` must be glm4v or glm4, found {found}")]
    ModelType {
        /// The configuration file.
        place: String,
        /// The type in it.
        found: String,
    },
    /// The tokenizer or the chat template failed.
    #[error("{what}: {source}")]
    Text {
        /// The file or the step.
        what: &'static str,
        /// What happened there.
        source: pocketglm_bpe::Error,
    },
    /// A special token that the model needs and the tokenizer lacks.
    #[error("tokenizer.json has no token {token:?}, which config.json gives the id {id}")]
    SpecialToken {
        /// The token.
        token: &'static str,
        /// Its id in the configuration.
        id: u32,
    },
    /// A checkpoint without a chat template was given messages.
    #[error(
        "the checkpoint has no chat template (chat_template.jinja or tokenizer_config.json), so it takes input_ids only"
    )]
    NoTemplate,
    /// A text-only checkpoint was given pictures.
    #[error("the checkpoint has no vision encoder, so it cannot take {found} picture(s)")]
    NoVision {
        /// Pictures in the request.
        found: usize,
    },
    /// A checkpoint without an audio branch was given sounds.
    #[error(
        "the checkpoint has no audio branch (`audio_config` in config.json and the tensors `model.audio_tower.*`, \
         `model.audio_projection.*`, `model.audio_tag`), so it cannot take {found} sound(s); an adapter file adds one \
         (--adapter)"
    )]
    NoAudio {
        /// Sounds in the request.
        found: usize,
    },
    /// A sound could not be read, decoded or resampled.
    #[error("sound {sound}: {source}")]
    Sound {
        /// The path, or a description of where it came from.
        sound: String,
        /// What happened.
        source: Box<pocketglm_wav2vec::Error>,
    },
    /// An adapter file that cannot be used.
    #[error("adapter {path}: {what}")]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found.
        what: String,
    },
    /// A picture could not be read, decoded or resized.
    #[error("picture {picture}: {source}")]
    Picture {
        /// The path, or a description of where it came from.
        picture: String,
        /// What happened.
        source: pocketglm_vit::Error,
    },
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file larger than its cap.
    #[error("{path} has {found} bytes, at most {limit} are read")]
    FileSize {
        /// The file.
        path: PathBuf,
        /// The cap.
        limit: u64,
        /// The file's size.
        found: u64,
    },
    /// A request that is not of the expected form.
    #[error("request: {what}")]
    Request {
        /// Where, what was wanted and what was found.
        what: String,
    },
    /// Prompt, positions or sampling settings that make no sense.
    #[error(transparent)]
    Glm(#[from] pocketglm_glm::Error),
    /// The vision configuration or a grid makes no sense.
    #[error(transparent)]
    Vision(#[from] pocketglm_vit::Error),
    /// A speech checkpoint, or its settings, make no sense.
    #[error(transparent)]
    Audio(Box<pocketglm_wav2vec::Error>),
    /// The graph could not be built, compiled or run.
    #[error(transparent)]
    Graph(#[from] pocketglm_graph::Error),
    /// A kernel, the thread pool or a tensor failed.
    #[error(transparent)]
    Tensor(#[from] pocketglm_tensor::Error),
    /// The plan does not fit the budget.
    #[error("the model needs {needed} bytes ({plan}), the budget is {budget} bytes")]
    Budget {
        /// Bytes needed.
        needed: u64,
        /// The parts, with their bytes.
        plan: String,
        /// Bytes allowed.
        budget: u64,
    },
    /// The plan does not fit what the device may be asked for.
    #[error("the model needs {needed} bytes of the device ({plan}), {budget} bytes are allowed")]
    DeviceBudget {
        /// Bytes needed.
        needed: u64,
        /// The parts, with their bytes.
        plan: String,
        /// Bytes allowed.
        budget: u64,
    },
    /// An end of a range of ops that names none.
    #[error("no op is called `{wanted}`; close to it: `{}`; a number is below {ops}", near.join("`, `"))]
    NoOp {
        /// What was asked for.
        wanted: String,
        /// How many ops there are.
        ops: usize,
        /// Names that are close to it.
        near: Vec<String>,
    },
    /// A range of ops without one.
    #[error("the range of ops begins with {from} and ends before that, with {until}")]
    NoOps {
        /// Its first op.
        from: String,
        /// Its last op.
        until: String,
    },
    /// A prompt that does not fit the context.
    #[error("the prompt has {prompt} tokens, the context holds {context}")]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// A prompt without a token.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("input_ids[{at}] is {id}, the vocabulary has {vocabulary} rows")]
    TokenId {
        /// Index in the prompt.
        at: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding table.
        vocabulary: usize,
    },
    /// A weight that is NaN or infinite, found because a result was not finite.
    #[error("the logits are not finite because tensor `{tensor}` has {value} at element {index}")]
    WeightNotFinite {
        /// The tensor.
        tensor: String,
        /// Index of the first such element.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// Logits that are not finite although every weight is.
    #[error("the logit of token {token} is {value} although every weight is finite")]
    LogitNotFinite {
        /// The token.
        token: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A precision policy that makes no sense, or does not fit the model.
    #[error("policy `{policy}`: {what}")]
    Policy {
        /// The policy's name.
        policy: String,
        /// What was wanted and what was found.
        what: String,
    },
    /// A tensor could not be quantised.
    #[error("{place}: tensor `{tensor}`, row {row}: {source}")]
    Quantise {
        /// The file.
        place: String,
        /// The tensor.
        tensor: String,
        /// Its first row that is concerned.
        row: usize,
        /// What happened.
        source: Box<pocketglm_quant::Error>,
    },
    /// A quantised tensor that would be quantised again, without leave to do so.
    #[error("{place}: tensor `{tensor}` is already {found}: making it {wanted} would quantise it twice")]
    AlreadyQuantised {
        /// The file.
        place: String,
        /// The tensor.
        tensor: String,
        /// Its format.
        found: pocketglm_tensor::DType,
        /// The format that it would get.
        wanted: pocketglm_tensor::DType,
    },
    /// Something stands where a file is to be written.
    #[error("{path} exists already (--force replaces it)")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A method that needs a calibration table, without one.
    #[error("{method} needs a calibration table for tensor `{tensor}` (--calibration)")]
    NoCalibration {
        /// The method.
        method: &'static str,
        /// The first tensor that wants it.
        tensor: String,
    },
    /// A calibration table that is none, or one of another model.
    #[error("calibration table {path}: {what}")]
    Calibration {
        /// The file.
        path: PathBuf,
        /// What was wanted and what was found.
        what: String,
    },
    /// Samples that cannot be used.
    #[error("samples {path}: {what}")]
    Samples {
        /// The file.
        path: PathBuf,
        /// Where, what was wanted and what was found.
        what: String,
    },
    /// Two models that cannot be compared.
    #[error("{model} cannot be compared with {reference}: {what}")]
    Compare {
        /// The model.
        model: PathBuf,
        /// What it is compared with.
        reference: PathBuf,
        /// What differs.
        what: String,
    },
    /// A model of a comparison computes something that is not finite, so that nothing can be said about either.
    #[error("the {role} {model} cannot be compared: {what}")]
    NotFinite {
        /// `reference` or `candidate`.
        role: &'static str,
        /// The model.
        model: PathBuf,
        /// Where the value was found, and the weight that is to blame.
        what: String,
    },
    /// The statistics of activations could not be gathered.
    #[error("the input of `{tensor}`: {source}")]
    Statistics {
        /// The weight that the input meets.
        tensor: String,
        /// What happened.
        source: pocketglm_quant::Error,
    },
    /// The work was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// The fault of a device, where one is behind this error.
    pub fn device_fault(&self) -> Option<pocketglm_graph::DeviceFault> {
        match self {
            Error::Graph(error) => error.device_fault(),
            _ => None,
        }
    }
}

impl From<pocketglm_wav2vec::Error> for Error {
    fn from(source: pocketglm_wav2vec::Error) -> Error {
        Error::Audio(Box::new(source))
    }
}
