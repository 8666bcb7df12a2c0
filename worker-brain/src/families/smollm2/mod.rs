//! SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from its GGUF file, with a connector of learnable queries.
//!
//! Read in this order: this file (prompts to control signals), [`tokens`] (the tokenizer in the file), [`language`] (the model in it).

pub mod language;
pub mod tokens;

use candle_core::{DType, Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlHeader, ControlSignal, ControlSpace, GuidanceFormula, StreamRole, UnconditionalPolicy},
    v1::ErrorCode,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec},
    nn::{MAX_ROWS, rows::on_pool},
    signal,
    weights::{Gguf, Weights},
};
use serde::Deserialize;

use self::{language::Language, tokens::Tokens};
use super::{Source, unloadable};
use crate::connectors::queries::{self, Connector};

/// Tokens of a batch, template and padding included. On CPU as many as leave each prompt's values untouched by the others, to the bit.
fn max_batch(device: &Device) -> usize {
    if device.is_cpu() { MAX_ROWS } else { 1024 }
}

/// `brain.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// States are read after this many layers.
    layer: usize,
    /// Written before the prompt; its states are dropped.
    prefix: String,
    /// Written after the prompt; its states are kept.
    suffix: String,
}

struct SmolLm2 {
    spec: EngineSpec,
    space: ControlSpace,
    header: ControlHeader,
    config: Config,
    tokens: Tokens,
    /// Tokens of the prefix.
    skipped: usize,
    language: Language,
    connector: Connector,
}

/// Loads the language model and the connector.
///
/// # Errors
/// If a file cannot be read, is malformed, or does not fit the manifest.
pub fn load(source: &Source) -> Result<Box<dyn Brain>, EngineError> {
    let Source { pipeline, weights, devices, dtypes } = source;
    let device = source.device();
    let config: Config =
        pipeline.config("brain", &pipeline.brain().config).map_err(|e| unloadable("the pipeline")(e.into()))?;
    let Some(part) = pipeline.connector().filter(|part| part.family == "queries") else {
        let family = pipeline.connector().map_or("none", |part| &part.family);
        let message = format!("the connector's family is {family}; this brain has one of queries");
        return Err(ApiError::new(ErrorCode::InvalidField, message).field("connector.family").into());
    };
    let connector: queries::Config =
        pipeline.config("connector", &part.config).map_err(|e| unloadable("the pipeline")(e.into()))?;
    let Some(weights) = weights else {
        return Err(ApiError::new(ErrorCode::InvalidField, "brain.fetched is missing").field("brain.fetched").into());
    };
    let file = Gguf::open(weights).map_err(|e| unloadable("the language model")(e.into()))?;
    let tokens = Tokens::read(&file).map_err(|e| unloadable("the tokenizer")(e.into()))?;
    let keep = dtypes.of_file(&pipeline.brain().name);
    let language =
        Language::read(&file, config.layer, devices, keep).map_err(|e| unloadable("the language model")(e.into()))?;
    drop(file);
    if connector.states != language.width() {
        let message =
            format!("the connector reads {} channels, the language model has {}", connector.states, language.width());
        return Err(ApiError::new(ErrorCode::InvalidField, message).field("connector.config.states").into());
    }
    let path = pipeline.weights(part).map_err(|e| unloadable("the connector")(e.into()))?;
    let mut file = Weights::open_shards(&[path], device, dtypes.of_file(&part.name))
        .map_err(|e| unloadable("the connector")(e.into()))?;
    let connector = Connector::new(connector, &mut file)?;
    file.finish().map_err(|e| unloadable("the connector")(e.into()))?;
    let sizes = connector.config();
    let space = pipeline.space(sizes.width as u32, format!("queries{}@{}", sizes.queries, config.layer), "rms");
    let spec = EngineSpec { model: pipeline.model(&space), max_batch: max_batch(device), simulated: false };
    let template = blake3::hash(format!("{}\0{}\0{}", config.prefix, config.suffix, config.layer).as_bytes());
    let header = ControlHeader {
        schema_version: signal::SCHEMA_VERSION,
        brain_hash: pipeline.brain_hash().to_owned(),
        connector_hash: pipeline.connector_hash().to_owned(),
        template_hash: template.to_hex()[..16].to_owned(),
        space: Some(space.clone()),
    };
    let skipped = tokens.encode(&config.prefix).map_err(|e| unloadable("the template")(e.into()))?.len();
    Ok(Box::new(SmolLm2 { spec, space, header, config, tokens, skipped, language, connector }))
}

impl SmolLm2 {
    /// Ids of template and prompt.
    fn ids(&self, request: &EmbedRequest) -> Result<Vec<u32>, EngineError> {
        if !request.negative_prompt.is_empty() {
            let message = format!("the model {} takes no negative prompt", self.spec.model.name);
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("negative_prompt").into());
        }
        let Config { prefix, suffix, .. } = &self.config;
        let ids = self.tokens.encode(&format!("{prefix}{}{suffix}", request.prompt));
        let ids = ids.map_err(|source| EngineError::compute("cannot split the prompt into tokens", source))?;
        let (count, limit) = (ids.len().saturating_sub(self.skipped), self.connector.config().max_tokens);
        if count > limit {
            let message = format!(
                "the prompt takes {count} tokens with the {} of the template, the model reads {limit}",
                self.tokens.encode(suffix).map(|ids| ids.len()).unwrap_or_default()
            );
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field("prompt")
                .limit(limit.to_string())
                .into());
        }
        Ok(ids)
    }

    /// Control tokens (batch, queries, width) of prompts as ids.
    fn control(&self, rows: &[Vec<u32>]) -> candle_core::Result<Tensor> {
        let device = self.language.device();
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |value: fn(&[u32], usize) -> u32| {
            let values: Vec<u32> = rows.iter().flat_map(|row| (0..longest).map(move |i| value(row, i))).collect();
            Tensor::from_vec(values, (rows.len(), longest), device)
        };
        let ids = padded(|row, i| row.get(i).copied().unwrap_or(0))?;
        let mask = padded(|row, i| u32::from(i < row.len()))?.to_dtype(DType::F32)?;
        let states = self.language.states(&ids, &mask)?; // (batch, tokens, states)
        let kept = longest - self.skipped;
        let mask = mask.narrow(1, self.skipped, kept)?;
        // As in training: what is absent reads as zeros.
        let states = states.narrow(1, self.skipped, kept)?.broadcast_mul(&mask.unsqueeze(2)?)?;
        self.connector.forward(&states, &mask)
    }

    fn signal(&self, control: &Tensor) -> candle_core::Result<ControlSignal> {
        Ok(ControlSignal {
            header: Some(self.header.clone()),
            streams: vec![signal::stream(StreamRole::Query, Branch::Conditional, &control.to_device(&Device::Cpu)?)?],
            unconditional: UnconditionalPolicy::LearnedNull.into(),
            guidance_formula: GuidanceFormula::Unconditional.into(),
            ..Default::default()
        })
    }
}

impl Brain for SmolLm2 {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        let ControlHeader { brain_hash, connector_hash, template_hash, .. } = &self.header;
        format!("{brain_hash}/{connector_hash}/{template_hash}/{}", signal::space_name(&self.space))
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        // The connector's rows: its queries, and the prompt without the template's beginning.
        let read = |ids: usize| ids.saturating_sub(self.skipped) + self.connector.config().queries;
        self.ids(request).map(|ids| ids.len().max(read(ids.len())))
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let rows: Vec<Result<Vec<u32>, EngineError>> = batch.iter().map(|request| self.ids(request)).collect();
        let good: Vec<Vec<u32>> = rows.iter().filter_map(|row| row.as_ref().ok().cloned()).collect();
        let mut signals = match good.is_empty() {
            true => Vec::new(),
            false => match on_pool(|| self.control(&good)) {
                Ok(control) => (0..good.len()).map(|i| Ok(self.signal(&control.get(i)?)?)).collect(),
                Err(error) => {
                    // Out of memory for all need not mean out of memory for each.
                    tracing::warn!(%error, prompts = good.len(), "a batch failed; computing its prompts one by one");
                    let single = |row: &Vec<u32>| Ok(self.signal(&self.control(std::slice::from_ref(row))?.get(0)?)?);
                    good.iter().map(single).collect::<Vec<Result<_, EngineError>>>()
                }
            },
        }
        .into_iter();
        let missing = || Err(EngineError::Crashed("a prompt was left out of its batch".to_owned()));
        rows.into_iter().map(|row| row.and_then(|_| signals.next().unwrap_or_else(missing))).collect()
    }
}
