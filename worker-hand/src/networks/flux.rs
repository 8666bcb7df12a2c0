//! FLUX.1's denoiser: `FluxTransformer2DModel`. Text and image tokens go through blocks of two streams that attend to each other, then through blocks of one.
//!
//! Source: diffusers 0.42.1, `models/transformers/transformer_flux.py`. Checked against it by `tests/flux.rs`.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        linear::Linear,
        ops,
    },
    weights::Weights,
};
use serde::Deserialize;

use super::{
    joint::{Embedder, Heads, Side, Sizes, Stream, modulation, normed},
    rotary::Turns,
};

/// What `config.json` says. Other fields are refused by [`Flux::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of an image token: 2 x 2 cells of the latent.
    pub in_channels: usize,
    /// Channels of what comes out for each, if they are others.
    pub out_channels: Option<usize>,
    /// Blocks of two streams.
    pub num_layers: usize,
    /// Blocks of one.
    pub num_single_layers: usize,
    /// Channels of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Channels of a text token.
    pub joint_attention_dim: usize,
    /// Channels of the pooled text.
    pub pooled_projection_dim: usize,
    /// Whether the strength of guidance is told to the network.
    pub guidance_embeds: bool,
    /// Channels of a head that turn with each axis of a token's place; even, and in all those of a head.
    pub axes_dims_rope: Vec<usize>,
    /// Cells of a patch; packing is done outside.
    pub patch_size: usize,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            patch_size: 1,
            others: BTreeMap::new(),
        }
    }
}

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// The network.
#[derive(Debug)]
pub struct Flux {
    config: Config,
    embedder: Embedder,
    context: Linear,
    input: Linear,
    double: Vec<Double>,
    single: Vec<Single>,
    output_modulation: Linear,
    output: Linear,
}

/// What a picture is conditioned on.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// (batch, tokens, joint)
    pub states: &'a Tensor,
    /// (batch, pooled)
    pub pooled: &'a Tensor,
    /// (batch or 1, 1, 1, tokens + rows x columns), added to the logits of text tokens and image tokens.
    pub bias: Option<&'a Tensor>,
}

#[derive(Debug)]
struct Double {
    image: Stream,
    text: Stream,
}

#[derive(Debug)]
struct Single {
    modulation: Linear,
    heads: Heads,
    up: Linear,
    output: Linear,
}

impl Flux {
    /// Takes the tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be, or says what is not computed here.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { in_channels, num_attention_heads, attention_head_dim: head, ref axes_dims_rope, .. } = config;
        let width = num_attention_heads * head;
        let sizes = [in_channels, width, config.joint_attention_dim, config.pooled_projection_dim];
        if sizes.contains(&0) || config.patch_size != 1 || config.out_channels.is_some_and(|out| out != in_channels) {
            candle_core::bail!("a FLUX denoiser cannot be so: {config:?}");
        }
        let odd = axes_dims_rope.iter().any(|channels| !channels.is_multiple_of(2));
        if axes_dims_rope.len() != 3 || odd || axes_dims_rope.iter().sum::<usize>() != head {
            candle_core::bail!("axes_dims_rope {axes_dims_rope:?} of heads of {head} channels");
        }
        if let Some(field) = config.others.keys().find(|field| !field.starts_with('_')) {
            candle_core::bail!("a FLUX denoiser's {field} is not known");
        }
        let embedder = Embedder::new(weights, config.pooled_projection_dim, width, config.guidance_embeds);
        let sizes = Sizes { width, head, normed: true };
        let double = (0..config.num_layers)
            .map(|layer| {
                let block = format!("transformer_blocks.{layer}");
                let mut stream = |side| Stream::new(weights, &block, side, sizes);
                Double { image: stream(Side::Image), text: stream(Side::Text) }
            })
            .collect();
        let single = (0..config.num_single_layers)
            .map(|layer| {
                let block = format!("single_transformer_blocks.{layer}");
                Single {
                    modulation: Linear::with_bias(weights, &format!("{block}.norm.linear"), width, 3 * width),
                    heads: Heads::new(weights, &format!("{block}.attn"), Side::Image, sizes),
                    up: Linear::with_bias(weights, &format!("{block}.proj_mlp"), width, 4 * width),
                    output: Linear::with_bias(weights, &format!("{block}.proj_out"), 5 * width, width),
                }
            })
            .collect();
        Ok(Self {
            embedder,
            context: Linear::with_bias(weights, "context_embedder", config.joint_attention_dim, width),
            input: Linear::with_bias(weights, "x_embedder", in_channels, width),
            double,
            single,
            output_modulation: Linear::with_bias(weights, "norm_out.linear", width, 2 * width),
            output: Linear::with_bias(weights, "proj_out", width, in_channels),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Image tokens x (batch, rows x columns, in), each batch row at its own time (batch; 0 to 1000), with a text -> the flow (batch, rows x columns, in). guidance: (batch), for networks that are told it. (rows, columns): the picture in patches.
    ///
    /// # Errors
    /// If shapes do not fit, or guidance is given where it is not wanted, or not where it is.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        given: Text<'_>,
        guidance: Option<&Tensor>,
        places: (usize, usize),
    ) -> Result<Tensor> {
        let condition = self.embedder.forward(time, given.pooled, guidance)?;
        let mut image = self.input.forward(x)?;
        let mut text = self.context.forward(given.states)?;
        let tokens = text.dim(1)?;
        let turns = self.turns(tokens, places, x)?;
        let attention = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (q, k) = (turns.apply(q)?, turns.apply(k)?);
            attend(&q, &k, v, given.bias, Logits::of_width(self.config.attention_head_dim))?.flatten_from(2)
        };
        for block in &self.double {
            let of_image = modulation(&block.image.modulation, &condition, 6)?;
            let of_text = modulation(&block.text.modulation, &condition, 6)?;
            let from_image = block.image.heads.forward(&normed(&image, &of_image[1], &of_image[0])?)?;
            let from_text = block.text.heads.forward(&normed(&text, &of_text[1], &of_text[0])?)?;
            let both = |part: usize| Tensor::cat(&[&from_text[part], &from_image[part]], 1);
            let attended = attention(&both(0)?, &both(1)?, &both(2)?)?;
            let rest = attended.dim(1)? - tokens;
            image = block.image.finish(&image, &attended.narrow(1, tokens, rest)?.contiguous()?, &of_image)?;
            text = block.text.finish(&text, &attended.narrow(1, 0, tokens)?.contiguous()?, &of_text)?;
        }
        let mut all = Tensor::cat(&[&text, &image], 1)?;
        for block in &self.single {
            let parts = modulation(&block.modulation, &condition, 3)?;
            let h = normed(&all, &parts[1], &parts[0])?;
            let [q, k, v] = block.heads.forward(&h)?;
            let attended = attention(&q, &k, &v)?;
            let wide = Tensor::cat(&[&attended, &ops::gelu(&block.up.forward(&h)?)?], 2)?;
            all = ops::gated_sum(&all, &block.output.forward(&wide)?, &parts[2])?;
        }
        let image = all.narrow(1, tokens, all.dim(1)? - tokens)?.contiguous()?;
        let parts = modulation(&self.output_modulation, &condition, 2)?;
        self.output.forward(&normed(&image, &parts[0], &parts[1])?)
    }

    /// Text tokens stand at the origin, image tokens at (0, row, column).
    fn turns(&self, tokens: usize, (rows, columns): (usize, usize), like: &Tensor) -> Result<Turns> {
        let places = std::iter::repeat_n([0, 0, 0], tokens)
            .chain((0..rows).flat_map(|row| (0..columns).map(move |column| [0, row, column])));
        Turns::new(places, &self.config.axes_dims_rope, THETA, like)
    }
}
