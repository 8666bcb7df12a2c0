//! Weights from safetensors and GGUF files, as tensors by name, matrices in the type that is asked for ([`Dtypes`]).
//!
//! A file may come from anywhere: lengths are checked against the file before memory is reserved, and a file that does not fit the
//! model is refused with every difference at once. Of what `torch.save` writes, only the description of tensors is understood; pickled code is never run.

mod dtype;
mod pth;
mod stored;

use std::{
    collections::{BTreeMap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, quantized::gguf_file};
use rayon::prelude::*;

use crate::{memory, thread::panic_message};

pub use dtype::{Dtype, Dtypes, Keep, Refused};
pub use stored::{Measure, measure, names};

/// Most bytes of a weights' file.
const MAX_FILE: u64 = 64 << 30;
/// How many differences are told; the rest is counted.
const MAX_TOLD: usize = 20;

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what its format asks for: truncated, or with lengths that do not agree.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// There is no room for the values.
    #[error("{} needs {} for its values, {} can be had: {}", path.display(), gigabytes(*needed), gigabytes(*available), fitting(*halved, *available))]
    TooLarge {
        /// Which file, or the first of its shards.
        path: PathBuf,
        /// Bytes.
        needed: u64,
        /// Bytes with matrices in half precision.
        halved: u64,
        /// Bytes.
        available: u64,
    },
    /// The tensors are not those of the model.
    #[error("{}: {}", path.display(), told(differences))]
    Mismatch {
        /// Which file.
        path: PathBuf,
        /// Each one names a tensor.
        differences: Vec<String>,
    },
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// What would fit.
fn fitting(halved: u64, available: u64) -> String {
    match halved <= available {
        true => format!("in bf16 it would fit ({})", gigabytes(halved)),
        false => "another machine, or a smaller model".to_owned(),
    }
}

fn told(differences: &[String]) -> String {
    let shown = differences.iter().take(MAX_TOLD).map(String::as_str).collect::<Vec<_>>().join("; ");
    match differences.len().saturating_sub(MAX_TOLD) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

/// Tensors of a file, taken one by one; [`Weights::finish`] tells what did not fit.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    device: Device,
    tensors: BTreeMap<String, Tensor>,
    differences: Vec<String>,
}

impl Weights {
    /// Reads every tensor of a safetensors file (f32, f16, bf16) as f32.
    ///
    /// # Errors
    /// If the file cannot be read, is malformed, or has values of another type or that are not finite.
    pub fn open_safetensors(path: &Path, device: &Device) -> Result<Self, Error> {
        Self::open_shards(&[path.to_owned()], device, Keep::F32)
    }

    /// Reads every tensor of several safetensors files, which are shards of one.
    ///
    /// # Errors
    /// As [`Weights::open_safetensors`], if two have a tensor of the same name, if values do not fit into the type to be kept, and, on CPU, if there is no room
    /// for all: told before any is read.
    pub fn open_shards(paths: &[PathBuf], device: &Device, keep: Keep) -> Result<Self, Error> {
        Self::open_some(paths, device, keep, |_| true)
    }

    /// Reads the `wanted` tensors of safetensors files, which are shards of one.
    ///
    /// # Errors
    /// As [`Weights::open_shards`].
    pub fn open_some(
        paths: &[PathBuf],
        device: &Device,
        keep: Keep,
        wanted: impl Fn(&str) -> bool + Sync,
    ) -> Result<Self, Error> {
        let mut tensors = BTreeMap::new();
        let first = paths.first().map_or(Path::new(""), |path| path);
        let measure = stored::measure_some(paths, &wanted)?;
        if device.is_cpu() {
            check_room(first, &measure, keep, memory::available())?;
        }
        ASKED.fetch_add(measure.bytes, Relaxed);
        for path in paths {
            for (name, tensor) in stored::read(path, device, keep, &wanted)? {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::Malformed {
                        path: path.clone(),
                        what: format!("tensor {name} is in another shard too"),
                    });
                }
            }
        }
        Ok(Self::of(first, device, tensors))
    }

    /// Reads the `wanted` tensors of a file that `torch.save` wrote. Of its pickled part only what describes tensors is understood; code in it is not run.
    ///
    /// # Errors
    /// If the file cannot be read or is malformed, or a wanted tensor is of another type than a float, a part of another, or has values that are not finite.
    pub fn open_pth(path: &Path, device: &Device, keep: Keep, wanted: impl Fn(&str) -> bool) -> Result<Self, Error> {
        Ok(Self::of(path, device, pth::read(path, device, keep, &wanted)?))
    }

    /// The `wanted` tensors of a GGUF file, dequantised.
    ///
    /// # Errors
    /// If a tensor is malformed, or has values that are not finite.
    pub fn from_gguf(file: &Gguf, device: &Device, keep: Keep, wanted: impl Fn(&str) -> bool) -> Result<Self, Error> {
        let Gguf { path, content, bytes } = file;
        let malformed = |what: String| Error::Malformed { path: path.clone(), what };
        let names: Vec<&String> = content.tensor_infos.keys().filter(|name| wanted(name)).collect();
        let tensors = names
            .into_par_iter()
            .map(|name| {
                let read = || {
                    let stored = content.tensor(&mut std::io::Cursor::new(bytes), name, &Device::Cpu)?;
                    kept(&stored.dequantize(&Device::Cpu)?, keep, device)
                };
                Ok((name.clone(), guarded(read).map_err(|what| malformed(format!("tensor {name} {what}")))?))
            })
            .collect::<Result<BTreeMap<_, _>, Error>>()?;
        Ok(Self::of(path, device, tensors))
    }

    fn of(path: &Path, device: &Device, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { path: path.to_owned(), device: device.clone(), tensors, differences: Vec::new() }
    }

    /// Whether a tensor of this name is there and not taken yet.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Renames every tensor that is not taken yet.
    pub fn rename(&mut self, name: impl Fn(&str) -> String) {
        self.tensors =
            std::mem::take(&mut self.tensors).into_iter().map(|(old, tensor)| (name(&old), tensor)).collect();
    }

    /// Takes a tensor, as f32. If it is missing or of another shape, that is noted for [`Weights::finish`], and zeros stand in for it (they take
    /// no memory, whatever the shape).
    pub fn get(&mut self, name: &str, shape: &[usize]) -> Tensor {
        let full = |tensor: Tensor| tensor.to_dtype(DType::F32).expect("floats can be converted");
        self.take(name, shape).map_or_else(|| self.zeros(shape), full)
    }

    /// The same in the type that it is kept as.
    pub fn matrix(&mut self, name: &str, shape: &[usize]) -> Tensor {
        self.take(name, shape).unwrap_or_else(|| self.zeros(shape))
    }

    /// Takes a tensor, as f32, and brings it into another form, of the shape `wanted`, in which zeros stand in for it if it is missing or of another shape.
    ///
    /// # Errors
    /// If it cannot be brought into that form.
    pub fn get_as(
        &mut self,
        name: &str,
        shape: &[usize],
        wanted: &[usize],
        convert: impl FnOnce(Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.matrix_as(name, shape, wanted, |tensor| convert(tensor.to_dtype(DType::F32)?))
    }

    /// The same in the type that it is kept as.
    ///
    /// # Errors
    /// As [`Weights::get_as`].
    pub fn matrix_as(
        &mut self,
        name: &str,
        shape: &[usize],
        wanted: &[usize],
        convert: impl FnOnce(Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.take(name, shape).map_or_else(|| Ok(self.zeros(wanted)), convert)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Option<Tensor> {
        match self.tensors.remove(name) {
            Some(tensor) if tensor.dims() == shape => return Some(tensor),
            Some(tensor) => {
                self.differences
                    .push(format!("tensor {name} has shape {:?}, the model wants {shape:?}", tensor.dims()));
            }
            None => self.differences.push(format!("tensor {name} {shape:?} is missing")),
        }
        None
    }

    fn zeros(&self, shape: &[usize]) -> Tensor {
        Tensor::zeros((), DType::F32, &self.device)
            .and_then(|zero| zero.broadcast_as(shape))
            .expect("a scalar can be broadcast to any shape")
    }

    /// Every difference at once: missing, misshapen, and surplus tensors.
    ///
    /// # Errors
    /// If there is any.
    pub fn finish(mut self) -> Result<(), Error> {
        let surplus =
            self.tensors.iter().map(|(name, tensor)| format!("tensor {name} {:?} is not the model's", tensor.dims()));
        self.differences.extend(surplus);
        match self.differences.is_empty() {
            true => Ok(()),
            false => Err(Error::Mismatch { path: self.path, differences: self.differences }),
        }
    }
}

/// Bytes of safetensors that this process was asked to read so far, and has read.
static ASKED: AtomicU64 = AtomicU64::new(0);
static READ: AtomicU64 = AtomicU64::new(0);

/// How much of the weights that this process was asked for so far is read: bytes, and bytes in all.
pub fn loaded() -> (u64, u64) {
    (READ.load(Relaxed), ASKED.load(Relaxed))
}

/// A tensor of a file, on the CPU, in the type that it is to be kept as, on the device that it is to be on. Values that are not finite would come out as a black
/// picture long after: refused here.
fn kept(tensor: &Tensor, keep: Keep, device: &Device) -> candle_core::Result<Tensor> {
    let dtype = if tensor.rank() < 2 { DType::F32 } else { keep.matrix(tensor.dtype()) };
    if !is_finite(tensor)? {
        candle_core::bail!("has values that are not finite");
    }
    let converted = tensor.to_dtype(dtype)?;
    if dtype == DType::F16 && tensor.dtype() != dtype && !is_finite(&converted)? {
        candle_core::bail!("has values beyond those of f16: bf16 or f32 would keep them");
    }
    converted.to_device(device)
}

/// Whether all values of a contiguous tensor on the CPU are finite.
fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((from, to))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("lies elsewhere");
    };
    Ok(match storage {
        CpuStorage::F32(values) => values[from..to].iter().all(|value| value.is_finite()),
        CpuStorage::F16(values) => values[from..to].iter().all(|value| value.is_finite()),
        CpuStorage::BF16(values) => values[from..to].iter().all(|value| value.is_finite()),
        _ => return is_finite(&tensor.to_dtype(DType::F32)?),
    })
}

fn check_room(path: &Path, measure: &Measure, keep: Keep, available: Option<u64>) -> Result<(), Error> {
    let needed = measure.memory(keep);
    match available {
        Some(available) if needed > available => {
            let halved = measure.memory(Dtype::Bf16.into());
            Err(Error::TooLarge { path: path.to_owned(), needed, halved, available })
        }
        _ => Ok(()),
    }
}

/// A GGUF file in memory: metadata (tokenizer, sizes) and tensors, read once.
pub struct Gguf {
    path: PathBuf,
    content: gguf_file::Content,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path).field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl Gguf {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or is malformed.
    pub fn open(path: &Path) -> Result<Self, Error> {
        check_size(path)?;
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        // candle checks each length against what is left of the file before it reserves memory.
        let content = guarded(|| gguf_file::Content::read(&mut std::io::Cursor::new(&bytes))).map_err(|what| {
            Error::Malformed { path: path.to_owned(), what: format!("not a GGUF file, or a truncated one: {what}") }
        })?;
        for (name, tensor) in &content.tensor_infos {
            // candle multiplies the axes without looking for an overflow.
            let values = tensor.shape.dims().iter().try_fold(1usize, |values, axis| values.checked_mul(*axis));
            if values.is_none_or(|values| values / 8 > bytes.len()) {
                let what = format!("tensor {name} {:?} is larger than the file", tensor.shape.dims());
                return Err(Error::Malformed { path: path.to_owned(), what });
            }
        }
        Ok(Self { path: path.to_owned(), content, bytes })
    }

    /// What the file holds.
    pub fn measure(&self) -> Measure {
        let mut found = Measure::default();
        for tensor in self.content.tensor_infos.values() {
            // What is dequantised is f32 first.
            found.add(tensor.shape.dims(), DType::F32, 0, format!("{:?}", tensor.ggml_dtype).to_lowercase());
        }
        Measure { bytes: self.bytes.len() as u64, ..found }
    }

    /// What the file says of the model, by key.
    pub fn metadata(&self) -> &HashMap<String, gguf_file::Value> {
        &self.content.metadata
    }
}

/// A file's length, if it is not too large.
fn check_size(path: &Path) -> Result<u64, Error> {
    let length = std::fs::metadata(path).map_err(|source| Error::Read { path: path.to_owned(), source })?.len();
    match length <= MAX_FILE {
        true => Ok(length),
        false => Err(Error::Malformed {
            path: path.to_owned(),
            what: format!("{length} bytes are over the limit of {MAX_FILE}"),
        }),
    }
}

/// candle panics where sizes overflow; a hostile file must not take the worker with it.
fn guarded<T>(read: impl FnOnce() -> candle_core::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(panic) => Err(panic_message(panic.as_ref())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn safe(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    const TWO: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[1,2],"data_offsets":[8,12]}}"#;

    fn two() -> Vec<u8> {
        let halves = [half::f16::from_f32(0.5), half::f16::from_f32(-3.0)];
        let data = [1f32.to_le_bytes(), 2f32.to_le_bytes()]
            .concat()
            .into_iter()
            .chain(halves.iter().flat_map(|h| h.to_le_bytes()));
        safe(TWO, &data.collect::<Vec<_>>())
    }

    #[test]
    fn every_difference_is_told_at_once() {
        let (_folder, path) = write(&two());
        let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
        assert_eq!(weights.get("b", &[1, 2]).to_vec2::<f32>().unwrap(), [[0.5, -3.0]]);
        assert_eq!(weights.get("a", &[2]).to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        weights.finish().unwrap();
        let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
        let huge = [1 << 30, 1 << 20];
        assert_eq!(weights.get("missing", &huge).dims(), huge);
        assert_eq!(weights.get("a", &[3]).dims(), [3]);
        let error = weights.finish().unwrap_err().to_string();
        for wanted in [
            "tensor missing [1073741824, 1048576] is missing",
            "tensor a has shape [2], the model wants [3]",
            "tensor b [1, 2] is not the model's",
        ] {
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn matrices_are_kept_as_asked_and_vectors_in_f32() {
        let (_folder, path) = write(&two());
        let open = |keep: Keep| Weights::open_shards(std::slice::from_ref(&path), &Device::Cpu, keep).unwrap();
        for (keep, expected) in [
            (Keep::F32, DType::F32),
            (Dtype::Auto.into(), DType::F16),
            (Dtype::F16.into(), DType::F16),
            (Dtype::Bf16.into(), DType::BF16),
        ] {
            let mut weights = open(keep);
            assert_eq!(weights.matrix("a", &[2]).dtype(), DType::F32);
            let matrix = weights.matrix("b", &[1, 2]);
            assert_eq!(matrix.dtype(), expected);
            assert_eq!(matrix.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap(), [[0.5, -3.0]]);
            assert_eq!(open(keep).get("b", &[1, 2]).dtype(), DType::F32);
        }
        let large = safe(r#"{"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}"#, &1e5f32.to_le_bytes());
        let (_folder, path) = write(&large);
        let error = Weights::open_shards(&[path], &Device::Cpu, Dtype::F16.into()).unwrap_err().to_string();
        assert!(error.contains("tensor a has values beyond those of f16"), "{error}");
    }

    #[test]
    fn hostile_safetensors_are_errors() {
        let good = two();
        let nan = safe(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &f32::NAN.to_le_bytes());
        let cases = [
            (Vec::new(), "not a safetensors file"),
            (good[..good.len() - 1].to_vec(), "truncated"),
            (u64::MAX.to_le_bytes().to_vec(), "not a safetensors file"),
            (safe("{", &[]), "not a safetensors file"),
            (
                safe(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#, &[0; 8]),
                "not a safetensors file",
            ),
            (safe(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, &[0; 8]), "not a safetensors file"),
            (safe(r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8]), "type I64"),
            (nan, "tensor a has values that are not finite"),
        ];
        for (bytes, wanted) in cases {
            let (_folder, path) = write(&bytes);
            let error = Weights::open_safetensors(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let positions = r#"{"text_model.embeddings.position_ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
        let (_folder, path) = write(&safe(positions, &[0; 8]));
        Weights::open_safetensors(&path, &Device::Cpu).unwrap().finish().unwrap();
        let missing = Weights::open_safetensors(Path::new("/nowhere/w"), &Device::Cpu).unwrap_err();
        assert!(matches!(missing, Error::Read { .. }), "{missing}");
    }

    #[test]
    fn files_are_measured_by_their_headers() {
        let (_folder, path) = write(&two());
        let measure = measure(&[path.clone(), path.clone()]).unwrap();
        assert_eq!((measure.tensors, measure.parameters, measure.bytes), (4, 8, 24));
        assert_eq!(measure.types.iter().map(String::as_str).collect::<Vec<_>>(), ["f16", "f32"]);
        // Four values in a vector, four in a matrix of f16.
        assert_eq!((measure.memory(Keep::F32), measure.memory(Dtype::Auto.into())), (32, 24));
        assert!(check_room(&path, &measure, Keep::F32, None).is_ok());
        assert!(check_room(&path, &measure, Keep::F32, Some(32)).is_ok());
        let mut large = Measure::default();
        large.add(&[3_075, 1_000_000], DType::F32, 0, "f32".to_owned());
        let room = |available| check_room(&path, &large, Keep::F32, Some(available)).unwrap_err().to_string();
        let error = room(5_000_000_000);
        assert!(error.contains("needs 12.3 GB for its values, 5.0 GB can be had: another machine"), "{error}");
        let error = room(7_000_000_000);
        assert!(error.contains("in bf16 it would fit (6.2 GB)"), "{error}");
    }

    fn gguf(tensors: u64, name_length: u64, dims: &[u64], data: &[u8]) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(name_length.to_le_bytes());
        bytes.push(b'a');
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        bytes
    }

    #[test]
    fn hostile_gguf_is_an_error() {
        let values: Vec<u8> = [1f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let (_folder, path) = write(&gguf(1, 1, &[2], &values));
        let mut weights =
            Gguf::open(&path).and_then(|file| Weights::from_gguf(&file, &Device::Cpu, Keep::F32, |_| true)).unwrap();
        assert_eq!(weights.get("a", &[2]).to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let nan: Vec<u8> = [1f32, f32::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        for bytes in [
            Vec::new(),
            b"GGUF".to_vec(),
            gguf(u64::MAX, 1, &[2], &values),
            gguf(1, u64::MAX, &[2], &values),
            gguf(1, 1, &[u64::MAX, u64::MAX], &values),
            gguf(1, 1, &[1 << 62, 4], &values),
            gguf(1, 1, &[1 << 40], &values),
            gguf(1, 1, &[2; 9], &values),
            gguf(1, 1, &[2], &values[..7]),
            gguf(1, 1, &[2], &nan),
        ] {
            let (_folder, path) = write(&bytes);
            let error = Gguf::open(&path)
                .and_then(|file| Weights::from_gguf(&file, &Device::Cpu, Keep::F32, |_| true))
                .unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{error}");
        }
    }
}
