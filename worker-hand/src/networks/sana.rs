//! Sana's denoiser: `SanaTransformer2DModel`. Image tokens mix by linear attention and by convolutions, which also tell them where they are, and attend to the
//! text. Sana-Sprint's is also told the strength of guidance.
//!
//! Source: diffusers 0.42.1, `models/transformers/sana_transformer.py`. Checked against it by the checkpoints of `tests/tests/checkpoints.rs`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        linear::Linear,
        linear_attention::attend_linear,
        ops,
    },
    weights::Weights,
};
use serde::Deserialize;

use super::blocks::{GatedConvolution, from_patches, modulated_layer_norm, sinusoid, to_patches};

/// What `config.json` says. Other fields are refused by [`Sana::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of a latent.
    pub in_channels: usize,
    /// Channels of what comes out.
    pub out_channels: usize,
    /// Heads of an attention of the image to itself.
    pub num_attention_heads: usize,
    /// Channels of such a head.
    pub attention_head_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads of an attention to the text.
    pub num_cross_attention_heads: usize,
    /// Channels of such a head.
    pub cross_attention_head_dim: usize,
    /// Channels of a text token inside: as many as an image token has.
    pub cross_attention_dim: usize,
    /// Channels of a state of the text.
    pub caption_channels: usize,
    /// Channels inside the convolutions, for each outside.
    pub mlp_ratio: f64,
    /// Whether the image's queries, keys and values have biases.
    pub attention_bias: bool,
    /// Cells of a latent along a side that pictures usually have.
    pub sample_size: usize,
    /// Cells of a patch along each side.
    pub patch_size: usize,
    /// Whether the norm before the convolutions has weights: not known here.
    pub norm_elementwise_affine: bool,
    /// Epsilon of the norms in blocks.
    pub norm_eps: f64,
    /// Tokens are told their places, counted in units of this; without it they are not told.
    pub interpolation_scale: Option<f64>,
    /// Whether it is told the strength of guidance.
    pub guidance_embeds: bool,
    /// What that is multiplied by before.
    pub guidance_embeds_scale: f64,
    /// Whether queries and keys are normed: `rms_norm_across_heads`, or none.
    pub qk_norm: Option<String>,
    /// What the time is multiplied by, if it is not told the strength of guidance.
    pub timestep_scale: f64,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            in_channels: 32,
            out_channels: 32,
            num_attention_heads: 70,
            attention_head_dim: 32,
            num_layers: 20,
            num_cross_attention_heads: 20,
            cross_attention_head_dim: 112,
            cross_attention_dim: 2240,
            caption_channels: 2304,
            mlp_ratio: 2.5,
            attention_bias: false,
            sample_size: 32,
            patch_size: 1,
            norm_elementwise_affine: false,
            norm_eps: 1e-6,
            interpolation_scale: None,
            guidance_embeds: false,
            guidance_embeds_scale: 0.1,
            qk_norm: None,
            timestep_scale: 1.0,
            others: BTreeMap::new(),
        }
    }
}

/// Epsilon of the norms of queries, keys and the text.
const RMS_EPS: f64 = 1e-5;
/// Epsilon of the last norm.
const LAST_EPS: f64 = 1e-6;
/// Waves of an embedded number.
const WAVES: usize = 256;

/// The network.
#[derive(Debug)]
pub struct Sana {
    config: Config,
    patches: Linear,
    time: [Linear; 2],
    guidance: Option<[Linear; 2]>,
    modulation: Linear,
    caption: [Linear; 2],
    caption_norm: Tensor,
    blocks: Vec<Block>,
    /// (2, width)
    output_table: Tensor,
    output: Linear,
}

/// An attention's projections.
#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: Option<[Tensor; 2]>,
    output: Linear,
    heads: usize,
}

impl Attention {
    fn new(weights: &mut Weights, name: &str, width: usize, heads: (usize, usize), normed: bool, biased: bool) -> Self {
        let (inner, part) = (heads.0 * heads.1, |part: &str| format!("{name}.{part}"));
        let mut linear = |of: &str| match biased {
            true => Linear::with_bias(weights, &part(of), width, inner),
            false => Linear::new(weights, &part(of), width, inner),
        };
        let (q, k, v) = (linear("to_q"), linear("to_k"), linear("to_v"));
        let norms = ["norm_q.weight", "norm_k.weight"];
        let norms = normed.then(|| norms.map(|norm| weights.get(&part(norm), &[inner])));
        Self { q, k, v, norms, output: Linear::with_bias(weights, &part("to_out.0"), inner, width), heads: heads.0 }
    }

    /// Queries of x and keys and values of y, each (batch, tokens, heads, channels).
    fn project(&self, x: &Tensor, y: &Tensor) -> Result<[Tensor; 3]> {
        let (mut q, mut k) = (self.q.forward(x)?, self.k.forward(y)?);
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (ops::rms_norm(&q, q_norm, RMS_EPS)?, ops::rms_norm(&k, k_norm, RMS_EPS)?);
        }
        let split = |x: Tensor| {
            let (batch, tokens, width) = x.dims3()?;
            x.reshape((batch, tokens, self.heads, width / self.heads))
        };
        Ok([split(q)?, split(k)?, split(self.v.forward(y)?)?])
    }
}

#[derive(Debug)]
struct Block {
    alone: Attention,
    text: Attention,
    mlp: GatedConvolution,
    /// (6, width)
    table: Tensor,
}

impl Block {
    fn new(weights: &mut Weights, name: &str, config: &Config) -> Result<Self> {
        let width = config.num_attention_heads * config.attention_head_dim;
        let part = |part: &str| format!("{name}.{part}");
        let normed = config.qk_norm.is_some();
        let alone = (config.num_attention_heads, config.attention_head_dim);
        let text = (config.num_cross_attention_heads, config.cross_attention_head_dim);
        Ok(Self {
            alone: Attention::new(weights, &part("attn1"), width, alone, normed, config.attention_bias),
            text: Attention::new(weights, &part("attn2"), width, text, normed, true),
            mlp: GatedConvolution::new(weights, &part("ff"), width, config.mlp_ratio)?,
            table: weights.get(&part("scale_shift_table"), &[6, width]),
        })
    }

    /// x (batch, tokens, width) as it leaves the block. condition: (batch, 6, width)
    fn forward(
        &self,
        x: &Tensor,
        (rows, columns): (usize, usize),
        text: &Tensor,
        bias: Option<&Tensor>,
        condition: &Tensor,
        eps: f64,
    ) -> Result<Tensor> {
        let parts = parts(&condition.broadcast_add(&self.table)?)?;
        let normed = modulated_layer_norm(x, &parts[1], &parts[0], eps)?;
        let [q, k, v] = self.alone.project(&normed, &normed)?;
        let attended = self.alone.output.forward(&attend_linear(&q, &k, &v)?.flatten_from(2)?)?;
        let x = ops::gated_sum(x, &attended, &parts[2])?;
        let [q, k, v] = self.text.project(&x, text)?;
        let logits = Logits::of_width(q.dim(3)?);
        let x = (self.text.output.forward(&attend(&q, &k, &v, bias, logits)?.flatten_from(2)?)? + x)?;
        let (batch, tokens, width) = x.dims3()?;
        let map = modulated_layer_norm(&x, &parts[4], &parts[3], eps)?.reshape((batch, rows, columns, width))?;
        ops::gated_sum(&x, &self.mlp.forward(&map)?.reshape((batch, tokens, width))?, &parts[5])
    }
}

/// (batch, count, width) -> count of (batch, width)
fn parts(table: &Tensor) -> Result<Vec<Tensor>> {
    table.chunk(table.dim(1)?, 1)?.iter().map(|part| part.squeeze(1)?.contiguous()).collect()
}

impl Sana {
    /// Takes the tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be, or says what is not computed here.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { in_channels, out_channels, patch_size, num_layers, caption_channels, .. } = config;
        let width = config.num_attention_heads * config.attention_head_dim;
        let inner = config.num_cross_attention_heads * config.cross_attention_head_dim;
        let sizes = [in_channels, out_channels, patch_size, num_layers, caption_channels, width, inner];
        if sizes.contains(&0) || config.sample_size < patch_size || config.cross_attention_dim != width {
            candle_core::bail!("a Sana denoiser cannot be so: {config:?}");
        }
        if config.norm_elementwise_affine {
            candle_core::bail!("norm_elementwise_affine = true is not known");
        }
        if let Some(norm) = config.qk_norm.as_deref().filter(|norm| *norm != "rms_norm_across_heads") {
            candle_core::bail!("qk_norm {norm:?} is not known");
        }
        if let Some(field) = config.others.keys().find(|field| !field.starts_with('_') && *field != "dropout") {
            candle_core::bail!("a Sana denoiser's {field} is not known");
        }
        if config.interpolation_scale.is_some_and(|scale| scale <= 0.0 || !width.is_multiple_of(4)) {
            candle_core::bail!("places of {width} channels in units of {:?} cannot be", config.interpolation_scale);
        }
        let told = config.guidance_embeds;
        let embedder = |weights: &mut Weights, name: &str| {
            let name = if told { format!("time_embed.{name}") } else { format!("time_embed.emb.{name}") };
            let first = Linear::with_bias(weights, &format!("{name}.linear_1"), WAVES, width);
            [first, Linear::with_bias(weights, &format!("{name}.linear_2"), width, width)]
        };
        Ok(Self {
            patches: Linear::of_patches(weights, "patch_embed.proj", in_channels, patch_size, width)?,
            time: embedder(weights, "timestep_embedder"),
            guidance: told.then(|| embedder(weights, "guidance_embedder")),
            modulation: Linear::with_bias(weights, "time_embed.linear", width, 6 * width),
            caption: [
                Linear::with_bias(weights, "caption_projection.linear_1", caption_channels, width),
                Linear::with_bias(weights, "caption_projection.linear_2", width, width),
            ],
            caption_norm: weights.get("caption_norm.weight", &[width]),
            blocks: (0..num_layers)
                .map(|layer| Block::new(weights, &format!("transformer_blocks.{layer}"), &config))
                .collect::<Result<_>>()?,
            output_table: weights.get("scale_shift_table", &[2, width]),
            output: Linear::with_bias(weights, "proj_out", width, patch_size * patch_size * out_channels),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Latents x (batch, channels, height, width), each batch row at its own time (batch), with a text (batch, tokens, caption) and, where it is told,
    /// the strength of guidance (batch) -> the flow (batch, channels, height, width). bias: (batch or 1, 1, 1, tokens), added to the logits of text tokens.
    ///
    /// # Errors
    /// If shapes do not fit, or guidance is given where it is not wanted, or not where it is.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        states: &Tensor,
        bias: Option<&Tensor>,
        guidance: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Config { patch_size: side, timestep_scale, guidance_embeds_scale, norm_eps, .. } = self.config;
        let (batch, _, height, width) = x.dims4()?;
        let (rows, columns) = (height / side, width / side);
        let mut image = self.patches.forward(&to_patches(x, side)?)?;
        if let Some(scale) = self.config.interpolation_scale {
            let base = self.config.sample_size / side;
            image = image.broadcast_add(&places((rows, columns), base, scale, image.dim(2)?, x.device())?)?;
        }
        let through = |[first, second]: &[Linear; 2], value: &Tensor| {
            second.forward(&ops::silu(&first.forward(&sinusoid(value, WAVES, true, 0.0)?)?)?)
        };
        let embedded = match (&self.guidance, guidance) {
            (None, None) => through(&self.time, &(time * timestep_scale)?)?,
            (Some(layers), Some(guidance)) => {
                (through(&self.time, time)? + through(layers, &(guidance * guidance_embeds_scale)?)?)?
            }
            (Some(_), None) => candle_core::bail!("this denoiser wants the strength of guidance"),
            (None, Some(_)) => candle_core::bail!("this denoiser takes no guidance"),
        };
        let inner = image.dim(2)?;
        let condition = self.modulation.forward(&ops::silu(&embedded)?)?.reshape((batch, 6, inner))?;
        let text = self.caption[1].forward(&ops::gelu(&self.caption[0].forward(states)?)?)?;
        let text = ops::rms_norm(&text, &self.caption_norm, RMS_EPS)?;
        for block in &self.blocks {
            image = block.forward(&image, (rows, columns), &text, bias, &condition, norm_eps)?;
        }
        let parts = parts(&embedded.unsqueeze(1)?.broadcast_add(&self.output_table)?)?;
        let image = self.output.forward(&modulated_layer_norm(&image, &parts[1], &parts[0], LAST_EPS)?)?;
        from_patches(&image, (rows, columns), side)
    }
}

/// What tells tokens their places, (1, tokens, width): sines and cosines of the column, then of the row, in units of `scale` of a picture of `base` patches
/// along each side.
fn places((rows, columns): (usize, usize), base: usize, scale: f64, width: usize, device: &Device) -> Result<Tensor> {
    let waves = width / 4;
    // In f32 up to here, as the reference has it.
    let place = |at: usize, count: usize| f64::from(at as f32 / (count as f64 / base as f64) as f32 / scale as f32);
    let mut values: Vec<f32> = Vec::with_capacity(rows * columns * width);
    for row in 0..rows {
        for column in 0..columns {
            for place in [place(column, columns), place(row, rows)] {
                let angles = (0..waves).map(|i| place / 10_000f64.powf(i as f64 / waves as f64));
                values.extend(angles.clone().map(|angle| angle.sin() as f32));
                values.extend(angles.map(|angle| angle.cos() as f32));
            }
        }
    }
    Tensor::from_vec(values, (1, rows * columns, width), device)?.to_dtype(DType::F32)
}
