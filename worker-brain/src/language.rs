//! A decoder language model from a folder as transformers saves it, alone or as the language half of a model that also sees.

use std::path::{Path, PathBuf};

use candle_core::Device;
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::EngineError,
    nn::decoder::{Config, Decoder, Naming, RotaryPairs, published},
    pipeline::{diffusers, read_json},
    weights::{self, Dtypes, Gguf, Keep, Weights},
};
use serde_json::{Map, Value};

use crate::families::unloadable;

/// Loads the model of a folder. `largest`: its tokenizer's largest id; `dtypes`: what it is kept as, by the folder's name; `writes`: whether it is to write text, which takes what predicts tokens.
///
/// # Errors
/// If a file cannot be read, is malformed, or is not of a decoder that is known.
pub fn load(
    folder: &Path,
    largest: usize,
    devices: &[Device],
    dtypes: &Dtypes,
    writes: bool,
) -> Result<Decoder, EngineError> {
    let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let unloadable = unloadable(&name);
    let fields = read_json(&folder.join("config.json")).map_err(|e| unloadable(e.into()))?;
    let config = Config::published(&fields).map_err(|e| unloadable(e.into()))?;
    check_vocabulary(&name, config.vocabulary, largest)?;
    let keep = dtypes.of(&name, &fields)?;
    let (files, variant) = diffusers::weights(folder).map_err(|e| unloadable(e.into()))?;
    let decoder = match (&files[..], variant) {
        ([file], diffusers::GGUF) => from_gguf(file, config, &fields, (devices, keep), writes),
        _ => from_safetensors(&files, config, &fields, (devices, keep), writes),
    };
    decoder.and_then(|decoder| Ok(decoder.spread(devices)?)).map_err(unloadable)
}

/// What predicts tokens, at the end of its name and by the usual one.
const HEAD: &str = "lm_head.weight";
/// The same in GGUF.
const GGUF_HEAD: &str = "output.weight";

type Loading = Result<Decoder, Box<dyn std::error::Error + Send + Sync>>;

fn from_safetensors(
    files: &[PathBuf],
    config: Config,
    fields: &Map<String, Value>,
    (devices, keep): (&[Device], Keep),
    writes: bool,
) -> Loading {
    let names = weights::names(files)?;
    // Without any embeddings, what is missing is told below, by the usual names.
    let prefix = published::prefix(names.iter().map(String::as_str)).unwrap_or("model.");
    let alone = prefix == "model." || prefix.is_empty();
    // What predicts tokens is read if it is to, what sees is not.
    let wanted = |tensor: &str| match tensor.ends_with(HEAD) {
        true => writes,
        false => tensor.starts_with(prefix) && !is_of_another(tensor, alone),
    };
    let mut tensors = Weights::open_some(files, loading(devices), keep, wanted)?;
    tensors.rename(|tensor| match tensor.ends_with(HEAD) {
        true => HEAD.to_owned(),
        false => format!("model.{}", tensor.strip_prefix(prefix).unwrap_or(tensor)),
    });
    if writes && !tensors.contains(HEAD) && !published::is_tied(fields) {
        return Err(format!("{HEAD} is missing, and the embeddings are not said to do its work").into());
    }
    let decoder = Decoder::new(config, Naming::Transformers, &mut tensors)?.with_head(&mut tensors, HEAD);
    tensors.finish()?;
    Ok(decoder)
}

/// From one file of GGUF, dequantised, to f32 unless half precision is asked for: it takes less room on the disk, not in memory.
fn from_gguf(
    file: &Path,
    config: Config,
    fields: &Map<String, Value>,
    (devices, keep): (&[Device], Keep),
    writes: bool,
) -> Loading {
    let file = Gguf::open(file)?;
    let architecture = file.metadata().get("general.architecture").and_then(|value| value.to_string().ok()).cloned();
    let architecture = architecture.unwrap_or_default();
    let wanted = published::gguf_architecture(fields);
    if architecture != wanted {
        return Err(format!("the GGUF file is of architecture {architecture:?}, config.json of {wanted:?}").into());
    }
    let pairs = if wanted == "llama" { RotaryPairs::Neighbours } else { config.rotary_pairs };
    let config = Config { rotary_pairs: pairs, ..config };
    let mut tensors = Weights::from_gguf(&file, loading(devices), keep, |name| {
        Naming::Gguf.wants(name, config.layers) || (writes && name == GGUF_HEAD)
    })?;
    let decoder = Decoder::new(config, Naming::Gguf, &mut tensors)?.with_head(&mut tensors, GGUF_HEAD);
    tensors.finish()?;
    Ok(decoder)
}

/// Where weights are read to, that are then shared out over these devices: not all need fit on the first.
pub fn loading(devices: &[Device]) -> &Device {
    match devices {
        [only] => only,
        _ => &Device::Cpu,
    }
}

/// Whether a tensor under the decoder's prefix belongs to what sees.
fn is_of_another(tensor: &str, alone: bool) -> bool {
    let parts = ["visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "image_newline"];
    let rest = tensor.strip_prefix("model.").unwrap_or(tensor);
    alone && parts.iter().any(|part| rest.starts_with(part))
}

/// Refuses a tokenizer that counts further than a model knows. Told before weights are read, which takes a while.
///
/// # Errors
/// If so.
pub fn check_vocabulary(name: &str, known: usize, largest: usize) -> Result<(), EngineError> {
    if largest < known {
        return Ok(());
    }
    let message = format!("{name} knows {known} tokens, its tokenizer counts up to {largest}");
    Err(ApiError::new(ErrorCode::InvalidField, message).field("brain.config").into())
}

/// Refuses a model that is to read longer sequences than are computed as it was trained.
///
/// # Errors
/// If so.
pub fn check_length(name: &str, model: &Config, longest: usize) -> Result<(), EngineError> {
    match model.longest {
        Some(limit) if longest > limit => {
            let message = format!("{name} reads sequences of up to {limit} tokens, not {longest}");
            let refused = ApiError::new(ErrorCode::LimitExceeded, message).field("brain.config.max_tokens");
            Err(refused.limit(limit.to_string()).into())
        }
        _ => Ok(()),
    }
}
