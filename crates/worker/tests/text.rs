//! CLIP's and T5's text encoders agree with transformers on tiny random models, from the folders that it saves: every layer, in a batch of texts of different
//! length and each alone.
//!
//! Tolerance: 2e-5 of the largest value, f32 rounding over three layers. `text/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_worker::{
    nn::{clip, t5},
    weights::Weights,
};

const TOLERANCE: f32 = 2e-5;

fn file(name: &str, file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/text").join(name).join(file)
}

fn open(name: &str) -> Weights {
    Weights::open_safetensors(&file(name, "model.safetensors"), &Device::Cpu).unwrap()
}

/// Ids and mask, what is expected, and the rows of it.
struct Golden {
    weights: Weights,
    ids: Tensor,
    mask: Tensor,
    lengths: Vec<usize>,
}

fn golden(name: &str, tokens: usize) -> Golden {
    let mut weights = Weights::open_safetensors(&file(name, "golden.safetensors"), &Device::Cpu).unwrap();
    let ids = weights.get("ids", &[3, tokens]).to_dtype(DType::U32).unwrap();
    let mask = weights.get("mask", &[3, tokens]);
    let lengths = mask.sum(1).unwrap().to_vec1::<f32>().unwrap().into_iter().map(|sum| sum as usize).collect();
    Golden { weights, ids, mask, lengths }
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Compares what all rows together gave, (3, tokens, width) or (3, width), and then each row with what it gave alone. With `hidden` padding, positions after a row's end mean nothing.
fn agree(what: &str, together: &Tensor, alone: &[Tensor], expected: &Tensor, lengths: Option<&[usize]>) {
    for (row, single) in alone.iter().enumerate() {
        let end = lengths.map(|lengths| lengths[row]);
        let cut = |x: Tensor| {
            if let Some(end) = end.filter(|_| x.dims().len() > 1) { x.narrow(0, 0, end).unwrap() } else { x }
        };
        let wanted = cut(expected.get(row).unwrap());
        for (how, got) in [("together", together.get(row).unwrap()), ("alone", single.get(0).unwrap())] {
            let error = largest(&(cut(got) - &wanted).unwrap()) / largest(expected);
            assert!(error < TOLERANCE, "{what}, row {row} {how}: {error}");
        }
    }
}

#[test]
fn clip_agrees_with_transformers() {
    for (name, projected, masked) in [("clip-l", false, false), ("clip-g", true, false), ("clip-masked", true, true)] {
        let config: clip::Config = serde_json::from_slice(&std::fs::read(file(name, "config.json")).unwrap()).unwrap();
        let mut weights = open(name);
        let (layers, width) = (config.layers, config.width);
        let pooled_width = config.projection.filter(|_| projected).unwrap_or(width);
        let encoder = clip::Clip::new(config, projected, &mut weights).unwrap();
        weights.finish().unwrap();
        let mut golden = golden(name, 9);
        let row = |x: &Tensor, row| x.narrow(0, row, 1).unwrap();
        let run = |ids: &Tensor, mask: &Tensor| {
            let states = encoder.states(ids, masked.then_some(mask)).unwrap();
            let normed = encoder.final_norm(&states[layers]).unwrap();
            let pooled = encoder.pooled(ids, &normed).unwrap();
            (states, normed, pooled)
        };
        let together = run(&golden.ids, &golden.mask);
        let alone: Vec<_> = (0..3).map(|i| run(&row(&golden.ids, i), &row(&golden.mask, i))).collect();
        let lengths = golden.lengths.clone();
        let lengths = masked.then_some(lengths.as_slice());
        for layer in 0..=layers {
            let expected = golden.weights.get(&format!("state.{layer}"), &[3, 9, width]);
            let singles: Vec<_> = alone.iter().map(|(states, ..)| states[layer].clone()).collect();
            agree(&format!("{name}, layer {layer}"), &together.0[layer], &singles, &expected, lengths);
        }
        let singles: Vec<_> = alone.iter().map(|(_, normed, _)| normed.clone()).collect();
        let expected = golden.weights.get("normed", &[3, 9, width]);
        agree(&format!("{name}, normed"), &together.1, &singles, &expected, lengths);
        let singles: Vec<_> = alone.iter().map(|(.., pooled)| pooled.clone()).collect();
        let expected = golden.weights.get("pooled", &[3, pooled_width]);
        agree(&format!("{name}, pooled"), &together.2, &singles, &expected, None);
        golden.weights.finish().unwrap();
    }
}

#[test]
fn t5_agrees_with_transformers() {
    for (name, masked) in [("t5-v1_1", false), ("t5-masked", true), ("t5-relu", false)] {
        let config: t5::Config = serde_json::from_slice(&std::fs::read(file(name, "config.json")).unwrap()).unwrap();
        let mut weights = open(name);
        let (layers, width) = (config.layers, config.width);
        let encoder = t5::T5::new(config, &mut weights).unwrap();
        weights.finish().unwrap();
        let mut golden = golden(name, 21);
        let row = |x: &Tensor, row| x.narrow(0, row, 1).unwrap();
        let run = |ids: &Tensor, mask: &Tensor| encoder.states(ids, masked.then_some(mask)).unwrap();
        let together = run(&golden.ids, &golden.mask);
        let alone: Vec<_> = (0..3).map(|i| run(&row(&golden.ids, i), &row(&golden.mask, i))).collect();
        let lengths = golden.lengths.clone();
        let lengths = masked.then_some(lengths.as_slice());
        // transformers' last hidden state is the normed one.
        let last = golden.weights.get(&format!("state.{layers}"), &[3, 21, width]);
        let normed = golden.weights.get("normed", &[3, 21, width]);
        assert!(largest(&(last - &normed).unwrap()) == 0.0);
        for layer in (0..layers).chain([layers + 1]) {
            let expected = match layer <= layers {
                true => golden.weights.get(&format!("state.{layer}"), &[3, 21, width]),
                false => normed.clone(),
            };
            let singles: Vec<_> = alone.iter().map(|states| states[layer].clone()).collect();
            agree(&format!("{name}, layer {layer}"), &together[layer], &singles, &expected, lengths);
        }
        golden.weights.finish().unwrap();
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let read = |name: &str| std::fs::read(file(name, "config.json")).unwrap();
    let config: clip::Config = serde_json::from_slice(&read("clip-g")).unwrap();
    for (config, projected) in [
        (clip::Config { heads: 3, ..config.clone() }, true),
        (clip::Config { heads: 0, ..config.clone() }, true),
        (clip::Config { projection: None, ..config.clone() }, true),
    ] {
        assert!(clip::Clip::new(config, projected, &mut open("clip-g")).is_err());
    }
    let encoder = clip::Clip::new(config, true, &mut open("clip-g")).unwrap();
    let ids = |tokens: usize, id: u32| Tensor::full(id, (1, tokens), &Device::Cpu).unwrap();
    assert!(encoder.states(&ids(9, 39), None).is_ok());
    assert!(encoder.states(&ids(10, 39), None).is_err(), "more tokens than positions");
    assert!(encoder.states(&ids(9, 40), None).is_err(), "an id past the vocabulary");
    let config: t5::Config = serde_json::from_slice(&read("t5-v1_1")).unwrap();
    for config in [
        t5::Config { buckets: 2, ..config.clone() },
        t5::Config { max_distance: 8, ..config.clone() },
        t5::Config { heads: 0, ..config.clone() },
    ] {
        assert!(t5::T5::new(config, &mut open("t5-v1_1")).is_err());
    }
    let encoder = t5::T5::new(config.clone(), &mut open("t5-v1_1")).unwrap();
    let mask = Tensor::ones((1, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(encoder.states(&ids(4, 1), Some(&mask)).is_err(), "a mask of another length");
    // A file of another model: everything that differs is told.
    let mut other = open("clip-g");
    t5::T5::new(config, &mut other).unwrap();
    let told = other.finish().unwrap_err().to_string();
    assert!(told.contains("tensor encoder.block.0.layer.0.SelfAttention.q.weight [16, 16] is missing"), "{told}");
}
