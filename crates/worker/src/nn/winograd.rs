//! 3 x 3 convolution of every pixel by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015): four
//! pixels of an output for 16 multiplications by input channel, where sums themselves take 36.
//!
//! A tile is 4 x 4 pixels of the input; tiles are two pixels apart. Input tiles and kernels are transformed, by additions and halving, into 16 numbers each; these are
//! multiplied and summed over input channels, as 16 products of matrices; each 16 sums are transformed into 2 x 2 pixels. Kernels are transformed each time: they would take
//! 16/9 of the memory if they were kept, and it takes little time beside the products of a map that is large enough.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    ops::slice,
    tile::{Columns, Width},
};

/// Fewest tiles of a map for which it pays to transform the kernels.
const FEWEST_TILES: usize = 128;
/// Channels come in vectors, of which this is a multiple on every processor.
const CHANNELS: usize = 16;
/// Tiles that are computed together.
const BLOCK: usize = 96;
/// Strips of outputs whose kernels one task transforms.
const STRIPS: usize = 8;
/// What lies 16 times side by side is further apart by this: else all 16 would fall into the same few lines of a cache.
const PAD: usize = 16;
/// Values of transformed kernels that are held at once: 16 MB.
const HELD: usize = 4 << 20;

/// Whether it is the quicker way for a map of this size.
pub(super) fn pays((height, width): (usize, usize), inputs: usize, outputs: usize) -> bool {
    let even = |channels: usize| channels > 0 && channels.is_multiple_of(CHANNELS);
    height.div_ceil(2) * width.div_ceil(2) >= FEWEST_TILES && even(inputs) && even(outputs)
}

/// x (batch, height, width, in), weight (9 in, out) -> (batch, height, width, out)
pub(super) struct Winograd {
    /// (out)
    pub(super) bias: Vec<f32>,
}

impl CustomOp2 for Winograd {
    fn name(&self) -> &'static str {
        "winograd"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, inputs) = lx.shape().dims4()?;
        let (rows, outputs) = lw.shape().dims2()?;
        if rows != 9 * inputs || self.bias.len() != outputs {
            candle_core::bail!("a map of {inputs} channels, a kernel of {:?}, {} biases", lw.shape(), self.bias.len());
        }
        let map = Map { height, width, inputs, outputs };
        let y = map.convolved(slice(x, lx)?, slice(w, lw)?, &self.bias);
        Ok((CpuStorage::F32(y), (batch, height, width, outputs).into()))
    }
}

/// The sizes of a convolution.
#[derive(Debug, Clone, Copy)]
struct Map {
    height: usize,
    width: usize,
    inputs: usize,
    outputs: usize,
}

impl Map {
    fn convolved(self, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let Self { height, width, inputs, outputs } = self;
        let strip = Arch::new().dispatch(Width);
        let group = (HELD / (16 * inputs)).max(1).next_multiple_of(strip);
        let (across, image) = (width.div_ceil(2), height * width);
        // Blocks of one image are shared out evenly.
        let (down, threads) = (height.div_ceil(2), rayon::current_num_threads());
        let blocks = (down * across).div_ceil(BLOCK).next_multiple_of(threads);
        let lines = 2 * down.div_ceil(blocks);
        let mut y = vec![0f32; x.len() / inputs * outputs];
        let mut kernels = Vec::new();
        for first in (0..outputs).step_by(group) {
            let some = first..(first + group).min(outputs);
            let kernels = Kernels::new(weight, self, some, strip, &mut kernels);
            let (images, maps) = (y.par_chunks_mut(image * outputs), x.par_chunks(image * inputs));
            images.zip(maps).for_each(|(image, x)| {
                let blocks = image.par_chunks_mut(lines * width * outputs).enumerate();
                blocks.for_each_init(Scratch::default, |scratch, (block, y)| {
                    Arch::new().dispatch(Block {
                        map: self,
                        kernels: &kernels,
                        x,
                        bias,
                        line: block * lines,
                        y,
                        scratch,
                    });
                });
            });
        }
        y
    }
}

/// The transformed kernels of some outputs: (strips, 16, in, strip), zeros beyond the last output; the 16 are further apart by [`PAD`].
struct Kernels<'a> {
    values: &'a [f32],
    outputs: Range<usize>,
    strip: usize,
}

impl<'a> Kernels<'a> {
    fn new(weight: &[f32], map: Map, outputs: Range<usize>, strip: usize, values: &'a mut Vec<f32>) -> Self {
        let one = 16 * (map.inputs * strip + PAD);
        values.resize(outputs.len().div_ceil(strip) * one, 0.0);
        let tasks = values.par_chunks_mut(one * STRIPS).enumerate();
        tasks.for_each(|(task, to)| {
            let first = outputs.start + task * STRIPS * strip;
            let outputs = first..(first + STRIPS * strip).min(outputs.end);
            Arch::new().dispatch(Strips { weight, map, outputs, to, strip });
        });
        Self { values, outputs, strip }
    }

    /// (in, strip): the numbers of this index among the 16, of the strip of this output.
    fn of(&self, inputs: usize, output: usize, index: usize) -> &[f32] {
        let one = inputs * self.strip;
        &self.values[(output / self.strip * 16 + index) * (one + PAD)..][..one]
    }
}

/// Some strips of transformed kernels.
struct Strips<'a> {
    weight: &'a [f32],
    map: Map,
    outputs: Range<usize>,
    to: &'a mut [f32],
    strip: usize,
}

impl WithSimd for Strips<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Map { inputs, outputs, .. } = self.map;
        let apart = inputs * self.strip + PAD;
        for input in 0..inputs {
            for at in (0..self.outputs.len()).step_by(S::F32_LANES) {
                let g = |row: usize, column: usize| {
                    let start = ((3 * row + column) * inputs + input) * outputs + self.outputs.start + at;
                    load::<S>(&self.weight[start..])
                };
                let mut columns = [[simd.splat_f32s(0.0); 4]; 3];
                for (column, values) in columns.iter_mut().enumerate() {
                    *values = of_kernel(simd, [g(0, column), g(1, column), g(2, column)]);
                }
                let to = &mut self.to[at / self.strip * 16 * apart + input * self.strip + at % self.strip..];
                for row in 0..4 {
                    let values = of_kernel(simd, [columns[0][row], columns[1][row], columns[2][row]]);
                    for (column, value) in values.into_iter().enumerate() {
                        store::<S>(&mut to[(4 * row + column) * apart..], value);
                    }
                }
            }
        }
    }
}

/// What a thread computes with: transformed tiles (16, tiles, in), and products (16, tiles, out).
#[derive(Default)]
struct Scratch {
    tiles: Vec<f32>,
    products: Vec<f32>,
}

/// Some lines of one image.
struct Block<'a> {
    map: Map,
    kernels: &'a Kernels<'a>,
    /// The image.
    x: &'a [f32],
    bias: &'a [f32],
    /// The first line of y in the image, an even one.
    line: usize,
    /// The lines.
    y: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Map { width, inputs, outputs, .. } = self.map;
        let lines = self.y.len() / (width * outputs);
        let across = width.div_ceil(2);
        let tiles = lines.div_ceil(2) * across;
        let Kernels { outputs: some, strip, .. } = self.kernels;
        let Scratch { tiles: transformed, products } = self.scratch;
        let (x_apart, y_apart) = (tiles * inputs + PAD, tiles * some.len() + PAD);
        transformed.resize(16 * x_apart, 0.0);
        products.resize(16 * y_apart, 0.0);
        for tile in 0..tiles {
            let place =
                Place { x: self.x, map: self.map, line: self.line + 2 * (tile / across), column: 2 * (tile % across) };
            place.transform(simd, &mut transformed[tile * inputs..], x_apart);
        }
        for (index, y) in products.chunks_exact_mut(y_apart).enumerate() {
            let x = &transformed[index * x_apart..][..tiles * inputs];
            for at in (0..some.len()).step_by(*strip) {
                let w = self.kernels.of(inputs, at, index);
                let (width, y, y_stride) = (*strip.min(&(some.len() - at)), &mut y[at..], some.len());
                let (rows, x_stride, w_stride) = (tiles, inputs, *strip);
                Columns { x, rows, x_stride, inputs, w, w_stride, width, y, y_stride, begun: false }.with_simd(simd);
            }
        }
        for tile in 0..tiles {
            let (line, column) = (2 * (tile / across), 2 * (tile % across));
            for at in (0..some.len()).step_by(S::F32_LANES) {
                let bias = load::<S>(&self.bias[some.start + at..]);
                let sums = |row: usize, column: usize| {
                    load::<S>(&products[(4 * row + column) * y_apart + tile * some.len() + at..])
                };
                let mut columns = [[bias; 2]; 4];
                for (column, values) in columns.iter_mut().enumerate() {
                    *values = of_sums(simd, [sums(0, column), sums(1, column), sums(2, column), sums(3, column)]);
                }
                let [a, b, c, d] = columns;
                let pixels = [of_sums(simd, [a[0], b[0], c[0], d[0]]), of_sums(simd, [a[1], b[1], c[1], d[1]])];
                for (row, pixels) in pixels.into_iter().enumerate().take(lines - line) {
                    for (right, pixel) in pixels.into_iter().take(width - column).enumerate() {
                        let start = ((line + row) * width + column + right) * outputs + some.start + at;
                        store::<S>(&mut self.y[start..], simd.add_f32s(pixel, bias));
                    }
                }
            }
        }
    }
}

/// A tile of the input, of whose four inner pixels the first is given.
struct Place<'a> {
    x: &'a [f32],
    map: Map,
    line: usize,
    column: usize,
}

impl Place<'_> {
    /// The tile transformed: 16 rows of all channels, `apart` from each other.
    #[inline(always)]
    fn transform<S: Simd>(&self, simd: S, to: &mut [f32], apart: usize) {
        let Map { height, width, inputs, .. } = self.map;
        // Pixels of the tile; none outside of the map.
        let mut pixels = [[None; 4]; 4];
        for (row, pixels) in pixels.iter_mut().enumerate() {
            for (column, pixel) in pixels.iter_mut().enumerate() {
                let line = (self.line + row).checked_sub(1).filter(|line| *line < height);
                let column = (self.column + column).checked_sub(1).filter(|column| *column < width);
                *pixel = line.zip(column).map(|(line, column)| &self.x[(line * width + column) * inputs..][..inputs]);
            }
        }
        let zeros = simd.splat_f32s(0.0);
        for at in (0..inputs).step_by(S::F32_LANES) {
            let mut rows = [[zeros; 4]; 4];
            for (row, pixels) in rows.iter_mut().zip(&pixels) {
                for (value, pixel) in row.iter_mut().zip(pixels) {
                    if let Some(pixel) = pixel {
                        *value = load::<S>(&pixel[at..]);
                    }
                }
                *row = of_input(simd, *row);
            }
            for column in 0..4 {
                let values = of_input(simd, [rows[0][column], rows[1][column], rows[2][column], rows[3][column]]);
                for (row, value) in values.into_iter().enumerate() {
                    store::<S>(&mut to[(4 * row + column) * apart + at..], value);
                }
            }
        }
    }
}

/// One axis of a kernel: G g.
#[inline(always)]
fn of_kernel<S: Simd>(simd: S, [a, b, c]: [S::f32s; 3]) -> [S::f32s; 4] {
    let half = simd.splat_f32s(0.5);
    let (ends, middle) = (simd.mul_f32s(simd.add_f32s(a, c), half), simd.mul_f32s(b, half));
    [a, simd.add_f32s(ends, middle), simd.sub_f32s(ends, middle), c]
}

/// One axis of a tile of the input: the transpose of B, times it.
#[inline(always)]
fn of_input<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
    [simd.sub_f32s(a, c), simd.add_f32s(b, c), simd.sub_f32s(c, b), simd.sub_f32s(b, d)]
}

/// One axis of sums: the transpose of A, times them.
#[inline(always)]
fn of_sums<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 2] {
    [simd.add_f32s(simd.add_f32s(a, b), c), simd.sub_f32s(simd.sub_f32s(b, c), d)]
}

#[inline(always)]
fn load<S: Simd>(values: &[f32]) -> S::f32s {
    S::as_simd_f32s(&values[..S::F32_LANES]).0[0]
}

#[inline(always)]
fn store<S: Simd>(to: &mut [f32], value: S::f32s) {
    S::as_mut_simd_f32s(&mut to[..S::F32_LANES]).0[0] = value;
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::{super::conv::Conv3x3, *};

    #[test]
    fn equals_sums_themselves_and_a_map_is_computed_alone() {
        // Odd sizes, strips that are not full, more outputs than kernels are held of.
        for (batch, height, width, inputs, outputs) in
            [(1, 24, 24, 16, 16), (2, 23, 25, 32, 80), (1, 3, 141, 16, 48), (1, 20, 26, 2048, 144), (3, 32, 32, 64, 64)]
        {
            assert!(pays((height, width), inputs, outputs));
            let x = Tensor::randn(0f32, 1.0, (batch, height, width, inputs), &Device::Cpu).unwrap();
            let deviation = 1.0 / (3.0 * (inputs as f32).sqrt());
            let weight = Tensor::randn(0f32, deviation, (outputs, inputs, 3, 3), &Device::Cpu).unwrap();
            let bias = Tensor::randn(0f32, 1.0, outputs, &Device::Cpu).unwrap();
            let of = |x: &Tensor| Conv3x3::new(&weight, &bias).unwrap().forward(x).unwrap();
            let ours = of(&x);
            // Another type is computed by im2col.
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
            let sums = Conv3x3::new(&wide(&weight), &wide(&bias)).unwrap().forward(&wide(&x)).unwrap();
            let error = (wide(&ours) - sums).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(error < 1e-5, "{error} for {batch} x {height} x {width}, {inputs} to {outputs}");
            let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let last = of(&x.narrow(0, batch - 1, 1).unwrap());
            assert_eq!(values(&ours.narrow(0, batch - 1, 1).unwrap()), values(&last));
        }
    }
}
