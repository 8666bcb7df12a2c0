//! MetaQuery's shape in small: learnable queries and the language model's token states go through a bidirectional transformer; what
//! stands at the queries is the control signal.
//!
//! There may be two of them, of which the second learnt many more words and is less sure of how what it reads belongs together, and a gate that sends it the
//! prompts whose words the first does not know.
//!
//! Source of the mathematics: `training/network.py`, classes `Connector`, `Gate` and `Routed`, whose names the weights have.

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend, hide_absent},
        linear::Linear,
        ops,
    },
    weights::Weights,
};
use serde::Deserialize;

const EPS: f64 = 1e-6;

/// Sizes, from `connector.config` of a pipeline.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the language model's states.
    pub states: usize,
    /// Learnable queries: tokens of the control signal.
    pub queries: usize,
    /// Channels of the control signal.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers.
    pub layers: usize,
    /// Most tokens of a prompt.
    pub max_tokens: usize,
    /// Channels of the gate, if there is one: the tensors are then those of `plain`, `words` and `gate`.
    #[serde(default)]
    pub gate: Option<usize>,
}

/// The connector.
#[derive(Debug)]
pub struct Connector {
    config: Config,
    plain: Reader,
    /// The gate, and who reads what it lets through.
    words: Option<(Gate, Reader)>,
}

impl Connector {
    /// Takes the connector's tensors. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If a size is 0 or the heads do not divide the width.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { states, queries, width, heads, max_tokens, gate, .. } = config;
        if [states, queries, width, heads, max_tokens, gate.unwrap_or(1)].contains(&0) || width % heads != 0 {
            candle_core::bail!("a connector cannot have these sizes: {config:?}");
        }
        let (plain, words) = match gate {
            None => (Reader::new(&config, weights, ""), None),
            Some(gate) => {
                let gate = Gate {
                    norm: weights.get("gate.n.w", &[states]),
                    hidden: Linear::with_bias(weights, "gate.a", states, gate),
                    output: Linear::with_bias(weights, "gate.b", gate, 1),
                };
                let words = Reader::new(&config, weights, "words.");
                (Reader::new(&config, weights, "plain."), Some((gate, words)))
            }
        };
        Ok(Self { config, plain, words })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// states: (batch, tokens, states), tokens up to `max_tokens`; mask: (batch, tokens), 1 = present -> (batch, queries, width)
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, states: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let Some((gate, words)) = &self.words else { return self.plain.forward(&self.config, states, mask) };
        let through = gate.forward(states, mask)?;
        let mut signals = vec![None; through.len()];
        for (reader, wanted) in [(&self.plain, false), (words, true)] {
            let some: Vec<u32> =
                (0u32..).zip(&through).filter(|(_, through)| **through == wanted).map(|(i, _)| i).collect();
            if some.is_empty() {
                continue;
            }
            let index = Tensor::new(&*some, states.device())?;
            let read =
                reader.forward(&self.config, &states.index_select(&index, 0)?, &mask.index_select(&index, 0)?)?;
            for (row, prompt) in some.iter().enumerate() {
                signals[*prompt as usize] = Some(read.get(row)?);
            }
        }
        Tensor::stack(&signals.into_iter().flatten().collect::<Vec<_>>(), 0)
    }
}

/// Tells prompts apart by the most telling of their tokens.
#[derive(Debug)]
struct Gate {
    norm: Tensor,
    hidden: Linear,
    output: Linear,
}

impl Gate {
    /// states: (batch, tokens, states), mask: (batch, tokens) -> whether each prompt goes to the second reader
    fn forward(&self, states: &Tensor, mask: &Tensor) -> Result<Vec<bool>> {
        let hidden = ops::gelu(&self.hidden.forward(&ops::rms_norm(states, &self.norm, EPS)?)?)?;
        let scores = self.output.forward(&hidden)?.squeeze(2)?.to_vec2::<f32>()?;
        let present = mask.to_vec2::<f32>()?;
        let above = |(scores, present): (Vec<f32>, Vec<f32>)| {
            scores.into_iter().zip(present).any(|(score, present)| present > 0.0 && score > 0.0)
        };
        Ok(scores.into_iter().zip(present).map(above).collect())
    }
}

/// Queries and layers.
#[derive(Debug)]
struct Reader {
    input_norm: Tensor,
    input: Linear,
    queries: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    projections: [Linear; 3],
    head_norms: [Tensor; 2],
    output: Linear,
    mlp_norm: Tensor,
    up: Linear,
    down: Linear,
}

impl Reader {
    /// Takes the tensors whose names begin with `prefix`.
    fn new(config: &Config, weights: &mut Weights, prefix: &str) -> Self {
        let Config { states, queries, width, heads, max_tokens, .. } = *config;
        let name = |part: &str| format!("{prefix}{part}");
        let layers = (0..config.layers)
            .map(|i| {
                let projection = |weights: &mut Weights, part: &str| {
                    Linear::new(weights, &name(&format!("b.{i}.1.{part}")), width, width)
                };
                Layer {
                    attention_norm: weights.get(&name(&format!("b.{i}.0.w")), &[width]),
                    projections: ["q", "k", "v"].map(|part| projection(weights, part)),
                    head_norms: ["qn", "kn"]
                        .map(|part| weights.get(&name(&format!("b.{i}.1.{part}.w")), &[width / heads])),
                    output: projection(weights, "o"),
                    mlp_norm: weights.get(&name(&format!("b.{i}.2.w")), &[width]),
                    up: Linear::new(weights, &name(&format!("b.{i}.3.a")), width, 4 * width),
                    down: Linear::new(weights, &name(&format!("b.{i}.3.b")), 4 * width, width),
                }
            })
            .collect();
        Self {
            input_norm: weights.get(&name("n0.w"), &[states]),
            input: Linear::with_bias(weights, &name("inp"), states, width),
            queries: weights.get(&name("q"), &[queries, width]),
            positions: weights.get(&name("pos"), &[max_tokens, width]),
            layers,
            output_norm: weights.get(&name("on.w"), &[width]),
        }
    }

    fn forward(&self, config: &Config, states: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let Config { queries, width, heads, .. } = *config;
        let (batch, tokens, _) = states.dims3()?;
        let read = self.input.forward(&ops::rms_norm(states, &self.input_norm, EPS)?)?;
        let read = read.broadcast_add(&self.positions.narrow(0, 0, tokens)?)?;
        let asked = self.queries.unsqueeze(0)?.expand((batch, queries, width))?;
        let mut x = Tensor::cat(&[&asked, &read], 1)?; // (batch, queries + tokens, width)
        let all = Tensor::ones((batch, queries), mask.dtype(), mask.device())?;
        let bias = hide_absent(&Tensor::cat(&[&all, mask], 1)?)?;
        let split = |y: Tensor| y.reshape((batch, queries + tokens, heads, width / heads));
        for layer in &self.layers {
            let h = ops::rms_norm(&x, &layer.attention_norm, EPS)?;
            let [q, k, v] = &layer.projections;
            let q = ops::rms_norm(&split(q.forward(&h)?)?, &layer.head_norms[0], EPS)?;
            let k = ops::rms_norm(&split(k.forward(&h)?)?, &layer.head_norms[1], EPS)?;
            let v = split(v.forward(&h)?)?;
            let attended = attend(&q, &k, &v, Some(&bias), Logits::of_width(width / heads))?.flatten_from(2)?;
            x = (x + layer.output.forward(&attended)?)?;
            let h = ops::rms_norm(&x, &layer.mlp_norm, EPS)?;
            x = (x + layer.down.forward(&ops::gelu(&layer.up.forward(&h)?)?)?)?;
        }
        ops::rms_norm(&x.narrow(1, 0, queries)?, &self.output_norm, EPS)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;

    /// Tolerance: 1e-5 of values of about 1. `tests/connector/reference.py` makes the file.
    #[test]
    fn agrees_with_the_training_code() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/connector/queries.safetensors");
        let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
        let (states, mask) = (weights.get("golden.states", &[2, 7, 24]), weights.get("golden.mask", &[2, 7]));
        let batch = weights.get("golden.batch", &[2, 3, 16]);
        let single = weights.get("golden.single", &[1, 3, 16]);
        let config = Config { states: 24, queries: 3, width: 16, heads: 2, layers: 2, max_tokens: 9, gate: None };
        let connector = Connector::new(config, &mut weights).unwrap();
        weights.finish().unwrap();
        let short = states.narrow(0, 1, 1).unwrap().narrow(1, 0, 4).unwrap();
        let all = Tensor::ones((1, 4), states.dtype(), &Device::Cpu).unwrap();
        for (states, mask, golden) in [(states, mask, batch), (short, all, single)] {
            let got = connector.forward(&states, &mask).unwrap();
            let error = (got - golden).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-5, "{error}");
        }
    }

    /// Tolerance and source as above.
    #[test]
    fn a_gate_chooses_the_reader_of_each_prompt() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/connector/routed.safetensors");
        let mut weights = Weights::open_safetensors(&path, &Device::Cpu).unwrap();
        let (states, mask) = (weights.get("golden.states", &[5, 7, 24]), weights.get("golden.mask", &[5, 7]));
        let (through, golden) = (weights.get("golden.through", &[5]), weights.get("golden.batch", &[5, 3, 16]));
        let config = Config { states: 24, queries: 3, width: 16, heads: 2, layers: 2, max_tokens: 9, gate: Some(32) };
        let connector = Connector::new(config, &mut weights).unwrap();
        weights.finish().unwrap();
        let (gate, _) = connector.words.as_ref().unwrap();
        let wanted: Vec<bool> = through.to_vec1::<f32>().unwrap().iter().map(|value| *value > 0.0).collect();
        assert_eq!(gate.forward(&states, &mask).unwrap(), wanted);
        let got = connector.forward(&states, &mask).unwrap();
        let error = (&got - golden).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");
        for prompt in 0..5 {
            let one = |x: &Tensor| x.narrow(0, prompt, 1).unwrap();
            let alone = connector.forward(&one(&states), &one(&mask)).unwrap();
            let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(alone), values(one(&got)), "prompt {prompt}");
        }
    }
}
