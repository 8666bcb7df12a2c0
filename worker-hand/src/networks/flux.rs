//! FLUX.1's denoiser: `FluxTransformer2DModel`. Text and image tokens go through blocks of two streams that attend to each other, then through blocks of one.
//!
//! Source: diffusers 0.42.1, `models/transformers/transformer_flux.py`. Checked against it by `tests/flux.rs`.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        linear::Linear,
        ops,
    },
    weights::Weights,
};
use serde::Deserialize;

use super::blocks::sinusoid;

/// What `config.json` says. Other fields are refused by [`Flux::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Config {
    /// Channels of an image token: 2 x 2 cells of the latent.
    pub in_channels: usize,
    /// Channels of what comes out for each, if they are others.
    #[serde(default)]
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
    #[serde(default)]
    pub guidance_embeds: bool,
    /// Channels of a head that turn with each axis of a token's place; even, and in all those of a head.
    #[serde(default = "axes")]
    pub axes_dims_rope: Vec<usize>,
    /// Cells of a patch; packing is done outside.
    #[serde(default = "one")]
    pub patch_size: usize,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

fn axes() -> Vec<usize> {
    vec![16, 56, 56]
}

fn one() -> usize {
    1
}

/// Epsilon of every norm.
const EPS: f64 = 1e-6;
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// Waves of an embedded number.
const WAVES: usize = 256;

/// The network.
#[derive(Debug)]
pub struct Flux {
    config: Config,
    time: [Linear; 2],
    guidance: Option<[Linear; 2]>,
    pooled: [Linear; 2],
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

/// Projections of one stream to heads.
#[derive(Debug)]
struct Heads {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: [Tensor; 2],
}

/// One stream's half of a block of two.
#[derive(Debug)]
struct Stream {
    modulation: Linear,
    heads: Heads,
    output: Linear,
    up: Linear,
    down: Linear,
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

/// Cosines and sines of each token's place, (tokens, channels of a head / 2).
#[derive(Debug)]
struct Turns {
    cos: Tensor,
    sin: Tensor,
}

impl Heads {
    fn new(weights: &mut Weights, prefix: &str, names: [&str; 5], width: usize, head: usize) -> Self {
        let [q, k, v, q_norm, k_norm] = names.map(|name| format!("{prefix}.{name}"));
        let mut linear = |name: &str| Linear::with_bias(weights, name, width, width);
        let (q, k, v) = (linear(&q), linear(&k), linear(&v));
        let norms = [q_norm, k_norm].map(|name| weights.get(&format!("{name}.weight"), &[head]));
        Self { q, k, v, norms }
    }

    /// (batch, tokens, width) -> q, k, v (batch, tokens, heads, channels), q and k normed.
    fn forward(&self, x: &Tensor, heads: usize) -> Result<[Tensor; 3]> {
        let split = |y: Tensor| {
            let (batch, tokens, width) = y.dims3()?;
            y.reshape((batch, tokens, heads, width / heads))
        };
        let [q_norm, k_norm] = &self.norms;
        let q = ops::rms_norm(&split(self.q.forward(x)?)?, q_norm, EPS)?;
        let k = ops::rms_norm(&split(self.k.forward(x)?)?, k_norm, EPS)?;
        Ok([q, k, split(self.v.forward(x)?)?])
    }
}

impl Stream {
    fn new(weights: &mut Weights, block: &str, text: bool, width: usize, head: usize) -> Self {
        let attention = format!("{block}.attn");
        let (norm, names, output, mlp) = match text {
            false => ("norm1", ["to_q", "to_k", "to_v", "norm_q", "norm_k"], "to_out.0", "ff"),
            true => (
                "norm1_context",
                ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"],
                "to_add_out",
                "ff_context",
            ),
        };
        Self {
            modulation: Linear::with_bias(weights, &format!("{block}.{norm}.linear"), width, 6 * width),
            heads: Heads::new(weights, &attention, names, width, head),
            output: Linear::with_bias(weights, &format!("{attention}.{output}"), width, width),
            up: Linear::with_bias(weights, &format!("{block}.{mlp}.net.0.proj"), width, 4 * width),
            down: Linear::with_bias(weights, &format!("{block}.{mlp}.net.2"), 4 * width, width),
        }
    }

    /// The rest of a block, after attention. parts: shift, scale and gate of the attention, then of the MLP.
    fn finish(&self, x: &Tensor, attended: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
        let x = ops::gated_sum(x, &self.output.forward(attended)?, &parts[2])?;
        let h = ops::gelu(&self.up.forward(&normed(&x, &parts[4], &parts[3])?)?)?;
        ops::gated_sum(&x, &self.down.forward(&h)?, &parts[5])
    }
}

/// Layer norm without weights, then `y (1 + scale) + shift`.
fn normed(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    ops::modulated_norm(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, scale, shift, EPS)
}

/// Equal parts of modulation, each (batch, width).
fn modulation(linear: &Linear, condition: &Tensor, parts: usize) -> Result<Vec<Tensor>> {
    linear.forward(condition)?.chunk(parts, 1)?.iter().map(Tensor::contiguous).collect()
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
        let mut embedder = |name: &str, inputs: usize| {
            ["linear_1", "linear_2"].map(|layer| {
                let inputs = if layer == "linear_1" { inputs } else { width };
                Linear::with_bias(weights, &format!("time_text_embed.{name}.{layer}"), inputs, width)
            })
        };
        let time = embedder("timestep_embedder", WAVES);
        let guidance = config.guidance_embeds.then(|| embedder("guidance_embedder", WAVES));
        let pooled = embedder("text_embedder", config.pooled_projection_dim);
        let double = (0..config.num_layers)
            .map(|layer| {
                let block = format!("transformer_blocks.{layer}");
                let mut stream = |text| Stream::new(weights, &block, text, width, head);
                Double { image: stream(false), text: stream(true) }
            })
            .collect();
        let single = (0..config.num_single_layers)
            .map(|layer| {
                let block = format!("single_transformer_blocks.{layer}");
                let names = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
                Single {
                    modulation: Linear::with_bias(weights, &format!("{block}.norm.linear"), width, 3 * width),
                    heads: Heads::new(weights, &format!("{block}.attn"), names, width, head),
                    up: Linear::with_bias(weights, &format!("{block}.proj_mlp"), width, 4 * width),
                    output: Linear::with_bias(weights, &format!("{block}.proj_out"), 5 * width, width),
                }
            })
            .collect();
        Ok(Self {
            time,
            guidance,
            pooled,
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
        let heads = self.config.num_attention_heads;
        let condition = ops::silu(&self.condition(time, given.pooled, guidance)?)?;
        let mut image = self.input.forward(x)?;
        let mut text = self.context.forward(given.states)?;
        let tokens = text.dim(1)?;
        let turns = self.turns(tokens, places, x)?;
        let attention = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (q, k) = (turned(q, &turns)?, turned(k, &turns)?);
            attend(&q, &k, v, given.bias, Logits::of_width(self.config.attention_head_dim))?.flatten_from(2)
        };
        for block in &self.double {
            let of_image = modulation(&block.image.modulation, &condition, 6)?;
            let of_text = modulation(&block.text.modulation, &condition, 6)?;
            let from_image = block.image.heads.forward(&normed(&image, &of_image[1], &of_image[0])?, heads)?;
            let from_text = block.text.heads.forward(&normed(&text, &of_text[1], &of_text[0])?, heads)?;
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
            let [q, k, v] = block.heads.forward(&h, heads)?;
            let attended = attention(&q, &k, &v)?;
            let wide = Tensor::cat(&[&attended, &ops::gelu(&block.up.forward(&h)?)?], 2)?;
            all = ops::gated_sum(&all, &block.output.forward(&wide)?, &parts[2])?;
        }
        let image = all.narrow(1, tokens, all.dim(1)? - tokens)?.contiguous()?;
        let parts = modulation(&self.output_modulation, &condition, 2)?;
        self.output.forward(&normed(&image, &parts[0], &parts[1])?)
    }

    /// (batch, width)
    fn condition(&self, time: &Tensor, pooled: &Tensor, guidance: Option<&Tensor>) -> Result<Tensor> {
        let through = |[first, second]: &[Linear; 2], x: &Tensor| second.forward(&ops::silu(&first.forward(x)?)?);
        let waves = |values: &Tensor| sinusoid(values, WAVES, true, 0.0);
        let condition = (through(&self.time, &waves(time)?)? + through(&self.pooled, pooled)?)?;
        match (&self.guidance, guidance) {
            (None, None) => Ok(condition),
            // Told in thousandths, as the time is.
            (Some(layers), Some(guidance)) => condition + through(layers, &waves(&(guidance * 1000.0)?)?)?,
            (Some(_), None) => candle_core::bail!("this FLUX denoiser wants the strength of guidance"),
            (None, Some(_)) => candle_core::bail!("this FLUX denoiser takes no guidance"),
        }
    }

    /// Text tokens stand at the origin, image tokens at (0, row, column).
    fn turns(&self, tokens: usize, (rows, columns): (usize, usize), like: &Tensor) -> Result<Turns> {
        let places = std::iter::repeat_n([0, 0, 0], tokens)
            .chain((0..rows).flat_map(|row| (0..columns).map(move |column| [0, row, column])));
        let axes = &self.config.axes_dims_rope;
        let mut angles = Vec::new();
        for place in places {
            for (axis, channels) in axes.iter().enumerate() {
                let frequency = |i: usize| THETA.powf(-2.0 * i as f64 / *channels as f64);
                angles.extend((0..channels / 2).map(|i| place[axis] as f64 * frequency(i)));
            }
        }
        let half = self.config.attention_head_dim / 2;
        let count = angles.len() / half.max(1);
        let tensor = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle) as f32).collect();
            Tensor::from_vec(values, (1, count, 1, half), like.device())
        };
        Ok(Turns { cos: tensor(f64::cos)?, sin: tensor(f64::sin)? })
    }
}

/// Turns each pair of neighbouring channels of x (batch, tokens, heads, channels).
fn turned(x: &Tensor, Turns { cos, sin }: &Turns) -> Result<Tensor> {
    let (batch, tokens, heads, channels) = x.dims4()?;
    let pairs = x.reshape((batch, tokens, heads, channels / 2, 2))?;
    let (a, b) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::stack(&[first, second], 4)?.reshape((batch, tokens, heads, channels))
}
