//! Stable Diffusion 3's denoiser agrees with diffusers on tiny random networks, from the folders that it saves: at the start, middle and end of a run, and in a
//! batch whose samples are each at another time; together and alone.
//!
//! Tolerance: 5e-5 absolute, where values reach 6. Alone and together: 2e-5. `sd3/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::networks::sd3::Sd3;
use golden::difference;

const NETWORK: &str = "sd3";
const TOLERANCE: f32 = 5e-5;
const ROUNDING: f32 = 2e-5;

fn sd3(name: &str) -> Sd3 {
    let mut weights = golden::weights(NETWORK, name);
    let sd3 = Sd3::new(serde_json::from_value(golden::config(NETWORK, name)).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    sd3
}

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, height, width, tokens) in [("medium", 6, 10, 5), ("dual", 8, 2, 3), ("odd", 3, 5, 1)] {
        let sd3 = sd3(name);
        let config = sd3.config();
        let shape = [3, config.in_channels, height, width];
        let mut golden = golden::golden(NETWORK, name);
        let x = golden.get("x", &shape);
        let states = golden.get("context", &[3, tokens, config.joint_attention_dim]);
        let pooled = golden.get("pooled", &[3, config.pooled_projection_dim]);
        for label in ["start", "middle", "end", "mixed"] {
            let time = golden.get(&format!("{label}.time"), &[3]);
            let expected = golden.get(&format!("{label}.out"), &shape);
            let together = sd3.forward(&x, &time, &states, &pooled, None).unwrap();
            let error = difference(&together, &expected);
            assert!(error < TOLERANCE, "{name}, {label}: {error}");
            for i in 0..3 {
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let alone = sd3.forward(&row(&x), &row(&time), &row(&states), &row(&pooled), None).unwrap();
                assert!(difference(&alone, &row(&together)) < ROUNDING, "{name}, {label}: sample {i} alone");
            }
        }
    }
}

#[test]
fn a_bias_hides_tokens_of_the_text() {
    let sd3 = sd3("medium");
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let (x, time) = (random(&[1, 4, 4, 6]), Tensor::new(&[500f32], &Device::Cpu).unwrap());
    let (kept, other, pooled) = (random(&[1, 3, 12]), random(&[1, 2, 12]), random(&[1, 10]));
    let both = Tensor::cat(&[&kept, &other], 1).unwrap();
    // Six patches, then the text.
    let bias: Vec<f32> = (0..11).map(|key| if key >= 9 { -1e9 } else { 0.0 }).collect();
    let bias = Tensor::from_vec(bias, (1, 1, 1, 11), &Device::Cpu).unwrap();
    let run = |states: &Tensor, bias: Option<&Tensor>| sd3.forward(&x, &time, states, &pooled, bias).unwrap();
    let without = run(&kept, None);
    assert!(difference(&run(&both, Some(&bias)), &without) < ROUNDING);
    assert!(difference(&run(&both, None), &without) > 1e-3);
}

#[test]
fn a_bias_hides_patches_in_every_attention() {
    // The image attends to itself alone in these blocks, too.
    let sd3 = sd3("dual");
    let config = sd3.config();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let side = config.patch_size;
    let (kept, time) = (random(&[1, config.in_channels, side, side]), Tensor::new(&[500f32], &Device::Cpu).unwrap());
    let (states, pooled) = (random(&[1, 3, config.joint_attention_dim]), random(&[1, config.pooled_projection_dim]));
    // Two patches side by side, the second hidden from both.
    let bias = Tensor::new(&[[[[0f32, -1e9, 0.0, 0.0, 0.0]]]], &Device::Cpu).unwrap();
    let first = |bias: Option<&Tensor>, hidden: &Tensor| {
        let x = Tensor::cat(&[&kept, hidden], 3).unwrap();
        sd3.forward(&x, &time, &states, &pooled, bias).unwrap().narrow(3, 0, side).unwrap()
    };
    let [one, other] = [(), ()].map(|()| random(&[1, config.in_channels, side, side]));
    assert!(difference(&first(Some(&bias), &one), &first(Some(&bias), &other)) < ROUNDING);
    assert!(difference(&first(None, &one), &first(None, &other)) > 1e-3);
}

#[test]
fn what_is_not_computed_here_is_refused() {
    for (field, value, wanted) in [
        ("qk_norm", serde_json::json!("layer_norm"), "qk_norm \"layer_norm\""),
        ("caption_projection_dim", serde_json::json!(8), "caption_projection_dim: 8"),
        ("patch_size", serde_json::json!(0), "patch_size: 0"),
        ("time_twice", serde_json::json!(1), "time_twice is not known"),
    ] {
        let mut config = golden::config(NETWORK, "medium");
        config[field] = value;
        let mut weights = golden::weights(NETWORK, "medium");
        let error = Sd3::new(serde_json::from_value(config).unwrap(), &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let wide = Tensor::zeros((1, 4, 2, 14), candle_core::DType::F32, &Device::Cpu).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = sd3("medium").forward(&wide, &zeros(&[1]), &zeros(&[1, 2, 12]), &zeros(&[1, 10]), None).unwrap_err();
    assert!(error.to_string().contains("1 x 7 patches; this denoiser knows 1 to 6"), "{error}");
}
