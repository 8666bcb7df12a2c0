//! Affine maps.

use candle_core::{D, DType, Device, Result, Tensor};

use super::product::product;
use crate::weights::Weights;

/// `x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// (in, out): the order in which a product reads it
    weight: Tensor,
    /// (out)
    bias: Option<Tensor>,
}

impl Linear {
    /// Without bias: takes `{name}.weight`.
    pub fn new(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Self {
        let weight = weights.matrix(&format!("{name}.weight"), &[outputs, inputs]);
        Self { weight: transposed(weight), bias: None }
    }

    /// The same for a map whose inputs f16 does not hold: where a weight's type is that of its inputs too, f16 becomes f32.
    pub fn beyond_f16(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Self {
        let weight = weights.matrix(&format!("{name}.weight"), &[outputs, inputs]);
        let wide = match weight.dtype() == DType::F16 && !weight.device().is_cpu() {
            true => weight.to_dtype(DType::F32).expect("floats can be converted"),
            false => weight,
        };
        Self { weight: transposed(wide), bias: None }
    }

    /// With bias: takes `{name}.weight` and `{name}.bias`.
    pub fn with_bias(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Self {
        let bias = Some(weights.get(&format!("{name}.bias"), &[outputs]));
        Self { bias, ..Self::new(weights, name, inputs, outputs) }
    }

    /// A 1 x 1 convolution as a map of channels, for maps that keep channels last: takes `{name}.weight` of (out, in, 1, 1) and
    /// `{name}.bias`.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn of_convolution(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        Self::of_patches(weights, name, inputs, 1, outputs)
    }

    /// The same without bias.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn of_plain_convolution(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        Self::kernel(weights, name, inputs, 1, outputs)
    }

    /// A convolution whose stride is its side as a map of patches, whose values are ordered by channel, row and column: takes `{name}.weight` of
    /// (out, in, side, side) and `{name}.bias`.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn of_patches(weights: &mut Weights, name: &str, inputs: usize, side: usize, outputs: usize) -> Result<Self> {
        let plain = Self::kernel(weights, name, inputs, side, outputs)?;
        Ok(Self { bias: Some(weights.get(&format!("{name}.bias"), &[outputs])), ..plain })
    }

    fn kernel(weights: &mut Weights, name: &str, inputs: usize, side: usize, outputs: usize) -> Result<Self> {
        let weight = flattened(weights, name, &[outputs, inputs, side, side])?;
        Ok(Self { weight, bias: None })
    }

    /// A convolution over films whose stride is its kernel as a map of patches, whose values are ordered by channel, frame, row and column: takes `{name}.weight` of
    /// (out, channels, frames, side, side), and `{name}.bias` if there is one.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn of_films(
        weights: &mut Weights,
        name: &str,
        [channels, frames, side]: [usize; 3],
        outputs: usize,
        biased: bool,
    ) -> Result<Self> {
        let weight = flattened(weights, name, &[outputs, channels, frames, side, side])?;
        Ok(Self { weight, bias: biased.then(|| weights.get(&format!("{name}.bias"), &[outputs])) })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.weight.device()
    }

    /// The same on another device.
    ///
    /// # Errors
    /// If it does not take the weights.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_device(device)).transpose()?;
        Ok(Self { weight: self.weight.to_device(device)?, bias })
    }

    /// (.., in) -> (.., out)
    ///
    /// # Errors
    /// If the width does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let inputs = x.dim(D::Minus1)?;
        let rows = x.elem_count() / inputs.max(1);
        // One product of matrices, whatever the axes in front.
        let y = product(&x.reshape((rows, inputs))?, &self.weight)?;
        if let Some(last) = shape.last_mut() {
            *last = self.weight.dim(1)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias)?.reshape(shape),
            None => y.reshape(shape),
        }
    }
}

/// A kernel (out, ..) as (values of a patch, out).
fn flattened(weights: &mut Weights, name: &str, shape: &[usize]) -> Result<Tensor> {
    let (outputs, values) = (shape[0], shape[1..].iter().product());
    weights.matrix_as(&format!("{name}.weight"), shape, &[values, outputs], |weight| {
        weight.reshape((outputs, values))?.t()?.contiguous()
    })
}

/// (out, in) -> (in, out). What stands in for a missing tensor has no values of its own and is given none: its size may be absurd.
fn transposed(weight: Tensor) -> Tensor {
    let turned = weight.t().expect("a matrix can be turned");
    if weight.is_contiguous() { turned.contiguous().expect("values can be copied") } else { turned }
}
