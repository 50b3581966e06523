//! Writers that are killed, or whose disk is full: what stands under the final name is always whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: what fails is a failed test"
)]
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pocketglm_checkpoint::{
    GgufFile, GgufWriter, PglmContents, PglmFile, PglmWriter, ReadMode, SafetensorsFile, SafetensorsWriter,
};
use pocketglm_tensor::{DType, TensorInfo, WeightSource};

/// Names the folder that a child process writes to.
const VARIABLE: &str = "POCKETGLM_WRITE_TO";
const TENSORS: usize = 24;
const ELEMENTS: usize = 16 << 10;

fn tensors() -> Vec<TensorInfo> {
    let one = |i| TensorInfo { name: format!("t{i}"), dtype: DType::F32, shape: vec![ELEMENTS] };
    (0..TENSORS).map(one).collect()
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("pocketglm-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn write_pglm(path: &Path) -> Result<(), String> {
    let contents = PglmContents { tensors: tensors(), ..PglmContents::default() };
    let mut writer = PglmWriter::create(path, &contents, &[]).map_err(|e| e.to_string())?;
    for info in &contents.tensors {
        writer.write(&info.name, &vec![3; info.bytes()]).map_err(|e| e.to_string())?;
    }
    writer.finish().map_err(|e| e.to_string())
}

fn write_gguf(path: &Path) -> Result<(), String> {
    let tensors = tensors();
    let mut writer = GgufWriter::create(path, &[], &tensors, &[]).map_err(|e| e.to_string())?;
    for info in &tensors {
        writer.write(&info.name, &vec![3; info.bytes()]).map_err(|e| e.to_string())?;
    }
    writer.finish().map_err(|e| e.to_string())
}

fn write_safetensors(path: &Path) -> Result<(), String> {
    let tensors = tensors();
    let mut writer =
        SafetensorsWriter::create(path, &tensors, &BTreeMap::new()).map_err(|e| e.to_string())?;
    for info in &tensors {
        writer.write(&info.name, &vec![3; info.bytes()]).map_err(|e| e.to_string())?;
    }
    writer.finish().map_err(|e| e.to_string())
}

/// What the child processes below run; by itself it has nothing to do, so it is left out.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child() {
    let Some(folder) = std::env::var_os(VARIABLE).map(PathBuf::from) else { return };
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        write_pglm(&folder.join("m.pglm")).unwrap();
        write_gguf(&folder.join("m.gguf")).unwrap();
        write_safetensors(&folder.join("m.table")).unwrap();
    }
}

/// What the child with a small disk runs.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child_with_little_room() {
    let Some(folder) = std::env::var_os(VARIABLE).map(PathBuf::from) else { return };
    let errors = [
        write_pglm(&folder.join("m.pglm")),
        write_gguf(&folder.join("m.gguf")),
        write_safetensors(&folder.join("m.table")),
    ];
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    println!("report: {errors:?} {names:?}");
}

#[test]
fn killed_writers_leave_nothing_damaged_and_the_next_one_starts_afresh() {
    let folder = folder("killed");
    let [pglm, gguf, table] = ["m.pglm", "m.gguf", "m.table"].map(|name| folder.join(name));
    let partial = |name: &str| folder.join(format!(".{name}.partial")).exists();
    let any = || ["m.pglm", "m.gguf", "m.table"].into_iter().any(partial);
    let (mut whole, mut leftovers) = (0, 0);
    for round in 0..60u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env(VARIABLE, &folder)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Some time after it began to write, however busy the machine is.
        let until = Instant::now() + Duration::from_secs(20);
        while !any() {
            assert!(Instant::now() < until, "the writer never began");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(round * 7_919 % 30_000));
        child.kill().unwrap();
        child.wait().unwrap();
        leftovers += usize::from(any());
        if pglm.exists() {
            PglmFile::open(&pglm, ReadMode::Map).unwrap().verify(&mut |_, _| {}).unwrap();
            whole += 1;
        }
        if gguf.exists() {
            let file = GgufFile::open(&gguf, ReadMode::Map).unwrap();
            assert_eq!(file.get("t23").unwrap().bytes(), vec![3; 4 * ELEMENTS]);
        }
        if table.exists() {
            let file = SafetensorsFile::open(&table, ReadMode::Map).unwrap();
            assert_eq!(file.tensor("t23").unwrap().bytes(), vec![3; 4 * ELEMENTS]);
        }
        if round % 6 == 5 {
            let _ = std::fs::remove_file(&pglm);
        }
    }
    println!("{whole} whole files, {leftovers} leftovers");
    assert!(leftovers > 0, "no writer was killed while it wrote");
    write_pglm(&pglm).unwrap();
    write_gguf(&gguf).unwrap();
    write_safetensors(&table).unwrap();
    PglmFile::open(&pglm, ReadMode::Map).unwrap().verify(&mut |_, _| {}).unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["m.gguf", "m.pglm", "m.table"]);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_full_disk_is_an_error_and_leaves_no_partial_file() {
    let folder = folder("full");
    // A limit on the size of files fails writes as a full disk does; the signal that comes with it is ignored.
    let output = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 256; exec \"$0\" --ignored --exact child_with_little_room --nocapture",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(VARIABLE, &folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let report =
        text.lines().find(|l| l.contains("report: ")).unwrap_or_else(|| panic!("no report in {text}"));
    for file in ["m.pglm", "m.gguf", "m.table"] {
        assert!(report.contains(&format!("cannot write {}", folder.join(file).display())), "{report}");
    }
    assert!(report.ends_with("[]"), "files were left: {report}");
    // The control: with room for all, all are there.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child_with_little_room", "--nocapture"])
        .env(VARIABLE, &folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("report: [Ok(()), Ok(()), Ok(())]"), "{text}");
    std::fs::remove_dir_all(folder).unwrap();
}
