//! CLIP's text encoder: hidden states of any layers, and one pooled vector for a text.
//!
//! Stable Diffusion 1.5 and 2.1 read the states, SDXL the last but one of two encoders and the pooled vector of the larger, FLUX.1 and Stable Diffusion 3 pooled
//! vectors.
//!
//! Source: transformers 5.23, `models/clip/modeling_clip.py`. Checked against it by `tests/text.rs`.

use candle_core::{Device, Result, Tensor};
use serde::Deserialize;

use super::{
    attention::{Logits, attend, causal, hide_absent},
    linear::Linear,
    norm::LayerNorm,
    ops::{self, Activation},
};
use crate::weights::Weights;

/// What `config.json` says of an encoder. Fields that are not here do not change what it computes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Rows of the embedding table.
    #[serde(rename = "vocab_size")]
    pub vocabulary: usize,
    /// Channels of a hidden state.
    #[serde(rename = "hidden_size")]
    pub width: usize,
    /// Channels inside the MLP.
    #[serde(rename = "intermediate_size")]
    pub mlp_width: usize,
    /// Layers.
    #[serde(rename = "num_hidden_layers")]
    pub layers: usize,
    /// Heads; divides `width`.
    #[serde(rename = "num_attention_heads")]
    pub heads: usize,
    /// Most tokens of a text, its start and end included.
    #[serde(rename = "max_position_embeddings")]
    pub positions: usize,
    /// Activation of the MLP.
    #[serde(rename = "hidden_act")]
    pub activation: Activation,
    /// Epsilon of the norms.
    #[serde(rename = "layer_norm_eps")]
    pub norm_eps: f64,
    /// The token that ends a text, where the pooled vector is read. 2 stands in many configurations by an old mistake: then the end is where the largest id is.
    #[serde(rename = "eos_token_id")]
    pub end: u32,
    /// Channels of the pooled vector, where it is projected.
    #[serde(rename = "projection_dim")]
    pub projection: Option<usize>,
}

/// What transformers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            vocabulary: 49_408,
            width: 512,
            mlp_width: 2048,
            layers: 12,
            heads: 8,
            positions: 77,
            activation: Activation::QuickGelu,
            norm_eps: 1e-5,
            end: 49_407,
            projection: Some(512),
        }
    }
}

/// The end token of configurations whose tokenizer has another.
const MISTAKEN_END: u32 = 2;

/// The encoder.
#[derive(Debug)]
pub struct Clip {
    config: Config,
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    mlp_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Clip {
    /// Takes the tensors of `CLIPTextModel`, and with `projected` those of `CLIPTextModelWithProjection`, by their published names, or as transformers 5 saves
    /// the former: without `text_model.` in front. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be: heads that do not divide the width, a size of 0, no width of the projection.
    pub fn new(config: Config, projected: bool, weights: &mut Weights) -> Result<Self> {
        let Config { vocabulary, width, mlp_width, heads, positions, norm_eps, .. } = config;
        if [vocabulary, width, mlp_width, heads, positions].contains(&0) || !width.is_multiple_of(heads) {
            candle_core::bail!("a CLIP text encoder cannot be so: {config:?}");
        }
        let projection = match (projected, config.projection) {
            (false, _) => None,
            (true, Some(outputs)) => Some(Linear::new(weights, "text_projection", width, outputs)),
            (true, None) => candle_core::bail!("a CLIP text encoder with a projection has no projection_dim"),
        };
        let prefix = if weights.contains("embeddings.token_embedding.weight") { "" } else { "text_model." };
        let layers = (0..config.layers)
            .map(|layer| {
                let name = |part: &str| format!("{prefix}encoder.layers.{layer}.{part}");
                let mut linear = |part: &str, inputs, outputs| Linear::with_bias(weights, &name(part), inputs, outputs);
                let (q, k) = (linear("self_attn.q_proj", width, width), linear("self_attn.k_proj", width, width));
                let (v, output) =
                    (linear("self_attn.v_proj", width, width), linear("self_attn.out_proj", width, width));
                let (up, down) = (linear("mlp.fc1", width, mlp_width), linear("mlp.fc2", mlp_width, width));
                let mut norm = |part: &str| LayerNorm::new(weights, &name(part), width, norm_eps);
                let (attention_norm, mlp_norm) = (norm("layer_norm1"), norm("layer_norm2"));
                Layer { attention_norm, q, k, v, output, mlp_norm, up, down }
            })
            .collect();
        Ok(Self {
            tokens: weights.matrix(&format!("{prefix}embeddings.token_embedding.weight"), &[vocabulary, width]),
            positions: weights.get(&format!("{prefix}embeddings.position_embedding.weight"), &[positions, width]),
            layers,
            final_norm: LayerNorm::new(weights, &format!("{prefix}final_layer_norm"), width, norm_eps),
            projection,
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.tokens.device()
    }

    /// Hidden states (batch, tokens, width) after each layer, the embeddings first, without the final norm: layers + 1 of them.
    ///
    /// ids: u32 (batch, tokens); mask: (batch, tokens), 1 = present, or none as diffusers' Stable Diffusion has it (every padding token is read).
    ///
    /// # Errors
    /// If there are more tokens than positions, or an id is not of the vocabulary.
    pub fn states(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let (_, tokens) = ids.dims2()?;
        if tokens > self.config.positions {
            candle_core::bail!("{tokens} tokens for a text encoder of {} positions", self.config.positions);
        }
        let rows = ops::embed(&self.tokens, ids)?;
        let mut states = vec![rows.broadcast_add(&self.positions.narrow(0, 0, tokens)?)?];
        let mut bias = causal(tokens, tokens, None, self.device())?;
        if let Some(mask) = mask {
            bias = bias.broadcast_add(&hide_absent(mask)?)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            states.push(layer.forward(&self.config, &states[index], &bias)?);
        }
        Ok(states)
    }

    /// The final norm over states after the last layer: what `last_hidden_state` is.
    ///
    /// # Errors
    /// If the width does not fit.
    pub fn final_norm(&self, states: &Tensor) -> Result<Tensor> {
        self.final_norm.forward(states)
    }

    /// One vector for each text (batch, width), or (batch, projection): the normed state at its end, projected where the encoder has a projection.
    ///
    /// ids: as in [`Clip::states`]; normed: what [`Clip::final_norm`] gave.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn pooled(&self, ids: &Tensor, normed: &Tensor) -> Result<Tensor> {
        let rows = ids.to_vec2::<u32>()?;
        let ends = rows.iter().map(|row| end_of(row, self.config.end));
        let picked = ends.enumerate().map(|(row, end)| normed.get(row)?.get(end)).collect::<Result<Vec<_>>>()?;
        let pooled = Tensor::stack(&picked, 0)?;
        match &self.projection {
            Some(projection) => projection.forward(&pooled),
            None => Ok(pooled),
        }
    }
}

/// Where a text ends: at the first end token, or the first of the largest ids; at the start if there is no end token.
fn end_of(row: &[u32], end: u32) -> usize {
    let wanted = if end == MISTAKEN_END { row.iter().copied().max().unwrap_or(0) } else { end };
    row.iter().position(|id| *id == wanted).unwrap_or(0)
}

impl Layer {
    /// (batch, tokens, width) -> (batch, tokens, width)
    fn forward(&self, config: &Config, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let h = self.attention_norm.forward(x)?;
        let split = |y: Tensor| y.reshape((batch, tokens, config.heads, width / config.heads));
        let (q, k, v) = (split(self.q.forward(&h)?)?, split(self.k.forward(&h)?)?, split(self.v.forward(&h)?)?);
        let attended = attend(&q, &k, &v, Some(bias), Logits::of_width(width / config.heads))?.flatten_from(2)?;
        let x = (x + self.output.forward(&attended)?)?;
        let h = ops::activate(config.activation, &self.up.forward(&self.mlp_norm.forward(&x)?)?)?;
        x + self.down.forward(&h)?
    }
}

#[cfg(test)]
mod tests {
    use super::end_of;

    #[test]
    fn where_a_text_ends() {
        assert_eq!(end_of(&[9, 4, 8, 8], 8), 2, "padded with the end token");
        assert_eq!(end_of(&[9, 4, 5], 8), 0, "without any");
        assert_eq!(end_of(&[48, 4, 49, 49], 2), 2, "a configuration's old mistake");
    }
}
