//! Weights kept in half precision: what is computed with them is, to the bit, what f32 gives with the same values.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use candle_core::DType;
use efferent_proto::v1::Size;
use efferent_tests::{
    checkpoints::{Engines, Golden, NEGATIVE, PROMPTS, copied, difference, embed, folder, kept_as, to_dtype},
    processes::efferent,
};
use efferent_worker::{engine::RenderRequest, pipeline::Pipeline};

/// One of each network, with a guidance that its pipeline takes.
const CHECKPOINTS: [(&str, f32); 8] = [
    ("sd15", 7.5),
    ("sdxl", 5.0),
    ("flux-dev", 3.5),
    ("sd35", 7.0),
    ("z-image", 5.0),
    ("sana", 4.5),
    ("metaquery-qwen2-5-vl", 4.5),
    ("metaquery-qwen3-vl", 7.5),
];

/// All values of a control signal, of the latent after two steps, and of the picture.
fn computed((mut brain, mut hand): Engines, size: Size, guidance_scale: f32) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let negatives = brain.spec().model.negative_prompt;
    let signal = embed(&mut *brain, PROMPTS[1], if negatives { NEGATIVE } else { "" });
    let states = signal.streams.iter().flat_map(|stream| stream.values.to_vec()).collect();
    let model = &hand.spec().model;
    let request = RenderRequest {
        signal,
        size,
        steps: 2,
        guidance_scale,
        seed: 7,
        sampler: model.samplers[0].clone(),
        image_guidance_scale: 1.0,
        guidance_rescale: 0.0,
        guidance_range: 0.0..1.0,
        picture: None,
    };
    let mut sample = hand.begin(&request).unwrap();
    for _ in 0..2 {
        hand.step(&mut [&mut sample]).remove(0).unwrap();
    }
    let latent = hand.checkpoint(&sample).unwrap();
    let latent = latent[12..].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (states, latent, hand.finish(sample).unwrap().into_raw())
}

#[test]
fn halves_give_what_f32_gives_with_their_values() {
    for (name, guidance) in CHECKPOINTS {
        let size = Golden::open(name).size("0.guided.image");
        let computed = |pipeline: &Pipeline, dtypes: &str| computed(kept_as(pipeline, dtypes).unwrap(), size, guidance);
        let whole = computed(&Pipeline::open(&folder(name)).unwrap(), "auto");
        for (dtype, asked, apart) in [(DType::BF16, "bf16", 0.3), (DType::F16, "f16", 0.02)] {
            let root = copied(name);
            to_dtype(root.path(), dtype);
            let pipeline = Pipeline::open(root.path()).unwrap();
            let wide = computed(&pipeline, "f32");
            // As they are stored; and made so as they are read.
            let stored = computed(&pipeline, "auto");
            assert!(stored == wide, "{name}: {asked} as stored is not what f32 gives");
            // Parts that f16 is not for would stay as they are.
            if dtype == DType::BF16 {
                let original = Pipeline::open(&folder(name)).unwrap();
                let connector = original.connector().map(|part| format!(",{}=f32", part.name)).unwrap_or_default();
                let made = computed(&original, &format!("{asked}{connector}"));
                assert!(made == wide, "{name}: {asked} made of f32 is not what f32 gives");
            }
            // And the rounding is there (some are stored in f16), and small.
            let error = difference(&wide.1, &whole.1);
            assert!((error > 0.0 || asked == "f16") && error < apart, "{name}: {asked} moves the latent by {error}");
        }
    }
}

#[test]
fn parts_are_kept_each_as_asked() {
    let inspect = |name: &str, dtype: &str| {
        let args = ["models", "inspect", &*folder(name).display().to_string(), "--json", "--dtype", dtype];
        let out = Command::new(efferent()).args(args).output().unwrap();
        (out.status.code(), out.stdout, String::from_utf8(out.stderr).unwrap())
    };
    let memory = |dtype: &str, part: &str| {
        let (_, told, _) = inspect("sd15", dtype);
        let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
        let parts = told["parts"].as_array().unwrap().clone();
        parts.iter().find(|found| found["name"] == part).unwrap()["memory_bytes"].as_u64().unwrap()
    };
    for part in ["text_encoder", "unet", "vae"] {
        let (whole, half) = (memory("f32", part), memory("bf16", part));
        assert!(half * 2 >= whole && half < whole * 6 / 10, "{part}: {half} of {whole} bytes");
        assert_eq!(memory("auto", part), whole);
        assert_eq!(memory("unet=bf16", part), if part == "unet" { half } else { whole });
        assert_eq!(memory("bf16,unet=f32", part), if part == "unet" { whole } else { half });
    }

    for (name, dtype, told) in [
        ("sd15", "fp16", "\"fp16\" is not auto, f32, f16 or bf16"),
        ("sd15", "transformer=bf16", "no part is called \"transformer\"; there are text_encoder, unet, vae"),
        ("sana", "vae=f16", "vae is not kept in f16: values of AutoencoderDC overflow there; bf16 and f32 are offered"),
        ("sana", "text_encoder=f16", "text_encoder is not kept in f16: values of Gemma2"),
    ] {
        let (code, _, error) = inspect(name, dtype);
        assert!(code == Some(64) && error.contains(told), "{name}, {dtype}: {code:?} {error}");
    }
    let refused = kept_as(&Pipeline::open(&folder("sana")).unwrap(), "vae=f16").err().unwrap();
    assert!(refused.to_string().contains("vae is not kept in f16"), "{refused}");
}
