//! Configurations with the values of published models are accepted, and come to their sizes. No weights are read.
//!
//! `published/*.json` has them by path, as the models' pages on Hugging Face's hub show them; they were written down from memory and from other projects'
//! public copies, not downloaded, so whatever in them changes nothing that is computed may differ.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::Device;
use efferent_hand::{
    networks::{
        LatentSpace as _,
        autoencoder::{self, Autoencoder},
        dc_autoencoder::{self, DcAutoencoder},
        flux::{self, Flux},
        sana::{self, Sana},
        sd3::{self, Sd3},
        unet::{self, Unet},
        z_image::{self, ZImage},
    },
    samplers::{Config as Scheduler, Flow, Plan},
};
use efferent_proto::v1::{Model, Size};
use efferent_worker::{
    nn::{
        clip,
        decoder::{Config as Decoder, RotaryAxes, Window},
        ops::Activation,
        rotary::Stretch,
        t5, vision,
    },
    pipeline::{Pipeline, read_json},
    weights::Weights,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

fn here(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

/// A published folder with its configurations, and files that stand for weights.
struct Published(tempfile::TempDir);

impl Published {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files: BTreeMap<String, Value> = read_json(&here(&format!("published/{name}.json"))).unwrap();
        for (path, config) in &files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            // As Python writes it.
            let text = serde_json::to_string_pretty(config).unwrap().replace("\"-Infinity\"", "-Infinity");
            std::fs::write(&path, text).unwrap();
            if path.ends_with("config.json") {
                std::fs::write(path.with_file_name("model.safetensors"), "none").unwrap();
            }
        }
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn config<T: DeserializeOwned>(&self, part: &str) -> T {
        read_json(&self.path().join(part).join("config.json")).unwrap()
    }
}

/// A file of other tensors, none of which is any that a network looks for: those that are missing count for zeros until they are told of.
fn nothing() -> Weights {
    Weights::open_safetensors(&here("flux/dev/golden.safetensors"), &Device::Cpu).unwrap()
}

struct Wanted {
    name: &'static str,
    side: u32,
    steps: u32,
    guidance: f32,
    sampler: &'static str,
    tokens: u32,
    width: u32,
}

const PIPELINES: [Wanted; 10] = [
    wanted("stable-diffusion-v1-5", 512, (50, 7.5, "pndm"), 77, 768),
    wanted("stable-diffusion-2-1", 768, (50, 7.5, "ddim"), 77, 1024),
    wanted("lcm_dreamshaper_v7", 512, (4, 8.5, "lcm"), 77, 768),
    wanted("stable-diffusion-xl-base-1.0", 1024, (50, 5.0, "euler"), 77, 2048),
    wanted("stable-diffusion-3-medium-diffusers", 1024, (28, 7.0, "euler"), 256, 4096),
    wanted("flux.1-dev", 1024, (28, 3.5, "euler"), 512, 4096),
    wanted("flux.1-schnell", 1024, (4, 0.0, "euler"), 512, 4096),
    wanted("z-image-turbo", 1024, (50, 5.0, "euler"), 512, 2560),
    wanted("sana_1600m_1024px_diffusers", 1024, (20, 4.5, "dpmpp-2m"), 300, 2304),
    wanted("sana_sprint_1.6b_1024px_diffusers", 1024, (2, 4.5, "scm"), 300, 2304),
];

const fn wanted(
    name: &'static str,
    side: u32,
    (steps, guidance, sampler): (u32, f32, &'static str),
    tokens: u32,
    width: u32,
) -> Wanted {
    Wanted { name, side, steps, guidance, sampler, tokens, width }
}

#[test]
fn pipelines_offer_what_they_are_made_for() {
    for Wanted { name, side, steps, guidance, sampler, tokens, width } in PIPELINES {
        let published = Published::new(name);
        let pipeline = Pipeline::open(published.path()).unwrap();
        let space = pipeline.declared_space().unwrap();
        let model: Model = pipeline.model(&space);
        assert_eq!(model.sizes, [Size { width: side, height: side }], "{name}");
        assert_eq!((model.default_steps, model.default_guidance_scale), (steps, guidance), "{name}");
        assert_eq!((&*model.samplers[0], model.max_prompt_tokens, space.width), (sampler, tokens, width), "{name}");
        // Those that are told the strength of guidance have no branch without the prompt.
        let told = ["lcm_dreamshaper_v7", "flux.1-dev", "flux.1-schnell", "sana_sprint_1.6b_1024px_diffusers"];
        assert_eq!(model.negative_prompt, !told.contains(&name), "{name}");
        let scheduler: Scheduler =
            read_json(&published.path().join("scheduler").join("scheduler_config.json")).unwrap();
        let own = scheduler.own().unwrap();
        let plan = Plan::new(&scheduler, own, 4, 0, Flow { even: true, mu: Some(0.8) }).unwrap();
        assert!(plan.times().len() >= 4, "{name}");
    }
}

#[test]
fn unets_are_known() {
    for (name, heads, depth) in [
        ("stable-diffusion-v1-5", unet::Each::Same(8), unet::Each::Same(1)),
        ("lcm_dreamshaper_v7", unet::Each::Same(8), unet::Each::Same(1)),
        ("stable-diffusion-2-1", unet::Each::Listed(vec![5, 10, 20, 20]), unet::Each::Same(1)),
        ("stable-diffusion-xl-base-1.0", unet::Each::Listed(vec![5, 10, 20]), unet::Each::Listed(vec![1, 2, 10])),
    ] {
        let mut config: unet::Config = Published::new(name).config("unet");
        assert_eq!((&config.attention_head_dim, &config.transformer_layers_per_block), (&heads, &depth), "{name}");
        assert_eq!((config.in_channels, config.out_channels, config.norm_num_groups), (4, 4, 32), "{name}");
        assert_eq!(config.block_out_channels[..3], [320, 640, 1280], "{name}");
        assert_eq!(config.time_cond_proj_dim, (name == "lcm_dreamshaper_v7").then_some(256));
        // The same in small: every field of it is known.
        config.block_out_channels.fill(160);
        Unet::new(config, &mut nothing()).unwrap();
    }
}

#[test]
fn autoencoders_are_known() {
    for (name, channels, scaling, shift, convolutions) in [
        // Its file is older than three of the fields.
        ("stable-diffusion-v1-5", 4, 0.18215, None, true),
        ("stable-diffusion-2-1", 4, 0.18215, None, true),
        ("stable-diffusion-xl-base-1.0", 4, 0.13025, None, true),
        ("stable-diffusion-3-medium-diffusers", 16, 1.5305, Some(0.0609), false),
        ("flux.1-dev", 16, 0.3611, Some(0.1159), false),
        ("flux.1-schnell", 16, 0.3611, Some(0.1159), false),
        ("z-image-turbo", 16, 0.3611, Some(0.1159), false),
    ] {
        let mut config: autoencoder::Config = Published::new(name).config("vae");
        assert_eq!(config.block_out_channels, [128, 256, 512, 512], "{name}");
        let got = (config.latent_channels, config.scaling_factor, config.shift_factor, config.use_quant_conv);
        assert_eq!(got, (channels, scaling, shift, convolutions), "{name}");
        assert_eq!((config.norm_num_groups, config.mid_block_add_attention), (32, true), "{name}");
        config.block_out_channels.fill(32);
        assert_eq!(Autoencoder::new(config, &mut nothing()).unwrap().factor(), 8, "{name}");
    }
    for name in ["sana_1600m_1024px_diffusers", "sana_sprint_1.6b_1024px_diffusers"] {
        let mut config: dc_autoencoder::Config = Published::new(name).config("vae");
        assert_eq!((config.latent_channels, config.scaling_factor), (32, 0.41407), "{name}");
        assert_eq!(config.decoder_block_out_channels, [128, 256, 512, 512, 1024, 1024], "{name}");
        config.encoder_block_out_channels.fill(32);
        config.decoder_block_out_channels.fill(32);
        assert_eq!(DcAutoencoder::new(config, &mut nothing()).unwrap().factor(), 32, "{name}");
    }
}

#[test]
fn transformers_are_known() {
    let mut config: sd3::Config = Published::new("stable-diffusion-3-medium-diffusers").config("transformer");
    assert_eq!((config.num_layers, config.num_attention_heads, config.pos_embed_max_size), (24, 24, 192));
    assert_eq!((config.caption_projection_dim, config.pooled_projection_dim), (1536, 2048));
    (config.num_layers, config.num_attention_heads, config.caption_projection_dim) = (1, 1, 64);
    config.pos_embed_max_size = 2;
    Sd3::new(config, &mut nothing()).unwrap();

    for (name, told) in [("flux.1-dev", true), ("flux.1-schnell", false)] {
        let mut config: flux::Config = Published::new(name).config("transformer");
        assert_eq!((config.num_layers, config.num_single_layers, config.num_attention_heads), (19, 38, 24), "{name}");
        assert_eq!((config.guidance_embeds, &*config.axes_dims_rope), (told, &[16, 56, 56][..]), "{name}");
        (config.num_layers, config.num_single_layers, config.num_attention_heads) = (1, 1, 1);
        Flux::new(config, &mut nothing()).unwrap();
    }

    let mut config: z_image::Config = Published::new("z-image-turbo").config("transformer");
    assert_eq!((config.dim, config.n_layers, config.n_heads, config.cap_feat_dim), (3840, 30, 30, 2560));
    assert_eq!((&*config.axes_lens, config.t_scale), (&[1536, 512, 512][..], 1000.0));
    (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) = (128, 1, 1, 1);
    ZImage::new(config, &mut nothing()).unwrap();

    for (name, told) in [("sana_1600m_1024px_diffusers", false), ("sana_sprint_1.6b_1024px_diffusers", true)] {
        let mut config: sana::Config = Published::new(name).config("transformer");
        assert_eq!(
            (config.num_layers, config.num_attention_heads, config.cross_attention_dim),
            (20, 70, 2240),
            "{name}"
        );
        assert_eq!((config.guidance_embeds, config.qk_norm.is_some()), (told, told), "{name}");
        (config.num_layers, config.num_attention_heads, config.cross_attention_dim) = (1, 2, 64);
        (config.num_cross_attention_heads, config.cross_attention_head_dim) = (2, 32);
        Sana::new(config, &mut nothing()).unwrap();
    }
}

#[test]
fn text_encoders_are_known() {
    let clip_l = (768, 12, 12, 3072, Activation::QuickGelu);
    let clip_g = (1280, 32, 20, 5120, Activation::Gelu);
    for (name, part, wanted) in [
        ("stable-diffusion-v1-5", "text_encoder", clip_l),
        ("stable-diffusion-2-1", "text_encoder", (1024, 23, 16, 4096, Activation::Gelu)),
        ("stable-diffusion-xl-base-1.0", "text_encoder", clip_l),
        ("stable-diffusion-xl-base-1.0", "text_encoder_2", clip_g),
        ("stable-diffusion-3-medium-diffusers", "text_encoder", clip_l),
        ("stable-diffusion-3-medium-diffusers", "text_encoder_2", clip_g),
        ("flux.1-dev", "text_encoder", clip_l),
        ("flux.1-schnell", "text_encoder", clip_l),
    ] {
        let config: clip::Config = Published::new(name).config(part);
        let got = (config.width, config.layers, config.heads, config.mlp_width, config.activation);
        assert_eq!(got, wanted, "{name}: {part}");
        assert_eq!((config.vocabulary, config.positions, config.end), (49_408, 77, 2), "{name}: {part}");
    }
    for (name, part) in [
        ("stable-diffusion-3-medium-diffusers", "text_encoder_3"),
        ("flux.1-dev", "text_encoder_2"),
        ("flux.1-schnell", "text_encoder_2"),
    ] {
        let config: t5::Config = Published::new(name).config(part);
        assert_eq!((config.width, config.layers, config.heads, config.mlp_width), (4096, 24, 64, 10_240), "{name}");
        assert_eq!((config.mlp, config.vocabulary), (t5::Mlp::GatedGelu, 32_128), "{name}");
    }
    for (name, width) in
        [("z-image-turbo", 2560), ("sana_1600m_1024px_diffusers", 2304), ("sana_sprint_1.6b_1024px_diffusers", 2304)]
    {
        let fields: Map<String, Value> = Published::new(name).config("text_encoder");
        assert_eq!(Decoder::published(&fields).unwrap().width, width, "{name}");
    }
}

#[test]
fn language_models_are_known() {
    let files: BTreeMap<String, Map<String, Value>> = read_json(&here("published/language.json")).unwrap();
    let wanted = [
        // Vocabulary, width, layers, heads, heads of keys, channels of a head, channels inside the MLP.
        ("Llama-2-7b-hf", [32_000, 4096, 32, 32, 32, 128, 11_008], 1e4),
        ("Llama-3.1-8B-Instruct", [128_256, 4096, 32, 32, 8, 128, 14_336], 5e5),
        ("Mistral-7B-v0.1", [32_000, 4096, 32, 32, 8, 128, 14_336], 1e4),
        ("Qwen3-4B", [151_936, 2560, 36, 32, 8, 128, 9728], 1e6),
        ("gemma-2-2b-it", [256_000, 2304, 26, 8, 4, 256, 9216], 1e4),
        ("Qwen2.5-VL-3B-Instruct", [151_936, 2048, 36, 16, 2, 128, 11_008], 1e6),
        ("Qwen3-VL-4B-Instruct", [151_936, 2560, 36, 32, 8, 128, 9728], 5e6),
        ("InternVL3-1B", [151_674, 896, 24, 14, 2, 64, 4864], 1e6),
        ("llava-onevision-qwen2-0.5b-ov-hf", [152_000, 896, 24, 14, 2, 64, 4864], 1e6),
    ];
    assert_eq!(files.len(), wanted.len());
    for (name, sizes, base) in wanted {
        let config = Decoder::published(&files[name]).unwrap();
        let Decoder { vocabulary, width, layers, heads, key_heads, head_width, mlp_width, .. } = config;
        assert_eq!([vocabulary, width, layers, heads, key_heads, head_width, mlp_width], sizes, "{name}");
        assert_eq!(config.rotary_base, base, "{name}");
    }
    let read = |name: &str| Decoder::published(&files[name]).unwrap();
    let stretch = Stretch { factor: 8.0, low: 1.0, high: 4.0, positions: 8192.0 };
    assert_eq!(read("Llama-3.1-8B-Instruct").rotary_stretch, Some(stretch));
    assert_eq!(read("Mistral-7B-v0.1").sliding_window, Some(Window::Every(4096)));
    let gemma = read("gemma-2-2b-it");
    assert_eq!((gemma.sliding_window, gemma.soft_cap), (Some(Window::EverySecond(4096)), Some(50.0)));
    assert_eq!((gemma.logit_width, gemma.activation), (Some(256), Activation::GeluTanh));
    assert_eq!(read("Qwen2.5-VL-3B-Instruct").rotary_axes, Some(RotaryAxes::InTurn([16, 24, 24])));
    assert_eq!(read("Qwen3-VL-4B-Instruct").rotary_axes, Some(RotaryAxes::Woven([24, 20, 20])));
    // Up to its longest sequence the base is what it is.
    assert_eq!(read("InternVL3-1B").longest, Some(32_768));
    let llava = read("llava-onevision-qwen2-0.5b-ov-hf");
    assert!(llava.projection_bias && llava.longest.is_none() && llava.activation == Activation::Silu);
    for (name, width) in [("Qwen2.5-VL-3B-Instruct", 2048), ("Qwen3-VL-4B-Instruct", 2560)] {
        assert_eq!(vision::Config::published(&files[name]).unwrap().out_width, width, "{name}");
    }
}
