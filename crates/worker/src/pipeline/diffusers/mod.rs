//! A folder as diffusers saves a pipeline: `model_index.json`, and a folder for each part with its configuration and weights.
//!
//! The pipeline's class says which families run it ([`classes`]); everything else is read from the parts' configurations. The weights may be one file or
//! shards with an index, whole or a variant of half the size (`fp16`, `bf16`).

mod classes;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value};

use self::classes::{CLASSES, Described};
use super::{BrainPart, Error, MAX_INDEX, Manifest, Offers, Part, Range, read_json, read_json_of, scheduler, short};

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
        image_to_image: described.image_to_image,
        inpainting: described.inpainting,
        guidance_rescale: described.guidance_rescale,
        // Where the strength of guidance is a number that the network is told, there is nothing to leave out.
        guidance_range: described.negative_prompt,
        inpainting_only: described.inpainting_only,
        max_reference_images: 0,
        default_image_guidance_scale: 0.0,
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
            folders: Vec::new(),
            config: described.brain_config,
        },
        connector: None,
        hand: Part {
            family: described.hand.to_owned(),
            name: model,
            weights: None,
            folders: Vec::new(),
            config: described.hand_config,
        },
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

/// The class of a part's folder, from its configuration; none of a folder without one, such as a tokenizer's.
pub(super) fn class(part: &Path) -> Option<String> {
    let config: Map<String, Value> = read_json(&part.join("config.json")).ok()?;
    let class = config.get("_class_name").or_else(|| config.get("architectures")?.get(0))?;
    class.as_str().map(str::to_owned)
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

/// What a variant is called that is one GGUF file.
pub const GGUF: &str = "gguf";

/// The safetensors files of a part, and the variant that they are (empty for the whole). The whole is preferred; where there are none, a single GGUF file counts, of whatever name.
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
                let shards: Shards = read_json_of(&index, MAX_INDEX)?;
                let files: BTreeSet<String> = shards.weight_map.into_values().collect();
                if let Some(file) = files.iter().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
                    return Err(Error::Malformed { path: index, what: format!("{file:?} is not a plain file name") });
                }
                return Ok((files.iter().map(|file| part.join(file)).collect(), variant));
            }
            looked.push(whole);
        }
    }
    let entries = std::fs::read_dir(part).into_iter().flatten().flatten().map(|entry| entry.path());
    let gguf: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|kind| kind == GGUF)).collect();
    if gguf.len() == 1 {
        return Ok((gguf, GGUF));
    }
    let names: Vec<_> = looked.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    Err(Error::Malformed {
        path: part.to_owned(),
        what: format!("no weights; looked for {}, their shards, and one file of GGUF", names.join(", ")),
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
    let parts: Vec<String> =
        folder.parts().map(|(part, _)| part.to_owned()).filter(|part| !UNUSED.contains(&&**part)).collect();
    fingerprint_of_files(folder.path, vec![folder.path.join(INDEX)], &parts)
}

/// The same for some folders of a model folder.
pub(super) fn fingerprint_of(path: &Path, parts: &[String]) -> Result<String, Error> {
    fingerprint_of_files(path, Vec::new(), parts)
}

fn fingerprint_of_files(root: &Path, mut files: Vec<PathBuf>, parts: &[String]) -> Result<String, Error> {
    for part in parts {
        let part = root.join(part);
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
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
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
