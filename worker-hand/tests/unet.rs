//! Stable Diffusion's denoisers agree with diffusers on tiny random networks, from the folders that it saves: at the start, middle and end of a run, and in a batch
//! whose samples are each at another time; together and alone.
//!
//! Tolerance: 1e-5 absolute, f32 rounding, where values reach 3; 1e-4 where strengths of guidance are embedded, as waves of thousands of radian, where the last bit
//! of a frequency shows. `unet/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::networks::unet::{Added, Config, Text, Unet};
use golden::difference;

const NETWORK: &str = "unet";
const TOLERANCE: f32 = 1e-5;

fn unet(name: &str) -> Unet {
    let mut weights = golden::weights(NETWORK, name);
    let unet = Unet::new(serde_json::from_value(golden::config(NETWORK, name)).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    unet
}

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, height, width, tokens) in
        [("sd15", 7, 10, 5), ("sd21", 8, 4, 7), ("sdxl", 8, 8, 3), ("odd", 5, 3, 4), ("lcm", 8, 6, 5)]
    {
        let unet = unet(name);
        let (inputs, outputs) = (unet.config().in_channels, unet.config().out_channels);
        let mut golden = golden::golden(NETWORK, name);
        let last = |x: Tensor| x.permute((0, 2, 3, 1)).unwrap();
        let x = last(golden.get("x", &[3, inputs, height, width]));
        let context = golden.get("context", &[3, tokens, 12]);
        let added = (name == "sdxl")
            .then(|| Added { pooled: golden.get("pooled", &[3, 10]), sizes: golden.get("sizes", &[3, 6]) });
        let guidance = (name == "lcm").then(|| golden.get("guidance", &[3]));
        let tolerance = if guidance.is_some() { 1e-4 } else { TOLERANCE };
        let mut cases = Vec::new();
        for label in ["start", "middle", "end", "mixed"] {
            let time = golden.get(&format!("{label}.time"), &[3]);
            cases.push((label, time, last(golden.get(&format!("{label}.out"), &[3, outputs, height, width]))));
        }
        golden.finish().unwrap();
        for (label, time, expected) in cases {
            let text = Text { states: &context, bias: None };
            let together = unet.forward(&x, &time, text, added.as_ref(), guidance.as_ref()).unwrap();
            let error = difference(&together, &expected);
            assert!(error < tolerance, "{name}, {label}: {error}");
            for i in 0..3 {
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let added = added.as_ref().map(|added| Added { pooled: row(&added.pooled), sizes: row(&added.sizes) });
                let (states, guidance) = (row(&context), guidance.as_ref().map(row));
                let text = Text { states: &states, bias: None };
                let alone = unet.forward(&row(&x), &row(&time), text, added.as_ref(), guidance.as_ref()).unwrap();
                assert_eq!(difference(&alone, &row(&together)), 0.0, "{name}, {label}: sample {i} alone");
            }
        }
    }
}

#[test]
fn a_bias_hides_tokens_of_the_context() {
    let unet = unet("sd15");
    let random = |shape: (usize, usize, usize)| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let x = random((8, 8, 4)).unsqueeze(0).unwrap();
    let time = Tensor::new(&[500f32], &Device::Cpu).unwrap();
    let (kept, other) = (random((1, 3, 12)), random((1, 2, 12)));
    let both = Tensor::cat(&[&kept, &other], 1).unwrap();
    let bias = Tensor::new(&[[[[0f32, 0.0, 0.0, -1e9, -1e9]]]], &Device::Cpu).unwrap();
    let run =
        |states: &Tensor, bias: Option<&Tensor>| unet.forward(&x, &time, Text { states, bias }, None, None).unwrap();
    let (hidden, without) = (run(&both, Some(&bias)), run(&kept, None));
    assert!(difference(&hidden, &without) < TOLERANCE);
    assert!(difference(&run(&both, None), &without) > 1e-3);
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    for (field, value, wanted) in [
        ("class_embed_type", serde_json::json!("timestep"), "class_embed_type"),
        ("dual_cross_attention", serde_json::json!(true), "dual_cross_attention"),
        ("mid_block_type", serde_json::json!(null), "mid_block_type"),
        ("time_cond_proj_dim", serde_json::json!(7), "time_cond_proj_dim"),
        ("addition_embed_type", serde_json::json!("image"), "addition_embed_type"),
        ("addition_embed_type", serde_json::json!("text_time"), "projection_class_embeddings_input_dim None"),
        ("block_out_channels", serde_json::json!([8]), "levels"),
        ("block_out_channels", serde_json::json!([]), "levels"),
        ("block_out_channels", serde_json::json!([8, 0, 16]), "channels"),
        ("attention_head_dim", serde_json::json!(3), "3 heads of 8 channels"),
        ("attention_head_dim", serde_json::json!([2, 2]), "for 3 levels"),
        ("norm_num_groups", serde_json::json!(3), "3 groups of 8 channels"),
        ("norm_num_groups", serde_json::json!(0), "0 groups"),
    ] {
        let mut changed = golden::config(NETWORK, "sd15");
        changed[field] = value;
        let changed: Config = serde_json::from_value(changed).unwrap();
        let mut weights = golden::weights(NETWORK, "sd15");
        let error = Unet::new(changed, &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{field}: {error}");
    }
    let mut unknown = golden::config(NETWORK, "sd15");
    unknown["down_block_types"][0] = "AttnDownBlock2D".into();
    let error = serde_json::from_value::<Config>(unknown).unwrap_err().to_string();
    assert!(error.contains("AttnDownBlock2D"), "{error}");
    // Weights of another network: everything that differs is told.
    let mut weights = golden::weights(NETWORK, "sd21");
    Unet::new(serde_json::from_value(golden::config(NETWORK, "sd15")).unwrap(), &mut weights).unwrap();
    let told = weights.finish().unwrap_err().to_string();
    assert!(told.contains("tensor down_blocks.0.resnets.1.norm1.weight [8] is missing"), "{told}");
    assert!(told.contains("has shape"), "{told}");
}

#[test]
fn a_pooled_text_and_guidance_are_neither_left_out_nor_ignored() {
    let x = Tensor::zeros((1, 8, 8, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    let time = Tensor::new(&[500f32], &Device::Cpu).unwrap();
    let context = Tensor::zeros((1, 3, 12), candle_core::DType::F32, &Device::Cpu).unwrap();
    let pooled = Tensor::zeros((1, 10), candle_core::DType::F32, &Device::Cpu).unwrap();
    let added = Added { pooled, sizes: Tensor::zeros((1, 6), candle_core::DType::F32, &Device::Cpu).unwrap() };
    let run = |name: &str, added: Option<&Added>, guidance: Option<&Tensor>| {
        unet(name).forward(&x, &time, Text { states: &context, bias: None }, added, guidance)
    };
    assert!(run("sdxl", None, None).is_err());
    assert!(run("sd15", Some(&added), None).is_err());
    assert!(run("sdxl", Some(&added), None).is_ok());
    let guidance = Tensor::new(&[8.5f32], &Device::Cpu).unwrap();
    assert!(run("lcm", None, None).is_err());
    assert!(run("sd15", None, Some(&guidance)).is_err());
    assert!(run("lcm", None, Some(&guidance)).is_ok());
}
