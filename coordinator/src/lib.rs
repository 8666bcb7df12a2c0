//! Coordinator: the gRPC front door.
//!
//! Read in this order: [`server`] (how it starts and stops), [`images`] (`ImageService`: from request to durable job), [`validate`] (what
//! is refused, and why), [`follow`] (a job's events for one client), [`batches`] (many requests submitted together), [`dead`] (jobs that were given up), [`objects`] (files that requests refer to), [`pictures`] (those that they begin with), [`signals`] (control signals as objects), [`tenants`] (shares and quotas), [`quote`] (when a request would be done), [`scale`] (how many workers are needed), [`directory`] (which models and workers there are), [`cluster`]
//! (`ClusterService`).
//!
//! It keeps no state: jobs live in the ledger, so any coordinator can serve, watch or cancel any job. Deliberately absent: tensors.

pub mod batches;
pub mod cluster;
pub mod dead;
pub mod directory;
pub mod follow;
pub mod images;
pub mod objects;
pub mod pictures;
pub mod quote;
pub mod scale;
pub mod server;
pub mod signals;
pub mod tenants;
pub mod validate;

pub use server::{Error, Options, run};
