//! Pulling tasks, and leases on them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use efferent_proto::time::from_unix_ms;
use rusqlite::params;

use super::{
    Embedded, Inner,
    database::{after, now, queue_row},
};
use crate::{Delivery, Error, Lease, Result};

impl Embedded {
    /// Leases what can be delivered now; if nothing can, tells when something may.
    pub(super) async fn pull_now(&self, queue: &str, max: usize) -> Result<(Vec<Delivery>, Option<i64>)> {
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
