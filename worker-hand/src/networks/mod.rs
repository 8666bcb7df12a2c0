//! Networks that families of hands are made of, by the names and configurations that diffusers saves them with.
//!
//! Maps are kept as (batch, height, width, channels).

pub mod autoencoder;
mod blocks;
pub mod flux;
pub mod unet;
