//! T5's encoder: the text brain of FLUX.1 and Stable Diffusion 3.
//!
//! Source: transformers 5.23, `models/t5/modeling_t5.py`. Checked against it by `tests/text.rs`.

use candle_core::{Device, Result, Tensor};
use serde::Deserialize;

use super::{
    attention::{Logits, attend, hide_absent},
    linear::Linear,
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
    #[serde(rename = "d_model")]
    pub width: usize,
    /// Channels of a head; they need not add up to `width`.
    #[serde(rename = "d_kv")]
    pub head_width: usize,
    /// Channels inside the MLP.
    #[serde(rename = "d_ff")]
    pub mlp_width: usize,
    /// Layers.
    #[serde(rename = "num_layers")]
    pub layers: usize,
    /// Heads.
    #[serde(rename = "num_heads")]
    pub heads: usize,
    /// Distances that have a bias of their own, half of them for each direction.
    #[serde(rename = "relative_attention_num_buckets")]
    pub buckets: usize,
    /// From this distance on there is one bias.
    #[serde(rename = "relative_attention_max_distance")]
    pub max_distance: usize,
    /// Epsilon of the norms.
    #[serde(rename = "layer_norm_epsilon")]
    pub norm_eps: f64,
    /// The MLP: `relu`, `gated-gelu` or `gated-silu`.
    #[serde(rename = "feed_forward_proj")]
    pub mlp: Mlp,
}

/// What transformers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            vocabulary: 32_128,
            width: 512,
            head_width: 64,
            mlp_width: 2048,
            layers: 6,
            heads: 8,
            buckets: 32,
            max_distance: 128,
            norm_eps: 1e-6,
            mlp: Mlp::Relu,
        }
    }
}

/// How the MLP computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Mlp {
    /// `down relu(up x)` (T5 1.0)
    #[serde(rename = "relu")]
    Relu,
    /// `down (gelu(gate x) up x)`, GELU in its tanh form (T5 1.1)
    #[serde(rename = "gated-gelu")]
    GatedGelu,
    /// `down (silu(gate x) up x)`
    #[serde(rename = "gated-silu")]
    GatedSilu,
}

/// The encoder.
#[derive(Debug)]
pub struct T5 {
    config: Config,
    embedding: Tensor,
    /// (buckets, heads)
    distances: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    mlp_norm: Tensor,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl T5 {
    /// Takes the tensors of `T5EncoderModel` by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be: a size of 0, or fewer than four buckets.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { vocabulary, width, head_width, mlp_width, heads, buckets, max_distance, .. } = config;
        // Half of the buckets for each direction, half of those for single distances.
        if [vocabulary, width, head_width, mlp_width, heads].contains(&0) || buckets < 4 || max_distance <= buckets / 4
        {
            candle_core::bail!("a T5 encoder cannot be so: {config:?}");
        }
        let inner = heads * head_width;
        let layers = (0..config.layers)
            .map(|layer| {
                let name = |part: &str| format!("encoder.block.{layer}.layer.{part}");
                let mut linear = |part: &str, inputs, outputs| Linear::new(weights, &name(part), inputs, outputs);
                let (q, k) = (linear("0.SelfAttention.q", width, inner), linear("0.SelfAttention.k", width, inner));
                let (v, output) =
                    (linear("0.SelfAttention.v", width, inner), linear("0.SelfAttention.o", inner, width));
                let (gate, up) = match config.mlp {
                    Mlp::Relu => (None, "1.DenseReluDense.wi"),
                    Mlp::GatedGelu | Mlp::GatedSilu => {
                        (Some(linear("1.DenseReluDense.wi_0", width, mlp_width)), "1.DenseReluDense.wi_1")
                    }
                };
                let up = linear(up, width, mlp_width);
                let down = Linear::beyond_f16(weights, &name("1.DenseReluDense.wo"), mlp_width, width);
                let mut norm = |part: &str| weights.get(&name(part), &[width]);
                let (attention_norm, mlp_norm) = (norm("0.layer_norm.weight"), norm("1.layer_norm.weight"));
                Layer { attention_norm, q, k, v, output, mlp_norm, gate, up, down }
            })
            .collect();
        if weights.contains("encoder.embed_tokens.weight") && weights.contains("shared.weight") {
            // Some files hold the one table under both names.
            weights.matrix("encoder.embed_tokens.weight", &[vocabulary, width]);
        }
        let distances = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        Ok(Self {
            embedding: weights.matrix("shared.weight", &[vocabulary, width]),
            distances: weights.get(distances, &[buckets, heads]),
            layers,
            final_norm: weights.get("encoder.final_layer_norm.weight", &[width]),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Hidden states (batch, tokens, width) after each layer, the embeddings first, and at last the normed ones: layers + 2 of them.
    ///
    /// ids: u32 (batch, tokens); mask: (batch, tokens), 1 = present, or none as FLUX.1 and Stable Diffusion 3 have it (padding is read).
    ///
    /// # Errors
    /// If an id is not of the vocabulary, or a mask has another shape.
    pub fn states(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let (_, tokens) = ids.dims2()?;
        let mut states = vec![ops::embed(&self.embedding, ids)?];
        let mut bias = self.distance_bias(tokens)?;
        if let Some(mask) = mask {
            bias = bias.broadcast_add(&hide_absent(mask)?)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            states.push(layer.forward(&self.config, &states[index], &bias)?);
        }
        states.push(ops::rms_norm(&states[self.layers.len()], &self.final_norm, self.config.norm_eps)?);
        Ok(states)
    }

    /// What is added to the logits for the distance of key and query: (1, heads, tokens, tokens), the same in every layer.
    fn distance_bias(&self, tokens: usize) -> Result<Tensor> {
        let Config { buckets, max_distance, heads, .. } = self.config;
        let of = |query: usize, key: usize| bucket(key as i64 - query as i64, buckets, max_distance);
        let index: Vec<u32> = (0..tokens).flat_map(|query| (0..tokens).map(move |key| of(query, key))).collect();
        let rows = self.distances.index_select(&Tensor::from_vec(index, tokens * tokens, self.device())?, 0)?;
        rows.reshape((tokens, tokens, heads))?.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()
    }
}

/// The bucket of a distance from a query to a key. Near distances have one each, farther ones share them by their logarithm.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let away = distance.unsigned_abs() as usize;
    let side = if distance > 0 { half } else { 0 };
    let bucket = if away < exact {
        away
    } else {
        // In f32, as the model was trained: at the edges of buckets the last bit decides.
        let far = (away as f32 / exact as f32).ln() / ((max_distance as f64 / exact as f64).ln() as f32);
        (exact + (far * (half - exact) as f32) as usize).min(half - 1)
    };
    (side + bucket) as u32
}

impl Layer {
    /// (batch, tokens, width) -> (batch, tokens, width)
    fn forward(&self, config: &Config, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let h = ops::rms_norm(x, &self.attention_norm, config.norm_eps)?;
        let split = |y: Tensor| y.reshape((batch, tokens, config.heads, config.head_width));
        let (q, k, v) = (split(self.q.forward(&h)?)?, split(self.k.forward(&h)?)?, split(self.v.forward(&h)?)?);
        // T5 does not scale: its weights do.
        let attended = attend(&q, &k, &v, Some(bias), Logits { scale: 1.0, soft_cap: None })?.flatten_from(2)?;
        let x = (x + self.output.forward(&attended)?)?;
        let h = ops::rms_norm(&x, &self.mlp_norm, config.norm_eps)?;
        let up = self.up.forward(&h)?;
        let h = match &self.gate {
            None => up.relu()?,
            Some(gate) => {
                let activation = if config.mlp == Mlp::GatedGelu { Activation::GeluTanh } else { Activation::Silu };
                (ops::activate(activation, &gate.forward(&h)?)? * up)?
            }
        };
        x + self.down.forward(&h)?
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_of_distances() {
        let of = |distance| bucket(distance, 32, 128);
        assert_eq!([of(0), of(-1), of(1), of(-7), of(7)], [0, 1, 17, 7, 23], "near ones have one each");
        assert_eq!([of(-8), of(-15), of(-16), of(-127), of(-128), of(-5000)], [8, 9, 10, 15, 15, 15]);
        assert_eq!([of(8), of(5000)], [24, 31]);
    }
}
