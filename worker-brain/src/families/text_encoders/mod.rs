//! Text encoders as they are, without a connector: what the pipelines of diffusers condition their denoisers on.
//!
//! Which encoders there are, at which layer each is read and how their states are joined is data (`brain.config`), written for a folder of diffusers by
//! `crates/worker/src/pipeline/diffusers/classes.rs`. Read in this order: this file (prompts to control signals), [`tokenizer`], `pairs` (tokenizers
//! without `tokenizer.json`), [`encoder`].

pub mod encoder;
mod pairs;
pub mod tokenizer;

use candle_core::{Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{
        Branch, ControlHeader, ControlSignal, ControlSpace, ControlStream, GuidanceFormula, PooledVector, StreamRole,
        UnconditionalPolicy,
    },
    v1::ErrorCode,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec},
    signal,
};
use serde::Deserialize;

use self::encoder::{Encoder, Layer, Use};
use super::{Source, unloadable};
use crate::texts::Encoded;

/// Texts of a batch.
const MAX_TEXTS: usize = 16;

/// `brain.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    encoders: Vec<encoder::Config>,
    /// The text stream: groups of tokens, one after the other; each is the states of several encoders, joined channel by channel.
    text: Vec<Vec<Read>>,
    /// A last group of so many tokens of so many channels, all zeros, for an encoder that was left out.
    #[serde(default)]
    zeros: Option<(usize, usize)>,
    /// Encoders whose pooled vectors are joined; none for no pooled vector.
    pooled: Vec<usize>,
    /// What the space calls the states.
    layers: String,
    empty_negative: EmptyNegative,
}

/// States of an encoder.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    /// Which, counted from 0.
    encoder: usize,
    layer: Layer,
}

/// What stands for a negative prompt that is not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EmptyNegative {
    /// The states of an empty text.
    Text,
    /// Zeros.
    Zeros,
    /// Nothing: the hand wants no branch without the prompt, and there are no negative prompts.
    Nothing,
}

struct TextEncoders {
    spec: EngineSpec,
    space: ControlSpace,
    header: ControlHeader,
    config: Config,
    encoders: Vec<Encoder>,
    /// An empty negative prompt is by far the most frequent text.
    empty: Option<Meaning>,
}

/// A text, and what it is.
type Text<'a> = (&'a str, Use);

/// The text of a negative prompt that is not given.
const EMPTY: Text<'static> = ("", Use::Negative);

/// What a text comes to.
#[derive(Debug, Clone)]
struct Meaning {
    /// (tokens, width)
    text: Tensor,
    pooled: Vec<f32>,
}

/// Loads the encoders.
///
/// # Errors
/// If a file cannot be read, is malformed, or does not fit the manifest.
pub fn load(source: &Source) -> Result<Box<dyn Brain>, EngineError> {
    let Source { pipeline, devices, dtypes, .. } = source;
    let config: Config =
        pipeline.config("brain", &pipeline.brain().config).map_err(|e| unloadable("the pipeline")(e.into()))?;
    let impossible = |what: &str| EngineError::from(ApiError::new(ErrorCode::InvalidField, what).field("brain.config"));
    if let Some(part) = pipeline.connector() {
        return Err(impossible(&format!("text encoders have no connector, {} is one", part.name)));
    }
    let asked = config.text.iter().flatten().map(|read| read.encoder).chain(config.pooled.iter().copied());
    if config.text.is_empty() || config.text.iter().any(Vec::is_empty) || asked.max() >= Some(config.encoders.len()) {
        return Err(impossible("brain.config reads encoders that are not there, or none"));
    }
    // Of several devices and encoders each has its own; a language model that is alone is shared out.
    let each: Vec<&[Device]> = match (devices.len(), config.encoders.len()) {
        (0..=1, _) | (_, 1) => vec![devices],
        _ => devices.chunks(1).collect(),
    };
    let load = |(part, devices)| Encoder::load(pipeline.folder(), part, devices, dtypes);
    let encoders = config.encoders.iter().zip(each.into_iter().cycle()).map(load).collect::<Result<Vec<_>, _>>()?;
    let width = |group: &Vec<Read>| group.iter().map(|read| encoders[read.encoder].width()).sum::<usize>();
    let absent = config.zeros.map(|(_, width)| width);
    let width = config.text.iter().map(width).chain(absent).max().unwrap_or(0);
    let space = pipeline.space(width as u32, config.layers.clone(), "none");
    if let Some(other) = pipeline.declared_space().filter(|declared| *declared != space) {
        let (ours, wanted) = (signal::space_name(&space), signal::space_name(&other));
        return Err(impossible(&format!("the encoders give {ours}, the hand wants {wanted}")));
    }
    let tokens = encoders.iter().map(Encoder::longest).max().unwrap_or(0);
    let spec = EngineSpec { model: pipeline.model(&space), max_batch: MAX_TEXTS * tokens, simulated: false };
    let template = blake3::hash(pipeline.brain().config.to_string().as_bytes());
    let header = ControlHeader {
        schema_version: signal::SCHEMA_VERSION,
        brain_hash: pipeline.brain_hash().to_owned(),
        connector_hash: String::new(),
        template_hash: template.to_hex()[..16].to_owned(),
        space: Some(space.clone()),
    };
    Ok(Box::new(TextEncoders { spec, space, header, config, encoders, empty: None }))
}

impl TextEncoders {
    /// The tokens of a text for each encoder; refuses one that is too long.
    fn ids(&self, (text, use_): Text<'_>) -> Result<Vec<Vec<u32>>, EngineError> {
        self.encoders.iter().map(|encoder| encoder.ids(text, use_)).collect()
    }

    fn encode(&self, text: Text<'_>) -> Result<Meaning, EngineError> {
        let ids = self.ids(text)?;
        let read: Vec<encoder::States> = self
            .encoders
            .iter()
            .zip(&ids)
            .map(|(encoder, ids)| encoder.states(ids, text.1))
            .collect::<Result<_, _>>()?;
        let group = |group: &Vec<Read>| {
            let parts = group
                .iter()
                .map(|part| read[part.encoder].layer(part.layer)?.to_device(&Device::Cpu))
                .collect::<candle_core::Result<Vec<_>>>()?;
            Tensor::cat(&parts, 1)
        };
        let mut groups = self.config.text.iter().map(group).collect::<candle_core::Result<Vec<_>>>()?;
        if let (Some(shape), Some(first)) = (self.config.zeros, groups.first()) {
            groups.push(Tensor::zeros(shape, first.dtype(), first.device())?);
        }
        let mut pooled = Vec::new();
        for encoder in &self.config.pooled {
            pooled.extend(read[*encoder].pooled()?);
        }
        Ok(Meaning { text: joined(&groups)?, pooled })
    }

    fn signal(&self, positive: &Meaning, negative: Option<&Meaning>) -> Result<ControlSignal, EngineError> {
        let stream = |branch, encoded: &Meaning| -> candle_core::Result<ControlStream> {
            signal::stream(StreamRole::Text, branch, &encoded.text)
        };
        let mut streams = vec![stream(Branch::Conditional, positive)?];
        let mut pooled = Vec::new();
        let vector = |label: &str, values: &[f32]| PooledVector { label: label.to_owned(), values: values.to_vec() };
        if !self.config.pooled.is_empty() {
            pooled.push(vector(signal::CONDITIONAL, &positive.pooled));
        }
        if let Some(negative) = negative {
            streams.push(stream(Branch::Unconditional, negative)?);
            if !self.config.pooled.is_empty() {
                pooled.push(vector(signal::UNCONDITIONAL, &negative.pooled));
            }
        }
        let policy = match (negative, self.config.empty_negative) {
            (Some(_), _) => UnconditionalPolicy::Branch,
            (None, EmptyNegative::Nothing) => UnconditionalPolicy::Unspecified,
            (None, _) => UnconditionalPolicy::Zeros,
        };
        Ok(ControlSignal {
            header: Some(self.header.clone()),
            streams,
            pooled,
            unconditional: policy.into(),
            guidance_formula: GuidanceFormula::Unconditional.into(),
            ..Default::default()
        })
    }

    /// The text of the negative branch; none if zeros stand for it, or nothing.
    fn negative<'a>(&self, request: &'a EmbedRequest) -> Option<Text<'a>> {
        match self.config.empty_negative {
            EmptyNegative::Nothing => None,
            EmptyNegative::Zeros if request.negative_prompt.is_empty() => None,
            EmptyNegative::Zeros | EmptyNegative::Text => Some((&request.negative_prompt, Use::Negative)),
        }
    }

    fn check(&self, request: &EmbedRequest) -> Result<(), EngineError> {
        self.ids((&*request.prompt, Use::Prompt))?;
        self.negative(request).map_or(Ok(()), |negative| self.ids(negative).map(drop))
    }
}

/// Groups of tokens, one after the other; channels that one lacks are zeros.
fn joined(groups: &[Tensor]) -> candle_core::Result<Tensor> {
    let width = groups.iter().map(|group| group.dim(1)).collect::<candle_core::Result<Vec<_>>>()?;
    let width = width.into_iter().max().unwrap_or(0);
    let padded = |group: &Tensor| group.pad_with_zeros(1, 0, width - group.dim(1)?);
    Tensor::cat(&groups.iter().map(padded).collect::<candle_core::Result<Vec<_>>>()?, 0)
}

impl Brain for TextEncoders {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        let ControlHeader { brain_hash, template_hash, .. } = &self.header;
        format!("{brain_hash}/{template_hash}/{}", signal::space_name(&self.space))
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        self.check(request)?;
        // Every text is as long as the longest may be.
        Ok(self.spec.max_batch / MAX_TEXTS)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let checked: Vec<Result<(), EngineError>> = batch.iter().map(|request| self.check(request)).collect();
        let good = || batch.iter().zip(&checked).filter(|(_, checked)| checked.is_ok()).map(|(request, _)| request);
        // Where both are read alike, a text is encoded once, whatever it is for.
        let use_ = if self.encoders.iter().any(Encoder::tells_apart) { Use::Prompt } else { Use::Negative };
        let mut texts: Vec<Text<'_>> = Vec::new();
        for request in good() {
            for text in [Some((&*request.prompt, use_)), self.negative(request)].into_iter().flatten() {
                let known = texts.contains(&text) || (text == EMPTY && self.empty.is_some());
                if !known {
                    texts.push(text);
                }
            }
        }
        let found = Encoded::new(texts, |text| self.encode(*text));
        if self.empty.is_none() {
            self.empty = found.get(&EMPTY).ok().cloned();
        }
        let look = |text: Text<'_>| match &self.empty {
            Some(empty) if text == EMPTY => Ok(empty.clone()),
            _ => found.get(&text).cloned(),
        };
        let signal = |request: &EmbedRequest| {
            let negative = self.negative(request).map(look).transpose()?;
            self.signal(&look((&*request.prompt, use_))?, negative.as_ref())
        };
        batch.iter().zip(checked).map(|(request, checked)| checked.and_then(|()| signal(request))).collect()
    }
}
