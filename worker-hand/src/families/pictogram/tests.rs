//! Parity with the training code's modules. `tests/pictogram/reference.py` makes the files.
//!
//! Tolerance: 1e-4, on values of about 1.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use candle_core::DType;
use efferent_proto::internal::{ControlHeader, ControlSignal};

use super::*;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/pictogram")
}

fn config() -> Config {
    Config { queries: 3, width: 16, heads: 2, layers: 2, shift: 6.0 }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

/// The decoder's weights, drawn from the seeds that the reference uses.
fn decoder_weights() -> HashMap<String, Tensor> {
    let shapes = std::fs::read_to_string(folder().join("decoder.txt")).unwrap();
    shapes
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let (name, shape) = line.split_once(' ').unwrap();
            let shape: Vec<usize> = shape.split(' ').map(|side| side.parse().unwrap()).collect();
            let inputs: usize = shape[1..].iter().product();
            let scale = if shape.len() > 1 { (1.5 / inputs as f32).sqrt() } else { 0.3 };
            let values: Vec<f32> =
                randn(1000 + index as u64, shape.iter().product()).iter().map(|v| v * scale).collect();
            (format!("dec.{name}"), Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect()
}

fn golden(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder().join(file), &Device::Cpu).unwrap()
}

/// A small hand: random denoiser and decoder.
fn hand() -> (Pictogram, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hand.safetensors");
    let mut tensors = decoder_weights();
    tensors.extend(golden("hand.safetensors").into_iter().filter(|(name, _)| name.starts_with("hand.")));
    let decoder = golden("decoder.safetensors");
    tensors.insert("latent.mean".to_owned(), decoder["mean"].clone());
    tensors.insert("latent.std".to_owned(), decoder["std"].clone());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
    let network = Network::new(&config(), &mut weights).unwrap();
    let decoder = Decoder::new(&mut weights).unwrap();
    weights.finish().unwrap();
    let model = efferent_proto::v1::Model { max_steps: 100, ..Default::default() };
    let spec = EngineSpec { model, max_batch: MAX_BATCH, simulated: false };
    let space = ControlSpace { family: "pictogram".to_owned(), width: 16, ..Default::default() };
    (Pictogram { spec, space, config: config(), network, decoder, device: Device::Cpu, second: None }, folder)
}

fn request(control: &Tensor, hand: &Pictogram) -> RenderRequest {
    let header = ControlHeader { schema_version: 1, space: Some(hand.space.clone()), ..Default::default() };
    let streams = vec![signal::stream(StreamRole::Query, Branch::Conditional, control).unwrap()];
    RenderRequest {
        signal: Arc::new(ControlSignal { header: Some(header), streams, ..Default::default() }),
        size: Size { width: SIDE, height: SIDE },
        steps: 5,
        guidance_scale: 2.5,
        seed: 7,
        sampler: "euler".to_owned(),
        image_guidance_scale: 1.0,
        guidance_rescale: 0.0,
        guidance_range: 0.0..1.0,
        picture: None,
    }
}

fn latent(sample: &Sample) -> Tensor {
    let values = state(sample).unwrap().trajectory.latent.clone();
    Tensor::from_vec(values, (1, PATCHES, PATCH_WIDTH), &Device::Cpu).unwrap()
}

fn finish(hand: &mut Pictogram, mut sample: Sample) -> Sample {
    while !sample.is_complete() {
        hand.step(&mut [&mut sample]).pop().unwrap().unwrap();
    }
    sample
}

#[test]
fn the_denoiser_agrees_with_the_training_code() {
    let (hand, golden) = (hand().0, golden("hand.safetensors"));
    let t = golden["golden.t"].to_dtype(DType::F32).unwrap();
    let got = hand.network.forward(&golden["golden.z"], &t, &golden["golden.control"]).unwrap();
    let error = largest_difference(&got, &golden["golden.forward"]);
    assert!(error < 1e-4, "{error}");
}

#[test]
fn the_decoder_agrees_with_the_training_code() {
    let (hand, golden) = (hand().0, golden("decoder.safetensors"));
    let latent = golden["latent"].permute((0, 2, 3, 1)).unwrap();
    let picture = hand.decoder.forward(&latent).unwrap().permute((0, 3, 1, 2)).unwrap();
    let every = |step: u32| {
        Tensor::from_vec((0..96).step_by(step as usize).collect::<Vec<u32>>(), 96 / step as usize, &Device::Cpu)
            .unwrap()
    };
    let picture = picture.contiguous().unwrap().index_select(&every(4), 2).unwrap().index_select(&every(3), 3).unwrap();
    let largest = golden["picture"].abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let error = largest_difference(&picture, &golden["picture"]) / largest;
    assert!(error < 1e-4, "{error} of {largest}");
}

#[test]
fn whole_runs_agree_with_the_training_code() {
    let (mut hand, _folder) = hand();
    let golden = golden("hand.safetensors");
    let control = golden["golden.control"].get(0).unwrap();
    for sampler in ["euler", "heun"] {
        for (steps, guidance) in [(1, "2.5"), (5, "2.5"), (4, "1.0")] {
            let guidance_scale = guidance.parse().unwrap();
            let request =
                RenderRequest { steps, guidance_scale, sampler: sampler.to_owned(), ..request(&control, &hand) };
            let sample = hand.begin(&request).unwrap();
            let sample = finish(&mut hand, sample);
            let wanted = &golden[&format!("golden.{sampler}.{steps}.{guidance}")];
            let largest = wanted.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let error = largest_difference(&latent(&sample), wanted) / largest.max(1.0);
            assert!(error < 1e-4, "{sampler}, {steps} steps: {error} of {largest}");
        }
    }
}

#[test]
fn the_contract_holds() {
    let (mut hand, _folder) = hand();
    let golden = golden("hand.safetensors");
    let requests: Vec<RenderRequest> = (0..3)
        .map(|i| {
            let control = golden["golden.control"].get(i).unwrap();
            RenderRequest { seed: i as u64, steps: 3 + i as u32, ..request(&control, &hand) }
        })
        .collect();
    efferent_worker::testing::check_hand(&mut hand, &requests);
}

/// Alone, in a batch with others that are at other steps, set aside in between, or gone on with from a checkpoint: each value of the latent and of
/// the picture is the same, to the bit. (On CPU; see `nn::rows`.)
#[test]
fn a_picture_depends_on_its_request_alone() {
    let (mut hand, _folder) = hand();
    let golden = golden("hand.safetensors");
    for sampler in ["euler", "heun"] {
        for guidance_scale in [1.0, 2.5] {
            let requests: Vec<RenderRequest> = (0..4)
                .map(|i| {
                    let control = golden["golden.control"].get(i % 3).unwrap();
                    let (seed, steps, sampler) = (40 + i as u64, 4 + i as u32, sampler.to_owned());
                    let guidance_range = if i % 2 == 0 { 0.0..1.0 } else { 0.3..0.8 };
                    RenderRequest { seed, steps, sampler, guidance_scale, guidance_range, ..request(&control, &hand) }
                })
                .collect();
            let begun = |hand: &mut Pictogram| -> Vec<Sample> {
                requests.iter().map(|request| hand.begin(request).unwrap()).collect()
            };
            let bits = |sample: &Sample| state(sample).unwrap().trajectory.latent.iter().map(|v| v.to_bits()).collect();
            let alone: Vec<(Vec<u32>, RgbImage)> = begun(&mut hand)
                .into_iter()
                .map(|sample| {
                    let sample = finish(&mut hand, sample);
                    (bits(&sample), hand.finish(sample).unwrap())
                })
                .collect();
            // With the branch without the prompt on another device; here that is the same processor.
            hand.second = Some((self::hand().0.network, Device::Cpu));
            for (sample, (latent, _)) in begun(&mut hand).into_iter().zip(&alone) {
                assert!(
                    bits(&finish(&mut hand, sample)) == *latent,
                    "{sampler} {guidance_scale}: a second device changes the latent"
                );
            }
            hand.second = None;
            // Of every size up to all, one after the other joining; who has come furthest is set aside every third step.
            let mut samples = begun(&mut hand);
            for round in 0.. {
                let mut batch: Vec<&mut Sample> =
                    samples.iter_mut().take(1 + round).filter(|sample| !sample.is_complete()).collect();
                if round % 3 == 2 && batch.len() > 1 {
                    batch.remove(0);
                }
                if batch.is_empty() {
                    break;
                }
                hand.step(&mut batch).into_iter().for_each(|outcome| outcome.unwrap());
            }
            for (sample, (latent, picture)) in samples.into_iter().zip(&alone) {
                assert!(bits(&sample) == *latent, "{sampler} {guidance_scale}: a batch changes the latent");
                assert!(hand.finish(sample).unwrap() == *picture);
            }
            // From the checkpoint of every step, in a batch of all that go on.
            let mut samples = Vec::new();
            let mut sample = hand.begin(&requests[0]).unwrap();
            while !sample.is_complete() {
                hand.step(&mut [&mut sample]).pop().unwrap().unwrap();
                let kept = hand.checkpoint(&sample).unwrap();
                samples.push(hand.resume(&requests[0], &kept).unwrap());
            }
            while samples.iter().any(|sample| !sample.is_complete()) {
                let mut batch: Vec<&mut Sample> = samples.iter_mut().filter(|sample| !sample.is_complete()).collect();
                hand.step(&mut batch).into_iter().for_each(|outcome| outcome.unwrap());
            }
            for sample in samples {
                assert!(bits(&sample) == alone[0].0, "{sampler} {guidance_scale}: a checkpoint changes the latent");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (mut hand, _folder) = hand();
    let control = golden("hand.safetensors")["golden.control"].get(0).unwrap();
    let good = request(&control, &hand);
    let signal = |change: fn(&mut ControlSignal)| {
        let mut signal = good.signal.as_ref().clone();
        change(&mut signal);
        RenderRequest { signal: Arc::new(signal), ..good.clone() }
    };
    for (request, wanted) in [
        (signal(|s| s.header = None), "no header"),
        (signal(|s| s.header.as_mut().unwrap().schema_version = 9), "schema version 9"),
        (signal(|s| s.header.as_mut().unwrap().space.as_mut().unwrap().family = "sana".to_owned()), "of space sana/16"),
        (signal(|s| s.streams.clear()), "no conditional query stream"),
        (signal(|s| s.streams[0].tokens = 2), "bytes for 2 x 16"),
        (signal(|s| s.streams[0].tokens = u32::MAX), "malformed control signal"),
        (signal(|s| s.streams[0].values = vec![0xff; 192].into()), "not finite"),
        (RenderRequest { steps: 0, ..good.clone() }, "0 steps"),
        (RenderRequest { steps: 101, ..good.clone() }, "101 steps"),
        (RenderRequest { guidance_scale: f32::NAN, ..good.clone() }, "not finite"),
        (RenderRequest { sampler: "ddim".to_owned(), ..good.clone() }, "no sampler \"ddim\""),
        (RenderRequest { size: Size { width: 64, height: 96 }, ..good.clone() }, "64x96"),
    ] {
        let error = hand.begin(&request).unwrap_err();
        assert!(matches!(error, EngineError::Refused(_)), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
    // Both spaces are named.
    let error = hand.begin(&signal(|s| s.header.as_mut().unwrap().space.as_mut().unwrap().width = 8)).unwrap_err();
    assert!(error.to_string().contains("pictogram/8/") && error.to_string().contains("pictogram/16/"), "{error}");
    let sample = hand.begin(&good).unwrap();
    for bytes in [&b""[..], &[0; 3], &[9; 5], &1u32.to_le_bytes()] {
        assert!(hand.resume(&good, bytes).is_err());
    }
    assert_eq!(sample.step, 0);
}
