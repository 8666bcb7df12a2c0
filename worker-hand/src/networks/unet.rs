//! The denoiser of Stable Diffusion 1.5, 2.1 and XL: `UNet2DConditionModel`.
//!
//! Source: diffusers 0.42.1, `models/unets/unet_2d_condition.py` and the blocks that it names. Checked against it by `tests/unet.rs`.

use candle_core::{D, Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        conv::{Conv3x3, Sampling, nearest},
        linear::Linear,
        norm::{GroupNorm, LayerNorm},
        ops::{self, Activation},
    },
    weights::Weights,
};
use serde::Deserialize;

use super::blocks::{Norm, Residual, sinusoid};

/// What `config.json` says. What it may say otherwise is refused by [`Unet::new`], or changes nothing of what is computed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of the latent that goes in.
    pub in_channels: usize,
    /// Channels of what comes out.
    pub out_channels: usize,
    /// Channels of each level, from the largest map to the smallest.
    pub block_out_channels: Vec<usize>,
    /// Kind of each level on the way down.
    pub down_block_types: Vec<Kind>,
    /// Kind of each level on the way up, from the smallest map to the largest.
    pub up_block_types: Vec<Kind>,
    /// Residual blocks of each level on the way down; one more on the way up.
    pub layers_per_block: Each,
    /// Heads of each level. (The name is an old mistake of the format.)
    pub attention_head_dim: Each,
    /// Heads of each level, in configurations that name them right.
    pub num_attention_heads: Option<Each>,
    /// Transformer blocks of each attention.
    pub transformer_layers_per_block: Each,
    /// Channels of the conditioning.
    pub cross_attention_dim: usize,
    /// Whether attentions begin and end with linear maps; else with convolutions of one pixel, which compute the same.
    pub use_linear_projection: bool,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the norms of residual blocks.
    pub norm_eps: f64,
    /// Activation of residual blocks.
    pub act_fn: Activation,
    /// Whether the cosines of the time's embedding come first.
    pub flip_sin_to_cos: bool,
    /// Taken off the number of the time embedding's frequencies.
    pub freq_shift: f64,
    /// `text_time`: a pooled text and numbers of the picture's size are added to the time (SDXL).
    pub addition_embed_type: Option<String>,
    /// Channels for each of those numbers.
    pub addition_time_embed_dim: Option<usize>,
    /// Channels of the pooled text and of all those numbers.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Channels of an embedding of the strength of guidance, which is added to the time's: of networks that are told it (LCM).
    pub time_cond_proj_dim: Option<usize>,
    /// Fields that are not looked into unless they are set to something that computes otherwise.
    #[serde(flatten)]
    pub others: serde_json::Map<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out; some are younger than files that are in use.
impl Default for Config {
    fn default() -> Self {
        use Kind::{Attention, Plain};
        Self {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: vec![Attention, Attention, Attention, Plain],
            up_block_types: vec![Plain, Attention, Attention, Attention],
            layers_per_block: Each::Same(2),
            attention_head_dim: Each::Same(8),
            num_attention_heads: None,
            transformer_layers_per_block: Each::Same(1),
            cross_attention_dim: 1280,
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            act_fn: Activation::Silu,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            time_cond_proj_dim: None,
            others: serde_json::Map::new(),
        }
    }
}

const TEXT_TIME: &str = "text_time";

/// Fields that change what is computed, and the only values that are known here.
const KNOWN: [(&str, &[&str]); 24] = [
    ("attention_type", &["\"default\""]),
    ("center_input_sample", &["false"]),
    ("class_embed_type", &["null"]),
    ("class_embeddings_concat", &["false"]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
    ("cross_attention_norm", &["null"]),
    ("downsample_padding", &["1"]),
    ("dual_cross_attention", &["false"]),
    ("encoder_hid_dim", &["null"]),
    ("encoder_hid_dim_type", &["null"]),
    ("mid_block_type", &["\"UNetMidBlock2DCrossAttn\""]),
    ("mid_block_only_cross_attention", &["null", "false"]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("num_class_embeds", &["null"]),
    ("only_cross_attention", &["false"]),
    ("resnet_out_scale_factor", &["1", "1.0"]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("reverse_transformer_layers_per_block", &["null"]),
    ("time_embedding_act_fn", &["null"]),
    ("time_embedding_dim", &["null"]),
    ("time_embedding_type", &["\"positional\""]),
    ("timestep_post_act", &["null"]),
];

/// One number for all levels, or one for each.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Each {
    /// The same for all.
    Same(usize),
    /// Level by level.
    Listed(Vec<usize>),
}

impl Each {
    /// The number of a level, of `levels`.
    fn of(&self, level: usize, levels: usize) -> Result<usize> {
        match self {
            Self::Same(number) => Ok(*number),
            Self::Listed(numbers) if numbers.len() == levels => Ok(numbers[level]),
            Self::Listed(numbers) => candle_core::bail!("{numbers:?} for {levels} levels of a UNet"),
        }
    }
}

/// A level, on the way down or up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Kind {
    /// With attention.
    #[serde(rename = "CrossAttnDownBlock2D", alias = "CrossAttnUpBlock2D")]
    Attention,
    /// Without.
    #[serde(rename = "DownBlock2D", alias = "UpBlock2D")]
    Plain,
}

/// What a picture is conditioned on.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// (batch, tokens, cross)
    pub states: &'a Tensor,
    /// (batch or 1, 1, 1, tokens), added to the logits of its tokens.
    pub bias: Option<&'a Tensor>,
}

/// What SDXL adds to the time.
#[derive(Debug, Clone)]
pub struct Added {
    /// The pooled text, (batch, channels)
    pub pooled: Tensor,
    /// Original height and width, top and left of the crop, height and width that are aimed at: (batch, 6)
    pub sizes: Tensor,
}

/// The network.
#[derive(Debug)]
pub struct Unet {
    config: Config,
    input: Conv3x3,
    time: [Linear; 2],
    guidance: Option<Linear>,
    added: Option<[Linear; 2]>,
    down: Vec<Level>,
    middle: (Residual, Attention, Residual),
    up: Vec<Level>,
    norm: GroupNorm,
    output: Conv3x3,
}

/// Residual blocks with an attention after each, or none, and a change of size at the end.
#[derive(Debug)]
struct Level {
    blocks: Vec<(Residual, Option<Attention>)>,
    sampler: Option<Conv3x3>,
}

#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    input: Linear,
    blocks: Vec<Block>,
    output: Linear,
    heads: usize,
}

#[derive(Debug)]
struct Block {
    norms: [LayerNorm; 3],
    itself: Heads,
    cross: Heads,
    gate: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Heads {
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
}

/// What every block of a pass reads.
struct Pass<'a> {
    /// (batch, channels of the time), the activation applied
    time: Tensor,
    /// (batch, tokens, channels)
    context: &'a Tensor,
    /// Added to the logits of what is looked at in the context.
    bias: Option<&'a Tensor>,
}

/// Takes tensors for a configuration.
struct Loader<'a> {
    weights: &'a mut Weights,
    norm: Norm,
    time: usize,
    context: usize,
    linear: bool,
}

impl Loader<'_> {
    /// A residual block and what stands beside it: `resnets.{index}` and `attentions.{index}`. attention: (heads, blocks), if there is one.
    fn step(
        &mut self,
        name: &str,
        index: usize,
        (inputs, outputs): (usize, usize),
        attention: Option<(usize, usize)>,
    ) -> Result<(Residual, Option<Attention>)> {
        let residual = self.residual(&format!("{name}.resnets.{index}"), inputs, outputs)?;
        let name = format!("{name}.attentions.{index}");
        let attention = attention.map(|(heads, blocks)| self.attention(&name, outputs, heads, blocks)).transpose()?;
        Ok((residual, attention))
    }

    fn residual(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Residual> {
        Residual::new(self.weights, name, inputs, outputs, Some(self.time), self.norm)
    }

    fn attention(&mut self, name: &str, width: usize, heads: usize, blocks: usize) -> Result<Attention> {
        if heads == 0 || !width.is_multiple_of(heads) {
            candle_core::bail!("{heads} heads of {width} channels cannot be ({name})");
        }
        // Attentions have a norm of an epsilon of their own.
        let norm = GroupNorm::new(self.weights, &format!("{name}.norm"), width, self.norm.groups, 1e-6)?;
        let input = self.projection(&format!("{name}.proj_in"), width)?;
        let output = self.projection(&format!("{name}.proj_out"), width)?;
        let blocks = (0..blocks).map(|block| self.block(&format!("{name}.transformer_blocks.{block}"), width));
        Ok(Attention { norm, input, blocks: blocks.collect(), output, heads })
    }

    fn projection(&mut self, name: &str, width: usize) -> Result<Linear> {
        match self.linear {
            true => Ok(Linear::with_bias(self.weights, name, width, width)),
            false => Linear::of_convolution(self.weights, name, width, width),
        }
    }

    fn block(&mut self, name: &str, width: usize) -> Block {
        let norms = ["norm1", "norm2", "norm3"];
        Block {
            norms: norms.map(|norm| LayerNorm::new(self.weights, &format!("{name}.{norm}"), width, 1e-5)),
            itself: self.heads(&format!("{name}.attn1"), width, width),
            cross: self.heads(&format!("{name}.attn2"), width, self.context),
            gate: Linear::with_bias(self.weights, &format!("{name}.ff.net.0.proj"), width, 8 * width),
            down: Linear::with_bias(self.weights, &format!("{name}.ff.net.2"), 4 * width, width),
        }
    }

    fn heads(&mut self, name: &str, width: usize, context: usize) -> Heads {
        Heads {
            q: Linear::new(self.weights, &format!("{name}.to_q"), width, width),
            k: Linear::new(self.weights, &format!("{name}.to_k"), context, width),
            v: Linear::new(self.weights, &format!("{name}.to_v"), context, width),
            output: Linear::with_bias(self.weights, &format!("{name}.to_out.0"), width, width),
        }
    }
}

impl Unet {
    /// Takes the network's tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration asks for what is not computed here, or cannot be.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        check(&config)?;
        let channels = &config.block_out_channels;
        let (levels, first) = (channels.len(), channels[0]);
        let time = 4 * first;
        let mut loader = Loader {
            norm: Norm { groups: config.norm_num_groups, eps: config.norm_eps, activation: config.act_fn },
            time,
            context: config.cross_attention_dim,
            linear: config.use_linear_projection,
            weights,
        };
        let heads = config.num_attention_heads.as_ref().unwrap_or(&config.attention_head_dim);
        let size = |level| -> Result<(usize, usize)> {
            Ok((heads.of(level, levels)?, config.transformer_layers_per_block.of(level, levels)?))
        };
        let attention = |kind, level| (kind == Kind::Attention).then(|| size(level)).transpose();
        let (mut down, mut skipped) = (Vec::new(), vec![first]);
        let mut inputs = first;
        for (level, kind) in config.down_block_types.iter().enumerate() {
            let (name, outputs) = (format!("down_blocks.{level}"), channels[level]);
            let mut blocks = Vec::new();
            for index in 0..config.layers_per_block.of(level, levels)? {
                blocks.push(loader.step(&name, index, (inputs, outputs), attention(*kind, level)?)?);
                skipped.push(outputs);
                inputs = outputs;
            }
            let sampler = match level + 1 < levels {
                false => None,
                true => {
                    skipped.push(outputs);
                    let convolution = format!("{name}.downsamplers.0.conv");
                    Some(Conv3x3::load(loader.weights, &convolution, outputs, outputs)?.at(Sampling::Second))
                }
            };
            down.push(Level { blocks, sampler });
        }
        let width = channels[levels - 1];
        let (heads, depth) = size(levels - 1)?;
        let middle = (
            loader.residual("mid_block.resnets.0", width, width)?,
            loader.attention("mid_block.attentions.0", width, heads, depth)?,
            loader.residual("mid_block.resnets.1", width, width)?,
        );
        let mut up = Vec::new();
        for (step, kind) in config.up_block_types.iter().enumerate() {
            let level = levels - 1 - step;
            let (name, outputs) = (format!("up_blocks.{step}"), channels[level]);
            let mut blocks = Vec::new();
            for index in 0..=config.layers_per_block.of(level, levels)? {
                let Some(skip) = skipped.pop() else {
                    candle_core::bail!("a UNet whose levels do not meet: {config:?}")
                };
                blocks.push(loader.step(&name, index, (inputs + skip, outputs), attention(*kind, level)?)?);
                inputs = outputs;
            }
            let sampler = match level > 0 {
                false => None,
                true => Some(Conv3x3::load(loader.weights, &format!("{name}.upsamplers.0.conv"), outputs, outputs)?),
            };
            up.push(Level { blocks, sampler });
        }
        let weights = loader.weights;
        let guidance =
            config.time_cond_proj_dim.map(|inputs| Linear::new(weights, "time_embedding.cond_proj", inputs, first));
        let mut pair = |name: &str, inputs: usize| {
            let mut linear = |part: &str, inputs| Linear::with_bias(weights, &format!("{name}.{part}"), inputs, time);
            [linear("linear_1", inputs), linear("linear_2", time)]
        };
        let added = config.projection_class_embeddings_input_dim.filter(|_| config.addition_embed_type.is_some());
        Ok(Self {
            time: pair("time_embedding", first),
            guidance,
            added: added.map(|inputs| pair("add_embedding", inputs)),
            input: Conv3x3::load(weights, "conv_in", config.in_channels, first)?,
            down,
            middle,
            up,
            norm: GroupNorm::new(weights, "conv_norm_out", first, config.norm_num_groups, config.norm_eps)?,
            output: Conv3x3::load(weights, "conv_out", first, config.out_channels)?,
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Latents (batch, height, width, in), each at its own time (batch; 0 to 999, fractions too), with a text -> what the network predicts (batch, height, width,
    /// out): noise or velocity, as it was trained. added: for networks that want it; guidance: (batch), the strength, for networks that are told it.
    ///
    /// # Errors
    /// If shapes do not fit, or `added` or `guidance` is given where it is not wanted, or not where it is.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        given: Text<'_>,
        added: Option<&Added>,
        guidance: Option<&Tensor>,
    ) -> Result<Tensor> {
        let time = ops::activate(self.config.act_fn, &self.embed(time, added, guidance)?)?;
        let pass = Pass { time, context: given.states, bias: given.bias };
        let mut x = self.input.forward(x)?;
        let mut skipped = vec![x.clone()];
        for Level { blocks, sampler } in &self.down {
            for (residual, attention) in blocks {
                x = residual.forward(&x, Some(&pass.time))?;
                if let Some(attention) = attention {
                    x = attention.forward(&x, &pass)?;
                }
                skipped.push(x.clone());
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x)?;
                skipped.push(x.clone());
            }
        }
        let (first, attention, last) = &self.middle;
        x = attention.forward(&first.forward(&x, Some(&pass.time))?, &pass)?;
        x = last.forward(&x, Some(&pass.time))?;
        for Level { blocks, sampler } in &self.up {
            for (residual, attention) in blocks {
                let Some(skip) = skipped.pop() else { candle_core::bail!("a UNet's levels do not meet") };
                x = residual.forward(&Tensor::cat(&[&x, &skip], 3)?, Some(&pass.time))?;
                if let Some(attention) = attention {
                    x = attention.forward(&x, &pass)?;
                }
            }
            if let (Some(sampler), Some(next)) = (sampler, skipped.last()) {
                // To the size that it had on the way down: an odd one is not twice the smaller one.
                let (_, height, width, _) = next.dims4()?;
                x = sampler.forward(&nearest(&x, (height, width))?)?;
            }
        }
        self.output.forward(&ops::activate(self.config.act_fn, &self.norm.forward(&x)?)?)
    }

    fn embed(&self, time: &Tensor, added: Option<&Added>, guidance: Option<&Tensor>) -> Result<Tensor> {
        let config = &self.config;
        let act = |x: Tensor| ops::activate(config.act_fn, &x);
        let through = |[first, second]: &[Linear; 2], x: &Tensor| second.forward(&act(first.forward(x)?)?);
        let waves = |values: &Tensor, width: usize| sinusoid(values, width, config.flip_sin_to_cos, config.freq_shift);
        let mut time = waves(time, config.block_out_channels[0])?;
        match (&self.guidance, guidance) {
            (None, None) => {}
            (Some(layer), Some(guidance)) => {
                // What is above none, in thousandths, sines first: `get_guidance_scale_embedding` of diffusers' pipelines.
                let above = ((guidance - 1.0)? * 1000.0)?;
                time =
                    (time + layer.forward(&sinusoid(&above, config.time_cond_proj_dim.unwrap_or(0), false, 1.0)?)?)?;
            }
            (Some(_), None) => candle_core::bail!("this UNet wants the strength of guidance"),
            (None, Some(_)) => candle_core::bail!("this UNet takes no guidance"),
        }
        let embedded = through(&self.time, &time)?;
        match (&self.added, added) {
            (None, None) => Ok(embedded),
            (Some(layers), Some(added)) => {
                let (batch, numbers) = added.sizes.dims2()?;
                let width = config.addition_time_embed_dim.unwrap_or(0);
                let sizes = waves(&added.sizes.flatten_all()?, width)?.reshape((batch, numbers * width))?;
                embedded + through(layers, &Tensor::cat(&[&added.pooled, &sizes], 1)?)?
            }
            (Some(_), None) => candle_core::bail!("this UNet wants a pooled text and sizes"),
            (None, Some(_)) => candle_core::bail!("this UNet takes no pooled text and sizes"),
        }
    }
}

/// Refuses what is not computed here.
fn check(config: &Config) -> Result<()> {
    let levels = config.block_out_channels.len();
    if levels == 0 || config.down_block_types.len() != levels || config.up_block_types.len() != levels {
        candle_core::bail!("a UNet's levels are told apart in number: {config:?}");
    }
    if config.block_out_channels.contains(&0) || !config.block_out_channels[0].is_multiple_of(2) {
        candle_core::bail!("channels of a UNet cannot be {:?}", config.block_out_channels);
    }
    if config.time_cond_proj_dim.is_some_and(|width| width < 4 || !width.is_multiple_of(2)) {
        candle_core::bail!("a UNet's time_cond_proj_dim cannot be {:?}", config.time_cond_proj_dim);
    }
    let added = (config.addition_time_embed_dim, config.projection_class_embeddings_input_dim);
    match (config.addition_embed_type.as_deref(), added) {
        (None, _) => {}
        (Some(TEXT_TIME), (Some(width), Some(_))) if width > 0 && width.is_multiple_of(2) => {}
        (kind, (width, inputs)) => candle_core::bail!(
            "a UNet's addition_embed_type {kind:?} with addition_time_embed_dim {width:?} and projection_class_embeddings_input_dim {inputs:?} is not known"
        ),
    }
    for (field, known) in KNOWN {
        let value = config.others.get(field).map(ToString::to_string);
        if let Some(value) = value.filter(|value| !known.contains(&value.as_str())) {
            candle_core::bail!("a UNet's {field} = {value} is not known");
        }
    }
    Ok(())
}

impl Attention {
    /// (batch, height, width, channels) -> the same
    fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let mut h = self.input.forward(&self.norm.forward(x)?.reshape((batch, height * width, channels))?)?;
        for block in &self.blocks {
            h = block.forward(&h, self.heads, pass)?;
        }
        x + self.output.forward(&h)?.reshape((batch, height, width, channels))?
    }
}

impl Block {
    /// (batch, tokens, channels) -> the same
    fn forward(&self, x: &Tensor, heads: usize, pass: &Pass<'_>) -> Result<Tensor> {
        let h = self.norms[0].forward(x)?;
        let x = (x + self.itself.forward(&h, &h, heads, None)?)?;
        let h = self.norms[1].forward(&x)?;
        let x = (&x + self.cross.forward(&h, pass.context, heads, pass.bias)?)?;
        let h = self.gate.forward(&self.norms[2].forward(&x)?)?;
        let half = h.dim(D::Minus1)? / 2;
        let gate = ops::activate(Activation::Gelu, &h.narrow(D::Minus1, half, half)?.contiguous()?)?;
        &x + self.down.forward(&(h.narrow(D::Minus1, 0, half)? * gate)?)?
    }
}

impl Heads {
    /// x: (batch, tokens, channels), context: (batch, keys, its channels) -> (batch, tokens, channels)
    fn forward(&self, x: &Tensor, context: &Tensor, heads: usize, bias: Option<&Tensor>) -> Result<Tensor> {
        let split = |y: Tensor| {
            let (batch, tokens, channels) = y.dims3()?;
            y.reshape((batch, tokens, heads, channels / heads))
        };
        let (q, k) = (split(self.q.forward(x)?)?, split(self.k.forward(context)?)?);
        let v = split(self.v.forward(context)?)?;
        let attended = attend(&q, &k, &v, bias, Logits::of_width(q.dim(3)?))?;
        self.output.forward(&attended.flatten_from(2)?)
    }
}
