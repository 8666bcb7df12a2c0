//! Rotary positions: pairs of channels turn by an angle that grows with the position.

use candle_core::{D, Result, Tensor};

/// By how much each pair of a head of so many channels turns from one position to the next: `base^(-2 i / width)`.
pub fn frequencies(base: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64) as f32).collect()
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
