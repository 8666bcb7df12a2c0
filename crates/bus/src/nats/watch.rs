//! Watching a bucket: what there is, then every change, across lost connections.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use async_nats::jetstream::kv::{self, Operation, Store};
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::fault;
use crate::{Change, Entry, Result};

/// Every value of a bucket.
pub(super) async fn snapshot(store: &Store) -> Result<Vec<Entry>> {
    let what = || format!("listing {}", store.name);
    let info = store.stream.get_info().await.map_err(fault(what()))?;
    let mut latest = BTreeMap::new();
    if info.state.messages == 0 {
        return Ok(Vec::new());
    }
    let mut watch = store.watch_with_history(">").await.map_err(fault(what()))?;
    // The last message may have expired since: then nobody says "that was all", and silence must do.
    while let Ok(Some(entry)) = tokio::time::timeout(Duration::from_secs(1), watch.next()).await {
        let entry = entry.map_err(fault(what()))?;
        let last = entry.delta == 0;
        match entry.operation {
            Operation::Put => {
                let value = Entry { key: entry.key.clone(), value: entry.value, revision: entry.revision };
                latest.insert(entry.key, value);
            }
            Operation::Delete | Operation::Purge => drop(latest.remove(&entry.key)),
        }
        if last {
            break;
        }
    }
    Ok(latest.into_values().collect())
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
