//! The golden files: tiny checkpoints and what the reference implementation computes with them.

use std::path::PathBuf;

use pocketglm::{Content, Message, Part, Picture, Request};
use safetensors::SafeTensors;
use serde_json::Value;

/// Every checkpoint folder, with the folder whose expected numbers it shares.
pub const CHECKPOINTS: &[(&str, &str)] = &[
    ("default", "default"),
    ("real-head-dim", "real-head-dim"),
    ("kv-heads-1", "kv-heads-1"),
    ("kv-heads-all", "kv-heads-all"),
    ("kv-heads-8-2", "kv-heads-8-2"),
    ("patch-8", "patch-8"),
    ("merge-3", "merge-3"),
    ("temporal-1", "temporal-1"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("tied", "tied"),
    ("eps", "eps"),
    ("sharded-v4", "bf16"),
    ("other-names", "bf16"),
];

/// A path below `tests/golden`.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The tensors of one golden file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    /// Reads a file below `tests/golden`.
    ///
    /// # Panics
    /// Where the file is not there: it is part of the repository.
    #[allow(clippy::panic)] // Golden files are part of the repository.
    pub fn open(name: &str) -> Tensors {
        let path = path(name);
        Tensors(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn view<R>(&self, name: &str, read: impl FnOnce(&safetensors::tensor::TensorView<'_>) -> R) -> Option<R> {
        let all = SafeTensors::deserialize(&self.0).ok()?;
        all.tensor(name).ok().map(|t| read(&t))
    }

    /// A tensor as f32, if the file has it.
    pub fn f32(&self, name: &str) -> Option<Vec<f32>> {
        self.view(name, |t| t.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect())
    }

    /// A tensor as i64, if the file has it.
    pub fn i64(&self, name: &str) -> Option<Vec<i64>> {
        self.view(name, |t| t.data().as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect())
    }

    /// A `[h, w, 3]` or `[frames, h, w, 3]` picture tensor as pictures.
    pub fn pictures(&self, name: &str) -> Option<Vec<Picture>> {
        self.view(name, |t| {
            let shape = t.shape();
            let (h, w) = (shape[shape.len() - 3], shape[shape.len() - 2]);
            t.data().chunks_exact(h * w * 3).filter_map(|p| Picture::rgb8(w, h, p.to_vec()).ok()).collect()
        })
    }
}

/// A case of a checkpoint: its request with the golden pictures, and its expected values.
pub struct Case {
    /// Name of the case.
    pub name: String,
    /// The conversation.
    pub request: Request,
    /// What `expected.json` says.
    pub expected: Value,
    /// Its tensors.
    pub tensors: Tensors,
}

/// All cases of a checkpoint.
///
/// # Panics
/// Where golden files are missing or unreadable.
#[allow(clippy::panic, clippy::expect_used)] // Golden files are part of the repository.
pub fn cases(expected_in: &str) -> Vec<Case> {
    let json = std::fs::read(path(&format!("{expected_in}/golden/expected.json"))).expect("expected.json");
    let expected: Value = serde_json::from_slice(&json).expect("expected.json is JSON");
    let cases = expected["cases"].as_object().expect("cases").clone();
    cases
        .into_iter()
        .map(|(name, expected)| Case {
            request: request(&expected["messages"], &name),
            tensors: Tensors::open(&format!("{expected_in}/golden/{name}.safetensors")),
            name,
            expected,
        })
        .collect()
}

/// The conversation of a case, with the pictures that all checkpoints share.
#[allow(clippy::panic, clippy::expect_used)] // Golden files are part of the repository.
fn request(messages: &Value, case: &str) -> Request {
    let first =
        || Tensors::open("default/golden/image.safetensors").pictures("image.0.raw_u8").expect("picture 0");
    let mut pictures = match case {
        "text" => Vec::new(),
        "image" => first(),
        "two_images" => {
            let second = Tensors::open("default/golden/two_images.safetensors").pictures("image.1.raw_u8");
            [first(), second.expect("picture 1")].concat()
        }
        "video" => Vec::new(),
        other => panic!("unknown case {other}"),
    }
    .into_iter();
    let text = |v: &Value| v.as_str().expect("text").to_string();
    let mut part = |p: &Value| match p["type"].as_str() {
        Some("text") => Part::Text(text(&p["text"])),
        Some("image") => Part::Image(pictures.next().expect("a picture for each image")),
        Some("video") => Part::Video {
            frames: Tensors::open("default/golden/video.safetensors")
                .pictures("video.raw_u8")
                .expect("frames"),
            seconds: vec![0, 1, 2, 3],
        },
        other => panic!("unknown part {other:?}"),
    };
    let messages = messages.as_array().expect("messages").iter().map(|m| {
        let content = match &m["content"] {
            Value::String(s) => Content::Text(s.clone()),
            parts => Content::Parts(parts.as_array().expect("parts").iter().map(&mut part).collect()),
        };
        Message { role: text(&m["role"]), content }
    });
    Request::Messages(messages.collect())
}

/// Relative L2 distance: `|a - b| / |b|`; infinite where the lengths differ or a value is not finite.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() || b.is_empty() || a.iter().chain(b).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let square = |v: f64| v * v;
    let distance: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (distance / norm.max(f64::MIN_POSITIVE)).sqrt()
}
