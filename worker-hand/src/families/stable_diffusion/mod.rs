//! Stable Diffusion 1.5, 2.1 and XL, from a folder of diffusers: a UNet on the latents of an autoencoder, conditioned on the states of text encoders.
//!
//! Source of what surrounds the networks: diffusers 0.42.1, `pipelines/stable_diffusion{,_xl}`.

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
    latent::{self, Branches, Network, Question, Shape, Strength, guide, rescaled},
    networks::{
        LatentSpace,
        autoencoder::Autoencoder,
        unet::{Added, Text, Unet},
    },
};

/// Numbers of a size that XL's UNet is told: original height and width, the crop's corner, target height and width.
const SIZES: usize = 6;

#[derive(Debug)]
struct StableDiffusion {
    unet: Unet,
    vae: Autoencoder,
}

/// What a sample is conditioned on, with the branch without the prompt last, if there is guidance.
#[derive(Debug)]
struct Condition {
    /// (branches, tokens, width)
    context: Tensor,
    /// For networks that want it: (branches, width) and (branches, [`SIZES`]).
    added: Option<(Tensor, Tensor)>,
    strength: Strength,
    rescale: f32,
}

/// Loads the hand of a pipeline.
///
/// # Errors
/// If a file cannot be read, is malformed, or says what is not computed here.
pub fn load(pipeline: &Pipeline, setup: &Setup) -> Result<Box<dyn Hand>, EngineError> {
    latent::load(pipeline, setup, |parts| {
        // Configurations first: they are told to be wrong at once, weights take a while to read.
        let (unet, vae) = (parts.config("unet")?, parts.config("vae")?);
        let unet = parts.load("unet", |weights| Unet::new(unet, weights))?;
        let vae = parts.load("vae", |weights| Autoencoder::new(vae, weights))?;
        // A mask, and the latent of what it leaves.
        let marked = 2 * vae.channels() + 1;
        let beside = if unet.config().in_channels == marked { marked - vae.channels() } else { 0 };
        latent::check_channels("unet", (unet.config().in_channels, unet.config().out_channels), beside, &vae)?;
        Ok(StableDiffusion { unet, vae })
    })
}

impl StableDiffusion {
    /// Whether the strength of guidance is a number that the network is told (LCM).
    fn is_told(&self) -> bool {
        self.unet.config().time_cond_proj_dim.is_some()
    }

    /// Channels of the pooled vector: what the sizes leave of the added embedding.
    fn pooled_width(&self) -> usize {
        let config = self.unet.config();
        let sizes = SIZES * config.addition_time_embed_dim.unwrap_or(0);
        config.projection_class_embeddings_input_dim.unwrap_or(0).saturating_sub(sizes)
    }
}

impl Network for StableDiffusion {
    type Condition = Condition;

    fn width(&self) -> usize {
        self.unet.config().cross_attention_dim
    }

    fn multiple(&self) -> usize {
        self.vae.factor()
    }

    fn mends(&self) -> bool {
        self.unet.config().in_channels > self.vae.channels()
    }

    fn autoencoder(&self) -> &dyn LatentSpace {
        &self.vae
    }

    fn condition(&self, request: &RenderRequest, device: &Device) -> Result<Condition, EngineError> {
        let signal = &request.signal;
        let config = self.unet.config();
        let (rescale, size) = (request.guidance_rescale, request.size);
        // A network that is told the strength is not asked a second time, without the prompt.
        let branches = if self.is_told() { vec![Branch::Conditional] } else { latent::guiding(request) };
        let context = latent::text(signal, &branches, config.cross_attention_dim, device)?;
        let added = match config.addition_embed_type {
            None => None,
            Some(_) => {
                let pooled = latent::pooled(signal, &branches, self.pooled_width(), device)?;
                let count = pooled.dim(0)?;
                let (height, width) = (size.height as f32, size.width as f32);
                let sizes = [height, width, 0.0, 0.0, height, width].repeat(count);
                Some((pooled, Tensor::from_vec(sizes, (count, SIZES), device)?))
            }
        };
        Ok(Condition { context, added, strength: request.into(), rescale })
    }

    fn made(&self, steps: f64, strength: f64) -> f64 {
        (steps * strength).trunc().min(steps)
    }

    fn kind(condition: &Condition) -> String {
        let dims = condition.context.dims();
        format!("{}/{}", dims[0], dims[1])
    }

    fn branches(condition: &Condition) -> usize {
        condition.context.dims()[0]
    }

    fn guide(condition: &Condition, answers: Branches) -> Vec<f32> {
        let conditional = match &*answers {
            [conditional, _, ..] if condition.rescale > 0.0 => conditional.clone(),
            _ => return guide(condition.strength, answers),
        };
        rescaled(condition.rescale, &conditional, guide(condition.strength, answers))
    }

    fn evaluate(
        &self,
        questions: &[Question<'_, Condition>],
        branches: Range<usize>,
        [channels, height, width]: Shape,
        device: &Device,
    ) -> Result<Vec<Branches>, EngineError> {
        let per = branches.len();
        let part = |tensor: &Tensor| tensor.narrow(0, branches.start, per);
        let parts = |tensors: Vec<&Tensor>| {
            Tensor::cat(&tensors.into_iter().map(part).collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let rows = |q: &Question<'_, Condition>| {
            let x = Tensor::from_slice(q.latent, (1, channels, height, width), device)?
                .permute((0, 2, 3, 1))?
                .contiguous()?;
            Tensor::cat(&vec![x; per], 0)
        };
        let x = Tensor::cat(&questions.iter().map(rows).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let times: Vec<f32> = questions.iter().flat_map(|q| std::iter::repeat_n(q.time, per)).collect();
        let times = Tensor::from_vec(times, per * questions.len(), device)?;
        let context = parts(questions.iter().map(|q| &q.condition.context).collect())?;
        let strengths = questions.iter().flat_map(|q| std::iter::repeat_n(q.condition.strength.prompt, per));
        let guidance = Tensor::from_vec(strengths.collect::<Vec<f32>>(), per * questions.len(), device)?;
        let told = self.is_told();
        let added: Option<Vec<_>> = questions.iter().map(|q| q.condition.added.as_ref()).collect();
        let answer = match added.filter(|added| !added.is_empty()) {
            None => by_large_row(&[&x, &times, &guidance, &context], |row| {
                let text = Text { states: &row[3], bias: None };
                self.unet.forward(&row[0], &row[1], text, None, told.then_some(&row[2]))
            })?,
            Some(added) => {
                let pooled = parts(added.iter().map(|(pooled, _)| pooled).collect())?;
                let sizes = parts(added.iter().map(|(_, sizes)| sizes).collect())?;
                by_large_row(&[&x, &times, &guidance, &context, &pooled, &sizes], |row| {
                    let text = Text { states: &row[3], bias: None };
                    let added = Added { pooled: row[4].clone(), sizes: row[5].clone() };
                    self.unet.forward(&row[0], &row[1], text, Some(&added), told.then_some(&row[2]))
                })?
            }
        };
        let answers = answer.permute((0, 3, 1, 2))?.contiguous()?.flatten_from(1)?.to_vec2::<f32>()?;
        Ok(answers.chunks(per.max(1)).map(<[_]>::to_vec).collect())
    }
}
