//! Pictures to begin with, and parts of pictures to change.

use std::sync::Arc;

use candle_core::Tensor;
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::engine::{EngineError, Picture, RenderRequest};
use image::GrayImage;

use super::{Engine, Network, Shape, tiles};
use crate::{
    noise::Noise,
    samplers::{Beginning, Plan, Trajectory},
};

pub(super) fn mends_alone() -> EngineError {
    let message = "this model draws a part of a picture: it wants init_image and mask";
    ApiError::new(ErrorCode::InvalidField, message).field("mask").into()
}

impl<N: Network> Engine<N> {
    /// The beginning of a trajectory from a picture, and what the network is shown beside the latent. Noise is drawn as diffusers draws it: for the picture's latent, for the trajectory, and,
    /// with a mask, for the latent of what stays, which only networks that mend are shown.
    pub(super) fn begun_with(
        &self,
        plan: Arc<Plan>,
        picture: &Picture,
        request: &RenderRequest,
        [channels, height, width]: Shape,
    ) -> Result<(Trajectory, Vec<f32>), EngineError> {
        let vae = self.network.autoencoder();
        let factor = vae.factor();
        let (columns, rows) = ((width * factor) as u32, (height * factor) as u32);
        let fits = |dims: (u32, u32)| dims == (columns, rows);
        if !fits(picture.image.dimensions()) || !picture.mask.as_ref().is_none_or(|mask| fits(mask.dimensions())) {
            return Err(EngineError::Crashed("a picture of another size than is to be drawn".to_owned()));
        }
        let pixels: Vec<f32> = picture.image.as_raw().iter().map(|byte| f32::from(*byte) / 255.0 * 2.0 - 1.0).collect();
        let count = channels * height * width;
        let mends = self.network.mends();
        let (whole, mut noise, mut draws) =
            (picture.mask.is_some() && picture.strength >= 1.0, Noise::new(request.seed), 0);
        let clean = if mends && whole {
            vec![0.0; count]
        } else {
            self.encoded(pixels.clone(), [channels, height, width], |count| {
                draws += 1;
                noise.normal(count)
            })?
        };
        let may = |mask: &GrayImage, column: usize, row: usize| mask.get_pixel(column as u32, row as u32).0[0] >= 128;
        let cells = |mask: &GrayImage| -> Vec<f32> {
            let cell = |i: usize| may(mask, i % width * factor, i / width * factor);
            (0..height * width).map(|i| f32::from(u8::from(cell(i)))).collect()
        };
        let cells = picture.mask.as_ref().map(cells);
        let mask = cells.as_ref().filter(|_| !mends).map(|cells| cells.repeat(channels));
        let drawn = draws > 0;
        let mut trajectory = Trajectory::from_picture(plan, Beginning { clean, noise, draws, mask, whole });
        let beside = match (&picture.mask, cells) {
            (Some(mask), Some(mut cells)) if mends => {
                let stays = |(i, value)| {
                    let pixel = i / 3;
                    if may(mask, pixel % columns as usize, pixel / columns as usize) { 0.0 } else { value }
                };
                let stays = pixels.into_iter().enumerate().map(stays).collect();
                cells.extend(self.encoded(stays, [channels, height, width], |_| trajectory.draw())?);
                cells
            }
            _ if mends => return Err(mends_alone()),
            (Some(_), _) if drawn => {
                trajectory.draw();
                Vec::new()
            }
            _ => Vec::new(),
        };
        Ok((trajectory, beside))
    }

    /// The latent of pixels of -1 to 1, by row, column and channel; `draw` gives so many values of noise, if the autoencoder wants some.
    fn encoded(
        &self,
        pixels: Vec<f32>,
        [channels, height, width]: Shape,
        draw: impl FnOnce(usize) -> Vec<f32>,
    ) -> Result<Vec<f32>, EngineError> {
        let vae = self.network.autoencoder();
        let factor = vae.factor();
        let pixels = Tensor::from_vec(pixels, (1, height * factor, width * factor, 3), &self.device)?;
        let moments = self.whole_or_tiled(
            (height, width),
            || vae.moments(&pixels),
            || tiles::moments(vae, &pixels, vae.tiles()),
        )?;
        let encoded = vae.encoded(&moments)?;
        let values = |map: &Tensor| map.permute((0, 3, 1, 2))?.flatten_all()?.to_vec1::<f32>();
        let mut latent = values(&encoded.mean)?;
        if let Some(deviation) = &encoded.deviation {
            let (drawn, deviations) = (draw(latent.len()), values(deviation)?);
            latent.iter_mut().zip(deviations.iter().zip(&drawn)).for_each(|(x, (by, n))| *x += by * n);
        }
        let latent = vae.scale(&Tensor::from_vec(latent, (channels, height, width), &self.device)?)?;
        Ok(latent.flatten_all()?.to_vec1()?)
    }
}
