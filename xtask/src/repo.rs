//! The repository: its root, its files, and the programs that the commands run.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::io_error;
use crate::{Error, Result};

/// The folder of the workspace.
pub fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let package = PathBuf::from(package);
    package.parent().unwrap_or(&package).to_owned()
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// A program with its arguments, as one would type it.
pub fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_stem().unwrap_or(command.get_program());
    std::iter::once(name).chain(command.get_args()).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs a program and gives what it wrote to its standard output.
pub fn output_of(command: &mut Command) -> Result<Vec<u8>> {
    let shown = shown(command);
    let failed = |what| Error::Command { command: shown.clone(), what };
    let output = command.output().map_err(|e| failed(format!("cannot run: {e}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(format!("failed ({}): {why}", output.status)))
}

/// Runs a program whose output goes where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let failed = |what| Error::Command { command: shown.clone(), what };
    let status = command.status().map_err(|e| failed(format!("cannot run: {e}")))?;
    if status.success() { Ok(()) } else { Err(failed(format!("failed ({status})"))) }
}

/// The files that are in git or would be added by `git add --all`, relative to the root, sorted.
///
/// # Errors
/// Where git is absent or this is no repository: then nothing can be said about tracked files.
pub fn tracked_files() -> Result<Vec<String>> {
    // A checkout may belong to another user, as in a container; we only list names.
    let mut git = Command::new("git");
    git.current_dir(root()).args(["-c", "safe.directory=*", "ls-files", "-z"]);
    git.args(["--cached", "--others", "--exclude-standard"]);
    let out = output_of(&mut git)?;
    let mut files: Vec<String> = out
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        // A file that was deleted and not yet committed is still listed.
        .filter(|name| root().join(name).symlink_metadata().is_ok())
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The text of a file.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(io_error("read", path))
}

/// Writes a file as a whole.
pub fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(io_error("write", path))
}

/// Writes to the standard output; a reader that has seen enough, such as `head`, is no error.
pub fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Io { action: "write", path: "standard output".into(), source: e })
        }
        _ => Ok(()),
    }
}

/// A table with columns padded to their widest cell; the first column left, the others right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(c, (cell, &w))| if c == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_its_message() {
        let error = run(Command::new("git").args(["no-such-command"])).unwrap_err().to_string();
        assert!(error.contains("git no-such-command") && error.contains("failed"), "{error}");
        let error = output_of(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert!(error.contains("no-such-program") && error.contains("cannot run"), "{error}");
    }

    #[test]
    fn columns_of_a_table_line_up() {
        let rows = [vec!["a".into(), "10".into()], vec!["long".into(), "5".into()]];
        assert_eq!(table(&rows), "a     10\nlong   5\n");
    }

    #[test]
    fn this_file_is_among_the_tracked_ones() {
        assert!(tracked_files().unwrap().iter().any(|f| f == "xtask/src/repo.rs"));
    }
}
