//! `x W` for few rows.
//!
//! A general product of matrices first copies W into the order in which it reads it. With the rows of one prompt or one small picture that takes
//! longer than the product. Here W is read as it lies, outputs side by side: a tile of rows and outputs is kept in registers while it runs
//! through the inputs. Each value is a sum in the order of the inputs, whatever other rows there are.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    half::{self, Values},
    ops::{is_ours, slice},
};

/// Most rows for which it is the quicker way. Up to as many, a row's values do not depend on the others.
pub const MAX_ROWS: usize = 160;
/// Multiplications that one task of the thread pool does at least.
const GRAIN: usize = 512 * 1024;
/// Outputs of the widest tile on the widest vectors.
const WIDEST: usize = 64;

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
        let grain = (GRAIN / (rows * inputs).max(1)).next_multiple_of(WIDEST).max(WIDEST);
        let parts: Vec<Range<usize>> =
            (0..outputs).step_by(grain).map(|start| start..(start + grain).min(outputs)).collect();
        let columns: Vec<Vec<f32>> = parts
            .par_iter()
            .map(|part| match w {
                Values::F32(w) => Arch::new().dispatch(Columns { x, w, inputs, outputs, part: part.clone() }),
                _ => {
                    // Their columns, in f32.
                    let mut columns = vec![0f32; inputs * part.len()];
                    for (input, columns) in columns.chunks_exact_mut(part.len()).enumerate() {
                        w.widen(input * outputs + part.start, columns);
                    }
                    let part = 0..part.len();
                    Arch::new().dispatch(Columns { x, w: &columns, inputs, outputs: part.len(), part })
                }
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

/// Some outputs of all rows: (rows, part)
struct Columns<'a> {
    x: &'a [f32],
    w: &'a [f32],
    inputs: usize,
    outputs: usize,
    part: Range<usize>,
}

impl WithSimd for Columns<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self { x, inputs, ref part, .. } = self;
        let (rows, width) = (x.len() / inputs.max(1), part.len());
        let mut y = vec![0f32; rows * width];
        // Tiles as large as fit into the registers: of 32 vectors 6 x 4, of 16 vectors 6 x 2.
        let widest = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let mut at = 0;
        while at < width {
            let vectors = ((width - at) / S::F32_LANES).min(widest);
            let mut row = 0;
            while row < rows {
                row += match vectors {
                    4 => self.some_rows::<S, 4>(simd, row, rows - row, at, &mut y),
                    2 | 3 => self.some_rows::<S, 2>(simd, row, rows - row, at, &mut y),
                    1 => self.some_rows::<S, 1>(simd, row, rows - row, at, &mut y),
                    _ => self.rest(row, at, &mut y),
                };
            }
            at += match vectors {
                0 => width - at,
                3 => 2 * S::F32_LANES,
                vectors => vectors * S::F32_LANES,
            };
        }
        y
    }
}

impl Columns<'_> {
    /// As many of the `left` rows as fit into a tile. Returns how many.
    #[inline(always)]
    fn some_rows<S: Simd, const VECTORS: usize>(
        &self,
        simd: S,
        row: usize,
        left: usize,
        at: usize,
        y: &mut [f32],
    ) -> usize {
        match left {
            6.. => self.tile::<S, 6, VECTORS>(simd, row, at, y),
            4.. => self.tile::<S, 4, VECTORS>(simd, row, at, y),
            2.. => self.tile::<S, 2, VECTORS>(simd, row, at, y),
            _ => self.tile::<S, 1, VECTORS>(simd, row, at, y),
        }
    }

    /// `ROWS` rows of `VECTORS` vectors of outputs, from `row` and output `at` of the part on. Returns `ROWS`.
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        row: usize,
        at: usize,
        y: &mut [f32],
    ) -> usize {
        let length = VECTORS * S::F32_LANES;
        let mut x = [&[][..]; ROWS];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + r) * self.inputs..][..self.inputs];
        }
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        let mut weights = &self.w[self.part.start + at..];
        for input in 0..self.inputs {
            let (vectors, _) = S::as_simd_f32s(&weights[..length]);
            let mut w = [simd.splat_f32s(0.0); VECTORS];
            w.copy_from_slice(vectors);
            for r in 0..ROWS {
                let x = simd.splat_f32s(x[r][input]);
                for v in 0..VECTORS {
                    sums[r][v] = simd.mul_add_f32s(x, w[v], sums[r][v]);
                }
            }
            weights = weights.get(self.outputs..).unwrap_or_default();
        }
        let width = self.part.len();
        for (r, sums) in sums.iter().enumerate() {
            let (to, _) = S::as_mut_simd_f32s(&mut y[(row + r) * width + at..][..length]);
            to.copy_from_slice(sums);
        }
        ROWS
    }

    /// What is left of a row's outputs, from `at` of the part on, when no vector is full. Returns 1.
    fn rest(&self, row: usize, at: usize, y: &mut [f32]) -> usize {
        let width = self.part.len();
        for (input, x) in self.x[row * self.inputs..][..self.inputs].iter().enumerate() {
            let w = &self.w[input * self.outputs..][self.part.start + at..self.part.end];
            for (y, w) in y[row * width + at..(row + 1) * width].iter_mut().zip(w) {
                *y = x.mul_add(*w, *y);
            }
        }
        1
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn values_agree_with_f64_and_do_not_depend_on_other_rows() {
        for (rows, inputs, outputs) in
            [(1, 1, 1), (2, 16, 4), (7, 33, 9), (26, 576, 192), (13, 100, 1023), (160, 64, 6)]
        {
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
