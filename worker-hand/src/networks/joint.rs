//! What transformers are made of whose text and image tokens attend to each other while each stream has weights of its own: FLUX.1, Stable Diffusion 3.
//!
//! Source: diffusers 0.42.1, `JointTransformerBlock`, `FluxTransformerBlock`, `CombinedTimestep(Guidance)TextProjEmbeddings`.

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{linear::Linear, ops},
    weights::Weights,
};

use super::blocks::{modulated_layer_norm, sinusoid};

/// Epsilon of every norm.
pub(super) const EPS: f64 = 1e-6;
/// Waves of an embedded number.
const WAVES: usize = 256;

/// Which stream: their tensors are named differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Image,
    Text,
}

/// Channels of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) width: usize,
    pub(super) head: usize,
    /// Whether queries and keys are normed.
    pub(super) normed: bool,
}

/// Projections of one stream to heads.
#[derive(Debug)]
pub(super) struct Heads {
    q: Linear,
    k: Linear,
    v: Linear,
    norms: Option<[Tensor; 2]>,
    channels: usize,
}

impl Heads {
    pub(super) fn new(weights: &mut Weights, prefix: &str, side: Side, sizes: Sizes) -> Self {
        let names = match side {
            Side::Image => ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
            Side::Text => ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"],
        };
        let Sizes { width, head, normed } = sizes;
        let [q, k, v, q_norm, k_norm] = names.map(|name| format!("{prefix}.{name}"));
        let mut linear = |name: &str| Linear::with_bias(weights, name, width, width);
        let (q, k, v) = (linear(&q), linear(&k), linear(&v));
        let norms = normed.then(|| [q_norm, k_norm].map(|name| weights.get(&format!("{name}.weight"), &[head])));
        Self { q, k, v, norms, channels: head }
    }

    /// (batch, tokens, width) -> q, k, v (batch, tokens, heads, channels), q and k normed.
    pub(super) fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let split = |y: Tensor| {
            let (batch, tokens, width) = y.dims3()?;
            y.reshape((batch, tokens, width / self.channels, self.channels))
        };
        let (q, k, v) = (split(self.q.forward(x)?)?, split(self.k.forward(x)?)?, split(self.v.forward(x)?)?);
        match &self.norms {
            None => Ok([q, k, v]),
            Some([q_norm, k_norm]) => Ok([ops::rms_norm(&q, q_norm, EPS)?, ops::rms_norm(&k, k_norm, EPS)?, v]),
        }
    }
}

/// What follows attention in a stream.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) output: Linear,
    up: Linear,
    down: Linear,
}

impl Rest {
    pub(super) fn new(weights: &mut Weights, block: &str, side: Side, width: usize) -> Self {
        let (output, mlp) = match side {
            Side::Image => ("to_out.0", "ff"),
            Side::Text => ("to_add_out", "ff_context"),
        };
        Self {
            output: Linear::with_bias(weights, &format!("{block}.attn.{output}"), width, width),
            up: Linear::with_bias(weights, &format!("{block}.{mlp}.net.0.proj"), width, 4 * width),
            down: Linear::with_bias(weights, &format!("{block}.{mlp}.net.2"), 4 * width, width),
        }
    }

    /// parts: shift, scale and gate of the MLP.
    pub(super) fn mlp(&self, x: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
        let h = ops::gelu(&self.up.forward(&normed(x, &parts[1], &parts[0])?)?)?;
        ops::gated_sum(x, &self.down.forward(&h)?, &parts[2])
    }
}

/// One stream's half of a block of two.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) modulation: Linear,
    pub(super) heads: Heads,
    rest: Rest,
}

impl Stream {
    pub(super) fn new(weights: &mut Weights, block: &str, side: Side, sizes: Sizes) -> Self {
        let norm = if side == Side::Image { "norm1" } else { "norm1_context" };
        Self {
            modulation: Linear::with_bias(weights, &format!("{block}.{norm}.linear"), sizes.width, 6 * sizes.width),
            heads: Heads::new(weights, &format!("{block}.attn"), side, sizes),
            rest: Rest::new(weights, block, side, sizes.width),
        }
    }

    /// The rest of a block, after attention. parts: shift, scale and gate of the attention, then of the MLP.
    pub(super) fn finish(&self, x: &Tensor, attended: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
        let x = ops::gated_sum(x, &self.rest.output.forward(attended)?, &parts[2])?;
        self.rest.mlp(&x, &parts[3..6])
    }
}

/// Layer norm without weights, then `y (1 + scale) + shift`.
pub(super) fn normed(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    modulated_layer_norm(x, scale, shift, EPS)
}

/// Equal parts of modulation, each (batch, width).
pub(super) fn modulation(linear: &Linear, condition: &Tensor, parts: usize) -> Result<Vec<Tensor>> {
    linear.forward(condition)?.chunk(parts, 1)?.iter().map(Tensor::contiguous).collect()
}

/// Embeds the numbers and the pooled text that every block is told.
#[derive(Debug)]
pub(super) struct Embedder {
    time: [Linear; 2],
    guidance: Option<[Linear; 2]>,
    pooled: [Linear; 2],
}

impl Embedder {
    /// `guided`: whether the strength of guidance is told too.
    pub(super) fn new(weights: &mut Weights, pooled: usize, width: usize, guided: bool) -> Self {
        let mut embedder = |name: &str, inputs: usize| {
            ["linear_1", "linear_2"].map(|layer| {
                let inputs = if layer == "linear_1" { inputs } else { width };
                Linear::with_bias(weights, &format!("time_text_embed.{name}.{layer}"), inputs, width)
            })
        };
        Self {
            time: embedder("timestep_embedder", WAVES),
            guidance: guided.then(|| embedder("guidance_embedder", WAVES)),
            pooled: embedder("text_embedder", pooled),
        }
    }

    /// time (batch; 0 to 1000), pooled (batch, pooled) -> (batch, width), as modulation reads it.
    ///
    /// # Errors
    /// If shapes do not fit, or guidance is given where it is not wanted, or not where it is.
    pub(super) fn forward(&self, time: &Tensor, pooled: &Tensor, guidance: Option<&Tensor>) -> Result<Tensor> {
        let through = |[first, second]: &[Linear; 2], x: &Tensor| second.forward(&ops::silu(&first.forward(x)?)?);
        let waves = |values: &Tensor| sinusoid(values, WAVES, true, 0.0);
        let condition = (through(&self.time, &waves(time)?)? + through(&self.pooled, pooled)?)?;
        let condition = match (&self.guidance, guidance) {
            (None, None) => condition,
            // Told in thousandths, as the time is.
            (Some(layers), Some(guidance)) => (condition + through(layers, &waves(&(guidance * 1000.0)?)?)?)?,
            (Some(_), None) => candle_core::bail!("this denoiser wants the strength of guidance"),
            (None, Some(_)) => candle_core::bail!("this denoiser takes no guidance"),
        };
        ops::silu(&condition)
    }
}
