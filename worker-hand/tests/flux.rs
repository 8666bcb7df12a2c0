//! FLUX's denoiser agrees with diffusers on tiny random networks, from the folders that it saves: at the start, middle and end of a run, and in a batch whose
//! samples are each at another time; together and alone.
//!
//! Tolerance: 1e-4 absolute, where values reach 6: strengths of guidance are embedded as waves of up to 7250 radian, where the last bit of a frequency, which
//! two implementations of `exp` need not share, is 4e-4 radian. Alone and together: 2e-5. `flux/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::networks::flux::{Flux, Text};
use golden::difference;

const NETWORK: &str = "flux";
const TOLERANCE: f32 = 1e-4;
const ROUNDING: f32 = 2e-5;

fn flux(name: &str) -> Flux {
    let mut weights = golden::weights(NETWORK, name);
    let flux = Flux::new(serde_json::from_value(golden::config(NETWORK, name)).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    flux
}

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, places, tokens) in [("dev", (3, 5), 4), ("schnell", (4, 2), 7), ("odd", (1, 3), 1)] {
        let flux = flux(name);
        let config = flux.config();
        let shape = [3, places.0 * places.1, config.in_channels];
        let mut golden = golden::golden(NETWORK, name);
        let x = golden.get("x", &shape);
        let states = golden.get("context", &[3, tokens, config.joint_attention_dim]);
        let pooled = golden.get("pooled", &[3, config.pooled_projection_dim]);
        let guidance = config.guidance_embeds.then(|| golden.get("guidance", &[3]));
        for label in ["start", "middle", "end", "mixed"] {
            let time = golden.get(&format!("{label}.time"), &[3]);
            let expected = golden.get(&format!("{label}.out"), &shape);
            let text = Text { states: &states, pooled: &pooled, bias: None };
            let together = flux.forward(&x, &time, text, guidance.as_ref(), places).unwrap();
            let error = difference(&together, &expected);
            assert!(error < TOLERANCE, "{name}, {label}: {error}");
            for i in 0..3 {
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let (states, pooled, guidance) = (row(&states), row(&pooled), guidance.as_ref().map(row));
                let text = Text { states: &states, pooled: &pooled, bias: None };
                let alone = flux.forward(&row(&x), &row(&time), text, guidance.as_ref(), places).unwrap();
                assert!(difference(&alone, &row(&together)) < ROUNDING, "{name}, {label}: sample {i} alone");
            }
        }
    }
}

#[test]
fn a_bias_hides_tokens_of_the_text() {
    let flux = flux("schnell");
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let (x, time) = (random(&[1, 6, 8]), Tensor::new(&[500f32], &Device::Cpu).unwrap());
    let (kept, other, pooled) = (random(&[1, 3, 6]), random(&[1, 2, 6]), random(&[1, 4]));
    let both = Tensor::cat(&[&kept, &other], 1).unwrap();
    let bias: Vec<f32> = (0..11).map(|key| if key == 3 || key == 4 { -1e9 } else { 0.0 }).collect();
    let bias = Tensor::from_vec(bias, (1, 1, 1, 11), &Device::Cpu).unwrap();
    let run = |states: &Tensor, bias: Option<&Tensor>| {
        flux.forward(&x, &time, Text { states, pooled: &pooled, bias }, None, (2, 3)).unwrap()
    };
    let without = run(&kept, None);
    assert!(difference(&run(&both, Some(&bias)), &without) < ROUNDING);
    assert!(difference(&run(&both, None), &without) > 1e-3);
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    for (field, value, wanted) in [
        ("qk_norm", serde_json::json!("layer_norm"), "qk_norm"),
        ("patch_size", serde_json::json!(2), "patch_size: 2"),
        ("out_channels", serde_json::json!(3), "out_channels: Some(3)"),
        ("axes_dims_rope", serde_json::json!([3, 3, 2]), "axes_dims_rope [3, 3, 2]"),
    ] {
        let mut config = golden::config(NETWORK, "dev");
        config[field] = value;
        let mut weights = golden::weights(NETWORK, "dev");
        let error = Flux::new(serde_json::from_value(config).unwrap(), &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
