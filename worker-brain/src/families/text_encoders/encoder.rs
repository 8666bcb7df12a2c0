//! One encoder with its tokenizer.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::EngineError,
    nn::{
        clip::{self, Clip},
        decoder::Decoder,
        t5::{self, T5},
    },
    pipeline::{diffusers, read_json},
    weights::{Dtypes, Weights},
};
use serde::Deserialize;

use super::{super::unloadable, tokenizer::Tokenizer};
use crate::language;

/// An encoder of `brain.config`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What it is.
    pub kind: Kind,
    /// Its folder in the model folder.
    pub folder: String,
    /// Its tokenizer's.
    pub tokenizer: String,
    /// Whether its pooled vector is projected.
    #[serde(default)]
    pub projected: bool,
    /// Tokens of a text, the start, the end and the padding included: every text is padded to so many.
    pub max_tokens: usize,
    /// Whether a longer text is cut, because another encoder reads the whole; else it is refused.
    #[serde(default)]
    pub cut: bool,
    /// What is written before and after a text.
    #[serde(default)]
    pub template: (String, String),
    /// What is written before a prompt, and not before a negative one. Its tokens do not count, and of their states only the first and the last are kept.
    #[serde(default)]
    pub instruction: String,
    /// Whether texts are read in lower case, without spaces around them.
    #[serde(default)]
    pub lower_case: bool,
}

/// What a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// What is to be drawn.
    Prompt,
    /// What is not.
    Negative,
}

impl Use {
    /// The field of a request that it stands in.
    fn field(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Negative => "negative_prompt",
        }
    }
}

/// Encoders that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The text half of CLIP.
    Clip,
    /// T5's encoder. Padding is read as any other token.
    T5,
    /// A decoder language model. Texts are not padded: there are as many states as tokens.
    Decoder,
}

/// At which layer states are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// After the last, normed.
    Last,
    /// After the last but one, as they are.
    Penultimate,
}

/// An encoder.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    max_tokens: usize,
    cut: bool,
    template: (String, String),
    lower_case: bool,
    instruction: Instruction,
    network: Network,
}

/// What is written before prompts; empty for nothing.
#[derive(Debug)]
struct Instruction {
    text: String,
    /// Its tokens, with what the tokenizer adds.
    tokens: usize,
}

impl Instruction {
    fn new(text: &str, tokenizer: &Tokenizer) -> Result<Self, EngineError> {
        let tokens = match text.is_empty() {
            true => 0,
            false => tokenizer.encode(text).map_err(|e| EngineError::compute("cannot read an instruction", e))?.len(),
        };
        Ok(Self { text: text.to_owned(), tokens })
    }

    /// Tokens that a text may have more because of it: all but the first and the last, which are kept.
    fn room(&self, use_: Use) -> usize {
        if use_ == Use::Prompt { self.tokens.saturating_sub(2) } else { 0 }
    }
}

#[derive(Debug)]
enum Network {
    Clip(Clip),
    T5(T5),
    Decoder(Decoder),
}

impl Network {
    /// Reads configuration and weights of a folder. `largest`: the tokenizer's largest id.
    fn load(
        folder: &Path,
        config: &Config,
        largest: usize,
        devices: &[Device],
        dtypes: &Dtypes,
    ) -> Result<Self, EngineError> {
        let unloadable = unloadable(&config.folder);
        let path = folder.join("config.json");
        let open = || {
            let (files, _) = diffusers::weights(folder).map_err(|e| unloadable(e.into()))?;
            let keep = dtypes.of(&config.folder, &read_json(&path).map_err(|e| unloadable(e.into()))?)?;
            Weights::open_shards(&files, devices.first().unwrap_or(&Device::Cpu), keep)
                .map_err(|e| unloadable(e.into()))
        };
        let check = |known: usize| language::check_vocabulary(&config.folder, known, largest);
        let (network, weights) = match config.kind {
            Kind::Clip => {
                let clip: clip::Config = read_json(&path).map_err(|e| unloadable(e.into()))?;
                check(clip.vocabulary)?;
                if config.max_tokens > clip.positions {
                    let Config { folder, max_tokens, .. } = config;
                    let message = format!("{folder} reads up to {} tokens, not {max_tokens}", clip.positions);
                    return Err(ApiError::new(ErrorCode::InvalidField, message)
                        .field("brain.config.max_tokens")
                        .into());
                }
                let mut weights = open()?;
                (Clip::new(clip, config.projected, &mut weights).map(Self::Clip), weights)
            }
            Kind::T5 => {
                let t5: t5::Config = read_json(&path).map_err(|e| unloadable(e.into()))?;
                check(t5.vocabulary)?;
                let mut weights = open()?;
                (T5::new(t5, &mut weights).map(Self::T5), weights)
            }
            Kind::Decoder => return language::load(folder, largest, devices, dtypes, false).map(Self::Decoder),
        };
        let network = network.map_err(|e| unloadable(e.into()))?;
        weights.finish().map_err(|e| unloadable(e.into()))?;
        Ok(network)
    }

    fn device(&self) -> &Device {
        match self {
            Self::Clip(clip) => clip.device(),
            Self::T5(t5) => t5.device(),
            Self::Decoder(decoder) => decoder.device(),
        }
    }
}

impl Encoder {
    /// Loads an encoder of a model folder.
    ///
    /// # Errors
    /// If a file cannot be read, is malformed, or is not of the encoder.
    pub fn load(folder: &Path, config: &Config, devices: &[Device], dtypes: &Dtypes) -> Result<Self, EngineError> {
        let Config { folder: part, tokenizer, max_tokens, cut, template, lower_case, .. } = config;
        let refused = |field: &str, message: String| -> EngineError {
            ApiError::new(ErrorCode::InvalidField, message).field(field).into()
        };
        if [part, tokenizer]
            .into_iter()
            .any(|name| name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.'))
        {
            let message = format!("{part:?} and {tokenizer:?} must be plain folder names");
            return Err(refused("brain.config.encoders", message));
        }
        if *max_tokens < 2 {
            return Err(refused("brain.config.max_tokens", format!("a text of {max_tokens} tokens has no room")));
        }
        let tokenizer = Tokenizer::open(&folder.join(tokenizer)).map_err(|e| unloadable(part)(e.into()))?;
        if tokenizer.padding().is_none() && config.kind != Kind::Decoder {
            let message = format!("the tokenizer of {part} names no pad_token, and has none of the usual ones");
            return Err(refused("brain.config.encoders", message));
        }
        let network = Network::load(&folder.join(part), config, tokenizer.largest(), devices, dtypes)?;
        let instruction = Instruction::new(&config.instruction, &tokenizer)?;
        let (template, lower_case) = (template.clone(), *lower_case);
        let made = Self { tokenizer, max_tokens: *max_tokens, cut: *cut, template, lower_case, instruction, network };
        if let Network::Decoder(decoder) = &made.network {
            language::check_length(part, decoder.config(), made.longest())?;
        }
        Ok(made)
    }

    /// Channels of a state.
    pub fn width(&self) -> usize {
        match &self.network {
            Network::Clip(clip) => clip.config().width,
            Network::T5(t5) => t5.config().width,
            Network::Decoder(decoder) => decoder.config().width,
        }
    }

    /// Whether it reads a prompt otherwise than a negative prompt.
    pub fn tells_apart(&self) -> bool {
        !self.instruction.text.is_empty()
    }

    /// Most tokens that it reads at once.
    pub fn longest(&self) -> usize {
        self.max_tokens + self.instruction.room(Use::Prompt)
    }

    /// Token ids of a text in its template, padded if the encoder wants it so. One that is too long is cut before its end token, or refused, naming the field.
    ///
    /// # Errors
    /// If the text is too long, or the tokenizer fails.
    pub fn ids(&self, text: &str, use_: Use) -> Result<Vec<u32>, EngineError> {
        let (before, after) = &self.template;
        let lower = self.lower_case.then(|| text.to_lowercase());
        let text = lower.as_deref().map_or(text, str::trim);
        let instruction = if use_ == Use::Prompt { &*self.instruction.text } else { "" };
        let mut ids = self
            .tokenizer
            .encode(&format!("{before}{instruction}{text}{after}"))
            .map_err(|e| EngineError::compute("cannot split a text into tokens", e))?;
        let room = self.instruction.room(use_);
        let limit = self.max_tokens + room;
        if self.cut && ids.len() > limit {
            let end = ids.last().copied();
            ids.truncate(limit - 1);
            ids.extend(end);
        }
        if ids.len() > limit {
            let (field, limit) = (use_.field(), self.max_tokens);
            let message = format!(
                "{field} takes {} tokens, what is added around it included; the model reads {limit}",
                ids.len() - room
            );
            return Err(ApiError::new(ErrorCode::LimitExceeded, message).field(field).limit(limit.to_string()).into());
        }
        if let (Network::Clip(_) | Network::T5(_), Some(padding)) = (&self.network, self.tokenizer.padding()) {
            ids.resize(limit, padding);
        }
        Ok(ids)
    }

    /// States of a text.
    ///
    /// # Errors
    /// If an id is not of the vocabulary.
    pub fn states(&self, ids: &[u32], use_: Use) -> candle_core::Result<States<'_>> {
        let skipped = self.instruction.room(use_).min(ids.len().saturating_sub(1));
        let ids = Tensor::new(ids, self.network.device())?.unsqueeze(0)?;
        let states = match &self.network {
            Network::Clip(clip) => clip.states(&ids, None)?,
            Network::T5(t5) => t5.states(&ids, None)?,
            Network::Decoder(decoder) => {
                let layers = decoder.config().layers;
                let present = Tensor::ones(ids.dims2()?, DType::F32, ids.device())?;
                decoder.states(&decoder.embed(&ids)?, &present, &[layers.saturating_sub(1), layers])?
            }
        };
        Ok(States { encoder: self, ids, skipped, states })
    }
}

/// What an encoder made of a text.
#[derive(Debug)]
pub struct States<'a> {
    encoder: &'a Encoder,
    ids: Tensor,
    /// Tokens after the first whose states are left out.
    skipped: usize,
    states: Vec<Tensor>,
}

impl States<'_> {
    fn normed(&self) -> candle_core::Result<Tensor> {
        match (&self.encoder.network, &*self.states) {
            (Network::Clip(clip), [.., last]) => clip.final_norm(last),
            (Network::Decoder(decoder), [.., last]) => decoder.final_norm(last),
            (Network::T5(_), [.., normed]) => Ok(normed.clone()),
            (_, []) => candle_core::bail!("an encoder gave no states"),
        }
    }

    /// (tokens, width)
    ///
    /// # Errors
    /// If the encoder has no such layer.
    pub fn layer(&self, layer: Layer) -> candle_core::Result<Tensor> {
        let states = match (layer, &self.encoder.network, &*self.states) {
            (Layer::Last, ..) => self.normed()?.get(0),
            (Layer::Penultimate, Network::Clip(_) | Network::Decoder(_), [.., penultimate, _]) => penultimate.get(0),
            (Layer::Penultimate, Network::T5(_), [.., penultimate, _, _]) => penultimate.get(0),
            (Layer::Penultimate, ..) => candle_core::bail!("an encoder without layers has none but the last"),
        }?;
        if self.skipped == 0 {
            return Ok(states);
        }
        let rest = states.dim(0)? - 1 - self.skipped;
        Tensor::cat(&[states.narrow(0, 0, 1)?, states.narrow(0, 1 + self.skipped, rest)?], 0)
    }

    /// The vector that stands for the whole text.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn pooled(&self) -> candle_core::Result<Vec<f32>> {
        match &self.encoder.network {
            Network::Clip(clip) => clip.pooled(&self.ids, &self.normed()?)?.flatten_all()?.to_vec1(),
            Network::T5(_) | Network::Decoder(_) => candle_core::bail!("only CLIP has a vector for the whole text"),
        }
    }
}
