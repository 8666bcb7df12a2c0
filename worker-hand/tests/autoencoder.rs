//! Autoencoders agree with diffusers on tiny random networks, from the folders that it saves: pictures to latents and latents to pictures, together and alone.
//!
//! Tolerance: 1e-5 absolute, f32 rounding, where values reach 4. `autoencoder/reference.py` makes the files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod golden;

use candle_core::{Device, Tensor};
use efferent_hand::{
    latent::tiles,
    networks::{
        LatentSpace as _,
        autoencoder::{Autoencoder, Config},
    },
};
use golden::difference;

const NETWORK: &str = "autoencoder";
const TOLERANCE: f32 = 1e-5;

#[test]
fn every_kind_agrees_with_diffusers() {
    for (name, height, width) in [("sd", 12, 8), ("flux", 12, 20), ("plain", 5, 3)] {
        let mut weights = golden::weights(NETWORK, name);
        let network =
            Autoencoder::new(serde_json::from_value(golden::config(NETWORK, name)).unwrap(), &mut weights).unwrap();
        weights.finish().unwrap();
        let (factor, channels) = (network.factor(), network.config().latent_channels);
        let mut golden = golden::golden(NETWORK, name);
        let mut get = |part: &str, shape: [usize; 4]| golden.get(part, &shape).permute((0, 2, 3, 1)).unwrap();
        let small = [3, channels, height / factor, width / factor];
        let (x, latent) = (get("x", [3, 3, height, width]), get("latent", small));
        let (mean, logvar) = (get("mean", small), get("logvar", small));
        let picture = get("picture", [3, 3, height, width]);
        let side = 16 / factor;
        let tiled = [("wide", side, 2 * side + 1), ("large", 2 * side - 1, side + 3)].map(|(key, rows, columns)| {
            let latent = get(&format!("{key}.latent"), [1, channels, rows, columns]);
            let picture = get(&format!("{key}.picture"), [1, 3, rows * factor, columns * factor]);
            let moments = ["mean", "logvar"].map(|part| get(&format!("{key}.{part}"), [1, channels, rows, columns]));
            (key, latent, picture, moments)
        });
        golden.finish().unwrap();
        let parts = |moments: &Tensor| [0, channels].map(|start| moments.narrow(3, start, channels).unwrap());
        for (key, latent, picture, [mean, logvar]) in tiled {
            let got = tiles::decode(&network, &latent, network.tiles()).unwrap();
            let [got_mean, got_logvar] = parts(&tiles::moments(&network, &picture, network.tiles()).unwrap());
            for (got, wanted) in [(got, &picture), (got_mean, &mean), (got_logvar, &logvar)] {
                let error = difference(&got, wanted);
                assert!(error < TOLERANCE, "{name}, {key}, in tiles: {error}");
            }
        }
        let [got_mean, got_logvar] = parts(&network.moments(&x).unwrap());
        let got = network.decode(&latent).unwrap();
        for (what, got, wanted) in
            [("mean", &got_mean, &mean), ("variance", &got_logvar, &logvar), ("picture", &got, &picture)]
        {
            let error = difference(got, wanted);
            assert!(error < TOLERANCE, "{name}, {what}: {error}");
        }
        for i in 0..3 {
            let row = |x: &Tensor| x.narrow(0, i, 1).unwrap();
            assert_eq!(
                difference(&parts(&network.moments(&row(&x)).unwrap())[0], &row(&got_mean)),
                0.0,
                "{name}: {i} alone"
            );
            assert_eq!(difference(&network.decode(&row(&latent)).unwrap(), &row(&got)), 0.0, "{name}: {i} alone");
        }
        let back = network.unscale(&network.scale(&latent).unwrap()).unwrap();
        assert!(difference(&back, &latent) < TOLERANCE);
    }
}

#[test]
fn a_latent_is_scaled_as_configured() {
    let mut weights = golden::weights(NETWORK, "flux");
    let network =
        Autoencoder::new(serde_json::from_value(golden::config(NETWORK, "flux")).unwrap(), &mut weights).unwrap();
    let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    let scaled = network.scale(&one).unwrap().to_vec1::<f32>().unwrap()[0];
    assert!((scaled - (1.0 - 0.1159) * 0.3611).abs() < 1e-6, "{scaled}");
}

#[test]
fn an_old_configuration_scales_as_it_did() {
    let mut old = golden::config(NETWORK, "sd");
    old.as_object_mut().unwrap().remove("scaling_factor").unwrap();
    assert_eq!(serde_json::from_value::<Config>(old).unwrap().scaling_factor, 0.18215);
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    for (field, value, wanted) in [
        ("latents_mean", serde_json::json!([0.0]), "latents_mean"),
        ("block_out_channels", serde_json::json!([8]), "levels"),
        ("block_out_channels", serde_json::json!([]), "levels"),
        ("latent_channels", serde_json::json!(0), "cannot be"),
        ("norm_num_groups", serde_json::json!(5), "5 groups of 8 channels"),
    ] {
        let mut changed = golden::config(NETWORK, "sd");
        changed[field] = value;
        let changed: Config = serde_json::from_value(changed).unwrap();
        let mut weights = golden::weights(NETWORK, "sd");
        let error = Autoencoder::new(changed, &mut weights).unwrap_err().to_string();
        assert!(error.contains(wanted), "{field}: {error}");
    }
    let mut unknown = golden::config(NETWORK, "sd");
    unknown["down_block_types"][0] = "AttnDownEncoderBlock2D".into();
    let error = serde_json::from_value::<Config>(unknown).unwrap_err().to_string();
    assert!(error.contains("AttnDownEncoderBlock2D"), "{error}");
}
