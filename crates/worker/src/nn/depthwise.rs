//! Depthwise convolution of maps kept as (batch, height, width, channels): each channel is filtered by itself.
//!
//! candle runs a grouped convolution group by group, which for a channel a group is thousands of convolutions of one channel each.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::ops::{is_ours, slice};
use crate::weights::Weights;

/// A depthwise convolution with a square kernel of an odd side, stride 1, and zeros around the map, whose size stays.
#[derive(Debug, Clone)]
pub struct Depthwise {
    /// (side side, channels)
    weight: Tensor,
    /// (channels)
    bias: Option<Tensor>,
    side: usize,
}

impl Depthwise {
    /// Takes `{name}.weight` of (channels, 1, side, side), and `{name}.bias` if there is to be one.
    ///
    /// # Errors
    /// If the side is even.
    pub fn load(weights: &mut Weights, name: &str, channels: usize, side: usize, biased: bool) -> Result<Self> {
        if side.is_multiple_of(2) {
            candle_core::bail!("{name}: a kernel of {side} x {side} has no middle");
        }
        let (shape, taps) = ([channels, 1, side, side], side * side);
        let weight = weights.get_as(&format!("{name}.weight"), &shape, &[taps, channels], |weight| {
            weight.reshape((channels, taps))?.t()?.contiguous()
        })?;
        let bias = biased.then(|| weights.get(&format!("{name}.bias"), &[channels]));
        Ok(Self { weight, bias, side })
    }

    /// (batch, height, width, channels) -> the same shape
    ///
    /// # Errors
    /// If the channels do not agree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, height, width, channels) = x.dims4()?;
        if self.weight.dims() != [self.side * self.side, channels] {
            candle_core::bail!("a depthwise kernel of {:?} does not fit a map of {:?}", self.weight.dims(), x.dims());
        }
        if is_ours(x) {
            let op = Filter { side: self.side, bias: self.bias.clone() };
            return x.contiguous()?.apply_op2_no_bwd(&self.weight, &op);
        }
        let around = self.side / 2;
        let padded = x.pad_with_zeros(1, around, around)?.pad_with_zeros(2, around, around)?;
        let mut sum = match &self.bias {
            Some(bias) => bias.broadcast_as(x.shape())?.contiguous()?,
            None => x.zeros_like()?,
        };
        for dy in 0..self.side {
            for dx in 0..self.side {
                let part = padded.narrow(1, dy, height)?.narrow(2, dx, width)?;
                sum = (sum + part.broadcast_mul(&self.weight.get(dy * self.side + dx)?)?)?;
            }
        }
        Ok(sum)
    }
}

struct Filter {
    side: usize,
    bias: Option<Tensor>,
}

impl CustomOp2 for Filter {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = lx.shape().dims4()?;
        let (input, weight) = (slice(x, lx)?, slice(w, lw)?);
        let guard = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &guard {
            Some((storage, layout)) => match &**storage {
                Storage::Cpu(storage) => Some(slice(storage, layout)?),
                _ => candle_core::bail!("the bias of a convolution on CPU lies elsewhere"),
            },
            None => None,
        };
        let line = width * channels;
        let mut output = vec![0f32; batch * height * line];
        if line > 0 {
            output.par_chunks_mut(line).enumerate().for_each(|(index, out)| {
                let (image, y) = (index / height, index % height);
                if let Some(bias) = bias {
                    out.chunks_exact_mut(channels).for_each(|cell| cell.copy_from_slice(bias));
                }
                let around = self.side / 2;
                for dy in 0..self.side {
                    let Some(from) = (y + dy).checked_sub(around).filter(|from| *from < height) else { continue };
                    let source = &input[(image * height + from) * line..][..line];
                    for dx in 0..self.side {
                        let weight = &weight[(dy * self.side + dx) * channels..][..channels];
                        filter_line(source, out, weight, dx, around, width);
                    }
                }
            });
        }
        Ok((CpuStorage::F32(output), lx.shape().clone()))
    }
}

/// Adds to each cell of a line what the cell `dx - around` to the right of it in `source` contributes, where there is one.
fn filter_line(source: &[f32], out: &mut [f32], weight: &[f32], dx: usize, around: usize, width: usize) {
    let channels = weight.len();
    let (first, last) = (around.saturating_sub(dx), (width + around).saturating_sub(dx).min(width));
    if first >= last {
        return;
    }
    let from = (first + dx - around) * channels;
    let sources = source[from..].chunks_exact(channels);
    for (cell, values) in out[first * channels..last * channels].chunks_exact_mut(channels).zip(sources) {
        for ((sum, value), weight) in cell.iter_mut().zip(values).zip(weight) {
            *sum += value * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn random(channels: usize, side: usize, biased: bool) -> Depthwise {
        let weight = Tensor::randn(0f32, 0.5, (side * side, channels), &Device::Cpu).unwrap();
        let bias = biased.then(|| Tensor::randn(0f32, 1.0, channels, &Device::Cpu).unwrap());
        Depthwise { weight, bias, side }
    }

    #[test]
    fn equals_candles_grouped_convolution() {
        for (batch, height, width, channels, side, biased) in [
            (1, 1, 1, 1, 3, true),
            (2, 5, 3, 4, 3, false),
            (1, 2, 7, 3, 5, true),
            (2, 4, 4, 6, 5, false),
            (1, 3, 3, 2, 7, true),
        ] {
            let convolution = random(channels, side, biased);
            let x = Tensor::randn(0f32, 1.0, (batch, height, width, channels), &Device::Cpu).unwrap();
            let kernel = convolution.weight.t().unwrap().reshape((channels, 1, side, side)).unwrap();
            let mut wanted = x.permute((0, 3, 1, 2)).unwrap().conv2d(&kernel, side / 2, 1, 1, channels).unwrap();
            if let Some(bias) = &convolution.bias {
                wanted = wanted.broadcast_add(&bias.reshape((1, channels, 1, 1)).unwrap()).unwrap();
            }
            let got = convolution.forward(&x).unwrap().permute((0, 3, 1, 2)).unwrap();
            let error = (got - wanted).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-5, "{error} for {height} x {width}, side {side}");
        }
    }

    #[test]
    fn the_portable_form_agrees() {
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let own = random(3, 5, true);
        let portable = Depthwise { weight: wide(&own.weight), bias: own.bias.as_ref().map(wide), side: 5 };
        let x = Tensor::randn(0f32, 1.0, (2, 3, 6, 3), &Device::Cpu).unwrap();
        let difference = (wide(&own.forward(&x).unwrap()) - portable.forward(&wide(&x)).unwrap()).unwrap();
        assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-5);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let x = Tensor::zeros((1, 2, 2, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(random(3, 3, false).forward(&x).is_err());
    }
}
