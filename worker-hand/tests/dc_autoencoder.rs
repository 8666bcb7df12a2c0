//! Autoencoders of few cells agree with diffusers on tiny random networks, from the folders that it saves: pictures to latents and latents to pictures,
//! together and alone.
//!
//! Tolerance: 2e-5 absolute, f32 rounding. `dc_autoencoder/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::{
    latent::tiles::{self, Tiles},
    networks::{
        LatentSpace as _,
        dc_autoencoder::{Config, DcAutoencoder},
    },
};
use golden::difference;
use serde_json::json;

const NETWORK: &str = "dc_autoencoder";
const TOLERANCE: f32 = 2e-5;

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, height, width) in [("sana", 12, 20), ("shuffled", 10, 6), ("passed", 8, 12)] {
        let mut weights = golden::weights(NETWORK, name);
        let config = serde_json::from_value(golden::config(NETWORK, name)).unwrap();
        let network = DcAutoencoder::new(config, &mut weights).unwrap();
        weights.finish().unwrap();
        let (factor, channels) = (network.factor(), network.channels());
        let mut golden = golden::golden(NETWORK, name);
        let mut get = |part: &str, shape: [usize; 4]| golden.get(part, &shape).permute((0, 2, 3, 1)).unwrap();
        let small = [3, channels, height / factor, width / factor];
        let (x, latent) = (get("x", [3, 3, height, width]), get("latent", small));
        let (encoded, picture) = (get("encoded", small), get("picture", [3, 3, height, width]));
        let tiles = Tiles { side: 16 / factor, stride: 12 / factor };
        let (rows, columns) = (2 * tiles.side - 1, tiles.side + 1);
        let large = get("large.latent", [1, channels, rows, columns]);
        let large_picture = get("large.picture", [1, 3, rows * factor, columns * factor]);
        let large_encoded = get("large.encoded", [1, channels, rows, columns]);
        golden.finish().unwrap();
        let decoded = tiles::decode(&network, &large, tiles).unwrap();
        let encoded_again = tiles::moments(&network, &large_picture, tiles).unwrap();
        for (got, wanted) in [(decoded, &large_picture), (encoded_again, &large_encoded)] {
            let error = difference(&got, wanted);
            assert!(error < TOLERANCE, "{name}, in tiles: {error}");
        }
        let (got_encoded, got) = (network.moments(&x).unwrap(), network.decode(&latent).unwrap());
        for (what, got, wanted) in [("latent", &got_encoded, &encoded), ("picture", &got, &picture)] {
            let error = difference(got, wanted);
            assert!(error < TOLERANCE, "{name}, {what}: {error}");
        }
        for i in 0..3 {
            let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
            assert_eq!(difference(&network.moments(&row(&x)).unwrap(), &row(&got_encoded)), 0.0, "{name}: {i} alone");
            assert_eq!(difference(&network.decode(&row(&latent)).unwrap(), &row(&got)), 0.0, "{name}: {i} alone");
        }
    }
}

#[test]
fn a_latent_is_scaled_as_configured() {
    let mut weights = golden::weights(NETWORK, "sana");
    let config = serde_json::from_value(golden::config(NETWORK, "sana")).unwrap();
    let network = DcAutoencoder::new(config, &mut weights).unwrap();
    let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    let unscaled = network.unscale(&one).unwrap().to_vec1::<f32>().unwrap()[0];
    assert!((unscaled - 1.0 / 0.41407).abs() < 1e-6, "{unscaled}");
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    for (field, value, wanted) in [
        ("encoder_block_out_channels", json!([8, 8]), "levels"),
        ("decoder_layers_per_block", json!([1, 0, 1]), "must have blocks"),
        ("encoder_qkv_multiscales", json!([[], [4], [5]]), "has no middle"),
        ("encoder_block_types", json!(["ResBlock"]), "1 values for 3 levels"),
        ("latent_channels", json!(3), "cannot be"),
        ("attention_head_dim", json!(0), "cannot be"),
        ("encoder_block_out_channels", json!([8, 12, 20]), "8 channels cannot become 12"),
        ("tiles", json!(2), "tiles is not known"),
    ] {
        let mut changed = golden::config(NETWORK, "sana");
        changed[field] = value;
        let changed: Config = serde_json::from_value(changed).unwrap();
        let mut weights = golden::weights(NETWORK, "sana");
        let error = DcAutoencoder::new(changed, &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{field}: {error}");
    }
    let mut unknown = golden::config(NETWORK, "sana");
    unknown["decoder_norm_types"] = "batch_norm".into();
    assert!(serde_json::from_value::<Config>(unknown).is_err());
}
