//! Classes of pipelines: which families run each, and what its parts' configurations say about it.

use serde_json::{Map, Value, json};

use super::{Error, Folder, scheduler};

/// What a pipeline's class says.
pub(super) struct Class {
    pub(super) name: &'static str,
    pub(super) describe: fn(&Folder<'_>) -> Result<Described, Error>,
}

/// Every class that is known.
pub(super) const CLASSES: [Class; 10] = [
    Class { name: "FluxPipeline", describe: flux },
    Class { name: "LatentConsistencyModelPipeline", describe: latent_consistency },
    Class { name: "SanaPipeline", describe: sana },
    Class { name: "SanaSprintPipeline", describe: sana_sprint },
    Class { name: "StableDiffusion3Pipeline", describe: stable_diffusion_3 },
    Class { name: "StableDiffusionInpaintPipeline", describe: stable_diffusion },
    Class { name: "StableDiffusionPipeline", describe: stable_diffusion },
    Class { name: "StableDiffusionXLInpaintPipeline", describe: stable_diffusion_xl },
    Class { name: "StableDiffusionXLPipeline", describe: stable_diffusion_xl },
    Class { name: "ZImagePipeline", describe: z_image },
];

/// What is served of a pipeline.
pub(super) struct Described {
    pub(super) description: &'static str,
    pub(super) brain: &'static str,
    pub(super) brain_config: Value,
    pub(super) hand: &'static str,
    pub(super) hand_config: Value,
    pub(super) steps: u32,
    pub(super) guidance: f32,
    /// Usual size, width and height.
    pub(super) size: (u32, u32),
    /// Pixels that a side must be a multiple of.
    pub(super) multiple: u32,
    /// Longest side, if the network knows no longer one.
    pub(super) longest: Option<u32>,
    pub(super) samplers: Vec<scheduler::Sampler>,
    pub(super) max_prompt_tokens: u32,
    pub(super) negative_prompt: bool,
    /// Whether diffusers has the pipeline in a form that begins with a picture, and in one that changes a part of it.
    pub(super) image_to_image: bool,
    pub(super) inpainting: bool,
    /// Whether the network is made for inpainting, and draws nothing else.
    pub(super) inpainting_only: bool,
    /// Whether the pipeline takes back contrast.
    pub(super) guidance_rescale: bool,
}

/// A size that is one number for both sides, or height and width.
fn sides(config: &Map<String, Value>, field: &str) -> Option<(u32, u32)> {
    let number = |value: &Value| value.as_u64().and_then(|side| u32::try_from(side).ok());
    match config.get(field)? {
        Value::Array(pair) => Some((number(pair.get(1)?)?, number(pair.first()?)?)),
        side => number(side).map(|side| (side, side)),
    }
}

/// A size of a configuration, or what diffusers takes if it is left out.
fn size_of(config: &Map<String, Value>, field: &str, usual: u32) -> u32 {
    let value = config.get(field).and_then(Value::as_u64).unwrap_or(usual.into());
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Pixels that a cell of a latent stands for, along each side.
fn latent_cell(vae: &Map<String, Value>) -> u32 {
    let levels = vae.get("block_out_channels").and_then(Value::as_array).map_or(1, Vec::len);
    1 << levels.clamp(1, 8).saturating_sub(1)
}

const SCHEDULERS: &[&str] = &[
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
];

fn unet_pipeline(
    folder: &Folder<'_>,
    description: &'static str,
    steps: u32,
    guidance: f32,
    mut brain: Value,
    tokens: u64,
) -> Result<Described, Error> {
    let (unet, vae, scheduler) = (folder.config("unet")?, folder.config("vae")?, folder.scheduler()?);
    // Distilled to be told the strength of guidance instead of being asked a second time, without the prompt.
    let told = unet.get("time_cond_proj_dim").is_some_and(|width| !width.is_null());
    if told {
        brain["empty_negative"] = json!("nothing");
    }
    let cell = latent_cell(&vae);
    let (width, height) = sides(&unet, "sample_size").unwrap_or((64, 64));
    let layers = brain.get("layers").cloned();
    Ok(Described {
        description,
        brain: "text_encoders",
        brain_config: brain,
        hand: "stable_diffusion",
        hand_config: json!({ "layers": layers, "width": size_of(&unet, "cross_attention_dim", 1280) }),
        steps,
        guidance,
        size: (width.saturating_mul(cell), height.saturating_mul(cell)),
        multiple: cell,
        longest: None,
        samplers: scheduler.samplers(),
        max_prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        negative_prompt: !told,
        image_to_image: true,
        inpainting: true,
        inpainting_only: size_of(&unet, "in_channels", 4) > size_of(&unet, "out_channels", 4),
        guidance_rescale: !told,
    })
}

fn stable_diffusion(folder: &Folder<'_>) -> Result<Described, Error> {
    clip_and_unet(folder, "Stable Diffusion", 50, 7.5)
}

/// Stable Diffusion distilled into few steps. (Its pipeline that begins with a picture counts steps in another way.)
fn latent_consistency(folder: &Folder<'_>) -> Result<Described, Error> {
    let mut described = clip_and_unet(folder, "Latent consistency model, in few steps", 4, 8.5)?;
    described.samplers.truncate(1);
    Ok(Described { image_to_image: false, inpainting: false, ..described })
}

fn clip_and_unet(
    folder: &Folder<'_>,
    description: &'static str,
    steps: u32,
    guidance: f32,
) -> Result<Described, Error> {
    folder.wants(&[
        ("text_encoder", &["CLIPTextModel"]),
        ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("unet", &["UNet2DConditionModel"]),
        ("vae", &["AutoencoderKL"]),
        ("scheduler", SCHEDULERS),
    ])?;
    let tokens = folder.longest("tokenizer")?;
    let brain = json!({
        "encoders": [{ "kind": "clip", "folder": "text_encoder", "tokenizer": "tokenizer", "projected": false, "max_tokens": tokens }],
        "text": [[{ "encoder": 0, "layer": "last" }]],
        "pooled": [],
        "layers": "clip@last",
        "empty_negative": "text",
    });
    unet_pipeline(folder, description, steps, guidance, brain, tokens)
}

fn stable_diffusion_xl(folder: &Folder<'_>) -> Result<Described, Error> {
    folder.wants(&[
        ("text_encoder", &["CLIPTextModel"]),
        ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("text_encoder_2", &["CLIPTextModelWithProjection"]),
        ("tokenizer_2", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("unet", &["UNet2DConditionModel"]),
        ("vae", &["AutoencoderKL"]),
        ("scheduler", SCHEDULERS),
    ])?;
    let tokens = folder.longest("tokenizer")?.min(folder.longest("tokenizer_2")?);
    let zeros = folder.index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(true);
    let clip = |folder: &str, tokenizer: &str, projected: bool| json!({ "kind": "clip", "folder": folder, "tokenizer": tokenizer, "projected": projected, "max_tokens": tokens });
    let brain = json!({
        "encoders": [clip("text_encoder", "tokenizer", false), clip("text_encoder_2", "tokenizer_2", true)],
        "text": [[{ "encoder": 0, "layer": "penultimate" }, { "encoder": 1, "layer": "penultimate" }]],
        "pooled": [1],
        "layers": "clip@-2+clip@-2",
        "empty_negative": if zeros { "zeros" } else { "text" },
    });
    unet_pipeline(folder, "Stable Diffusion XL", 50, 5.0, brain, tokens)
}

/// Cells of a latent along a side that the pipelines of transformers draw unless told otherwise.
const USUAL_CELLS: u32 = 128;
/// Cells of a patch along each side, in the same.
const PATCH: u32 = 2;
/// Most tokens that T5 reads of a text for FLUX.1.
const FLUX_TOKENS: u32 = 512;

fn flux(folder: &Folder<'_>) -> Result<Described, Error> {
    folder.wants(&[
        ("text_encoder", &["CLIPTextModel"]),
        ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("text_encoder_2", &["T5EncoderModel"]),
        ("tokenizer_2", &["T5Tokenizer", "T5TokenizerFast"]),
        ("transformer", &["FluxTransformer2DModel"]),
        ("vae", &["AutoencoderKL"]),
        ("scheduler", &["FlowMatchEulerDiscreteScheduler"]),
    ])?;
    let (transformer, vae) = (folder.config("transformer")?, folder.config("vae")?);
    // Trained to be told the strength of guidance (dev), or to do without in few steps (schnell).
    let guided = transformer.get("guidance_embeds").and_then(Value::as_bool).unwrap_or(false);
    let cell = latent_cell(&vae);
    Ok(Described {
        description: if guided { "FLUX.1, told the strength of guidance" } else { "FLUX.1 in few steps" },
        brain: "text_encoders",
        brain_config: json!({
            "encoders": [
                { "kind": "clip", "folder": "text_encoder", "tokenizer": "tokenizer", "max_tokens": folder.longest("tokenizer")?, "cut": true },
                { "kind": "t5", "folder": "text_encoder_2", "tokenizer": "tokenizer_2", "max_tokens": FLUX_TOKENS },
            ],
            "text": [[{ "encoder": 1, "layer": "last" }]],
            "pooled": [0],
            "layers": "t5@last",
            "empty_negative": "nothing",
        }),
        hand: "flux",
        hand_config: json!({ "layers": "t5@last", "width": size_of(&transformer, "joint_attention_dim", 4096) }),
        steps: if guided { 28 } else { 4 },
        guidance: if guided { 3.5 } else { 0.0 },
        size: (USUAL_CELLS * cell, USUAL_CELLS * cell),
        multiple: cell * PATCH,
        longest: None,
        samplers: folder.scheduler()?.samplers(),
        max_prompt_tokens: FLUX_TOKENS,
        negative_prompt: false,
        image_to_image: true,
        inpainting: true,
        inpainting_only: false,
        guidance_rescale: false,
    })
}

/// Most tokens that T5 reads of a text for Stable Diffusion 3.
const SD3_TOKENS: u32 = 256;

fn stable_diffusion_3(folder: &Folder<'_>) -> Result<Described, Error> {
    let mut wanted: Vec<(&str, &[&str])> = vec![
        ("text_encoder", &["CLIPTextModelWithProjection"]),
        ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("text_encoder_2", &["CLIPTextModelWithProjection"]),
        ("tokenizer_2", &["CLIPTokenizer", "CLIPTokenizerFast"]),
        ("transformer", &["SD3Transformer2DModel"]),
        ("vae", &["AutoencoderKL"]),
        ("scheduler", &["FlowMatchEulerDiscreteScheduler"]),
    ];
    // T5 may be left out to save memory: zeros stand for its states.
    let t5 = folder.parts().any(|(name, _)| name == "text_encoder_3");
    if t5 {
        wanted.extend::<[(&str, &[&str]); 2]>([
            ("text_encoder_3", &["T5EncoderModel"]),
            ("tokenizer_3", &["T5Tokenizer", "T5TokenizerFast"]),
        ]);
    }
    folder.wants(&wanted)?;
    let (transformer, vae) = (folder.config("transformer")?, folder.config("vae")?);
    let number = |field: &str, usual: u32| size_of(&transformer, field, usual);
    let (cell, patch) = (latent_cell(&vae), number("patch_size", 2));
    let side = number("sample_size", USUAL_CELLS).saturating_mul(cell);
    let tokens = folder.longest("tokenizer")?;
    let clip = |part: &str, tokenizer: &str| json!({ "kind": "clip", "folder": part, "tokenizer": tokenizer, "projected": true, "max_tokens": tokens, "cut": t5 });
    let mut encoders = vec![clip("text_encoder", "tokenizer"), clip("text_encoder_2", "tokenizer_2")];
    let mut text = vec![json!([{ "encoder": 0, "layer": "penultimate" }, { "encoder": 1, "layer": "penultimate" }])];
    let mut zeros = Value::Null;
    if t5 {
        encoders.push(
            json!({ "kind": "t5", "folder": "text_encoder_3", "tokenizer": "tokenizer_3", "max_tokens": SD3_TOKENS }),
        );
        text.push(json!([{ "encoder": 2, "layer": "last" }]));
    } else {
        zeros = json!([SD3_TOKENS, number("joint_attention_dim", 4096)]);
    }
    let layers = if t5 { "clip@-2+clip@-2,t5@last" } else { "clip@-2+clip@-2,zeros" };
    Ok(Described {
        description: "Stable Diffusion 3",
        brain: "text_encoders",
        brain_config: json!({
            "encoders": encoders,
            "text": text,
            "zeros": zeros,
            "pooled": [0, 1],
            "layers": layers,
            "empty_negative": "text",
        }),
        hand: "stable_diffusion_3",
        hand_config: json!({ "layers": layers, "width": number("joint_attention_dim", 4096) }),
        steps: 28,
        guidance: 7.0,
        size: (side, side),
        multiple: cell.saturating_mul(patch),
        longest: Some(number("pos_embed_max_size", 96).saturating_mul(patch).saturating_mul(cell)),
        samplers: folder.scheduler()?.samplers(),
        max_prompt_tokens: if t5 { SD3_TOKENS } else { u32::try_from(tokens).unwrap_or(u32::MAX) },
        negative_prompt: true,
        image_to_image: true,
        inpainting: true,
        inpainting_only: false,
        guidance_rescale: false,
    })
}

/// Most tokens of a text for Z-Image, its template included.
const Z_IMAGE_TOKENS: u32 = 512;

fn z_image(folder: &Folder<'_>) -> Result<Described, Error> {
    folder.wants(&[
        ("text_encoder", &["Qwen3Model", "Qwen3ForCausalLM"]),
        ("tokenizer", &["Qwen2Tokenizer", "Qwen2TokenizerFast"]),
        ("transformer", &["ZImageTransformer2DModel"]),
        ("vae", &["AutoencoderKL"]),
        ("scheduler", &["FlowMatchEulerDiscreteScheduler"]),
    ])?;
    let cell = latent_cell(&folder.config("vae")?);
    let transformer = folder.config("transformer")?;
    let places = |axis: usize| transformer.get("axes_lens")?.get(axis)?.as_u64()?.try_into().ok();
    let longest = [1, 2].map(|axis| places(axis).unwrap_or(u32::MAX)).into_iter().min();
    Ok(Described {
        description: "Z-Image",
        brain: "text_encoders",
        brain_config: json!({
            "encoders": [{
                "kind": "decoder", "folder": "text_encoder", "tokenizer": "tokenizer", "max_tokens": Z_IMAGE_TOKENS,
                "template": ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"],
            }],
            "text": [[{ "encoder": 0, "layer": "penultimate" }]],
            "pooled": [],
            "layers": "qwen3@-2",
            "empty_negative": "text",
        }),
        hand: "z_image",
        hand_config: json!({ "layers": "qwen3@-2", "width": size_of(&transformer, "cap_feat_dim", 2560) }),
        steps: 50,
        guidance: 5.0,
        size: (USUAL_CELLS * cell, USUAL_CELLS * cell),
        multiple: cell * PATCH,
        longest: longest.map(|places: u32| places.saturating_mul(PATCH).saturating_mul(cell)),
        samplers: folder.scheduler()?.samplers(),
        max_prompt_tokens: Z_IMAGE_TOKENS,
        negative_prompt: true,
        image_to_image: true,
        inpainting: true,
        inpainting_only: false,
        guidance_rescale: false,
    })
}

/// Most tokens of a text for Sana.
const SANA_TOKENS: u32 = 300;
/// What Sana was trained to read in front of each prompt. Part of the model: NVlabs' Sana and diffusers' `SanaPipeline` (Apache-2.0) pass it word for word.
const SANA_INSTRUCTION: &str = include_str!("sana_instruction.txt");

fn sana(folder: &Folder<'_>) -> Result<Described, Error> {
    sana_of(folder, &["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"], false)
}

fn sana_sprint(folder: &Folder<'_>) -> Result<Described, Error> {
    sana_of(folder, &["SCMScheduler"], true)
}

/// `sprint`: distilled into few steps, and told the strength of guidance.
fn sana_of(folder: &Folder<'_>, schedulers: &[&str], sprint: bool) -> Result<Described, Error> {
    folder.wants(&[
        ("text_encoder", &["Gemma2Model", "Gemma2ForCausalLM"]),
        ("tokenizer", &["GemmaTokenizer", "GemmaTokenizerFast"]),
        ("transformer", &["SanaTransformer2DModel"]),
        ("vae", &["AutoencoderDC"]),
        ("scheduler", schedulers),
    ])?;
    let (transformer, vae) = (folder.config("transformer")?, folder.config("vae")?);
    if transformer.get("guidance_embeds").and_then(Value::as_bool).unwrap_or(false) != sprint {
        return Err(folder.malformed("SanaSprintPipeline, and no other, has a transformer with guidance_embeds"));
    }
    let levels = vae.get("encoder_block_out_channels").and_then(Value::as_array).map_or(6, Vec::len);
    let cell = 1 << levels.clamp(1, 8).saturating_sub(1);
    let side = size_of(&transformer, "sample_size", 32).saturating_mul(cell);
    Ok(Described {
        description: if sprint { "Sana-Sprint, in few steps" } else { "Sana" },
        brain: "text_encoders",
        brain_config: json!({
            "encoders": [{
                "kind": "decoder", "folder": "text_encoder", "tokenizer": "tokenizer", "max_tokens": SANA_TOKENS,
                "instruction": SANA_INSTRUCTION, "lower_case": true,
            }],
            "text": [[{ "encoder": 0, "layer": "last" }]],
            "pooled": [],
            "layers": "gemma2@last",
            "empty_negative": if sprint { "nothing" } else { "text" },
        }),
        hand: "sana",
        hand_config: json!({ "layers": "gemma2@last", "width": size_of(&transformer, "caption_channels", 2304) }),
        steps: if sprint { 2 } else { 20 },
        guidance: 4.5,
        size: (side, side),
        multiple: cell.saturating_mul(size_of(&transformer, "patch_size", 1)),
        longest: None,
        samplers: folder.scheduler()?.samplers(),
        max_prompt_tokens: SANA_TOKENS,
        negative_prompt: !sprint,
        image_to_image: sprint,
        inpainting: false,
        inpainting_only: false,
        guidance_rescale: false,
    })
}
