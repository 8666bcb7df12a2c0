//! 3 x 3 convolution of maps kept as (batch, height, width, channels), by im2col and one matrix product.
//!
//! candle's own CPU convolution takes 3 times as long on maps of 64 x 64 and more. Channels last means that a row of the
//! im2col matrix is nine copies of contiguous channels, and that norms over channels read contiguous memory.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::weights::Weights;

/// A 3 x 3 convolution, stride 1, padding 1.
#[derive(Debug, Clone)]
pub struct Conv3x3 {
    /// (9 in, out)
    weight: Tensor,
    /// (out)
    bias: Tensor,
}

impl Conv3x3 {
    /// From a weight of (out, in, 3, 3) and a bias of (out), as PyTorch stores them.
    ///
    /// # Errors
    /// If the shapes are others.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let (outputs, inputs, 3, 3) = weight.dims4()? else {
            candle_core::bail!("a kernel of {:?} is not 3 x 3", weight.dims())
        };
        let bias = bias.reshape(outputs)?;
        // (out, in, 3, 3) -> (3, 3, in, out) -> (9 in, out)
        let weight = weight.permute((2, 3, 1, 0))?.contiguous()?.reshape((9 * inputs, outputs))?;
        Ok(Self { weight, bias })
    }

    /// Takes `{name}.weight` of (out, in, 3, 3) and `{name}.bias`.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn load(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"), &[outputs, inputs, 3, 3]);
        Self::new(&weight, &weights.get(&format!("{name}.bias"), &[outputs]))
    }

    /// (batch, height, width, in) -> (batch, height, width, out)
    ///
    /// # Errors
    /// If the channels do not agree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = x.dims4()?;
        let rows = im2col(x)?; // (b h w, 9 in)
        rows.matmul(&self.weight)?.broadcast_add(&self.bias)?.reshape((b, h, w, self.bias.elem_count()))
    }
}

/// (batch, height, width, channels) -> (batch height width, 9 channels): each pixel's neighbourhood, row by row, zeros outside.
///
/// # Errors
/// If the tensor is not of four dimensions.
pub fn im2col(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        return x.contiguous()?.apply_op1_no_bwd(&Im2Col);
    }
    let padded = x.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
    let mut parts = Vec::with_capacity(9);
    for dy in 0..3 {
        for dx in 0..3 {
            parts.push(padded.narrow(1, dy, h)?.narrow(2, dx, w)?);
        }
    }
    Tensor::cat(&parts, 3)?.reshape((b * h * w, 9 * c))
}

struct Im2Col;

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
        let mut output = vec![0f32; b * h * w * 9 * c];
        let line = w * 9 * c;
        if line > 0 {
            output.par_chunks_mut(line).enumerate().for_each(|(index, line)| {
                let (image, y) = (index / h, index % h);
                for dy in 0..3 {
                    let Some(from) = (y + dy).checked_sub(1).filter(|from| *from < h) else { continue };
                    let source = &input[(image * h + from) * w * c..][..w * c];
                    copy_line(source, line, dy, w, c);
                }
            });
        }
        Ok((CpuStorage::F32(output), Shape::from((b * h * w, 9 * c))))
    }
}

/// Copies a source line of (w, c) to the places that see it as their row `dy`.
fn copy_line(source: &[f32], line: &mut [f32], dy: usize, w: usize, c: usize) {
    for (x, cell) in line.chunks_exact_mut(9 * c).enumerate() {
        let target = &mut cell[dy * 3 * c..][..3 * c];
        // Columns x - 1 ..= x + 1, cut at the edges.
        let (first, last) = (x.saturating_sub(1), (x + 1).min(w - 1));
        let skip = (first + 1 - x) * c;
        let count = (last + 1 - first) * c;
        target[skip..skip + count].copy_from_slice(&source[first * c..][..count]);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn equals_candles_own_convolution() {
        for (b, h, w, inputs, outputs) in [(1, 1, 1, 1, 1), (2, 5, 3, 4, 7), (1, 12, 12, 48, 16), (3, 1, 6, 2, 3)] {
            let device = Device::Cpu;
            let x = Tensor::randn(0f32, 1.0, (b, inputs, h, w), &device).unwrap();
            let weight = Tensor::randn(0f32, 0.1, (outputs, inputs, 3, 3), &device).unwrap();
            let bias = Tensor::randn(0f32, 1.0, outputs, &device).unwrap();
            let expected = x.conv2d(&weight, 1, 1, 1, 1).unwrap();
            let expected = expected.broadcast_add(&bias.reshape((1, outputs, 1, 1)).unwrap()).unwrap();
            let channels_last = x.permute((0, 2, 3, 1)).unwrap();
            let got = Conv3x3::new(&weight, &bias).unwrap().forward(&channels_last).unwrap();
            let got = got.permute((0, 3, 1, 2)).unwrap();
            let error = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 2e-5, "{error} for {b} x {h} x {w}, {inputs} to {outputs}");
        }
    }

    #[test]
    fn the_portable_form_agrees() {
        let x = Tensor::randn(0f64, 1.0, (2, 4, 5, 3), &Device::Cpu).unwrap();
        let portable = im2col(&x).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let own = im2col(&x.to_dtype(DType::F32).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(portable, own);
    }
}
