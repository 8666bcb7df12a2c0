//! Z-Image's denoiser agrees with diffusers on the tiny random networks of `tests/checkpoints`: at the start, middle and end of a run, and in a batch whose samples
//! are each at another time and have texts of other lengths; together and alone. And a bias, which diffusers has not, hides what it is to hide.
//!
//! Tolerance: 1e-4 absolute, where values reach 6: times are embedded as waves of up to 1000 radian, where the last bit of a frequency, which two
//! implementations of `exp` need not share, is 6e-5 radian. Alone and together: 2e-5. `z_image/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with other networks' tests")]
mod golden;

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_hand::networks::z_image::{Config, MULTIPLE, Text, ZImage};
use efferent_worker::weights::Weights;
use golden::difference;

const NETWORK: &str = "z_image";
const TOLERANCE: f32 = 1e-4;
/// Alone and together: f32 rounding.
const ROUNDING: f32 = 2e-5;

fn network(name: &str) -> ZImage {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints").join(name).join("transformer");
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let path = folder.join("diffusion_pytorch_model.safetensors");
    let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
    let network = ZImage::new(serde_json::from_str(&config).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    network
}

#[test]
fn every_kind_agrees_with_diffusers() {
    // Patches that are filled up to one multiple, to none, to the next; a text that needs no filling among those that do.
    for (name, height, width, tokens) in
        [("z-image", 10, 6, MULTIPLE), ("z-image-turbo", 8, 16, MULTIPLE), ("z-image-odd", 14, 10, 2 * MULTIPLE)]
    {
        let network = network(name);
        let Config { in_channels, cap_feat_dim, .. } = *network.config();
        let shape = [3, in_channels, height, width];
        let mut golden = golden::golden(NETWORK, name);
        let x = golden.get("x", &shape);
        let states = golden.get("context", &[3, tokens, cap_feat_dim]);
        let present = golden.get("present", &[3, tokens]);
        let mut cases = Vec::new();
        for label in ["start", "middle", "end", "mixed"] {
            let time = golden.get(&format!("{label}.time"), &[3]);
            cases.push((label, time, golden.get(&format!("{label}.out"), &shape)));
        }
        golden.finish().unwrap();
        for (label, time, expected) in cases {
            let text = Text { states: &states, present: &present, bias: None };
            let together = network.forward(&x, &time, text).unwrap();
            let error = difference(&together, &expected);
            assert!(error < TOLERANCE, "{name}, {label}: {error}");
            for i in 0..3 {
                let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let (states, present) = (row(&states), row(&present));
                let text = Text { states: &states, present: &present, bias: None };
                let alone = network.forward(&row(&x), &row(&time), text).unwrap();
                assert!(difference(&alone, &row(&together)) < ROUNDING, "{name}, {label}: sample {i} alone");
            }
        }
    }
}

#[test]
fn a_bias_hides_tokens_of_the_text_and_patches() {
    let network = network("z-image");
    let config = network.config();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let (side, time) = (network.patch(), Tensor::new(&[0.5f32], &Device::Cpu).unwrap());
    let present = Tensor::ones((1, MULTIPLE), DType::F32, &Device::Cpu).unwrap();
    let (states, picture) =
        (random(&[1, MULTIPLE, config.cap_feat_dim]), random(&[1, config.in_channels, 2 * side, 3 * side]));
    // Six patches, then the text.
    let hidden = |key: usize| {
        let bias: Vec<f32> = (0..6 + MULTIPLE).map(|other| if other == key { -1e9 } else { 0.0 }).collect();
        Tensor::from_vec(bias, (1, 1, 1, 6 + MULTIPLE), &Device::Cpu).unwrap()
    };
    let run = |x: &Tensor, states: &Tensor, bias: Option<&Tensor>| {
        let answer = network.forward(x, &time, Text { states, present: &present, bias }).unwrap();
        // All but the last patch, which may change.
        answer.narrow(2, 0, side).unwrap()
    };
    let other = Tensor::cat(
        &[
            &states.narrow(1, 0, 5).unwrap(),
            &random(&[1, 1, config.cap_feat_dim]),
            &states.narrow(1, 6, MULTIPLE - 6).unwrap(),
        ],
        1,
    );
    let other = other.unwrap();
    let bias = hidden(6 + 5);
    assert!(difference(&run(&picture, &other, Some(&bias)), &run(&picture, &states, Some(&bias))) < ROUNDING);
    assert!(difference(&run(&picture, &other, None), &run(&picture, &states, None)) > 1e-3);

    let last = random(&[1, config.in_channels, side, side]);
    let corner = [0..1, 0..config.in_channels, side..2 * side, 2 * side..3 * side];
    let changed = picture.slice_assign(&corner, &last).unwrap();
    let bias = hidden(5);
    assert!(difference(&run(&changed, &states, Some(&bias)), &run(&picture, &states, Some(&bias))) < ROUNDING);
    assert!(difference(&run(&changed, &states, None), &run(&picture, &states, None)) > 1e-3);
}
