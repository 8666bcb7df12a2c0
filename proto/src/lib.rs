//! The wire: everything that crosses a process boundary.
//!
//! Read in this order: [`v1`] (what clients see), [`internal`] (what our processes tell one another), [`error`] (one error, mapped
//! totally to gRPC), [`names`] (queues, buckets, subjects), [`items`] (files of prompts), [`time`] (conversions), [`work`] (in what work is counted).
//!
//! Deliberately absent: any behaviour. This crate has no runtime, no I/O, and no dependency on another crate of ours.

pub mod error;
pub mod items;
pub mod names;
pub mod time;
pub mod work;

pub use error::ApiError;

/// The public API, `efferent.v1`.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    reason = "generated; the documentation is in the .proto files"
)]
pub mod v1 {
    tonic::include_proto!("efferent.v1");
}

/// Messages between brains, hands and coordinators, `efferent.internal.v1`.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    reason = "generated; the documentation is in the .proto files"
)]
pub mod internal {
    // Generated code names its neighbours by `super::super`, so the nesting must mirror the packages.
    mod v1 {
        tonic::include_proto!("efferent.internal.v1");
    }
    pub use v1::*;
}

/// Every public `.proto` file, encoded: what the reflection service answers from.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/efferent.bin"));
