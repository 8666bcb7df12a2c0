//! What a host has: GPUs as NVIDIA's driver tells of them, or as a file does; its processor and memory.

use std::path::Path;

use nvml_wrapper::{Nvml, error::NvmlError};
use serde::{Deserialize, Serialize};

use super::{Cores, Error};

/// A host's devices.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// GPUs in the order of their places on the bus, which is `nvidia-smi`'s.
    pub gpus: Vec<GpuInfo>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuInfo {
    /// Its place, from 0.
    pub index: usize,
    /// NVIDIA's name for this very one, `GPU-...`: stays the same over restarts and other places.
    pub uuid: String,
    /// What it is: "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Bytes of memory in all.
    pub memory_bytes: u64,
}

impl Inventory {
    /// As a file (JSON) has it, or if none is named as the driver has it. Without a driver there are no GPUs.
    ///
    /// # Errors
    /// If the file cannot be read or is malformed. A driver that fails is logged, and counts as none.
    pub fn read(file: &Path) -> Result<Self, Error> {
        if file.as_os_str().is_empty() {
            return Ok(Self::of_driver().unwrap_or_else(|error| {
                match error {
                    NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound | NvmlError::DriverNotLoaded => {
                        tracing::debug!(%error, "no NVIDIA driver");
                    }
                    error => tracing::warn!(%error, "NVIDIA's driver does not tell of its GPUs"),
                }
                Self::default()
            }));
        }
        let wrong = |source| Error::Inventory { path: file.to_owned(), source };
        let text = std::fs::read_to_string(file).map_err(wrong)?;
        let mut inventory: Self = serde_json::from_str(&text).map_err(|error| wrong(error.into()))?;
        inventory.gpus.sort_by_key(|gpu| gpu.index);
        Ok(inventory)
    }

    fn of_driver() -> Result<Self, NvmlError> {
        let driver = Nvml::init()?;
        let gpu = |index: u32| {
            let device = driver.device_by_index(index)?;
            Ok(GpuInfo {
                index: index as usize,
                uuid: device.uuid()?,
                name: device.name()?,
                memory_bytes: device.memory_info()?.total,
            })
        };
        Ok(Self { gpus: (0..driver.device_count()?).map(gpu).collect::<Result<_, NvmlError>>()? })
    }
}

/// A host's processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// What it is; empty if the operating system does not tell.
    pub name: String,
    /// Bytes of the host's memory; 0 if the operating system does not tell.
    pub memory_bytes: u64,
    /// Cores that this process may run on.
    pub cores: Cores,
}

impl Processor {
    /// This host's.
    pub fn of_host() -> Self {
        let value = |file: &str, key: &str| {
            let text = std::fs::read_to_string(file).ok()?;
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let kibibytes = value("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            name: value("/proc/cpuinfo", "model name").unwrap_or_default(),
            memory_bytes: kibibytes.unwrap_or(0) * 1024,
            cores: Cores::allowed().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stands_for_a_host() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/eight-gpus.json");
        let inventory = Inventory::read(&file).unwrap();
        assert_eq!(inventory.gpus.iter().map(|gpu| gpu.index).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert_eq!(inventory.gpus[3].memory_bytes, 85_520_809_984);
        let missing = Inventory::read(Path::new("/no/such/file")).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read the inventory /no/such/file");
        let malformed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(malformed.path(), r#"{"gpus": [{"index": 0}]}"#).unwrap();
        assert!(matches!(Inventory::read(malformed.path()), Err(Error::Inventory { .. })));
    }

    #[test]
    fn a_host_without_a_driver_has_no_gpus_and_is_no_error() {
        Inventory::read(Path::new("")).unwrap();
        let processor = Processor::of_host();
        assert!(processor.cores.count() > 0 && processor.memory_bytes > 1 << 20, "{processor:?}");
    }
}
