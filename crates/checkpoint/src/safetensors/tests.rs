use ::safetensors::SafeTensors;

use super::*;
use crate::test_support::{Numbers, TempDir, golden, raw_file, small_file, within_two_seconds};

fn parse(bytes: Vec<u8>) -> Result<SafetensorsFile> {
    SafetensorsFile::parse(FileBytes::from_bytes("x.safetensors", bytes.into()))
}

fn parse_error(bytes: Vec<u8>) -> String {
    parse(bytes).unwrap_err().to_string()
}

/// The error for a file of these tensors and so many zero bytes of data.
fn header_error(header: &str, data: usize) -> String {
    parse_error(raw_file(header, &vec![0; data]))
}

/// Reads every tensor, so that each checked range is really used.
fn read_all(file: &SafetensorsFile) -> usize {
    let mut read = 0;
    for info in file.tensors() {
        let tensor = file.get(&info.name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (info.dtype, &info.shape[..]));
        read += tensor.bytes().iter().map(|&b| usize::from(b) & 1 | 1).sum::<usize>();
    }
    read
}

#[test]
fn small_file_is_read_with_its_metadata() {
    let file = parse(small_file()).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(file.metadata().get("format").map(String::as_str), Some("pt"));
    assert_eq!(file.get("a").unwrap().to_f32().unwrap()[..], [1.0, 2.0]);
    assert_eq!(file.info("b").unwrap().shape, [1, 3]);
    let error = file.tensor("c").unwrap_err();
    assert_eq!(error.to_string(), "no tensor `c` in x.safetensors");
    assert!(matches!(error, pocketglm_tensor::Error::Missing { .. }));
}

#[test]
fn tensors_share_the_files_bytes() {
    let bytes = Bytes::from(small_file());
    let whole = bytes.as_slice().as_ptr_range();
    let file = SafetensorsFile::parse(FileBytes::from_bytes("x", bytes.clone())).unwrap();
    let a = file.get("a").unwrap();
    assert!(whole.contains(&a.bytes().as_ptr()));
}

#[test]
fn mapped_and_copied_files_give_the_same_tensors() {
    let dir = TempDir::new();
    let path = dir.write("x.safetensors", small_file());
    for mode in [ReadMode::Map, ReadMode::Read] {
        let file = SafetensorsFile::open(&path, mode).unwrap();
        assert_eq!(file.get("a").unwrap().to_f32().unwrap()[..], [1.0, 2.0], "{mode:?}");
        assert_eq!(read_all(&file), 14);
    }
}

#[test]
fn truncation_of_a_mapped_file_is_an_error_before_its_bytes_are_touched() {
    let dir = TempDir::new();
    let path = dir.write("x.safetensors", small_file());
    let mapped = SafetensorsFile::open(&path, ReadMode::Map).unwrap();
    let copied = SafetensorsFile::open(&path, ReadMode::Read).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(20).unwrap();
    let error = mapped.get("a").unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    assert_eq!(copied.get("a").unwrap().to_f32().unwrap()[..], [1.0, 2.0]);
}

#[test]
fn empty_file_folder_and_device_are_errors() {
    let dir = TempDir::new();
    let empty = dir.write("x", "");
    for mode in [ReadMode::Map, ReadMode::Read] {
        let error = SafetensorsFile::open(&empty, mode).unwrap_err().to_string();
        assert!(error.ends_with("expected 8 bytes of header length, found a file of 0 bytes"), "{error}");
        let error = SafetensorsFile::open(dir.path(), mode).unwrap_err();
        assert!(matches!(error, Error::NotAFile { found: "a folder", .. }));
        #[cfg(unix)]
        {
            let error = SafetensorsFile::open(Path::new("/dev/zero"), mode).unwrap_err();
            assert!(matches!(error, Error::NotAFile { found: "a device", .. }));
        }
    }
}

#[cfg(unix)]
#[test]
fn fifo_is_refused_without_waiting() {
    let dir = TempDir::new();
    let path = dir.path().join("x.safetensors");
    crate::test_support::make_fifo(&path);
    let error = within_two_seconds("fifo", || SafetensorsFile::open(&path, ReadMode::Map).unwrap_err());
    assert!(matches!(error, Error::NotAFile { found: "a FIFO", .. }));
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let whole = small_file();
    parse(whole.clone()).unwrap();
    for n in 0..whole.len() {
        let error = parse_error(whole[..n].to_vec());
        assert!(error.contains("x.safetensors"), "{n} bytes: {error}");
    }
}

#[test]
fn what_is_accepted_of_2000_mutations_the_reference_reader_reads_alike() {
    let whole = small_file();
    let (accepted, refused) = within_two_seconds("2000 mutations", || {
        let mut numbers = Numbers(1);
        let (mut accepted, mut refused) = (0, 0);
        for i in 0..2000 {
            // Every second one keeps a fitting header length, so that what lies behind is reached too.
            let bytes = if i % 2 == 0 {
                numbers.mutated(&whole)
            } else {
                let header = numbers.mutated(&whole[8..whole.len() - 14]);
                [&(header.len() as u64).to_le_bytes()[..], &header, &whole[whole.len() - 14..]].concat()
            };
            let file = match parse(bytes.clone()) {
                Ok(file) => file,
                Err(error) => {
                    refused += 1;
                    // Being stricter than the reference is meant only for names that occur twice.
                    let twice = error.to_string().contains("occurs twice");
                    assert!(twice || SafeTensors::deserialize(&bytes).is_err(), "mutation {i}: {error}");
                    continue;
                }
            };
            accepted += 1;
            read_all(&file);
            let reference = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("mutation {i}: {e}"));
            assert_eq!(reference.len(), file.names().count(), "mutation {i}");
            for info in file.tensors() {
                let theirs = reference.tensor(&info.name).unwrap();
                assert_eq!(theirs.shape(), info.shape);
                assert_eq!(theirs.data(), file.get(&info.name).unwrap().bytes());
            }
        }
        (accepted, refused)
    });
    // Both kinds must occur, or the test would show nothing.
    assert!(accepted > 30 && refused > 1000, "{accepted} accepted, {refused} refused");
}

#[test]
fn header_lengths_beyond_cap_and_file_are_refused() {
    for length in [1 << 63, u64::MAX, MAX_HEADER_BYTES + 1] {
        let mut bytes = small_file();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        let error = parse_error(bytes);
        assert!(error.contains(&format!("header length {length}, expected at most 100000000")), "{error}");
    }
    let mut bytes = small_file();
    let follow = bytes.len() - 8;
    bytes[..8].copy_from_slice(&MAX_HEADER_BYTES.to_le_bytes());
    let error = parse_error(bytes);
    assert!(
        error.ends_with(&format!("header length 100000000, but {follow} bytes follow in the file")),
        "{error}"
    );
}

#[test]
fn header_must_be_a_json_object_in_utf8() {
    assert!(header_error("", 0).ends_with("offset 8: expected `{`, found nothing"));
    assert!(header_error(" {}", 0).ends_with("offset 8: expected `{`, found byte 0x20"));
    assert!(header_error("{} x", 0).contains("trailing characters"));
    let mut bytes = raw_file(r#"{"a":"?"}"#, &[]);
    bytes[8 + 6] = 0xff;
    assert!(parse_error(bytes).contains("offset 14: expected UTF-8"));
    // An empty file is valid, and so are trailing spaces.
    assert_eq!(parse(raw_file("{}  ", &[])).unwrap().names().count(), 0);
}

#[test]
fn shapes_that_overflow_are_refused() {
    for shape in ["[9223372036854775808,4]", "[4294967296,4294967296,4]", "[18446744073709551615]"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        let error = header_error(&header, 4);
        assert!(error.contains("tensor `a`") && error.contains("too many elements"), "{error}");
    }
}

#[test]
fn shape_of_2_to_the_60_elements_allocates_nothing_and_is_refused() {
    let header = r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,4]}}"#;
    let error = within_two_seconds("2^60 elements", || header_error(header, 4));
    assert!(error.ends_with("of type U8 needs 1152921504606846976 bytes, data_offsets give 4"), "{error}");
    let header =
        r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}"#;
    assert!(header_error(header, 4).ends_with("reach past the 4 bytes of data in the file"));
}

#[test]
fn offsets_that_leave_the_data_or_run_backwards_are_refused() {
    let header = |o: &str| format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{o}}}}}"#);
    assert!(header_error(&header("[1,5]"), 4).contains("reach past the 4 bytes"));
    assert!(header_error(&header("[18446744073709551614,18446744073709551615]"), 4).contains("reach past"));
    assert!(header_error(&header("[4,0]"), 4).contains("end before they begin"));
    for (offsets, what) in
        [("[0]", "2 data_offsets"), ("[0,4,4]", "more than 2"), ("[-1,3]", "u64"), ("[0.5,4]", "u64")]
    {
        let error = header_error(&header(offsets), 4);
        assert!(error.contains("tensor `a`") && error.contains(what), "{error}");
    }
}

#[test]
fn overlaps_holes_and_leftover_bytes_are_refused() {
    let header = |b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    assert!(header_error(&header("[3,7]"), 7).contains("tensor `b`"));
    assert!(header_error(&header("[3,7]"), 7).contains("it overlaps another"));
    assert!(header_error(&header("[0,4]"), 4).contains("it overlaps another"));
    assert!(header_error(&header("[5,9]"), 9).contains("a hole lies before it"));
    assert!(header_error(&header("[4,8]"), 9).contains("the tensors end here"));
    parse(raw_file(&header("[4,8]"), &[0; 8])).unwrap();
}

#[test]
fn duplicate_keys_are_refused_at_every_level() {
    let a = r#""a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    assert!(header_error(&format!("{{{a},{a}}}"), 0).starts_with("tensor `a` occurs twice"));
    assert!(header_error(r#"{"__metadata__":{},"__metadata__":{}}"#, 0).contains("occurs twice"));
    assert!(header_error(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0).contains("key `k` occurs twice"));
    let twice = r#"{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}"#;
    assert!(header_error(twice, 0).contains("tensor `a`: `dtype` occurs twice"));
}

#[test]
fn missing_and_mistyped_fields_name_the_tensor() {
    for (tensor, what) in [
        (r#"{"shape":[0],"data_offsets":[0,0]}"#, "`dtype` is missing"),
        (r#"{"dtype":"U8","data_offsets":[0,0]}"#, "`shape` is missing"),
        (r#"{"dtype":"U8","shape":[0]}"#, "`data_offsets` is missing"),
        (r#"{"dtype":7,"shape":[0],"data_offsets":[0,0]}"#, "expected a string"),
        (r#"{"dtype":"U8","shape":{},"data_offsets":[0,0]}"#, "expected an array"),
        (r#"{"dtype":"U8","shape":[0,0,0,0,0,0,0,0,0],"data_offsets":[0,0]}"#, "more than 8 numbers"),
        ("[]", "expected an object with dtype"),
    ] {
        let error = header_error(&format!(r#"{{"a.b":{tensor}}}"#), 0);
        assert!(error.contains("tensor `a.b`") && error.contains(what), "{error}");
    }
    assert!(header_error(r#"{"__metadata__":{"k":1}}"#, 0).contains("expected a string"));
    assert!(header_error(r#"{"__metadata__":[]}"#, 0).contains("expected an object of strings"));
}

#[test]
fn control_characters_and_endless_names_do_not_reach_messages() {
    let name = format!("\\u001b[2J{}", "n".repeat(10_000));
    let error = header_error(&format!(r#"{{"{name}":{{"dtype":"Q","shape":[],"data_offsets":[0,0]}}}}"#), 0);
    assert!(error.len() < 500 && !error.contains('\u{1b}'), "{error:?}");
}

#[test]
fn deep_nesting_neither_overflows_the_stack_nor_hangs() {
    let deep = |open: &str, close: &str, n| format!("{}{}", open.repeat(n), close.repeat(n));
    within_two_seconds("nesting", || {
        let arrays = deep("[", "]", 1_000_000);
        for header in [
            format!(r#"{{"a":{arrays}}}"#),
            format!(r#"{{"__metadata__":{arrays}}}"#),
            format!(r#"{{"a":{{"shape":{arrays}}}}}"#),
            format!(r#"{{"a":{{"other":{arrays}}}}}"#),
            deep(r#"{"a":"#, "}", 1_000_000),
        ] {
            assert!(parse(raw_file(&header, &[])).is_err());
        }
    });
}

#[test]
fn header_of_a_million_tensors_is_refused_soon() {
    let mut header = String::from("{");
    for i in 0..1_000_000 {
        header.push_str(&format!(r#""t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#));
    }
    header.pop();
    header.push('}');
    let bytes = raw_file(&header, &[]);
    let error = within_two_seconds("a million tensors", || parse_error(bytes.clone()));
    assert!(error.contains("more than 262144 tensors"), "{error}");
}

#[test]
fn long_arrays_and_numbers_are_refused_soon() {
    let zeros = "0,".repeat(10_000_000);
    let header = format!(r#"{{"a":{{"shape":[{zeros}0]}}}}"#);
    within_two_seconds("a long shape", || {
        assert!(header_error(&header, 0).contains("more than 8 numbers"));
        let digits = "9".repeat(1_000_000);
        assert!(parse(raw_file(&format!(r#"{{"a":{{"shape":[{digits}]}}}}"#), &[])).is_err());
    });
}

#[test]
fn unsupported_types_are_listed_and_named_when_asked_for() {
    let header = r#"{"d":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},
                     "f":{"dtype":"F4","shape":[4],"data_offsets":[8,10]},
                     "x":{"dtype":"U8","shape":[2],"data_offsets":[10,12]}}"#;
    let header = header.replace(['\n', ' '], "");
    let file = parse(raw_file(&header, &[7; 12])).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["d", "f", "x"]);
    assert_eq!(file.tensors().len(), 1);
    assert!(file.contains("d") && file.info("d").is_none());
    let error = file.get("d").unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(error.to_string().contains("tensor `d` has the unsupported type F64"), "{error}");
    let error = file.tensor("f").unwrap_err();
    assert!(matches!(error, pocketglm_tensor::Error::Source { .. }) && error.to_string().contains("F4"));
    assert_eq!(file.get("x").unwrap().bytes(), [7, 7]);
    // Their sizes are checked like others'.
    assert!(
        parse(raw_file(&header.replace("[8,10]", "[8,11]").replace("[10,12]", "[11,13]"), &[7; 13])).is_err()
    );
    assert!(parse(raw_file(&header.replace("\"shape\":[4]", "\"shape\":[3]"), &[7; 12])).is_err());
}

#[test]
fn types_that_the_format_does_not_have_are_refused() {
    for dtype in ["F128", "f32", "", "float32"] {
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,4]}}}}"#);
        let error = header_error(&header, 4);
        assert!(error.contains(&format!("tensor `a` at offset {}", 8 + header.len())), "{error}");
        assert!(error.ends_with(&format!("unknown element type `{dtype}`")), "{error}");
    }
}

#[test]
fn every_type_of_the_reference_reader_is_known_with_its_size() {
    use ::safetensors::Dtype::*;
    let all = [
        BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, I16, U16, F16, BF16, I32, U32, F32,
        C64, F64, I64, U64,
    ];
    for dtype in all {
        let stored = Stored::parse(&dtype.to_string()).unwrap_or_else(|| panic!("{dtype} is unknown"));
        assert_eq!(stored.bits(), dtype.bitsize() as u64, "{dtype}");
    }
}

#[test]
fn scalars_empty_tensors_and_unaligned_data_are_read() {
    let header = r#"{"s":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"e":{"dtype":"F32","shape":[3,0],"data_offsets":[1,1]},"u":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#;
    let data = [vec![9], 1.5f32.to_le_bytes().to_vec()].concat();
    let file = parse(raw_file(header, &data)).unwrap();
    assert_eq!(file.get("s").unwrap().bytes(), [9]);
    assert_eq!(file.get("e").unwrap().elements(), 0);
    assert_eq!(file.get("u").unwrap().to_f32().unwrap()[..], [1.5]);
}

#[test]
fn finite_check_names_tensor_and_element() {
    let mut bytes = small_file();
    parse(bytes.clone()).unwrap().check_finite().unwrap();
    let n = bytes.len();
    // The second element of `b`, the last but one of the file.
    bytes[n - 4..n - 2].copy_from_slice(&[0x80, 0x7f]);
    let error = parse(bytes).unwrap().check_finite().unwrap_err();
    assert_eq!(
        error.to_string(),
        "x.safetensors: tensor `b`: element 1 is NaN or infinite, expected finite weights"
    );
}

#[test]
fn golden_files_are_read_like_the_reference_reader_does() {
    fn visit(folder: &Path, files: &mut usize) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, files);
            } else if path.extension().is_some_and(|e| e == "safetensors") {
                let bytes = std::fs::read(&path).unwrap();
                let reference = SafeTensors::deserialize(&bytes).unwrap();
                let ours = SafetensorsFile::open(&path, ReadMode::Map).unwrap();
                assert_eq!(ours.tensors().len(), reference.len(), "{}", path.display());
                for (name, theirs) in reference.tensors() {
                    let tensor = ours.get(&name).unwrap();
                    assert_eq!(tensor.dtype().name(), theirs.dtype().to_string());
                    assert_eq!(tensor.shape(), theirs.shape());
                    assert_eq!(tensor.bytes(), theirs.data(), "{} {name}", path.display());
                }
                *files += 1;
            }
        }
    }
    let mut files = 0;
    visit(&golden(), &mut files);
    assert!(files >= 10, "only {files} golden files were found");
}
