//! One encoder with its tokenizer.

use std::path::Path;

use candle_core::{Device, Tensor};
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::EngineError,
    nn::{clip, clip::Clip},
    pipeline::{diffusers, read_json},
    weights::Weights,
};
use serde::Deserialize;

use super::{super::unloadable, tokenizer::Tokenizer};

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
    pub projected: bool,
    /// Tokens of a text, the start, the end and the padding included: every text is padded to so many.
    pub max_tokens: usize,
}

/// Encoders that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The text half of CLIP.
    Clip,
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
    clip: Clip,
}

impl Encoder {
    /// Loads an encoder of a model folder.
    ///
    /// # Errors
    /// If a file cannot be read, is malformed, or is not of the encoder.
    pub fn load(folder: &Path, config: &Config, device: &Device) -> Result<Self, EngineError> {
        let Config { kind: Kind::Clip, folder: part, tokenizer, projected, max_tokens } = config;
        if [part, tokenizer]
            .into_iter()
            .any(|name| name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.'))
        {
            let message = format!("{part:?} and {tokenizer:?} must be plain folder names");
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("brain.config.encoders").into());
        }
        let unloadable = unloadable(part);
        let tokenizer = Tokenizer::open(&folder.join(tokenizer)).map_err(|e| unloadable(e.into()))?;
        let folder = folder.join(part);
        let config: clip::Config = read_json(&folder.join("config.json")).map_err(|e| unloadable(e.into()))?;
        if *max_tokens < 2 || *max_tokens > config.positions {
            let message = format!("{part} reads up to {} tokens, not {max_tokens}", config.positions);
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("brain.config.max_tokens").into());
        }
        if tokenizer.largest() >= config.vocabulary {
            let message = format!(
                "{part} knows {} tokens, its tokenizer counts up to {}",
                config.vocabulary,
                tokenizer.largest()
            );
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("brain.config.encoders").into());
        }
        let (files, _) = diffusers::weights(&folder).map_err(|e| unloadable(e.into()))?;
        let mut weights = Weights::open_shards(&files, device).map_err(|e| unloadable(e.into()))?;
        let clip = Clip::new(config, *projected, &mut weights).map_err(|e| unloadable(e.into()))?;
        weights.finish().map_err(|e| unloadable(e.into()))?;
        Ok(Self { tokenizer, max_tokens: *max_tokens, clip })
    }

    /// Channels of a state.
    pub fn width(&self) -> usize {
        self.clip.config().width
    }

    /// Token ids of a text, padded. Refuses one that is too long, naming the field.
    ///
    /// # Errors
    /// If the text is too long, or the tokenizer fails.
    pub fn ids(&self, field: &str, text: &str) -> Result<Vec<u32>, EngineError> {
        let mut ids =
            self.tokenizer.encode(text).map_err(|e| EngineError::compute("cannot split a text into tokens", e))?;
        let limit = self.max_tokens;
        if ids.len() > limit {
            let message =
                format!("{field} takes {} tokens, its start and end included; the model reads {limit}", ids.len());
            return Err(ApiError::new(ErrorCode::LimitExceeded, message).field(field).limit(limit.to_string()).into());
        }
        ids.resize(limit, self.tokenizer.padding());
        Ok(ids)
    }

    /// States of a text.
    ///
    /// # Errors
    /// If an id is not of the vocabulary.
    pub fn states(&self, ids: &[u32]) -> candle_core::Result<States<'_>> {
        let ids = Tensor::new(ids, self.clip.device())?.unsqueeze(0)?;
        let states = self.clip.states(&ids, None)?;
        Ok(States { encoder: self, ids, states })
    }
}

/// What an encoder made of a text.
#[derive(Debug)]
pub struct States<'a> {
    encoder: &'a Encoder,
    ids: Tensor,
    states: Vec<Tensor>,
}

impl States<'_> {
    fn normed(&self) -> candle_core::Result<Tensor> {
        match self.states.last() {
            Some(last) => self.encoder.clip.final_norm(last),
            None => candle_core::bail!("an encoder gave no states"),
        }
    }

    /// (tokens, width)
    ///
    /// # Errors
    /// If the encoder has no such layer.
    pub fn layer(&self, layer: Layer) -> candle_core::Result<Tensor> {
        match (layer, &*self.states) {
            (Layer::Last, _) => self.normed()?.get(0),
            (Layer::Penultimate, [.., penultimate, _]) => penultimate.get(0),
            (Layer::Penultimate, _) => candle_core::bail!("an encoder without layers has none but the last"),
        }
    }

    /// The vector that stands for the whole text.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn pooled(&self) -> candle_core::Result<Vec<f32>> {
        self.encoder.clip.pooled(&self.ids, &self.normed()?)?.flatten_all()?.to_vec1()
    }
}
