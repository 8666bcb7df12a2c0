//! Weights in half precision: half the memory, and half the time to read them.
//!
//! On CPU they become f32 where they are used, piece by piece, and everything is computed in f32: what comes out is, to the bit, what the same weights give when
//! they are kept in f32. Elsewhere what is multiplied by them is brought to their type, and the product back. What lies between products (sums, norms, softmax)
//! is f32 everywhere.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use half::{bf16, f16, slice::HalfFloatSliceExt as _};
use pulp::Arch;
use rayon::prelude::*;

/// Values that one task of the thread pool makes f32.
const PIECE: usize = 64 * 1024;

/// Whether a tensor is in half precision.
pub(super) fn is_half(tensor: &Tensor) -> bool {
    matches!(tensor.dtype(), DType::F16 | DType::BF16)
}

/// x (rows, inputs), weight (inputs, outputs), perhaps in half precision -> (rows, outputs) in the type of x
pub(super) fn matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    match is_half(weight) && x.dtype() != weight.dtype() {
        false => x.matmul(weight),
        true if x.device().is_cpu() => x.matmul(&widened(weight)?),
        true => x.to_dtype(weight.dtype())?.matmul(weight)?.to_dtype(x.dtype()),
    }
}

/// A weight as it is multiplied by on its device: f32 on CPU.
pub(super) fn operand(weight: &Tensor) -> Result<Tensor> {
    if weight.device().is_cpu() { widened(weight) } else { Ok(weight.clone()) }
}

/// The same values in f32.
fn widened(weight: &Tensor) -> Result<Tensor> {
    match is_half(weight) {
        true if weight.device().is_cpu() => weight.contiguous()?.apply_op1_no_bwd(&Widen),
        true => weight.to_dtype(DType::F32),
        false => Ok(weight.clone()),
    }
}

/// The values of a weight on the CPU.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// Of a contiguous tensor.
    pub(super) fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("a kernel wants contiguous values")
        };
        Ok(match storage {
            CpuStorage::F16(values) => Self::F16(&values[from..to]),
            CpuStorage::BF16(values) => Self::Bf16(&values[from..to]),
            other => Self::F32(&other.as_slice::<f32>()?[from..to]),
        })
    }

    /// Some of them as f32, from `start` on.
    pub(super) fn widen(self, start: usize, to: &mut [f32]) {
        let range = start..start + to.len();
        match self {
            Self::F32(values) => to.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(to),
            // The first half of an f32.
            Self::Bf16(values) => Arch::new().dispatch(|| {
                for (to, value) in to.iter_mut().zip(&values[range.clone()]) {
                    *to = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }),
        }
    }
}

struct Widen;

impl CustomOp1 for Widen {
    fn name(&self) -> &'static str {
        "widen"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = Values::of(storage, layout)?;
        let mut wide = vec![0f32; layout.shape().elem_count()];
        wide.par_chunks_mut(PIECE).enumerate().for_each(|(index, piece)| values.widen(index * PIECE, piece));
        Ok((CpuStorage::F32(wide), layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn wide_values_are_the_same() {
        let x = Tensor::randn(0f32, 3.0, (300, 301), &Device::Cpu).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let half = x.to_dtype(dtype).unwrap();
            let wide = widened(&half).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(wide, half.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap());
            let turned = widened(&half.t().unwrap()).unwrap();
            assert_eq!(turned.t().unwrap().to_vec2::<f32>().unwrap(), wide);
        }
    }
}
