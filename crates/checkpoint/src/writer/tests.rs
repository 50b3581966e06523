use ::safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
use pocketglm_tensor::{DType, WeightSource};

use super::*;
use crate::test_support::TempDir;
use crate::{ReadMode, SafetensorsFile};

fn info(name: &str, dtype: DType, shape: &[usize]) -> TensorInfo {
    TensorInfo { name: name.into(), dtype, shape: shape.to_vec() }
}

/// One tensor of every type with an odd count, narrow types declared first; and the bytes of each.
fn mixed() -> Vec<(TensorInfo, Vec<u8>)> {
    let infos = [
        info("bytes", DType::U8, &[3]),
        info("half", DType::F16, &[5]),
        info("empty", DType::F32, &[0, 7]),
        info("scalar", DType::F32, &[]),
        info("brain \"quoted\" \u{1f600}", DType::BF16, &[1, 3]),
        info("long", DType::I64, &[1]),
        info("int", DType::I32, &[3]),
    ];
    let fill = |t: &TensorInfo| (0..t.bytes()).map(|i| (i * 7 + t.name.len()) as u8).collect();
    infos.into_iter().map(|t| (t.clone(), fill(&t))).collect()
}

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".into(), "pt".into()), ("k\n".into(), "v\"".into())])
}

#[test]
fn written_files_are_aligned_and_read_back_by_both_readers() {
    let dir = TempDir::new();
    let path = dir.path().join("x.safetensors");
    let tensors = mixed();
    let infos: Vec<_> = tensors.iter().map(|(t, _)| t.clone()).collect();
    let mut writer = SafetensorsWriter::create(&path, &infos, &metadata()).unwrap();
    // One byte at a time and in turns, the hardest order.
    for i in 0..16 {
        for (t, bytes) in &tensors {
            writer.write(&t.name, bytes.get(i..i + 1).unwrap_or(&[])).unwrap();
        }
    }
    writer.finish().unwrap();
    assert_eq!(dir.names(), ["x.safetensors"]);

    let bytes = std::fs::read(&path).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap().len(), 2);
    let ours = SafetensorsFile::open(&path, ReadMode::Map).unwrap();
    assert_eq!(*ours.metadata(), metadata());
    assert_eq!(ours.tensors().len(), tensors.len());
    for (t, data) in &tensors {
        let theirs = reference.tensor(&t.name).unwrap();
        assert_eq!((theirs.shape(), theirs.data()), (&t.shape[..], &data[..]));
        assert_eq!(theirs.dtype().to_string(), t.dtype.name());
        let tensor = ours.get(&t.name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape(), tensor.bytes()), (t.dtype, &t.shape[..], &data[..]));
        let offset = theirs.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % t.dtype.alignment(), 0, "{} is unaligned", t.name);
    }
    let header_length = u64::from_le_bytes(*bytes.first_chunk().unwrap());
    assert_eq!((8 + header_length) % 64, 0);
}

#[test]
fn files_of_the_reference_writer_are_read() {
    let data: Vec<u8> = (0..24).collect();
    let views = [
        ("x", TensorView::new(Dtype::F16, vec![2, 3], &data[..12]).unwrap()),
        ("y", TensorView::new(Dtype::I64, vec![3], &data).unwrap()),
        ("z", TensorView::new(Dtype::F64, vec![3], &data).unwrap()),
    ];
    let written = serialize(views, Some([("a".to_owned(), "b".to_owned())].into())).unwrap();
    let file = crate::FileBytes::from_bytes("ref", written.into());
    let file = SafetensorsFile::parse(file).unwrap();
    assert_eq!(file.metadata()["a"], "b");
    assert_eq!(file.get("x").unwrap().bytes(), &data[..12]);
    assert_eq!(file.get("y").unwrap().shape(), [3]);
    assert!(file.contains("z") && file.get("z").is_err());
}

#[test]
fn dropped_and_incomplete_writers_leave_the_old_file() {
    let dir = TempDir::new();
    let path = dir.write("x.safetensors", "old");
    let infos = [info("a", DType::U8, &[4]), info("b", DType::U8, &[2])];

    let mut writer = SafetensorsWriter::create(&path, &infos, &BTreeMap::new()).unwrap();
    writer.write("a", &[1, 2, 3]).unwrap();
    assert_eq!(dir.names().len(), 2, "the temporary file stands beside the old one");
    drop(writer);
    assert_eq!(dir.names(), ["x.safetensors"]);

    let mut writer = SafetensorsWriter::create(&path, &infos, &BTreeMap::new()).unwrap();
    writer.write("a", &[1, 2, 3]).unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert!(error.ends_with("tensor `a` has 4 bytes, 3 were given (2 tensors are incomplete)"), "{error}");
    assert_eq!(dir.names(), ["x.safetensors"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn surplus_bytes_and_undeclared_tensors_are_refused_and_writing_can_go_on() {
    let dir = TempDir::new();
    let path = dir.path().join("x");
    let infos = [info("a", DType::U8, &[4])];
    let mut writer = SafetensorsWriter::create(&path, &infos, &BTreeMap::new()).unwrap();
    writer.write("a", &[1, 2]).unwrap();
    assert!(writer.write("a", &[0; 3]).unwrap_err().to_string().ends_with("has 4 bytes, 5 were given"));
    assert!(writer.write("b", &[]).unwrap_err().to_string().ends_with("`b` was not declared"));
    writer.write("a", &[3, 4]).unwrap();
    writer.finish().unwrap();
    let file = SafetensorsFile::open(&path, ReadMode::Map).unwrap();
    assert_eq!(file.get("a").unwrap().bytes(), [1, 2, 3, 4]);
}

#[test]
fn declarations_that_no_reader_accepts_are_refused() {
    let dir = TempDir::new();
    let path = dir.path().join("x");
    for (infos, what) in [
        (vec![info("a", DType::U8, &[1]), info("a", DType::F32, &[1])], "declared twice"),
        (vec![info("__metadata__", DType::U8, &[1])], "cannot have the name"),
        (vec![info("a", DType::U8, &[1; 9])], "9 dimensions, expected at most 8"),
        (vec![info("a", DType::F32, &[1 << 62, 4])], "too large"),
        (vec![info("a", DType::U8, &[1 << 62]), info("b", DType::U8, &[1 << 62])], "too large"),
        (vec![info(&"n".repeat(100_000_001), DType::U8, &[0])], "expected at most 100000000"),
    ] {
        let Err(error) = SafetensorsWriter::create(&path, &infos, &BTreeMap::new()) else {
            panic!("accepted: {what}")
        };
        assert!(error.to_string().contains(what), "{error}");
    }
    assert!(dir.names().is_empty());
}

/// A child process writes the same file again and again until it is killed; whatever stands under the final
/// name must then be one whole version.
#[cfg(unix)]
#[test]
fn killed_writer_never_leaves_half_a_file_under_the_final_name() {
    const ROLE: &str = "POCKETGLM_TEST_WRITES_UNTIL_KILLED";
    const BYTES: usize = 1 << 20;
    if let Some(path) = std::env::var_os(ROLE) {
        // Ends by itself, should the parent die first.
        for version in (0u8..=255).cycle().take(5000) {
            let infos = [info("a", DType::U8, &[BYTES])];
            let mut writer = SafetensorsWriter::create(Path::new(&path), &infos, &BTreeMap::new()).unwrap();
            for _ in 0..64 {
                writer.write("a", &[version; BYTES / 64]).unwrap();
            }
            writer.finish().unwrap();
        }
        std::process::exit(0);
    }
    let name = "writer::tests::killed_writer_never_leaves_half_a_file_under_the_final_name";
    let mut leftovers = 0;
    for round in 0..30 {
        let dir = TempDir::new();
        let path = dir.path().join("x.safetensors");
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(ROLE, &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let start = std::time::Instant::now();
        while !path.exists() {
            assert!(start.elapsed().as_secs() < 60, "the child writes nothing");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let file = SafetensorsFile::open(&path, ReadMode::Map).unwrap();
        let tensor = file.get("a").unwrap();
        assert_eq!(tensor.elements(), BYTES);
        let first = tensor.bytes()[0];
        assert!(tensor.bytes().iter().all(|&b| b == first), "two versions in one file");
        leftovers += dir.names().len() - 1;
    }
    // Some kills must have hit in the middle of a version, or the test would show nothing.
    assert!(leftovers > 0);
}
