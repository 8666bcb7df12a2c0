//! A frozen language model that learnable queries are appended to, and a connector from what stands at them to a hand's control space: MetaQuery, OpenUni.
//!
//! The language model is a folder as transformers saves it; of a model that also sees, its language half is read. Prompts alone are read so far, no pictures.
//!
//! Source: facebookresearch/metaquery 206f6de, `models/model.py`; wusize/OpenUni d1703fc, `src/models/openuni`.

use candle_core::{DType, Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlHeader, ControlSignal, ControlSpace, GuidanceFormula, StreamRole, UnconditionalPolicy},
    v1::ErrorCode,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec},
    nn::decoder::Decoder,
    pipeline::{Part, Pipeline},
    signal,
    weights::Weights,
};
use serde::Deserialize;

use super::{Source, text_encoders::tokenizer::Tokenizer, unloadable};
use crate::{
    connectors::{metaquery, openuni},
    language,
    texts::Encoded,
};

/// Texts of a batch.
const MAX_TEXTS: usize = 16;

/// `brain.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The language model's folder in the model folder.
    language_model: String,
    /// Its tokenizer's.
    tokenizer: String,
    /// What is written before and after a prompt, up to the queries.
    template: (String, String),
    /// What is read for guidance instead of an empty negative prompt in the template.
    #[serde(default)]
    unconditional: Option<String>,
    /// Where the queries are.
    queries: Queries,
    /// Most tokens of a prompt, the template not included.
    max_tokens: usize,
}

/// Where learnable queries are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Queries {
    /// Beside the connector's weights: `meta_queries`.
    Embeddings,
    /// Rows of the language model's table of embeddings: tokens of this name, `{}` being their number.
    Rows(String),
}

/// From what stands at the queries to the control signal.
#[derive(Debug)]
enum Connector {
    MetaQuery(metaquery::Connector),
    OpenUni(openuni::Connector),
}

impl Connector {
    fn forward(&self, states: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::MetaQuery(connector) => connector.forward(states),
            Self::OpenUni(connector) => connector.forward(states),
        }
    }
}

struct MetaQuery {
    spec: EngineSpec,
    space: ControlSpace,
    header: ControlHeader,
    config: Config,
    tokenizer: Tokenizer,
    /// Tokens of the template.
    around: usize,
    language: Decoder,
    /// (1, queries, states)
    queries: Tensor,
    connector: Connector,
    /// The control signal without a prompt is by far the most frequent one.
    unconditional: Option<Tensor>,
}

/// A connector with its queries, if they are beside it, and its numbers of queries, of channels that it reads, and that it gives.
struct Loaded {
    connector: Connector,
    beside: Option<Tensor>,
    queries: usize,
    states: usize,
    width: usize,
}

/// Loads the language model, the queries and the connector.
///
/// # Errors
/// If a file cannot be read, is malformed, or does not fit the manifest.
pub fn load(source: &Source) -> Result<Box<dyn Brain>, EngineError> {
    let Source { pipeline, devices, .. } = source;
    let device = source.device();
    let config: Config =
        pipeline.config("brain", &pipeline.brain().config).map_err(|e| unloadable("the pipeline")(e.into()))?;
    let refused =
        |field: &str, message: String| EngineError::from(ApiError::new(ErrorCode::InvalidField, message).field(field));
    let part = pipeline.connector().ok_or_else(|| refused("connector", "this brain wants a connector".to_owned()))?;
    for name in [&config.language_model, &config.tokenizer] {
        if !pipeline.brain().folders.contains(name) {
            return Err(refused("brain.folders", format!("{name:?} is not one of brain.folders")));
        }
    }
    let tokenizer = Tokenizer::open(&pipeline.folder().join(&config.tokenizer))
        .map_err(|e| unloadable("the tokenizer")(e.into()))?;
    let encode = |text: &str| tokenizer.encode(text).map_err(|e| unloadable("the template")(e.into()));
    let Loaded { connector, beside, queries, states, width } = load_connector(pipeline, part, &config.queries, device)?;
    let language = language::load(&pipeline.folder().join(&config.language_model), tokenizer.largest(), devices)?;
    if language.config().width != states {
        let message =
            format!("the connector reads {states} channels, the language model has {}", language.config().width);
        return Err(refused("connector.config.states", message));
    }
    let rows = match (&config.queries, beside) {
        (Queries::Embeddings, Some(rows)) => rows.unsqueeze(0)?,
        (Queries::Rows(name), _) => {
            let ids = (0..queries).map(|i| match &*encode(&name.replace("{}", &i.to_string()))? {
                [id] => Ok(*id),
                ids => Err(refused("brain.config.queries", format!("query {i} is {} tokens, not one", ids.len()))),
            });
            language.embed(&Tensor::new(ids.collect::<Result<Vec<_>, _>>()?, device)?.unsqueeze(0)?)?
        }
        (Queries::Embeddings, None) => return Err(refused("connector", "there are no meta_queries".to_owned())),
    };
    let space = pipeline.space(width as u32, format!("queries{queries}@last"), "none");
    if let Some(other) = pipeline.declared_space().filter(|declared| *declared != space) {
        let (ours, wanted) = (signal::space_name(&space), signal::space_name(&other));
        return Err(refused("connector.config", format!("the connector gives {ours}, the hand wants {wanted}")));
    }
    let around = encode(&format!("{}{}", config.template.0, config.template.1))?.len();
    let longest = around + config.max_tokens + queries;
    let spec = EngineSpec { model: pipeline.model(&space), max_batch: MAX_TEXTS * longest, simulated: false };
    let template = blake3::hash(pipeline.brain().config.to_string().as_bytes());
    let header = ControlHeader {
        schema_version: signal::SCHEMA_VERSION,
        brain_hash: pipeline.brain_hash().to_owned(),
        connector_hash: pipeline.connector_hash().to_owned(),
        template_hash: template.to_hex()[..16].to_owned(),
        space: Some(space.clone()),
    };
    let (queries, unconditional) = (rows, None);
    Ok(Box::new(MetaQuery {
        spec,
        space,
        header,
        config,
        tokenizer,
        around,
        language,
        queries,
        connector,
        unconditional,
    }))
}

fn load_connector(pipeline: &Pipeline, part: &Part, queries: &Queries, device: &Device) -> Result<Loaded, EngineError> {
    let unloadable = unloadable("the connector");
    let path = pipeline.weights(part).map_err(|e| unloadable(e.into()))?;
    // A checkpoint may hold the whole model: the connector's tensors are read.
    let ours = |name: &str| {
        let name = name.strip_prefix("model.").unwrap_or(name);
        ["connector.", "projector.", "meta_queries"].iter().any(|part| name.starts_with(part))
    };
    let weights = match path.extension().is_some_and(|kind| kind == "pth" || kind == "pt" || kind == "bin") {
        true => Weights::open_pth(&path, device, ours),
        false => Weights::open_some(&[path], device, ours),
    };
    let mut weights = weights.map_err(|e| unloadable(e.into()))?;
    weights.rename(|name| name.strip_prefix("model.").unwrap_or(name).to_owned());
    let config = &part.config;
    let (connector, queries_count, states, width) = match &*part.family {
        "metaquery" => {
            let config: metaquery::Config = pipeline.config("connector", config).map_err(|e| unloadable(e.into()))?;
            let made = metaquery::Connector::new(&config, &mut weights)?;
            (Connector::MetaQuery(made), config.queries, config.states, config.width)
        }
        "openuni" => {
            let config: openuni::Config = pipeline.config("connector", config).map_err(|e| unloadable(e.into()))?;
            let made = openuni::Connector::new(&config, &mut weights)?;
            (Connector::OpenUni(made), config.queries, config.states, config.width)
        }
        other => {
            let message = format!("no connector family is called {other:?}; known here are metaquery, openuni");
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("connector.family").into());
        }
    };
    if queries_count == 0 {
        let message = "a connector without queries cannot be".to_owned();
        return Err(ApiError::new(ErrorCode::InvalidField, message).field("connector.config.queries").into());
    }
    let beside = (*queries == Queries::Embeddings).then(|| weights.get("meta_queries", &[queries_count, states]));
    weights.finish().map_err(|e| unloadable(e.into()))?;
    Ok(Loaded { connector, beside, queries: queries_count, states, width })
}

impl MetaQuery {
    /// A prompt in its template.
    fn written(&self, prompt: &str) -> String {
        let (before, after) = &self.config.template;
        format!("{before}{prompt}{after}")
    }

    /// What is read for guidance.
    fn negative(&self, request: &EmbedRequest) -> String {
        match &self.config.unconditional {
            Some(text) if request.negative_prompt.is_empty() => text.clone(),
            _ => self.written(&request.negative_prompt),
        }
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        self.tokenizer.encode(text).map_err(|e| EngineError::compute("cannot split a text into tokens", e))
    }

    fn check(&self, field: &str, prompt: &str) -> Result<(), EngineError> {
        let (count, limit) =
            (self.ids(&self.written(prompt))?.len().saturating_sub(self.around), self.config.max_tokens);
        if count <= limit {
            return Ok(());
        }
        let message = format!("{field} takes {count} tokens, the model reads {limit}");
        Err(ApiError::new(ErrorCode::LimitExceeded, message).field(field).limit(limit.to_string()).into())
    }

    /// The control tokens (queries, width) of a text.
    fn control(&self, text: &str) -> Result<Tensor, EngineError> {
        let ids = Tensor::new(self.ids(text)?, self.language.device())?.unsqueeze(0)?;
        let read = Tensor::cat(&[&self.language.embed(&ids)?, &self.queries], 1)?;
        let (_, tokens, _) = read.dims3()?;
        let (queries, layers) = (self.queries.dim(1)?, self.language.config().layers);
        let present = Tensor::ones((1, tokens), DType::F32, ids.device())?;
        let states = self.language.states(&read, &present, &[layers])?;
        let last = states.first().ok_or_else(|| EngineError::Crashed("no states".to_owned()))?;
        let asked = self.language.final_norm(&last.narrow(1, tokens - queries, queries)?.contiguous()?)?;
        Ok(self.connector.forward(&asked)?.get(0)?.to_device(&Device::Cpu)?)
    }

    fn signal(&self, positive: &Tensor, negative: &Tensor) -> Result<ControlSignal, EngineError> {
        Ok(ControlSignal {
            header: Some(self.header.clone()),
            streams: vec![
                signal::stream(StreamRole::Query, Branch::Conditional, positive)?,
                signal::stream(StreamRole::Query, Branch::Unconditional, negative)?,
            ],
            unconditional: UnconditionalPolicy::Branch.into(),
            guidance_formula: GuidanceFormula::Unconditional.into(),
            ..Default::default()
        })
    }
}

impl Brain for MetaQuery {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        let ControlHeader { brain_hash, connector_hash, template_hash, .. } = &self.header;
        format!("{brain_hash}/{connector_hash}/{template_hash}/{}", signal::space_name(&self.space))
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        self.check("prompt", &request.prompt)?;
        self.check("negative_prompt", &request.negative_prompt)?;
        // Every text is as long as the longest may be.
        Ok(self.spec.max_batch / MAX_TEXTS)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let empty = self.negative(&EmbedRequest { prompt: String::new(), negative_prompt: String::new() });
        let checked: Vec<Result<(), EngineError>> =
            batch.iter().map(|request| self.tokens(request).map(drop)).collect();
        let mut texts: Vec<String> = Vec::new();
        for (request, _) in batch.iter().zip(&checked).filter(|(_, checked)| checked.is_ok()) {
            for text in [self.written(&request.prompt), self.negative(request)] {
                let known = texts.contains(&text) || (text == empty && self.unconditional.is_some());
                if !known {
                    texts.push(text);
                }
            }
        }
        let found = Encoded::new(texts, |text| self.control(text));
        if self.unconditional.is_none() {
            self.unconditional = found.get(&empty).ok().cloned();
        }
        let look = |text: String| match &self.unconditional {
            Some(control) if text == empty => Ok(control.clone()),
            _ => found.get(&text).cloned(),
        };
        let signal =
            |request: &EmbedRequest| self.signal(&look(self.written(&request.prompt))?, &look(self.negative(request))?);
        batch.iter().zip(checked).map(|(request, checked)| checked.and_then(|()| signal(request))).collect()
    }
}
