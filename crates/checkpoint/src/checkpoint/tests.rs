use pocketglm_tensor::DType;

use super::*;
use crate::test_support::{Numbers, TempDir, golden, raw_file, small_file, within_two_seconds};

fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    Checkpoint::open(path, &OpenOptions::default())
}

fn open_error(path: impl AsRef<Path>) -> String {
    open(path).unwrap_err().to_string()
}

/// A file with one U8 tensor of one element per name.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, n)| format!(r#""{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    raw_file(&format!("{{{}}}", entries.join(",")), &vec![5; names.len()])
}

const INDEX: &str = r#"{"metadata":{"total_size":3},"weight_map":{"a":"s-1.safetensors","b":"s-2.safetensors","c":"s-1.safetensors"}}"#;

/// A valid checkpoint of two shards.
fn sharded() -> TempDir {
    let dir = TempDir::new();
    dir.write("s-1.safetensors", shard(&["c", "a"]));
    dir.write("s-2.safetensors", shard(&["b"]));
    dir.write(INDEX_FILE, INDEX);
    dir
}

#[test]
fn single_file_folder_and_lone_file_open() {
    let dir = TempDir::new();
    dir.write(SINGLE_FILE, small_file());
    let other = dir.write("other.safetensors", shard(&["z"]));
    dir.write("config.json", r#"{"n": 1}"#);
    let folder = open(dir.path()).unwrap();
    assert_eq!(folder.tensor("a").unwrap().to_f32().unwrap()[..], [1.0, 2.0]);
    let lone = open(&other).unwrap();
    assert_eq!(lone.tensors().len(), 1);
    // The files beside a lone file are its folder's.
    assert_eq!(lone.required_json("config.json").unwrap()["n"], 1);
    assert_eq!(lone.place("z"), other.display().to_string());
}

#[test]
fn shards_are_one_source_in_a_stable_order() {
    let dir = sharded();
    let checkpoint = open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint.tensors().into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["c", "a", "b"]);
    assert_eq!(checkpoint.info("b").unwrap().dtype, DType::U8);
    assert_eq!(checkpoint.tensor("b").unwrap().bytes(), [5]);
    assert!(checkpoint.place("b").ends_with("s-2.safetensors"));
    let error = checkpoint.tensor("nothing").unwrap_err();
    assert_eq!(error.to_string(), format!("no tensor `nothing` in {}", dir.path().display()));
}

#[test]
fn folder_without_weights_or_config_says_what_is_missing_where() {
    let dir = TempDir::new();
    let folder = dir.path().display().to_string();
    assert_eq!(
        open_error(dir.path()),
        format!(
            "no model.safetensors, model.safetensors.index.json, .gguf or .pglm file of a model in {folder}"
        )
    );
    dir.write(SINGLE_FILE, small_file());
    let checkpoint = open(dir.path()).unwrap();
    assert!(checkpoint.json("config.json").unwrap().is_none());
    let error = checkpoint.required_json("config.json").unwrap_err();
    assert_eq!(error.to_string(), format!("no config.json in {folder}"));
    assert!(open_error(dir.path().join("absent")).starts_with("cannot open "));
}

#[test]
fn index_and_shards_must_agree() {
    let dir = sharded();
    dir.write("s-2.safetensors", shard(&["b", "d"]));
    assert!(
        open_error(dir.path()).contains("tensor `d`")
            && open_error(dir.path()).contains("the index does not")
    );

    dir.write("s-2.safetensors", shard(&["b", "a"]));
    let error = open_error(dir.path());
    assert!(
        error.starts_with("tensor `a` occurs twice: in ") && error.ends_with("s-2.safetensors"),
        "{error}"
    );

    dir.write("s-2.safetensors", shard(&["d"]));
    let error = open_error(dir.path());
    assert!(error.contains("tensor `b`: the index names") && error.ends_with("which lacks it"), "{error}");

    std::fs::remove_file(dir.path().join("s-2.safetensors")).unwrap();
    assert!(open_error(dir.path()).starts_with("no shard s-2.safetensors in "));

    // The control: the same folder with the right shard opens.
    dir.write("s-2.safetensors", shard(&["b"]));
    open(dir.path()).unwrap();
}

#[test]
fn index_cannot_lead_out_of_the_folder() {
    let dir = sharded();
    let outside = TempDir::new();
    let target = outside.write("s.safetensors", shard(&["a"]));
    let climbing = format!("../{}/s.safetensors", outside.path().file_name().unwrap().to_str().unwrap());
    for bad in [&*climbing, target.to_str().unwrap(), "sub/s-1.safetensors", "..", ".", "", "C:s.safetensors"]
    {
        dir.write(INDEX_FILE, serde_json::json!({ "weight_map": { "a": bad } }).to_string());
        assert!(open_error(dir.path()).contains("is not a plain file name"), "{bad:?}");
    }
    dir.write(INDEX_FILE, r#"{"weight_map":{"a":"config.json"}}"#);
    assert!(open_error(dir.path()).ends_with("is not a plain file name that ends in .safetensors"));
}

#[cfg(unix)]
#[test]
fn shard_or_config_that_is_a_fifo_is_refused_without_waiting() {
    let dir = sharded();
    std::fs::remove_file(dir.path().join("s-2.safetensors")).unwrap();
    crate::test_support::make_fifo(&dir.path().join("s-2.safetensors"));
    crate::test_support::make_fifo(&dir.path().join("config.json"));
    within_two_seconds("fifo", || {
        assert!(open_error(dir.path()).ends_with("s-2.safetensors is a FIFO, expected a regular file"));
        let error = open(dir.path().join("s-1.safetensors")).unwrap().json("config.json").unwrap_err();
        assert!(matches!(error, Error::NotAFile { found: "a FIFO", .. }));
    });
}

#[cfg(unix)]
#[test]
fn symbolic_links_are_followed_and_dangling_ones_are_errors() {
    use std::os::unix::fs::symlink;
    let (blobs, dir) = (sharded(), TempDir::new());
    for name in blobs.names() {
        symlink(blobs.path().join(&name), dir.path().join(&name)).unwrap();
    }
    symlink(blobs.path().join("absent"), dir.path().join("config.json")).unwrap();
    symlink("loop", dir.path().join("loop")).unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors().len(), 3);
    assert!(matches!(checkpoint.json("config.json").unwrap_err(), Error::Io { .. }));
    assert!(checkpoint.json("loop").is_err());
    symlink(blobs.path().join("absent"), dir.path().join(SINGLE_FILE)).unwrap();
    assert!(open_error(dir.path()).contains("model.safetensors"), "a dangling link is not an absent file");
}

#[test]
fn every_truncation_of_the_index_is_an_error_that_names_it() {
    let dir = sharded();
    for n in 0..INDEX.len() {
        dir.write(INDEX_FILE, &INDEX[..n]);
        assert!(open_error(dir.path()).contains(INDEX_FILE), "{n} bytes");
    }
    dir.write(INDEX_FILE, INDEX);
    open(dir.path()).unwrap();
}

#[test]
fn mutations_of_the_index_are_refused_or_give_a_source_that_reads() {
    let dir = sharded();
    let mut numbers = Numbers(2);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..2000 {
        dir.write(INDEX_FILE, numbers.mutated(INDEX.as_bytes()));
        match open(dir.path()) {
            Err(_) => refused += 1,
            Ok(checkpoint) => {
                accepted += 1;
                assert_eq!(checkpoint.tensors().len(), 3);
                for name in ["a", "b", "c"] {
                    assert_eq!(checkpoint.tensor(name).unwrap().bytes(), [5]);
                }
            }
        }
    }
    assert!(accepted > 50 && refused > 500, "{accepted} accepted, {refused} refused");
}

#[test]
fn malformed_and_oversized_indexes_are_refused_soon() {
    let dir = sharded();
    let many_shards: serde_json::Map<String, Value> =
        (0..1001).map(|i| (format!("t{i}"), format!("{i}.safetensors").into())).collect();
    let nested = "[".repeat(1_000_000);
    let many = (0..300_000).map(|i| format!(r#""t{i}":"s-1.safetensors""#)).collect::<Vec<_>>().join(",");
    for (text, what) in [
        ("[]".to_owned(), "expected an object with a weight_map"),
        ("{}".to_owned(), "`weight_map` is missing"),
        (r#"{"weight_map":{"a":1}}"#.to_owned(), "expected a string"),
        (r#"{"weight_map":{"a":"x","a":"y"}}"#.to_owned(), "key `a` occurs twice"),
        (r#"{"weight_map":{},"weight_map":{}}"#.to_owned(), "`weight_map` occurs twice"),
        (serde_json::json!({ "weight_map": many_shards }).to_string(), "1001 shards, expected at most 1000"),
        (format!(r#"{{"metadata":{nested}"#), "EOF"),
        (format!(r#"{{"weight_map":{nested}"#), "expected an object of strings"),
        (format!(r#"{{"weight_map":{{{many}}}}}"#), "more than 262144 strings"),
    ] {
        dir.write(INDEX_FILE, text);
        let error = within_two_seconds(what, || open_error(dir.path()));
        assert!(error.contains(what), "{what}: {error}");
    }
    let file = std::fs::File::create(dir.path().join(INDEX_FILE)).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = within_two_seconds("1 TiB index", || open_error(dir.path()));
    assert!(error.ends_with("has 1099511627776 bytes, at most 67108864 are read"), "{error}");
}

#[test]
fn side_files_have_limits_of_size_depth_and_number() {
    let dir = TempDir::new();
    dir.write(SINGLE_FILE, small_file());
    let checkpoint = open(dir.path()).unwrap();

    let big = std::fs::File::create(dir.path().join("config.json")).unwrap();
    big.set_len((1 << 20) + 1).unwrap();
    assert!(matches!(
        checkpoint.json("config.json").unwrap_err(),
        Error::FileTooLarge { limit: 1048576, .. }
    ));

    dir.write("config.json", "[".repeat(1 << 20));
    assert!(checkpoint.json("config.json").unwrap_err().to_string().contains("recursion limit"));

    dir.write("tokenizer.json", format!("[{}0]", "0,".repeat(5_000_000)));
    let error = within_two_seconds("many values", || checkpoint.json("tokenizer.json").unwrap_err());
    assert!(error.to_string().ends_with("more than 4000000 values"), "{error}");

    dir.write("chat_template.jinja", b"abc\xff");
    let error = checkpoint.text("chat_template.jinja").unwrap_err().to_string();
    assert!(error.ends_with("expected UTF-8, found other bytes at offset 3"), "{error}");
    dir.write("chat_template.jinja", "{{ x }}");
    assert_eq!(checkpoint.text("chat_template.jinja").unwrap().as_deref(), Some("{{ x }}"));
    assert!(checkpoint.text("absent").unwrap().is_none());
    assert!(matches!(checkpoint.bytes("../config.json").unwrap_err(), Error::FileName { .. }));
}

#[test]
fn non_finite_weights_are_refused_only_when_asked() {
    let dir = TempDir::new();
    let mut bytes = small_file();
    let n = bytes.len();
    bytes[n - 2..].copy_from_slice(&[0xc0, 0x7f]);
    dir.write(SINGLE_FILE, bytes);
    open(dir.path()).unwrap();
    let options = OpenOptions { check_finite: true, ..OpenOptions::default() };
    let error = Checkpoint::open(dir.path(), &options).unwrap_err();
    assert!(matches!(error, Error::NonFinite { index: 2, .. }), "{error}");
}

#[test]
fn golden_checkpoints_open_with_all_their_files() {
    let (mut single, mut several) = (0, 0);
    for entry in std::fs::read_dir(golden()).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("config.json").exists() {
            continue;
        }
        for mode in [ReadMode::Map, ReadMode::Read] {
            let checkpoint =
                Checkpoint::open(&folder, &OpenOptions { mode, check_finite: true, mmproj: None }).unwrap();
            assert!(checkpoint.required_json("config.json").unwrap()["model_type"].is_string());
            assert!(checkpoint.json("tokenizer.json").unwrap().is_some_and(|t| t["model"].is_object()));
            assert!(checkpoint.text("chat_template.jinja").unwrap().is_some());
            let tensors = checkpoint.tensors();
            assert!(tensors.len() > 20, "{}", folder.display());
            for info in tensors {
                let tensor = checkpoint.tensor(&info.name).unwrap();
                assert_eq!((tensor.shape(), tensor.bytes().len()), (&info.shape[..], info.bytes()));
            }
            let files = checkpoint.files();
            for name in ["config.json", "tokenizer.json", "chat_template.jinja"] {
                assert!(files.contains(&folder.join(name).as_path()), "{name} in {files:?}");
            }
            assert!(files.iter().all(|f| f.is_file()), "{files:?}");
            let shards = files.iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")).count();
            assert_eq!(files.contains(&folder.join(INDEX_FILE).as_path()), shards > 1);
            if shards > 1 { several += 1 } else { single += 1 }
        }
    }
    assert!(single > 0 && several > 0, "{single} single and {several} sharded golden checkpoints");
}
