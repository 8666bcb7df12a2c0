//! Networks that families of hands are made of, by the names and configurations that diffusers saves them with.
//!
//! Maps are kept as (batch, height, width, channels).

pub mod autoencoder;
mod blocks;
pub mod dc_autoencoder;
pub mod flux;
mod joint;
mod rotary;
pub mod sana;
pub mod sd3;
pub mod unet;
pub mod z_image;

use candle_core::{Result, Tensor};

use crate::latent::tiles::Tiles;

/// What an encoder makes of pictures, each (batch, height / factor, width / factor, channels).
#[derive(Debug)]
pub struct Encoded {
    /// The latents, or their mean.
    pub mean: Tensor,
    /// By how much they deviate from it, if they are drawn.
    pub deviation: Option<Tensor>,
}

/// An autoencoder, as the engine of its latents sees it.
pub trait LatentSpace: Send + Sync + std::fmt::Debug {
    /// Channels of a latent.
    fn channels(&self) -> usize;

    /// Pixels of a picture for each cell of a latent, along an axis.
    fn factor(&self) -> usize;

    /// Latents (batch, height, width, channels), not scaled -> pictures (batch, height factor, width factor, 3), about in [-1, 1].
    ///
    /// # Errors
    /// If shapes do not fit.
    fn decode(&self, latent: &Tensor) -> Result<Tensor>;

    /// How its latents, and pictures by as many pixels, are cut where one is too large to be computed whole.
    fn tiles(&self) -> Tiles;

    /// Pictures (batch, height, width, 3) in [-1, 1] -> what is told of latents, not scaled, (batch, height / factor, width / factor, ..) for [`LatentSpace::encoded`].
    ///
    /// # Errors
    /// If shapes do not fit.
    fn moments(&self, picture: &Tensor) -> Result<Tensor>;

    /// What is told of latents as such.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn encoded(&self, moments: &Tensor) -> Result<Encoded>;

    /// Latents as a denoiser has them.
    ///
    /// # Errors
    /// If the device has no room.
    fn scale(&self, latent: &Tensor) -> Result<Tensor>;

    /// Back from a denoiser's latents.
    ///
    /// # Errors
    /// If the device has no room.
    fn unscale(&self, latent: &Tensor) -> Result<Tensor>;
}
