//! Pictures to patches, as Qwen-VL's processors cut them.
//!
//! Source: transformers 5.23, `models/qwen2_vl/image_processing_qwen2_vl.py`.

use candle_core::{Device, Result, Tensor};
use image::{
    RgbImage,
    imageops::{self, FilterType},
};

use super::{Config, Kind};

/// Most times that a side may be as long as the other.
const MAX_ASPECT: u32 = 200;

/// What is done to a picture before it is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preparation {
    /// Pixels that a picture is scaled up to, if it has fewer.
    pub min_pixels: usize,
    /// Pixels that a picture is scaled down to, if it has more.
    pub max_pixels: usize,
    /// Taken from red, green and blue, each of 0 to 1.
    pub mean: [f32; 3],
    /// What is left is divided by.
    pub deviation: [f32; 3],
}

impl Preparation {
    /// What the processor of the published models does to pictures of this many pixels.
    pub fn usual(kind: &Kind, min_pixels: usize, max_pixels: usize) -> Self {
        let (mean, deviation) = match kind {
            // As CLIP was trained with.
            Kind::Windowed { .. } => {
                ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1])
            }
            Kind::Tapped { .. } => ([0.5; 3], [0.5; 3]),
        };
        Self { min_pixels, max_pixels, mean, deviation }
    }

    /// Width and height that a picture is scaled to: multiples of `multiple`, within the limits, of about its own aspect.
    ///
    /// # Errors
    /// If it has no pixels, or a side is far longer than the other.
    pub fn fitted(&self, (width, height): (u32, u32), multiple: usize) -> std::result::Result<(u32, u32), String> {
        let (long, short) = (width.max(height), width.min(height));
        if short == 0 || long / short > MAX_ASPECT || (long / short == MAX_ASPECT && !long.is_multiple_of(short)) {
            return Err(format!("{width}x{height}: one side is more than {MAX_ASPECT} times the other"));
        }
        let (w, h, multiple) = (f64::from(width), f64::from(height), multiple as f64);
        let (least, most) = (self.min_pixels as f64, self.max_pixels as f64);
        let near = |side: f64| (side / multiple).round_ties_even() * multiple;
        let fitted = if near(w) * near(h) > most {
            let by = (w * h / most).sqrt();
            let down = |side: f64| ((side / by / multiple).floor() * multiple).max(multiple);
            (down(w), down(h))
        } else if near(w) * near(h) < least {
            let by = (least / (w * h)).sqrt();
            let up = |side: f64| (side * by / multiple).ceil() * multiple;
            (up(w), up(h))
        } else {
            (near(w), near(h))
        };
        Ok((fitted.0 as u32, fitted.1 as u32))
    }

    /// A picture's patches.
    ///
    /// # Errors
    /// Those of [`Preparation::fitted`], and if there is no memory.
    pub fn patches(&self, picture: &RgbImage, config: &Config) -> Result<Patches> {
        let (width, height) = self.fitted(picture.dimensions(), config.multiple()).map_err(candle_core::Error::msg)?;
        let scaled = match picture.dimensions() == (width, height) {
            true => None,
            false => Some(imageops::resize(picture, width, height, FilterType::CatmullRom)),
        };
        let pixels = scaled.as_ref().unwrap_or(picture).as_raw();
        let (side, columns, rows) = (config.patch, width as usize / config.patch, height as usize / config.patch);
        let value = |x: usize, y: usize, channel: usize| {
            let value = f32::from(pixels[(y * width as usize + x) * 3 + channel]) / 255.0;
            (value - self.mean[channel]) / self.deviation[channel]
        };
        let cells = cells(rows, columns, config.merge);
        let mut values = Vec::with_capacity(cells.len() * 3 * config.frames * side * side);
        for [row, column] in &cells {
            for channel in 0..3 {
                for _ in 0..config.frames {
                    let lines = (row * side..(row + 1) * side)
                        .flat_map(|y| (column * side..(column + 1) * side).map(move |x| (x, y)));
                    values.extend(lines.map(|(x, y)| value(x, y, channel)));
                }
            }
        }
        let length = values.len() / cells.len().max(1);
        Ok(Patches { values: Tensor::from_vec(values, (cells.len(), length), &Device::Cpu)?, rows, columns })
    }
}

/// A picture, cut.
#[derive(Debug, Clone)]
pub struct Patches {
    /// (patches, 3 channels x frames x side x side), those of one token together
    pub values: Tensor,
    /// Patches from top to bottom.
    pub rows: usize,
    /// Patches from left to right.
    pub columns: usize,
}

impl Patches {
    /// Tokens that it comes to.
    pub fn tokens(&self, merge: usize) -> usize {
        self.rows * self.columns / (merge * merge)
    }

    /// Row and column of each patch.
    pub(super) fn cells(&self, merge: usize) -> Vec<[usize; 2]> {
        cells(self.rows, self.columns, merge)
    }
}

/// Row and column of the patches of a grid, blocks of `merge` x `merge` one after the other.
fn cells(rows: usize, columns: usize, merge: usize) -> Vec<[usize; 2]> {
    let within = move |top: usize, left: usize| {
        (0..merge).flat_map(move |row| (0..merge).map(move |column| [top + row, left + column]))
    };
    let blocks = (0..rows / merge).flat_map(|top| (0..columns / merge).map(move |left| (top * merge, left * merge)));
    blocks.flat_map(|(top, left)| within(top, left)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_published_processor() {
        let limits = Preparation::usual(&Kind::Tapped { places: 1, taps: vec![] }, 56 * 56, 28 * 28 * 1280);
        // `smart_resize` of transformers 5.23, as (width, height).
        for (size, wanted) in [
            ((640, 480), (644, 476)),
            ((4000, 3000), (1148, 840)),
            ((10, 10), (56, 56)),
            ((1, 200), (28, 812)),
            ((14, 42), (56, 112)),
            ((1204, 1204), (980, 980)),
        ] {
            assert_eq!(limits.fitted(size, 28), Ok(wanted), "{size:?}");
        }
        for size in [(0, 4), (1, 201), (2, 401)] {
            assert!(limits.fitted(size, 28).is_err(), "{size:?}");
        }
    }

    #[test]
    fn patches_of_a_token_stand_together() {
        assert_eq!(cells(2, 4, 2)[..5], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]);
    }
}
