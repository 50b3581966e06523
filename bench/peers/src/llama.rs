//! Safe owners of the parts of llama.cpp that the bench needs: model, context, vision encoder, quantiser.
//!
//! Knows nothing of the command line or of JSON. Start at [`start`], then [`Model::open`] and [`Session::new`].
//!
//! Invariant: a [`Session`] and a [`Vision`] borrow their model, so that nothing outlives what it points to.

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use llama_cpp_sys_2 as sys;

use crate::{Error, Result};

/// Tokens in one batch at most, as in `llama-bench`.
pub const BATCH: usize = 512;

/// How a session runs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Worker threads, for prefill and decode alike.
    pub threads: u32,
    /// Tokens that the KV cache has room for.
    pub context: u32,
    /// Fused attention; a quantised V cache needs it.
    pub flash_attention: bool,
    /// Type of keys and values in the cache.
    pub kv: sys::ggml_type,
}

/// Level of the last log line: a continuation line has no level of its own.
static LAST_LEVEL: AtomicU32 = AtomicU32::new(0);

/// Prints warnings and errors to stderr and drops the rest.
///
/// # Safety
/// `text` is null or a zero-terminated string.
unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    let level = if level == sys::GGML_LOG_LEVEL_CONT { LAST_LEVEL.load(Ordering::Relaxed) } else { level };
    LAST_LEVEL.store(level, Ordering::Relaxed);
    if level >= sys::GGML_LOG_LEVEL_WARN && !text.is_null() {
        // SAFETY: not null, and zero-terminated by llama.cpp's contract for log callbacks.
        eprint!("llama.cpp: {}", unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
}

/// Prepares the library; the first call of a program.
pub fn start() {
    // SAFETY: the callback is a static function that needs no user data.
    unsafe {
        sys::llama_log_set(Some(log), null_mut());
        sys::mtmd_log_set(Some(log), null_mut());
        sys::llama_backend_init();
    }
}

/// A static string of llama.cpp.
///
/// # Safety
/// `text` is null or a zero-terminated string that is never freed.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and zero-terminated as this function demands.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

/// llama.cpp's own version.
pub fn version() -> String {
    // SAFETY: returns a static string.
    unsafe { text(sys::llama_version()) }
}

/// The instruction sets and options that llama.cpp was built with.
pub fn system() -> String {
    // SAFETY: returns a string in static storage.
    unsafe { text(sys::llama_print_system_info()) }
}

fn path_string(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Error::Path(path.into()))
}

/// Weights that are mapped and repacked for this machine, as llama.cpp does by default.
pub struct Model {
    raw: NonNull<sys::llama_model>,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl Model {
    /// Maps a GGUF file and repacks the weights that llama.cpp has faster layouts for.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path_string(path)?;
        // SAFETY: plain data.
        let mut parameters = unsafe { sys::llama_model_default_params() };
        parameters.n_gpu_layers = 0;
        parameters.load_mode = sys::LLAMA_LOAD_MODE_MMAP;
        parameters.use_extra_bufts = true;
        // SAFETY: the name lives through the call; the parameters hold no other pointer than the defaults.
        let raw = unsafe { sys::llama_model_load_from_file(name.as_ptr(), parameters) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::Load(path.into()))?;
        // SAFETY: the model is alive, and its vocabulary with it.
        let vocabulary = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(raw.as_ptr())) };
        Ok(Self { raw, vocabulary: usize::try_from(vocabulary).unwrap_or(0) })
    }

    /// A line about architecture, size and format.
    pub fn description(&self) -> String {
        let mut buffer = [0 as c_char; 256];
        // SAFETY: the model is alive and the length is the buffer's; the result is zero-terminated.
        unsafe {
            sys::llama_model_desc(self.raw.as_ptr(), buffer.as_mut_ptr(), buffer.len());
            text(buffer.as_ptr())
        }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_size(self.raw.as_ptr()) }
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_params(self.raw.as_ptr()) }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by `open`, freed once; sessions borrow the model and are gone.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

/// A KV cache with its threads.
pub struct Session<'m> {
    raw: NonNull<sys::llama_context>,
    pool: NonNull<sys::ggml_threadpool>,
    model: &'m Model,
    context: usize,
    /// Tokens in the cache.
    held: usize,
    random: u64,
}

impl<'m> Session<'m> {
    /// Allocates the cache and starts the threads.
    pub fn new(model: &'m Model, settings: Settings) -> Result<Self> {
        let threads = i32::try_from(settings.threads).map_err(|_| Error::Context)?;
        let batch = settings.context.min(BATCH as u32);
        // SAFETY: plain data.
        let mut parameters = unsafe { sys::llama_context_default_params() };
        parameters.n_ctx = settings.context;
        parameters.n_batch = batch;
        parameters.n_ubatch = batch;
        parameters.n_threads = threads;
        parameters.n_threads_batch = threads;
        parameters.type_k = settings.kv;
        parameters.type_v = settings.kv;
        parameters.flash_attn_type = if settings.flash_attention {
            sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
        } else {
            sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
        };
        // SAFETY: the model is alive and outlives the session.
        let raw = unsafe { sys::llama_init_from_model(model.raw.as_ptr(), parameters) };
        let raw = NonNull::new(raw).ok_or(Error::Context)?;
        // SAFETY: the parameters are plain data that live through the call.
        let pool = unsafe {
            let mut parameters = sys::ggml_threadpool_params_default(threads);
            sys::ggml_threadpool_new(&mut parameters)
        };
        let Some(pool) = NonNull::new(pool) else {
            // SAFETY: made above and used by nobody.
            unsafe { sys::llama_free(raw.as_ptr()) };
            return Err(Error::Context);
        };
        // As llama-bench does: without a pool of its own a build without OpenMP starts its threads anew for every graph.
        // SAFETY: both are alive; `drop` detaches the pool before it frees it.
        unsafe { sys::llama_attach_threadpool(raw.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        // SAFETY: the context is alive.
        let context = unsafe { sys::llama_n_ctx(raw.as_ptr()) } as usize;
        Ok(Self { raw, pool, model, context, held: 0, random: 0x9E37_79B9_7F4A_7C15 })
    }

    /// Seconds that the prefill of `n` random tokens takes behind `depth` others.
    pub fn prefill(&mut self, n: usize, depth: usize) -> Result<f64> {
        self.seek(n, depth)?;
        let ids = self.ids(n);
        self.timed(|this| ids.chunks(BATCH).try_for_each(|chunk| this.decode(chunk, false)))
    }

    /// Seconds that the decoding of `n` random tokens, one at a time, takes behind `depth` others.
    pub fn generate(&mut self, n: usize, depth: usize) -> Result<f64> {
        self.seek(n, depth)?;
        let ids = self.ids(n);
        self.timed(|this| ids.chunks(1).try_for_each(|id| this.decode(id, false)))
    }

    /// Logits after every one of `ids`, [ids, vocabulary], row after row.
    pub fn logits(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        if let Some(&id) =
            ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= self.model.vocabulary))
        {
            return Err(Error::Id { id, vocabulary: self.model.vocabulary });
        }
        self.seek(ids.len(), 0)?;
        let mut out = Vec::with_capacity(ids.len() * self.model.vocabulary);
        for chunk in ids.chunks(BATCH) {
            self.decode(chunk, true)?;
            for row in 0..chunk.len() {
                // SAFETY: the context is alive, and the batch asked for the logits of every row.
                let row = unsafe { sys::llama_get_logits_ith(self.raw.as_ptr(), row as i32) };
                let row = NonNull::new(row).ok_or(Error::Decode(-1))?;
                // SAFETY: llama.cpp keeps one value for each token of the vocabulary until the next call of decode.
                out.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(row.as_ptr(), self.model.vocabulary)
                });
            }
        }
        Ok(out)
    }

    /// Leaves `depth` tokens in the cache, with room for `n` more.
    fn seek(&mut self, n: usize, depth: usize) -> Result<()> {
        if n == 0 || n.checked_add(depth).is_none_or(|sum| sum > self.context) {
            return Err(Error::Length { n, depth, context: self.context });
        }
        // SAFETY: the context is alive; the positions are in the cache.
        let kept = unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            sys::llama_memory_seq_rm(memory, 0, depth.min(self.held) as i32, -1)
        };
        if !kept {
            return Err(Error::Decode(-1));
        }
        self.held = self.held.min(depth);
        let ids = self.ids(depth - self.held);
        ids.chunks(BATCH).try_for_each(|chunk| self.decode(chunk, false))
    }

    /// Appends tokens to the cache and waits for the logits of the last one or of all.
    fn decode(&mut self, ids: &[i32], all: bool) -> Result<()> {
        let (mut ids, mut wanted) = (ids.to_vec(), vec![1i8; ids.len()]);
        let batch = sys::llama_batch {
            n_tokens: ids.len() as i32,
            token: ids.as_mut_ptr(),
            embd: null_mut(),
            pos: null_mut(),
            n_seq_id: null_mut(),
            seq_id: null_mut(),
            logits: if all { wanted.as_mut_ptr() } else { null_mut() },
        };
        // SAFETY: the arrays have `n_tokens` values and live through both calls; a null array means the next positions
        // of sequence 0, and the logits of the last token.
        let code = unsafe {
            let code = sys::llama_decode(self.raw.as_ptr(), batch);
            sys::llama_synchronize(self.raw.as_ptr());
            code
        };
        if code != 0 {
            return Err(Error::Decode(code));
        }
        self.held += ids.len();
        Ok(())
    }

    /// Random tokens of the vocabulary (xorshift), the same in every run.
    fn ids(&mut self, n: usize) -> Vec<i32> {
        let mut next = || {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            (self.random % self.model.vocabulary.max(1) as u64) as i32
        };
        (0..n).map(|_| next()).collect()
    }

    fn timed(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work(self)?;
        let seconds = start.elapsed().as_secs_f64();
        // Idle workers spin for a while: they must not disturb whoever is measured next.
        // SAFETY: the pool is alive; the next decode resumes it.
        unsafe { sys::ggml_threadpool_pause(self.pool.as_ptr()) };
        std::thread::sleep(Duration::from_millis(50));
        Ok(seconds)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // SAFETY: both made by `new`, freed once, the pool after the context has let it go.
        unsafe {
            sys::llama_detach_threadpool(self.raw.as_ptr());
            sys::llama_free(self.raw.as_ptr());
            sys::ggml_threadpool_free(self.pool.as_ptr());
        }
    }
}

/// The vision encoder of an mmproj file.
pub struct Vision<'m> {
    raw: NonNull<sys::mtmd_context>,
    embedding: usize,
    model: PhantomData<&'m Model>,
}

/// What the encoding of one picture took and gave.
pub struct Encoded {
    /// Seconds of resizing, normalising and cutting into patches.
    pub preprocess: f64,
    /// Seconds in the encoder.
    pub encode: f64,
    /// Embeddings, [tokens, width of the text model].
    pub rows: Vec<f32>,
    /// Rows of `rows`.
    pub tokens: usize,
}

impl<'m> Vision<'m> {
    /// Loads an mmproj file beside its text model.
    pub fn open(path: &Path, model: &'m Model, settings: Settings) -> Result<Self> {
        let name = path_string(path)?;
        // SAFETY: plain data.
        let mut parameters = unsafe { sys::mtmd_context_params_default() };
        parameters.use_gpu = false;
        parameters.print_timings = false;
        parameters.warmup = false;
        parameters.n_threads = i32::try_from(settings.threads).map_err(|_| Error::Context)?;
        parameters.flash_attn_type = if settings.flash_attention {
            sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
        } else {
            sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
        };
        // SAFETY: the name lives through the call, the model outlives the encoder.
        let raw = unsafe { sys::mtmd_init_from_file(name.as_ptr(), model.raw.as_ptr(), parameters) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::Load(path.into()))?;
        // SAFETY: the model is alive.
        let embedding = unsafe { sys::llama_model_n_embd_inp(model.raw.as_ptr()) };
        Ok(Self { raw, embedding: usize::try_from(embedding).unwrap_or(0), model: PhantomData })
    }

    /// Encodes a picture of `width` x `height` RGB pixels.
    pub fn encode(&mut self, width: u32, height: u32, pixels: &[u8]) -> Result<Encoded> {
        if pixels.len() as u64 != 3 * u64::from(width) * u64::from(height) || pixels.is_empty() {
            return Err(Error::Picture("the pixels do not fill the size"));
        }
        let start = Instant::now();
        // SAFETY: the encoder is alive; the bitmap copies the pixels, whose number was checked; chunks and bitmap are
        // freed below on every path.
        unsafe {
            let chunks = sys::mtmd_input_chunks_init();
            let bitmap = sys::mtmd_bitmap_init(width, height, pixels.as_ptr());
            let marker = sys::mtmd_default_marker();
            let prompt = sys::mtmd_input_text {
                text: marker,
                text_len: CStr::from_ptr(marker).to_bytes().len(),
                add_special: false,
                parse_special: true,
            };
            let code = sys::mtmd_tokenize(self.raw.as_ptr(), chunks, &prompt, &bitmap.cast_const(), 1);
            let encoded = if code == 0 {
                self.encode_chunks(chunks, start.elapsed().as_secs_f64())
            } else {
                Err(Error::Picture("llama.cpp could not prepare it"))
            };
            sys::mtmd_bitmap_free(bitmap);
            sys::mtmd_input_chunks_free(chunks);
            encoded
        }
    }

    /// # Safety
    /// `chunks` is a live list that this encoder made.
    unsafe fn encode_chunks(
        &mut self,
        chunks: *mut sys::mtmd_input_chunks,
        preprocess: f64,
    ) -> Result<Encoded> {
        // SAFETY: the list is alive and the index is below its length.
        let picture = unsafe {
            (0..sys::mtmd_input_chunks_size(chunks))
                .map(|at| sys::mtmd_input_chunks_get(chunks, at))
                .find(|&chunk| sys::mtmd_input_chunk_get_type(chunk) == sys::MTMD_INPUT_CHUNK_TYPE_IMAGE)
        };
        let chunk = picture.ok_or(Error::Picture("llama.cpp made no picture tokens of it"))?;
        let start = Instant::now();
        // SAFETY: encoder and chunk are alive.
        let code = unsafe { sys::mtmd_encode_chunk(self.raw.as_ptr(), chunk) };
        let encode = start.elapsed().as_secs_f64();
        // SAFETY: as above.
        let (tokens, rows) = unsafe {
            (sys::mtmd_input_chunk_get_n_tokens(chunk), sys::mtmd_get_output_embd(self.raw.as_ptr()))
        };
        match NonNull::new(rows) {
            Some(rows) if code == 0 => {
                // SAFETY: the encoder keeps `tokens` rows of the text model's width until its next call.
                let rows =
                    unsafe { std::slice::from_raw_parts(rows.as_ptr(), tokens * self.embedding) }.to_vec();
                std::thread::sleep(Duration::from_millis(50));
                Ok(Encoded { preprocess, encode, rows, tokens })
            }
            _ => Err(Error::Picture("llama.cpp could not encode it")),
        }
    }
}

impl Drop for Vision<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `open`, freed once, before its model.
        unsafe { sys::mtmd_free(self.raw.as_ptr()) }
    }
}

/// Formats that `quantize` offers, by the names of `llama-quantize`.
const FORMATS: [(&str, sys::llama_ftype); 19] = [
    ("F32", sys::LLAMA_FTYPE_ALL_F32),
    ("F16", sys::LLAMA_FTYPE_MOSTLY_F16),
    ("BF16", sys::LLAMA_FTYPE_MOSTLY_BF16),
    ("Q8_0", sys::LLAMA_FTYPE_MOSTLY_Q8_0),
    ("Q4_0", sys::LLAMA_FTYPE_MOSTLY_Q4_0),
    ("Q4_1", sys::LLAMA_FTYPE_MOSTLY_Q4_1),
    ("Q5_0", sys::LLAMA_FTYPE_MOSTLY_Q5_0),
    ("Q5_1", sys::LLAMA_FTYPE_MOSTLY_Q5_1),
    ("Q2_K", sys::LLAMA_FTYPE_MOSTLY_Q2_K),
    ("Q2_K_S", sys::LLAMA_FTYPE_MOSTLY_Q2_K_S),
    ("Q3_K_S", sys::LLAMA_FTYPE_MOSTLY_Q3_K_S),
    ("Q3_K_M", sys::LLAMA_FTYPE_MOSTLY_Q3_K_M),
    ("Q4_K_S", sys::LLAMA_FTYPE_MOSTLY_Q4_K_S),
    ("Q4_K_M", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M),
    ("Q5_K_S", sys::LLAMA_FTYPE_MOSTLY_Q5_K_S),
    ("Q5_K_M", sys::LLAMA_FTYPE_MOSTLY_Q5_K_M),
    ("Q6_K", sys::LLAMA_FTYPE_MOSTLY_Q6_K),
    ("IQ4_NL", sys::LLAMA_FTYPE_MOSTLY_IQ4_NL),
    ("IQ4_XS", sys::LLAMA_FTYPE_MOSTLY_IQ4_XS),
];

/// The number of a format; Q3_K, Q4_K and Q5_K mean the medium mixture, as for `llama-quantize`.
pub fn format(name: &str) -> Result<sys::llama_ftype> {
    let full = match name {
        "Q3_K" | "Q4_K" | "Q5_K" => format!("{name}_M"),
        _ => name.to_owned(),
    };
    let known = || FORMATS.map(|(name, _)| name).join(", ");
    FORMATS
        .iter()
        .find(|(name, _)| *name == full)
        .map(|&(_, format)| format)
        .ok_or_else(|| Error::Format { name: name.into(), known: known() })
}

/// Writes `input` in another format. `pure` gives every matrix that format instead of llama.cpp's mixture.
pub fn quantize(
    input: &Path,
    output: &Path,
    format: sys::llama_ftype,
    threads: u32,
    pure: bool,
) -> Result<()> {
    let (from, to) = (path_string(input)?, path_string(output)?);
    // SAFETY: plain data.
    let mut parameters = unsafe { sys::llama_model_quantize_default_params() };
    parameters.nthread = i32::try_from(threads).map_err(|_| Error::Context)?;
    parameters.ftype = format;
    parameters.pure_ = pure;
    // SAFETY: names and parameters live through the call.
    let code = unsafe { sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &parameters) };
    if code == 0 { Ok(()) } else { Err(Error::Quantize(input.into())) }
}
