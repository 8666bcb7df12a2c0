//! Stable Diffusion 3 and 3.5, from a folder of diffusers: a transformer on patches of the latents of an autoencoder, conditioned on the states of two CLIPs
//! and T5, with guidance against a negative prompt.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/stable_diffusion_3`.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use efferent_worker::{
    engine::{EngineError, Hand, RenderRequest},
    nn::rows::by_large_row,
    pipeline::Pipeline,
};

use crate::{
    families::Setup,
    latent::{self, Branches, Network, Question, Shape, Strength, guide},
    networks::{LatentSpace, autoencoder::Autoencoder, sd3::Sd3},
    samplers::{self, Flow},
};

#[derive(Debug)]
struct StableDiffusion3 {
    transformer: Sd3,
    vae: Autoencoder,
}

/// What a sample is conditioned on, with the branch without the prompt last, if there is guidance.
#[derive(Debug)]
struct Condition {
    /// (1 or 2, tokens, width)
    states: Tensor,
    /// (1 or 2, width)
    pooled: Tensor,
    strength: Strength,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> std::result::Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, setup, |parts| {
        let (transformer, vae) = (parts.config("transformer")?, parts.config("vae")?);
        let transformer = parts.load("transformer", |weights| Sd3::new(transformer, weights))?;
        let vae = parts.load("vae", |weights| Autoencoder::new(vae, weights))?;
        let config = transformer.config();
        latent::check_channels("transformer", (config.in_channels, config.out_channels), 0, &vae)?;
        Ok(StableDiffusion3 { transformer, vae })
    })
}

impl Network for StableDiffusion3 {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.transformer.config().joint_attention_dim
    }

    fn multiple(&self) -> usize {
        self.vae.factor() * self.transformer.config().patch_size
    }

    fn autoencoder(&self) -> &dyn LatentSpace {
        &self.vae
    }

    fn flow(
        &self,
        scheduler: &samplers::Config,
        [_, height, width]: Shape,
    ) -> std::result::Result<Flow, samplers::Error> {
        let side = self.transformer.config().patch_size;
        let tokens = (height / side) * (width / side);
        Ok(Flow { even: false, mu: Some(latent::shift_of_size(scheduler, tokens)?) })
    }

    fn condition(&self, request: &RenderRequest, device: &Device) -> std::result::Result<Condition, EngineError> {
        let signal = &request.signal;
        let (config, branches) = (self.transformer.config(), latent::guiding(request));
        let states = latent::text(signal, &branches, config.joint_attention_dim, device)?;
        let pooled = latent::pooled(signal, &branches, config.pooled_projection_dim, device)?;
        Ok(Condition { states, pooled, strength: request.into() })
    }

    fn kind(condition: &Condition) -> String {
        let dims = condition.states.dims();
        format!("{}/{}", dims[0], dims[1])
    }

    fn branches(condition: &Condition) -> usize {
        condition.states.dims()[0]
    }

    fn guide(condition: &Condition, answers: Branches) -> Vec<f32> {
        guide(condition.strength, answers)
    }

    fn evaluate(
        &self,
        questions: &[Question<'_, Condition>],
        branches: Range<usize>,
        [channels, height, width]: Shape,
        device: &Device,
    ) -> std::result::Result<Vec<Branches>, EngineError> {
        let per = branches.len();
        let parts = |of: fn(&Condition) -> &Tensor| {
            let part = |q: &Question<'_, Condition>| of(q.condition).narrow(0, branches.start, per);
            Tensor::cat(&questions.iter().map(part).collect::<Result<Vec<_>>>()?, 0)
        };
        let rows = |q: &Question<'_, Condition>| {
            let x = Tensor::from_slice(q.latent, (1, channels, height, width), device)?;
            Tensor::cat(&vec![x; per], 0)
        };
        let x = Tensor::cat(&questions.iter().map(rows).collect::<Result<Vec<_>>>()?, 0)?;
        let times: Vec<f32> = questions.iter().flat_map(|q| std::iter::repeat_n(q.time, per)).collect();
        let times = Tensor::from_vec(times, per * questions.len(), device)?;
        let (states, pooled) = (parts(|condition| &condition.states)?, parts(|condition| &condition.pooled)?);
        let answer = by_large_row(&[&x, &times, &states, &pooled], |row| {
            self.transformer.forward(&row[0], &row[1], &row[2], &row[3], None)
        })?;
        let answers = answer.flatten_from(1)?.to_vec2::<f32>()?;
        Ok(answers.chunks(per.max(1)).map(<[_]>::to_vec).collect())
    }
}
