//! `x W` for few rows.
//!
//! A general product of matrices first copies all of W into the order in which it reads it, which with the rows of one prompt or one small picture takes
//! as long as the product itself. Here a piece of W, as much of some columns as a core's cache holds, is copied as it lies, and all rows pass it by tiles in registers. It is
//! copied because each of its lines is read once for six rows, and lines that lie a multiple of 4 kB apart, as those of most matrices do, fall into the same few places of
//! a cache. Each value is a sum in the order of the inputs, whatever other rows there are.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::{
    half::{self, Values},
    ops::{is_ours, slice},
    tile::{Columns, WIDEST},
};

/// Most rows for which it is the quicker way. Up to as many, a row's values do not depend on the others.
pub const MAX_ROWS: usize = 160;
/// Multiplications that one task of the thread pool does at least.
const GRAIN: usize = 512 * 1024;
/// Tasks for each thread, where there is enough to do: the last one to end is not long alone.
const TASKS: usize = 4;
/// Inputs of a piece of W.
const INPUTS: usize = 256;
/// Columns of a piece of a W that is large: with so many inputs 256 kB.
const COLUMNS: usize = 256;
/// How much further apart the lines of a piece are than they are long, so that they do not fall into the same few places of a cache.
const PAD: usize = 16;

/// x (rows, inputs), weight (inputs, outputs), perhaps in half precision -> (rows, outputs)
///
/// # Errors
/// If the inputs differ.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let known = is_ours(weight) || (weight.device().is_cpu() && half::is_half(weight));
    let ours = is_ours(x) && known && weight.is_contiguous() && (1..=MAX_ROWS).contains(&x.dim(0)?);
    if ours && x.dim(1)? == weight.dim(0)? {
        return x.contiguous()?.apply_op2_no_bwd(weight, &Product);
    }
    half::matmul(x, weight)
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((rows, inputs), (_, outputs)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let (x, w) = (slice(x, lx)?, Values::of(w, lw)?);
        let even = outputs.div_ceil(TASKS * rayon::current_num_threads()).min(COLUMNS);
        let grain = (GRAIN / (rows * inputs).max(1)).max(even).next_multiple_of(WIDEST);
        let parts: Vec<Range<usize>> =
            (0..outputs).step_by(grain).map(|start| start..(start + grain).min(outputs)).collect();
        let columns: Vec<Vec<f32>> = parts
            .par_iter()
            .map(|part| {
                let (width, w_stride) = (part.len(), part.len() + PAD);
                let mut piece = vec![0f32; inputs.min(INPUTS) * w_stride];
                let mut y = vec![0f32; rows * width];
                for first in (0..inputs).step_by(INPUTS) {
                    let some = INPUTS.min(inputs - first);
                    for (input, columns) in piece.chunks_exact_mut(w_stride).take(some).enumerate() {
                        w.widen((first + input) * outputs + part.start, &mut columns[..width]);
                    }
                    Arch::new().dispatch(Columns {
                        x: &x[first..],
                        rows,
                        x_stride: inputs,
                        inputs: some,
                        w: &piece,
                        w_stride,
                        width,
                        y: &mut y,
                        y_stride: width,
                        begun: first > 0,
                    });
                }
                y
            })
            .collect();
        let mut y = vec![0f32; rows * outputs];
        for (part, columns) in parts.iter().zip(&columns) {
            let to = y.chunks_exact_mut(outputs.max(1));
            for (to, from) in to.zip(columns.chunks_exact(part.len())) {
                to[part.clone()].copy_from_slice(from);
            }
        }
        Ok((CpuStorage::F32(y), (rows, outputs).into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn values_agree_with_f64_and_do_not_depend_on_other_rows() {
        for (rows, inputs, outputs) in [
            (1, 1, 1),
            (2, 16, 4),
            (7, 33, 9),
            (26, 576, 192),
            (13, 100, 1023),
            (160, 64, 6),
            (9, 700, 1300),
            (1, 257, 5000),
        ] {
            let x = Tensor::randn(0f32, 1.0, (rows, inputs), &Device::Cpu).unwrap();
            let w = Tensor::randn(0f32, 1.0, (inputs, outputs), &Device::Cpu).unwrap();
            let ours = product(&x, &w).unwrap();
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let difference = (wide(&ours) - wide(&x).matmul(&wide(&w)).unwrap()).unwrap();
            let error = difference.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(error < 1e-5 * (inputs as f64).sqrt() * 4.0, "{rows} x {inputs} x {outputs}: {error}");
            let last = product(&x.narrow(0, rows - 1, 1).unwrap(), &w).unwrap();
            let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(ours.narrow(0, rows - 1, 1).unwrap()), values(last));
        }
    }

    #[test]
    fn halves_give_what_they_give_in_f32() {
        for dtype in [DType::F16, DType::BF16] {
            for (rows, inputs, outputs) in [(1, 5, 3), (7, 33, 70), (26, 576, 1000), (200, 64, 48)] {
                let x = Tensor::randn(0f32, 1.0, (rows, inputs), &Device::Cpu).unwrap();
                let w = Tensor::randn(0f32, 1.0, (inputs, outputs), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let wide = product(&x, &w.to_dtype(DType::F32).unwrap()).unwrap();
                assert_eq!(product(&x, &w).unwrap().to_vec2::<f32>().unwrap(), wide.to_vec2::<f32>().unwrap());
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let zeros = |a, b| Tensor::zeros((a, b), DType::F32, &Device::Cpu).unwrap();
        assert!(product(&zeros(2, 3), &zeros(4, 5)).is_err());
        assert_eq!(product(&zeros(0, 3), &zeros(3, 4)).unwrap().dims(), [0, 4]);
    }
}
