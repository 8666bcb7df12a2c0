//! Networks that families of hands are made of, by the names and configurations that diffusers saves them with.
//!
//! Maps are kept as (batch, height, width, channels).

pub mod autoencoder;
mod blocks;
pub mod flux;
mod joint;
mod rotary;
pub mod sd3;
pub mod unet;
pub mod z_image;
