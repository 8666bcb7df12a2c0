//! Times a network on real dimensions: `network_speed KIND FOLDER RUNS DTYPE` (what its matrices are kept as) for `tests/peers/networks.py`, which makes the folder and measures PyTorch beside it.
//!
//! Reads `config.json`, `weights.safetensors` and `input.safetensors`; writes `output.safetensors`; prints the milliseconds of each run, and the most memory
//! that the process had (MB).

#![expect(clippy::print_stdout, reason = "what it measured is read from there")]

use std::{collections::HashMap, path::Path, time::Instant};

use candle_core::{DType, Device, Result, Tensor};
use efferent_hand::networks::{
    LatentSpace as _,
    autoencoder::Autoencoder,
    dc_autoencoder::DcAutoencoder,
    sana::Sana,
    unet::{self, Unet},
    z_image::{Text, ZImage},
};
use efferent_worker::{
    nn::decoder::{Config, Decoder, Naming},
    weights::{Dtype, Weights},
};
use serde::de::DeserializeOwned;

type Failure = Box<dyn std::error::Error>;
type Run = Box<dyn Fn() -> Result<Tensor>>;

fn main() -> std::result::Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, kind, folder, runs, dtype] = &arguments[..] else {
        return Err("network_speed KIND FOLDER RUNS DTYPE".into());
    };
    let folder = Path::new(folder);
    let run = load(kind, folder, dtype.parse::<Dtype>()?)?;
    let mut times = Vec::new();
    let mut output = run()?;
    for _ in 0..runs.parse::<usize>()? {
        let start = Instant::now();
        output = run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    candle_core::safetensors::save(&HashMap::from([("output", output)]), folder.join("output.safetensors"))?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    let peak = peak.and_then(|kilobytes| kilobytes.parse::<f64>().ok()).unwrap_or(0.0) / 1e3;
    println!("{}", serde_json::json!({ "times": times, "memory": peak }));
    Ok(())
}

fn config<T: DeserializeOwned>(folder: &Path) -> std::result::Result<T, Failure> {
    Ok(serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?)
}

/// Maps as networks keep them: channels last.
fn last(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 2, 3, 1))?.contiguous()
}

fn first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()
}

fn load(kind: &str, folder: &Path, dtype: Dtype) -> std::result::Result<Run, Failure> {
    let device = Device::Cpu;
    let inputs = candle_core::safetensors::load(folder.join("input.safetensors"), &device)?;
    let input = |name: &str| inputs.get(name).cloned().ok_or_else(|| format!("no {name}"));
    let mut weights = Weights::open_shards(&[folder.join("weights.safetensors")], &device, dtype.into())?;
    let run: Run = match kind {
        "unet" => {
            let network = Unet::new(config(folder)?, &mut weights)?;
            let (x, time, text) = (last(&input("x")?)?, input("time")?, input("text")?);
            Box::new(move || {
                let text = unet::Text { states: &text, bias: None };
                first(&network.forward(&x, &time, text, None, None)?)
            })
        }
        "vae" => {
            let network = Autoencoder::new(config(folder)?, &mut weights)?;
            let x = last(&input("x")?)?;
            Box::new(move || first(&network.decode(&x)?))
        }
        "dc-ae" => {
            let network = DcAutoencoder::new(config(folder)?, &mut weights)?;
            let x = last(&input("x")?)?;
            Box::new(move || first(&network.decode(&x)?))
        }
        "sana" => {
            let network = Sana::new(config(folder)?, &mut weights)?;
            let (x, time, text) = (input("x")?, input("time")?, input("text")?);
            Box::new(move || network.forward(&x, &time, &text, None, None))
        }
        "z-image" => {
            let network = ZImage::new(config(folder)?, &mut weights)?;
            let (x, time, text) = (input("x")?, input("time")?, input("text")?);
            let present = Tensor::ones((1, text.dim(1)?), DType::F32, &device)?;
            Box::new(move || network.forward(&x, &time, Text { states: &text, present: &present, bias: None }))
        }
        "language" => {
            let config = Config::published(&config(folder)?)?;
            let layers = config.layers;
            let network = Decoder::new(config, Naming::Transformers, &mut weights)?;
            let ids = input("ids")?.to_dtype(DType::U32)?;
            let present = Tensor::ones(ids.dims2()?, DType::F32, &device)?;
            Box::new(move || network.final_norm(&network.states(&network.embed(&ids)?, &present, &[layers])?[0]))
        }
        other => return Err(format!("no kind {other:?}").into()),
    };
    weights.finish()?;
    Ok(run)
}
