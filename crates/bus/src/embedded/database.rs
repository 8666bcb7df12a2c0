//! The thread that owns the database: calls in transactions, what has expired, whose files go, who is told.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use efferent_proto::{names, time::unix_ms};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use tokio::sync::{Notify, broadcast, mpsc as channel};

use super::objects::object_path;
use crate::{Bucket, Change, Entry, Error, Event, Result, clock::Clock};

pub(super) const SCHEMA: &str = "
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
pub(super) const SWEEP: Duration = Duration::from_millis(200);
/// A call, and what answers it once it is durable, or with what went wrong instead.
pub(super) type Call = Box<dyn FnOnce(&Transaction<'_>, &mut Aftermath) -> Reply + Send>;
pub(super) type Reply = Box<dyn FnOnce(Option<&str>) + Send>;

/// What to tell others, and to remove, once the transaction is durable.
#[derive(Default)]
pub(super) struct Aftermath {
    pub(super) changes: Vec<(Bucket, Change)>,
    pub(super) woken: Vec<String>,
    pub(super) watchers: Vec<(Bucket, channel::UnboundedSender<Change>)>,
    /// Objects that were removed and still have their files.
    pub(super) objects: Vec<String>,
    /// Why the transaction cannot be committed, if a call has brought it down.
    fault: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Wakers(Mutex<HashMap<String, Arc<Notify>>>);

impl Wakers {
    pub(super) fn of(&self, queue: &str) -> Arc<Notify> {
        let mut wakers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = wakers.get(queue) {
            return waker.clone();
        }
        wakers.entry(queue.to_owned()).or_default().clone()
    }
}

pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // A committed transaction survives a power cut, not only a crash of the process.
    connection.pragma_update(None, "synchronous", "full")?;
    connection.execute_batch(SCHEMA)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

pub(super) struct Database {
    pub(super) connection: Connection,
    pub(super) inbox: mpsc::Receiver<Call>,
    pub(super) wakers: Arc<Wakers>,
    pub(super) watchers: Vec<(Bucket, channel::UnboundedSender<Change>)>,
    pub(super) folder: PathBuf,
    pub(super) events: broadcast::Sender<Event>,
}

impl Database {
    pub(super) fn serve(mut self) {
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
                // After a fault such as a full disk SQLite has undone everything, and what follows would be outside the transaction.
                while replies.len() < 256
                    && !transaction.is_autocommit()
                    && let Ok(call) = self.inbox.try_recv()
                {
                    replies.push(call(&transaction, &mut aftermath));
                }
                transaction.commit()
            }
            // Dropping the call tells the caller.
            Err(error) => Err(error),
        };
        let fault = committed.err().map(|error| {
            tracing::error!(%error, "the queue's database failed");
            aftermath.fault.take().unwrap_or_else(|| what(&error).to_owned())
        });
        if fault.is_none() {
            self.tell(aftermath);
        }
        replies.into_iter().for_each(|reply| reply(fault.as_deref()));
    }

    fn tell(&mut self, aftermath: Aftermath) {
        self.unlink(aftermath.objects);
        for (bucket, change) in aftermath.changes {
            if let (Bucket::Jobs, Change::Put(entry)) = (bucket, &change) {
                // No subscribers is fine.
                let _ =
                    self.events.send(Event { subject: names::job_stored(&entry.key), payload: entry.value.clone() });
            }
            self.watchers.retain(|(watched, watcher)| *watched != bucket || watcher.send(change.clone()).is_ok());
        }
        // Told what there was, in the same transaction as the changes above: from here on they get every change.
        self.watchers.extend(aftermath.watchers);
        for queue in aftermath.woken {
            self.wakers.of(&queue).notify_waiters();
        }
    }

    /// Removes the files of objects that were removed, unless they were stored again in the same transaction: that found the file, and did not write it anew.
    fn unlink(&self, objects: Vec<String>) {
        for hash in objects {
            let statement = self.connection.prepare_cached("SELECT 1 FROM objects WHERE hash = ?1");
            if let Ok(false) = statement.and_then(|mut statement| statement.exists([&hash])) {
                let _ = fs::remove_file(object_path(&self.folder, &hash));
            }
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
        let changes = gone.into_iter().filter_map(|(bucket, key)| {
            let bucket = Bucket::ALL.into_iter().find(|b| b.name() == bucket)?;
            Some((bucket, Change::Gone { key }))
        });
        let changes = changes.collect();
        self.tell(Aftermath { changes, objects, ..Default::default() });
        Ok(())
    }
}

pub(super) fn now() -> i64 {
    unix_ms(Clock::of_process().now())
}

/// `at` in the database's form; far away for what does not fit.
pub(super) fn after(duration: Duration) -> i64 {
    now().saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

/// Runs `work` so that its failure undoes its own changes and nobody else's in the transaction.
pub(super) fn apart<T>(
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
        aftermath.objects.append(&mut own.objects);
    } else if transaction.is_autocommit() {
        if let Err(error @ Error::Unavailable { what, .. }) = &outcome {
            tracing::debug!(%error, "a call brought its transaction down");
            aftermath.fault = Some(what.clone());
        }
        return outcome;
    } else {
        savepoint("ROLLBACK TO call")?;
    }
    savepoint("RELEASE call")?;
    outcome
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Error::unavailable(what(&error), error)
    }
}

fn what(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => "the disk is full, the embedded queue's database cannot be written",
        _ => "the embedded queue's database",
    }
}

/// Capacity, tasks and lease in milliseconds of a queue.
pub(super) fn queue_row(transaction: &Transaction<'_>, queue: &str) -> Result<(i64, i64, i64)> {
    transaction
        .prepare_cached("SELECT capacity, tasks, lease_ms FROM queues WHERE name = ?1")?
        .query_row([queue], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?
        .ok_or_else(|| Error::Usage(format!("queue {queue} was not declared")))
}

pub(super) fn entry(transaction: &Transaction<'_>, bucket: Bucket, key: &str) -> rusqlite::Result<Option<Entry>> {
    transaction
        .prepare_cached(
            "SELECT key, value, revision FROM entries WHERE bucket = ?1 AND key = ?2 AND (until IS NULL OR until > ?3)",
        )?
        .query_row(params![bucket.name(), key, now()], to_entry)
        .optional()
}

pub(super) fn entries(transaction: &Transaction<'_>, bucket: Bucket) -> rusqlite::Result<Vec<Entry>> {
    transaction
        .prepare_cached(
            "SELECT key, value, revision FROM entries WHERE bucket = ?1 AND (until IS NULL OR until > ?2) ORDER BY key",
        )?
        .query_map(params![bucket.name(), now()], to_entry)?
        .collect()
}

pub(super) fn to_entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let value: Vec<u8> = row.get(1)?;
    Ok(Entry { key: row.get(0)?, value: value.into(), revision: row.get::<_, i64>(2)?.unsigned_abs() })
}
