//! A folder as diffusers saves a pipeline: `model_index.json`, and a folder for each part with its configuration and weights.
//!
//! The pipeline's class says which families run it ([`CLASSES`]); everything else is read from the parts' configurations. The weights may be one file or
//! shards with an index, whole or a variant of half the size (`fp16`, `bf16`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{BrainPart, Error, Manifest, Offers, Part, Range, read_json, scheduler, short};

/// The file that makes a folder one of diffusers.
pub const INDEX: &str = "model_index.json";
/// Variants of weights, in the order in which they are looked for; the first is the whole.
const VARIANTS: [&str; 3] = ["", "fp16", "bf16"];
/// Most images of a request.
const MAX_IMAGES: u32 = 16;
/// Most steps of a request.
const MAX_STEPS: u32 = 150;
/// Strongest guidance.
const MAX_GUIDANCE: f32 = 30.0;
/// How much longer than the usual side of a picture its longest may be.
const LONGEST: u32 = 4;

/// What a pipeline's class says.
struct Class {
    name: &'static str,
    describe: fn(&Folder<'_>) -> Result<Described, Error>,
}

/// Every class that is known.
const CLASSES: [Class; 5] = [
    Class { name: "FluxPipeline", describe: flux },
    Class { name: "StableDiffusion3Pipeline", describe: stable_diffusion_3 },
    Class { name: "StableDiffusionPipeline", describe: stable_diffusion },
    Class { name: "StableDiffusionXLPipeline", describe: stable_diffusion_xl },
    Class { name: "ZImagePipeline", describe: z_image },
];

/// What is served of a pipeline.
struct Described {
    description: &'static str,
    brain: &'static str,
    brain_config: Value,
    hand: &'static str,
    hand_config: Value,
    steps: u32,
    guidance: f32,
    /// Usual size, width and height.
    size: (u32, u32),
    /// Pixels that a side must be a multiple of.
    multiple: u32,
    /// Longest side, if the network knows no longer one.
    longest: Option<u32>,
    samplers: Vec<scheduler::Sampler>,
    max_prompt_tokens: u32,
    negative_prompt: bool,
}

/// A pipeline's folder.
struct Folder<'a> {
    path: &'a Path,
    index: Map<String, Value>,
}

impl Folder<'_> {
    fn malformed(&self, what: impl Into<String>) -> Error {
        Error::Malformed { path: self.path.join(INDEX), what: what.into() }
    }

    /// The class of each part that is there.
    fn parts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.index.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_array()?.get(1)?.as_str()?)))
    }

    /// Refuses a pipeline without a part, or with another class of it.
    fn wants(&self, wanted: &[(&str, &[&str])]) -> Result<(), Error> {
        for (part, classes) in wanted {
            match self.parts().find(|(name, _)| name == part) {
                Some((_, class)) if classes.contains(&class) => {}
                Some((_, class)) => {
                    return Err(self.malformed(format!("{part} is a {class}; this family runs {}", classes.join(", "))));
                }
                None => return Err(self.malformed(format!("there is no {part}"))),
            }
        }
        let known = |name: &str| wanted.iter().any(|(part, _)| *part == name) || UNUSED.contains(&name);
        match self.parts().find(|(name, _)| !known(name)) {
            Some((name, class)) => Err(self.malformed(format!("{name} ({class}) is not known"))),
            None => Ok(()),
        }
    }

    fn config(&self, part: &str) -> Result<Map<String, Value>, Error> {
        read_json(&self.path.join(part).join("config.json"))
    }

    fn scheduler(&self) -> Result<scheduler::Config, Error> {
        read_json(&self.path.join("scheduler").join("scheduler_config.json"))
    }

    /// Most tokens of a text for a tokenizer.
    fn longest(&self, tokenizer: &str) -> Result<u64, Error> {
        let config: Map<String, Value> = read_json(&self.path.join(tokenizer).join("tokenizer_config.json"))?;
        // Tokenizers without a limit have one of 10^30.
        Ok(config.get("model_max_length").and_then(Value::as_u64).filter(|most| *most < 100_000).unwrap_or(77))
    }
}

/// Parts that change nothing of a picture here: what they check is not checked.
const UNUSED: [&str; 3] = ["safety_checker", "feature_extractor", "image_encoder"];

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
    let levels = vae.get("block_out_channels").and_then(Value::as_array).map_or(4, Vec::len);
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
    brain: Value,
    tokens: u64,
) -> Result<Described, Error> {
    let (unet, vae, scheduler) = (folder.config("unet")?, folder.config("vae")?, folder.scheduler()?);
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
        negative_prompt: true,
    })
}

fn stable_diffusion(folder: &Folder<'_>) -> Result<Described, Error> {
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
    unet_pipeline(folder, "Stable Diffusion", 50, 7.5, brain, tokens)
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
    })
}

/// The manifest that a folder amounts to, and a hash of what is in it.
pub(super) fn read(path: &Path) -> Result<(Manifest, String), Error> {
    let index: Map<String, Value> = read_json(&path.join(INDEX))?;
    let folder = Folder { path, index };
    let name = folder.index.get("_class_name").and_then(Value::as_str).unwrap_or_default();
    let known = || CLASSES.iter().map(|class| class.name).collect::<Vec<_>>().join(", ");
    let class = CLASSES
        .iter()
        .find(|class| class.name == name)
        .ok_or_else(|| folder.malformed(format!("_class_name is {name:?}; this program runs {}", known())))?;
    let described = (class.describe)(&folder)?;
    let Described { size: (width, height), multiple, samplers, .. } = described;
    let longest = width.max(height).saturating_mul(LONGEST).min(described.longest.unwrap_or(u32::MAX));
    if width == 0 || height == 0 || longest > 16_384 {
        return Err(folder.malformed(format!("pictures of {width}x{height} pixels cannot be")));
    }
    let offers = Offers {
        sizes: vec![(width, height)],
        size_range: Some(Range {
            multiple,
            min_side: multiple,
            max_side: longest,
            max_pixels: u64::from(LONGEST) * u64::from(width) * u64::from(height),
        }),
        samplers: samplers.iter().map(|sampler| sampler.name().to_owned()).collect(),
        default_steps: described.steps,
        max_steps: MAX_STEPS,
        default_guidance_scale: described.guidance,
        max_guidance_scale: MAX_GUIDANCE,
        max_image_count: MAX_IMAGES,
        max_prompt_tokens: described.max_prompt_tokens,
        negative_prompt: described.negative_prompt,
    };
    let model = model_name(path);
    let manifest = Manifest {
        format: super::FORMAT,
        name: model.clone(),
        description: described.description.to_owned(),
        brain: BrainPart {
            family: described.brain.to_owned(),
            name: model.clone(),
            fetched: None,
            config: described.brain_config,
        },
        connector: None,
        hand: Part { family: described.hand.to_owned(), name: model, weights: None, config: described.hand_config },
        offers,
    };
    let hash = fingerprint(&folder)?;
    Ok((manifest, hash))
}

/// Every part that has weights, and its class.
///
/// # Errors
/// If the index cannot be read.
pub fn parts(path: &Path) -> Result<Vec<(String, String)>, Error> {
    let folder = Folder { path, index: read_json(&path.join(INDEX))? };
    let used = |name: &str| !UNUSED.contains(&name) && path.join(name).join("config.json").is_file();
    Ok(folder.parts().filter(|(name, _)| used(name)).map(|(name, class)| (name.to_owned(), class.to_owned())).collect())
}

/// A name from the folder's: its own, or that of the repository it is a snapshot of in a download cache.
fn model_name(path: &Path) -> String {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let names: Vec<String> = absolute.iter().rev().map(|name| name.to_string_lossy().into_owned()).collect();
    let name = match &*names {
        [_, snapshots, repository, ..] if snapshots == "snapshots" => {
            repository.rsplit("--").next().unwrap_or_default()
        }
        [name, ..] => name,
        [] => "",
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(plain).take(64).collect();
    if name.is_empty() { "model".to_owned() } else { name }
}

#[derive(Deserialize)]
struct Shards {
    weight_map: BTreeMap<String, String>,
}

/// The safetensors files of a part, and the variant that they are (empty for the whole). The whole is preferred.
///
/// # Errors
/// If there are none, or an index is malformed.
pub fn weights(part: &Path) -> Result<(Vec<PathBuf>, &'static str), Error> {
    let mut looked = Vec::new();
    for variant in VARIANTS {
        let dotted = if variant.is_empty() { String::new() } else { format!(".{variant}") };
        for stem in ["diffusion_pytorch_model", "model"] {
            let whole = part.join(format!("{stem}{dotted}.safetensors"));
            if whole.is_file() {
                return Ok((vec![whole], variant));
            }
            let index = part.join(format!("{stem}.safetensors.index{dotted}.json"));
            if index.is_file() {
                let files: BTreeSet<String> = read_json::<Shards>(&index)?.weight_map.into_values().collect();
                if let Some(file) = files.iter().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
                    return Err(Error::Malformed { path: index, what: format!("{file:?} is not a plain file name") });
                }
                return Ok((files.iter().map(|file| part.join(file)).collect(), variant));
            }
            looked.push(whole);
        }
    }
    let names: Vec<_> = looked.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    Err(Error::Malformed {
        path: part.to_owned(),
        what: format!("no weights; looked for {} and their shards", names.join(", ")),
    })
}

/// Files up to this many bytes are hashed whole.
const WHOLE: u64 = 4 << 20;
/// Of larger ones, the beginning (with the header, which names every tensor) and so many blocks, evenly spread.
const BLOCKS: u64 = 256;
const BLOCK: u64 = 4096;

/// Tells one folder from another that gives other pictures, in a fraction of the time that reading all weights takes: configurations and vocabularies whole,
/// weights by samples.
fn fingerprint(folder: &Folder<'_>) -> Result<String, Error> {
    let mut files = vec![folder.path.join(INDEX)];
    for (part, _) in folder.parts().filter(|(part, _)| !UNUSED.contains(part)) {
        let part = folder.path.join(part);
        let read = |source| Error::Read { path: part.clone(), source };
        for entry in std::fs::read_dir(&part).map_err(read)? {
            let path = entry.map_err(read)?.path();
            let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
            if ["json", "txt", "model"].contains(&kind) {
                files.push(path);
            }
        }
        if part.join("config.json").is_file() && !part.join("tokenizer_config.json").is_file() {
            files.extend(weights(&part)?.0);
        }
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let read = |source| Error::Read { path: path.clone(), source };
        let mut file = File::open(&path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let name = path.strip_prefix(folder.path).unwrap_or(&path).to_string_lossy().into_owned();
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(&length.to_le_bytes());
        if length <= WHOLE {
            std::io::copy(&mut file, &mut hasher).map_err(read)?;
            continue;
        }
        let mut take = |from: u64, count: u64| -> std::io::Result<()> {
            file.seek(SeekFrom::Start(from))?;
            std::io::copy(&mut file.by_ref().take(count), &mut hasher).map(drop)
        };
        take(0, WHOLE / 4).map_err(read)?;
        for block in 0..BLOCKS {
            take((length - BLOCK) / (BLOCKS - 1) * block, BLOCK).map_err(read)?;
        }
    }
    Ok(short(&hasher.finalize()))
}
