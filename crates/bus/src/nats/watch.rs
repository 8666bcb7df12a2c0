//! Watching a bucket: what there is, then every change, across lost connections.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use async_nats::jetstream::{
    kv::{self, Operation, Store},
    stream::LastRawMessageErrorKind,
};
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::fault;
use crate::{Change, Entry, Error, Result};

/// A silence after which the server is asked whether that was all.
const SILENCE: Duration = Duration::from_secs(1);
/// Silences in a row, with more to come, after which a listing is given up.
const MOST_SILENCES: u32 = 10;

/// Every value of a bucket.
pub(super) async fn snapshot(store: &Store) -> Result<Vec<Entry>> {
    let what = || format!("listing {}", store.name);
    let broken = |how: &str| Error::Unavailable { what: format!("{}: {how}", what()), source: None };
    let info = store.stream.get_info().await.map_err(fault(what()))?;
    let mut latest = BTreeMap::new();
    if info.state.messages == 0 {
        return Ok(Vec::new());
    }
    let mut watch = store.watch_with_history(">").await.map_err(fault(what()))?;
    let (mut seen, mut silences) = (0, 0);
    loop {
        let Ok(next) = tokio::time::timeout(SILENCE, watch.next()).await else {
            // The last message may have expired since: then nobody says "that was all". Nor does a server that stalls.
            if !is_more(store, seen).await? {
                break;
            }
            silences += 1;
            if silences == MOST_SILENCES {
                return Err(broken("the server has more and does not send it"));
            }
            continue;
        };
        let entry = next.ok_or_else(|| broken("it ended before its end"))?.map_err(fault(what()))?;
        silences = 0;
        seen = entry.revision;
        let last = entry.delta == 0;
        match entry.operation {
            Operation::Put => {
                let value = Entry { key: entry.key.clone(), value: entry.value, revision: entry.revision };
                latest.insert(entry.key, value);
            }
            Operation::Delete | Operation::Purge => drop(latest.remove(&entry.key)),
        }
        // In a cluster, whoever sends may be behind the leader: what it takes for the last need not be.
        if last && (seen >= info.state.last_sequence || !is_more(store, seen).await?) {
            break;
        }
    }
    Ok(latest.into_values().collect())
}

/// Whether the bucket's leader has anything after a revision.
async fn is_more(store: &Store, revision: u64) -> Result<bool> {
    match store.stream.get_first_raw_message_by_subject(format!("{}>", store.prefix), revision + 1).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(false),
        Err(error) => Err(Error::unavailable(format!("asking whether {} has more", store.name), error)),
    }
}

/// A snapshot, and a watch that misses nothing after it.
pub(super) async fn begin_watch(store: &Store) -> Result<(Vec<Entry>, kv::Watch)> {
    let what = || format!("watching {}", store.name);
    let info = store.stream.get_info().await.map_err(fault(what()))?;
    let entries = snapshot(store).await?;
    let watch = store.watch_all_from_revision(info.state.last_sequence + 1).await.map_err(fault(what()))?;
    Ok((entries, watch))
}

/// Tells what there is and every change; starts anew, telling the difference, when the connection was lost.
pub(super) async fn watch(store: Store, first: (Vec<Entry>, kv::Watch), sender: mpsc::Sender<Change>) {
    let mut known: HashSet<String> = HashSet::new();
    let mut begun = Some(first);
    let mut told = false;
    loop {
        let (entries, mut changes) = match begun.take() {
            Some(begun) => begun,
            None => match begin_watch(&store).await {
                Ok(begun) => begun,
                Err(error) => {
                    tracing::warn!(%error, "cannot watch; trying again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if sender.is_closed() {
                        return;
                    }
                    continue;
                }
            },
        };
        let present: HashSet<String> = entries.iter().map(|entry| entry.key.clone()).collect();
        let gone: Vec<Change> = known.difference(&present).map(|key| Change::Gone { key: key.clone() }).collect();
        let mut told_now: Vec<Change> = entries.into_iter().map(Change::Put).chain(gone).collect();
        if !told {
            told_now.push(Change::Current);
            told = true;
        }
        for change in told_now {
            if sender.send(change).await.is_err() {
                return;
            }
        }
        known = present;
        loop {
            let entry = tokio::select! {
                entry = changes.next() => entry,
                () = sender.closed() => return,
            };
            let Some(Ok(entry)) = entry else {
                if let Some(Err(error)) = entry {
                    tracing::warn!(%error, bucket = store.name, "a watch broke off; starting it anew");
                }
                break;
            };
            let change = if entry.operation == Operation::Put {
                known.insert(entry.key.clone());
                Change::Put(Entry { key: entry.key, value: entry.value, revision: entry.revision })
            } else {
                known.remove(&entry.key);
                Change::Gone { key: entry.key }
            };
            if sender.send(change).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
