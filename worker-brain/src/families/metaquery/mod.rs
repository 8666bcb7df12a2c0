//! A frozen language model that learnable queries are appended to, and a connector from what stands at them to a hand's control space: MetaQuery, OpenUni.
//!
//! The language model is a folder as transformers saves it; of a model that also sees, its language half is read, and what sees if the pipeline wants pictures read ([`pictures`]).
//!
//! Source: facebookresearch/metaquery 206f6de, `models/model.py`; wusize/OpenUni d1703fc, `src/models/openuni`.

mod pictures;

use std::collections::HashSet;

use candle_core::{DType, Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlHeader, ControlSignal, ControlSpace, GuidanceFormula, StreamRole, UnconditionalPolicy},
    v1::ErrorCode,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec},
    nn::decoder::{Decoder, Sight},
    pipeline::{Part, Pipeline},
    signal,
    weights::{Keep, Weights},
};
use serde::Deserialize;

use self::pictures::{Eyes, Shown, View};
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
    /// How pictures are read, if they are.
    #[serde(default)]
    pictures: Option<pictures::Config>,
    /// What the language model writes before the queries, if it does.
    #[serde(default)]
    thinking: Option<Thinking>,
}

/// A text that the language model writes about a prompt before the queries are read: the likeliest token each time.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Thinking {
    /// What of the template stands between a prompt and the text.
    after: String,
    /// The token that ends it.
    until: String,
    /// Most tokens of it.
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
    eyes: Option<Eyes>,
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
    let Source { pipeline, devices, dtypes, .. } = source;
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
    let Loaded { connector, beside, queries, states, width } =
        load_connector(pipeline, part, &config.queries, device, dtypes.of_file(&part.name))?;
    let folder = pipeline.folder().join(&config.language_model);
    let language = language::load(&folder, tokenizer.largest(), devices, dtypes, config.thinking.is_some())?;
    if language.config().width != states {
        let message =
            format!("the connector reads {states} channels, the language model has {}", language.config().width);
        return Err(refused("connector.config.states", message));
    }
    let eyes =
        config.pictures.clone().map(|pictures| Eyes::open(pictures, &folder, states, device, dtypes)).transpose()?;
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
    if let Some(thinking) = &config.thinking {
        if !config.template.1.starts_with(&thinking.after) || thinking.max_tokens == 0 {
            let message = "thinking.after is no beginning of the template's second part, or thinking.max_tokens is 0";
            return Err(refused("brain.config.thinking", message.to_owned()));
        }
        if encode(&thinking.until)?.len() != 1 {
            return Err(refused("brain.config.thinking.until", format!("{:?} is not one token", thinking.until)));
        }
    }
    let around = encode(&format!("{}{}", config.template.0, config.template.1))?.len();
    let written = config.thinking.as_ref().map_or(0, |thinking| thinking.max_tokens);
    let longest = around + config.max_tokens + written + queries + eyes.as_ref().map_or(0, Eyes::most_tokens);
    language::check_length(&config.language_model, language.config(), longest)?;
    let model = pipeline.model(&space);
    if (model.max_reference_images > 0) != eyes.is_some() {
        let message = "offers.max_reference_images and brain.config.pictures go together".to_owned();
        return Err(refused("offers.max_reference_images", message));
    }
    let spec = EngineSpec { model, max_batch: MAX_TEXTS * longest, simulated: false };
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
        eyes,
        queries,
        connector,
        unconditional,
    }))
}

fn load_connector(
    pipeline: &Pipeline,
    part: &Part,
    queries: &Queries,
    device: &Device,
    keep: Keep,
) -> Result<Loaded, EngineError> {
    let unloadable = unloadable("the connector");
    let path = pipeline.weights(part).map_err(|e| unloadable(e.into()))?;
    // A checkpoint may hold the whole model: the connector's tensors are read.
    let ours = |name: &str| {
        let name = name.strip_prefix("model.").unwrap_or(name);
        ["connector.", "projector.", "meta_queries"].iter().any(|part| name.starts_with(part))
    };
    let weights = match path.extension().is_some_and(|kind| kind == "pth" || kind == "pt" || kind == "bin") {
        true => Weights::open_pth(&path, device, keep, ours),
        false => Weights::open_some(&[path], device, keep, ours),
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

    /// What the language model writes about a prompt.
    fn think(&self, thinking: &Thinking, text: &Text, views: &Encoded<Shown, View>) -> Result<String, EngineError> {
        let (read, sight) = self.read(text, views, None)?;
        let written = self.language.write(&read, &sight, &self.ids(&thinking.until)?, thinking.max_tokens)?;
        let text = self.tokenizer.decode(&written);
        let text = text.map_err(|e| EngineError::compute("cannot join tokens to a text", e))?.trim().to_owned();
        tracing::debug!(text, "the language model has written");
        Ok(text)
    }

    /// Has the language model write about each prompt, and puts what it wrote where it is read: after the prompt, before the queries.
    fn think_of(
        &self,
        thinking: &Thinking,
        wanted: &mut [Result<Vec<(Branch, Text)>, EngineError>],
        views: &Encoded<Shown, View>,
    ) {
        let rest = self.config.template.1.len() - thinking.after.len();
        let begun = |text: &Text| Text { text: text.text[..text.text.len() - rest].to_owned(), ..text.clone() };
        let prompts = wanted.iter().flatten().flatten().filter(|(branch, _)| *branch == Branch::Conditional);
        let prompts: HashSet<Text> = prompts.map(|(_, text)| begun(text)).collect();
        let thoughts = Encoded::new(prompts.into_iter().collect(), |text| self.think(thinking, text, views));
        for request in wanted {
            let Ok(texts) = request else { continue };
            let prompts = texts.iter_mut().filter(|(branch, _)| *branch == Branch::Conditional);
            let thought = prompts.map(|(_, text)| {
                let thought = thoughts.get(&begun(text))?;
                text.text.insert_str(text.text.len() - rest, thought);
                Ok(())
            });
            if let Err(error) = thought.collect::<Result<(), EngineError>>() {
                *request = Err(error);
            }
        }
    }

    /// What a request wants read on each branch: with the prompt, without it, and, if there are pictures, without the prompt and with them. Without them means with black ones, as MetaQuery does.
    fn wanted(&self, request: &EmbedRequest) -> Vec<(Branch, Text)> {
        let text = |text: String, pictures: &[Shown]| Text { text, pictures: pictures.to_vec() };
        let prompt = self.written(&request.prompt);
        if request.references.is_empty() {
            let negative = text(self.negative(request), &[]);
            return vec![(Branch::Conditional, text(prompt, &[])), (Branch::Unconditional, negative)];
        }
        let negative = self.written(&request.negative_prompt);
        let shown: Vec<Shown> = request.references.iter().cloned().map(Shown::Picture).collect();
        let black: Vec<Shown> =
            request.references.iter().map(|reference| Shown::Black(reference.image.dimensions())).collect();
        vec![
            (Branch::Conditional, text(prompt, &shown)),
            (Branch::Unconditional, text(negative.clone(), &black)),
            (Branch::ImageConditional, text(negative, &shown)),
        ]
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

    /// What the language model reads of a text (1, tokens, width), with queries after it or not, and where pictures are in it.
    fn read(
        &self,
        text: &Text,
        views: &Encoded<Shown, View>,
        queries: Option<&Tensor>,
    ) -> Result<(Tensor, Sight), EngineError> {
        let embedded = |text: &str| {
            let ids = Tensor::new(self.ids(text)?, self.language.device())?.unsqueeze(0)?;
            Ok::<_, EngineError>(self.language.embed(&ids)?)
        };
        match &self.eyes {
            Some(eyes) if !text.pictures.is_empty() => {
                let (before, after) = text.text.split_at(self.config.template.0.len());
                let views = text.pictures.iter().map(|shown| views.get(shown)).collect::<Result<Vec<_>, _>>()?;
                eyes.read([before, after], &views, queries, embedded)
            }
            _ => {
                let rows: Vec<Tensor> = [embedded(&text.text)?].into_iter().chain(queries.cloned()).collect();
                Ok((Tensor::cat(&rows, 1)?, Sight::default()))
            }
        }
    }

    /// The control tokens (queries, width) of a text.
    fn control(&self, text: &Text, views: &Encoded<Shown, View>) -> Result<Tensor, EngineError> {
        let (read, sight) = self.read(text, views, Some(&self.queries))?;
        let (_, tokens, _) = read.dims3()?;
        let (queries, layers) = (self.queries.dim(1)?, self.language.config().layers);
        let present = Tensor::ones((1, tokens), DType::F32, read.device())?;
        let states = self.language.states_with(&read, &present, &[layers], &sight)?;
        let last = states.first().ok_or_else(|| EngineError::Crashed("no states".to_owned()))?;
        let asked = self.language.final_norm(&last.narrow(1, tokens - queries, queries)?.contiguous()?)?;
        Ok(self.connector.forward(&asked)?.get(0)?.to_device(&Device::Cpu)?)
    }

    fn signal(&self, controls: &[(Branch, Tensor)]) -> Result<ControlSignal, EngineError> {
        let stream = |(branch, control): &(Branch, Tensor)| signal::stream(StreamRole::Query, *branch, control);
        Ok(ControlSignal {
            header: Some(self.header.clone()),
            streams: controls.iter().map(stream).collect::<candle_core::Result<_>>()?,
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
        let offered = self.spec.model.max_reference_images;
        if request.references.len() > offered as usize {
            let message = format!("{} pictures to read; this model reads {offered}", request.references.len());
            let refusal = ApiError::new(ErrorCode::NotOffered, message).field("reference_images");
            return Err(refusal.limit(offered.to_string()).into());
        }
        if let Some(eyes) = &self.eyes {
            request.references.iter().try_for_each(|reference| eyes.check(reference.image.dimensions()))?;
        }
        // Every text is as long as the longest may be.
        Ok(self.spec.max_batch / MAX_TEXTS)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let empty = Text { text: self.negative(&EmbedRequest::default()), pictures: Vec::new() };
        let checked = batch.iter().map(|request| self.tokens(request).map(|_| self.wanted(request)));
        let mut wanted: Vec<Result<Vec<(Branch, Text)>, EngineError>> = checked.collect();
        // A picture is read on two branches, and may be in several requests: it is looked at once.
        let shown: HashSet<Shown> =
            wanted.iter().flatten().flatten().flat_map(|(_, text)| text.pictures.iter().cloned()).collect();
        let blind = || EngineError::Crashed("there is nothing that sees".to_owned());
        let views = Encoded::new(shown.into_iter().collect(), |shown| {
            self.eyes.as_ref().ok_or_else(blind).and_then(|eyes| eyes.see(shown))
        });
        if let Some(thinking) = &self.config.thinking {
            self.think_of(thinking, &mut wanted, &views);
        }
        let mut texts: Vec<Text> = Vec::new();
        for (_, text) in wanted.iter().flatten().flatten() {
            let known = texts.contains(text) || (*text == empty && self.unconditional.is_some());
            if !known {
                texts.push(text.clone());
            }
        }
        let found = Encoded::new(texts, |text| self.control(text, &views));
        if self.unconditional.is_none() {
            self.unconditional = found.get(&empty).ok().cloned();
        }
        let look = |(branch, text): (Branch, Text)| match &self.unconditional {
            Some(control) if text == empty => Ok((branch, control.clone())),
            _ => Ok((branch, found.get(&text).cloned()?)),
        };
        let controls = |wanted: Vec<(Branch, Text)>| wanted.into_iter().map(look).collect::<Result<Vec<_>, _>>();
        wanted.into_iter().map(|wanted| wanted.and_then(controls).and_then(|found| self.signal(&found))).collect()
    }
}

/// What is read in one pass: a text, and pictures that stand before the prompt in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Text {
    text: String,
    pictures: Vec<Shown>,
}
