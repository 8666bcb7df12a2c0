//! Checkpoints of `tests/checkpoints`, and comparison with what diffusers computed with them.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use efferent_brain::families as brains;
use efferent_hand::{families as hands, pictures};
use efferent_proto::{
    internal::{Branch, StreamRole},
    v1::Size,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, Hand, Reference, RenderRequest},
    pictures::File,
    pipeline::Pipeline,
    signal,
    weights::Dtypes,
};
use image::{ImageFormat, RgbImage};

/// Prompts of the golden tensors.
pub const PROMPTS: [&str; 3] = [
    "a red apple",
    "Two cats, 3 dögs & an owl's nest — 苹果!  (8k)",
    "the quick brown fox jumps over the lazy dog while it's raining and we've 42 reasons to stay at home tonight",
];
/// And what they are to keep out.
pub const NEGATIVE: &str = "blurry, low quality";
/// Largest difference of a joint, relative to the largest value of it, or to 1.
pub const TOLERANCE: f32 = 1e-4;

/// Where a checkpoint is.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints").join(name)
}

/// Where models compute: on the CPU, or what `EFFERENT_TEST_DEVICE` says (`cuda:0`, `metal:0`), of a build with that feature.
pub fn device() -> Device {
    let Ok(name) = std::env::var("EFFERENT_TEST_DEVICE") else { return Device::Cpu };
    match name.split_once(':').map(|(kind, number)| (kind, number.parse())) {
        Some(("cuda", Ok(number))) => Device::new_cuda(number).expect("is there"),
        Some(("metal", Ok(number))) => Device::new_metal(number).expect("is there"),
        _ => panic!("EFFERENT_TEST_DEVICE is {name:?}; cuda:0 and metal:0 are such devices"),
    }
}

/// A checkpoint with its engines.
pub fn open(name: &str) -> (Pipeline, Box<dyn Brain>, Box<dyn Hand>) {
    let pipeline = Pipeline::open(&folder(name)).expect("is there");
    let (brain, hand) = kept_as(&pipeline, "auto").expect("is there");
    (pipeline, brain, hand)
}

/// A brain and a hand of one pipeline.
pub type Engines = (Box<dyn Brain>, Box<dyn Hand>);

/// The engines of a pipeline, whose weights are kept as `dtypes` says.
///
/// # Errors
/// If an engine is not to be had so.
pub fn kept_as(pipeline: &Pipeline, dtypes: &str) -> Result<Engines, EngineError> {
    let dtypes: Dtypes = dtypes.parse().expect("is well written");
    let brain = brains::factory(pipeline, Path::new("/nowhere"), vec![device()], dtypes.clone())()?;
    Ok((brain, hands::factory(pipeline, hands::Setup { dtypes, ..device().into() })()?))
}

/// The engines of a checkpoint on two devices: layers of language models shared out, the branch without the prompt apart. On CPU both are the same processor.
pub fn open_on_two(name: &str) -> Engines {
    let pipeline = Pipeline::open(&folder(name)).expect("is there");
    let brain = brains::factory(&pipeline, Path::new("/nowhere"), vec![device(), device()], Dtypes::default())()
        .expect("is there");
    let setup = hands::Setup { second: Some(device()), ..device().into() };
    (brain, hands::factory(&pipeline, setup)().expect("is there"))
}

/// What diffusers computed.
#[derive(Debug)]
pub struct Golden(std::collections::HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Golden {
    /// What diffusers computed with a checkpoint.
    pub fn open(name: &str) -> Self {
        Self::read(name, "golden.safetensors")
    }

    /// From a file of the checkpoint.
    pub fn read(name: &str, file: &str) -> Self {
        let bytes = std::fs::read(folder(name).join(file)).expect("is there");
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("is there");
        let values = |tensor: Tensor| {
            (tensor.dims().to_vec(), tensor.flatten_all().expect("is there").to_vec1().expect("is there"))
        };
        Self(tensors.into_iter().map(|(key, tensor)| (key, values(tensor))).collect())
    }

    /// A tensor.
    pub fn values(&self, key: &str) -> &[f32] {
        &self.0.get(key).unwrap_or_else(|| panic!("no {key}")).1
    }

    /// Whether there is such a tensor.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Pixels of a picture.
    pub fn size(&self, key: &str) -> Size {
        let dims = &self.0.get(key).unwrap_or_else(|| panic!("no {key}")).0;
        Size { width: dims[1] as u32, height: dims[0] as u32 }
    }
}

/// Largest difference, relative to the largest value, or to 1.
pub fn difference(got: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(got.len(), wanted.len(), "another number of values");
    let largest = wanted.iter().fold(1f32, |most, value| most.max(value.abs()));
    got.iter().zip(wanted).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max) / largest
}

/// Largest difference of two pictures, of 255.
pub fn steps_apart(got: &RgbImage, wanted: &[f32]) -> f32 {
    assert_eq!(got.as_raw().len(), wanted.len());
    got.as_raw().iter().zip(wanted).map(|(g, w)| (f32::from(*g) - w).abs()).fold(0.0, f32::max)
}

/// What a brain makes of a prompt.
pub fn embed(brain: &mut dyn Brain, prompt: &str, negative: &str) -> Arc<signal::ControlSignal> {
    let request =
        EmbedRequest { prompt: prompt.to_owned(), negative_prompt: negative.to_owned(), ..Default::default() };
    Arc::new(brain.embed(&[request]).remove(0).expect("is there"))
}

/// A prompt with pictures before it.
pub fn read_with(prompt: &str, negative: &str, pictures: &[RgbImage]) -> EmbedRequest {
    let reference = |image: &RgbImage| {
        Arc::new(Reference { hash: blake3::hash(image.as_raw()).to_hex().to_string(), image: image.clone() })
    };
    EmbedRequest {
        prompt: prompt.to_owned(),
        negative_prompt: negative.to_owned(),
        references: pictures.iter().map(reference).collect(),
    }
}

const REFERENCES: &str = "references.safetensors";

/// The pictures that a checkpoint's goldens read.
pub fn references(name: &str) -> Vec<RgbImage> {
    let golden = Golden::read(name, REFERENCES);
    let picture = |key: &str| {
        let (size, values) = (golden.size(key), golden.values(key));
        let bytes = values.iter().map(|value| *value as u8).collect();
        RgbImage::from_raw(size.width, size.height, bytes).expect("is there")
    };
    vec![picture("picture.0"), picture("picture.1")]
}

/// What a brain reads of pictures, and how a hand is guided by them, compared with MetaQuery's way; nothing if the checkpoint has no such goldens.
pub fn referenced(name: &str, brain: &mut dyn Brain, hand: &mut dyn Hand) -> Option<Errors> {
    folder(name).join(REFERENCES).exists().then_some(())?;
    let (golden, pictures) = (Golden::read(name, REFERENCES), references(name));
    let mut errors = Errors::default();
    for (key, count, prompt, negative, image_guidance_scale) in [
        ("one", 1, PROMPTS[0], "", 1.5),
        ("two", 2, PROMPTS[2], NEGATIVE, 2.5),
        // Not above 1: the pictures are read on both branches, and do not guide.
        ("plain", 2, PROMPTS[1], "", 1.0),
    ] {
        let signal = brain.embed(&[read_with(prompt, negative, &pictures[..count])]).remove(0).expect("is there");
        let branches =
            [(Branch::Conditional, "full"), (Branch::ImageConditional, "seen"), (Branch::Unconditional, "nothing")];
        for (branch, part) in branches {
            let stream = signal::find(&signal, StreamRole::Query, branch).expect("is there");
            let states = signal::tensor(stream, &Device::Cpu).expect("is there").flatten_all().expect("is there");
            let states = states.to_vec1::<f32>().expect("is there");
            let error = difference(&states, golden.values(&format!("{key}.{part}")));
            assert!(error <= TOLERANCE, "{name}: {key}.{part} differs by {error}");
            errors.states = errors.states.max(error);
        }
        let render = RenderRequest {
            signal: Arc::new(signal),
            size: golden.size(&format!("{key}.image")),
            steps: 4,
            guidance_scale: 4.5,
            image_guidance_scale,
            guidance_rescale: 0.0,
            guidance_range: 0.0..1.0,
            seed: 50,
            sampler: hand.spec().model.samplers[0].clone(),
            picture: None,
        };
        compare(hand, &golden, key, &render, &mut errors);
    }
    Some(errors)
}

/// Largest errors of a checkpoint, by joint.
#[derive(Debug, Default)]
pub struct Errors {
    /// Of states of a text.
    pub states: f32,
    /// Of pooled vectors.
    pub pooled: f32,
    /// Of latents between steps.
    pub latents: f32,
    /// Of pictures, of 255.
    pub image: f32,
}

/// Renders as diffusers did and compares every latent between steps, and the picture.
pub fn compare(hand: &mut dyn Hand, golden: &Golden, key: &str, request: &RenderRequest, errors: &mut Errors) {
    let wanted = golden.values(&format!("{key}.latents"));
    let mut sample = hand.begin(request).expect("is there");
    let count = (hand.checkpoint(&sample).expect("is there").len() - 12) / 4;
    let evaluations = wanted.len() / count;
    // A sampler whose first step asks twice has one latent more than steps; Heun's has two for each but the last.
    let steps = sample.steps as usize;
    let at = |step: usize| {
        if request.sampler == "heun" { (2 * step + 1).min(evaluations - 1) } else { step + evaluations - steps }
    };
    for step in 0..steps {
        hand.step(&mut [&mut sample]).remove(0).expect("is there");
        let checkpoint = hand.checkpoint(&sample).expect("is there");
        let latent: Vec<f32> =
            checkpoint[12..12 + 4 * count].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let from = at(step) * count;
        let error = difference(&latent, &wanted[from..from + count]);
        assert!(error <= TOLERANCE, "{key}: the latent after step {} differs by {error}", step + 1);
        errors.latents = errors.latents.max(error);
    }
    hand.preview(&sample).expect("is there");
    let picture = hand.finish(sample).expect("is there");
    let apart = steps_apart(&picture, golden.values(&format!("{key}.image")));
    assert!(apart <= 1.0, "{key}: the picture differs by {apart}/255");
    errors.image = errors.image.max(apart);
}

/// What a hand does that begins with a picture or changes a part of one, compared with diffusers; nothing if the checkpoint has no such goldens.
pub fn begun(name: &str, brain: &mut dyn Brain, hand: &mut dyn Hand) -> Option<Errors> {
    folder(name).join("pictures.safetensors").exists().then_some(())?;
    let golden = Golden::read(name, "pictures.safetensors");
    let (mut errors, size) = (Errors::default(), golden.size("init"));
    let file = |key: &str| {
        let bytes = golden.values(key).iter().map(|value| *value as u8).collect();
        let picture = RgbImage::from_raw(size.width, size.height, bytes).expect("is there");
        let mut file = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut file, ImageFormat::Png).expect("is there");
        file.into_inner()
    };
    let (image, mask) = (file("init"), file("mask"));
    let (image, mask) = (File { field: "init_image", bytes: &image }, File { field: "mask", bytes: &mask });
    let usual = brain.spec().model.samplers[0].clone();
    let mut keys: Vec<&str> = golden.0.keys().filter_map(|key| key.strip_suffix(".latents")).collect();
    keys.sort_unstable();
    for key in keys {
        let (kind, how) = key.split_once('.').expect("is there");
        let (strength, sampler) = how.parse().map_or((0.6, how.to_owned()), |strength: f64| (strength, usual.clone()));
        let mask = (kind == "partly").then_some(mask);
        let request = RenderRequest {
            signal: embed(brain, PROMPTS[0], ""),
            size,
            steps: 5,
            guidance_scale: if name.starts_with("flux") { 3.5 } else { 4.0 },
            seed: 60,
            sampler,
            image_guidance_scale: 1.0,
            guidance_range: 0.0..if kind == "ranged" { strength as f32 } else { 1.0 },
            guidance_rescale: if kind == "rescaled" { strength as f32 } else { 0.0 },
            picture: matches!(kind, "begun" | "partly")
                .then(|| Arc::new(pictures::picture(image, mask, size, strength).expect("is there"))),
        };
        compare(hand, &golden, key, &request, &mut errors);
    }
    Some(errors)
}

/// A copy of a checkpoint.
pub fn copied(name: &str) -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).expect("is there");
        for entry in std::fs::read_dir(from).expect("is there") {
            let path = entry.expect("is there").path();
            let target = to.join(path.file_name().expect("is there"));
            match path.is_dir() {
                true => copy(&path, &target),
                false => assert!(std::fs::copy(&path, &target).is_ok()),
            }
        }
    }
    let root = tempfile::tempdir().expect("is there");
    copy(&folder(name), root.path());
    root
}

/// Copies a checkpoint, changes it, and tells why it cannot be used.
pub fn damaged(name: &str, change: impl FnOnce(&Path)) -> String {
    let root = copied(name);
    change(root.path());
    let pipeline = match Pipeline::open(root.path()) {
        Ok(pipeline) => pipeline,
        Err(error) => return error.to_string(),
    };
    let told = |error: EngineError| {
        let mut text = error.to_string();
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(error) = cause {
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        text
    };
    let brain =
        brains::factory(&pipeline, Path::new("/nowhere"), vec![Device::Cpu], Dtypes::default())().err().map(told);
    let hand = hands::factory(&pipeline, Device::Cpu)().err().map(told);
    [brain, hand].into_iter().flatten().collect::<Vec<_>>().join("\n")
}

/// Stores the matrices of all parts of a folder in this type, as published checkpoints have them.
pub fn to_dtype(root: &Path, dtype: DType) {
    for part in std::fs::read_dir(root).expect("is there") {
        let part = part.expect("is there").path();
        let files = part.is_dir().then(|| std::fs::read_dir(&part).expect("is there")).into_iter().flatten();
        for path in files.map(|file| file.expect("is there").path()) {
            if path.extension().is_none_or(|kind| kind != "safetensors") {
                continue;
            }
            let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).expect("is there");
            for tensor in tensors.values_mut().filter(|tensor| tensor.rank() > 1) {
                *tensor = tensor.to_dtype(dtype).expect("is there");
            }
            candle_core::safetensors::save(&tensors, &path).expect("is there");
        }
    }
}

/// Writes the language model of a folder as one file of GGUF, as its converter does, in place of its safetensors.
pub fn to_gguf(folder: &Path, architecture: &str) {
    const NAMES: [(&str, &str); 13] = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
    ];
    let gemma = architecture == "gemma2";
    let path = folder.join("model.safetensors");
    let name = |name: &str| {
        let name = name.trim_start_matches("model.");
        let Some(rest) = name.strip_prefix("layers.") else {
            let known = [("embed_tokens.weight", "token_embd.weight"), ("norm.weight", "output_norm.weight")];
            return known.into_iter().find(|(old, _)| *old == name).map(|(_, new)| new.to_owned());
        };
        let (layer, part) = rest.split_once('.')?;
        let (part, kind) = part.rsplit_once('.')?;
        let (_, new) = NAMES.into_iter().find(|(old, _)| *old == part)?;
        // Without norms of what comes out, the norm before the MLP has that name.
        let new = if new == "post_attention_norm" && !gemma { "ffn_norm" } else { new };
        Some(format!("blk.{layer}.{new}.{kind}"))
    };
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).expect("is there");
    let tensors: Vec<(String, QTensor)> = tensors
        .iter()
        .filter_map(|(old, tensor)| {
            let new = name(old)?;
            let tensor =
                if gemma && new.ends_with("norm.weight") { (tensor + 1.0).expect("is there") } else { tensor.clone() };
            Some((new, QTensor::quantize(&tensor, GgmlDType::F32).expect("is there")))
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let architecture = gguf_file::Value::String(architecture.to_owned());
    let mut file = std::fs::File::create(folder.join("weights.gguf")).expect("is there");
    gguf_file::write(&mut file, &[("general.architecture", &architecture)], &tensors).expect("is there");
    std::fs::remove_file(path).expect("is there");
}
