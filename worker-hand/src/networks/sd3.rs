//! Stable Diffusion 3's denoiser: `SD3Transformer2DModel`. Text and image tokens have streams of their own and attend to each other in every block; in some
//! blocks (3.5 medium) the image also attends to itself alone. The text's stream ends before the last block does.
//!
//! Source: diffusers 0.42.1, `models/transformers/transformer_sd3.py`. Checked against it by `tests/sd3.rs`.

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

use super::blocks::{from_patches, to_patches};
use super::joint::{Embedder, Heads, Rest, Side, Sizes, modulation, normed};

/// What `config.json` says. Other fields are refused by [`Sd3::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Cells of a latent along a side that pictures usually have.
    pub sample_size: usize,
    /// Cells of a patch along each side.
    pub patch_size: usize,
    /// Channels of a latent.
    pub in_channels: usize,
    /// Channels of what comes out.
    pub out_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Channels of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Channels of a text token.
    pub joint_attention_dim: usize,
    /// Channels that it is projected to: those of all heads.
    pub caption_projection_dim: usize,
    /// Channels of the pooled text.
    pub pooled_projection_dim: usize,
    /// Patches along each side of the table of places.
    pub pos_embed_max_size: usize,
    /// Blocks in which the image also attends to itself alone.
    pub dual_attention_layers: Vec<usize>,
    /// Whether queries and keys are normed: `rms_norm`, or none.
    pub qk_norm: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            out_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
            others: BTreeMap::new(),
        }
    }
}

/// The network.
#[derive(Debug)]
pub struct Sd3 {
    config: Config,
    patches: Linear,
    /// (side, side, width)
    places: Tensor,
    embedder: Embedder,
    context: Linear,
    blocks: Vec<Block>,
    output_modulation: Linear,
    output: Linear,
}

#[derive(Debug)]
struct Block {
    image_modulation: Linear,
    image: Heads,
    image_rest: Rest,
    /// The image's attention to itself alone, where there is one, and its output.
    alone: Option<(Heads, Linear)>,
    text_modulation: Linear,
    text: Heads,
    /// None in the last block, from which the text does not go on.
    text_rest: Option<Rest>,
}

impl Block {
    fn new(weights: &mut Weights, name: &str, sizes: Sizes, alone: bool, last: bool) -> Self {
        let Sizes { width, .. } = sizes;
        let part = |part: &str| format!("{name}.{part}");
        let parts = (if alone { 9 } else { 6 }, if last { 2 } else { 6 });
        Self {
            image_modulation: Linear::with_bias(weights, &part("norm1.linear"), width, parts.0 * width),
            image: Heads::new(weights, &part("attn"), Side::Image, sizes),
            image_rest: Rest::new(weights, name, Side::Image, width),
            alone: alone.then(|| {
                let heads = Heads::new(weights, &part("attn2"), Side::Image, sizes);
                (heads, Linear::with_bias(weights, &part("attn2.to_out.0"), width, width))
            }),
            text_modulation: Linear::with_bias(weights, &part("norm1_context.linear"), width, parts.1 * width),
            text: Heads::new(weights, &part("attn"), Side::Text, sizes),
            text_rest: (!last).then(|| Rest::new(weights, name, Side::Text, width)),
        }
    }

    /// Image (batch, tokens, width) and text (batch, tokens, width), both as they leave the block.
    fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        condition: &Tensor,
        bias: Option<&Tensor>,
        logits: Logits,
    ) -> Result<(Tensor, Tensor)> {
        let of_image = modulation(&self.image_modulation, condition, if self.alone.is_some() { 9 } else { 6 })?;
        let of_text = modulation(&self.text_modulation, condition, if self.text_rest.is_some() { 6 } else { 2 })?;
        // The last norm of the text is told scale before shift.
        let (text_scale, text_shift) = match &self.text_rest {
            Some(_) => (&of_text[1], &of_text[0]),
            None => (&of_text[0], &of_text[1]),
        };
        let from_image = self.image.forward(&normed(image, &of_image[1], &of_image[0])?)?;
        let from_text = self.text.forward(&normed(text, text_scale, text_shift)?)?;
        let both = |part: usize| Tensor::cat(&[&from_image[part], &from_text[part]], 1);
        let attended = attend(&both(0)?, &both(1)?, &both(2)?, bias, logits)?.flatten_from(2)?;
        let tokens = image.dim(1)?;
        let to_image = attended.narrow(1, 0, tokens)?.contiguous()?;
        let mut image_out = ops::gated_sum(image, &self.image_rest.output.forward(&to_image)?, &of_image[2])?;
        if let Some((heads, output)) = &self.alone {
            let [q, k, v] = heads.forward(&normed(image, &of_image[7], &of_image[6])?)?;
            let bias = bias.map(|bias| bias.narrow(3, 0, tokens)).transpose()?;
            let attended = attend(&q, &k, &v, bias.as_ref(), logits)?.flatten_from(2)?;
            image_out = ops::gated_sum(&image_out, &output.forward(&attended)?, &of_image[8])?;
        }
        let image_out = self.image_rest.mlp(&image_out, &of_image[3..6])?;
        let text_out = match &self.text_rest {
            None => text.clone(),
            Some(rest) => {
                let to_text = attended.narrow(1, tokens, attended.dim(1)? - tokens)?.contiguous()?;
                let text = ops::gated_sum(text, &rest.output.forward(&to_text)?, &of_text[2])?;
                rest.mlp(&text, &of_text[3..6])?
            }
        };
        Ok((image_out, text_out))
    }
}

impl Sd3 {
    /// Takes the tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be, or says what is not computed here.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { in_channels, out_channels, patch_size, pos_embed_max_size: side, num_layers, .. } = config;
        let (head, width) = (config.attention_head_dim, config.num_attention_heads * config.attention_head_dim);
        let sizes = [in_channels, out_channels, patch_size, side, width, config.joint_attention_dim, num_layers];
        if sizes.contains(&0) || config.pooled_projection_dim == 0 || config.caption_projection_dim != width {
            candle_core::bail!("a Stable Diffusion 3 denoiser cannot be so: {config:?}");
        }
        if let Some(norm) = config.qk_norm.as_deref().filter(|norm| *norm != "rms_norm") {
            candle_core::bail!("qk_norm {norm:?} is not known");
        }
        if let Some(field) = config.others.keys().find(|field| !field.starts_with('_')) {
            candle_core::bail!("a Stable Diffusion 3 denoiser's {field} is not known");
        }
        let sizes = Sizes { width, head, normed: config.qk_norm.is_some() };
        let block = |weights: &mut Weights, layer: usize| {
            let (alone, last) = (config.dual_attention_layers.contains(&layer), layer + 1 == num_layers);
            Block::new(weights, &format!("transformer_blocks.{layer}"), sizes, alone, last)
        };
        Ok(Self {
            patches: Linear::of_patches(weights, "pos_embed.proj", in_channels, patch_size, width)?,
            places: weights.get_as(
                "pos_embed.pos_embed",
                &[1, side * side, width],
                &[side, side, width],
                |places| places.reshape((side, side, width)),
            )?,
            embedder: Embedder::new(weights, config.pooled_projection_dim, width, false),
            context: Linear::with_bias(weights, "context_embedder", config.joint_attention_dim, width),
            blocks: (0..num_layers).map(|layer| block(weights, layer)).collect(),
            output_modulation: Linear::with_bias(weights, "norm_out.linear", width, 2 * width),
            output: Linear::with_bias(weights, "proj_out", width, patch_size * patch_size * out_channels),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Latents x (batch, channels, height, width), each batch row at its own time (batch; 0 to 1000), with a text (batch, tokens, joint) and its pooled vector
    /// (batch, pooled) -> the flow (batch, channels, height, width). bias: (batch or 1, 1, 1, patches + tokens), added to the logits of image tokens and text tokens.
    ///
    /// # Errors
    /// If shapes do not fit, or the picture has more patches along a side than there are places.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        states: &Tensor,
        pooled: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Config { patch_size: side, pos_embed_max_size: most, .. } = self.config;
        let (_, _, height, width) = x.dims4()?;
        let (rows, columns) = (height / side, width / side);
        if rows > most || columns > most || rows * columns == 0 {
            candle_core::bail!("{rows} x {columns} patches; this denoiser knows 1 to {most} along each side");
        }
        let places = self.places.narrow(0, (most - rows) / 2, rows)?.narrow(1, (most - columns) / 2, columns)?;
        let places = places.reshape((1, rows * columns, ()))?;
        let mut image = self.patches.forward(&to_patches(x, side)?)?.broadcast_add(&places)?;
        let mut text = self.context.forward(states)?;
        let condition = self.embedder.forward(time, pooled, None)?;
        let logits = Logits::of_width(self.config.attention_head_dim);
        for block in &self.blocks {
            (image, text) = block.forward(&image, &text, &condition, bias, logits)?;
        }
        let parts = modulation(&self.output_modulation, &condition, 2)?;
        let image = self.output.forward(&normed(&image, &parts[0], &parts[1])?)?;
        from_patches(&image, (rows, columns), side)
    }
}
