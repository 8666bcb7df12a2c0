//! What sees agrees with transformers on tiny random Qwen2.5-VL and Qwen3-VL models: patches, tokens, and what the language model makes of them.
//!
//! Tolerance: 2e-5 of the largest value, f32 rounding over a few layers; a picture that is scaled differs by one step of 255 at most. `vision/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_worker::{
    nn::{
        decoder::{Config as TextConfig, Decoder, Naming, Sight},
        vision::{
            Config, Kind, Seen, Stretch, Vision,
            patches::{Patches, Preparation},
            places,
        },
    },
    pipeline::read_json,
    weights::{Keep, Weights},
};
use image::RgbImage;

const NAMES: [&str; 4] = ["windows", "windows-odd", "taps", "taps-odd"];

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vision").join(name)
}

fn picture(key: &str) -> RgbImage {
    image::open(file(&format!("{key}.png"))).unwrap().to_rgb8()
}

/// A tensor of the file, of whatever shape.
fn golden(name: &str, key: &str) -> Option<Tensor> {
    let tensors = candle_core::safetensors::load(file(&format!("{name}.safetensors")), &Device::Cpu).unwrap();
    tensors.get(&format!("golden.{key}")).cloned()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn apart(got: &Tensor, wanted: &Tensor) -> f32 {
    largest(&(got - wanted).unwrap()) / largest(wanted)
}

fn open(name: &str) -> (Vision, Decoder) {
    let fields = read_json(&file(&format!("{name}.json"))).unwrap();
    let part = |prefix: &'static str| {
        let wanted = |tensor: &str| tensor.starts_with(prefix);
        let mut weights =
            Weights::open_some(&[file(&format!("{name}.safetensors"))], &Device::Cpu, Keep::F32, wanted).unwrap();
        weights.rename(|tensor| tensor.replacen(prefix, if prefix == "visual." { "" } else { "model." }, 1));
        weights
    };
    let (mut seeing, mut reading) = (part("visual."), part("language_model."));
    let vision = Vision::new(Config::published(&fields).unwrap(), &mut seeing).unwrap();
    let config = TextConfig::published(&fields).unwrap();
    let decoder = Decoder::new(config, Naming::Transformers, &mut reading).unwrap();
    seeing.finish().unwrap();
    reading.finish().unwrap();
    (vision, decoder)
}

fn prepared(vision: &Vision, picture: &RgbImage) -> Patches {
    Preparation::usual(&vision.config().kind, 600, 1700).patches(picture, vision.config()).unwrap()
}

#[test]
fn patches_and_tokens_agree_with_transformers() {
    for name in NAMES {
        let (vision, _) = open(name);
        for key in ["fits", "scaled"] {
            let patches = prepared(&vision, &picture(key));
            let wanted = |part: &str| golden(name, &format!("{key}.{part}"));
            let grid: Vec<f32> = wanted("grid").unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!([patches.rows as f32, patches.columns as f32], grid[1..], "{name}, {key}");
            let theirs = wanted("patches").unwrap();
            let difference = largest(&(&patches.values - &theirs).unwrap());
            // One step of 255, by the smallest deviation that values are divided by; scaling rounds here and there.
            let allowed = if key == "fits" { 1e-5 } else { 1.01 / 255.0 / 0.26 };
            assert!(difference < allowed, "{name}, {key}: patches differ by {difference}");
            let Seen { tokens, added } = vision.see(&Patches { values: theirs, ..patches }).unwrap();
            let error = apart(&tokens, &wanted("tokens").unwrap());
            assert!(error < 2e-5, "{name}, {key}: {error}");
            for (tap, tokens) in added.iter().enumerate() {
                let error = apart(tokens, &wanted(&format!("tap.{tap}")).unwrap());
                assert!(error < 2e-5, "{name}, {key}, tap {tap}: {error}");
            }
            let taps = match &vision.config().kind {
                Kind::Windowed { .. } => 0,
                Kind::Tapped { taps, .. } => taps.len(),
            };
            assert_eq!(added.len(), taps, "{name}");
        }
    }
}

#[test]
fn texts_with_pictures_are_read_as_transformers_reads_them() {
    for name in NAMES {
        let (vision, decoder) = open(name);
        let layers = decoder.config().layers;
        let read = |embeddings: &Tensor, sight: &Sight| {
            let (_, tokens, _) = embeddings.dims3().unwrap();
            let all = Tensor::ones((1, tokens), DType::F32, &Device::Cpu).unwrap();
            let states = decoder.states_with(embeddings, &all, &[layers], sight).unwrap();
            decoder.final_norm(&states[0]).unwrap()
        };
        let ids = |key: &str| golden(name, key).unwrap().to_dtype(DType::U32).unwrap();
        let plain = decoder.embed(&ids("plain.ids")).unwrap();
        let error = apart(&read(&plain, &Sight::default()), &golden(name, "plain.states").unwrap());
        assert!(error < 2e-5, "{name}, text alone: {error}");

        let (fits, scaled) = (picture("fits"), picture("scaled"));
        let merge = vision.config().merge;
        let seen = [("fits", fits), ("scaled", scaled)].map(|(key, picture)| {
            let patches = prepared(&vision, &picture);
            let stretch = Stretch::Picture { rows: patches.rows / merge, columns: patches.columns / merge };
            let theirs = golden(name, &format!("{key}.patches")).unwrap();
            (vision.see(&Patches { values: theirs, ..patches }).unwrap(), stretch)
        });
        let text = |from: usize, count: usize| {
            decoder.embed(&ids("ids").narrow(1, from, count).unwrap()).unwrap().squeeze(0).unwrap()
        };
        let [(first, first_at), (second, second_at)] = &seen;
        let (one, two) = (first.tokens.dim(0).unwrap(), second.tokens.dim(0).unwrap());
        let texts = [text(0, 3), text(3 + one, 2), text(5 + one + two, 4)];
        let row = |texts: &[Tensor; 3], first: &Tensor, second: &Tensor| {
            Tensor::cat(&[&texts[0], first, &texts[1], second, &texts[2]], 0).unwrap().unsqueeze(0).unwrap()
        };
        let nothing = texts.clone().map(|text| text.zeros_like().unwrap());
        let sight = Sight {
            places: places(&[Stretch::Text(3), *first_at, Stretch::Text(2), *second_at, Stretch::Text(4)]),
            added: first.added.iter().zip(&second.added).map(|(first, second)| row(&nothing, first, second)).collect(),
        };
        let states = read(&row(&texts, &first.tokens, &second.tokens), &sight);
        let error = apart(&states, &golden(name, "states").unwrap());
        assert!(error < 2e-5, "{name}: {error}");
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let (vision, decoder) = open("taps");
    let config = vision.config().clone();
    let mut nothing = Weights::open_some(&[file("taps.safetensors")], &Device::Cpu, Keep::F32, |_| false).unwrap();
    for config in [
        Config { heads: 3, ..config.clone() },
        Config { width: 0, ..config.clone() },
        Config { kind: Kind::Tapped { places: 5, taps: vec![4] }, ..config.clone() },
        Config { kind: Kind::Windowed { window: 0, whole: vec![] }, ..config.clone() },
    ] {
        assert!(Vision::new(config, &mut nothing).is_err());
    }
    let patches = Patches { values: Tensor::zeros((4, 95), DType::F32, &Device::Cpu).unwrap(), rows: 2, columns: 2 };
    assert!(vision.see(&patches).is_err(), "patches of another size");
    let embeddings = Tensor::zeros((1, 2, 16), DType::F32, &Device::Cpu).unwrap();
    let all = Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
    let short = Sight { places: vec![[0; 3]], added: vec![] };
    assert!(decoder.states_with(&embeddings, &all, &[1], &short).is_err(), "too few places");
}
