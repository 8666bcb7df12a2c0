//! The innermost of our products of matrices: a tile of rows and outputs is kept in registers while it runs through the inputs.
//!
//! Each value is a sum in the order of the inputs, whatever other rows and outputs there are.

use pulp::{Simd, WithSimd};

/// Outputs of the widest tile on the widest vectors.
pub(super) const WIDEST: usize = 64;

/// Vectors of outputs in the largest tile that fits into the registers: of 32 vectors 6 x 4, of 16 vectors 6 x 2.
const fn widest<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

/// How many outputs the largest tile has on this processor.
pub(super) struct Width;

impl WithSimd for Width {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        widest::<S>() * S::F32_LANES
    }
}

/// `width` columns of a product: x (rows, inputs) and w (inputs, width) -> y (rows, width)
pub(super) struct Columns<'a> {
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    /// From one row of x to the next.
    pub(super) x_stride: usize,
    pub(super) inputs: usize,
    pub(super) w: &'a [f32],
    /// From one input's weights to the next one's.
    pub(super) w_stride: usize,
    pub(super) width: usize,
    pub(super) y: &'a mut [f32],
    /// From one row of y to the next.
    pub(super) y_stride: usize,
    /// Whether y holds the sums over the inputs before these.
    pub(super) begun: bool,
}

impl WithSimd for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let rows = self.rows;
        let mut at = 0;
        while at < self.width {
            let vectors = ((self.width - at) / S::F32_LANES).min(widest::<S>());
            let mut row = 0;
            while row < rows {
                row += match vectors {
                    4 => self.some_rows::<S, 4>(simd, row, rows - row, at),
                    2 | 3 => self.some_rows::<S, 2>(simd, row, rows - row, at),
                    1 => self.some_rows::<S, 1>(simd, row, rows - row, at),
                    _ => self.rest(row, at),
                };
            }
            at += match vectors {
                0 => self.width - at,
                3 => 2 * S::F32_LANES,
                vectors => vectors * S::F32_LANES,
            };
        }
    }
}

impl Columns<'_> {
    /// As many of the `left` rows as fit into a tile. Returns how many.
    #[inline(always)]
    fn some_rows<S: Simd, const VECTORS: usize>(&mut self, simd: S, row: usize, left: usize, at: usize) -> usize {
        match left {
            6.. => self.tile::<S, 6, VECTORS>(simd, row, at),
            4.. => self.tile::<S, 4, VECTORS>(simd, row, at),
            2.. => self.tile::<S, 2, VECTORS>(simd, row, at),
            _ => self.tile::<S, 1, VECTORS>(simd, row, at),
        }
    }

    /// `ROWS` rows of `VECTORS` vectors of outputs, from `row` and output `at` on. Returns `ROWS`.
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, row: usize, at: usize) -> usize {
        let length = VECTORS * S::F32_LANES;
        let mut x = [&[][..]; ROWS];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + r) * self.x_stride..][..self.inputs];
        }
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        if self.begun {
            for (r, sums) in sums.iter_mut().enumerate() {
                let (begun, _) = S::as_simd_f32s(&self.y[(row + r) * self.y_stride + at..][..length]);
                sums.copy_from_slice(begun);
            }
        }
        let mut weights = &self.w[at..];
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
            weights = weights.get(self.w_stride..).unwrap_or_default();
        }
        for (r, sums) in sums.iter().enumerate() {
            let (to, _) = S::as_mut_simd_f32s(&mut self.y[(row + r) * self.y_stride + at..][..length]);
            to.copy_from_slice(sums);
        }
        ROWS
    }

    /// What is left of a row's outputs, from `at` on, when no vector is full. Returns 1.
    fn rest(&mut self, row: usize, at: usize) -> usize {
        let to = &mut self.y[row * self.y_stride + at..][..self.width - at];
        if !self.begun {
            to.fill(0.0);
        }
        for (input, x) in self.x[row * self.x_stride..][..self.inputs].iter().enumerate() {
            let w = &self.w[input * self.w_stride..][at..self.width];
            for (y, w) in to.iter_mut().zip(w) {
                *y = x.mul_add(*w, *y);
            }
        }
        1
    }
}
