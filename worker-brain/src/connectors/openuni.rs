//! OpenUni's connector: layers as a vision transformer's over what stands at the queries, and projections before or after them.
//!
//! Source: wusize/OpenUni d1703fc, `src/models/connector/modeling_connector.py`, `src/models/openuni`; the tensors' names are those of its checkpoints.

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        linear::Linear,
        norm::LayerNorm,
        ops,
    },
    weights::Weights,
};
use serde::Deserialize;

/// `layer_norm_eps` of every published configuration.
const EPS: f64 = 1e-6;

/// Sizes, from `connector.config` of a pipeline.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Learnable queries.
    pub queries: usize,
    /// Channels of the language model's states.
    pub states: usize,
    /// Channels of the control signal.
    pub width: usize,
    /// Channels inside a layer's MLP.
    pub mlp_width: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Where the projection is.
    pub projection: Projection,
    /// Channels of the layers, where there are projections on both sides.
    #[serde(default)]
    pub inner_width: Option<usize>,
}

/// Where layers and projections are, as OpenUni's `proj_type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Layers, then the projection.
    EncProj,
    /// The projection, then layers.
    ProjEnc,
    /// Layers between two projections.
    ProjEncProj,
}

/// The connector.
#[derive(Debug)]
pub struct Connector {
    before: Option<Linear>,
    layers: Vec<Layer>,
    after: Option<Linear>,
    heads: usize,
}

#[derive(Debug)]
struct Layer {
    norms: [LayerNorm; 2],
    projections: [Linear; 3],
    output: Linear,
    up: Linear,
    down: Linear,
}

impl Connector {
    /// Takes the connector's tensors. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If a size is 0 or the heads do not divide the width.
    pub fn new(config: &Config, weights: &mut Weights) -> Result<Self> {
        let Config { states, width, mlp_width, heads, projection, .. } = *config;
        let inner = match (projection, config.inner_width) {
            (Projection::EncProj, None) => states,
            (Projection::ProjEnc, None) => width,
            (Projection::ProjEncProj, Some(inner)) => inner,
            _ => candle_core::bail!("inner_width belongs to proj_enc_proj, and to it alone"),
        };
        if [states, width, mlp_width, heads, inner].contains(&0) || inner % heads != 0 {
            candle_core::bail!("a connector cannot have these sizes: {config:?}");
        }
        let layer = |weights: &mut Weights, index: usize| {
            let part = |part: &str| format!("connector.layers.{index}.{part}");
            let norms = ["layer_norm1", "layer_norm2"].map(|norm| LayerNorm::new(weights, &part(norm), inner, EPS));
            let mut linear = |name: &str, inputs, outputs| Linear::with_bias(weights, &part(name), inputs, outputs);
            let projections = ["q_proj", "k_proj", "v_proj"];
            Layer {
                norms,
                projections: projections.map(|name| linear(&format!("self_attn.{name}"), inner, inner)),
                output: linear("self_attn.out_proj", inner, inner),
                up: linear("mlp.fc1", inner, mlp_width),
                down: linear("mlp.fc2", mlp_width, inner),
            }
        };
        let layers = (0..config.layers).map(|index| layer(weights, index)).collect();
        let (before, after) = match projection {
            Projection::EncProj => (None, Some("projector")),
            Projection::ProjEnc => (Some("projector"), None),
            Projection::ProjEncProj => (Some("projector.0"), Some("projector.1")),
        };
        let before = before.map(|name| Linear::with_bias(weights, name, states, inner));
        let after = after.map(|name| Linear::with_bias(weights, name, inner, width));
        Ok(Self { before, layers, after, heads })
    }

    /// (batch, queries, states) -> (batch, queries, width)
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let through = |linear: &Option<Linear>, x: &Tensor| match linear {
            Some(linear) => linear.forward(x),
            None => Ok(x.clone()),
        };
        let mut x = through(&self.before, states)?;
        let (batch, tokens, width) = x.dims3()?;
        for layer in &self.layers {
            let h = layer.norms[0].forward(&x)?;
            let split = |linear: &Linear| linear.forward(&h)?.reshape((batch, tokens, self.heads, width / self.heads));
            let [q, k, v] = &layer.projections;
            let logits = Logits::of_width(width / self.heads);
            let attended = attend(&split(q)?, &split(k)?, &split(v)?, None, logits)?.flatten_from(2)?;
            x = (x + layer.output.forward(&attended)?)?;
            let h = layer.norms[1].forward(&x)?;
            x = (x + layer.down.forward(&ops::gelu(&layer.up.forward(&h)?)?)?)?;
        }
        through(&self.after, &x)
    }
}
