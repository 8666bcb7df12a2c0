//! One worker for each device of a host: a locked file for each device, in a folder that all workers of the host share.
//!
//! The operating system lets go of a lock when its holder ends, however it ends. The files stay, and are locked again by the next.

use std::{
    fmt,
    fs::{self, File, TryLockError},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::Error;

/// Whoever only looks whether a device is held holds it for a moment; a claim waits that long.
const MOMENT: Duration = Duration::from_millis(250);
const PAUSE: Duration = Duration::from_millis(10);

/// The folder of a host's locks.
#[derive(Debug, Clone)]
pub struct Claims {
    folder: PathBuf,
}

/// Who holds a device, as it wrote itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it is: `brain`, `hand`.
    pub role: String,
    /// Its process.
    pub pid: u32,
    /// All that it holds: `cpu:0-3`.
    pub devices: Vec<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} (process {}, on {})", self.role, self.pid, self.devices.join(","))
    }
}

/// Devices that are held until this is dropped, or the process ends.
#[derive(Debug, Default)]
pub struct Claim {
    #[expect(dead_code, reason = "held for their locks")]
    files: Vec<File>,
}

impl Claims {
    /// Those in a folder; the host's usual one if none is named. It is made when it is needed.
    pub fn in_folder(folder: &Path) -> Self {
        let usual = || std::env::temp_dir().join("efferent-devices");
        Self { folder: if folder.as_os_str().is_empty() { usual() } else { folder.to_owned() } }
    }

    /// Claims devices, each a lock's name and the device's, all of them or none. Blocks for a moment if one is held.
    ///
    /// # Errors
    /// [`Error::Held`] if another worker has one, [`Error::Claims`] if there can be no locks.
    pub fn take(&self, devices: &[(String, String)], holder: &Holder) -> Result<Claim, Error> {
        if devices.is_empty() {
            return Ok(Claim::default());
        }
        let fault = |source| Error::Claims { folder: self.folder.clone(), source };
        make_for_all(&self.folder).map_err(fault)?;
        // Always in the same order, so that of two workers that want some of the same devices at once, one gets them.
        let mut devices = devices.to_vec();
        devices.sort();
        let mut files = Vec::new();
        for (lock, device) in devices {
            let path = self.folder.join(format!("{lock}.lock"));
            let mut file = open_for_all(&path).map_err(fault)?;
            let until = Instant::now() + MOMENT;
            loop {
                match file.try_lock() {
                    Ok(()) => break,
                    Err(TryLockError::Error(error)) => return Err(fault(error)),
                    Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(PAUSE),
                    Err(TryLockError::WouldBlock) => {
                        return Err(Error::Held { device, holder: read(&mut file), file: path });
                    }
                }
            }
            let text = serde_json::to_vec(holder).map_err(|error| fault(error.into()))?;
            file.set_len(0).and_then(|()| file.write_all(&text)).map_err(fault)?;
            files.push(file);
        }
        Ok(Claim { files })
    }

    /// Who holds a device, by its lock's name.
    pub fn holder(&self, lock: &str) -> Option<Holder> {
        let mut file = File::open(self.folder.join(format!("{lock}.lock"))).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(read(&mut file)),
            Ok(()) | Err(TryLockError::Error(_)) => None,
        }
    }
}

fn read(file: &mut File) -> Holder {
    let mut text = Vec::new();
    let holder = file.take(4096).read_to_end(&mut text).ok().and_then(|_| serde_json::from_slice(&text).ok());
    // It has locked the file, and not written yet.
    holder.unwrap_or_else(|| Holder { role: "worker".to_owned(), pid: 0, devices: vec!["?".to_owned()] })
}

/// A folder in which every user of the host can lock devices.
fn make_for_all(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    open_up(folder, 0o1777)
}

/// A file that every user of the host can lock. It is made only if it is not there: Linux does not let one user open another's file in
/// such a folder with the wish to create it.
fn open_for_all(path: &Path) -> io::Result<File> {
    match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    open_up(path, 0o666)?;
    Ok(file)
}

#[cfg(unix)]
fn open_up(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn open_up(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(pid: u32) -> Holder {
        Holder { role: "hand".to_owned(), pid, devices: vec!["cpu:0-1".to_owned()] }
    }

    fn cores(cores: &[usize]) -> Vec<(String, String)> {
        cores.iter().map(|core| (format!("cpu-{core}"), format!("cpu:{core}"))).collect()
    }

    #[test]
    fn a_device_is_held_once_and_free_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let claims = Claims::in_folder(&folder.path().join("locks"));
        assert_eq!(claims.holder("cpu-1"), None);
        let first = claims.take(&cores(&[0, 1]), &holder(11)).unwrap();
        let error = claims.take(&cores(&[2, 1]), &holder(22)).unwrap_err();
        let Error::Held { device, holder: first_holder, .. } = &error else { panic!("{error}") };
        assert_eq!((device.as_str(), first_holder.pid), ("cpu:1", 11));
        let words = "device \"cpu:1\" is held by a hand (process 11, on cpu:0-1)";
        assert!(error.to_string().starts_with(words), "{error}");
        assert_eq!(claims.holder("cpu-0"), Some(holder(11)));
        assert_eq!(claims.holder("cpu-2"), None, "whoever gets not all has none");
        drop(first);
        assert_eq!(claims.holder("cpu-0"), None);
        claims.take(&cores(&[1, 2]), &holder(22)).unwrap();
        claims.take(&[], &holder(33)).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Claims::in_folder(&file.path().join("x")).take(&cores(&[0]), &holder(1)).unwrap_err();
        assert!(matches!(error, Error::Claims { .. }), "{error}");
    }
}
