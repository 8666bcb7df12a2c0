//! The bus of one process: a SQLite file and a folder of objects. No server to install, nothing lost on a crash.
//!
//! One thread owns the database. It takes all calls that wait, runs them in one transaction, commits, and only then answers: durable
//! and still quick, as many calls share one sync of the disk. A lock file keeps a second process out.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use efferent_proto::time::{from_unix_ms, unix_ms};
use futures::{StreamExt as _, stream::BoxStream};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use tokio::{
    io::AsyncReadExt as _,
    sync::{Notify, broadcast, mpsc as channel, oneshot},
};

use crate::{
    Bucket, Bus, Change, DUPLICATE_WINDOW, Delivery, Depth, Entry, Error, Event, Lease, MAX_MESSAGE, MAX_OBJECT,
    MAX_VALUE, NewTask, Published, QueueSpec, Result, check_key, check_length, check_queue, subject_matches,
};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS queues (name TEXT PRIMARY KEY, capacity INTEGER NOT NULL, lease_ms INTEGER NOT NULL, tasks INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
-- due: when the task may be delivered; while it is leased, when its lease ends. attempt: deliveries so far, and what tells one lease from the next.
CREATE TABLE IF NOT EXISTS tasks (id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, key TEXT NOT NULL, job TEXT NOT NULL, headers TEXT NOT NULL,
    payload BLOB NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, leased INTEGER NOT NULL DEFAULT 0, due INTEGER NOT NULL, published INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS tasks_by_queue ON tasks (queue, leased, id);
CREATE INDEX IF NOT EXISTS tasks_by_job ON tasks (queue, job);
CREATE INDEX IF NOT EXISTS tasks_leased ON tasks (queue, due) WHERE leased = 1;
CREATE TRIGGER IF NOT EXISTS task_added AFTER INSERT ON tasks BEGIN UPDATE queues SET tasks = tasks + 1 WHERE name = new.queue; END;
CREATE TRIGGER IF NOT EXISTS task_removed AFTER DELETE ON tasks BEGIN UPDATE queues SET tasks = tasks - 1 WHERE name = old.queue; END;
CREATE TABLE IF NOT EXISTS seen (queue TEXT NOT NULL, key TEXT NOT NULL, until INTEGER NOT NULL, PRIMARY KEY (queue, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS seen_by_time ON seen (until);
CREATE TABLE IF NOT EXISTS entries (bucket TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, until INTEGER, PRIMARY KEY (bucket, key));
CREATE INDEX IF NOT EXISTS entries_by_time ON entries (until) WHERE until IS NOT NULL;
CREATE TABLE IF NOT EXISTS objects (hash TEXT PRIMARY KEY, length INTEGER NOT NULL, until INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revision (only INTEGER PRIMARY KEY CHECK (only = 0), number INTEGER NOT NULL);
INSERT OR IGNORE INTO revision VALUES (0, 0);
-- One process owns the file: whatever was leased, its holder is gone.
UPDATE tasks SET leased = 0, due = 0 WHERE leased = 1;
";

/// How often what has expired is removed.
const SWEEP: Duration = Duration::from_millis(200);
/// Events that a slow subscriber may be behind before it loses some.
const EVENT_BACKLOG: usize = 4096;
const CHUNK: usize = 256 * 1024;

type Call = Box<dyn FnOnce(&Transaction<'_>, &mut Aftermath) -> Box<dyn FnOnce(bool) + Send> + Send>;

/// What to tell others once the transaction is durable.
#[derive(Default)]
struct Aftermath {
    changes: Vec<(Bucket, Change)>,
    woken: Vec<String>,
    watchers: Vec<(Bucket, channel::UnboundedSender<Change>)>,
}

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

#[derive(Debug, Default)]
struct Wakers(Mutex<HashMap<String, Arc<Notify>>>);

impl Wakers {
    fn of(&self, queue: &str) -> Arc<Notify> {
        let mut wakers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = wakers.get(queue) {
            return waker.clone();
        }
        wakers.entry(queue.to_owned()).or_default().clone()
    }
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
        let worker =
            Database { connection, inbox, wakers: wakers.clone(), watchers: Vec::new(), folder: folder.clone() };
        thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || worker.serve())
            .map_err(|error| fault("starting the queue's thread for", error))?;
        Ok(Self { inner: Arc::new(Inner { calls, folder, wakers, events, _lock: lock }) })
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // A committed transaction survives a power cut, not only a crash of the process.
    connection.pragma_update(None, "synchronous", "full")?;
    connection.execute_batch(SCHEMA)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

struct Database {
    connection: Connection,
    inbox: mpsc::Receiver<Call>,
    wakers: Arc<Wakers>,
    watchers: Vec<(Bucket, channel::UnboundedSender<Change>)>,
    folder: PathBuf,
}

impl Database {
    fn serve(mut self) {
        let mut swept = Instant::now();
        loop {
            match self.inbox.recv_timeout(SWEEP) {
                Ok(first) => self.run(first),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            if swept.elapsed() >= SWEEP {
                swept = Instant::now();
                if let Err(error) = self.sweep() {
                    tracing::warn!(%error, "cannot remove what has expired");
                }
            }
        }
    }

    /// Runs a call and those that wait behind it in one transaction, commits, answers.
    fn run(&mut self, first: Call) {
        let mut aftermath = Aftermath::default();
        let mut replies = Vec::new();
        let committed = match self.connection.transaction() {
            Ok(transaction) => {
                replies.push(first(&transaction, &mut aftermath));
                while replies.len() < 256
                    && let Ok(call) = self.inbox.try_recv()
                {
                    replies.push(call(&transaction, &mut aftermath));
                }
                transaction.commit()
            }
            // Dropping the call tells the caller.
            Err(error) => Err(error),
        };
        if let Err(error) = &committed {
            tracing::error!(%error, "the queue's database failed");
        }
        let durable = committed.is_ok();
        if durable {
            self.tell(aftermath);
        }
        replies.into_iter().for_each(|reply| reply(durable));
    }

    fn tell(&mut self, aftermath: Aftermath) {
        for (bucket, change) in aftermath.changes {
            self.watchers.retain(|(watched, watcher)| *watched != bucket || watcher.send(change.clone()).is_ok());
        }
        // Told what there was, in the same transaction as the changes above: from here on they get every change.
        self.watchers.extend(aftermath.watchers);
        for queue in aftermath.woken {
            self.wakers.of(&queue).notify_waiters();
        }
    }

    fn sweep(&mut self) -> rusqlite::Result<()> {
        let now = now();
        let transaction = self.connection.transaction()?;
        let gone: Vec<(String, String)> = transaction
            .prepare_cached("DELETE FROM entries WHERE until <= ?1 RETURNING bucket, key")?
            .query_map([now], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
        transaction.prepare_cached("DELETE FROM seen WHERE until <= ?1")?.execute([now])?;
        let objects: Vec<String> = transaction
            .prepare_cached("DELETE FROM objects WHERE until <= ?1 RETURNING hash")?
            .query_map([now], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        transaction.commit()?;
        for hash in objects {
            let _ = fs::remove_file(object_path(&self.folder, &hash));
        }
        let changes = gone.into_iter().filter_map(|(bucket, key)| {
            let bucket = Bucket::ALL.into_iter().find(|b| b.name() == bucket)?;
            Some((bucket, Change::Gone { key }))
        });
        let changes = changes.collect();
        self.tell(Aftermath { changes, ..Default::default() });
        Ok(())
    }
}

fn now() -> i64 {
    unix_ms(SystemTime::now())
}

/// `at` in the database's form; far away for what does not fit.
fn after(duration: Duration) -> i64 {
    now().saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

fn object_path(folder: &Path, hash: &str) -> PathBuf {
    folder.join("objects").join(hash.get(..2).unwrap_or("__")).join(hash)
}

impl Inner {
    /// Runs `work` on the database's thread. It sees the effects of earlier calls; its own are durable when this returns.
    async fn call<T: Send + 'static>(
        &self,
        what: impl Fn() -> String,
        work: impl FnOnce(&Transaction<'_>, &mut Aftermath) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel::<Option<Result<T>>>();
        let call: Call = Box::new(move |transaction, aftermath| {
            // Whoever asked has gone away: a lease would be given to nobody.
            if reply.is_closed() {
                return Box::new(|_| {});
            }
            let outcome = apart(transaction, aftermath, work);
            Box::new(move |durable| {
                let _ = reply.send(durable.then_some(outcome));
            })
        });
        let closed = || Error::Unavailable { what: what(), source: None };
        self.calls.send(call).map_err(|_| closed())?;
        answer.await.ok().flatten().unwrap_or_else(|| Err(closed()))
    }
}

/// Runs `work` so that its failure undoes its own changes and nobody else's in the transaction.
fn apart<T>(
    transaction: &Transaction<'_>,
    aftermath: &mut Aftermath,
    work: impl FnOnce(&Transaction<'_>, &mut Aftermath) -> Result<T>,
) -> Result<T> {
    let savepoint = |statement: &str| {
        transaction
            .prepare_cached(statement)
            .and_then(|mut s| s.execute([]))
            .map_err(|error| Error::unavailable("database", error))
    };
    savepoint("SAVEPOINT call")?;
    let mut own = Aftermath::default();
    let outcome = work(transaction, &mut own);
    if outcome.is_ok() {
        aftermath.changes.append(&mut own.changes);
        aftermath.woken.append(&mut own.woken);
        aftermath.watchers.append(&mut own.watchers);
    } else {
        savepoint("ROLLBACK TO call")?;
    }
    savepoint("RELEASE call")?;
    outcome
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Error::unavailable("the embedded queue's database", error)
    }
}

#[derive(Debug)]
struct EmbeddedLease {
    inner: Arc<Inner>,
    queue: String,
    key: String,
    id: i64,
    attempt: u32,
    time: Duration,
}

impl EmbeddedLease {
    /// Runs a statement on the task if the lease still holds. Its parameters are id, attempt, now and `value`.
    async fn act(&self, statement: &'static str, value: i64, wakes: bool) -> Result<()> {
        let (queue, key, id, attempt) = (self.queue.clone(), self.key.clone(), self.id, self.attempt);
        self.inner
            .call(
                || format!("answering task {} in {}", self.key, self.queue),
                move |transaction, aftermath| {
                    let changed = transaction.prepare_cached(statement)?.execute(params![id, attempt, now(), value])?;
                    if changed == 0 {
                        return Err(Error::LeaseLost { queue, key });
                    }
                    if wakes {
                        aftermath.woken.push(queue);
                    }
                    Ok(())
                },
            )
            .await
    }
}

#[async_trait]
impl Lease for EmbeddedLease {
    async fn extend(&self) -> Result<()> {
        let statement = "UPDATE tasks SET due = ?4 WHERE id = ?1 AND attempt = ?2 AND leased = 1 AND due > ?3";
        self.act(statement, after(self.time), false).await
    }

    async fn ack(&self) -> Result<()> {
        // A lease that ran out but was not given to another may still be answered: the work is done, why do it again?
        self.act("DELETE FROM tasks WHERE id = ?1 AND attempt = ?2 AND leased = 1 AND ?3 + ?4 <> 0", 0, false).await
    }

    async fn nak(&self, delay: Duration) -> Result<()> {
        let statement =
            "UPDATE tasks SET leased = 0, due = ?4 WHERE id = ?1 AND attempt = ?2 AND leased = 1 AND ?3 <> 0";
        self.act(statement, after(delay), true).await
    }

    async fn terminate(&self, reason: &str) -> Result<()> {
        tracing::info!(queue = self.queue, key = self.key, reason, "task terminated");
        self.ack().await
    }
}

#[async_trait]
impl Bus for Embedded {
    fn kind(&self) -> &'static str {
        "embedded"
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
            let due = next_due.map(|due| from_unix_ms(due).duration_since(SystemTime::now()).unwrap_or_default());
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
        let length = bytes.len() as i64;
        let path = object_path(&self.inner.folder, &hash);
        let written = tokio::task::spawn_blocking(move || write_durably(&path, &bytes)).await;
        written
            .map_err(|error| Error::unavailable("storing an object", error))?
            .map_err(|error| Error::unavailable("storing an object", error))?;
        let (name, until) = (hash.clone(), ttl.map(after));
        self.inner
            .call(
                || "storing an object".to_owned(),
                move |transaction, _| {
                    transaction
                        .prepare_cached("INSERT OR REPLACE INTO objects VALUES (?1, ?2, ?3)")?
                        .execute(params![name, length, until])?;
                    Ok(())
                },
            )
            .await?;
        Ok(hash)
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
        let removed = self
            .inner
            .call(
                || "deleting an object".to_owned(),
                move |transaction, _| {
                    Ok(transaction.prepare_cached("DELETE FROM objects WHERE hash = ?1")?.execute([name])? > 0)
                },
            )
            .await?;
        if removed {
            let _ = tokio::fs::remove_file(object_path(&self.inner.folder, hash)).await;
        }
        Ok(())
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
    /// Leases what can be delivered now; if nothing can, tells when something may.
    async fn pull_now(&self, queue: &str, max: usize) -> Result<(Vec<Delivery>, Option<i64>)> {
        let name = queue.to_owned();
        let limit = i64::try_from(max).unwrap_or(i64::MAX);
        let (time, rows, next_due) = self
            .inner
            .call(
                || "pulling tasks".to_owned(),
                move |transaction, _| {
                    let (_, _, lease) = queue_row(transaction, &name)?;
                    let now = now();
                    // Two looks, each along an index: what waits, and what was leased and came back.
                    let statement = "SELECT id FROM (
                            SELECT * FROM (SELECT id FROM tasks WHERE queue = ?1 AND leased = 1 AND due <= ?2 LIMIT ?3)
                            UNION ALL SELECT * FROM (SELECT id FROM tasks WHERE queue = ?1 AND leased = 0 AND due <= ?2 ORDER BY id LIMIT ?3)
                        ) ORDER BY id LIMIT ?3";
                    let ids: Vec<i64> = transaction
                        .prepare_cached(statement)?
                        .query_map(params![name, now, limit], |row| row.get(0))?
                        .collect::<rusqlite::Result<_>>()?;
                    let mut rows = Vec::with_capacity(ids.len());
                    for id in ids {
                        let statement = "UPDATE tasks SET leased = 1, due = ?2, attempt = attempt + 1 WHERE id = ?1
                            RETURNING id, key, job, headers, payload, attempt, published";
                        rows.push(transaction.prepare_cached(statement)?.query_row(
                            params![id, now.saturating_add(lease)],
                            |row| {
                                Ok(Row {
                                    id: row.get(0)?,
                                    key: row.get(1)?,
                                    job: row.get(2)?,
                                    headers: row.get(3)?,
                                    payload: row.get(4)?,
                                    attempt: row.get(5)?,
                                    published: row.get(6)?,
                                })
                            },
                        )?);
                    }
                    let next_due = match rows.is_empty() {
                        true => transaction
                            .prepare_cached("SELECT min(due) FROM tasks WHERE queue = ?1")?
                            .query_row([&name], |row| row.get(0))?,
                        false => None,
                    };
                    Ok((Duration::from_millis(lease.unsigned_abs()), rows, next_due))
                },
            )
            .await?;
        let delivery = |row: Row| Delivery {
            queue: queue.to_owned(),
            key: row.key.clone(),
            job: row.job,
            headers: serde_json::from_str::<BTreeMap<String, String>>(&row.headers).unwrap_or_default(),
            payload: row.payload.into(),
            attempt: row.attempt,
            published_at: from_unix_ms(row.published),
            lease: Box::new(EmbeddedLease {
                inner: self.inner.clone(),
                queue: queue.to_owned(),
                key: row.key,
                id: row.id,
                attempt: row.attempt,
                time,
            }),
        };
        Ok((rows.into_iter().map(delivery).collect(), next_due))
    }

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

struct Row {
    id: i64,
    key: String,
    job: String,
    headers: String,
    payload: Vec<u8>,
    attempt: u32,
    published: i64,
}

/// Capacity, tasks and lease in milliseconds of a queue.
fn queue_row(transaction: &Transaction<'_>, queue: &str) -> Result<(i64, i64, i64)> {
    transaction
        .prepare_cached("SELECT capacity, tasks, lease_ms FROM queues WHERE name = ?1")?
        .query_row([queue], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?
        .ok_or_else(|| Error::Usage(format!("queue {queue} was not declared")))
}

fn entry(transaction: &Transaction<'_>, bucket: Bucket, key: &str) -> rusqlite::Result<Option<Entry>> {
    transaction
        .prepare_cached(
            "SELECT key, value, revision FROM entries WHERE bucket = ?1 AND key = ?2 AND (until IS NULL OR until > ?3)",
        )?
        .query_row(params![bucket.name(), key, now()], to_entry)
        .optional()
}

fn entries(transaction: &Transaction<'_>, bucket: Bucket) -> rusqlite::Result<Vec<Entry>> {
    transaction
        .prepare_cached(
            "SELECT key, value, revision FROM entries WHERE bucket = ?1 AND (until IS NULL OR until > ?2) ORDER BY key",
        )?
        .query_map(params![bucket.name(), now()], to_entry)?
        .collect()
}

fn to_entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let value: Vec<u8> = row.get(1)?;
    Ok(Entry { key: row.get(0)?, value: value.into(), revision: row.get::<_, i64>(2)?.unsigned_abs() })
}

/// Writes a file so that it is there in full or not at all, whenever the power goes.
fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() == bytes.len() as u64) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let part = path.with_extension(format!("part{}", efferent_proto::names::new_job_id()));
    let mut file = fs::File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    fs::File::open(folder)?.sync_all()
}

type Reading = Option<(tokio::fs::File, blake3::Hasher, String)>;

async fn next_chunk(state: Reading) -> Option<(Result<Bytes>, Reading)> {
    let (mut file, mut hasher, hash) = state?;
    let mut chunk = vec![0; CHUNK];
    let mut filled = 0;
    while filled < CHUNK {
        match file.read(&mut chunk[filled..]).await {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) => return Some((Err(Error::unavailable(format!("reading object {hash}"), error)), None)),
        }
    }
    chunk.truncate(filled);
    hasher.update(&chunk);
    if filled == CHUNK {
        return Some((Ok(chunk.into()), Some((file, hasher, hash))));
    }
    if hasher.finalize().to_hex().as_str() != hash {
        let what = format!("object {hash} is damaged: its bytes have another hash");
        return Some((Err(Error::Unavailable { what, source: None }), None));
    }
    Some((Ok(chunk.into()), None))
}
