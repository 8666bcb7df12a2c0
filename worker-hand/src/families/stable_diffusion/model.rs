//! UNet and autoencoder, and one guided evaluation of the first.

use candle_core::{Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlSignal, StreamRole, UnconditionalPolicy},
    v1::{ErrorCode, Size},
};
use efferent_worker::{
    engine::EngineError,
    nn::rows::by_row,
    signal::{self, CONDITIONAL, UNCONDITIONAL},
};

use crate::networks::{
    autoencoder::Autoencoder,
    unet::{Added, Unet},
};

/// Numbers of a size that XL's UNet is told: original height and width, the crop's corner, target height and width.
const SIZES: usize = 6;

/// The networks of a pipeline.
#[derive(Debug)]
pub(super) struct Model {
    unet: Unet,
    vae: Autoencoder,
}

/// What a sample is conditioned on, with the branch without the prompt last, if there is guidance.
#[derive(Debug)]
pub(super) struct Condition {
    /// (1 or 2, tokens, width)
    context: Tensor,
    /// For networks that want it: (1 or 2, width) and (1 or 2, [`SIZES`]).
    added: Option<(Tensor, Tensor)>,
}

impl Condition {
    /// Tokens and width.
    pub(super) fn shape(&self) -> [usize; 2] {
        let dims = self.context.dims();
        [dims[1], dims[2]]
    }
}

/// An evaluation of one sample.
#[derive(Debug)]
pub(super) struct Question<'a> {
    pub(super) latent: &'a [f32],
    pub(super) time: f32,
    pub(super) condition: &'a Condition,
    pub(super) guidance: Option<f32>,
}

fn malformed(what: impl Into<String>) -> EngineError {
    ApiError::new(ErrorCode::InvalidField, format!("malformed control signal: {}", what.into())).field("signal").into()
}

impl Model {
    /// Refuses networks that do not go together.
    pub(super) fn new(unet: Unet, vae: Autoencoder) -> Result<Self, EngineError> {
        let (inputs, outputs, latent) =
            (unet.config().in_channels, unet.config().out_channels, vae.config().latent_channels);
        if inputs != latent || outputs != latent {
            let message =
                format!("the UNet goes from {inputs} to {outputs} channels, the autoencoder's latents have {latent}");
            return Err(ApiError::new(ErrorCode::InvalidField, message).field("unet").into());
        }
        Ok(Self { unet, vae })
    }

    /// Pixels that a cell of a latent stands for, along each side.
    pub(super) fn cell(&self) -> usize {
        self.vae.factor()
    }

    /// Channels of a latent.
    pub(super) fn channels(&self) -> usize {
        self.vae.config().latent_channels
    }

    /// What a control signal says for a picture of a size.
    pub(super) fn condition(
        &self,
        signal: &ControlSignal,
        size: Size,
        guided: bool,
        device: &Device,
    ) -> Result<Condition, EngineError> {
        let config = self.unet.config();
        let zeros = signal.unconditional() == UnconditionalPolicy::Zeros;
        let text = |branch| match signal::find(signal, StreamRole::Text, branch) {
            Some(stream) => Ok(signal::tensor(stream, device)?),
            None => Err(malformed(format!("there is no text stream of {}", branch.as_str_name()))),
        };
        let positive = text(Branch::Conditional)?;
        if positive.dim(1)? != config.cross_attention_dim {
            let message =
                format!("states of {} channels, the UNet reads {}", positive.dim(1)?, config.cross_attention_dim);
            return Err(malformed(message));
        }
        let mut contexts = vec![positive.clone()];
        if guided {
            contexts.push(if zeros { positive.zeros_like()? } else { text(Branch::Unconditional)? });
        }
        if contexts.iter().any(|context| context.dims() != positive.dims()) {
            return Err(malformed("the two text streams differ in length"));
        }
        let added = match config.addition_embed_type {
            None => None,
            Some(_) => {
                let pooled = |label: &str| {
                    let found = signal.pooled.iter().find(|vector| vector.label == label);
                    found
                        .map(|vector| vector.values.clone())
                        .ok_or_else(|| malformed(format!("there is no {label} pooled vector")))
                };
                let mut vectors = vec![pooled(CONDITIONAL)?];
                if guided {
                    vectors.push(if zeros { vec![0.0; vectors[0].len()] } else { pooled(UNCONDITIONAL)? });
                }
                let width = self.pooled_width();
                if vectors.iter().any(|vector| vector.len() != width || vector.iter().any(|value| !value.is_finite())) {
                    return Err(malformed(format!("a pooled vector is not of {width} finite values")));
                }
                let count = vectors.len();
                let (height, width_pixels) = (size.height as f32, size.width as f32);
                let sizes = [height, width_pixels, 0.0, 0.0, height, width_pixels].repeat(count);
                Some((
                    Tensor::from_vec(vectors.concat(), (count, width), device)?,
                    Tensor::from_vec(sizes, (count, SIZES), device)?,
                ))
            }
        };
        Ok(Condition { context: Tensor::stack(&contexts, 0)?, added })
    }

    /// Channels of the pooled vector: what the sizes leave of the added embedding.
    fn pooled_width(&self) -> usize {
        let config = self.unet.config();
        let sizes = SIZES * config.addition_time_embed_dim.unwrap_or(0);
        config.projection_class_embeddings_input_dim.unwrap_or(0).saturating_sub(sizes)
    }

    /// What the UNet answers, guided. All samples have latents of `shape` (channels, height, width), and all are guided or none is.
    pub(super) fn predict(
        &self,
        questions: &[Question<'_>],
        shape: [usize; 3],
        device: &Device,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let [channels, height, width] = shape;
        let branches = questions.iter().map(|q| q.condition.context.dim(0)).collect::<candle_core::Result<Vec<_>>>()?;
        let per = branches.first().copied().unwrap_or(1);
        let rows = |q: &Question<'_>| {
            let x = Tensor::from_slice(q.latent, (1, channels, height, width), device)?
                .permute((0, 2, 3, 1))?
                .contiguous()?;
            Tensor::cat(&vec![x; per], 0)
        };
        let x = Tensor::cat(&questions.iter().map(rows).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let times: Vec<f32> = questions.iter().flat_map(|q| std::iter::repeat_n(q.time, per)).collect();
        let times = Tensor::from_vec(times, per * questions.len(), device)?;
        let contexts: Vec<&Tensor> = questions.iter().map(|q| &q.condition.context).collect();
        let context = Tensor::cat(&contexts, 0)?;
        let added: Option<Vec<_>> = questions.iter().map(|q| q.condition.added.as_ref()).collect();
        let answer = match added.filter(|added| !added.is_empty()) {
            None => by_row(&[&x, &times, &context], |row| self.unet.forward(&row[0], &row[1], &row[2], None, None))?,
            Some(added) => {
                let pooled = Tensor::cat(&added.iter().map(|(pooled, _)| pooled).collect::<Vec<_>>(), 0)?;
                let sizes = Tensor::cat(&added.iter().map(|(_, sizes)| sizes).collect::<Vec<_>>(), 0)?;
                by_row(&[&x, &times, &context, &pooled, &sizes], |row| {
                    let added = Added { pooled: row[3].clone(), sizes: row[4].clone() };
                    self.unet.forward(&row[0], &row[1], &row[2], None, Some(&added))
                })?
            }
        };
        let answers = answer.permute((0, 3, 1, 2))?.contiguous()?.flatten_from(1)?.to_vec2::<f32>()?;
        let guided = |(question, rows): (&Question<'_>, &[Vec<f32>])| match (question.guidance, rows) {
            (Some(scale), [conditional, unconditional]) => {
                conditional.iter().zip(unconditional).map(|(c, u)| u + scale * (c - u)).collect()
            }
            (_, [answer, ..]) => answer.clone(),
            (_, []) => Vec::new(),
        };
        Ok(questions.iter().zip(answers.chunks(per)).map(guided).collect())
    }

    /// A latent (1, channels, height, width) to values in about [-1, 1], row by row of pixels, with the picture's width and height.
    pub(super) fn decode(&self, latent: &Tensor) -> candle_core::Result<(Vec<f32>, u32, u32)> {
        let latent = self.vae.unscale(&latent.permute((0, 2, 3, 1))?.contiguous()?)?;
        let picture = self.vae.decode(&latent)?;
        let (_, height, width, _) = picture.dims4()?;
        Ok((picture.flatten_all()?.to_vec1()?, width as u32, height as u32))
    }
}
