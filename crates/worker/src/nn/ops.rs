//! Element-wise operations and norms.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor};

use serde::Deserialize;

use super::kernels;

/// Whether our kernels take a tensor.
pub(super) fn is_ours(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// The values of a contiguous f32 tensor.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a kernel wants contiguous values"),
    }
}

/// Token ids, u32 (batch, tokens) -> their rows of a table (vocabulary, width), perhaps in half precision: (batch, tokens, width) in f32
///
/// # Errors
/// If an id is not of the vocabulary.
pub(super) fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (batch, tokens) = ids.dims2()?;
    let rows = table.index_select(&ids.flatten_all()?, 0)?;
    rows.to_dtype(DType::F32)?.reshape((batch, tokens, table.dim(1)?))
}

/// An activation, as configurations name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Activation {
    /// `x sigmoid(x)`
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// GELU by the error function.
    #[serde(rename = "gelu")]
    Gelu,
    /// GELU in its tanh form.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// `x sigmoid(1.702 x)`
    #[serde(rename = "quick_gelu")]
    QuickGelu,
}

/// An activation of every value, any shape.
pub fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => silu(x),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => gelu(x),
        Activation::QuickGelu => silu(&(x * 1.702)?)? / 1.702,
    }
}

/// `x sigmoid(x)`, any shape.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if is_ours(x) { x.contiguous()?.apply_op1_no_bwd(&Map("silu", kernels::silu)) } else { x.silu() }
}

/// GELU in its tanh form, any shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if is_ours(x) { x.contiguous()?.apply_op1_no_bwd(&Map("gelu", kernels::gelu)) } else { x.gelu() }
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last axis. weight: (width)
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if weight.dims() != [x.dim(D::Minus1)?] {
        candle_core::bail!("a norm of {:?} does not fit values of {:?}", weight.dims(), x.dims());
    }
    match is_ours(x) {
        true => x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &RmsNorm { eps: eps as f32 }),
        false => portable_norm(x, eps)?.broadcast_mul(weight),
    }
}

fn portable_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)
}

/// Adaptive norm: RMS norm without weight, then `y (1 + scale) + shift`. x: (rows, tokens, width); scale, shift: (rows, width)
pub fn modulated_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, _, width) = x.dims3()?;
    if scale.dims() != [rows, width] || shift.dims() != [rows, width] {
        candle_core::bail!("modulation of {:?} and {:?} does not fit {:?}", scale.dims(), shift.dims(), x.dims());
    }
    if is_ours(x) {
        let op = ModulatedNorm { eps: eps as f32 };
        return x.contiguous()?.apply_op3_no_bwd(&scale.contiguous()?, &shift.contiguous()?, &op);
    }
    portable_norm(x, eps)?.broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?.broadcast_add(&shift.unsqueeze(1)?)
}

/// `x + gate y`. x, y: (rows, tokens, width); gate: (rows, width)
pub fn gated_sum(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let (rows, _, width) = x.dims3()?;
    if gate.dims() != [rows, width] || y.dims() != x.dims() {
        candle_core::bail!("a gate of {:?} does not fit {:?} and {:?}", gate.dims(), x.dims(), y.dims());
    }
    match is_ours(x) {
        true => x.contiguous()?.apply_op3_no_bwd(&y.contiguous()?, &gate.contiguous()?, &GatedSum),
        false => x + y.broadcast_mul(&gate.unsqueeze(1)?)?,
    }
}

struct Map(&'static str, fn(&[f32]) -> Vec<f32>);

impl CustomOp1 for Map {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.1(slice(x, layout)?)), layout.shape().clone()))
    }
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(kernels::rms_norm(slice(x, lx)?, slice(w, lw)?, self.eps)), lx.shape().clone()))
    }
}

struct ModulatedNorm {
    eps: f32,
}

impl CustomOp3 for ModulatedNorm {
    fn name(&self) -> &'static str {
        "modulated-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        scale: &CpuStorage,
        ls: &Layout,
        shift: &CpuStorage,
        lh: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, tokens, width) = lx.shape().dims3()?;
        let (x, scale, shift) = (slice(x, lx)?, slice(scale, ls)?, slice(shift, lh)?);
        Ok((CpuStorage::F32(kernels::modulated_norm(x, scale, shift, tokens, width, self.eps)), lx.shape().clone()))
    }
}

struct GatedSum;

impl CustomOp3 for GatedSum {
    fn name(&self) -> &'static str {
        "gated-sum"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
        gate: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, tokens, width) = lx.shape().dims3()?;
        let (x, y, gate) = (slice(x, lx)?, slice(y, ly)?, slice(gate, lg)?);
        Ok((CpuStorage::F32(kernels::gated_sum(x, y, gate, tokens, width)), lx.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn random(shape: impl Into<Shape>) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// Our kernels are compared with the portable form, which f64 takes.
    fn agree(ours: Result<Tensor>, portable: Result<Tensor>) {
        let difference = (ours.unwrap().to_dtype(DType::F64).unwrap() - portable.unwrap()).unwrap();
        let error = difference.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn kernels_agree_with_the_portable_form() {
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let x = random((2, 3, 50)).transpose(0, 1).unwrap();
        agree(silu(&x), silu(&wide(&x)));
        agree(gelu(&x), gelu(&wide(&x)));
        let weight = random(50);
        agree(rms_norm(&x, &weight, 1e-5), rms_norm(&wide(&x), &wide(&weight), 1e-5));
        let modulation = random((3, 150));
        let part = |i: usize| modulation.narrow(1, 50 * i, 50).unwrap();
        agree(
            modulated_norm(&x, &part(0), &part(1), 1e-6),
            modulated_norm(&wide(&x), &wide(&part(0)), &wide(&part(1)), 1e-6),
        );
        let y = random((3, 2, 50));
        agree(gated_sum(&x, &y, &part(2)), gated_sum(&wide(&x), &wide(&y), &wide(&part(2))));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let x = random((2, 3, 4));
        assert!(rms_norm(&x, &random(5), 1e-5).is_err());
        assert!(modulated_norm(&x, &random((2, 4)), &random((1, 4)), 1e-5).is_err());
        assert!(gated_sum(&x, &random((2, 3, 3)), &random((2, 4))).is_err());
    }
}
