//! MetaQuery's connector: a bidirectional encoder with rotary positions over what stands at the queries, a projection, and a norm.
//!
//! Source: facebookresearch/metaquery 206f6de, `models/{model,transformer_encoder}.py`; the tensors' names are those of its checkpoints.

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        linear::Linear,
        ops, rotary,
    },
    weights::Weights,
};
use serde::Deserialize;

/// Of the encoder's norms: `rms_norm_eps` that Qwen2's configuration has if none is said.
const EPS: f64 = 1e-6;
/// Of the last norm.
const LAST_EPS: f64 = 1e-5;
/// Base of the rotary frequencies: `rope_theta` that Qwen2's configuration has if none is said.
const BASE: f64 = 10_000.0;
/// Queries and keys are divided by their length, which is kept from 0 by this much.
const LENGTH_EPS: f64 = 1e-24;

/// Sizes, from `connector.config` of a pipeline.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Learnable queries.
    pub queries: usize,
    /// Channels of the language model's states, and of the encoder.
    pub states: usize,
    /// Channels of the control signal.
    pub width: usize,
    /// Layers of the encoder: 24 as published.
    pub layers: usize,
    /// Its attention heads: as many as 64 goes into `states`, as published.
    pub heads: usize,
}

/// The connector.
#[derive(Debug)]
pub struct Connector {
    layers: Vec<Layer>,
    projections: [Linear; 2],
    norm: Tensor,
    heads: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    projections: [Linear; 3],
    /// (heads, channels)
    head_norms: [Tensor; 2],
    output: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Connector {
    /// Takes the connector's tensors. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If a size is 0, the heads do not divide the width, or their width is odd.
    pub fn new(config: &Config, weights: &mut Weights) -> Result<Self> {
        let Config { states, width, layers, heads, .. } = *config;
        if [states, width, heads].contains(&0) || states % heads != 0 || !(states / heads).is_multiple_of(2) {
            candle_core::bail!("a connector cannot have these sizes: {config:?}");
        }
        let head = states / heads;
        let layer = |weights: &mut Weights, index: usize| {
            let part = |part: &str| format!("connector.0.layers.{index}.{part}");
            let projections = ["q_proj", "k_proj", "v_proj"].map(|name| part(&format!("self_attn.{name}")));
            let gammas = ["q_norm", "k_norm"].map(|name| part(&format!("self_attn.{name}.gamma")));
            let [q, k] = gammas.map(|name| {
                weights.get_as(&name, &[heads, 1, head], &[heads, head], |gamma| gamma.reshape((heads, head)))
            });
            Ok(Layer {
                attention_norm: weights.get(&part("input_layernorm.weight"), &[states]),
                projections: projections.map(|name| Linear::with_bias(weights, &name, states, states)),
                head_norms: [q?, k?],
                output: Linear::new(weights, &part("self_attn.o_proj"), states, states),
                mlp_norm: weights.get(&part("post_attention_layernorm.weight"), &[states]),
                gate: Linear::new(weights, &part("mlp.gate_proj"), states, 4 * states),
                up: Linear::new(weights, &part("mlp.up_proj"), states, 4 * states),
                down: Linear::new(weights, &part("mlp.down_proj"), 4 * states, states),
            })
        };
        Ok(Self {
            layers: (0..layers).map(|index| layer(weights, index)).collect::<Result<_>>()?,
            projections: [
                Linear::with_bias(weights, "connector.1", states, width),
                Linear::with_bias(weights, "connector.3", width, width),
            ],
            norm: weights.get("connector.4.weight", &[width]),
            heads,
        })
    }

    /// (batch, queries, states) -> (batch, queries, width)
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = states.dims3()?;
        let head = width / self.heads;
        let [cos, sin] = turns(tokens, head, states)?;
        let ones = Tensor::ones(head, states.dtype(), states.device())?;
        let mut x = states.clone();
        for layer in &self.layers {
            let h = ops::rms_norm(&x, &layer.attention_norm, EPS)?;
            let split = |linear: &Linear| linear.forward(&h)?.reshape((batch, tokens, self.heads, head));
            // Turned first, and then brought to one length: as published.
            let normed = |x: Tensor, gamma: &Tensor| {
                ops::rms_norm(&rotary::turn_halves(&x, &cos, &sin)?, &ones, LENGTH_EPS)?.broadcast_mul(gamma)
            };
            let [q, k, v] = &layer.projections;
            let (q, k) = (normed(split(q)?, &layer.head_norms[0])?, normed(split(k)?, &layer.head_norms[1])?);
            let attended = attend(&q, &k, &split(v)?, None, Logits::of_width(head))?.flatten_from(2)?;
            x = (x + layer.output.forward(&attended)?)?;
            let h = ops::rms_norm(&x, &layer.mlp_norm, EPS)?;
            let gate = ops::silu(&layer.gate.forward(&h)?)?;
            x = (x + layer.down.forward(&(gate * layer.up.forward(&h)?)?)?)?;
        }
        let [first, second] = &self.projections;
        ops::rms_norm(&second.forward(&ops::gelu(&first.forward(&x)?)?)?, &self.norm, LAST_EPS)
    }
}

/// Cosines and sines of the places, each (tokens, half a head).
fn turns(tokens: usize, head: usize, like: &Tensor) -> Result<[Tensor; 2]> {
    let frequencies = rotary::frequencies(BASE, head);
    let angles: Vec<f32> = (0..tokens).flat_map(|t| frequencies.iter().map(move |f| t as f32 * f)).collect();
    let angles = Tensor::from_vec(angles, (tokens, head / 2), like.device())?;
    Ok([angles.cos()?, angles.sin()?])
}
