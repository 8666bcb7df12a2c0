//! A decoder language model: Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma 2 by configuration.
//!
//! It answers hidden states of any layers at all positions, takes embeddings instead of ids (so that learnable queries can stand in
//! the sequence), and honours a padding mask, so that prompts of different length share a batch. It writes text too ([`writing`]).
//!
//! Source: transformers 5.23, `models/{llama,mistral,qwen2,qwen3,gemma,gemma2}/modeling_*.py`; names of GGUF tensors: gguf 0.19,
//! `constants.py`. Checked against them by `tests/decoder.rs`.

pub mod published;
pub mod writing;

use candle_core::{DType, Device, Result, Tensor};

use self::writing::Cache;
use super::{
    attention::{Logits, attend, causal, hide_absent},
    linear::Linear,
    ops::{self, Activation},
    rotary::{self, Stretch},
};
use crate::weights::Weights;

/// Everything in which the families differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Channels of a hidden state.
    pub width: usize,
    /// Layers to load and run; those after the last one that is read cost nothing if left out.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub key_heads: usize,
    /// Channels of a head.
    pub head_width: usize,
    /// Channels inside the MLP.
    pub mlp_width: usize,
    /// Base of the rotary angles.
    pub rotary_base: f64,
    /// How slow turns are made slower (Llama 3.1).
    pub rotary_stretch: Option<Stretch>,
    /// Tokens of the longest sequence, where a longer one would turn otherwise than computed here (InternVL3).
    pub longest: Option<usize>,
    /// Which channels a rotation pairs.
    pub rotary_pairs: RotaryPairs,
    /// Which pairs turn by time, row and column, where positions have all three (Qwen2.5-VL, Qwen3-VL).
    pub rotary_axes: Option<RotaryAxes>,
    /// Epsilon of RMS norms.
    pub norm_eps: f64,
    /// Norm weights are stored minus 1 (Gemma).
    pub norm_offset: bool,
    /// Activation of the MLP's gate.
    pub activation: Activation,
    /// q, k and v have biases (Qwen2).
    pub projection_bias: bool,
    /// q and k are normalised per head before the rotation (Qwen3).
    pub head_norm: bool,
    /// The outputs of attention and MLP are normalised too (Gemma 2).
    pub output_norm: bool,
    /// Embeddings are multiplied by sqrt(width) (Gemma).
    pub scaled_embedding: bool,
    /// Width that logits are scaled by, if not that of a head (Gemma 2).
    pub logit_width: Option<usize>,
    /// Cap of attention logits (Gemma 2).
    pub soft_cap: Option<f64>,
    /// Which layers look back so many positions at most, their own counted; none if all see the whole.
    pub sliding_window: Option<Window>,
}

/// Layers that look back a number of positions at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Every second one, the first one included (Gemma 2).
    EverySecond(usize),
    /// Every one (Mistral 7B 0.1).
    Every(usize),
}

/// Which channels a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairs {
    /// Channel i and i + half: weights as transformers has them.
    Halves,
    /// Channels 2 i and 2 i + 1: Llama's q and k in GGUF, which stores them permuted for this.
    Neighbours,
}

/// How the pairs of a rotation are dealt out over time, row and column, so many for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryAxes {
    /// One axis after the other (Qwen2.5-VL).
    InTurn([usize; 3]),
    /// In turns of three, for as long as row and column have some left; the rest is time's (Qwen3-VL).
    Woven([usize; 3]),
}

impl RotaryAxes {
    /// The axis of a pair.
    fn of(self, pair: usize) -> usize {
        match self {
            Self::InTurn([time, _, _]) if pair < time => 0,
            Self::InTurn([time, rows, _]) if pair < time + rows => 1,
            Self::InTurn(_) => 2,
            Self::Woven(counts) => match pair % 3 {
                axis if pair < 3 * counts[axis] => axis,
                _ => 0,
            },
        }
    }
}

/// What a sequence holds besides text.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    /// Time, row and column of each token; empty for 0, 1, 2 ... on all three.
    pub places: Vec<[u32; 3]>,
    /// What is added after the first layers, (batch, tokens, width) for one after the other (DeepStack of Qwen3-VL).
    pub added: Vec<Tensor>,
}

/// How the file names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`
    Transformers,
    /// `blk.0.attn_q.weight`
    Gguf,
}

impl Naming {
    /// (name in transformers, name in GGUF) of a layer's part
    fn part(self, layer: usize, [transformers, gguf]: [&str; 2]) -> String {
        match self {
            Self::Transformers => format!("model.layers.{layer}.{transformers}"),
            Self::Gguf => format!("blk.{layer}.{gguf}"),
        }
    }

    fn embedding(self) -> &'static str {
        match self {
            Self::Transformers => "model.embed_tokens.weight",
            Self::Gguf => "token_embd.weight",
        }
    }

    fn final_norm(self) -> &'static str {
        match self {
            Self::Transformers => "model.norm.weight",
            Self::Gguf => "output_norm.weight",
        }
    }

    /// Whether a model that keeps `layers` layers takes a tensor of this name.
    pub fn wants(self, name: &str, layers: usize) -> bool {
        let prefix = self.part(0, ["", ""]).replace("0.", "");
        match name.strip_prefix(&prefix).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok()) {
            Some(layer) => layer < layers && !name.ends_with("rope_freqs.weight"),
            None => name == self.embedding() || name == self.final_norm(),
        }
    }
}

/// The model.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    /// What predicts tokens (vocabulary, width), if it is not the table of embeddings.
    head: Option<Tensor>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    output: Linear,
    attention_output_norm: Option<Tensor>,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    mlp_output_norm: Option<Tensor>,
}

/// What every layer of a pass shares.
struct Pass {
    cos: Tensor,
    sin: Tensor,
    bias: Tensor,
    /// Of every second layer, where those see less.
    windowed_bias: Option<Tensor>,
}

impl Decoder {
    /// Takes the model's tensors. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be: heads that do not divide, an odd head width, a size of 0.
    pub fn new(config: Config, naming: Naming, weights: &mut Weights) -> Result<Self> {
        let Config { vocabulary, width, heads, key_heads, head_width, mlp_width, .. } = config;
        if [vocabulary, width, heads, key_heads, head_width, mlp_width].contains(&0) {
            candle_core::bail!("a size of the language model is 0: {config:?}");
        }
        if heads % key_heads != 0 || head_width % 2 != 0 {
            candle_core::bail!("{heads} heads over {key_heads} key heads of width {head_width} cannot be");
        }
        let norm = |weights: &mut Weights, name: &str, width: usize| {
            let weight = weights.get(name, &[width]);
            // GGUF stores Gemma's norms with the 1 added.
            if config.norm_offset && naming == Naming::Transformers { weight + 1.0 } else { Ok(weight) }
        };
        let embedding = weights.matrix(naming.embedding(), &[vocabulary, width]);
        let layers = (0..config.layers)
            .map(|layer| {
                let name = |part: [&str; 2]| naming.part(layer, part);
                let normed = |weights: &mut Weights, part: [&str; 2], width: usize| {
                    norm(weights, &format!("{}.weight", name(part)), width)
                };
                let projection = |weights: &mut Weights, part: [&str; 2], outputs: usize| match config.projection_bias {
                    true => Linear::with_bias(weights, &name(part), width, outputs),
                    false => Linear::new(weights, &name(part), width, outputs),
                };
                let mlp_norm = match config.output_norm {
                    true => ["pre_feedforward_layernorm", "ffn_norm"],
                    false => ["post_attention_layernorm", "ffn_norm"],
                };
                Ok(Layer {
                    attention_norm: normed(weights, ["input_layernorm", "attn_norm"], width)?,
                    q: projection(weights, ["self_attn.q_proj", "attn_q"], heads * head_width),
                    k: projection(weights, ["self_attn.k_proj", "attn_k"], key_heads * head_width),
                    v: projection(weights, ["self_attn.v_proj", "attn_v"], key_heads * head_width),
                    q_norm: when(config.head_norm, || {
                        normed(weights, ["self_attn.q_norm", "attn_q_norm"], head_width)
                    })?,
                    k_norm: when(config.head_norm, || {
                        normed(weights, ["self_attn.k_norm", "attn_k_norm"], head_width)
                    })?,
                    output: Linear::new(weights, &name(["self_attn.o_proj", "attn_output"]), heads * head_width, width),
                    attention_output_norm: when(config.output_norm, || {
                        normed(weights, ["post_attention_layernorm", "post_attention_norm"], width)
                    })?,
                    mlp_norm: normed(weights, mlp_norm, width)?,
                    gate: Linear::new(weights, &name(["mlp.gate_proj", "ffn_gate"]), width, mlp_width),
                    up: Linear::new(weights, &name(["mlp.up_proj", "ffn_up"]), width, mlp_width),
                    down: Linear::new(weights, &name(["mlp.down_proj", "ffn_down"]), mlp_width, width),
                    mlp_output_norm: when(config.output_norm, || {
                        normed(weights, ["post_feedforward_layernorm", "post_ffw_norm"], width)
                    })?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let final_norm = norm(weights, naming.final_norm(), width)?;
        Ok(Self { config, embedding, layers, final_norm, head: None })
    }

    /// The same with its layers shared out over devices, in order and as evenly as can be: one computes after the other, so together they hold what none holds
    /// alone. Embeddings and the last norm are on the first.
    ///
    /// # Errors
    /// If a device does not take its part.
    pub fn spread(self, devices: &[Device]) -> Result<Self> {
        let [first, _, ..] = devices else {
            return Ok(self);
        };
        let count = self.layers.len();
        let layers = self.layers.iter().enumerate();
        Ok(Self {
            layers: layers
                .map(|(index, layer)| layer.to_device(&devices[index * devices.len() / count]))
                .collect::<Result<Vec<_>>>()?,
            embedding: self.embedding.to_device(first)?,
            final_norm: self.final_norm.to_device(first)?,
            head: self.head.as_ref().map(|head| head.to_device(first)).transpose()?,
            config: self.config,
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

    /// Token ids, u32 (batch, tokens) -> what the first layer reads (batch, tokens, width).
    ///
    /// # Errors
    /// If an id is not of the vocabulary.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = ops::embed(&self.embedding, ids)?;
        if self.config.scaled_embedding { rows * (self.config.width as f64).sqrt() } else { Ok(rows) }
    }

    /// Hidden states (batch, tokens, width) on the first device after each of `layers` (0: the embeddings; n: after n layers), without the final norm.
    ///
    /// embeddings: (batch, tokens, width), as [`Decoder::embed`] gives them, or learnt; mask: (batch, tokens), 1 = present. States
    /// at absent positions mean nothing.
    ///
    /// # Errors
    /// If there is no such layer, or shapes do not fit.
    pub fn states(&self, embeddings: &Tensor, mask: &Tensor, layers: &[usize]) -> Result<Vec<Tensor>> {
        self.states_with(embeddings, mask, layers, &Sight::default())
    }

    /// The same of sequences that hold pictures too, all at the same places. States after a layer have what is added there.
    ///
    /// # Errors
    /// Those of [`Decoder::states`].
    pub fn states_with(
        &self,
        embeddings: &Tensor,
        mask: &Tensor,
        layers: &[usize],
        sight: &Sight,
    ) -> Result<Vec<Tensor>> {
        self.run(embeddings, mask, layers, sight, None)
    }

    /// `mask` is of what was read before too.
    fn run(
        &self,
        embeddings: &Tensor,
        mask: &Tensor,
        layers: &[usize],
        sight: &Sight,
        mut cache: Option<&mut Cache>,
    ) -> Result<Vec<Tensor>> {
        let (batch, tokens, _) = embeddings.dims3()?;
        let past = cache.as_ref().map_or(0, |cache| cache.tokens);
        if ![0, tokens].contains(&sight.places.len()) || sight.added.len() > self.layers.len() {
            candle_core::bail!("{} places, {} additions for {tokens} tokens", sight.places.len(), sight.added.len());
        }
        if mask.dims() != [batch, past + tokens] {
            candle_core::bail!("a mask of {:?} for embeddings of {:?}", mask.dims(), embeddings.dims());
        }
        if let Some(longest) = self.config.longest.filter(|longest| past + tokens > *longest) {
            candle_core::bail!("a sequence of {} tokens; this model reads up to {longest}", past + tokens);
        }
        let last = layers.iter().copied().max().unwrap_or(0);
        if last > self.layers.len() {
            candle_core::bail!("states after layer {last} of a model with {} layers", self.layers.len());
        }
        let begun = cache.as_ref().map_or(0, |cache| cache.next);
        let mut pass = self.pass(mask, tokens, begun, &sight.places)?;
        let mut states = vec![embeddings.clone()];
        for (index, layer) in self.layers[..last].iter().enumerate() {
            let device = layer.attention_norm.device();
            if !device.same_device(pass.cos.device()) {
                pass = pass.to_device(device)?;
            }
            let kept = cache.as_mut().and_then(|cache| cache.layers.get_mut(index));
            let mut next = layer.forward(&self.config, &states[index].to_device(device)?, &pass, index, kept)?;
            if let Some(added) = sight.added.get(index) {
                next = (next + added.to_device(device)?)?;
            }
            if !layers.contains(&index) {
                // Not asked for: let go of its memory.
                states[index] = Tensor::zeros((), DType::F32, self.device())?;
            }
            states.push(next);
        }
        layers.iter().map(|layer| states[*layer].to_device(self.device())).collect()
    }

    /// The final norm over states after the last layer.
    ///
    /// # Errors
    /// If the width does not fit.
    pub fn final_norm(&self, states: &Tensor) -> Result<Tensor> {
        ops::rms_norm(states, &self.final_norm, self.config.norm_eps)
    }

    /// Of the last `tokens` of a mask, which are `begun` places from the beginning if nothing else is said.
    fn pass(&self, mask: &Tensor, tokens: usize, begun: u32, places: &[[u32; 3]]) -> Result<Pass> {
        let (config, device) = (&self.config, self.device());
        let all = mask.dim(1)?;
        let half = config.head_width / 2;
        let mut frequencies = rotary::frequencies(config.rotary_base, config.head_width);
        if let Some(stretch) = config.rotary_stretch {
            frequencies.iter_mut().for_each(|frequency| *frequency = stretch.of(*frequency));
        }
        let place = |token: usize, pair: usize| match (places.get(token), config.rotary_axes) {
            (Some(place), Some(axes)) => place[axes.of(pair)] as f32,
            (Some([time, _, _]), None) => *time as f32,
            (None, _) => (begun + token as u32) as f32,
        };
        let angle = |(token, pair): (usize, usize)| place(token, pair) * frequencies[pair];
        let angles: Vec<f32> = (0..tokens).flat_map(|t| (0..half).map(move |pair| (t, pair))).map(angle).collect();
        let angles = Tensor::from_vec(angles, (tokens, half), device)?;
        let absent = hide_absent(mask)?;
        let bias = |window| causal(tokens, all, window, device)?.broadcast_add(&absent);
        let (everywhere, every_second) = match config.sliding_window {
            None => (None, None),
            Some(Window::Every(window)) => (Some(window), None),
            Some(Window::EverySecond(window)) => (None, Some(window)),
        };
        Ok(Pass {
            cos: angles.cos()?,
            sin: angles.sin()?,
            bias: bias(everywhere)?,
            windowed_bias: when(every_second.is_some(), || bias(every_second))?,
        })
    }
}

impl Pass {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            cos: self.cos.to_device(device)?,
            sin: self.sin.to_device(device)?,
            bias: self.bias.to_device(device)?,
            windowed_bias: self.windowed_bias.as_ref().map(|bias| bias.to_device(device)).transpose()?,
        })
    }
}

impl Layer {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let (linear, norm) = (|part: &Linear| part.to_device(device), |norm: &Tensor| norm.to_device(device));
        let perhaps = |norm: &Option<Tensor>| norm.as_ref().map(|norm| norm.to_device(device)).transpose();
        Ok(Self {
            attention_norm: norm(&self.attention_norm)?,
            q: linear(&self.q)?,
            k: linear(&self.k)?,
            v: linear(&self.v)?,
            q_norm: perhaps(&self.q_norm)?,
            k_norm: perhaps(&self.k_norm)?,
            output: linear(&self.output)?,
            attention_output_norm: perhaps(&self.attention_output_norm)?,
            mlp_norm: norm(&self.mlp_norm)?,
            gate: linear(&self.gate)?,
            up: linear(&self.up)?,
            down: linear(&self.down)?,
            mlp_output_norm: perhaps(&self.mlp_output_norm)?,
        })
    }

    /// (batch, tokens, width) -> (batch, tokens, width)
    /// `kept`: keys and values of what was read before, which those of `x` are added to.
    fn forward(
        &self,
        config: &Config,
        x: &Tensor,
        pass: &Pass,
        index: usize,
        kept: Option<&mut Option<(Tensor, Tensor)>>,
    ) -> Result<Tensor> {
        let normed = |x: &Tensor, norm: &Tensor| ops::rms_norm(x, norm, config.norm_eps);
        let also = |x: Tensor, norm: &Option<Tensor>| match norm {
            Some(norm) => normed(&x, norm),
            None => Ok(x),
        };
        let (batch, tokens, _) = x.dims3()?;
        let h = normed(x, &self.attention_norm)?;
        let split = |y: Tensor, heads: usize| y.reshape((batch, tokens, heads, config.head_width));
        let turn = |y: Tensor| rotate(&y, pass, config.rotary_pairs);
        let q = turn(also(split(self.q.forward(&h)?, config.heads)?, &self.q_norm)?)?;
        let mut k = turn(also(split(self.k.forward(&h)?, config.key_heads)?, &self.k_norm)?)?;
        let mut v = split(self.v.forward(&h)?, config.key_heads)?;
        if let Some(kept) = kept {
            if let Some((before_k, before_v)) = kept {
                (k, v) = (Tensor::cat(&[&*before_k, &k], 1)?, Tensor::cat(&[&*before_v, &v], 1)?);
            }
            *kept = Some((k.clone(), v.clone()));
        }
        let logits = Logits {
            scale: 1.0 / (config.logit_width.unwrap_or(config.head_width) as f64).sqrt(),
            soft_cap: config.soft_cap,
        };
        let bias = pass.windowed_bias.as_ref().filter(|_| index.is_multiple_of(2)).unwrap_or(&pass.bias);
        let attended = attend(&q, &k, &v, Some(bias), logits)?.flatten_from(2)?;
        let x = (x + also(self.output.forward(&attended)?, &self.attention_output_norm)?)?;
        let h = normed(&x, &self.mlp_norm)?;
        let gate = ops::activate(config.activation, &self.gate.forward(&h)?)?;
        let h = self.down.forward(&(gate * self.up.forward(&h)?)?)?;
        x + also(h, &self.mlp_output_norm)?
    }
}

/// Rotary positions. x: (batch, tokens, heads, width); cos, sin: (tokens, width / 2)
fn rotate(x: &Tensor, pass: &Pass, pairs: RotaryPairs) -> Result<Tensor> {
    let (batch, tokens, heads, width) = x.dims4()?;
    match pairs {
        RotaryPairs::Halves => rotary::turn_halves(x, &pass.cos, &pass.sin),
        RotaryPairs::Neighbours => {
            let x = x.reshape((batch, tokens, heads, width / 2, 2))?;
            let (first, second) = (x.narrow(4, 0, 1)?.squeeze(4)?, x.narrow(4, 1, 1)?.squeeze(4)?);
            let [a, b] = rotary::turn(&first, &second, &pass.cos, &pass.sin)?;
            Tensor::stack(&[a, b], 4)?.reshape((batch, tokens, heads, width))
        }
    }
}

fn when<T>(condition: bool, make: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    condition.then(make).transpose()
}
