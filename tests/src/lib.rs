//! Harness of the tests that need several parts at once.
//!
//! [`local`]: coordinators and workers with simulated engines in this process, on the embedded queue: quick, and every part can be reached.
//! [`processes`]: the `efferent` binary and nats-server as processes, which can be killed. [`calls`] and [`batches`]: what tests do with
//! a coordinator. [`checkpoints`]: tiny models and what diffusers computed with them. [`faults`]: what is killed or paused, when, and how often. [`load`]: clients
//! that do not give up, and what must hold when all is over.

#![expect(clippy::expect_used, clippy::missing_panics_doc, reason = "a harness fails by panicking")]
#![expect(clippy::print_stderr, reason = "tests say what they do to the cluster")]

pub mod batches;
pub mod calls;
pub mod checkpoints;
pub mod faults;
pub mod load;
pub mod local;
pub mod processes;
