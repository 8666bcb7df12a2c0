//! The hand of the shipped pipeline: 96 x 96 pictures by flow matching on a 12 x 12 x 16 latent.
//!
//! Read in this order: this file (the engine), `network` (the denoiser), `trajectory` (its samplers), `decode` (latent to picture).

mod decode;
mod network;
#[cfg(test)]
mod tests;
mod trajectory;

use std::ops::Range;

use bytes::Bytes;
use candle_core::{Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlSpace, StreamRole},
    v1::{ErrorCode, Size},
};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    nn::rows::{by_row, on_pool},
    pipeline::Pipeline,
    signal,
    weights::Weights,
};
use image::RgbImage;
use serde::Deserialize;

use self::{
    decode::Decoder,
    network::Network,
    trajectory::{Sampler, Trajectory, schedule},
};
use crate::{families::Setup, noise::randn};

/// Channels of the latent.
const CHANNELS: usize = 16;
/// Cells of the latent, along each side.
const GRID: usize = 12;
/// Tokens of the latent: 2 x 2 cells each.
const PATCHES: usize = 36;
const PATCH_WIDTH: usize = 4 * CHANNELS;
const LATENT: usize = PATCHES * PATCH_WIDTH;
/// Pixels of a picture, along each side.
const SIDE: u32 = 96;
/// Samples that share a pass. On CPU a pass takes time in proportion, so more would only keep the first one waiting.
const MAX_BATCH: usize = 8;

/// `hand.config` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Tokens of a control signal.
    queries: usize,
    /// Channels of a token.
    width: usize,
    /// Attention heads.
    heads: usize,
    /// Layers.
    layers: usize,
    /// Shift of the schedule: above 1, more steps are spent near the noise.
    shift: f32,
}

struct Pictogram {
    spec: EngineSpec,
    space: ControlSpace,
    config: Config,
    network: Network,
    decoder: Decoder,
    device: Device,
    /// The network once more, on another device, for the branch without the prompt.
    second: Option<(Network, Device)>,
}

struct State {
    trajectory: Trajectory,
    times: Vec<f32>,
    guidance_scale: f32,
    /// Steps that are guided.
    guided: Range<u32>,
    /// (queries, width)
    control: Tensor,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or does not fit the manifest.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> Result<Box<dyn Hand>, EngineError> {
    let unloadable =
        |source: Box<dyn std::error::Error + Send + Sync>| EngineError::compute("cannot load the hand", source);
    let config: Config = pipeline.config("hand", &pipeline.hand().config).map_err(|e| unloadable(e.into()))?;
    let Config { queries, width, heads, .. } = config;
    if queries == 0
        || width == 0
        || heads == 0
        || width % heads != 0
        || !(config.shift > 0.0 && config.shift.is_finite())
    {
        return Err(ApiError::new(ErrorCode::InvalidField, format!("hand.config cannot be: {config:?}")).into());
    }
    // The space says at which layer the brain was read; only the brain's part of the manifest tells.
    let layer = pipeline.brain().config.get("layer").and_then(serde_json::Value::as_u64).unwrap_or(0);
    let space = pipeline.space(width as u32, format!("queries{queries}@{layer}"), "rms");
    let mut model = pipeline.model(&space);
    // What the manifest offers and this family cannot do is not offered.
    model.sizes.retain(|size| *size == Size { width: SIDE, height: SIDE });
    model.samplers.retain(|name| name.parse::<Sampler>().is_ok());
    if model.sizes.is_empty() || model.samplers.is_empty() {
        let known = Sampler::ALL.map(Sampler::name).join(", ");
        let message = format!("this family draws {SIDE}x{SIDE} with {known}; the manifest offers none of that");
        return Err(ApiError::new(ErrorCode::InvalidField, message).field("offers").into());
    }
    let path = pipeline.weights(pipeline.hand()).map_err(|e| unloadable(e.into()))?;
    let keep = setup.dtypes.of_file(&pipeline.hand().name);
    let parts = |device: &Device| {
        let mut weights =
            Weights::open_shards(std::slice::from_ref(&path), device, keep).map_err(|e| unloadable(e.into()))?;
        let (network, decoder) = (Network::new(&config, &mut weights)?, Decoder::new(&mut weights)?);
        weights.finish().map_err(|e| unloadable(e.into()))?;
        Ok::<_, EngineError>((network, decoder))
    };
    let device = setup.first.clone();
    let (network, decoder) = parts(&device)?;
    let second = match &setup.second {
        Some(device) => Some((parts(device)?.0, device.clone())),
        None => None,
    };
    let spec = EngineSpec { model, max_batch: MAX_BATCH, simulated: false };
    Ok(Box::new(Pictogram { spec, space, config, network, decoder, device, second }))
}

impl Pictogram {
    /// Predictions of the clean latents at (`latents`, `times`), guided where `guided` says so.
    fn predict(
        &self,
        states: &[&State],
        latents: &[&[f32]],
        times: &[f32],
        guided: &[bool],
    ) -> candle_core::Result<Vec<Vec<f32>>> {
        let tensors = |network: &Network, device: &Device, prompted: bool, places: &[usize]| {
            let (count, null) = (places.len(), network.null());
            let latents: Vec<f32> = places.iter().flat_map(|place| latents[*place]).copied().collect();
            let z = Tensor::from_vec(latents, (count, PATCHES, PATCH_WIDTH), device)?;
            let t = Tensor::from_vec(places.iter().map(|place| times[*place]).collect::<Vec<_>>(), count, device)?;
            let control = |place: &usize| if prompted { &states[*place].control } else { null };
            Ok::<_, candle_core::Error>([z, t, Tensor::stack(&places.iter().map(control).collect::<Vec<_>>(), 0)?])
        };
        let forward = |network: &Network, [z, t, control]: [Tensor; 3]| {
            let answer = by_row(&[&z, &t, &control], |row| network.forward(&row[0], &row[1], &row[2]))?;
            answer.flatten_from(1)?.to_vec2::<f32>()
        };
        let all: Vec<usize> = (0..states.len()).collect();
        let twice: Vec<usize> = all.iter().copied().filter(|place| guided[*place]).collect();
        let (mut with, without) = match &self.second {
            Some((network, device)) if !twice.is_empty() => std::thread::scope(|scope| {
                let without = scope.spawn(|| forward(network, tensors(network, device, false, &twice)?));
                let with = forward(&self.network, tensors(&self.network, &self.device, true, &all)?)?;
                let crashed = |_| candle_core::bail!("the branch without the prompt crashed");
                Ok::<_, candle_core::Error>((with, without.join().unwrap_or_else(crashed)?))
            })?,
            _ => {
                let (mut inputs, count) = (tensors(&self.network, &self.device, true, &all)?, all.len());
                if !twice.is_empty() {
                    let more = tensors(&self.network, &self.device, false, &twice)?;
                    for (input, more) in inputs.iter_mut().zip(more) {
                        *input = Tensor::cat(&[&*input, &more], 0)?;
                    }
                }
                let mut with = forward(&self.network, inputs)?;
                let without = with.split_off(count);
                (with, without)
            }
        };
        for (place, u) in twice.into_iter().zip(without) {
            let scale = states[place].guidance_scale;
            with[place].iter_mut().zip(u).for_each(|(c, u)| *c = u + scale * (*c - u));
        }
        Ok(with)
    }

    fn advance(&self, batch: &mut [(&mut State, usize)]) -> candle_core::Result<()> {
        let predictions = {
            let states: Vec<&State> = batch.iter().map(|(state, _)| &**state).collect();
            let latents: Vec<&[f32]> = states.iter().map(|state| &*state.trajectory.latent).collect();
            let times: Vec<f32> = batch.iter().map(|(state, step)| state.times[*step]).collect();
            let guided: Vec<bool> = batch.iter().map(|(state, step)| state.is_guided_at(*step)).collect();
            self.predict(&states, &latents, &times, &guided)?
        };
        let mut corrections = Vec::new();
        for (index, ((state, step), clean)) in batch.iter_mut().zip(predictions).enumerate() {
            let State { trajectory, times, .. } = &mut **state;
            if let Some(correction) = trajectory.advance(times, *step, clean) {
                corrections.push((index, correction));
            }
        }
        if corrections.is_empty() {
            return Ok(());
        }
        let predictions = {
            let states: Vec<&State> = corrections.iter().map(|(index, _)| &*batch[*index].0).collect();
            let latents: Vec<&[f32]> = corrections.iter().map(|(_, correction)| &*correction.latent).collect();
            let times: Vec<f32> = corrections.iter().map(|(i, _)| batch[*i].0.times[batch[*i].1 + 1]).collect();
            let guided: Vec<bool> = corrections.iter().map(|(i, _)| batch[*i].0.is_guided_at(batch[*i].1)).collect();
            self.predict(&states, &latents, &times, &guided)?
        };
        for ((index, correction), clean) in corrections.iter().zip(predictions) {
            let (state, step) = &mut batch[*index];
            let State { trajectory, times, .. } = &mut **state;
            trajectory.correct(times, *step, correction, clean);
        }
        Ok(())
    }

    fn decode(&self, latent: &[f32]) -> Result<RgbImage, EngineError> {
        if latent.iter().any(|value| !value.is_finite()) {
            return Err(EngineError::Crashed("the latent is not finite".to_owned()));
        }
        let patches = Tensor::from_slice(latent, (1, PATCHES, PATCH_WIDTH), &self.device)?;
        let picture = on_pool(|| self.decoder.forward(&network::unpatch(&patches)?))?;
        let values = picture.flatten_all()?.to_vec1::<f32>()?;
        let bytes = values.iter().map(|v| ((v.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8).collect();
        RgbImage::from_raw(SIDE, SIDE, bytes)
            .ok_or_else(|| EngineError::Crashed("a picture of another size".to_owned()))
    }
}

impl State {
    fn is_guided_at(&self, step: usize) -> bool {
        is_guided(self.guidance_scale) && self.guided.contains(&(step as u32))
    }
}

fn is_guided(guidance_scale: f32) -> bool {
    (guidance_scale - 1.0).abs() > f32::EPSILON
}

fn state(sample: &Sample) -> Result<&State, EngineError> {
    sample.state.downcast_ref().ok_or_else(foreign)
}

fn foreign() -> EngineError {
    EngineError::Crashed("a sample of another engine".to_owned())
}

impl Hand for Pictogram {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        signal::check_space(&request.signal, &self.space)?;
        let stream = signal::find(&request.signal, StreamRole::Query, Branch::Conditional).ok_or_else(|| {
            ApiError::new(ErrorCode::InvalidField, "the control signal has no conditional query stream").field("signal")
        })?;
        let control = signal::tensor(stream, &self.device)?;
        let Config { queries, width, shift, .. } = self.config;
        if control.dims() != [queries, width] {
            let message =
                format!("the control signal has {:?} values, this hand reads {queries} x {width}", control.dims());
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("signal").into());
        }
        if request.size != (Size { width: SIDE, height: SIDE }) {
            let message = format!("this hand draws {SIDE}x{SIDE}, not {}x{}", request.size.width, request.size.height);
            return Err(ApiError::new(ErrorCode::NotOffered, message)
                .field("size")
                .limit(format!("{SIDE}x{SIDE}"))
                .into());
        }
        let sampler: Sampler = request.sampler.parse().map_err(|message: String| {
            ApiError::new(ErrorCode::NotOffered, message)
                .field("sampler")
                .limit(Sampler::ALL.map(Sampler::name).join(", "))
        })?;
        if request.steps == 0 || request.steps > self.spec.model.max_steps {
            let limit = self.spec.model.max_steps;
            let message = format!("{} steps; this hand takes 1 to {limit}", request.steps);
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field("steps")
                .limit(limit.to_string())
                .into());
        }
        if !request.guidance_scale.is_finite() {
            return Err(ApiError::new(ErrorCode::InvalidField, "the guidance scale is not finite")
                .field("guidance_scale")
                .into());
        }
        let guided = if is_guided(request.guidance_scale) { "guided" } else { "unguided" };
        let state = State {
            trajectory: Trajectory::new(sampler, randn(request.seed, LATENT)),
            times: schedule(request.steps as usize, shift),
            guidance_scale: request.guidance_scale,
            guided: request.guided_steps(request.steps),
            control,
        };
        Ok(Sample {
            key: BatchKey(format!("{}/{guided}", sampler.name())),
            step: 0,
            steps: request.steps,
            state: Box::new(state),
        })
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let mut outcomes: Vec<Result<(), EngineError>> = Vec::with_capacity(batch.len());
        let mut states = Vec::with_capacity(batch.len());
        for sample in batch.iter_mut() {
            let (step, steps) = (sample.step as usize, sample.steps);
            match sample.state.downcast_mut::<State>() {
                Some(state) if sample.step < steps => {
                    states.push((state, step));
                    outcomes.push(Ok(()));
                }
                _ => outcomes.push(Err(foreign())),
            }
        }
        if !states.is_empty()
            && let Err(error) = self.advance(&mut states)
        {
            let error = EngineError::from(error);
            return outcomes.into_iter().map(|outcome| outcome.and_then(|()| Err(error.again()))).collect();
        }
        for (sample, outcome) in batch.iter_mut().zip(&outcomes) {
            sample.step += u32::from(outcome.is_ok());
        }
        outcomes
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        let trajectory = &state(sample)?.trajectory;
        // What the network takes the picture for; before the first step that is the noise.
        self.decode(if trajectory.clean.is_empty() { &trajectory.latent } else { &trajectory.clean })
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        self.decode(&state(&sample)?.trajectory.latent)
    }

    /// step (u32), then latent and the last prediction (f32 each), little endian
    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        let trajectory = &state(sample)?.trajectory;
        let mut bytes = sample.step.to_le_bytes().to_vec();
        for value in trajectory.latent.iter().chain(&trajectory.clean) {
            bytes.extend(value.to_le_bytes());
        }
        Ok(bytes.into())
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        let unfit = || EngineError::Crashed("a checkpoint that does not fit".to_owned());
        let mut sample = self.begin(request)?;
        let (step, values) = from.split_first_chunk::<4>().ok_or_else(unfit)?;
        let (step, (values, rest)) = (u32::from_le_bytes(*step), values.as_chunks::<4>());
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let wanted = if step == 0 { LATENT } else { 2 * LATENT };
        if step > sample.steps || values.len() != wanted || !rest.is_empty() || values.iter().any(|v| !v.is_finite()) {
            return Err(unfit());
        }
        let State { trajectory, .. } = sample.state.downcast_mut().ok_or_else(foreign)?;
        trajectory.latent = values[..LATENT].to_vec();
        trajectory.clean = values[LATENT..].to_vec();
        sample.step = step;
        Ok(sample)
    }
}
