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
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

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
    let one = |(name, info, mut values): (String, TensorInfo, Values)| {
        let from = header.start + info.data_offsets.0 as u64;
        let bytes = values.bytes();
        read_part(path, from, bytes).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        super::READ.fetch_add(bytes.len() as u64, super::Relaxed);
        let tensor = values.tensor(&info.shape).and_then(|tensor| super::kept(&tensor, keep, device));
        Ok((name.clone(), tensor.map_err(|error| malformed(format!("tensor {name} {error}")))?))
    };
    // Room is made by one thread: an allocator may keep what each thread frees for that thread, and whoever takes these tensors turns many into others of their size.
    let room = |(name, info): (String, TensorInfo)| {
        let values = Values::zeros(info.dtype, info.data_offsets.1 - info.data_offsets.0).ok_or_else(|| {
            malformed(format!("tensor {name} is of type {:?}; f32, f16 and bf16 are read", info.dtype))
        })?;
        Ok((name, info, values))
    };
    let rooms = header.tensors().filter(|(name, _)| wanted(name)).map(room).collect::<Result<Vec<_>, Error>>()?;
    rooms.into_par_iter().map(one).collect()
}

fn read_part(path: &Path, from: u64, to: &mut [u8]) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    file.read_exact(to)
}

/// Values of a tensor in the type that they are stored as.
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Values {
    /// So many bytes of them; `None` for types that are not read.
    fn zeros(dtype: Dtype, bytes: usize) -> Option<Self> {
        Some(match dtype {
            Dtype::F32 => Self::F32(bytemuck::zeroed_vec(bytes / 4)),
            Dtype::F16 => Self::F16(bytemuck::zeroed_vec(bytes / 2)),
            Dtype::BF16 => Self::Bf16(bytemuck::zeroed_vec(bytes / 2)),
            _ => return None,
        })
    }

    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice_mut(values),
            Self::F16(values) => bytemuck::cast_slice_mut(values),
            Self::Bf16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// From the bytes of a file, which are little-endian.
    fn tensor(self, shape: &[usize]) -> candle_core::Result<Tensor> {
        match self {
            Self::F32(mut values) => {
                values.iter_mut().for_each(|value| *value = f32::from_bits(u32::from_le(value.to_bits())));
                Tensor::from_vec(values, shape, &Device::Cpu)
            }
            Self::F16(mut values) => {
                values.iter_mut().for_each(|value| *value = f16::from_bits(u16::from_le(value.to_bits())));
                Tensor::from_vec(values, shape, &Device::Cpu)
            }
            Self::Bf16(mut values) => {
                values.iter_mut().for_each(|value| *value = bf16::from_bits(u16::from_le(value.to_bits())));
                Tensor::from_vec(values, shape, &Device::Cpu)
            }
        }
    }
}
