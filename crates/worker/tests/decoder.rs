//! The decoder agrees with transformers on tiny random models of each family: every layer, alone and in a padded batch.
//!
//! Tolerance: 2e-5 of the largest value, f32 rounding over three layers. `decoder/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_worker::{
    nn::{
        decoder::{Config, Decoder, Naming, RotaryPairs, Sight, Window},
        ops::Activation,
        rotary::Stretch,
    },
    weights::Weights,
};

const LAYERS: usize = 3;

fn open(name: &str) -> Weights {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/decoder/{name}.safetensors"));
    Weights::open_safetensors(&path, &Device::Cpu).unwrap()
}

fn llama() -> Config {
    Config {
        vocabulary: 32,
        width: 16,
        layers: LAYERS,
        heads: 4,
        key_heads: 2,
        head_width: 4,
        mlp_width: 24,
        rotary_base: 1e5,
        rotary_stretch: None,
        longest: None,
        rotary_pairs: RotaryPairs::Halves,
        rotary_axes: None,
        norm_eps: 1e-5,
        norm_offset: false,
        activation: Activation::Silu,
        projection_bias: false,
        head_norm: false,
        output_norm: false,
        scaled_embedding: false,
        logit_width: None,
        soft_cap: None,
        sliding_window: None,
    }
}

fn families() -> Vec<(&'static str, Config)> {
    let qwen2 = Config { heads: 2, key_heads: 1, head_width: 8, rotary_base: 1e6, projection_bias: true, ..llama() };
    let qwen3 = Config { head_width: 6, rotary_base: 1e6, head_norm: true, ..llama() };
    let gemma = Config {
        heads: 2,
        key_heads: 1,
        head_width: 8,
        rotary_base: 1e4,
        norm_offset: true,
        activation: Activation::GeluTanh,
        scaled_embedding: true,
        ..llama()
    };
    let gemma2 = Config {
        heads: 4,
        key_heads: 2,
        output_norm: true,
        logit_width: Some(12),
        soft_cap: Some(2.0),
        sliding_window: Some(Window::EverySecond(3)),
        ..gemma.clone()
    };
    let stretch = Stretch { factor: 4.0, low: 1.0, high: 4.0, positions: 32.0 };
    let llama3 = Config { head_width: 8, rotary_base: 1e2, rotary_stretch: Some(stretch), ..llama() };
    let mistral = Config { rotary_base: 1e4, sliding_window: Some(Window::Every(3)), ..llama() };
    // Up to its longest sequence the base is what it is.
    let dynamic = Config { longest: Some(16), ..qwen2.clone() };
    vec![
        ("llama", llama()),
        ("llama3", llama3),
        ("mistral", mistral),
        ("qwen2", qwen2),
        ("dynamic", dynamic),
        ("qwen3", qwen3),
        ("gemma", gemma),
        ("gemma2", gemma2),
    ]
}

/// Largest difference at present positions, over the largest value.
fn error(got: &Tensor, expected: &Tensor, mask: &Tensor) -> f32 {
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let difference = (got - expected).unwrap().broadcast_mul(&mask.unsqueeze(2).unwrap()).unwrap();
    largest(difference) / largest(expected.clone())
}

#[test]
fn every_family_agrees_with_transformers() {
    let mut inputs = open("inputs");
    let (ids, mask) = (inputs.get("ids", &[2, 7]).to_dtype(DType::U32).unwrap(), inputs.get("mask", &[2, 7]));
    for (name, config) in families() {
        let mut weights = open(name);
        let golden = |weights: &mut Weights, kind: &str, shape: [usize; 3]| -> Vec<Tensor> {
            (0..=LAYERS).map(|layer| weights.get(&format!("golden.{kind}.{layer}"), &shape)).collect()
        };
        let (batch, single) = (golden(&mut weights, "batch", [2, 7, 16]), golden(&mut weights, "single", [1, 4, 16]));
        let written: Vec<f32> = weights.get("golden.written", &[9]).to_vec1().unwrap();
        // transformers' base models have no "model." in front; the reference adds it, as models with a head have it.
        let decoder = Decoder::new(config, Naming::Transformers, &mut weights).unwrap();
        weights.finish().unwrap();
        let short = ids.narrow(0, 1, 1).unwrap().narrow(1, 0, 4).unwrap();
        let all = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
        for (ids, mask, golden) in [(&ids, &mask, batch), (&short, &all, single)] {
            let states = decoder.states(&decoder.embed(ids).unwrap(), mask, &[0, 1, 2, 3]).unwrap();
            for (layer, (state, golden)) in states.iter().zip(&golden).enumerate() {
                // transformers' last hidden state is the normalised one.
                let state = if layer == LAYERS { decoder.final_norm(state).unwrap() } else { state.clone() };
                let error = error(&state, golden, mask);
                assert!(error < 2e-5, "{name}, layer {layer}: {error}");
            }
            let last = decoder.states(&decoder.embed(ids).unwrap(), mask, &[2]).unwrap();
            assert!(error(&last[0], &golden[2], mask) < 2e-5, "{name}: a layer alone");
        }
        // What it writes, each token read once; also if the sequence is read in pieces before.
        let first = decoder.embed(&ids.narrow(0, 0, 1).unwrap()).unwrap();
        let ours = decoder.write(&first, &Sight::default(), &[], written.len()).unwrap();
        assert_eq!(ours.iter().map(|id| *id as f32).collect::<Vec<_>>(), written, "{name}");
        let stopped = decoder.write(&first, &Sight::default(), &ours[4..5], written.len()).unwrap();
        assert_eq!(stopped, ours[..ours.iter().position(|id| *id == ours[4]).unwrap()]);
        let whole = decoder.states(&first, &mask.narrow(0, 0, 1).unwrap(), &[LAYERS]).unwrap().remove(0);
        let mut cache = decoder.cache();
        for (from, count) in [(0, 3), (3, 1), (4, 3)] {
            let piece = first.narrow(1, from, count).unwrap();
            let states = decoder.read_on(&piece, &Sight::default(), &mut cache).unwrap();
            let all = Tensor::ones((1, count), DType::F32, &Device::Cpu).unwrap();
            assert!(error(&states, &whole.narrow(1, from, count).unwrap(), &all) < 2e-5, "{name}: in pieces");
        }
        assert_eq!(cache.tokens(), 7);
        // Layers shared out over two devices, which here are one processor.
        let states = |decoder: &Decoder| {
            let states = decoder.states(&decoder.embed(&ids).unwrap(), &mask, &[1, 3]).unwrap();
            states.iter().map(|state| state.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect::<Vec<_>>()
        };
        let whole = states(&decoder);
        assert_eq!(states(&decoder.spread(&[Device::Cpu, Device::Cpu]).unwrap()), whole, "{name}");
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let mut weights = open("llama");
    for config in
        [Config { heads: 0, ..llama() }, Config { key_heads: 3, ..llama() }, Config { head_width: 3, ..llama() }]
    {
        assert!(Decoder::new(config, Naming::Transformers, &mut weights).is_err());
    }
    let decoder = Decoder::new(llama(), Naming::Transformers, &mut weights).unwrap();
    let ids = Tensor::new(&[[1u32, 31, 32]], &Device::Cpu).unwrap();
    assert!(decoder.embed(&ids).is_err(), "an id past the vocabulary");
    let embeddings = decoder.embed(&ids.narrow(1, 0, 2).unwrap()).unwrap();
    let mask = Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(decoder.states(&embeddings, &mask, &[4]).is_err(), "a layer that is not there");
    assert!(decoder.states(&embeddings, &mask.narrow(1, 0, 1).unwrap(), &[1]).is_err(), "a mask of another length");
    let short = Decoder::new(Config { longest: Some(1), ..llama() }, Naming::Transformers, &mut open("llama")).unwrap();
    let told = short.states(&embeddings, &mask, &[1]).unwrap_err().to_string();
    assert!(told.contains("2 tokens; this model reads up to 1"), "{told}");
}

#[test]
fn naming_keeps_only_what_is_read() {
    for (naming, name, wanted) in [
        (Naming::Gguf, "blk.23.attn_q.weight", true),
        (Naming::Gguf, "blk.24.attn_q.weight", false),
        (Naming::Gguf, "token_embd.weight", true),
        (Naming::Gguf, "output.weight", false),
        (Naming::Transformers, "model.layers.3.mlp.up_proj.weight", true),
        (Naming::Transformers, "model.layers.30.mlp.up_proj.weight", false),
        (Naming::Transformers, "model.norm.weight", true),
        (Naming::Transformers, "lm_head.weight", false),
    ] {
        assert_eq!(naming.wants(name, 24), wanted, "{name}");
    }
}
