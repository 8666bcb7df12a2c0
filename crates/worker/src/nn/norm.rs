//! Norms with weights of their own.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::ops::{is_ours, slice};
use crate::weights::Weights;

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Takes `{name}.weight` and `{name}.bias`, each of (width).
    pub fn new(weights: &mut Weights, name: &str, width: usize, eps: f64) -> Self {
        let mut get = |part: &str| weights.get(&format!("{name}.{part}"), &[width]);
        Self { weight: get("weight"), bias: get("bias"), eps }
    }

    /// (.., width) -> (.., width)
    ///
    /// # Errors
    /// If the width does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, self.eps as f32)
    }
}

/// Each group of channels of an image, over all its pixels: `(x - mean) / sqrt(variance + eps) * weight + bias`.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Takes `{name}.weight` and `{name}.bias`, each of (channels).
    ///
    /// # Errors
    /// If the groups do not divide the channels.
    pub fn new(weights: &mut Weights, name: &str, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            candle_core::bail!("{groups} groups of {channels} channels cannot be ({name})");
        }
        let mut get = |part: &str| weights.get(&format!("{name}.{part}"), &[channels]);
        Ok(Self { weight: get("weight"), bias: get("bias"), groups, eps })
    }

    /// (batch, .., channels) -> the same shape
    ///
    /// # Errors
    /// If the channels do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let channels = self.weight.elem_count();
        if x.dims().len() < 2 || x.dims().last() != Some(&channels) {
            candle_core::bail!("a norm of {channels} channels does not fit values of {:?}", x.dims());
        }
        match is_ours(x) {
            true => x.contiguous()?.apply_op3_no_bwd(
                &self.weight,
                &self.bias,
                &Groups { groups: self.groups, eps: self.eps },
            ),
            false => self.portable(x),
        }
    }

    fn portable(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, self.weight.elem_count());
        let pixels = x.elem_count() / (batch * channels).max(1);
        let y = x.reshape((batch, pixels, self.groups, channels / self.groups))?;
        let y = y.broadcast_sub(&y.mean_keepdim((1, 3))?)?;
        let y = y.broadcast_div(&(y.sqr()?.mean_keepdim((1, 3))? + self.eps)?.sqrt()?)?.reshape(x.shape())?;
        let (weight, bias) = (self.weight.to_dtype(x.dtype())?, self.bias.to_dtype(x.dtype())?);
        y.broadcast_mul(&weight)?.broadcast_add(&bias)
    }
}

struct Groups {
    groups: usize,
    eps: f64,
}

impl CustomOp3 for Groups {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (slice(x, lx)?, slice(weight, lw)?, slice(bias, lb)?);
        let mut output = vec![0f32; x.len()];
        let image = x.len() / lx.dims()[0].max(1);
        for (x, output) in x.chunks_exact(image.max(1)).zip(output.chunks_exact_mut(image.max(1))) {
            self.one(x, weight, bias, output);
        }
        Ok((CpuStorage::F32(output), lx.shape().clone()))
    }
}

/// Pixels that are summed in one piece: the order of sums does not depend on the number of threads.
const PIECE: usize = 256;

impl Groups {
    /// One image, (pixels, channels).
    fn one(&self, x: &[f32], weight: &[f32], bias: &[f32], output: &mut [f32]) {
        let (channels, width) = (weight.len(), weight.len() / self.groups);
        let count = (x.len() / self.groups) as f64;
        let total = |value: &(dyn Fn(usize, f32) -> f32 + Sync)| -> Vec<f64> {
            let pieces: Vec<Vec<f32>> = x
                .par_chunks(PIECE * channels)
                .map(|piece| {
                    let mut sums = vec![0f32; channels];
                    for pixel in piece.chunks_exact(channels) {
                        for (channel, (sum, x)) in sums.iter_mut().zip(pixel).enumerate() {
                            *sum += value(channel, *x);
                        }
                    }
                    sums
                })
                .collect();
            let group = |group: usize| {
                pieces.iter().flat_map(|sums| &sums[group * width..][..width]).map(|sum| f64::from(*sum)).sum::<f64>()
            };
            (0..self.groups).map(|index| group(index) / count).collect()
        };
        let means: Vec<f32> = total(&|_, x| x).into_iter().map(|mean| mean as f32).collect();
        // Around the mean: the difference of two large numbers would lose what matters.
        let variances = total(&|channel, x| (x - means[channel / width]).powi(2));
        let factors: Vec<(f32, f32)> = (0..channels)
            .map(|channel| {
                let group = channel / width;
                let scale = (1.0 / (variances[group] + self.eps).sqrt()) as f32 * weight[channel];
                (scale, bias[channel] - means[group] * scale)
            })
            .collect();
        output.par_chunks_mut(PIECE * channels).zip(x.par_chunks(PIECE * channels)).for_each(|(output, x)| {
            for (output, x) in output.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                for ((o, x), (scale, shift)) in output.iter_mut().zip(x).zip(&factors) {
                    *o = x * scale + shift;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn groups_agree_with_the_portable_form() {
        for (shape, groups) in [((1, 1, 1, 4), 2), ((2, 5, 3, 12), 3), ((3, 40, 20, 32), 32), ((1, 2, 2, 6), 1)] {
            let x = ((Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap() * 3.0).unwrap() + 20.0).unwrap();
            let random = || Tensor::randn(0f32, 1.0, shape.3, &Device::Cpu).unwrap();
            let norm = GroupNorm { weight: random(), bias: random(), groups, eps: 1e-5 };
            let ours = norm.forward(&x).unwrap().to_dtype(DType::F64).unwrap();
            let portable = norm.forward(&x.to_dtype(DType::F64).unwrap()).unwrap();
            let error = (ours - portable).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(error < 1e-4, "{error} for {shape:?} in {groups} groups");
            assert!(norm.forward(&x.narrow(3, 0, 2).unwrap()).is_err());
        }
    }
}
