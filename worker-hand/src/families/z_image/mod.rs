//! Z-Image, from a folder of diffusers: a transformer on patches of the latents of an autoencoder, conditioned on the states of a decoder language model.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/z_image`.

use candle_core::{Device, Result, Tensor};
use efferent_proto::{
    internal::{Branch, ControlSignal, StreamRole},
    v1::Size,
};
use efferent_worker::{
    engine::{EngineError, Hand},
    nn::rows::by_row,
    pipeline::Pipeline,
    signal,
};

use crate::{
    latent::{self, Network, Question, Shape},
    networks::{
        autoencoder::Autoencoder,
        z_image::{MULTIPLE, ZImage as Transformer},
    },
    samplers::{self, Flow},
};

#[derive(Debug)]
struct ZImage {
    transformer: Transformer,
    vae: Autoencoder,
}

/// A text, filled up.
#[derive(Debug)]
struct Text {
    /// (1, tokens, width)
    states: Tensor,
    /// (1, tokens), 1 for those of the text
    present: Tensor,
}

/// What a sample is conditioned on.
#[derive(Debug)]
struct Condition {
    /// With the prompt, and without it if there is guidance.
    texts: Vec<Text>,
    guidance: f32,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, device: &Device) -> std::result::Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, device, |parts| {
        let (transformer, vae) = (parts.config("transformer")?, parts.config("vae")?);
        let transformer = parts.load("transformer", |weights| Transformer::new(transformer, weights))?;
        let vae = parts.load("vae", |weights| Autoencoder::new(vae, weights))?;
        let channels = transformer.config().in_channels;
        latent::check_channels("transformer", channels, channels, &vae)?;
        Ok(ZImage { transformer, vae })
    })
}

impl ZImage {
    fn text(&self, signal: &ControlSignal, branch: Branch, device: &Device) -> std::result::Result<Text, EngineError> {
        let stream = signal::find(signal, StreamRole::Text, branch)
            .ok_or_else(|| latent::malformed(format!("there is no text stream of {}", branch.as_str_name())))?;
        let states = signal::tensor(stream, device)?;
        let (tokens, width) = states.dims2()?;
        let wanted = self.transformer.config().cap_feat_dim;
        if tokens == 0 || width != wanted {
            return Err(latent::malformed(format!(
                "{tokens} states of {width} channels, the network reads some of {wanted}"
            )));
        }
        let filled = tokens.next_multiple_of(MULTIPLE);
        let present: Vec<f32> = (0..filled).map(|token| f32::from(u8::from(token < tokens))).collect();
        Ok(Text {
            states: states.pad_with_zeros(0, 0, filled - tokens)?.unsqueeze(0)?,
            present: Tensor::from_vec(present, (1, filled), device)?,
        })
    }
}

impl Network for ZImage {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.transformer.config().cap_feat_dim
    }

    fn multiple(&self) -> usize {
        self.vae.factor() * self.transformer.patch()
    }

    fn autoencoder(&self) -> &Autoencoder {
        &self.vae
    }

    fn flow(
        &self,
        scheduler: &samplers::Config,
        [_, height, width]: Shape,
    ) -> std::result::Result<Flow, samplers::Error> {
        let side = self.transformer.patch();
        Ok(Flow { even: true, mu: Some(latent::shift_of_size(scheduler, (height / side) * (width / side))?) })
    }

    fn condition(
        &self,
        signal: &ControlSignal,
        _: Size,
        guidance: f32,
        device: &Device,
    ) -> std::result::Result<Condition, EngineError> {
        let mut texts = vec![self.text(signal, Branch::Conditional, device)?];
        // The strength counts from 0 here: what the prompt adds is added once more for each.
        if guidance > 0.0 {
            texts.push(self.text(signal, Branch::Unconditional, device)?);
        }
        Ok(Condition { texts, guidance })
    }

    fn kind(condition: &Condition) -> String {
        let tokens: Vec<String> = condition.texts.iter().map(|text| text.present.dims()[1].to_string()).collect();
        tokens.join("/")
    }

    fn predict(
        &self,
        questions: &[Question<'_, Condition>],
        [channels, height, width]: Shape,
        device: &Device,
    ) -> std::result::Result<Vec<Vec<f32>>, EngineError> {
        let latents = questions
            .iter()
            .map(|q| Tensor::from_slice(q.latent, (1, channels, height, width), device))
            .collect::<Result<Vec<_>>>()?;
        let x = Tensor::cat(&latents, 0)?;
        // What samplers call 1000, all noise, is 0 to the network.
        let times: Vec<f32> = questions.iter().map(|q| (1000.0 - q.time) / 1000.0).collect();
        let times = Tensor::from_vec(times, questions.len(), device)?;
        let branches = questions.iter().map(|q| q.condition.texts.len()).min().unwrap_or(0);
        let mut answers = Vec::new();
        // The two texts of a sample need not be of one length, so they are not computed together.
        for branch in 0..branches {
            let texts: Vec<&Text> = questions.iter().map(|q| &q.condition.texts[branch]).collect();
            let states = Tensor::cat(&texts.iter().map(|text| &text.states).collect::<Vec<_>>(), 0)?;
            let present = Tensor::cat(&texts.iter().map(|text| &text.present).collect::<Vec<_>>(), 0)?;
            let answer = by_row(&[&x, &times, &states, &present], |row| {
                self.transformer.forward(&row[0], &row[1], &row[2], &row[3])
            })?;
            answers.push(answer.flatten_from(1)?.to_vec2::<f32>()?);
        }
        // The network answers with what leads to the picture, samplers want what leads to the noise.
        let velocity = |(index, question): (usize, &Question<'_, Condition>)| match &*answers {
            [conditional, unconditional] => {
                let both = conditional[index].iter().zip(&unconditional[index]);
                both.map(|(c, u)| -(c + question.condition.guidance * (c - u))).collect()
            }
            [conditional, ..] => conditional[index].iter().map(|c| -c).collect(),
            [] => Vec::new(),
        };
        Ok(questions.iter().enumerate().map(velocity).collect())
    }
}
