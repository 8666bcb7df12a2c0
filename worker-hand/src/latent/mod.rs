//! The engine of families that denoise the latent of an autoencoder, as the pipelines of diffusers do. A family adds its [`Network`].
//!
//! Read in this order: this file (the engine), `beginning` (from a picture), [`texts`] (what a control signal says), [`guidance`], [`tiles`] (large latents to pictures).
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/`.

mod beginning;
mod guidance;
mod texts;
pub mod tiles;

use std::{borrow::Cow, collections::BTreeSet, ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use candle_core::{Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::ControlSpace,
    v1::{ErrorCode, Size},
    work::offers_size,
};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    nn::rows::on_pool,
    pipeline::{Pipeline, diffusers, read_json},
    signal::{self, space_name},
    weights::{Dtypes, Weights},
};
use image::RgbImage;
use serde::{Deserialize, de::DeserializeOwned};

pub use self::{
    guidance::{Strength, guide, guiding, rescaled},
    texts::{FilledText, filled_text, pooled, text},
};
use crate::{
    families::Setup,
    networks::LatentSpace,
    samplers::{self, Flow, Plan, Sampler, Trajectory},
};

/// Samples that share a pass. On CPU a pass takes time in proportion, so more would only keep the first one waiting.
const MAX_BATCH: usize = 8;
/// Cells of a latent along the longest side of a preview.
const PREVIEW_CELLS: usize = 16;

/// Channels, height and width of a latent.
pub type Shape = [usize; 3];

/// What a family adds to the engine.
pub trait Network: Send + Sync + std::fmt::Debug + 'static {
    /// What a sample is conditioned on: the signal's tensors, checked, and the strength of guidance.
    type Condition: Send + Sync + std::fmt::Debug + 'static;

    /// Channels of a token of the control signal.
    fn width(&self) -> usize;

    /// Pixels that a side of a picture must be a multiple of.
    fn multiple(&self) -> usize;

    /// Whether it draws the part of a picture that a mask tells, and nothing else, being shown the mask and the latent of what stays beside its own.
    fn mends(&self) -> bool {
        false
    }

    /// The autoencoder of its latents.
    fn autoencoder(&self) -> &dyn LatentSpace;

    /// What it adds to its scheduler's configuration for latents of a shape.
    ///
    /// # Errors
    /// If the configuration is malformed.
    fn flow(&self, scheduler: &samplers::Config, shape: Shape) -> Result<Flow, samplers::Error> {
        let _ = (scheduler, shape);
        Ok(Flow::default())
    }

    /// What a request's control signal says for its picture.
    ///
    /// # Errors
    /// If the signal lacks something or has another shape.
    fn condition(&self, request: &RenderRequest, device: &Device) -> Result<Self::Condition, EngineError>;

    /// How many of so many steps are made of a picture that is to change by so much.
    fn made(&self, steps: f64, strength: f64) -> f64 {
        steps - (steps - steps * strength).trunc()
    }

    /// Tells apart what cannot share a pass.
    fn kind(condition: &Self::Condition) -> String;

    /// How often it is asked for one answer: with the prompt, and without it if there is guidance.
    fn branches(condition: &Self::Condition) -> usize;

    /// What it answers on these branches (0 is that with the prompt) of each question, one after the other. All latents are of one shape, and all conditions of one kind.
    ///
    /// # Errors
    /// If a pass fails.
    fn evaluate(
        &self,
        questions: &[Question<'_, Self::Condition>],
        branches: Range<usize>,
        shape: Shape,
        device: &Device,
    ) -> Result<Vec<Branches>, EngineError>;

    /// What samplers are told of the answers on all branches, or on the first alone where there is to be no guidance.
    fn guide(condition: &Self::Condition, answers: Branches) -> Vec<f32>;
}

/// Answers to one question, one of each branch.
pub type Branches = Vec<Vec<f32>>;

/// An evaluation of one sample.
#[derive(Debug)]
pub struct Question<'a, Condition> {
    /// By channel, row and column.
    pub latent: &'a [f32],
    /// What the sampler tells the network.
    pub time: f32,
    /// What the picture is to show.
    pub condition: &'a Condition,
}

/// `hand.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// What the space calls the states that the network was trained with.
    layers: String,
    /// Channels of a token of the control signal.
    width: usize,
}

struct Engine<N> {
    spec: EngineSpec,
    space: ControlSpace,
    scheduler: samplers::Config,
    network: N,
    device: Device,
    /// The network once more, on another device, for the branch without the prompt.
    second: Option<(N, Device)>,
    /// Pixels of a picture above which it is decoded and encoded in tiles, if there is such a limit.
    tile_above: Option<u64>,
}

struct State<C> {
    trajectory: Trajectory,
    condition: C,
    /// The same for [`Engine::second`].
    second: Option<C>,
    /// What the network is shown beside the latent, more channels of it: nothing to most.
    beside: Vec<f32>,
    /// Steps that are guided.
    guided: Range<u32>,
    size: Size,
}

/// What a network is asked of a sample, with what it is shown beside.
fn asked<C>(state: &State<C>) -> (Cow<'_, [f32]>, f32) {
    match (state.trajectory.question(), &*state.beside) {
        (question, []) => question,
        ((latent, time), beside) => (Cow::Owned([&latent, beside].concat()), time),
    }
}

fn questions<'a, C>(asked: &'a [(Cow<'a, [f32]>, f32)], conditions: &[&'a C]) -> Vec<Question<'a, C>> {
    let asked = asked.iter().zip(conditions);
    asked.map(|((latent, time), condition)| Question { latent, time: *time, condition: *condition }).collect()
}

/// A sample at one of its steps, and on how many branches the network is asked there.
struct Moving<'a, C> {
    state: &'a mut State<C>,
    branches: usize,
}

/// The folder of a pipeline of diffusers, whose parts a family loads.
#[derive(Debug)]
pub struct Parts<'a> {
    folder: &'a Path,
    device: &'a Device,
    dtypes: &'a Dtypes,
}

fn unloadable(part: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
    EngineError::compute(format!("cannot load {part}"), source)
}

impl Parts<'_> {
    /// The configuration of a part.
    ///
    /// # Errors
    /// If it cannot be read, or is malformed.
    pub fn config<T: DeserializeOwned>(&self, part: &str) -> Result<T, EngineError> {
        read_json(&self.folder.join(part).join("config.json")).map_err(|e| unloadable(part, e))
    }

    /// A part, made from its weights, all of which it must take.
    ///
    /// # Errors
    /// If a file cannot be read, is malformed, or is not of the part.
    pub fn load<T>(
        &self,
        part: &str,
        make: impl FnOnce(&mut Weights) -> candle_core::Result<T>,
    ) -> Result<T, EngineError> {
        let (files, variant) = diffusers::weights(&self.folder.join(part)).map_err(|e| unloadable(part, e))?;
        tracing::info!(part, variant, files = files.len(), "loading");
        let keep = self.dtypes.of(part, &self.config(part)?)?;
        let mut weights = Weights::open_shards(&files, self.device, keep).map_err(|e| unloadable(part, e))?;
        let made = make(&mut weights).map_err(|e| unloadable(part, e))?;
        weights.finish().map_err(|e| unloadable(part, e))?;
        Ok(made)
    }
}

/// The hand of a pipeline, with the network that `make` loads.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load<N: Network>(
    pipeline: &Pipeline,
    setup: &Setup,
    make: impl Fn(&Parts<'_>) -> Result<N, EngineError>,
) -> Result<Box<dyn Hand>, EngineError> {
    let config: Config = pipeline.config("hand", &pipeline.hand().config).map_err(|e| unloadable("the pipeline", e))?;
    let folder = pipeline.folder();
    let scheduler = read_json(&folder.join("scheduler").join("scheduler_config.json"))
        .map_err(|e| unloadable("the scheduler", e))?;
    let network = make(&Parts { folder, device: &setup.first, dtypes: &setup.dtypes })?;
    let space = pipeline.space(network.width() as u32, config.layers, "none");
    if network.width() != config.width {
        let message = format!("the network reads {}, not states of {} channels", space_name(&space), config.width);
        return Err(ApiError::new(ErrorCode::InvalidField, message).field("hand.config.width").into());
    }
    let second = match &setup.second {
        Some(device) => Some((make(&Parts { folder, device, dtypes: &setup.dtypes })?, device.clone())),
        None => None,
    };
    let spec = EngineSpec { model: pipeline.model(&space), max_batch: MAX_BATCH, simulated: false };
    Ok(Box::new(Engine {
        spec,
        space,
        scheduler,
        network,
        device: setup.first.clone(),
        second,
        tile_above: setup.tile_above,
    }))
}

/// Why a control signal is refused.
pub fn malformed(what: impl Into<String>) -> EngineError {
    ApiError::new(ErrorCode::InvalidField, format!("malformed control signal: {}", what.into())).field("signal").into()
}

/// The latents of questions, (batch, channels, height, width).
///
/// # Errors
/// If one is not of that shape.
pub fn stacked<C>(
    questions: &[Question<'_, C>],
    [channels, height, width]: Shape,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let latent = |q: &Question<'_, C>| Tensor::from_slice(q.latent, (1, channels, height, width), device);
    Tensor::cat(&questions.iter().map(latent).collect::<candle_core::Result<Vec<_>>>()?, 0)
}

/// The exponent of a shift that grows with a picture's tokens, from `base_shift` at `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`.
///
/// # Errors
/// If the configuration is malformed.
pub fn shift_of_size(scheduler: &samplers::Config, tokens: usize) -> Result<f64, samplers::Error> {
    let number = |name, usual| scheduler.number(name, usual);
    let (first, last) = (number("base_image_seq_len", 256.0)?, number("max_image_seq_len", 4096.0)?);
    let (low, high) = (number("base_shift", 0.5)?, number("max_shift", 1.15)?);
    let slope = (high - low) / (last - first);
    Ok(tokens as f64 * slope + (low - slope * first))
}

/// Refuses a network that does not take and give as many channels as the latents have, `beside` not counted.
///
/// # Errors
/// If so.
pub fn check_channels(
    part: &str,
    (inputs, outputs): (usize, usize),
    beside: usize,
    vae: &dyn LatentSpace,
) -> Result<(), EngineError> {
    let latent = vae.channels();
    if inputs == latent + beside && outputs == latent {
        return Ok(());
    }
    let message = format!("{part} goes from {inputs} to {outputs} channels, the autoencoder's latents have {latent}");
    Err(ApiError::new(ErrorCode::InvalidField, message).field(part).into())
}

impl<N: Network> Engine<N> {
    fn shape(&self, size: Size) -> Result<Shape, EngineError> {
        let (vae, multiple) = (self.network.autoencoder(), self.network.multiple());
        let (width, height) = (size.width as usize, size.height as usize);
        let sides = [width, height];
        if sides.iter().any(|side| *side == 0 || !side.is_multiple_of(multiple) || *side > 16_384) {
            let message = format!("{width}x{height}: both sides of a picture must be multiples of {multiple}");
            return Err(ApiError::new(ErrorCode::NotOffered, message).field("size").limit(multiple.to_string()).into());
        }
        Ok([vae.channels(), height / vae.factor(), width / vae.factor()])
    }

    fn begin_from(&mut self, request: &RenderRequest, from: Option<&[u8]>) -> Result<Sample, EngineError> {
        signal::check_space(&request.signal, &self.space)?;
        let shape = self.shape(request.size)?;
        let refused = |code, field: &str, message: String| EngineError::from(ApiError::new(code, message).field(field));
        if !offers_size(&self.spec.model, request.size) {
            let Size { width, height } = request.size;
            return Err(refused(ErrorCode::NotOffered, "size", format!("this hand does not draw {width}x{height}")));
        }
        let sampler: Sampler =
            request.sampler.parse().map_err(|what| refused(ErrorCode::NotOffered, "sampler", what))?;
        let limit = self.spec.model.max_steps;
        if request.steps == 0 || request.steps > limit {
            let message = format!("{} steps; this hand takes 1 to {limit}", request.steps);
            return Err(refused(ErrorCode::LimitExceeded, "steps", message));
        }
        if !request.guidance_scale.is_finite() {
            let message = "the guidance scale is not finite".to_owned();
            return Err(refused(ErrorCode::InvalidField, "guidance_scale", message));
        }
        let rescale = request.guidance_rescale;
        if !(0.0..=1.0).contains(&rescale) || (rescale > 0.0 && !self.spec.model.guidance_rescale) {
            let message = format!("this hand does not rescale guidance by {rescale}");
            return Err(refused(ErrorCode::NotOffered, "guidance_rescale", message));
        }
        let condition = self.network.condition(request, &self.device)?;
        let second = match &self.second {
            Some((network, device)) if N::branches(&condition) > 1 => Some(network.condition(request, device)?),
            _ => None,
        };
        let steps = match &request.picture {
            None => request.steps,
            Some(picture) => self.network.made(f64::from(request.steps), picture.strength) as u32,
        };
        if steps == 0 || steps > request.steps {
            let message = format!("with this strength, none of {} steps would be made", request.steps);
            return Err(refused(ErrorCode::InvalidField, "strength", message));
        }
        let skipped = (request.steps - steps) as usize;
        let plan = self
            .network
            .flow(&self.scheduler, shape)
            .and_then(|flow| Plan::new(&self.scheduler, sampler, request.steps as usize, skipped, flow))
            .map_err(|error| refused(ErrorCode::NotOffered, "steps", error.to_string()))?;
        let plan = Arc::new(plan);
        let (begun, beside) = match &request.picture {
            None if self.network.mends() => return Err(beginning::mends_alone()),
            None => (Trajectory::new(plan, request.seed, shape.iter().product()), Vec::new()),
            Some(picture) => self.begun_with(plan, picture, request, shape)?,
        };
        let (trajectory, step) = match from {
            None => (begun, 0),
            Some(from) => {
                begun.resume(from).ok_or_else(|| EngineError::Crashed("a checkpoint that does not fit".to_owned()))?
            }
        };
        let [_, height, width] = shape;
        Ok(Sample {
            key: BatchKey(format!("{sampler}/{width}x{height}/{}", N::kind(&condition))),
            step,
            steps,
            state: Box::new(State {
                trajectory,
                condition,
                second,
                beside,
                guided: request.guided_steps(steps),
                size: request.size,
            }),
        })
    }

    /// Asks the network once for each, and goes on by its answers. Which are in the middle of a step now.
    fn evaluate(&self, moving: &mut [Moving<'_, N::Condition>]) -> Result<Vec<bool>, EngineError> {
        let shape = match moving.first() {
            Some(moving) => self.shape(moving.state.size)?,
            None => return Ok(Vec::new()),
        };
        let mut outputs = vec![Vec::new(); moving.len()];
        // Those that are guided at their step, and those that are not, are asked apart.
        let counts: BTreeSet<usize> = moving.iter().map(|moving| moving.branches).collect();
        for count in counts {
            let (places, states): (Vec<usize>, Vec<&State<N::Condition>>) = moving
                .iter()
                .enumerate()
                .filter(|(_, moving)| moving.branches == count)
                .map(|(place, moving)| (place, &*moving.state))
                .unzip();
            for ((place, state), answers) in places.iter().zip(&states).zip(self.answers(&states, count, shape)?) {
                outputs[*place] = N::guide(&state.condition, answers);
            }
        }
        Ok(moving.iter_mut().zip(outputs).map(|(moving, output)| !moving.state.trajectory.answer(&output)).collect())
    }

    /// The network's answers on the first branches of each; with a second device, that without the prompt is computed there at the same time.
    fn answers(
        &self,
        states: &[&State<N::Condition>],
        branches: usize,
        shape: Shape,
    ) -> Result<Vec<Branches>, EngineError> {
        let asked: Vec<_> = states.iter().map(|state| asked(state)).collect();
        let beside = states.first().map_or(0, |state| state.beside.len());
        let [channels, height, width] = shape;
        let shape = [channels + beside / (height * width).max(1), height, width];
        let here: Vec<&N::Condition> = states.iter().map(|state| &state.condition).collect();
        let there: Option<Vec<&N::Condition>> = states.iter().map(|state| state.second.as_ref()).collect();
        let (Some((network, device)), Some(there), 2..) = (&self.second, there, branches) else {
            return self.network.evaluate(&questions(&asked, &here), 0..branches, shape, &self.device);
        };
        let (with, without) = std::thread::scope(|scope| {
            let without = scope.spawn(|| network.evaluate(&questions(&asked, &there), 1..branches, shape, device));
            let with = self.network.evaluate(&questions(&asked, &here), 0..1, shape, &self.device);
            let crashed = |_| Err(EngineError::Crashed("the branch without the prompt".to_owned()));
            (with, without.join().unwrap_or_else(crashed))
        });
        let (mut answers, without) = (with?, without?);
        answers.iter_mut().zip(without).for_each(|(answers, without)| answers.extend(without));
        Ok(answers)
    }

    fn advance(&self, moving: &mut [Moving<'_, N::Condition>]) -> Result<(), EngineError> {
        let unfinished = self.evaluate(moving)?;
        let mut rest: Vec<_> = moving
            .iter_mut()
            .zip(unfinished)
            .filter(|(_, unfinished)| *unfinished)
            .map(|(moving, _)| Moving { state: &mut *moving.state, branches: moving.branches })
            .collect();
        self.evaluate(&mut rest).map(drop)
    }

    /// What the autoencoder makes at once, or tile by tile where a picture of so many cells is larger than is asked for, or than memory suffices for.
    fn whole_or_tiled(
        &self,
        (height, width): (usize, usize),
        whole: impl Fn() -> candle_core::Result<Tensor> + Send + Sync,
        tiled: impl Fn() -> candle_core::Result<Tensor> + Send + Sync,
    ) -> Result<Tensor, EngineError> {
        let vae = self.network.autoencoder();
        let pixels = (height * width * vae.factor() * vae.factor()) as u64;
        let large = tiles::is_large(vae.tiles(), height, width);
        if large && self.tile_above.is_some_and(|most| pixels > most) {
            return Ok(on_pool(tiled)?);
        }
        match on_pool(whole).map_err(EngineError::from) {
            Err(EngineError::OutOfMemory(message)) if large => {
                tracing::warn!(message, pixels, "too little memory for a picture as a whole; it is made in tiles");
                Ok(on_pool(tiled)?)
            }
            made => made,
        }
    }

    fn decode(&self, latent: &[f32], shape: Shape) -> Result<RgbImage, EngineError> {
        if latent.iter().any(|value| !value.is_finite()) {
            return Err(EngineError::Crashed("the latent is not finite".to_owned()));
        }
        let [channels, height, width] = shape;
        let latent = Tensor::from_slice(latent, (1, channels, height, width), &self.device)?;
        let vae = self.network.autoencoder();
        let latent = vae.unscale(&latent.permute((0, 2, 3, 1))?.contiguous()?)?;
        let picture =
            self.whole_or_tiled((height, width), || vae.decode(&latent), || tiles::decode(vae, &latent, vae.tiles()))?;
        let (_, height, width, _) = picture.dims4()?;
        let values: Vec<f32> = picture.flatten_all()?.to_vec1()?;
        let bytes = values.iter().map(|v| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8).collect();
        RgbImage::from_raw(width as u32, height as u32, bytes)
            .ok_or_else(|| EngineError::Crashed("a picture of another size".to_owned()))
    }

    fn state(sample: &Sample) -> Result<&State<N::Condition>, EngineError> {
        sample.state.downcast_ref().ok_or_else(foreign)
    }
}

fn foreign() -> EngineError {
    EngineError::Crashed("a sample of another engine".to_owned())
}

/// A latent of fewer cells, each the mean of several: its picture is smaller and costs less.
fn shrunk(latent: &[f32], [channels, height, width]: [usize; 3]) -> (Vec<f32>, [usize; 3]) {
    let factor = width.max(height).div_ceil(PREVIEW_CELLS);
    let (rows, columns) = ((height / factor).max(1), (width / factor).max(1));
    let mean = |channel: usize, row: usize, column: usize| {
        let cells = (row * factor..((row + 1) * factor).min(height))
            .flat_map(|y| (column * factor..((column + 1) * factor).min(width)).map(move |x| (y, x)));
        let (sum, count) = cells
            .fold((0.0, 0.0), |(sum, count), (y, x)| (sum + latent[(channel * height + y) * width + x], count + 1.0));
        sum / count
    };
    let small = (0..channels)
        .flat_map(|c| (0..rows).flat_map(move |y| (0..columns).map(move |x| (c, y, x))))
        .map(|(c, y, x)| mean(c, y, x))
        .collect();
    (small, [channels, rows, columns])
}

impl<N: Network> Hand for Engine<N> {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        self.begin_from(request, None)
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let mut outcomes: Vec<Result<(), EngineError>> = Vec::with_capacity(batch.len());
        let mut moving = Vec::with_capacity(batch.len());
        for sample in batch.iter_mut() {
            let complete = sample.is_complete();
            match sample.state.downcast_mut::<State<N::Condition>>() {
                Some(state) if !complete && !state.trajectory.is_complete() => {
                    let branches = N::branches(&state.condition);
                    let branches = if state.guided.contains(&sample.step) { branches } else { branches.min(1) };
                    moving.push(Moving { state, branches });
                    outcomes.push(Ok(()));
                }
                _ => outcomes.push(Err(foreign())),
            }
        }
        if let Err(error) = self.advance(&mut moving) {
            return outcomes.into_iter().map(|outcome| outcome.and_then(|()| Err(error.again()))).collect();
        }
        for (sample, outcome) in batch.iter_mut().zip(&outcomes) {
            sample.step += u32::from(outcome.is_ok());
        }
        outcomes
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        let State { trajectory, size, .. } = Self::state(sample)?;
        let (latent, shape) = shrunk(trajectory.clean(), self.shape(*size)?);
        self.decode(&latent, shape)
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        let State { trajectory, size, .. } = Self::state(&sample)?;
        self.decode(trajectory.latent(), self.shape(*size)?)
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        Ok(Self::state(sample)?.trajectory.checkpoint().into())
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        self.begin_from(request, Some(from))
    }
}
