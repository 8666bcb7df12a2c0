//! FLUX.1 (dev, schnell), from a folder of diffusers: a transformer on patches of the latents of an autoencoder, conditioned on T5's states and CLIP's
//! pooled vector. The strength of guidance is a number that the network is told, or is not wanted; there is no branch without the prompt.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/flux`.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use efferent_proto::{ApiError, internal::Branch, v1::ErrorCode};
use efferent_worker::{
    engine::{EngineError, Hand, RenderRequest},
    nn::rows::by_large_row,
    pipeline::Pipeline,
};

use crate::{
    families::Setup,
    latent::{self, Branches, Network, Question, Shape},
    networks::{
        LatentSpace,
        autoencoder::Autoencoder,
        flux::{Flux as Transformer, Text},
    },
    samplers::{self, Flow},
};

/// Cells of a patch along each side.
const PATCH: usize = 2;

#[derive(Debug)]
struct Flux {
    transformer: Transformer,
    vae: Autoencoder,
}

/// What a sample is conditioned on.
#[derive(Debug)]
struct Condition {
    /// (1, tokens, width)
    states: Tensor,
    /// (1, width)
    pooled: Tensor,
    guidance: f32,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> std::result::Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, setup, |parts| {
        let (transformer, vae) = (parts.config("transformer")?, parts.config("vae")?);
        let transformer = parts.load("transformer", |weights| Transformer::new(transformer, weights))?;
        let vae = parts.load("vae", |weights| Autoencoder::new(vae, weights))?;
        let channels = transformer.config().in_channels;
        if channels % (PATCH * PATCH) != 0 {
            let message = format!("{channels} channels are not those of patches of {PATCH} x {PATCH} cells");
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("transformer").into());
        }
        let cells = channels / (PATCH * PATCH);
        latent::check_channels("transformer", (cells, cells), 0, &vae)?;
        Ok(Flux { transformer, vae })
    })
}

impl Network for Flux {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.transformer.config().joint_attention_dim
    }

    fn multiple(&self) -> usize {
        self.vae.factor() * PATCH
    }

    fn autoencoder(&self) -> &dyn LatentSpace {
        &self.vae
    }

    fn flow(
        &self,
        scheduler: &samplers::Config,
        [_, height, width]: Shape,
    ) -> std::result::Result<Flow, samplers::Error> {
        let tokens = (height / PATCH) * (width / PATCH);
        Ok(Flow { even: true, mu: Some(latent::shift_of_size(scheduler, tokens)?) })
    }

    fn condition(&self, request: &RenderRequest, device: &Device) -> std::result::Result<Condition, EngineError> {
        let signal = &request.signal;
        let config = self.transformer.config();
        let states = latent::text(signal, &[Branch::Conditional], config.joint_attention_dim, device)?;
        let pooled = latent::pooled(signal, &[Branch::Conditional], config.pooled_projection_dim, device)?;
        Ok(Condition { states, pooled, guidance: request.guidance_scale })
    }

    fn kind(condition: &Condition) -> String {
        condition.states.dims()[1].to_string()
    }

    fn branches(_: &Condition) -> usize {
        1
    }

    fn guide(_: &Condition, answers: Branches) -> Vec<f32> {
        answers.into_iter().next().unwrap_or_default()
    }

    fn evaluate(
        &self,
        questions: &[Question<'_, Condition>],
        _: Range<usize>,
        [channels, height, width]: Shape,
        device: &Device,
    ) -> std::result::Result<Vec<Branches>, EngineError> {
        let (rows, columns) = (height / PATCH, width / PATCH);
        let patches = |q: &Question<'_, Condition>| {
            let cells = Tensor::from_slice(q.latent, (channels, rows, PATCH, columns, PATCH), device)?;
            let packed = cells.permute((1, 3, 0, 2, 4))?.contiguous()?;
            packed.reshape((1, rows * columns, channels * PATCH * PATCH))
        };
        let x = Tensor::cat(&questions.iter().map(patches).collect::<Result<Vec<_>>>()?, 0)?;
        let count = questions.len();
        let numbers = |f: fn(&Question<'_, Condition>) -> f32| {
            Tensor::from_vec(questions.iter().map(f).collect::<Vec<_>>(), count, device)
        };
        let (times, guidance) = (numbers(|q| q.time)?, numbers(|q| q.condition.guidance)?);
        let states = Tensor::cat(&questions.iter().map(|q| &q.condition.states).collect::<Vec<_>>(), 0)?;
        let pooled = Tensor::cat(&questions.iter().map(|q| &q.condition.pooled).collect::<Vec<_>>(), 0)?;
        let told = self.transformer.config().guidance_embeds;
        let answer = by_large_row(&[&x, &times, &guidance, &states, &pooled], |row| {
            let text = Text { states: &row[3], pooled: &row[4], bias: None };
            self.transformer.forward(&row[0], &row[1], text, told.then_some(&row[2]), (rows, columns))
        })?;
        let cells = answer
            .reshape((count, rows, columns, channels, PATCH, PATCH))?
            .permute(&[0, 3, 1, 4, 2, 5][..])?
            .contiguous()?;
        Ok(cells.flatten_from(1)?.to_vec2()?.into_iter().map(|answer| vec![answer]).collect())
    }
}
