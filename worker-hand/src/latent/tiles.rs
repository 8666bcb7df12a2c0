//! Large latents to pictures and back, piece by piece: memory then grows with the piece, not with the picture.
//!
//! Tiles overlap and are blended into one another, left over right and upper over lower. A picture made so differs from one made whole, in shades that are hard to see: every
//! tile is normalised by itself.
//!
//! Source: diffusers 0.42.1, `tiled_decode` and `tiled_encode` of `models/autoencoders/autoencoder_{kl,dc}.py`. Checked against it by `tests/autoencoder.rs` and `tests/dc_autoencoder.rs`.

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

/// What was made of a tile.
struct Piece {
    height: usize,
    width: usize,
    channels: usize,
    /// By row, column and channel.
    values: Vec<f32>,
}

impl Piece {
    fn at(&self, (y, x): (usize, usize)) -> std::ops::Range<usize> {
        let start = (y * self.width + x) * self.channels;
        start..start + self.channels
    }

    /// Its value at a place, by `share`, and by the rest that of another one.
    fn blend(&mut self, place: (usize, usize), other: &Self, there: (usize, usize), share: f32) {
        let place = self.at(place);
        for (value, other) in self.values[place].iter_mut().zip(&other.values[other.at(there)]) {
            *value = other * (1.0 - share) + *value * share;
        }
    }

    /// Begins as the piece above ends.
    fn below(&mut self, above: &Self, extent: usize) {
        let extent = extent.min(above.height).min(self.height);
        for y in 0..extent {
            for x in 0..self.width.min(above.width) {
                self.blend((y, x), above, (above.height - extent + y, x), y as f32 / extent as f32);
            }
        }
    }

    /// Begins as the piece to the left ends.
    fn right_of(&mut self, left: &Self, extent: usize) {
        let extent = extent.min(left.width).min(self.width);
        for y in 0..self.height.min(left.height) {
            for x in 0..extent {
                self.blend((y, x), left, (y, left.width - extent + x), x as f32 / extent as f32);
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
    pieced(latent, tiles, |cells| cells * vae.factor(), |tile| vae.decode(tile))
}

/// A picture (1, height, width, 3) -> what is told of its latent, as [`LatentSpace::moments`] does, on the CPU.
///
/// # Errors
/// If a tile cannot be encoded, or tiles cannot be so.
pub fn moments(vae: &dyn LatentSpace, picture: &Tensor, tiles: Tiles) -> Result<Tensor> {
    let factor = vae.factor();
    let tiles = Tiles { side: tiles.side * factor, stride: tiles.stride * factor };
    pieced(picture, tiles, |pixels| pixels / factor, |tile| vae.moments(tile))
}

/// What `part` makes of a map, tile by tile. `scaled`: the length that it makes of a length.
fn pieced(
    map: &Tensor,
    Tiles { side, stride }: Tiles,
    scaled: impl Fn(usize) -> usize,
    part: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, height, width, _) = map.dims4()?;
    if stride == 0 || stride > side {
        candle_core::bail!("tiles of {side}, {stride} apart");
    }
    let (kept, extent) = (scaled(stride), scaled(side) - scaled(stride));
    let (mut whole, mut channels) = (Vec::new(), 0);
    let mut above: Vec<Piece> = Vec::new();
    for top in (0..height).step_by(stride) {
        let mut row: Vec<Piece> = Vec::new();
        for left in (0..width).step_by(stride) {
            let (rows, columns) = (side.min(height - top), side.min(width - left));
            let made =
                part(&map.narrow(1, top, rows)?.narrow(2, left, columns)?.contiguous()?)?.to_device(&Device::Cpu)?;
            let (_, rows, columns, of_each) = made.dims4()?;
            channels = of_each;
            let mut piece = Piece { height: rows, width: columns, channels, values: made.flatten_all()?.to_vec1()? };
            if let Some(above) = above.get(row.len()) {
                piece.below(above, extent);
            }
            if let Some(left) = row.last() {
                piece.right_of(left, extent);
            }
            whole.resize(scaled(height) * scaled(width) * channels, 0f32);
            for y in 0..piece.height.min(kept) {
                let length = channels * piece.width.min(kept);
                let to = channels * ((scaled(top) + y) * scaled(width) + scaled(left));
                let from = channels * y * piece.width;
                whole[to..to + length].copy_from_slice(&piece.values[from..from + length]);
            }
            row.push(piece);
        }
        above = row;
    }
    Tensor::from_vec(whole, (1, scaled(height), scaled(width), channels), &Device::Cpu)
}
