//! Z-Image's denoiser: `ZImageTransformer2DModel`. The picture's tokens and the text's are refined each alone, and then go through one stream together. Both are
//! filled up to a multiple of 32 with tokens that were learnt for it and are attended to like any other.
//!
//! Source: diffusers 0.42.1, `models/transformers/transformer_z_image.py`. Checked against it by the checkpoints of `tests/tests/checkpoints.rs`.

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

use super::{blocks::sinusoid, rotary::Turns};

/// Numbers of tokens are filled up to a multiple of this.
pub const MULTIPLE: usize = 32;

/// What `config.json` says. Other fields are refused by [`ZImage::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Cells of a patch along each side; only one size is known here.
    pub all_patch_size: Vec<usize>,
    /// Frames of a patch: 1.
    pub all_f_patch_size: Vec<usize>,
    /// Channels of a latent.
    pub in_channels: usize,
    /// Channels of a token.
    pub dim: usize,
    /// Layers of the stream of both.
    pub n_layers: usize,
    /// Layers that refine the picture's tokens, and as many for the text's.
    pub n_refiner_layers: usize,
    /// Heads.
    pub n_heads: usize,
    /// Heads of keys and values: all.
    pub n_kv_heads: usize,
    /// Epsilon of the norms around attention and MLP.
    pub norm_eps: f64,
    /// Whether queries and keys are normed.
    pub qk_norm: bool,
    /// Channels of a state of the text.
    pub cap_feat_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// What the time, 0 to 1, is multiplied with.
    pub t_scale: f64,
    /// Channels of a head that turn with each axis of a token's place.
    pub axes_dims: Vec<usize>,
    /// Places along each axis.
    pub axes_lens: Vec<usize>,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        Self {
            all_patch_size: vec![2],
            all_f_patch_size: vec![1],
            in_channels: 16,
            dim: 3840,
            n_layers: 30,
            n_refiner_layers: 2,
            n_heads: 30,
            n_kv_heads: 30,
            norm_eps: 1e-5,
            qk_norm: true,
            cap_feat_dim: 2560,
            rope_theta: 256.0,
            t_scale: 1000.0,
            axes_dims: vec![32, 48, 48],
            axes_lens: vec![1024, 512, 512],
            others: BTreeMap::new(),
        }
    }
}

/// Epsilon of the norms of queries and keys.
const HEAD_EPS: f64 = 1e-5;
/// Epsilon of the last norm.
const LAST_EPS: f64 = 1e-6;
/// Most channels of the embedded time, and its waves.
const TIME_WIDTH: usize = 256;
/// Channels inside the time's embedder.
const TIME_INNER: usize = 1024;

/// The network.
#[derive(Debug)]
pub struct ZImage {
    config: Config,
    patches: Linear,
    time: [Linear; 2],
    caption_norm: Tensor,
    caption: Linear,
    /// (1, 1, dim)
    picture_filler: Tensor,
    caption_filler: Tensor,
    picture_refiner: Vec<Block>,
    caption_refiner: Vec<Block>,
    layers: Vec<Block>,
    output_scale: Linear,
    output: Linear,
}

/// What a picture is conditioned on.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// (batch, tokens, caption); tokens must be a multiple of [`MULTIPLE`].
    pub states: &'a Tensor,
    /// (batch, tokens): 1 for states that count, a beginning of each row.
    pub present: &'a Tensor,
    /// (batch or 1, 1, 1, patches + tokens), added to the logits of the picture's patches and the text's tokens.
    pub bias: Option<&'a Tensor>,
}

/// What every block of a stack reads.
struct Pass<'a> {
    turns: &'a Turns,
    /// (batch, width)
    time: &'a Tensor,
    /// Of the tokens that attend to each other.
    bias: Option<&'a Tensor>,
}

#[derive(Debug)]
struct Block {
    /// None in blocks that are not told the time.
    modulation: Option<Linear>,
    q: Linear,
    k: Linear,
    v: Linear,
    head_norms: Option<[Tensor; 2]>,
    output: Linear,
    /// Before and after attention, before and after the MLP.
    norms: [Tensor; 4],
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(weights: &mut Weights, name: &str, config: &Config, modulated: bool) -> Self {
        let Config { dim, n_heads, qk_norm, .. } = *config;
        let part = |part: &str| format!("{name}.{part}");
        let inner = dim * 8 / 3;
        let mut plain = |of: &str, inputs, outputs| Linear::new(weights, &part(of), inputs, outputs);
        let (q, k) = (plain("attention.to_q", dim, dim), plain("attention.to_k", dim, dim));
        let (v, output) = (plain("attention.to_v", dim, dim), plain("attention.to_out.0", dim, dim));
        let (gate, down) = (plain("feed_forward.w1", dim, inner), plain("feed_forward.w2", inner, dim));
        let up = plain("feed_forward.w3", dim, inner);
        let mut norm = |of: &str, width: usize| weights.get(&part(&format!("{of}.weight")), &[width]);
        let norms = ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"].map(|of| norm(of, dim));
        let head = dim / n_heads;
        let head_norms = qk_norm.then(|| ["attention.norm_q", "attention.norm_k"].map(|of| norm(of, head)));
        let width = dim.min(TIME_WIDTH);
        let modulation = modulated.then(|| Linear::with_bias(weights, &part("adaLN_modulation.0"), width, 4 * dim));
        Self { modulation, q, k, v, head_norms, output, norms, gate, up, down }
    }

    fn attention(&self, x: &Tensor, pass: &Pass<'_>, heads: usize) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let split = |y: Tensor| y.reshape((batch, tokens, heads, width / heads));
        let (q, k) = (split(self.q.forward(x)?)?, split(self.k.forward(x)?)?);
        let (q, k) = match &self.head_norms {
            None => (q, k),
            Some([of_q, of_k]) => (ops::rms_norm(&q, of_q, HEAD_EPS)?, ops::rms_norm(&k, of_k, HEAD_EPS)?),
        };
        let v = split(self.v.forward(x)?)?;
        let (q, k) = (pass.turns.apply(&q)?, pass.turns.apply(&k)?);
        let attended = attend(&q, &k, &v, pass.bias, Logits::of_width(width / heads))?;
        self.output.forward(&attended.flatten_from(2)?)
    }

    /// (batch, tokens, dim) -> the same
    fn forward(&self, x: &Tensor, pass: &Pass<'_>, config: &Config) -> Result<Tensor> {
        let norm = |x: &Tensor, which: usize| ops::rms_norm(x, &self.norms[which], config.norm_eps);
        let mlp = |x: &Tensor| {
            let gated = (ops::silu(&self.gate.forward(x)?)? * self.up.forward(x)?)?;
            self.down.forward(&gated)
        };
        let Some(modulation) = &self.modulation else {
            let x = (x + norm(&self.attention(&norm(x, 0)?, pass, config.n_heads)?, 1)?)?;
            return &x + norm(&mlp(&norm(&x, 2)?)?, 3)?;
        };
        let parts = modulation.forward(pass.time)?.unsqueeze(1)?.chunk(4, 2)?;
        let (scales, gates) = ([(&parts[0] + 1.0)?, (&parts[2] + 1.0)?], [parts[1].tanh()?, parts[3].tanh()?]);
        let h = self.attention(&norm(x, 0)?.broadcast_mul(&scales[0])?, pass, config.n_heads)?;
        let x = (x + norm(&h, 1)?.broadcast_mul(&gates[0])?)?;
        let h = mlp(&norm(&x, 2)?.broadcast_mul(&scales[1])?)?;
        &x + norm(&h, 3)?.broadcast_mul(&gates[1])?
    }
}

impl ZImage {
    /// Takes the tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be, or says what is not computed here.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { in_channels, dim, n_heads, n_kv_heads, cap_feat_dim, .. } = config;
        let axes = (config.axes_dims.len(), config.axes_lens.len(), config.axes_dims.iter().sum::<usize>());
        let odd = config.axes_dims.iter().any(|channels| !channels.is_multiple_of(2));
        if [in_channels, dim, n_heads, cap_feat_dim].contains(&0)
            || n_kv_heads != n_heads
            || axes != (3, 3, dim / n_heads.max(1))
            || odd
        {
            candle_core::bail!("a Z-Image denoiser cannot be so: {config:?}");
        }
        let (&[side], &[1]) = (&*config.all_patch_size, &*config.all_f_patch_size) else {
            candle_core::bail!("patches of {:?} x {:?} frames", config.all_patch_size, config.all_f_patch_size);
        };
        let known = |(name, value): &(&String, &serde_json::Value)| {
            name.starts_with('_') || (*name == "siglip_feat_dim" && value.is_null())
        };
        if let Some((field, _)) = config.others.iter().find(|field| !known(field)) {
            candle_core::bail!("a Z-Image denoiser's {field} is not known");
        }
        let width = dim.min(TIME_WIDTH);
        let cells = side * side * in_channels;
        let kind = format!("{side}-1");
        let mut blocks = |stack: &str, count: usize, modulated: bool| -> Vec<Block> {
            (0..count).map(|layer| Block::new(weights, &format!("{stack}.{layer}"), &config, modulated)).collect()
        };
        let picture_refiner = blocks("noise_refiner", config.n_refiner_layers, true);
        let caption_refiner = blocks("context_refiner", config.n_refiner_layers, false);
        let layers = blocks("layers", config.n_layers, true);
        let last = format!("all_final_layer.{kind}");
        Ok(Self {
            patches: Linear::with_bias(weights, &format!("all_x_embedder.{kind}"), cells, dim),
            time: [
                Linear::with_bias(weights, "t_embedder.mlp.0", TIME_WIDTH, TIME_INNER),
                Linear::with_bias(weights, "t_embedder.mlp.2", TIME_INNER, width),
            ],
            caption_norm: weights.get("cap_embedder.0.weight", &[cap_feat_dim]),
            caption: Linear::with_bias(weights, "cap_embedder.1", cap_feat_dim, dim),
            picture_filler: weights.get("x_pad_token", &[1, dim]).unsqueeze(0)?,
            caption_filler: weights.get("cap_pad_token", &[1, dim]).unsqueeze(0)?,
            picture_refiner,
            caption_refiner,
            layers,
            output_scale: Linear::with_bias(weights, &format!("{last}.adaLN_modulation.1"), width, dim),
            output: Linear::with_bias(weights, &format!("{last}.linear"), dim, cells),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Cells of a patch along each side.
    pub fn patch(&self) -> usize {
        self.config.all_patch_size.first().copied().unwrap_or(1)
    }

    /// Latents x (batch, channels, height, width), each batch row at its own time (batch; 0 noise to 1 picture), with a text -> what leads from the noise to the
    /// picture (batch, channels, height, width).
    ///
    /// # Errors
    /// If shapes do not fit, or there are more tokens or patches along an axis than places.
    pub fn forward(&self, x: &Tensor, time: &Tensor, given: Text<'_>) -> Result<Tensor> {
        let Text { states, present, bias } = given;
        let (side, dim) = (self.patch(), self.config.dim);
        let (batch, channels, height, width) = x.dims4()?;
        let (rows, columns) = (height / side, width / side);
        let tokens = states.dim(1)?;
        let places = &self.config.axes_lens;
        let most = [tokens + 1, rows.max(1) - 1, columns.max(1) - 1];
        if !tokens.is_multiple_of(MULTIPLE) || rows * columns == 0 || most.iter().zip(places).any(|(a, b)| a >= b) {
            candle_core::bail!("{tokens} tokens and {rows} x {columns} patches; this denoiser knows {places:?}");
        }
        let waves = sinusoid(&(time * self.config.t_scale)?, TIME_WIDTH, true, 0.0)?;
        let time = self.time[1].forward(&ops::silu(&self.time[0].forward(&waves)?)?)?;

        let cells = x.reshape(&[batch, channels, rows, side, columns, side][..])?.permute(&[0, 2, 4, 3, 5, 1][..])?;
        let cells = cells.contiguous()?.reshape((batch, rows * columns, side * side * channels))?;
        let mut picture = self.patches.forward(&cells)?;
        let filling = (rows * columns).next_multiple_of(MULTIPLE) - rows * columns;
        if filling > 0 {
            let filler = self.picture_filler.broadcast_as((batch, filling, dim))?;
            picture = Tensor::cat(&[&picture, &filler], 1)?;
        }
        let of_picture = (0..rows)
            .flat_map(|row| (0..columns).map(move |column| [tokens + 1, row, column]))
            .chain(std::iter::repeat_n([0, 0, 0], filling));
        let of_caption = (0..tokens).map(|token| [1 + token, 0, 0]);
        let turns = |places: &mut dyn Iterator<Item = [usize; 3]>| {
            Turns::new(places, &self.config.axes_dims, self.config.rope_theta, x)
        };
        let through = |blocks: &[Block], x: Tensor, turns: &Turns, bias: Option<&Tensor>| {
            let pass = Pass { turns, time: &time, bias };
            blocks.iter().try_fold(x, |x, block| block.forward(&x, &pass, &self.config))
        };
        // What fills the picture up has a bias of none.
        let part = |from: usize, count: usize| bias.map(|bias| bias.narrow(3, from, count)).transpose();
        let (to_picture, to_caption) = (part(0, rows * columns)?, part(rows * columns, tokens)?);
        let to_picture = to_picture.map(|bias| bias.pad_with_zeros(3, 0, filling)).transpose()?;
        let picture = through(&self.picture_refiner, picture, &turns(&mut of_picture.clone())?, to_picture.as_ref())?;

        let caption = ops::rms_norm(states, &self.caption_norm, self.config.norm_eps)?;
        let caption = self.caption.forward(&caption)?;
        let present = present.unsqueeze(2)?;
        let filler = self.caption_filler.broadcast_mul(&present.affine(-1.0, 1.0)?)?;
        let caption = (caption.broadcast_mul(&present)? + filler)?;
        let caption = through(&self.caption_refiner, caption, &turns(&mut of_caption.clone())?, to_caption.as_ref())?;

        let both = Tensor::cat(&[&picture, &caption], 1)?;
        let to_both = to_picture.zip(to_caption).map(|(picture, caption)| Tensor::cat(&[&picture, &caption], 3));
        let to_both = to_both.transpose()?;
        let both = through(&self.layers, both, &turns(&mut of_picture.chain(of_caption))?, to_both.as_ref())?;
        let picture = both.narrow(1, 0, rows * columns)?.contiguous()?;
        let scale = self.output_scale.forward(&ops::silu(&time)?)?;
        let centred = picture.broadcast_sub(&picture.mean_keepdim(D::Minus1)?)?;
        let normed = ops::modulated_norm(&centred, &scale, &scale.zeros_like()?, LAST_EPS)?;
        let cells = self.output.forward(&normed)?.reshape(&[batch, rows, columns, side, side, channels][..])?;
        cells.permute(&[0, 5, 1, 3, 2, 4][..])?.contiguous()?.reshape((batch, channels, height, width))
    }
}
