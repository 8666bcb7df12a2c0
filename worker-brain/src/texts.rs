//! What brains that read several texts of a request share: each text is encoded once in a batch, whatever it is for.

use std::{collections::HashMap, hash::Hash};

use efferent_worker::{engine::EngineError, nn::rows::on_pool};
use rayon::prelude::*;

/// Texts of a batch, and what became of each.
#[derive(Debug)]
pub(crate) struct Encoded<K, E>(HashMap<K, Result<E, EngineError>>);

impl<K: Eq + Hash + Sync + Send, E: Send> Encoded<K, E> {
    /// Encodes each text once, each on a thread of its own: what one comes to does not depend on the others.
    pub(crate) fn new(texts: Vec<K>, encode: impl Fn(&K) -> Result<E, EngineError> + Sync + Send) -> Self {
        let encoded: Vec<_> = on_pool(|| texts.par_iter().map(encode).collect());
        Self(texts.into_iter().zip(encoded).collect())
    }

    /// What a text came to.
    ///
    /// # Errors
    /// If it could not be encoded, or was not asked for.
    pub(crate) fn get(&self, text: &K) -> Result<&E, EngineError> {
        match self.0.get(text) {
            Some(Ok(encoded)) => Ok(encoded),
            Some(Err(error)) => Err(error.again()),
            None => Err(EngineError::Crashed("a text was left out of its batch".to_owned())),
        }
    }
}
