//! Opening regular files only, reading small ones, and writing a file whole or not at all.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pocketglm_tensor::Bytes;

use crate::error::{io_error, shown};
use crate::{Error, Result};

/// Opens a regular file for reading, following symbolic links; returns it with its length.
///
/// A FIFO, device, socket or folder is refused, and never waited for.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    // The kind is asked for first, because opening a device can already have an effect.
    let before = fs::metadata(path).map_err(io_error("open", path))?;
    require_regular(path, &before)?;
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Opening a FIFO waits for a writer, should one have taken the file's place just now.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(io_error("open", path))?;
    let after = file.metadata().map_err(io_error("inspect", path))?;
    require_regular(path, &after)?;
    if !same_file(&before, &after) {
        let what = "another file took its place while it was opened".to_owned();
        return Err(Error::Changed { path: path.to_owned(), what });
    }
    Ok((file, after.len()))
}

#[cfg(unix)]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    a.len() == b.len()
}

fn require_regular(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::NotAFile { path: path.to_owned(), found: kind(metadata) })
}

fn kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        return "a folder";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "a FIFO";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_block_device() || kind.is_char_device() {
            return "a device";
        }
    }
    "something else"
}

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Bytes> {
    let (file, found) = open_regular(path)?;
    let too_large = |found| Error::FileTooLarge { path: path.to_owned(), limit, found };
    if found > limit {
        return Err(too_large(found));
    }
    let mut bytes = Vec::new();
    // One byte more than allowed, to notice a file that grows under the reader.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes.into())
}

/// Whether something stands under this name, be it a dangling symbolic link.
pub(crate) fn stands(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Refuses to write a file over what must not be lost: one of `inputs`, by whatever names the two go (another path, a
/// hard or a symbolic link), or anything but a regular file. Files are renamed to their names, which would replace a
/// device or a FIFO by a file like any other.
///
/// # Errors
/// [`Error::Write`] for an input, [`Error::NotAFile`], [`Error::Io`].
pub fn check_target<P: AsRef<Path>>(target: &Path, inputs: &[P]) -> Result<()> {
    refuse_inputs(target, inputs)?;
    require_replaceable(target)
}

/// Refuses to write over one of `inputs`, by whatever names the two go.
pub(crate) fn refuse_inputs<P: AsRef<Path>>(target: &Path, inputs: &[P]) -> Result<()> {
    let Ok(there) = fs::metadata(target) else { return Ok(()) };
    for input in inputs.iter().map(AsRef::as_ref) {
        let same_name = match (fs::canonicalize(target), fs::canonicalize(input)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        let same_inode = cfg!(unix) && fs::metadata(input).is_ok_and(|m| same_file(&there, &m));
        if same_name || same_inode {
            let what = format!("it is {}, which is being read", input.display());
            return Err(Error::Write { path: target.to_owned(), what });
        }
    }
    Ok(())
}

/// Refuses a name under which something other than a regular file, or a link to one, stands.
fn require_replaceable(target: &Path) -> Result<()> {
    // Where even this fails, so will the writing, with a better message.
    let Ok(there) = fs::symlink_metadata(target) else { return Ok(()) };
    if !there.is_symlink() {
        return require_regular(target, &there);
    }
    match fs::metadata(target) {
        Ok(behind) => require_regular(target, &behind),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(Error::NotAFile { path: target.to_owned(), found: "a symbolic link to nothing" })
        }
        Err(e) => Err(io_error("inspect", target)(e)),
    }
}

/// Whether two paths are one name in one folder; nothing need stand there.
pub(crate) fn one_name(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (
            fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()),
            path.file_name().map(ToOwned::to_owned),
        )
    };
    place(a) == place(b)
}

/// Joins a file name to a folder; refuses a name that could lead out of it on any system.
pub(crate) fn join_plain(folder: &Path, name: &str, place: &Path) -> Result<PathBuf> {
    let mut parts = Path::new(name).components();
    let single =
        matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    let foreign = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control();
    if !single || name.len() > 255 || name.chars().any(foreign) {
        return Err(Error::FileName { name: shown(name), place: place.to_owned(), wanted: "" });
    }
    Ok(folder.join(name))
}

/// Writes a file whole or not at all: `fill` writes a temporary file in the same folder, which is synced
/// and then renamed to `path`, replacing what stood there. On an error nothing changes under `path`.
///
/// # Errors
/// [`Error::Io`], also for the error that `fill` returns; [`Error::NotAFile`] where something other than a regular file
/// stands there.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    fill(&mut file.out).map_err(io_error("write", path))?;
    file.commit()
}

/// A file under a temporary name that takes its final name on [`AtomicFile::commit`], and is removed when
/// dropped before.
pub(crate) struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    pub(crate) out: BufWriter<File>,
    committed: bool,
}

impl AtomicFile {
    pub(crate) fn create(target: &Path) -> Result<AtomicFile> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        require_replaceable(target)?;
        let Some(name) = target.file_name() else {
            return Err(Error::Write { path: target.to_owned(), what: "the path names no file".into() });
        };
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{count}.tmp", std::process::id()));
            let temporary = target.with_file_name(hidden);
            match fs::OpenOptions::new().write(true).create_new(true).open(&temporary) {
                Ok(file) => {
                    let out = BufWriter::with_capacity(1 << 20, file);
                    return Ok(AtomicFile { target: target.to_owned(), temporary, out, committed: false });
                }
                // Left behind by a killed process of the same number: take the next name.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io_error("create a temporary file for", target)(e)),
            }
        }
    }

    /// As [`AtomicFile::create`], for files that take long to write: the temporary name is always the same one, so that
    /// what a killed process left is found and replaced by the next one. Two processes cannot write at once.
    pub(crate) fn create_staged(target: &Path) -> Result<AtomicFile> {
        require_replaceable(target)?;
        let Some(name) = target.file_name() else {
            return Err(Error::Write { path: target.to_owned(), what: "the path names no file".into() });
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".partial");
        let temporary = target.with_file_name(hidden);
        let failed = || io_error("create a temporary file for", target);
        let busy = || Error::Write {
            path: target.to_owned(),
            what: format!("another process is writing {}", temporary.display()),
        };
        // Its owner may rename the file between opening and locking it: then there is a new one to open.
        for _ in 0..16 {
            if let Ok(there) = fs::symlink_metadata(&temporary) {
                require_regular(&temporary, &there)?;
            }
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(false);
            #[cfg(unix)]
            {
                use std::os::unix::fs::OpenOptionsExt;
                options.custom_flags(libc::O_NOFOLLOW);
            }
            let file = options.open(&temporary).map_err(failed())?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Err(busy()),
                // A file system without locks: then nothing keeps two processes apart but their user.
                Err(fs::TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
                Err(fs::TryLockError::Error(e)) => return Err(failed()(e)),
            }
            let ours = file.metadata().map_err(failed())?;
            if !fs::symlink_metadata(&temporary).is_ok_and(|there| same_file(&there, &ours)) {
                continue;
            }
            file.set_len(0).map_err(failed())?;
            let out = BufWriter::with_capacity(1 << 20, file);
            return Ok(AtomicFile { target: target.to_owned(), temporary, out, committed: false });
        }
        Err(busy())
    }

    /// Brings all bytes to the disk: nothing but the renaming is left then, and nothing stands in its way.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.out.flush().map_err(io_error("write", &self.target))?;
        self.out.get_ref().sync_all().map_err(io_error("sync", &self.target))?;
        // Something may have taken the name meanwhile.
        require_replaceable(&self.target)
    }

    /// Syncs the file, gives it its final name and syncs the folder.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.sync()?;
        fs::rename(&self.temporary, &self.target)
            .map_err(io_error("rename a temporary file to", &self.target))?;
        self.committed = true;
        sync_folder(&self.target)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; the name shows that the file is a leftover.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Makes a rename durable. File systems that cannot sync folders say so with these two errors.
#[cfg(unix)]
fn sync_folder(target: &Path) -> Result<()> {
    let folder = match target.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    match File::open(folder).and_then(|f| f.sync_all()) {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        // A folder that may be written but not read (mode -wx) cannot be opened to be synced.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(io_error("sync", folder)),
    }
}

#[cfg(not(unix))]
fn sync_folder(_target: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::TempDir;

    #[test]
    fn write_atomic_replaces_the_file_and_leaves_no_other() {
        let dir = TempDir::new();
        let path = dir.path().join("a.txt");
        write_atomic(&path, |f| f.write_all(b"old")).unwrap();
        write_atomic(&path, |f| f.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(dir.names(), ["a.txt"]);
    }

    #[test]
    fn failed_write_keeps_the_old_file_and_removes_the_temporary_one() {
        let dir = TempDir::new();
        let path = dir.path().join("a.txt");
        write_atomic(&path, |f| f.write_all(b"old")).unwrap();
        let failed = write_atomic(&path, |f| {
            f.write_all(b"half of the new")?;
            f.flush()?;
            Err(io::Error::other("the pen broke"))
        });
        assert!(failed.unwrap_err().to_string().contains("the pen broke"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(dir.names(), ["a.txt"]);
    }

    #[test]
    fn write_to_a_folder_or_to_nowhere_is_refused() {
        let dir = TempDir::new();
        fs::create_dir(dir.path().join("sub")).unwrap();
        assert!(write_atomic(&dir.path().join("sub"), |_| Ok(())).is_err());
        assert!(write_atomic(&dir.path().join("absent").join("a"), |_| Ok(())).is_err());
        assert!(write_atomic(Path::new("/"), |_| Ok(())).is_err());
        assert_eq!(dir.names(), ["sub"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_is_never_replaced() {
        use std::os::unix::fs::{FileTypeExt, symlink};
        let dir = TempDir::new();
        let at = |name: &str| dir.path().join(name);
        crate::test_support::make_fifo(&at("fifo"));
        symlink(at("fifo"), at("link-to-fifo")).unwrap();
        symlink(at("absent"), at("link-to-nothing")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/null", at("link-to-device")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        let before = dir.names();
        for (name, kind) in [
            ("fifo", "a FIFO"),
            ("link-to-fifo", "a FIFO"),
            ("link-to-nothing", "a symbolic link to nothing"),
            ("socket", "a socket"),
            ("link-to-device", "a device"),
            ("folder", "a folder"),
        ] {
            let refused = [
                write_atomic(&at(name), |f| f.write_all(b"new")),
                AtomicFile::create_staged(&at(name)).map(drop),
                check_target(&at(name), &[] as &[&Path]),
            ];
            for refused in refused {
                let found = refused.unwrap_err().to_string();
                assert!(found.contains(&format!("{name} is {kind}, expected a regular file")), "{found}");
            }
        }
        assert_eq!(dir.names(), before);
        assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
        drop(socket);
        // What takes the name while the file is written is not replaced either.
        let late = write_atomic(&at("late"), |_| {
            crate::test_support::make_fifo(&at("late"));
            Ok(())
        });
        assert!(late.unwrap_err().to_string().contains("late is a FIFO"));
        // The control: a file, and a link to one, are.
        fs::write(at("file"), b"old").unwrap();
        symlink(at("file"), at("link")).unwrap();
        write_atomic(&at("link"), |f| f.write_all(b"new")).unwrap();
        write_atomic(&at("file"), |f| f.write_all(b"new")).unwrap();
        assert_eq!(
            (fs::read(at("file")).unwrap(), fs::read(at("link")).unwrap()),
            (b"new".into(), b"new".into())
        );
    }

    #[cfg(unix)]
    #[test]
    fn an_input_is_refused_as_target_by_every_name_that_it_has() {
        let dir = TempDir::new();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("input"), b"1").unwrap();
        fs::write(at("other"), b"2").unwrap();
        fs::create_dir(at("sub")).unwrap();
        fs::hard_link(at("input"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("input"), at("soft")).unwrap();
        let inputs = [at("absent"), at("input")];
        for name in ["input", "hard", "soft", "sub/../input", "./input"] {
            let found = check_target(&at(name), &inputs).unwrap_err().to_string();
            assert!(found.contains("input, which is being read"), "{found}");
        }
        // The other way round: what is read is a link, and the file behind it is written.
        assert!(check_target(&at("input"), &[at("soft")]).is_err());
        for name in ["other", "new"] {
            check_target(&at(name), &inputs).unwrap();
        }
    }

    #[test]
    fn names_that_lead_out_of_the_folder_are_refused() {
        let folder = Path::new("folder");
        for bad in ["", ".", "..", "../a", "/a", "a/b", "a/", "./a", "a\\b", "c:a", "a\0b", "a\nb"] {
            assert!(join_plain(folder, bad, folder).is_err(), "{bad:?} was accepted");
        }
        assert!(join_plain(folder, &"a".repeat(256), folder).is_err());
        assert_eq!(join_plain(folder, "a.safetensors", folder).unwrap(), folder.join("a.safetensors"));
    }

    #[test]
    fn small_files_have_a_limit() {
        let dir = TempDir::new();
        let path = dir.path().join("a");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read_small(&path, 5).unwrap().as_slice(), b"12345");
        let error = read_small(&path, 4).unwrap_err();
        assert!(matches!(error, Error::FileTooLarge { limit: 4, found: 5, .. }));
    }
}
