//! Hand worker: takes control signals from the queue, renders images, records them.
//!
//! Read in this order: [`service`] (the worker), [`places`] (how many tasks it holds), [`engine_loop`] (the thread that steps a running batch),
//! [`signals`] (where control signals come from), [`turns`] (who is advanced next), [`profile`] (how many together), [`checkpoints`] (going on after a crash), [`encode`] (image files), [`pictures`] (files
//! that requests bring),
//! [`latent`], [`noise`], [`samplers`] and [`networks`] (shared by families), [`families`] (the models).
//!
//! Deliberately absent: language, and everything that a brain knows.

mod checkpoints;
pub mod encode;
pub mod engine_loop;
pub mod families;
pub mod latent;
pub mod networks;
pub mod noise;
pub mod pictures;
mod places;
pub mod profile;
pub mod samplers;
pub mod service;
mod signals;
pub mod turns;

pub use service::{Error, Options, run};
