//! Batches: a record for each, and chunks of items, whose requests lie in the object store.
//!
//! A chunk is written once as to its items; only the items' states change afterwards. So a submission can be sent again, and a batch of
//! any length costs memory for one chunk at a time.

use bytes::Bytes;
use efferent_proto::{
    internal::{BatchRecord, ChunkRecord, JobEnded, JobRecord},
    names,
    v1::{Batch, BatchItems, BatchState, GenerateRequest, ItemError, ItemState},
};

use super::{Ledger, decode, encode, job_id};
use crate::{Bucket, Error, Result, read_object};

/// Items of a chunk.
pub const CHUNK_ITEMS: usize = 256;

/// A record and the revision to compare with when it is swapped.
pub type Revised<T> = (T, u64);

/// A batch's id; empty if the record has no batch.
pub fn batch_id(record: &BatchRecord) -> &str {
    record.batch.as_ref().map_or("", |batch| &batch.batch_id)
}

/// Whether nothing follows this state.
pub fn is_over(state: BatchState) -> bool {
    matches!(state, BatchState::Ended | BatchState::Cancelled)
}

/// How often an item was given another try, by its place in its chunk.
pub fn tries(chunk: &ChunkRecord, at: usize) -> u8 {
    chunk.tries.get(at).copied().unwrap_or(0)
}

/// The id of the job that does an item: the same whoever releases it, another one for each try.
pub fn item_job_id(batch_id: &str, index: u64, tries: u8) -> String {
    let text = if tries == 0 { format!("{batch_id}/{index}") } else { format!("{batch_id}/{index}/{tries}") };
    let hash = blake3::hash(text.as_bytes());
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.as_bytes()[..16]);
    names::derived_job_id(batch_id, digest)
}

/// What became of storing a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// It is stored, now or before, and this is its items' hash.
    Yes(String),
    /// Other items are stored in its place.
    Conflict,
}

/// Items of a chunk that get another try.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retried {
    /// Those that had failed until now.
    pub retried: u64,
    /// All that wait now.
    pub waiting: u64,
}

impl Ledger {
    /// Stores a new batch. False if there is one of this id.
    pub async fn create_batch(&self, record: &BatchRecord) -> Result<bool> {
        let created = self.bus.create(Bucket::Batches, batch_id(record), encode(record), Some(self.options.retention));
        Ok(created.await?.is_some())
    }

    /// A batch.
    pub async fn batch(&self, id: &str) -> Result<Option<Revised<BatchRecord>>> {
        let entry = self.bus.get(Bucket::Batches, id).await?;
        entry.map(|entry| Ok((decode(&entry.value, "batch", id)?, entry.revision))).transpose()
    }

    /// Every batch that is kept.
    pub async fn batches(&self) -> Result<Vec<Revised<BatchRecord>>> {
        let entries = self.bus.list(Bucket::Batches).await?;
        entries.iter().map(|entry| Ok((decode(&entry.value, "batch", &entry.key)?, entry.revision))).collect()
    }

    /// Writes a batch if it is still at `revision`. `None` if it is not.
    pub async fn swap_batch(&self, record: &BatchRecord, revision: u64) -> Result<Option<u64>> {
        let retention = Some(self.options.retention);
        self.bus.swap(Bucket::Batches, batch_id(record), encode(record), revision, retention).await
    }

    /// Changes a batch, however many others do at the same time; `change` says whether there is anything to write. The batch as it is
    /// afterwards, or `None` if there is no such batch.
    pub async fn change_batch(
        &self,
        id: &str,
        mut change: impl FnMut(&mut Batch) -> bool + Send,
    ) -> Result<Option<BatchRecord>> {
        for _ in 0..super::MAX_SWAPS {
            let Some((mut record, revision)) = self.batch(id).await? else { return Ok(None) };
            if !change(record.batch.get_or_insert_default()) || self.swap_batch(&record, revision).await?.is_some() {
                return Ok(Some(record));
            }
        }
        Err(Error::Unavailable {
            what: format!("batch {id} changed all the time while it was being changed"),
            source: None,
        })
    }

    /// Stores a chunk: first its items, then its record, once.
    pub async fn store_chunk(
        &self,
        batch_id: &str,
        number: u64,
        items: Vec<GenerateRequest>,
        refused: Vec<ItemError>,
    ) -> Result<Stored> {
        let first = number * CHUNK_ITEMS as u64;
        let mut states = vec![ItemState::Waiting as u8; items.len()];
        for error in &refused {
            if let Some(state) = states.get_mut(error.index.saturating_sub(first) as usize) {
                *state = ItemState::Failed as u8;
            }
        }
        let retention = Some(self.options.retention);
        let items = self.bus.put_object(encode(&BatchItems { items }), retention).await?;
        let record = ChunkRecord { items: items.clone(), states: states.into(), refused, tries: Bytes::new() };
        let key = names::chunk_key(batch_id, number);
        if self.bus.create(Bucket::Chunks, &key, encode(&record), retention).await?.is_some() {
            return Ok(Stored::Yes(items));
        }
        let standing = self.chunk(batch_id, number).await?;
        Ok(if standing.is_some_and(|(chunk, _)| chunk.items == items) { Stored::Yes(items) } else { Stored::Conflict })
    }

    /// A chunk's record.
    pub async fn chunk(&self, batch_id: &str, number: u64) -> Result<Option<Revised<ChunkRecord>>> {
        let key = names::chunk_key(batch_id, number);
        let entry = self.bus.get(Bucket::Chunks, &key).await?;
        entry.map(|entry| Ok((decode(&entry.value, "chunk", &key)?, entry.revision))).transpose()
    }

    /// Writes a chunk's states if it is still at `revision`. `None` if it is not.
    pub async fn swap_chunk(
        &self,
        batch_id: &str,
        number: u64,
        record: &ChunkRecord,
        revision: u64,
    ) -> Result<Option<u64>> {
        let key = names::chunk_key(batch_id, number);
        self.bus.swap(Bucket::Chunks, &key, encode(record), revision, Some(self.options.retention)).await
    }

    /// Has the failed items of a chunk wait for another try, however many others change it at the same time.
    pub async fn retry_chunk(&self, batch_id: &str, number: u64) -> Result<Retried> {
        for _ in 0..super::MAX_SWAPS {
            let Some((mut record, revision)) = self.chunk(batch_id, number).await? else {
                return Ok(Retried::default());
            };
            let first = number * CHUNK_ITEMS as u64;
            let refused = |at: usize| record.refused.iter().any(|refused| refused.index == first + at as u64);
            let failed: Vec<usize> = record
                .states
                .iter()
                .enumerate()
                .filter(|(_, state)| **state == ItemState::Failed as u8)
                .map(|(at, _)| at)
                .filter(|at| !refused(*at) && tries(&record, *at) < u8::MAX)
                .collect();
            let mut states = record.states.to_vec();
            let waiting = states.iter().filter(|state| **state == ItemState::Waiting as u8).count() + failed.len();
            let retried = Retried { retried: failed.len() as u64, waiting: waiting as u64 };
            if failed.is_empty() {
                return Ok(retried);
            }
            let mut tries = record.tries.to_vec();
            tries.resize(states.len(), 0);
            for at in failed {
                states[at] = ItemState::Waiting as u8;
                tries[at] += 1;
            }
            (record.states, record.tries) = (states.into(), tries.into());
            if self.swap_chunk(batch_id, number, &record, revision).await?.is_some() {
                return Ok(retried);
            }
        }
        Err(Error::Unavailable {
            what: format!("chunk {number} of batch {batch_id} changed all the time while it was being changed"),
            source: None,
        })
    }

    /// A chunk's items.
    pub async fn chunk_items(&self, record: &ChunkRecord) -> Result<Vec<GenerateRequest>> {
        let missing =
            || Error::Unavailable { what: format!("the items {} are no longer kept", record.items), source: None };
        let bytes: Bytes = read_object(self.bus.as_ref(), &record.items).await?.ok_or_else(missing)?;
        Ok(decode::<BatchItems>(&bytes, "items", &record.items)?.items)
    }

    /// Tells the dispatcher that a job of a batch has ended. At most once: if it gets lost, the dispatcher finds out by looking.
    pub(super) async fn tell_end(&self, record: &JobRecord) {
        let state = record.job.as_ref().map_or(0, |job| job.state);
        let ended = JobEnded { job_id: job_id(record).to_owned(), state };
        let _ = self.bus.emit(&names::batch_ends(&record.batch_id), encode(&ended)).await;
    }
}
