//! Pictures to latents of few cells and back: `AutoencoderDC`, of Sana. Levels of large maps are residual blocks, those of small maps linear attention.
//!
//! Source: diffusers 0.42.1, `models/autoencoders/autoencoder_dc.py`, `models/attention_processor.py`. Checked against it by `tests/dc_autoencoder.rs`, and by
//! the checkpoints of `tests/tests/checkpoints.rs`.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};
use efferent_worker::{
    nn::{
        conv::{Conv3x3, Sampling, nearest},
        depthwise::Depthwise,
        linear::Linear,
        linear_attention::attend_linear,
        ops::{self, Activation},
    },
    weights::Weights,
};
use serde::Deserialize;

use super::{Encoded, LatentSpace, blocks::GatedConvolution};
use crate::latent::tiles::Tiles;

/// A field that is one value for every level, or one for each.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Each<T> {
    /// For every level.
    One(T),
    /// Level by level, from the largest map on.
    Many(Vec<T>),
}

impl<T: Clone> Each<T> {
    fn of(&self, levels: usize) -> Result<Vec<T>> {
        match self {
            Self::One(value) => Ok(vec![value.clone(); levels]),
            Self::Many(values) if values.len() == levels => Ok(values.clone()),
            Self::Many(values) => candle_core::bail!("{} values for {levels} levels", values.len()),
        }
    }
}

/// What levels are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum BlockType {
    /// Two convolutions.
    ResBlock,
    /// Linear attention and a gated convolution.
    EfficientViTBlock,
}

/// How norms are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum NormType {
    /// By the root of the mean square of a pixel's channels.
    #[serde(rename = "rms_norm")]
    Rms,
}

/// How maps become smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Down {
    /// By a convolution at every second pixel.
    #[serde(rename = "conv", alias = "Conv")]
    Convolution,
    /// By a convolution at every pixel, four of which become one.
    #[serde(rename = "pixel_unshuffle")]
    Unshuffle,
}

/// How maps become larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Up {
    /// Each pixel four times, and a convolution.
    #[serde(rename = "interpolate")]
    Interpolate,
    /// A convolution, one of whose pixels becomes four.
    #[serde(rename = "pixel_shuffle")]
    Shuffle,
}

/// The last activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Last {
    /// `max(x, 0)`
    #[serde(rename = "relu")]
    Relu,
    /// `x sigmoid(x)`
    #[serde(rename = "silu")]
    Silu,
}

/// What `config.json` says. Other fields are refused by [`DcAutoencoder::new`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the fields are those of the published configuration")]
pub struct Config {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Channels of a head.
    pub attention_head_dim: usize,
    pub encoder_block_types: Each<BlockType>,
    pub decoder_block_types: Each<BlockType>,
    pub encoder_block_out_channels: Vec<usize>,
    pub decoder_block_out_channels: Vec<usize>,
    pub encoder_layers_per_block: Vec<usize>,
    pub decoder_layers_per_block: Vec<usize>,
    /// Sides of the kernels whose outcomes attention reads beside the map itself.
    pub encoder_qkv_multiscales: Vec<Vec<usize>>,
    pub decoder_qkv_multiscales: Vec<Vec<usize>>,
    pub upsample_block_type: Up,
    pub downsample_block_type: Down,
    pub decoder_norm_types: Each<NormType>,
    pub decoder_act_fns: Each<Activation>,
    /// Whether the encoder's last convolution is added to a mean of what went in.
    pub encoder_out_shortcut: bool,
    /// Whether the decoder's first convolution is added to what went in.
    pub decoder_in_shortcut: bool,
    pub decoder_conv_act_fn: Last,
    /// What latents are multiplied by for a denoiser.
    pub scaling_factor: f64,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

/// What diffusers takes for fields that are left out.
impl Default for Config {
    fn default() -> Self {
        let scales = || [vec![], vec![], vec![], vec![5], vec![5], vec![5]].to_vec();
        Self {
            in_channels: 3,
            latent_channels: 32,
            attention_head_dim: 32,
            encoder_block_types: Each::One(BlockType::ResBlock),
            decoder_block_types: Each::One(BlockType::ResBlock),
            encoder_block_out_channels: vec![128, 256, 512, 512, 1024, 1024],
            decoder_block_out_channels: vec![128, 256, 512, 512, 1024, 1024],
            encoder_layers_per_block: vec![2, 2, 2, 3, 3, 3],
            decoder_layers_per_block: vec![3; 6],
            encoder_qkv_multiscales: scales(),
            decoder_qkv_multiscales: scales(),
            upsample_block_type: Up::Shuffle,
            downsample_block_type: Down::Unshuffle,
            decoder_norm_types: Each::One(NormType::Rms),
            decoder_act_fns: Each::One(Activation::Silu),
            encoder_out_shortcut: true,
            decoder_in_shortcut: true,
            decoder_conv_act_fn: Last::Relu,
            scaling_factor: 1.0,
            others: BTreeMap::new(),
        }
    }
}

const EPS: f64 = 1e-5;
/// Pixels of a tile, and from one tile's beginning to the next one's.
const TILE: (usize, usize) = (512, 448);
/// Pixels that one becomes, or that become one.
const FOUR: usize = 4;

/// The network.
#[derive(Debug)]
pub struct DcAutoencoder {
    config: Config,
    input: Down2,
    encoder: Vec<(Vec<Block>, Option<Down2>)>,
    to_latent: Conv3x3,
    from_latent: Conv3x3,
    /// From the smallest map on.
    decoder: Vec<(Option<Up2>, Vec<Block>)>,
    norm: Norm,
    output: Up2,
}

/// `x / sqrt(mean(x^2) + eps) * weight + bias` over a pixel's channels.
#[derive(Debug)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(weights: &mut Weights, name: &str, channels: usize) -> Self {
        let mut get = |part: &str| weights.get(&format!("{name}.{part}"), &[channels]);
        Self { weight: get("weight"), bias: get("bias") }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, EPS)?.broadcast_add(&self.bias)
    }
}

/// Every `group` neighbouring channels averaged.
fn averaged(x: &Tensor, group: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape((b, h, w, c / group, group))?.mean(D::Minus1)
}

/// Every channel `times` times.
fn repeated(x: &Tensor, times: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.unsqueeze(D::Minus1)?.expand((b, h, w, c, times))?.reshape((b, h, w, c * times))
}

/// (b, 2 h, 2 w, c) -> (b, h, w, 4 c)
fn unshuffled(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape(&[b, h / 2, 2, w / 2, 2, c][..])?.permute(&[0, 1, 3, 5, 2, 4][..])?;
    x.contiguous()?.reshape((b, h / 2, w / 2, FOUR * c))
}

/// (b, h, w, 4 c) -> (b, 2 h, 2 w, c)
fn shuffled(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape(&[b, h, w, c / FOUR, 2, 2][..])?.permute(&[0, 1, 4, 2, 5, 3][..])?;
    x.contiguous()?.reshape((b, 2 * h, 2 * w, c / FOUR))
}

/// To a map of half the size, or (without `kind`) of the same.
#[derive(Debug)]
struct Down2 {
    convolution: Conv3x3,
    kind: Option<Down>,
    /// Channels averaged into one on the way around the convolution, where there is one.
    shortcut: Option<usize>,
}

impl Down2 {
    fn new(
        weights: &mut Weights,
        name: &str,
        inputs: usize,
        outputs: usize,
        kind: Down,
        shortcut: bool,
    ) -> Result<Self> {
        let whole = (kind != Down::Unshuffle || outputs.is_multiple_of(FOUR))
            && (!shortcut || (FOUR * inputs).is_multiple_of(outputs));
        if !whole {
            candle_core::bail!("{name}: {inputs} channels cannot become {outputs}");
        }
        let convolved = if kind == Down::Unshuffle { outputs / FOUR } else { outputs };
        let convolution = Conv3x3::load(weights, &format!("{name}.conv"), inputs, convolved)?;
        let sampling = if kind == Down::Unshuffle { Sampling::Every } else { Sampling::Second };
        let shortcut = shortcut.then(|| FOUR * inputs / outputs);
        Ok(Self { convolution: convolution.at(sampling), kind: Some(kind), shortcut })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let convolved = self.convolution.forward(x)?;
        let convolved = if self.kind == Some(Down::Unshuffle) { unshuffled(&convolved)? } else { convolved };
        match self.shortcut {
            Some(group) => convolved + averaged(&unshuffled(x)?, group)?,
            None => Ok(convolved),
        }
    }
}

/// To a map of twice the size, or (without `kind`) of the same.
#[derive(Debug)]
struct Up2 {
    convolution: Conv3x3,
    kind: Option<Up>,
    /// How often each channel counts on the way around the convolution, where there is one.
    shortcut: Option<usize>,
}

impl Up2 {
    fn new(weights: &mut Weights, name: &str, inputs: usize, outputs: usize, kind: Up, shortcut: bool) -> Result<Self> {
        if !(FOUR * outputs).is_multiple_of(inputs) && shortcut {
            candle_core::bail!("{name}: {inputs} channels cannot become {outputs}");
        }
        let convolved = if kind == Up::Shuffle { FOUR * outputs } else { outputs };
        let convolution = Conv3x3::load(weights, &format!("{name}.conv"), inputs, convolved)?;
        let shortcut = shortcut.then(|| FOUR * outputs / inputs);
        Ok(Self { convolution, kind: Some(kind), shortcut })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        let larger = match self.kind {
            None => self.convolution.forward(x)?,
            Some(Up::Interpolate) => self.convolution.forward(&nearest(x, (2 * height, 2 * width))?)?,
            Some(Up::Shuffle) => shuffled(&self.convolution.forward(x)?)?,
        };
        match self.shortcut {
            Some(times) => larger + shuffled(&repeated(x, times)?)?,
            None => Ok(larger),
        }
    }
}

#[derive(Debug)]
enum Block {
    Residual { first: Conv3x3, second: Conv3x3, norm: Norm, activation: Activation },
    Attention(Box<Attention>),
}

#[derive(Debug)]
struct Attention {
    /// q, k and v
    projections: [Linear; 3],
    scales: Vec<(Depthwise, Grouped)>,
    output: Linear,
    norm: Norm,
    head: usize,
    mlp: GatedConvolution,
    mlp_norm: Norm,
}

/// A 1 x 1 convolution in groups of channels, each of which only reads itself.
#[derive(Debug)]
struct Grouped {
    /// (groups, in, out)
    weight: Tensor,
}

impl Grouped {
    fn new(weights: &mut Weights, name: &str, groups: usize, width: usize) -> Result<Self> {
        let (shape, wanted) = ([groups * width, width, 1, 1], [groups, width, width]);
        let weight = weights.get_as(&format!("{name}.weight"), &shape, &wanted, |weight| {
            weight.reshape((groups, width, width))?.transpose(1, 2)?.contiguous()
        })?;
        Ok(Self { weight })
    }

    /// (batch, height, width, channels) -> the same shape
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (groups, width, _) = self.weight.dims3()?;
        let rows = x.elem_count() / (groups * width).max(1);
        let grouped = x.reshape((rows, groups, width))?.transpose(0, 1)?.contiguous()?;
        grouped.matmul(&self.weight)?.transpose(0, 1)?.contiguous()?.reshape(x.shape())
    }
}

/// What blocks of a level have in common.
struct Level<'a> {
    kind: BlockType,
    channels: usize,
    head: usize,
    scales: &'a [usize],
    activation: Activation,
}

impl Block {
    fn new(weights: &mut Weights, name: &str, level: &Level<'_>) -> Result<Self> {
        let (channels, part) = (level.channels, |part: &str| format!("{name}.{part}"));
        if level.kind == BlockType::ResBlock {
            return Ok(Self::Residual {
                first: Conv3x3::load(weights, &part("conv1"), channels, channels)?,
                second: Conv3x3::load_plain(weights, &part("conv2"), channels, channels)?,
                norm: Norm::new(weights, &part("norm"), channels),
                activation: level.activation,
            });
        }
        let heads = channels / level.head;
        let inner = heads * level.head;
        let linear = |weights: &mut Weights, of: &str| Linear::new(weights, &part(of), channels, inner);
        let scale = |weights: &mut Weights, (index, side): (usize, &usize)| {
            let name = part(&format!("attn.to_qkv_multiscale.{index}"));
            let first = Depthwise::load(weights, &format!("{name}.proj_in"), 3 * inner, *side, false)?;
            Ok((first, Grouped::new(weights, &format!("{name}.proj_out"), 3 * heads, level.head)?))
        };
        Ok(Self::Attention(Box::new(Attention {
            projections: ["attn.to_q", "attn.to_k", "attn.to_v"].map(|of| linear(weights, of)),
            scales: level.scales.iter().enumerate().map(|of| scale(weights, of)).collect::<Result<_>>()?,
            output: Linear::new(weights, &part("attn.to_out"), inner * (1 + level.scales.len()), channels),
            norm: Norm::new(weights, &part("attn.norm_out"), channels),
            head: level.head,
            mlp: GatedConvolution::new(weights, &part("conv_out"), channels, 4.0)?,
            mlp_norm: Norm::new(weights, &part("conv_out.norm"), channels),
        })))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Residual { first, second, norm, activation } => {
                let h = second.forward(&ops::activate(*activation, &first.forward(x)?)?)?;
                norm.forward(&h)? + x
            }
            Self::Attention(attention) => attention.forward(x),
        }
    }
}

impl Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, _) = x.dims4()?;
        let parts = self.projections.iter().map(|linear| linear.forward(x)).collect::<Result<Vec<_>>>()?;
        let map = Tensor::cat(&parts, 3)?;
        let mut maps = vec![map.clone()];
        for (depthwise, grouped) in &self.scales {
            maps.push(grouped.forward(&depthwise.forward(&map)?)?);
        }
        let all = Tensor::cat(&maps, 3)?;
        // Heads are counted across the three projections: each takes three runs of its width, wherever they come from.
        let heads = all.dim(3)? / (3 * self.head);
        let all = all.reshape(&[batch, height * width, heads, 3, self.head][..])?;
        let part = |index: usize| all.narrow(3, index, 1)?.squeeze(3)?.contiguous();
        let attended = attend_linear(&part(0)?, &part(1)?, &part(2)?)?;
        let attended = attended.reshape((batch, height, width, heads * self.head))?;
        let x = (self.norm.forward(&self.output.forward(&attended)?)? + x)?;
        self.mlp_norm.forward(&self.mlp.forward(&x)?)? + x
    }
}

impl DcAutoencoder {
    /// Takes the network's tensors by their published names. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration asks for what is not computed here, or cannot be.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        if let Some(field) = config.others.keys().find(|field| !field.starts_with('_')) {
            candle_core::bail!("an AutoencoderDC's {field} is not known");
        }
        let Config { in_channels, latent_channels: latent, attention_head_dim: head, .. } = config;
        let (down, up) = (&config.encoder_block_out_channels, &config.decoder_block_out_channels);
        let counts = [config.encoder_layers_per_block.len(), config.encoder_qkv_multiscales.len(), up.len()];
        let counts =
            counts.into_iter().chain([config.decoder_layers_per_block.len(), config.decoder_qkv_multiscales.len()]);
        let levels = down.len();
        if levels < 2 || counts.into_iter().any(|count| count != levels) {
            candle_core::bail!("an AutoencoderDC's levels are told apart in number: {config:?}");
        }
        let ends = [down[levels - 1], up[levels - 1]];
        if down.iter().chain(up).any(|channels| *channels == 0 || channels / head.max(1) == 0)
            || in_channels == 0
            || head == 0
            || latent == 0
            || config.scaling_factor == 0.0
            || ends.iter().any(|channels| !channels.is_multiple_of(latent))
        {
            candle_core::bail!("an AutoencoderDC cannot be so: {config:?}");
        }
        // A first level without blocks is passed over: the picture goes in, and comes out, at half its size.
        let passed = |layers: &[usize]| layers.iter().skip(1).any(|count| *count == 0);
        if passed(&config.encoder_layers_per_block) || passed(&config.decoder_layers_per_block) {
            candle_core::bail!("an AutoencoderDC's levels after the first must have blocks: {config:?}");
        }
        let (encoder, input) = Self::encoder(&config, weights)?;
        let to_latent = Conv3x3::load(weights, "encoder.conv_out", ends[0], latent)?;
        let from_latent = Conv3x3::load(weights, "decoder.conv_in", latent, ends[1])?;
        let decoder = Self::decoder(&config, weights)?;
        let whole = config.decoder_layers_per_block[0] > 0;
        let channels = if whole { up[0] } else { up[1] };
        let norm = Norm::new(weights, "decoder.norm_out", channels);
        let output = match whole {
            true => Up2 {
                convolution: Conv3x3::load(weights, "decoder.conv_out", channels, in_channels)?,
                kind: None,
                shortcut: None,
            },
            false => Up2::new(weights, "decoder.conv_out", channels, in_channels, config.upsample_block_type, false)?,
        };
        Ok(Self { input, encoder, to_latent, from_latent, decoder, norm, output, config })
    }

    #[expect(clippy::type_complexity, reason = "levels, each with what leads to the next")]
    fn encoder(config: &Config, weights: &mut Weights) -> Result<(Vec<(Vec<Block>, Option<Down2>)>, Down2)> {
        let channels = &config.encoder_block_out_channels;
        let (levels, kind) = (channels.len(), config.downsample_block_type);
        let kinds = config.encoder_block_types.of(levels)?;
        let input = match config.encoder_layers_per_block[0] {
            0 => Down2::new(weights, "encoder.conv_in", config.in_channels, channels[1], kind, false)?,
            _ => Down2 {
                convolution: Conv3x3::load(weights, "encoder.conv_in", config.in_channels, channels[0])?,
                kind: None,
                shortcut: None,
            },
        };
        let mut encoder = Vec::new();
        for level in 0..levels {
            let count = config.encoder_layers_per_block[level];
            let of = Level {
                kind: kinds[level],
                channels: channels[level],
                head: config.attention_head_dim,
                scales: &config.encoder_qkv_multiscales[level],
                activation: Activation::Silu,
            };
            let name = |index: usize| format!("encoder.down_blocks.{level}.{index}");
            let blocks = (0..count).map(|index| Block::new(weights, &name(index), &of)).collect::<Result<Vec<_>>>()?;
            let down = match channels.get(level + 1).filter(|_| count > 0) {
                Some(next) => Some(Down2::new(weights, &name(count), channels[level], *next, kind, true)?),
                None => None,
            };
            encoder.push((blocks, down));
        }
        Ok((encoder, input))
    }

    fn decoder(config: &Config, weights: &mut Weights) -> Result<Vec<(Option<Up2>, Vec<Block>)>> {
        let channels = &config.decoder_block_out_channels;
        let levels = channels.len();
        let kinds = config.decoder_block_types.of(levels)?;
        let (_, activations) = (config.decoder_norm_types.of(levels)?, config.decoder_act_fns.of(levels)?);
        let mut decoder = Vec::new();
        for level in (0..levels).rev() {
            let count = config.decoder_layers_per_block[level];
            let of = Level {
                kind: kinds[level],
                channels: channels[level],
                head: config.attention_head_dim,
                scales: &config.decoder_qkv_multiscales[level],
                activation: activations[level],
            };
            let name = |index: usize| format!("decoder.up_blocks.{level}.{index}");
            let up = match channels.get(level + 1).filter(|_| count > 0) {
                Some(from) => {
                    Some(Up2::new(weights, &name(0), *from, channels[level], config.upsample_block_type, true)?)
                }
                None => None,
            };
            let first = usize::from(up.is_some());
            let block = |index| Block::new(weights, &name(first + index), &of);
            decoder.push((up, (0..count).map(block).collect::<Result<Vec<_>>>()?));
        }
        Ok(decoder)
    }
}

impl LatentSpace for DcAutoencoder {
    fn channels(&self) -> usize {
        self.config.latent_channels
    }

    fn factor(&self) -> usize {
        1 << (self.config.encoder_block_out_channels.len() - 1)
    }

    fn tiles(&self) -> Tiles {
        let (side, stride) = TILE;
        Tiles { side: (side / self.factor()).max(2), stride: (stride / self.factor()).max(1) }
    }

    fn moments(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = self.input.forward(picture)?;
        for (blocks, down) in &self.encoder {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(down) = down {
                x = down.forward(&x)?;
            }
        }
        let latent = self.to_latent.forward(&x)?;
        match self.config.encoder_out_shortcut {
            true => latent + averaged(&x, x.dim(3)? / self.config.latent_channels)?,
            false => Ok(latent),
        }
    }

    /// Latents themselves.
    fn encoded(&self, moments: &Tensor) -> Result<Encoded> {
        Ok(Encoded { mean: moments.clone(), deviation: None })
    }

    fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        let mut x = self.from_latent.forward(latent)?;
        if self.config.decoder_in_shortcut {
            let times = x.dim(3)? / self.config.latent_channels;
            x = (x + repeated(latent, times)?)?;
        }
        for (up, blocks) in &self.decoder {
            if let Some(up) = up {
                x = up.forward(&x)?;
            }
            for block in blocks {
                x = block.forward(&x)?;
            }
        }
        let x = self.norm.forward(&x)?;
        let x = match self.config.decoder_conv_act_fn {
            Last::Relu => x.relu()?,
            Last::Silu => ops::silu(&x)?,
        };
        self.output.forward(&x)
    }

    fn scale(&self, latent: &Tensor) -> Result<Tensor> {
        latent * self.config.scaling_factor
    }

    fn unscale(&self, latent: &Tensor) -> Result<Tensor> {
        latent / self.config.scaling_factor
    }
}
