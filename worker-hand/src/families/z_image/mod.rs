//! Z-Image, from a folder of diffusers: a transformer on patches of the latents of an autoencoder, conditioned on the states of a decoder language model.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/z_image`.

use std::ops::Range;

use candle_core::{Device, Tensor};
use efferent_proto::internal::Branch;
use efferent_worker::{
    engine::{EngineError, Hand, RenderRequest},
    nn::rows::by_large_row,
    pipeline::Pipeline,
};

use crate::{
    families::Setup,
    latent::{self, Branches, FilledText, Network, Question, Shape},
    networks::{
        LatentSpace,
        autoencoder::Autoencoder,
        z_image::{MULTIPLE, Text, ZImage as Transformer},
    },
    samplers::{self, Flow},
};

#[derive(Debug)]
struct ZImage {
    transformer: Transformer,
    vae: Autoencoder,
}

/// What a sample is conditioned on.
#[derive(Debug)]
struct Condition {
    /// With the prompt, and without it if there is guidance.
    texts: Vec<FilledText>,
    guidance: f32,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, setup, |parts| {
        let (transformer, vae) = (parts.config("transformer")?, parts.config("vae")?);
        let transformer = parts.load("transformer", |weights| Transformer::new(transformer, weights))?;
        let vae = parts.load("vae", |weights| Autoencoder::new(vae, weights))?;
        let channels = transformer.config().in_channels;
        latent::check_channels("transformer", (channels, channels), 0, &vae)?;
        Ok(ZImage { transformer, vae })
    })
}

impl Network for ZImage {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.transformer.config().cap_feat_dim
    }

    fn multiple(&self) -> usize {
        self.vae.factor() * self.transformer.patch()
    }

    fn autoencoder(&self) -> &dyn LatentSpace {
        &self.vae
    }

    fn flow(&self, scheduler: &samplers::Config, [_, height, width]: Shape) -> Result<Flow, samplers::Error> {
        let side = self.transformer.patch();
        Ok(Flow { even: true, mu: Some(latent::shift_of_size(scheduler, (height / side) * (width / side))?) })
    }

    fn condition(&self, request: &RenderRequest, device: &Device) -> Result<Condition, EngineError> {
        let signal = &request.signal;
        let guidance = request.guidance_scale;
        let text = |branch| latent::filled_text(signal, branch, self.width(), MULTIPLE, device);
        let mut texts = vec![text(Branch::Conditional)?];
        // The strength counts from 0 here: what the prompt adds is added once more for each.
        if guidance > 0.0 {
            texts.push(text(Branch::Unconditional)?);
        }
        Ok(Condition { texts, guidance })
    }

    fn kind(condition: &Condition) -> String {
        let tokens: Vec<String> = condition.texts.iter().map(|text| text.present.dims()[1].to_string()).collect();
        tokens.join("/")
    }

    fn branches(condition: &Condition) -> usize {
        condition.texts.len()
    }

    // The network answers with what leads to the picture, samplers want what leads to the noise.
    fn guide(condition: &Condition, answers: Branches) -> Vec<f32> {
        match &*answers {
            [conditional, unconditional] => {
                let both = conditional.iter().zip(unconditional);
                both.map(|(c, u)| -(c + condition.guidance * (c - u))).collect()
            }
            [conditional, ..] => conditional.iter().map(|c| -c).collect(),
            [] => Vec::new(),
        }
    }

    fn evaluate(
        &self,
        questions: &[Question<'_, Condition>],
        branches: Range<usize>,
        shape: Shape,
        device: &Device,
    ) -> Result<Vec<Branches>, EngineError> {
        let x = latent::stacked(questions, shape, device)?;
        // What samplers call 1000, all noise, is 0 to the network.
        let times: Vec<f32> = questions.iter().map(|q| (1000.0 - q.time) / 1000.0).collect();
        let times = Tensor::from_vec(times, questions.len(), device)?;
        let mut answers = vec![Branches::new(); questions.len()];
        // The two texts of a sample need not be of one length, so they are not computed together.
        for branch in branches {
            let texts: Vec<&FilledText> = questions.iter().map(|q| &q.condition.texts[branch]).collect();
            let states = Tensor::cat(&texts.iter().map(|text| &text.states).collect::<Vec<_>>(), 0)?;
            let present = Tensor::cat(&texts.iter().map(|text| &text.present).collect::<Vec<_>>(), 0)?;
            let answer = by_large_row(&[&x, &times, &states, &present], |row| {
                self.transformer.forward(&row[0], &row[1], Text { states: &row[2], present: &row[3], bias: None })
            })?;
            answers
                .iter_mut()
                .zip(answer.flatten_from(1)?.to_vec2()?)
                .for_each(|(answers, answer)| answers.push(answer));
        }
        Ok(answers)
    }
}
