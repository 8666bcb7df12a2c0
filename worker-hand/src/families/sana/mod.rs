//! Sana and Sana-Sprint, from a folder of diffusers: a transformer with linear attention on the latents of an autoencoder of 32 pixels a cell, conditioned on
//! the states of a decoder language model.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/sana`.

use std::ops::Range;

use candle_core::{Device, Tensor};
use efferent_proto::internal::Branch;
use efferent_worker::{
    engine::{EngineError, Hand, RenderRequest},
    nn::{attention::hide_absent, rows::by_large_row},
    pipeline::Pipeline,
};

use crate::{
    families::Setup,
    latent::{self, Branches, FilledText, Network, Question, Shape, Strength},
    networks::{LatentSpace, dc_autoencoder::DcAutoencoder, sana::Sana as Transformer},
};

/// Texts are filled up to a multiple of so many tokens, which are hidden, so that those of about one length share a pass.
const MULTIPLE: usize = 32;

#[derive(Debug)]
struct Sana {
    transformer: Transformer,
    vae: DcAutoencoder,
}

/// What a sample is conditioned on.
#[derive(Debug)]
struct Condition {
    /// With the prompt, and without it if there is classifier-free guidance.
    texts: Vec<FilledText>,
    strength: Strength,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, setup, |parts| {
        let (transformer, vae) = (parts.config("transformer")?, parts.config("vae")?);
        let transformer = parts.load("transformer", |weights| Transformer::new(transformer, weights))?;
        let vae = parts.load("vae", |weights| DcAutoencoder::new(vae, weights))?;
        let config = transformer.config();
        latent::check_channels("transformer", (config.in_channels, config.out_channels), 0, &vae)?;
        Ok(Sana { transformer, vae })
    })
}

impl Network for Sana {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.transformer.config().caption_channels
    }

    fn multiple(&self) -> usize {
        self.vae.factor() * self.transformer.config().patch_size
    }

    fn autoencoder(&self) -> &dyn LatentSpace {
        &self.vae
    }

    fn condition(&self, request: &RenderRequest, device: &Device) -> Result<Condition, EngineError> {
        let signal = &request.signal;
        let text = |branch| latent::filled_text(signal, branch, self.width(), MULTIPLE, device);
        // Sprint is told the strength instead.
        let branches = match self.transformer.config().guidance_embeds {
            true => vec![Branch::Conditional],
            false => latent::guiding(request),
        };
        Ok(Condition { texts: branches.into_iter().map(text).collect::<Result<_, _>>()?, strength: request.into() })
    }

    fn kind(condition: &Condition) -> String {
        let tokens: Vec<String> = condition.texts.iter().map(|text| text.present.dims()[1].to_string()).collect();
        tokens.join("/")
    }

    fn branches(condition: &Condition) -> usize {
        condition.texts.len()
    }

    fn guide(condition: &Condition, answers: Branches) -> Vec<f32> {
        latent::guide(condition.strength, answers)
    }

    fn evaluate(
        &self,
        questions: &[Question<'_, Condition>],
        branches: Range<usize>,
        shape: Shape,
        device: &Device,
    ) -> Result<Vec<Branches>, EngineError> {
        let x = latent::stacked(questions, shape, device)?;
        let numbers = |of: fn(&Question<'_, Condition>) -> f32| {
            Tensor::from_vec(questions.iter().map(of).collect::<Vec<_>>(), questions.len(), device)
        };
        let (times, guidance) = (numbers(|q| q.time)?, numbers(|q| q.condition.strength.prompt)?);
        let told = self.transformer.config().guidance_embeds;
        let mut answers = vec![Branches::new(); questions.len()];
        // The two texts of a sample need not be of one length, so they are not computed together.
        for branch in branches {
            let texts: Vec<&FilledText> = questions.iter().map(|q| &q.condition.texts[branch]).collect();
            let states = Tensor::cat(&texts.iter().map(|text| &text.states).collect::<Vec<_>>(), 0)?;
            let present = Tensor::cat(&texts.iter().map(|text| &text.present).collect::<Vec<_>>(), 0)?;
            let answer = by_large_row(&[&x, &times, &guidance, &states, &present], |row| {
                let bias = hide_absent(&row[4])?;
                self.transformer.forward(&row[0], &row[1], &row[3], Some(&bias), told.then_some(&row[2]))
            })?;
            answers
                .iter_mut()
                .zip(answer.flatten_from(1)?.to_vec2()?)
                .for_each(|(answers, answer)| answers.push(answer));
        }
        Ok(answers)
    }
}
