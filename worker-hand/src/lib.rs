//! Hand worker: takes control signals from the queue, renders images, records them.
//!
//! Read in this order: [`service`] (the worker), [`engine_loop`] (the thread that steps a running batch), [`encode`] (image files),
//! [`noise`] and [`samplers`] (shared by families), [`families`] (the models).
//!
//! Deliberately absent: language, and everything that a brain knows.

pub mod encode;
pub mod engine_loop;
pub mod families;
pub mod noise;
pub mod samplers;
pub mod service;

pub use service::{Error, Options, run};
