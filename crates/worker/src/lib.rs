//! What brains and hands share.
//!
//! Read in this order: [`engine`] (the contract that every brain and hand implements), [`signal`] (the control signal between them),
//! [`pipeline`] (a model folder: which brain, connector and hand go together), [`weights`] (safetensors and GGUF, checked), [`memory`] (whether they fit),
//! [`nn`] (building blocks of models), [`devices`] (what there is to compute on, and that nobody else does), [`thread`] (the OS thread that owns
//! an engine), [`watchdog`] (that it comes back), [`intake`] (pulling from lanes), [`task`] (a
//! leased task and its duties), [`pictures`] (files of pictures that tasks refer to), [`lifecycle`] (registration, heartbeat, drain), [`roster`] (several models in one worker), [`stage_time`] (what work takes), [`sim`] (what simulated engines agree on), [`testing`] (the conformance kit).
//!
//! Deliberately absent: any particular model (those are families in the workers), and anything of gRPC.

pub mod devices;
pub mod engine;
pub mod intake;
pub mod lifecycle;
pub mod memory;
pub mod nn;
pub mod pictures;
pub mod pipeline;
pub mod roster;
pub mod signal;
pub mod sim;
pub mod stage_time;
pub mod task;
pub mod testing;
pub mod thread;
pub mod watchdog;
pub mod weights;
