//! Pictures to latents and back: `AutoencoderKL`, of Stable Diffusion 1.5 to 3.5, FLUX.1 and Z-Image.
//!
//! Source: diffusers 0.42.1, `models/autoencoders/{autoencoder_kl,vae}.py`. Checked against it by `tests/autoencoder.rs`.

use candle_core::{D, Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        conv::{Conv3x3, Sampling, nearest},
        linear::Linear,
        norm::GroupNorm,
        ops::{self, Activation},
    },
    weights::Weights,
};
use serde::Deserialize;

use crate::latent::tiles::Tiles;

use super::{
    Encoded, LatentSpace,
    blocks::{Norm, Residual},
};

/// What `config.json` says. What it may say otherwise is refused by [`Autoencoder::new`], or changes nothing of what is computed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of a picture that goes in.
    pub in_channels: usize,
    /// Channels of a picture that comes out.
    pub out_channels: usize,
    /// Channels of each level, from the largest map to the smallest. Each level but the last halves the map.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; one more of the decoder.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Activation.
    pub act_fn: Activation,
    /// What latents are multiplied by for a denoiser. Stable Diffusion 1.5's configuration is older than the field.
    pub scaling_factor: f64,
    /// What is taken off latents before that.
    pub shift_factor: Option<f64>,
    /// Whether latents go through a convolution of one pixel after the encoder.
    pub use_quant_conv: bool,
    /// Whether they do before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle has an attention.
    pub mid_block_add_attention: bool,
    /// Pixels of the pictures that it was trained with: of a tile, where a picture is made in tiles.
    pub sample_size: SampleSize,
    /// Kinds of the levels; there is one.
    pub down_block_types: Vec<DownBlock>,
    /// Kinds of the levels; there is one.
    pub up_block_types: Vec<UpBlock>,
    /// Means of latents, channel by channel: not known here.
    pub latents_mean: Option<Vec<f64>>,
    /// Deviations of latents, channel by channel: not known here.
    pub latents_std: Option<Vec<f64>>,
}

/// What diffusers takes for fields that are left out; some are younger than files that are in use.
impl Default for Config {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            act_fn: Activation::Silu,
            scaling_factor: 0.18215,
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            sample_size: SampleSize::default(),
            down_block_types: vec![DownBlock::Plain],
            up_block_types: vec![UpBlock::Plain],
            latents_mean: None,
            latents_std: None,
        }
    }
}

/// Pixels of a side, or of two.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum SampleSize {
    /// Of both sides.
    Side(usize),
    /// Of height and width.
    Sides(Vec<usize>),
}

impl Default for SampleSize {
    fn default() -> Self {
        Self::Side(32)
    }
}

/// A level of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlock {
    /// Residual blocks.
    #[serde(rename = "DownEncoderBlock2D")]
    Plain,
}

/// A level of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlock {
    /// Residual blocks.
    #[serde(rename = "UpDecoderBlock2D")]
    Plain,
}

/// Epsilon of every norm; no configuration tells it.
const NORM_EPS: f64 = 1e-6;

/// The network.
#[derive(Debug)]
pub struct Autoencoder {
    config: Config,
    encoder: Half,
    to_latent: Option<Linear>,
    from_latent: Option<Linear>,
    decoder: Half,
}

/// Encoder or decoder.
#[derive(Debug)]
struct Half {
    input: Conv3x3,
    levels: Vec<(Vec<Residual>, Option<Conv3x3>)>,
    middle: Middle,
    norm: GroupNorm,
    output: Conv3x3,
}

#[derive(Debug)]
struct Middle {
    residuals: [Residual; 2],
    attention: Option<Attention>,
}

#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
}

impl Middle {
    fn new(weights: &mut Weights, name: &str, width: usize, attention: bool, norm: Norm) -> Result<Self> {
        let residual = |weights: &mut Weights, index: usize| {
            Residual::new(weights, &format!("{name}.resnets.{index}"), width, width, None, norm)
        };
        let residuals = [residual(weights, 0)?, residual(weights, 1)?];
        let attention = match attention {
            true => Some(Attention::new(weights, &format!("{name}.attentions.0"), width, norm.groups)?),
            false => None,
        };
        Ok(Self { residuals, attention })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.residuals[0].forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.residuals[1].forward(&x, None)
    }
}

impl Attention {
    fn new(weights: &mut Weights, name: &str, width: usize, groups: usize) -> Result<Self> {
        // Autoencoders that were published before diffusers 0.17 have other names.
        let names = match weights.contains(&format!("{name}.query.weight")) {
            true => ["query", "key", "value", "proj_attn"],
            false => ["to_q", "to_k", "to_v", "to_out.0"],
        };
        let norm = GroupNorm::new(weights, &format!("{name}.group_norm"), width, groups, NORM_EPS)?;
        let [q, k, v, output] = names.map(|part| Linear::with_bias(weights, &format!("{name}.{part}"), width, width));
        Ok(Self { norm, q, k, v, output })
    }

    /// (batch, height, width, channels) -> the same; one head over all pixels
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let h = self.norm.forward(x)?.reshape((batch, height * width, channels))?;
        let one = |y: Tensor| y.unsqueeze(2);
        let (q, k, v) = (one(self.q.forward(&h)?)?, one(self.k.forward(&h)?)?, one(self.v.forward(&h)?)?);
        let attended = attend(&q, &k, &v, None, Logits::of_width(channels))?.flatten_from(2)?;
        x + self.output.forward(&attended)?.reshape((batch, height, width, channels))?
    }
}

impl Half {
    fn encoder(config: &Config, norm: Norm, weights: &mut Weights) -> Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let mut levels = Vec::new();
        let mut inputs = channels[0];
        for (level, &outputs) in channels.iter().enumerate() {
            let name = format!("encoder.down_blocks.{level}");
            let mut blocks = Vec::new();
            for index in 0..config.layers_per_block {
                blocks.push(Residual::new(weights, &format!("{name}.resnets.{index}"), inputs, outputs, None, norm)?);
                inputs = outputs;
            }
            let sampler = match level < last {
                true => {
                    let sampler = Conv3x3::load(weights, &format!("{name}.downsamplers.0.conv"), outputs, outputs)?;
                    Some(sampler.at(Sampling::Between))
                }
                false => None,
            };
            levels.push((blocks, sampler));
        }
        Ok(Self {
            input: Conv3x3::load(weights, "encoder.conv_in", config.in_channels, channels[0])?,
            levels,
            middle: Middle::new(weights, "encoder.mid_block", channels[last], config.mid_block_add_attention, norm)?,
            norm: GroupNorm::new(weights, "encoder.conv_norm_out", channels[last], norm.groups, norm.eps)?,
            output: Conv3x3::load(weights, "encoder.conv_out", channels[last], 2 * config.latent_channels)?,
        })
    }

    fn decoder(config: &Config, norm: Norm, weights: &mut Weights) -> Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let mut levels = Vec::new();
        let mut inputs = channels[last];
        for (step, &outputs) in channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{step}");
            let mut blocks = Vec::new();
            for index in 0..=config.layers_per_block {
                blocks.push(Residual::new(weights, &format!("{name}.resnets.{index}"), inputs, outputs, None, norm)?);
                inputs = outputs;
            }
            let sampler = match step < last {
                true => Some(Conv3x3::load(weights, &format!("{name}.upsamplers.0.conv"), outputs, outputs)?),
                false => None,
            };
            levels.push((blocks, sampler));
        }
        Ok(Self {
            input: Conv3x3::load(weights, "decoder.conv_in", config.latent_channels, channels[last])?,
            levels,
            middle: Middle::new(weights, "decoder.mid_block", channels[last], config.mid_block_add_attention, norm)?,
            norm: GroupNorm::new(weights, "decoder.conv_norm_out", channels[0], norm.groups, norm.eps)?,
            output: Conv3x3::load(weights, "decoder.conv_out", channels[0], config.out_channels)?,
        })
    }

    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        // SiLU, whatever the configuration's activation is.
        self.output.forward(&ops::silu(&self.norm.forward(x)?)?)
    }
}

impl Autoencoder {
    /// Takes the network's tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration asks for what is not computed here, or cannot be.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let levels = config.block_out_channels.len();
        if levels == 0 || config.down_block_types.len() != levels || config.up_block_types.len() != levels {
            candle_core::bail!("an autoencoder's levels are told apart in number: {config:?}");
        }
        if config.block_out_channels.contains(&0) || config.latent_channels == 0 || config.scaling_factor == 0.0 {
            candle_core::bail!("an autoencoder cannot be so: {config:?}");
        }
        if config.latents_mean.is_some() || config.latents_std.is_some() {
            candle_core::bail!("an autoencoder's latents_mean and latents_std are not known here");
        }
        let norm = Norm { groups: config.norm_num_groups, eps: NORM_EPS, activation: config.act_fn };
        let latent = config.latent_channels;
        let map = |weights: &mut Weights, wanted: bool, name: &str, width: usize| -> Result<Option<Linear>> {
            wanted.then(|| Linear::of_convolution(weights, name, width, width)).transpose()
        };
        Ok(Self {
            encoder: Half::encoder(&config, norm, weights)?,
            to_latent: map(weights, config.use_quant_conv, "quant_conv", 2 * latent)?,
            from_latent: map(weights, config.use_post_quant_conv, "post_quant_conv", latent)?,
            decoder: Half::decoder(&config, norm, weights)?,
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl LatentSpace for Autoencoder {
    fn channels(&self) -> usize {
        self.config.latent_channels
    }

    fn factor(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        let mut x = match &self.from_latent {
            Some(map) => map.forward(latent)?,
            None => latent.clone(),
        };
        x = self.decoder.middle.forward(&self.decoder.input.forward(&x)?)?;
        for (blocks, sampler) in &self.decoder.levels {
            for block in blocks {
                x = block.forward(&x, None)?;
            }
            if let Some(sampler) = sampler {
                let (_, height, width, _) = x.dims4()?;
                x = sampler.forward(&nearest(&x, (2 * height, 2 * width))?)?;
            }
        }
        self.decoder.finish(&x)
    }

    fn tiles(&self) -> Tiles {
        let pixels = match &self.config.sample_size {
            SampleSize::Side(side) => *side,
            SampleSize::Sides(sides) => sides.first().copied().unwrap_or(0),
        };
        let side = (pixels / self.factor()).max(4);
        Tiles { side, stride: side * 3 / 4 }
    }

    fn moments(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = self.encoder.input.forward(picture)?;
        for (blocks, sampler) in &self.encoder.levels {
            for block in blocks {
                x = block.forward(&x, None)?;
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x)?;
            }
        }
        x = self.encoder.finish(&self.encoder.middle.forward(&x)?)?;
        match &self.to_latent {
            Some(map) => map.forward(&x),
            None => Ok(x),
        }
    }

    /// Means, and logarithms of variances, one after the other.
    fn encoded(&self, moments: &Tensor) -> Result<Encoded> {
        let channels = self.config.latent_channels;
        let log_variance = moments.narrow(D::Minus1, channels, channels)?.clamp(-30f32, 20f32)?;
        Ok(Encoded { mean: moments.narrow(D::Minus1, 0, channels)?, deviation: Some((log_variance * 0.5)?.exp()?) })
    }

    fn scale(&self, latent: &Tensor) -> Result<Tensor> {
        (latent - self.config.shift_factor.unwrap_or(0.0))? * self.config.scaling_factor
    }

    fn unscale(&self, latent: &Tensor) -> Result<Tensor> {
        (latent / self.config.scaling_factor)? + self.config.shift_factor.unwrap_or(0.0)
    }
}
