//! What of Z-Image's denoiser the checkpoints of `tests/tests/checkpoints.rs`, which compare it with diffusers, do not show: a bias, which diffusers has not.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with other networks' tests")]
mod golden;

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_hand::networks::z_image::{MULTIPLE, Text, ZImage};
use efferent_worker::weights::Weights;
use golden::difference;

/// Alone and together: f32 rounding.
const ROUNDING: f32 = 2e-5;

fn network() -> ZImage {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints/z-image/transformer");
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let path = folder.join("diffusion_pytorch_model.safetensors");
    let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
    let network = ZImage::new(serde_json::from_str(&config).unwrap(), &mut weights).unwrap();
    weights.finish().unwrap();
    network
}

#[test]
fn a_bias_hides_tokens_of_the_text_and_patches() {
    let network = network();
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
