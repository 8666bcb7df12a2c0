//! Samplers as diffusers has them: which noise levels a network is asked at, and how its answers lead from noise to a latent.
//!
//! Read in this order: [`Config`] (`scheduler_config.json`), [`schedule`] (levels and times), [`trajectory`] (a sample on its way).
//! Each sample has a trajectory of its own, so samples at other steps, of other lengths, share a pass of the network.
//!
//! Source: diffusers 0.42.1, `schedulers/`. Checked against it by `tests/samplers.rs`.

pub mod schedule;
pub mod trajectory;

pub use efferent_worker::pipeline::scheduler::{Config, Error, Sampler};
pub use schedule::{Flow, Plan};
pub use trajectory::{Beginning, Trajectory};
