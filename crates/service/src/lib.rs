//! How any binary of ours starts, is seen and stops.
//!
//! Read in this order: [`shutdown`] (the stop signal), [`telemetry`] (logs, metrics, traces), [`trace`] (trace context in messages),
//! [`admin`] (the port that operators and Prometheus ask).
//!
//! Deliberately absent: what any particular process does, and where its settings come from (that is the command line's).

pub mod admin;
mod meters;
pub mod shutdown;
pub mod telemetry;
pub mod trace;

pub use shutdown::Shutdown;
