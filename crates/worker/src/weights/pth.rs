//! Files that `torch.save` writes: a zip of values, and a pickled description of the tensors, of which candle understands that much and no more.

use std::{collections::BTreeMap, path::Path};

use candle_core::{Device, Tensor, pickle::PthTensors};

use super::{Error, Keep, check_size, guarded, kept};

/// The wanted tensors of a file, kept as asked.
pub(super) fn read(
    path: &Path,
    device: &Device,
    keep: Keep,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<BTreeMap<String, Tensor>, Error> {
    let malformed = |what: String| Error::Malformed { path: path.to_owned(), what };
    let length = check_size(path)?;
    let file = guarded(|| PthTensors::new(path, None))
        .map_err(|what| malformed(format!("not a file of torch.save, or a truncated one: {what}")))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in file.tensor_infos().iter().filter(|(name, _)| wanted(name)) {
        let told = |what: &str| malformed(format!("tensor {name} {what}"));
        if !info.dtype.is_float() {
            return Err(told(&format!("is of type {:?}; floats are read", info.dtype)));
        }
        // candle counts what lies before a tensor in bytes where it is told in values.
        if info.layout.start_offset() != 0 {
            return Err(told("is a part of another one"));
        }
        let values = info.layout.dims().iter().try_fold(1usize, |count, dim| count.checked_mul(*dim));
        let bytes = values.and_then(|values| values.checked_mul(info.dtype.size_in_bytes()));
        if bytes.is_none_or(|bytes| bytes as u64 > length) {
            return Err(told(&format!("of {:?} is larger than the file", info.layout.dims())));
        }
        let read = || match file.get(name)? {
            Some(tensor) => kept(&tensor.contiguous()?, keep, device),
            None => candle_core::bail!("is not in the file"),
        };
        tensors.insert(name.clone(), guarded(read).map_err(|what| told(&what))?);
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{super::Weights, *};

    /// `tests/weights/reference.py` makes it: `a`, `b` transposed, in f16, and `ids`, which are no floats.
    fn file() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights/small.pth")
    }

    #[test]
    fn tensors_of_torch() {
        let mut weights =
            Weights::open_pth(&file(), &Device::Cpu, Keep::F32, |name| name != "ids" && name != "part").unwrap();
        assert_eq!(weights.get("a", &[2, 3]).to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_eq!(weights.get("b", &[2, 2]).to_vec2::<f32>().unwrap(), [[0.5, 2.5], [1.5, 3.5]]);
        weights.finish().unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let told = |path: &Path, wanted: &str| {
            Weights::open_pth(path, &Device::Cpu, Keep::F32, |name| name == wanted).unwrap_err().to_string()
        };
        assert!(told(&file(), "ids").contains("tensor ids is of type I64"));
        assert!(told(&file(), "part").contains("is a part of another one"));
        let folder = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(file()).unwrap();
        for (name, bytes) in [("cut.pth", &bytes[..bytes.len() / 2]), ("empty.pth", &[]), ("text.pth", b"import os")] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            assert!(told(&path, "a").contains("not a file of torch.save"), "{name}");
        }
        assert!(told(Path::new("/nowhere.pth"), "a").contains("cannot read"));
    }
}
