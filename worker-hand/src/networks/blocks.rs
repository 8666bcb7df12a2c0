//! What denoisers and autoencoders are both made of.

use candle_core::{D, DType, Result, Tensor};
use efferent_worker::{
    nn::{
        conv::Conv3x3,
        depthwise::Depthwise,
        linear::Linear,
        norm::GroupNorm,
        ops::{self, Activation},
    },
    weights::Weights,
};

/// How every residual block of a network norms and activates.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm {
    pub(super) groups: usize,
    pub(super) eps: f64,
    pub(super) activation: Activation,
}

/// A residual block of two convolutions: diffusers' `ResnetBlock2D`.
#[derive(Debug)]
pub(super) struct Residual {
    norms: [GroupNorm; 2],
    convolutions: [Conv3x3; 2],
    time: Option<Linear>,
    shortcut: Option<Linear>,
    activation: Activation,
}

impl Residual {
    /// `time`: channels of the embedded time, of networks that have any.
    pub(super) fn new(
        weights: &mut Weights,
        name: &str,
        inputs: usize,
        outputs: usize,
        time: Option<usize>,
        norm: Norm,
    ) -> Result<Self> {
        let Norm { groups, eps, activation } = norm;
        let part = |part: &str| format!("{name}.{part}");
        Ok(Self {
            norms: [
                GroupNorm::new(weights, &part("norm1"), inputs, groups, eps)?,
                GroupNorm::new(weights, &part("norm2"), outputs, groups, eps)?,
            ],
            convolutions: [
                Conv3x3::load(weights, &part("conv1"), inputs, outputs)?,
                Conv3x3::load(weights, &part("conv2"), outputs, outputs)?,
            ],
            time: time.map(|time| Linear::with_bias(weights, &part("time_emb_proj"), time, outputs)),
            shortcut: match inputs == outputs {
                true => None,
                false => Some(Linear::of_convolution(weights, &part("conv_shortcut"), inputs, outputs)?),
            },
            activation,
        })
    }

    /// x: (batch, height, width, in), time: (batch, its channels), activated -> (batch, height, width, out)
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let act = |x: Tensor| ops::activate(self.activation, &x);
        let mut h = self.convolutions[0].forward(&act(self.norms[0].forward(x)?)?)?;
        match (&self.time, time) {
            (Some(layer), Some(time)) => h = h.broadcast_add(&layer.forward(time)?.unsqueeze(1)?.unsqueeze(1)?)?,
            (None, None) => {}
            _ => candle_core::bail!("a residual block wants a time if and only if it was trained with one"),
        }
        let h = self.convolutions[1].forward(&act(self.norms[1].forward(&h)?)?)?;
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + h,
            None => x + h,
        }
    }
}

/// Channels widened, mixed with those of neighbouring pixels, gated and narrowed: diffusers' `GLUMBConv`, without its norm and residual sum.
#[derive(Debug)]
pub(super) struct GatedConvolution {
    inverted: Linear,
    depthwise: Depthwise,
    point: Linear,
}

impl GatedConvolution {
    /// `ratio`: channels inside for each outside.
    pub(super) fn new(weights: &mut Weights, name: &str, channels: usize, ratio: f64) -> Result<Self> {
        let inner = (ratio * channels as f64) as usize;
        Ok(Self {
            inverted: Linear::of_convolution(weights, &format!("{name}.conv_inverted"), channels, 2 * inner)?,
            depthwise: Depthwise::load(weights, &format!("{name}.conv_depth"), 2 * inner, 3, true)?,
            point: Linear::of_plain_convolution(weights, &format!("{name}.conv_point"), inner, channels)?,
        })
    }

    /// (batch, height, width, channels) -> the same shape
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.depthwise.forward(&ops::silu(&self.inverted.forward(x)?)?)?;
        let halves = h.chunk(2, D::Minus1)?;
        self.point.forward(&(&halves[0] * ops::silu(&halves[1])?)?)
    }
}

/// Layer norm without weights, then `y (1 + scale) + shift`. x: (rows, tokens, width); scale, shift: (rows, width)
pub(super) fn modulated_layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    ops::modulated_norm(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, scale, shift, eps)
}

/// (batch, channels, height, width) -> (batch, patches, channels side side): the values of each patch, by channel, row and column
pub(super) fn to_patches(x: &Tensor, side: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (rows, columns) = (height / side, width / side);
    let cells = x.reshape(&[batch, channels, rows, side, columns, side][..])?.permute(&[0, 2, 4, 1, 3, 5][..])?;
    cells.contiguous()?.reshape((batch, rows * columns, channels * side * side))
}

/// (batch, patches, side side channels), values by row, column and channel -> (batch, channels, rows side, columns side)
pub(super) fn from_patches(x: &Tensor, (rows, columns): (usize, usize), side: usize) -> Result<Tensor> {
    let (batch, _, values) = x.dims3()?;
    let channels = values / (side * side).max(1);
    let cells = x.reshape(&[batch, rows, columns, side, side, channels][..])?.permute(&[0, 5, 1, 3, 2, 4][..])?;
    cells.contiguous()?.reshape((batch, channels, rows * side, columns * side))
}

/// values: (count) -> (count, width): sines and cosines at width / 2 frequencies between 1 and 1 / 10,000.
pub(super) fn sinusoid(values: &Tensor, width: usize, cosines_first: bool, shift: f64) -> Result<Tensor> {
    let half = width / 2;
    // In f32, step by step, as the reference has it: at times of thousands the last bit of a frequency shows.
    let exponent = |i: usize| -(10_000f64.ln()) as f32 * i as f32 / (half as f64 - shift) as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| exponent(i).exp()).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), values.device())?;
    let angles = values.to_dtype(DType::F32)?.unsqueeze(1)?.broadcast_mul(&frequencies)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    Tensor::cat(&if cosines_first { [cos, sin] } else { [sin, cos] }, 1)
}
