//! Rotary positions: pairs of channels turn by an angle that grows with the position.

use candle_core::{D, Result, Tensor};

/// By how much each pair of a head of so many channels turns from one position to the next: `base^(-2 i / width)`.
pub fn frequencies(base: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64) as f32).collect()
}

/// How slow turns are made slower, for texts longer than those of the first training (Llama 3.1 and later).
///
/// Source: transformers 5.23, `modeling_rope_utils.py`, `_compute_llama3_parameters`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    /// How many times slower.
    pub factor: f64,
    /// Pairs that turn around less often than this within `positions` are slowed down by all of the factor.
    pub low: f64,
    /// Pairs that turn around more often are not; those between are by a part of it.
    pub high: f64,
    /// Positions of the first training.
    pub positions: f64,
}

impl Stretch {
    /// What becomes of a pair's turn from one position to the next.
    pub fn of(&self, frequency: f32) -> f32 {
        let Self { factor, low, high, positions } = *self;
        let frequency = f64::from(frequency);
        let kept = ((positions * frequency / std::f64::consts::TAU - low) / (high - low)).clamp(0.0, 1.0);
        ((1.0 - kept) * frequency / factor + kept * frequency) as f32
    }
}

/// Turns pairs of channels. first, second: (batch, tokens, heads, pairs); cos, sin: (tokens, pairs)
///
/// # Errors
/// If shapes do not fit.
pub fn turn(first: &Tensor, second: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<[Tensor; 2]> {
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?); // (tokens, 1, pairs)
    Ok([
        (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
        (first.broadcast_mul(&sin)? + second.broadcast_mul(&cos)?)?,
    ])
}

/// Turns channel i with channel i + half. x: (batch, tokens, heads, width); cos, sin: (tokens, width / 2)
///
/// # Errors
/// If shapes do not fit.
pub fn turn_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let [a, b] = turn(&x.narrow(D::Minus1, 0, half)?, &x.narrow(D::Minus1, half, half)?, cos, sin)?;
    Tensor::cat(&[a, b], D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_turns_are_stretched_as_by_transformers() {
        // Llama 3.1 8B: `ROPE_INIT_FUNCTIONS["llama3"]` of transformers 5.23.
        let stretch = Stretch { factor: 8.0, low: 1.0, high: 4.0, positions: 8192.0 };
        let plain = frequencies(500_000.0, 128);
        for (pair, wanted) in [
            (0, 1.0),
            (1, 0.814_617_2),
            (10, 0.128_687_38),
            (28, 0.003_211_446),
            (29, 0.002_166_570_6),
            (30, 0.001_371_893_7),
            (32, 0.000_524_846),
            (34, 0.000_178_507_79),
            (35, 9.556_212e-5),
            (40, 3.428_102_4e-5),
            (63, 3.068_926e-7),
        ] {
            let got = stretch.of(plain[pair]);
            assert!((got / wanted - 1.0f32).abs() < 1e-5, "pair {pair}: {got}, not {wanted}");
        }
    }
}
