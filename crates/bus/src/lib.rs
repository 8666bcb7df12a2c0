//! What the cluster stands on: a durable queue, a key-value store, an object store and at-most-once events.
//!
//! Read in this order: this file (the contract), [`nats`] (JetStream, for clusters), [`embedded`] (one process: a SQLite file and a
//! folder), [`ledger`] (jobs, results, workers and models as typed records on top), [`contract`] (the test-suite that every backend passes).
//! `clock` is the time that all who share a bus go by.
//!
//! Deliberately absent: anything that knows what a brain or a hand computes.

mod clock;
pub mod contract;
pub mod embedded;
pub mod ledger;
pub mod nats;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

/// A bus that is shared by the tasks of a process.
pub type SharedBus = Arc<dyn Bus>;

/// Why the bus did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server or the file cannot be reached or answered too late. Trying again may help.
    #[error("{what}: the queue is unavailable")]
    Unavailable {
        /// What was attempted, on what.
        what: String,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The queue holds as many tasks as it may.
    #[error("queue {queue} is full ({capacity} tasks)")]
    Full {
        /// Its name.
        queue: String,
        /// Its limit.
        capacity: u64,
    },
    /// More bytes than a message, a value or an object may have.
    #[error("{what}: {length} bytes are over the limit of {limit}")]
    TooLarge {
        /// What was attempted, on what.
        what: String,
        /// Bytes given.
        length: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// The server is not fit: too old, or it did not take the configuration that was asked of it.
    #[error("{0}")]
    Unfit(String),
    /// The lease had ended, so the extension, ack or nak came to nothing or is not known to have been heard.
    #[error("the lease on task {key} in {queue} has ended")]
    LeaseLost {
        /// The queue.
        queue: String,
        /// The task's idempotency key.
        key: String,
    },
    /// A queue that was not declared, a name that is not allowed: a mistake in the program.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// An [`Error::Unavailable`] with a cause.
    pub fn unavailable(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unavailable { what: what.into(), source: Some(source.into()) }
    }
}

/// Short for a result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Most bytes of a task (a message of the queue) or of an event.
pub const MAX_MESSAGE: usize = 960 * 1024;
/// Most bytes of a value.
pub const MAX_VALUE: usize = 512 * 1024;
/// Most bytes of an object.
pub const MAX_OBJECT: usize = 64 * 1024 * 1024;

/// How long a queue remembers the keys of its tasks.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);

/// How a queue behaves. The same name must always be declared with the same behaviour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSpec {
    /// Dotted name, each part of `a-z0-9_-`.
    pub name: String,
    /// Tasks it holds at most, waiting and leased together.
    pub capacity: u64,
    /// How long a task is leased to a worker that neither extends nor answers.
    pub lease: Duration,
}

/// A task to publish.
#[derive(Debug, Clone, Default)]
pub struct NewTask {
    /// The same key within the queue's duplicate window (10 minutes) is stored once.
    pub key: String,
    /// The job it belongs to: what [`Bus::purge`] goes by. One name part.
    pub job: String,
    /// Small named values (trace context and such).
    pub headers: BTreeMap<String, String>,
    /// The task itself, at most [`MAX_MESSAGE`].
    pub payload: Bytes,
}

/// What became of a published task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// Durable from now on.
    Stored,
    /// A task with this key was stored before; nothing was added.
    Duplicate,
}

/// How much a queue holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Depth {
    /// Tasks that wait (delayed ones included).
    pub ready: u64,
    /// Tasks that are leased.
    pub leased: u64,
    /// Since when the oldest task has been there.
    pub oldest_age: Option<Duration>,
}

/// A task that is leased to us. Dropping it does nothing: the lease runs out and the task is delivered again.
#[async_trait]
pub trait Lease: Send + Sync + Debug {
    /// Renews the lease for its full time from now.
    async fn extend(&self) -> Result<()>;
    /// Done: the task is removed. Returns once the removal is durable.
    async fn ack(&self) -> Result<()>;
    /// Not done: to be delivered again after `delay`.
    async fn nak(&self, delay: Duration) -> Result<()>;
    /// Never to be delivered again: the task is removed, `reason` is logged.
    async fn terminate(&self, reason: &str) -> Result<()>;
}

/// A task and the lease on it.
#[derive(Debug)]
pub struct Delivery {
    /// The queue it came from.
    pub queue: String,
    /// Its idempotency key.
    pub key: String,
    /// Its job.
    pub job: String,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
    /// The task itself.
    pub payload: Bytes,
    /// Which delivery this is, from 1.
    pub attempt: u32,
    /// When it was published.
    pub published_at: SystemTime,
    /// The lease.
    pub lease: Box<dyn Lease>,
}

/// Where a value is kept. Each bucket is a namespace with its own kind of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bucket {
    /// Job records.
    Jobs,
    /// What idempotency keys stand for.
    Idempotency,
    /// Live workers; entries expire unless they are renewed.
    Workers,
    /// Models ever registered.
    Models,
    /// Where cached control signals are.
    Signals,
    /// Leases of singletons.
    Leases,
    /// Jobs that were given up.
    Dead,
    /// Batches.
    Batches,
    /// Chunks of batches.
    Chunks,
    /// Where checkpoints of renders are.
    Checkpoints,
}

impl Bucket {
    /// Every bucket.
    pub const ALL: [Bucket; 10] = [
        Bucket::Jobs,
        Bucket::Idempotency,
        Bucket::Workers,
        Bucket::Models,
        Bucket::Signals,
        Bucket::Leases,
        Bucket::Dead,
        Bucket::Batches,
        Bucket::Chunks,
        Bucket::Checkpoints,
    ];

    /// Its name in backends.
    pub fn name(self) -> &'static str {
        match self {
            Bucket::Jobs => "jobs",
            Bucket::Idempotency => "idempotency",
            Bucket::Workers => "workers",
            Bucket::Models => "models",
            Bucket::Signals => "signals",
            Bucket::Leases => "leases",
            Bucket::Dead => "dead",
            Bucket::Batches => "batches",
            Bucket::Chunks => "chunks",
            Bucket::Checkpoints => "checkpoints",
        }
    }
}

/// A value and the revision to compare with when it is swapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Dotted name, each part of `A-Za-z0-9_=-`.
    pub key: String,
    /// The value, at most [`MAX_VALUE`].
    pub value: Bytes,
    /// Grows with every change of this key.
    pub revision: u64,
}

/// A change of a watched bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A key has this value now.
    Put(Entry),
    /// A key is gone: deleted or expired.
    Gone {
        /// Which.
        key: String,
    },
    /// All that was there when the watch began has been told; sent once.
    Current,
}

/// An event that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its subject.
    pub subject: String,
    /// Its body.
    pub payload: Bytes,
}

/// The bus. Every method can be called from many tasks at once, and can be dropped at any await point without harm to the store.
#[async_trait]
pub trait Bus: Send + Sync + Debug {
    /// `nats` or `embedded`.
    fn kind(&self) -> &'static str;

    /// This machine's address, as whoever is across the network sees it; none where the bus is within one process.
    fn local_address(&self) -> Option<IpAddr> {
        None
    }

    /// What time it is for all who share this bus, however their machines' clocks are set. Deadlines are stated and kept by it.
    fn now(&self) -> SystemTime;

    /// Whether it answers now. Used by readiness checks.
    async fn ping(&self) -> Result<()>;

    // --- queue ---

    /// Makes a queue, or finds it there as asked. Every process declares what it uses; the call is idempotent.
    async fn declare(&self, spec: &QueueSpec) -> Result<()>;
    /// Stores a task. Durable once this returns. [`Error::Full`] if the queue is at its capacity.
    async fn publish(&self, queue: &str, task: NewTask) -> Result<Published>;
    /// Leases up to `max` tasks, oldest first; waits up to `wait` for the first. Empty after that time.
    async fn pull(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<Delivery>>;
    /// Removes the waiting tasks of a job. Returns how many. A backend may remove leased ones too: they are not delivered again.
    async fn purge(&self, queue: &str, job: &str) -> Result<u64>;
    /// What a queue holds.
    async fn depth(&self, queue: &str) -> Result<Depth>;

    // --- key-value ---

    /// The present value.
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Entry>>;
    /// Stores a value if the key has none. `None` if it has one; else the revision. It vanishes after `ttl`.
    async fn create(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<Option<u64>>;
    /// Stores a value if the key's revision is `revision`. `None` if it is not; else the new revision. `ttl` starts anew.
    async fn swap(
        &self,
        bucket: Bucket,
        key: &str,
        value: Bytes,
        revision: u64,
        ttl: Option<Duration>,
    ) -> Result<Option<u64>>;
    /// Stores a value whatever was there.
    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64>;
    /// Removes a value; fine if there is none.
    async fn delete(&self, bucket: Bucket, key: &str) -> Result<()>;
    /// All values of a bucket, by key.
    async fn list(&self, bucket: Bucket) -> Result<Vec<Entry>>;
    /// All values of a bucket, then [`Change::Current`], then every change. The stream ends when the bus is closed. It survives lost connections.
    async fn watch(&self, bucket: Bucket) -> Result<BoxStream<'static, Change>>;

    // --- objects ---

    /// Stores bytes under their BLAKE3 hash (hex). They vanish after `ttl`. Storing the same bytes again may prolong their time and never shortens it: of the two
    /// expiries the later holds, and without a `ttl` they stay. Only [`Bus::delete_object`] ends that.
    async fn put_object(&self, bytes: Bytes, ttl: Option<Duration>) -> Result<String>;
    /// The bytes of a hash, in chunks; checked against the hash, an error at the end if they differ. `None` if there are none.
    async fn get_object(&self, hash: &str) -> Result<Option<BoxStream<'static, Result<Bytes>>>>;
    /// Removes an object; fine if there is none.
    async fn delete_object(&self, hash: &str) -> Result<()>;

    // --- events ---
    // Besides what is emitted, every value that is stored in [`Bucket::Jobs`] is told as soon as it is durable, under [`names::job_stored`].

    /// Tells whoever listens now. No guarantee.
    async fn emit(&self, subject: &str, payload: Bytes) -> Result<()>;
    /// Events from now on. `*` stands for one part of a subject, `>` for the rest. Active once this returns. A subscriber that
    /// lags behind loses events rather than holding anyone up.
    async fn subscribe(&self, pattern: &str) -> Result<BoxStream<'static, Event>>;
}

/// Reads a whole object.
pub async fn read_object(bus: &dyn Bus, hash: &str) -> Result<Option<Bytes>> {
    use futures::TryStreamExt as _;
    let Some(chunks) = bus.get_object(hash).await? else { return Ok(None) };
    let chunks: Vec<Bytes> = chunks.try_collect().await?;
    Ok(Some(match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => chunks.concat().into(),
    }))
}

fn check_length(what: &str, length: usize, limit: usize) -> Result<()> {
    if length <= limit {
        return Ok(());
    }
    Err(Error::TooLarge { what: what.to_owned(), length: length as u64, limit: limit as u64 })
}

/// Refuses a queue's name that a backend could not spell.
fn check_queue(name: &str) -> Result<()> {
    let part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'));
    match name.len() <= 200 && name.split('.').all(part) {
        true => Ok(()),
        false => Err(Error::Usage(format!("{name:?} is not a queue's name"))),
    }
}

/// Refuses a key that a backend could not spell.
fn check_key(key: &str) -> Result<()> {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'=' | b'-'))
    };
    match key.len() <= 256 && key.split('.').all(part) {
        true => Ok(()),
        false => Err(Error::Usage(format!("{key:?} is not a key"))),
    }
}

/// Whether a subject fits a pattern: `*` stands for one part, `>` for the rest.
fn subject_matches(pattern: &str, subject: &str) -> bool {
    let mut parts = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, parts.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(part)) if wanted == part => {}
            _ => return false,
        }
    }
    parts.next().is_none()
}
