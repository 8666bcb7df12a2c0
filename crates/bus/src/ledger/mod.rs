//! Jobs, results, workers and models as typed records on top of a bus.
//!
//! [`transition`] is the pure part: what may follow what in a job's life; [`attempts`] how often a task may fail in which way. This file does the
//! reading, comparing and swapping; [`batches`] keeps many requests that were submitted together, [`dead`] jobs that were given up, [`signals`] control signals.

pub mod attempts;
pub mod batches;
pub mod dead;
pub mod signals;
pub mod transition;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use efferent_proto::{
    internal::{IdempotencyRecord, JobEvents, JobRecord, KnownJob},
    names,
    v1::{JobEvent, Model, Worker},
};
use moka::{Entry, ops::compute::Op, sync::Cache};
use prost::Message;

use crate::{Bucket, Error, QueueSpec, Result, SharedBus};

pub use transition::{Transition, has_ended, is_final};

/// What every process of a cluster must agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long jobs, results, images and idempotency keys are kept after their last change. Default 7 days.
    pub retention: Duration,
    /// Most tasks that wait for a brain, for each brain and lane. Default 4096.
    pub brain_queue: u64,
    /// Most tasks that wait for a hand, for each hand and lane. Default 65,536: 16 images for each task of a brain, so that a brain
    /// need not wait for room.
    pub hand_queue: u64,
    /// How long a task is leased to a worker that neither extends nor answers. Default 20 s.
    pub lease: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            retention: Duration::from_secs(7 * 24 * 3600),
            brain_queue: 4096,
            hand_queue: 65_536,
            lease: Duration::from_secs(20),
        }
    }
}

/// How often a compare-and-swap is tried before the store is called unavailable. Only the few processes that work on one job compete.
const MAX_SWAPS: u32 = 64;

/// The revision of a job that was not made yet when it was remembered.
const NOT_MADE: u64 = 0;

/// How long a change waits for a job that is being made, see [`Ledger::expect_job`], and the pauses between two looks.
const BEING_MADE: (Duration, Duration, Duration) =
    (Duration::from_secs(5), Duration::from_millis(1), Duration::from_millis(250));

/// Jobs whose last known record a process remembers.
const REMEMBERED: u64 = 1024;

/// The records of the cluster.
#[derive(Debug, Clone)]
pub struct Ledger {
    bus: SharedBus,
    options: Options,
    /// Records as this process last wrote them, with their revision: the next change can do without reading first. Never trusted for an
    /// answer, only for a swap, which fails if it is out of date.
    known: Cache<String, Arc<KnownJob>>,
}

/// What became of a transition.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The record as it is now, after the change.
    Changed(Box<JobRecord>),
    /// The record as it is; the transition adds nothing to it or may not follow.
    Unchanged(Box<JobRecord>),
    /// There is no such job.
    Unknown,
}

impl Outcome {
    /// The record as it is now.
    pub fn record(&self) -> Option<&JobRecord> {
        match self {
            Self::Changed(record) | Self::Unchanged(record) => Some(record),
            Self::Unknown => None,
        }
    }
}

impl Ledger {
    /// The records on this bus.
    pub fn new(bus: SharedBus, options: Options) -> Self {
        Self { bus, options, known: Cache::new(REMEMBERED) }
    }

    /// The bus below.
    pub fn bus(&self) -> &SharedBus {
        &self.bus
    }

    /// What time it is for all of the cluster.
    pub fn now(&self) -> SystemTime {
        self.bus.now()
    }

    /// What the cluster agreed on.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Makes the queues of a model's brain and hand, every lane.
    pub async fn declare_queues(&self, model: &Model) -> Result<()> {
        for lane in names::LANES {
            for (name, capacity) in [
                (names::brain_queue(&model.brain, lane), self.options.brain_queue),
                (names::hand_queue(&model.hand, lane), self.options.hand_queue),
            ] {
                self.bus.declare(&QueueSpec { name, capacity, lease: self.options.lease }).await?;
            }
        }
        Ok(())
    }

    /// Stores a new job. False if there is one of this id.
    pub async fn create_job(&self, record: &JobRecord) -> Result<bool> {
        let id = job_id(record);
        let created = self.bus.create(Bucket::Jobs, id, encode(record), Some(self.options.retention)).await?;
        match created {
            Some(revision) => self.remember(up_to_date(record.clone(), revision)),
            None => self.known.invalidate(id),
        }
        Ok(created.is_some())
    }

    /// Remembers a job that is about to be made, so that its task can be published at the same time. Whoever gets the task finds the job's entry
    /// when it is there, and waits a little for it.
    pub fn expect_job(&self, record: &JobRecord) {
        self.remember(up_to_date(record.clone(), NOT_MADE));
    }

    /// Looks for the entry of a job that was being made when this process heard of it, so that the next change need not.
    pub async fn confirm(&self, job_id: &str) {
        let Some(expected) = self.known(job_id).filter(|known| known.revision == NOT_MADE) else { return };
        if let Ok(Some(found)) = self.current(job_id, Some(&expected)).await {
            self.remember(found);
        }
    }

    /// A job as its entry has it; with what was deferred, if nothing was written since.
    async fn current(&self, job_id: &str, expected: Option<&KnownJob>) -> Result<Option<KnownJob>> {
        let (patience, mut pause, longest) = BEING_MADE;
        let until = Instant::now() + patience;
        loop {
            let entry = self.bus.get(Bucket::Jobs, job_id).await?;
            match (entry, expected) {
                (Some(entry), _) => {
                    let found = up_to_date(decode(&entry.value, "job", job_id)?, entry.revision);
                    return Ok(Some(match expected {
                        Some(expected) => with_deferred(found, expected),
                        None => found,
                    }));
                }
                (None, Some(_)) if Instant::now() < until => {
                    tokio::time::sleep(pause).await;
                    pause = longest.min(pause * 2);
                }
                (None, _) => return Ok(None),
            }
        }
    }

    /// What this process knows of a job, to send along with a task.
    pub fn known(&self, job_id: &str) -> Option<KnownJob> {
        self.known.get(job_id).map(|known| known.as_ref().clone())
    }

    /// Takes over what another process knew of a job, unless this one knows more.
    pub fn remember(&self, known: KnownJob) {
        let Some(record) = &known.record else { return };
        let age = |known: &KnownJob| (known.revision, known.record.as_ref().map_or(0, |record| record.log.len()));
        self.known.entry_by_ref(job_id(record)).and_compute_with(|standing| match standing.map(Entry::into_value) {
            Some(standing) if age(&standing) >= age(&known) => Op::Nop,
            Some(standing) if standing.revision == NOT_MADE => {
                Op::Put(Arc::new(with_deferred(known.clone(), &standing)))
            }
            _ => Op::Put(Arc::new(known.clone())),
        });
    }

    /// Applies a transition to what this process knows of a job, and leaves it to the next change to write and tell it: here, or wherever
    /// [`Self::known`] is sent. If another change comes first, it is forgotten.
    pub fn defer(&self, job_id: &str, transition: &Transition) {
        self.known.entry_by_ref(job_id).and_compute_with(|standing| {
            let Some(mut known) = standing.map(|standing| standing.into_value().as_ref().clone()) else {
                return Op::Nop;
            };
            let applied = known.record.as_mut().is_some_and(|record| transition::apply(record, transition, self.now()));
            if applied { Op::Put(Arc::new(known)) } else { Op::Nop }
        });
    }

    /// A job.
    pub async fn job(&self, job_id: &str) -> Result<Option<JobRecord>> {
        self.bus.get(Bucket::Jobs, job_id).await?.map(|entry| decode(&entry.value, "job", job_id)).transpose()
    }

    /// Every job that is kept.
    pub async fn jobs(&self) -> Result<Vec<JobRecord>> {
        self.bus.list(Bucket::Jobs).await?.iter().map(|entry| decode(&entry.value, "job", &entry.key)).collect()
    }

    /// Applies a transition, however many others change the job at the same time. The bus tells the record to whoever listens.
    pub async fn apply(&self, job_id: &str, transition: &Transition) -> Result<Outcome> {
        let mut remembered = self.known(job_id);
        for _ in 0..MAX_SWAPS {
            let from_memory = remembered.is_some();
            let KnownJob { record, revision, .. } = match remembered.take() {
                Some(remembered) if remembered.revision != NOT_MADE => remembered,
                expected => match self.current(job_id, expected.as_ref()).await? {
                    Some(found) => found,
                    None => {
                        self.known.invalidate(job_id);
                        return Ok(Outcome::Unknown);
                    }
                },
            };
            let mut record = record.unwrap_or_default();
            if !transition::apply(&mut record, transition, self.now()) {
                if from_memory {
                    continue;
                }
                return Ok(Outcome::Unchanged(Box::new(record)));
            }
            let value = encode(&record);
            let swapped = self.bus.swap(Bucket::Jobs, job_id, value, revision, Some(self.options.retention)).await?;
            let Some(revision) = swapped else { continue };
            if has_ended(&record) {
                self.known.invalidate(job_id);
                if !record.batch_id.is_empty() {
                    self.tell_end(&record).await;
                }
            } else {
                self.remember(up_to_date(record.clone(), revision));
            }
            return Ok(Outcome::Changed(Box::new(record)));
        }
        Err(Error::Unavailable {
            what: format!("job {job_id} changed {MAX_SWAPS} times while it was being changed"),
            source: None,
        })
    }

    /// Tells events that are not kept to whoever listens: at most once.
    pub async fn pass(&self, job_id: &str, events: Vec<JobEvent>) {
        if !events.is_empty() {
            let _ = self.bus.emit(&names::job_passing(job_id), encode(&JobEvents { events })).await;
        }
    }

    /// Ties an idempotency key to a job, unless it is tied. Returns the record that stands.
    pub async fn claim_key(&self, key: &str, record: IdempotencyRecord) -> Result<IdempotencyRecord> {
        let (name, value) = (key_name(key), encode(&record));
        if self.bus.create(Bucket::Idempotency, &name, value, Some(self.options.retention)).await?.is_some() {
            return Ok(record);
        }
        let standing = self.claimed(key).await?;
        standing.ok_or_else(|| Error::Unavailable { what: "idempotency key expired just now".to_owned(), source: None })
    }

    /// What an idempotency key is tied to.
    pub async fn claimed(&self, key: &str) -> Result<Option<IdempotencyRecord>> {
        let name = key_name(key);
        let entry = self.bus.get(Bucket::Idempotency, &name).await?;
        entry.map(|entry| decode(&entry.value, "idempotency key", &name)).transpose()
    }

    /// Registers or renews a worker. It vanishes after `ttl` unless renewed.
    pub async fn register_worker(&self, worker: &Worker, ttl: Duration) -> Result<()> {
        self.bus.put(Bucket::Workers, &worker.id, encode(worker), Some(ttl)).await.map(drop)
    }

    /// Takes a worker off the list.
    pub async fn remove_worker(&self, id: &str) -> Result<()> {
        self.bus.delete(Bucket::Workers, id).await
    }

    /// Makes a model known for good.
    pub async fn register_model(&self, model: &Model) -> Result<()> {
        let value = encode(model);
        if self.bus.get(Bucket::Models, &model.name).await?.is_some_and(|entry| entry.value == value) {
            return Ok(());
        }
        self.bus.put(Bucket::Models, &model.name, value, None).await.map(drop)
    }
}

/// Keys are the caller's text; their hash is a valid name.
fn key_name(key: &str) -> String {
    blake3::hash(key.as_bytes()).to_hex().to_string()
}

/// What is known of a job when its entry was just read or written.
fn up_to_date(record: JobRecord, revision: u64) -> KnownJob {
    KnownJob { written: record.log.len() as u64, record: Some(record), revision }
}

/// An entry as it was just read, with what `expected` has that is not written yet, unless something else was written since.
fn with_deferred(found: KnownJob, expected: &KnownJob) -> KnownJob {
    if found.written == expected.written { KnownJob { revision: found.revision, ..expected.clone() } } else { found }
}

/// A record's job id; empty if the record has no job.
pub fn job_id(record: &JobRecord) -> &str {
    record.job.as_ref().map_or("", |job| &job.job_id)
}

/// A message's bytes.
pub fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// A message from bytes that one of our processes wrote.
pub fn decode<M: Message + Default>(bytes: &[u8], what: &str, key: &str) -> Result<M> {
    M::decode(bytes).map_err(|source| Error::unavailable(format!("{what} {key} cannot be decoded"), source))
}
