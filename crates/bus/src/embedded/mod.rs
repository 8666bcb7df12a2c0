//! The bus of one process: a SQLite file and a folder of objects. No server to install, nothing lost on a crash.
//!
//! One thread owns the database. It takes all calls that wait, runs them in one transaction, commits, and only then answers: durable
//! and still quick, as many calls share one sync of the disk. A lock file keeps a second process out.
//!
//! Read in this order: this file (the bus), [`database`] (the thread), [`tasks`] (pulling, leases), [`objects`] (files).

mod database;
mod objects;
mod tasks;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use efferent_proto::time::from_unix_ms;
use futures::{StreamExt as _, stream::BoxStream};
use rusqlite::{OptionalExtension as _, Transaction, params};
use tokio::sync::{broadcast, mpsc as channel, oneshot};

use self::{
    database::{Aftermath, Call, Database, Wakers, after, apart, connect, entries, entry, now, queue_row},
    objects::{TRIES, next_chunk, object_path, write_durably},
};
use crate::{
    Bucket, Bus, Change, DUPLICATE_WINDOW, Delivery, Depth, Entry, Error, Event, MAX_MESSAGE, MAX_OBJECT, MAX_VALUE,
    NewTask, Published, QueueSpec, Result, check_key, check_length, check_queue, clock::Clock, subject_matches,
};

/// Events that a slow subscriber may be behind before it loses some.
const EVENT_BACKLOG: usize = 4096;

/// A bus in this process.
#[derive(Debug)]
pub struct Embedded {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    calls: mpsc::Sender<Call>,
    folder: PathBuf,
    wakers: Arc<Wakers>,
    events: broadcast::Sender<Event>,
    /// Held as long as the bus lives.
    _lock: fs::File,
}

impl Embedded {
    /// Opens the bus in a folder, which is made if it is not there.
    ///
    /// # Errors
    /// If the folder cannot be used, or another process has it open.
    pub async fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        tokio::task::spawn_blocking(move || Self::open_blocking(folder))
            .await
            .map_err(|error| Error::unavailable("opening the embedded queue", error))?
    }

    fn open_blocking(folder: PathBuf) -> Result<Self> {
        let name = folder.display().to_string();
        let fault = |what: &str, source: std::io::Error| Error::unavailable(format!("{what} {name}"), source);
        fs::create_dir_all(folder.join("objects")).map_err(|error| fault("making folder", error))?;
        let lock = fs::File::create(folder.join("lock")).map_err(|error| fault("opening the lock in", error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::Unfit(format!(
                    "{name} is in use by another process: the embedded queue serves one process. Use NATS to join several."
                )));
            }
            Err(fs::TryLockError::Error(error)) => return Err(fault("locking", error)),
        }
        let connection = connect(&folder.join("queue.sqlite3"))
            .map_err(|error| Error::unavailable(format!("opening the database in {name}"), error))?;
        let (calls, inbox) = mpsc::channel();
        let wakers = Arc::new(Wakers::default());
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let worker = Database {
            connection,
            inbox,
            wakers: wakers.clone(),
            watchers: Vec::new(),
            folder: folder.clone(),
            events: events.clone(),
        };
        thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || worker.serve())
            .map_err(|error| fault("starting the queue's thread for", error))?;
        Ok(Self { inner: Arc::new(Inner { calls, folder, wakers, events, _lock: lock }) })
    }
}

impl Inner {
    /// Runs `work` on the database's thread. It sees the effects of earlier calls; its own are durable when this returns.
    async fn call<T: Send + 'static>(
        &self,
        what: impl Fn() -> String,
        work: impl FnOnce(&Transaction<'_>, &mut Aftermath) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel::<Result<T>>();
        let call: Call = Box::new(move |transaction, aftermath| {
            // Whoever asked has gone away: a lease would be given to nobody.
            if reply.is_closed() {
                return Box::new(|_| {});
            }
            let outcome = apart(transaction, aftermath, work);
            Box::new(move |fault| {
                let _ = reply.send(match fault {
                    None => outcome,
                    Some(fault) => Err(Error::Unavailable { what: fault.to_owned(), source: None }),
                });
            })
        });
        let closed = || Error::Unavailable { what: what(), source: None };
        self.calls.send(call).map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }
}

#[async_trait]
impl Bus for Embedded {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    fn now(&self) -> SystemTime {
        Clock::of_process().now()
    }

    async fn ping(&self) -> Result<()> {
        self.inner.call(|| "ping".to_owned(), |_, _| Ok(())).await
    }

    async fn declare(&self, spec: &QueueSpec) -> Result<()> {
        check_queue(&spec.name)?;
        let spec = spec.clone();
        self.inner
            .call(
                || "declaring a queue".to_owned(),
                move |transaction, _| {
                    let statement = "INSERT INTO queues (name, capacity, lease_ms) VALUES (?1, ?2, ?3)
                        ON CONFLICT (name) DO UPDATE SET capacity = ?2, lease_ms = ?3";
                    let lease = i64::try_from(spec.lease.as_millis()).unwrap_or(i64::MAX);
                    let capacity = i64::try_from(spec.capacity).unwrap_or(i64::MAX);
                    transaction.prepare_cached(statement)?.execute(params![spec.name, capacity, lease])?;
                    Ok(())
                },
            )
            .await
    }

    async fn publish(&self, queue: &str, task: NewTask) -> Result<Published> {
        check_length("task", task.payload.len(), MAX_MESSAGE)?;
        let queue = queue.to_owned();
        let published = self
            .inner
            .call(
                || "publishing a task".to_owned(),
                move |transaction, aftermath| {
                    let (capacity, tasks, _) = queue_row(transaction, &queue)?;
                    let now = now();
                    let known: Option<i64> = transaction
                        .prepare_cached("SELECT 1 FROM seen WHERE queue = ?1 AND key = ?2 AND until > ?3")?
                        .query_row(params![queue, task.key, now], |row| row.get(0))
                        .optional()?;
                    if known.is_some() {
                        return Ok(Published::Duplicate);
                    }
                    if tasks >= capacity {
                        return Err(Error::Full { queue, capacity: capacity.unsigned_abs() });
                    }
                    let headers = serde_json::to_string(&task.headers).unwrap_or_default();
                    transaction
                        .prepare_cached("INSERT INTO tasks (queue, key, job, headers, payload, due, published) VALUES (?1, ?2, ?3, ?4, ?5, 0, ?6)")?
                        .execute(params![queue, task.key, task.job, headers, &task.payload[..], now])?;
                    transaction
                        .prepare_cached("INSERT OR REPLACE INTO seen VALUES (?1, ?2, ?3)")?
                        .execute(params![queue, task.key, after(DUPLICATE_WINDOW)])?;
                    aftermath.woken.push(queue);
                    Ok(Published::Stored)
                },
            )
            .await?;
        Ok(published)
    }

    async fn pull(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<Delivery>> {
        let until = tokio::time::Instant::now() + wait;
        let waker = self.inner.wakers.of(queue);
        loop {
            // Listen before looking: a task that is published in between is not missed.
            let woken = waker.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let (found, next_due) = self.pull_now(queue, max).await?;
            if !found.is_empty() || max == 0 || tokio::time::Instant::now() >= until {
                return Ok(found);
            }
            let due = next_due.map(|due| from_unix_ms(due).duration_since(self.now()).unwrap_or_default());
            let pause =
                due.map_or(until, |due| until.min(tokio::time::Instant::now() + due + Duration::from_millis(1)));
            tokio::select! {
                () = &mut woken => {}
                () = tokio::time::sleep_until(pause) => {}
            }
        }
    }

    async fn purge(&self, queue: &str, job: &str) -> Result<u64> {
        let (queue, job) = (queue.to_owned(), job.to_owned());
        self.inner
            .call(
                || "purging a job".to_owned(),
                move |transaction, _| {
                    let statement = "DELETE FROM tasks WHERE queue = ?1 AND job = ?2 AND (leased = 0 OR due <= ?3)";
                    Ok(transaction.prepare_cached(statement)?.execute(params![queue, job, now()])? as u64)
                },
            )
            .await
    }

    async fn depth(&self, queue: &str) -> Result<Depth> {
        let queue = queue.to_owned();
        self.inner
            .call(
                || "asking a queue's depth".to_owned(),
                move |transaction, _| {
                    let (_, tasks, _) = queue_row(transaction, &queue)?;
                    let now = now();
                    let leased: i64 = transaction
                        .prepare_cached("SELECT count(*) FROM tasks WHERE queue = ?1 AND leased = 1 AND due > ?2")?
                        .query_row(params![queue, now], |row| row.get(0))?;
                    let oldest: Option<i64> = transaction
                        .prepare_cached("SELECT min(published) FROM tasks WHERE queue = ?1")?
                        .query_row([&queue], |row| row.get(0))?;
                    let age = |published: i64| Duration::from_millis(now.saturating_sub(published).unsigned_abs());
                    Ok(Depth {
                        ready: (tasks - leased).unsigned_abs(),
                        leased: leased.unsigned_abs(),
                        oldest_age: oldest.map(age),
                    })
                },
            )
            .await
    }

    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Entry>> {
        check_key(key)?;
        let key = key.to_owned();
        self.inner.call(|| format!("reading {}", bucket.name()), move |t, _| Ok(entry(t, bucket, &key)?)).await
    }

    async fn create(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<Option<u64>> {
        self.store(bucket, key, value, ttl, |present| present.is_none()).await
    }

    async fn swap(
        &self,
        bucket: Bucket,
        key: &str,
        value: Bytes,
        revision: u64,
        ttl: Option<Duration>,
    ) -> Result<Option<u64>> {
        self.store(bucket, key, value, ttl, move |present| present == Some(revision)).await
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        let stored = self.store(bucket, key, value, ttl, |_| true).await?;
        stored.ok_or_else(|| Error::Usage("a put cannot be refused".to_owned()))
    }

    async fn delete(&self, bucket: Bucket, key: &str) -> Result<()> {
        check_key(key)?;
        let key = key.to_owned();
        self.inner
            .call(
                || format!("deleting from {}", bucket.name()),
                move |transaction, aftermath| {
                    let statement = "DELETE FROM entries WHERE bucket = ?1 AND key = ?2";
                    if transaction.prepare_cached(statement)?.execute(params![bucket.name(), key])? > 0 {
                        aftermath.changes.push((bucket, Change::Gone { key }));
                    }
                    Ok(())
                },
            )
            .await
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Entry>> {
        self.inner.call(|| format!("listing {}", bucket.name()), move |t, _| Ok(entries(t, bucket)?)).await
    }

    async fn watch(&self, bucket: Bucket) -> Result<BoxStream<'static, Change>> {
        let (sender, receiver) = channel::unbounded_channel();
        self.inner
            .call(
                || format!("watching {}", bucket.name()),
                move |transaction, aftermath| {
                    for entry in entries(transaction, bucket)? {
                        let _ = sender.send(Change::Put(entry));
                    }
                    let _ = sender.send(Change::Current);
                    aftermath.watchers.push((bucket, sender));
                    Ok(())
                },
            )
            .await?;
        Ok(tokio_stream::wrappers::UnboundedReceiverStream::new(receiver).boxed())
    }

    async fn put_object(&self, bytes: Bytes, ttl: Option<Duration>) -> Result<String> {
        check_length("object", bytes.len(), MAX_OBJECT)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        for _ in 0..TRIES {
            let (path, bytes) = (object_path(&self.inner.folder, &hash), bytes.clone());
            let length = bytes.len() as u64;
            let written = tokio::task::spawn_blocking(move || write_durably(&path, &bytes)).await;
            written.map_err(|error| Error::unavailable("storing an object", error))?.map_err(|error| {
                match error.kind() {
                    std::io::ErrorKind::StorageFull => {
                        Error::unavailable("the disk is full, an object cannot be stored", error)
                    }
                    _ => Error::unavailable("storing an object", error),
                }
            })?;
            if self.note_object(&hash, length, ttl).await? {
                return Ok(hash);
            }
        }
        Err(Error::Unavailable { what: "storing an object that is deleted again and again".to_owned(), source: None })
    }

    async fn get_object(&self, hash: &str) -> Result<Option<BoxStream<'static, Result<Bytes>>>> {
        let name = hash.to_owned();
        let statement = "SELECT 1 FROM objects WHERE hash = ?1 AND (until IS NULL OR until > ?2)";
        let known = self
            .inner
            .call(
                || "reading an object".to_owned(),
                move |transaction, _| {
                    let found = transaction.prepare_cached(statement)?.exists(params![name, now()])?;
                    Ok(found)
                },
            )
            .await?;
        if !known {
            return Ok(None);
        }
        let file = match tokio::fs::File::open(object_path(&self.inner.folder, hash)).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::unavailable("reading an object", error)),
        };
        let state = Some((file, blake3::Hasher::new(), hash.to_owned()));
        Ok(Some(futures::stream::unfold(state, next_chunk).boxed()))
    }

    async fn delete_object(&self, hash: &str) -> Result<()> {
        let name = hash.to_owned();
        self.inner
            .call(
                || "deleting an object".to_owned(),
                move |transaction, aftermath| {
                    if transaction.prepare_cached("DELETE FROM objects WHERE hash = ?1")?.execute([&name])? > 0 {
                        aftermath.objects.push(name);
                    }
                    Ok(())
                },
            )
            .await
    }

    async fn emit(&self, subject: &str, payload: Bytes) -> Result<()> {
        check_length("event", payload.len(), MAX_MESSAGE)?;
        // No subscribers is fine.
        let _ = self.inner.events.send(Event { subject: subject.to_owned(), payload });
        Ok(())
    }

    async fn subscribe(&self, pattern: &str) -> Result<BoxStream<'static, Event>> {
        let pattern = pattern.to_owned();
        let stream = tokio_stream::wrappers::BroadcastStream::new(self.inner.events.subscribe());
        let wanted = move |event: std::result::Result<Event, _>| {
            std::future::ready(event.ok().filter(|event: &Event| subject_matches(&pattern, &event.subject)))
        };
        Ok(stream.filter_map(wanted).boxed())
    }
}

impl Embedded {
    async fn store(
        &self,
        bucket: Bucket,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
        may: impl FnOnce(Option<u64>) -> bool + Send + 'static,
    ) -> Result<Option<u64>> {
        check_key(key)?;
        check_length("value", value.len(), MAX_VALUE)?;
        let key = key.to_owned();
        self.inner
            .call(
                || format!("writing {}", bucket.name()),
                move |transaction, aftermath| {
                    let present = entry(transaction, bucket, &key)?.map(|entry| entry.revision);
                    if !may(present) {
                        return Ok(None);
                    }
                    let revision: i64 = transaction
                        .prepare_cached("UPDATE revision SET number = number + 1 RETURNING number")?
                        .query_row([], |row| row.get(0))?;
                    transaction
                        .prepare_cached("INSERT OR REPLACE INTO entries VALUES (?1, ?2, ?3, ?4, ?5)")?
                        .execute(params![bucket.name(), key, &value[..], revision, ttl.map(after)])?;
                    let revision = revision.unsigned_abs();
                    aftermath.changes.push((bucket, Change::Put(Entry { key, value, revision })));
                    Ok(Some(revision))
                },
            )
            .await
    }
}
