//! Reading weights before they are asked for, on a thread of its own, while text tools and graphs are made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use pocketglm_glm::AUDIO_SCOPE;
use pocketglm_tensor::{Bytes, WeightSource};

use crate::model::VISION_SCOPE;

/// Bytes between two looks at whether there is still somebody who wants them.
const STEP: usize = 1 << 20;

/// Reads the matrices that kernels use as they lie in a mapped file, in the order of the file, until this is dropped.
///
/// A page that is in the system's cache already still has to get into the process's tables: on many cores that are busy, or on
/// one that has nothing else to do. Prompts need all of the decoder; encoders wait for their first picture or clip.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    /// `None` where nothing is used as it lies, or there are no threads.
    pub fn start(weights: &dyn WeightSource) -> Option<ReadAhead> {
        let matrices = decoder_matrices(weights);
        if matrices.is_empty() {
            return None;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            let pieces = matrices.iter().flat_map(pieces);
            pieces.take_while(|_| !stopped.load(Ordering::Relaxed)).for_each(|piece| piece.prefetch());
        };
        let thread = std::thread::Builder::new().name("pocketglm-ahead".into()).spawn(work).ok()?;
        Some(ReadAhead { stop, thread: Some(thread) })
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It ends within a step, and with it its hold on the file.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The bytes of the decoder's packed matrices. What cannot be read is reported by whoever needs it.
fn decoder_matrices(weights: &dyn WeightSource) -> Vec<Bytes> {
    let tensors = weights.tensors().into_iter();
    let decoder =
        tensors.filter(|t| ![VISION_SCOPE, AUDIO_SCOPE].iter().any(|scope| t.name.starts_with(scope)));
    decoder.filter_map(|t| weights.packed(&t.name).ok().flatten()).map(|p| p.shared_bytes()).collect()
}

fn pieces(bytes: &Bytes) -> impl Iterator<Item = Bytes> + '_ {
    (0..bytes.len()).step_by(STEP).filter_map(|at| bytes.slice(at..bytes.len().min(at + STEP)))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Mutex;

    use pocketglm_tensor::{Block, BytesOwner, DType, Packed, PackedFormat, Tensor, TensorInfo};

    use super::*;

    /// Bytes that remember what was asked for.
    struct Asked {
        bytes: Vec<u8>,
        ranges: Mutex<Vec<Range<usize>>>,
    }

    impl BytesOwner for Asked {
        fn bytes(&self) -> &[u8] {
            &self.bytes
        }

        fn prefetch(&self, range: Range<usize>) {
            self.ranges.lock().unwrap().push(range);
        }
    }

    /// Three matrices in one run of bytes, each as long as a third of it, and a vector.
    struct File(Arc<Asked>);

    const NAMES: [&str; 3] =
        ["model.language_model.layers.0.w", "model.visual.blocks.0.w", "model.language_model.layers.1.w"];
    const ROWS: usize = 20_000;
    const K: usize = 256;

    fn format() -> PackedFormat {
        PackedFormat::of(DType::Block(Block::Q8_0)).unwrap()
    }

    fn length() -> usize {
        Packed::bytes_for(format(), ROWS, K).unwrap()
    }

    impl WeightSource for File {
        fn tensors(&self) -> Vec<TensorInfo> {
            let matrix = |name: &str| TensorInfo {
                name: name.into(),
                dtype: DType::Block(Block::Q8_0),
                shape: vec![ROWS, K],
            };
            NAMES.map(matrix).into()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            self.tensors().into_iter().find(|t| t.name == name)
        }

        fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
            Err(pocketglm_tensor::Error::Missing { name: name.into(), place: "a test".into() })
        }

        fn packed(&self, name: &str) -> pocketglm_tensor::Result<Option<Packed>> {
            let at = NAMES.iter().position(|n| *n == name).unwrap() * length();
            let bytes = Bytes::from_owner(self.0.clone()).slice(at..at + length()).unwrap();
            Packed::from_bytes(format(), ROWS, K, bytes).map(Some)
        }
    }

    fn file() -> File {
        File(Arc::new(Asked { bytes: vec![0; 3 * length()], ranges: Mutex::new(Vec::new()) }))
    }

    #[test]
    fn all_matrices_of_the_decoder_are_read_and_none_of_the_vision_encoder() {
        let file = file();
        let ahead = ReadAhead::start(&file).unwrap();
        let wanted = [0..length(), 2 * length()..3 * length()];
        let covered = || {
            let ranges = file.0.ranges.lock().unwrap();
            ranges.iter().map(Range::len).sum::<usize>()
        };
        let start = std::time::Instant::now();
        while covered() < 2 * length() {
            assert!(start.elapsed().as_secs() < 60, "{} bytes were asked for", covered());
            std::thread::yield_now();
        }
        drop(ahead);
        let ranges = file.0.ranges.lock().unwrap();
        assert!(ranges.len() > 2, "in pieces");
        for range in ranges.iter() {
            assert!(wanted.iter().any(|w| w.start <= range.start && range.end <= w.end), "{range:?}");
        }
    }

    #[test]
    fn a_source_without_matrices_as_they_lie_needs_no_thread() {
        struct Plain(File);
        impl WeightSource for Plain {
            fn tensors(&self) -> Vec<TensorInfo> {
                self.0.tensors()
            }
            fn info(&self, name: &str) -> Option<TensorInfo> {
                self.0.info(name)
            }
            fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
                self.0.tensor(name)
            }
        }
        assert!(ReadAhead::start(&Plain(file())).is_none());
    }
}
