//! Safetensors files: what their headers tell, and their values, tensor by tensor, so that no more than one is in memory twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, tensor::Metadata};

use super::{Error, Keep, check_size};

/// Most bytes of a header, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;
/// Which tensors are read, by name.
pub(super) type Wanted<'a> = &'a (dyn Fn(&str) -> bool + Sync);

/// What files of weights hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Measure {
    /// Tensors.
    pub tensors: usize,
    /// Values of all.
    pub parameters: u64,
    /// Bytes of the values in the files.
    pub bytes: u64,
    /// Types of the values.
    pub types: BTreeSet<String>,
    /// Values of vectors, and of matrices by the type that they are stored as.
    pub(super) vectors: u64,
    pub(super) matrices: Vec<(DType, u64)>,
}

impl Measure {
    /// Bytes of the values in memory, if they are kept as this.
    pub fn memory(&self, keep: Keep) -> u64 {
        let matrices = self.matrices.iter().map(|(stored, values)| (keep.matrix(*stored), *values));
        let all = matrices.chain([(DType::F32, self.vectors)]);
        all.fold(0, |sum, (dtype, values)| sum.saturating_add(values.saturating_mul(dtype.size_in_bytes() as u64)))
    }

    /// Counts a tensor in.
    pub(super) fn add(&mut self, shape: &[usize], stored: DType, bytes: u64, name: String) {
        let values = shape.iter().product::<usize>() as u64;
        self.tensors += 1;
        self.parameters += values;
        self.bytes += bytes;
        self.types.insert(name);
        match (shape.len(), self.matrices.iter_mut().find(|(dtype, _)| *dtype == stored)) {
            (0 | 1, _) => self.vectors += values,
            (_, Some((_, sum))) => *sum += values,
            (_, None) => self.matrices.push((stored, values)),
        }
    }
}

/// Reads the headers of safetensors files.
///
/// # Errors
/// If a file cannot be read, or is malformed.
pub fn measure(paths: &[PathBuf]) -> Result<Measure, Error> {
    if let [only] = paths
        && only.extension().is_some_and(|kind| kind == "gguf")
    {
        return Ok(super::Gguf::open(only)?.measure());
    }
    measure_some(paths, &|_| true)
}

/// Names of the tensors in safetensors files, from their headers.
///
/// # Errors
/// If a file cannot be read, or is malformed.
pub fn names(paths: &[PathBuf]) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for path in paths {
        names.extend(Header::read(path)?.tensors().map(|(name, _)| name));
    }
    Ok(names)
}

/// The same for some of the tensors.
pub(super) fn measure_some(paths: &[PathBuf], wanted: Wanted<'_>) -> Result<Measure, Error> {
    let mut found = Measure::default();
    for path in paths {
        let header = Header::read(path)?;
        for (_, tensor) in header.tensors().filter(|(name, _)| wanted(name)) {
            let bytes = (tensor.data_offsets.1 - tensor.data_offsets.0) as u64;
            let stored = match tensor.dtype {
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                _ => DType::F32,
            };
            found.add(&tensor.shape, stored, bytes, format!("{:?}", tensor.dtype).to_lowercase());
        }
    }
    Ok(found)
}

/// The beginning of a file, checked against its length.
struct Header {
    /// Where the values begin.
    start: u64,
    metadata: Metadata,
}

impl Header {
    fn read(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let malformed = |what: &dyn std::fmt::Display| Error::Malformed {
            path: path.to_owned(),
            what: format!("not a safetensors file, or a truncated one: {what}"),
        };
        check_size(path)?;
        let mut file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(|error| malformed(&error))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > length {
            return Err(malformed(&format_args!("a header of {size} bytes")));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(|error| malformed(&error))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| malformed(&error))?;
        let start = 8 + size;
        let values = metadata.tensors().values().map(|tensor| tensor.data_offsets.1 as u64).max().unwrap_or(0);
        match start + values == length {
            true => Ok(Self { start, metadata }),
            false => Err(malformed(&format_args!("{length} bytes, the header tells of {}", start + values))),
        }
    }

    /// Positions that old versions of transformers saved beside the weights, integers that count from 0, are left out.
    fn tensors(&self) -> impl Iterator<Item = (String, safetensors::tensor::TensorInfo)> {
        let tensors = self.metadata.tensors().into_iter().filter(|(name, _)| !name.ends_with("position_ids"));
        tensors.map(|(name, info)| (name, info.clone())).collect::<Vec<_>>().into_iter()
    }
}

/// The wanted tensors of a file, kept as asked.
pub(super) fn read(
    path: &Path,
    device: &Device,
    keep: Keep,
    wanted: Wanted<'_>,
) -> Result<BTreeMap<String, Tensor>, Error> {
    let header = Header::read(path)?;
    let malformed = |what: String| Error::Malformed { path: path.to_owned(), what };
    let tensors: Vec<_> = header.tensors().filter(|(name, _)| wanted(name)).collect();
    let one = |(name, info): (String, safetensors::tensor::TensorInfo)| {
        let (begin, end) = info.data_offsets;
        let bytes = part(path, header.start + begin as u64, end - begin)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        super::READ.fetch_add(bytes.len() as u64, super::Relaxed);
        let tensor = tensor(info.dtype, bytes, &info.shape).ok_or_else(|| {
            malformed(format!("tensor {name} is of type {:?}; f32, f16 and bf16 are read", info.dtype))
        })?;
        let tensor = tensor.and_then(|tensor| super::kept(&tensor, keep, device));
        Ok((name.clone(), tensor.map_err(|error| malformed(format!("tensor {name} {error}")))?))
    };
    tensors.into_par_iter().map(one).collect()
}

fn part(path: &Path, from: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Little-endian values of a float type; `None` for other types.
fn tensor(dtype: Dtype, data: Vec<u8>, shape: &[usize]) -> Option<candle_core::Result<Tensor>> {
    let halves = data.as_chunks::<2>().0;
    Some(match dtype {
        Dtype::F32 => {
            let values: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        Dtype::F16 => {
            let values: Vec<f16> = halves.iter().map(|b| f16::from_le_bytes(*b)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        Dtype::BF16 => {
            let values: Vec<bf16> = halves.iter().map(|b| bf16::from_le_bytes(*b)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        _ => return None,
    })
}
