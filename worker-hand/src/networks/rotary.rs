//! Rotary positions along several axes: each pair of neighbouring channels of a head turns with a token's place on one axis.

use candle_core::{Result, Tensor};

/// Cosines and sines of each token's place, (1, tokens, 1, channels of a head / 2).
#[derive(Debug)]
pub(super) struct Turns {
    cos: Tensor,
    sin: Tensor,
}

impl Turns {
    /// `axes`: channels that turn with each axis, all even; `theta`: the base of the frequencies.
    pub(super) fn new(
        places: impl Iterator<Item = [usize; 3]>,
        axes: &[usize],
        theta: f64,
        like: &Tensor,
    ) -> Result<Self> {
        let half = axes.iter().sum::<usize>() / 2;
        let mut angles = Vec::new();
        for place in places {
            for (place, channels) in place.into_iter().zip(axes) {
                let frequency = |i: usize| theta.powf(-2.0 * i as f64 / *channels as f64);
                angles.extend((0..channels / 2).map(|i| place as f64 * frequency(i)));
            }
        }
        let count = angles.len() / half.max(1);
        let tensor = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle) as f32).collect();
            Tensor::from_vec(values, (1, count, 1, half), like.device())
        };
        Ok(Self { cos: tensor(f64::cos)?, sin: tensor(f64::sin)? })
    }

    /// Turns x (batch, tokens, heads, channels).
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, heads, channels) = x.dims4()?;
        let pairs = x.reshape((batch, tokens, heads, channels / 2, 2))?;
        let (a, b) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
        let first = (a.broadcast_mul(&self.cos)? - b.broadcast_mul(&self.sin)?)?;
        let second = (b.broadcast_mul(&self.cos)? + a.broadcast_mul(&self.sin)?)?;
        Tensor::stack(&[first, second], 4)?.reshape((batch, tokens, heads, channels))
    }
}
