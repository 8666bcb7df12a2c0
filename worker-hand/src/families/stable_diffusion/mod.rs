//! Stable Diffusion 1.5, 2.1 and XL, from a folder of diffusers: a UNet on the latents of an autoencoder, conditioned on the states of text encoders.
//!
//! Read in this order: this file (the engine), `model` (what is loaded, and one guided evaluation).
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/stable_diffusion{,_xl}`.

mod model;

use std::sync::Arc;

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
    signal,
    weights::Weights,
};
use image::RgbImage;
use serde::Deserialize;

use self::model::{Condition, Model};
use crate::{
    networks::{autoencoder::Autoencoder, unet::Unet},
    samplers::{self, Flow, Plan, Sampler, Trajectory},
};

/// Samples that share a pass. On CPU a pass takes time in proportion, so more would only keep the first one waiting.
const MAX_BATCH: usize = 8;
/// Cells of a latent along the longest side of a preview.
const PREVIEW_CELLS: usize = 16;

/// `hand.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// What the space calls the states that the network was trained with.
    layers: String,
}

struct StableDiffusion {
    spec: EngineSpec,
    space: ControlSpace,
    scheduler: samplers::Config,
    model: Model,
    device: Device,
}

struct State {
    trajectory: Trajectory,
    condition: Condition,
    size: Size,
    /// Strength of guidance; none for a single evaluation.
    guidance: Option<f32>,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, device: &Device) -> Result<Box<dyn Hand>, EngineError> {
    let unloadable = |part: &'static str| {
        move |source: Box<dyn std::error::Error + Send + Sync>| {
            EngineError::compute(format!("cannot load {part}"), source)
        }
    };
    let config: Config =
        pipeline.config("hand", &pipeline.hand().config).map_err(|e| unloadable("the pipeline")(e.into()))?;
    let folder = pipeline.folder();
    let scheduler: samplers::Config = read_json(&folder.join("scheduler").join("scheduler_config.json"))
        .map_err(|e| unloadable("the scheduler")(e.into()))?;
    let open = |part: &'static str| {
        let (files, variant) = diffusers::weights(&folder.join(part)).map_err(|e| unloadable(part)(e.into()))?;
        tracing::info!(part, variant, files = files.len(), "loading");
        Weights::open_shards(&files, device).map_err(|e| unloadable(part)(e.into()))
    };
    // Configurations first: they are told to be wrong at once, weights take a while to read.
    let unet_config = read_json(&folder.join("unet").join("config.json")).map_err(|e| unloadable("unet")(e.into()))?;
    let vae_config = read_json(&folder.join("vae").join("config.json")).map_err(|e| unloadable("vae")(e.into()))?;
    let mut weights = open("unet")?;
    let unet = Unet::new(unet_config, &mut weights).map_err(|e| unloadable("unet")(e.into()))?;
    weights.finish().map_err(|e| unloadable("unet")(e.into()))?;
    let mut weights = open("vae")?;
    let vae = Autoencoder::new(vae_config, &mut weights).map_err(|e| unloadable("vae")(e.into()))?;
    weights.finish().map_err(|e| unloadable("vae")(e.into()))?;
    let space = pipeline.space(unet.config().cross_attention_dim as u32, config.layers, "none");
    let spec = EngineSpec { model: pipeline.model(&space), max_batch: MAX_BATCH, simulated: false };
    let model = Model::new(unet, vae)?;
    Ok(Box::new(StableDiffusion { spec, space, scheduler, model, device: device.clone() }))
}

impl StableDiffusion {
    /// Channels, height and width of the latent of a picture.
    fn latent(&self, size: Size) -> Result<[usize; 3], EngineError> {
        let cell = self.model.cell();
        let (width, height) = (size.width as usize, size.height as usize);
        let sides = [width, height];
        if sides.iter().any(|side| *side == 0 || !side.is_multiple_of(cell) || *side > 16_384) {
            let message = format!("{width}x{height}: both sides of a picture must be multiples of {cell}");
            return Err(ApiError::new(ErrorCode::NotOffered, message).field("size").limit(cell.to_string()).into());
        }
        Ok([self.model.channels(), height / cell, width / cell])
    }

    fn begin_from(&mut self, request: &RenderRequest, from: Option<&[u8]>) -> Result<Sample, EngineError> {
        signal::check_space(&request.signal, &self.space)?;
        let latent = self.latent(request.size)?;
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
            return Err(refused(
                ErrorCode::InvalidField,
                "guidance_scale",
                "the guidance scale is not finite".to_owned(),
            ));
        }
        // As in diffusers: at 1 and below there is one evaluation, without guidance.
        let guidance = (request.guidance_scale > 1.0).then_some(request.guidance_scale);
        let condition = self.model.condition(&request.signal, request.size, guidance.is_some(), &self.device)?;
        let plan = Plan::new(&self.scheduler, sampler, request.steps as usize, Flow::default())
            .map_err(|error| refused(ErrorCode::NotOffered, "steps", error.to_string()))?;
        let (plan, count) = (Arc::new(plan), latent.iter().product());
        let (trajectory, step) = match from {
            None => (Trajectory::new(plan, request.seed, count), 0),
            Some(from) => Trajectory::resume(plan, request.seed, count, from)
                .ok_or_else(|| EngineError::Crashed("a checkpoint that does not fit".to_owned()))?,
        };
        let [tokens, _] = condition.shape();
        let [_, height, width] = latent;
        let guided = if guidance.is_some() { "guided" } else { "unguided" };
        Ok(Sample {
            key: BatchKey(format!("{sampler}/{guided}/{width}x{height}/{tokens}")),
            step,
            steps: request.steps,
            state: Box::new(State { trajectory, condition, size: request.size, guidance }),
        })
    }

    /// Asks the network once for each, and goes on by its answers. Which are in the middle of a step now.
    fn evaluate(&self, states: &mut [&mut State]) -> Result<Vec<bool>, EngineError> {
        let shape = match states.first() {
            Some(state) => self.latent(state.size)?,
            None => return Ok(Vec::new()),
        };
        let outputs = {
            let questions: Vec<_> = states.iter().map(|state| state.trajectory.question()).collect();
            let asked: Vec<_> = states
                .iter()
                .zip(&questions)
                .map(|(state, (latent, time))| model::Question {
                    latent,
                    time: *time,
                    condition: &state.condition,
                    guidance: state.guidance,
                })
                .collect();
            self.model.predict(&asked, shape, &self.device)?
        };
        Ok(states.iter_mut().zip(outputs).map(|(state, output)| !state.trajectory.answer(&output)).collect())
    }

    fn advance(&self, states: &mut [&mut State]) -> Result<(), EngineError> {
        let unfinished = self.evaluate(states)?;
        let mut rest: Vec<&mut State> = states
            .iter_mut()
            .zip(unfinished)
            .filter(|(_, unfinished)| *unfinished)
            .map(|(state, _)| &mut **state)
            .collect();
        self.evaluate(&mut rest).map(drop)
    }

    fn decode(&self, latent: &[f32], shape: [usize; 3]) -> Result<RgbImage, EngineError> {
        if latent.iter().any(|value| !value.is_finite()) {
            return Err(EngineError::Crashed("the latent is not finite".to_owned()));
        }
        let [channels, height, width] = shape;
        let latent = Tensor::from_slice(latent, (1, channels, height, width), &self.device)?;
        let (values, width, height) = on_pool(|| self.model.decode(&latent))?;
        let bytes = values.iter().map(|v| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8).collect();
        RgbImage::from_raw(width, height, bytes)
            .ok_or_else(|| EngineError::Crashed("a picture of another size".to_owned()))
    }
}

fn state(sample: &Sample) -> Result<&State, EngineError> {
    sample.state.downcast_ref().ok_or_else(foreign)
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

impl Hand for StableDiffusion {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        self.begin_from(request, None)
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let mut outcomes: Vec<Result<(), EngineError>> = Vec::with_capacity(batch.len());
        let mut states = Vec::with_capacity(batch.len());
        for sample in batch.iter_mut() {
            let complete = sample.is_complete();
            match sample.state.downcast_mut::<State>() {
                Some(state) if !complete && !state.trajectory.is_complete() => {
                    states.push(state);
                    outcomes.push(Ok(()));
                }
                _ => outcomes.push(Err(foreign())),
            }
        }
        if let Err(error) = self.advance(&mut states) {
            let memory = matches!(error, EngineError::OutOfMemory(_));
            let message = error.to_string();
            let failed = || match memory {
                true => Err(EngineError::OutOfMemory(message.clone())),
                false => Err(EngineError::compute("a denoising step failed", message.clone())),
            };
            return outcomes.into_iter().map(|outcome| outcome.and_then(|()| failed())).collect();
        }
        for (sample, outcome) in batch.iter_mut().zip(&outcomes) {
            sample.step += u32::from(outcome.is_ok());
        }
        outcomes
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        let State { trajectory, size, .. } = state(sample)?;
        let (latent, shape) = shrunk(trajectory.clean(), self.latent(*size)?);
        self.decode(&latent, shape)
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        let State { trajectory, size, .. } = state(&sample)?;
        self.decode(trajectory.latent(), self.latent(*size)?)
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        Ok(state(sample)?.trajectory.checkpoint().into())
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        self.begin_from(request, Some(from))
    }
}
