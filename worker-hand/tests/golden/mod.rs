//! Folders of tiny networks as diffusers saves them, with what it computes beside: `tests/{network}/{name}`.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use efferent_worker::weights::Weights;

fn file(network: &str, name: &str, file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join(network).join(name).join(file)
}

pub(crate) fn config(network: &str, name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(file(network, name, "config.json")).unwrap()).unwrap()
}

pub(crate) fn weights(network: &str, name: &str) -> Weights {
    Weights::open_safetensors(&file(network, name, "diffusion_pytorch_model.safetensors"), &Device::Cpu).unwrap()
}

pub(crate) fn golden(network: &str, name: &str) -> Weights {
    Weights::open_safetensors(&file(network, name, "golden.safetensors"), &Device::Cpu).unwrap()
}

/// Largest absolute difference.
pub(crate) fn difference(got: &Tensor, expected: &Tensor) -> f32 {
    (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}
