//! Large latents to pictures, piece by piece: memory then grows with the piece, not with the picture.
//!
//! Tiles overlap and are blended into one another, left over right and upper over lower. A picture made so differs from one made whole, in shades that are hard to see: every
//! tile is normalised by itself.
//!
//! Source: diffusers 0.42.1, `tiled_decode` of `models/autoencoders/autoencoder_{kl,dc}.py`. Checked against it by `tests/autoencoder.rs` and `tests/dc_autoencoder.rs`.

use candle_core::{Device, Result, Tensor};

use crate::networks::LatentSpace;

/// How latents are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// Cells of a tile, along each side.
    pub side: usize,
    /// Cells from one tile's beginning to the next one's.
    pub stride: usize,
}

/// A tile's picture.
struct Piece {
    height: usize,
    width: usize,
    /// By row and column, of three colours.
    values: Vec<f32>,
}

impl Piece {
    fn blend(&mut self, (y, x): (usize, usize), other: [f32; 3], share: f32) {
        let at = (y * self.width + x) * 3;
        for (value, other) in self.values[at..at + 3].iter_mut().zip(other) {
            *value = other * (1.0 - share) + *value * share;
        }
    }

    fn at(&self, y: usize, x: usize) -> [f32; 3] {
        std::array::from_fn(|colour| self.values[(y * self.width + x) * 3 + colour])
    }

    /// Begins as the piece above ends.
    fn below(&mut self, above: &Self, extent: usize) {
        let extent = extent.min(above.height).min(self.height);
        for y in 0..extent {
            for x in 0..self.width.min(above.width) {
                self.blend((y, x), above.at(above.height - extent + y, x), y as f32 / extent as f32);
            }
        }
    }

    /// Begins as the piece to the left ends.
    fn right_of(&mut self, left: &Self, extent: usize) {
        let extent = extent.min(left.width).min(self.width);
        for y in 0..self.height.min(left.height) {
            for x in 0..extent {
                self.blend((y, x), left.at(y, left.width - extent + x), x as f32 / extent as f32);
            }
        }
    }
}

/// Whether a latent is larger than a tile.
pub fn is_large(tiles: Tiles, height: usize, width: usize) -> bool {
    height.max(width) > tiles.side
}

/// A latent (1, height, width, channels), not scaled -> its picture (1, height factor, width factor, 3), on the CPU.
///
/// # Errors
/// If a tile cannot be decoded, or tiles cannot be so.
pub fn decode(vae: &dyn LatentSpace, latent: &Tensor, tiles: Tiles) -> Result<Tensor> {
    let (_, height, width, _) = latent.dims4()?;
    let (Tiles { side, stride }, factor) = (tiles, vae.factor());
    if stride == 0 || stride > side {
        candle_core::bail!("tiles of {side} cells, {stride} apart");
    }
    let (kept, extent) = (stride * factor, (side - stride) * factor);
    let mut picture = vec![0f32; height * factor * width * factor * 3];
    let mut above: Vec<Piece> = Vec::new();
    for top in (0..height).step_by(stride) {
        let mut row: Vec<Piece> = Vec::new();
        for left in (0..width).step_by(stride) {
            let (rows, columns) = (side.min(height - top), side.min(width - left));
            let tile = latent.narrow(1, top, rows)?.narrow(2, left, columns)?.contiguous()?;
            let values = vae.decode(&tile)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
            let mut piece = Piece { height: rows * factor, width: columns * factor, values };
            if let Some(above) = above.get(row.len()) {
                piece.below(above, extent);
            }
            if let Some(left) = row.last() {
                piece.right_of(left, extent);
            }
            for y in 0..piece.height.min(kept) {
                let length = 3 * piece.width.min(kept);
                let to = 3 * ((top * factor + y) * width * factor + left * factor);
                let from = 3 * y * piece.width;
                picture[to..to + length].copy_from_slice(&piece.values[from..from + length]);
            }
            row.push(piece);
        }
        above = row;
    }
    Tensor::from_vec(picture, (1, height * factor, width * factor, 3), &Device::Cpu)
}
