//! Affine maps.

use candle_core::{D, Result, Tensor};

use crate::weights::Weights;

/// `x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// (out, in)
    weight: Tensor,
    /// (out)
    bias: Option<Tensor>,
}

impl Linear {
    /// Without bias: takes `{name}.weight`.
    pub fn new(weights: &mut Weights, name: &str, inputs: usize, outputs: usize) -> Self {
        Self { weight: weights.get(&format!("{name}.weight"), &[outputs, inputs]), bias: None }
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
        let weight = weights.get(&format!("{name}.weight"), &[outputs, inputs, 1, 1]).reshape((outputs, inputs))?;
        Ok(Self { weight, bias: Some(weights.get(&format!("{name}.bias"), &[outputs])) })
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
        let y = x.reshape((rows, inputs))?.matmul(&self.weight.t()?)?;
        if let Some(last) = shape.last_mut() {
            *last = self.weight.dim(0)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias)?.reshape(shape),
            None => y.reshape(shape),
        }
    }
}
