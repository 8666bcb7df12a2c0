//! Sana's denoiser agrees with diffusers on tiny random networks, from the folders that it saves: at the start, middle and end of a run, and in a batch whose
//! samples are each at another time and have texts of other lengths; together and alone.
//!
//! Tolerance: 1e-4 absolute, where values reach 9: times are embedded as waves of up to 1000 radian, where the last bit of a frequency, which two
//! implementations of `exp` need not share, is 6e-5 radian. Alone and together: 2e-5. `sana/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::networks::sana::{Config, Sana};
use efferent_worker::nn::attention::hide_absent;
use golden::difference;

const NETWORK: &str = "sana";
const TOLERANCE: f32 = 1e-4;
const ROUNDING: f32 = 2e-5;

fn sana(name: &str) -> Sana {
    let mut weights = golden::weights(NETWORK, name);
    let sana = Sana::new(serde_json::from_value(golden::config(NETWORK, name)).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    sana
}

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, height, width, lengths) in
        [("plain", 5, 7, [4, 6, 1]), ("odd", 6, 10, [2, 3, 3]), ("sprint", 4, 3, [5, 1, 4])]
    {
        let sana = sana(name);
        let Config { in_channels, out_channels, caption_channels, guidance_embeds, .. } = *sana.config();
        let tokens = lengths.into_iter().max().unwrap();
        let mut golden = golden::golden(NETWORK, name);
        let x = golden.get("x", &[3, in_channels, height, width]);
        let states = golden.get("context", &[3, tokens, caption_channels]);
        let bias = hide_absent(&golden.get("present", &[3, tokens])).unwrap();
        let guidance = guidance_embeds.then(|| golden.get("guidance", &[3]));
        let mut cases = Vec::new();
        for label in ["start", "middle", "end", "mixed"] {
            let time = golden.get(&format!("{label}.time"), &[3]);
            cases.push((label, time, golden.get(&format!("{label}.out"), &[3, out_channels, height, width])));
        }
        golden.finish().unwrap();
        for (label, time, expected) in cases {
            let together = sana.forward(&x, &time, &states, Some(&bias), guidance.as_ref()).unwrap();
            let error = difference(&together, &expected);
            assert!(error < TOLERANCE, "{name}, {label}: {error}");
            for (i, length) in lengths.into_iter().enumerate() {
                // With its own tokens only: what fills a text up in a batch is of no account.
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let (states, guidance) = (row(&states).narrow(1, 0, length).unwrap(), guidance.as_ref().map(row));
                let alone = sana.forward(&row(&x), &row(&time), &states, None, guidance.as_ref()).unwrap();
                assert!(difference(&alone, &row(&together)) < ROUNDING, "{name}, {label}: sample {i} alone");
            }
        }
    }
}

#[test]
fn guidance_is_neither_left_out_nor_ignored() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let (x, time, strength) = (zeros(&[1, 4, 2, 2]), zeros(&[1]), Tensor::new(&[4.5f32], &Device::Cpu).unwrap());
    for name in ["plain", "sprint"] {
        let sana = sana(name);
        let states = zeros(&[1, 2, sana.config().caption_channels]);
        let told = sana.config().guidance_embeds;
        assert_eq!(sana.forward(&x, &time, &states, None, None).is_ok(), !told, "{name}");
        assert_eq!(sana.forward(&x, &time, &states, None, Some(&strength)).is_ok(), told, "{name}");
    }
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    for (field, value, wanted) in [
        ("qk_norm", serde_json::json!("layer_norm"), "qk_norm \"layer_norm\""),
        ("norm_elementwise_affine", serde_json::json!(true), "norm_elementwise_affine = true"),
        ("cross_attention_dim", serde_json::json!(16), "cross_attention_dim: 16"),
        ("interpolation_scale", serde_json::json!(0.0), "units of Some(0.0)"),
        ("patch_size", serde_json::json!(0), "patch_size: 0"),
        ("time_twice", serde_json::json!(1), "time_twice is not known"),
    ] {
        let mut config = golden::config(NETWORK, "plain");
        config[field] = value;
        let mut weights = golden::weights(NETWORK, "plain");
        let error = Sana::new(serde_json::from_value(config).unwrap(), &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{field}: {error}");
    }
}
