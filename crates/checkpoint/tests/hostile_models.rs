//! GGUF and `.pglm` files made to harm: each is refused with an error that says what is wrong, soon, and without
//! memory beyond a small multiple of its size.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: what fails is a failed test"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pocketglm_checkpoint::{
    Checkpoint, Error, FileBytes, GgufFile, GgufMeta, GgufWriter, OpenOptions, PglmContents, PglmFile,
    PglmWriter, ReadMode, SafetensorsFile, export_pglm,
};
use pocketglm_tensor::{Block, Bytes, DType, TensorInfo, WeightSource};
use sha2::{Digest, Sha256};

/// Counts what each thread holds, and the most that it held since the count was last set back.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's duty is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's duty is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `body` held at once beyond what was held before.
fn peak_of<T>(body: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let result = body();
    let peak = PEAK.with(Cell::get) - before;
    (result, peak.max(0) as usize)
}

/// What reading a file of `bytes` may take: fixed tables, and some bytes for each byte of the file.
fn allowance(bytes: usize) -> usize {
    256 * 1024 + 24 * bytes
}

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("pocketglm-hostile-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A fixed sequence of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % end.max(1)
    }

    /// `bytes` with one to four places changed, up to `reach` from the start.
    fn mutated(&mut self, bytes: &[u8], reach: usize) -> Vec<u8> {
        const NUMBERS: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0xff,
            0xffff,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 32,
            i64::MAX as u64,
            u64::MAX - 31,
            u64::MAX,
        ];
        let mut out = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(reach.min(out.len()));
            match self.below(7) {
                0 => out[at] ^= 1 << self.below(8),
                1 => out[at] = self.below(256) as u8,
                // A count, length, offset or type that lies.
                2 | 3 => {
                    let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                    let width = [4, 8][self.below(2)];
                    for (slot, byte) in out[at..].iter_mut().zip(&number[..width]) {
                        *slot = *byte;
                    }
                }
                4 => drop(out.remove(at)),
                5 => out.insert(at, self.below(256) as u8),
                _ => {
                    let end = (at + 1 + self.below(40)).min(out.len());
                    let piece = out[at..end].to_vec();
                    let to = self.below(reach.min(out.len()));
                    out.splice(to..to, piece);
                }
            }
        }
        out
    }
}

/// Runs `body` on many files and holds each to its time and memory.
fn each_is_bounded(files: impl Iterator<Item = Vec<u8>>, body: impl Fn(&[u8]) -> bool) -> (usize, usize) {
    let (mut accepted, mut refused) = (0, 0);
    for (i, file) in files.enumerate() {
        let mut seconds = 0.0;
        // A slow run is repeated before it counts: the machine may have been busy with something else.
        for _ in 0..3 {
            let start = Instant::now();
            let (ok, peak) = peak_of(|| body(&file));
            seconds = start.elapsed().as_secs_f64();
            assert!(peak <= allowance(file.len()), "file {i} of {} bytes took {peak} bytes", file.len());
            if seconds < 2.0 {
                if ok {
                    accepted += 1
                } else {
                    refused += 1
                }
                break;
            }
        }
        assert!(seconds < 2.0, "file {i} took {seconds} s");
    }
    (accepted, refused)
}

// --- GGUF

const MAX: u64 = u64::MAX;

/// A GGUF file put together field by field.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn head(tensors: u64, keys: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(tensors).u64(keys)
    }

    fn u32(mut self, n: u32) -> Raw {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u64(mut self, n: u64) -> Raw {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn text(mut self, text: &[u8]) -> Raw {
        self = self.u64(text.len() as u64);
        self.0.extend(text);
        self
    }

    fn key(self, key: &str, kind: u32) -> Raw {
        self.text(key.as_bytes()).u32(kind)
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Raw {
        self = self.text(name.as_bytes()).u32(dims.len() as u32);
        for &d in dims {
            self = self.u64(d);
        }
        self.u32(kind).u64(offset)
    }

    /// Pads, and appends so many bytes of data.
    fn data(mut self, bytes: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
        self.0.extend(vec![0; bytes]);
        self.0
    }
}

fn parse(bytes: &[u8]) -> pocketglm_checkpoint::Result<GgufFile> {
    GgufFile::parse(FileBytes::from_bytes("x.gguf", Bytes::from(bytes.to_vec())))
}

/// Every published way to attack a reader of GGUF, as a file, and what the error must say.
fn attacks() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let one = |dims: &[u64], kind, offset| Raw::head(1, 0).tensor("t", dims, kind, offset).data(64);
    let key = |kind: u32| Raw::head(0, 1).key("k", kind);
    let mut big_endian = Raw::head(0, 0).0;
    big_endian[4..8].copy_from_slice(&3u32.to_be_bytes());
    let long = "n".repeat(65);
    vec![
        ("no magic", b"GGML\x03\0\0\0".to_vec(), "expected the magic `GGUF`"),
        (
            "version of the first year",
            [&b"GGUF"[..], &[1, 0, 0, 0], &[0; 16]].concat(),
            "version 1, expected 2 or 3",
        ),
        (
            "version of the future",
            [&b"GGUF"[..], &[9, 0, 0, 0], &[0; 16]].concat(),
            "version 9, expected 2 or 3",
        ),
        ("big-endian", big_endian, "a big-endian file (version 3)"),
        ("CVE-2024-21802: tensors past the file", Raw::head(1 << 18, 0).0, "262144 tensors need at least"),
        (
            "CVE-2024-21836: tensor count wraps",
            Raw::head(MAX, 0).0,
            "18446744073709551615 tensors, expected at most",
        ),
        (
            "CVE-2024-23496: key count wraps",
            Raw::head(0, MAX).0,
            "18446744073709551615 keys, expected at most",
        ),
        ("CVE-2024-21825: keys past the file", Raw::head(0, 60_000).0, "60000 keys need at least"),
        (
            "CVE-2024-23605: string length wraps",
            key(8).u64(MAX).0,
            "expected 18446744073709551615 more bytes",
        ),
        (
            "CVE-2024-23605: key length wraps",
            Raw::head(0, 1).u64(MAX).u64(0).0,
            "a name of 18446744073709551615 bytes",
        ),
        ("key without a name", Raw::head(0, 1).u64(0).u32(4).u64(0).0, "a name of 0 bytes"),
        (
            "key longer than the specification's",
            Raw::head(0, 1).text(&[b'k'; 65_536]).u32(4).u32(1).0,
            "a name of 65536 bytes",
        ),
        ("key of other bytes than UTF-8", Raw::head(0, 1).text(b"\xff\xfe").u32(4).u32(1).0, "not UTF-8"),
        ("CVE-2025-49847: token length wraps", key(9).u32(8).u64(1).u64(MAX - 7).0, "string 0 of 1"),
        (
            "#19856: array length wraps",
            key(9).u32(10).u64(1 << 61).u64(0).0,
            "an array of 2305843009213693952 values",
        ),
        (
            "#19856: array past the file",
            key(9).u32(4).u64(1 << 30).u64(0).0,
            "expected 4294967296 more bytes",
        ),
        (
            "#27188: endless array of strings",
            key(9).u32(8).u64(1 << 40).u64(0).0,
            "1099511627776 strings, but 8 bytes",
        ),
        (
            "#19856: arrays in arrays",
            key(9).u32(9).u64(1).u32(9).u64(1).u32(9).u64(1).0,
            "an array of arrays",
        ),
        ("#26690: array of an unknown type", key(9).u32(77).u64(1).u64(0).0, "unknown value type 77"),
        ("value of an unknown type", key(13).u64(0).0, "unknown value type 13"),
        (
            "bool that is neither",
            {
                let mut raw = key(7).0;
                raw.push(2);
                raw
            },
            "expected 0 or 1",
        ),
        ("key twice", Raw::head(0, 2).key("k", 4).u32(1).key("k", 4).u32(1).0, "occurs twice"),
        (
            "#26318: alignment of another type",
            Raw::head(0, 1).key("general.alignment", 8).text(b"32").0,
            "of type string",
        ),
        (
            "#26318: alignment of 64 bits",
            Raw::head(0, 1).key("general.alignment", 10).u64(32).0,
            "of type uint64",
        ),
        (
            "alignment 0",
            Raw::head(0, 1).key("general.alignment", 4).u32(0).0,
            "a power of two from 8 to 65536",
        ),
        (
            "alignment 24",
            Raw::head(0, 1).key("general.alignment", 4).u32(24).0,
            "a power of two from 8 to 65536",
        ),
        (
            "alignment 2^31",
            Raw::head(0, 1).key("general.alignment", 4).u32(1 << 31).0,
            "a power of two from 8 to 65536",
        ),
        ("no dimensions", one(&[], 0, 0), "0 dimensions, expected 1 to 4"),
        ("#19856: five dimensions", one(&[1, 1, 1, 1, 16], 0, 0), "5 dimensions, expected 1 to 4"),
        ("dimension of zero", one(&[0], 0, 0), "dimension 0 is 0"),
        ("negative dimension", one(&[MAX, 4], 0, 0), "dimension 0 is 18446744073709551615"),
        ("RUSTSEC-2026-0217: elements wrap", one(&[1 << 32, 1 << 32], 24, 0), "too many elements"),
        ("CVE-2025-53630: bytes wrap to a few", one(&[1 << 62, 4], 0, 0), "too many elements"),
        (
            "CVE-2026-27940: sum of sizes wraps",
            Raw::head(2, 0)
                .tensor("a", &[(1 << 61) - 8], 0, 0)
                .tensor("b", &[(1 << 61) - 8], 0, (1 << 63) - 32)
                .data(64),
            "reach past the 64 bytes of data",
        ),
        (
            "CVE-2026-7482: tensor larger than the file",
            one(&[1 << 20], 0, 0),
            "4194304 bytes from offset 0 on reach past the 64 bytes",
        ),
        ("offset past the file", one(&[4], 0, 1 << 20), "from offset 1048576 on reach past"),
        ("offset wraps", one(&[4], 0, MAX - 31), "reach past the 64 bytes"),
        ("offset between alignments", one(&[4], 0, 4), "no multiple of the alignment 32"),
        ("hole", one(&[4], 0, 32), "a hole lies before it"),
        (
            "overlap",
            Raw::head(2, 0).tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 0).data(64),
            "it overlaps another",
        ),
        ("data that no tensor has", one(&[8], 0, 0), "the tensors end here"),
        ("unknown element type", one(&[4], 12345, 0), "unknown element type 12345"),
        ("element type of an old version", one(&[32], 4, 0), "unknown element type 4"),
        (
            "rows of broken blocks",
            one(&[33], 2, 0),
            "rows of 33 values, expected a multiple of the 32 of a Q4_0 block",
        ),
        (
            "tensor twice",
            Raw::head(2, 0).tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64),
            "occurs twice",
        ),
        (
            "tensor name longer than readers take",
            Raw::head(1, 0).tensor(&long, &[8], 0, 0).data(32),
            "a name of 65 bytes",
        ),
        ("tensor without a name", Raw::head(1, 0).tensor("", &[8], 0, 0).data(32), "a name of 0 bytes"),
    ]
}

#[test]
fn every_published_attack_on_gguf_readers_is_refused_with_its_reason() {
    let attacks = attacks();
    assert!(attacks.len() >= 40);
    for (name, bytes, wanted) in attacks {
        let (error, peak) = peak_of(|| match parse(&bytes) {
            Ok(_) => panic!("{name}: accepted"),
            Err(e) => e.to_string(),
        });
        assert!(error.contains(wanted), "{name}: {error}");
        // File and place are in every message.
        assert!(error.contains("x.gguf"), "{name}: {error}");
        assert!(error.contains("offset") || error.contains("twice"), "{name}: {error}");
        assert!(peak <= allowance(bytes.len()), "{name}: {peak} bytes");
    }
    // The control: the same builder makes files that are read.
    let good = Raw::head(1, 1).key("general.alignment", 4).u32(32).tensor("t", &[8, 2], 0, 0).data(64);
    assert_eq!(parse(&good).unwrap().shape("t"), Some(&[2, 8][..]));
}

/// A text model with one layer, small enough to try everything with.
fn keys() -> Vec<(String, GgufMeta)> {
    let mut tokens: Vec<String> = (33u8..=126)
        .chain(161..=172)
        .chain(174..=255)
        .map(|b| char::from(b).to_string())
        .chain((0..68).map(|i| char::from_u32(256 + i).unwrap().to_string()))
        .collect();
    tokens.extend(["he", "<|endoftext|>", "<|user|>", "</answer>", "[PAD260]"].map(String::from));
    let mut kinds = vec![1; 257];
    kinds.extend([3, 3, 4, 5]);
    let mut keys = vec![
        ("general.architecture".to_owned(), "glm4".into()),
        ("tokenizer.ggml.model".to_owned(), "gpt2".into()),
        ("tokenizer.ggml.pre".to_owned(), "glm4".into()),
        ("tokenizer.ggml.tokens".to_owned(), GgufMeta::Strings(tokens)),
        ("tokenizer.ggml.token_type".to_owned(), GgufMeta::I32s(kinds)),
        ("tokenizer.ggml.merges".to_owned(), GgufMeta::Strings(vec!["h e".into()])),
        ("tokenizer.ggml.eos_token_id".to_owned(), 257u32.into()),
        ("tokenizer.chat_template".to_owned(), "{{ messages }}".into()),
    ];
    let number = |name: &str, n: u32| (format!("glm4.{name}"), GgufMeta::U32(n));
    keys.extend([
        number("block_count", 1),
        number("context_length", 64),
        number("embedding_length", 32),
        number("feed_forward_length", 32),
        number("attention.head_count", 2),
        number("attention.head_count_kv", 1),
        number("rope.dimension_count", 8),
        ("glm4.attention.layer_norm_rms_epsilon".to_owned(), 1e-5f32.into()),
        ("glm4.rope.freq_base".to_owned(), 1e4f32.into()),
        ("glm4.rope.dimension_sections".to_owned(), GgufMeta::I32s(vec![2, 1, 1, 0])),
    ]);
    keys
}

fn tensors() -> Vec<TensorInfo> {
    let tensor =
        |name: &str, dtype, shape: &[usize]| TensorInfo { name: name.into(), dtype, shape: shape.to_vec() };
    let q8 = DType::Block(Block::Q8_0);
    vec![
        tensor("token_embd.weight", q8, &[261, 32]),
        tensor("output_norm.weight", DType::F32, &[32]),
        tensor("blk.0.attn_q.weight", q8, &[32, 32]),
        tensor("blk.0.attn_q.bias", DType::F32, &[32]),
        tensor("blk.0.attn_k.weight", DType::Block(Block::Q4_0), &[16, 32]),
        tensor("blk.0.ffn_down.weight", DType::F16, &[32, 32]),
    ]
}

fn gguf_with(folder: &Folder, name: &str, keys: &[(String, GgufMeta)]) -> PathBuf {
    let path = folder.0.join(name);
    let tensors = tensors();
    let mut writer = GgufWriter::create(&path, keys, &tensors, &[]).unwrap();
    for info in &tensors {
        let bytes: Vec<u8> = (0..info.bytes()).map(|i| (i % 60) as u8).collect();
        writer.write(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    path
}

/// Opens a checkpoint and asks it for everything that it has.
fn read_all(path: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(path, &OpenOptions { mode: ReadMode::Read, ..Default::default() })
        .map_err(|e| e.to_string())?;
    let mut first = Ok(());
    for info in checkpoint.tensors() {
        match checkpoint.tensor(&info.name) {
            Ok(tensor) => assert_eq!((tensor.dtype(), tensor.shape()), (info.dtype, &info.shape[..])),
            Err(e) => first = Err(e.to_string()),
        }
    }
    for name in ["config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"]
    {
        checkpoint.json(name).map_err(|e| e.to_string())?;
    }
    checkpoint.json("tokenizer.json").map_err(|e| e.to_string())?;
    checkpoint.text("chat_template.jinja").map_err(|e| e.to_string())?;
    first
}

#[test]
fn keys_of_a_model_that_lie_are_refused_by_their_name() {
    let folder = Folder::new();
    read_all(&gguf_with(&folder, "good.gguf", &keys())).unwrap();
    let long = "x".repeat(5000);
    let number = |n: u32| Some(GgufMeta::U32(n));
    let cases: Vec<(&str, Option<GgufMeta>, &str)> = vec![
        ("general.architecture", Some("llama".into()), "must be glm4, found \"llama\""),
        ("general.architecture", None, "must be a string, found nothing"),
        ("glm4.block_count", number(513), "from 1 to 512, found 513"),
        ("glm4.block_count", number(0), "from 1 to 512, found 0"),
        ("glm4.block_count", Some("1".into()), "from 1 to 512, found \"1\""),
        ("glm4.block_count", None, "found nothing"),
        ("glm4.attention.head_count", number(0), "found 0"),
        ("glm4.attention.head_count", number(3), "must be a divisor of"),
        ("glm4.attention.head_count", Some(GgufMeta::U32s(vec![2])), "found an array of 1 values"),
        ("glm4.embedding_length", number(u32::MAX), "found 4294967295"),
        ("glm4.rope.dimension_count", number(64), "from 2 to 16, found 64"),
        ("glm4.rope.dimension_count", number(7), "an even number, found 7"),
        ("glm4.rope.dimension_sections", Some(GgufMeta::I32s(vec![-2, 5, 1, 0])), "3 numbers that sum to 4"),
        ("glm4.rope.dimension_sections", Some(GgufMeta::U32s(vec![1; 4])), "3 numbers that sum to 4"),
        ("glm4.rope.dimension_sections", Some(GgufMeta::U32s(vec![0; 1 << 16])), "found an array of 65536"),
        ("glm4.rope.freq_base", Some(f32::NAN.into()), "a number from 1 to 1000000000, found NaN"),
        ("glm4.attention.layer_norm_rms_epsilon", Some((-1f32).into()), "found -1"),
        ("split.count", number(3), "join split files first"),
        ("tokenizer.ggml.model", Some("llama".into()), "must be gpt2"),
        ("tokenizer.ggml.pre", Some("qwen2".into()), "must be glm4 or chatglm-bpe"),
        ("tokenizer.ggml.tokens", Some("x".into()), "must be an array"),
        (
            "tokenizer.ggml.tokens",
            Some(GgufMeta::U32s(vec![1; 261])),
            "strings in UTF-8 of at most 4096 bytes",
        ),
        (
            "tokenizer.ggml.tokens",
            Some(GgufMeta::Strings(vec![long; 261])),
            "strings in UTF-8 of at most 4096 bytes",
        ),
        (
            "tokenizer.ggml.token_type",
            Some(GgufMeta::I32s(vec![1; 4])),
            "an array of 261 values, one a token",
        ),
        (
            "tokenizer.ggml.token_type",
            Some(GgufMeta::I32s(vec![-3; 261])),
            "numbers from 1 to 6 (see token 0)",
        ),
        (
            "tokenizer.ggml.merges",
            Some(GgufMeta::Strings(vec!["he".into()])),
            "two tokens with a space between",
        ),
        ("tokenizer.ggml.eos_token_id", number(261), "from 0 to 260, found 261"),
        ("tokenizer.chat_template", number(1), "must be a string, found 1"),
    ];
    for (key, value, wanted) in cases {
        let mut keys = keys();
        keys.retain(|(k, _)| k != key);
        keys.extend(value.map(|v| (key.to_owned(), v)));
        let path = gguf_with(&folder, "bad.gguf", &keys);
        let error = read_all(&path).expect_err(key);
        assert!(error.contains(key) && error.contains(wanted), "{key}: {error}");
        assert!(error.contains("bad.gguf"), "{key}: {error}");
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn infinite_scales_are_found_where_they_are_looked_for() {
    let folder = Folder::new();
    let path = gguf_with(&folder, "inf.gguf", &keys());
    let options = OpenOptions { check_finite: true, mode: ReadMode::Read, mmproj: None };
    Checkpoint::open(&path, &options).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // The data of the last tensors: q4_0 rows of 18 bytes, then f16.
    let end = bytes.len() - 32 * 32 * 2;
    let k = end - (16 * 18usize).next_multiple_of(32);
    bytes[k + 18..k + 20].copy_from_slice(&[0x00, 0x7c]);
    std::fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(&path, &options).unwrap_err().to_string();
    assert!(error.contains("tensor `blk.0.attn_k.weight`: element 32 is NaN or infinite"), "{error}");
}

#[test]
fn a_gguf_file_cut_at_any_length_is_an_error() {
    let folder = Folder::new();
    let path = gguf_with(&folder, "whole.gguf", &keys());
    let whole = std::fs::read(&path).unwrap();
    let file = parse(&whole).unwrap();
    // The last tensor need not be padded in the file.
    let end = whole.len() - (32 * 32 * 2usize).next_multiple_of(32) + 32 * 32 * 2;
    assert_eq!(file.names().count(), 6);
    let cuts = (0..end).map(|n| whole[..n].to_vec());
    let (accepted, refused) = each_is_bounded(cuts, |bytes| parse(bytes).is_ok());
    assert_eq!((accepted, refused), (0, end));
}

#[test]
fn mutated_gguf_files_neither_panic_nor_hang_nor_take_memory() {
    let folder = Folder::new();
    let small = std::fs::read(gguf_with(&folder, "small.gguf", &keys())).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf/text.gguf");
    let golden = std::fs::read(golden).unwrap();
    let header = small.len() - tensors().iter().map(TensorInfo::bytes).sum::<usize>();
    let mut numbers = Numbers(42);
    let files = (0..2000).map(|i| match i % 4 {
        0 => numbers.mutated(&golden, golden.len()),
        1 => numbers.mutated(&small, small.len()),
        // Counts, types and lengths stand at the very start and, of tensors, at the end of the header.
        2 => numbers.mutated(&small, 200),
        _ => {
            let (front, back) = small.split_at(header - 700);
            [front, &numbers.mutated(back, 700)].concat()
        }
    });
    let path = folder.0.join("mutated.gguf");
    let (accepted, refused) = each_is_bounded(files, |bytes| {
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        read_all(&path).is_ok()
    });
    println!("{accepted} accepted, {refused} refused");
    // Both kinds must occur, or the test would show nothing.
    assert!(accepted > 50 && refused > 1000, "{accepted} accepted, {refused} refused");
}

// --- pglm

fn pglm(folder: &Folder) -> Vec<u8> {
    let path = folder.0.join("good.pglm");
    let int4 = DType::from_name("int4-g32-asym").unwrap();
    let tensor =
        |name: &str, dtype, shape: &[usize]| TensorInfo { name: name.into(), dtype, shape: shape.to_vec() };
    let contents = PglmContents {
        tensors: vec![
            tensor("a", DType::F32, &[3]),
            tensor("b", int4, &[2, 40]),
            tensor("c", DType::Block(Block::Q4_0), &[2, 32]),
        ],
        files: vec![
            ("config.json".into(), b"{\"n\": 1}".to_vec()),
            ("tokenizer.json".into(), b"{}".to_vec()),
        ],
        policy: Some("* = int4"),
        ..PglmContents::default()
    };
    let mut writer = PglmWriter::create(&path, &contents, &[]).unwrap();
    for info in &contents.tensors {
        writer.write(&info.name, &vec![7; info.bytes()]).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

fn open_pglm(bytes: &[u8]) -> pocketglm_checkpoint::Result<PglmFile> {
    PglmFile::new(SafetensorsFile::parse(FileBytes::from_bytes("x.pglm", Bytes::from(bytes.to_vec())))?)
}

fn header_end(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize
}

/// The same file with the hash that its changed header has now, so that a reader looks further than the hash.
fn rehashed(mut bytes: Vec<u8>) -> Vec<u8> {
    let key = b"\"pglm.header\":\"";
    let Some(at) = bytes.windows(key.len()).position(|w| w == key) else { return bytes };
    let digits = at + key.len()..at + key.len() + 64;
    let end = header_end(&bytes);
    if digits.end > end || end > bytes.len() {
        return bytes;
    }
    bytes[digits.clone()].fill(b'0');
    let hash: String = Sha256::digest(&bytes[8..end]).iter().map(|b| format!("{b:02x}")).collect();
    bytes[digits].copy_from_slice(hash.as_bytes());
    bytes
}

#[test]
fn every_changed_byte_of_a_pglm_file_is_noticed() {
    let folder = Folder::new();
    let good = pglm(&folder);
    open_pglm(&good).unwrap().verify(&mut |_, _| {}).unwrap();
    let (mut at_open, mut at_verify) = (0, 0);
    for at in 0..good.len() {
        for change in [1u8, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            match open_pglm(&bytes) {
                Err(_) => at_open += 1,
                Ok(file) => {
                    let error = file.verify(&mut |_, _| {}).expect_err("the change of byte {at}").to_string();
                    assert!(error.contains("x.pglm") && error.contains("is damaged"), "{error}");
                    at_verify += 1;
                }
            }
        }
    }
    assert_eq!(at_open + at_verify, 3 * good.len());
    assert_eq!(at_open, 3 * header_end(&good), "a changed header is noticed when the file is opened");
}

#[test]
fn pglm_metadata_that_lie_are_refused_even_with_the_right_hash() {
    let folder = Folder::new();
    let good = pglm(&folder);
    open_pglm(&rehashed(good.clone())).unwrap();
    let end = header_end(&good);
    let change = |from: &str, to: &str| {
        let header = std::str::from_utf8(&good[8..end]).unwrap();
        assert!(header.contains(from), "{from} is not in {header}");
        let mut header = header.replacen(from, to, 1).into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &good[end..]].concat();
        open_pglm(&rehashed(bytes)).expect_err(to).to_string()
    };
    for (from, to, wanted) in [
        (r#""pglm.version":"1""#, r#""pglm.version":"2""#, "version `2`, expected 1"),
        (r#""pglm.version""#, r#""pglm.varsion""#, "no `pglm.version`"),
        (r#""pglm.tensors""#, r#""pglm.tansors""#, "no `pglm.tensors`"),
        (r#""pglm.header""#, r#""pglm.haader""#, "no `pglm.header`"),
        (r#"int4-g32-asym"#, r#"int4-g99-asym"#, "unknown format `int4-g99-asym`"),
        (r#"int4-g32-asym"#, r#"int4-g32"#, "shape [2, 40] of the format int4-g32 needs U8"),
        (r#"\"layout\":\"rows\""#, r#"\"layout\":\"cols\""#, "unknown layout `cols`, expected rows"),
        (r#"\"shape\":[2,40]"#, r#"\"shape\":[99,40]"#, "needs U8 of shape"),
        (r#"\"shape\":[2,40]"#, r#"\"shape\":[4294967296,4294967296,40]"#, "is none of the format"),
        (r#"\"shape\":[2,40]"#, r#"\"shape\":[1,1,1,1,1,1,1,2,40]"#, "9 dimensions, expected at most 8"),
        (r#"\"shape\":[2,32]"#, r#"\"shape\":[2,33]"#, "is none of the format Q4_0"),
        (r#"\"c\":"#, r#"\"d\":"#, "tensor `d`: the file has no such tensor"),
        (r#"\"sha256\":\""#, r#"\"sha256\":\"0"#, "expected 64 digits"),
    ] {
        let error = change(from, to);
        assert!(error.contains(wanted), "{to}: {error}");
        assert!(error.contains("x.pglm"), "{error}");
    }
    // A tensor that the table does not have.
    let error = change(r#""pad:0":"#, r#""stray":"#);
    assert!(error.contains("tensor `stray` is not in `pglm.tensors`"), "{error}");
    // The wrong hash alone.
    let mut bytes = good.clone();
    let at = end - 1;
    assert_eq!(bytes[at], b' ');
    bytes[at] = b'\n';
    let error = open_pglm(&bytes).unwrap_err().to_string();
    assert!(error.contains("the header is damaged: expected SHA-256"), "{error}");
}

#[test]
fn a_pglm_file_cut_at_any_length_is_an_error() {
    let folder = Folder::new();
    let whole = pglm(&folder);
    let cuts = (0..whole.len()).map(|n| whole[..n].to_vec());
    let (accepted, refused) = each_is_bounded(cuts, |bytes| open_pglm(bytes).is_ok());
    assert_eq!((accepted, refused), (0, whole.len()));
}

#[test]
fn mutated_pglm_files_neither_panic_nor_hang_nor_take_memory() {
    let folder = Folder::new();
    let good = pglm(&folder);
    let end = header_end(&good);
    let mut numbers = Numbers(7);
    let files = (0..2000).map(|i| {
        if i % 4 == 0 {
            return numbers.mutated(&good, good.len());
        }
        let mut header = numbers.mutated(&good[8..end], end - 8);
        header.truncate(end + 256);
        rehashed([&(header.len() as u64).to_le_bytes()[..], &header, &good[end..]].concat())
    });
    let (accepted, refused) = each_is_bounded(files, |bytes| {
        let Ok(file) = open_pglm(bytes) else { return false };
        for info in file.tensors() {
            assert_eq!(file.get(&info.name).unwrap().shape(), info.shape);
        }
        let names: Vec<String> = file.files().map(str::to_owned).collect();
        for name in &names {
            let read = file.file(name);
            assert!(matches!(read, Ok(Some(_)) | Err(Error::Damaged { .. })), "{read:?}");
        }
        let _ = file.verify(&mut |_, _| {});
        let _ = file.check_finite();
        true
    });
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 20 && refused > 1000, "{accepted} accepted, {refused} refused");
}

#[test]
fn a_pglm_file_is_a_safetensors_file_for_the_reference_reader() {
    let folder = Folder::new();
    let bytes = pglm(&folder);
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = open_pglm(&bytes).unwrap();
    assert_eq!(theirs.tensor("a").unwrap().shape(), [3]);
    assert_eq!(theirs.tensor("b").unwrap().dtype(), safetensors::Dtype::U8);
    // Matrices stand as the kernels read them; `get` gives the rows again.
    let panels = ours.get_packed("b").unwrap().unwrap();
    assert_eq!(theirs.tensor("b").unwrap().data(), panels.bytes());
    assert_eq!(ours.get("b").unwrap().bytes(), vec![7; 52]);
    assert_eq!(theirs.tensor("file:config.json").unwrap().data(), b"{\"n\": 1}");
    // Everything is aligned to 64 in the file.
    for (name, tensor) in theirs.tensors() {
        let at = tensor.data().as_ptr().addr() - bytes.as_ptr().addr();
        assert!(at.is_multiple_of(64) || name.starts_with("pad:"), "{name} at {at}");
    }
}

#[test]
fn a_pglm_file_gives_back_what_was_put_in() {
    let folder = Folder::new();
    let path = gguf_with(&folder, "text.gguf", &keys());
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    let files: Vec<(String, Vec<u8>)> =
        checkpoint.side_files().unwrap().into_iter().map(|(n, b)| (n, b.as_slice().to_vec())).collect();
    assert!(files.len() >= 5);
    let contents = PglmContents {
        files: files.clone(),
        policy: Some("text \"with\" quotes\n"),
        calibration: Some("sha256:0"),
        extra: [("source".to_owned(), "text.gguf".to_owned())].into(),
        ..PglmContents::default()
    };
    let target = folder.0.join("model.pglm");
    let mut last = (0, 0);
    export_pglm(&target, &checkpoint, contents, &checkpoint.files(), &mut |done, total| last = (done, total))
        .unwrap();
    assert!(last.0 == last.1 && last.0 > 0);
    let pglm = PglmFile::open(&target, ReadMode::Map).unwrap();
    assert_eq!(pglm.policy(), Some("text \"with\" quotes\n"));
    assert_eq!(pglm.calibration(), Some("sha256:0"));
    assert_eq!(pglm.extra().collect::<Vec<_>>(), [("source", "text.gguf")]);
    pglm.verify(&mut |done, total| last = (done, total)).unwrap();
    assert_eq!((last.0, pglm.hash().len()), (last.1, 64));
    assert_eq!(pglm.tensors(), checkpoint.tensors());
    for info in checkpoint.tensors() {
        assert_eq!(pglm.tensor(&info.name).unwrap().bytes(), checkpoint.tensor(&info.name).unwrap().bytes());
    }
    let again = Checkpoint::open(&target, &OpenOptions::default()).unwrap();
    for (name, content) in files {
        assert_eq!(again.bytes(&name).unwrap().unwrap().as_slice(), content, "{name}");
    }
    // The metadata are what makes it one, not the name; but a file of that name without them is refused.
    let other = folder.0.join("model.safetensors");
    std::fs::copy(&target, &other).unwrap();
    assert_eq!(Checkpoint::open(&other, &OpenOptions::default()).unwrap().tensors(), checkpoint.tensors());
}

#[test]
fn writers_refuse_their_inputs_and_what_their_files_cannot_hold() {
    let folder = Folder::new();
    let path = gguf_with(&folder, "text.gguf", &keys());
    let before = std::fs::read(&path).unwrap();
    let info =
        |name: &str, dtype, shape: &[usize]| TensorInfo { name: name.into(), dtype, shape: shape.to_vec() };
    let error = |e: pocketglm_checkpoint::Result<PglmWriter>| match e {
        Ok(_) => panic!("this must fail"),
        Err(e) => e.to_string(),
    };
    let gguf_error = |tensors: &[TensorInfo]| match GgufWriter::create(&folder.0.join("o"), &[], tensors, &[])
    {
        Ok(_) => panic!("this must fail"),
        Err(e) => e.to_string(),
    };
    // By another name too.
    std::fs::create_dir(folder.0.join("sub")).unwrap();
    let aside = folder.0.join("sub/../text.gguf");
    let message = error(PglmWriter::create(&aside, &PglmContents::default(), &[&path]));
    assert!(message.contains("which is being read"), "{message}");
    assert_eq!(std::fs::read(&path).unwrap(), before);

    let target = folder.0.join("x.pglm");
    let with = |tensors: Vec<TensorInfo>| PglmContents { tensors, ..PglmContents::default() };
    for (contents, wanted) in [
        (with(vec![info("file:x", DType::U8, &[1])]), "cannot have the name `file:x`"),
        (with(vec![info("pad:0", DType::U8, &[1])]), "cannot have the name `pad:0`"),
        (with(vec![info("a", DType::U8, &[1]), info("a", DType::U8, &[1])]), "declared twice"),
        (with(vec![info("a", DType::Block(Block::Q4_0), &[33])]), "no shape of the format Q4_0"),
        (with(vec![info("a", DType::F32, &[usize::MAX, 2])]), "too large"),
        (
            PglmContents { files: vec![("../x".into(), vec![])], ..PglmContents::default() },
            "not a plain file name",
        ),
        (
            PglmContents { extra: [("pglm.x".to_owned(), String::new())].into(), ..PglmContents::default() },
            "begins with pglm.",
        ),
    ] {
        let message = error(PglmWriter::create(&target, &contents, &[]));
        assert!(message.contains(wanted), "{message}");
    }
    let message = gguf_error(&[info("a", DType::from_name("int4-g64").unwrap(), &[1, 64])]);
    assert!(message.contains("GGUF has no format int4-g64"), "{message}");
    let message = gguf_error(&[info("a", DType::F32, &[1, 1, 1, 1, 1])]);
    assert!(message.contains("expected 1 to 4 dimensions"), "{message}");
    let message = gguf_error(&[info(&"n".repeat(64), DType::F32, &[1])]);
    assert!(message.contains("a name of 1 to 63 bytes"), "{message}");

    // Two writers at once, bytes that are too many or missing.
    let contents = with(vec![info("a", DType::U8, &[2])]);
    let mut first = PglmWriter::create(&target, &contents, &[]).unwrap();
    let message = error(PglmWriter::create(&target, &contents, &[]));
    assert!(message.contains("another process is writing"), "{message}");
    assert!(first.write("a", &[1; 3]).unwrap_err().to_string().contains("has 2 bytes, 3 were given"));
    assert!(first.write("b", &[1]).unwrap_err().to_string().contains("not declared"));
    assert!(first.finish().unwrap_err().to_string().contains("1 tensors are incomplete"));
    assert!(!target.exists());
    // The failed one left nothing that is in the way.
    let mut second = PglmWriter::create(&target, &contents, &[]).unwrap();
    second.write("a", &[1, 2]).unwrap();
    second.finish().unwrap();
    let names: Vec<_> = std::fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|n| !n.to_string_lossy().contains("partial")), "{names:?}");
}
