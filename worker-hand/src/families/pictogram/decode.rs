//! The decoder: latent to picture.
//!
//! Source of the mathematics: `training/network.py`, class `Decoder`, whose names the weights have. Maps keep channels last here.

use candle_core::{Result, Tensor};
use efferent_worker::{
    nn::{conv::Conv3x3, linear::Linear, ops},
    weights::Weights,
};

use super::CHANNELS;

const EPS: f64 = 1e-5;

/// The decoder.
#[derive(Debug)]
pub(super) struct Decoder {
    mean: Tensor,
    deviation: Tensor,
    input: Conv3x3,
    blocks: [Vec<Block>; 3],
    up: [Linear; 3],
    norm: Tensor,
    output: Conv3x3,
}

#[derive(Debug)]
struct Block {
    norm: Tensor,
    convolutions: [Conv3x3; 2],
}

impl Decoder {
    /// Takes the tensors below `dec.` and `latent.`.
    pub(super) fn new(weights: &mut Weights) -> Result<Self> {
        let mut blocks = |name: &str, count: usize, width: usize| {
            (0..count)
                .map(|i| {
                    let name = format!("dec.{name}.{i}");
                    Ok(Block {
                        norm: weights.get(&format!("{name}.n.w"), &[width]),
                        convolutions: [
                            Conv3x3::load(weights, &format!("{name}.a"), width, width)?,
                            Conv3x3::load(weights, &format!("{name}.b"), width, width)?,
                        ],
                    })
                })
                .collect::<Result<Vec<_>>>()
        };
        let blocks = [blocks("b1", 3, 128)?, blocks("b2", 2, 64)?, blocks("b3", 1, 32)?];
        Ok(Self {
            mean: weights.get("latent.mean", &[CHANNELS]),
            deviation: weights.get("latent.std", &[CHANNELS]),
            input: Conv3x3::load(weights, "dec.i", CHANNELS, 128)?,
            blocks,
            up: [
                Linear::of_convolution(weights, "dec.u1", 128, 256)?,
                Linear::of_convolution(weights, "dec.u2", 64, 128)?,
                Linear::of_convolution(weights, "dec.u3", 32, 48)?,
            ],
            norm: weights.get("dec.n.w", &[64]),
            output: Conv3x3::load(weights, "dec.o", 12, 3)?,
        })
    }

    /// Normalised latent (batch, 12, 12, 16) -> picture (batch, 96, 96, 3), in [-1, 1] but for overshoot
    pub(super) fn forward(&self, latent: &Tensor) -> Result<Tensor> {
        let z = latent.broadcast_mul(&self.deviation)?.broadcast_add(&self.mean)?;
        let [first, second, third] = &self.blocks;
        let run = |blocks: &[Block], x: Tensor| blocks.iter().try_fold(x, |x, block| block.forward(&x));
        let x = run(first, self.input.forward(&z)?)?; // (batch, 12, 12, 128)
        let x = run(second, pixel_shuffle(&self.up[0].forward(&x)?)?)?; // (batch, 24, 24, 64)
        let x = ops::rms_norm(&x, &self.norm, EPS)?;
        let x = run(third, pixel_shuffle(&self.up[1].forward(&x)?)?)?; // (batch, 48, 48, 32)
        let x = pixel_shuffle(&self.up[2].forward(&x)?)?; // (batch, 96, 96, 12)
        self.output.forward(&ops::silu(&x)?)
    }
}

impl Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.convolutions[0].forward(&ops::rms_norm(x, &self.norm, EPS)?)?;
        x + self.convolutions[1].forward(&ops::silu(&h)?)?
    }
}

/// (batch, h, w, 4 channels), a pixel's values as (channels, 2, 2) -> (batch, 2 h, 2 w, channels)
fn pixel_shuffle(x: &Tensor) -> Result<Tensor> {
    let (batch, h, w, width) = x.dims4()?;
    let x = x.reshape(&[batch, h, w, width / 4, 2, 2])?.permute([0, 1, 4, 2, 5, 3].as_slice())?;
    x.reshape((batch, 2 * h, 2 * w, width / 4))
}
