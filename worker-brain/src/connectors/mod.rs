//! Connectors: from a language model's states to a hand's control space.

pub mod metaquery;
pub mod openuni;
pub mod queries;
