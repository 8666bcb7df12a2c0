//! Brain worker: takes prompts from the queue, computes control signals, and hands them on to the hands' queue.
//!
//! Read in this order: [`service`] (the worker), [`batch`] (prompts to batches, cached signals), [`shared`] (what the brains of a cluster compute once), [`serve`] (large signals on their way to hands), [`families`] (brains), [`language`] (language models from folders), [`connectors`] (from their states to control signals).
//!
//! Deliberately absent: everything that a hand knows. Pixels are what some brains read, never what they write.

pub mod batch;
pub mod connectors;
pub mod families;
pub mod language;
pub mod serve;
pub mod service;
pub mod shared;
mod texts;

pub use service::{Error, Options, run};
