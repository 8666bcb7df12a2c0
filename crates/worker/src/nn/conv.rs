//! 3 x 3 convolution of maps kept as (batch, height, width, channels), by im2col and one matrix product, or Winograd's way; other sizes of a map.
//!
//! candle's own CPU convolution takes 3 times as long on maps of 64 x 64 and more. Channels last means that a row of the
//! im2col matrix is nine copies of contiguous channels, and that norms over channels read contiguous memory.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    half,
    ops::is_ours,
    product::{MAX_ROWS, product},
    winograd::{self, Winograd},
};
use crate::weights::Weights;

/// Which pixels a 3 x 3 convolution is computed at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// Every pixel: stride 1, padding 1 on each side. (height, width) stay.
    Every,
    /// Every second, from the first on: stride 2, padding 1 on each side. Each axis becomes (size + 1) / 2.
    Second,
    /// Every second, between the first two: stride 2, padding 1 below and on the right only. Each axis becomes size / 2.
    Between,
}

impl Sampling {
    /// (stride, zeros in front of an axis)
    fn steps(self) -> (usize, usize) {
        match self {
            Self::Every => (1, 1),
            Self::Second => (2, 1),
            Self::Between => (2, 0),
        }
    }

    /// An axis after the convolution.
    fn size(self, size: usize) -> usize {
        match self {
            Self::Every => size,
            Self::Second => size.div_ceil(2),
            Self::Between => size / 2,
        }
    }
}

/// Values of a matrix that is multiplied at once: 16 MB.
const BAND: usize = 4 << 20;

/// A 3 x 3 convolution.
#[derive(Debug, Clone)]
pub struct Conv3x3 {
    /// (9 in, out)
    weight: Tensor,
    /// (out)
    bias: Option<Tensor>,
    sampling: Sampling,
}

/// (out, in, 3, 3) -> (9 in, out)
fn rows_of_kernel(weight: &Tensor) -> Result<Tensor> {
    let (outputs, inputs, 3, 3) = weight.dims4()? else {
        candle_core::bail!("a kernel of {:?} is not 3 x 3", weight.dims())
    };
    weight.permute((2, 3, 1, 0))?.contiguous()?.reshape((9 * inputs, outputs))
}

impl Conv3x3 {
    /// From a weight of (out, in, 3, 3) and a bias of (out), as PyTorch stores them.
    ///
    /// # Errors
    /// If the shapes are others.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let bias = Some(bias.reshape(weight.dim(0)?)?);
        Ok(Self { weight: rows_of_kernel(weight)?, bias, sampling: Sampling::Every })
    }

    /// The same convolution at other pixels.
    #[must_use]
    pub fn at(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// Takes `{name}.weight` of (out, in, 3, 3) and `{name}.bias`.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn load(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let plain = Self::load_plain(weights, name, inputs, outputs)?;
        Ok(Self { bias: Some(weights.get(&format!("{name}.bias"), &[outputs])), ..plain })
    }

    /// The same without bias.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn load_plain(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let (shape, wanted) = ([outputs, inputs, 3, 3], [9 * inputs, outputs]);
        let weight = weights.matrix_as(&format!("{name}.weight"), &shape, &wanted, |weight| rows_of_kernel(&weight))?;
        Ok(Self { weight, bias: None, sampling: Sampling::Every })
    }

    /// (batch, height, width, in) -> (batch, height, width, out), the sizes as its [`Sampling`] says
    ///
    /// # Errors
    /// If the channels do not agree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let (height, width, outputs) = (self.sampling.size(h), self.sampling.size(w), self.weight.dim(1)?);
        let pays = is_ours(x) && self.sampling == Sampling::Every && winograd::pays((h, w), c, outputs);
        if pays && self.weight.device().is_cpu() {
            let bias = self.bias.as_ref().map_or_else(|| Ok(vec![0.0; outputs]), Tensor::to_vec1)?;
            return x.contiguous()?.apply_op2_no_bwd(&half::operand(&self.weight)?, &Winograd { bias });
        }
        if is_ours(x) && b > 1 && height * width <= MAX_ROWS {
            // As many images at once as leave a value the same, whatever others there are.
            let most = MAX_ROWS / (height * width).max(1);
            let parts = (0..b).step_by(most).map(|first| self.sampled(&x.narrow(0, first, most.min(b - first))?));
            return Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0);
        }
        self.sampled(x)
    }

    /// The same by im2col.
    fn sampled(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let (height, width, outputs) = (self.sampling.size(h), self.sampling.size(w), self.weight.dim(1)?);
        let product = |rows: Tensor| {
            let y = product(&rows, &self.weight)?;
            match &self.bias {
                Some(bias) => y.broadcast_add(bias),
                None => Ok(y),
            }
        };
        let band = (BAND / (width * 9 * c).max(1)).max(1);
        if !is_ours(x) || b * height <= band {
            return product(im2col(x, self.sampling)?)?.reshape((b, height, width, outputs));
        }
        // Band by band, so that the matrix is never larger than a cache.
        let x = x.contiguous()?;
        let mut parts = Vec::with_capacity(b * height.div_ceil(band));
        for image in 0..b {
            let x = x.narrow(0, image, 1)?;
            for first in (0..height).step_by(band) {
                let op = Im2Col { sampling: self.sampling, first, rows: band.min(height - first) };
                parts.push(product(x.apply_op1_no_bwd(&op)?)?);
            }
        }
        Tensor::cat(&parts, 0)?.reshape((b, height, width, outputs))
    }
}

/// (batch, height, width, channels) -> (batch height width, 9 channels): the neighbourhood of each pixel that is sampled, row by row, zeros outside.
///
/// # Errors
/// If the tensor is not of four dimensions.
pub fn im2col(x: &Tensor, sampling: Sampling) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if is_ours(x) {
        return x.contiguous()?.apply_op1_no_bwd(&Im2Col { sampling, first: 0, rows: sampling.size(h) });
    }
    let (stride, before) = sampling.steps();
    let padded = x.pad_with_zeros(1, before, 2)?.pad_with_zeros(2, before, 2)?;
    let (h, w) = (sampling.size(h), sampling.size(w));
    let mut parts = Vec::with_capacity(9);
    for dy in 0..3 {
        for dx in 0..3 {
            let part = padded.narrow(1, dy, h.saturating_sub(1) * stride + 1)?;
            let part = part.narrow(2, dx, w.saturating_sub(1) * stride + 1)?;
            parts.push(every(&every(&part, 1, stride)?, 2, stride)?);
        }
    }
    Tensor::cat(&parts, 3)?.reshape((b * h * w, 9 * c))
}

/// Every `stride`-th along an axis.
fn every(x: &Tensor, axis: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return Ok(x.clone());
    }
    let index: Vec<u32> = (0..x.dim(axis)?).step_by(stride).map(|i| i as u32).collect();
    x.contiguous()?.index_select(&Tensor::new(index, x.device())?, axis)
}

/// A map in another size, each pixel the nearest one: (batch, .., .., channels) -> (batch, height, width, channels).
///
/// # Errors
/// If the tensor is not of four dimensions.
pub fn nearest(x: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    let index = |from: usize, to: usize| -> Result<Tensor> {
        let index: Vec<u32> = (0..to).map(|i| (i * from / to) as u32).collect();
        Tensor::new(index, x.device())
    };
    x.contiguous()?.index_select(&index(h, height)?, 1)?.index_select(&index(w, width)?, 2)
}

/// Rows of the outcome, from the `first` on.
struct Im2Col {
    sampling: Sampling,
    first: usize,
    rows: usize,
}

impl CustomOp1 for Im2Col {
    fn name(&self) -> &'static str {
        "im2col-3x3"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("im2col wants contiguous values")
        };
        let input = &storage.as_slice::<f32>()?[start..end];
        let (stride, before) = self.sampling.steps();
        let (rows, columns) = (self.rows, self.sampling.size(w));
        let mut output = vec![0f32; b * rows * columns * 9 * c];
        let line = columns * 9 * c;
        if line > 0 {
            output.par_chunks_mut(line).enumerate().for_each(|(index, line)| {
                let (image, y) = (index / rows, (self.first + index % rows) * stride);
                for dy in 0..3 {
                    let Some(from) = (y + dy).checked_sub(before).filter(|from| *from < h) else { continue };
                    let source = &input[(image * h + from) * w * c..][..w * c];
                    for (x, cell) in line.chunks_exact_mut(9 * c).enumerate() {
                        copy_cell(source, &mut cell[dy * 3 * c..][..3 * c], x * stride, before, w, c);
                    }
                }
            });
        }
        Ok((CpuStorage::F32(output), Shape::from((b * rows * columns, 9 * c))))
    }
}

/// Copies columns x - before ..= x - before + 2 of a line of (w, c), cut at the edges.
fn copy_cell(line: &[f32], target: &mut [f32], x: usize, before: usize, w: usize, c: usize) {
    let (first, last) = (x.saturating_sub(before), (x + 2 - before).min(w - 1));
    let skip = (first + before - x) * c;
    let count = (last + 1 - first) * c;
    target[skip..skip + count].copy_from_slice(&line[first * c..][..count]);
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn equals_candles_own_convolution() {
        for (b, h, w, inputs, outputs) in [(1, 1, 1, 1, 1), (2, 5, 3, 4, 7), (1, 12, 12, 48, 16), (3, 1, 6, 2, 3)] {
            let device = Device::Cpu;
            let x = Tensor::randn(0f32, 1.0, (b, inputs, h, w), &device).unwrap();
            let weight = Tensor::randn(0f32, 0.1, (outputs, inputs, 3, 3), &device).unwrap();
            let bias = Tensor::randn(0f32, 1.0, outputs, &device).unwrap();
            let below = x.pad_with_zeros(2, 0, 1).unwrap().pad_with_zeros(3, 0, 1).unwrap();
            let mut cases = vec![
                (Sampling::Every, x.conv2d(&weight, 1, 1, 1, 1).unwrap()),
                (Sampling::Second, x.conv2d(&weight, 1, 2, 1, 1).unwrap()),
            ];
            if h > 1 && w > 1 {
                cases.push((Sampling::Between, below.conv2d(&weight, 0, 2, 1, 1).unwrap()));
            }
            for (sampling, expected) in cases {
                let expected = expected.broadcast_add(&bias.reshape((1, outputs, 1, 1)).unwrap()).unwrap();
                let channels_last = x.permute((0, 2, 3, 1)).unwrap();
                let got = Conv3x3::new(&weight, &bias).unwrap().at(sampling).forward(&channels_last).unwrap();
                let got = got.permute((0, 3, 1, 2)).unwrap();
                assert_eq!(got.dims(), expected.dims(), "{sampling:?} of {h} x {w}");
                let error = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 2e-5, "{error} for {b} x {h} x {w}, {inputs} to {outputs}, {sampling:?}");
            }
        }
    }

    #[test]
    fn bands_change_nothing() {
        let weight = Tensor::randn(0f32, 0.1, (8, 64, 3, 3), &Device::Cpu).unwrap();
        let convolution = Conv3x3::new(&weight, &Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap()).unwrap();
        // More than a band in each of two images, and a last one that is not full.
        let x = Tensor::randn(0f32, 1.0, (2, 70, 110, 64), &Device::Cpu).unwrap();
        for sampling in [Sampling::Every, Sampling::Second, Sampling::Between] {
            let convolution = convolution.clone().at(sampling);
            let whole = im2col(&x, sampling).unwrap().matmul(&convolution.weight).unwrap();
            let got = convolution.forward(&x).unwrap().reshape(whole.shape()).unwrap();
            let error = (got - whole).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-5, "{error}, {sampling:?}");
        }
    }

    #[test]
    fn halves_give_what_they_give_in_f32() {
        let x = Tensor::randn(0f32, 1.0, (2, 6, 5, 16), &Device::Cpu).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let weight = Tensor::randn(0f32, 0.1, (8, 16, 3, 3), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let bias = Tensor::randn(0f32, 1.0, 8, &Device::Cpu).unwrap();
            let of = |weight: &Tensor| Conv3x3::new(weight, &bias).unwrap().forward(&x).unwrap();
            let difference = (of(&weight) - of(&weight.to_dtype(DType::F32).unwrap())).unwrap();
            assert_eq!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
    }

    #[test]
    fn the_portable_form_agrees() {
        let x = Tensor::randn(0f64, 1.0, (2, 4, 5, 3), &Device::Cpu).unwrap();
        for sampling in [Sampling::Every, Sampling::Second, Sampling::Between] {
            let portable = im2col(&x, sampling).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            let own = im2col(&x.to_dtype(DType::F32).unwrap(), sampling).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(portable, own, "{sampling:?}");
        }
    }

    #[test]
    fn nearest_pixels() {
        let x = Tensor::new(&[[[[1f32], [2.0]], [[3.0], [4.0]]]], &Device::Cpu).unwrap();
        let larger = nearest(&x, (3, 4)).unwrap().squeeze(0).unwrap().squeeze(2).unwrap();
        let wanted = [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]];
        assert_eq!(larger.to_vec2::<f32>().unwrap(), wanted);
    }
}
