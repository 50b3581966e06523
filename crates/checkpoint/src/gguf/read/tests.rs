use pocketglm_tensor::Bytes;

use super::*;
use crate::gguf::{GgufMeta, GgufWriter};
use crate::test_support::{TempDir, golden};

fn parse(bytes: Vec<u8>) -> Result<GgufFile> {
    GgufFile::parse(FileBytes::from_bytes("x.gguf", Bytes::from(bytes)))
}

/// A file with one key of each kind and tensors of several.
fn sample() -> Vec<u8> {
    let dir = TempDir::new();
    let path = dir.path().join("x.gguf");
    let keys: Vec<(String, GgufMeta)> = vec![
        ("u".into(), 7u32.into()),
        ("f".into(), 0.1f32.into()),
        ("b".into(), true.into()),
        ("s".into(), "text".into()),
        ("us".into(), GgufMeta::U32s(vec![1, 2])),
        ("is".into(), GgufMeta::I32s(vec![-1, 2])),
        ("fs".into(), GgufMeta::F32s(vec![0.3, 2.0, -1.0])),
        ("ss".into(), GgufMeta::Strings(vec!["a".into(), String::new(), "\u{120}b".into()])),
    ];
    let tensor =
        |name: &str, dtype, shape: &[usize]| TensorInfo { name: name.into(), dtype, shape: shape.to_vec() };
    let tensors = [
        tensor("matrix", DType::F16, &[2, 3]),
        tensor("blocks", DType::from_name("Q5_K").unwrap(), &[1, 2, 256]),
        tensor("vector", DType::F32, &[5]),
    ];
    let mut writer = GgufWriter::create(&path, &keys, &tensors, &[]).unwrap();
    // In another order than declared, and in pieces.
    writer.write("vector", &[1; 7]).unwrap();
    writer.write("matrix", &[2; 12]).unwrap();
    writer.write("vector", &[1; 13]).unwrap();
    writer.write("blocks", &[3; 352]).unwrap();
    writer.finish().unwrap();
    assert_eq!(dir.names(), ["x.gguf"]);
    std::fs::read(path).unwrap()
}

#[test]
fn keys_and_tensors_are_read_back() {
    let file = parse(sample()).unwrap();
    assert_eq!((file.version(), file.keys().count()), (3, 8));
    assert_eq!(file.required("u", 0..=7).unwrap(), 7);
    // A float32 is what its shortest decimal says.
    assert_eq!(file.number("f", 0.0..=1.0).unwrap(), Some(0.1));
    assert_eq!(file.numbers::<3>("fs", -1.0..=2.0).unwrap(), Some([0.3, 2.0, -1.0]));
    assert_eq!(file.boolean("b").unwrap(), Some(true));
    assert_eq!(file.string("s").unwrap(), Some("text"));
    assert_eq!(file.numbers::<2>("is", -1.0..=2.0).unwrap(), Some([-1.0, 2.0]));
    let texts: Vec<String> = file
        .array("ss")
        .unwrap()
        .unwrap()
        .iter()
        .map(|v| match v {
            GgufValue::String(s) => String::from_utf8(s.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(texts, ["a", "", "\u{120}b"]);
    assert_eq!(file.integer("nothing", 0..=1).unwrap(), None);
    for (error, wanted) in [
        (file.integer("u", 0..=6).unwrap_err(), "key `u` at offset"),
        (file.integer("s", 0..=6).unwrap_err(), "found \"text\""),
        (file.boolean("u").unwrap_err(), "must be a bool, found 7"),
        (file.array("u").unwrap_err(), "must be an array"),
        (file.string("us").unwrap_err(), "found an array of 2 values of type uint32"),
        (file.numbers::<3>("us", 0.0..=9.0).unwrap_err(), "3 numbers from 0 to 9"),
    ] {
        assert!(error.to_string().contains(wanted), "{error}");
    }
    assert_eq!(file.names().collect::<Vec<_>>(), ["matrix", "blocks", "vector"]);
    assert_eq!(file.get("matrix").unwrap().bytes(), [2; 12]);
    assert_eq!(file.get("vector").unwrap().bytes(), [1; 20]);
    let blocks = file.tensor("blocks").unwrap();
    assert_eq!((blocks.dtype().name(), blocks.shape()), ("Q5_K", &[1, 2, 256][..]));
    let error = file.tensor("nothing").unwrap_err().to_string();
    assert_eq!(error, "no tensor `nothing` in x.gguf");
}

#[test]
fn version_two_is_read_like_version_three() {
    let mut bytes = sample();
    bytes[4] = 2;
    let file = parse(bytes).unwrap();
    assert_eq!((file.version(), file.names().count()), (2, 3));
}

#[test]
fn a_tensor_of_a_foreign_type_does_not_prevent_opening_and_is_named_when_asked_for() {
    let mut bytes = sample();
    // The type of `vector` (F32, 5 values in 20 bytes) follows its name, dimensions and size.
    let at = bytes.windows(6).position(|w| w == b"vector").unwrap() + 6 + 4 + 8;
    assert_eq!(bytes[at..at + 4], [0, 0, 0, 0]);
    bytes[at] = 24;
    // I8 takes 5 bytes, so the data behind it would be left over; the padding hides the difference.
    let file = parse(bytes).unwrap();
    assert!(file.contains("vector") && file.info("vector").is_none());
    assert_eq!(file.tensors().len(), 2);
    let error = file.get("vector").unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(
        error.to_string().contains("tensor `vector` has the unsupported type I8, expected F32"),
        "{error}"
    );
    let error = file.tensor("vector").unwrap_err();
    assert!(matches!(error, pocketglm_tensor::Error::Source { .. }), "{error}");
}

#[test]
fn types_have_the_sizes_that_the_reference_lists() {
    // Number, values and bytes of a block, from the table GGML_QUANT_SIZES of PyPI's gguf 0.19.0; Q8_1 is from
    // ggml itself, which has 36 bytes there.
    const TABLE: [(u32, &str, u64, u64); 34] = [
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    ];
    for (id, name, values, bytes) in TABLE {
        let found = GgmlType::of_id(id).unwrap();
        assert_eq!((found.name, found.values, found.bytes), (name, values, bytes));
    }
    assert_eq!((0..100_000).filter(|&id| GgmlType::of_id(id).is_some()).count(), TABLE.len());
}

#[test]
fn the_golden_file_has_the_tensors_of_its_checkpoint() {
    let file = GgufFile::open(&golden().join("gguf/text.gguf"), ReadMode::Map).unwrap();
    let original =
        crate::SafetensorsFile::open(&golden().join("bf16/model.safetensors"), ReadMode::Map).unwrap();
    for (gguf, here) in crate::gguf::glm::TEXT {
        let (ours, theirs) = (file.get(gguf).unwrap(), original.get(here).unwrap());
        assert_eq!(ours.shape(), theirs.shape());
        assert_eq!(ours.to_f32().unwrap(), theirs.to_f32().unwrap(), "{gguf}");
    }
    file.check_finite().unwrap();
}
